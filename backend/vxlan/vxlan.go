// Package vxlan plans the VXLAN overlay (RFC 7348): one device in each family, with a static forwarding entry, a static
// neighbour and a route for every peer. Nothing is learned and nothing is flooded: what the leases say is all that
// there is.
//
// A packet to a pod of a peer takes three steps, each of them an entry here: the route sends it to the peer's first
// address on the device; the neighbour entry gives that address the peer's VTEP MAC; the FDB entry sends frames for
// that MAC to the peer's address on the underlay.
package vxlan

import (
	"crypto/sha256"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

const (
	// RulePriority is where the rule for packets from this node's pods stands: behind the local table, before the main
	// one.
	RulePriority = 11800

	maxDeviceName = 15 // IFNAMSIZ - 1, uapi/linux/if.h
	minIPv6MTU    = 1280
)

// DeviceName is the name of the device in one family. A VNI too long for the usual name gets a shorter one.
func DeviceName(f addr.Family, vni uint32) string {
	usual, short := "overlay.", "ovl."
	if f == addr.IPv6 {
		usual, short = "overlay-v6.", "ovl6."
	}
	number := strconv.FormatUint(uint64(vni), 10)
	if len(usual)+len(number) > maxDeviceName {
		return short + number
	}
	return usual + number
}

// Owns reports whether a VXLAN device of this name is one of ours, of whatever VNI.
func Owns(name string) bool {
	_, number, ok := strings.Cut(name, ".")
	vni, err := strconv.ParseUint(number, 10, 24)
	return ok && err == nil &&
		(name == DeviceName(addr.IPv4, uint32(vni)) || name == DeviceName(addr.IPv6, uint32(vni)))
}

// Backend is the VXLAN backend.
type Backend struct{}

// VTEPs gives each family a MAC that follows from the node's identity: a device that was deleted and recreated is the
// one that the lease announced.
func (Backend) VTEPs(c subnet.Config, id subnet.Identity) addr.Per[subnet.VTEP] {
	var out addr.Per[subnet.VTEP]
	for _, f := range c.Families() {
		out.Set(f, subnet.VTEP{VNI: c.Backend.VNI, MAC: mac(id, f, c.Backend.VNI)})
	}
	return out
}

func mac(id subnet.Identity, f addr.Family, vni uint32) addr.MAC {
	sum := sha256.Sum256([]byte(fmt.Sprintf("%s\x00%s\x00%d\x00%d", id.NodeID, id.NodeName, f, vni)))
	m := addr.MAC(sum[:6])
	m[0] = m[0]&^0x01 | 0x02 // unicast, locally administered (IEEE 802-2014 §8.2)
	return m
}

// Plan has a device in each family, a rule where a peer is reached by a tunnel, and for each peer either the three
// entries of a tunnel or, with DirectRouting and where no gateway is between, a plain route.
func (Backend) Plan(in backend.Input) backend.Plan {
	families, n := in.Config.Families(), len(in.Peers)
	p := backend.NewPlan(n * len(families))
	p.State.FDB = make([]netstate.FDBEntry, 0, n*len(families))
	p.State.Neighbours = make([]netstate.Neighbour, 0, n*len(families))
	nodes := make([]netstate.Route, 0, n*len(families)) // to the peers themselves, in a table before the main one
	for _, f := range families {
		dev, own := planDevice(&p, in, f), source(in, f)
		p.Each(in, f, func(peer *subnet.Lease) {
			if in.Config.Backend.DirectRouting {
				if by, err := backend.OnLink(in.Host, peer.PublicIP.Get(f)); err == nil {
					p.AddDirect(peer, f, by)
					return
				}
			}
			planTunnel(&p, in.Host, dev, own, peer, f)
			if peer.PublicIPLocal {
				nodes = append(nodes, routeToNode(dev, peer, f))
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
	return p
}

func planDevice(p *backend.Plan, in backend.Input, f addr.Family) string {
	under, b := in.Underlay.Get(f), in.Config.Backend
	dev := DeviceName(f, b.VNI)
	mtu := p.LimitMTU(in, f)
	if mtu < minIPv6MTU && f == addr.IPv6 {
		p.Problems = append(p.Problems,
			fmt.Sprintf("%s: an underlay MTU of %[3]d leaves %[2]d, IPv6 needs %[4]d", dev, mtu, under.MTU, minIPv6MTU))
	}
	p.Tunnel.Set(f, dev)
	s := &p.State
	s.Links = append(s.Links, netstate.Link{
		Name: dev, MAC: in.Self.VTEP.Get(f).MAC, MTU: mtu,
		VXLAN: netstate.VXLAN{
			VNI: b.VNI, Port: b.Port, Local: under.Addr, Underlay: under.Device, Learning: b.Learning, GBP: b.GBP,
		},
	})
	if in.Host.IPv6 && mtu >= minIPv6MTU { // below that, a device has no IPv6 (RFC 8200 §5), nor settings for it
		s.Sysctls = append(s.Sysctls, netstate.AcceptRA(dev))
		if f == addr.IPv6 {
			s.Sysctls = append(s.Sysctls, netstate.IPv6On(dev))
		}
	}
	s.Addresses = append(s.Addresses, netstate.Address{Link: dev, Prefix: addr.Host(in.Self.Gateway(f))})
	return dev
}

// source is the address of this node that peers know, and answer through the tunnel; none where they can't.
func source(in backend.Input, f addr.Family) netip.Addr {
	if ip := in.Self.PublicIP.Get(f); in.Self.PublicIPLocal && in.Host.Source(ip) {
		return ip
	}
	return netip.Addr{}
}

// planTunnel plans the entries for a peer. What the node itself sends to its pods comes from own, unless the peer may
// answer that without the tunnel: then from the device's address, which is in the node's subnet.
func planTunnel(p *backend.Plan, h netstate.Host, dev string, own netip.Addr, peer *subnet.Lease, f addr.Family) {
	sn, gw, mac, ip := peer.Subnets.Get(f), peer.Gateway(f), peer.VTEP.Get(f).MAC, peer.PublicIP.Get(f)
	s := &p.State
	s.FDB = append(s.FDB, netstate.FDBEntry{Link: dev, MAC: mac, Dst: ip})
	s.Neighbours = append(s.Neighbours, netstate.Neighbour{Link: dev, IP: gw, MAC: mac})
	r := netstate.Route{Table: netstate.MainTable, Dst: sn, Metric: netstate.Metric(sn), Via: gw, Link: dev, OnLink: true}
	if peer.PublicIPLocal {
		r.Src = own
	}
	s.Routes = append(s.Routes, r)
	if by, ok := h.Route(gw); ok && f == addr.IPv6 && by.Dst.Bits() > 0 {
		// The IPv6 stack refuses a gateway that a route of the host, but for the default one, looks for elsewhere (a site's
		// fd00::/8, say), onlink or not. A route to the gateway alone comes before that one.
		r.Dst, r.Via, r.OnLink = addr.Host(gw), netip.Addr{}, false
		s.Routes = append(s.Routes, r)
	}
	p.Add(peer, f, backend.Tunnel, nil)
}

// routeToNode is by which pods reach the peer node itself the way that its answers come, through the tunnel. Nothing
// but this one address is steered: whatever else a lease might claim, it can't draw the traffic of another host.
func routeToNode(dev string, peer *subnet.Lease, f addr.Family) netstate.Route {
	dst := addr.Host(peer.PublicIP.Get(f))
	return netstate.Route{
		Table: netstate.OwnTable, Dst: dst, Metric: netstate.Metric(dst), Via: peer.Gateway(f), Link: dev, OnLink: true,
	}
}
