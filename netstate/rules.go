package netstate

import (
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// Rule is a routing rule with our protocol number: packets from one network to another are looked up in a table. All
// fields are its key.
type Rule struct {
	Priority uint32
	From, To netip.Prefix // both of the rule's family; of length 0: any
	Table    uint32
	AtLeast  uint8  // shorter prefixes in the table count as none (one less is iproute2's suppress_prefixlength)
	Unmarked uint32 // the packet's mark has none of these bits
}

// Compare orders rules by key.
func (r Rule) Compare(o Rule) int {
	return cmp.Or(cmp.Compare(r.Priority, o.Priority), addr.ComparePrefix(r.From, o.From), addr.ComparePrefix(r.To, o.To),
		cmp.Compare(r.Table, o.Table), cmp.Compare(r.AtLeast, o.AtLeast), cmp.Compare(r.Unmarked, o.Unmarked))
}

func (r Rule) String() string {
	return "rule " + HostRule{Rule: r, Mask: r.Unmarked, Action: RuleToTable}.String()
}

// HostRule is any routing rule of the node but ours.
type HostRule struct {
	Rule
	Action     RuleAction
	Mark, Mask uint32
	In, Out    string // devices
	Not        bool   // it is for the packets that do not match
	VRF        bool   // it is for the packets of devices in a VRF, and looks up the table of that
	Other      bool   // it depends on something else too: a user, a port
}

// RuleAction is what becomes of a packet that a rule is for (FR_ACT_*, uapi/linux/fib_rules.h).
type RuleAction uint8

// The actions that matter; a number above them drops the packet.
const (
	RuleToTable RuleAction = 1
	RuleGoto    RuleAction = 2
	RuleNop     RuleAction = 3
)

func (r HostRule) String() string {
	var b strings.Builder
	add := func(on bool, format string, args ...any) {
		if on {
			fmt.Fprintf(&b, format, args...)
		}
	}
	add(true, "%d", r.Priority)
	add(r.Not, " not")
	if r.From.Bits() > 0 {
		add(true, " from %s", r.From)
	} else {
		add(true, " from all")
	}
	add(r.To.Bits() > 0, " to %s", r.To)
	add(r.Mask != 0, " fwmark %#x/%#x", r.Mark, r.Mask)
	add(r.In != "", " iif %s", r.In)
	add(r.Out != "", " oif %s", r.Out)
	switch {
	case r.VRF:
		add(true, " lookup [l3mdev-table]")
	case r.Action == RuleToTable:
		add(true, " lookup %d", r.Table)
	case r.Action == RuleGoto:
		add(true, " goto")
	case r.Action == RuleNop:
		add(true, " nop")
	default:
		add(r.Action == unix.RTN_BLACKHOLE, " blackhole")
		add(r.Action == unix.RTN_UNREACHABLE, " unreachable")
		add(r.Action == unix.RTN_PROHIBIT, " prohibit")
	}
	add(r.AtLeast > 0, " suppress_prefixlength %d", int(r.AtLeast)-1)
	return b.String()
}

// everything reports whether a rule is for all packets that another one is for.
func (r HostRule) everything(o Rule) bool {
	selective := r.Not || r.Mask != 0 || r.In != "" || r.Out != "" || r.VRF || r.Other
	return !selective && contains(r.From, o.From) && contains(r.To, o.To)
}

// leadsTo reports whether a rule does all that one of ours is to do.
func (r HostRule) leadsTo(o Rule) bool {
	return r.everything(o) && r.Action == RuleToTable && r.Table == o.Table && int(r.AtLeast) <= o.To.Bits()
}

// selects reports whether a rule may be for some of the packets that one of ours is for.
func (r HostRule) selects(o Rule) bool {
	if r.Not {
		r.Not = false
		return !r.everything(o)
	}
	return r.From.Overlaps(o.From) && r.To.Overlaps(o.To)
}

// marked reports whether a rule is for packets with a certain mark: another program has put it on them to have them
// take this rule.
func (r HostRule) marked() bool { return !r.Not && r.Mark&r.Mask != 0 }

// drops reports whether what a rule is for is thrown away.
func (r HostRule) drops() bool { return r.Action > RuleNop }

// diverts reports whether a rule may take packets elsewhere that one of ours is for, without being meant for them
// alone.
func (r HostRule) diverts(o Rule) bool {
	switch {
	case !r.selects(o), r.Action == RuleNop, r.marked(), r.Out != "", r.VRF:
		return false
	case r.Action == RuleToTable && (r.Table == unix.RT_TABLE_LOCAL || r.Table == o.Table):
		return false
	case r.drops() && !r.Not:
		// What is dropped because of where it comes from is a filter, unless that is where pods are.
		pods := o.To
		if pods.Bits() == 0 {
			pods = o.From
		}
		return r.In == "" && !r.Other && r.From.Overlaps(pods)
	}
	return true
}

func contains(outer, inner netip.Prefix) bool {
	return outer.Bits() <= inner.Bits() && outer.Contains(inner.Addr())
}

// MainPriority is where the rule for the main table stands in every kernel (fib4_default_rules_init).
const MainPriority = 32766

// ToMain is the rule by which packets to a network find what the main table has for it and its parts. Other
// destinations go on to the rules behind it, also where the main table has a default route.
func ToMain(network netip.Prefix) Rule {
	return Rule{Priority: MainPriority, To: network, Table: MainTable, AtLeast: uint8(network.Bits())}
}

// Precede places a rule of ours: where it is to stand by itself, or else just before the first rule of another program
// that may take its packets elsewhere. It is none where a rule that is there does the same. The local table comes
// before it in any case. An error says that there is no place for it; then it stands where it is of some use at least.
func (h Host) Precede(r Rule) ([]Rule, error) {
	r.From, r.To = orAny(r.From, r.To), orAny(r.To, r.From)
	local := -1 // the priority of the rule for the local table
	first := HostRule{}
	found, seen := false, false
	for _, o := range h.Rules {
		if addr.FamilyOf(o.From.Addr()) != addr.FamilyOf(r.From.Addr()) {
			continue
		}
		seen = true
		switch {
		case o.Priority > r.Priority:
		case o.leadsTo(r) && !found:
			return nil, nil
		case found && o.marked() && o.selects(r) && !o.leadsTo(r):
			r.Unmarked |= o.Mark & o.Mask // what was marked for a rule behind this one goes there as before
		case !found && o.Table == unix.RT_TABLE_LOCAL && o.everything(r) && o.Action == RuleToTable:
			local = int(o.Priority)
		case !found && o.diverts(r):
			first, found = o, true
		}
	}
	switch {
	case !seen && r.Table == MainTable: // a kernel without rules
		return nil, nil
	case !found:
		return []Rule{r}, nil
	}
	room := int(first.Priority)
	r.Priority = uint32(max(room-1, 0))
	if local >= 0 || r.Table != MainTable {
		if room == 0 || room == local {
			r.Priority = first.Priority
			return []Rule{r}, fmt.Errorf("no rule can precede %q of another program: give that one a higher number", first)
		}
		return []Rule{r}, nil
	}
	if room < 2 {
		return nil, fmt.Errorf("no rule can precede %q of another program, which precedes the local table: "+
			"give it a higher number", first)
	}
	toLocal := Rule{Priority: r.Priority - 1, From: r.From, To: r.To, Table: unix.RT_TABLE_LOCAL}
	return []Rule{toLocal, r}, nil
}

// orAny is a prefix, or, where it is none, all addresses of another's family.
func orAny(p, like netip.Prefix) netip.Prefix {
	if p.IsValid() {
		return p
	}
	return netip.PrefixFrom(unspecified(like.Addr().Is6()), 0)
}

// parseRule reads an RTM_NEWRULE body (struct fib_rule_hdr, uapi/linux/fib_rules.h).
func parseRule(b []byte) (r HostRule, ours, ok bool) {
	if len(b) < unix.SizeofRtMsg || !isIP(b[0]) {
		return r, false, false
	}
	const invert = 2            // FIB_RULE_INVERT
	h := nl.DeserializeRtMsg(b) // of the same layout; the action is the type
	src := unspecified(h.Family == unix.AF_INET6)
	dst := src
	r.Table, r.Action, r.Other, r.Not = uint32(h.Table), RuleAction(h.Type), h.Tos != 0, h.Flags&invert != 0
	eachAttr(b[unix.SizeofRtMsg:], func(typ uint16, data []byte) {
		switch typ {
		case unix.FRA_SRC:
			src = ipOf(data)
		case unix.FRA_DST:
			dst = ipOf(data)
		case unix.FRA_PRIORITY:
			r.Priority = u32(data)
		case unix.FRA_TABLE:
			r.Table = u32(data)
		case unix.FRA_FWMARK:
			r.Mark = u32(data)
		case unix.FRA_FWMASK:
			r.Mask = u32(data)
		case unix.FRA_IIFNAME:
			r.In = cString(data)
		case unix.FRA_OIFNAME:
			r.Out = cString(data)
		case unix.FRA_SUPPRESS_PREFIXLEN:
			r.AtLeast = uint8(u32(data) + 1) // all ones: it is not set
		case unix.FRA_L3MDEV:
			r.VRF = len(data) > 0 && data[0] != 0
		case unix.FRA_SUPPRESS_IFGROUP:
			r.Other = r.Other || u32(data) != math.MaxUint32
		case unix.FRA_FLOW, unix.FRA_UNSPEC, unix.FRA_GOTO, unix.FRA_PAD:
		case unix.FRA_PROTOCOL:
			ours = len(data) > 0 && data[0] == Protocol && r.Action == RuleToTable
		default:
			r.Other = true
		}
	})
	r.From, r.To = netip.PrefixFrom(src, int(h.Src_len)), netip.PrefixFrom(dst, int(h.Dst_len))
	if r.Mark == 0 {
		r.Unmarked = r.Mask
	}
	return r, ours, r.From.IsValid() && r.To.IsValid() && src.Is4() == dst.Is4()
}
