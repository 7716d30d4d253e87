package doctor

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/diag/doctor/packetfilter"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/netstate"
)

func judgePrivileges(f Facts) findings {
	if f.Privileges != nil {
		return fail("%v: many checks cannot run", f.Privileges).fix("sudo overlayd doctor")
	}
	return ok("CAP_NET_ADMIN and CAP_NET_RAW are present")
}

func judgeSupport(f Facts) (out findings) {
	if f.Privileges != nil {
		return skipped("needs privileges to test")
	}
	for _, what := range slices.Sorted(maps.Keys(f.Errs)) {
		out.add(warn("%s cannot be read: %v", what, f.Errs[what]))
	}
	for _, s := range f.Support {
		switch {
		case s.err == nil:
		case errors.Is(s.err, unix.EPERM): // in a container, for example
			out.add(skipped("%s: %v", s.what, s.err))
		case s.fix == "":
			out.add(warn("%s: %v", s.what, s.err))
		default:
			out.add(fail("%s: %v", s.what, s.err).steps(s.fix))
		}
	}
	return out.orOK("all that is needed is available")
}

func judgeForwarding(f Facts) (out findings) {
	for _, fam := range f.families() {
		s := netstate.Forwarding(fam)
		switch v, known := f.System.Sysctls[s.Path]; {
		case !known:
			out.add(fail("the kernel has no setting %s: is %s disabled?", s.Path, fam))
		case v == "0":
			out.add(fail("%s is 0: this node does not forward packets of pods", s.Path).safely(f.forwardingFixes(fam)...))
		}
	}
	if len(out) == 0 && slices.Contains(f.families(), addr.IPv4) {
		for _, dev := range f.podDevices() {
			if s := deviceForwarding(dev); f.System.Sysctls[s] == "0" {
				out.add(fail("%s is 0: packets that arrive by %s are not forwarded", s, dev).safely(sysctl(s, "1")))
			}
		}
	}
	return out.orOK("on")
}

// forwardingFixes: a kernel that begins to forward IPv6 drops the routes that it has from router advertisements, unless
// a device was told to take them all the same.
func (f Facts) forwardingFixes(fam addr.Family) []change {
	var out []change
	if fam == addr.IPv6 {
		for _, dev := range f.Survey.Host.AdvertisedBy() {
			out = append(out, sysctl("net/ipv6/conf/"+dev+"/accept_ra", "2"))
		}
	}
	s := netstate.Forwarding(fam)
	return append(out, sysctl(s.Path, s.Value))
}

// podDevices are those by which pods' packets come: the tunnels and the bridges.
func (f Facts) podDevices() []string {
	var out []string
	for _, d := range f.tunnels() {
		if d.exists {
			out = append(out, d.name)
		}
	}
	return append(out, namesOf(f.bridges())...)
}

// judgeBridgeFilter: kube-proxy sends what goes to a service to one of its pods. The answers of a pod on the same
// bridge are not routed; only where the packet filter sees bridged packets does it put the service's address back into
// them.
func judgeBridgeFilter(f Facts) (out findings) {
	const lost = "pods lose replies of services (including cluster DNS) whose endpoint is on the same node"
	pods := slices.ContainsFunc(f.bridges(), func(l netstate.SurveyLink) bool { return l.Kind == "bridge" })
	switch {
	case !f.kubeProxy():
		return skipped("no kube-proxy rules on this node")
	case !pods && !f.Service.inKubernetes():
		return skipped("no pod bridge")
	}
	for _, fam := range f.families() {
		s := netstate.BridgeNetfilter(fam).Path
		switch v, known := f.System.Sysctls[s]; {
		case !known:
			return fail("the module br_netfilter is not loaded: " + lost).
				fix("modprobe br_netfilter && echo br_netfilter > /etc/modules-load.d/br_netfilter.conf")
		case v == "0":
			out.add(fail("%s is 0: "+lost, s).safely(sysctl(s, "1")))
		}
	}
	return out.orOK("kube-proxy's rules see bridged packets")
}

