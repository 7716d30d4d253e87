package doctor

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/diag/doctor/packetfilter"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/netstate"
)

func hostChecks() []check {
	return []check{
		{"privileges", judgePrivileges},
		{"kernel", judgeSupport},
		{"forwarding", judgeForwarding},
		{"bridge netfilter", judgeBridgeFilter},
		{"IPv6", judgeIPv6},
		{"pings", judgeEcho},
		{"interface", judgeInterface},
		{"rp_filter", judgeRPFilter},
		{"routes", judgeRoutes},
		{"policy routing", judgePolicyRouting},
	}
}

func parsePrefix(s string) netip.Prefix {
	p, _ := netip.ParsePrefix(s)
	return p
}

func judgePrivileges(f Facts) []Finding {
	if f.Privileges != nil {
		return fail(f.Privileges.Error()+": many checks cannot run", "sudo overlayd doctor")
	}
	return ok("CAP_NET_ADMIN and CAP_NET_RAW are present")
}

func judgeSupport(f Facts) []Finding {
	if f.Privileges != nil {
		return skipped("needs privileges to test")
	}
	var out []Finding
	for _, what := range slices.Sorted(maps.Keys(f.Errs)) {
		out = append(out, warn(fmt.Sprintf("%s cannot be read: %v", what, f.Errs[what]))...)
	}
	for _, s := range f.System.Support {
		if errors.Is(s.err, unix.EPERM) { // in a container, for example
			out = append(out, skipped(fmt.Sprintf("%s: %v", s.what, s.err))...)
		} else if s.err != nil && s.steps == nil {
			out = append(out, warn(fmt.Sprintf("%s: %v", s.what, s.err))...)
		} else if s.err != nil {
			out = append(out, fail(fmt.Sprintf("%s: %v", s.what, s.err), s.steps...)...)
		}
	}
	return orOK(out, "all that is needed is available")
}

// families are those of the network; IPv4 where it is not known.
func (f Facts) families() []addr.Family {
	var out []addr.Family
	for _, fam := range addr.Families() {
		inUse := f.Config != nil && f.Config.Pools.Get(fam).On() || f.Self.Subnets.Get(fam).IsValid()
		if inUse {
			out = append(out, fam)
		}
	}
	if len(out) == 0 {
		out = []addr.Family{addr.IPv4}
	}
	return out
}

func judgeForwarding(f Facts) []Finding {
	var out []Finding
	for _, fam := range f.families() {
		s := netstate.Forwarding(fam)
		v, known := f.System.Sysctls[s.Path]
		switch {
		case !known:
			out = append(out, fail(fmt.Sprintf("the kernel has no setting %s: is %s disabled?", s.Path, fam))...)
		case v == "0":
			out = append(out, fixable(Fail, fmt.Sprintf("%s is 0: this node does not forward packets of pods", s.Path), f.forwardingFixes(fam)...)...)
		}
	}
	if len(out) == 0 && slices.Contains(f.families(), addr.IPv4) {
		for _, dev := range f.podDevices() {
			if f.System.Sysctls[deviceForwarding(dev)] == "0" {
				out = append(out, fixable(Fail, fmt.Sprintf("%s is 0: packets that arrive by %s are not forwarded", deviceForwarding(dev), dev), sysctlFix(deviceForwarding(dev), "1"))...)
			}
		}
	}
	return orOK(out, "it is on")
}

// judgeIPv6: overlayd sees to its own device, the bridge and the uplinks are those of other programs.
func judgeIPv6(f Facts) []Finding {
	if !slices.Contains(f.families(), addr.IPv6) {
		return skipped("the network has none")
	}
	var out []Finding
	for _, b := range f.bridges() {
		if s := ipv6Off(b.Name); f.System.Sysctls[s] == "1" {
			reason := fmt.Sprintf("disabled on %s, so pods have no gateway", b.Name)
			out = append(out, fixable(Fail, reason, sysctlFix(s, "0"))...)
		}
	}
	for _, l := range f.uplinks(addr.IPv6) {
		if s := ipv6Off(l.Name); f.System.Sysctls[s] == "1" { // its addresses and routes do not come back by themselves
			reason := fmt.Sprintf("disabled on %s, which leads to the other nodes", l.Name)
			out = append(out,
				fail(reason, "sysctl -w "+s+"=0   # and in /etc/sysctl.d; then give it its addresses and routes again")...)
		}
	}
	if s := ipv6Off("default"); f.System.Sysctls[s] == "1" {
		const reason = "disabled on new devices: the CNI plugin cannot give a new bridge its address"
		out = append(out, warn(reason, "sysctl -w "+s+"=0   # and in /etc/sysctl.d")...)
	}
	return orOK(out, "the pods' devices may have it")
}

