package doctor

import (
	"fmt"
	"slices"

	"github.com/overlayd/overlayd/subnet"
)

// judgeLearning: a device that learns holds the sender's address of each frame against its entry for that MAC. One of
// ours is never changed, so that a frame from another address than the peer announces is dropped (vxlan_snoop in the
// kernel), and counted nowhere.
func judgeLearning(f Facts) []Finding {
	learns := f.Config != nil && f.Config.Backend.Type == subnet.VXLAN && f.Config.Backend.Learning
	for _, d := range f.devices() {
		learns = learns || d.there && d.link.VXLAN.Learning
	}
	if !learns {
		return ok("the tunnel device does not learn")
	}
	const dropped = "Backend.Learning is on: a node silently drops what a peer sends from another address " +
		"than it announces"
	var behind, silent []string
	if f.Store != nil {
		for _, e := range f.Store.Table.Entries {
			// flannel's leases don't say whether the address is the node's own.
			if e.Err == nil && e.Identity != f.Identity && e.NodeID != "" && !e.PublicIPLocal && f.tunnelled(e) {
				behind = append(behind, fmt.Sprintf("%s (%s)", e.Name(), subnet.FormatKey(e.Subnets)))
			}
		}
	}
	for _, p := range f.Pings.Sample {
		if p.way == "tunnel" && !p.answers() && !p.small.refused() {
			silent = append(silent, p.name)
		}
	}
	slices.Sort(silent)
	var out []Finding
	if own := f.ownEntry(); own != nil && !own.PublicIPLocal {
		const own = ": the address that this node announces is on none of its devices (NAT), " +
			"so peers drop what it sends"
		out = append(out, fail(dropped+own, f.noLearning())...)
	}
	if len(behind) > 0 {
		reason := fmt.Sprintf("%s: the address of %s is on no device of that node (NAT)", dropped, few(behind))
		out = append(out, fail(reason, f.noLearning())...)
	}
	if len(out) == 0 && len(silent) > 0 {
		reason := fmt.Sprintf("%s: that may be why %s does not answer", dropped, few(slices.Compact(silent)))
		out = append(out, warn(reason, f.noLearning())...)
	}
	return orOK(out, "it is on, and as far as is known, peers send from the addresses that they announce")
}

// tunnelled reports whether a lease's node is reached through the tunnel.
func (f Facts) tunnelled(e *subnet.Entry) bool {
	return slices.ContainsFunc(f.Peers, func(p peer) bool {
		return p.way == "tunnel" && (p.subnet == e.Subnets.V4 || p.subnet == e.Subnets.V6)
	})
}

// noLearning switches it off for all nodes.
func (f Facts) noLearning() string {
	if put := f.putBackend("Learning", false); put != "" {
		return put
	}
	return f.etcdctl("get " + f.prefix() + "/config")
}
