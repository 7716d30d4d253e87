package packetfilter

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The library leaves out expressions that it has no type for (byteorder, socket, rt, osf, xfrm, tunnel, tproxy, fwd, dup, ...).
// What they do can't be known, that they are there can, by the registers. Each value that is loaded is read once in what nft and
// iptables-nft write:
//   - what is read but was not loaded comes from an expression that was left out,
//   - what was loaded but is read by none goes to one,
//   - a number in the machine's order that is compared by "less" or "between" went through a byteorder.
//
// Such a rule gets a test that can't be judged. Left out without a trace is "last", which does nothing to a packet. The
// one case of two readers is a comparison "at least", then "at most", which is how a range is written: an expression between
// them, whose value has the same length, would not be found.

// notKnown says of a test what it asks for, in place of a name.
const notKnown = "an expression unknown to this version of overlayd"

// part is a field in a register, or the beginning of one.
type part struct {
	Key
	size int // bytes
}

// loaded is what is in a register: fields that follow each other, or what is not known.
type loaded struct {
	parts []part
	what  string
}

func (l loaded) size() int {
	n := 0
	for _, p := range l.parts {
		n += p.size
	}
	return n
}

// parser turns the expressions of a rule into tests.
type parser struct {
	reader *reader
	table  *nftables.Table
	regs   map[uint32]loaded // what was loaded and not yet read
	rule   Rule
	hidden bool // an expression has been left out

	least *expr.Cmp // the expression before, where it is a comparison "at least"
	of    loaded    // what it compares
}

func (r *reader) rule(t *nftables.Table, exprs []expr.Any) Rule {
	p := parser{reader: r, table: t, regs: map[uint32]loaded{}}
	for _, e := range exprs {
		least := p.least
		p.take(e)
		if p.least == least {
			p.least = nil
		}
	}
	if p.hidden || len(p.regs) > 0 {
		p.unknown(notKnown)
		if p.rule.Action == (Action{}) && p.rule.Map == nil { // it may be what decides, as fwd does
			p.rule.Action.Verdict = Unclear
		}
	}
	return p.rule
}

func (p *parser) test(t ...Test) { p.rule.Tests = append(p.rule.Tests, t...) }
func (p *parser) sets(f Field)   { p.test(Test{Sets: f}) }

func (p *parser) unknown(what string) {
	if n := len(p.rule.Tests); n == 0 || p.rule.Tests[n-1].What != what {
		p.test(unknownTest(what))
	}
}

// register gives registers of four and of sixteen bytes the same numbers (enum nft_registers).
func register(n uint32) uint32 {
	const first32 = 8
	if n >= unix.NFT_REG_1 && n <= unix.NFT_REG_4 {
		return first32 + (n-unix.NFT_REG_1)*4
	}
	return n
}

func (p *parser) load(reg uint32, l loaded) {
	_, unread := p.regs[register(reg)]
	p.hidden = p.hidden || unread
	p.regs[register(reg)] = l
}

// value is that of a register, which is read with it.
func (p *parser) value(reg uint32) loaded {
	l, ok := p.regs[register(reg)]
	delete(p.regs, register(reg))
	if !ok {
		p.unknown(notKnown)
	}
	return l
}

// written is a register whose value goes elsewhere. There may be none to load, and then the rule does not hold.
func (p *parser) written(reg uint32) {
	if l := p.value(reg); len(l.parts) == 0 && l.what != "" {
		p.unknown(l.what)
	}
}

func (p *parser) field(reg uint32, f Field, size int, what string) {
	l := loaded{what: what}
	if f != "" {
		l.parts = []part{{Key{Field: f}, size}}
	}
	p.load(reg, l)
}

