// Package netstate is the kernel's network state as comparable values: what a node has, what it should have, and the
// changes that lead from the one to the other. It knows devices, addresses and routes, and nothing of leases.
package netstate

import (
	"cmp"
	"fmt"
	"net/netip"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/internal/sorted"
)

// State is the part of the kernel's network state that is ours. Desired, it says what there must be, and nothing
// else of ours; observed, it says what is there. The slices are in the order of their Compare methods and hold no
// two objects with one key.
type State struct {
	Links      []Link
	Sysctls    []Sysctl
	Addresses  []Address
	Neighbours []Neighbour
	FDB        []FDBEntry
	// TunnelPeers are those of WireGuard devices.
	TunnelPeers []TunnelPeer
	Routes      []Route
	Rules       []Rule
}

// Link is a VXLAN or WireGuard device that is up. Name is its key.
type Link struct {
	Name      string
	VXLAN     VXLAN     // zero for WireGuard
	WireGuard WireGuard // zero for VXLAN
	MAC       addr.MAC  // zero for WireGuard
	MTU       int
	Down      bool // only observed, never desired
}

// VXLAN is what makes a device the one it is: where any of it is wrong, the device is recreated.
type VXLAN struct {
	VNI      uint32
	Port     uint16     // UDP, on the underlay
	Local    netip.Addr // source address of the tunnels
	Underlay string     // the device that the tunnels are bound to; "": to none, or to one that is gone
	Learning bool
	GBP      bool
}

// Sysctl is one kernel setting. Path, its key, is below /proc/sys: "net/ipv4/ip_forward". A setting is never removed,
// only no longer kept.
type Sysctl struct{ Path, Value string }

// Address is an address on a link of ours. Both fields are its key.
type Address struct {
	Link   string
	Prefix netip.Prefix
}

// Neighbour is a permanent ARP or NDP entry on a link of ours, keyed by link and address.
type Neighbour struct {
	Link string
	IP   netip.Addr
	MAC  addr.MAC
}

// FDBEntry is a permanent forwarding entry of a VXLAN device: frames to MAC go to the VTEP at Dst. Keyed by link and
// MAC.
type FDBEntry struct {
	Link string
	MAC  addr.MAC
	Dst  netip.Addr
}

// Route is a unicast route with our protocol number. Table, Dst and Metric are its key.
type Route struct {
	Table  uint32 // MainTable, or one of our own
	Metric uint32 // beside Table, since there are thousands of routes: 8 bytes less each
	Dst    netip.Prefix
	Via    netip.Addr // the zero Addr: none, on-link
	Link   string
	OnLink bool       // take Via for reachable on Link, whatever the addresses there say
	Src    netip.Addr // of the node's own packets; the zero Addr: the kernel's choice, from the addresses of Link
}

// Routing tables and the mark of our own (iproute2's rt_tables and rt_protos; 118 is free there).
const (
	MainTable = 254
	OwnTable  = 118
	Protocol  = 118
)

// Compare orders links by key.
func (l Link) Compare(o Link) int { return cmp.Compare(l.Name, o.Name) }

// Compare orders settings by key. Forwarding comes last: the moment it is switched on, the kernel drops what it has
// learned from router advertisements on devices that were not told otherwise before.
func (s Sysctl) Compare(o Sysctl) int {
	rank := func(s Sysctl) int {
		if s.Path == Forwarding(addr.IPv6).Path {
			return 1
		}
		return 0
	}
	return cmp.Or(rank(s)-rank(o), cmp.Compare(s.Path, o.Path))
}

// Forwarding is the setting by which a node passes packets on.
func Forwarding(f addr.Family) Sysctl {
	if f == addr.IPv4 {
		return Sysctl{"net/ipv4/ip_forward", "1"}
	}
	return Sysctl{"net/ipv6/conf/all/forwarding", "1"}
}

// BridgeNetfilter has iptables see what crosses the bridges of this node. The setting is there once the module
// br_netfilter is loaded.
func BridgeNetfilter(f addr.Family) Sysctl {
	if f == addr.IPv4 {
		return Sysctl{"net/bridge/bridge-nf-call-iptables", "1"}
	}
	return Sysctl{"net/bridge/bridge-nf-call-ip6tables", "1"}
}

// Compare orders addresses by key.
func (a Address) Compare(o Address) int {
	return cmp.Or(cmp.Compare(a.Link, o.Link), addr.ComparePrefix(a.Prefix, o.Prefix))
}

