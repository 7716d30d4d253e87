// Package addr holds the address values that every other package shares: the two IP families as one type, a pair of
// values with one for each family, and a MAC address that can be compared. It does no I/O.
package addr

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
)

// Family is one of the two IP families. Its value is the protocol's version number, 4 or 6.
type Family uint8

// The two families. There is no third, and no zero family.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// Families lists both families in the order in which they are worked through and printed.
func Families() [2]Family { return [2]Family{IPv4, IPv6} }

// FamilyOf tells the family of a valid address; a v4-mapped IPv6 address counts as IPv6, as it does on the wire.
func FamilyOf(a netip.Addr) Family {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

// Bits is the length of an address of this family: 32 or 128.
func (f Family) Bits() int {
	if f == IPv4 {
		return 32
	}
	return 128
}

// Host is the prefix that holds this one address: a /32 or a /128.
func Host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// ParseHost reads the address of a host, of one of these families; false: it is none.
func ParseHost(text string, families ...Family) (netip.Addr, bool) {
	a, err := netip.ParseAddr(text)
	if err != nil || a.Is4In6() || a.IsUnspecified() || a.Zone() != "" || !slices.Contains(families, FamilyOf(a)) {
		return netip.Addr{}, false
	}
	return a, true
}

func (f Family) String() string { return fmt.Sprintf("IPv%d", uint8(f)) }

// Per holds one value for each family; the zero value of T stands for "this family is not in use". It is comparable
// where T is.
type Per[T any] struct{ V4, V6 T }

// Get returns the value of one family.
func (p Per[T]) Get(f Family) T {
	if f == IPv4 {
		return p.V4
	}
	return p.V6
}

// Set changes the value of one family.
func (p *Per[T]) Set(f Family, v T) {
	if f == IPv4 {
		p.V4 = v
	} else {
		p.V6 = v
	}
}

// MAC is an Ethernet address as a comparable value. The zero value means "none".
type MAC [6]byte

// ParseMAC reads the usual notation, six octets in hexadecimal with colons or dashes; any other length is an error.
func ParseMAC(s string) (MAC, error) {
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != len(MAC{}) {
		return MAC{}, fmt.Errorf("%q is not a MAC address of six octets", s)
	}
	return MAC(hw), nil
}

// IsZero reports whether m is the all-zero address.
func (m MAC) IsZero() bool { return m == MAC{} }

// IsGroup reports whether m is a multicast or broadcast address (the I/G bit, IEEE 802-2014 §8.2).
func (m MAC) IsGroup() bool { return m[0]&1 == 1 }

// Compare orders MAC addresses as numbers.
func (m MAC) Compare(o MAC) int {
	switch a, b := m.Uint64(), o.Uint64(); {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// Uint64 is the address as a number: the order of the numbers is that of the addresses.
func (m MAC) Uint64() uint64 {
	return uint64(binary.BigEndian.Uint16(m[:2]))<<32 | uint64(binary.BigEndian.Uint32(m[2:]))
}

func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// Last returns the highest address of a prefix.
func Last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// ComparePrefix orders prefixes by address, then by length: IPv4 before IPv6.
func ComparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}
