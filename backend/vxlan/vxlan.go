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
	"strconv"
	"strings"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

const (
	maxDeviceName = 15 // IFNAMSIZ - 1, uapi/linux/if.h
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

// Plan has the device and, for each peer, the three entries of a tunnel or a plain route.
func (b Backend) Plan(in backend.Input) backend.Plan {
	n := len(in.Peers) * len(in.Config.Families())
	p := backend.NewPlan(n)
	p.State.FDB = make([]netstate.FDBEntry, 0, n)
	p.State.Neighbours = make([]netstate.Neighbour, 0, n)
	p.PlanTunnels(in, b)
	return p
}

// Device is a VXLAN device with the MAC that the lease announces.
func (Backend) Device(in backend.Input, f addr.Family) netstate.Link {
	under, b := in.Underlay.Get(f), in.Config.Backend
	return netstate.Link{
		Name: DeviceName(f, b.VNI), MAC: in.Self.VTEP.Get(f).MAC,
		VXLAN: netstate.VXLAN{
			VNI: b.VNI, Port: b.Port, Local: under.Addr, Underlay: under.Device, Learning: b.Learning, GBP: b.GBP,
		},
	}
}

// Peer plans the forwarding entry and the neighbour.
func (b Backend) Peer(p *backend.Plan, _ backend.Input, dev string, peer *subnet.Lease, f addr.Family) {
	mac := peer.VTEP.Get(f).MAC
	s := &p.State
	s.FDB = append(s.FDB, netstate.FDBEntry{Link: dev, MAC: mac, Dst: peer.PublicIP.Get(f)})
	s.Neighbours = append(s.Neighbours, netstate.Neighbour{Link: dev, IP: b.Gateway(peer, f), MAC: mac})
}

// Gateway is the address of the peer's device.
func (Backend) Gateway(peer *subnet.Lease, f addr.Family) netip.Addr { return peer.Gateway(f) }
