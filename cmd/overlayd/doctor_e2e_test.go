package main_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/lab"
	"github.com/overlayd/overlayd/test/labtest"
	"github.com/overlayd/overlayd/test/nstest"
)

// doctorReport is what `overlayd doctor -o json` prints.
type doctorReport struct {
	Findings []doctorFinding
	Took     time.Duration `json:"tookNanoseconds"`
	Fixed    []struct{ What, Error string }
}

type doctorFinding struct {
	Check, Mark, Reason string
	Fix                 []string
}

func (r doctorReport) with(marks ...string) []doctorFinding {
	return slices.DeleteFunc(
		slices.Clone(r.Findings),
		func(f doctorFinding) bool { return !slices.Contains(marks, f.Mark) },
	)
}

// patience bounds what a test waits for, on a machine that does other things as well.
const patience = time.Minute

// patient is the node that the doctor examines.
type patient struct {
	t        *testing.T
	lab      *lab.Lab
	node     *lab.Node
	overlayd string
	etcd     lab.Machine
	where    []string // instead of what the node's own daemon is told
}

func (p patient) sh(script string) {
	p.t.Helper()
	if out, err := p.node.Run(p.t.Context(), "sh", "-ec", script); err != nil {
		p.t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

func (p patient) etcdctl(args ...string) string {
	p.t.Helper()
	out, err := p.etcd.Run(p.t.Context(), "etcdctl", append([]string{"--endpoints", p.lab.Etcd().URLs()[0]}, args...)...)
	if err != nil {
		p.t.Fatalf("etcdctl %s: %v\n%s", args, err, out)
	}
	return out
}

func (p patient) args(more ...string) []string {
	if p.where != nil {
		return append(append([]string{"doctor", "--env-file", "/none"}, p.where...), more...)
	}
	return append([]string{
		"doctor",
		"--env-file",
		"/none",
		"--socket",
		p.node.Socket(),
		"--state-dir",
		p.node.StateDir(),
		"--subnet-file",
		p.node.SubnetFile(),
		"--node-name",
		p.node.Name,
		"--node-id",
		p.node.Spec().ID,
		"--etcd-endpoints",
		strings.Join(p.lab.Etcd().URLs(), ","),
	}, more...)
}

// examine runs the doctor; its exit status must be that of what it found.
func (p patient) examine(more ...string) doctorReport {
	p.t.Helper()
	out, err := p.node.Run(p.t.Context(), p.overlayd, p.args(append([]string{"-o", "json"}, more...)...)...)
	exit := (*exec.ExitError)(nil)
	if err != nil && !errors.As(err, &exit) {
		p.t.Fatal(err)
	}
	var r doctorReport
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		p.t.Fatalf("%v\n%s", err, out)
	}
	if (exit != nil) != (len(r.with("fail")) > 0) || exit != nil && exit.ExitCode() != 1 {
		p.t.Errorf("exit %v with these failures: %+v", err, r.with("fail"))
	}
	return r
}

// bounded holds the doctor to an end of its own: what does not answer would take minutes.
func (p patient) bounded(when string) {
	p.t.Helper()
	began := time.Now()
	r := p.examine()
	p.t.Logf("%s: %s", when, r.Took)
	if took := time.Since(began); took > 20*time.Second {
		p.t.Errorf("%s: the doctor took %s", when, took)
	}
}

// finds waits until a check has a mark and says a text: some of what is broken takes the daemon a moment to notice.
func (p patient) finds(check, mark, text string, more ...string) doctorFinding {
	p.t.Helper()
	var r doctorReport
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		r = p.examine(more...)
		for _, f := range r.Findings {
			if f.Check == check && f.Mark == mark && strings.Contains(f.Reason, text) {
				if (mark == "fail" || mark == "warn") && len(f.Fix) == 0 {
					p.t.Errorf("%s: nothing fixes %q", check, f.Reason)
				}
				return f
			}
		}
		if time.Now().After(end) {
			break
		}
	}
	for _, f := range r.with("fail", "warn") {
		p.t.Logf("%s %s: %s", f.Mark, f.Check, f.Reason)
	}
	p.t.Fatalf("no %s of %s with %q", mark, check, text)
	return doctorFinding{}
}

