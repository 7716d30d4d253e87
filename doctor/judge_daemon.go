package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/status"
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
		return skipped("only root may ask it")
	case d.Err != nil:
		return fail("the daemon does not answer: "+d.Err.Error(), f.Service.restart(), f.Service.log())
	case d.Holder != nil:
		return fail(d.Holder.Error()+", and nobody answers at the socket: it has another --socket, or is about to start or end", "ps -o pid,args -C overlayd")
	case !d.Running:
		return fail("overlayd does not run on this node; what it made before stays as it is, and follows no change", f.start(), f.Service.log())
	case !d.Status.Ready:
		return fail("it runs, and is not ready: see its problems", "overlayd status")
	case d.PeersErr != nil:
		return warn("it runs, but does not say who the other nodes are: "+d.PeersErr.Error(), "overlayd status --peers")
	}
	return ok(fmt.Sprintf("%s, version %s, ready", f.name(), d.Status.Version))
}

// start starts the daemon. One on a machine that is a clone would take the lease of the other.
func (f Facts) start() string {
	if f.NoLease != "" {
		return f.Service.start() + "   # not before own lease is clear, see there"
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
		x := Finding{Mark: Warn, Reason: fmt.Sprintf("the daemon says: %s: %s, for %s", p.Name, p.Reason, f.Now.Sub(p.Since).Round(time.Second))}
		if see := checkFor(p.Name); see != "" {
			x.Reason += "; see " + see
		}
		if p.Fatal {
			x.Mark = Fail
		}
		x.Mend = []string{"overlayd status"}
		out = append(out, x)
	}
	if len(later) > 0 { // what waits for the rest is not the cause
		out = append(out, fail(fmt.Sprintf("the daemon says: not there yet, overlayd is starting: %s", strings.Join(later, ", ")), "overlayd status")...)
	}
	return orOK(out, "the daemon has none")
}

// checkFor is the check that looks at the same thing as a problem of the daemon.
func checkFor(problem string) string {
	return map[string]string{
		"underlay": "interface", "config": "network config", "config-keys": "network config", "etcd-inside": "network config",
		"lease": "leases", "claim": "own lease and leases", "etcd": "etcd", "offline": "etcd",
		"kernel": "drift and tunnel device", "firewall": "iptables variants and kernel", "subnet-file": "subnet file", "node-set": "kernel", "state-dir": "state directory",
		"unreachable": "peers", "settings": "forwarding", "subnet-moved": "bridge", "pod-bridge": "bridge",
		"foreign-route": "routes", "plan": "MTU and policy routing", "refused-lease": "leases",
	}[problem]
}

func judgeDrift(f Facts) []Finding {
	switch d := f.Daemon; {
	case !d.Running:
		return skipped("only the daemon knows what it has planned")
	case d.DiffErr != nil:
		return skipped("the daemon does not say: " + d.DiffErr.Error())
	case len(d.Diff) > 0:
		return warn(fmt.Sprintf("the kernel is not as planned, which the daemon puts right within a second unless something refuses or undoes it: %s", few(d.Diff)), "overlayd diff")
	}
	if repairs := f.repairs(); repairs != "" {
		return warn("the kernel is as planned, but somebody else changes it: "+repairs, f.Service.logOf("repaired what somebody else changed"))
	}
	return ok("the kernel is as planned")
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
		out = append(out, fail("the settings can't all be read: "+f.EnvFileErr.Error())...)
	}
	if f.Wrong != nil {
		for line := range strings.Lines(f.Wrong.Error()) {
			out = append(out, fail(strings.TrimSpace(line))...)
		}
	}
	if len(f.UnknownKeys) > 0 {
		out = append(out, warn(fmt.Sprintf("%s has settings that overlayd does not know: %s", f.EnvFile, few(f.UnknownKeys)))...)
	}
	var off []string
	if f.System.SubnetEnv["FLANNEL_IPMASQ"] == "false" {
		off = append(off, "--ip-masq is off: pods reach what is outside of the pod network only where there is a way back to their own addresses")
	}
	if f.Daemon.Running && f.Daemon.Status.Ready && !f.Daemon.Status.Probe.On {
		off = append(off, "--mesh-probe is off: the daemon does not notice when other nodes stop answering")
	}
	return orOK(out, strings.Join(append([]string{"every one makes sense"}, off...), "; "))
}

func judgeIdentity(f Facts) []Finding {
	if f.IdentityErr != nil {
		mend := []string{}
		if !f.System.HasMachineID || f.System.MachineID == "" || f.System.MachineID == "uninitialized" {
			mend = []string{"systemd-machine-id-setup"}
		}
		return fail(f.IdentityErr.Error(), mend...)
	}
	reason := fmt.Sprintf("node %s, id %s", f.Identity.NodeName, f.Identity.NodeID)
	if f.IdentityFromMemory {
		return ok(fmt.Sprintf("%s, by %s; started without --node-name and --node-id, the daemon would take the host name and /etc/machine-id, which say otherwise", reason, filepath.Join(f.StateDir, "lease.json")))
	}
	if !f.Daemon.Running && f.Memory != nil && f.Memory.Node.NodeID != f.Identity.NodeID {
		return warn(fmt.Sprintf("%s, but %s is the memory of node %s, id %s: it is left aside at the next start", reason,
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
		out = append(out, warn("what the daemon remembers can't be read, so that it can't start while etcd is away: "+f.MemoryErr.Error())...)
	}
	if f.System.StateDirErr != nil && f.Privileges == nil {
		out = append(out, fail(fmt.Sprintf("%s can't be written to: %v", f.StateDir, f.System.StateDirErr), "findmnt --target "+f.StateDir)...)
	}
	return orOK(out, f.StateDir+" can be written to")
}

func judgeSubnetFile(f Facts) []Finding {
	s := f.System
	if s.SubnetEnvErr != nil {
		if f.Daemon.Running && !f.Daemon.Status.Ready {
			return fail(fmt.Sprintf("%s is not there yet, so that no pod can start: %v", f.SubnetFile, s.SubnetEnvErr), "overlayd status")
		}
		again := f.Service.restart()
		if !f.Daemon.Running {
			again = f.start()
		}
		return fail(fmt.Sprintf("%s can't be read, and no pod can start without it: %v", f.SubnetFile, s.SubnetEnvErr), again)
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
			out = append(out, fail(fmt.Sprintf("%s says %s=%s, the lease is %s", f.SubnetFile, key, s.SubnetEnv[key], own), f.Service.restart())...)
		}
	}
	if want := f.Daemon.Status.Network.MTU; want > 0 && s.SubnetEnv["FLANNEL_MTU"] != fmt.Sprint(want) {
		out = append(out, fail(fmt.Sprintf("%s says FLANNEL_MTU=%s, pods should be told %d", f.SubnetFile, s.SubnetEnv["FLANNEL_MTU"], want), f.Service.restart())...)
	}
	if len(out) == 0 && f.Self.Subnets.V4 == f.Self.Subnets.V6 {
		return skipped(f.SubnetFile + " is there; this node's lease is not known")
	}
	return orOK(out, f.SubnetFile+" says what the lease says")
}
