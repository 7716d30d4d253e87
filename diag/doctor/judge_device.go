package doctor

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

func deviceChecks() []check {
	return []check{
		{"tunnel device", judgeTunnel},
		{"VXLAN port", judgePort},
		{"MTU", judgeMTU},
		{"bridge", judgeBridge},
		{"offloads", judgeOffloads},
		{"learning", judgeLearning},
		{"other overlays", judgeLeftovers},
	}
}

func judgeTunnel(f Facts) []Finding {
	switch {
	case f.Errs["devices"] != nil:
		return skipped(f.Errs["devices"].Error())
	case f.backend() == subnet.HostGW:
		return ok("host-gw uses none")
	case f.NoLease != "" && len(f.Daemon.Status.Devices) == 0:
		return skipped(f.NoLease)
	}
	var out []Finding
	var names []string
	for _, d := range f.devices() {
		names = append(names, d.name)
		again := f.Service.start()
		if f.Daemon.Running {
			again = "overlayd status"
		}
		v := d.link.VXLAN
		switch {
		case !d.there:
			out = append(out, fail(d.name+" does not exist", again)...)
			continue
		case d.link.Kind != "vxlan":
			out = append(out, fail(fmt.Sprintf("%s is a %s device, which blocks the tunnel device of this name", d.name, d.link.Kind), "ip link delete "+d.name)...)
			continue
		case !d.link.Up && len(f.portHolder(d)) > 0:
			out = append(out, fail(d.name+" is down, and cannot be set up while another program has its UDP port: see VXLAN port", f.portHolder(d)[0].Fix...)...)
		case !d.link.Up:
			out = append(out, fail(d.name+" is down", "ip link set "+d.name+" up")...)
		case v.VNI != d.vni || v.Port != d.port:
			out = append(out, fail(fmt.Sprintf("%s has VNI %d and UDP port %d, but the network uses %d and %d", d.name, v.VNI, v.Port, d.vni, d.port), again)...)
		case d.local.IsValid() && (v.Underlay != d.underlay || v.Local != d.local):
			by := func(device string) string { return orDefault(device, "no device alone") }
			out = append(out, fail(fmt.Sprintf("%s sends from %s over %s, expected from %s over %s",
				d.name, v.Local, by(v.Underlay), d.local, by(d.underlay)), again)...)
		}
		if mac := f.announced(d); mac != "" && mac != d.link.MAC.String() {
			out = append(out, fail(fmt.Sprintf("%s has the MAC address %s, but the lease announces %s: packets from peers are dropped", d.name, d.link.MAC, mac), "ip link set "+d.name+" address "+mac)...)
		}
		if s := ipv6Off(d.name); f.System.Sysctls[s] == "1" && d.family == addr.IPv6 {
			out = append(out, fail("IPv6 is disabled on "+d.name, "sysctl -w "+s+"=0")...)
		}
	}
	if len(names) == 0 {
		return skipped("the network config is unknown")
	}
	return orOK(out, strings.Join(names, " and "))
}

// announced is the MAC address that the others send to.
func (f Facts) announced(d tunnel) string {
	if d.mac != "" {
		return d.mac
	}
	if m := f.Self.VTEP.Get(d.family).MAC; !m.IsZero() {
		return m.String()
	}
	return ""
}

// judgePort looks for who else has the UDP port or the VNI.
func judgePort(f Facts) []Finding {
	if f.Errs["devices"] != nil {
		return skipped(f.Errs["devices"].Error())
	}
	ds := f.devices()
	if len(ds) == 0 {
		if f.backend() == subnet.HostGW {
			return ok("host-gw needs none")
		}
		return skipped("the network config is unknown")
	}
	var out []Finding
	for _, d := range ds {
		taken := false
		for _, l := range f.Survey.Links {
			v := l.VXLAN
			if l.Kind != "vxlan" || l.Name == d.name || v.Port != d.port || v.Local.IsValid() && v.Local.Is6() != (d.family == addr.IPv6) {
				continue
			}
			switch {
			case v.VNI == d.vni:
				taken = true
				out = append(out, fail(fmt.Sprintf("the VXLAN device %s has VNI %d on UDP port %d, which overlayd needs: the kernel allows only one such device", l.Name, v.VNI, v.Port), "ip link delete "+l.Name, f.Service.restart())...)
			case !d.there && l.Up:
				taken = true
				out = append(out, fail(fmt.Sprintf("the VXLAN device %s is on UDP port %d with other settings", l.Name, v.Port), "ip link delete "+l.Name, f.Service.restart())...)
			}
		}
		if !taken {
			out = append(out, f.portHolder(d)...)
		}
	}
	return orOK(out, fmt.Sprintf("no other program uses UDP port %d or VNI %d", ds[0].port, ds[0].vni))
}

