package probe

import (
	"cmp"
	"container/heap"
	"errors"
	"math"
	"math/bits"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/internal/ping"
)

const (
	// perSecond is the most packets that a node sends in a second, on average over longestPause.
	perSecond = 10
	// shortestRound and longestRound bound how long it takes to ping all targets once. More targets than perSecond allows within the
	// longest take longer.
	shortestRound, longestRound = 10 * time.Second, 10 * time.Minute
	// spare is what of perSecond the round leaves for those that did not answer, as long as they are few enough for that.
	spare = 2
	// waitFor is how long an answer may take.
	waitFor = 2 * time.Second
	// askAgain is how often those are pinged that did not answer.
	askAgain = 10 * time.Second
	// grace is how long nothing is held against a target that is new, or that answers again: its node may still be
	// starting.
	grace = 20 * time.Second
	// These are between two steps. Waking up costs an idle node more than sending a dozen packets does, so that they go together.
	shortestPause, usualPause, longestPause = time.Second, 5 * time.Second, 10 * time.Second
	// many targets are those with which a round takes minutes, so that nothing is gained by steps more often than longestPause.
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
	fullNext    bool          // where there is time for one size only
	knock       bool          // it is knocked at instead of pinged, see ping.Socket
	early       bool          // due before its turn, and then pinged in both sizes
	due         time.Duration // when to ping it next, by rotation.now
	place       int           // in rotation.queue; gone: in none
	since       int64         // of its first ping, or of the answer after both sizes were lost, in ns since 1970; 0: none yet
	heard       int64         // when it answered last, likewise; 0: never
}

const (
	soon = -1 // a due time before all others
	gone = -1 // the place of a target that was removed
)

// queue is a heap (container/heap): the target that is due first is its first.
type queue []*target

func (q queue) Len() int { return len(q) }

func (q queue) Less(i, j int) bool { return q[i].due < q[j].due }

func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].place, q[j].place = i, j
}

func (q *queue) Push(t any) {
	t.(*target).place = len(*q)
	*q = append(*q, t.(*target))
}

