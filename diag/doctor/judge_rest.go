package doctor

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/dist"
	"github.com/overlayd/overlayd/subnet"
)

func managerChecks() []check {
	return []check{{"systemd-networkd", judgeNetworkd}, {"NetworkManager", judgeNetworkManager}, {"udev", judgeUdev}}
}

// unseen is said in a pod, which sees neither the processes nor the files of its host.
func (f Facts) unseen(look string) []Finding {
	return skipped("not visible from a pod; on the node, check that it leaves overlayd's devices alone: " + look)
}

func judgeNetworkd(f Facts) []Finding {
	m := f.System.Managers
	if f.Service.inKubernetes() {
		return f.unseen("networkctl status " + f.someDevice())
	}
	if !m.Networkd {
		return ok("not running")
	}
	var out []Finding
	if m.NetworkFile != "" {
		reason := fmt.Sprintf("%s matches %s: systemd-networkd may change its addresses, routes and ports; "+
			"then: networkctl reload", m.NetworkFile, m.Managed)
		if dropInCovers(m.Managed) {
			file := fix{file: "/etc/systemd/network/10-overlayd.network"}
			out = append(out, fixable(Warn, reason, file)...)
		} else {
			const write = `printf '[Match]\nName=%[1]s\n[Link]\nUnmanaged=yes\n' > /etc/systemd/network/10-%[1]s.network`
			out = append(out, warn(reason, fmt.Sprintf(write, m.Managed))...)
		}
	}
	if !m.ForeignRoutes {
		out = append(out, fixable(Warn, "systemd-networkd removes foreign routes and rules when it starts or reconfigures a device; the fix tells it not to, from its next start on",
			fix{file: "/etc/systemd/networkd.conf.d/overlayd.conf"})...)
	}
	return orOK(out, "leaves overlayd's devices, routes and rules alone")
}

func judgeNetworkManager(f Facts) []Finding {
	m := f.System.Managers
	file := fix{file: "/etc/NetworkManager/conf.d/overlayd.conf"}
	switch {
	case f.Service.inKubernetes():
		return f.unseen("nmcli device status")
	case !m.NetworkManager:
		return ok("not running")
	case m.NMManages != "":
		var out []string
		covered := true
		for name := range strings.SplitSeq(m.NMManages, ", ") {
			out = append(out, "nmcli device set "+name+" managed no")
			covered = covered && dropInCovers(name)
		}
		reason := fmt.Sprintf("manages %s, and removes addresses and ports with `nmcli networking off`, "+
			"or when a connection ends", m.NMManages)
		if m.NMIgnores || !covered {
			return warn(reason+"; this lasts until the next boot; for longer, name it in /etc/NetworkManager/conf.d", out...)
		}
		found := fixable(Warn, reason+"; then: nmcli general reload", file)
		found[0].Fix = append(found[0].Fix, out...)
		return found
	case m.NMAnswers:
		return ok("manages neither overlayd's devices nor the pod bridge")
	case !m.NMIgnores:
		return fixable(Warn, "what it manages is unknown (its networking is off, or there is no nmcli), and nothing "+
			"tells it to leave overlayd's devices alone; then: nmcli general reload", file)
	}
	return ok("configured to leave overlayd's devices alone")
}

// dropInCovers reports whether the drop-in files name a device.
func dropInCovers(name string) bool {
	text, err := dist.DropIns.ReadFile("systemd/network/10-overlayd.network")
	return err == nil && device{name: name}.matches(string(text))
}

func judgeUdev(f Facts) []Finding {
	m := f.System.Managers
	switch {
	case f.Service.inKubernetes():
		return f.unseen("udevadm test-builtin net_setup_link /sys/class/net/" + f.someDevice())
	case !m.Udev:
		return ok("not running")
	case m.LinkFile != "" && m.MACPolicy != "" && m.MACPolicy != "none":
		return fixable(Warn, fmt.Sprintf("%s has MACAddressPolicy=%s, so udev may change the MAC address that the lease announces", m.LinkFile, m.MACPolicy),
			fix{file: "/etc/systemd/network/10-overlayd.link"})
	}
	return ok("leaves the MAC addresses of overlayd's devices alone")
}

func limitChecks() []check {
	return []check{{"neighbour table", judgeNeighbours}, {"connection table", judgeConntrack}}
}

