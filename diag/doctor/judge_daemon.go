package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/diag/status"
)

// few shortens a list for a line.
func few(names []string) string {
	const most = 5
	if rest := len(names) - most; rest > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), rest)
	}
	return strings.Join(names, ", ")
}

func daemonChecks() []check {
	return []check{
		{"daemon", judgeDaemon},
		{"problems", judgeProblems},
		{"drift", judgeDrift},
		{"settings", judgeSettings},
		{"identity", judgeIdentity},
		{"state directory", judgeStateDir},
		{"subnet file", judgeSubnetFile},
	}
}

func judgeDaemon(f Facts) []Finding {
	d := f.Daemon
	switch {
	case errors.Is(d.Err, fs.ErrPermission):
		return skipped("only root may query it")
	case d.Err != nil:
		return fail("the daemon does not answer: "+d.Err.Error(), f.Service.restart(), f.Service.log())
	case d.Holder != nil:
		return fail(d.Holder.Error()+", and no process answers at the socket: it has another --socket, or is starting or stopping", "ps -o pid,args -C overlayd")
	case !d.Running:
		return fail("overlayd does not run on this node; the data plane stays unchanged and follows no changes", f.start(), f.Service.log())
	case !d.Status.Ready:
		return fail("running, but not ready: see its problems", "overlayd status")
	case d.PeersErr != nil:
		return warn("running, but does not list its peers: "+d.PeersErr.Error(), "overlayd status --peers")
	}
	return ok(fmt.Sprintf("%s, version %s, ready", f.name(), d.Status.Version))
}

// start starts the daemon. One on a machine that is a clone would take the lease of the other.
func (f Facts) start() string {
	if f.NoLease != "" {
		return f.Service.start() + "   # only after own lease is resolved"
	}
	return f.Service.start()
}

func judgeProblems(f Facts) []Finding {
	if !f.Daemon.Running {
		return nil
	}
	var out []Finding
	var later []string
	for _, p := range f.Daemon.Status.Problems {
		if p.Code == status.Starting {
			later = append(later, p.Name)
			continue
		}
		x := Finding{Mark: Warn, Reason: fmt.Sprintf("%s: %s, for %s", p.Name, p.Reason, f.Now.Sub(p.Since).Round(time.Second))}
		if see := checkFor(p.Name); see != "" {
			x.Reason += "; see " + see
		}
		if p.Fatal {
			x.Mark = Fail
		}
		x.Fix = []string{"overlayd status"}
		out = append(out, x)
	}
	if len(later) > 0 { // what waits for the rest is not the cause
		out = append(out, fail(fmt.Sprintf("overlayd is starting: %s", strings.Join(later, ", ")), "overlayd status")...)
	}
	return orOK(out, "none")
}

// checkFor is the check that looks at the same thing as a problem of the daemon.
func checkFor(problem string) string {
	return map[string]string{
		"underlay": "interface", "config": "network config", "config-keys": "network config", "etcd-inside": "network config",
		"lease": "leases", "claim": "own lease and leases", "etcd": "etcd", "offline": "etcd",
		"kernel": "drift and tunnel device", "firewall": "iptables variants and kernel", "subnet-file": "subnet file", "node-set": "kernel", "state-dir": "state directory",
		"unreachable": "peers", "settings": "forwarding", "subnet-moved": "bridge", "pod-bridge": "bridge",
		"foreign-route": "routes", "plan": "MTU and policy routing", "rejected-lease": "leases",
	}[problem]
}

func judgeDrift(f Facts) []Finding {
	switch d := f.Daemon; {
	case !d.Running:
		return skipped("only the daemon knows the desired state")
	case d.DiffErr != nil:
		return skipped("the daemon does not answer: " + d.DiffErr.Error())
	case len(d.Diff) > 0:
		return warn(fmt.Sprintf("the kernel differs from the desired state; the daemon reverts that within a second unless the kernel refuses it or another process undoes it: %s", few(d.Diff)), "overlayd diff")
	}
	if repairs := f.repairs(); repairs != "" {
		return warn("the kernel is in sync, but another process keeps changing it: "+repairs, f.Service.logOf("reverted external change"))
	}
	return ok("the kernel is in sync")
}

// repairs says what the daemon puts right again and again, or did a moment ago; "" is nothing.
func (f Facts) repairs() string {
	const (
		moment = 2 * time.Minute
		many   = 20 // and more than one in an hour
	)
	var out []string
	up := f.Daemon.Status.Now.Sub(f.Daemon.Status.Started)
	for _, d := range f.Daemon.Status.Drift {
		ago := f.Daemon.Status.Now.Sub(d.At)
		often := d.Count >= many && up < time.Duration(d.Count)*time.Hour
		if d.Count == 0 || !often && ago > moment {
			continue
		}
		text := fmt.Sprintf("%s %d times since the daemon started", d.Kind, d.Count)
		if !d.At.IsZero() {
			text += fmt.Sprintf(", the last %s ago", ago.Round(time.Second))
		}
		out = append(out, fmt.Sprintf("%s (%s)", text, d.Last))
	}
	return few(out)
}

