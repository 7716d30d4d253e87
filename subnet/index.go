package subnet

import (
	"iter"
	"net/netip"
	"slices"

	"github.com/overlayd/overlayd/addr"
)

// candidate is a lease of another node.
type candidate struct {
	*Entry
	lease    *Lease // without the families that the network does not use; nil if it is rejected by itself
	accepted bool
}

// leaseIndex finds leases that have in common what only one node can have: a part of a subnet, a public IP, or a
// tunnel end.
type leaseIndex struct {
	subnets addr.Per[[]*candidate] // those with a subnet of the family, in its order
	lengths addr.Per[[]int]        // how many of these have a prefix of this length; nil: there was none yet
	room    int                    // for so many leases
	ips     holders[[16]byte]
	ends    holders[tunnelEnd]
}

// holders are the leases with a key: only one, most often.
type holders[K comparable] struct {
	first map[K]*candidate
	more  map[K][]*candidate
}

// add reports whether another lease had the key.
func (h *holders[K]) add(k K, c *candidate) bool {
	switch h.first[k] {
	case nil:
		h.first[k] = c
		return false
	case c: // both families have the same MAC
		return false
	}
	if h.more == nil {
		h.more = map[K][]*candidate{}
	}
	h.more[k] = append(h.more[k], c)
	return true
}

func (h *holders[K]) remove(k K, c *candidate) {
	more := slices.DeleteFunc(h.more[k], func(o *candidate) bool { return o == c })
	switch {
	case h.first[k] != c:
	case len(more) == 0:
		delete(h.first, k)
	default:
		h.first[k], more = more[0], more[1:]
	}
	if len(more) == 0 {
		delete(h.more, k)
	} else {
		h.more[k] = more
	}
}

// linked lists others with a key: the first of them, which itself is linked to all.
func (h *holders[K]) linked(k K, c *candidate, yield func(*candidate) bool) bool {
	first := h.first[k]
	if first != c {
		return first == nil || yield(first)
	}
	for _, o := range h.more[k] {
		if !yield(o) {
			return false
		}
	}
	return true
}

func (l *Lease) overlaps(o *Lease) bool {
	return overlap(l.Subnets.V4, o.Subnets.V4) || overlap(l.Subnets.V6, o.Subnets.V6)
}

// tunnelEnd is what one node alone can have: the MAC of its device, or its public key. The zero value: neither.
type tunnelEnd struct {
	mac addr.MAC
	key PublicKey
}

func (e tunnelEnd) String() string {
	if e.key != "" {
		return "PublicKey " + string(e.key)
	}
	return "VtepMAC " + e.mac.String()
}

// end is that of a family which the lease is in.
func (l *Lease) end(f addr.Family) tunnelEnd {
	if !l.Subnets.Get(f).IsValid() {
		return tunnelEnd{}
	}
	return tunnelEnd{l.VTEP.Get(f).MAC, l.PublicKey}
}

// sharedEnd is an end that both leases have; the zero one: none.
func (l *Lease) sharedEnd(o *Lease) tunnelEnd {
	for _, f := range addr.Families() {
		if e := l.end(f); e != (tunnelEnd{}) && (e == o.end(addr.IPv4) || e == o.end(addr.IPv6)) {
			return e
		}
	}
	return tunnelEnd{}
}

// search finds where something is in a sorted list, or has to be: at its end, if much comes in order.
func search[T, K any](list []T, key K, compare func(T, K) int) (int, bool) {
	if n := len(list); n == 0 || compare(list[n-1], key) < 0 {
		return n, false
	}
	return slices.BinarySearchFunc(list, key, compare)
}

// at is where a list has the first subnet that is not before p.
func at(list []*candidate, f addr.Family, p netip.Prefix) int {
	i, _ := search(list, p, func(c *candidate, p netip.Prefix) int {
		return addr.ComparePrefix(c.lease.Subnets.Get(f), p)
	})
	return i
}

// newIndex makes an index with room for n leases.
func newIndex(n int) leaseIndex {
	return leaseIndex{
		room: n,
		ips:  holders[[16]byte]{first: make(map[[16]byte]*candidate, n)},
		ends: holders[tunnelEnd]{first: make(map[tunnelEnd]*candidate, n)},
	}
}