// judgeEcho: pods don't depend on it, but what is seen of this node from outside does.
func judgeEcho(f Facts) []Finding {
	var out []Finding
	for _, fam := range f.families() {
		if s := ignoresPings(fam); f.System.Sysctls[s] == "1" {
			out = append(out,
				warn(s+" is 1: this node answers no pings, so other nodes cannot reliably tell whether it is up",
					fmt.Sprintf("sysctl -w %s=0", s))...)
		}
	}
	return orOK(out, "this node answers them")
}

// judgeBridgeFilter: kube-proxy sends what goes to a service to one of its pods. The answers of a pod on the same bridge don't pass the
// routing, and only where the packet filter sees them all the same is the address of the service put back into them.
func judgeBridgeFilter(f Facts) []Finding {
	const lost = "pods lose replies of services (including cluster DNS) whose endpoint is on the same node"
	if why := f.unreadable(); why != "" {
		return skipped(why)
	}
	pods := slices.ContainsFunc(f.bridges(), func(l netstate.SurveyLink) bool { return l.Kind == "bridge" })
	switch {
	case !f.kubeProxy():
		return skipped("no kube-proxy rules on this node")
	case !pods && !f.Service.inKubernetes():
		return skipped("no pod bridge")
	}
	var out []Finding
	for _, fam := range f.families() {
		v, known := f.System.Sysctls[netstate.BridgeNetfilter(fam).Path]
		if !known {
			return fail("the module br_netfilter is not loaded: "+lost, "modprobe br_netfilter && echo br_netfilter > /etc/modules-load.d/br_netfilter.conf")
		}
		if v == "0" {
			out = append(out, fixable(Fail, fmt.Sprintf("%s is 0: %s", netstate.BridgeNetfilter(fam).Path, lost), sysctlFix(netstate.BridgeNetfilter(fam).Path, "1"))...)
		}
	}
	return orOK(out, "kube-proxy's rules see bridged packets")
}

// kubeProxy reports whether kube-proxy has rules here: it is known by its chains in iptables, and by its table in nftables.
func (f Facts) kubeProxy() bool {
	names := []string{"KUBE-SERVICES", "KUBE-FORWARD"}
	return f.Filter.Has(names...) ||
		slices.ContainsFunc(f.Filter, func(c packetfilter.Chain) bool { return c.Table == "kube-proxy" }) ||
		slices.ContainsFunc(f.Legacy, func(c packetfilter.Legacy) bool { return slices.Contains(names, c.Chain) })
}

// forwardingFixes: a kernel that begins to forward IPv6 drops the routes that it has from router advertisements, unless a device was
// told to take them all the same.
func (f Facts) forwardingFixes(fam addr.Family) []fix {
	var out []fix
	if fam == addr.IPv6 {
		for _, dev := range f.Survey.Host.AdvertisedBy() {
			out = append(out, sysctlFix("net/ipv6/conf/"+dev+"/accept_ra", "2"))
		}
	}
	s := netstate.Forwarding(fam)
	return append(out, sysctlFix(s.Path, s.Value))
}

// podDevices are those by which pods' packets come: the tunnels and the bridges.
func (f Facts) podDevices() []string {
	var out []string
	for _, d := range f.devices() {
		if d.there {
			out = append(out, d.name)
		}
	}
	for _, b := range f.bridges() {
		out = append(out, b.Name)
	}
	return out
}

// bridges are the devices that have an address inside this node's own subnet, but for the tunnels.
func (f Facts) bridges() []netstate.SurveyLink {
	var out []netstate.SurveyLink
	for _, a := range f.Survey.Host.Addresses {
		own := f.Self.Subnets.Get(addr.FamilyOf(a.Prefix.Addr()))
		if !own.IsValid() || !own.Contains(a.Prefix.Addr()) || a.Tunnel {
			continue
		}
		if l, there := f.Survey.Link(a.Link); there && !slices.ContainsFunc(out, func(o netstate.SurveyLink) bool { return o.Name == l.Name }) {
			out = append(out, l)
		}
	}
	return out
}