// Compare orders neighbours by key.
func (n Neighbour) Compare(o Neighbour) int {
	if n.Link != o.Link {
		return cmp.Compare(n.Link, o.Link)
	}
	return n.IP.Compare(o.IP)
}

// Compare orders FDB entries by key.
func (e FDBEntry) Compare(o FDBEntry) int {
	if e.Link != o.Link {
		return cmp.Compare(e.Link, o.Link)
	}
	return e.MAC.Compare(o.MAC)
}

// Compare orders routes by key.
func (r Route) Compare(o Route) int {
	if r.Table != o.Table {
		return cmp.Compare(r.Table, o.Table)
	}
	if c := addr.ComparePrefix(r.Dst, o.Dst); c != 0 {
		return c
	}
	return cmp.Compare(r.Metric, o.Metric)
}

func (l Link) String() string {
	if l.wireGuard() {
		s := fmt.Sprintf("device %s wireguard port %d key %s", l.Name, l.WireGuard.Port, l.WireGuard.Key.Public())
		if l.Down {
			s += " down"
		}
		return fmt.Sprintf("%s mtu %d", s, l.MTU)
	}
	s := fmt.Sprintf("device %s vxlan id %d dstport %d local %s", l.Name, l.VXLAN.VNI, l.VXLAN.Port, l.VXLAN.Local)
	if l.VXLAN.Underlay != "" {
		s += " dev " + l.VXLAN.Underlay
	}
	for _, flag := range []struct {
		on   bool
		name string
	}{{l.VXLAN.Learning, " learning"}, {l.VXLAN.GBP, " gbp"}, {l.Down, " down"}} {
		if flag.on {
			s += flag.name
		}
	}
	return fmt.Sprintf("%s address %s mtu %d", s, l.MAC, l.MTU)
}

func (s Sysctl) String() string  { return fmt.Sprintf("sysctl %s=%s", s.Path, s.Value) }
func (a Address) String() string { return fmt.Sprintf("address %s dev %s", a.Prefix, a.Link) }
func (n Neighbour) String() string {
	return fmt.Sprintf("neighbour %s lladdr %s dev %s", n.IP, n.MAC, n.Link)
}

func (e FDBEntry) String() string { return fmt.Sprintf("fdb %s dst %s dev %s", e.MAC, e.Dst, e.Link) }

func (r Route) String() string {
	s := fmt.Sprintf("route %s", r.Dst)
	if r.Via.IsValid() {
		s += fmt.Sprintf(" via %s", r.Via)
	}
	s += fmt.Sprintf(" dev %s", r.Link)
	if r.OnLink {
		s += " onlink"
	}
	if r.Src.IsValid() {
		s += fmt.Sprintf(" src %s", r.Src)
	}
	if r.Table != MainTable {
		s += fmt.Sprintf(" table %d", r.Table)
	}
	return s + fmt.Sprintf(" metric %d", r.Metric)
}

// Metric is the metric that the routes to a destination get, from 1 to 1023. The kernel finds the shared part of a
// route (fib_info) in a hash table by device and metric but not by gateway, so a thousand routes that differ in the
// gateway alone make one long chain; spread over the metrics, adding one costs the same at any number. Depends on the
// destination only, so that a route that changes its gateway is replaced in place.
func Metric(dst netip.Prefix) uint32 {
	const prime = 16777619 // of 32-bit FNV-1a
	h := uint32(2166136261)
	for _, b := range dst.Addr().AsSlice() {
		h = (h ^ uint32(b)) * prime
	}
	h ^= h >> 15
	return 1 + h%1023
}

// Sort brings the slices into order, which is what Diff wants.
func (s *State) Sort() {
	sorted.Sort(s.Links)
	sorted.Sort(s.Sysctls)
	sorted.Sort(s.Addresses)
	sorted.Sort(s.Neighbours)
	sorted.Sort(s.FDB)
	sorted.Sort(s.TunnelPeers)
	sorted.Sort(s.Routes)
	sorted.Sort(s.Rules)
}

// Counts tells how many objects of each kind there are.
func (s State) Counts() map[string]int {
	return map[string]int{
		string(kindLink): len(s.Links), string(kindSysctl): len(s.Sysctls), string(kindAddress): len(s.Addresses),
		string(kindNeighbour): len(s.Neighbours), string(kindFDB): len(s.FDB), string(kindRoute): len(s.Routes),
		string(kindTunnelPeer): len(s.TunnelPeers),
		string(kindRule):       len(s.Rules),
	}
}
