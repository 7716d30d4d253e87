package probe

import (
	"cmp"
	"errors"
	"math"
	"math/bits"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/status"
)

const (
	// perSecond is the most packets that a node sends in a second, counted over longestPause.
	perSecond = 10
	// shortestRound and longestRound bound how long it takes to ping all targets once. More targets than perSecond allows within the
	// longest take longer.
	shortestRound, longestRound = 10 * time.Second, 10 * time.Minute
	// spare is what of perSecond the round leaves for those that did not answer, so long as they are few enough for that.
	spare = 2
	// waitFor is how long an answer may take.
	waitFor = 2 * time.Second
	// askAgain is how often those are asked that did not answer.
	askAgain = 10 * time.Second
	// grace is how long nothing is held against a target that is new, or that answers again: its node may still be
	// starting.
	grace = 20 * time.Second
	// These are between two looks at what came and what is due.
	shortestPause, usualPause, longestPause = time.Second, 5 * time.Second, 10 * time.Second
	// many targets are those with which a round takes minutes, so that nothing is gained by looking more often than longestPause.
	many = 1000
	// remembered is how many outcomes are kept of each size.
	remembered = 8
)

// Target is another node, in one family.
type Target struct {
	Subnet  netip.Prefix // its key
	Name    string
	Address netip.Addr // to be pinged
}

// history is what came of the last pings.
type history struct {
	lost uint8 // a bit for each, the newest lowest
	n    uint8
}

func (h *history) note(lost bool) {
	h.lost <<= 1
	if lost {
		h.lost |= 1
	}
	h.n = min(h.n+1, remembered)
}

// down reports whether the last n were lost.
func (h *history) down(n uint8) bool { return h.n >= n && bits.TrailingZeros8(^h.lost) >= int(n) }

// losses counts those that are remembered.
func (h *history) losses() int { return bits.OnesCount8(h.lost) }

// series is the history of one size.
type series struct {
	history
	rtt uint32 // of the last answer, in ns; waitFor has room in it
}

func (s *series) pings() status.Pings {
	return status.Pings{Sent: int(s.n), Lost: s.losses(), RTT: time.Duration(s.rtt)}
}

// target is a Target with what is known of it. There are thousands: it is kept small.
type target struct {
	Target
	small, full series
	both        history // those of either size
	verdict     verdict
	queued      bool // in rotation.fresh or rotation.waiting
	fullNext    bool // where there is time for one size only
	gone        bool
	knock       bool  // it is knocked at instead of pinged, see socket
	since       int64 // of its first ping, or of the answer after both sizes were lost, in ns since 1970; 0: none yet
	again       int64 // when to ask it out of turn, in ns since 1970; 0: not
	heard       int64 // when it answered last, likewise; 0: never
}

// verdict is a status.Verdict in one byte; the greater, the worse.
type verdict uint8

const (
	notPinged verdict = iota
	answers
	lossy
	smallOnly
	silent
)

func (v verdict) word() status.Verdict {
	return [...]status.Verdict{status.NotPinged, status.Answers, status.Lossy, status.SmallOnly, status.Silent}[v]
}

// Two packets in a row that are lost may be bad luck; a third one is not, since it was sent a second or more after the first.
func (t *target) judge(now time.Time) verdict {
	young := now.Sub(time.Unix(0, t.since)) < grace
	switch {
	case t.both.n == 0, young && t.heard == 0:
		return notPinged
	case t.both.down(3):
		return silent
	case t.full.down(2) && !t.small.down(1) && !young:
		return smallOnly
	case t.small.lost|t.full.lost != 0:
		return lossy
	}
	return answers
}

func (t *target) result() status.PeerProbe {
	p := status.PeerProbe{Address: t.Address.String(), Verdict: t.verdict.word(), Small: t.small.pings(), Full: t.full.pings()}
	if t.heard != 0 {
		p.Heard = time.Unix(0, t.heard)
	}
	return p
}

