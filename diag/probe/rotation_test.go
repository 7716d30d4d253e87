package probe

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/internal/ping"
)

func targets(n int) []Target {
	var out []Target
	for i := range n {
		ip := netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0})
		out = append(out, Target{Subnet: netip.PrefixFrom(ip, 24), Name: fmt.Sprintf("n%d", i), Address: ip})
	}
	return out
}

// simulation answers for the targets, or not, in simulated time.
type simulation struct {
	rot    *rotation
	now    time.Time
	answer func(p ping.Packet) bool
	most   float64 // packets in a second, over a pause
	sent   map[netip.Addr]int
	sizes  map[netip.Addr]map[int]bool
	last   map[netip.Addr]time.Time
	gap    map[netip.Addr]time.Duration // the longest between two visits
}

func newSimulation(ts []Target) *simulation {
	w := &simulation{
		rot: newRotation(), now: time.Unix(1e9, 0), answer: func(ping.Packet) bool { return true },
		sent: map[netip.Addr]int{}, sizes: map[netip.Addr]map[int]bool{},
		last: map[netip.Addr]time.Time{}, gap: map[netip.Addr]time.Duration{},
	}
	w.rot.size = 1450
	w.replace(ts)
	return w
}

// replace makes these the only targets.
func (w *simulation) replace(ts []Target) {
	var all []netip.Prefix
	for _, t := range w.rot.targets {
		all = append(all, t.Subnet)
	}
	w.rot.change(all, ts)
}

func (w *simulation) target(subnet netip.Prefix) *target {
	return w.rot.target(subnet)
}

func (w *simulation) name(to netip.Addr) string {
	for _, t := range w.rot.targets {
		if t.Address == to {
			return t.Name
		}
	}
	return ""
}

// run lets seconds pass; an answer takes a millisecond.
func (w *simulation) run(seconds int) {
	for end := w.now.Add(time.Duration(seconds) * time.Second); ; {
		pause := w.rot.pause()
		if w.now.Add(pause).After(end) {
			return
		}
		w.now = w.now.Add(pause)
		w.rot.expire(w.now)
		pings := w.rot.next(w.now, pause)
		w.most = max(w.most, float64(len(pings))/pause.Seconds())
		for _, p := range pings {
			w.rot.sentAt(p.Seq, w.now, nil)
			if w.sent[p.To]++; !w.last[p.To].IsZero() {
				w.gap[p.To] = max(w.gap[p.To], w.now.Sub(w.last[p.To]))
			}
			w.last[p.To] = w.now
			if w.sizes[p.To] == nil {
				w.sizes[p.To] = map[int]bool{}
			}
			w.sizes[p.To][p.Size] = true
			if w.answer(p) {
				w.rot.answered(ping.Reply{From: p.To, Seq: p.Seq, At: w.now.Add(time.Millisecond)})
			}
		}
	}
}

// All within ten minutes, at most ten packets a second; beyond what that allows, as fast as it does.
func TestRound(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ targets, seconds int }{
		{1, 10}, {3, 10}, {40, 10}, {100, 26}, {1000, 251}, {2500, 601}, {4800, 601}, {6000, 751}, {20000, 2501},
	} {
		w := newSimulation(targets(c.targets))
		w.run(c.seconds)
		if len(w.sent) != c.targets || w.most > perSecond {
			t.Errorf("%d targets: %d pinged after %d s, at most %g packets a second", c.targets, len(w.sent), c.seconds, w.most)
		}
		if p := w.rot.summary(); p.Answer != c.targets || p.MedianRTT != time.Millisecond || p.Lost != 0 ||
			p.Round > time.Duration(c.seconds)*time.Second {
			t.Errorf("%d targets: %+v", c.targets, p)
		}
		w.run(c.seconds)
		for ip, sizes := range w.sizes {
			if len(sizes) != 2 {
				t.Fatalf("%d targets: %s was pinged with %v only", c.targets, ip, sizes)
			}
		}
	}
}

