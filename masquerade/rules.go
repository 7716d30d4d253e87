// Package masquerade decides which packets of the pod network get the node's address on their way out, and puts the
// rules for it into the node's firewall.
//
// Rules is the decision: pure, for both IP families the same, and without a word about a particular firewall. A Driver
// makes the firewall equal to it.
package masquerade

import (
	"net/netip"
	"slices"

	"github.com/overlayd/overlayd/addr"
)

// Table is the part of the firewall that a chain belongs to.
type Table string

// The tables in which there are chains of ours.
const (
	NAT    Table = "nat"
	Filter Table = "filter"
)

// Hook is the place in the kernel's packet path from which a chain of ours is called: before all others there in
// POSTROUTING, behind them in FORWARD.
type Hook string

// The hooks from which chains of ours are called.
const (
	PostRouting Hook = "POSTROUTING"
	Forward     Hook = "FORWARD"
)

// Place says where a chain stands: its table, the hook that calls it, and its name.
type Place struct {
	Table Table
	Hook  Hook
	Name  string
}

// Places lists every chain that can be ours. Nothing else of another program's tables is ever changed.
func Places() []Place { return []Place{postRouting(), forward()} }

func postRouting() Place { return Place{NAT, PostRouting, "OVERLAYD-POSTRTG"} }
func forward() Place     { return Place{Filter, Forward, "OVERLAYD-FWD"} }

// Verdict is what becomes of a packet that a rule matches.
type Verdict uint8

// The verdicts. The zero Verdict is none of them.
const (
	// Return ends our chain and lets the hook's other rules decide; it is not an accept, so that the rules of
	// kube-proxy, of the portmap plugin and of the operator still decide.
	Return Verdict = iota + 1
	// Masquerade gives the packet's connection the address of the device that it leaves by.
	Masquerade
	// SNAT gives the packet's connection the address Rule.Source.
	SNAT
	// Unmark takes the bits of Rule.Mark from the packet's mark; the next rule decides.
	Unmark
	// Accept ends the hook for the packet.
	Accept
)

// Mark matches a packet mark under a mask. A zero mask matches everything.
type Mark struct{ Value, Mask uint32 }

// Rule is one row of a chain: all its matches together, and a verdict. A zero match matches everything.
type Rule struct {
	Mark      Mark
	MarkNot   bool // the mark is another one
	Src, Dst  netip.Prefix
	DstNot    bool   // everything but Dst
	DstSet    string // the destination is in this set, one of the Ruleset's
	DstSetNot bool   // or is not
	OutDevice string
	Verdict   Verdict
	Source    netip.Addr // for SNAT
	Comment   string     // why; letters, digits, spaces and hyphens, so that every firewall takes it as it is
}

// Chain is a chain of ours with all its rules, in order.
type Chain struct {
	Place
	Rules []Rule
}

// Set is a named set that rules match on: of single addresses, or of networks.
type Set struct {
	Name     string
	Networks bool
	Members  []netip.Prefix // sorted, each once
}

// Ruleset is all that is desired in the firewall for one family; without chains, nothing of ours.
type Ruleset struct {
	Family addr.Family
	Sets   []Set
	Chains []Chain
}

// Equal tells whether two rulesets are the same, in the same order.
func (rs Ruleset) Equal(o Ruleset) bool {
	return rs.sameRules(o) &&
		slices.EqualFunc(rs.Sets, o.Sets, func(a, b Set) bool { return slices.Equal(a.Members, b.Members) })
}

// sameRules tells whether two rulesets differ in the members of their sets at most.
func (rs Ruleset) sameRules(o Ruleset) bool {
	return rs.Family == o.Family &&
		slices.EqualFunc(rs.Sets, o.Sets, func(a, b Set) bool { return a.Name == b.Name && a.Networks == b.Networks }) &&
		slices.EqualFunc(rs.Chains, o.Chains, func(a, b Chain) bool {
			return a.Place == b.Place && slices.Equal(a.Rules, b.Rules)
		})
}

// masquerading is the chain at the hook of that name; without rules where none is desired.
func (rs Ruleset) masquerading() Chain {
	for _, c := range rs.Chains {
		if c.Place == postRouting() {
			return c
		}
	}
	return Chain{Place: postRouting()}
}

