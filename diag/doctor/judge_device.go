package doctor

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

func needsOwnSubnet(f Facts) string {
	if f.Self.Subnets == (addr.Per[netip.Prefix]{}) {
		return cmp.Or(f.NoLease, "this node's lease is unknown")
	}
	return ""
}

func judgeTunnel(f Facts) (out findings) {
	switch {
	case f.backend() == subnet.HostGW:
		return ok("host-gw uses none")
	case f.NoLease != "" && len(f.Daemon.Status.Devices) == 0:
		return skipped("%s", f.NoLease)
	}
	var names []string
	for _, d := range f.tunnels() {
		names = append(names, d.name)
		out.add(f.judgeDevice(d))
	}
	if len(names) == 0 {
		return skipped("the network config is unknown")
	}
	return out.orOK("%s", strings.Join(names, " and "))
}

func (f Facts) judgeDevice(d tunnel) (out findings) {
	again, v := f.ifRunning("overlayd status"), d.link.VXLAN
	switch {
	case !d.exists:
		return fail("%s does not exist", d.name).steps(again)
	case d.wg != (d.link.Kind == "wireguard" || d.link.Kind == "tuntap"), !d.wg && d.link.Kind != "vxlan":
		return fail("%s is a %s device: overlayd needs the name for its tunnel device", d.name, d.link.Kind).
			fix("ip link delete %s", d.name)
	case !d.link.Up:
		if taken := f.portHolder(d); taken != nil {
			out.add(fail("%s is down, and cannot be set up while another program has its UDP port: see tunnel port", d.name).
				steps(taken[0].Fix...))
		} else {
			out.add(fail("%s is down", d.name).fix("ip link set %s up", d.name))
		}
	case d.wg: // its port and its key are part of the drift
	case v.VNI != d.vni || v.Port != d.port:
		out.add(fail("%s has VNI %d and UDP port %d, but the network uses %d and %d",
			d.name, v.VNI, v.Port, d.vni, d.port).steps(again))
	case d.local.IsValid() && (v.Underlay != d.underlay || v.Local != d.local):
		const none = "no device alone"
		out.add(fail("%s sends from %s over %s, expected from %s over %s", d.name,
			v.Local, cmp.Or(v.Underlay, none), d.local, cmp.Or(d.underlay, none)).steps(again))
	}
	if mac := d.link.MAC.String(); d.mac != "" && d.mac != mac {
		out.add(fail("%s has the MAC address %s, but the lease announces %s: packets from peers are dropped",
			d.name, mac, d.mac).fix("ip link set %s address %s", d.name, d.mac))
	}
	if s := ipv6Off(d.name); f.System.Sysctls[s] == "1" && d.family == addr.IPv6 {
		out.add(fail("IPv6 is disabled on %s", d.name).fix("sysctl -w %s=0", s))
	}
	return out
}

// judgePort finds who else has the UDP port or the VNI.
func judgePort(f Facts) (out findings) {
	ds := f.tunnels()
	switch {
	case f.backend() == subnet.HostGW:
		return ok("host-gw needs none")
	case len(ds) == 0:
		return skipped("the network config is unknown")
	}
	for _, d := range ds {
		var taken findings
		for _, l := range f.Survey.Links {
			v := l.VXLAN
			otherFamily := v.Local.IsValid() && v.Local.Is6() != (d.family == addr.IPv6)
			if l.Kind == "vxlan" && l.Name != d.name && v.Port == d.port && !otherFamily &&
				(v.VNI == d.vni || !d.exists && l.Up) {
				taken.add(fail("the VXLAN device %s has VNI %d on UDP port %d, so that the kernel refuses %s with VNI %d",
					l.Name, v.VNI, v.Port, d.name, d.vni).steps("ip link delete "+l.Name, f.Service.restart()))
			}
		}
		if taken == nil {
			taken = f.portHolder(d)
		}
		out.add(taken)
	}
	if ds[0].wg {
		return out.orOK("no other program uses UDP port %d", ds[0].port)
	}
	return out.orOK("no other program uses UDP port %d or VNI %d", ds[0].port, ds[0].vni)
}

// portHolder finds out whether another program has the port of a device which does not exist, or is down.
func (f Facts) portHolder(d tunnel) findings {
	if !slices.ContainsFunc(f.System.Sockets, func(s udpSocket) bool { return s.blocks(d) }) {
		return nil
	}
	out := fail("UDP port %d is taken by another program", d.port).fix("ss -ulnp 'sport = :%d'   # names it", d.port)
	if d.exists {
		out.fix("ip link set %s up   # once that program has released the port", d.name)
	}
	return out
}

