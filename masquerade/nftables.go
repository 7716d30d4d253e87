package masquerade

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/masquerade/ipset"
)

// Names of overlayd's own objects in nftables. The chain's priority lets us decide about a packet just before all that is at the usual
// place for source NAT (100), such as kube-proxy. A packet that returns here is left to them.
const (
	ownTable    = "overlayd"
	ownChain    = "postrouting"
	ownPriority = 100 - 5
)

func nftTable(f addr.Family, name string) *nftables.Table {
	return &nftables.Table{Name: name, Family: map[addr.Family]nftables.TableFamily{
		addr.IPv4: nftables.TableFamilyIPv4, addr.IPv6: nftables.TableFamilyIPv6,
	}[f]}
}

// connect returns a connection that opens a socket for each request: what an error leaves unread is not taken for the
// answer to the next. There is room for a transaction with the members of a large cluster, which is sent at once, and
// the kernel answers at once or never.
func connect() *nftables.Conn {
	conn, _ := nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error { // fails for lasting connections only
		return errors.Join(c.SetWriteBuffer(writeBuffer), c.SetDeadline(time.Now().Add(answerTimeout)))
	}))
	return conn
}

const (
	writeBuffer   = 8 << 20 // bytes
	answerTimeout = 30 * time.Second
)

// generation is the number of changes in nf_tables of this network namespace: while it stays, nothing changes there.
func generation() (uint32, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return 0, err
	}
	defer func() { _ = conn.Close() }()
	answers, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
		Data:   make([]byte, nfgenmsgSize),
	})
	for _, answer := range answers {
		attrs, err := netlink.NewAttributeDecoder(answer.Data[nfgenmsgSize:])
		if err != nil {
			return 0, err
		}
		attrs.ByteOrder = binary.BigEndian
		for attrs.Next() {
			if attrs.Type() == unix.NFTA_GEN_ID {
				return attrs.Uint32(), nil
			}
		}
	}
	return 0, cmp.Or(err, errors.New("nf_tables tells no generation"))
}

// nfgenmsgSize is the size of nfgenmsg (uapi/linux/netfilter/nfnetlink.h).
const nfgenmsgSize = 4

// nftRulesOf returns the rules of a chain; none where there is no such chain. One that the library cannot decode has no
// handle, and stands for a condition that is not known. The library gives up a chain with such a rule, so the chain is
// then handed to it rule by rule.
func nftRulesOf(f addr.Family, table, chain string) ([]*nftables.Rule, error) {
	t, c := nftTable(f, table), &nftables.Chain{Name: chain}
	if rules, err := connect().GetRules(t, c); err == nil {
		return rules, nil
	}
	var dump []netlink.Message
	_, err := (&nftables.Conn{TestDial: func(request []netlink.Message) ([]netlink.Message, error) {
		conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
		if err != nil {
			return nil, err
		}
		defer func() { _ = conn.Close() }()
		h := request[0].Header
		dump, err = conn.Execute(netlink.Message{Header: netlink.Header{Type: h.Type, Flags: h.Flags}, Data: request[0].Data})
		return nil, cmp.Or(err, io.EOF) // no answer that is to be decoded at once
	}}).GetRules(t, c)
	if err != nil {
		return nil, err
	}
	var rules []*nftables.Rule
	for _, m := range dump {
		one := &nftables.Conn{TestDial: func(request []netlink.Message) ([]netlink.Message, error) {
			m.Header = netlink.Header{Type: m.Header.Type, Sequence: request[0].Header.Sequence, PID: request[0].Header.PID}
			return []netlink.Message{m}, nil
		}}
		rule, err := one.GetRules(t, c)
		if err != nil {
			rule = []*nftables.Rule{{Table: t, Exprs: []expr.Any{&expr.Ct{}}}}
		}
		rules = append(rules, rule...)
	}
	return rules, nil
}

// findTable returns a table, and nil where there is none.
func findTable(f addr.Family, name string) (*nftables.Table, error) {
	t, err := connect().ListTableOfFamily(name, nftTable(f, name).Family)
	return orNil(t, err)
}