// portHolder names the program that has the port of a device which is not there, or down.
func (f Facts) portHolder(d tunnel) []Finding {
	for _, s := range f.System.Sockets {
		if !s.inTheWayOf(d) {
			continue
		}
		who := orDefault(s.holder, "another program")
		steps := []string{fmt.Sprintf("ss -ulnp 'sport = :%d'", d.port)}
		if d.there {
			steps = append(steps, "ip link set "+d.name+" up   # once that program has released the port")
		}
		return fail(fmt.Sprintf("UDP port %d is taken by %s", d.port, who), steps...)
	}
	return nil
}

func judgeMTU(f Facts) []Finding {
	if f.Errs["devices"] != nil {
		return skipped(f.Errs["devices"].Error())
	}
	var out []Finding
	said := []string{}
	for _, d := range f.devices() {
		if !d.there {
			continue
		}
		links := f.uplinks(d.family)
		if len(links) == 0 {
			continue
		}
		under := slices.MinFunc(links, func(a, b netstate.SurveyLink) int { return a.MTU - b.MTU })
		room := backend.PodMTU(subnet.Backend{Type: subnet.VXLAN}, d.family, under.MTU)
		said = append(said, fmt.Sprintf("%s %d over %s %d", d.name, d.link.MTU, under.Name, under.MTU))
		switch {
		case d.link.MTU > room:
			out = append(out, fail(fmt.Sprintf("%s has an MTU of %d, but %s with %d carries only %d", d.name, d.link.MTU, under.Name, under.MTU, room), fmt.Sprintf("ip link set %s mtu %d", d.name, room))...)
		case d.mtu > 0 && d.link.MTU != d.mtu:
			out = append(out, fail(fmt.Sprintf("%s has an MTU of %d, expected %d", d.name, d.link.MTU, d.mtu), fmt.Sprintf("ip link set %s mtu %d", d.name, d.mtu))...)
		}
	}
	want := f.podMTU()
	for _, b := range f.bridges() {
		if want == 0 {
			break
		}
		if b.MTU > want {
			out = append(out, warn(fmt.Sprintf("%s has an MTU of %d, more than the %d that get through to other nodes", b.Name, b.MTU, want), fmt.Sprintf("ip link set %s mtu %d", b.Name, want))...)
		}
		out = append(out, f.ports(b, want)...)
	}
	return orOK(out, orDefault(strings.Join(said, "; "), "no tunnel device to compare"))
}

// ports are the devices by which pods are on a bridge.
func (f Facts) ports(bridge netstate.SurveyLink, want int) []Finding {
	var over []string
	steps := []string{}
	for _, l := range f.Survey.Links {
		if l.Master == bridge.Name && l.MTU > want {
			over = append(over, fmt.Sprintf("%s %d", l.Name, l.MTU))
			if len(steps) < 3 {
				steps = append(steps, fmt.Sprintf("ip link set %s mtu %d", l.Name, want))
			}
		}
	}
	if len(over) == 0 {
		return nil
	}
	return warn(fmt.Sprintf("%d ports of %s have a larger MTU than the %d that get through: their pods were created with another pod MTU; recreate them (%s)", len(over), bridge.Name, want, few(over)), steps...)
}

// judgeBridge: whatever pods are on has an address of this node's subnet.
func judgeBridge(f Facts) []Finding {
	if f.Errs["devices"] != nil {
		return skipped(f.Errs["devices"].Error())
	}
	if f.Self.Subnets == (addr.Per[netip.Prefix]{}) {
		return skipped(orDefault(f.NoLease, "this node's lease is unknown"))
	}
	lost := f.lostByBridges()
	var out []Finding
	for _, l := range lost {
		out = append(out, fail(l.String()+f.byManager(l), l.Commands()...)...)
	}
	if len(lost) == 0 {
		out = f.withoutGateway()
	}
	names := []string{}
	for _, b := range f.bridges() {
		names = append(names, b.Name)
		if !b.Up && !slices.ContainsFunc(lost, func(l netstate.BridgeLoss) bool { return l.Bridge == b.Name }) {
			out = append(out, fail(b.Name+" is down: pods cannot send", "ip link set "+b.Name+" up")...)
		}
	}
	ours := slices.ContainsFunc(f.bridges(), func(b netstate.SurveyLink) bool { return b.Kind == "bridge" })
	for _, a := range f.Survey.Host.Addresses {
		fam := addr.FamilyOf(a.Prefix.Addr())
		own, network := f.Self.Subnets.Get(fam), f.network(fam)
		l, _ := f.Survey.Link(a.Link)
		if a.Tunnel || !own.IsValid() || own.Contains(a.Prefix.Addr()) || l.Kind != "bridge" {
			continue
		}
		if !network.IsValid() || !network.Contains(a.Prefix.Addr()) {
			continue
		}
		reason := fmt.Sprintf("%s has the address %s, but this node's subnet is %s: ", a.Link, a.Prefix, own)
		if ours { // that of the pods is another one
			out = append(out, fail(reason+"its containers have addresses that lead to another node; configure another network in the program that created it (such as Docker)",
				"ip -br link show master "+a.Link, "ip -d link show "+a.Link)...)
		} else {
			out = append(out, fail(reason+"its pods have addresses that lead to another node; recreate the bridge and the pods", f.anew(a)...)...)
		}
	}
	if len(out) == 0 && len(names) == 0 {
		return ok("none yet (the first pod creates it)")
	}
	return orOK(out, strings.Join(names, " and ")+" has an address of this node's subnet")
}

