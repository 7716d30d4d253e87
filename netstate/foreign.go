package netstate

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// RouteConflict is a route of another program by which packets go where they must not.
type RouteConflict struct {
	Hops []HostRoute
	Peer netip.Prefix // whose route it precedes; not valid: it leads the tunnel's own packets into the tunnel
}

// RouteConflicts finds routes of other programs that packets to a peer's subnet take before ours: for the same
// destination with a better metric, or for a part of it. And those by which packets to the peers themselves would enter
// the tunnel: they never leave. It is pure.
func RouteConflicts(h Host, s State) []RouteConflict {
	var lengths []int
	for _, r := range s.Routes {
		if r.Table == MainTable && !slices.Contains(lengths, r.Dst.Bits()) {
			lengths = append(lengths, r.Dst.Bits())
		}
	}
	out := intoTunnel(h, s)
	h.EachRoute(func(hops []HostRoute) {
		r := hops[0]
		for _, bits := range lengths {
			p, err := r.Dst.Addr().Prefix(bits)
			if err != nil || bits > r.Dst.Bits() {
				continue
			}
			i, _ := slices.BinarySearchFunc(s.Routes, Route{Table: MainTable, Dst: p}, Route.Compare)
			if i == len(s.Routes) || s.Routes[i].Dst != p {
				continue
			}
			if bits < r.Dst.Bits() || r.Metric <= s.Routes[i].Metric {
				out = append(out, RouteConflict{hops, p})
			}
		}
	})
	return out
}

func intoTunnel(h Host, s State) []RouteConflict {
	var out []RouteConflict
	for _, r := range h.Routes {
		covers := func(e FDBEntry) bool { return r.Dst.Contains(e.Dst) }
		if !h.IsTunnel(r.Link) || r.Dst.Bits() > 0 && !slices.ContainsFunc(s.FDB, covers) {
			continue
		}
		if best := h.NextHops(r.Dst.Addr()); slices.Contains(best, r) { // no other comes before it
			out = append(out, RouteConflict{Hops: best})
		}
	}
	return out
}

// String names the route, and says what is wrong with it.
func (c RouteConflict) String() string {
	r, what := c.Hops[0], "precedes the route to the peer "+c.Peer.String()
	if !c.Peer.IsValid() {
		what = "leads the tunnel's own packets into the tunnel"
	}
	name := "the route that drops packets to " + r.Dst.String()
	if !r.Drops {
		var devices []string
		for _, hop := range c.Hops {
			if !slices.Contains(devices, hop.Link) {
				devices = append(devices, hop.Link)
			}
		}
		name = fmt.Sprintf("the route to %s by %s", r.Dst, strings.Join(devices, " and "))
	}
	return fmt.Sprintf("%s, metric %d, belongs to another program and %s", name, r.Metric, what)
}

// Command removes the route.
func (c RouteConflict) Command() string {
	r, command, device := c.Hops[0], "ip route del", ""
	if r.Dst.Addr().Is6() {
		command = "ip -6 route del"
	}
	if len(c.Hops) == 1 && !r.Drops {
		device = " dev " + r.Link
	}
	return fmt.Sprintf("%s %s%s metric %d", command, r.Dst, device, r.Metric)
}
