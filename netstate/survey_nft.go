package netstate

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// What golang.org/x/sys/unix has no names for (uapi/linux/netfilter/nf_tables.h).
const (
	nftaHookDevs        = 4
	nftaDeviceName      = 1
	nftaBitwiseOp       = 6
	nftaSetElemKeyEnd   = 10
	nftSetElemCatchall  = 2
	nftReg32            = 8 // NFT_REG32_00: the first of sixteen registers of four bytes
	nftMetaBriIifname   = unix.NFT_META_BRI_IIFNAME
	nftLookupInverted   = 1
	maxFilterChainsRead = 20000
)

// FilterChains reads the packet filter that nf_tables holds: the base chains that may drop packets or change the sender of those that
// leave, and what they lead to.
func (n *NFTables) FilterChains() ([]FilterChain, error) {
	r := filterReader{c: n.c, known: map[chainKey]FilterChain{}, sets: map[setKey]filterSet{}}
	if err := r.heads(); err != nil {
		return nil, fmt.Errorf("reading the chains of nf_tables: %w", err)
	}
	var todo []chainKey
	for key, c := range r.known {
		if c.Hook != "" {
			todo = append(todo, key)
		}
	}
	slices.SortFunc(todo, chainKey.compare)
	var out []FilterChain
	seen := map[chainKey]bool{}
	for len(todo) > 0 && len(out) < maxFilterChainsRead {
		key := todo[0]
		todo = todo[1:]
		if seen[key] {
			continue
		}
		seen[key] = true
		c, there := r.known[key]
		if !there {
			continue
		}
		if err := r.rules(key, &c); err != nil {
			return nil, fmt.Errorf("reading the rules of %s %s %s: %w", c.Family, c.Table, c.Name, err)
		}
		out = append(out, c)
		for _, to := range c.leadsTo() {
			todo = append(todo, chainKey{key.family, key.table, to})
		}
	}
	return out, nil
}

// leadsTo lists the chains that a chain calls.
func (c FilterChain) leadsTo() []string {
	var out []string
	for _, r := range c.Rules {
		if r.Action.Chain != "" {
			out = append(out, r.Action.Chain)
		}
		for _, m := range r.Map {
			if m.Action.Chain != "" {
				out = append(out, m.Action.Chain)
			}
		}
	}
	return out
}

type chainKey struct {
	family      uint8
	table, name string
}

func (k chainKey) compare(o chainKey) int {
	return bytes.Compare([]byte(fmt.Sprint(k)), []byte(fmt.Sprint(o)))
}

type setKey struct {
	family     uint8
	table, set string
}

// filterReader reads what one look needs, each thing once.
type filterReader struct {
	c     *conn
	known map[chainKey]FilterChain
	sets  map[setKey]filterSet
}

func (r *filterReader) dump(what uint16, family uint8, attrs []*nl.RtAttr, reset func(), each func(family uint8, attrs []byte)) error {
	return r.c.dump(unix.NFNL_SUBSYS_NFTABLES<<8|what, &nl.Nfgenmsg{NfgenFamily: family}, attrs, reset, func(body []byte) {
		if len(body) > sizeofNfgenmsg {
			each(body[0], body[sizeofNfgenmsg:])
		}
	})
}

func familyName(f uint8) string {
	switch f {
	case unix.NFPROTO_IPV4:
		return "ip"
	case unix.NFPROTO_IPV6:
		return "ip6"
	case unix.NFPROTO_INET:
		return "inet"
	case unix.NFPROTO_NETDEV:
		return "netdev"
	case unix.NFPROTO_BRIDGE:
		return "bridge"
	}
	return fmt.Sprintf("family %d", f)
}