// judgeNeighbours: the kernel refuses more than gc_thresh3 neighbours, and begins to clear up above gc_thresh2. Permanent ones, such as
// those that overlayd sets, do not count since Linux 5.0 (struct neigh_table, gc_entries); those that the kernel finds by itself do:
// peers that are reached directly or are on a network of this node, and the pods here.
func judgeNeighbours(f Facts) []Finding {
	const spare = 512 // pods of this node, gateways, other hosts
	var out []Finding
	known := false
	for _, fam := range f.families() {
		hard, ok := f.System.number(threshold(fam, "3"))
		if !ok {
			continue
		}
		known = true
		need := spare
		for _, p := range f.Peers {
			if p.family() != fam || !p.publicIP.IsValid() {
				continue
			}
			if r, there := f.Survey.Host.Route(p.publicIP); there && !r.Via.IsValid() {
				need++
			}
		}
		if need > hard {
			next := 1024
			for next < 2*need {
				next *= 2
			}
			out = append(out, fixable(Warn, fmt.Sprintf("%s is %d: %d nodes are on a network of this node, which together with its pods may exceed it", threshold(fam, "3"), hard, need-spare),
				f.moreNeighbours(fam, next)...)...)
		}
	}
	if !known {
		return skipped("limits not visible in this network namespace")
	}
	if n := f.System.NeighbourTable.Overflows; n > 0 && len(out) == 0 {
		var more []fix
		for _, fam := range addr.Families() {
			if hard, known := f.System.number(threshold(fam, "3")); known {
				more = append(more, f.moreNeighbours(fam, max(8192, 2*hard))...)
			}
		}
		out = append(out, warn(fmt.Sprintf("it was full %d times since the machine started (gc_thresh3)", n), commands(more)...)...)
	}
	return orOK(out, "large enough for all nodes on this node's networks")
}

// moreNeighbours makes the table larger, and no limit smaller than it is.
func (f Facts) moreNeighbours(fam addr.Family, hard int) []fix {
	var out []fix
	for _, x := range []struct {
		n    string
		want int
	}{{"3", hard}, {"2", hard / 2}, {"1", hard / 8}} {
		if is, known := f.System.number(threshold(fam, x.n)); !known || is < x.want {
			out = append(out, sysctlFix(threshold(fam, x.n), fmt.Sprint(x.want)))
		}
	}
	return out
}

func judgeConntrack(f Facts) []Finding {
	count, ok1 := f.System.number("net/netfilter/nf_conntrack_count")
	most, ok2 := f.System.number("net/netfilter/nf_conntrack_max")
	if !ok1 || !ok2 || most == 0 {
		return skipped("connections are not tracked, or the table is not visible here")
	}
	reason := fmt.Sprintf("%d of %d connections (%d %%)", count, most, 100*count/most)
	more := sysctlFix("net/netfilter/nf_conntrack_max", fmt.Sprint(2*most))
	switch {
	case 100*count >= 95*most:
		return fixable(Fail, reason+": when it is full, new connections are dropped", more)
	case 100*count >= 80*most:
		return fixable(Warn, reason+": when it is full, new connections are dropped", more)
	}
	return ok(reason)
}

func peerChecks() []check {
	return []check{{"peers", judgePeers}, {"peers answer", judgePings}, {"full-size packets", judgeBlackHole}}
}

func judgePeers(f Facts) []Finding {
	var odd []string
	for _, p := range f.Peers {
		if p.way == "unreachable" {
			odd = append(odd, fmt.Sprintf("%s (%s): %s", p.name, p.subnet, p.reason))
		}
	}
	switch {
	case len(odd) > 0:
		return fail(fmt.Sprintf("no path to %d: %s", len(odd), few(odd)), "overlayd status --peers")
	case f.PeersFrom == "":
		return skipped("the peers are unknown")
	case len(f.Peers) == 0:
		return ok("no peers")
	}
	return ok(fmt.Sprintf("%d, as listed by %s", len(f.Peers), f.PeersFrom))
}

// unpinged says why there is nothing to judge.
func (f Facts) unpinged() []Finding {
	if f.Pings.Err == nil {
		return nil
	}
	if errors.Is(f.Pings.Err, errNobody) && f.PeersFrom != "" {
		return ok("no peers")
	}
	return skipped(f.Pings.Err.Error())
}

func judgePings(f Facts) []Finding {
	if out := f.unpinged(); out != nil {
		return out
	}
	var silent, lossy, refused, mute []string
	var notSent netip.Addr
	var ignores string
	var slowest time.Duration
	for _, p := range f.Pings.Sample {
		what := fmt.Sprintf("%s (%s)", p.name, p.target)
		switch {
		case p.small.refused():
			refused, notSent = append(refused, fmt.Sprintf("%s: %v", what, p.small.Err)), p.target
		case !p.answers():
			silent = append(silent, what)
		case p.small.Lost > 0:
			lossy = append(lossy, what)
		}
		if p.mute {
			mute, ignores = append(mute, what), ignoresPings(p.family())
		}
		slowest = max(slowest, p.small.RTT)
	}
	n := len(f.Pings.Sample)
	var out []Finding
	if len(refused) > 0 {
		out = append(out, fail(fmt.Sprintf("the kernel refuses to send to %d of %d: %s", len(refused), n, few(refused)), "ip route get "+notSent.String())...)
	}
	if len(silent) > 0 {
		x := f.silent(silent, n)
		out = append(out, x...)
	}
	if len(lossy) > 0 {
		out = append(out, warn(fmt.Sprintf("some packets to %d of %d are lost: %s", len(lossy), n, few(lossy)))...)
	}
	all := fmt.Sprintf("%d of %d pinged, all answer within %s", n, f.Pings.Of, slowest.Round(10*time.Microsecond))
	if len(mute) > 0 {
		all += fmt.Sprintf("; %s ignores pings (is %s 1 there?), and was probed by UDP instead", few(mute), ignores)
	}
	return orOK(out, all)
}

