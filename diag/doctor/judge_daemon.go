package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/internal/cniconf"
)

func judgeDaemon(f Facts) findings {
	d := f.Daemon
	switch {
	case errors.Is(d.Err, fs.ErrPermission):
		return skipped("only root may query it")
	case d.Err != nil:
		return fail("the daemon does not answer: %v", d.Err).steps(f.Service.restart(), f.Service.log())
	case d.Holder != nil:
		return fail("%v, and no process answers at the socket: it has another --socket, or is starting or stopping",
			d.Holder).fix("ps -o pid,args -C overlayd")
	case !d.Running:
		return fail("overlayd does not run on this node; the data plane stays unchanged and follows no changes").
			steps(f.start(), f.Service.log())
	case !d.Status.Ready:
		return fail("running, but not ready: see its problems").fix("overlayd status")
	case d.PeersErr != nil:
		return warn("running, but does not list its peers: %v", d.PeersErr).fix("overlayd status --peers")
	}
	return ok("%s, version %s, ready", f.name(), d.Status.Version)
}

// start starts the daemon. One on a machine that is a clone would take the lease of the other.
func (f Facts) start() string {
	if f.NoLease != "" {
		return f.Service.start() + "   # only after own lease is resolved"
	}
	return f.Service.start()
}

// ifRunning is a command for a daemon that runs; one that does not is started.
func (f Facts) ifRunning(command string) string {
	if f.Daemon.Running {
		return command
	}
	return f.start()
}

func judgeProblems(f Facts) (out findings) {
	if !f.Daemon.Running {
		return nil
	}
	var starting []string
	for _, p := range f.Daemon.Status.Problems {
		if p.Code == status.Starting { // it follows from another problem
			starting = append(starting, p.Name)
			continue
		}
		m, reason := Warn, fmt.Sprintf("%s: %s, for %s", p.Name, p.Reason, f.Now.Sub(p.Since).Round(time.Second))
		if p.Fatal {
			m = Fail
		}
		out.add(finding(m, "%s", reason).fix("overlayd status"))
	}
	if len(starting) > 0 {
		out.add(fail("overlayd is starting: %s", strings.Join(starting, ", ")).fix("overlayd status"))
	}
	return out.orOK("none")
}

func judgeDrift(f Facts) findings {
	switch d := f.Daemon; {
	case !d.Running:
		return skipped("only the daemon knows the desired state")
	case d.DiffErr != nil:
		return skipped("the daemon does not answer: %v", d.DiffErr)
	case len(d.Diff) > 0:
		return warn("the kernel differs from the desired state; the daemon reverts that within a second unless the kernel "+
			"refuses it or another process undoes it: %s", few(d.Diff)).fix("overlayd diff")
	}
	if reverted := f.reverted(); len(reverted) > 0 {
		return warn("the kernel is in sync, but another process keeps changing it: %s", few(reverted)).
			steps(f.Service.wholeLog() + " | grep 'reverted external change' | tail -n 20")
	}
	return ok("the kernel is in sync")
}

// reverted is what the daemon reverts again and again, or did a moment ago.
func (f Facts) reverted() []string {
	const (
		moment = 2 * time.Minute
		many   = 20 // and more than one in an hour
	)
	s := f.Daemon.Status
	var out []string
	for _, d := range s.Drift {
		ago := s.Now.Sub(d.At)
		often := d.Count >= many && s.Now.Sub(s.Started) < time.Duration(d.Count)*time.Hour
		if d.Count > 0 && (often || ago <= moment) {
			out = append(out, fmt.Sprintf("%s %d times since the daemon started, the last %s ago (%s)",
				d.Kind, d.Count, ago.Round(time.Second), d.Last))
		}
	}
	return out
}

func judgeSettings(f Facts) (out findings) {
	switch {
	case f.EnvFileErr != nil && f.Privileges != nil && errors.Is(f.EnvFileErr, fs.ErrPermission):
		out.add(skipped("%v", f.EnvFileErr))
	case f.EnvFileErr != nil:
		out.add(fail("some settings cannot be read: %v", f.EnvFileErr))
	}
	for line := range strings.Lines(text(f.Wrong)) {
		out.add(fail("%s", strings.TrimSpace(line)))
	}
	if len(f.UnknownKeys) > 0 {
		out.add(warn("%s has unknown settings: %s", f.EnvFile, few(f.UnknownKeys)))
	}
	well := "all valid"
	if f.System.SubnetEnv["FLANNEL_IPMASQ"] == "false" {
		well += "; --ip-masq is off: pods reach external addresses only where a route leads back to the pod network"
	}
	if f.Daemon.Running && f.Daemon.Status.Ready && !f.Daemon.Status.Probe.On {
		well += "; --mesh-probe is off: the daemon does not notice when other nodes stop answering"
	}
	return out.orOK("%s", well)
}