// kubeProxy reports whether kube-proxy has rules here: its chains in iptables, or its table in nftables.
func (f Facts) kubeProxy() bool {
	names := []string{"KUBE-SERVICES", "KUBE-FORWARD"}
	return f.Filter.Has(names...) ||
		slices.ContainsFunc(f.Filter, func(c packetfilter.Chain) bool { return c.Table == "kube-proxy" }) ||
		slices.ContainsFunc(f.Legacy, func(c packetfilter.Legacy) bool { return slices.Contains(names, c.Chain) })
}

// judgeIPv6: overlayd enables it on its own device; the bridge and the uplinks are those of other programs.
func judgeIPv6(f Facts) (out findings) {
	if !slices.Contains(f.families(), addr.IPv6) {
		return skipped("the network has none")
	}
	off := func(device string) bool { return f.System.Sysctls[ipv6Off(device)] == "1" }
	for _, b := range namesOf(f.bridges()) {
		if off(b) {
			out.add(fail("disabled on %s, so pods have no gateway", b).safely(sysctl(ipv6Off(b), "0")))
		}
	}
	for _, l := range namesOf(f.uplinks(addr.IPv6)) {
		if off(l) { // its addresses and routes do not come back by themselves
			out.add(fail("disabled on %s, which leads to the other nodes", l).
				fix("sysctl -w %s=0   # and in /etc/sysctl.d; then give it its addresses and routes again", ipv6Off(l)))
		}
	}
	if off("default") {
		out.add(warn("disabled on new devices: the CNI plugin cannot give a new bridge its address").
			fix("sysctl -w %s=0   # and in /etc/sysctl.d", ipv6Off("default")))
	}
	return out.orOK("the pods' devices may have it")
}

// judgeEcho: pods don't depend on it, but other nodes' view of this one does.
func judgeEcho(f Facts) (out findings) {
	for _, fam := range f.families() {
		if s := ignoresPings(fam); f.System.Sysctls[s] == "1" {
			out.add(warn("%s is 1: this node answers no pings, so other nodes cannot reliably tell whether it is up", s).
				fix("sysctl -w %s=0", s))
		}
	}
	return out.orOK("this node answers them")
}

func judgeInterface(f Facts) (out findings) {
	if p := f.problem("underlay"); p != nil && p.Code != status.Starting {
		out.add(fail("none found: %s", p.Reason).steps(f.interfaceSteps()...))
	} else if f.ChooseErr != nil {
		return fail("%s", strings.ReplaceAll(f.ChooseErr.Error(), "\n", "; ")).steps(f.interfaceSteps()...)
	}
	var names []string
	for _, fam := range f.families() {
		u, links := f.Underlay.By.Get(fam), f.uplinks(fam)
		switch {
		case !u.Addr.IsValid():
			continue
		case u.Device != "":
			l, exists := f.Survey.Link(u.Device)
			if links = nil; exists {
				links = append(links, l)
			}
			names = append(names, fmt.Sprintf("%s on %s", u.Addr, u.Device))
			out.add(f.ambiguous(fam))
			out.add(f.notByDevice(fam, u.Device))
		default:
			names = append(names, fmt.Sprintf("%s by %s", u.Addr, strings.Join(namesOf(links), ", ")))
		}
		out.add(f.judgeUplinks(u, links))
	}
	out.add(f.elsewhereThanStore())
	if len(names) == 0 && len(out) == 0 {
		return skipped("the network config is unknown")
	}
	return out.orOK("%s", strings.Join(names, " and "))
}