// forwardOnly leaves out all but the chain in FORWARD, whose rules match on no set.
func (rs Ruleset) forwardOnly() Ruleset {
	elsewhere := func(c Chain) bool { return c.Place != forward() }
	return Ruleset{Family: rs.Family, Chains: slices.DeleteFunc(slices.Clone(rs.Chains), elsewhere)}
}

// places are the places of the chains, never nil.
func (rs Ruleset) places() []Place {
	out := []Place{}
	for _, c := range rs.Chains {
		out = append(out, c.Place)
	}
	return out
}

// without leaves out sets and the rules that match on one of them. What these exempted is then masqueraded: not what is
// promised, but it arrives.
func (rs Ruleset) without(sets ...string) Ruleset {
	out := Ruleset{Family: rs.Family}
	for _, s := range rs.Sets {
		if !slices.Contains(sets, s.Name) {
			out.Sets = append(out.Sets, s)
		}
	}
	for _, c := range rs.Chains {
		c.Rules = slices.DeleteFunc(slices.Clone(c.Rules), func(r Rule) bool { return slices.Contains(sets, r.DstSet) })
		out.Chains = append(out.Chains, c)
	}
	return out
}

// Input is all that the decision rests on, for one family.
type Input struct {
	// Network is the whole pod network, Subnet this node's part of it.
	Network, Subnet netip.Prefix
	// Node is the address that the peers know this node by, if it is configured on this node; invalid otherwise. The
	// answers of pods to this address come back through the network, to any other address of the node they may not.
	Node netip.Addr
	// Tunnel is the name of the VXLAN device, or empty when there is none.
	Tunnel string
	// DirectNodes says that there may be peers that are reached without the tunnel, and Nodes are their addresses.
	DirectNodes bool
	Nodes       []netip.Addr
	// Bare lists the subnets of the peers behind the tunnel whose pods answer this node's own address without it.
	Bare []netip.Prefix
	// Exclude lists destinations that are sent the pods' own addresses. Those of the other family are passed over.
	Exclude []netip.Prefix
	// Masquerade and Forward say which of the two chains is desired.
	Masquerade, Forward bool
}

// Family is the family that the input is about.
func (in Input) Family() addr.Family { return addr.FamilyOf(in.Network.Addr()) }

// nodeSet is the name of the set with the addresses of those peers that are reached without the tunnel.
func nodeSet(f addr.Family) string {
	return addr.Per[string]{V4: "overlayd-nodes4", V6: "overlayd-nodes6"}.Get(f)
}

// bareSet is the name of the set with Input.Bare.
func bareSet(f addr.Family) string {
	return addr.Per[string]{V4: "overlayd-bare4", V6: "overlayd-bare6"}.Get(f)
}

// setNames are all sets that can be ours.
func setNames(f addr.Family) []string { return []string{nodeSet(f), bareSet(f)} }

// Rules decides what this node's firewall has to hold for the family of in.Network, which must be valid.
func Rules(in Input) Ruleset {
	in.Network, in.Subnet = in.Network.Masked(), in.Subnet.Masked()
	rs := Ruleset{Family: in.Family()}
	if in.Masquerade {
		rs.Chains = append(rs.Chains, Chain{postRouting(), postRoutingRules(in, rs.Family)})
		if in.DirectNodes {
			rs.Sets = append(rs.Sets, Set{nodeSet(rs.Family), false, members(hosts(in.Nodes), rs.Family)})
		}
		if in.bare() {
			rs.Sets = append(rs.Sets, Set{bareSet(rs.Family), true, members(in.Bare, rs.Family)})
		}
	}
	if in.Forward {
		rs.Chains = append(rs.Chains, Chain{forward(), forwardRules(in.Network)})
	}
	return rs
}

// kubeProxy is how kube-proxy marks what it will masquerade in POSTROUTING (its default --iptables-masquerade-bit, 14).
func kubeProxy() Mark { return Mark{0x4000, 0x4000} }