func TestVerdicts(t *testing.T) {
	t.Parallel()
	ts := targets(5)
	for _, c := range []struct {
		name   string
		answer func(p ping.Packet, n int) bool
		want   status.Verdict
	}{
		{"answers", func(ping.Packet, int) bool { return true }, status.Answers},
		{"silent", func(ping.Packet, int) bool { return false }, status.Silent},
		{"small only", func(p ping.Packet, _ int) bool { return p.Size == SmallSize }, status.SmallOnly},
		{"lossy", func(_ ping.Packet, n int) bool { return n%3 != 1 }, status.Lossy},
	} {
		w := newSimulation(ts)
		w.run(10)
		n := 0
		w.answer = func(p ping.Packet) bool {
			if p.To != ts[2].Address {
				return true
			}
			n++
			return c.answer(p, n)
		}
		w.run(22) // a round, an answer that is waited for, the same again to be sure
		if got := w.target(ts[2].Subnet).verdict(); got != c.want {
			t.Errorf("%s: %q", c.name, got)
		}
		if got, rest := w.target(
			ts[1].Subnet,
		).verdict(), w.rot.counts[status.Answers]; got != status.Answers ||
			c.want != status.Answers && rest != 4 {
			t.Errorf("%s: another one is %q, %d answer", c.name, got, rest)
		}
		w.answer = func(ping.Packet) bool { return true }
		w.run(110) // eight answers, one every ten seconds
		if p := w.rot.summary(); p.Answer != 5 {
			t.Errorf("%s: afterwards %+v", c.name, p)
		}
		if w.most > perSecond {
			t.Errorf("%s: %g packets in a second", c.name, w.most)
		}
	}
}

// Nothing is held against a target that is new, nor against one that comes back with less than it had, for a while.
func TestGrace(t *testing.T) {
	t.Parallel()
	ts := targets(3)
	w := newSimulation(ts[:2])
	w.run(30)
	joins := w.now.Add(15 * time.Second)
	w.answer = func(p ping.Packet) bool { return p.To != ts[2].Address || w.now.After(joins) }
	w.rot.change(nil, []Target{ts[2]})
	verdict := func() status.Verdict { return w.target(ts[2].Subnet).verdict() }
	for !w.now.After(joins) {
		if v := verdict(); v != status.NotPinged {
			t.Fatalf("%s before it joins: %s", joins.Sub(w.now), v)
		}
		w.run(5) // one step at least
	}
	w.run(120)
	if v := verdict(); v != status.Answers {
		t.Errorf("once it has joined: %s", v)
	}
	w.answer = func(p ping.Packet) bool { return p.To != ts[2].Address }
	w.run(40)
	if v := verdict(); v != status.Silent {
		t.Errorf("it does not answer: %s", v)
	}
	w.answer = func(p ping.Packet) bool { return p.To != ts[2].Address || p.Size == SmallSize }
	for range 20 {
		if w.run(5); verdict() != status.Silent {
			break
		}
	}
	back := w.now
	for range 20 {
		if w.run(5); verdict() == status.SmallOnly {
			break
		}
	}
	if after := w.now.Sub(back); after < grace-5*time.Second || after > 2*grace || verdict() != status.SmallOnly {
		t.Errorf("%s after it is back: %s", after, verdict())
	}
	w.answer = func(ping.Packet) bool { return true }
	w.run(120)
	asked := 0 // one visit is lost, then the large packets of the next ones, for a while
	booted := w.now.Add(20 * time.Second)
	w.answer = func(p ping.Packet) bool {
		if p.To == ts[2].Address {
			asked++
		}
		return p.To != ts[2].Address || asked > 2 && (p.Size == SmallSize || w.now.After(booted))
	}
	for !w.now.After(booted) {
		if w.run(5); verdict() == status.SmallOnly || verdict() == status.Silent {
			t.Fatalf("%s %s before it has booted", verdict(), booted.Sub(w.now))
		}
	}
	never := Target{Subnet: netip.MustParsePrefix("10.9.9.0/24"), Address: netip.MustParseAddr("10.9.9.0")}
	w.rot.change(nil, []Target{never})
	w.answer = func(p ping.Packet) bool { return p.To != never.Address }
	w.run(45)
	if v := w.target(never.Subnet).verdict(); v != status.Silent {
		t.Errorf("one that never answers: %s", v)
	}
}