// heads reads what there is to know of all chains but their rules. Of the base chains that translate addresses, those are kept that may
// change the sender.
func (r *filterReader) heads() error {
	skip := map[chainKey]bool{}
	err := r.dump(unix.NFT_MSG_GETCHAIN, unix.NFPROTO_UNSPEC, nil, func() { clear(r.known) }, func(family uint8, attrs []byte) {
		c := FilterChain{Family: familyName(family), Policy: "accept"}
		kind := ""
		eachAttr(attrs, func(typ uint16, data []byte) {
			switch typ {
			case unix.NFTA_CHAIN_TABLE:
				c.Table = cString(data)
			case unix.NFTA_CHAIN_NAME:
				c.Name = cString(data)
			case unix.NFTA_CHAIN_TYPE:
				kind = cString(data)
			case unix.NFTA_CHAIN_POLICY:
				c.Policy = verdictName(int32(be32(data)))
			case unix.NFTA_CHAIN_HOOK:
				c.takeHook(family, data)
			}
		})
		key := chainKey{family, c.Table, c.Name}
		c.NAT = c.Hook != "" && kind == "nat"
		if c.NAT && c.Hook != "postrouting" {
			skip[key] = true
		}
		r.known[key] = c
	})
	for key := range skip {
		delete(r.known, key)
	}
	return err
}

func (c *FilterChain) takeHook(family uint8, data []byte) {
	names := []string{"prerouting", "input", "forward", "output", "postrouting", "ingress"}
	if family == unix.NFPROTO_NETDEV {
		names = []string{"ingress", "egress"}
	}
	eachAttr(data, func(typ uint16, data []byte) {
		switch typ {
		case unix.NFTA_HOOK_HOOKNUM:
			if n := be32(data); n < uint32(len(names)) {
				c.Hook = names[n]
			}
		case unix.NFTA_HOOK_PRIORITY:
			c.Priority = int32(be32(data))
		case unix.NFTA_HOOK_DEV:
			c.Devices = append(c.Devices, cString(data))
		case nftaHookDevs:
			eachAttr(data, func(typ uint16, data []byte) {
				if typ == nftaDeviceName {
					c.Devices = append(c.Devices, cString(data))
				}
			})
		}
	})
	slices.Sort(c.Devices)
	c.Devices = slices.Compact(c.Devices)
}

func (r *filterReader) rules(key chainKey, c *FilterChain) error {
	attrs := []*nl.RtAttr{
		nl.NewRtAttr(unix.NFTA_RULE_TABLE, nl.ZeroTerminated(key.table)), nl.NewRtAttr(unix.NFTA_RULE_CHAIN, nl.ZeroTerminated(key.name)),
	}
	var parsed []*filterParser
	err := r.dump(unix.NFT_MSG_GETRULE, key.family, attrs, func() { parsed = nil }, func(_ uint8, attrs []byte) {
		if cString(attrOf(attrs, unix.NFTA_RULE_CHAIN)) == key.name { // an older kernel does not filter
			parsed = append(parsed, parseFilterRule(key.family, attrs))
		}
	})
	if err != nil {
		return err
	}
	for _, p := range parsed { // the sets have to be asked for, and a dump must be read to its end before
		for _, l := range p.lookups {
			set, err := r.set(setKey{key.family, key.table, l.set})
			if err != nil {
				return err
			}
			p.resolve(l, set)
		}
		c.Rules = append(c.Rules, p.rule)
	}
	return nil
}

// filterSet is what is in a set or map.
type filterSet struct {
	interval bool
	keyLen   int
	elems    []filterElem
	lost     bool // it can't be judged
}

type filterElem struct {
	from, to []byte // to: of a concatenation of ranges
	end      bool   // the first that is no longer in the range before
	all      bool   // what is in no other
	action   FilterAction
}

func (r *filterReader) set(key setKey) (filterSet, error) {
	if s, ok := r.sets[key]; ok {
		return s, nil
	}
	var s filterSet
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETSET, 0)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: key.family})
	for _, a := range stringAttrs(key.table, key.set) {
		req.AddData(a)
	}
	err := r.c.ask(req, func(body []byte) {
		eachAttr(body[min(sizeofNfgenmsg, len(body)):], func(typ uint16, data []byte) {
			switch typ {
			case unix.NFTA_SET_FLAGS:
				flags := be32(data)
				s.interval = flags&unix.NFT_SET_INTERVAL != 0
				s.lost = s.lost || flags&unix.NFT_SET_OBJECT != 0
			case unix.NFTA_SET_KEY_LEN:
				s.keyLen = int(be32(data))
			}
		})
	})
	if err != nil {
		return s, fmt.Errorf("set %s: %w", key.set, err)
	}
	err = r.dump(unix.NFT_MSG_GETSETELEM, key.family, stringAttrs(key.table, key.set), func() { s.elems = nil }, func(_ uint8, attrs []byte) {
		eachAttr(attrOf(attrs, unix.NFTA_SET_ELEM_LIST_ELEMENTS), func(_ uint16, elem []byte) { s.elems = append(s.elems, parseElem(elem)) })
	})
	if err != nil {
		return s, fmt.Errorf("set %s: %w", key.set, err)
	}
	r.sets[key] = s
	return s, nil
}

