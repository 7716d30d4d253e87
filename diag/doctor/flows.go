package doctor

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/netstate"
)

// Probes is what was tried out with what is known.
type Probes struct {
	Support    []support
	Flows      []flow // to peers
	ToStore    []flow
	RoutingErr error // why the kernel was not asked to route them
	Pings      PingFacts
}

func probe(ctx context.Context, o Options, f Facts) Probes {
	var p Probes
	if f.Errs[readDevices] == nil {
		p.Flows, p.ToStore = f.flows(), storeFlows(ctx, f.endpoints())
		p.RoutingErr = route(f.Survey.Host, p.Flows, p.ToStore)
	}
	p.Pings = pingPeers(ctx, o, f)
	if f.Privileges == nil {
		p.Support = trySupport(f)
	}
	return p
}

// flow is a packet, what the kernel says of it, and the route that it should take.
type flow struct {
	netstate.Flow
	netstate.Answer
	who     string // sends what to whom
	desired netstate.Route
}

// route has the kernel route packets: what rules and tables lead to, it alone knows.
func route(h netstate.Host, lists ...[]flow) error {
	for _, flows := range lists {
		asked := make([]netstate.Flow, len(flows))
		for i := range flows {
			asked[i] = flows[i].Flow
		}
		answers, err := h.Ask(asked)
		if err != nil {
			return err
		}
		for i := range flows {
			flows[i].Answer = answers[i]
		}
	}
	return nil
}

// flows are packets to pods of peers, and from pods here to nodes: to some of them, as what diverts packets diverts
// those to most.
func (f Facts) flows() []flow {
	const most = 32
	var out []flow
	for _, p := range f.Peers[:min(len(f.Peers), most)] {
		out = append(out, f.flowsTo(p)...)
	}
	for _, r := range f.Survey.Ours.Routes {
		if r.Table != netstate.OwnTable || len(out) >= 6*most {
			continue
		}
		to := r.Dst.Addr()
		if pod, bridge := f.somePod(addr.FamilyOf(to)); bridge != "" {
			who := fmt.Sprintf("from a pod of this node to the node %s", to)
			out = append(out, flow{Flow: netstate.Flow{To: to, From: pod, In: bridge}, who: who, desired: r})
		}
	}
	return out
}

// flowsTo are packets to a pod of a peer for which there is a route of ours; for the others, see judgeRoutes.
func (f Facts) flowsTo(p peer) []flow {
	i := slices.IndexFunc(f.Survey.Ours.Routes, func(r netstate.Route) bool {
		return r.Table == netstate.MainTable && r.Dst == p.subnet
	})
	if i < 0 {
		return nil
	}
	to := addr.Last(p.subnet).Prev()
	var out []flow
	add := func(who string, from netip.Addr, in string) {
		who += " to pods of " + p.name
		packet := netstate.Flow{To: to, From: from, In: in}
		out = append(out, flow{Flow: packet, who: who, desired: f.Survey.Ours.Routes[i]})
	}
	add("from this node", netip.Addr{}, "")
	if ip := f.Underlay.By.Get(p.family()).Addr; ip.IsValid() && f.Survey.Host.Has(ip) {
		add(fmt.Sprintf("from this node's address %s", ip), ip, "")
	}
	if pod, bridge := f.somePod(p.family()); bridge != "" {
		add("from a pod of this node", pod, bridge)
	}
	return out
}

// somePod is an address that a pod of this node may have, and the bridge that its packets come by; "": there is none.
func (f Facts) somePod(fam addr.Family) (pod netip.Addr, bridge string) {
	b := f.bridgeOf(fam)
	if !b.Up || b.Kind != "bridge" {
		return netip.Addr{}, ""
	}
	return f.freeAddress(fam), b.Name
}

// storeFlows are packets to the endpoints in use, so far as their addresses are known soon.
func storeFlows(ctx context.Context, endpoints []string) []flow {
	const soon = 300 * time.Millisecond
	ctx, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	var out []flow
	for _, e := range endpoints {
		u, err := url.Parse(e)
		if err != nil || u.Hostname() == "" {
			continue
		}
		found, _ := net.DefaultResolver.LookupNetIP(ctx, "ip", u.Hostname()) // an address as it is, too
		for _, a := range found {
			out = append(out, flow{Flow: netstate.Flow{To: a.Unmap().WithZone("")}})
		}
	}
	return out
}

// judgePolicyRouting: rules of other programs may lead packets to another table than the one that our routes are in.
func judgePolicyRouting(f Facts) (out findings) {
	if len(f.Flows) == 0 {
		return skipped("no route to a peer to look up")
	}
	said := map[string]bool{}
	for _, x := range f.Flows {
		asDesired := x.Link == x.desired.Link && x.Via == x.desired.Via
		if x.Err == nil && (asDesired || x.Table == x.desired.Table) { // another route of that table: see judgeRoutes
			continue
		}
		what := fmt.Sprintf("leave by %s (table %d), not by %s", x.Link, x.Table, x.desired.Link)
		if x.Err != nil {
			what = fmt.Sprintf("are not sent (%v)", x.Err)
		}
		rule, found := f.Survey.Host.RuleOf(x.Flow, x.Answer)
		if said[what+rule.String()] { // of another peer
			continue
		}
		said[what+rule.String()] = true
		word := ip(addr.FamilyOf(x.To))
		if !found || rule.Priority >= netstate.MainPriority { // that is the kernel's own: one of ours is missing
			out.add(fail("packets %s %s", x.who, what).
				fix("%s", f.ifRunning(fmt.Sprintf("overlayd diff; %s rule; %s route get %s", word, word, x.To))))
			continue
		}
		out.add(fail("packets %s %s: the rule %q of another program matches them", x.who, what, rule).
			fix("%s", f.ifRunning(fmt.Sprintf("%s rule   # give that rule a higher number, or exclude %s in its program",
				word, f.network(addr.FamilyOf(x.To))))))
	}
	return out.atMost().orOK("packets to peers' pods take overlayd's routes")
}

// elsewhereThanStore finds out where the store is reached by another device than the one that is taken to lead to the
// other nodes.
func (f Facts) elsewhereThanStore() findings {
	for _, x := range f.ToStore {
		fam := addr.FamilyOf(x.To)
		uplinks := []string{f.Underlay.By.Get(fam).Device}
		if uplinks[0] == "" { // bound to none
			uplinks = namesOf(f.uplinks(fam))
		}
		l, _ := f.Survey.Link(x.Link)
		here := l.Loopback || x.Table == unix.RT_TABLE_LOCAL
		inside := l.Tunnel || f.network(fam).Contains(x.To) // no device of the pods leads to other nodes
		if x.Err != nil || len(uplinks) == 0 || x.Link == "" || here || inside || slices.Contains(uplinks, x.Link) {
			continue
		}
		if !f.Underlay.ByDefault && slices.ContainsFunc(f.Pings.Sample, pinged.answers) {
			continue // an operator has chosen it, and was right
		}
		return warn("%s is used to reach the other nodes, but %s (%s) is reached by %s: are the nodes there, too?",
			strings.Join(uplinks, ", "), f.storeName(), x.To, x.Link).
			steps(f.Service.set(f.EnvFile, "OVERLAYD_IFACE", x.Link))
	}
	return nil
}

// ip is the command for a family.
func ip(fam addr.Family) string {
	if fam == addr.IPv6 {
		return "ip -6"
	}
	return "ip"
}