// One among thousands that fails is found within the round, and asked again without waiting for the next.
func TestSuspectsAmongMany(t *testing.T) {
	t.Parallel()
	ts := targets(5000)
	w := newSimulation(ts)
	w.run(600)
	bad := ts[1234]
	w.answer = func(p ping.Packet) bool { return p.To != bad.Address }
	w.run(612)
	if got := w.target(bad.Subnet).verdict(); got != status.Silent {
		t.Fatalf("%q", got)
	}
	if got := w.rot.named(status.Silent, 3); !slices.Equal(got, []string{"n1234"}) {
		t.Errorf("%q", got)
	}
	w.answer = func(ping.Packet) bool { return true }
	w.run(110)
	if got := w.target(bad.Subnet).verdict(); got != status.Answers {
		t.Errorf("afterwards: %q", got)
	}
	// Even if all fail, there is no more than that.
	w.answer = func(ping.Packet) bool { return false }
	w.run(1900) // three rounds
	if p := w.rot.summary(); p.Silent < 4990 || w.most > perSecond || len(p.Worst) != status.WorstPeers ||
		p.Worst[0].Probe.Verdict != status.Silent {
		t.Errorf("%d silent, %g a second, %d worst", p.Silent, w.most, len(p.Worst))
	}
}

// However long a round is, a new target that is dead is pinged at once, and silent after its grace; the node does not
// wake up each second to wait for that.
func TestNewAmongMany(t *testing.T) {
	t.Parallel()
	for _, n := range []int{1000, 2400, 5000, 5400, 6000, 10000} {
		w := newSimulation(targets(n))
		w.run(200)
		dead := Target{Subnet: netip.MustParsePrefix("192.0.2.0/24"), Address: netip.MustParseAddr("192.0.2.1")}
		w.answer = func(p ping.Packet) bool { return p.To != dead.Address }
		w.rot.change(nil, []Target{dead})
		if w.run(2); w.sent[dead.Address] == 0 {
			t.Errorf("%d targets: not pinged within two seconds", n)
		}
		if w.rot.pause() != longestPause {
			t.Errorf("%d targets: pinged, but the next step is after %s", n, w.rot.pause())
		}
		if w.run(30); w.target(dead.Subnet).verdict() != status.Silent {
			t.Errorf("%d targets: %s after 32 s", n, w.target(dead.Subnet).verdict())
		}
	}
}

// A new target is pinged soon, also among thousands; a removed one is forgotten, even with packets in flight; one that
// stays keeps its results.
func TestTargetsChange(t *testing.T) {
	t.Parallel()
	ts := targets(5000)
	w := newSimulation(ts[:4999])
	w.run(10)
	w.rot.change(nil, []Target{ts[4999]})
	w.run(10)
	if w.sent[ts[4999].Address] == 0 {
		t.Error("a target that came was not pinged within ten seconds")
	}
	w.answer = func(ping.Packet) bool { return false }
	w.run(5) // packets are on their way to targets that go now
	w.replace(nil)
	w.rot.change([]netip.Prefix{ts[0].Subnet}, nil) // twice
	w.run(5)
	if p := w.rot.summary(); p.Targets != 0 || p.Silent+p.Lossy+p.Answer+p.NotPinged != 0 ||
		w.rot.next(w.now, time.Second) != nil ||
		len(w.rot.targets) != 0 {
		t.Errorf("%+v", p)
	}

	w = newSimulation(ts[:3])
	w.run(10)
	moved := ts[1]
	moved.Address = netip.MustParseAddr("192.0.2.1")
	w.rot.change(nil, []Target{ts[0]})
	w.rot.change(nil, []Target{moved})
	if a, b := w.target(
		ts[0].Subnet,
	).verdict(), w.target(
		ts[1].Subnet,
	).verdict(); a != status.Answers ||
		b != status.NotPinged {
		t.Errorf("%q, %q", a, b)
	}
}

// A round goes on where it was, however often the targets are replaced: those that stand last get their turn, too.
func TestReplaceKeepsItsPlace(t *testing.T) {
	t.Parallel()
	const n = 4800 // a round takes ten minutes
	ts := targets(n)
	w := newSimulation(ts[1:])
	for i := range 11 {
		w.run(60)
		w.replace(ts[(i+1)%2:]) // one that stands first comes and goes
	}
	w.replace(ts)
	if got := len(w.sent); got < n-1 {
		t.Errorf("%d of %d targets were pinged in eleven minutes", got, n)
	}

	for _, c := range []struct {
		name    string
		visited int
		now     []Target
		next    string
	}{
		{"the same", 3, ts[2:8], "n5"},
		{"the one visited last is gone", 3, slices.Concat(ts[2:4], ts[5:8]), "n5"},
		{"the one that was due is gone", 3, slices.Concat(ts[2:5], ts[6:8]), "n6"},
		{"all that were to come are gone", 3, ts[2:5], "n2"},
		{"others join", 6, ts[2:11], "n8"}, // new ones are pinged at once
		{"all are others", 3, ts[10:20], "n10"},
		{"none is left", 3, nil, ""},
	} {
		w := newSimulation(ts[2:8])
		w.rot.suspects = nil // in turn, and not all at once
		next := func() string {
			for range 20 {
				w.now = w.now.Add(time.Second)
				pings := w.rot.next(w.now, time.Second)
				for _, p := range pings {
					w.rot.answered(ping.Reply{From: p.To, Seq: p.Seq, At: w.now})
				}
				if len(pings) > 0 {
					return w.name(pings[0].To)
				}
			}
			return ""
		}
		for range c.visited {
			next()
		}
		if w.replace(c.now); next() != c.next {
			t.Errorf("%s: %s is not next", c.name, c.next)
		}
	}
}

