// Package packetfilter answers what the packet filter of this host does to a packet: Read turns the rules of nf_tables,
// those of iptables-nft among them, into values, and Filter.Through sends a packet through them. What a rule asks for
// that is not known here stays in it, as a test that can't be judged. The rules of iptables-legacy are only listed
// (ReadLegacy).
package packetfilter

import (
	"encoding/binary"
	"net/netip"
	"slices"
)

// Filter is what nf_tables holds, of whichever program: the base chains that may drop packets, or change the sender of
// those that leave, and the chains that they call.
type Filter []Chain

// Chain is a list of rules.
type Chain struct {
	Family      string // of its table: "ip", "ip6", "inet" or "netdev"
	Table, Name string
	NAT         bool   // of a base chain: it translates addresses
	Hook        string // as nft names it: "input"; empty for a chain that only others call
	Priority    int32  // of a base chain: the lower ones come first
	Policy      string // of a base chain: "accept" or "drop"
	Rules       []Rule
}

// Rule is all tests together, and what happens then. A rule with a verdict map is one Rule for each element.
type Rule struct {
	Tests  []Test
	Action Action
}

// Action is what happens to a packet that passes a rule's tests.
type Action struct {
	Verdict Verdict
	Chain   string // of Jump and Goto
}

// Verdict is what a rule says of a packet.
type Verdict string

// The verdicts.
const (
	Continue Verdict = "" // the next rule
	Accept   Verdict = "accept"
	Drop     Verdict = "drop" // or reject
	Return   Verdict = "return"
	Jump     Verdict = "jump"
	Goto     Verdict = "goto"
	Unclear  Verdict = "unclear" // the packet goes where is not known here
	// Translate gives a packet another sender, which settles that for all chains that come behind.
	Translate Verdict = "masquerade"
)

// Field is a part of a packet, or of what the kernel knows about it.
type Field string

// The fields. Addresses and ports are in the order of the wire, the kernel's own numbers in that of the machine.
const (
	Source        Field = "saddr"
	Destination   Field = "daddr"
	SourcePort    Field = "sport"
	Port          Field = "dport"
	Protocol      Field = "l4proto"   // one byte
	NFProto       Field = "nfproto"   // one byte: 2 or 10
	EtherType     Field = "protocol"  // two bytes
	In            Field = "iifname"   // 16 bytes
	Out           Field = "oifname"   // 16 bytes
	InIndex       Field = "iif"       // four bytes
	OutIndex      Field = "oif"       // four bytes
	State         Field = "ct state"  // four bytes, one bit for each state
	Status        Field = "ct status" // four bytes
	Mark          Field = "mark"      // four bytes
	PacketType    Field = "pkttype"   // one byte
	TypeOfAddress Field = "fib daddr type"
	Reverse       Field = "fib saddr . iif oif" // not 0 if answers leave by the device that the packet came by
)

// longest is the size of an address, of a name, and of a register.
const longest = 16

// size is how many bytes a field has that is not read from a header; the longest where it is not known which one it is.
func (f Field) size() int {
	switch f {
	case Mark, InIndex, OutIndex, State, Status, TypeOfAddress, Reverse:
		return 4
	case EtherType:
		return 2
	case NFProto, Protocol, PacketType:
		return 1
	}
	return longest
}

// Key is a field as seen through a mask; nil masks nothing.
type Key struct {
	Field Field
	Mask  []byte
}

func (k Key) isAddress() bool { return k.Field == Source || k.Field == Destination }

// Test holds if the fields of the key are in one of the ranges; with Not, if they are in none. One without a key can't
// be judged.
type Test struct {
	Key  []Key
	Any  [][]Range // for each alternative a range for each field of the key
	Not  bool
	What string // of a test that can't be judged: what it asks for
	// Sets makes it no test, but a change: from here on it is not known what the field holds.
	Sets Field
}

// Address is the one address that a test asks for; not valid where it asks for something else.
func (t Test) Address() netip.Addr {
	if len(t.Key) != 1 || !t.Key[0].isAddress() || t.Not || len(t.Any) != 1 || len(t.Any[0]) != 1 {
		return netip.Addr{}
	}
	r := t.Any[0][0]
	part := slices.ContainsFunc(t.Key[0].Mask, func(b byte) bool { return b != 0xff })
	a, _ := netip.AddrFromSlice(r.From) // not valid where it is the beginning of one
	if part || !slices.Equal(r.From, r.To) {
		return netip.Addr{}
	}
	return a
}

// Range is both ends of a range, and what is between them.
type Range struct{ From, To []byte }

// States of a connection, as bits of State (NF_CT_STATE_BIT, NF_CT_STATE_INVALID_BIT and NF_CT_STATE_UNTRACKED_BIT of
// uapi/linux/netfilter/nf_conntrack_common.h).
const (
	StateInvalid     = 1
	StateEstablished = 2
	StateRelated     = 4
	StateNew         = 8
	StateUntracked   = 64
)

// statusDNAT is IPS_DST_NAT of the same header, a bit of Status.
const statusDNAT = 1 << 5

// unknownTest is a condition of which is only known what it is called.
func unknownTest(what string) Test { return Test{What: what} }

// equalTest compares one field with one value.
func equalTest(f Field, mask, value []byte, not bool) Test {
	return Test{Key: []Key{{f, mask}}, Any: [][]Range{{{value, value}}}, Not: not}
}

// rangesTest holds if a field is in one of the ranges; with not, if it is in none.
func rangesTest(f Field, not bool, ranges ...Range) Test {
	t := Test{Key: []Key{{Field: f}}, Not: not}
	for _, r := range ranges {
		t.Any = append(t.Any, []Range{r})
	}
	return t
}

// bitTest holds if any of these bits is set in a field of four bytes.
func bitTest(f Field, bits uint32, not bool) Test {
	return equalTest(f, native32(bits), make([]byte, 4), !not)
}

func native32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
func port16(v uint16) []byte   { return binary.BigEndian.AppendUint16(nil, v) }