// judgeUplinks judges the device that the tunnel is bound to, or those that lead to the other nodes.
func (f Facts) judgeUplinks(u backend.Underlay, links []netstate.SurveyLink) (out findings) {
	gone := !f.Survey.Host.Has(u.Addr)
	if gone && u.Device == "" { // whichever devices are up, the tunnel can't send from it
		return fail("this node no longer has the address %s", u.Addr).steps(f.Service.restart())
	}
	for _, l := range links {
		switch what := l.Name + ", which leads to the other nodes,"; {
		case !l.Up:
			out.add(fail("%s is down", what).fix("ip link set %s up", l.Name))
		case !l.Carrier:
			out.add(fail("%s has no carrier: is the cable plugged in?", what).fix("ip -br link show %s", l.Name))
		case l.Kind == "dummy" && u.Device != "":
			out.add(warn("%s is a dummy device, which sends nothing: set --iface to the device that leads to the other nodes",
				l.Name).steps(f.Service.set(f.EnvFile, "OVERLAYD_IFACE", "DEVICE")))
		}
	}
	if len(out) > 0 && len(out) < len(links) { // others are left
		for i := range out {
			out[i].Mark = Warn
		}
	}
	switch {
	case len(links) == 0 && u.Device != "":
		out.add(fail("%s, which leads to the other nodes, does not exist", u.Device).fix("ip -br link"))
	case len(out) == 0 && gone:
		out.add(fail("%s no longer has the address %s", u.Device, u.Addr).steps(f.Service.restart()))
	case len(links) == 0:
		out.add(fail("no route leads from %s to the other nodes", u.Addr).steps(f.interfaceSteps()...))
	}
	return out
}

// notByDevice finds silent peers to which no route leads by the device that the tunnel is bound to: the kernel takes
// them for hosts on the network of that device. Routes of other tables don't show here, so that a peer which answers is
// left out.
func (f Facts) notByDevice(fam addr.Family, device string) findings {
	var names []string
	var last netip.Addr
	for _, p := range f.Pings.Sample {
		leads := func(r netstate.HostRoute) bool { return r.Link == device && r.Dst.Contains(p.publicIP) }
		if !p.answers() && p.path == pathTunnel && addr.FamilyOf(p.publicIP) == fam &&
			!slices.ContainsFunc(f.Survey.Host.Routes, leads) {
			names, last = append(names, fmt.Sprintf("%s (%s)", p.name, p.publicIP)), p.publicIP
		}
	}
	if len(names) == 0 {
		return nil
	}
	return fail("no route over %s, to which the tunnel is bound, leads to %s, which does not answer", device, few(names)).
		fix("ip route get %s   # add a route over %s, or set --iface to the device that leads there", last, device)
}

// defaultRoutes are the devices of the default routes of a family.
func (f Facts) defaultRoutes(fam addr.Family) []string {
	var out []string
	f.Survey.Host.EachRoute(func(hops []netstate.HostRoute) {
		r := hops[0] // of several next hops, all are in use
		if r.Dst.Bits() == 0 && addr.FamilyOf(r.Dst.Addr()) == fam && !r.Drops && !slices.Contains(out, r.Link) {
			out = append(out, r.Link)
		}
	})
	slices.Sort(out)
	return out
}

// interfaceSteps is what to do where no interface is found: mostly the default route is missing.
func (f Facts) interfaceSteps() []string {
	var steps []string
	for _, fam := range f.families() {
		if f.Underlay.ByDefault && len(f.defaultRoutes(fam)) == 0 {
			steps = append(steps, fmt.Sprintf("%s route add default via GATEWAY dev %s   # there is none for %s; "+
				"or set --iface to the device that leads to the other nodes",
				ip(fam), cmp.Or(f.Underlay.By.Get(fam).Device, "DEVICE"), fam))
		}
	}
	return append(steps, "ip -br address", "ip route show default")
}

// ambiguous: which device the default route goes by may be another one tomorrow.
func (f Facts) ambiguous(fam addr.Family) findings {
	devices, u := f.defaultRoutes(fam), f.Underlay.By.Get(fam)
	if !f.Underlay.ByDefault || len(devices) < 2 {
		return nil
	}
	return warn("%s has default routes by %s; the lowest metric wins, which may change with the next boot: set --iface",
		fam, strings.Join(devices, " and ")).
		steps(f.Service.set(f.EnvFile, "OVERLAYD_IFACE", cmp.Or(u.Device, u.Addr.String())))
}

const strictRP = 1 // net.ipv4.conf.*.rp_filter: 0 off, 1 strict (RFC 3704 section 2.2), 2 loose

// strict reports whether rp_filter is strict on a device: the kernel takes the higher one of the two settings.
func (f Facts) strict(device string) bool {
	all, _ := f.System.number(rpFilter("all"))
	own, known := f.System.number(rpFilter(device))
	return known && max(all, own) == strictRP
}