func judgeMTU(f Facts) (out findings) {
	var well []string
	for _, d := range f.tunnels() {
		links := f.uplinks(d.family)
		if !d.exists || len(links) == 0 {
			continue
		}
		under := slices.MinFunc(links, func(a, b netstate.SurveyLink) int { return a.MTU - b.MTU })
		room := backend.PodMTU(subnet.Backend{Type: f.backend()}, d.family, under.MTU)
		well = append(well, fmt.Sprintf("%s %d over %s %d", d.name, d.link.MTU, under.Name, under.MTU))
		switch {
		case d.link.MTU > room:
			out.add(fail("%s has an MTU of %d, but %s with %d carries only %d",
				d.name, d.link.MTU, under.Name, under.MTU, room).fix("ip link set %s mtu %d", d.name, room))
		case d.mtu > 0 && d.link.MTU != d.mtu:
			out.add(fail("%s has an MTU of %d, expected %d", d.name, d.link.MTU, d.mtu).
				fix("ip link set %s mtu %d", d.name, d.mtu))
		}
	}
	most := f.podMTU()
	for _, b := range f.bridges() {
		if most > 0 && b.MTU > most {
			out.add(warn("%s has an MTU of %d, more than the %d that get through to other nodes", b.Name, b.MTU, most).
				fix("ip link set %s mtu %d", b.Name, most))
		}
		var over, steps []string
		for _, l := range f.Survey.Links {
			if most > 0 && l.Master == b.Name && l.MTU > most {
				over = append(over, fmt.Sprintf("%s %d", l.Name, l.MTU))
				steps = append(steps, fmt.Sprintf("ip link set %s mtu %d", l.Name, most))
			}
		}
		if len(over) > 0 {
			out.add(warn("%d ports of %s have a larger MTU than the %d that get through: their pods were created with "+
				"another pod MTU; recreate them (%s)", len(over), b.Name, most, few(over)).steps(steps[:min(3, len(steps))]...))
		}
	}
	return out.orOK("%s", cmp.Or(strings.Join(well, "; "), "no tunnel device to compare"))
}

// judgeBridge: whatever pods are on has an address of this node's subnet, and what it had before.
func judgeBridge(f Facts) (out findings) {
	_, lost := netstate.FollowBridges(f.Persisted.Bridges, f.Survey.Host, f.Self.Subnets)
	for _, l := range lost {
		out.add(fail("%s", l).steps(l.Commands()...))
	}
	pods := false
	for _, b := range f.bridges() {
		pods = pods || b.Kind == "bridge"
		if !b.Up && !slices.ContainsFunc(lost, func(l netstate.BridgeLoss) bool { return l.Bridge == b.Name }) {
			out.add(fail("%s is down: pods cannot send", b.Name).fix("ip link set %s up", b.Name))
		}
	}
	for _, a := range f.Survey.Host.Addresses {
		fam := addr.FamilyOf(a.Prefix.Addr())
		own, l := f.Self.Subnets.Get(fam), f.device(a.Link)
		if a.Tunnel || !own.IsValid() || own.Contains(a.Prefix.Addr()) || l.Kind != "bridge" ||
			!f.network(fam).Contains(a.Prefix.Addr()) {
			continue
		}
		reason := fmt.Sprintf("%s has the address %s, but this node's subnet is %s: ", a.Link, a.Prefix, own)
		if pods { // those of this node are on another one
			out.add(fail("%sits containers have addresses that lead to another node; configure another network in the "+
				"program that created it (such as Docker)", reason).
				steps("ip -br link show master "+a.Link, "ip -d link show "+a.Link))
		} else {
			out.add(fail("%sits pods have addresses that lead to another node; recreate the bridge and the pods", reason).
				steps("ip link delete "+a.Link+"   # if pods are on it", "ls /var/lib/cni/networks   # and remove the "+
					"directory of the pods' network, then start the pods of this node again"))
		}
	}
	if names := namesOf(f.bridges()); len(names) > 0 {
		return out.orOK("%s has an address of this node's subnet", strings.Join(names, " and "))
	}
	return out.orOK("none yet (the first pod creates it)")
}

func (f Facts) device(name string) netstate.SurveyLink {
	l, _ := f.Survey.Link(name)
	return l
}

// bridgeOf is a device that has an address inside this node's own subnet, as the pods' bridge does.
func (f Facts) bridgeOf(fam addr.Family) netstate.SurveyLink {
	for _, a := range f.Survey.Host.Addresses {
		if !a.Tunnel && f.Self.Subnets.Get(fam).Contains(a.Prefix.Addr()) {
			return f.device(a.Link)
		}
	}
	return netstate.SurveyLink{}
}

// judgeOffloads warns of what was switched off: it costs, and may be meant.
func judgeOffloads(f Facts) (out findings) {
	var names []string
	for _, d := range f.tunnels() {
		names = append(append(names, namesOf(f.uplinks(d.family))...), d.name)
	}
	if len(names) == 0 {
		return skipped("no tunnel device")
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		var off []string
		for _, o := range f.device(name).Offloads {
			if !o.On && slices.Contains([]string{"tx", "gso", "gro"}, o.Name) {
				off = append(off, o.Name)
			}
		}
		if len(off) > 0 {
			out.add(warn("%s has %s disabled, which costs throughput; fine as a workaround for broken hardware",
				name, strings.Join(off, ", ")).fix("ethtool -K %s %s on", name, strings.Join(off, " on ")))
		}
	}
	return out.orOK("checksums, gso and gro are on; if pings work and TCP does not, see Documentation/doctor.md")
}