// anew removes a bridge, and what the plugin host-local remembers of the addresses on it: only where it is known under which name.
func (f Facts) anew(a netstate.HostAddress) []string {
	const again = "   # then start the pods of this node again"
	bridge := "ip link delete " + a.Link + "   # if pods are on it"
	for _, n := range f.System.CNI {
		if n.within(a.Prefix.Masked()) {
			return []string{bridge, "rm -rf " + n.dir + again}
		}
	}
	return []string{bridge, "ls /var/lib/cni/networks   # and remove the directory of the pods' network," + strings.TrimPrefix(again, "   #")}
}

// lostByBridges is what the pods' bridges have no longer that the daemon has seen on them.
func (f Facts) lostByBridges() []netstate.BridgeLoss {
	if f.Memory == nil {
		return nil
	}
	_, lost := netstate.FollowBridges(f.Memory.Bridges, f.Survey.Host, f.Self.Subnets)
	return lost
}

// byManager names the program that most likely took it: one that configures the devices on which pods are.
func (f Facts) byManager(l netstate.BridgeLoss) string {
	var names []string
	if m := f.System.Managers; m.Networkd && m.NetworkFile != "" {
		names = append(names, "systemd-networkd")
	}
	if m := f.System.Managers; m.NetworkManager && (m.NMManages != "" || !m.NMAnswers && !m.NMIgnores) {
		names = append(names, "NetworkManager")
	}
	if len(names) == 0 || len(l.Addrs)+len(l.Ports) == 0 {
		return ""
	}
	return "; another program removed it, see " + strings.Join(names, " and ")
}

// withoutGateway finds the bridge that pods are on where nothing has the address that is their gateway.
func (f Facts) withoutGateway() []Finding {
	if f.System.SubnetEnvErr != nil {
		return nil
	}
	var out []Finding
	for _, fam := range addr.Families() {
		own := f.Self.Subnets.Get(fam)
		if !own.IsValid() || slices.ContainsFunc(f.Survey.Host.Addresses, func(a netstate.HostAddress) bool { return !a.Tunnel && own.Contains(a.Prefix.Addr()) }) {
			continue
		}
		gateway := netip.PrefixFrom(own.Addr().Next(), own.Bits())
		for _, l := range f.Survey.Links {
			if l.Kind != "bridge" || !slices.ContainsFunc(f.Survey.Links, func(p netstate.SurveyLink) bool { return p.Master == l.Name && p.Kind == "veth" }) {
				continue
			}
			has := f.addressesOf(l.Name)
			ours := slices.ContainsFunc(f.bridges(), func(b netstate.SurveyLink) bool { return b.Name == l.Name })
			reason, steps := fmt.Sprintf("no device has the address %s, the gateway of this node's pods: %s, which has ports and no %s address, seems to have lost it", gateway, l.Name, fam), fmt.Sprintf("ip address add %s dev %s", gateway, l.Name)
			switch {
			case len(has) == 0 && l.Name == "cni0":
				out = append(out, fail(reason, steps)...)
			case len(has) == 0:
				out = append(out, warn(reason+", if pods are on it", steps)...)
			case ours && !slices.Contains(has, fam):
				out = append(out, warn(reason+fmt.Sprintf(", if pods are to have addresses of %s", fam), steps)...)
			}
		}
	}
	return out
}

// addressesOf lists the families of the addresses that a device has, but for those that are good on its own network only.
func (f Facts) addressesOf(device string) []addr.Family {
	var out []addr.Family
	for _, a := range f.Survey.Host.Addresses {
		if a.Link == device && !a.Prefix.Addr().IsLinkLocalUnicast() {
			out = append(out, addr.FamilyOf(a.Prefix.Addr()))
		}
	}
	return out
}

