package packetfilter

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// known are the expressions that are understood, by the kernel's names for them.
func known() map[string]func() expr.Any {
	return map[string]func() expr.Any{
		"bitwise": empty[expr.Bitwise], "cmp": empty[expr.Cmp], "ct": empty[expr.Ct], "fib": empty[expr.Fib],
		"immediate": empty[expr.Immediate], "lookup": empty[expr.Lookup], "masq": empty[expr.Masq],
		"match": empty[expr.Match], "meta": empty[expr.Meta], "nat": empty[expr.NAT], "notrack": empty[expr.Notrack],
		"objref": empty[expr.Objref], "payload": empty[expr.Payload], "range": empty[expr.Range],
		"reject": empty[expr.Reject], "target": empty[expr.Target],
	}
}

func empty[T any, E interface {
	*T
	expr.Any
}]() expr.Any {
	return E(new(T))
}

// decidesNothing reports whether an expression that is not understood leaves the verdict to those behind it. A new one
// may be a verdict itself, as fwd and queue are, and synproxy, which answers a SYN in place of its receiver.
func decidesNothing(name string) bool {
	return slices.Contains([]string{
		"byteorder", "connlimit", "dup", "dynset", "exthdr", "flow_offload", "hash", "inner", "limit", "numgen",
		"objref", "osf", "quota", "rt", "socket", "tunnel", "xfrm",
	}, name)
}

// cell is a byte of a register.
type cell struct {
	field Field
	at    int // which byte of the field it is
	mask  byte
	what  string // it is instead of a field
}

// part is a field, or the beginning of one, and where it is in a key.
type part struct {
	Key
	from, to int
}

// parser turns the expressions of a rule into tests.
type parser struct {
	reader *reader
	table  *nftables.Table
	regs   map[int]cell // by the place of the byte
	rule   Rule
	more   []Rule // the elements of a verdict map
}

// parse turns a rule into those for each element of its verdict map, or into one.
func (r *reader) parse(t *nftables.Table, exprs []expression) []Rule {
	p := parser{reader: r, table: t, regs: map[int]cell{}}
	for _, e := range exprs {
		onlyNotes := slices.Contains([]string{"counter", "last", "log"}, e.name)
		if !onlyNotes && !p.take(e.decoded) {
			clear(p.regs) // it may have loaded or changed any
			p.unknown(e.name)
			if !decidesNothing(e.name) {
				p.rule.Action.Verdict = Unclear
			}
		}
	}
	if p.more == nil {
		return []Rule{p.rule}
	}
	for i := range p.more {
		p.more[i].Tests = append(slices.Clone(p.rule.Tests), p.more[i].Tests...)
	}
	return p.more
}

func (p *parser) test(t ...Test) { p.rule.Tests = append(p.rule.Tests, t...) }
func (p *parser) sets(f Field)   { p.test(Test{Sets: f}) }

func (p *parser) unknown(what string) {
	if n := len(p.rule.Tests); n == 0 || p.rule.Tests[n-1].What != what {
		p.test(unknownTest(what))
	}
}

// place is where a register begins. Those of sixteen bytes are four of four bytes each (enum nft_registers).
func place(register uint32) int {
	const first32 = 8
	if register >= unix.NFT_REG_1 && register <= unix.NFT_REG_4 {
		return int(register-unix.NFT_REG_1) * 16
	}
	return (int(register) - first32) * 4
}

// load puts a field at a place, or what is not known, which has a name.
func (p *parser) load(at int, f Field, size int, what string) {
	for i := range size {
		p.regs[at+i] = cell{f, i, 0xff, what}
	}
	for end := at + size; end%4 > 0; end++ { // the kernel pads it
		delete(p.regs, end)
	}
}

// key is the fields that n bytes from a register on hold: each begins at a multiple of four, or where the one before it
// ends. Otherwise it says what else they hold.
func (p *parser) key(register uint32, n int) (parts []part, what string) {
	for i := range n {
		c, loaded := p.regs[place(register)+i]
		if !loaded && i%4 > 0 { // nothing, up to the next field
			continue
		}
		if c.field != "" && c.at == 0 {
			parts = append(parts, part{Key{Field: c.field}, i, i})
		}
		if len(parts) == 0 {
			return nil, cmp.Or(c.what, "a value that another expression has loaded")
		}
		last := &parts[len(parts)-1]
		if c.field != last.Field || c.at != i-last.from {
			return nil, cmp.Or(c.what, string(c.field))
		}
		last.to, last.Mask = i+1, append(last.Mask, c.mask)
	}
	for i := range parts {
		if !slices.ContainsFunc(parts[i].Mask, func(b byte) bool { return b != 0xff }) {
			parts[i].Mask = nil
		}
	}
	return parts, ""
}

