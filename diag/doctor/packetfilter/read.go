package packetfilter

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// maxReads bounds how often the rules are read because another process has changed them meanwhile.
const maxReads = 4

// Read reads the packet filter that nf_tables holds in the network namespace of the calling thread: the chains that a
// packet can come to, and each set that they name.
func Read() (Filter, error) {
	var raw *netlink.Conn
	c, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(n *netlink.Conn) error {
		raw = n
		return nil
	}))
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.CloseLasting() }()
	for n := 1; ; n++ {
		r := reader{c: c, raw: raw, known: known(), sets: map[chainKey]*set{}}
		before, err := r.generation()
		if err != nil {
			return nil, err
		}
		f, err := r.read()
		if err != nil {
			return nil, fmt.Errorf("reading the chains of nf_tables: %w", err)
		}
		// The library does not say that a listing was interrupted; the ruleset's generation does.
		after, err := r.generation()
		if err != nil || n == maxReads || before == after {
			return f, err
		}
	}
}

// generation is the number of the ruleset. It comes first in the answer, before what says which thread asks.
func (r *reader) generation() (string, error) {
	const upToGeneration = 12 // bytes
	answers, err := r.ask(unix.NFT_MSG_GETGEN, 0)
	if err != nil || len(answers) == 0 {
		return "", err
	}
	return string(answers[0][:min(len(answers[0]), upToGeneration)]), nil
}

// chainKey names a chain, or a set, as no other is named.
type chainKey struct {
	family      nftables.TableFamily
	table, name string
}

func keyOf(c *nftables.Chain) chainKey { return chainKey{c.Table.Family, c.Table.Name, c.Name} }

// reader reads each thing once.
type reader struct {
	c       *nftables.Conn
	raw     *netlink.Conn
	known   map[string]func() expr.Any
	rules   map[chainKey][][]byte // of each chain, their expressions as the kernel writes them
	sets    map[chainKey]*set
	limited [][]byte // what the kernel says of sets whose elements limit packets, which the library leaves out
}

// ask sends a request that the library has no call for, and gives the answers as they come.
func (r *reader) ask(what uint16, flags netlink.HeaderFlags) ([][]byte, error) {
	const anyFamily = "\x00\x00\x00\x00" // struct nfgenmsg
	answers, err := r.raw.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | what), Flags: netlink.Request | flags},
		Data:   []byte(anyFamily),
	})
	var out [][]byte
	for _, m := range answers {
		out = append(out, m.Data)
	}
	return out, err
}

func (r *reader) read() (Filter, error) {
	tables, err := r.c.ListTables()
	if err != nil {
		return nil, err
	}
	all, err := r.c.ListChains()
	if err != nil {
		return nil, err
	}
	if r.rules, err = r.readRules(); err != nil {
		return nil, err
	}
	if r.limited, err = r.ask(unix.NFT_MSG_GETSET, netlink.Dump); err != nil {
		return nil, err
	}
	r.limited = slices.DeleteFunc(r.limited, func(b []byte) bool {
		return !bytes.Contains(b, []byte("limit\x00")) && !bytes.Contains(b, []byte("quota\x00"))
	})
	chains := map[chainKey]*nftables.Chain{}
	var todo []*nftables.Chain
	for _, c := range all {
		dormant := slices.ContainsFunc(tables, func(t *nftables.Table) bool {
			flags := binary.BigEndian.Uint32(native32(t.Flags)) // which the library leaves in the order of the wire
			return t.Family == c.Table.Family && t.Name == c.Table.Name && flags&unix.NFT_TABLE_F_DORMANT != 0
		})
		if familyName(c.Table.Family) == "" || dormant {
			continue
		}
		chains[keyOf(c)] = c
		// What translates addresses elsewhere changes no sender of a packet that leaves.
		if c.Hooknum != nil && (c.Type != nftables.ChainTypeNAT || hookName(c) == "postrouting") {
			todo = append(todo, c)
		}
	}
	var out Filter
	seen := map[*nftables.Chain]bool{nil: true} // one that is not there
	for ; len(todo) > 0; todo = todo[1:] {
		c := todo[0]
		if seen[c] {
			continue
		}
		seen[c] = true
		read, err := r.chain(c)
		if err != nil {
			return nil, err
		}
		out = append(out, read)
		for _, rule := range read.Rules {
			todo = append(todo, chains[chainKey{c.Table.Family, c.Table.Name, rule.Action.Chain}])
		}
	}
	return out, nil
}

