package lab_test

import (
	"context"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/lab"
	"github.com/overlayd/overlayd/test/labtest"
	"github.com/overlayd/overlayd/test/nstest"
)

// settle is short in these tests: nothing that a test has broken mends itself.
const settle = 500 * time.Millisecond

func check(t *testing.T, l *lab.Lab) lab.Report {
	t.Helper()
	r, err := l.Check(t.Context(), settle)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func run(t *testing.T, m lab.Machine, line string) {
	t.Helper()
	if _, err := m.Run(t.Context(), "sh", "-c", line); err != nil {
		t.Fatal(err)
	}
}

// wantOnly holds every failure against a description of the one fault that was made.
func wantOnly(t *testing.T, r lab.Report, fault string, caused func(lab.Outcome) bool) {
	t.Helper()
	if r.Failed == 0 {
		t.Errorf("%s: not noticed", fault)
	}
	for _, o := range r.Failures {
		if !caused(o) {
			t.Errorf("%s: unexpected: %s", fault, o)
		}
	}
}

// The check must be green on a sound network, and must name the cells that each fault breaks and no others. The faults
// are those that are easily overlooked: traffic flows, but not as it should.
func TestCheckFindsFaults(t *testing.T) {
	t.Parallel()
	l := labtest.Up(t, lab.Options{Nodes: 3, Pods: 1, Stack: lab.StackDual, Overlayd: standInPath(t)})
	if r := check(t, l); r.Failed > 0 || r.Checks == 0 {
		t.Fatalf("the sound network:\n%s", r.Text())
	}
	n1, n2 := l.Node(1), l.Node(2)

	// With ports that n1 itself never takes: the kernel remembers these connections for a while, and would move n1's own
	// out of their way.
	run(t, n1.Machine, `nft add table ip bad && nft add chain ip bad p '{ type nat hook postrouting priority 50; }' &&
		nft add rule ip bad p ip saddr 10.244.0.2 ip daddr 10.244.1.2 meta l4proto tcp masquerade to :1024-2047`)
	wantOnly(t, check(t, l), "source NAT between pods", func(o lab.Outcome) bool {
		return o.Check == lab.CheckTCP && o.From == "n1-p1" && o.To == "n2-p1" && o.Family == addr.IPv4 &&
			strings.Contains(o.Err, "saw the client as 10.244.0.0:")
	})
	run(t, n1.Machine, "nft delete table ip bad")

	run(t, n1.Machine, "nft flush table ip t")
	wantOnly(t, check(t, l), "no masquerade", func(o lab.Outcome) bool {
		return o.Check == lab.CheckInternet && o.From == "n1-p1" && o.Family == addr.IPv4
	})
	run(t, n1.Machine, "nft add rule ip t p ip saddr 10.244.0.0/16 ip daddr != '{ 10.244.0.0/16, 172.31.0.0/16 }' masquerade")

	// Without the way back through the tunnel, IPv6 answers cross the underlay bare, which has to drop them.
	run(t, n1.Machine, "ip -6 route flush table 77")
	spoofed := check(t, l)
	if !slices.ContainsFunc(spoofed.Failures, func(o lab.Outcome) bool {
		return o.Check == lab.CheckPing && o.From == "n1-p1" && o.To == "n2"
	}) {
		t.Errorf("a pod's bare packet crossed the router:\n%s", spoofed.Text())
	}
	wantOnly(t, spoofed, "spoofed IPv6 on the underlay", func(o lab.Outcome) bool {
		pair := o.From + o.To
		return o.Family == addr.IPv6 && strings.Contains(pair, "n1-p1") && !strings.Contains(pair, "internet")
	})
	run(t, n1.Machine, "ip -6 route add fd31:0:0:2::12 via fd00:10:244:1:: dev overlay-v6.1 onlink table 77")
	run(t, n1.Machine, "ip -6 route add fd31:0:0:1::13 via fd00:10:244:2:: dev overlay-v6.1 onlink table 77")

	run(t, n2.Machine, "ip link set overlay.1 mtu 1400")
	wantOnly(t, check(t, l), "a small MTU", func(o lab.Outcome) bool {
		return o.Check == lab.CheckMTU && o.Family == addr.IPv4
	})
}

// The same network, but the wish is DirectRouting: all traffic flows, in a way that was not asked for.
func TestCheckFindsTheWrongPath(t *testing.T) {
	t.Parallel()
	l := labtest.Up(t, lab.Options{Nodes: 3, Pods: 1, Direct: true, Stack: lab.StackDual, Overlayd: standInPath(t)})
	wantOnly(t, check(t, l), "tunnel within a segment", func(o lab.Outcome) bool {
		return o.Check == lab.CheckPath && o.Path == "tunnel" && o.Err == "went tunnel instead of direct" &&
			!strings.Contains(o.From+o.To, "n2")
	})
}

// What fault tests do to nodes and to etcd.
func TestHandles(t *testing.T) {
	t.Parallel()
	l := labtest.Up(t, lab.Options{Nodes: 2, Pods: 1, Stack: lab.StackDual, Overlayd: standInPath(t)})
	ctx := t.Context()
	n1, etcd := l.Node(1), l.Etcd()

	from, err := l.PodEndpoint(1, 1)
	if err != nil {
		t.Fatal(err)
	}
	ping := func() error {
		_, err := from.Ping(ctx, lab.Ping{To: l.Node(2).Addr(addr.IPv6), Wait: 300 * time.Millisecond})
		return err
	}
	flow := func(step string, want bool) {
		t.Helper()
		err := ping()
		for end := time.Now().Add(15 * time.Second); err != nil && want && time.Now().Before(end); {
			err = ping()
		}
		if (err == nil) != want {
			t.Errorf("%s: ping answers %v, want an answer: %v", step, err, want)
		}
	}
	must := func(step string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", step, err)
		}
	}
	flow("up", true)
	must("unplug", n1.Unplug())
	flow("unplugged", false)
	must("plug", n1.Plug())
	flow("plugged", true)

	must("kill", n1.Kill(ctx))
	if n1.Running() || n1.Ready(ctx) == nil {
		t.Error("the daemon still runs after SIGKILL")
	}
	must("kill what is dead", n1.Kill(ctx))

	_, err = etcd.Run(ctx, "etcdctl", "put", "/kept", "yes")
	must("put", err)
	must("stop etcd", etcd.Stop(ctx))
	must("start etcd", etcd.Start())
	must("etcd ready", etcd.WaitReady(ctx))
	out, err := etcd.Run(ctx, "etcdctl", "get", "/kept")
	must("get", err)
	if !strings.Contains(out, "yes") {
		t.Errorf("etcd lost its data over a restart: %q", out)
	}
	must("pause etcd", etcd.Pause())
	if _, err := etcd.Get(ctx, etcd.URLs()[0]+"/health"); err == nil || !etcd.Running() {
		t.Errorf("paused etcd answers, or has ended: %v", err)
	}
	must("resume etcd", etcd.Resume())
	must("etcd ready", etcd.WaitReady(ctx))

	// Another process finds the lab again by its name.
	again, err := lab.Open(l.Topology().Options.Name)
	must("open", err)
	if again.Etcd().PID() != etcd.PID() || again.Status(ctx).Nodes[1].Lease == nil {
		t.Errorf("found again: %+v", again.Status(ctx))
	}
}

func TestUpSaysWhyANodeDoesNotStart(t *testing.T) {
	t.Parallel()
	nstest.NeedRoot(t)
	path := standInPath(t)
	if err := os.WriteFile(path, []byte("#!/bin/sh\necho no luck today\nexit 2\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	name := labtest.Name()
	t.Cleanup(func() { _ = lab.Down(context.Background(), name) })
	_, err := lab.Up(t.Context(), lab.Options{Name: name, Nodes: 1, Overlayd: path})
	if err == nil || !strings.Contains(err.Error(), "no luck today") {
		t.Errorf("got: %v", err)
	}
	if err := lab.Down(t.Context(), name); err != nil {
		t.Error(err)
	}
}