// judgeLearning: a device that learns holds the sender's address of each frame against its entry for that MAC. One of
// ours is never changed, so that a frame from another address than the peer announces is dropped (vxlan_snoop in the
// kernel), and counted nowhere.
func judgeLearning(f Facts) (out findings) {
	learns := f.Config != nil && f.Config.Backend.Type == subnet.VXLAN && f.Config.Backend.Learning
	for _, d := range f.tunnels() {
		learns = learns || d.exists && d.link.VXLAN.Learning
	}
	if !learns {
		return ok("the tunnel device does not learn")
	}
	const dropped = "Backend.Learning is on: a node silently drops what a peer sends from another address than it " +
		"announces"
	off := cmp.Or(f.putBackend("Learning", false), f.showConfig())
	var behind []string
	if f.Store != nil {
		for _, e := range f.Store.Table.Entries {
			tunnelled := func(p peer) bool {
				return p.path == pathTunnel && (p.subnet == e.Subnets.V4 || p.subnet == e.Subnets.V6)
			}
			// flannel's leases don't say whether the address is the node's own.
			if e.Err == nil && e.Identity != f.Identity && e.NodeID != "" && !e.PublicIPLocal &&
				slices.ContainsFunc(f.Peers, tunnelled) {
				behind = append(behind, fmt.Sprintf("%s (%s)", e.Name(), e.Key))
			}
		}
	}
	if own := f.ownEntry(); own != nil && !own.PublicIPLocal {
		out.add(fail(dropped + "; no device of this node has the address that it announces (NAT), so peers drop what it " +
			"sends").steps(off))
	}
	if len(behind) > 0 {
		out.add(fail(dropped+"; no device of these nodes has the address that they announce (NAT): %s", few(behind)).
			steps(off))
	}
	return out.orOK("it is on; as far as leases tell, peers send from the addresses that they announce")
}

// judgeLeftovers finds devices that other overlays make, and flannel's rules.
func judgeLeftovers(f Facts) (out findings) {
	var names, steps []string
	for _, l := range f.Survey.Links {
		for _, prefix := range []string{
			"flannel.", "flannel-v6.", "flannel-wg", "cilium_", "vxlan.calico", "vxlan-v6.calico", "weave", "antrea-",
			"kube-bridge", "tunl0",
		} {
			if strings.HasPrefix(l.Name, prefix) && (l.Name != "tunl0" || l.Up) { // tunl0 comes with the module ipip
				names, steps = append(names, l.Name), append(steps, "ip link delete "+l.Name+"   # if it is unused")
			}
		}
	}
	if len(names) > 0 {
		out.add(warn("other overlays' devices exist, whose routes and rules may interfere: %s", few(names)).
			steps(steps...))
	}
	out.add(f.flannelRules())
	return out.orOK("none")
}

// flannelRules finds flannel's chains of iptables, and its tables with EnableNFTables.
func (f Facts) flannelRules() findings {
	fixes := map[string]string{} // by what there is
	// In one step, with what calls the chain: nothing else of the table is written again.
	chain := func(name, save, table, chain string) {
		const script = "{ echo '*%[1]s'; %[2]s -t %[1]s | sed -n '/%[3]s/s/^-A/-D/p'; echo '-X %[3]s'; echo COMMIT; } | " +
			"%[4]s --noflush"
		if strings.HasPrefix(chain, "FLANNEL-") {
			fixes[name] = fmt.Sprintf(script, table, save, chain, strings.Replace(save, "-save", "-restore", 1))
		}
	}
	for _, c := range f.Filter {
		if c.Table == "flannel-ipv4" || c.Table == "flannel-ipv6" {
			name := fmt.Sprintf("table %s %s", c.Family, c.Table)
			fixes[name] = "nft delete " + name
		}
		save := map[string]string{"ip": "iptables-save", "ip6": "ip6tables-save"}[c.Family]
		chain(c.String(), save, c.Table, c.Name)
	}
	for _, c := range f.Legacy {
		chain(fmt.Sprintf("%s -t %s, chain %s", c.Save, c.Table, c.Chain), c.Save, c.Table, c.Chain)
	}
	if len(fixes) == 0 {
		return nil
	}
	return warn("flannel's rules exist: they masquerade packets from pods to nodes and accept forwarded packets. "+
		"If flanneld no longer runs here, remove them: %s", few(slices.Sorted(maps.Keys(fixes)))).
		steps(slices.Sorted(maps.Values(fixes))...)
}