// add reports whether the lease has something in common with one that was there.
func (x *leaseIndex) add(c *candidate) (met bool) {
	meet := func(*candidate) bool { met = true; return false }
	for _, f := range addr.Families() {
		sn := c.lease.Subnets.Get(f)
		if !sn.IsValid() {
			continue
		}
		if x.lengths.Get(f) == nil {
			x.lengths.Set(f, make([]int, f.Bits()+1))
			x.subnets.Set(f, make([]*candidate, 0, x.room))
		}
		x.overlapping(c, f, meet)
		list := x.subnets.Get(f)
		x.subnets.Set(f, slices.Insert(list, at(list, f, sn), c))
		x.lengths.Get(f)[sn.Bits()]++
		met = x.ips.add(c.lease.PublicIP.Get(f).As16(), c) || met
		if e := c.lease.end(f); e != (tunnelEnd{}) {
			met = x.ends.add(e, c) || met
		}
	}
	return met
}

func (x *leaseIndex) remove(c *candidate) {
	for _, f := range addr.Families() {
		sn := c.lease.Subnets.Get(f)
		if !sn.IsValid() {
			continue
		}
		list := x.subnets.Get(f)
		i := at(list, f, sn)
		i += slices.Index(list[i:], c)
		x.subnets.Set(f, slices.Delete(list, i, i+1))
		x.lengths.Get(f)[sn.Bits()]--
		x.ips.remove(c.lease.PublicIP.Get(f).As16(), c)
		x.ends.remove(c.lease.end(f), c)
	}
}

// linked lists leases that have something in common with c. Where many have the same, it is the first of them, and only
// that one is linked to all: going on from lease to lease leads to each, in a time that grows with their number.
func (x *leaseIndex) linked(c *candidate) iter.Seq[*candidate] {
	return func(yield func(*candidate) bool) {
		for _, f := range addr.Families() {
			more := !c.lease.Subnets.Get(f).IsValid() || x.overlapping(c, f, yield) &&
				x.ips.linked(c.lease.PublicIP.Get(f).As16(), c, yield) &&
				x.ends.linked(c.lease.end(f), c, yield)
			if !more {
				return
			}
		}
	}
}

// meets reports whether a lease has something in common with another one of the index.
func (x *leaseIndex) meets(c *candidate) bool {
	for range x.linked(c) {
		return true
	}
	return false
}

func (x *leaseIndex) overlapping(c *candidate, f addr.Family, yield func(*candidate) bool) bool {
	sn, list := c.lease.Subnets.Get(f), x.subnets.Get(f)
	for bits, n := range x.lengths.Get(f) {
		if bits == sn.Bits() {
			break
		}
		if n == 0 {
			continue
		}
		around := netip.PrefixFrom(sn.Addr(), bits).Masked()
		i := at(list, f, around)
		if i < len(list) && list[i].lease.Subnets.Get(f) == around && !yield(list[i]) {
			return false
		}
	}
	same := list[at(list, f, sn):] // and those inside
	for _, o := range same {
		p := o.lease.Subnets.Get(f)
		if !sn.Overlaps(p) {
			break
		}
		if o != c && !yield(o) {
			return false
		}
		if o != c && p == sn && same[0] != c { // this one is linked to the others
			break
		}
	}
	return true
}

// related lists the leases that can make a difference to each other: those given, those linked to them, and so on.
// Some of them are in dispute, the others share nothing with any.
func (x *leaseIndex) related(given []*candidate) (all, disputed []*candidate) {
	seen := map[*candidate]bool{}
	add := func(c *candidate) {
		if !seen[c] {
			seen[c] = true
			all = append(all, c)
		}
	}
	for _, c := range given {
		add(c)
	}
	for i := 0; i < len(all); i++ {
		before := len(disputed)
		for o := range x.linked(all[i]) {
			add(o)
			if len(disputed) == before {
				disputed = append(disputed, all[i])
			}
		}
	}
	return all, disputed
}
