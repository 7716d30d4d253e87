package doctor

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/diag/doctor/packetfilter"
	"github.com/overlayd/overlayd/netstate"
)

// judgeLegacy names the rules of iptables-legacy that may concern pods or the tunnel: what they do to a packet is not
// evaluated.
func judgeLegacy(f Facts) findings {
	suspects, saves := f.suspects()
	if len(suspects) == 0 {
		return ok("no rules that may drop or masquerade packets of pods or of the tunnel")
	}
	return warn("iptables-legacy has rules that may drop or masquerade packets of pods or of the tunnel; "+
		"they are listed here, not evaluated: %s", few(suspects)).steps(saves...)
}

// suspects are the rules and policies of iptables-legacy that may drop packets of pods or of the tunnel or change their
// sender, and the programs that list them. Neither what overlayd, kube-proxy and container engines have in chains of
// their own counts, nor a rule for addresses that no pod and no node has.
func (f Facts) suspects() (rules, saves []string) {
	accepts := func(save string) bool { // the daemon's chain decides before the policy does
		return slices.ContainsFunc(f.Legacy, func(c packetfilter.Legacy) bool {
			return c.Save == save && c.Chain == "FORWARD" && slices.Contains(c.Rules, "-A FORWARD -j OVERLAYD-FWD")
		})
	}
	for _, c := range f.Legacy {
		add := func(rule string) {
			rules = append(rules, fmt.Sprintf("%s (%s -t %s)", rule, c.Save, c.Table))
			if !slices.Contains(saves, c.Save) {
				saves = append(saves, c.Save)
			}
		}
		if c.Policy == "DROP" && (c.Chain != "FORWARD" || !accepts(c.Save)) {
			add(fmt.Sprintf("-P %s DROP", c.Chain))
		}
		for _, r := range c.Rules {
			// Docker closes the ports of its containers, which may be pods.
			closes := c.Chain == "DOCKER" && slices.ContainsFunc(f.bridges(), func(b netstate.SurveyLink) bool {
				return strings.Contains(r, " -o "+b.Name+" ")
			})
			if stops(r) && (closes || !ownChain(c.Chain) && f.concerns(r)) {
				add(r)
			}
		}
	}
	return rules, saves
}

// ownChain reports whether a chain belongs to overlayd, kube-proxy or a container engine by its name.
func ownChain(name string) bool {
	return slices.ContainsFunc([]string{"OVERLAYD-", "KUBE-", "DOCKER", "CNI-", "FLANNEL-"},
		func(prefix string) bool { return strings.HasPrefix(name, prefix) })
}

// stops reports whether a rule's target keeps a packet from arriving, or from arriving as it is.
func stops(rule string) bool {
	words := strings.Fields(rule)
	i := slices.Index(words, "-j") + 1
	return i > 0 && i < len(words) && slices.Contains(
		[]string{"DROP", "REJECT", "TARPIT", "QUEUE", "NFQUEUE", "MASQUERADE", "SNAT", "NETMAP"}, words[i])
}

// concerns reports whether a rule is about addresses of pods or nodes, or about any.
func (f Facts) concerns(rule string) bool {
	words := strings.Fields(rule)
	for i, w := range words[:len(words)-1] {
		p, err := netip.ParsePrefix(words[i+1])
		if err != nil || w != "-s" && w != "-d" {
			continue
		}
		fam := addr.FamilyOf(p.Addr())
		network := f.network(fam)
		if words[i-1] == "!" { // packets between pods are excepted
			whole := network.IsValid() && p.Bits() <= network.Bits() && p.Contains(network.Addr())
			if whole && strings.Contains(rule, "-A POSTROUTING ") {
				return false
			}
			continue
		}
		node := p.Contains(f.reachedAt(fam)) ||
			slices.ContainsFunc(f.Peers, func(o peer) bool { return p.Contains(o.publicIP) })
		if network.IsValid() && !node && !p.Overlaps(network) {
			return false
		}
	}
	return true
}

// besides is what to add to a finding that all is well.
func (f Facts) besides() string {
	if rules, _ := f.suspects(); len(rules) > 0 {
		return " by nf_tables; see iptables-legacy"
	}
	return ""
}
