package backend

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// RulePriority is where the rule for packets from this node's pods stands: behind the local table, before the main one.
const RulePriority = 11800

const minIPv6MTU = 1280 // RFC 8200 §5

// Encapsulation is what the backends with a tunnel device in each family plan each in its own way.
type Encapsulation interface {
	// Device is the device of a family, without its MTU.
	Device(in Input, f addr.Family) netstate.Link
	// Peer plans what a tunnel to a peer consists of, but for the routes.
	Peer(p *Plan, in Input, dev string, peer *subnet.Lease, f addr.Family)
	// Gateway is the address on the device by which a peer is reached; the zero Addr: the device needs none.
	Gateway(peer *subnet.Lease, f addr.Family) netip.Addr
}

// PlanTunnels has a device in each family, a rule where a peer is reached by a tunnel, and for each peer either a tunnel
// or, with DirectRouting and where no gateway is between, a plain route.
func (p *Plan) PlanTunnels(in Input, t Encapsulation) {
	families := in.Config.Families()
	// To the peers themselves, in a table before the main one.
	nodes := make([]netstate.Route, 0, len(in.Peers)*len(families))
	for _, f := range families {
		dev, own := p.planDevice(in, t, f), source(in, f)
		p.Each(in, f, func(peer *subnet.Lease) {
			if in.Config.Backend.DirectRouting {
				if by, err := OnLink(in.Host, peer.PublicIP.Get(f)); err == nil {
					p.AddDirect(peer, f, by)
					return
				}
			}
			t.Peer(p, in, dev, peer, f)
			via := t.Gateway(peer, f)
			p.routeInto(in.Host, dev, via, own, peer, f)
			if peer.PublicIPLocal {
				nodes = append(nodes, routeToNode(dev, via, peer, f))
			}
		})
	}
	for _, f := range families {
		p.AddRule(in.Host, netstate.ToMain(in.Config.Pools.Get(f).Network))
		// A rule of any kind makes the kernel look up every route the long way, which is some 8 % of the CPU of a request:
		// only where there is something in the table.
		if slices.ContainsFunc(nodes, func(r netstate.Route) bool { return addr.FamilyOf(r.Dst.Addr()) == f }) {
			p.AddRule(in.Host, netstate.Rule{Priority: RulePriority, From: in.Self.Subnets.Get(f), Table: netstate.OwnTable})
		}
	}
	slices.SortFunc(nodes, netstate.Route.Compare)
	p.State.Routes = slices.Insert(p.State.Routes, 0, nodes...)
	p.State.Sort()
}

func (p *Plan) planDevice(in Input, t Encapsulation, f addr.Family) string {
	l := t.Device(in, f)
	l.MTU = p.LimitMTU(in, f)
	if l.MTU < minIPv6MTU && f == addr.IPv6 {
		p.Problems = append(p.Problems, fmt.Sprintf("%s: an underlay MTU of %d leaves %d, IPv6 needs %d",
			l.Name, in.Underlay.Get(f).MTU, l.MTU, minIPv6MTU))
	}
	p.Tunnel.Set(f, l.Name)
	s := &p.State
	s.Links = append(s.Links, l)
	if in.Host.IPv6 && l.MTU >= minIPv6MTU { // below that, a device has no IPv6 (RFC 8200 §5), nor settings for it
		s.Sysctls = append(s.Sysctls, netstate.AcceptRA(l.Name))
		if f == addr.IPv6 {
			s.Sysctls = append(s.Sysctls, netstate.IPv6On(l.Name))
		}
	}
	s.Addresses = append(s.Addresses, netstate.Address{Link: l.Name, Prefix: addr.Host(in.Self.Gateway(f))})
	return l.Name
}

// source is the address of this node that peers know, and answer through the tunnel; none where they can't.
func source(in Input, f addr.Family) netip.Addr {
	if ip := in.Self.PublicIP.Get(f); in.Self.PublicIPLocal && in.Host.Source(ip) {
		return ip
	}
	return netip.Addr{}
}

// routeInto plans the route to a peer's pods. What the node itself sends to them comes from own, unless the peer may
// answer that without the tunnel: then from the device's address, which is in the node's subnet.
func (p *Plan) routeInto(h netstate.Host, dev string, via, own netip.Addr, peer *subnet.Lease, f addr.Family) {
	sn := peer.Subnets.Get(f)
	r := netstate.Route{
		Table: netstate.MainTable, Dst: sn, Metric: netstate.Metric(sn), Via: via, Link: dev, OnLink: via.IsValid(),
	}
	if peer.PublicIPLocal {
		r.Src = own
	}
	p.State.Routes = append(p.State.Routes, r)
	p.Add(peer, f, Tunnel, nil)
	if !via.Is6() {
		return
	}
	if by, ok := h.Route(via); ok && by.Dst.Bits() > 0 {
		// The IPv6 stack refuses a gateway that a route of the host, but for the default one, looks for elsewhere (a site's
		// fd00::/8, say), onlink or not. A route to the gateway alone comes before that one.
		r.Dst, r.Via, r.OnLink = addr.Host(via), netip.Addr{}, false
		p.State.Routes = append(p.State.Routes, r)
	}
}

// routeToNode is by which pods reach the peer node itself the way that its answers come, through the tunnel. Nothing
// but this one address is steered: whatever else a lease might claim, it can't draw the traffic of another host.
func routeToNode(dev string, via netip.Addr, peer *subnet.Lease, f addr.Family) netstate.Route {
	dst := addr.Host(peer.PublicIP.Get(f))
	return netstate.Route{
		Table: netstate.OwnTable, Dst: dst, Metric: netstate.Metric(dst), Via: via, Link: dev, OnLink: via.IsValid(),
	}
}