func (p *parser) take(e expr.Any) {
	switch e := e.(type) {
	case *expr.Counter, *expr.Log:
	case *expr.Payload:
		p.payload(e)
	case *expr.Meta:
		p.meta(e)
	case *expr.Ct:
		p.ct(e)
	case *expr.Fib:
		switch {
		case e.ResultADDRTYPE && e.FlagDADDR && !e.FlagSADDR && !e.FlagIIF && !e.FlagOIF:
			p.field(e.Register, TypeOfAddress, 4, "")
		case e.ResultOIF && e.FlagPRESENT && e.FlagSADDR && e.FlagIIF && !e.FlagDADDR && !e.FlagOIF:
			p.field(e.Register, Reverse, 4, "")
		default:
			p.field(e.Register, "", 0, "fib")
		}
	case *expr.Bitwise:
		p.bitwise(e)
	case *expr.Cmp:
		p.cmp(e)
	case *expr.Range:
		p.compare(p.value(e.Register), e.FromData, e.ToData, e.Op == expr.CmpOpNeq)
	case *expr.Lookup:
		p.lookup(e)
	case *expr.Immediate:
		p.field(e.Register, "", 0, "")
	case *expr.Exthdr:
		if e.DestRegister != 0 {
			p.field(e.DestRegister, "", 0, "an extension header")
		} else {
			p.value(e.SourceRegister)
		}
	case *expr.Numgen:
		p.field(e.Register, "", 0, "numgen")
	case *expr.Hash:
		clear(p.regs)
		p.field(e.DestRegister, "", 0, "hash")
	case *expr.Limit, *expr.Quota, *expr.Connlimit, *expr.FlowOffload:
		p.unknown(strings.ToLower(strings.TrimPrefix(fmt.Sprintf("%T", e), "*expr.")))
	case *expr.Dynset: // with a limit of its own, or the set is full
		clear(p.regs)
		p.unknown("set " + e.SetName)
	case *expr.Notrack:
		p.sets(State)
	case *expr.Objref:
		p.object(e)
	case *expr.Match:
		p.test(xtMatch(e)...)
	case *expr.Target:
		action, sets := xtTarget(e.Name)
		p.rule.Action = action
		if sets != "" {
			p.sets(sets)
		}
	default:
		p.end(e)
	}
}

// end is what an expression says that may decide what becomes of the packet.
func (p *parser) end(e expr.Any) {
	action := Action{Verdict: Unclear}
	switch e := e.(type) {
	case *expr.Verdict:
		action = actionOf(e)
	case *expr.Reject:
		action.Verdict = Drop
	case *expr.Masq:
		clear(p.regs)
		action.Verdict = Translate
	case *expr.NAT:
		clear(p.regs)
		if e.Type == expr.NATTypeSourceNAT {
			action.Verdict = Translate
		}
	case *expr.SynProxy: // a verdict may come behind it
		p.unknown("synproxy")
	default: // queue, redirect
		clear(p.regs)
	}
	p.rule.Action = action
}

// object is one with a name, of the table.
func (p *parser) object(e *expr.Objref) {
	switch nftables.ObjType(e.Type) {
	case nftables.ObjTypeCounter, nftables.ObjTypeCtHelper, nftables.ObjTypeCtTimeout, nftables.ObjTypeCtExpect,
		nftables.ObjTypeSecMark, nftables.ObjTypeTunnel:
	case nftables.ObjTypeSynProxy:
		p.end(&expr.SynProxy{})
	default: // a limit or a quota, or one that a map chooses
		clear(p.regs)
		p.unknown("object " + e.Name)
	}
}

// protocol is the family of the packets that the rule can meet, as far as it is said: NFPROTO_IPV4, NFPROTO_IPV6 or 0.
func (p *parser) protocol() uint8 {
	if p.table.Family == nftables.TableFamilyIPv4 || p.table.Family == nftables.TableFamilyIPv6 {
		return uint8(p.table.Family)
	}
	for _, t := range p.rule.Tests {
		if family := familyAsked(t); family != "" {
			return map[string]uint8{"ip": unix.NFPROTO_IPV4, "ip6": unix.NFPROTO_IPV6}[family]
		}
	}
	return 0
}

