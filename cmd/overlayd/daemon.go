package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/agent"
	"github.com/overlayd/overlayd/internal/owner"
	"github.com/overlayd/overlayd/masquerade"
	"github.com/overlayd/overlayd/masquerade/ipset"
	"github.com/overlayd/overlayd/netstate"
)

// lockName is the name that a daemon holds in its network namespace.
const lockName = "overlayd"

// lockPatience is how long a daemon that has just been killed may still hold the name.
const lockPatience = 3 * time.Second

// settled is how long after its start a daemon has what it works with.
const settled = 10 * time.Second

// settle gives back what only the start took: memory, and all processors but one. An idle node with 5,000 peers then
// takes a fifth to a third less, since its one loop wakes no idle processor. GOMAXPROCS in the environment wins.
func settle() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}
	debug.FreeOSMemory()
}

// garbage is the percentage of the memory in use that may be garbage: the node's memory is for pods, and a daemon that
// has started makes little. GOGC in the environment wins.
const garbage = 50

// daemon runs until ctx ends. All that an operator can have got wrong is found before anything is touched.
func daemon(ctx context.Context, f *flags) (err error) {
	if err := errors.Join(f.check(), f.checkStore(f.store.Kind)); err != nil {
		return err
	}
	if f.agent.Identity, err = f.identity(); err != nil {
		return err
	}
	f.store.Kube.Node, f.agent.Prefix = f.agent.Identity.NodeName, f.store.Network()
	if f.log, err = f.logger(); err != nil {
		return err
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(garbage)
	}
	logLibraries(f.log)
	store, err := newStore(f.store, f.log)
	if err != nil {
		return usageError{err}
	}
	defer store.Close()
	for _, e := range f.store.Exposed() {
		f.log.Warn("credentials exposed", zap.String("reason", e.Text))
	}
	if err := needPrivileges(); err != nil {
		return err
	}
	unlock, err := f.lockNode()
	if err != nil {
		return err
	}
	defer unlock()
	kernel, err := netstate.Open(agent.OwnsDevice)
	if err != nil {
		return err
	}
	defer kernel.Close()
	kernel.SysctlDir, kernel.WireGuardProgram = f.sysctlDir, f.wireGuardProgram
	parts := agent.Parts{
		Store: store, Kernel: kernel, Log: f.log, LogLevel: f.logLevel,
		About: agent.About{
			Version: version, Store: f.store.Status(), Traffic: store, Restart: newRestart(f.logLevel).changes,
		},
	}
	parts.About.Store.Endpoints = store.Endpoints()
	if s, ok := store.(interface {
		SetReady(ready bool, reason string)
	}); ok {
		parts.Ready = s.SetReady
	}
	if err := f.wire(ctx, &parts); err != nil {
		return err
	}
	defer time.AfterFunc(settled, settle).Stop()
	err = agent.New(f.agent, parts).Run(ctx)
	if ctx.Err() != nil {
		f.log.Info("overlayd stopping; the data plane stays unchanged")
		return nil
	}
	return err
}

// lockNode keeps other daemons off the node: those that run at the same time, and those of another installation also
// while this one's is being restarted.
func (f *flags) lockNode() (unlock func(), err error) {
	dir, own := f.agent.StateDir, f.agent.Owner
	if unlock, err = agent.Lock(lockName, lockPatience); err != nil {
		if other, _, _ := owner.Read(dir, time.Now()); other != "" && other != own {
			err = fmt.Errorf("%w, of the installation %s", err, other)
		}
		return nil, err
	}
	if own == "" {
		return unlock, nil
	}
	before, err := owner.Check(dir, own, f.takeOver, time.Now())
	if errors.As(err, new(*owner.Error)) {
		unlock()
		return nil, err
	}
	if err = errors.Join(err, owner.Write(dir, own)); err != nil {
		f.log.Warn("cannot write which installation owns this node", zap.Error(err)) // the lock works without it
	} else if before != "" && before != own {
		f.log.Warn("took over this node", zap.String("from", before), zap.String("owner", own))
	}
	return unlock, nil
}

// wire adds what the agent is asked by and notified of.
func (f *flags) wire(ctx context.Context, p *agent.Parts) (err error) {
	if p.Health, err = f.listenHealth(); err != nil {
		return err
	}
	if p.Control, err = listenControl(f.socket); err != nil {
		return err
	}
	if err := servePprof(ctx, f.pprof); err != nil {
		return err
	}
	if len(f.unknown) > 0 {
		f.log.Warn("unknown environment variables", zap.Strings("variables", f.unknown))
	}
	f.log.Info("overlayd starting", zap.String("version", version),
		zap.String("node", f.agent.Identity.NodeName), zap.String("id", f.agent.Identity.NodeID),
		zap.String("store", string(f.store.Kind)), zap.Strings("endpoints", p.About.Store.Endpoints),
		zap.String("network", f.agent.Prefix))
	if p.Notify, p.Watchdog, err = systemd(f.log); err != nil {
		return err
	}
	// What cannot be watched is compared periodically.
	if p.FirewallChanges, err = masquerade.Watch(ctx); err != nil {
		f.log.Warn("no firewall notifications; comparing only every --iptables-resync", zap.Error(err))
	}
	if p.SubnetFile, err = agent.WatchFile(f.agent.SubnetFile); err != nil {
		f.log.Warn("cannot watch the subnet file; comparing it periodically", zap.Error(err))
	}
	if f.agent.CNIConf != "" {
		if p.CNIConf, err = agent.WatchDir(filepath.Dir(f.agent.CNIConf)); err != nil {
			f.log.Warn("cannot watch the CNI configurations; comparing them periodically", zap.Error(err))
		}
	}
	f.wireFirewall(p)
	return nil
}

// wireFirewall has the agent choose the firewall when it runs, as this starts processes, and report what was chosen.
func (f *flags) wireFirewall(p *agent.Parts) {
	f.firewall.Sets = ipset.New()
	var chosen atomic.Pointer[masquerade.Decision]
	p.Firewall = func(ctx context.Context) masquerade.Driver {
		driver, d := masquerade.New(ctx, f.firewall)
		chosen.Store(&d)
		variant := zap.Skip()
		if d.Variant != masquerade.VariantDefault {
			variant = zap.String("iptables_variant", string(d.Variant))
		}
		f.log.Info("firewall chosen", zap.String("firewall", string(d.Kind)), variant, zap.String("reason", d.Reason))
		return driver
	}
	p.About.Firewall = func() (kind, reason string) {
		if d := chosen.Load(); d != nil {
			return strings.TrimSuffix(fmt.Sprintf("%s-%s", d.Kind, d.Variant), "-"), d.Reason
		}
		return "", "not chosen yet"
	}
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

// systemd returns how it is notified, and how often it expects to be; nil where it does not run the daemon. Processes
// that the daemon starts inherit NOTIFY_SOCKET, which each notification reads again; the unit has systemd ignore them
// (NotifyAccess=main).
func systemd(log *zap.Logger) (notify func(state string), watchdog time.Duration, err error) {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return nil, 0, nil
	}
	notify = func(state string) {
		if _, err := sd.SdNotify(false, state); err != nil {
			log.Warn("cannot notify systemd", zap.Error(err))
		}
	}
	watchdog, err = sd.SdWatchdogEnabled(true)
	return notify, watchdog, err
}