// postRoutingRules is the order that matters: who is left alone comes before who is masqueraded. The kernel asks only
// for the first packet of a connection; answers follow it whatever stands here. Of those left alone the most frequent
// come first.
func postRoutingRules(in Input, f addr.Family) []Rule {
	net := in.Network
	rules := []Rule{{Mark: kubeProxy(), MarkNot: true, Src: net, Dst: net, Verdict: Return, Comment: "pod to pod"}}
	if in.Node.IsValid() {
		rules = append(rules, in.fromNode(f)...)
	}
	rules = append(rules, Rule{Mark: kubeProxy(), Verdict: Return, Comment: "kube-proxy masquerades this itself"})
	rules = append(rules, nodeRules(in, f)...)
	for _, p := range members(in.Exclude, f) {
		rules = append(rules, Rule{Src: net, Dst: p, Verdict: Return, Comment: "excluded by the operator"})
	}
	rules = append(rules, Rule{Src: net, Dst: multicast(f), DstNot: true, Verdict: Masquerade, Comment: "pod to external"})
	if in.Subnet.IsValid() {
		rules = append(rules, Rule{Dst: in.Subnet, Verdict: Return, Comment: "external to a pod of this node"})
	}
	return append(rules,
		Rule{Dst: net, Verdict: Masquerade, Comment: "external to a pod of another node, replies must return here"},
	)
}

// bare tells whether there are peers towards which this node itself has to be masqueraded.
func (in Input) bare() bool { return in.Node.IsValid() && len(in.Bare) > 0 }

// Source is the address that connections through this node into the tunnel are given; invalid: none.
func (in Input) Source() netip.Addr {
	if in.Masquerade && in.Tunnel != "" {
		return in.Node
	}
	return netip.Addr{}
}

// fromNode has what this node sends into the tunnel come from the address that the pods there answer through it. What
// the rule before and the first one here leave is to be masqueraded, by kube-proxy or by us; MASQUERADE would take the
// address of the tunnel's device. kube-proxy's bit is cleared, as it does itself: the encapsulated packet inherits the
// mark, and would be masqueraded too.
func (in Input) fromNode(f addr.Family) []Rule {
	own := Rule{
		Mark: kubeProxy(), MarkNot: true, Src: addr.Host(in.Node), Dst: in.Network, Verdict: Return,
		Comment: "this node to a pod",
	}
	out := Rule{
		Dst: in.Network, OutDevice: in.Tunnel, Verdict: SNAT, Source: in.Node, Comment: "through this node to a pod",
	}
	if in.bare() {
		const whose = " whose replies return here"
		own.DstSet, own.DstSetNot, own.Comment = bareSet(f), true, own.Comment+whose
		out.DstSet, out.DstSetNot, out.Comment = bareSet(f), true, out.Comment+whose
	}
	if in.Tunnel == "" { // the device to any peer has an address that it answers
		return []Rule{own}
	}
	unmark := out
	unmark.Mark, unmark.Verdict, unmark.Source = kubeProxy(), Unmark, netip.Addr{}
	unmark.Comment = "the next rule does what kube-proxy asks for"
	return []Rule{own, unmark, out}
}

// nodeRules keep the pods' real addresses towards the nodes' own addresses. What leaves through the tunnel for
// an address outside of the network goes to a peer node: nothing else is routed there.
func nodeRules(in Input, f addr.Family) []Rule {
	var rules []Rule
	if in.Tunnel != "" {
		rules = append(rules,
			Rule{Src: in.Network, OutDevice: in.Tunnel, Verdict: Return, Comment: "pod to a node through the tunnel"})
	}
	if in.DirectNodes {
		rules = append(rules, Rule{Src: in.Network, DstSet: nodeSet(f), Verdict: Return, Comment: "pod to a node directly"})
	}
	return rules
}

func forwardRules(net netip.Prefix) []Rule {
	return []Rule{
		{Src: net, Verdict: Accept, Comment: "from a pod"},
		{Dst: net, Verdict: Accept, Comment: "to a pod"},
	}
}

// members picks one family out of a list, sorted, so that another order changes nothing.
func members(list []netip.Prefix, f addr.Family) []netip.Prefix {
	var own []netip.Prefix
	for _, p := range list {
		if p.IsValid() && addr.FamilyOf(p.Addr()) == f {
			own = append(own, p.Masked())
		}
	}
	slices.SortFunc(own, addr.ComparePrefix)
	return slices.Compact(own)
}

// hosts are single addresses as networks.
func hosts(list []netip.Addr) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(list))
	for _, a := range list {
		if a.IsValid() {
			out = append(out, addr.Host(a))
		}
	}
	return out
}

func multicast(f addr.Family) netip.Prefix {
	if f == addr.IPv4 {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{224}), 4)
	}
	return netip.PrefixFrom(netip.AddrFrom16([16]byte{0xff}), 8)
}
