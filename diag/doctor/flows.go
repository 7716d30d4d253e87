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
	"github.com/overlayd/overlayd/subnet/etcd"
)

// flow is a packet, what the kernel says of it, and the route that it should take.
type flow struct {
	netstate.Flow
	netstate.Answer
	who  string // sends what to whom
	want netstate.Route
}

// mostAsked bounds the peers for which the kernel is asked: what diverts packets diverts those to most.
const mostAsked = 32

// askKernel has the kernel route packets to peers and to the store: what rules and tables lead to, it alone knows.
func (f *Facts) askKernel(ctx context.Context) {
	if f.Errs["devices"] != nil {
		return
	}
	var flows []flow
	for _, p := range f.Peers[:min(len(f.Peers), mostAsked)] {
		flows = append(flows, f.flowsTo(p)...)
	}
	for _, r := range f.Survey.Ours.Routes {
		to := r.Dst.Addr()
		pod, bridge := f.somePod(addr.FamilyOf(to))
		if r.Table == netstate.OwnTable && bridge != "" && len(flows) < 6*mostAsked {
			who := fmt.Sprintf("from a pod of this node to the node %s", to)
			flows = append(flows, flow{Flow: netstate.Flow{To: to, From: pod, In: bridge}, who: who, want: r})
		}
	}
	peers := len(flows)
	for _, a := range storeAddresses(ctx, f.storeOptions()) {
		flows = append(flows, flow{Flow: netstate.Flow{To: a}})
	}
	asked := make([]netstate.Flow, len(flows))
	for i := range flows {
		asked[i] = flows[i].Flow
	}
	answers, err := netstate.Ask(asked)
	if err != nil {
		f.failed("routing", err)
		return
	}
	for i := range flows {
		flows[i].Answer = answers[i]
	}
	f.Flows, f.ToStore = flows[:peers], flows[peers:]
}

// flowsTo are packets to a pod of a peer for which there is a route of ours.
func (f *Facts) flowsTo(p peer) []flow {
	i := slices.IndexFunc(f.Survey.Ours.Routes, func(r netstate.Route) bool {
		return r.Table == netstate.MainTable && r.Dst == p.subnet
	})
	if i < 0 { // see judgeRoutes
		return nil
	}
	to := p.subnet.Addr()
	for range 5 {
		if next := to.Next(); p.subnet.Contains(next) {
			to = next
		}
	}
	fam := p.family()
	out := []flow{{Flow: netstate.Flow{To: to}, who: "from this node"}}
	if ip := f.Underlay.By.Get(fam).Addr; ip.IsValid() && f.Survey.Host.Has(ip) {
		out = append(out, flow{Flow: netstate.Flow{To: to, From: ip}, who: fmt.Sprintf("from this node's address %s", ip)})
	}
	if pod, bridge := f.somePod(fam); bridge != "" {
		out = append(out, flow{Flow: netstate.Flow{To: to, From: pod, In: bridge}, who: "from a pod of this node"})
	}
	for j := range out {
		out[j].who += " to pods of " + p.name
		out[j].want = f.Survey.Ours.Routes[i]
	}
	return out
}

// somePod is an address that a pod of this node may have, and the bridge that its packets come by; "": there is none.
func (f *Facts) somePod(fam addr.Family) (pod netip.Addr, bridge string) {
	own := f.Self.Subnets.Get(fam)
	for _, a := range f.Survey.Host.Addresses {
		if !own.IsValid() || !own.Contains(a.Prefix.Addr()) || a.Tunnel {
			continue
		}
		if l, there := f.Survey.Link(a.Link); !there || !l.Up || l.Kind != "bridge" {
			continue
		}
		pod = a.Prefix.Addr().Next()
		for own.Contains(pod) && f.Survey.Host.Has(pod) {
			pod = pod.Next()
		}
		if own.Contains(pod) {
			return pod, a.Link
		}
	}
	return netip.Addr{}, ""
}

