package probe

import (
	"context"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/internal/ping"
	"github.com/overlayd/overlayd/test/nstest"
)

var (
	peer4 = netip.MustParseAddr("192.0.2.2")
	peer6 = netip.MustParseAddr("2001:db8::2")
)

// A peer that ignores pings refuses datagrams to a closed port: it is not silent, and what is too large for the way is
// found too.
func TestPeerIgnoresPings(t *testing.T) {
	t.Parallel()
	node, middle, peer := nstest.Switched(t)
	peer.Exec("sysctl", "-qw", "net.ipv4.icmp_echo_ignore_all=1", "net.ipv6.icmp.echo_ignore_all=1")
	knock := func(size int) (out []ping.Outcome) {
		var err error
		node.Do(func() { out, err = ping.Once(t.Context(), []netip.Addr{peer4, peer6}, size, 3, 2*time.Second, true) })
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for _, size := range []int{SmallSize, 1500} {
		for _, o := range knock(size) {
			if o.Lost != 0 || o.RTT <= 0 || o.RTT > time.Second || o.Err != nil {
				t.Errorf("%d bytes: %+v", size, o)
			}
		}
	}
	silent := false
	var m *Mesh
	m = NewMesh(func() { silent = silent || m.Trouble(1).Silent.Count > 0 })
	m.Resize(1500)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go node.Do(func() { ended <- m.Run(ctx) })
	m.Change(nil, []Target{
		{netip.MustParsePrefix("10.1.0.0/24"), "p", peer4},
		{netip.MustParsePrefix("fd00::/64"), "p", peer6},
	})
	wait := func(what string, ok func(status.Probe) bool) {
		t.Helper()
		for end := time.Now().Add(60 * time.Second); !ok(m.Summary()); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: %+v", what, m.Summary())
			}
		}
	}
	wait("both answer", func(p status.Probe) bool {
		return p.Lossy+p.Answer == 2 && p.MedianRTT > 0 && p.MedianRTT < time.Second
	})
	middle.Exec("ip", "link", "set", "dev", "p2", "mtu", "1400")
	wait("a hole in the middle", func(p status.Probe) bool { return p.SmallOnly == 2 })
	cancel()
	if <-ended; silent {
		t.Error("it was said to be silent")
	}
}

func TestMesh(t *testing.T) {
	t.Parallel()
	node, middle, peer := nstest.Switched(t)
	var mu sync.Mutex
	notified := 0
	m := NewMesh(func() { mu.Lock(); defer mu.Unlock(); notified++ })
	m.Resize(1500)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go node.Do(func() { ended <- m.Run(ctx) })
	defer func() { cancel(); <-ended }()
	p4, p6 := netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("fd00::/64")
	m.Change(nil, []Target{{p4, "p", peer4}, {p6, "p", peer6}})
	wait := func(what string, ok func(status.Probe) bool) {
		t.Helper()
		for end := time.Now().Add(40 * time.Second); !ok(m.Summary()); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: %+v", what, m.Summary())
			}
		}
	}
	wait("both answer", func(p status.Probe) bool { return p.Answer == 2 && p.MedianRTT > 0 })
	if p := m.Summary(); p.Lost != 0 {
		t.Errorf("at first: %+v", p)
	}
	middle.Exec("ip", "link", "set", "dev", "p2", "mtu", "1400")
	wait("a hole in the middle", func(p status.Probe) bool { return p.SmallOnly == 2 })
	if x := m.Trouble(
		1,
	); x.Targets != 2 || x.Silent.Count != 0 || x.SmallOnly.Count != 2 || len(x.SmallOnly.Names) != 1 ||
		x.Err != nil {
		t.Errorf("%+v", x)
	}
	peer.Exec("ip", "link", "set", "eth0", "down")
	wait("the peer is gone", func(p status.Probe) bool { return p.Silent == 2 })
	m.Change([]netip.Prefix{p6}, nil)
	if got := m.Peer(p4); got == nil || got.Verdict != status.Silent || got.Small.Lost == 0 || m.Peer(p6) != nil {
		t.Errorf("%+v, %+v", got, m.Peer(p6))
	}
	mu.Lock()
	if notified < 3 {
		t.Errorf("%d notifications", notified)
	}
	mu.Unlock()
	m.Change(m.Subnets(), nil)
	wait("no target is left", func(p status.Probe) bool { return p.Targets == 0 && p.Silent == 0 })
}
