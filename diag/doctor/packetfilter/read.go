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

// Read reads the packet filter that nf_tables holds in the network namespace of the calling thread. It asks for the rules of
// each chain that a packet can come to, and for each set that they name. A chain with a rule that can't be decoded is Unclear.
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
		r := reader{c: c, chains: map[chainKey]*nftables.Chain{}, sets: map[chainKey]*set{}}
		before, err := r.ask(raw, unix.NFT_MSG_GETGEN, 0)
		if err != nil {
			return nil, err
		}
		if r.limited, err = r.ask(raw, unix.NFT_MSG_GETSET, netlink.Dump); err != nil {
			return nil, err
		}
		r.limited = slices.DeleteFunc(r.limited, func(b []byte) bool {
			return !bytes.Contains(b, []byte("limit\x00")) && !bytes.Contains(b, []byte("quota\x00"))
		})
		f, err := r.read()
		if err != nil {
			return nil, fmt.Errorf("reading the chains of nf_tables: %w", err)
		}
		// The library does not say that a listing was interrupted; the ruleset's generation does. It comes first in an answer,
		// before what says which thread asks.
		const upToGeneration = 12
		after, err := r.ask(raw, unix.NFT_MSG_GETGEN, 0)
		same := func(a, b []byte) bool {
			return bytes.Equal(a[:min(len(a), upToGeneration)], b[:min(len(b), upToGeneration)])
		}
		if err != nil || n == maxReads || slices.EqualFunc(before, after, same) {
			return f, err
		}
	}
}

// chainKey names a chain, or a set, as no other is named.
type chainKey struct {
	family      nftables.TableFamily
	table, name string
}

// reader reads each thing once.
type reader struct {
	c       *nftables.Conn
	chains  map[chainKey]*nftables.Chain
	sets    map[chainKey]*set
	limited [][]byte // what the kernel says of sets whose elements limit packets, which the library leaves out
}

// ask sends a request that the library has no call for, and gives the answers as they come.
func (*reader) ask(raw *netlink.Conn, what uint16, flags netlink.HeaderFlags) ([][]byte, error) {
	const anyFamily = "\x00\x00\x00\x00" // struct nfgenmsg
	answers, err := raw.Execute(netlink.Message{
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
	var todo []*nftables.Chain
	for _, c := range all {
		dormant := slices.ContainsFunc(tables, func(t *nftables.Table) bool {
			flags := binary.BigEndian.Uint32(native32(t.Flags)) // which the library leaves in the order of the wire
			return t.Family == c.Table.Family && t.Name == c.Table.Name && flags&unix.NFT_TABLE_F_DORMANT != 0
		})
		if familyName(c.Table.Family) == "" || dormant {
			continue
		}
		r.chains[chainKey{c.Table.Family, c.Table.Name, c.Name}] = c
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
		read := r.chain(c)
		out = append(out, read)
		for _, rule := range read.Rules {
			for _, a := range append([]Case{{Action: rule.Action}}, rule.Map...) {
				todo = append(todo, r.chains[chainKey{c.Table.Family, c.Table.Name, a.Action.Chain}])
			}
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

func (r *reader) chain(c *nftables.Chain) Chain {
	out := Chain{Family: familyName(c.Table.Family), Table: c.Table.Name, Name: c.Name, Policy: "accept"}
	if c.Hooknum != nil {
		out.Hook, out.NAT, out.Priority = hookName(c), c.Type == nftables.ChainTypeNAT, int32(*c.Priority)
	}
	if c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop {
		out.Policy = "drop"
	}
	rules, err := r.c.GetRules(c.Table, c)
	if err != nil {
		out.Unclear = fmt.Sprintf("a rule that this version of overlayd does not understand (%v)", err)
	}
	for _, rule := range rules {
		out.Rules = append(out.Rules, r.rule(c.Table, rule.Exprs))
	}
	return out
}

// set is what is in a set or map.
type set struct {
	cases    []Case // their keys as one range each
	interval bool
	limited  bool // its elements may hold for some packets only
	err      error
}

func (r *reader) set(t *nftables.Table, name string) *set {
	key := chainKey{t.Family, t.Name, name}
	if s, known := r.sets[key]; known {
		return s
	}
	s := &set{}
	r.sets[key] = s
	head, err := r.c.GetSetByName(t, name)
	if err != nil {
		s.err = err
		return s
	}
	elements, err := r.c.GetSetElements(head)
	if err != nil {
		s.err = err
		return s
	}
	s.interval, s.cases = head.Interval, casesOf(head, elements)
	// Where rules add elements, each may have a limit of its own.
	s.limited = head.Dynamic || slices.ContainsFunc(r.limited, func(b []byte) bool { return bytes.Contains(b, []byte(name+"\x00")) })
	return s
}

// casesOf gives the elements as ranges, with the actions of a map. Of a set with intervals, the kernel gives the ends of ranges
// as elements, unless it is a concatenation.
func casesOf(s *nftables.Set, elements []nftables.SetElement) []Case {
	out := []Case{}
	ends := s.Interval && !s.Concatenation && !slices.ContainsFunc(elements, func(e nftables.SetElement) bool { return e.KeyEnd != nil })
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
			out = append(out, Case{nil, action})
			continue
		case e.KeyEnd != nil:
			to = e.KeyEnd
		case ends && i+1 < len(elements):
			to = before(elements[i+1].Key)
		case ends:
			to = bytes.Repeat([]byte{0xff}, len(e.Key))
		}
		out = append(out, Case{[]Range{{e.Key, to}}, action})
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

// mapped is the verdict of a map's element, which the library leaves as the kernel has written it. It decodes the same where a
// rule gives it.
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
