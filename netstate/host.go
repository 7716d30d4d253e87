package netstate

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/overlayd/overlayd/addr"
)

// Host is what of the node's network is not ours but decisions depend on: a value, gathered in one go.
type Host struct {
	Links     []HostLink
	Addresses []HostAddress
	IPv6      bool        // the kernel has it at all
	Routes    []HostRoute // unicast routes of the main table that are not ours
	Rules     []HostRule  // in the order in which the kernel asks them, those of IPv4 first

	local   map[netip.Addr]struct{}
	tunnels []string              // the devices that are ours
	best    map[netip.Prefix]span // in Routes: the next hops of the one with the lowest metric
	lengths addr.Per[[]int]       // of the prefixes in best
}

// span is a part of a list, without the end.
type span struct{ from, to int }

// HostLink is any device of the node.
type HostLink struct {
	Index    int
	Name     string
	AltNames string // one in each line: a HostLink is comparable
	Kind     string // as `ip -d link` has it: "bridge", "veth", "vxlan"; "device" for one without
	Master   string // the bridge, bond or VRF that it is a port of
	Tunnel   bool   // a tunnel device of ours
	MTU      int
	Up       bool
	Loopback bool
	VXLAN    VXLAN // of a VXLAN device; the zero value otherwise
}

// HostAddress is an address configured on a device, with the prefix length it has there.
type HostAddress struct {
	Link   string
	Prefix netip.Prefix
	// Fleeting is an address that may not stay or can't be used yet: temporary, deprecated, tentative, or failed in
	// duplicate detection.
	Fleeting bool
	Tunnel   bool // it is on a device of ours
}

// HostRoute is a unicast route of the main table, or one that drops packets. A route with several next hops is one
// HostRoute for each of them, one behind the other.
type HostRoute struct {
	Dst    netip.Prefix
	Via    netip.Addr // the gateway, maybe of the other family; the zero Addr: on-link
	Link   string
	Src    netip.Addr // the source address that it prefers; the zero Addr: none
	Metric uint32
	// Multipath says that this is one next hop of several.
	Multipath bool
	// Drops is a route that throws packets away: a blackhole, or one that answers "unreachable" or "prohibited".
	Drops bool
	// Advertised is a route that came with a router advertisement.
	Advertised bool
}

// Equal reports whether two observations of the host are the same.
func (h Host) Equal(o Host) bool {
	return h.IPv6 == o.IPv6 && slices.Equal(h.Links, o.Links) && slices.Equal(h.Addresses, o.Addresses) &&
		slices.Equal(h.Routes, o.Routes) && slices.Equal(h.Rules, o.Rules)
}

// external is the host without what is on our tunnel devices.
func (h Host) external() Host {
	h.Links = reject(h.Links, func(l HostLink) bool { return l.Tunnel })
	h.Addresses = reject(h.Addresses, func(a HostAddress) bool { return a.Tunnel })
	h.Routes = reject(h.Routes, func(r HostRoute) bool { return h.IsTunnel(r.Link) })
	return h
}

// Names are all by which a device is known.
func (l HostLink) Names() []string {
	if l.AltNames == "" {
		return []string{l.Name}
	}
	return append(strings.Split(l.AltNames, "\n"), l.Name)
}

// HasName reports whether a name means the device.
func (l HostLink) HasName(name string) bool { return slices.Contains(l.Names(), name) }

// Link finds a device by name.
func (h Host) Link(name string) (HostLink, bool) {
	i := slices.IndexFunc(h.Links, func(l HostLink) bool { return l.Name == name })
	if i < 0 {
		return HostLink{}, false
	}
	return h.Links[i], true
}

// linkAt is the device with an index; the zero value where there is none.
func (h Host) linkAt(index int) HostLink {
	if i := slices.IndexFunc(h.Links, func(l HostLink) bool { return l.Index == index }); i >= 0 {
		return h.Links[i]
	}
	return HostLink{}
}

// IsTunnel reports whether a device is a tunnel device of ours.
func (h Host) IsTunnel(device string) bool { return slices.Contains(h.tunnels, device) }