func judgeSettings(f Facts) []Finding {
	var out []Finding
	switch {
	case f.EnvFileErr != nil && f.Privileges != nil && errors.Is(f.EnvFileErr, fs.ErrPermission):
		out = append(out, skipped(f.EnvFileErr.Error())...)
	case f.EnvFileErr != nil:
		out = append(out, fail("some settings cannot be read: "+f.EnvFileErr.Error())...)
	}
	if f.Wrong != nil {
		for line := range strings.Lines(f.Wrong.Error()) {
			out = append(out, fail(strings.TrimSpace(line))...)
		}
	}
	if len(f.UnknownKeys) > 0 {
		out = append(out, warn(fmt.Sprintf("%s has unknown settings: %s", f.EnvFile, few(f.UnknownKeys)))...)
	}
	var off []string
	if f.System.SubnetEnv["FLANNEL_IPMASQ"] == "false" {
		off = append(off, "--ip-masq is off: pods reach external addresses only where a route leads back to the pod network")
	}
	if f.Daemon.Running && f.Daemon.Status.Ready && !f.Daemon.Status.Probe.On {
		off = append(off, "--mesh-probe is off: the daemon does not notice when other nodes stop answering")
	}
	return orOK(out, strings.Join(append([]string{"all valid"}, off...), "; "))
}

func judgeIdentity(f Facts) []Finding {
	if f.IdentityErr != nil {
		steps := []string{}
		if !f.System.HasMachineID || f.System.MachineID == "" || f.System.MachineID == "uninitialized" {
			steps = []string{"systemd-machine-id-setup"}
		}
		return fail(f.IdentityErr.Error(), steps...)
	}
	reason := fmt.Sprintf("node %s, id %s", f.Identity.NodeName, f.Identity.NodeID)
	if f.IdentityFromMemory {
		return ok(fmt.Sprintf("%s, from %s; without --node-name and --node-id, the daemon would use the host name and /etc/machine-id, which differ", reason, filepath.Join(f.StateDir, "lease.json")))
	}
	if !f.Daemon.Running && f.Memory != nil && f.Memory.Node.NodeID != f.Identity.NodeID {
		return warn(fmt.Sprintf("%s, but %s is the persisted state of node %s, id %s: the next start ignores it", reason,
			filepath.Join(f.StateDir, "lease.json"), f.Memory.Node.NodeName, f.Memory.Node.NodeID))
	}
	return ok(reason)
}

func judgeStateDir(f Facts) []Finding {
	const little = 16 << 20 // bytes: some thousand leases and their temporary copy fit in
	var out []Finding
	for _, dir := range []string{f.StateDir, filepath.Dir(f.SubnetFile)} {
		free, files, readOnly, err := freeSpace(dir)
		switch {
		case err != nil:
			out = append(out, warn(fmt.Sprintf("%s: %v", dir, err))...)
		case readOnly:
			out = append(out, fail(dir+" is on a file system that is mounted read-only", "findmnt --target "+dir)...)
		case free < little || files < 10:
			out = append(out, fail(fmt.Sprintf("%s is on a file system with %d MB and %d files left", dir, free>>20, files), "df -h "+dir, "df -i "+dir)...)
		}
	}
	if f.MemoryErr != nil {
		out = append(out, warn("the persisted state cannot be read, so the daemon cannot start while etcd is unreachable: "+f.MemoryErr.Error())...)
	}
	if f.System.StateDirErr != nil && f.Privileges == nil {
		out = append(out, fail(fmt.Sprintf("%s is not writable: %v", f.StateDir, f.System.StateDirErr), "findmnt --target "+f.StateDir)...)
	}
	return orOK(out, f.StateDir+" is writable")
}

func judgeSubnetFile(f Facts) []Finding {
	s := f.System
	if s.SubnetEnvErr != nil {
		if f.Daemon.Running && !f.Daemon.Status.Ready {
			return fail(fmt.Sprintf("%s does not exist yet, so no pod can start: %v", f.SubnetFile, s.SubnetEnvErr), "overlayd status")
		}
		again := f.Service.restart()
		if !f.Daemon.Running {
			again = f.start()
		}
		return fail(fmt.Sprintf("%s cannot be read, so no pod can start: %v", f.SubnetFile, s.SubnetEnvErr), again)
	}
	if f.NoLease != "" {
		return skipped(f.NoLease)
	}
	var out []Finding
	for _, fam := range addr.Families() {
		own := f.Self.Subnets.Get(fam)
		if !own.IsValid() {
			continue
		}
		key := map[addr.Family]string{addr.IPv4: "FLANNEL_SUBNET", addr.IPv6: "FLANNEL_IPV6_SUBNET"}[fam]
		if got := parsePrefix(s.SubnetEnv[key]); !got.IsValid() || got.Masked() != own {
			out = append(out, fail(fmt.Sprintf("%s says %s=%s, but the lease is %s", f.SubnetFile, key, s.SubnetEnv[key], own), f.Service.restart())...)
		}
	}
	if want := f.Daemon.Status.Network.MTU; want > 0 && s.SubnetEnv["FLANNEL_MTU"] != fmt.Sprint(want) {
		out = append(out, fail(fmt.Sprintf("%s says FLANNEL_MTU=%s, but the pod MTU is %d", f.SubnetFile, s.SubnetEnv["FLANNEL_MTU"], want), f.Service.restart())...)
	}
	if len(out) == 0 && f.Self.Subnets.V4 == f.Self.Subnets.V6 {
		return skipped(f.SubnetFile + " exists; this node's lease is unknown")
	}
	return orOK(out, f.SubnetFile+" matches the lease")
}
