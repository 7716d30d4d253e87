package masquerade

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"sigs.k8s.io/knftables"

	"github.com/overlayd/overlayd/addr"
)

// This file is the pure half of the nftables driver: rulesets as nft reads them, and as it prints them in its JSON form
// (libnftables-json(5)), what differs, and the transaction that puts it right.

const (
	nftProgram   = "nft"
	nftTableName = "overlayd"
	nftChainName = "postrouting"
	// nftPriority lets us see a packet just before everybody at the usual place for source NAT, such as kube-proxy. Who
	// returns here leaves the packet to them.
	nftPriority = 100 - 5
	nftAccept   = "accept"
)

func nftFamily(f addr.Family) knftables.Family {
	if f == addr.IPv4 {
		return knftables.IPv4Family
	}
	return knftables.IPv6Family
}

// nftTable is what our table of one family holds, in the form in which it is compared.
type nftTable struct {
	family addr.Family
	exists bool
	chains []string // each with all that it is
	rules  []nftRule
	sets   map[string]nftSet
	odd    []string // what we never make
}

type nftRule struct{ chain, comment, expr string }

type nftSet struct {
	kind    string
	members []string // sorted
}

func (t nftTable) equal(o nftTable) bool {
	return t.sameBut(o) && maps.EqualFunc(t.sets, o.sets, func(a, b nftSet) bool { return slices.Equal(a.members, b.members) })
}

// sameBut is equal, whatever the members of the sets.
func (t nftTable) sameBut(o nftTable) bool {
	return t.family == o.family && t.exists == o.exists && slices.Equal(t.chains, o.chains) && slices.Equal(t.rules, o.rules) &&
		slices.Equal(t.odd, o.odd) && maps.EqualFunc(t.sets, o.sets, func(a, b nftSet) bool { return a.kind == b.kind })
}

// alike tells whether t may be another nft's way to print o: as many rules, each with its comment at its place.
func (t nftTable) alike(o nftTable) bool {
	strip := func(rules []nftRule) (out []nftRule) {
		for _, r := range rules {
			out = append(out, nftRule{chain: r.chain, comment: r.comment})
		}
		return out
	}
	return t.exists == o.exists && len(t.odd) == 0 && len(t.chains) == len(o.chains) && len(t.sets) == len(o.sets) &&
		slices.Equal(strip(t.rules), strip(o.rules))
}

// nftDifferences compares what was found with what is wanted.
func nftDifferences(f addr.Family, have, want nftTable) []Drift {
	at := func(k DriftKind) []Drift { return []Drift{{f, postRouting(), k}} }
	switch {
	case !want.exists:
		return at(Leftover)
	case !have.exists || len(have.chains)+len(have.odd) == 0:
		return at(ChainMissing)
	case !have.sameBut(want):
		return at(RulesChanged)
	}
	return at(SetChanged)
}

// nftTableOf is how the table for a ruleset prints. The forward chain is not part of it.
func nftTableOf(rs Ruleset) nftTable {
	t := nftTable{family: rs.Family}
	c, wanted := rs.chain(postRouting())
	if !wanted {
		return t
	}
	t.exists = true
	t.chains = []string{fmt.Sprintf("%s type nat hook postrouting priority %d policy %s", nftChainName, nftPriority, nftAccept)}
	for _, r := range c.Rules {
		expr, _ := json.Marshal(nftExpr(rs.Family, r)) // of strings, numbers and nil
		t.rules = append(t.rules, nftRule{nftChainName, r.Comment, string(expr)})
	}
	for _, s := range rs.Sets {
		if t.sets == nil {
			t.sets = map[string]nftSet{}
		}
		t.sets[s.Name] = nftSet{nftSetType(rs.Family), memberTexts(s.Members)}
	}
	return t
}

func nftSetType(f addr.Family) string { return fmt.Sprintf("ipv%d_addr", f) }

func memberTexts(list []netip.Addr) []string {
	out := make([]string, len(list))
	for i, a := range list {
		out[i] = a.String()
	}
	slices.Sort(out)
	return out
}

type object = map[string]any

