package packetfilter

import (
	"bytes"
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Packet is what is known of a packet that begins a connection.
type Packet struct {
	Source, Destination netip.Addr // not valid where they are not known
	V6                  bool
	Protocol            byte   // IPPROTO_*
	SourcePort, Port    uint16 // 0: not known, and any rule about it may hold
	In, Out             Device // without a name where they are not known
	Local               bool   // the destination is an address of this host
	Answered            bool   // it is known that answers leave by In
}

// Device is a network device of this host.
type Device struct {
	Name  string
	Index int
}

// fields is the packet as rules see it: a field that is missing may have any value.
func (p Packet) fields() map[Field][]byte {
	out := map[Field][]byte{
		Protocol: {p.Protocol}, State: native32(StateNew), Status: native32(0), Mark: native32(0),
		PacketType: {unix.PACKET_HOST}, NFProto: {unix.NFPROTO_IPV4}, EtherType: port16(unix.ETH_P_IP),
		TypeOfAddress: native32(unix.RTN_UNICAST),
	}
	set := func(f Field, known bool, value []byte) {
		if known {
			out[f] = value
		}
	}
	device := func(d Device, name, index Field) {
		set(name, d.Name != "", append([]byte(d.Name), make([]byte, max(0, unix.IFNAMSIZ-len(d.Name)))...))
		set(index, d.Name != "", native32(uint32(d.Index)))
	}
	set(NFProto, p.V6, []byte{unix.NFPROTO_IPV6})
	set(EtherType, p.V6, port16(unix.ETH_P_IPV6))
	set(Source, p.Source.IsValid(), p.Source.AsSlice())
	set(Destination, p.Destination.IsValid(), p.Destination.AsSlice())
	set(SourcePort, p.SourcePort != 0, port16(p.SourcePort))
	set(Port, p.Port != 0, port16(p.Port))
	device(p.In, In, InIndex)
	device(p.Out, Out, OutIndex)
	set(TypeOfAddress, p.Local, native32(unix.RTN_LOCAL))
	set(Reverse, p.Answered, native32(1))
	return out
}

// Fate is what becomes of a packet at one or more hooks. Where neither Drops nor Unsure is set, it passes.
type Fate struct {
	Drops   bool // nothing is known by which it could pass. In chains that translate: it gets another sender
	Unsure  bool // it depends on what can't be judged
	By      string
	Chain   Chain // that drops it, or where it isn't sure
	Rule    Rule
	Unclear string // what could not be judged
}

// Has reports whether there is a chain of one of these names.
func (f Filter) Has(names ...string) bool {
	return slices.ContainsFunc(f, func(c Chain) bool { return slices.Contains(names, c.Name) })
}

// Head is the base chain of a hook in the same table as c: the one that leads to it.
func (f Filter) Head(c Chain, hook string) Chain {
	for _, b := range f {
		if c.Hook == "" && b.Hook == hook && b.Family == c.Family && b.Table == c.Table {
			return b
		}
	}
	return c
}

// Through sends a packet through the hooks, in the order in which the kernel does. The first hook that drops it
// decides.
func (f Filter) Through(p Packet, hooks ...string) Fate { return f.through(p, false, hooks) }

// Translated sends a packet that leaves through the rules that may change its sender; Drops says that they do.
func (f Filter) Translated(p Packet) Fate { return f.through(p, true, []string{"postrouting"}) }

func (f Filter) through(p Packet, nat bool, hooks []string) Fate {
	var doubt Fate
	packet := p.fields()
	for _, hook := range hooks {
		for _, c := range f.at(hook, p.V6, nat) {
			w := walk{filter: f, packet: packet}
			res := w.run(c)
			if res.Drops {
				return res
			}
			if res.Unsure && !doubt.Unsure {
				doubt = res
			}
			packet = w.packet
		}
	}
	return doubt
}

// at lists the base chains of a hook that see packets of a family, in their order.
func (f Filter) at(hook string, v6, nat bool) []Chain {
	other := map[bool]string{true: "ip", false: "ip6"}[v6]
	var out []Chain
	for _, c := range f {
		if c.Hook == hook && c.NAT == nat && c.Family != other {
			out = append(out, c)
		}
	}
	slices.SortStableFunc(out, func(a, b Chain) int { return cmp.Compare(a.Priority, b.Priority) })
	return out
}

// truth is the outcome of a test: yes, no, or unknown.
type truth int8

const (
	no truth = iota
	yes
	unknown
)

// walk is the path of one packet through one base chain.
type walk struct {
	filter Filter
	packet map[Field][]byte
	steps  int
}

// Bounds against rules that call each other without end (which the kernel refuses), and against the time that a very
// long list takes.
const (
	maxDepth = 20
	maxSteps = 200_000
)

// outcomes are what may become of a packet: several, where that depends on what can't be judged.
type outcomes struct {
	goesOn  bool
	returns bool // the chain is left, and the one that called it goes on
	passes  bool
	drops   bool
	dropBy  Fate   // the first that may drop it
	doubt   string // what can't be judged: the first
}

func (o outcomes) or(p outcomes) outcomes {
	if o.drops {
		p.dropBy = o.dropBy
	}
	return outcomes{
		o.goesOn || p.goesOn, o.returns || p.returns, o.passes || p.passes, o.drops || p.drops, p.dropBy,
		cmp.Or(o.doubt, p.doubt),
	}
}

// unsure is where all may happen.
func unsure(f Fate, doubt string) outcomes {
	return outcomes{passes: true, drops: true, dropBy: f, doubt: doubt}
}

func (w *walk) run(base Chain) Fate {
	o := w.chain(base, 0)
	switch atEnd := o.goesOn || o.returns; {
	case atEnd && base.Policy == "drop":
		o = o.or(outcomes{drops: true, dropBy: Fate{Chain: base, By: "its policy"}})
	case atEnd:
		o.passes = true
	}
	if base.Hook == "ingress" || base.Hook == "egress" { // the library does not say on which devices such a chain is
		o = o.or(outcomes{passes: true, doubt: "the device that the chain is on"})
	}
	if !o.drops {
		return Fate{}
	}
	f := o.dropBy
	f.Drops, f.Unsure, f.Unclear = !o.passes, o.passes, o.doubt
	return f
}

// chain walks through one chain.
func (w *walk) chain(c Chain, depth int) outcomes {
	all := outcomes{goesOn: true}
	for _, r := range c.Rules {
		if w.steps++; w.steps > maxSteps || depth > maxDepth {
			return all.or(unsure(Fate{Chain: c}, "more rules than are evaluated"))
		}
		holds, doubt := w.matches(r)
		if holds == no {
			continue
		}
		o := w.act(c, r, depth)
		if holds == unknown {
			o = outcomes{goesOn: true, doubt: doubt}.or(o)
		}
		all.goesOn = false
		if all = all.or(o); !all.goesOn {
			break
		}
	}
	return all
}

// act does what a rule says.
func (w *walk) act(c Chain, r Rule, depth int) outcomes {
	a := r.Action
	f := Fate{Chain: c, Rule: r, By: describeRule(c, r)}
	switch a.Verdict {
	case Accept:
		return outcomes{passes: true}
	case Drop, Translate: // the one in chains that filter, the other in those that translate
		return outcomes{drops: true, dropBy: f}
	case Return:
		return outcomes{returns: true}
	case Unclear:
		return unsure(f, "what the rule "+f.By+" does")
	case Jump, Goto:
		i := slices.IndexFunc(w.filter, func(to Chain) bool {
			return to.Family == c.Family && to.Table == c.Table && to.Name == a.Chain
		})
		if i < 0 {
			return unsure(f, "the chain "+a.Chain+", which was not read,")
		}
		o := w.chain(w.filter[i], depth+1)
		back := o.goesOn || o.returns
		o.goesOn, o.returns = back && a.Verdict == Jump, back && a.Verdict == Goto
		return o
	}
	return outcomes{goesOn: true}
}

// matches: all tests together. One that does not hold settles it, whatever the others are.
func (w *walk) matches(r Rule) (truth, string) {
	all, doubt := yes, ""
	for _, t := range r.Tests {
		if t.Sets != "" {
			w.packet = maps.Clone(w.packet)
			delete(w.packet, t.Sets)
			continue
		}
		switch w.holds(t) {
		case no:
			return no, ""
		case unknown:
			all, doubt = unknown, cmp.Or(doubt, describe(t, ""))
		}
	}
	return all, doubt
}

func (w *walk) holds(t Test) truth {
	if len(t.Key) == 0 {
		return unknown
	}
	found := no
	for _, ranges := range t.Any {
		if in := w.inside(t.Key, ranges); in == yes {
			found = yes
			break
		} else if in == unknown {
			found = unknown
		}
	}
	if t.Not && found != unknown {
		return yes - found
	}
	return found
}

// inside: every field in its range.
func (w *walk) inside(key []Key, ranges []Range) truth {
	all := yes
	for i, r := range ranges {
		value, known := w.packet[key[i].Field]
		if !known {
			all = unknown
		} else if !within(value, key[i].Mask, r) {
			return no
		}
	}
	return all
}

// within compares as the kernel does: the first bytes of a field where the range is shorter (a prefix, or the beginning
// of a name).
func within(value, mask []byte, r Range) bool {
	n := len(r.From)
	if n > len(value) || n != len(r.To) {
		return false
	}
	v := bytes.Clone(value[:n])
	for i := range min(n, len(mask)) {
		v[i] &= mask[i]
	}
	return bytes.Compare(v, r.From) >= 0 && bytes.Compare(v, r.To) <= 0
}
