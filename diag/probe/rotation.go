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
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/internal/ping"
)

const (
	// perSecond is the maximum rate of packets, averaged over longestPause.
	perSecond = 10
	// shortestRound and longestRound bound the time in which all targets are pinged once. More targets than the rate
	// allows within the longest take longer.
	shortestRound, longestRound = 10 * time.Second, 10 * time.Minute
	// spare is the part of perSecond that a round leaves for suspects: both sizes to one of them each second. Without
	// it, they would wait for the round to come to them.
	spare = 2
	// waitFor is how long an answer may take.
	waitFor = 2 * time.Second
	// askAgain is the interval for suspects, or longer if the round leaves not enough of perSecond for all of them.
	askAgain = 10 * time.Second
	// grace is how long losses of a target that is new, or that answers again, do not count: its node may be starting.
	grace = 20 * time.Second
	// These are between two steps. On an idle node a wakeup costs more than a dozen packets, so packets are grouped.
	shortestPause, usualPause, longestPause = time.Second, 5 * time.Second, 10 * time.Second
	// many targets make a round of minutes, so that steps more often than longestPause gain nothing.
	many = 1000
	// remembered is the number of results kept for each size.
	remembered = 8
	// fewSuspects is up to how many it costs less to sort the suspects than to search thousands of targets.
	fewSuspects = 100
)

// Target is a peer, in one family.
type Target struct {
	Subnet  netip.Prefix // its key
	Name    string
	Address netip.Addr // to be pinged
}

// history holds the results of the last pings.
type history struct {
	lost uint8 // one bit each, the newest lowest
	n    uint8
}

func (h *history) add(lost bool) {
	h.lost <<= 1
	if lost {
		h.lost |= 1
	}
	h.n = min(h.n+1, remembered)
}

// down reports whether the last n were lost.
func (h *history) down(n uint8) bool { return h.n >= n && bits.TrailingZeros8(^h.lost) >= int(n) }

func (h *history) losses() int { return bits.OnesCount8(h.lost) }

// series is the history of one size.
type series struct {
	history
	rtt uint32 // of the last answer, in ns; waitFor fits
}

func (s *series) pings() status.Pings {
	return status.Pings{Sent: int(s.n), Lost: s.losses(), RTT: time.Duration(s.rtt)}
}

// target is a Target with its results. There are thousands, so it is kept small.
type target struct {
	Target
	small, full series
	both        history // of either size
	rank        uint8   // of its verdict in verdicts
	fullNext    bool    // if a round has time for one size only
	knock       bool    // datagrams to a closed port instead of pings, see Once
	removed     bool    // is no longer a target
	again       int64   // when to ping it next at the earliest, in ns since 1970; 0: at once
	since       int64   // of its first ping, or of the answer after both sizes were lost, in ns since 1970; 0: none
	answered    int64   // the last time, in ns since 1970; 0: never
}

// lossy reports whether any of the last pings was lost.
func (t *target) lossy() bool { return t.small.lost|t.full.lost != 0 }

// due reports whether it may be pinged again.
func (t *target) due(now time.Time) bool { return now.UnixNano() >= t.again }

// verdicts are in order, the worst last.
func verdicts() [5]status.Verdict {
	return [...]status.Verdict{status.NotPinged, status.Answers, status.Lossy, status.SmallOnly, status.Silent}
}

func (t *target) verdict() status.Verdict { return verdicts()[t.rank] }

// judge returns the verdict. Two lost packets in a row may be chance, since they are sent together; a third was sent at
// least a second later.
func (t *target) judge(now time.Time) status.Verdict {
	young := now.Sub(time.Unix(0, t.since)) < grace
	switch {
	case t.both.n == 0, young && t.answered == 0:
		return status.NotPinged
	case t.both.down(3):
		return status.Silent
	case t.full.down(2) && !t.small.down(1) && !young:
		return status.SmallOnly
	case t.lossy():
		return status.Lossy
	}
	return status.Answers
}

func (t *target) result() status.PeerProbe {
	p := status.PeerProbe{
		Address: t.Address.String(), Verdict: t.verdict(), Small: t.small.pings(), Full: t.full.pings(),
	}
	if t.answered != 0 {
		p.Last = time.Unix(0, t.answered)
	}
	return p
}

// flight is a packet that was sent.
type flight struct {
	target *target
	full   bool
	sent   time.Time
}

// rotation chooses which target to ping next, and keeps the results. It has no clock, no sockets and no lock.
//
// All targets are pinged in turn, at a steady rate. Suspects, which are a few new ones and those that did not answer,
// are pinged in addition, with what remains of perSecond.
type rotation struct {
	targets  []*target    // in the order of their subnets
	due      netip.Prefix // the subnet whose target is next, or the one behind it
	suspects []*target    // the one that waits longest first
	credit   time.Duration
	families addr.Per[int]
	size     int // of full packets
	flights  map[uint16]flight
	seq      uint16
	counts   map[status.Verdict]int

	sent, lost, notAllowed int
}

