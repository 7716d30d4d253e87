package doctor

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/netstate"
)

// packet is what is known of a packet: a field that is missing may have any value.
type packet map[netstate.Field][]byte

// fate is what becomes of a packet at one or more hooks.
type fate struct {
	drops   bool // nothing is known by which it could pass
	maybe   bool // it depends on what can't be judged
	but     bool // it drops, except for what a rule before lets through
	by      string
	chain   netstate.FilterChain // that drops it, or where it isn't sure
	rule    netstate.FilterRule
	unclear string // what could not be judged
}

// truth is the outcome of a test: yes, no, or unknown.
type truth int8

const (
	no truth = iota
	yes
	unknown
)

// filter is the node's packet filter: every chain, of whichever program.
type filter []netstate.FilterChain

// has reports whether there is a chain of one of these names.
func (f filter) has(names ...string) bool {
	return slices.ContainsFunc(f, func(c netstate.FilterChain) bool { return slices.Contains(names, c.Name) })
}

// through sends a packet through the hooks, in the order in which the kernel does. The first hook that drops it decides.
func (f filter) through(p packet, v6 bool, hooks ...string) fate {
	var doubt fate
	for _, hook := range hooks {
		for _, c := range f.at(hook, p, v6) {
			w := walk{filter: f, packet: p, base: c}
			res := w.run()
			if res.drops {
				return res
			}
			if res.maybe && !doubt.maybe {
				doubt = res
			}
			p = w.after()
		}
	}
	return doubt
}

// at lists the base chains of a hook that see a packet of this family, in their order.
func (f filter) at(hook string, p packet, v6 bool) []netstate.FilterChain {
	family := map[bool]string{true: "ip6", false: "ip"}[v6]
	var out []netstate.FilterChain
	for _, c := range f {
		if c.Hook != hook || c.Family == "bridge" || (c.Family == "ip" || c.Family == "ip6") && c.Family != family {
			continue
		}
		if c.Family == "netdev" && !slices.Contains(c.Devices, name(p[netstate.FieldIn])) {
			continue
		}
		out = append(out, c)
	}
	slices.SortStableFunc(out, func(a, b netstate.FilterChain) int { return cmp.Compare(a.Priority, b.Priority) })
	return out
}

func (f filter) chain(like netstate.FilterChain, name string) (netstate.FilterChain, bool) {
	i := slices.IndexFunc(f, func(c netstate.FilterChain) bool {
		return c.Family == like.Family && c.Table == like.Table && c.Name == name && c.Legacy == like.Legacy
	})
	if i < 0 {
		return netstate.FilterChain{}, false
	}
	return f[i], true
}

// walk is the way of one packet through one base chain. Where a test can't be judged, both ways are taken: the walk goes on as if it
// did not hold, and remembers what would have happened.
type walk struct {
	filter filter
	packet packet
	base   netstate.FilterChain

	canPass, canDrop bool // by a rule whose tests can't all be judged
	dropBy           fate
	doubt            string
	lost             []netstate.Field // that a rule may have changed
	steps            int
}

// Bounds against rules that call each other without end (which the kernel refuses), and against the time that a very long list takes.
const (
	maxDepth = 20
	maxSteps = 200_000
)

type outcome uint8

const (
	goesOn outcome = iota
	passes
	dropped
	unclear
)

func (w *walk) run() fate {
	out, f := w.chain(w.base, 0, false)
	if out == goesOn { // the policy
		out, f = passes, fate{chain: w.base, by: "its policy"}
		if w.base.Policy == "drop" {
			out = dropped
		}
	}
	switch {
	case out == dropped && !w.canPass:
		f.drops = true
		return f
	case out == dropped:
		f.maybe, f.unclear = true, w.doubt
		return f
	case out == unclear:
		f.maybe = true
		return f
	case w.canDrop:
		w.dropBy.maybe, w.dropBy.unclear = true, w.doubt
		return w.dropBy
	}
	return fate{}
}

// after is the packet as the next chain sees it.
func (w *walk) after() packet {
	if len(w.lost) == 0 {
		return w.packet
	}
	p := packet{}
	for k, v := range w.packet {
		if !slices.Contains(w.lost, k) {
			p[k] = v
		}
	}
	return p
}