func (q *queue) Pop() any {
	last := len(*q) - 1
	t := (*q)[last]
	(*q)[last], *q = nil, (*q)[:last]
	t.place = gone
	return t
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

// packet is one that is to be sent.
type packet struct {
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
	targets  map[netip.Prefix]*target
	queue    queue // the same
	families addr.Per[int]
	now      time.Duration // the time that due was told of
	round    time.Duration // at the last step
	size     int           // of full packets
	flights  map[uint16]flight
	seq      uint16
	counts   [silent + 1]int

	sent, lost, notAllowed int
}

func newRotation() *rotation {
	return &rotation{targets: map[netip.Prefix]*target{}, flights: map[uint16]flight{}}
}

// put adds a target that is due at some time. One that is there with the same address keeps what is known of it.
func (r *rotation) put(t Target, due time.Duration) {
	if old := r.targets[t.Subnet]; old != nil && old.Address == t.Address {
		old.Name = t.Name
		return
	}
	r.remove(t.Subnet)
	n := &target{Target: t, due: due, early: due == soon}
	r.targets[t.Subnet] = n
	heap.Push(&r.queue, n)
	r.count(n, 1)
}

func (r *rotation) remove(subnet netip.Prefix) {
	if t := r.targets[subnet]; t != nil {
		delete(r.targets, subnet)
		heap.Remove(&r.queue, t.place)
		r.count(t, -1)
	}
}

func (r *rotation) count(t *target, n int) {
	f := addr.FamilyOf(t.Address)
	r.families.Set(f, r.families.Get(f)+n)
	r.counts[t.verdict] += n
}

// replace makes these the targets. Those that stay keep what is known of them and when they are due: a round may take longer than the time
// until the next call. Those that come are spread over a round.
func (r *rotation) replace(ts []Target) {
	stay := make(map[netip.Prefix]bool, len(ts))
	for _, t := range ts {
		stay[t.Subnet] = true
	}
	for subnet := range r.targets {
		if !stay[subnet] {
			r.remove(subnet)
		}
	}
	_, round := pace(len(ts))
	for i, t := range ts {
		r.put(t, r.now+round*time.Duration(i)/time.Duration(len(ts)))
	}
}

// pace is how many packets each of so many targets is sent in a round, both sizes or one after the other in turn, and how long a round takes.
func pace(targets int) (each int, round time.Duration) {
	const regular = perSecond - spare
	longest := longestRound.Seconds()
	each = 2
	if float64(2*targets) > regular*longest {
		each = 1
	}
	n := float64(each * targets)
	if n > regular*longest { // then all that is allowed may be needed
		return each, max(longestRound, seconds(n/perSecond))
	}
	return each, max(shortestRound, seconds(n/regular))
}

func seconds(n float64) time.Duration { return time.Duration(n * float64(time.Second)) }

// retry is how long those wait that did not answer: askAgain, as long as what the round leaves of perSecond is enough for all of them.
func (r *rotation) retry() time.Duration {
	each, round := pace(len(r.queue))
	left := max(perSecond-float64(each*len(r.queue))/round.Seconds(), 0.01)
	suspects := r.counts[lossy] + r.counts[smallOnly] + r.counts[silent]
	return max(askAgain, seconds(float64(2*suspects)/left))
}

// pause is how long to wait until there is something to do.
func (r *rotation) pause() time.Duration {
	switch {
	case len(r.queue) == 0, r.queue[0].due == soon:
		return shortestPause
	case len(r.queue) > many:
		return longestPause
	}
	return usualPause
}

// due chooses what to send for a stretch of time that has passed since the last call, a second for example.
func (r *rotation) due(now time.Time, passed time.Duration) []packet {
	passed = min(passed, longestPause)
	r.now += passed
	each, round := pace(len(r.queue))
	if round < r.round { // there are fewer targets: none of them waits longer than a round takes now
		for _, t := range r.queue {
			t.due = min(t.due, r.now+round)
		}
		heap.Init(&r.queue)
	}
	r.round = round
	budget := int(math.Round(perSecond * passed.Seconds()))
	var out []packet
	for len(r.queue) > 0 && r.queue[0].due <= r.now {
		t, n := r.queue[0], each
		if t.early {
			n = 2
		}
		if len(out)+n > budget {
			break
		}
		out = r.visit(out, t, n, now)
		t.due, t.early = max(t.due, r.now-longestPause)+round, false
		if t.verdict != answers {
			r.hasten(t, r.retry())
		}
		heap.Fix(&r.queue, t.place)
	}
	return out
}

// hasten has a target pinged before its turn.
func (r *rotation) hasten(t *target, after time.Duration) {
	if due := r.now + after; due < t.due {
		t.due, t.early = due, true
	}
}

func (r *rotation) visit(out []packet, t *target, each int, now time.Time) []packet {
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
		out = append(out, packet{to: t.Address, seq: r.seq, size: size, knock: t.knock})
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

// answered takes an answer. One that comes late, twice, or from another address is none.
func (r *rotation) answered(p ping.Reply) {
	f, ok := r.flights[p.Seq]
	if !ok || f.to != p.From {
		return
	}
	// Two readings of the wall clock, the kernel's and ours: it may have been set in between.
	rtt := p.At.Sub(f.sent)
	if rtt > waitFor {
		return
	}
	r.settle(p.Seq, f, false, max(rtt, 1), p.At)
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
	if t.place == gone {
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
	switch {
	case lost && t.both.losses() == 1: // at once, to be sure
		r.hasten(t, r.retry()-askAgain)
	case t.verdict == answers && t.early:
		t.due, t.early = r.now+r.round, false
	default:
		return
	}
	heap.Fix(&r.queue, t.place)
}

// summary is all that is known, without the single targets but the worst.
func (r *rotation) summary() status.Probe {
	_, round := pace(len(r.targets))
	p := status.Probe{
		On: true, Targets: len(r.targets), Size: r.size, Round: round, Sent: r.sent, Lost: r.lost, NotAllowed: r.notAllowed,
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

// named lists targets with a verdict, by name or else by subnet, in order; the first of them if there are more than most.
func (r *rotation) named(v verdict, most int) []string {
	if r.counts[v] == 0 {
		return nil
	}
	var out []string
	for _, t := range r.targets {
		if t.verdict == v {
			out = append(out, cmp.Or(t.Name, t.Subnet.String()))
		}
	}
	slices.Sort(out)
	return out[:min(len(out), most)]
}