func newRotation() *rotation {
	return &rotation{flights: map[uint16]flight{}, counts: map[status.Verdict]int{}}
}

// find is where the target of a subnet is, or would be.
func (r *rotation) find(subnet netip.Prefix) (int, bool) {
	if n := len(r.targets); n == 0 || addr.ComparePrefix(r.targets[n-1].Subnet, subnet) < 0 {
		return n, false
	}
	return slices.BinarySearchFunc(r.targets, subnet, func(t *target, sn netip.Prefix) int {
		return addr.ComparePrefix(t.Subnet, sn)
	})
}

// target is the one of a subnet; nil: there is none.
func (r *rotation) target(subnet netip.Prefix) *target {
	if i, ok := r.find(subnet); ok {
		return r.targets[i]
	}
	return nil
}

// change removes and adds targets, see Mesh.Change. A few new ones are pinged at once, more are spread over a round.
func (r *rotation) change(gone []netip.Prefix, come []Target) {
	removed := map[*target]bool{}
	for _, subnet := range gone {
		if t := r.target(subnet); t != nil {
			removed[t] = true
		}
	}
	var added []*target
	for _, t := range come {
		if old := r.target(t.Subnet); old != nil {
			if old.Name = t.Name; old.Address == t.Address {
				delete(removed, old)
				continue
			}
			removed[old] = true
		}
		added = append(added, &target{Target: t})
	}
	for t := range removed {
		t.removed = true
		r.count(t, -1)
	}
	if len(removed) > 0 {
		r.targets = slices.DeleteFunc(r.targets, func(t *target) bool { return t.removed })
	}
	for _, t := range added {
		i, _ := r.find(t.Subnet)
		r.targets = slices.Insert(r.targets, i, t)
		r.count(t, 1)
	}
	if len(added) <= perSecond {
		r.suspects = slices.Concat(added, r.suspects)
	}
}

func (r *rotation) count(t *target, n int) {
	f := addr.FamilyOf(t.Address)
	r.families.Set(f, r.families.Get(f)+n)
	r.counts[t.verdict()] += n
}

// pace is the number of packets for each target in a round, both sizes or one in turn, and the duration of a round.
func pace(targets int) (each int, round time.Duration) {
	if n := seconds(float64(2*targets) / (perSecond - spare)); n <= longestRound {
		return 2, max(shortestRound, n)
	}
	return 1, max(longestRound, seconds(float64(targets)/(perSecond-spare)))
}

func seconds(n float64) time.Duration { return time.Duration(n * float64(time.Second)) }

// pause is the time until the next step.
func (r *rotation) pause() time.Duration {
	switch {
	case len(r.targets) == 0, slices.ContainsFunc(r.suspects, func(t *target) bool { return t.again == 0 }):
		return shortestPause
	case len(r.targets) > many:
		return longestPause
	}
	return usualPause
}

// next chooses the packets to send, given the time since the last call.
func (r *rotation) next(now time.Time, passed time.Duration) []ping.Packet {
	passed = min(passed, longestPause) // time that the node was suspended is not made up for
	n := len(r.targets)
	each, round := pace(n)
	r.credit += passed * time.Duration(n)
	visits := min(int(r.credit/round), n)
	r.credit %= round
	out := r.visitSuspects(now, int(math.Round(perSecond*passed.Seconds()))-visits*each)
	at, _ := r.find(r.due)
	for range visits {
		t := r.targets[at%n]
		if !t.lossy() || t.due(now) { // otherwise it was just pinged as a suspect
			out = r.visit(out, t, each, now)
		}
		at++
		r.due = r.targets[at%n].Subnet
	}
	return out
}

// visitSuspects pings those that are due, as far as the budget of packets allows.
func (r *rotation) visitSuspects(now time.Time, budget int) (out []ping.Packet) {
	var visited []*target
	r.suspects = slices.DeleteFunc(r.suspects, func(t *target) bool {
		switch {
		case t.removed, t.again != 0 && !t.lossy(): // it has answered
			return true
		case len(out)+2 > budget, !t.due(now):
			return false
		}
		out = r.visit(out, t, 2, now)
		visited = append(visited, t)
		return true
	})
	r.suspects = append(r.suspects, visited...)
	return out
}

// suspect has a target pinged again at once.
func (r *rotation) suspect(t *target) {
	if t.again = 0; !slices.Contains(r.suspects, t) {
		r.suspects = slices.Insert(r.suspects, 0, t)
	}
}