func parseElem(b []byte) filterElem {
	var e filterElem
	eachAttr(b, func(typ uint16, data []byte) {
		switch typ {
		case unix.NFTA_SET_ELEM_KEY:
			e.from = bytes.Clone(attrOf(data, unix.NFTA_DATA_VALUE))
		case nftaSetElemKeyEnd:
			e.to = bytes.Clone(attrOf(data, unix.NFTA_DATA_VALUE))
		case unix.NFTA_SET_ELEM_FLAGS:
			e.end, e.all = be32(data)&unix.NFT_SET_ELEM_INTERVAL_END != 0, be32(data)&nftSetElemCatchall != 0
		case unix.NFTA_SET_ELEM_DATA:
			if v := attrOf(data, unix.NFTA_DATA_VERDICT); v != nil {
				e.action = verdictOf(v)
			} else {
				e.action = FilterAction{Verdict: Unclear}
			}
		}
	})
	return e
}

func verdictOf(b []byte) FilterAction {
	chain := cString(attrOf(b, unix.NFTA_VERDICT_CHAIN))
	switch code := int32(be32(attrOf(b, unix.NFTA_VERDICT_CODE))); code {
	case unix.NFT_CONTINUE:
		return FilterAction{}
	case unix.NFT_JUMP:
		return FilterAction{Jump, chain}
	case unix.NFT_GOTO:
		return FilterAction{Goto, chain}
	default:
		switch v := Verdict(verdictName(code)); v {
		case Accept, Drop, Return:
			return FilterAction{Verdict: v}
		}
		return FilterAction{Verdict: Unclear}
	}
}

// cases are the elements as ranges, with the actions of a map. Of a set with intervals, the kernel gives the ends of ranges as elements.
func (s filterSet) cases() []FilterCase {
	var out []FilterCase
	elems := slices.Clone(s.elems)
	for _, e := range elems {
		switch {
		case e.all:
			continue
		case e.to != nil:
			out = append(out, FilterCase{[]FilterRange{{e.from, e.to}}, e.action})
		case !s.interval:
			out = append(out, FilterCase{[]FilterRange{{e.from, e.from}}, e.action})
		}
	}
	if s.interval && len(out) == 0 {
		elems = slices.DeleteFunc(elems, func(e filterElem) bool { return e.all })
		slices.SortStableFunc(elems, func(a, b filterElem) int {
			if c := bytes.Compare(a.from, b.from); c != 0 {
				return c
			}
			return map[bool]int{true: 0, false: 1}[a.end] - map[bool]int{true: 0, false: 1}[b.end] // one range ends where the next begins
		})
		for i, e := range elems {
			if e.end {
				continue
			}
			to := bytes.Repeat([]byte{0xff}, len(e.from))
			if i+1 < len(elems) {
				to = before(elems[i+1].from)
			}
			out = append(out, FilterCase{[]FilterRange{{e.from, to}}, e.action})
		}
	}
	for _, e := range elems {
		if e.all {
			out = append(out, FilterCase{nil, e.action})
		}
	}
	return out
}

// before is the number before.
func before(b []byte) []byte {
	out := bytes.Clone(b)
	for i := len(out) - 1; i >= 0; i-- {
		out[i]--
		if out[i] != 0xff {
			break
		}
	}
	return out
}

// loaded is what is in a register.
type loaded struct {
	FilterField
	size  int
	value []byte // of one that holds a constant
	what  string // of one that holds what is not known
}

type filterLookup struct {
	test  int // in rule.Tests; -1: the rule's map
	set   string
	parts []loaded
}