// well waits until nothing is wrong any more, but for some checks that are.
func (p patient) well(but ...string) {
	p.t.Helper()
	var r doctorReport
	wrong := func() []doctorFinding {
		return slices.DeleteFunc(r.with("fail", "warn"), func(f doctorFinding) bool { return slices.Contains(but, f.Check) })
	}
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if r = p.examine(); len(wrong()) == 0 {
			return
		}
	}
	p.t.Errorf("it does not get well: %+v", wrong())
}

// harmless makes sure that no command is offered that acts on what is another node's.
func (p patient) harmless() {
	p.t.Helper()
	for _, f := range p.examine().Findings {
		for _, m := range f.Fix {
			for _, harm := range []string{"ip link set overlay.1 address", "ip link delete", "rm -rf", " del "} {
				if strings.Contains(m, harm) {
					p.t.Errorf("%s %s: %s: %s", f.Mark, f.Check, f.Reason, m)
				}
			}
		}
	}
}

// The doctor finds nothing on a node that is well, and names the cause of each thing that is broken.
func TestDoctor(t *testing.T) {
	t.Parallel()
	overlayd := labtest.BuildOverlayd(t)
	l := labtest.Up(t, lab.Options{Overlayd: overlayd, Pods: 1})
	etcd, err := l.Machine("etcd")
	if err != nil {
		t.Fatal(err)
	}
	p := patient{t: t, lab: l, node: l.Node(1), overlayd: overlayd, etcd: etcd}
	p.finds("peers answer", "ok", "2 of 2 pinged") // they come a moment later
	p.well()
	if out, err := p.node.Run(t.Context(), overlayd, p.args()...); err != nil {
		t.Fatal(err)
	} else {
		t.Log("\n" + out)
	}
	own, err := p.node.Lease()
	if err != nil {
		t.Fatal(err)
	}

	t.Run("nft drops the port", func(t *testing.T) {
		p := p.in(t)
		p.sh(
			`nft add table inet site; nft add chain inet site in '{ type filter hook input priority 0; policy accept; }'; ` +
				`nft add rule inet site in udp dport 8472 drop`,
		)
		f := p.finds("tunnel in the firewall", "fail", "udp dport 8472 drop")
		p.sh(f.Fix[0])
		p.well()
		p.sh(`nft delete table inet site`)
	})
	t.Run("nft drops by default", func(t *testing.T) {
		p := p.in(t)
		p.sh(`nft -f - <<EOF
table inet site {
	set open { type inet_service; flags interval; elements = { 22, 2379-2380, 8000-8100 } }
	chain in {
		type filter hook input priority 0; policy drop;
		iifname { "lo", "overlay.1", "cni0" } accept
		ct state vmap { established : accept, related : accept, invalid : drop }
		meta l4proto { icmp, ipv6-icmp } accept
		tcp dport @open accept
	}
}
EOF`)
		f := p.finds("tunnel in the firewall", "fail", "its policy")
		p.sh(f.Fix[0])
		p.well()
		p.sh(`nft delete table inet site`)
	})
	t.Run("iptables drops what is forwarded", func(t *testing.T) {
		p := p.in(t)
		p.sh(`iptables -t mangle -A FORWARD -s 10.244.0.0/16 -m conntrack --ctstate NEW -j DROP`)
		p.finds("forwarded packets", "fail", "table ip mangle, chain FORWARD")
		p.sh(`iptables -t mangle -F FORWARD`)
		p.well()
	})
	t.Run("black hole", func(t *testing.T) {
		p := p.in(t)
		// A switch throws away what is too large for one of its ports, and sends no ICMP error.
		sw, err := p.lab.Machine("seg2")
		if err != nil {
			t.Fatal(err)
		}
		if out, err := sw.Run(t.Context(), "ip", "link", "set", "n2", "mtu", "1400"); err != nil {
			t.Fatal(err, out)
		}
		f := p.finds("full-size packets", "fail", "is 1354, so the path MTU is 1404") // a bridge leaves room for a VLAN's tag
		if out, err := p.etcd.Run(t.Context(), "sh", "-ec", f.Fix[0]); err != nil ||
			!strings.Contains(f.Fix[0], `"MTU":1404`) {
			t.Errorf("%s: %v\n%s", f.Fix[0], err, out)
		}
		p.finds("full-size packets", "ok", "1354 bytes get through")
		if out, err := sw.Run(t.Context(), "ip", "link", "set", "n2", "mtu", "1500"); err != nil {
			t.Fatal(err, out)
		}
		p.etcdctl("put", "/overlayd/network/config", `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}`)
		p.well()
	})
	t.Run("leases that contradict each other", func(t *testing.T) {
		p := p.in(t)
		value := `{"PublicIP":%q,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:07"},` +
			`"NodeName":%q,"NodeID":%q}`
		key := "/overlayd/network/subnets/10.244.255.0-24"
		p.etcdctl("put", key, fmt.Sprintf(value, p.lab.Node(2).Addr(addr.IPv4), "other", "some-id"))
		f := p.finds("leases", "fail", "10.244.255.0-24 of other: its public IP 172.31.2.12 is that of n2")
		if !strings.Contains(f.Fix[0], key) {
			t.Errorf("%+v", f)
		}
		p.etcdctl("put", key, fmt.Sprintf(value, "172.31.1.77", "twin", p.lab.Node(2).Spec().ID))
		p.finds("leases", "fail", "one is a clone of the other")
		p.etcdctl("del", key)
		p.well()
	})
	t.Run("config", func(t *testing.T) {
		p := p.in(t)
		p.etcdctl("put", "/overlayd/network/config", `{"Network":"10.244.0.0/16","Backend":{"Type":"pigeon"}}`)
		f := p.finds("network config", "fail", `expected "vxlan", "host-gw" or "wireguard", found "pigeon"`)
		if out, err := p.etcd.Run(t.Context(), "sh", "-ec", f.Fix[0]); err != nil || !strings.Contains(f.Fix[0], "put") {
			t.Errorf("%s: %v\n%s", f.Fix[0], err, out)
		}
		p.well()
		p.etcdctl("put", "/overlayd/network/config", `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"},"Bakend":1}`)
		p.finds("network config", "warn", "Bakend")
		p.etcdctl("put", "/overlayd/network/config", `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}`)
		p.well()
	})
	t.Run("learning and NAT", func(t *testing.T) {
		p := p.in(t)
		p.etcdctl("put", "/overlayd/network/config", `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","Learning":true}}`)
		p.finds("learning", "ok", "it is on")
		const key = "/overlayd/network/subnets/10.244.255.0-24"
		p.etcdctl("put", key,
			`{"PublicIP":"172.31.2.77","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:07"},`+
				`"NodeName":"natted","NodeID":"some-id"}`)
		f := p.finds("learning", "fail", "has the address that they announce (NAT): natted (10.244.255.0-24)")
		p.etcdctl("del", key)
		if out, err := p.etcd.Run(t.Context(), "sh", "-ec", f.Fix[0]); err != nil {
			t.Errorf("%s: %v\n%s", f.Fix[0], err, out)
		}
		p.finds("learning", "ok", "does not learn")
		p.well()
	})
	t.Run("a node that answers no pings", func(t *testing.T) {
		p := p.in(t)
		p.sh("echo 1 > /proc/sys/net/ipv4/icmp_echo_ignore_all")
		p.sh(p.finds("pings", "warn", "net/ipv4/icmp_echo_ignore_all is 1").Fix[0])
		if out, err := p.lab.Node(2).
			Run(t.Context(), "sh", "-c", "echo 1 > /proc/sys/net/ipv4/icmp_echo_ignore_all"); err != nil {
			t.Fatal(err, out)
		}
		p.finds("peers answer", "ok", "ignores pings (is net/ipv4/icmp_echo_ignore_all 1 there?)")
		if out, err := p.lab.Node(2).
			Run(t.Context(), "sh", "-c", "echo 0 > /proc/sys/net/ipv4/icmp_echo_ignore_all"); err != nil {
			t.Fatal(err, out)
		}
		p.well()
	})
	t.Run("wrong prefix", func(t *testing.T) {
		p := p.in(t)
		p.finds("network config", "fail", "etcd has nothing under /wrong/network/", "--etcd-prefix", "/wrong/network")
	})
	t.Run("bridge with another address", func(t *testing.T) {
		p := p.in(t)
		p.sh("ip link add docker7 type bridge; ip address add 10.244.250.1/24 dev docker7; ip link set docker7 up")
		p.finds(
			"bridge",
			"fail",
			"docker7 has the address 10.244.250.1/24, but this node's subnet is "+own.Subnets[0].String(),
		)
		p.sh("ip link delete docker7")
		p.well()
	})
	t.Run("a pod with a larger MTU", func(t *testing.T) {
		p := p.in(t)
		p.sh("ip link set cni0 mtu 1450; ip link set veth-p1 mtu 1500")
		p.finds("MTU", "warn", "veth-p1 1500")
		p.sh("ip link set veth-p1 mtu 1450")
		p.well()
	})
	t.Run("another overlay", func(t *testing.T) {
		p := p.in(t)
		p.sh("ip link add flannel.9 type vxlan id 9 dstport 8473 local 172.31.1.11")
		p.finds("other overlays", "warn", "flannel.9")
		p.sh("ip link delete flannel.9")
		p.well()
	})
	t.Run("what flannel leaves", func(t *testing.T) {
		p := p.in(t)
		for _, tool := range []string{"iptables", "ip6tables", "iptables-legacy"} {
			p.sh(strings.ReplaceAll(
				`TOOL -t nat -N FLANNEL-POSTRTG; TOOL -t nat -A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
				TOOL -t nat -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
				TOOL -t nat -A FLANNEL-POSTRTG -j MASQUERADE --random-fully
				TOOL -N FLANNEL-FWD; TOOL -I FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
				TOOL -A FLANNEL-FWD -m comment --comment "flanneld forward" -j ACCEPT`, "TOOL", tool))
		}
		p.sh(`for f in ip ip6; do t=flannel-ipv4; [ $f = ip ] || t=flannel-ipv6; nft -f - <<EOF
			table $f $t { chain postrtg { type nat hook postrouting priority srcnat; masquerade; }
				chain forward { type filter hook forward priority filter; accept; }; }
EOF
			done; ip route add 10.244.0.0/24 via 172.31.1.12`)
		p.finds("routes", "warn", "10.244.0.0/24 via 172.31.1.12 by eth0 belongs to another program")
		f := p.finds("other overlays", "warn", "flannel's rules exist")
		if len(f.Fix) != 8 {
			t.Errorf("commands for %d leftovers, want 8: %q", len(f.Fix), f.Fix)
		}
		for _, command := range append(f.Fix, p.finds("routes", "warn", "10.244.0.0/24").Fix...) {
			p.sh(command)
		}
		p.sh(
			`! { iptables-save; ip6tables-save; iptables-legacy-save; nft list tables; ip route; } | ` +
				`grep -E 'FLANNEL|flannel|10\.244\.0\.0/24'`)
		p.sh("iptables-legacy -t nat -F; iptables-legacy -F")
		p.well()
	})
	t.Run("foreign route", func(t *testing.T) {
		p := p.in(t)
		other, err := p.lab.Node(2).Lease()
		if err != nil {
			t.Fatal(err)
		}
		p.sh("ip route add blackhole " + other.Subnets[0].String())
		f := p.finds("routes", "fail", "belongs to another program")
		p.sh(f.Fix[0])
		p.well()
	})
	t.Run("rules of another program", func(t *testing.T) {
		p := p.in(t)
		p.sh("ip route add 10.0.0.0/8 via 172.31.1.1 table 52; ip rule add pref 5270 lookup 52")
		p.finds("policy routing", "ok", "take overlayd's routes")
		p.well()
		p.sh("ip rule del pref 5270; ip rule add pref 0 lookup 52") // nothing can come before that
		p.finds("policy routing", "fail",
			`leave by eth0 (table 52), not by overlay.1: the rule "0 from all lookup 52" of another program matches them`)
		p.finds("policy routing", "fail", " are not sent (invalid argument)")
		p.finds("problems", "warn", "give that one a higher number, for ")
		p.sh("ip rule del pref 0 lookup 52; ip route flush table 52")
		p.well()
	})
	t.Run("rp_filter", func(t *testing.T) {
		p := p.in(t)
		// One that is not notified of a change goes on to send through the tunnel.
		stop(t, p.lab.Node(3))
		p.etcdctl(
			"put",
			"/overlayd/network/config",
			`{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}`,
		)
		p.finds("rp_filter", "warn", "strict on overlay.1") // as all of the lab's devices are
		if r := p.examine("--fix"); len(r.Fixed) != 1 || r.Fixed[0].Error != "" {
			t.Errorf("--fix: %+v", r.Fixed)
		}
		p.well("peers answer", "problems") // the third is as strict itself
		p.etcdctl("put", "/overlayd/network/config", `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}`)
		if err := p.lab.Node(3).Start(); err != nil {
			t.Fatal(err)
		}
		p.well()
	})
	t.Run("etcd stopped", func(t *testing.T) {
		p := p.in(t)
		if err := p.lab.Etcd().Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
		p.finds("store", "fail", "connection refused")
		p.bounded("without etcd")
		p.finds("peers answer", "ok", "all answer")
		if err := p.lab.Etcd().Start(); err != nil {
			t.Fatal(err)
		}
		p.well()
	})

	t.Run("etcd silent", func(t *testing.T) {
		p := p.in(t)
		if err := p.lab.Etcd().Pause(); err != nil {
			t.Fatal(err)
		}
		p.finds("store", "fail", "no answer from")
		p.bounded("without an answer of etcd")
		if err := p.lab.Etcd().Resume(); err != nil {
			t.Fatal(err)
		}
		p.well()
	})
	t.Run("both iptables", func(t *testing.T) {
		p := p.in(t)
		p.sh("iptables-legacy -w 20 -A INPUT -p udp --dport 8472 -j DROP; iptables-nft -A INPUT -p tcp --dport 25 -j DROP")
		p.finds("iptables variants", "warn", "iptables-legacy has 1 rules and iptables-nft 1")
		f := p.finds(
			"iptables-legacy",
			"warn",
			"-A INPUT -p udp -m udp --dport 8472 -j DROP (iptables-legacy-save -t filter)",
		)
		p.sh(f.Fix[0] + " | grep -e '--dport 8472 -j DROP'")
		p.finds("tunnel in the firewall", "ok", "is open by nf_tables; see iptables-legacy")
		p.sh("iptables-legacy -w 20 -F; iptables-nft -D INPUT -p tcp --dport 25 -j DROP")
		p.well()
	})
	t.Run("daemon hangs", func(t *testing.T) {
		p := p.in(t)
		if err := p.node.Pause(); err != nil {
			t.Fatal(err)
		}
		p.finds("daemon", "fail", "does not answer")
		p.finds("peers answer", "ok", "2 of 2 pinged")
		if err := p.lab.Etcd().Pause(); err != nil { // the slowest case
			t.Fatal(err)
		}
		p.bounded("with neither daemon nor etcd")
		if err := p.lab.Etcd().Resume(); err != nil {
			t.Fatal(err)
		}
		if err := p.node.Resume(); err != nil {
			t.Fatal(err)
		}
		p.well()
		p.finds("daemon", "fail", "another overlayd is running on this node: process", "--socket", "/none")
	})

	t.Run("clone", func(t *testing.T) {
		p := p.in(t)
		third := p.lab.Node(3)
		theirs, err := third.Lease()
		if err != nil {
			t.Fatal(err)
		}
		stop(t, third)
		dir := t.TempDir()
		at := func(name string) string { return filepath.Join(dir, name) }
		// The first node's name and ID, on the third one's machine.
		told := []string{
			"--node-name",
			p.node.Name,
			"--node-id",
			p.node.Spec().ID,
			"--state-dir",
			dir,
			"--subnet-file",
			at("subnet.env"),
			"--socket",
			at("socket"),
			"--etcd-endpoints",
			strings.Join(p.lab.Etcd().URLs(), ","),
		}
		clone := p
		clone.node, clone.where = third, told
		clone.finds("own lease", "fail", "or another machine has the same name and ID")
		clone.finds("tunnel device", "skipped", "which no device of this node has")
		clone.finds("bridge", "skipped", "which no device of this node has")
		clone.harmless()

		daemon := exec.Command(p.overlayd, append(slices.Clone(told), "--healthz-port", "0")...)
		if err := third.Do(daemon.Start); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- daemon.Wait() }()
		end := sync.OnceFunc(func() {
			_ = daemon.Process.Signal(unix.SIGTERM)
			<-ended
		})
		defer end()
		// the third node's lease is still there, and that node is off
		clone.finds("leases", "fail", "its public IP 172.31.1.13 is")

		p.etcdctl("del", "/overlayd/network/subnets/"+strings.ReplaceAll(theirs.Subnets[0].String(), "/", "-"))
		f := p.finds("own lease", "fail", "has taken the lease over, and is at 172.31.1.13")
		if !strings.Contains(f.Fix[1], "systemd-machine-id-setup") {
			t.Errorf("%q", f.Fix)
		}
		p.harmless()
		end()
		stop(t, p.node)
		for _, n := range []*lab.Node{p.node, third} {
			if err := n.Start(); err != nil {
				t.Fatal(err)
			}
			if err := n.WaitReady(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		p.well()
	})
	t.Run("no default route", func(t *testing.T) {
		p := p.in(t)
		gone, err := p.node.Run(t.Context(), "ip", "route", "show", "default")
		if err != nil || gone == "" {
			t.Fatalf("%q: %v", gone, err)
		}
		p.sh("ip route del default")
		if f := p.finds(
			"interface",
			"fail",
			"eth0, used so far",
		); !strings.Contains(
			f.Fix[0],
			"ip route add default via GATEWAY dev eth0",
		) {
			t.Errorf("%q", f.Fix)
		}
		p.sh("ip route add " + gone)
		p.well()
	})
	t.Run("bridge without its address", func(t *testing.T) {
		p := p.in(t)
		p.sh("ip address flush dev cni0")
		f := p.finds("bridge", "fail", "has lost its address")
		p.sh(f.Fix[0])
		p.well()
	})
	t.Run("another masquerade", func(t *testing.T) {
		p := p.in(t)
		p.sh(
			"nft 'add table ip foreign; add chain ip foreign c { type nat hook postrouting priority 90; }; " +
				"add rule ip foreign c ip saddr 10.0.0.0/8 masquerade'",
		)
		f := p.finds("masqueraded packets", "warn", `"ip saddr 10.0.0.0/8 masquerade"`)
		p.sh(f.Fix[0])
		p.sh("nft delete table ip foreign")
		p.well()
	})

	t.Run("daemon stopped", func(t *testing.T) {
		p := p.in(t)
		stop(t, p.node)
		p.finds("daemon", "fail", "does not run")
		p.finds("peers answer", "ok", "2 of 2 pinged")
		p.sh("sysctl -qw net.ipv4.ip_forward=0")
		p.finds("forwarding", "fail", "net/ipv4/ip_forward is 0")
		if r := p.examine(
			"--fix",
		); len(r.Fixed) != 1 || !strings.Contains(r.Fixed[0].What, "ip_forward") ||
			r.Fixed[0].Error != "" {
			t.Errorf("--fix: %+v", r.Fixed)
		}
		p.well("daemon")
		p.sh("ip link set overlay.1 mtu 1300")
		f := p.finds("MTU", "fail", "overlay.1 has an MTU of 1300, expected 1450")
		p.sh(f.Fix[0])
		p.sh("iptables -P FORWARD DROP; iptables -F FORWARD")
		p.finds("forwarded packets", "fail", "its policy")
		p.sh("iptables -P FORWARD ACCEPT")
		p.sh(
			"ip link delete overlay.1; ip link add thief type vxlan id 1 dstport 8472 local 172.31.1.11 dev eth0; " +
				"ip link set thief up",
		)
		p.finds("tunnel port", "fail", "thief has VNI 1 on UDP port 8472")
		p.finds("tunnel device", "fail", "overlay.1 does not exist")
		p.finds("routes", "fail", "the routes to 2 peers are missing")
		p.sh("ip link delete thief")
		var socket *net.UDPConn
		if err := p.node.Do(func() (err error) {
			socket, err = net.ListenUDP("udp4", &net.UDPAddr{Port: 8472})
			return err
		}); err != nil {
			t.Fatal(err)
		}
		p.finds("tunnel port", "fail", "UDP port 8472 is taken by another program")
		p.sh("ip link add overlay.1 type vxlan id 1 dstport 8472 local 172.31.1.11 dev eth0")
		p.finds("tunnel port", "fail", "UDP port 8472 is taken by another program")
		p.finds("tunnel device", "fail", "cannot be set up while another program has its UDP port")
		_ = socket.Close()
		if err := p.node.Start(); err != nil {
			t.Fatal(err)
		}
		if err := p.node.WaitReady(t.Context()); err != nil {
			t.Fatal(err)
		}
		p.well()
	})
}

// in is the patient of a part of a test.
func (p patient) in(t *testing.T) patient {
	p.t = t
	return p
}

// With 5,000 peers, all of them and their routes are checked.
func TestDoctorWithManyPeers(t *testing.T) {
	t.Parallel()
	const peers = 5000
	overlayd := labtest.BuildOverlayd(t)
	l := labtest.Up(t, lab.Options{Overlayd: overlayd, Pods: 1, Nodes: 1})
	etcd, err := l.Machine("etcd")
	if err != nil {
		t.Fatal(err)
	}
	p := patient{t: t, lab: l, node: l.Node(1), overlayd: overlayd, etcd: etcd}
	cli, err := l.EtcdClient()
	if err != nil {
		t.Fatal(err)
	}
	defer cli.Close()
	// A network with room for them, in which the node takes another subnet.
	p.etcdctl("put", "/overlayd/network/config", `{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}`)
	lease, err := cli.Grant(t.Context(), 3600)
	if err != nil {
		t.Fatal(err)
	}
	for i := range peers {
		key := fmt.Sprintf("/overlayd/network/subnets/10.%d.%d.0-24", 1+i/200, i%200)
		value := fmt.Sprintf(
			`{"PublicIP":"172.31.%d.%d","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:01:%02x:%02x"},`+
				`"NodeName":"p%d","NodeID":"id-%d","PublicIPLocal":true}`,
			110+i/250,
			2+i%250,
			i/256,
			i%256,
			i,
			i,
		)
		if _, err := cli.Put(t.Context(), key, value, clientv3.WithLease(lease.ID)); err != nil {
			t.Fatal(err)
		}
	}
	p.finds("peers", "ok", fmt.Sprintf("%d, as listed by", peers))
	p.finds("routes", "ok", fmt.Sprint(2*peers))
	r := p.examine()
	t.Logf("all took %s", r.Took)
}

// On nodes of all kinds that are well, nothing is found, with and without the daemon; the settings come from the
// daemon's own file.
func TestDoctorFindsNothing(t *testing.T) {
	t.Parallel()
	overlayd := labtest.BuildOverlayd(t)
	for _, o := range []lab.Options{
		{Backend: lab.VXLAN, Stack: lab.StackDual, Direct: true},
		{Backend: lab.HostGW},
		{Backend: lab.VXLAN, Stack: lab.StackIPv6, Secure: true},
	} {
		o.Overlayd, o.Pods = overlayd, 1
		t.Run(fmt.Sprintf("%s %s direct=%v secure=%v", o.Backend, o.Stack, o.Direct, o.Secure), func(t *testing.T) {
			t.Parallel()
			l := labtest.Up(t, o)
			n := l.Node(1)
			file := filepath.Join(t.TempDir(), "overlayd.env")
			var env strings.Builder
			argv := n.Argv()[1:]
			for i := 0; i+1 < len(argv); i += 2 {
				fmt.Fprintf(
					&env,
					"OVERLAYD_%s=%q\n",
					strings.ToUpper(strings.ReplaceAll(strings.TrimPrefix(argv[i], "--"), "-", "_")),
					argv[i+1],
				)
			}
			if err := os.WriteFile(file, []byte(env.String()), 0o600); err != nil {
				t.Fatal(err)
			}
			var out string
			var err error
			// Each peer is pinged in each family.
			all := map[bool]string{true: "4 of 4 pinged", false: "2 of 2 pinged"}[o.Stack == lab.StackDual]
			prints := func(want string) {
				t.Helper()
				for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
					out, err = n.Run(t.Context(), overlayd, "doctor", "--env-file", file)
					if strings.Contains(out, want) && strings.Contains(out, all) {
						return
					}
				}
				t.Errorf("no %q: %v\n%s", want, err, out)
			}
			prints("\n0 fail, 0 warn")
			if o.Secure && !strings.Contains(out, "certificates            the first one expires at") {
				t.Errorf("nothing of certificates:\n%s", out)
			}
			stop(t, n)
			prints("\n1 fail, 0 warn") // the daemon
			if strings.Contains(out, "password") {
				t.Errorf("a secret may be shown:\n%s", out)
			}
		})
	}
}

