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
	// kube-proxy, of the portmap plugin and of the operator keep their say.
	Return Verdict = iota + 1
	// Masquerade gives the packet's connection the address of the device that it leaves by.
	Masquerade
	// Accept ends the hook for the packet.
	Accept
)

// Mark matches a packet mark under a mask. A zero mask matches everything.
type Mark struct{ Value, Mask uint32 }

// Rule is one row of a chain: all its matches together, and a verdict. A zero match matches everything. It is comparable.
type Rule struct {
	Mark      Mark
	Src, Dst  netip.Prefix
	DstNot    bool   // Dst is meant the other way: everything but it
	DstSet    string // the destination is in this set, one of the Ruleset's
	DstSetNot bool   // or is not
	OutDevice string
	Verdict   Verdict
	Comment   string // why; letters, digits, spaces and hyphens, so that every firewall takes it as it is
}

// Chain is a chain of ours with all its rules, in order.
type Chain struct {
	Place
	Rules []Rule
}

// Set is a named set that rules look into: of single addresses, or of networks.
type Set struct {
	Name     string
	Networks bool
	Members  []netip.Prefix // sorted, each once
}

// Ruleset is all that is wanted in the firewall for one family. One without chains means: nothing of ours.
type Ruleset struct {
	Family addr.Family
	Sets   []Set
	Chains []Chain
}

// Equal tells whether two rulesets are the same, in the same order.
func (rs Ruleset) Equal(o Ruleset) bool {
	return rs.Family == o.Family &&
		slices.EqualFunc(rs.Sets, o.Sets, func(a, b Set) bool {
			return a.Name == b.Name && a.Networks == b.Networks && slices.Equal(a.Members, b.Members)
		}) &&
		slices.EqualFunc(rs.Chains, o.Chains, func(a, b Chain) bool { return a.Place == b.Place && slices.Equal(a.Rules, b.Rules) })
}

// chain is what is wanted at a place; a chain without rules where nothing is.
func (rs Ruleset) chain(p Place) (Chain, bool) {
	i := slices.IndexFunc(rs.Chains, func(c Chain) bool { return c.Place == p })
	if i < 0 {
		return Chain{Place: p}, false
	}
	return rs.Chains[i], true
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
	// Exclude lists destinations that see the pods' own addresses. Those of the other family are passed over.
	Exclude []netip.Prefix
	// Masquerade and Forward say which of the two chains is wanted.
	Masquerade, Forward bool
}

// Family is the family that the input is about.
func (in Input) Family() addr.Family { return addr.FamilyOf(in.Network.Addr()) }

// NodeSet is the name of the set with the addresses of those peers that are reached without the tunnel.
func NodeSet(f addr.Family) string {
	if f == addr.IPv4 {
		return "overlayd-nodes4"
	}
	return "overlayd-nodes6"
}

// bareSet is the name of the set with Input.Bare.
func bareSet(f addr.Family) string {
	if f == addr.IPv4 {
		return "overlayd-bare4"
	}
	return "overlayd-bare6"
}

// setNames are all sets that can be ours.
func setNames(f addr.Family) []string { return []string{NodeSet(f), bareSet(f)} }

// Rules decides what this node's firewall has to hold for the family of in.Network, which must be valid.
func Rules(in Input) Ruleset {
	in.Network, in.Subnet = in.Network.Masked(), in.Subnet.Masked()
	rs := Ruleset{Family: in.Family()}
	if in.Masquerade {
		rs.Chains = append(rs.Chains, Chain{postRouting(), postRoutingRules(in, rs.Family)})
		if in.DirectNodes {
			rs.Sets = append(rs.Sets, Set{NodeSet(rs.Family), false, members(hosts(in.Nodes), rs.Family)})
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

// postRoutingRules is the order that matters: who is left alone comes before who is masqueraded. The kernel asks only
// for the first packet of a connection; answers follow it whatever stands here. Of those left alone the most frequent
// come first.
func postRoutingRules(in Input, f addr.Family) []Rule {
	net := in.Network
	rules := []Rule{
		{Src: net, Dst: net, Verdict: Return, Comment: "pod to pod"},
		{Mark: Mark{0x4000, 0x4000}, Verdict: Return, Comment: "kube-proxy masquerades this itself"},
	}
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

// nodeRules keep the real addresses between pods and the nodes' own addresses. What leaves through the tunnel for
// somebody outside of the network goes to a peer node: nothing else is routed there.
func nodeRules(in Input, f addr.Family) []Rule {
	var rules []Rule
	if in.Tunnel != "" {
		rules = append(rules, Rule{Src: in.Network, OutDevice: in.Tunnel, Verdict: Return, Comment: "pod to a node through the tunnel"})
	}
	if in.DirectNodes {
		rules = append(rules, Rule{Src: in.Network, DstSet: NodeSet(f), Verdict: Return, Comment: "pod to a node directly"})
	}
	if in.Node.IsValid() {
		r := Rule{Src: addr.Host(in.Node), Dst: in.Network, Verdict: Return, Comment: "this node to a pod"}
		if in.bare() {
			r.DstSet, r.DstSetNot, r.Comment = bareSet(f), true, "this node to a pod whose replies return here"
		}
		rules = append(rules, r)
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