// chain walks through one chain. unsure says that it is not known whether the packet comes here at all.
func (w *walk) chain(c netstate.FilterChain, depth int, unsure bool) (outcome, fate) {
	if depth > maxDepth {
		return unclear, fate{chain: c, unclear: "rules that call each other too deeply"}
	}
	for _, r := range c.Rules {
		if w.steps++; w.steps > maxSteps {
			return unclear, fate{chain: c, unclear: "more rules than are looked at"}
		}
		holds, doubt := w.matches(r)
		if holds == no {
			continue
		}
		if holds == unknown && w.doubt == "" {
			w.doubt = doubt
		}
		if len(r.Changes) > 0 {
			w.lost = append(w.lost, r.Changes...)
			w.packet = w.after()
		}
		action, sure := w.action(r)
		if !sure {
			if w.doubt == "" {
				w.doubt = "a map"
			}
			holds = unknown
		}
		for _, a := range action {
			out, f, end := w.act(a, c, r, depth, unsure || holds == unknown)
			switch {
			case end && holds == yes:
				return goesOn, f
			case end: // who called this chain may let it pass, whatever comes behind here
				w.canPass = true
			case out == goesOn:
			case holds == yes:
				return out, f
			default:
				w.note(out, f)
			}
		}
	}
	return goesOn, fate{}
}

// note remembers what may have become of the packet.
func (w *walk) note(out outcome, f fate) {
	switch out {
	case passes:
		w.canPass = true
	case dropped:
		if !w.canDrop {
			w.canDrop, w.dropBy = true, f
		}
	case unclear:
		w.canPass = true
		if !w.canDrop {
			w.canDrop, w.dropBy = true, f
		}
		if w.doubt == "" {
			w.doubt = f.unclear
		}
	}
}

// act does what a rule says; end: the chain is left, and who called it goes on.
func (w *walk) act(a netstate.FilterAction, c netstate.FilterChain, r netstate.FilterRule, depth int, unsure bool) (out outcome, f fate, end bool) {
	f = fate{chain: c, rule: r, by: describeRule(c, r)}
	switch a.Verdict {
	case netstate.Accept:
		return passes, f, false
	case netstate.Drop, netstate.Translate: // the one in chains that filter, the other in those that translate
		return dropped, f, false
	case netstate.Unclear:
		f.unclear = "what the rule " + f.by + " does"
		return unclear, f, false
	case netstate.Return:
		return goesOn, f, true
	case netstate.Jump, netstate.Goto:
		to, there := w.filter.chain(c, a.Chain)
		if !there {
			f.unclear = "the chain " + a.Chain + ", which was not read,"
			return unclear, f, false
		}
		out, f = w.chain(to, depth+1, unsure)
		return out, f, out == goesOn && a.Verdict == netstate.Goto
	}
	return goesOn, f, false
}

// action is what a rule does; several where a map can't be judged.
func (w *walk) action(r netstate.FilterRule) (all []netstate.FilterAction, sure bool) {
	if r.Map == nil {
		return []netstate.FilterAction{r.Action}, true
	}
	for _, c := range r.Map {
		switch w.inside(r.Key, c.Ranges) {
		case yes:
			if len(all) == 0 {
				return []netstate.FilterAction{c.Action}, true
			}
			return append(all, c.Action), false
		case unknown:
			all = append(all, c.Action)
		}
	}
	return all, len(all) == 0
}

// matches: all tests together. One that does not hold settles it, whatever the others are.
func (w *walk) matches(r netstate.FilterRule) (truth, string) {
	all, doubt := yes, ""
	for _, t := range r.Tests {
		switch w.holds(t) {
		case no:
			return no, ""
		case unknown:
			if all = unknown; doubt == "" {
				doubt = cmp.Or(t.What, describeTest(t))
			}
		}
	}
	return all, doubt
}

func (w *walk) holds(t netstate.FilterTest) truth {
	any := no
	if len(t.Key) == 1 && t.Key[0].Field == netstate.FieldUnknown {
		return unknown
	}
	for _, ranges := range t.Any {
		if in := w.inside(t.Key, ranges); in == yes {
			any = yes
			break
		} else if in == unknown {
			any = unknown
		}
	}
	if t.Not && any != unknown {
		return yes - any
	}
	return any
}

// inside: every field in its range. No ranges stand for what is in no other case.
func (w *walk) inside(key []netstate.FilterField, ranges []netstate.FilterRange) truth {
	all := yes
	for i, r := range ranges {
		if i >= len(key) {
			return unknown
		}
		value, known := w.packet[key[i].Field]
		if !known {
			all = unknown
			continue
		}
		if !within(value, key[i].Mask, r) {
			return no
		}
	}
	return all
}

