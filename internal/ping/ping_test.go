package ping

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/nstest"
)

// patience bounds the wait for what has to come.
const patience = 20 * time.Second

var (
	peer4 = netip.MustParseAddr("192.0.2.2")
	peer6 = netip.MustParseAddr("2001:db8::2")
)

// replies are those that have come when there are enough of them, or when there was time enough.
func replies(s *Socket, enough int) (out []Reply) {
	for end := time.Now().Add(patience); ; s.Wait(time.Until(end)) {
		_ = s.Receive(func(r Reply) { out = append(out, r) })
		if len(out) >= enough || time.Now().After(end) {
			return out
		}
	}
}

// As many packets as go out together, of the largest kind, are all answered, also if they are not read meanwhile.
func TestRoomForABurst(t *testing.T) {
	t.Parallel()
	node, middle, peer := nstest.Switched(t)
	for _, l := range []string{"p1", "p2", "br0"} {
		middle.Exec("ip", "link", "set", "dev", l, "mtu", "9000")
	}
	node.Exec("ip", "link", "set", "dev", "eth0", "mtu", "9000")
	peer.Exec("ip", "link", "set", "dev", "eth0", "mtu", "9000")
	const burst = 100
	node.Do(func() {
		s, err := Open(addr.IPv4, 7, Probe)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		for seq := range burst {
			if err := s.Send(peer4, uint16(seq), 9000, nil); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(500 * time.Millisecond) // so that all are there before the first is read
		if got := replies(s, burst); len(got) != burst {
			t.Errorf("%d answers to %d packets", len(got), burst)
		}
	})
}

// Several sockets of one node don't take each other's answers.
func TestSocketsAreApart(t *testing.T) {
	t.Parallel()
	node, _, _ := nstest.Switched(t)
	node.Do(func() {
		for _, f := range addr.Families() {
			a, errA := Open(f, 1, Probe)
			b, errB := Open(f, 2, Probe)
			if errA != nil || errB != nil {
				t.Fatal(errA, errB)
			}
			defer a.Close()
			defer b.Close()
			to, began := addr.Per[netip.Addr]{V4: peer4, V6: peer6}.Get(f), time.Now()
			if err := a.Send(to, 7, 64, nil); err != nil {
				t.Fatal(err)
			}
			got := replies(a, 1)
			if len(got) != 1 || got[0].From != to || got[0].Seq != 7 || got[0].At.Before(began) || got[0].At.After(time.Now()) {
				t.Errorf("%s: %+v", f, got)
			}
			if err := b.Receive(func(r Reply) { t.Errorf("%s: the other one received %+v", f, r) }); err != nil {
				t.Error(err)
			}
		}
	})
}

// A connected socket knows its source address, and is told why a packet did not get through.
func TestConnect(t *testing.T) {
	t.Parallel()
	node, _, peer := nstest.Switched(t)
	peer.Exec("ip", "addr", "add", "198.51.100.1/24", "dev", "lo")
	node.Exec("ip", "route", "add", "198.51.100.0/24", "via", "192.0.2.2")
	peer.Exec("ip", "route", "add", "unreachable", "203.0.113.0/24")
	peer.Exec("sysctl", "-qw", "net.ipv4.ip_forward=1")
	node.Exec("ip", "route", "add", "203.0.113.0/24", "via", "192.0.2.2")
	node.Do(func() {
		for _, c := range []struct {
			to   string
			size int
			send error
			want error
		}{
			{"192.0.2.2", 0, nil, nil},
			{"192.0.2.2", 1500, nil, nil},
			{"192.0.2.2", 1501, unix.EMSGSIZE, nil},
			{"198.51.100.1", 84, nil, nil},
			{"203.0.113.1", 84, nil, unix.EHOSTUNREACH},
		} {
			to := netip.MustParseAddr(c.to)
			s, err := Open(addr.IPv4, 9, DontFragment)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if local, err := s.Connect(to); err != nil || local != netip.MustParseAddr("192.0.2.1") {
				t.Errorf("%s: from %s, %v", to, local, err)
			}
			if err := s.Send(to, 1, c.size, []byte("token")); !errors.Is(err, c.send) {
				t.Errorf("%s, %d bytes: %v", to, c.size, err)
			}
			if c.send != nil {
				continue
			}
			got := 0
			for end := time.Now().Add(patience); ; s.Wait(time.Until(end)) {
				err = s.Receive(func(Reply) { got++ })
				if got > 0 || err != nil || time.Now().After(end) {
					break
				}
			}
			if !errors.Is(err, c.want) || (got == 1) != (c.want == nil) {
				t.Errorf("%s, %d bytes: %d replies, %v", to, c.size, got, err)
			}
		}
	})
}

// A datagram is sent although an earlier one was refused, which the kernel reports first.
func TestKnockAfterARefusal(t *testing.T) {
	t.Parallel()
	node, _, peer := nstest.Switched(t)
	peer.Sysctl("net.ipv4.icmp_ratelimit", "0")
	node.Do(func() {
		s, err := Open(addr.IPv4, 3, Probe)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		const knocks = 3
		for seq := range uint16(knocks) {
			if err := s.Knock(peer4, seq, 64); err != nil {
				t.Errorf("%d: %v", seq, err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if got := replies(s, knocks); len(got) != knocks || got[2].Seq != 2 || got[0].From != peer4 {
			t.Errorf("%+v", got)
		}
	})
}

// A stream counts what is lost while the peer is away, and what the kernel refuses to send.
func TestStream(t *testing.T) {
	t.Parallel()
	node, middle, _ := nstest.Switched(t)
	for _, to := range []netip.Addr{peer4, peer6} {
		start := func(o Options) (s *Stream) {
			var err error
			o.To, o.Every = to, 5*time.Millisecond
			node.Do(func() { s, err = Start(t.Context(), o) })
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		sent := func(s *Stream, n int) {
			for end := time.Now().Add(patience); s.Stats(time.Time{}, time.Now()).Sent < n && time.Now().Before(end); {
				time.Sleep(time.Millisecond)
			}
		}
		s := start(Options{PMTU: Fragment})
		sent(s, 20)
		middle.Exec("ip", "link", "set", "dev", "p2", "down")
		down := time.Now()
		sent(s, s.Stats(time.Time{}, down).Sent+20)
		up := time.Now()
		middle.Exec("ip", "link", "set", "dev", "p2", "up")
		for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if x := s.Stats(up, time.Now()); x.Sent-x.Lost > 10 {
				break
			}
		}
		if x := s.Stats(down, up); x.Lost < 15 || x.LastLost.Before(down) || x.LastLost.After(up) {
			t.Errorf("%s, the peer is away: %+v", to, x)
		}
		if x := s.Stop(time.Second); x.Lost < 15 || x.Sent-x.Lost < 30 || x.Gap < up.Sub(down)/2 || x.Refused != 0 {
			t.Errorf("%s, in the end: %+v", to, x)
		}
		s = start(Options{Size: 1501, PMTU: DontFragment, Count: 3})
		sent(s, 3)
		if x := s.Stop(patience); x.Sent != 3 || x.Lost != 3 || x.Refused != 3 || !errors.Is(x.Err, unix.EMSGSIZE) {
			t.Errorf("%s, too large: %+v", to, x)
		}
		s = start(Options{Size: 1500, PMTU: DontFragment, Count: 3})
		sent(s, 3)
		if x := s.Stop(patience); x.Sent != 3 || x.Lost != 0 {
			t.Errorf("%s, the largest: %+v", to, x)
		}
	}
}