// nftExpr is a rule as nft prints it in JSON.
func nftExpr(f addr.Family, r Rule) []any {
	var expr []any
	match := func(op string, left, right any) {
		expr = append(expr, object{"match": object{"op": op, "left": left, "right": right}})
	}
	field := func(name string) object {
		return object{"payload": object{"protocol": string(nftFamily(f)), "field": name}}
	}
	if matches(r.Src, false) {
		match("==", field("saddr"), nftPrefix(r.Src))
	}
	if matches(r.Dst, r.DstNot) {
		match(map[bool]string{false: "==", true: "!="}[r.DstNot], field("daddr"), nftPrefix(r.Dst))
	}
	if r.OutDevice != "" {
		match("==", object{"meta": object{"key": "oifname"}}, r.OutDevice)
	}
	if r.Mark.Mask != 0 {
		match("==", object{"&": []any{object{"meta": object{"key": "mark"}}, r.Mark.Mask}}, r.Mark.Value)
	}
	if r.DstSet != "" {
		match("==", field("daddr"), "@"+r.DstSet)
	}
	if r.Verdict == Masquerade {
		return append(expr, object{"masquerade": object{"flags": "fully-random"}})
	}
	return append(expr, object{nftVerdict(r.Verdict): nil})
}

// matches tells whether a prefix has to be looked at: the one of all addresses matches anything.
func matches(p netip.Prefix, not bool) bool { return p.IsValid() && (p.Bits() > 0 || not) }

func nftPrefix(p netip.Prefix) any {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return object{"prefix": object{"addr": p.Addr().String(), "len": p.Bits()}}
}

func nftVerdict(v Verdict) string {
	return map[Verdict]string{Return: "return", Masquerade: "masquerade fully-random", Accept: nftAccept}[v]
}

// nftText is a rule as nft reads it.
func nftText(f addr.Family, r Rule) string {
	var words []any
	add := func(w ...any) { words = append(words, w...) }
	ip := nftFamily(f)
	if matches(r.Src, false) {
		add(ip, "saddr", nftAddress(r.Src))
	}
	if matches(r.Dst, r.DstNot) {
		add(ip, "daddr", map[bool]string{true: "!= "}[r.DstNot]+nftAddress(r.Dst))
	}
	if r.OutDevice != "" {
		add("oifname", `"`+r.OutDevice+`"`)
	}
	if r.Mark.Mask != 0 {
		add("meta mark &", fmt.Sprintf("0x%x", r.Mark.Mask), "==", fmt.Sprintf("0x%x", r.Mark.Value))
	}
	if r.DstSet != "" {
		add(ip, "daddr", "@"+r.DstSet)
	}
	add(nftVerdict(r.Verdict))
	return strings.TrimSpace(fmt.Sprintln(words...))
}