// within compares as the kernel does: the first bytes of a field where the range is shorter (a prefix, or the beginning of a name).
func within(value, mask []byte, r netstate.FilterRange) bool {
	n := len(r.From)
	if n > len(value) || n != len(r.To) {
		return false
	}
	v := bytes.Clone(value[:n])
	for i := range v {
		if i < len(mask) {
			v[i] &= mask[i]
		}
	}
	return bytes.Compare(v, r.From) >= 0 && bytes.Compare(v, r.To) <= 0
}

// What packets are made of.

func deviceField(s string) []byte {
	out := make([]byte, unix.IFNAMSIZ)
	copy(out, s)
	return out
}

func name(b []byte) string { return string(bytes.TrimRight(b, "\x00")) }

func native32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
func port16(v uint16) []byte   { return binary.BigEndian.AppendUint16(nil, v) }

// newPacket is a packet that begins a connection, in one of the two families.
func newPacket(src, dst netip.Addr, proto byte) packet {
	p := packet{
		netstate.FieldProtocol: {proto}, netstate.FieldState: native32(netstate.StateNew), netstate.FieldStatus: native32(0), netstate.FieldMark: native32(0),
		netstate.FieldPacketType: {0}, // PACKET_HOST
	}
	family, ether := byte(unix.NFPROTO_IPV4), []byte{0x08, 0x00}
	if dst.Is6() {
		family, ether = unix.NFPROTO_IPV6, []byte{0x86, 0xdd}
	}
	p[netstate.FieldFamily], p[netstate.FieldEtherType] = []byte{family}, ether
	if src.IsValid() {
		p[netstate.FieldSource] = src.AsSlice()
	}
	if dst.IsValid() {
		p[netstate.FieldDestination] = dst.AsSlice()
	}
	return p
}

// in says by which device a packet comes.
func (p packet) in(device string, index int) packet {
	if device != "" {
		p[netstate.FieldIn], p[netstate.FieldInIndex] = deviceField(device), native32(uint32(index))
		p[netstate.FieldInType] = binary.NativeEndian.AppendUint16(nil, unix.ARPHRD_ETHER)
	}
	return p
}

// out says by which device a packet leaves.
func (p packet) out(device string, index int) packet {
	if device != "" {
		p[netstate.FieldOut], p[netstate.FieldOutIndex] = deviceField(device), native32(uint32(index))
	}
	return p
}

// ports says of which port and to which one a packet is; without, any rule about ports may hold.
func (p packet) ports(from, to uint16) packet {
	out := maps.Clone(p)
	out[netstate.FieldSourcePort], out[netstate.FieldPort] = port16(from), port16(to)
	return out
}

// How rules are shown.

func describeRule(c netstate.FilterChain, r netstate.FilterRule) string {
	family := familyOf(c, r)
	// An address says by itself which family is meant.
	addressed := slices.ContainsFunc(r.Tests, func(t netstate.FilterTest) bool { return slices.ContainsFunc(t.Key, isAddress) })
	var words []string
	for _, t := range r.Tests {
		if _, asked := familyAsked(t); asked && addressed && family != "" {
			continue
		}
		words = append(words, describe(t, family))
	}
	if r.Map != nil {
		words = append(words, "a map")
	} else {
		words = append(words, strings.TrimSpace(string(r.Action.Verdict)+" "+r.Action.Chain))
	}
	// As nft writes it: the protocol by itself, where ports follow.
	text := strings.NewReplacer("l4proto udp dport", "udp dport", "l4proto udp sport", "udp sport", "l4proto tcp dport", "tcp dport", "l4proto tcp sport", "tcp sport").Replace(strings.Join(words, " "))
	return fmt.Sprintf("%q", text)
}

func isAddress(k netstate.FilterField) bool {
	return k.Field == netstate.FieldSource || k.Field == netstate.FieldDestination
}

// familyOf is the family of the packets that a rule is about: "ip", "ip6", or "" where it is about both.
func familyOf(c netstate.FilterChain, r netstate.FilterRule) string {
	if c.Family == "ip" || c.Family == "ip6" {
		return c.Family
	}
	for _, t := range r.Tests {
		if family, asked := familyAsked(t); asked {
			return family
		}
	}
	return ""
}

// familyAsked reports whether a test does nothing but ask for one of the families.
func familyAsked(t netstate.FilterTest) (family string, asked bool) {
	if len(t.Key) != 1 || t.Not || len(t.Any) != 1 || len(t.Any[0]) != 1 || t.Key[0].Mask != nil {
		return "", false
	}
	family = describeRange(t.Key[0], t.Any[0][0], "")
	asked = (t.Key[0].Field == netstate.FieldFamily || t.Key[0].Field == netstate.FieldEtherType) && (family == "ip" || family == "ip6")
	return family, asked
}

