package netstate

import (
	"net/netip"
	"slices"

	"github.com/overlayd/overlayd/addr"
)

// Host is what of the node's network is not ours but decisions depend on: a value, gathered in one go.
type Host struct {
	Links     []HostLink
	Addresses []HostAddress
	IPv6      bool        // the kernel has it at all
	Routes    []HostRoute // unicast routes of the main table that are not ours

	local   map[netip.Addr]struct{}
	best    map[netip.Prefix]HostRoute // the one with the lowest metric
	lengths addr.Per[[]int]            // of the prefixes in best
}

// HostLink is any device of the node.
type HostLink struct {
	Index    int
	Name     string
	MTU      int
	Up       bool
	Loopback bool
	VXLAN    VXLAN // of a VXLAN device; the zero value otherwise
}

// HostAddress is an address configured on a device, with the prefix length it has there.
type HostAddress struct {
	Link   string
	Prefix netip.Prefix
	// Fleeting is an address that may not stay or can't be used yet: temporary, deprecated, tentative, or failed in duplicate detection.
	Fleeting bool
	Tunnel   bool // it is on a device of ours
}

// HostRoute is a unicast route of the main table, or one that drops packets.
type HostRoute struct {
	Dst    netip.Prefix
	Via    netip.Addr // the zero Addr: on-link
	Link   string
	Metric uint32
	// Drops is a route that throws packets away: a blackhole, or one that answers "unreachable" or "prohibited".
	Drops bool
	// Advertised is a route that came with a router advertisement.
	Advertised bool
}

// Equal reports whether two looks at the host found the same.
func (h Host) Equal(o Host) bool {
	return h.IPv6 == o.IPv6 && slices.Equal(h.Links, o.Links) && slices.Equal(h.Addresses, o.Addresses) && slices.Equal(h.Routes, o.Routes)
}

// Link finds a device by name.
func (h Host) Link(name string) (HostLink, bool) {
	i := slices.IndexFunc(h.Links, func(l HostLink) bool { return l.Name == name })
	if i < 0 {
		return HostLink{}, false
	}
	return h.Links[i], true
}

// Has reports whether an address is configured on the node.
func (h Host) Has(a netip.Addr) bool {
	_, ok := h.local[a]
	return ok
}

// Route finds the route that the main table has for an address: the longest prefix, and of those the lowest metric. It asks
// for each prefix length in use once, so that it stays quick for many addresses and many routes.
func (h Host) Route(a netip.Addr) (HostRoute, bool) {
	for _, bits := range h.lengths.Get(addr.FamilyOf(a)) {
		p, err := a.Prefix(bits)
		if r, ok := h.best[p]; ok && err == nil {
			return r, true
		}
	}
	return HostRoute{}, false
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
	h.best = make(map[netip.Prefix]HostRoute, len(h.Routes))
	h.lengths = addr.Per[[]int]{}
	for _, r := range h.Routes {
		if b, ok := h.best[r.Dst]; !ok || r.Metric < b.Metric {
			h.best[r.Dst] = r
		}
		f := addr.FamilyOf(r.Dst.Addr())
		if ls := h.lengths.Get(f); !slices.Contains(ls, r.Dst.Bits()) {
			h.lengths.Set(f, append(ls, r.Dst.Bits()))
		}
	}
	for _, f := range addr.Families() {
		slices.SortFunc(h.lengths.Get(f), func(a, b int) int { return b - a }) // the longest first
	}
	return h
}
