package netstate

import (
	"encoding/binary"
)

// What stands here is the packet filter as values that can be judged: every chain that may drop a packet or change its sender, of
// nftables, of iptables-nft and of iptables-legacy, with its rules as tests on fields of a packet. What a rule asks for that is not known here stays visible as
// a test that can't be judged.

// FilterChain is a chain of rules that may drop packets, or translate their addresses.
type FilterChain struct {
	Family      string // of its table: "ip", "ip6", "inet", "netdev", "bridge"
	Table, Name string
	Legacy      bool     // iptables-legacy holds it
	NAT         bool     // of a base chain: it translates addresses
	Hook        string   // "prerouting", "input", "forward", "output", "postrouting" or "ingress"; empty for one that only others call
	Priority    int32    // of a base chain: the lower ones come first
	Devices     []string // of an ingress chain
	Policy      string   // of a base chain: "accept" or "drop"
	Rules       []FilterRule
}

// FilterRule is all tests together, and what happens then.
type FilterRule struct {
	Tests []FilterTest
	// Map, where it is set, looks the action up instead.
	Map    []FilterCase
	Key    []FilterField // of Map
	Action FilterAction
	// Changes are the fields that the rule sets to what is not known here: FieldMark, FieldState.
	Changes []Field
	Handle  uint64 // of a rule of nf_tables
}

// FilterAction is what happens to a packet that passes a rule's tests.
type FilterAction struct {
	Verdict Verdict
	Chain   string // of Jump and Goto
}

// FilterCase is one element of a map from fields to actions.
type FilterCase struct {
	Ranges []FilterRange
	Action FilterAction
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
	Unclear  Verdict = "unclear" // it ends somewhere that is not known here
	// Translate gives a packet another sender, which settles that for all chains that come behind.
	Translate Verdict = "masquerade"
)

// Field is a part of a packet, or of what the kernel knows about it.
type Field string

// The fields. Addresses and ports are in the order of the wire, the kernel's own numbers in that of the machine.
const (
	FieldSource      Field = "saddr"
	FieldDestination Field = "daddr"
	FieldSourcePort  Field = "sport"
	FieldPort        Field = "dport"
	FieldProtocol    Field = "l4proto"   // one byte
	FieldFamily      Field = "nfproto"   // one byte: 2 or 10
	FieldEtherType   Field = "protocol"  // two bytes
	FieldIn          Field = "iifname"   // 16 bytes
	FieldOut         Field = "oifname"   // 16 bytes
	FieldInIndex     Field = "iif"       // four bytes
	FieldOutIndex    Field = "oif"       // four bytes
	FieldInType      Field = "iiftype"   // two bytes
	FieldState       Field = "ct state"  // four bytes, one bit for each state
	FieldStatus      Field = "ct status" // four bytes
	FieldMark        Field = "mark"      // four bytes
	FieldPacketType  Field = "pkttype"   // one byte
	FieldTypeOfDst   Field = "fib daddr type"
	FieldReverse     Field = "fib saddr . iif oif" // four bytes: not 0 if answers leave by the device that the packet came by
	FieldUnknown     Field = ""                    // what can't be known of a packet, or is not known here
)

// FilterField is a field as seen through a mask; nil masks nothing.
type FilterField struct {
	Field Field
	Mask  []byte
}

// FilterTest holds if the fields are in one of the ranges; with Not, if they are in none.
type FilterTest struct {
	Key  []FilterField
	Any  [][]FilterRange // for each alternative a range for each field of the key
	Not  bool
	What string // of a test that can't be judged: what it asks for
}

// FilterRange is both ends of a range, and what is between them.
type FilterRange struct{ From, To []byte }

// States of a connection, as bits of FieldState (NF_CT_STATE_BIT, NF_CT_STATE_INVALID_BIT and NF_CT_STATE_UNTRACKED_BIT of
// uapi/linux/netfilter/nf_conntrack_common.h).
const (
	StateInvalid     = 1
	StateEstablished = 2
	StateRelated     = 4
	StateNew         = 8
	StateUntracked   = 64
)

// unknownTest is a condition of which is only known what it is called.
func unknownTest(what string) FilterTest {
	return FilterTest{Key: []FilterField{{Field: FieldUnknown}}, What: what}
}

// fieldTest compares one field with one value.
func fieldTest(f Field, mask, from, to []byte, not bool) FilterTest {
	return FilterTest{Key: []FilterField{{f, mask}}, Any: [][]FilterRange{{{from, to}}}, Not: not}
}

// bitTest holds if any of these bits is set in a field of four bytes.
func bitTest(f Field, bits uint32, not bool) FilterTest {
	mask := binary.NativeEndian.AppendUint32(nil, bits)
	zero := make([]byte, 4)
	return FilterTest{Key: []FilterField{{f, mask}}, Any: [][]FilterRange{{{zero, zero}}}, Not: !not}
}