func judgeInterface(f Facts) []Finding {
	if f.Errs["devices"] != nil {
		return skipped(f.Errs["devices"].Error())
	}
	var out []Finding
	if p := f.problem("underlay"); p != nil && p.Code != status.Starting {
		out = append(out, fail("none found: "+p.Reason, f.interfaceSteps()...)...)
	} else if f.ChooseErr != nil {
		return fail(strings.ReplaceAll(f.ChooseErr.Error(), "\n", "; "), f.interfaceSteps()...)
	}
	var names []string
	for _, fam := range f.families() {
		u := f.Underlay.By.Get(fam)
		if !u.Addr.IsValid() {
			continue
		}
		if u.Device == "" {
			names = append(names, fmt.Sprintf("%s by %s", u.Addr, strings.Join(namesOf(f.uplinks(fam)), ", ")))
			out = append(out, f.judgeUplinks(fam)...)
			continue
		}
		names = append(names, fmt.Sprintf("%s on %s", u.Addr, u.Device))
		l, there := f.Survey.Link(u.Device)
		switch {
		case !there:
			out = append(out, fail(fmt.Sprintf("%s, which leads to the other nodes, does not exist", u.Device), "ip -br link")...)
		case !l.Up:
			out = append(out, fail(fmt.Sprintf("%s, which leads to the other nodes, is down", u.Device), "ip link set "+u.Device+" up")...)
		case !l.Carrier:
			out = append(out, fail(fmt.Sprintf("%s, which leads to the other nodes, has no carrier: is the cable plugged in?", u.Device), "ip -br link show "+u.Device)...)
		case !f.Survey.Host.Has(u.Addr):
			out = append(out, fail(fmt.Sprintf("%s no longer has the address %s", u.Device, u.Addr), f.Service.restart())...)
		}
		if l.Kind == "dummy" {
			out = append(out,
				warn(fmt.Sprintf("%s is a dummy device, which sends nothing: set --iface to the device that leads to the other nodes",
					u.Device),
					f.Service.set(f.EnvFile, "OVERLAYD_IFACE", "DEVICE"))...)
		}
		out = append(out, f.ambiguous(fam)...)
		out = append(out, f.pastDevice(fam, u.Device)...)
	}
	out = append(out, f.elsewhereThanStore()...)
	if len(names) == 0 && len(out) == 0 {
		return skipped("the network config is unknown")
	}
	return orOK(out, strings.Join(names, " and "))
}

// pastDevice finds silent peers to which no route leads by the device that the tunnel is bound to: the kernel looks for
// them on the network of that device itself. Tables for source routing may have such a route, so that a peer which
// answers is not looked at.
func (f Facts) pastDevice(fam addr.Family, device string) []Finding {
	var names []string
	var first netip.Addr
	for _, p := range f.Pings.Sample {
		leads := func(r netstate.HostRoute) bool { return r.Link == device && r.Dst.Contains(p.publicIP) }
		if p.answers() || p.way != "tunnel" || addr.FamilyOf(p.publicIP) != fam ||
			slices.ContainsFunc(f.Survey.Host.Routes, leads) {
			continue
		}
		if names = append(names, fmt.Sprintf("%s (%s)", p.name, p.publicIP)); !first.IsValid() {
			first = p.publicIP
		}
	}
	if len(names) == 0 {
		return nil
	}
	return fail(fmt.Sprintf("no route over %s, to which the tunnel is bound, leads to %s, which does not answer",
		device, few(names)),
		fmt.Sprintf("ip route get %s   # add a route over %s, or set --iface to the device that leads there", first,
			device))
}

// judgeUplinks judges an address that is bound to no device: it needs one that leads to the other nodes.
func (f Facts) judgeUplinks(fam addr.Family) []Finding {
	u, links := f.Underlay.By.Get(fam), f.uplinks(fam)
	if !f.Survey.Host.Has(u.Addr) {
		return fail(fmt.Sprintf("no device has the address %s any longer", u.Addr), f.Service.restart())
	}
	if len(links) == 0 {
		return fail(fmt.Sprintf("no route leads from %s to the other nodes", u.Addr), f.interfaceSteps()...)
	}
	var dead, steps []string
	for _, l := range links {
		switch {
		case !l.Up:
			dead, steps = append(dead, l.Name+" is down"), append(steps, "ip link set "+l.Name+" up")
		case !l.Carrier:
			dead, steps = append(dead, l.Name+" has no carrier"), append(steps, "ip -br link show "+l.Name)
		}
	}
	switch len(dead) {
	case 0:
		return nil
	case len(links):
		return fail("no device leads to the other nodes: "+strings.Join(dead, ", "), steps...)
	}
	all := strings.Join(dead, ", ")
	return warn(fmt.Sprintf("%d of the %d devices that lead to the other nodes: %s", len(dead), len(links), all), steps...)
}

