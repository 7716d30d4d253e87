package masquerade

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/overlayd/overlayd/addr"
)

// This file is the pure half of the nftables driver: rulesets as nft reads them, as the kernel has them, what differs, and the
// transaction that puts it right.

const (
	nftProgram   = "nft"
	nftTableName = "overlayd"
	nftChainName = "postrouting"
	nftAccept    = "accept"
)

// nftBase is what our chain is. Its priority lets us see a packet just before everybody at the usual place for source NAT (100),
// such as kube-proxy. Who returns here leaves the packet to them.
func nftBase() string {
	return fmt.Sprintf("type nat hook postrouting priority %d policy %s", 100-5, nftAccept)
}

func nftFamily(f addr.Family) string {
	if f == addr.IPv4 {
		return "ip"
	}
	return "ip6"
}

// nftTable is what our table of one family holds, in the form in which it is compared.
type nftTable struct {
	family  addr.Family
	exists  bool
	plain   bool     // without flags
	objects int      // of all kinds; more than ours are somebody else's
	chain   string   // what ours is; empty where it is not there
	rules   []string // of our chain, as iptables would print them
	sets    []nftSet // of ours
}

type nftSet struct {
	name, kind string
	members    []netip.Prefix // sorted
}

func (t nftTable) equal(o nftTable) bool {
	return t.sameBut(o) && slices.EqualFunc(t.sets, o.sets, func(a, b nftSet) bool { return slices.Equal(a.members, b.members) })
}

// sameBut is equal, whatever the members of the sets.
func (t nftTable) sameBut(o nftTable) bool {
	return t.family == o.family && t.exists == o.exists && t.plain == o.plain && t.objects == o.objects && t.chain == o.chain &&
		slices.Equal(t.rules, o.rules) &&
		slices.EqualFunc(t.sets, o.sets, func(a, b nftSet) bool { return a.name == b.name && a.kind == b.kind })
}

// alike tells whether t may be what another nft made of o: as many rules, each with its comment and verdict at its place.
func (t nftTable) alike(o nftTable) bool {
	rules := text{jump: t.chain, rules: t.rules}
	return t.exists == o.exists && t.plain == o.plain && t.objects == o.objects && t.chain == o.chain && len(t.sets) == len(o.sets) &&
		(!o.exists || alike(text{rules: o.rules}, rules))
}

// nftDifferences compares what was found with what is wanted.
func nftDifferences(f addr.Family, have, want nftTable) []Drift {
	at := func(k DriftKind) []Drift { return []Drift{{f, postRouting(), k}} }
	switch {
	case !want.exists:
		return at(Leftover)
	case have.objects == 0:
		return at(ChainMissing)
	case !have.sameBut(want):
		return at(RulesChanged)
	}
	return at(SetChanged)
}

// nftTableOf is how the table for a ruleset reads. The forward chain is not part of it.
func nftTableOf(rs Ruleset) nftTable {
	t := nftTable{family: rs.Family}
	c, wanted := rs.chain(postRouting())
	if !wanted {
		return t
	}
	t.exists, t.plain, t.objects, t.chain = true, true, 1+len(rs.Sets), nftBase()
	c.Name = nftChainName
	t.rules = render(c, true)
	for _, s := range rs.Sets {
		t.sets = append(t.sets, nftSet{s.Name, nftSetKind(rs.Family, s.Networks), s.Members})
	}
	return t
}

// nftSetKind is the type of a set and, behind a space, its flag.
func nftSetKind(f addr.Family, networks bool) string {
	return fmt.Sprintf("ipv%d_addr%s", f, map[bool]string{true: " interval"}[networks])
}

// matches tells whether a prefix has to be looked at: the one of all addresses matches anything.
func matches(p netip.Prefix, not bool) bool { return p.IsValid() && (p.Bits() > 0 || not) }

func nftVerdict(v Verdict) string {
	return map[Verdict]string{Return: "return", Masquerade: "masquerade fully-random", Accept: nftAccept}[v]
}

// nftText is a rule as nft reads it.
func nftText(f addr.Family, r Rule) string {
	var words []any
	add := func(w ...any) { words = append(words, w...) }
	ip := nftFamily(f)
	if matches(r.Src, false) {
		add(ip, "saddr", r.Src)
	}
	if matches(r.Dst, r.DstNot) {
		add(ip, "daddr", map[bool]string{true: "!= "}[r.DstNot]+r.Dst.String())
	}
	if r.OutDevice != "" {
		add("oifname", `"`+r.OutDevice+`"`)
	}
	if r.Mark.Mask != 0 {
		add("meta mark &", fmt.Sprintf("0x%x", r.Mark.Mask), "==", fmt.Sprintf("0x%x", r.Mark.Value))
	}
	if r.DstSet != "" {
		add(ip, "daddr", map[bool]string{true: "!= "}[r.DstSetNot]+"@"+r.DstSet)
	}
	add(nftVerdict(r.Verdict))
	return strings.TrimSpace(fmt.Sprintln(words...))
}

// replaceTable takes the old table away and makes the new one. Nothing less is sure to leave nothing of what somebody
// may have done to the old one. The kernel shows packets either the one or the other.
func replaceTable(rs Ruleset, exists bool) string {
	var b strings.Builder
	name := nftFamily(rs.Family) + " " + nftTableName
	if exists {
		fmt.Fprintf(&b, "delete table %s\n", name)
	}
	c, wanted := rs.chain(postRouting())
	if !wanted {
		return b.String()
	}
	fmt.Fprintf(&b, "table %s {\n", name)
	for _, s := range rs.Sets {
		kind := strings.Replace(nftSetKind(rs.Family, s.Networks), " ", "; flags ", 1)
		fmt.Fprintf(&b, "\tset %s {\n\t\ttype %s\n", s.Name, kind)
		if len(s.Members) > 0 {
			fmt.Fprintf(&b, "\t\telements = { %s }\n", nftList(s.Members))
		}
		b.WriteString("\t}\n")
	}
	fmt.Fprintf(&b, "\tchain %s {\n\t\t%s\n", nftChainName, strings.Replace(nftBase(), " policy ", "; policy ", 1))
	for _, r := range c.Rules {
		fmt.Fprintf(&b, "\t\t%s comment \"%s\"\n", nftText(rs.Family, r), r.Comment)
	}
	b.WriteString("\t}\n}\n")
	return b.String()
}

// changeMembers is for a table in which all but the members of its sets is right.
func changeMembers(rs Ruleset, have nftTable) string {
	var b strings.Builder
	for i, s := range rs.Sets {
		for _, change := range []struct {
			verb string
			list []netip.Prefix
		}{{"delete", without(have.sets[i].members, s.Members)}, {"add", without(s.Members, have.sets[i].members)}} {
			if len(change.list) > 0 {
				fmt.Fprintf(&b, "%s element %s %s %s { %s }\n", change.verb, nftFamily(rs.Family), nftTableName, s.Name, nftList(change.list))
			}
		}
	}
	return b.String()
}

// without is what is in a and not in b; both are sorted.
func without(a, b []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(a), func(m netip.Prefix) bool {
		_, found := slices.BinarySearchFunc(b, m, addr.ComparePrefix)
		return found
	})
}

func nftList(list []netip.Prefix) string {
	out := make([]string, len(list))
	for i, p := range list {
		if out[i] = p.String(); p.IsSingleIP() {
			out[i] = p.Addr().String()
		}
	}
	return strings.Join(out, ", ")
}
