package probe

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/test/nstest"
)

// patience bounds the wait for what has to come.
const patience = 20 * time.Second

var (
	peer4 = netip.MustParseAddr("192.0.2.2")
	peer6 = netip.MustParseAddr("2001:db8::2")
)

// site is a node and a peer with a switch between them, whose ports may be made narrower than the ends think.
func site(t *testing.T) (node, middle, peer *nstest.NS) {
	node, middle, peer = nstest.New(t), nstest.New(t), nstest.New(t)
	nstest.Link(node, "eth0", middle, "p1")
	nstest.Link(peer, "eth0", middle, "p2")
	middle.Exec("ip", "link", "add", "br0", "type", "bridge")
	for _, l := range []string{"p1", "p2"} {
		middle.Exec("ip", "link", "set", "dev", l, "master", "br0")
		middle.Exec("ip", "link", "set", "dev", l, "up")
	}
	middle.Exec("ip", "link", "set", "br0", "up")
	node.Addr("eth0", "192.0.2.1/24")
	node.Addr("eth0", "2001:db8::1/64")
	peer.Addr("eth0", "192.0.2.2/24")
	peer.Addr("eth0", "2001:db8::2/64")
	return node, middle, peer
}

func TestOnce(t *testing.T) {
	t.Parallel()
	node, middle, _ := site(t)
	const forLost = 3 * time.Second
	once := func(within time.Duration, size int, to ...netip.Addr) (out []Outcome) {
		var err error
		node.Do(func() { out, err = Once(t.Context(), to, size, 3, within) })
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for _, size := range []int{SmallSize, 1499, 1500} {
		for _, o := range once(patience, size, peer4, peer6) {
			if o.Sent != 3 || o.Lost != 0 || o.RTT <= 0 || o.Err != nil {
				t.Errorf("%d bytes: %+v", size, o)
			}
		}
	}
	for _, o := range once(forLost, 1501, peer4, peer6) {
		if o.Lost != 3 || !errors.Is(o.Err, unix.EMSGSIZE) {
			t.Errorf("more than the device takes: %+v", o)
		}
	}
	nobody := netip.MustParseAddr("192.0.2.66")
	if o := once(forLost, SmallSize, nobody, peer4); o[0].Lost != 3 || o[1].Lost != 0 {
		t.Errorf("one who is not there, and one who is: %+v", o)
	}
	middle.Exec("ip", "link", "set", "dev", "p2", "mtu", "1400")
	for _, o := range once(forLost, 1500, peer4, peer6) {
		if o.Lost != 3 {
			t.Errorf("a hole in the middle: %+v", o)
		}
	}
	for _, o := range once(patience, 1400, peer4, peer6) {
		if o.Lost != 0 {
			t.Errorf("small enough for the hole: %+v", o)
		}
	}
}

// A peer that ignores pings refuses datagrams to a closed port: it is not silent, and what is too large for the way is
// found too.
func TestPeerIgnoresPings(t *testing.T) {
	t.Parallel()
	node, middle, peer := site(t)
	peer.Exec("sysctl", "-qw", "net.ipv4.icmp_echo_ignore_all=1", "net.ipv6.icmp.echo_ignore_all=1")
	knock := func(size int) (out []Outcome) {
		var err error
		node.Do(func() { out, err = Knock(t.Context(), []netip.Addr{peer4, peer6}, size, 3, 2*time.Second) })
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
	m.Replace([]Target{
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
	node, middle, peer := site(t)
	var mu sync.Mutex
	news := 0
	m := NewMesh(func() { mu.Lock(); defer mu.Unlock(); news++ })
	m.Resize(1500)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go node.Do(func() { ended <- m.Run(ctx) })
	defer func() { cancel(); <-ended }()
	p4, p6 := netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("fd00::/64")
	m.Replace([]Target{{p4, "p", peer4}, {p6, "p", peer6}})
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
	if x := m.Trouble(1); x.Targets != 2 || x.Silent.Count != 0 || x.SmallOnly.Count != 2 || len(x.SmallOnly.Names) != 1 || x.Err != nil {
		t.Errorf("%+v", x)
	}
	peer.Exec("ip", "link", "set", "eth0", "down")
	wait("the peer is gone", func(p status.Probe) bool { return p.Silent == 2 })
	m.Change([]netip.Prefix{p6}, nil)
	if got := m.Peer(p4); got == nil || got.Verdict != status.Silent || got.Small.Lost == 0 || m.Peer(p6) != nil {
		t.Errorf("%+v, %+v", got, m.Peer(p6))
	}
	mu.Lock()
	if news < 3 {
		t.Errorf("told of news %d times", news)
	}
	mu.Unlock()
	m.Replace(nil)
	wait("nobody is left", func(p status.Probe) bool { return p.Targets == 0 && p.Silent == 0 })
}
