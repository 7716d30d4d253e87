// Package wireguard plans encrypted tunnels: one WireGuard device in each family, with a peer for each node. The device
// sends a packet to the peer whose allowed networks have its destination, and drops what does not come from the peer
// whose allowed networks have its source: the leases alone say who may send what.
package wireguard

import (
	"net/netip"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// DeviceName is the name of the device in one family.
func DeviceName(f addr.Family) string {
	if f == addr.IPv6 {
		return "overlay-wg-v6"
	}
	return "overlay-wg"
}

// Owns reports whether a device of this name is one of ours.
func Owns(name string) bool { return name == DeviceName(addr.IPv4) || name == DeviceName(addr.IPv6) }

// Backend is the WireGuard backend.
type Backend struct{}

// VTEPs is empty: the tunnels are not VXLAN's.
func (Backend) VTEPs(subnet.Config, subnet.Identity) addr.Per[subnet.VTEP] {
	return addr.Per[subnet.VTEP]{}
}

// Plan has the device and, for each node, a peer of it.
func (b Backend) Plan(in backend.Input) backend.Plan {
	n := len(in.Peers) * len(in.Config.Families())
	p := backend.NewPlan(n)
	p.State.TunnelPeers = make([]netstate.TunnelPeer, 0, n)
	p.PlanTunnels(in, b)
	return p
}

// Device is a WireGuard device with the key that the lease announces.
func (Backend) Device(in backend.Input, f addr.Family) netstate.Link {
	return netstate.Link{
		Name: DeviceName(f), WireGuard: netstate.WireGuard{Port: in.Config.Backend.ListenPort.Get(f), Key: in.Key},
	}
}

// Peer plans the peer, which may send from its pods and, where the address is its own, as the node itself.
func (Backend) Peer(p *backend.Plan, in backend.Input, dev string, peer *subnet.Lease, f addr.Family) {
	key, err := wgtypes.ParseKey(string(peer.PublicKey))
	if err != nil {
		return // it was parsed when the lease was read
	}
	ip, b := peer.PublicIP.Get(f), in.Config.Backend
	allowed := []netip.Prefix{peer.Subnets.Get(f)}
	if peer.PublicIPLocal {
		allowed = append(allowed, addr.Host(ip))
	}
	p.State.TunnelPeers = append(p.State.TunnelPeers, netstate.TunnelPeer{
		Link: dev, Key: key, Endpoint: netip.AddrPortFrom(ip, b.ListenPort.Get(f)), Roams: !peer.PublicIPLocal,
		Allowed: netstate.Allow(allowed...), Keepalive: uint16(b.Keepalive),
	})
}

// Gateway is none: the device knows by the destination to which peer a packet goes.
func (Backend) Gateway(*subnet.Lease, addr.Family) netip.Addr { return netip.Addr{} }
