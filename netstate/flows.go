package netstate

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// Flow is a packet as the kernel's routing sees it.
type Flow struct {
	To   netip.Addr
	From netip.Addr // the zero Addr: one of the node's own, without a source yet
	In   string     // the device that it comes by; "": it is the node's own
}

// Answer is what the kernel says about a Flow.
type Answer struct {
	Link  string
	Via   netip.Addr
	Table uint32
	Err   error // it is not sent at all
}

// Ask has the kernel route some packets, in the network namespace of the calling thread. Nothing is sent.
func (h Host) Ask(flows []Flow) ([]Answer, error) {
	kernel, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	defer kernel.Close()
	out := make([]Answer, 0, len(flows))
	for _, f := range flows {
		routes, err := kernel.RouteGetWithOptions(f.To.AsSlice(), &netlink.RouteGetOptions{SrcAddr: f.From.AsSlice(), Iif: f.In})
		a := Answer{Err: err}
		if err == nil && len(routes) > 0 {
			r := routes[0]
			via, _ := netip.AddrFromSlice(r.Gw)
			a = Answer{Link: h.linkAt(r.LinkIndex).Name, Via: via.Unmap(), Table: uint32(r.Table)}
			if a.Link == "" { // it came after the host was read
				return nil, fmt.Errorf("route to %s: no device with the index %d is known", f.To, r.LinkIndex)
			}
		}
		out = append(out, a)
	}
	return out, nil
}

// RuleOf finds the rule of another program by which a packet came to be answered so; false: it is none that can be
// told.
func (h Host) RuleOf(f Flow, a Answer) (HostRule, bool) {
	all := netip.PrefixFrom(unspecified(f.To.Is6()), 0)
	packet := Rule{From: all, To: addr.Host(f.To)}
	in := "lo"
	if f.In != "" {
		in = f.In
	}
	if f.From.IsValid() {
		packet.From = addr.Host(f.From)
	}
	i := slices.IndexFunc(h.Rules, func(r HostRule) bool {
		sourceless := r.From.Bits() > 0 && !f.From.IsValid() && !r.Not
		apart := sourceless || r.In != "" && r.In != in || r.Out != "" || r.marked()
		if apart || f.To.Is6() != r.From.Addr().Is6() || !r.selects(packet) {
			return false
		}
		if a.Err != nil {
			return r.drops() || r.diverts(packet)
		}
		return r.Action == RuleToTable && r.Table == a.Table
	})
	if i < 0 {
		return HostRule{}, false
	}
	return h.Rules[i], true
}