func judgeIdentity(f Facts) findings {
	if f.IdentityErr != nil {
		out := fail("%v", f.IdentityErr)
		if f.System.MachineID == "" || f.System.MachineID == "uninitialized" {
			out.fix("systemd-machine-id-setup")
		}
		return out
	}
	reason := fmt.Sprintf("node %s, id %s", f.Identity.NodeName, f.Identity.NodeID)
	file := filepath.Join(f.StateDir, "lease.json")
	if id := f.Persisted.Node.NodeID; !f.Daemon.Running && id != "" && id != f.Identity.NodeID {
		return warn("%s, but %s is the persisted state of node %s, id %s: the next start ignores it", reason, file,
			f.Persisted.Node.NodeName, id)
	}
	return ok("%s", reason)
}

func judgeStateDir(f Facts) (out findings) {
	const little = 16 << 20 // bytes: some thousand leases and their temporary copy fit in
	for _, d := range f.System.Dirs {
		switch {
		case d.err != nil && f.Privileges == nil:
			out.add(fail("%s is not writable: %v", d.dir, d.err).fix("findmnt --target %s", d.dir))
		case d.err == nil && (d.bytes < little || d.files < 10):
			out.add(fail("%s is on a file system with %d MB and %d files left", d.dir, d.bytes>>20, d.files).
				steps("df -h "+d.dir, "df -i "+d.dir))
		}
	}
	if f.PersistedErr != nil {
		out.add(warn("the persisted state cannot be read, so the daemon cannot start while the store is unreachable: %v",
			f.PersistedErr))
	}
	return out.orOK("%s is writable", f.StateDir)
}

// judgeCNI says which configuration precedes overlayd's. In a pod, the node's directory is below /host.
func judgeCNI(f Facts) findings {
	switch {
	case f.CNIConf == "":
		return skipped("--cni-conf does not say which configuration is overlayd's")
	case f.CNIErr == nil:
		return ok("%s is the one that the container runtime uses", f.CNIConf)
	}
	out := fail("%v", f.CNIErr)
	if other := (*cniconf.Foreign)(nil); errors.As(f.CNIErr, &other) {
		file := strings.TrimPrefix(other.File, "/host")
		out.fix("mv %s %s.disabled   # unless the runtime is told to use another one", file, file)
	}
	return out
}

func judgeSubnetFile(f Facts) (out findings) {
	env, again := f.System.SubnetEnv, f.ifRunning(f.Service.restart())
	switch err := f.System.SubnetEnvErr; {
	case err != nil && f.Daemon.Running && !f.Daemon.Status.Ready:
		return fail("%s does not exist yet, so no pod can start: %v", f.SubnetFile, err).fix("overlayd status")
	case err != nil:
		return fail("%s cannot be read, so no pod can start: %v", f.SubnetFile, err).steps(again)
	case f.NoLease != "":
		return skipped("%s", f.NoLease)
	case !slices.ContainsFunc(f.families(), func(fam addr.Family) bool { return f.Self.Subnets.Get(fam).IsValid() }):
		return skipped("%s exists; this node's lease is unknown", f.SubnetFile)
	}
	for _, fam := range addr.Families() {
		key, own := envKey(fam, "SUBNET"), f.Self.Subnets.Get(fam)
		if own.IsValid() && parsePrefix(env[key]).Masked() != own {
			out.add(fail("%s says %s=%s, but the lease is %s", f.SubnetFile, key, env[key], own).steps(again))
		}
	}
	if mtu := f.Daemon.Status.Network.MTU; mtu > 0 && env["FLANNEL_MTU"] != fmt.Sprint(mtu) {
		out.add(fail("%s says FLANNEL_MTU=%s, but the pod MTU is %d", f.SubnetFile, env["FLANNEL_MTU"], mtu).steps(again))
	}
	return out.orOK("%s matches the lease", f.SubnetFile)
}