// filterParser turns the expressions of a rule into tests.
type filterParser struct {
	family  uint8
	regs    map[uint32]loaded
	rule    FilterRule
	lookups []filterLookup
}

func parseFilterRule(family uint8, attrs []byte) *filterParser {
	p := &filterParser{family: family, regs: map[uint32]loaded{}}
	eachAttr(attrs, func(typ uint16, data []byte) {
		switch typ {
		case unix.NFTA_RULE_HANDLE:
			if len(data) == 8 {
				p.rule.Handle = binary.BigEndian.Uint64(data)
			}
		case unix.NFTA_RULE_EXPRESSIONS:
			eachAttr(data, func(_ uint16, expr []byte) {
				p.take(cString(attrOf(expr, unix.NFTA_EXPR_NAME)), attrOf(expr, unix.NFTA_EXPR_DATA))
			})
		}
	})
	return p
}

// reg gives registers of four and of sixteen bytes the same numbers.
func reg(b []byte) uint32 {
	n := be32(b)
	if n >= 1 && n <= 4 {
		return nftReg32 + (n-1)*4
	}
	return n
}

func (p *filterParser) take(name string, b []byte) {
	switch name {
	case "counter", "log", "objref", "dynset", "last", "dup":
	case "payload":
		p.takePayload(b)
	case "meta":
		p.takeMeta(b)
	case "ct":
		p.takeCT(b)
	case "fib":
		p.takeFib(b)
	case "bitwise":
		p.takeBitwise(b)
	case "cmp":
		p.takeCmp(b)
	case "range":
		p.takeRange(b)
	case "lookup":
		p.takeLookup(b)
	case "immediate":
		p.takeImmediate(b)
	case "reject":
		p.rule.Action = FilterAction{Verdict: Drop}
	case "notrack":
		p.rule.Changes = append(p.rule.Changes, FieldState)
	case "match":
		p.rule.Tests = append(p.rule.Tests, xtMatch(cString(attrOf(b, unix.NFTA_MATCH_NAME)), be32(attrOf(b, unix.NFTA_MATCH_REV)), attrOf(b, unix.NFTA_MATCH_INFO))...)
	case "target":
		p.rule.Action, p.rule.Changes = xtTarget(cString(attrOf(b, unix.NFTA_TARGET_NAME)))
	case "masq":
		p.rule.Action = FilterAction{Verdict: Translate}
	case "nat":
		p.rule.Action = FilterAction{Verdict: Unclear}
		if t := attrOf(b, unix.NFTA_NAT_TYPE); t != nil && be32(t) == unix.NFT_NAT_SNAT {
			p.rule.Action = FilterAction{Verdict: Translate}
		}
	case "queue", "tproxy", "synproxy", "fwd", "redir":
		p.rule.Action = FilterAction{Verdict: Unclear}
	case "limit", "quota", "connlimit":
		p.test(unknownTest(name))
	case "byteorder":
		p.unknown(reg(attrOf(b, 2)), "byteorder") // NFTA_BYTEORDER_DREG
	case "exthdr", "rt", "socket", "osf", "numgen", "hash", "xfrm", "tunnel", "flow_offload":
		// Whatever they load or ask: it is not known. Most of them name their register first.
		p.unknown(reg(attrOf(b, 1)), name)
		if name == "osf" || name == "socket" {
			p.unknown(reg(attrOf(b, 2)), name)
		}
	default:
		p.test(unknownTest(name))
	}
}

func (p *filterParser) test(t FilterTest) { p.rule.Tests = append(p.rule.Tests, t) }

func (p *filterParser) unknown(reg uint32, what string) { p.regs[reg] = loaded{what: what} }

// protocol is the family of the packets that the rule can meet, as far as it is said: NFPROTO_IPV4, NFPROTO_IPV6 or 0.
func (p *filterParser) protocol() uint8 {
	if p.family == unix.NFPROTO_IPV4 || p.family == unix.NFPROTO_IPV6 {
		return p.family
	}
	for _, t := range p.rule.Tests {
		if len(t.Key) != 1 || t.Not || len(t.Any) != 1 || len(t.Any[0]) != 1 {
			continue
		}
		value := t.Any[0][0].From
		switch {
		case t.Key[0].Field == FieldFamily && len(value) > 0:
			return value[0]
		case t.Key[0].Field == FieldEtherType && bytes.Equal(value, []byte{0x08, 0x00}):
			return unix.NFPROTO_IPV4
		case t.Key[0].Field == FieldEtherType && bytes.Equal(value, []byte{0x86, 0xdd}):
			return unix.NFPROTO_IPV6
		}
	}
	return 0
}