// interfaceSteps is what to do where no interface is found: mostly it is the default route that is missing.
func (f Facts) interfaceSteps() []string {
	steps := []string{"ip -br address", "ip route show default"}
	if !f.Underlay.ByDefault {
		return steps
	}
	for _, fam := range f.families() {
		if slices.ContainsFunc(f.Survey.Host.Routes, func(r netstate.HostRoute) bool {
			return r.Dst.Bits() == 0 && addr.FamilyOf(r.Dst.Addr()) == fam && !r.Drops
		}) {
			continue
		}
		word := map[addr.Family]string{addr.IPv4: "ip", addr.IPv6: "ip -6"}[fam]
		steps = append(steps, fmt.Sprintf("%s route add default via GATEWAY dev %s   # there is none for %s; or set --iface to the device that leads to the other nodes", word, orDefault(f.Underlay.By.Get(fam).Device, "DEVICE"), fam))
	}
	if len(steps) > 2 { // then that is it
		return append(steps[2:], steps[:2]...)
	}
	return steps
}

// ambiguous: which device the default route goes by may be another one tomorrow.
func (f Facts) ambiguous(fam addr.Family) []Finding {
	var devices []string
	f.Survey.Host.EachRoute(func(hops []netstate.HostRoute) {
		r := hops[0] // of several next hops, all are in use
		if r.Dst.Bits() == 0 && addr.FamilyOf(r.Dst.Addr()) == fam && !r.Drops && r.Link != "" && !slices.Contains(devices, r.Link) {
			devices = append(devices, r.Link)
		}
	})
	if !f.Underlay.ByDefault || len(devices) < 2 {
		return nil
	}
	slices.Sort(devices)
	return warn(fmt.Sprintf("%s has default routes by %s; the lowest metric wins, which may change with the next boot: set --iface", fam, strings.Join(devices, " and ")),
		f.Service.set(f.EnvFile, "OVERLAYD_IFACE",
			orDefault(f.Underlay.By.Get(fam).Device, f.Underlay.By.Get(fam).Addr.String())))
}