// familyName is empty for a family whose chains see no packet that is judged here.
func familyName(f nftables.TableFamily) string {
	return map[nftables.TableFamily]string{
		nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6",
		nftables.TableFamilyINet: "inet", nftables.TableFamilyNetdev: "netdev",
	}[f]
}

func hookName(c *nftables.Chain) string {
	names := []string{"prerouting", "input", "forward", "output", "postrouting", "ingress"} // enum nf_inet_hooks
	if c.Table.Family == nftables.TableFamilyNetdev {
		names = []string{"ingress", "egress"} // enum nf_dev_hooks
	}
	if n := int(*c.Hooknum); n < len(names) {
		return names[n]
	}
	return fmt.Sprintf("hook %d", *c.Hooknum)
}

func (r *reader) chain(c *nftables.Chain) (Chain, error) {
	out := Chain{Family: familyName(c.Table.Family), Table: c.Table.Name, Name: c.Name, Policy: "accept"}
	if c.Hooknum != nil {
		out.Hook, out.NAT, out.Priority = hookName(c), c.Type == nftables.ChainTypeNAT, int32(*c.Priority)
	}
	if c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop {
		out.Policy = "drop"
	}
	for _, list := range r.rules[keyOf(c)] {
		exprs, err := r.expressions(byte(c.Table.Family), list)
		if err != nil {
			return out, err
		}
		out.Rules = append(out.Rules, r.parse(c.Table, exprs)...)
	}
	return out, nil
}

// readRules lists all rules. The library would leave out expressions that it has no type for.
func (r *reader) readRules() (map[chainKey][][]byte, error) {
	const header = 4 // struct nfgenmsg, the family first
	answers, err := r.ask(unix.NFT_MSG_GETRULE, netlink.Dump)
	out := map[chainKey][][]byte{}
	for _, b := range answers {
		ad, err := netlink.NewAttributeDecoder(b[header:])
		if err != nil {
			return nil, err
		}
		at := chainKey{family: nftables.TableFamily(b[0])}
		var list []byte
		for ad.Next() {
			switch ad.Type() {
			case unix.NFTA_RULE_TABLE:
				at.table = ad.String()
			case unix.NFTA_RULE_CHAIN:
				at.name = ad.String()
			case unix.NFTA_RULE_EXPRESSIONS:
				list = ad.Bytes()
			}
		}
		if err := ad.Err(); err != nil {
			return nil, err
		}
		out[at] = append(out[at], list)
	}
	return out, err
}

// expression is one of a rule.
type expression struct {
	name    string
	decoded expr.Any // nil where it is not understood
}

func (r *reader) expressions(family byte, list []byte) (out []expression, err error) {
	ad, err := netlink.NewAttributeDecoder(list)
	if err != nil {
		return nil, err
	}
	for ad.Next() {
		ad.Nested(func(d *netlink.AttributeDecoder) error {
			var e expression
			for d.Next() {
				switch d.Type() {
				case unix.NFTA_EXPR_NAME:
					e.name = d.String()
					if known := r.known[e.name]; known != nil {
						e.decoded = known()
					}
				case unix.NFTA_EXPR_DATA:
					e.decoded = decode(family, d.Bytes(), e.decoded)
				}
			}
			out = append(out, e)
			return nil
		})
	}
	return out, ad.Err()
}

// decode fills an expression; nil where it can't.
func decode(family byte, data []byte, e expr.Any) expr.Any {
	if e == nil || expr.Unmarshal(family, data, e) != nil {
		return nil
	}
	if i, ok := e.(*expr.Immediate); ok && i.Register == unix.NFT_REG_VERDICT {
		return decode(family, data, &expr.Verdict{})
	}
	return e
}

// element is one of a set or map, its key as one range. Without keys it stands for what is in no other element.
type element struct {
	keys   *Range
	action Action // of a map
}