func describeTest(t netstate.FilterTest) string { return describe(t, "") }

// describe writes a test as nft would; family is that of the rule's packets.
func describe(t netstate.FilterTest, family string) string {
	if t.What != "" {
		return t.What
	}
	var fields, values []string
	for _, k := range t.Key {
		field := string(k.Field)
		if isAddress(k) {
			field = strings.TrimSpace(family + " " + field)
		}
		fields = append(fields, field)
	}
	const most = 3
	for i, alt := range t.Any {
		if i == most {
			values = append(values, "...")
			break
		}
		var parts []string
		for j, r := range alt {
			if j < len(t.Key) {
				parts = append(parts, describeRange(t.Key[j], r, family))
			}
		}
		values = append(values, strings.Join(parts, " . "))
	}
	not := ""
	if t.Not {
		not = "!= "
	}
	if len(t.Key) == 1 && (t.Key[0].Field == netstate.FieldState || t.Key[0].Field == netstate.FieldStatus) && t.Key[0].Mask != nil {
		return strings.TrimSpace(string(t.Key[0].Field) + " " + stateNames(t))
	}
	return strings.Join(fields, " . ") + " " + not + strings.Join(values, ",")
}

// stateNames are those of the bits under a mask; the test is that none of them is set, or not so.
func stateNames(t netstate.FilterTest) string {
	var out []string
	bits := binary.NativeEndian.Uint32(append(bytes.Clone(t.Key[0].Mask), 0, 0, 0, 0))
	for _, s := range []struct {
		bit  uint32
		name string
	}{{netstate.StateInvalid, "invalid"}, {netstate.StateEstablished, "established"}, {netstate.StateRelated, "related"}, {netstate.StateNew, "new"}, {netstate.StateUntracked, "untracked"}} {
		if bits&s.bit != 0 {
			out = append(out, s.name)
		}
	}
	if !t.Not {
		return "!= " + strings.Join(out, ",")
	}
	return strings.Join(out, ",")
}

func describeRange(k netstate.FilterField, r netstate.FilterRange, family string) string {
	show := func(b []byte) string {
		switch k.Field {
		case netstate.FieldSource, netstate.FieldDestination:
			whole := make([]byte, map[bool]int{true: 4, false: 16}[len(b) <= 4 && family != "ip6"])
			copy(whole, b)
			a, _ := netip.AddrFromSlice(whole)
			ones := 8 * len(b)
			if k.Mask != nil {
				ones = 0
				for _, m := range k.Mask {
					for ; m&0x80 != 0; m <<= 1 {
						ones++
					}
				}
			}
			if ones < a.BitLen() {
				return fmt.Sprintf("%s/%d", a, ones)
			}
			return a.String()
		case netstate.FieldIn, netstate.FieldOut:
			if !bytes.Contains(b, []byte{0}) || k.Mask != nil && bytes.IndexByte(k.Mask, 0) == len(name(b)) {
				return name(b) + "*"
			}
			return name(b)
		case netstate.FieldPort, netstate.FieldSourcePort:
			if len(b) == 2 {
				return fmt.Sprint(binary.BigEndian.Uint16(b))
			}
		case netstate.FieldProtocol:
			if len(b) == 1 {
				switch b[0] {
				case unix.IPPROTO_TCP:
					return "tcp"
				case unix.IPPROTO_UDP:
					return "udp"
				case unix.IPPROTO_ICMP:
					return "icmp"
				case unix.IPPROTO_ICMPV6:
					return "ipv6-icmp"
				}
				return fmt.Sprint(b[0])
			}
		case netstate.FieldFamily, netstate.FieldEtherType:
			for family, values := range map[string][][]byte{"ip": {{unix.NFPROTO_IPV4}, {0x08, 0x00}}, "ip6": {{unix.NFPROTO_IPV6}, {0x86, 0xdd}}} {
				if slices.ContainsFunc(values, func(v []byte) bool { return bytes.Equal(v, b) }) {
					return family
				}
			}
		case netstate.FieldMark, netstate.FieldInIndex, netstate.FieldOutIndex:
			if len(b) == 4 {
				return fmt.Sprintf("%#x", binary.NativeEndian.Uint32(b))
			}
		}
		return fmt.Sprintf("%#x", b)
	}
	if bytes.Equal(r.From, r.To) {
		return show(r.From)
	}
	return show(r.From) + "-" + show(r.To)
}