func orDefault(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

const strictRP = 1 // net.ipv4.conf.*.rp_filter: 0 off, 1 strict (RFC 3704 section 2.2), 2 loose

// judgeRPFilter: the kernel takes the higher one of the two settings. Strict drops what comes by another device than answers would go.
func judgeRPFilter(f Facts) []Finding {
	if !slices.Contains(f.families(), addr.IPv4) {
		return skipped("only IPv4 has it")
	}
	all, known := f.System.number(rpFilter("all"))
	if !known {
		return skipped("unreadable")
	}
	var out []Finding
	// What comes by the tunnel is answered by it, but where a peer sends through it and is sent to directly: it has other routes, or
	// an older config. Then its answers to pings are dropped here.
	var unanswered []string
	for _, p := range f.Pings.Sample {
		if p.way == "direct" && p.family() == addr.IPv4 && !p.answers() {
			unanswered = append(unanswered, p.name)
		}
	}
	for _, d := range f.devices() {
		if own, ok := f.System.number(rpFilter(d.name)); ok && d.family == addr.IPv4 && len(unanswered) > 0 && max(all, own) == strictRP {
			out = append(out, fixable(Warn, fmt.Sprintf("strict on %s, which drops tunnel packets of nodes that this node reaches directly; that may be why %s does not answer", d.name, few(unanswered)), sysctlFix(rpFilter(d.name), "2"))...)
		}
	}
	arrivals := f.arrivals(addr.IPv4)
	for _, l := range arrivals {
		own, known := f.System.number(rpFilter(l.Name))
		if !known || max(all, own) != strictRP {
			continue
		}
		var odd []string
		for _, p := range f.Peers {
			if r, there := f.Survey.Host.Route(p.publicIP); p.publicIP.Is4() && there && r.Link != "" &&
				!f.leavesBy(l.Name, p.publicIP) {
				odd = append(odd, fmt.Sprintf("%s (%s, by %s)", p.name, p.publicIP, r.Link))
			}
		}
		if len(odd) == 0 {
			continue
		}
		mark, ifThere := Fail, ""
		if len(arrivals) > 1 {
			mark, ifThere = Warn, " if they arrive there"
		}
		out = append(out, fixable(mark, fmt.Sprintf(
			"strict on %s, and the return path to %d nodes leaves by another device, so that "+
				"their packets to %s are dropped%s: %s",
			l.Name, len(odd), f.reachedAt(addr.IPv4), ifThere, few(odd)), sysctlFix(rpFilter(l.Name), "2"))...)
	}
	return orOK(out, "drops nothing on the devices in use")
}

// judgeRoutes finds routes of somebody else that come before ours.
func judgeRoutes(f Facts) []Finding {
	if f.Errs["devices"] != nil {
		return skipped(f.Errs["devices"].Error())
	}
	var lengths []int
	ours := map[netip.Prefix]uint32{}
	for _, r := range f.Survey.Ours.Routes {
		if r.Table == netstate.MainTable {
			ours[r.Dst] = r.Metric
			if !slices.Contains(lengths, r.Dst.Bits()) {
				lengths = append(lengths, r.Dst.Bits())
			}
		}
	}
	missing := []string{}
	for _, p := range f.Peers {
		if _, there := ours[p.subnet]; !there && (p.way == "tunnel" || p.way == "direct") {
			missing = append(missing, fmt.Sprintf("%s (%s)", p.subnet, p.name))
		}
	}
	var out []Finding
	if len(missing) > 0 {
		steps := f.start()
		if f.Daemon.Running {
			steps = "overlayd diff"
		}
		out = append(out, fail(fmt.Sprintf("the routes to %d peers are missing: %s", len(missing), few(missing)), steps)...)
	}
	f.Survey.Host.EachRoute(func(hops []netstate.HostRoute) {
		r := hops[0]
		out = append(out, f.intoTunnel(hops)...)
		for _, bits := range lengths {
			p, err := r.Dst.Addr().Prefix(bits)
			if err != nil || bits > r.Dst.Bits() {
				continue
			}
			metric, there := ours[p]
			if !there || bits == r.Dst.Bits() && r.Metric > metric {
				continue
			}
			what, how := fmt.Sprintf("the route to %s by %s", r.Dst, r.Link), fmt.Sprintf("%s dev %s", r.Dst, r.Link)
			if r.Drops {
				what, how = fmt.Sprintf("the route that drops packets to %s", r.Dst), r.Dst.String()
			} else if len(hops) > 1 {
				how = r.Dst.String()
			}
			out = append(out, fail(fmt.Sprintf("%s belongs to another program and precedes the route to the peer %s", what, p), fmt.Sprintf("ip route del %s metric %d", how, r.Metric))...)
			break
		}
	})
	out = append(out, f.staleRoutes(ours)...)
	if len(out) == 0 && f.PeersFrom == "" {
		return skipped("the peers are unknown")
	}
	return orOK(atMost(out), fmt.Sprintf("%d, none shadowed by other programs' routes", len(f.Survey.Ours.Routes)))
}

// intoTunnel finds a route by which the tunnel's own packets would enter it again: they never leave.
func (f Facts) intoTunnel(hops []netstate.HostRoute) []Finding {
	h := f.Survey.Host
	i := slices.IndexFunc(hops, func(r netstate.HostRoute) bool { return h.IsTunnel(r.Link) })
	if i < 0 {
		return nil
	}
	r := hops[i]
	covers := func(p peer) bool { return p.publicIP.IsValid() && r.Dst.Contains(p.publicIP) }
	if r.Dst.Bits() > 0 && !slices.ContainsFunc(f.Peers, covers) || !slices.Contains(h.NextHops(r.Dst.Addr()), r) {
		return nil // no packet of the tunnel takes it
	}
	word := map[addr.Family]string{addr.IPv4: "ip", addr.IPv6: "ip -6"}[addr.FamilyOf(r.Dst.Addr())]
	return fail(fmt.Sprintf("the route to %s by %s leads the tunnel's own packets into the tunnel; "+
		"a DHCP client on that device may have added it", r.Dst, r.Link),
		fmt.Sprintf("%s route del %s dev %s metric %d", word, r.Dst, r.Link, r.Metric))
}

// staleRoutes finds routes by a gateway to whole subnets of the pod network that do not come before a route of ours.
// flannel leaves such (host-gw, DirectRouting): they lead to where a node was. Without a metric they win as soon as
// another node has the subnet; those for IPv6, which have one, when ours goes.
func (f Facts) staleRoutes(ours map[netip.Prefix]uint32) []Finding {
	if f.Config == nil {
		return nil
	}
	var out []Finding
	for _, r := range f.Survey.Host.Routes {
		pool := f.Config.Pools.Get(addr.FamilyOf(r.Dst.Addr()))
		metric, ok := ours[r.Dst]
		if ok && r.Metric <= metric || !r.Via.IsValid() || r.Dst.Bits() != pool.SubnetLen || !pool.Network.Overlaps(r.Dst) {
			continue
		}
		out = append(out,
			warn(fmt.Sprintf("the route to %s via %s by %s belongs to another program and leads to a subnet of the pod network: "+
				"flannel leaves such routes behind", r.Dst, r.Via, r.Link),
				fmt.Sprintf("ip route del %s via %s dev %s metric %d", r.Dst, r.Via, r.Link, r.Metric))...)
	}
	return out
}
