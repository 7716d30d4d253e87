package doctor

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/overlayd/overlayd/internal/ping"
	"github.com/overlayd/overlayd/test/bubble"
)

// wire is a network that pings go through: each packet takes its time to send, and what passes is answered at once.
type wire struct {
	each   time.Duration
	passes func(to netip.Addr, size int) bool
	rtt    time.Duration
}

func (w wire) ping(ctx context.Context, to []netip.Addr, size, count int, wait time.Duration, knock bool) (
	[]ping.Outcome, error,
) {
	out := make([]ping.Outcome, len(to))
	lost := false
	sleep := func(d time.Duration) {
		select {
		case <-ctx.Done():
		case <-time.After(d):
		}
	}
	for range count {
		for i, a := range to {
			out[i].Addr, out[i].RTT = a, w.rtt
			out[i].Sent++
			if !w.passes(a, size) || knock {
				out[i].Lost++
				lost = true
			}
			sleep(w.each)
		}
	}
	if lost {
		sleep(wait)
	}
	return out, ctx.Err()
}

// pinged pings healthy peers through a wire.
func (w wire) pinged(t *testing.T, peers int) Facts {
	f := healthy(t)
	f.Pings, f.Peers = PingFacts{}, f.Peers[:1]
	for len(f.Peers) < peers {
		p := f.Peers[len(f.Peers)-1]
		p.target = p.target.Next()
		f.Peers = append(f.Peers, p)
	}
	bubble.Test(t, func(t *testing.T) { f.Pings = pingPeers(t.Context(), Options{Ping: w.ping}, f) })
	return f
}

// On a machine that is slow, peers that don't answer are silent all the same.
func TestPingsOnSlowMachine(t *testing.T) {
	none := func(netip.Addr, int) bool { return false }
	f := wire{each: 20 * time.Millisecond, passes: none}.pinged(t, 40)
	if x := judgePings(f); x[0].Mark != Fail || !strings.Contains(x[0].Reason, "none of the 32 pinged answers") {
		t.Errorf("%+v", x)
	}
	f = wire{each: time.Second, passes: none}.pinged(t, 40)
	if x := judgePings(
		f,
	); x[0].Mark != Skipped ||
		!strings.Contains(x[0].Reason, "took longer than 3.7s: is the machine overloaded?") {
		t.Errorf("%+v", x)
	}
}

// Packets that are lost by chance are no black hole, and don't make one look smaller than it is.
func TestBlackHoleAndLoss(t *testing.T) {
	// the first n packets of some sizes are lost, and all above the limit
	lose := func(n int, size func(int) bool, limit int) wire {
		return wire{each: time.Millisecond, passes: func(_ netip.Addr, s int) bool {
			if s > smallSize && size(s) && n > 0 {
				n--
				return false
			}
			return s <= limit
		}}
	}
	full := func(s int) bool { return s == 1450 }
	part := func(s int) bool { return s < 1450 }
	for name, tt := range map[string]struct {
		wire wire
		mark Mark
		text string
		size int
	}{
		"no loss":                        {lose(0, full, 1450), OK, "1450 bytes get through", 0},
		"the first two full ones":        {lose(2, full, 1450), Warn, "are lost: n2 (10.244.2.0): 2 of 5", 0},
		"a hole":                         {lose(0, full, 1400), Fail, "the largest packet that reaches n2 is 1400", 1400},
		"a hole at once below":           {lose(0, full, 1449), Fail, "the largest packet that reaches n2 is 1449", 1449},
		"a hole, and one lost packet":    {lose(1, part, 1400), Fail, "the largest packet that reaches n2 is 1400", 1400},
		"a hole, and three lost packets": {lose(3, part, 1400), Fail, "the largest packet that reaches n2 is 1400", 1400},
		"no hole any more":               {lose(5, full, 1450), Warn, "5 of 8", 1450},
	} {
		f := tt.wire.pinged(t, 1)
		if x := judgeBlackHole(f); x[0].Mark != tt.mark || !strings.Contains(x[0].Reason, tt.text) {
			t.Errorf("%s: %+v", name, x)
		}
		if l := f.Pings.Largest; l.Size != tt.size || l.Exact != (tt.mark == Fail) {
			t.Errorf("%s: %+v", name, l)
		}
	}
}

// A search that does not end says so.
func TestSearchDoesNotEnd(t *testing.T) {
	slow := wire{passes: func(_ netip.Addr, size int) bool { return size <= 1400 }, rtt: 150 * time.Millisecond}
	f := slow.pinged(t, 1)
	x := judgeBlackHole(f)
	if f.Pings.Largest.Exact || f.Pings.Largest.Size <= smallSize || !strings.Contains(x[0].Reason, "at least") ||
		strings.Contains(strings.Join(x[0].Fix, ""), "put") {
		t.Errorf("%+v %+v", f.Pings.Largest, x)
	}
}

// Where full packets can't be tried, it is said why.
func TestFullPacketsFail(t *testing.T) {
	f := healthy(t)
	f.Pings = PingFacts{}
	w := wire{passes: func(netip.Addr, int) bool { return true }}
	f.Pings = pingPeers(t.Context(), Options{
		Ping: func(ctx context.Context, to []netip.Addr, size, count int, wait time.Duration, knock bool) (
			[]ping.Outcome, error,
		) {
			if size > smallSize {
				return nil, errors.New("no memory")
			}
			return w.ping(ctx, to, size, count, wait, knock)
		},
	}, f)
	if x := judgeBlackHole(f); x[0].Mark != Skipped || x[0].Reason != "no memory" {
		t.Errorf("%+v", x)
	}
}

// A peer that answers no ping is asked by a datagram, before it is called silent.
func TestPeerIgnoresPings(t *testing.T) {
	f := healthy(t)
	first := f.Peers[0].target
	f.Pings = PingFacts{}
	pings := wire{passes: func(to netip.Addr, _ int) bool { return to != first }}
	var knockedAt []netip.Addr
	bubble.Test(t, func(t *testing.T) {
		f.Pings = pingPeers(t.Context(), Options{
			Ping: func(ctx context.Context, to []netip.Addr, size, count int, wait time.Duration, knock bool) (
				[]ping.Outcome, error,
			) {
				if !knock {
					return pings.ping(ctx, to, size, count, wait, false)
				}
				knockedAt = append(knockedAt, to...)
				return wire{passes: func(netip.Addr, int) bool { return true }}.ping(ctx, to, size, count, wait, false)
			},
		}, f)
	})
	if len(knockedAt) != 1 || knockedAt[0] != first {
		t.Errorf("knocked at %v", knockedAt)
	}
	for _, x := range append(judgePings(f), judgeBlackHole(f)...) {
		if x.Mark != OK {
			t.Errorf("%+v", x)
		}
	}
}
