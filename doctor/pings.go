package doctor

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"
)

// PingFacts is what came of pinging peers the way that pods' packets go.
type PingFacts struct {
	Err    error // why nothing was pinged
	Sample []pinged
	Of     int // peers that could be pinged
	// Largest is, for one peer that only small packets reach, the largest that does.
	Largest struct {
		Peer  peer
		Size  int
		Exact bool // otherwise it may be a little more: the search took too long
	}
}

type pinged struct {
	peer
	small, full Pong
	sized       bool // a full packet was tried
}

func (p pinged) answers() bool { return p.small.answered() }
func (p pinged) refused() bool { return p.sized && p.full.refused() }
func (p pinged) hole() bool {
	return p.sized && p.answers() && p.full.Sent > 0 && !p.full.answered() && !p.full.refused()
}

func (p Pong) answered() bool { return p.Sent > p.Lost }

// refused: nothing left this node.
func (p Pong) refused() bool { return p.Err != nil && !p.answered() }

const (
	sampleSize = 32
	smallSize  = 64 // bytes, with the IP header
	pingCount  = 2
)

// errNobody says that there is no peer to ping.
var errNobody = errors.New("no other node is known")

// ping asks a sample of the peers: those that already have a problem first.
func (f *Facts) ping(ctx context.Context, o Options) {
	switch {
	case o.Ping == nil:
		f.Pings.Err = errors.New("this build can't ping")
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
	ctx, cancel := context.WithTimeout(ctx, 2*pingFor)
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
		pongs, err := o.Ping(ctx, to, smallSize, pingCount, pingFor)
		small <- answer{pongs, err}
	}()
	go func() {
		if full == 0 {
			large <- answer{}
			return
		}
		pongs, err := o.Ping(ctx, to, full, pingCount, pingFor)
		large <- answer{pongs, err}
	}()
	a, b := <-small, <-large
	if a.err != nil {
		f.Pings.Err = a.err
		return
	}
	for _, p := range sample {
		q := pinged{peer: p, small: find(a.pongs, p.target)}
		if full > 0 && b.err == nil {
			q.full, q.sized = find(b.pongs, p.target), true
		}
		f.Pings.Sample = append(f.Pings.Sample, q)
	}
	f.findLargest(context.WithoutCancel(ctx), o, full)
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

// findLargest looks for the largest packet that gets through to one peer of a black hole.
func (f *Facts) findLargest(ctx context.Context, o Options, full int) {
	i := slices.IndexFunc(f.Pings.Sample, pinged.hole)
	if i < 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 2*pingFor)
	defer cancel()
	p := f.Pings.Sample[i]
	wait := max(4*p.small.RTT, 40*time.Millisecond)
	lo, hi := smallSize, full // lo gets through, hi does not
	for hi-lo > 1 {
		size := (lo + hi) / 2
		pongs, err := o.Ping(ctx, []netip.Addr{p.target}, size, 1, wait)
		if err != nil || ctx.Err() != nil { // what is left is not known
			break
		}
		if find(pongs, p.target).answered() {
			lo = size
		} else {
			hi = size
		}
	}
	f.Pings.Largest.Peer, f.Pings.Largest.Size, f.Pings.Largest.Exact = p.peer, lo, hi-lo == 1
}