// keysOf are the fields of a key.
func keysOf(parts []part) (out []Key) {
	for _, p := range parts {
		out = append(out, p.Key)
	}
	return out
}

// cut cuts the range of a key into those of its fields.
func cut(r Range, parts []part) (out []Range) {
	for _, p := range parts {
		out = append(out, Range{r.From[p.from:p.to], r.To[p.from:p.to]})
	}
	return out
}

// take understands an expression, or returns false.
func (p *parser) take(e expr.Any) bool {
	switch e := e.(type) {
	case *expr.Payload:
		p.payload(e)
	case *expr.Meta:
		p.meta(e)
	case *expr.Ct:
		p.ct(e)
	case *expr.Fib:
		p.fib(e)
	case *expr.Bitwise:
		p.bitwise(e)
	case *expr.Cmp:
		p.cmp(e)
	case *expr.Range:
		p.compare(e.Register, e.FromData, e.ToData, e.Op == expr.CmpOpNeq)
	case *expr.Lookup:
		p.lookup(e)
	case *expr.Immediate:
		p.load(place(e.Register), "", len(e.Data), "a constant")
	case *expr.Notrack:
		p.sets(State)
	case *expr.Objref:
		if nftables.ObjType(e.Type) == nftables.ObjTypeSynProxy {
			p.rule.Action.Verdict = Unclear
		}
		return !limits(nftables.ObjType(e.Type))
	case *expr.Match:
		p.test(xtMatch(e)...)
	case *expr.Target:
		action, sets := xtTarget(e.Name)
		p.rule.Action = action
		if sets != "" {
			p.sets(sets)
		}
	case *expr.Verdict:
		p.rule.Action = actionOf(e)
	case *expr.Reject:
		p.rule.Action = Action{Verdict: Drop}
	case *expr.Masq:
		p.rule.Action = Action{Verdict: Translate}
	case *expr.NAT:
		p.rule.Action = Action{Verdict: Translate}
		return e.Type == expr.NATTypeSourceNAT
	default:
		return false
	}
	return true
}

// limits reports whether an object with a name, or one that a map chooses, may stop a packet.
func limits(t nftables.ObjType) bool {
	return !slices.Contains([]nftables.ObjType{
		nftables.ObjTypeCounter, nftables.ObjTypeCtHelper, nftables.ObjTypeCtTimeout, nftables.ObjTypeCtExpect,
		nftables.ObjTypeSecMark, nftables.ObjTypeTunnel,
	}, t)
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
	to := place(e.DestRegister)
	for at, end := e.Offset, e.Offset+e.Len; at < end; {
		f, size := p.fieldAt(e.Base, at)
		if f == "" {
			size = end - at
		}
		size = min(size, end-at)
		switch {
		case e.OperationType != expr.PayloadWrite:
			p.load(to+int(at-e.Offset), f, int(size), fmt.Sprintf("payload %d,%d", e.Offset, e.Len))
		case f != "":
			p.sets(f)
		}
		at += size
	}
}

func (p *parser) meta(e *expr.Meta) {
	f := map[expr.MetaKey]Field{
		expr.MetaKeyMARK: Mark, expr.MetaKeyIIF: InIndex, expr.MetaKeyOIF: OutIndex, expr.MetaKeyIIFNAME: In,
		expr.MetaKeyOIFNAME: Out, expr.MetaKeyPROTOCOL: EtherType, expr.MetaKeyNFPROTO: NFProto,
		expr.MetaKeyL4PROTO: Protocol, expr.MetaKeyPKTTYPE: PacketType,
	}[e.Key]
	switch {
	case !e.SourceRegister:
		p.load(place(e.Register), f, f.size(), fmt.Sprintf("meta %d", e.Key))
	case f != "":
		p.sets(f)
	}
}

// ct loads what the kernel knows of the connection. What it can set is no field that is known here.
func (p *parser) ct(e *expr.Ct) {
	if e.Register == 0 { // the library leaves out the register that it sets something by
		return
	}
	f := map[expr.CtKey]Field{expr.CtKeySTATE: State, expr.CtKeySTATUS: Status}[e.Key]
	p.load(place(e.Register), f, f.size(), "ct")
}

