package masquerade

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net/netip"
	"os/exec"
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
)

// nftablesDriver keeps the rules of one family in a table of our own: the chain at the postrouting hook and the sets that
// it matches on. What differs is repaired by one transaction.
//
// The forward chain is not there, since it could not do what it is for. An accept ends only the base chain it is in; the
// chain of another table can still drop the packet. On most hosts the chain that drops is iptables' own FORWARD, whose
// policy Docker sets to DROP. There the accepts are needed, and only there they work. So this driver puts them there, as
// the driver on iptables does, wherever that chain exists, and makes none where it does not.
type nftablesDriver struct {
	open        opener
	sets        Sets // for what the other driver left; nil: none
	nft, legacy *tables
	swept       bool
}

func (d *nftablesDriver) ensure(ctx context.Context, rs Ruleset, full bool) (res Result, err error) {
	if full {
		if res.Drifts, err = ensureOwnTable(rs); err != nil {
			return res, err
		}
		found, err := d.ensureForward(ctx, rs, VariantNFT, &d.nft)
		res.Drifts = append(res.Drifts, found...)
		if err != nil {
			return res, err
		}
	}
	found, err := d.ensureForward(ctx, rs, VariantLegacy, &d.legacy)
	res.Drifts = append(res.Drifts, found...)
	if err != nil || !full {
		return res, err
	}
	if _, err := removeNFT(rs.Family, []Place{postRouting()}); err != nil || d.swept {
		return res, err
	}
	if _, err := removeLegacy(ctx, rs.Family, []Place{postRouting()}, d.open); err != nil {
		return res, fmt.Errorf("leftovers in iptables-legacy: %w", err)
	}
	err = dropSets(d.sets, Ruleset{Family: rs.Family})
	d.swept = err == nil
	return res, err
}

// ensureForward keeps the accepts in the FORWARD chain of a variant while there is one.
func (d *nftablesDriver) ensureForward(ctx context.Context, rs Ruleset, v Variant, t **tables) ([]Drift, error) {
	desired, isDesired := rs.chain(forward())
	if !isDesired {
		if v == VariantLegacy {
			return removeLegacy(ctx, rs.Family, []Place{forward()}, d.open)
		}
		return removeNFT(rs.Family, []Place{forward()})
	}
	there, drops, err := forwardChain(rs.Family, v)
	if err != nil || !there {
		return nil, err
	}
	if *t == nil {
		*t, err = d.open(ctx, rs.Family, v)
		missing := errors.Is(err, exec.ErrNotFound)
		switch {
		case missing && drops:
			return nil, fmt.Errorf("the FORWARD chain of iptables-nft drops by default, and the program is missing "+
				"that could accept the pods' packets in it: %w", err)
		case missing:
			return nil, nil
		case err != nil:
			return nil, err
		}
	}
	found, err := (*t).ensure(ctx, []Chain{desired})
	if err != nil {
		*t = nil // the program may have become another one
	}
	return found, err
}

// forwardChain tells whether a variant has a FORWARD chain, and whether its policy is known to be DROP.
func forwardChain(f addr.Family, v Variant) (there, drops bool, err error) {
	if v == VariantLegacy {
		names, err := legacyNames(f)
		return slices.Contains(names, string(Filter)), false, err
	}
	c, err := findChain(f, string(Filter), string(Forward))
	return c != nil, c != nil && c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop, err
}

// What is ours in nftables. The chain's priority lets us see a packet just before all that stands at the usual place for
// source NAT (100), such as kube-proxy. A packet that returns here is left to them.
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

// ensureOwnTable makes our table of one family the desired one.
func ensureOwnTable(rs Ruleset) ([]Drift, error) {
	chain, isDesired := rs.chain(postRouting())
	kind, differs, err := compareOwnTable(rs, chain, isDesired)
	if err != nil {
		return nil, fmt.Errorf("table %s: %w", ownTable, err)
	}
	if kind == "" {
		return nil, nil
	}
	if kind == SetChanged && changeMembers(rs, differs) == nil {
		return drifts(rs.Family, chain.Place, kind), nil
	}
	if err := replaceOwnTable(rs, chain, isDesired); err != nil {
		return nil, fmt.Errorf("table %s: %w", ownTable, err)
	}
	return drifts(rs.Family, chain.Place, kind), nil
}

func removeOwnTable(f addr.Family) error {
	_, err := ensureOwnTable(Ruleset{Family: f})
	return err
}

// compareOwnTable reads our table and tells in which way it differs from the desired one, if in any. Of sets with
// other members it returns the elements that there are.
func compareOwnTable(rs Ruleset, chain Chain, isDesired bool) (DriftKind, map[string][]nftables.SetElement, error) {
	have, err := findTable(rs.Family, ownTable)
	switch {
	case err != nil && !isDesired: // a kernel without nf_tables has nothing of ours
		return "", nil, nil
	case err != nil:
		return "", nil, err
	case have == nil && !isDesired:
		return "", nil, nil
	case !isDesired:
		return Leftover, nil, nil
	case have == nil || objects(have) == 0:
		return ChainMissing, nil, nil
	case have.Flags != 0 || objects(have) != 1+len(rs.Sets): // dormant, or with objects that are not ours
		return RulesChanged, nil, nil
	}
	base, err := findChain(rs.Family, ownTable, ownChain)
	if err != nil {
		return "", nil, err
	}
	if base == nil || !isOurs(base) {
		return RulesChanged, nil, nil
	}
	conn := connect()
	rules, err := conn.GetRules(have, base)
	if err != nil || !sameRules(rules, nftRules(have, rs.Family, chain)) {
		return RulesChanged, nil, nil // also where the library cannot read what another program put there
	}
	differs := map[string][]nftables.SetElement{}
	for _, s := range rs.Sets {
		elements, err := conn.GetSetElements(nftSet(have, rs.Family, s))
		if err != nil {
			return "", nil, err
		}
		if !sameElements(elements, nftElements(s)) {
			differs[s.Name] = elements
		}
	}
	if len(differs) > 0 {
		return SetChanged, differs, nil
	}
	return "", nil, nil
}