// storeAddresses are those of the endpoints in use, so far as they are known soon.
func storeAddresses(ctx context.Context, o etcd.Options) []netip.Addr {
	const soon = 300 * time.Millisecond
	ctx, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	var out []netip.Addr
	for _, e := range o.Endpoints {
		u, err := url.Parse(e)
		if err != nil || u.Hostname() == "" {
			continue
		}
		if a, err := netip.ParseAddr(u.Hostname()); err == nil {
			out = append(out, a.Unmap().WithZone(""))
			continue
		}
		found, _ := net.DefaultResolver.LookupNetIP(ctx, "ip", u.Hostname())
		for _, a := range found {
			out = append(out, a.Unmap().WithZone(""))
		}
	}
	return out
}

// judgePolicyRouting: rules of other programs may lead packets to another table than the one that our routes are in.
func judgePolicyRouting(f Facts) []Finding {
	if err := f.Errs["routing"]; err != nil {
		return skipped(err.Error())
	}
	if len(f.Flows) == 0 {
		return skipped("no route to a peer to look up")
	}
	var out []Finding
	said := map[string]bool{}
	for _, x := range f.Flows {
		asWanted := x.Link == x.want.Link && x.Via == x.want.Via
		if x.Err == nil && (asWanted || x.Table == x.want.Table) { // another route of that table: see judgeRoutes
			continue
		}
		what := fmt.Sprintf("leave by %s (table %d), not by %s", x.Link, x.Table, x.want.Link)
		if x.Err != nil {
			what = fmt.Sprintf("are not sent (%v)", x.Err)
		}
		rule, found := f.Survey.Host.RuleOf(x.Flow, x.Answer)
		if key := what + rule.String(); said[key] { // of another peer
			continue
		} else {
			said[key] = true
		}
		word := "ip"
		if x.To.Is6() {
			word = "ip -6"
		}
		steps := f.start()
		switch {
		case !found || rule.Priority >= netstate.MainPriority: // that is the kernel's own: one of ours is missing
			if f.Daemon.Running {
				steps = fmt.Sprintf("overlayd diff; %s rule; %s route get %s", word, word, x.To)
			}
			out = append(out, fail(fmt.Sprintf("packets %s %s", x.who, what), steps)...)
			continue
		case f.Daemon.Running:
			steps = fmt.Sprintf("%s rule   # give that rule a higher number, or exclude %s in its program",
				word, f.network(addr.FamilyOf(x.To)))
		}
		reason := fmt.Sprintf("packets %s %s: the rule %q of another program matches them", x.who, what, rule)
		out = append(out, fail(reason, steps)...)
	}
	return orOK(atMost(out), f.precedence())
}

// precedence says why no rule diverts packets.
func (f Facts) precedence() string {
	var ours []string
	for _, r := range f.Survey.Ours.Rules {
		if r.Table != netstate.OwnTable {
			ours = append(ours, strings.TrimPrefix(r.String(), "rule "))
		}
	}
	if len(ours) == 0 {
		return "packets to peers' pods take overlayd's routes"
	}
	return fmt.Sprintf("packets to peers' pods take overlayd's routes; %q precedes other programs' rules", few(ours))
}

// elsewhereThanStore finds out where the store is reached by another device than the one that is taken to lead to the
// other nodes.
func (f Facts) elsewhereThanStore() []Finding {
	for _, x := range f.ToStore {
		uplinks := []string{f.Underlay.By.Get(addr.FamilyOf(x.To)).Device}
		if uplinks[0] == "" { // bound to none
			uplinks = namesOf(f.uplinks(addr.FamilyOf(x.To)))
		}
		l, _ := f.Survey.Link(x.Link)
		here := l.Loopback || x.Table == unix.RT_TABLE_LOCAL
		if x.Err != nil || len(uplinks) == 0 || x.Link == "" || here || slices.Contains(uplinks, x.Link) {
			continue
		}
		// the daemon names both, and no device of the pods leads to other nodes
		if l.Tunnel || f.network(addr.FamilyOf(x.To)).Contains(x.To) {
			continue
		}
		if !f.Underlay.ByDefault && f.somePeerAnswers() { // an operator has chosen it, and was right
			continue
		}
		return warn(
			fmt.Sprintf("%s is used to reach the other nodes, but etcd (%s) is reached by %s: are the nodes there, too?",
				strings.Join(uplinks, ", "), x.To, x.Link),
			f.Service.set(f.EnvFile, "OVERLAYD_IFACE", x.Link))
	}
	return nil
}

func (f Facts) somePeerAnswers() bool { return slices.ContainsFunc(f.Pings.Sample, pinged.answers) }
