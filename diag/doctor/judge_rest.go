package doctor

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
)

// judgeManager: a program that configures devices by itself must leave overlayd's, and the pods' bridge, alone.
func (f Facts) judgeManager(m manager, i int) (out findings) {
	if f.Service.inKubernetes() { // which sees neither the processes nor the files of its host
		return skipped("not visible from a pod; on the node, check that it leaves overlayd's devices alone: %s", m.look)
	}
	if len(f.System.Managers) == 0 || !f.System.Managers[i].runs {
		return ok("not running")
	}
	is := f.System.Managers[i]
	for n, file := range m.files {
		if !is.told[n] {
			out.add(warn("%s; the fix tells it to leave overlayd's devices alone; then: %s", file.may, m.reload).
				safely(change{file: file.name}))
		}
	}
	if len(out) == 0 && len(is.bridges) > 0 {
		out.add(warn("no file tells it to leave the pod bridge %s alone", few(is.bridges)).
			fix("${EDITOR:-vi} %s   # add that name; then: %s", m.files[0].name, m.reload))
	}
	return out.orOK("leaves overlayd's devices, routes and MAC addresses alone")
}

// judgeNeighbours: the kernel refuses more than gc_thresh3 neighbours, and begins to clear up above gc_thresh2.
// Permanent ones, such as those that overlayd sets, do not count since Linux 5.0 (struct neigh_table, gc_entries);
// those that the kernel finds by itself do: peers that are reached directly or are on a network of this node, and the
// pods here.
func judgeNeighbours(f Facts) (out findings) {
	const spare = 512 // pods of this node, gateways, other hosts
	visible := false
	for _, fam := range f.families() {
		hard, known := f.System.number(threshold(fam, 3))
		visible = visible || known
		near := 0
		for _, p := range f.Peers {
			if r, exists := f.Survey.Host.Route(p.publicIP); p.family() == fam && exists && !r.Via.IsValid() {
				near++
			}
		}
		if known && near+spare > hard {
			next := 1024
			for next < 2*(near+spare) {
				next *= 2
			}
			out.add(warn("%s is %d: %d nodes are on a network of this node, which together with its pods may exceed it",
				threshold(fam, 3), hard, near).safely(f.moreNeighbours(fam, next)...))
		}
	}
	if !visible {
		return skipped("limits not visible in this network namespace")
	}
	return out.orOK("large enough for all nodes on this node's networks")
}

// moreNeighbours makes the table larger, and no limit smaller than it is.
func (f Facts) moreNeighbours(fam addr.Family, hard int) []change {
	var out []change
	for i, limit := range []int{hard, hard / 2, hard / 8} { // the hard one first
		path := threshold(fam, 3-i)
		if is, known := f.System.number(path); !known || is < limit {
			out = append(out, sysctl(path, fmt.Sprint(limit)))
		}
	}
	return out
}

func judgeConntrack(f Facts) findings {
	count, ok1 := f.System.number(connections)
	most, ok2 := f.System.number(maxConnections)
	if !ok1 || !ok2 || most == 0 {
		return skipped("connections are not tracked, or the table is not visible here")
	}
	reason := fmt.Sprintf("%d of %d connections (%d %%)", count, most, 100*count/most)
	if 100*count < 80*most {
		return ok("%s", reason)
	}
	mark := Warn
	if 100*count >= 95*most {
		mark = Fail
	}
	return finding(mark, "%s: when it is full, new connections are dropped", reason).
		safely(sysctl(maxConnections, fmt.Sprint(2*most)))
}

func judgePeers(f Facts) findings {
	var odd []string
	for _, p := range f.Peers {
		if p.path == pathUnreachable {
			odd = append(odd, fmt.Sprintf("%s (%s): %s", p.name, p.subnet, p.reason))
		}
	}
	switch {
	case len(odd) > 0:
		return fail("no path to %d: %s", len(odd), few(odd)).fix("overlayd status --peers")
	case f.PeersFrom == "":
		return skipped("the peers are unknown")
	case len(f.Peers) == 0:
		return ok("no peers")
	}
	return ok("%d, as listed by %s", len(f.Peers), f.PeersFrom)
}

// notPinged says why there is nothing to judge; nil: there is.
func (f Facts) notPinged() findings {
	switch {
	case f.Pings.Err == nil:
		return nil
	case errors.Is(f.Pings.Err, errNoPeer) && f.PeersFrom != "":
		return ok("no peers")
	}
	return skipped("%v", f.Pings.Err)
}