// Failing targets take nothing from the others: those are pinged within a round as before, and within ten minutes if a
// round was longer until targets left.
func TestFairness(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ targets, failing, seconds int }{
		{40, 30, 10}, {1000, 900, 250}, {4800, 500, 600}, {4800, 4700, 600}, {8000, 7600, 1000},
	} {
		w := newSimulation(targets(c.targets))
		w.run(c.seconds + 10)
		w.answer = func(p ping.Packet) bool { return int(p.To.As4()[1])<<8+int(p.To.As4()[2]) >= c.failing }
		w.run(4 * c.seconds)
		longest := time.Duration(0)
		for _, gap := range w.gap {
			longest = max(longest, gap)
		}
		if allowed := time.Duration(c.seconds)*time.Second + longestPause; longest > allowed || w.most > perSecond {
			t.Errorf(
				"%d of %d targets fail: one had to wait %s, at most %g packets a second",
				c.failing,
				c.targets,
				longest,
				w.most,
			)
		}
		ts := targets(c.targets)
		w.replace(ts[c.targets-5:])
		clear(w.last)
		if w.run(20); len(w.last) != 5 {
			t.Errorf("%d of the 5 targets that are left of %d were pinged within 20 s", len(w.last), c.targets)
		}
	}
}

// A time that the node slept through is not made up for.
func TestSleep(t *testing.T) {
	t.Parallel()
	w := newSimulation(targets(5000))
	w.run(601)
	w.now = w.now.Add(time.Hour)
	if got := len(w.rot.next(w.now, time.Hour)); got > perSecond*int(longestPause/time.Second) {
		t.Errorf("%d packets at once", got)
	}
	w.rot.change(nil, []Target{{Subnet: netip.MustParsePrefix("10.99.0.0/24"), Address: netip.MustParseAddr("10.99.0.0")}})
	if w.run(10); w.sent[netip.MustParseAddr("10.99.0.0")] == 0 {
		t.Error("a target that came was not pinged within ten seconds")
	}
}

// What is not this node's answer to this packet is none; and clocks that are set are no round trips.
func TestStrangeAnswers(t *testing.T) {
	t.Parallel()
	w := newSimulation(targets(1))
	w.answer = func(ping.Packet) bool { return false }
	w.rot.next(w.now, time.Second)
	pings := w.rot.next(w.now, time.Second)
	for range 20 {
		if len(pings) > 0 {
			break
		}
		w.now = w.now.Add(time.Second)
		pings = w.rot.next(w.now, time.Second)
	}
	p := pings[0]
	w.rot.sentAt(p.Seq, w.now, nil)
	for _, bad := range []ping.Reply{
		{From: netip.MustParseAddr("192.0.2.66"), Seq: p.Seq, At: w.now},
		{From: p.To, Seq: p.Seq + 100, At: w.now},
		{From: p.To, Seq: p.Seq, At: w.now.Add(3 * time.Second)},
	} {
		w.rot.answered(bad)
	}
	tg := w.target(targets(1)[0].Subnet)
	if tg.verdict() != status.NotPinged {
		t.Errorf("%q", tg.verdict())
	}
	w.rot.answered(ping.Reply{From: p.To, Seq: p.Seq, At: w.now.Add(-time.Hour)}) // the clock was set back
	if time.Duration(tg.small.rtt+tg.full.rtt) > time.Millisecond || tg.verdict() == status.NotPinged {
		t.Errorf("%+v", tg.result())
	}
	w.rot.sentAt(pings[1].Seq, w.now, unix.EPERM)
	if s := w.rot.summary(); s.NotAllowed != 1 || s.Lost != 1 || s.Lossy != 1 {
		t.Errorf("%+v", s)
	}
}