// Flags come before the environment, that before the file; what is wrong with any is a finding, and no secret is shown.
func TestDoctorSettings(t *testing.T) {
	t.Parallel()
	overlayd := labtest.BuildOverlayd(t)
	file := filepath.Join(t.TempDir(), "overlayd.env")
	content := "OVERLAYD_NODE_NAME=of-file\nOVERLAYD_NODE_ID=of-file\nOVERLAYD_ETCD_PREFIX=/of/file\n" +
		"OVERLAYD_IP_MASQ=perhaps\nOVERLAYD_IFACES=eth7\nexport X=1\n" +
		"OVERLAYD_ETCD_USERNAME=u\nOVERLAYD_ETCD_PASSWORD=s3cret\nOVERLAYD_ETCD_ENDPOINTS=http://127.0.0.1:1\n"
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(
		t.Context(),
		overlayd,
		"doctor",
		"--env-file",
		file,
		"--state-dir",
		t.TempDir(),
		"--socket",
		"/none",
		"--node-id",
		"of-flag",
		"-o",
		"json",
	)
	cmd.Env = append(os.Environ(), "OVERLAYD_NODE_NAME=of-environment", "OVERLAYD_NODE_ID=of-environment")
	var out []byte
	var err error
	nstest.New(t).Do(func() { out, err = cmd.CombinedOutput() })
	if cmd.ProcessState.ExitCode() != 1 {
		t.Fatalf("%v\n%s", err, out)
	}
	var r doctorReport
	if err := json.Unmarshal(out, &r); err != nil || strings.Contains(string(out), "s3cret") {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []doctorFinding{
		{Check: "identity", Mark: "ok", Reason: "node of-environment, id of-flag"},
		{Check: "settings", Mark: "fail", Reason: "line 6 is not NAME=value"},
		{Check: "settings", Mark: "fail", Reason: `OVERLAYD_IP_MASQ: "perhaps" is not valid`},
		{Check: "settings", Mark: "warn", Reason: "OVERLAYD_IFACES"},
		{Check: "store", Mark: "fail", Reason: "connection refused by http://127.0.0.1:1"},
	} {
		if !slices.ContainsFunc(r.Findings, func(f doctorFinding) bool {
			return f.Check == want.Check && f.Mark == want.Mark && strings.Contains(f.Reason, want.Reason)
		}) {
			t.Errorf("no %+v in\n%s", want, out)
		}
	}
	for _, args := range [][]string{{"doctor", "-o", "xml"}, {"doctor", "nonsense"}, {"doctor", "--no-such-flag"}} {
		cmd := exec.CommandContext(t.Context(), overlayd, args...)
		if out, err := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 2 {
			t.Errorf("%s: %v\n%s", args, err, out)
		}
	}
}