// silent: where everybody is, it is this node or its network; where some are, it is them.
func (f Facts) silent(silent []string, n int) []Finding {
	who := fmt.Sprintf("%d of the %d pinged", len(silent), n)
	if len(silent) == n && n > 1 {
		who = fmt.Sprintf("none of the %d pinged", n)
		reason := who + " answers through the pod network: the cause is most likely on this node, see the other findings; if there are none, check that the network between the nodes passes UDP"
		return fail(reason, f.capture())
	}
	verb := "do"
	if len(silent) == 1 {
		verb = "does"
	}
	return fail(
		fmt.Sprintf(
			"%s %s not answer through the pod network: %s; run overlayd doctor there, which also detects ignored pings",
			who, verb, few(silent)), "overlayd status --peers", f.capture())
}

// someDevice is a device of ours.
func (f Facts) someDevice() string {
	if ds := f.devices(); len(ds) > 0 {
		return ds[0].name
	}
	return "cni0"
}

// capture shows the tunnel's packets on the wire.
func (f Facts) capture() string {
	for _, d := range f.devices() {
		if links := f.uplinks(d.family); len(links) == 1 {
			return fmt.Sprintf("tcpdump -ni %s -c 20 udp port %d", links[0].Name, d.port)
		} else if len(links) > 1 {
			return fmt.Sprintf("tcpdump -ni any -c 20 udp port %d", d.port)
		}
	}
	return "ip -s link"
}

// judgeBlackHole: small packets get through, those of the size that pods may send do not.
func judgeBlackHole(f Facts) []Finding {
	if out := f.unpinged(); out != nil {
		return out
	}
	var holes, refused, lossy []string
	sized := 0
	var one pinged
	for _, p := range f.Pings.Sample {
		if p.sized && p.answers() {
			sized++
		}
		what := fmt.Sprintf("%s (%s)", p.name, p.target)
		switch {
		case p.answers() && p.refused():
			refused = append(refused, fmt.Sprintf("%s: %v", what, p.full.Err))
			one = p
		case p.hole():
			holes = append(holes, what)
			one = p
		case p.answers() && p.full.answered() && p.full.Lost >= pingCount: // which was reason to send more, and some got through
			lossy = append(lossy, fmt.Sprintf("%s: %d of %d", what, p.full.Lost, p.full.Sent))
		}
	}
	switch {
	case len(holes) == 0 && len(refused) == 0 && f.Pings.FullErr != nil:
		return skipped(f.Pings.FullErr.Error())
	case len(holes) == 0 && len(refused) == 0 && sized == 0:
		return skipped("no peer answers small packets, or the MTU is unknown")
	case len(holes) == 0 && len(refused) == 0 && len(lossy) > 0:
		return warn(fmt.Sprintf("some packets of %d bytes to %d of %d are lost: %s", f.podMTU(), len(lossy), sized, few(lossy)))
	case len(holes) == 0 && len(refused) == 0:
		return ok(fmt.Sprintf("%d bytes get through to %d peers", f.podMTU(), sized))
	case len(refused) > 0:
		return fail(fmt.Sprintf("the pod MTU is %d, but this node cannot send such packets to %d peers: %s", one.peer.full, len(refused), few(refused)), "ip -d link show type vxlan", f.Service.restart())
	}
	reason := fmt.Sprintf("small packets reach %s, those of %d bytes (the pod MTU) don't: an MTU black hole between the nodes", few(holes), one.peer.full)
	largest := f.Pings.Largest
	around := 0
	if largest.Peer.way == "tunnel" {
		around = subnet.Backend{Type: subnet.VXLAN}.Overhead(largest.Peer.family())
	}
	outer := largest.Size + around
	switch least := f.leastMTU(); {
	case largest.Size <= smallSize:
		return fail(reason, f.capture())
	case !largest.Exact:
		reason += fmt.Sprintf("; at least %d get through to %s; the search did not finish: run overlayd doctor again", largest.Size, largest.Peer.name)
		return fail(reason, f.capture())
	default:
		reason += fmt.Sprintf("; the largest packet that reaches %s is %d, so the path MTU is %d",
			largest.Peer.name, largest.Size, outer)
		if outer < least {
			return fail(fmt.Sprintf("%s: less than the overlay needs (%d); raise the MTU of the network between the nodes",
				reason, least), f.capture())
		}
	}
	return fail(reason, f.lowerMTU(outer)...)
}

// leastMTU is what the network between the nodes must carry: no network config may have less.
func (f Facts) leastMTU() int {
	return subnet.Backend{Type: f.backend()}.LeastMTU(slices.Contains(f.families(), addr.IPv6))
}

// lowerMTU: for all nodes in the network config, whose Backend.MTU is that of the network between them, or for this
// one at the device.
func (f Facts) lowerMTU(underlay int) []string {
	if put := f.putBackend("MTU", underlay); put != "" {
		return []string{put}
	}
	r, known := f.Survey.Host.Route(f.Pings.Largest.Peer.publicIP)
	if !known || r.Link == "" {
		return []string{f.capture()}
	}
	return []string{fmt.Sprintf("ip link set %s mtu %d", r.Link, underlay)}
}