func (r *rotation) visit(out []ping.Packet, t *target, each int, now time.Time) []ping.Packet {
	if t.both.down(2) && t.small.down(1) { // it may answer the other kind
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
		r.flights[r.seq] = flight{target: t, full: full, sent: now}
		out = append(out, ping.Packet{To: t.Address, Seq: r.seq, Size: size, Knock: t.knock})
	}
	t.fullNext, t.again = !t.fullNext, now.Add(askAgain).UnixNano()
	return out
}

// sentAt records when a packet was sent, or why the kernel did not send it.
func (r *rotation) sentAt(seq uint16, at time.Time, err error) {
	f, ok := r.flights[seq]
	if !ok {
		return
	}
	r.sent++
	if err != nil {
		if errors.Is(err, syscall.EPERM) { // dropped in OUTPUT
			r.notAllowed++
		}
		r.settle(seq, f, true, 0, at)
		return
	}
	f.sent = at
	r.flights[seq] = f
}

// answered takes an answer. A late one, a second one, and one from another address do not count.
func (r *rotation) answered(p ping.Reply) {
	f, ok := r.flights[p.Seq]
	if !ok || f.target.Address != p.From {
		return
	}
	// The kernel's and our reading of the wall clock; it may have been set in between.
	if rtt := p.At.Sub(f.sent); rtt <= waitFor {
		r.settle(p.Seq, f, false, max(rtt, 1), p.At)
	}
}

// expire gives up packets that were not answered in time.
func (r *rotation) expire(now time.Time) {
	for seq, f := range r.flights {
		if since := now.Sub(f.sent).Abs(); since > waitFor {
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
	if t.removed {
		return
	}
	if back := !lost && t.small.down(1) && t.full.down(1); back || t.since == 0 {
		t.since = now.UnixNano()
	}
	h := &t.small
	if f.full {
		h = &t.full
	}
	h.add(lost)
	t.both.add(lost)
	if !lost {
		h.rtt, t.answered = uint32(rtt), now.UnixNano()
	}
	r.counts[t.verdict()]--
	all := verdicts()
	t.rank = uint8(slices.Index(all[:], t.judge(now)))
	r.counts[t.verdict()]++
	if lost && t.both.losses() == 1 { // confirm it at once
		r.suspect(t)
	}
}

// summary is the result for all targets together, with the worst ones.
func (r *rotation) summary() status.Probe {
	_, round := pace(len(r.targets))
	p := status.Probe{
		On: true, Targets: len(r.targets), Size: r.size, Round: round,
		Sent: r.sent, Lost: r.lost, NotAllowed: r.notAllowed,
		Answer: r.counts[status.Answers], Lossy: r.counts[status.Lossy], SmallOnly: r.counts[status.SmallOnly],
		Silent: r.counts[status.Silent], NotPinged: r.counts[status.NotPinged], Worst: []status.Peer{},
	}
	var rtts []uint32
	var pinged []*target
	for _, t := range r.targets {
		if t.verdict() == status.NotPinged {
			continue
		}
		// With many targets, the slowest of those that answer would change all the time.
		if t.verdict() != status.Answers || len(r.targets)-p.NotPinged <= status.WorstPeers {
			pinged = append(pinged, t)
		}
		if rtt := max(t.small.rtt, t.full.rtt); rtt > 0 && t.verdict() != status.Silent {
			rtts = append(rtts, rtt)
		}
	}
	if slices.Sort(rtts); len(rtts) > 0 {
		p.MedianRTT = time.Duration(rtts[len(rtts)/2])
	}
	slices.SortFunc(pinged, func(a, b *target) int {
		return cmp.Or(
			cmp.Compare(b.rank, a.rank),
			cmp.Compare(b.small.losses()+b.full.losses(), a.small.losses()+a.full.losses()),
			cmp.Compare(b.small.rtt, a.small.rtt), addr.ComparePrefix(a.Subnet, b.Subnet),
		)
	})
	for _, t := range pinged[:min(len(pinged), status.WorstPeers)] {
		result := t.result()
		p.Worst = append(p.Worst, status.Peer{Name: t.Name, Subnet: t.Subnet.String(), Probe: &result})
	}
	return p
}

// named lists at most that many failing targets with a verdict, by name or else by subnet, in order: those whose subnets
// are first.
func (r *rotation) named(v status.Verdict, most int) (out []string) {
	if r.counts[v] == 0 {
		return nil
	}
	targets := r.targets
	if len(r.suspects) <= fewSuspects { // all that fail are among them
		targets = slices.SortedFunc(slices.Values(r.suspects), func(a, b *target) int {
			return addr.ComparePrefix(a.Subnet, b.Subnet)
		})
	}
	for _, t := range targets {
		if len(out) == most {
			break
		}
		if t.verdict() == v && !t.removed {
			out = append(out, cmp.Or(t.Name, t.Subnet.String()))
		}
	}
	slices.Sort(out)
	return out
}