func (p *filterParser) takePayload(b []byte) {
	if attrOf(b, unix.NFTA_PAYLOAD_SREG) != nil { // writes into the packet
		return
	}
	base, at, n := be32(attrOf(b, unix.NFTA_PAYLOAD_BASE)), be32(attrOf(b, unix.NFTA_PAYLOAD_OFFSET)), be32(attrOf(b, unix.NFTA_PAYLOAD_LEN))
	l := loaded{size: int(n), what: fmt.Sprintf("payload %d,%d", at, n)}
	switch base {
	case unix.NFT_PAYLOAD_NETWORK_HEADER:
		switch proto := p.protocol(); {
		case proto == unix.NFPROTO_IPV4 && at == 12 && n <= 4, proto == unix.NFPROTO_IPV6 && at == 8:
			l.Field = FieldSource
		case proto == unix.NFPROTO_IPV4 && at == 16 && n <= 4, proto == unix.NFPROTO_IPV6 && at == 24:
			l.Field = FieldDestination
		case proto == unix.NFPROTO_IPV4 && at == 9 && n == 1, proto == unix.NFPROTO_IPV6 && at == 6 && n == 1:
			l.Field = FieldProtocol
		}
	case unix.NFT_PAYLOAD_TRANSPORT_HEADER:
		switch {
		case at == 0 && n == 2:
			l.Field = FieldSourcePort
		case at == 2 && n == 2:
			l.Field = FieldPort
		case at == 0 && n == 4:
			l.Field = fieldPorts
		}
	}
	p.regs[reg(attrOf(b, unix.NFTA_PAYLOAD_DREG))] = l
}

func (p *filterParser) takeMeta(b []byte) {
	key := be32(attrOf(b, unix.NFTA_META_KEY))
	if attrOf(b, unix.NFTA_META_SREG) != nil {
		if key == unix.NFT_META_MARK {
			p.rule.Changes = append(p.rule.Changes, FieldMark)
		}
		return
	}
	l := loaded{what: fmt.Sprintf("meta %d", key)}
	switch key {
	case unix.NFT_META_MARK:
		l.Field, l.size = FieldMark, 4
	case unix.NFT_META_IIF:
		l.Field, l.size = FieldInIndex, 4
	case unix.NFT_META_OIF:
		l.Field, l.size = FieldOutIndex, 4
	case unix.NFT_META_IIFNAME:
		l.Field, l.size = FieldIn, unix.IFNAMSIZ
	case unix.NFT_META_OIFNAME:
		l.Field, l.size = FieldOut, unix.IFNAMSIZ
	case unix.NFT_META_IIFTYPE:
		l.Field, l.size = FieldInType, 2
	case unix.NFT_META_PROTOCOL:
		l.Field, l.size = FieldEtherType, 2
	case unix.NFT_META_NFPROTO:
		l.Field, l.size = FieldFamily, 1
	case unix.NFT_META_L4PROTO:
		l.Field, l.size = FieldProtocol, 1
	case unix.NFT_META_PKTTYPE:
		l.Field, l.size = FieldPacketType, 1
	case nftMetaBriIifname:
		l.what = "bridge port"
	}
	p.regs[reg(attrOf(b, unix.NFTA_META_DREG))] = l
}

func (p *filterParser) takeCT(b []byte) {
	if attrOf(b, unix.NFTA_CT_SREG) != nil {
		return
	}
	l := loaded{what: "ct"}
	switch be32(attrOf(b, unix.NFTA_CT_KEY)) {
	case unix.NFT_CT_STATE:
		l.Field, l.size = FieldState, 4
	case unix.NFT_CT_STATUS:
		l.Field, l.size = FieldStatus, 4
	case unix.NFT_CT_MARK:
		l.what = "ct mark"
	}
	p.regs[reg(attrOf(b, unix.NFTA_CT_DREG))] = l
}