func judgePings(f Facts) (out findings) {
	if out := f.notPinged(); out != nil {
		return out
	}
	var silent, lossy, rejected, mute []string
	var notSent, ignores string
	var slowest time.Duration
	for _, p := range f.Pings.Sample {
		what := fmt.Sprintf("%s (%s)", p.name, p.target)
		switch {
		case p.small.rejected():
			rejected, notSent = append(rejected, fmt.Sprintf("%s: %v", what, p.small.Err)), p.target.String()
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
	if len(rejected) > 0 {
		out.add(fail("the kernel refuses to send to %d of %d: %s", len(rejected), n, few(rejected)).
			fix("ip route get %s", notSent))
	}
	switch len(silent) {
	case 0:
	case max(n, 2): // the cause is this node, or its network
		out.add(fail("none of the %d pinged answers through the pod network: the cause is most likely on this node, see the "+
			"other findings; if there are none, check that the network between the nodes passes UDP", n).steps(f.capture()))
	default:
		verb := map[bool]string{true: "does", false: "do"}[len(silent) == 1]
		out.add(fail("%d of the %d pinged %s not answer through the pod network: %s; run overlayd doctor there, which also "+
			"detects ignored pings", len(silent), n, verb, few(silent)).steps("overlayd status --peers", f.capture()))
	}
	if len(lossy) > 0 {
		out.add(warn("some packets to %d of %d are lost: %s", len(lossy), n, few(lossy)))
	}
	well := fmt.Sprintf("%d of %d pinged, all answer within %s", n, f.Pings.Of, slowest.Round(10*time.Microsecond))
	if len(mute) > 0 {
		well += fmt.Sprintf("; %s ignores pings (is %s 1 there?), and was probed by UDP instead", few(mute), ignores)
	}
	return out.orOK("%s", well)
}

// capture shows the tunnel's packets on the wire.
func (f Facts) capture() string {
	if ds := f.tunnels(); len(ds) > 0 {
		return fmt.Sprintf("tcpdump -ni any -c 20 udp port %d", ds[0].port)
	}
	return "ip -s link"
}

// judgeBlackHole: small packets get through, those of the size that pods may send do not.
func judgeBlackHole(f Facts) findings {
	if out := f.notPinged(); out != nil {
		return out
	}
	var holes, rejected, lossy []string
	sized, mtu := 0, f.Pings.Size
	for _, p := range f.Pings.Sample {
		if p.sized && p.answers() {
			sized++
		}
		what := fmt.Sprintf("%s (%s)", p.name, p.target)
		switch {
		case p.answers() && p.rejected():
			rejected = append(rejected, fmt.Sprintf("%s: %v", what, p.full.Err))
		case p.hole():
			holes = append(holes, what)
		case p.answers() && p.full.answered() && p.full.Lost >= pingCount: // so that more were sent, and some got through
			lossy = append(lossy, fmt.Sprintf("%s: %d of %d", what, p.full.Lost, p.full.Sent))
		}
	}
	switch {
	case len(rejected) > 0:
		return fail("the pod MTU is %d, but this node cannot send such packets to %d peers: %s",
			mtu, len(rejected), few(rejected)).steps("ip -d link show type vxlan", f.Service.restart())
	case len(holes) > 0:
		return f.hole(fmt.Sprintf("small packets reach %s, those of %d bytes (the pod MTU) don't: an MTU black hole between "+
			"the nodes", few(holes), mtu))
	case f.Pings.FullErr != nil:
		return skipped("%v", f.Pings.FullErr)
	case sized == 0:
		return skipped("no peer answers small packets, or the MTU is unknown")
	case len(lossy) > 0:
		return warn("some packets of %d bytes to %d of %d are lost: %s", mtu, len(lossy), sized, few(lossy))
	}
	return ok("%d bytes get through to %d peers", mtu, sized)
}

// hole says what to do about a black hole.
func (f Facts) hole(reason string) findings {
	largest := f.Pings.Largest
	outer := largest.Size // with what the tunnel adds
	if largest.Peer.path == pathTunnel {
		outer += subnet.Backend{Type: f.backend()}.Overhead(largest.Peer.family())
	}
	least := subnet.Backend{Type: f.backend()}.LeastMTU(slices.Contains(f.families(), addr.IPv6))
	switch {
	case largest.Size <= smallSize:
		return fail("%s", reason).steps(f.capture())
	case !largest.Exact:
		return fail("%s; at least %d get through to %s; the search did not finish: run overlayd doctor again",
			reason, largest.Size, largest.Peer.name).steps(f.capture())
	}
	reason += fmt.Sprintf("; the largest packet that reaches %s is %d, so the path MTU is %d",
		largest.Peer.name, largest.Size, outer)
	if outer < least {
		return fail("%s: less than the overlay needs (%d); raise the MTU of the network between the nodes", reason, least).
			steps(f.capture())
	}
	// The config is for all nodes, its Backend.MTU that of the network between them.
	return fail("%s", reason).steps(cmp.Or(f.putBackend("MTU", outer), f.capture()))
}