// findChain returns a chain, and nil where there is none.
func findChain(f addr.Family, table, chain string) (*nftables.Chain, error) {
	c, err := connect().ListChain(nftTable(f, table), chain)
	return orNil(c, err)
}

// orNil makes nothing of what does not exist. The library hides the kernel's error behind its text.
func orNil[T any](found *T, err error) (*T, error) {
	if err != nil && strings.Contains(err.Error(), "no such file or directory") {
		return nil, nil
	}
	return found, err
}

// ensureOwnTable makes our table of one family the desired one. Where nothing else can have changed, only the members
// that came and went since the last time are sent: to list 5,000 takes milliseconds.
func (d *driver) ensureOwnTable(rs, left Ruleset, full bool) ([]Drift, error) {
	chain := rs.masquerading()
	if len(chain.Rules) == 0 {
		return removeOwnTable(rs.Family)
	}
	kind, err := DriftKind(""), error(nil)
	switch {
	case full:
		if kind, err = compareOwnTable(rs, chain); err == nil && kind != "" {
			err = replaceOwnTable(rs, chain)
		}
	case !rs.Equal(left):
		if kind = SetChanged; changeMembers(rs, left) != nil {
			err = replaceOwnTable(rs, chain)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("table %s: %w", ownTable, err)
	}
	if kind == "" {
		return nil, nil
	}
	d.generation++ // the next one, unless another program changes something meanwhile
	return drifts(rs.Family, chain.Place, kind), nil
}

func removeOwnTable(f addr.Family) ([]Drift, error) {
	if have, err := findTable(f, ownTable); err != nil || have == nil {
		return nil, nil // a kernel without nf_tables has nothing of ours
	}
	conn := connect()
	conn.DelTable(nftTable(f, ownTable))
	if err := conn.Flush(); err != nil {
		return nil, fmt.Errorf("table %s: %w", ownTable, err)
	}
	return drifts(f, postRouting(), Leftover), nil
}

// compareOwnTable reads our table and tells in which way it differs from the desired one, if in any.
func compareOwnTable(rs Ruleset, chain Chain) (DriftKind, error) {
	have, err := findTable(rs.Family, ownTable)
	switch {
	case err != nil:
		return "", err
	case have == nil || objects(have) == 0:
		return ChainMissing, nil
	case have.Flags != 0 || objects(have) != 1+len(rs.Sets): // dormant, or with objects that are not ours
		return RulesChanged, nil
	}
	base, err := findChain(rs.Family, ownTable, ownChain)
	if err != nil {
		return "", err
	}
	if base == nil || !isOurs(base) {
		return RulesChanged, nil
	}
	conn := connect()
	rules, err := conn.GetRules(have, base)
	if err != nil || !sameRules(rules, nftRules(have, rs.Family, chain)) {
		return RulesChanged, nil // also where the library cannot read what another program put there
	}
	for _, s := range rs.Sets {
		elements, err := conn.GetSetElements(nftSet(have, rs.Family, s))
		if err != nil {
			return "", err
		}
		if !slices.Equal(inOrder(elements), inOrder(nftElements(s, s.Members))) {
			return SetChanged, nil
		}
	}
	return "", nil
}

// inOrder are the elements of a set in an order that does not depend on where they come from.
func inOrder(elements []nftables.SetElement) []string {
	out := make([]string, len(elements))
	for i, e := range elements {
		if out[i] = string(e.Key); e.IntervalEnd {
			out[i] += " end"
		}
	}
	slices.Sort(out)
	return out
}

// objects is how many chains, sets and other objects a table holds. The kernel sends the number in network byte order;
// the library reads it in the machine's. Of both the smaller one is right.
func objects(t *nftables.Table) int { return int(min(t.Use, bits.ReverseBytes32(t.Use))) }

func isOurs(c *nftables.Chain) bool {
	ours := baseChain(c.Table)
	return c.Type == ours.Type && reflect.DeepEqual(c.Hooknum, ours.Hooknum) &&
		reflect.DeepEqual(c.Priority, ours.Priority) && reflect.DeepEqual(c.Policy, ours.Policy)
}

func baseChain(t *nftables.Table) *nftables.Chain {
	accept := nftables.ChainPolicyAccept
	return &nftables.Chain{
		Name: ownChain, Table: t, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting,
		Priority: nftables.ChainPriorityRef(ownPriority), Policy: &accept,
	}
}

func sameRules(have, desired []*nftables.Rule) bool {
	return slices.EqualFunc(have, desired, func(a, b *nftables.Rule) bool { return identity(a) == identity(b) })
}

// replaceOwnTable takes the old table away and makes the new one, in one transaction. Only that
// removes all that another program may have put into the old one.
func replaceOwnTable(rs Ruleset, chain Chain) error {
	conn := connect()
	t := nftTable(rs.Family, ownTable)
	conn.AddTable(t) // so that there is one to delete
	conn.DelTable(t)
	conn.AddTable(t)
	for _, s := range rs.Sets {
		set := nftSet(t, rs.Family, s)
		if err := conn.AddSet(set, nil); err != nil {
			return err
		}
		if err := addElements(conn, set, nftElements(s, s.Members)); err != nil {
			return err
		}
	}
	conn.AddChain(baseChain(t))
	for _, r := range nftRules(t, rs.Family, chain) {
		conn.AddRule(r)
	}
	return conn.Flush()
}

// elementsInMessage is how many elements of a set go into one message: a netlink attribute ends at 64 kB.
const elementsInMessage = 1000

// changeMembers is for a table in which all is as it was left but the members of its sets. Addresses come and go one by
// one; a set of networks, of which there are few, is filled again: the kernel does not take any half of two networks
// apart.
func changeMembers(rs, left Ruleset) error {
	conn := connect()
	for i, s := range rs.Sets {
		set := nftSet(nftTable(rs.Family, ownTable), rs.Family, s)
		add, gone := ipset.Diff(s.Members, left.Sets[i].Members)
		if s.Networks && len(add)+len(gone) > 0 {
			conn.FlushSet(set)
			add, gone = s.Members, nil
		}
		for part := range slices.Chunk(nftElements(s, gone), elementsInMessage) {
			if err := conn.SetDeleteElements(set, part); err != nil {
				return err
			}
		}
		if err := addElements(conn, set, nftElements(s, add)); err != nil {
			return err
		}
	}
	return conn.Flush()
}

func addElements(conn *nftables.Conn, set *nftables.Set, elements []nftables.SetElement) error {
	for part := range slices.Chunk(elements, elementsInMessage) {
		if err := conn.SetAddElements(set, part); err != nil {
			return err
		}
	}
	return nil
}

func nftSet(t *nftables.Table, f addr.Family, s Set) *nftables.Set {
	kind := map[addr.Family]nftables.SetDatatype{addr.IPv4: nftables.TypeIPAddr, addr.IPv6: nftables.TypeIP6Addr}[f]
	id := uint32(1 + slices.Index(setNames(f), s.Name)) // the library's own numbers come from a variable of the package
	return &nftables.Set{Table: t, ID: id, Name: s.Name, KeyType: kind, Interval: s.Networks}
}

// nftElements are the members of a set: addresses, or for networks the first address of each and the first one behind
// it. One network inside another is part of that.
func nftElements(s Set, members []netip.Prefix) []nftables.SetElement {
	var out []nftables.SetElement
	var last netip.Prefix
	for _, p := range members {
		if last.IsValid() && last.Contains(p.Addr()) {
			continue
		}
		last = p
		out = append(out, nftables.SetElement{Key: p.Addr().AsSlice()})
		if end := addr.Last(p).Next(); s.Networks && end.IsValid() {
			out = append(out, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
		}
	}
	return out
}

func nftRules(t *nftables.Table, f addr.Family, c Chain) []*nftables.Rule {
	rules := make([]*nftables.Rule, len(c.Rules))
	for i, r := range c.Rules {
		rules[i] = &nftables.Rule{
			Table: t, Chain: &nftables.Chain{Name: ownChain}, Exprs: expressions(f, r),
			UserData: userdata.AppendString(nil, userdata.TypeComment, r.Comment),
		}
	}
	return rules
}

// register is where a match loads the field that it compares.
const register = 1

// expressions are a rule as nf_tables runs it, in the order in which nft lists the matches.
func expressions(f addr.Family, r Rule) []expr.Any {
	h := headerOf(f)
	out := slices.Concat(h.prefix(h.source, r.Src, false), h.prefix(h.destination, r.Dst, r.DstNot))
	if r.OutDevice != "" {
		name := make([]byte, ifNameSize)
		copy(name, r.OutDevice)
		out = append(out, &expr.Meta{Key: expr.MetaKeyOIFNAME, Register: register},
			&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: name})
	}
	if r.Mark.Mask != 0 {
		out = append(out, &expr.Meta{Key: expr.MetaKeyMARK, Register: register},
			mask(binaryutil.NativeEndian.PutUint32(r.Mark.Mask)),
			&expr.Cmp{Op: equal(r.MarkNot), Register: register, Data: binaryutil.NativeEndian.PutUint32(r.Mark.Value)})
	}
	if r.DstSet != "" {
		out = append(out, h.load(h.destination, h.size),
			&expr.Lookup{SourceRegister: register, SetName: r.DstSet, Invert: r.DstSetNot})
	}
	switch r.Verdict {
	case Return:
		out = append(out, &expr.Verdict{Kind: expr.VerdictReturn})
	case Masquerade:
		out = append(out, &expr.Masq{FullyRandom: true})
	case SNAT:
		out = append(out, &expr.Immediate{Register: register, Data: r.Source.AsSlice()}, &expr.NAT{
			Type: expr.NATTypeSourceNAT, Family: uint32(nftTable(f, ownTable).Family),
			RegAddrMin: register, RegAddrMax: register, FullyRandom: true,
		})
	case Unmark:
		out = append(out, &expr.Meta{Key: expr.MetaKeyMARK, Register: register},
			mask(binaryutil.NativeEndian.PutUint32(^r.Mark.Mask)),
			&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: register})
	case Accept:
		out = append(out, &expr.Verdict{Kind: expr.VerdictAccept})
	}
	return out
}

