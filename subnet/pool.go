package subnet

import (
	"encoding/binary"
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
	shift := p.shift()
	hi, lo := halves(p.Min)
	addHi, addLo := i>>(64-shift%64), i<<(shift%64) // i << (shift mod 64), as two words
	if shift%64 == 0 {
		addHi, addLo = 0, i
	}
	if shift >= 64 {
		addHi, addLo = addLo, 0
	}
	var carry uint64
	lo, carry = bits.Add64(lo, addLo, 0)
	hi, _ = bits.Add64(hi, addHi, carry)
	return netip.PrefixFrom(join(hi, lo, p.Network.Addr().Is4()), p.SubnetLen)
}

// span is a range of subnet indices, both ends inside.
type span struct{ first, last uint64 }

// Leased counts the leases that take some of the pool's subnets.
func (p Pool) Leased(t Table) (n int) {
	for _, e := range t.Entries {
		for _, f := range addr.Families() {
			if _, ok := p.span(e.Subnets.Get(f)); ok {
				n++
			}
		}
	}
	return n
}

// span tells which of the pool's subnets a prefix overlaps; ok is false where there is none.
func (p Pool) span(x netip.Prefix) (s span, ok bool) {
	if !p.On() || !x.IsValid() || x.Addr().Is4() != p.Network.Addr().Is4() {
		return span{}, false
	}
	first, last := x.Masked().Addr(), addr.Last(x)
	if last.Less(p.Min) || addr.Last(netip.PrefixFrom(p.Max, p.SubnetLen)).Less(first) {
		return span{}, false
	}
	if first.Less(p.Min) {
		first = p.Min
	}
	if p.Max.Less(last) {
		last = p.Max
	}
	s = span{p.index(first), min(p.index(last), maxSubnets-1)}
	return s, s.first < maxSubnets
}

// fits reports whether a prefix is a subnet of the network, of the length that it leases. Min and Max do not count here: they bound
// what is chosen, and a reservation or an older config may have gone beyond.
func (p Pool) fits(x netip.Prefix) bool {
	return x.IsValid() && x.Bits() == p.SubnetLen && x.Masked() == x && p.Network.Contains(x.Addr())
}

// index is how many subnets lie between Min and the subnet of a (which is not below Min), capped at the largest number.
func (p Pool) index(a netip.Addr) uint64 {
	shift := p.shift()
	hi, lo := halves(a)
	minHi, minLo := halves(p.Min)
	lo, borrow := bits.Sub64(lo, minLo, 0)
	hi, _ = bits.Sub64(hi, minHi, borrow)
	if shift >= 64 {
		return hi >> (shift - 64)
	}
	if hi>>shift != 0 {
		return ^uint64(0)
	}
	return lo>>shift | hi<<(64-shift)
}

// floor is the first address of the subnet that holds a.
func (p Pool) floor(a netip.Addr) netip.Addr { return netip.PrefixFrom(a, p.SubnetLen).Masked().Addr() }

// shift is the number of host bits in a subnet.
func (p Pool) shift() int { return p.Network.Addr().BitLen() - p.SubnetLen }

// halves gives an address as two words; an IPv4 address is a number in the low one.
func halves(a netip.Addr) (hi, lo uint64) {
	if a.Is4() {
		b := a.As4()
		return 0, uint64(binary.BigEndian.Uint32(b[:]))
	}
	b := a.As16()
	return binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
}

func join(hi, lo uint64, is4 bool) netip.Addr {
	if is4 {
		return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, uint32(lo))))
	}
	return netip.AddrFrom16([16]byte(binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, hi), lo)))
}