// ping is a packet that is to be sent.
type ping struct {
	to    netip.Addr
	seq   uint16
	size  int
	knock bool
}

// flight is a packet that was sent.
type flight struct {
	target *target
	to     netip.Addr
	full   bool
	sent   time.Time
}

// rotation says whom to ping next, and keeps what came of it. It has no clock, no sockets and no lock.
type rotation struct {
	targets []*target // in the order of their subnets
	next    int       // in targets, of the round
	credit  float64   // packets that may be sent by now
	size    int       // of full packets
	fresh   []*target // to be asked out of turn, at once
	waiting []*target // to be asked again, in the order of their times
	flights map[uint16]flight
	seq     uint16
	counts  [silent + 1]int

	sent, lost, notAllowed int
}

func newRotation() *rotation {
	return &rotation{flights: map[uint16]flight{}}
}

// find is the target for a subnet, and where in the order it is or would be.
func (r *rotation) find(subnet netip.Prefix) (t *target, at int) {
	at, ok := slices.BinarySearchFunc(r.targets, subnet, func(t *target, p netip.Prefix) int { return addr.ComparePrefix(t.Subnet, p) })
	if !ok {
		return nil, at
	}
	return r.targets[at], at
}

// put adds a target, to be asked out of turn. One that is there with the same address keeps what is known of it.
func (r *rotation) put(t Target) {
	old, at := r.find(t.Subnet)
	if old != nil {
		if old.Address == t.Address {
			old.Name = t.Name
			return
		}
		r.remove(t.Subnet)
	}
	n := &target{Target: t, again: 1, queued: true} // long ago
	r.targets = slices.Insert(r.targets, at, n)
	if at < r.next {
		r.next++
	}
	r.counts[n.verdict]++
	r.fresh = append(r.fresh, n)
}

func (r *rotation) remove(subnet netip.Prefix) {
	t, at := r.find(subnet)
	if t == nil {
		return
	}
	r.targets = slices.Delete(r.targets, at, at+1)
	if at < r.next {
		r.next--
	}
	r.counts[t.verdict]--
	t.gone = true
}

// replace makes these the targets. What is known of those that stay is kept, and the round goes on behind the target that was visited
// last: it may take longer than the time until the next call.
func (r *rotation) replace(ts []Target) {
	ts = slices.Clone(ts)
	slices.SortFunc(ts, func(a, b Target) int { return addr.ComparePrefix(a.Subnet, b.Subnet) })
	before, visited := r.targets, r.targets[:r.next]
	r.targets, r.next, r.credit, r.counts = make([]*target, 0, len(ts)), 0, perSecond, [silent + 1]int{}
	for _, t := range ts {
		for len(before) > 0 && addr.ComparePrefix(before[0].Subnet, t.Subnet) < 0 {
			before[0].gone = true
			before = before[1:]
		}
		n := &target{Target: t}
		if len(before) > 0 && before[0].Subnet == t.Subnet {
			if before[0].Address == t.Address {
				n = before[0]
				n.Name = t.Name
			} else {
				before[0].gone = true
			}
			before = before[1:]
		}
		r.targets = append(r.targets, n)
		r.counts[n.verdict]++
	}
	for _, t := range before {
		t.gone = true
	}
	if len(visited) > 0 {
		last, at := r.find(visited[len(visited)-1].Subnet)
		if r.next = at; last != nil {
			r.next++
		}
	}
}

// has reports whether there is a target of a family; those of IPv4 stand first.
func (r *rotation) has(f addr.Family) bool {
	return len(r.targets) > 0 && (addr.FamilyOf(r.targets[0].Subnet.Addr()) == f || addr.FamilyOf(r.targets[len(r.targets)-1].Subnet.Addr()) == f)
}

// each is how many packets a visit in the round takes: both sizes, or one after the other in turn.
func (r *rotation) each() int {
	if float64(2*len(r.targets)) > (perSecond-spare)*longestRound.Seconds() {
		return 1
	}
	return 2
}