// set is what is in a set or map.
type set struct {
	elements []element
	size     int  // of a key
	unclear  bool // it could not be read
	limited  bool // its elements may hold for some packets only
}

func (r *reader) set(t *nftables.Table, name string) *set {
	key := chainKey{t.Family, t.Name, name}
	if s, known := r.sets[key]; known {
		return s
	}
	s := &set{unclear: true}
	r.sets[key] = s
	head, err := r.c.GetSetByName(t, name)
	if err != nil {
		return s
	}
	elements, err := r.c.GetSetElements(head)
	if err != nil {
		return s
	}
	*s = setOf(head, elements)
	// Where rules add elements, each may have a limit of its own.
	s.limited = head.Dynamic ||
		slices.ContainsFunc(r.limited, func(b []byte) bool { return bytes.Contains(b, []byte(name+"\x00")) })
	return s
}

func setOf(head *nftables.Set, elements []nftables.SetElement) set {
	s := set{elements: elementsOf(head, elements)}
	for _, e := range s.elements {
		if e.keys != nil {
			n := len(e.keys.From)
			s.unclear = s.unclear || n == 0 || s.size > 0 && n != s.size || n != len(e.keys.To)
			s.size = n
		}
	}
	return s
}

// elementsOf gives the elements as ranges, with the actions of a map. Of a set with intervals, the kernel gives the
// ends of ranges as elements, unless it is a concatenation.
func elementsOf(s *nftables.Set, elements []nftables.SetElement) []element {
	var out []element
	ends := s.Interval && !s.Concatenation &&
		!slices.ContainsFunc(elements, func(e nftables.SetElement) bool { return e.KeyEnd != nil })
	if ends { // where one range ends, the next may begin
		slices.SortStableFunc(elements, func(a, b nftables.SetElement) int {
			if a.IntervalEnd == b.IntervalEnd {
				return bytes.Compare(a.Key, b.Key)
			}
			return cmp.Or(bytes.Compare(a.Key, b.Key), map[bool]int{true: -1, false: 1}[a.IntervalEnd])
		})
	}
	for i, e := range elements {
		if e.IntervalEnd {
			continue
		}
		action, to := mapped(byte(s.Table.Family), e.Val), e.Key
		switch {
		case e.Key == nil: // for what is in no other
			out = append(out, element{nil, action})
			continue
		case e.KeyEnd != nil:
			to = e.KeyEnd
		case ends && i+1 < len(elements):
			to = before(elements[i+1].Key)
		case ends:
			to = bytes.Repeat([]byte{0xff}, len(e.Key))
		}
		out = append(out, element{&Range{e.Key, to}, action})
	}
	return out
}

// before is the number before.
func before(b []byte) []byte {
	out := bytes.Clone(b)
	for i := len(out) - 1; i >= 0; i-- {
		if out[i]--; out[i] != 0xff {
			break
		}
	}
	return out
}

// mapped is the verdict of a map's element, which the library leaves as the kernel has written it. It decodes the same
// where a rule gives it.
func mapped(family byte, value []byte) Action {
	const verdictData, immediateData = 2, 2 // enum nft_data_attributes, enum nft_immediate_attributes
	if len(value) < 8 {                     // that of a set
		return Action{Verdict: Unclear}
	}
	for _, typ := range []uint16{verdictData, immediateData} {
		var err error
		if value, err = netlink.MarshalAttributes([]netlink.Attribute{{Type: typ, Data: value}}); err != nil {
			return Action{Verdict: Unclear}
		}
	}
	var v expr.Verdict
	if err := expr.Unmarshal(family, value, &v); err != nil {
		return Action{Verdict: Unclear}
	}
	return actionOf(&v)
}

func actionOf(v *expr.Verdict) Action {
	verdict, known := map[expr.VerdictKind]Verdict{
		expr.VerdictAccept: Accept, expr.VerdictDrop: Drop, expr.VerdictReturn: Return,
		expr.VerdictJump: Jump, expr.VerdictGoto: Goto, expr.VerdictContinue: Continue,
	}[v.Kind]
	if !known {
		verdict = Unclear
	}
	return Action{verdict, v.Chain}
}