// fieldAt is the field that begins at an offset into a header, with its size.
func (p *parser) fieldAt(base expr.PayloadBase, at uint32) (Field, uint32) {
	const network, transport = expr.PayloadBaseNetworkHeader, expr.PayloadBaseTransportHeader
	for _, f := range []struct {
		base     expr.PayloadBase
		proto    uint8
		at, size uint32
		field    Field
	}{
		{transport, 0, 0, 2, SourcePort},
		{transport, 0, 2, 2, Port},
		{network, unix.NFPROTO_IPV4, 9, 1, Protocol},
		{network, unix.NFPROTO_IPV4, 12, 4, Source},
		{network, unix.NFPROTO_IPV4, 16, 4, Destination},
		{network, unix.NFPROTO_IPV6, 6, 1, Protocol},
		{network, unix.NFPROTO_IPV6, 8, 16, Source},
		{network, unix.NFPROTO_IPV6, 24, 16, Destination},
	} {
		if f.base == base && f.at == at && (base == transport || f.proto == p.protocol()) {
			return f.field, f.size
		}
	}
	return "", 0
}

func (p *parser) payload(e *expr.Payload) {
	l := loaded{what: fmt.Sprintf("payload %d,%d", e.Offset, e.Len)}
	for at, end := e.Offset, e.Offset+e.Len; at < end; {
		f, size := p.fieldAt(e.Base, at)
		if f == "" {
			l.parts = nil
			break
		}
		size = min(size, end-at)
		l.parts = append(l.parts, part{Key{Field: f}, int(size)})
		at += size
	}
	if e.OperationType != expr.PayloadWrite {
		p.load(e.DestRegister, l)
		return
	}
	p.written(e.SourceRegister)
	for _, part := range l.parts {
		p.sets(part.Field)
	}
}

func (p *parser) meta(e *expr.Meta) {
	f := map[expr.MetaKey]part{
		expr.MetaKeyMARK:     {Key{Field: Mark}, 4},
		expr.MetaKeyIIF:      {Key{Field: InIndex}, 4},
		expr.MetaKeyOIF:      {Key{Field: OutIndex}, 4},
		expr.MetaKeyIIFNAME:  {Key{Field: In}, unix.IFNAMSIZ},
		expr.MetaKeyOIFNAME:  {Key{Field: Out}, unix.IFNAMSIZ},
		expr.MetaKeyIIFTYPE:  {Key{Field: InType}, 2},
		expr.MetaKeyPROTOCOL: {Key{Field: EtherType}, 2},
		expr.MetaKeyNFPROTO:  {Key{Field: NFProto}, 1},
		expr.MetaKeyL4PROTO:  {Key{Field: Protocol}, 1},
		expr.MetaKeyPKTTYPE:  {Key{Field: PacketType}, 1},
	}[e.Key]
	if !e.SourceRegister {
		p.field(e.Register, f.Field, f.size, fmt.Sprintf("meta %d", e.Key))
		return
	}
	p.written(e.Register)
	if f.Field != "" {
		p.sets(f.Field)
	}
}

func (p *parser) ct(e *expr.Ct) {
	switch {
	case e.Register == 0: // it sets something; the library does not say by which register
		if len(p.regs) == 0 {
			p.unknown(notKnown)
		}
		clear(p.regs)
	case e.Key == expr.CtKeySTATE:
		p.field(e.Register, State, 4, "")
	case e.Key == expr.CtKeySTATUS:
		p.field(e.Register, Status, 4, "")
	case e.Key == expr.CtKeyMARK:
		p.field(e.Register, "", 0, "ct mark")
	default:
		p.field(e.Register, "", 0, "ct")
	}
}

// bitwise puts a mask on what is loaded; shifts, and what takes two registers, have none.
func (p *parser) bitwise(e *expr.Bitwise) {
	l := p.value(e.SourceRegister)
	masked := slices.ContainsFunc(l.parts, func(p part) bool { return p.Mask != nil })
	if masked || len(e.Mask) == 0 || len(e.Mask) != l.size() || len(bytes.Trim(e.Xor, "\x00")) > 0 {
		l = loaded{what: "bitwise " + l.what}
	}
	at := 0
	for i, part := range l.parts {
		l.parts[i].Mask = e.Mask[at : at+part.size]
		at += part.size
	}
	p.load(e.DestRegister, l)
}

