package subnet

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"

	"github.com/overlayd/overlayd/addr"
)

// PoolFullError says that no subnet is left, and what takes them up.
type PoolFullError struct {
	Pool         Pool   // that is full: of a dual-stack network, the other family's may have room
	Size         uint64 // subnets that could be leased
	Leases       int    // that take up some of them
	Reservations int
}

func (e *PoolFullError) Error() string {
	return fmt.Sprintf("no free subnet: all %d (%s to %s) are taken by %d leases and %d reservations",
		e.Size, e.Pool.Subnet(0), e.Pool.Subnet(e.Size-1), e.Leases, e.Reservations)
}

// pick chooses free subnets. Those in before are kept where they fit the network and are free; otherwise it is the
// first free one at or behind a hash of the node's identity, so that a node that lost everything tends to come back
// where it was. attempt moves that start, for those who lost a race. The work grows with the number of leases, not with
// the size of the pool.
func pick(c Config, taken []*Entry, before addr.Per[netip.Prefix], id Identity, attempt int) (
	addr.Per[netip.Prefix], error,
) {
	start := hash(id, attempt)
	kept := addr.Per[netip.Prefix]{}
	for _, f := range c.Families() {
		if p, sn := c.Pools.Get(f), before.Get(f); p.fits(sn) && free(sn, taken) {
			kept.Set(f, sn)
			start = p.index(sn.Addr())
		}
	}
	if kept == (addr.Per[netip.Prefix]{}) {
		if s, ok := pickPair(c, taken, start); ok {
			return s, nil
		}
	}
	return pickEach(c, taken, kept, start)
}

// pickPair chooses the same index in all pools in use.
func pickPair(c Config, taken []*Entry, start uint64) (s addr.Per[netip.Prefix], ok bool) {
	size := uint64(maxSubnets)
	for _, f := range c.Families() {
		size = min(size, c.Pools.Get(f).Size())
	}
	start %= size
	if s := c.pair(start); allFree(c, s, taken) { // in a pool with room, this is it most often
		return s, true
	}
	var busy []span
	for _, f := range c.Families() {
		busy = append(busy, c.Pools.Get(f).spans(taken)...)
	}
	i, ok := firstFree(busy, size, start)
	if !ok {
		return s, false
	}
	return c.pair(i), true
}

// pair is the subnets with an index, one of each pool in use.
func (c Config) pair(i uint64) (s addr.Per[netip.Prefix]) {
	for _, f := range c.Families() {
		s.Set(f, c.Pools.Get(f).Subnet(i))
	}
	return s
}

// pickEach chooses for each family by itself what is not kept: a dual-stack network may have no index that is free in
// both pools.
func pickEach(c Config, taken []*Entry, kept addr.Per[netip.Prefix], start uint64) (addr.Per[netip.Prefix], error) {
	for _, f := range c.Families() {
		if kept.Get(f).IsValid() {
			continue
		}
		p := c.Pools.Get(f)
		i, ok := firstFree(p.spans(taken), p.Size(), start%p.Size())
		if !ok {
			return kept, fullError(p, taken)
		}
		kept.Set(f, p.Subnet(i))
	}
	return kept, nil
}

// firstFree is the first index at or behind start, going round at size, that lies in none of the spans.
func firstFree(busy []span, size, start uint64) (uint64, bool) {
	slices.SortFunc(busy, func(a, b span) int { return cmp.Compare(a.first, b.first) })
	from := func(i uint64) uint64 {
		for _, s := range busy {
			if s.first > i {
				break
			}
			if s.last >= i {
				i = s.last + 1
			}
		}
		return i
	}
	if i := from(start); i < size {
		return i, true
	}
	i := from(0)
	return i, i < start
}

// free reports whether no entry takes up any part of a subnet.
func free(sn netip.Prefix, taken []*Entry) bool {
	f := addr.FamilyOf(sn.Addr())
	return !slices.ContainsFunc(taken, func(e *Entry) bool { return overlap(e.Subnets.Get(f), sn) })
}

// paired reports whether subnets have the same index in every pool, so that whoever holds the one key part holds the
// other. What is not paired has to be guarded on the whole table, since two keys may differ and still share one
// family's subnet. Below Min there are no indices.
func paired(c Config, s addr.Per[netip.Prefix]) bool {
	fs := c.Families()
	if len(fs) == 1 {
		return true
	}
	first := c.Pools.Get(fs[0]).index(s.Get(fs[0]).Addr())
	for _, f := range fs {
		if i := c.Pools.Get(f).index(s.Get(f).Addr()); i != first || i >= maxSubnets {
			return false
		}
	}
	return true
}

func fullError(p Pool, taken []*Entry) error {
	full := &PoolFullError{Pool: p, Size: p.Size()}
	for _, e := range taken {
		switch inside := p.overlaps(e.Subnets.Get(p.family())); {
		case inside && e.Reserved():
			full.Reservations++
		case inside:
			full.Leases++
		}
	}
	return full
}

func hash(id Identity, attempt int) uint64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(id.NodeID + "\x00" + id.NodeName + "\x00"))
	_, _ = h.Write(binary.BigEndian.AppendUint32(nil, uint32(attempt)))
	// FNV's low bits alone follow the last byte too closely: mix them with the high ones (the finalizer of splitmix64).
	x := h.Sum64()
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