// round is how long it takes to visit all targets.
func (r *rotation) round() time.Duration {
	n := float64(len(r.targets) * r.each())
	if n > (perSecond-spare)*longestRound.Seconds() { // then all that is allowed may be needed
		return max(longestRound, time.Duration(n/perSecond*float64(time.Second)))
	}
	return max(shortestRound, time.Duration(n/(perSecond-spare)*float64(time.Second)))
}

// rate is how many packets a second the round takes.
func (r *rotation) rate() float64 { return float64(r.each()*len(r.targets)) / r.round().Seconds() }

// pause is how long to wait until there is something to do. Waking up costs an idle node more than sending a dozen packets does, so
// that they go together, so long as nobody is suspected.
func (r *rotation) pause(now time.Time) time.Duration {
	if len(r.fresh) > 0 || len(r.targets) == 0 {
		return shortestPause
	}
	pause := usualPause
	if len(r.targets) > many {
		pause = longestPause
	}
	if len(r.waiting) > 0 {
		pause = min(pause, time.Duration(r.waiting[0].again-now.UnixNano()))
	}
	return max(pause, shortestPause)
}

// due chooses what to send for a stretch of time that has passed since the last call, a second for example.
func (r *rotation) due(now time.Time, passed time.Duration) []ping {
	if len(r.targets) == 0 {
		return nil
	}
	budget := int(math.Round(perSecond * min(passed, longestPause).Seconds()))
	each := r.each()
	r.credit = min(r.credit+r.rate()*passed.Seconds(), perSecond*longestPause.Seconds())
	var out []ping
	for visits := 0; visits < len(r.targets) && r.credit > float64(each)-1e-9 && len(out)+each <= budget; visits++ {
		r.credit -= float64(each)
		if r.next >= len(r.targets) {
			r.next = 0
		}
		t := r.targets[r.next]
		r.next++
		out = r.visit(out, t, each, now)
	}
	for len(out)+2 <= budget {
		t := r.suspect(now)
		if t == nil {
			break
		}
		t.again = now.Add(askAgain).UnixNano()
		r.waiting = append(r.waiting, t)
		out = r.visit(out, t, 2, now)
	}
	return out
}

// suspect takes the next one that is to be asked out of turn from its queue. Only the heads of the queues are looked at: there may be
// thousands in them.
func (r *rotation) suspect(now time.Time) *target {
	for {
		q := &r.fresh
		if len(*q) == 0 {
			q = &r.waiting
			if len(*q) == 0 || now.UnixNano() < (*q)[0].again {
				return nil
			}
		}
		t := (*q)[0]
		(*q)[0], *q = nil, (*q)[1:]
		if !t.gone && t.again != 0 {
			return t
		}
		t.queued = false
	}
}

func (r *rotation) visit(out []ping, t *target, each int, now time.Time) []ping {
	if t.both.down(2) && t.small.down(1) { // to see whether it answers the other way
		t.knock = !t.knock
	}
	for _, full := range []bool{false, true} {
		if each == 1 && full != t.fullNext {
			continue
		}
		size := SmallSize
		if full {
			size = r.size
		}
		r.seq++
		r.flights[r.seq] = flight{target: t, to: t.Address, full: full, sent: now}
		out = append(out, ping{to: t.Address, seq: r.seq, size: size, knock: t.knock})
	}
	t.fullNext = !t.fullNext
	return out
}

// departed says when a packet was really sent, or why the kernel did not send it.
func (r *rotation) departed(seq uint16, at time.Time, err error) {
	f, ok := r.flights[seq]
	if !ok {
		return
	}
	r.sent++
	if err != nil {
		if errors.Is(err, syscall.EPERM) { // a firewall's drop in OUTPUT
			r.notAllowed++
		}
		r.settle(seq, f, true, 0, at)
		return
	}
	f.sent = at
	r.flights[seq] = f
}