func (p *filterParser) takeFib(b []byte) {
	l := loaded{what: "fib"}
	const reverse = unix.NFTA_FIB_F_SADDR | unix.NFTA_FIB_F_IIF
	flags := be32(attrOf(b, unix.NFTA_FIB_FLAGS))
	switch be32(attrOf(b, unix.NFTA_FIB_RESULT)) {
	case unix.NFT_FIB_RESULT_ADDRTYPE:
		if flags == unix.NFTA_FIB_F_DADDR {
			l.Field, l.size = FieldTypeOfDst, 4
		}
	case unix.NFT_FIB_RESULT_OIF:
		if flags&^(unix.NFTA_FIB_F_MARK|unix.NFTA_FIB_F_PRESENT) == reverse {
			l.Field, l.size = FieldReverse, 4
		}
	}
	p.regs[reg(attrOf(b, unix.NFTA_FIB_DREG))] = l
}

func (p *filterParser) takeBitwise(b []byte) {
	l, ok := p.regs[reg(attrOf(b, unix.NFTA_BITWISE_SREG))]
	dst := reg(attrOf(b, unix.NFTA_BITWISE_DREG))
	if !ok || l.Mask != nil || l.value != nil || be32(attrOf(b, nftaBitwiseOp)) != 0 || !zero(valueOf(b, unix.NFTA_BITWISE_XOR)) {
		p.unknown(dst, "bitwise "+l.what)
		return
	}
	l.Mask = bytes.Clone(valueOf(b, unix.NFTA_BITWISE_MASK))
	p.regs[dst] = l
}

// fieldPorts is both ports, which iptables-nft compares in one go. It is taken apart before anybody sees it.
const fieldPorts Field = "sport . dport"

// comparePorts takes a comparison of both ports apart.
func (p *filterParser) comparePorts(l loaded, ranges []FilterRange, not bool) {
	if not || len(ranges) != 1 || len(ranges[0].From) != 4 || !bytes.Equal(ranges[0].From, ranges[0].To) || l.Mask != nil && len(l.Mask) != 4 {
		p.test(unknownTest("ports"))
		return
	}
	for i, f := range []Field{FieldSourcePort, FieldPort} {
		var mask []byte
		if l.Mask != nil {
			mask = l.Mask[2*i : 2*i+2]
		}
		v := ranges[0].From[2*i : 2*i+2]
		p.test(fieldTest(f, mask, v, v, false))
	}
}

// compared is a test of what is in a register; what can't be judged keeps its name.
func (p *filterParser) compared(l loaded, ok bool, ranges []FilterRange, not bool) {
	if !ok || l.Field == FieldUnknown {
		p.test(unknownTest(l.what))
		return
	}
	if l.Field == fieldPorts {
		p.comparePorts(l, ranges, not)
		return
	}
	var alternatives [][]FilterRange
	for _, r := range ranges {
		alternatives = append(alternatives, []FilterRange{r})
	}
	p.test(FilterTest{Key: []FilterField{l.FilterField}, Any: alternatives, Not: not})
}

func (p *filterParser) takeCmp(b []byte) {
	l, ok := p.regs[reg(attrOf(b, unix.NFTA_CMP_SREG))]
	v := bytes.Clone(valueOf(b, unix.NFTA_CMP_DATA))
	ff, zeros := bytes.Repeat([]byte{0xff}, len(v)), make([]byte, len(v))
	switch be32(attrOf(b, unix.NFTA_CMP_OP)) {
	case unix.NFT_CMP_EQ:
		p.compared(l, ok, []FilterRange{{v, v}}, false)
	case unix.NFT_CMP_NEQ:
		p.compared(l, ok, []FilterRange{{v, v}}, true)
	case unix.NFT_CMP_LT:
		p.compared(l, ok, []FilterRange{{v, ff}}, true)
	case unix.NFT_CMP_GTE:
		p.compared(l, ok, []FilterRange{{v, ff}}, false)
	case unix.NFT_CMP_LTE:
		p.compared(l, ok, []FilterRange{{zeros, v}}, false)
	case unix.NFT_CMP_GT:
		p.compared(l, ok, []FilterRange{{zeros, v}}, true)
	default:
		p.test(unknownTest("cmp"))
	}
}