// ifNameSize is IFNAMSIZ of uapi/linux/if.h.
const ifNameSize = 16

// header says where in the IP header the addresses stand, in bytes (RFC 791, RFC 8200).
type header struct{ source, destination, size uint32 }

func headerOf(f addr.Family) header {
	if f == addr.IPv4 {
		return header{12, 16, 4}
	}
	return header{8, 24, 16}
}

func (h header) load(offset, size uint32) expr.Any {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}
}

// prefix matches an address with a prefix; the prefix of all addresses is no match. Where the prefix ends at a byte,
// only the bytes before are loaded, which costs least.
func (h header) prefix(offset uint32, p netip.Prefix, not bool) []expr.Any {
	if !p.IsValid() || p.Bits() == 0 && !not {
		return nil
	}
	size, bits := h.size, p.Bits()
	if bits > 0 && bits%8 == 0 {
		size = uint32(bits / 8)
	}
	out := []expr.Any{h.load(offset, size)}
	if bits%8 != 0 || bits == 0 {
		ones := make([]byte, size)
		for i := range bits {
			ones[i/8] |= 0x80 >> (i % 8)
		}
		out = append(out, mask(ones))
	}
	return append(out, &expr.Cmp{Op: equal(not), Register: register, Data: p.Addr().AsSlice()[:size]})
}

func equal(not bool) expr.CmpOp {
	if not {
		return expr.CmpOpNeq
	}
	return expr.CmpOpEq
}

func mask(ones []byte) expr.Any {
	return &expr.Bitwise{
		SourceRegister: register, DestRegister: register, Len: uint32(len(ones)), Mask: ones,
		Xor: make([]byte, len(ones)),
	}
}
