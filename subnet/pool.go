package subnet

import (
	"encoding/binary"
	"math"
	"math/bits"
	"net/netip"

	"github.com/overlayd/overlayd/addr"
)

// maxSubnets bounds the index space of a pool. A larger pool (an IPv6 /1 could hold 2^125 subnets) is used up to there.
const maxSubnets = 1 << 62

// Size is the number of subnets that may be leased from the pool.
func (p Pool) Size() uint64 {
	i := p.index(p.Max)
	return min(i, maxSubnets-1) + 1
}

// Subnet is the subnet with the given index, from 0 (the one at Min) to Size()-1.
func (p Pool) Subnet(i uint64) netip.Prefix {
	h := p.hostBits()
	hi, lo := halves(p.Min)
	lo, carry := bits.Add64(lo, i<<h, 0)
	hi, _ = bits.Add64(hi, i<<(h-64)|i>>(64-h), carry) // a shift by 64 or more, also by a difference below 0, leaves 0
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], hi)
	binary.BigEndian.PutUint64(b[8:], lo)
	a := netip.AddrFrom16(b)
	if p.Min.Is4() {
		a = a.Unmap()
	}
	return netip.PrefixFrom(a, p.SubnetLen)
}

// span is a range of subnet indices, both ends inside.
type span struct{ first, last uint64 }

// Leased counts the leases that take some of the pool's subnets.
func (p Pool) Leased(t Table) (n int) {
	for _, e := range t.Entries {
		n += b2i(p.overlaps(e.Subnets.Get(p.family())))
	}
	return n
}

// overlaps reports whether a prefix of the pool's family takes some of its subnets.
func (p Pool) overlaps(x netip.Prefix) bool {
	last := netip.PrefixFrom(p.Max, p.SubnetLen)
	return p.On() && x.IsValid() && (p.Min.Less(x.Addr()) || x.Contains(p.Min)) &&
		(x.Addr().Less(p.Max) || last.Overlaps(x))
}

// spans lists what entries take up in the pool.
func (p Pool) spans(es []*Entry) []span {
	var out []span
	for _, e := range es {
		if s, ok := p.span(e.Subnets.Get(p.family())); ok {
			out = append(out, s)
		}
	}
	return out
}

func (p Pool) family() addr.Family { return addr.FamilyOf(p.Network.Addr()) }

// span is the pool's subnets that a prefix of its family overlaps; not ok: none.
func (p Pool) span(x netip.Prefix) (s span, ok bool) {
	if !p.overlaps(x) {
		return span{}, false
	}
	first, last := x.Masked().Addr(), addr.Last(x)
	if first.Less(p.Min) {
		first = p.Min
	}
	if p.Max.Less(last) {
		last = p.Max
	}
	s = span{p.index(first), min(p.index(last), maxSubnets-1)}
	return s, s.first < maxSubnets
}

// fits reports whether a prefix is a subnet of the network, of the length that it leases. Min and Max do not count
// here: they bound what is chosen, and a reservation or an older config may have gone beyond.
func (p Pool) fits(x netip.Prefix) bool {
	return x.IsValid() && x.Bits() == p.SubnetLen && x.Masked() == x && p.Network.Contains(x.Addr())
}

// index is how many subnets lie between Min and the subnet of a (which is not below Min), capped at the largest number.
func (p Pool) index(a netip.Addr) uint64 {
	h := p.hostBits()
	hi, lo := halves(a)
	minHi, minLo := halves(p.Min)
	lo, borrow := bits.Sub64(lo, minLo, 0)
	hi, _ = bits.Sub64(hi, minHi, borrow)
	switch {
	case h >= 64:
		return hi >> (h - 64)
	case hi>>h > 0:
		return math.MaxUint64
	}
	return hi<<(64-h) | lo>>h
}

// floor is the first address of the subnet that holds a.
func (p Pool) floor(a netip.Addr) netip.Addr { return netip.PrefixFrom(a, p.SubnetLen).Masked().Addr() }

// hostBits is how many there are in an address of a subnet.
func (p Pool) hostBits() uint { return uint(p.Network.Addr().BitLen() - p.SubnetLen) }

// halves is an address as a number of two words. One of IPv4 is that of its IPv6 form: only differences count.
func halves(a netip.Addr) (hi, lo uint64) {
	b := a.As16()
	return binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
}