// network is the whole pod network.
func (f Facts) network(fam addr.Family) netip.Prefix {
	if f.Config != nil {
		return f.Config.Pools.Get(fam).Network
	}
	for _, n := range f.Daemon.Status.Network.Networks {
		if p := parsePrefix(n); p.IsValid() && addr.FamilyOf(p.Addr()) == fam {
			return p
		}
	}
	return parsePrefix(f.System.SubnetEnv[map[addr.Family]string{addr.IPv4: "FLANNEL_NETWORK", addr.IPv6: "FLANNEL_IPV6_NETWORK"}[fam]])
}

// judgeOffloads warns of what was switched off: it costs, and may be meant.
func judgeOffloads(f Facts) []Finding {
	var out []Finding
	seen := map[string]bool{}
	for _, d := range f.devices() {
		for _, name := range append(namesOf(f.uplinks(d.family)), d.name) {
			l, there := f.Survey.Link(name)
			if !there || seen[name] {
				continue
			}
			seen[name] = true
			var off []string
			for _, o := range l.Offloads {
				if !o.On && slices.Contains([]string{"tx", "gso", "gro"}, o.Name) {
					off = append(off, o.Name)
				}
			}
			if len(off) > 0 {
				out = append(out, warn(fmt.Sprintf("%s has %s disabled, which costs throughput; fine as a workaround for broken hardware", name, strings.Join(off, ", ")), fmt.Sprintf("ethtool -K %s %s on", name, strings.Join(off, " on ")))...)
			}
		}
	}
	if len(seen) == 0 {
		return skipped("no tunnel device")
	}
	return orOK(out, "checksums, gso and gro are on; if pings work and TCP does not, see Documentation/doctor.md")
}

// judgeLeftovers looks for devices that other overlays make, and for flannel's rules.
func judgeLeftovers(f Facts) []Finding {
	if f.Errs["devices"] != nil {
		return skipped(f.Errs["devices"].Error())
	}
	var names, steps []string
	for _, l := range f.Survey.Links {
		for _, prefix := range []string{"flannel.", "flannel-v6.", "flannel-wg", "cilium_", "vxlan.calico", "vxlan-v6.calico", "weave", "antrea-", "kube-bridge", "tunl0"} {
			if strings.HasPrefix(l.Name, prefix) && (l.Name != "tunl0" || l.Up) { // tunl0 comes with the module ipip
				names, steps = append(names, l.Name), append(steps, "ip link delete "+l.Name+"   # if it is unused")
			}
		}
	}
	var out []Finding
	if len(names) > 0 {
		out = append(out, warn("other overlays' devices exist, whose routes and rules may interfere: "+few(names),
			steps...)...)
	}
	return orOK(append(out, f.leftRules()...), "none")
}

// leftRules finds flannel's rules: chains of iptables, or tables of its own with EnableNFTables.
func (f Facts) leftRules() []Finding {
	var names, fix []string
	note := func(name, command string) {
		if !slices.Contains(names, name) {
			names, fix = append(names, name), append(fix, command)
		}
	}
	// In one step, with what calls the chain: nothing else of the table is written again.
	chain := func(name, save, table, chain string) {
		note(name, fmt.Sprintf("{ echo '*%s'; %s -t %s | sed -n '/%s/s/^-A/-D/p'; echo '-X %s'; echo COMMIT; } | %s --noflush",
			table, save, table, chain, chain, strings.Replace(save, "-save", "-restore", 1)))
	}
	for _, c := range f.Filter {
		switch {
		case c.Table == "flannel-ipv4" || c.Table == "flannel-ipv6":
			name := fmt.Sprintf("table %s %s", c.Family, c.Table)
			note(name, "nft delete "+name)
		case strings.HasPrefix(c.Name, "FLANNEL-"):
			save := "iptables-save"
			if c.Family == "ip6" {
				save = "ip6tables-save"
			}
			chain(c.String(), save, c.Table, c.Name)
		}
	}
	for _, c := range f.Legacy {
		if strings.HasPrefix(c.Chain, "FLANNEL-") {
			chain(fmt.Sprintf("%s -t %s, chain %s", c.Save, c.Table, c.Chain), c.Save, c.Table, c.Chain)
		}
	}
	if len(names) == 0 {
		return nil
	}
	slices.Sort(fix)
	return warn(
		"flannel's rules exist: they masquerade packets from pods to nodes and accept "+
			"forwarded packets. If flanneld no longer runs here, remove them: "+few(names), fix...)
}