func (p *parser) cmp(e *expr.Cmp) {
	v := e.Data
	most, zeros := bytes.Repeat([]byte{0xff}, len(v)), make([]byte, len(v))
	if least := p.least; least != nil && e.Op == expr.CmpOpLte && e.Register == least.Register && len(v) == len(least.Data) {
		p.rule.Tests = p.rule.Tests[:len(p.rule.Tests)-1]
		p.compare(p.of, least.Data, v, false)
		return
	}
	l := p.value(e.Register)
	switch e.Op {
	case expr.CmpOpEq, expr.CmpOpNeq:
		p.compare(l, v, v, e.Op == expr.CmpOpNeq)
	case expr.CmpOpGte, expr.CmpOpLt:
		p.compare(l, v, most, e.Op == expr.CmpOpLt)
	case expr.CmpOpLte, expr.CmpOpGt:
		p.compare(l, zeros, v, e.Op == expr.CmpOpGt)
	}
	if e.Op == expr.CmpOpGte {
		p.least, p.of = e, l
	}
}

// compare tests what was in a register against a range.
func (p *parser) compare(l loaded, from, to []byte, not bool) {
	between := !bytes.Equal(from, to)
	if len(l.parts) == 0 || len(from) == 0 || len(from) > l.size() || len(from) != len(to) ||
		between && (len(l.parts) > 1 || l.parts[0].Field.machineOrder() || bytes.Compare(from, to) > 0) {
		if len(l.parts) > 0 {
			l.what = string(l.parts[0].Field)
		}
		p.unknown(cmp.Or(l.what, notKnown))
		return
	}
	t := Test{Not: not, Any: [][]Range{nil}}
	for at, i := 0, 0; at < len(from); i++ {
		end := min(at+l.parts[i].size, len(from))
		t.Key = append(t.Key, l.parts[i].Key)
		t.Any[0] = append(t.Any[0], Range{from[at:end], to[at:end]})
		at = end
	}
	p.test(t)
}

// lookup puts the elements of a set in the place of its name.
func (p *parser) lookup(e *expr.Lookup) {
	parts, known := p.concatenation(e.SourceRegister)
	if e.IsDestRegSet && e.DestRegister != unix.NFT_REG_VERDICT {
		p.unknown("map " + e.SetName) // without an element, the rule does not hold
		p.field(e.DestRegister, "", 0, "map "+e.SetName)
		return
	}
	var key []Key
	s := p.reader.set(p.table, e.SetName)
	for _, part := range parts {
		key = append(key, part.Key)
		if s.interval && part.Field.machineOrder() { // see byteorder above
			known = false
		}
	}
	cases := []Case{}
	for _, c := range s.cases {
		if c.Ranges != nil {
			c.Ranges = split(c.Ranges[0], parts)
			known = known && c.Ranges != nil
		}
		cases = append(cases, c)
	}
	if s.limited && !e.Invert {
		p.unknown("set " + e.SetName)
	}
	switch known = known && s.err == nil; {
	case !known && e.IsDestRegSet:
		p.rule.Action.Verdict = Unclear
	case !known:
		p.unknown("set " + e.SetName)
	case e.IsDestRegSet:
		p.rule.Key, p.rule.Map = key, cases
	default:
		t := Test{Key: key, Not: e.Invert}
		for _, c := range cases {
			t.Any = append(t.Any, c.Ranges)
		}
		p.test(t)
	}
}

// concatenation is all that was loaded and not yet read: fields that follow each other from a register on, each of which begins
// a register of four bytes.
func (p *parser) concatenation(from uint32) (parts []part, known bool) {
	at := register(from)
	for ; len(p.regs) > 0; at += uint32(parts[len(parts)-1].size+3) / 4 {
		l, ok := p.regs[at]
		if delete(p.regs, at); !ok || len(l.parts) != 1 {
			clear(p.regs)
			return nil, false
		}
		parts = append(parts, l.parts[0])
	}
	return parts, len(parts) > 0
}

// split cuts a range of a concatenation into those of its fields; nil where the lengths are others.
func split(r Range, parts []part) []Range {
	var out []Range
	at := 0
	for i, part := range parts {
		if i > 0 {
			at = (at + 3) &^ 3
		}
		end := at + part.size
		if end > len(r.From) || len(r.From) != len(r.To) {
			return nil
		}
		out = append(out, Range{r.From[at:end], r.To[at:end]})
		at = end
	}
	if at != len(r.From) && (at+3)&^3 != len(r.From) {
		return nil
	}
	return out
}
