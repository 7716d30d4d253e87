package doctor

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/overlayd/overlayd/internal/ping"
)

// PingFacts is what came of pinging peers by the path of pods' packets.
type PingFacts struct {
	Err     error // why none was pinged
	FullErr error // why not with full packets
	Size    int   // bytes of a full packet: the pod MTU
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
	mute        bool // it ignores pings, but rejects datagrams
}

func (p pinged) answers() bool  { return p.small.answered() }
func (p pinged) rejected() bool { return p.sized && p.full.rejected() }
func (p pinged) hole() bool {
	return p.sized && p.answers() && p.full.Sent > 0 && !p.full.answered() && !p.full.rejected()
}

// Pong is what came back from one address.
type Pong ping.Outcome

func (p Pong) answered() bool { return p.Sent > p.Lost }

// plus is what came of pinging twice.
func (p Pong) plus(q Pong) Pong {
	p.Sent, p.Lost = p.Sent+q.Sent, p.Lost+q.Lost
	if q.Err != nil {
		p.Err = q.Err
	}
	return p
}

// rejected: the kernel sent nothing.
func (p Pong) rejected() bool { return p.Err != nil && !p.answered() }

const (
	sampleSize = 32
	smallSize  = 64 // bytes, with the IP header
	pingCount  = 2
	pingFor    = 500 * time.Millisecond // for the last answer

	// What is lost by chance must not look like what is too large.
	searchCount = 3 // packets of one size
	searchFor   = 2 * time.Second
)

// send pings, or knocks. How long it may take is ample, for machines that are overloaded: what came before the end says
// nothing.
func (p Ping) send(ctx context.Context, to []netip.Addr, size, count int, knock bool) ([]ping.Outcome, error) {
	const each = 50 * time.Millisecond
	longest := pingFor + time.Duration(len(to)*count)*each
	ctx, cancel := context.WithTimeout(ctx, longest)
	defer cancel()
	out, err := p(ctx, to, size, count, pingFor, knock)
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("the pings took longer than %v: is the machine overloaded?", longest)
	}
	return out, err
}

// errNoPeer says that there is no peer to ping.
var errNoPeer = errors.New("no other node is known")

// pingPeers asks a sample of the peers: those that already have a problem first.
func pingPeers(ctx context.Context, o Options, f Facts) PingFacts {
	sample, of := f.sample()
	p := PingFacts{Of: of, Size: f.podMTU()}
	switch {
	case o.Ping == nil:
		p.Err = errors.New("this build cannot ping")
	case f.Privileges != nil:
		p.Err = f.Privileges
	case len(sample) == 0:
		p.Err = errNoPeer
	}
	if p.Err != nil {
		return p
	}
	to := make([]netip.Addr, 0, len(sample))
	for _, x := range sample {
		to = append(to, x.target)
	}
	var small, full []ping.Outcome
	var wg sync.WaitGroup
	wg.Go(func() { small, p.Err = o.Ping.send(ctx, to, smallSize, pingCount, false) })
	if p.Size > 0 {
		wg.Go(func() { full, p.FullErr = o.Ping.send(ctx, to, p.Size, pingCount, false) })
	}
	wg.Wait()
	if p.Err != nil {
		return p
	}
	for _, x := range sample {
		q := pinged{peer: x, small: find(small, x.target), sized: p.Size > 0 && p.FullErr == nil}
		if q.sized {
			q.full = find(full, x.target)
		}
		p.Sample = append(p.Sample, q)
	}
	silent := func(x pinged) bool { return !x.answers() && !x.small.rejected() }
	for x, pong := range p.again(ctx, o.Ping, silent, smallSize, pingCount, true) {
		if pong.answered() {
			x.small, x.mute, x.sized = pong, true, false
		}
	}
	for x, pong := range p.again(ctx, o.Ping, pinged.hole, p.Size, searchCount, false) {
		x.full = x.full.plus(pong)
	}
	if slices.ContainsFunc(p.Sample, pinged.hole) {
		p.findLargest(ctx, o)
	}
	return p
}

// again sends more packets to those of the sample that need it, and gives what came back.
func (p *PingFacts) again(ctx context.Context, by Ping, need func(pinged) bool, size, count int, knock bool,
) map[*pinged]Pong {
	var to []netip.Addr
	for _, x := range p.Sample {
		if need(x) {
			to = append(to, x.target)
		}
	}
	out := map[*pinged]Pong{}
	if len(to) == 0 {
		return out
	}
	outcomes, err := by.send(ctx, to, size, count, knock)
	for i := range p.Sample {
		if x := &p.Sample[i]; err == nil && need(*x) {
			out[x] = find(outcomes, x.target)
		}
	}
	return out
}

func find(outcomes []ping.Outcome, a netip.Addr) Pong {
	i := slices.IndexFunc(outcomes, func(o ping.Outcome) bool { return o.Addr == a })
	if i < 0 {
		return Pong{Addr: a}
	}
	return Pong(outcomes[i])
}

// sample are some of the peers that can be pinged, and how many can.
func (f Facts) sample() (sample []peer, of int) {
	var odd, rest []peer
	for _, p := range f.Peers {
		switch {
		case !p.target.IsValid() || !p.reachable():
		case p.reason != "" || p.odd:
			odd = append(odd, p)
		default:
			rest = append(rest, p)
		}
	}
	rand.Shuffle(len(rest), func(i, j int) { rest[i], rest[j] = rest[j], rest[i] })
	all := slices.Concat(odd, rest)
	return all[:min(len(all), sampleSize)], len(all)
}

// findLargest looks for the largest packet that gets through to one peer of a black hole, by halves. The size that
// seems to be too large in the end is tried once more: if it gets through, the search goes on above it.
func (p *PingFacts) findLargest(ctx context.Context, o Options) {
	x := &p.Sample[slices.IndexFunc(p.Sample, pinged.hole)]
	ctx, cancel := context.WithTimeout(ctx, searchFor)
	defer cancel()
	wait := max(4*x.small.RTT, 100*time.Millisecond)
	largest := &p.Largest
	largest.Peer, largest.Size = x.peer, smallSize
	for tooLarge := p.Size; largest.Size < p.Size && !largest.Exact; {
		size := max((largest.Size+tooLarge)/2, largest.Size+1)
		pongs, err := o.Ping(ctx, []netip.Addr{x.target}, size, searchCount, wait, false)
		if err != nil || ctx.Err() != nil { // what is left is not known
			return
		}
		pong := find(pongs, x.target)
		if size == p.Size {
			x.full = x.full.plus(pong)
		}
		switch {
		case pong.answered() && size == tooLarge:
			largest.Size, tooLarge = size, p.Size
		case pong.answered():
			largest.Size = size
		default:
			largest.Exact = size == tooLarge
			tooLarge = size
		}
	}
}