func (p *filterParser) takeRange(b []byte) {
	l, ok := p.regs[reg(attrOf(b, unix.NFTA_RANGE_SREG))]
	from, to := bytes.Clone(valueOf(b, unix.NFTA_RANGE_FROM_DATA)), bytes.Clone(valueOf(b, unix.NFTA_RANGE_TO_DATA))
	p.compared(l, ok, []FilterRange{{from, to}}, be32(attrOf(b, unix.NFTA_RANGE_OP)) != 0)
}

// takeLookup notes the set that has to be asked for. How many registers belong to the key is known by its length only.
func (p *filterParser) takeLookup(b []byte) {
	at := reg(attrOf(b, unix.NFTA_LOOKUP_SREG))
	l := filterLookup{test: -1, set: cString(attrOf(b, unix.NFTA_LOOKUP_SET))}
	for {
		part, ok := p.regs[at]
		if !ok {
			break
		}
		l.parts = append(l.parts, part)
		if part.size == 0 {
			break
		}
		at += uint32(part.size+3) / 4
	}
	dst := attrOf(b, unix.NFTA_LOOKUP_DREG)
	if dst == nil {
		l.test = len(p.rule.Tests)
		t := unknownTest("set " + l.set)
		t.Not = be32(attrOf(b, unix.NFTA_LOOKUP_FLAGS))&nftLookupInverted != 0
		p.test(t)
	} else if be32(dst) != unix.NFT_REG_VERDICT {
		p.unknown(reg(dst), "map "+l.set)
		return
	}
	p.lookups = append(p.lookups, l)
}

// resolve puts the elements of a set in the place of its name.
func (p *filterParser) resolve(l filterLookup, s filterSet) {
	key, sizes, ok := l.key(s.keyLen)
	cases := s.cases()
	if !ok || s.lost {
		if l.test < 0 {
			p.rule.Action = FilterAction{Verdict: Unclear}
		}
		return
	}
	for i, c := range cases {
		if len(key) > 1 && c.Ranges != nil {
			cases[i].Ranges = split(c.Ranges[0], sizes)
		}
	}
	if l.test < 0 {
		p.rule.Key, p.rule.Map = key, cases
		return
	}
	t := FilterTest{Key: key, Not: p.rule.Tests[l.test].Not, What: p.rule.Tests[l.test].What}
	for _, c := range cases {
		t.Any = append(t.Any, c.Ranges)
	}
	p.rule.Tests[l.test] = t
}

// key is the fields whose lengths add up to that of the set's key, each filled up to four bytes where there are several.
func (l filterLookup) key(length int) (key []FilterField, sizes []int, ok bool) {
	if len(l.parts) == 0 {
		return nil, nil, false
	}
	sum := 0
	for _, part := range l.parts {
		if part.Field == FieldUnknown || part.Field == fieldPorts || part.size == 0 {
			return nil, nil, false
		}
		key, sizes = append(key, part.FilterField), append(sizes, part.size)
		if sum+part.size == length {
			return key, sizes, true
		}
		if sum += (part.size + 3) &^ 3; sum >= length {
			return key, sizes, sum == length
		}
	}
	return nil, nil, false
}

// split cuts a concatenation into its fields.
func split(r FilterRange, sizes []int) []FilterRange {
	var out []FilterRange
	at := 0
	for _, n := range sizes {
		if at+n > len(r.From) || at+n > len(r.To) {
			return nil
		}
		out = append(out, FilterRange{r.From[at : at+n], r.To[at : at+n]})
		at += (n + 3) &^ 3
	}
	return out
}

func (p *filterParser) takeImmediate(b []byte) {
	dst := attrOf(b, unix.NFTA_IMMEDIATE_DREG)
	data := attrOf(b, unix.NFTA_IMMEDIATE_DATA)
	if be32(dst) != unix.NFT_REG_VERDICT {
		p.regs[reg(dst)] = loaded{what: "constant", value: bytes.Clone(attrOf(data, unix.NFTA_DATA_VALUE))}
		return
	}
	p.rule.Action = verdictOf(attrOf(data, unix.NFTA_DATA_VERDICT))
}