func nftAddress(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

// replaceTable takes the old table away and makes the new one. Nothing less is sure to leave nothing of what somebody
// may have done to the old one. The kernel shows packets either the one or the other.
func replaceTable(tx *knftables.Transaction, rs Ruleset, exists bool) {
	fam := nftFamily(rs.Family)
	table := &knftables.Table{Family: fam, Name: nftTableName}
	if exists {
		tx.Delete(table)
	}
	c, wanted := rs.chain(postRouting())
	if !wanted {
		return
	}
	tx.Add(table)
	for _, s := range rs.Sets {
		tx.Add(&knftables.Set{Family: fam, Table: nftTableName, Name: s.Name, Type: nftSetType(rs.Family)})
		for _, m := range s.Members {
			tx.Add(nftElement(fam, s.Name, m.String()))
		}
	}
	tx.Add(&knftables.Chain{
		Family: fam, Table: nftTableName, Name: nftChainName, Type: knftables.PtrTo(knftables.NATType),
		Hook: knftables.PtrTo(knftables.PostroutingHook), Priority: knftables.PtrTo(knftables.BaseChainPriority(fmt.Sprint(nftPriority))),
		Policy: knftables.PtrTo(knftables.AcceptPolicy),
	})
	for _, r := range c.Rules {
		tx.Add(&knftables.Rule{
			Family: fam, Table: nftTableName, Chain: nftChainName, Rule: nftText(rs.Family, r), Comment: knftables.PtrTo(r.Comment),
		})
	}
}

// changeMembers is for a table in which all but the members of its sets is right.
func changeMembers(tx *knftables.Transaction, rs Ruleset, have nftTable) {
	fam := nftFamily(rs.Family)
	for _, s := range rs.Sets {
		wanted, there := asSet(memberTexts(s.Members)), asSet(have.sets[s.Name].members)
		for _, m := range slices.Sorted(maps.Keys(wanted)) {
			if !there[m] {
				tx.Add(nftElement(fam, s.Name, m))
			}
		}
		for _, m := range slices.Sorted(maps.Keys(there)) {
			if !wanted[m] {
				tx.Delete(nftElement(fam, s.Name, m))
			}
		}
	}
}

func nftElement(fam knftables.Family, set, member string) *knftables.Element {
	return &knftables.Element{Family: fam, Table: nftTableName, Set: set, Key: []string{member}}
}

func asSet(list []string) map[string]bool {
	out := make(map[string]bool, len(list))
	for _, s := range list {
		out[s] = true
	}
	return out
}

// nftListing is the JSON form of a listing, as far as it matters here.
type nftListing struct {
	Objects []map[string]json.RawMessage `json:"nftables"`
}

type nftObject struct {
	Family, Table, Name, Chain, Type, Hook, Policy, Comment string

	Prio *int
	Elem []any
	Expr []any
	// What makes any of them something else than what we make.
	Flags, Timeout, Size, Map any
	Dev                       any
}

// eachNFTObject goes through the objects of a listing; those that cannot be read are odd.
func eachNFTObject(out string, f func(kind string, o nftObject, odd bool)) error {
	var l nftListing
	if err := json.Unmarshal([]byte(out), &l); err != nil {
		return fmt.Errorf("what nft printed: %w", err)
	}
	for _, wrapped := range l.Objects {
		for kind, raw := range wrapped {
			if kind == "metainfo" {
				continue
			}
			var o nftObject
			odd := json.Unmarshal(raw, &o) != nil || o.Flags != nil || o.Timeout != nil || o.Size != nil || o.Map != nil || o.Dev != nil
			f(kind, o, odd)
		}
	}
	return nil
}

// parseNFTTable reads a listing of our table. One that cannot be read (some versions print nothing when there is an object
// which they have no JSON for) holds something that is not ours.
func parseNFTTable(f addr.Family, out string) nftTable {
	t := nftTable{family: f, exists: true}
	err := eachNFTObject(out, func(kind string, o nftObject, odd bool) {
		if odd || !t.take(kind, o) {
			t.odd = append(t.odd, kind+" "+o.Name)
		}
	})
	if err != nil {
		t.odd = append(t.odd, err.Error())
	}
	return t
}

// take adds an object to the table; false if it is none that we make.
func (t *nftTable) take(kind string, o nftObject) bool {
	switch kind {
	case "table":
	case "chain":
		if o.Prio == nil {
			return false // not called by any hook
		}
		t.chains = append(t.chains, fmt.Sprintf("%s type %s hook %s priority %d policy %s", o.Name, o.Type, o.Hook, *o.Prio, o.Policy))
	case "rule":
		expr, err := json.Marshal(o.Expr)
		t.rules = append(t.rules, nftRule{o.Chain, o.Comment, string(expr)})
		return err == nil
	case "set":
		return t.takeSet(o)
	default:
		return false
	}
	return true
}

func (t *nftTable) takeSet(o nftObject) bool {
	s := nftSet{kind: o.Type, members: []string{}}
	for _, e := range o.Elem {
		text, ok := e.(string)
		if !ok {
			return false
		}
		s.members = append(s.members, text)
	}
	slices.Sort(s.members)
	if t.sets == nil {
		t.sets = map[string]nftSet{}
	}
	t.sets[o.Name] = s
	return true
}

func parseForwardPolicy(f addr.Family, out string) (string, error) {
	policy := ""
	return policy, eachNFTObject(out, func(kind string, o nftObject, _ bool) {
		if kind == "chain" && o.Family == string(nftFamily(f)) && o.Table == string(Filter) && o.Name == string(Forward) {
			policy = o.Policy
		}
	})
}
