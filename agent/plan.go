package agent

import (
	"net/netip"
	"slices"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/internal/sorted"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// lingerFor is how long a peer stays whose lease is gone or no longer accepted. A lease that was deleted or overwritten
// by mistake is back within that time, and no packet is lost; and nothing is gained by removing the routes to a node
// that is gone at once.
const lingerFor = 5 * time.Second

// peers is what the node knows of the others, and what is planned for them.
type peers struct {
	roster  subnet.Roster
	planned *planned  // nil: the next round plans everything
	paths   paths     // by subnet
	kept    time.Time // until when those are kept that the store lost last
}

// planned is what the node's plan was made of, and what the next one follows from if only a few peers come and go.
type planned struct {
	input backend.Input // without the peers
	node  backend.Plan  // of its state, the devices and the rules
	prune bool          // the peers are those of the store: what is not planned may go
	// plain: no peer is unreachable and no foreign route precedes ours, so that peers that come and go make no difference
	// to others.
	plain bool
}

// step leads from one plan to the next: what gone has goes, what come has comes. The two hold what single peers add; or
// all of the plan before goes, and come is the next one as a whole.
type step struct {
	gone, come backend.Plan
	all        bool
	planned    *planned
	shadowed   error
}

// accept decides which peers to act on. Those that the store has just lost are kept until its table is no longer stale:
// what goes missing later is removed as ever.
func (p *peers) accept(l leases, c subnet.Config, self subnet.Lease, now time.Time) subnet.Change {
	keep := lingerFor
	if l.is == stale && !l.until.Equal(p.kept) {
		keep, p.kept = max(lingerFor, l.until.Sub(now)), l.until
	}
	return p.roster.Update(l.table, c, self, now, keep)
}

// plan plans for the peers that came and went, or for all where anything else changed or these may make a difference to
// others. It is pure.
func (p *peers) plan(in backend.Input, node []netstate.Sysctl, prune bool, ch subnet.Change) step {
	if before := p.planned; before != nil && before.prune == prune && sameInput(before.input, in) {
		if len(ch.Gone)+len(ch.Come) == 0 {
			return step{planned: before}
		}
		st := step{gone: planFor(in, ch.Gone...), come: planFor(in, ch.Come...), planned: before}
		if before.plain && plain(st.come, shadowed(in.Host, st.come.State)) && p.sameRules(in, st) {
			st.gone.State, st.come.State = ofPeers(st.gone.State), ofPeers(st.come.State)
			return st
		}
	}
	st := step{come: planFor(in, p.roster.Peers()...), all: true}
	st.come.State.Sysctls = append(st.come.State.Sysctls, node...)
	slices.SortFunc(st.come.State.Sysctls, netstate.Sysctl.Compare)
	st.shadowed = shadowed(in.Host, st.come.State)
	st.planned = &planned{input: in, node: st.come, prune: prune, plain: plain(st.come, st.shadowed)}
	st.planned.node.State = netstate.State{
		Links: slices.Clone(st.come.State.Links), Rules: slices.Clone(st.come.State.Rules),
	}
	st.planned.node.Paths = nil
	return st
}

func planFor(in backend.Input, peers ...*subnet.Lease) backend.Plan {
	in.Peers = peers
	return backendOf(in.Config.Backend.Type).Plan(in)
}

func sameInput(a, b backend.Input) bool {
	return a.Config == b.Config && a.Self == b.Self && a.Underlay == b.Underlay && a.Host.Equal(b.Host) &&
		slices.Equal(a.Endpoints, b.Endpoints)
}

func plain(p backend.Plan, shadowed error) bool {
	unreachable := func(p backend.Path) bool { return p.Kind == backend.Unreachable }
	return shadowed == nil && !slices.ContainsFunc(p.Paths, unreachable)
}

// sameRules reports whether the rules stay as they were planned: the peers that come need no others, and those of the
// peers that are gone are needed by others. The peers are searched in growing parts: mostly the first one needs them
// all, and if none does, the search costs no more than planning for all.
func (p *peers) sameRules(in backend.Input, st step) bool {
	without := func(rules, others []netstate.Rule) []netstate.Rule {
		return slices.DeleteFunc(slices.Clone(rules), func(r netstate.Rule) bool { return slices.Contains(others, r) })
	}
	if len(without(st.come.State.Rules, p.planned.node.State.Rules)) > 0 {
		return false
	}
	unneeded, rest := without(st.gone.State.Rules, st.come.State.Rules), p.roster.Peers()
	for n := 1; len(unneeded) > 0 && len(rest) > 0; n *= 2 {
		part := rest[:min(n, len(rest))]
		unneeded, rest = without(unneeded, planFor(in, part...).State.Rules), rest[len(part):]
	}
	return len(unneeded) == 0
}

// ofPeers is what of a plan's state is for single peers.
func ofPeers(s netstate.State) netstate.State {
	return netstate.State{Neighbours: s.Neighbours, FDB: s.FDB, TunnelPeers: s.TunnelPeers, Routes: s.Routes}
}

// paths is how each subnet of a peer is reached, in the order of the subnets.
type paths []backend.Path

// to is the path to the subnet of a peer in one family; the zero Path: there is none.
func (p paths) to(l *subnet.Lease, f addr.Family) backend.Path {
	if !l.Subnets.Get(f).IsValid() {
		return backend.Path{}
	}
	path, _ := sorted.Find(p, backend.Path{Peer: l, Family: f})
	return path
}

// pathChange is another path to a subnet than before; without a peer, there is none.
type pathChange struct{ was, is backend.Path }

func (c pathChange) subnet() netip.Prefix {
	if c.is.Peer == nil {
		return c.was.Subnet()
	}
	return c.is.Subnet()
}

// follow takes the paths of a step, and returns those that are not as they were.
func (p *paths) follow(st step) (changes []pathChange) {
	gone, come := st.gone.Paths, st.come.Paths
	sorted.Sort(gone)
	sorted.Sort(come)
	was, is := []backend.Path(*p), come
	if st.all {
		*p = come
	} else {
		*p, was, is = sorted.Patch(was, gone, come)
	}
	for len(was)+len(is) > 0 {
		var order int
		switch {
		case len(was) == 0:
			order = 1
		case len(is) == 0:
			order = -1
		default:
			order = was[0].Compare(is[0])
		}
		var c pathChange
		if order <= 0 {
			c.was, was = was[0], was[1:]
		}
		if order >= 0 {
			c.is, is = is[0], is[1:]
		}
		if c.was != c.is {
			changes = append(changes, c)
		}
	}
	return changes
}

// inFirewall reports whether the firewall has to know of a change.
func (c pathChange) inFirewall() bool {
	named := func(p backend.Path) bool { return p.Kind == backend.Direct || p.Peer != nil && !p.Peer.PublicIPLocal }
	return named(c.was) || named(c.is)
}

// nodes are the peers' own addresses that are reached without a tunnel, and that pods may talk to without SNAT. bare
// are the subnets of those behind the tunnel that don't say that their public IP is their own, flannel's for one: what
// their pods answer to this node's own address comes without the tunnel, and a strict rp_filter drops it.
func (p *peers) nodes(f addr.Family) (nodes []netip.Addr, bare []netip.Prefix) {
	for _, l := range p.roster.Peers() {
		switch path := p.paths.to(l, f); {
		case path.Kind == backend.Direct && l.PublicIPLocal:
			nodes = append(nodes, l.PublicIP.Get(f))
		case path.Kind == backend.Tunnel && !l.PublicIPLocal:
			bare = append(bare, l.Subnets.Get(f))
		}
	}
	return nodes, bare
}
