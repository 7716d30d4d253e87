// Package backend turns leases into the kernel state that a node must have. Each backend is a pure function: no I/O, no
// clock, no memory of what was before.
package backend

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// Backend plans how packets get from node to node.
type Backend interface {
	// VTEPs is what the node's lease must say of its VXLAN tunnel ends, before anything exists.
	VTEPs(c subnet.Config, id subnet.Identity) addr.Per[subnet.VTEP]
	// Plan is the kernel state for a lease and its peers, in the order that netstate wants. The neighbours, FDB entries
	// and routes that a peer adds to it depend on no other peer: the plan for a few of them is what they add to the plan
	// for all. The rest is the same for any peers, but for the rules: there are such as some of the peers need.
	Plan(in Input) Plan
}

// Underlay is how a node reaches the others in one family: its own address, and the device. It is the zero value where
// the family is not in use.
type Underlay struct {
	Device string // "": none alone, since routes lead by several, or the address is on another one
	Addr   netip.Addr
	MTU    int // the least of the devices that lead to other nodes
}

// By says by which device packets leave.
func (u Underlay) By() string {
	if u.Device == "" {
		return "the narrowest device that leads to other nodes"
	}
	return u.Device
}

// Input is all that a plan is made from.
type Input struct {
	Config   subnet.Config
	Self     subnet.Lease
	Peers    []*subnet.Lease // accepted ones, see subnet.Table.Peers
	Underlay addr.Per[Underlay]
	Host     netstate.Host
	// Endpoints are the addresses of the store that are inside the network: no route may cover one of them, or this node
	// is cut off.
	Endpoints []netip.Addr
	Key       netstate.PrivateKey // of WireGuard
}

// Plan is the desired state of the node.
type Plan struct {
	State netstate.State
	MTU   int // for pods: what gets through in every family

	Tunnel   addr.Per[string] // the tunnel device, where there is one
	Paths    []Path           // one for each peer and family, in the order of the peers
	Problems []string
}

// NewPlan is a plan with room for that many peers, each counted once for each family.
func NewPlan(peers int) Plan {
	// Two routes for each: to its pods, and to the node itself.
	return Plan{State: netstate.State{Routes: make([]netstate.Route, 0, 2*peers)}, Paths: make([]Path, 0, peers)}
}

// Path is how a peer is reached in one family.
type Path struct {
	Peer   *subnet.Lease
	Family addr.Family
	Kind   PathKind
	Device bool   // the peer has a tunnel device, which has the first address of its subnet
	Reason string // where it is Unreachable
}

// Subnet is where the path leads to.
func (p Path) Subnet() netip.Prefix { return p.Peer.Subnets.Get(p.Family) }

// Compare orders paths by subnet.
func (p Path) Compare(o Path) int { return addr.ComparePrefix(p.Subnet(), o.Subnet()) }

// Ping is what answers to a ping at the peer, on the path that packets to its pods take; the zero Addr where there is
// none.
func (p Path) Ping() netip.Addr {
	switch {
	case p.Peer == nil || p.Kind == Unreachable:
		return netip.Addr{}
	case p.Device:
		return p.Peer.Gateway(p.Family)
	}
	// Nothing has an address of the peer's subnet for sure, and the path to it is that to the peer itself.
	return p.Peer.PublicIP.Get(p.Family)
}

// PathKind says what becomes of packets to a peer's pods.
type PathKind uint8

// The kinds of paths.
const (
	Tunnel      PathKind = iota + 1 // encapsulated
	Direct                          // routed as they are
	Unreachable                     // no route is made
)

func (k PathKind) String() string {
	switch k {
	case Tunnel:
		return "tunnel"
	case Direct:
		return "direct"
	case Unreachable:
		return "unreachable"
	}
	return "none"
}

// OnLink finds the route by which the host reaches a peer without a gateway, or says why there is none.
func OnLink(h netstate.Host, peer netip.Addr) (netstate.HostRoute, error) {
	hops := h.NextHops(peer)
	if len(hops) == 0 {
		return netstate.HostRoute{}, fmt.Errorf("this node has no route to %s", peer)
	}
	r := hops[0]
	switch {
	case len(hops) > 1:
		return r, fmt.Errorf("this node's route to %s (%s) has %d next hops, no single device", peer, r.Dst, len(hops))
	case h.IsTunnel(r.Link):
		return r, fmt.Errorf("this node's route to %s (%s) leads into the tunnel device %s", peer, r.Dst, r.Link)
	case r.Drops:
		return r, fmt.Errorf("this node drops packets to %s (route to %s)", peer, r.Dst)
	case r.Via.IsValid():
		return r, fmt.Errorf("%s is behind the gateway %s (%s), not on a network of this node", peer, r.Via, r.Link)
	case r.Link == "":
		return r, fmt.Errorf("this node's route to %s has no single device", peer)
	}
	return r, nil
}

