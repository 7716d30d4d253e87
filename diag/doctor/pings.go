package doctor

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"
)

// PingFacts is what came of pinging peers the way that pods' packets go.
type PingFacts struct {
	Err     error // why nothing was pinged
	FullErr error // why not with full packets
	Sample  []pinged
	Of      int // peers that could be pinged
	// Largest is, for one peer that only small packets reach, the largest that does.
	Largest struct {
		Peer  peer
		Size  int
		Exact bool // otherwise it may be more: the search did not end
	}
}

type pinged struct {
	peer
	small, full Pong
	sized       bool // a full packet was tried
	mute        bool // it ignores pings, but refuses datagrams
}

func (p pinged) answers() bool { return p.small.answered() }
func (p pinged) refused() bool { return p.sized && p.full.refused() }
func (p pinged) hole() bool {
	return p.sized && p.answers() && p.full.Sent > 0 && !p.full.answered() && !p.full.refused()
}

func (p Pong) answered() bool { return p.Sent > p.Lost }

// plus is what came of pinging twice.
func (p Pong) plus(q Pong) Pong {
	p.Sent, p.Lost = p.Sent+q.Sent, p.Lost+q.Lost
	if q.Err != nil {
		p.Err = q.Err
	}
	return p
}

// refused: nothing left this node.
func (p Pong) refused() bool { return p.Err != nil && !p.answered() }

const (
	sampleSize = 32
	smallSize  = 64 // bytes, with the IP header
	pingCount  = 2

	// What is lost by chance must not look like what is too large.
	searchCount = 3 // packets of one size
	searchFor   = 2 * time.Second
)

// longest is how long that many packets may take on a machine which is overloaded, with the wait for the last answer. Outcomes are worth
// nothing before that is over, so that it is ample; on other machines it does not matter.
func longest(packets int) time.Duration {
	const each = 50 * time.Millisecond
	return pingFor + time.Duration(packets)*each
}

// slow says what it means where that did not suffice.
func slow(err error, packets int) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("the pings took longer than %v: is the machine overloaded?", longest(packets))
	}
	return err
}

// errNobody says that there is no peer to ping.
var errNobody = errors.New("no other node is known")

// ping asks a sample of the peers: those that already have a problem first.
func (f *Facts) ping(ctx context.Context, o Options) {
	switch {
	case o.Ping == nil:
		f.Pings.Err = errors.New("this build cannot ping")
		return
	case f.Privileges != nil:
		f.Pings.Err = f.Privileges
		return
	}
	sample := f.sample()
	if len(sample) == 0 {
		f.Pings.Err = errNobody
		return
	}
	packets := len(sample) * pingCount
	pinging, cancel := context.WithTimeout(ctx, longest(packets))
	defer cancel()
	full := sample[0].full
	to := make([]netip.Addr, 0, len(sample))
	for _, p := range sample {
		to = append(to, p.target)
	}
	type answer struct {
		pongs []Pong
		err   error
	}
	small, large := make(chan answer, 1), make(chan answer, 1)
	go func() {
		pongs, err := o.Ping(pinging, to, smallSize, pingCount, pingFor)
		small <- answer{pongs, err}
	}()
	go func() {
		if full == 0 {
			large <- answer{}
			return
		}
		pongs, err := o.Ping(pinging, to, full, pingCount, pingFor)
		large <- answer{pongs, err}
	}()
	a, b := <-small, <-large
	if a.err != nil {
		f.Pings.Err = slow(a.err, packets)
		return
	}
	f.Pings.FullErr = slow(b.err, packets)
	for _, p := range sample {
		q := pinged{peer: p, small: find(a.pongs, p.target)}
		if full > 0 && b.err == nil {
			q.full, q.sized = find(b.pongs, p.target), true
		}
		f.Pings.Sample = append(f.Pings.Sample, q)
	}
	f.knock(ctx, o)
	if f.recheck(ctx, o, full) {
		f.findLargest(ctx, o, full)
	}
}

// knock tries those that answer no ping with datagrams to a closed port.
func (f *Facts) knock(ctx context.Context, o Options) {
	var to []netip.Addr
	for _, p := range f.Pings.Sample {
		if !p.answers() && !p.small.refused() {
			to = append(to, p.target)
		}
	}
	if len(to) == 0 || o.Knock == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, longest(len(to)*pingCount))
	defer cancel()
	pongs, err := o.Knock(ctx, to, smallSize, pingCount, pingFor)
	if err != nil {
		return
	}
	for i := range f.Pings.Sample {
		if p, pong := &f.Pings.Sample[i], find(pongs, f.Pings.Sample[i].target); !p.answers() && pong.answered() {
			p.small, p.mute, p.sized = pong, true, false
		}
	}
}

func find(pongs []Pong, a netip.Addr) Pong {
	i := slices.IndexFunc(pongs, func(p Pong) bool { return p.Addr == a })
	if i < 0 {
		return Pong{Addr: a}
	}
	return pongs[i]
}

func (f *Facts) sample() []peer {
	var odd, rest []peer
	for _, p := range f.Peers {
		if !p.target.IsValid() || p.way != "tunnel" && p.way != "direct" {
			continue
		}
		if p.reason != "" || p.odd {
			odd = append(odd, p)
		} else {
			rest = append(rest, p)
		}
	}
	f.Pings.Of = len(odd) + len(rest)
	rand.Shuffle(len(rest), func(i, j int) { rest[i], rest[j] = rest[j], rest[i] })
	odd = append(odd, rest...)
	return odd[:min(len(odd), sampleSize)]
}

// recheck sends more full packets to the peers that got none. It reports whether a hole is left that is worth a search.
func (f *Facts) recheck(ctx context.Context, o Options, full int) bool {
	var to []netip.Addr
	for _, p := range f.Pings.Sample {
		if p.hole() {
			to = append(to, p.target)
		}
	}
	if len(to) == 0 {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, longest(len(to)*searchCount))
	defer cancel()
	pongs, err := o.Ping(ctx, to, full, searchCount, pingFor)
	if err != nil {
		return false
	}
	for i := range f.Pings.Sample {
		if p := &f.Pings.Sample[i]; p.hole() {
			p.full = p.full.plus(find(pongs, p.target))
		}
	}
	return slices.ContainsFunc(f.Pings.Sample, pinged.hole)
}

// findLargest looks for the largest packet that gets through to one peer of a black hole, by halves. The size that seems to be too large
// in the end is tried once more: if it gets through, the search goes on above it.
func (f *Facts) findLargest(ctx context.Context, o Options, full int) {
	p := &f.Pings.Sample[slices.IndexFunc(f.Pings.Sample, pinged.hole)]
	ctx, cancel := context.WithTimeout(ctx, searchFor)
	defer cancel()
	wait := max(4*p.small.RTT, 100*time.Millisecond)
	largest := &f.Pings.Largest
	largest.Peer, largest.Size = p.peer, smallSize
	for tooLarge := full; largest.Size < full && !largest.Exact; {
		size := max((largest.Size+tooLarge)/2, largest.Size+1)
		pongs, err := o.Ping(ctx, []netip.Addr{p.target}, size, searchCount, wait)
		if err != nil || ctx.Err() != nil { // what is left is not known
			return
		}
		pong := find(pongs, p.target)
		if size == full {
			p.full = p.full.plus(pong)
		}
		switch {
		case pong.answered() && size == tooLarge:
			largest.Size, tooLarge = size, full
		case pong.answered():
			largest.Size = size
		default:
			largest.Exact = size == tooLarge
			tooLarge = size
		}
	}
}
