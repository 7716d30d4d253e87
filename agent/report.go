package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"go.uber.org/zap"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// mostNamed bounds how many objects one message names; the rest is counted.
const mostNamed = 10

// few shortens a list for a message.
func few(names []string) string {
	if rest := len(names) - mostNamed; rest > 0 {
		return fmt.Sprintf("%s; and %d more", strings.Join(names[:mostNamed], "; "), rest)
	}
	return strings.Join(names, "; ")
}

func joined(problems []string) error {
	if len(problems) == 0 {
		return nil
	}
	return errors.New(few(problems))
}

func refusals(refused []subnet.Refusal) error {
	var out []string
	for _, r := range refused {
		out = append(out, fmt.Sprintf("lease %.100q of node %q rejected: %s", r.Key, r.Node, r.Reason))
	}
	return joined(out)
}

// shadowed finds routes that are not ours and that packets to a peer's subnet would take before ours: for the same
// destination with a better metric, or for a part of it. And those by which packets to the peers themselves would enter
// the tunnel.
func shadowed(h netstate.Host, desired netstate.State) error {
	var lengths []int
	for _, r := range desired.Routes {
		if r.Table == netstate.MainTable && !slices.Contains(lengths, r.Dst.Bits()) {
			lengths = append(lengths, r.Dst.Bits())
		}
	}
	out := intoTunnel(h, desired)
	h.EachRoute(func(hops []netstate.HostRoute) {
		r := hops[0]
		for _, bits := range lengths {
			p, err := r.Dst.Addr().Prefix(bits)
			if err != nil || bits > r.Dst.Bits() {
				continue
			}
			i, _ := slices.BinarySearchFunc(desired.Routes, netstate.Route{Table: netstate.MainTable, Dst: p}, netstate.Route.Compare)
			if i == len(desired.Routes) || desired.Routes[i].Dst != p {
				continue
			}
			if bits < r.Dst.Bits() || r.Metric <= desired.Routes[i].Metric {
				out = append(out, describe(hops, "belongs to another program and precedes the route to the peer "+p.String()))
			}
		}
	})
	return joined(out)
}

// intoTunnel finds routes by which the tunnel's own packets would enter it again: they never leave.
func intoTunnel(h netstate.Host, desired netstate.State) []string {
	var out []string
	for _, r := range h.Routes {
		covers := func(e netstate.FDBEntry) bool { return r.Dst.Contains(e.Dst) }
		if !h.IsTunnel(r.Link) || r.Dst.Bits() > 0 && !slices.ContainsFunc(desired.FDB, covers) {
			continue
		}
		if best := h.NextHops(r.Dst.Addr()); slices.Contains(best, r) { // no other comes before it
			out = append(out,
				describe(best, "belongs to another program and leads the tunnel's own packets into the tunnel"))
		}
	}
	return out
}

// describe names a route, with what is said of it, and how to remove it.
func describe(hops []netstate.HostRoute, what string) string {
	r := hops[0]
	name, how := fmt.Sprintf("the route to %s by %s", r.Dst, strings.Join(devicesOf(hops), " and ")), r.Dst.String()
	if len(hops) == 1 && !r.Drops {
		how += " dev " + r.Link
	}
	if r.Drops {
		name = fmt.Sprintf("the route that drops packets to %s", r.Dst)
	}
	command := "ip route del"
	if r.Dst.Addr().Is6() {
		command = "ip -6 route del"
	}
	return fmt.Sprintf("%s, metric %d, %s; to remove it: %s %s metric %d", name, r.Metric, what, command, how, r.Metric)
}

// failures says which changes the kernel refused: those without which pods can't talk, and the minor ones. What only follows from
// a device that could not be made is left out.
func failures(failed []netstate.Failure) (major, minor error) {
	var out, less []string
	noLink := slices.ContainsFunc(failed, func(f netstate.Failure) bool { return f.Kind() == "device" })
	for _, f := range failed {
		s, setting := f.Obj.(netstate.Sysctl)
		switch {
		case setting && strings.HasPrefix(s.Path, "net/bridge/") && errors.Is(f, fs.ErrNotExist):
			less = append(less, fmt.Sprintf("%s does not exist: load the module br_netfilter on the host (modprobe br_netfilter), or pods lose replies of services "+
				"whose endpoint is on their own node (or set --bridge-netfilter=false)", s.Path))
		case setting && strings.HasPrefix(s.Path, "net/bridge/"):
			less = append(less, f.Error())
		case setting && noLink && strings.HasPrefix(s.Path, "net/ipv6/conf/"): // it may be that of the device
		case setting && strings.HasSuffix(s.Path, "/accept_ra"):
			less = append(less, f.Error())
		case !noLink || f.Kind() == "device" || !errors.Is(f, netstate.ErrNoLink):
			out = append(out, f.Error())
		}
	}
	return joined(out), joined(less)
}

func unreachable(ways []backend.Way) error {
	var out []string
	for _, w := range ways {
		if w.Kind == backend.Unreachable {
			out = append(out, fmt.Sprintf("%s of node %s: %s", w.Peer.Subnets.Get(w.Family), w.Peer.Name(), w.Reason))
		}
	}
	return joined(out)
}