// answered takes an answer. One that comes late, twice, or from somebody else is none.
func (r *rotation) answered(p pong) {
	f, ok := r.flights[p.seq]
	if !ok || f.to != p.from {
		return
	}
	// Two readings of the wall clock, the kernel's and ours: it may have been set in between.
	rtt := p.at.Sub(f.sent)
	if rtt > waitFor {
		return
	}
	r.settle(p.seq, f, false, max(rtt, 1), p.at)
}

// expire gives up what has not been answered in time.
func (r *rotation) expire(now time.Time) {
	for seq, f := range r.flights {
		if since := now.Sub(f.sent); since > waitFor || since < -waitFor {
			r.settle(seq, f, true, 0, now)
		}
	}
}

func (r *rotation) settle(seq uint16, f flight, lost bool, rtt time.Duration, now time.Time) {
	delete(r.flights, seq)
	t := f.target
	if lost {
		r.lost++
	}
	if t.gone {
		return
	}
	if back := !lost && t.small.down(1) && t.full.down(1); back || t.since == 0 {
		t.since = now.UnixNano()
	}
	h := &t.small
	if f.full {
		h = &t.full
	}
	h.note(lost)
	t.both.note(lost)
	if !lost {
		h.rtt, t.heard = uint32(rtt), now.UnixNano()
	}
	before := t.verdict
	t.verdict = t.judge(now)
	r.counts[before]--
	r.counts[t.verdict]++
	if t.verdict == answers {
		t.again = 0
		return
	}
	if t.again == 0 {
		t.again = now.UnixNano() // at once, to be sure
	}
	if !t.queued {
		t.queued = true
		r.fresh = append(r.fresh, t)
	}
}

// summary is all that is known, without the single targets but the worst.
func (r *rotation) summary() status.Probe {
	p := status.Probe{
		On: true, Targets: len(r.targets), Size: r.size, Round: r.round(), Sent: r.sent, Lost: r.lost, NotAllowed: r.notAllowed,
		Answer: r.counts[answers], Lossy: r.counts[lossy], SmallOnly: r.counts[smallOnly],
		Silent: r.counts[silent], NotPinged: r.counts[notPinged], Worst: []status.Peer{},
	}
	var rtts []time.Duration
	var pinged []*target
	for _, t := range r.targets {
		if t.verdict == notPinged {
			continue
		}
		pinged = append(pinged, t)
		if rtt := max(t.small.rtt, t.full.rtt); rtt > 0 && t.verdict != silent {
			rtts = append(rtts, time.Duration(rtt))
		}
	}
	if slices.Sort(rtts); len(rtts) > 0 {
		p.MedianRTT = rtts[len(rtts)/2]
	}
	if len(pinged) > status.WorstPeers { // those who are well would take turns in being the slowest
		pinged = slices.DeleteFunc(pinged, func(t *target) bool { return t.verdict == answers })
	}
	for _, t := range worst(pinged, status.WorstPeers) {
		result := t.result()
		p.Worst = append(p.Worst, status.Peer{Name: t.Name, Subnet: t.Subnet.String(), Probe: &result})
	}
	return p
}

func worst(ts []*target, most int) []*target {
	slices.SortFunc(ts, func(a, b *target) int {
		return cmp.Or(
			int(b.verdict)-int(a.verdict), b.small.losses()+b.full.losses()-a.small.losses()-a.full.losses(),
			cmp.Compare(b.small.rtt, a.small.rtt), addr.ComparePrefix(a.Subnet, b.Subnet),
		)
	})
	return ts[:min(len(ts), most)]
}

// named lists targets with a verdict, by name or else by subnet, in order; at most so many, whichever are found first.
func (r *rotation) named(v verdict, most int) []string {
	var out []string
	for _, t := range r.targets {
		if len(out) == min(most, r.counts[v]) {
			break
		}
		if t.verdict == v {
			out = append(out, cmp.Or(t.Name, t.Subnet.String()))
		}
	}
	slices.Sort(out)
	return out
}
