package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/agent"
	"github.com/overlayd/overlayd/backend/vxlan"
	"github.com/overlayd/overlayd/masquerade"
	"github.com/overlayd/overlayd/masquerade/ipset"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet/etcd"
)

// lockName is the name that a daemon holds in its network namespace.
const lockName = "overlayd"

// lockPatience is how long a daemon that has just been killed may still hold the name.
const lockPatience = 3 * time.Second

// settled is when a daemon has what it works with.
const settled = 10 * time.Second

// settle gives back what only the start took: memory, and all processors but one. One loop has little to do from now on, and what wakes up
// now and then is cheaper where nobody has to be woken beside it: an idle node with 5,000 peers takes a fifth to a third less. Whoever sets
// GOMAXPROCS decides by himself.
func settle() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}
	debug.FreeOSMemory()
}

// garbage is how much garbage there may be for each 100 bytes in use: the node's memory is for pods, and a daemon that has started makes
// little. Whoever sets GOGC decides by himself.
const garbage = 50

// daemon runs until ctx ends. All that an operator can have got wrong is found before anything is touched.
func daemon(ctx context.Context, f flags) error {
	opts, err := f.agentOptions()
	if err != nil {
		return err
	}
	storeOpts, err := f.storeOptions()
	if err != nil {
		return err
	}
	fw, err := f.firewallOptions()
	if err != nil {
		return err
	}
	health, err := f.healthAddress()
	if err != nil {
		return err
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(garbage)
	}
	log, level, err := f.logger()
	if err != nil {
		return err
	}
	logGRPC(log)
	store, err := etcd.New(storeOpts, log)
	if err != nil {
		return usageError{err}
	}
	defer store.Close()
	if err := needPrivileges(); err != nil {
		return err
	}
	unlock, err := agent.Lock(lockName, lockPatience)
	if err != nil {
		return err
	}
	defer unlock()
	listener, err := listen(health)
	if err != nil {
		return err
	}
	control, err := listenControl(f.socket)
	if err != nil {
		return err
	}
	if err := servePprof(ctx, f.pprof); err != nil {
		return err
	}
	kernel, err := netstate.Open(vxlan.Owns)
	if err != nil {
		return err
	}
	defer kernel.Close()
	kernel.SysctlDir = f.sysctlDir

	if len(f.unknown) > 0 {
		log.Warn("unknown environment variables", zap.Strings("variables", f.unknown))
	}
	log.Info("overlayd starting", zap.String("version", version), zap.String("node", opts.Identity.NodeName), zap.String("id", opts.Identity.NodeID),
		zap.Strings("etcd", storeOpts.Endpoints), zap.String("prefix", storeOpts.Prefix))
	fw.Sets = ipset.New()
	changes, err := masquerade.Watch(ctx)
	if err != nil {
		log.Warn("no firewall notifications; comparing only every --iptables-resync", zap.Error(err))
	}
	subnetFile, err := agent.WatchFile(opts.SubnetFile)
	if err != nil {
		log.Warn("cannot watch the subnet file; comparing it periodically", zap.Error(err))
	}
	var chosen atomic.Pointer[masquerade.Decision]
	choose := func(ctx context.Context) masquerade.Driver {
		driver, d := masquerade.New(ctx, fw)
		chosen.Store(&d)
		log.Info("firewall chosen", zap.String("firewall", string(d.Kind)), zap.String("iptables_variant", string(d.Variant)), zap.String("reason", d.Reason))
		return driver
	}
	notify, watchdog, err := systemd(log)
	if err != nil {
		return err
	}
	defer time.AfterFunc(settled, settle).Stop()
	err = agent.New(opts, agent.Parts{
		Store: store, Kernel: kernel, Health: listener, Control: control, Notify: notify, Watchdog: watchdog, Log: log, LogLevel: level, SubnetFile: subnetFile, Firewall: choose, FirewallChanges: changes,
		About: agent.About{
			Version: version, Endpoints: storeOpts.Endpoints, Prefix: storeOpts.Prefix, Traffic: store, Restart: newRestart(level).changes,
			Firewall: func() (kind, reason string) {
				if d := chosen.Load(); d != nil {
					return strings.TrimSuffix(fmt.Sprintf("%s-%s", d.Kind, d.Variant), "-"), d.Reason
				}
				return "", "not chosen yet"
			},
		},
	}).Run(ctx)
	if ctx.Err() != nil {
		log.Info("overlayd stopping; the data plane stays unchanged")
		return nil
	}
	return err
}

// needPrivileges says in one line what the kernel would say in many.
func needPrivileges() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("reading this process's capabilities: %w", err)
	}
	for _, c := range []struct {
		bit  uint
		name string
	}{{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"}, {unix.CAP_NET_RAW, "CAP_NET_RAW"}} {
		if data[c.bit/32].Effective&(1<<(c.bit%32)) == 0 {
			return fmt.Errorf("%s is missing: run overlayd as root, or give it CAP_NET_ADMIN and CAP_NET_RAW", c.name)
		}
	}
	return nil
}

// systemd returns how it is notified, and how often it wants to be; nil where it does not run the daemon.
func systemd(log *zap.Logger) (notify func(state string), watchdog time.Duration, err error) {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return nil, 0, nil
	}
	notify = func(state string) {
		if _, err := sd.SdNotify(false, state); err != nil {
			log.Warn("cannot notify systemd", zap.Error(err))
		}
	}
	watchdog, err = sd.SdWatchdogEnabled(false)
	return notify, watchdog, err
}