// judgeRPFilter: strict drops what comes by another device than answers would go.
func judgeRPFilter(f Facts) (out findings) {
	if !slices.Contains(f.families(), addr.IPv4) {
		return skipped("only IPv4 has it")
	}
	if _, known := f.System.number(rpFilter("all")); !known {
		return skipped("unreadable")
	}
	// What comes by the tunnel is answered by it, but where a peer sends through it and is sent to directly: it has
	// other routes, or an older config. Then its answers to pings are dropped here.
	var unanswered []string
	for _, p := range f.Pings.Sample {
		if p.path == pathDirect && p.family() == addr.IPv4 && !p.answers() {
			unanswered = append(unanswered, p.name)
		}
	}
	for _, d := range f.tunnels() {
		if d.family == addr.IPv4 && len(unanswered) > 0 && f.strict(d.name) {
			out.add(warn("strict on %s, which drops tunnel packets of nodes that this node reaches directly; that may be "+
				"why %s does not answer", d.name, few(unanswered)).safely(sysctl(rpFilter(d.name), "2")))
		}
	}
	arrivals := f.arrivals(addr.IPv4)
	for _, l := range arrivals {
		if !f.strict(l.Name) {
			continue
		}
		var odd []string
		for _, p := range f.Peers {
			r, exists := f.Survey.Host.Route(p.publicIP)
			if p.publicIP.Is4() && exists && r.Link != "" && !f.leavesBy(l.Name, p.publicIP) {
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
		out.add(finding(mark, "strict on %s, and the return path to %d nodes leaves by another device, so that their "+
			"packets to %s are dropped%s: %s", l.Name, len(odd), f.reachedAt(addr.IPv4), ifThere, few(odd)).
			safely(sysctl(rpFilter(l.Name), "2")))
	}
	return out.orOK("drops nothing on the devices in use")
}

// judgeRoutes: each peer has its route, and none of another program takes precedence.
func judgeRoutes(f Facts) (out findings) {
	ours := map[netip.Prefix]uint32{} // metrics
	for _, r := range f.Survey.Ours.Routes {
		if r.Table == netstate.MainTable {
			ours[r.Dst] = r.Metric
		}
	}
	var missing []string
	for _, p := range f.Peers {
		if _, exists := ours[p.subnet]; !exists && p.reachable() {
			missing = append(missing, fmt.Sprintf("%s (%s)", p.subnet, p.name))
		}
	}
	if len(missing) > 0 {
		out.add(fail("the routes to %d peers are missing: %s", len(missing), few(missing)).
			steps(f.ifRunning("overlayd diff")))
	}
	for _, c := range netstate.RouteConflicts(f.Survey.Host, f.Survey.Ours) {
		out.add(fail("%s", c).steps(c.Command()))
	}
	out.add(f.staleRoutes(ours))
	if len(out) == 0 && f.PeersFrom == "" {
		return skipped("the peers are unknown")
	}
	return out.atMost().orOK("%d, none shadowed by other programs' routes", len(f.Survey.Ours.Routes))
}

// staleRoutes finds routes by a gateway to whole subnets of the pod network that do not precede a route of ours.
// flannel leaves such (host-gw, DirectRouting): they lead to where a node was. Without a metric they win as soon as
// another node has the subnet; those for IPv6, which have one, when ours goes.
func (f Facts) staleRoutes(ours map[netip.Prefix]uint32) (out findings) {
	if f.Config == nil {
		return nil
	}
	for _, r := range f.Survey.Host.Routes {
		pool := f.Config.Pools.Get(addr.FamilyOf(r.Dst.Addr()))
		metric, ok := ours[r.Dst]
		if ok && r.Metric <= metric || !r.Via.IsValid() || r.Dst.Bits() != pool.SubnetLen ||
			!pool.Network.Overlaps(r.Dst) {
			continue
		}
		out.add(warn("the route to %s via %s by %s belongs to another program and leads to a subnet of the pod network: "+
			"flannel leaves such routes behind", r.Dst, r.Via, r.Link).
			fix("ip route del %s via %s dev %s metric %d", r.Dst, r.Via, r.Link, r.Metric))
	}
	return out
}
