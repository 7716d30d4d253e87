// Package hostgw plans plain routes between nodes that share a network: the fastest way there is, with no tunnel at
// all.
package hostgw

import (
	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// Backend is the host-gw backend.
type Backend struct{}

// VTEPs is empty: there is no tunnel.
func (Backend) VTEPs(subnet.Config, subnet.Identity) addr.Per[subnet.VTEP] {
	return addr.Per[subnet.VTEP]{}
}

// Plan has a route for each peer on a network of this node, by way of the peer's own address. A peer behind a gateway
// can't be reached this way: the gateway knows nothing of pods.
func (Backend) Plan(in backend.Input) backend.Plan {
	var p backend.Plan
	for _, f := range in.Config.Families() {
		p.LimitMTU(in, f)
		p.AddRule(in.Host, netstate.ToMain(in.Config.Pools.Get(f).Network))
		p.Each(in, f, func(peer *subnet.Lease) {
			by, err := backend.OnLink(in.Host, peer.PublicIP.Get(f))
			if err != nil {
				p.Add(peer, f, backend.Unreachable, err)
				return
			}
			p.AddDirect(peer, f, by)
		})
	}
	p.State.Sort()
	return p
}