// reasons says why peers are unreachable, by subnet.
func reasons(ways []backend.Way) map[netip.Prefix]string {
	out := map[netip.Prefix]string{}
	for _, w := range ways {
		if w.Kind == backend.Unreachable {
			out[w.Peer.Subnets.Get(w.Family)] = w.Reason
		}
	}
	return out
}

// inside says which endpoints of etcd are inside the cluster network, where any node may lease the subnet that covers
// them.
func inside(endpoints []netip.Addr, c subnet.Config, own subnet.Lease) error {
	var out []string
	for _, ip := range endpoints {
		if sn := own.Subnets.Get(addr.FamilyOf(ip)); sn.Contains(ip) {
			out = append(out,
				fmt.Sprintf("etcd is at %s, inside this node's own subnet %s: that address leads to the pod bridge instead; "+
					"move etcd, or give this node another subnet", ip, sn))
			continue
		}
		out = append(out, fmt.Sprintf("etcd is at %s, inside the cluster network %s: a peer whose subnet covers it is "+
			"unreachable from here; move etcd, or choose another network", ip, c.Pools.Get(addr.FamilyOf(ip)).Network))
	}
	return joined(out)
}

func unknownKeys(config string) error {
	if keys := subnet.UnknownKeys([]byte(config)); len(keys) > 0 {
		return fmt.Errorf("the network config has unknown keys: %q", keys)
	}
	return nil
}

// logChanges says what was done to the kernel: a line for each change while they are few, a count by kind otherwise.
func logChanges(log *zap.Logger, done []netstate.Change) {
	if len(done) == 0 {
		return
	}
	counts := map[string]int{}
	for _, c := range done {
		if entry := log.Check(zap.DebugLevel, "kernel change applied"); entry != nil {
			entry.Write(zap.Stringer("change", c))
		}
		counts[c.Op.String()+" "+c.Kind()]++
	}
	log.Info("kernel reconciled", zap.Any("changes", counts))
}

// peerLog says which peers came, went, or are reached in another way than before.
type peerLog struct {
	log  *zap.Logger
	ways map[*subnet.Lease]wayKinds
}

type wayKinds = addr.Per[backend.WayKind]

func kindsOf(ways []backend.Way) map[*subnet.Lease]wayKinds {
	out := make(map[*subnet.Lease]wayKinds, len(ways))
	for _, w := range ways {
		k := out[w.Peer]
		k.Set(w.Family, w.Kind)
		out[w.Peer] = k
	}
	return out
}

// change takes note of ways that are no more, and of others that are new. all: there are no others than these.
func (p *peerLog) change(gone, come []backend.Way, all bool) {
	left, arrived := kindsOf(gone), kindsOf(come)
	if all {
		left = maps.Clone(p.ways)
	}
	for l, k := range left {
		if arrived[l] == k { // as before
			delete(left, l)
			delete(arrived, l)
		} else {
			delete(p.ways, l)
		}
	}
	maps.Copy(p.ways, arrived)
	p.say(left, arrived)
}

// say logs a line for each peer and family while they are few, a count otherwise. A peer that is in both lists has changed.
func (p *peerLog) say(gone, come map[*subnet.Lease]wayKinds) {
	if len(gone)+len(come) > mostNamed {
		p.log.Info("peers changed", zap.Int("added", len(come)), zap.Int("removed", len(gone)), zap.Int("peers", len(p.ways)))
		return
	}
	was := map[netip.Prefix]string{}
	for l, kinds := range gone {
		for _, f := range addr.Families() {
			if k := kinds.Get(f); k != 0 {
				was[l.Subnets.Get(f)] = fmt.Sprintf("%s via %s", k, l.PublicIP.Get(f))
			}
		}
	}
	lines := map[netip.Prefix]func(){}
	note := func(message string, l *subnet.Lease, f addr.Family, fields ...zap.Field) {
		sn := l.Subnets.Get(f)
		lines[sn] = func() {
			p.log.Info(message, append([]zap.Field{zap.String("peer", l.Name()), zap.Stringer("subnet", sn)}, fields...)...)
		}
	}
	for l, kinds := range come {
		for _, f := range addr.Families() {
			k, sn := kinds.Get(f), l.Subnets.Get(f)
			if k == 0 {
				continue
			}
			path, via := zap.Stringer("path", k), zap.Stringer("via", l.PublicIP.Get(f))
			switch old, known := was[sn]; {
			case !known:
				note("peer added", l, f, path, via)
			case old != fmt.Sprintf("%s via %s", k, l.PublicIP.Get(f)):
				note("peer changed", l, f, path, via, zap.String("before", old))
			}
			delete(was, sn)
		}
	}
	for l := range gone {
		for _, f := range addr.Families() {
			if was[l.Subnets.Get(f)] != "" {
				note("peer removed", l, f)
			}
		}
	}
	for _, sn := range slices.SortedFunc(maps.Keys(lines), netip.Prefix.Compare) {
		lines[sn]()
	}
}
