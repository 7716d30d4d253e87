package doctor

import (
	"net/netip"
	"slices"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/netstate"
)

// uplinks are the devices by which packets to other nodes leave: those to which the routes to peers lead, and the one
// that the tunnel is bound to, or if it is bound to none, those of the default route. A tunnel device of ours is none.
func (f Facts) uplinks(fam addr.Family) []netstate.SurveyLink {
	var out []netstate.SurveyLink
	seen := map[string]bool{}
	add := func(name string) {
		if seen[name] {
			return
		}
		seen[name] = true
		if l, exists := f.Survey.Link(name); exists && !l.Tunnel {
			out = append(out, l)
		}
	}
	routes := func(to netip.Addr) {
		for _, r := range f.Survey.Host.NextHops(to) {
			if !r.Drops {
				add(r.Link)
			}
		}
	}
	if u := f.Underlay.By.Get(fam); u.Device != "" {
		add(u.Device)
	} else if u.Addr.IsValid() {
		routes(map[addr.Family]netip.Addr{addr.IPv4: netip.IPv4Unspecified(), addr.IPv6: netip.IPv6Unspecified()}[fam])
	}
	for _, p := range f.Peers {
		if p.publicIP.IsValid() && addr.FamilyOf(p.publicIP) == fam {
			routes(p.publicIP)
		}
	}
	return out
}

// arrivals are the devices on which packets of other nodes arrive: the one that has the address which they are sent to,
// or if nothing can arrive on that one, any by which packets leave.
func (f Facts) arrivals(fam addr.Family) []netstate.SurveyLink {
	at := f.reachedAt(fam)
	for _, a := range f.Survey.Host.Addresses {
		if a.Prefix.Addr() != at {
			continue
		}
		if l, exists := f.Survey.Link(a.Link); exists && !l.Loopback && l.Kind != "dummy" && !l.Tunnel {
			return []netstate.SurveyLink{l}
		}
	}
	return f.uplinks(fam)
}

// reachedAt is this node's address that packets of other nodes arrive with: the public IP, unless NAT puts another one
// in its place.
func (f Facts) reachedAt(fam addr.Family) netip.Addr {
	if ip := f.Underlay.PublicIP.Get(fam); f.Survey.Host.Has(ip) {
		return ip
	}
	return f.Underlay.By.Get(fam).Addr
}

// leavesBy reports whether a device leads to an address.
func (f Facts) leavesBy(device string, to netip.Addr) bool {
	return slices.ContainsFunc(f.Survey.Host.NextHops(to), func(r netstate.HostRoute) bool { return r.Link == device })
}