// objects is how many chains, sets and other objects a table holds. The kernel sends the number in network byte order;
// the library reads it in the machine's. Of both the smaller one is right.
func objects(t *nftables.Table) int { return int(min(t.Use, bits.ReverseBytes32(t.Use))) }

func isOurs(c *nftables.Chain) bool {
	want := baseChain(c.Table)
	return c.Type == want.Type && reflect.DeepEqual(c.Hooknum, want.Hooknum) && reflect.DeepEqual(c.Priority, want.Priority) &&
		reflect.DeepEqual(c.Policy, want.Policy)
}

func baseChain(t *nftables.Table) *nftables.Chain {
	accept := nftables.ChainPolicyAccept
	return &nftables.Chain{
		Name: ownChain, Table: t, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting,
		Priority: nftables.ChainPriorityRef(ownPriority), Policy: &accept,
	}
}

func sameRules(have, want []*nftables.Rule) bool {
	return slices.EqualFunc(have, want, func(a, b *nftables.Rule) bool { return identity(a) == identity(b) })
}

func sameElements(have, want []nftables.SetElement) bool {
	return len(have) == len(want) && len(without(want, have)) == 0
}

// replaceOwnTable takes the old table away and makes the new one, in one transaction. Only that
// removes all that another program may have put into the old one.
func replaceOwnTable(rs Ruleset, chain Chain, isDesired bool) error {
	conn := connect()
	t := nftTable(rs.Family, ownTable)
	conn.AddTable(t) // so that there is one to delete
	conn.DelTable(t)
	if !isDesired {
		return conn.Flush()
	}
	conn.AddTable(t)
	for _, s := range rs.Sets {
		set := nftSet(t, rs.Family, s)
		if err := conn.AddSet(set, nil); err != nil {
			return err
		}
		if err := addElements(conn, set, nftElements(s)); err != nil {
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

// changeMembers is for a table in which all but the members of its sets is right. Addresses come and go one by one;
// a set of networks, of which there are few, is filled again: the kernel does not take any half of two networks apart.
func changeMembers(rs Ruleset, differs map[string][]nftables.SetElement) error {
	conn := connect()
	for _, s := range rs.Sets {
		have, changed := differs[s.Name]
		if !changed {
			continue
		}
		set, want := nftSet(nftTable(rs.Family, ownTable), rs.Family, s), nftElements(s)
		add, gone := without(want, have), without(have, want)
		if s.Networks {
			conn.FlushSet(set)
			add, gone = want, nil
		}
		for part := range slices.Chunk(gone, elementsInMessage) {
			if err := conn.SetDeleteElements(set, part); err != nil {
				return err
			}
		}
		if err := addElements(conn, set, add); err != nil {
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

// without is what is in a and not in b.
func without(a, b []nftables.SetElement) []nftables.SetElement {
	type key struct {
		key string
		end bool
	}
	in := make(map[key]bool, len(b))
	for _, e := range b {
		in[key{string(e.Key), e.IntervalEnd}] = true
	}
	return slices.DeleteFunc(slices.Clone(a), func(e nftables.SetElement) bool { return in[key{string(e.Key), e.IntervalEnd}] })
}

func nftSet(t *nftables.Table, f addr.Family, s Set) *nftables.Set {
	kind := map[addr.Family]nftables.SetDatatype{addr.IPv4: nftables.TypeIPAddr, addr.IPv6: nftables.TypeIP6Addr}[f]
	id := uint32(1 + slices.Index(setNames(f), s.Name)) // the library's own numbers come from a variable of the package
	return &nftables.Set{Table: t, ID: id, Name: s.Name, KeyType: kind, Interval: s.Networks}
}

// nftElements are the members of a set: addresses, or for networks the first address of each and the first one behind
// it. One network inside another is part of that.
func nftElements(s Set) []nftables.SetElement {
	var out []nftables.SetElement
	var last netip.Prefix
	for _, p := range s.Members {
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
			&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: binaryutil.NativeEndian.PutUint32(r.Mark.Value)})
	}
	if r.DstSet != "" {
		out = append(out, h.load(h.destination, h.size), &expr.Lookup{SourceRegister: register, SetName: r.DstSet, Invert: r.DstSetNot})
	}
	switch r.Verdict {
	case Return:
		out = append(out, &expr.Verdict{Kind: expr.VerdictReturn})
	case Masquerade:
		out = append(out, &expr.Masq{FullyRandom: true})
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

// prefix matches an address with a prefix; the prefix of all addresses is no match. Where the prefix ends at a byte, only
// the bytes before are loaded, which costs least.
func (h header) prefix(offset uint32, p netip.Prefix, not bool) []expr.Any {
	if !p.IsValid() || p.Bits() == 0 && !not {
		return nil
	}
	op := expr.CmpOpEq
	if not {
		op = expr.CmpOpNeq
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
	return append(out, &expr.Cmp{Op: op, Register: register, Data: p.Addr().AsSlice()[:size]})
}

func mask(ones []byte) expr.Any {
	return &expr.Bitwise{SourceRegister: register, DestRegister: register, Len: uint32(len(ones)), Mask: ones, Xor: make([]byte, len(ones))}
}