// DirectRoute is the route to a peer's subnet by way of the peer's own address.
func DirectRoute(sn netip.Prefix, peer netip.Addr, by netstate.HostRoute) netstate.Route {
	return netstate.Route{Table: netstate.MainTable, Dst: sn, Metric: netstate.Metric(sn), Via: peer, Link: by.Link}
}

// Add notes how a peer is reached.
func (p *Plan) Add(peer *subnet.Lease, f addr.Family, kind PathKind, reason error) {
	path := Path{Peer: peer, Family: f, Kind: kind, Device: p.Tunnel.Get(f) != ""}
	if reason != nil {
		path.Reason = reason.Error()
	}
	p.Paths = append(p.Paths, path)
}

// AddDirect plans the plain route to a peer that is on a network of this node.
func (p *Plan) AddDirect(peer *subnet.Lease, f addr.Family, by netstate.HostRoute) {
	ip := peer.PublicIP.Get(f)
	p.State.Routes = append(p.State.Routes, DirectRoute(peer.Subnets.Get(f), ip, by))
	p.Add(peer, f, Direct, nil)
}

// Each calls do for each peer that has a subnet in the family. Left out, and noted as unreachable, is a peer whose
// address this node itself has, since packets to it would never leave, and one whose subnet covers a network that this
// node is on.
func (p *Plan) Each(in Input, f addr.Family, do func(peer *subnet.Lease)) {
	local := localNetworks(in, f)
	for _, peer := range in.Peers {
		if !peer.Subnets.Get(f).IsValid() {
			continue
		}
		if err := conflict(in, local, peer.PublicIP.Get(f), peer.Subnets.Get(f)); err != nil {
			p.Add(peer, f, Unreachable, err)
			continue
		}
		do(peer)
	}
}

// conflict says why a peer can't have a route on this node.
func conflict(in Input, local []netstate.HostAddress, ip netip.Addr, sn netip.Prefix) error {
	if in.Host.Has(ip) {
		return fmt.Errorf("its public IP %s is configured on this node", ip)
	}
	for _, a := range local {
		if a.Prefix.Overlaps(sn) {
			return fmt.Errorf("its subnet overlaps %s, a network of this node's device %s", a.Prefix.Masked(), a.Link)
		}
	}
	for _, e := range in.Endpoints {
		if sn.Contains(e) {
			return fmt.Errorf("its subnet covers %s, an endpoint of the store: a route there would cut this node off from it", e)
		}
	}
	return nil
}

// localNetworks lists the networks that this node is on and that reach into the cluster network, but for its own
// subnet.
func localNetworks(in Input, f addr.Family) []netstate.HostAddress {
	network, own := in.Config.Pools.Get(f).Network, in.Self.Subnets.Get(f)
	var out []netstate.HostAddress
	for _, a := range in.Host.Addresses {
		if a.Prefix.Overlaps(network) && !a.Prefix.Overlaps(own) && (!a.Tunnel || !a.Prefix.IsSingleIP()) {
			out = append(out, a)
		}
	}
	return out
}

// AddRule plans a rule, before those of other programs that would take packets away from it.
func (p *Plan) AddRule(h netstate.Host, r netstate.Rule) {
	rules, err := h.Precede(r)
	p.State.Rules = append(p.State.Rules, rules...)
	if err != nil && !slices.Contains(p.Problems, err.Error()) {
		p.Problems = append(p.Problems, err.Error())
	}
}

// LimitMTU lowers the pod MTU to what gets through in one more family, and returns that.
func (p *Plan) LimitMTU(in Input, f addr.Family) int {
	under, b := in.Underlay.Get(f), in.Config.Backend
	mtu := PodMTU(b, f, under.MTU)
	if b.MTU > under.MTU {
		// The same for both families over one device.
		if s := fmt.Sprintf(
			"Backend.MTU is %d, but %s has an MTU of %d, which is used: larger packets cannot leave the node", b.MTU,
			under.By(), under.MTU); !slices.Contains(p.Problems, s) {
			p.Problems = append(p.Problems, s)
		}
	}
	if p.MTU == 0 || mtu < p.MTU {
		p.MTU = mtu
	}
	return mtu
}

// PodMTU is the largest packet of a pod that leaves by an underlay of an MTU. Backend.MTU bounds what leaves, headers
// of the tunnel included; where it is more than the underlay takes, the underlay decides, so that pods never learn an
// MTU that does not get through.
func PodMTU(b subnet.Backend, f addr.Family, underlay int) int {
	outer := underlay
	if b.MTU != 0 {
		outer = min(outer, b.MTU)
	}
	return outer - b.Overhead(f)
}