// carries reports whether an address or a route is on a device, of link-local ones apart.
func (h Host) carries(name string) bool {
	onAddress := func(a HostAddress) bool { return a.Link == name && !a.Prefix.Addr().IsLinkLocalUnicast() }
	onRoute := func(r HostRoute) bool { return r.Link == name && !r.Dst.Addr().IsLinkLocalUnicast() }
	return slices.ContainsFunc(h.Addresses, onAddress) || slices.ContainsFunc(h.Routes, onRoute)
}

// Has reports whether an address is configured on the node.
func (h Host) Has(a netip.Addr) bool {
	_, ok := h.local[a]
	return ok
}

// Source reports whether the kernel takes an address as the preferred source of routes in the main table: it is in use
// on this node, and not on a device of a VRF, whose addresses are not local to that table.
func (h Host) Source(a netip.Addr) bool {
	return slices.ContainsFunc(h.Addresses, func(o HostAddress) bool {
		l, _ := h.Link(o.Link)
		master, _ := h.Link(l.Master)
		return o.Prefix.Addr() == a && !o.Fleeting && master.Kind != "vrf"
	})
}

// Route finds the route that the main table has for an address: the longest prefix, and of those the lowest metric; of
// one with several next hops it is the first. It asks for each prefix length in use once, so that it stays quick for
// many addresses and many routes.
func (h Host) Route(a netip.Addr) (HostRoute, bool) {
	hops := h.NextHops(a)
	if len(hops) == 0 {
		return HostRoute{}, false
	}
	return hops[0], true
}

// NextHops lists the next hops of the route to an address: one, unless it is a multipath route. There is none without a
// route.
func (h Host) NextHops(a netip.Addr) []HostRoute {
	for _, bits := range h.lengths.Get(addr.FamilyOf(a)) {
		p, err := a.Prefix(bits)
		if s, ok := h.best[p]; ok && err == nil {
			return h.Routes[s.from:s.to]
		}
	}
	return nil
}

// EachRoute calls do with the next hops of each route.
func (h Host) EachRoute(do func(hops []HostRoute)) {
	for from := 0; from < len(h.Routes); {
		r, to := h.Routes[from], from+1
		same := func(o HostRoute) bool { return o.Multipath && o.Dst == r.Dst && o.Metric == r.Metric }
		for r.Multipath && to < len(h.Routes) && same(h.Routes[to]) {
			to++
		}
		do(h.Routes[from:to])
		from = to
	}
}

// AdvertisedBy lists the devices by which routes are learned from router advertisements.
func (h Host) AdvertisedBy() []string {
	var out []string
	for _, r := range h.Routes {
		if r.Advertised && !slices.Contains(out, r.Link) {
			out = append(out, r.Link)
		}
	}
	return out
}

// Indexed prepares the look-ups. A Host that was put together by hand needs it too.
func (h Host) Indexed() Host {
	h.local = make(map[netip.Addr]struct{}, len(h.Addresses))
	for _, a := range h.Addresses {
		h.local[a.Prefix.Addr()] = struct{}{}
	}
	h.tunnels = nil
	for _, l := range h.Links {
		if l.Tunnel {
			h.tunnels = append(h.tunnels, l.Name)
		}
	}
	h.best = make(map[netip.Prefix]span, len(h.Routes))
	h.lengths = addr.Per[[]int]{}
	at := 0
	h.EachRoute(func(hops []HostRoute) {
		r := hops[0]
		if b, ok := h.best[r.Dst]; !ok || r.Metric < h.Routes[b.from].Metric {
			h.best[r.Dst] = span{at, at + len(hops)}
		}
		at += len(hops)
		f := addr.FamilyOf(r.Dst.Addr())
		if ls := h.lengths.Get(f); !slices.Contains(ls, r.Dst.Bits()) {
			h.lengths.Set(f, append(ls, r.Dst.Bits()))
		}
	})
	for _, f := range addr.Families() {
		slices.SortFunc(h.lengths.Get(f), func(a, b int) int { return b - a }) // the longest first
	}
	return h
}