func (p *parser) fib(e *expr.Fib) {
	var f Field
	switch {
	case e.ResultADDRTYPE && e.FlagDADDR && !e.FlagSADDR && !e.FlagIIF && !e.FlagOIF:
		f = TypeOfAddress
	case e.ResultOIF && e.FlagPRESENT && e.FlagSADDR && e.FlagIIF && !e.FlagDADDR && !e.FlagOIF:
		f = Reverse
	}
	p.load(place(e.Register), f, f.size(), "fib")
}

// bitwise puts a mask on what is loaded; shifts, and what takes two registers, have none.
func (p *parser) bitwise(e *expr.Bitwise) {
	from, to := place(e.SourceRegister), place(e.DestRegister)
	if len(e.Mask) == 0 || len(bytes.Trim(e.Xor, "\x00")) > 0 {
		p.load(to, "", int(e.Len), "bitwise")
		return
	}
	for i, mask := range e.Mask {
		c := p.regs[from+i]
		c.mask &= mask
		p.regs[to+i] = c
	}
}

func (p *parser) cmp(e *expr.Cmp) {
	v := e.Data
	most, zeros := bytes.Repeat([]byte{0xff}, len(v)), make([]byte, len(v))
	switch e.Op {
	case expr.CmpOpEq, expr.CmpOpNeq:
		p.compare(e.Register, v, v, e.Op == expr.CmpOpNeq)
	case expr.CmpOpGte, expr.CmpOpLt:
		p.compare(e.Register, v, most, e.Op == expr.CmpOpLt)
	case expr.CmpOpLte, expr.CmpOpGt:
		p.compare(e.Register, zeros, v, e.Op == expr.CmpOpGt)
	}
}

// compare tests what is in a register against a range.
func (p *parser) compare(register uint32, from, to []byte, not bool) {
	parts, what := p.key(register, len(from))
	if len(parts) == 0 || len(from) != len(to) || len(parts) > 1 && !bytes.Equal(from, to) {
		p.unknown(cmp.Or(what, "a comparison"))
		return
	}
	p.test(Test{Key: keysOf(parts), Any: [][]Range{cut(Range{from, to}, parts)}, Not: not})
}

// lookup puts the elements of a set in the place of its name.
func (p *parser) lookup(e *expr.Lookup) {
	name := "set " + e.SetName
	if e.IsDestRegSet && e.DestRegister != unix.NFT_REG_VERDICT {
		p.unknown(name) // without an element, the rule does not hold
		p.load(place(e.DestRegister), "", longest, name)
		return
	}
	s := p.reader.set(p.table, e.SetName)
	parts, what := p.key(e.SourceRegister, max(s.size, 1))
	switch {
	case what != "" || s.unclear:
		p.unknown(name)
		if e.IsDestRegSet {
			p.rule.Action.Verdict = Unclear
		}
		return
	case s.limited && !e.Invert:
		p.unknown(name)
	}
	in := Test{Key: keysOf(parts), Not: e.Invert} // in any element
	var elements []Rule
	for _, x := range s.elements {
		var ranges []Range
		if x.keys != nil {
			ranges = cut(*x.keys, parts)
		}
		in.Any = append(in.Any, ranges)
		elements = append(elements, Rule{[]Test{{Key: in.Key, Any: [][]Range{ranges}}}, x.action})
	}
	if e.IsDestRegSet {
		p.mapped(elements)
	} else {
		p.test(in)
	}
}

// mapped takes the elements of a verdict map: that for what is in no other comes last.
func (p *parser) mapped(elements []Rule) {
	isRest := func(r Rule) bool { return r.Tests[0].Any[0] == nil }
	p.more = slices.DeleteFunc(slices.Clone(elements), isRest)
	if i := slices.IndexFunc(elements, isRest); i >= 0 {
		none := Test{Key: elements[i].Tests[0].Key, Not: true}
		for _, r := range p.more {
			none.Any = append(none.Any, r.Tests[0].Any...)
		}
		p.more = append(p.more, Rule{[]Test{none}, elements[i].Action})
	}
	if len(elements) == 0 { // no packet is in it
		p.test(Test{Key: []Key{{Field: Protocol}}})
	}
}
