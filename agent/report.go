package agent

import (
	"errors"
	"fmt"
	"io/fs"
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

// problems is an error that names what is wrong with each of a list, so far as something is; nil: nothing.
func problems[T any](list []T, wrong func(T) string) error {
	var out []string
	for _, x := range list {
		if s := wrong(x); s != "" {
			out = append(out, s)
		}
	}
	switch rest := len(out) - mostNamed; {
	case len(out) == 0:
		return nil
	case rest > 0:
		return fmt.Errorf("%s; and %d more", strings.Join(out[:mostNamed], "; "), rest)
	}
	return errors.New(strings.Join(out, "; "))
}

func asItIs(s string) string { return s }

func rejections(rejected []subnet.Rejection) error {
	return problems(rejected, func(r subnet.Rejection) string {
		return fmt.Sprintf("lease %.100q of node %q rejected: %s", r.Key, r.Node, r.Reason)
	})
}

// shadowed says which routes of other programs send packets where they must not go, and how to remove them.
func shadowed(h netstate.Host, desired netstate.State) error {
	return problems(netstate.RouteConflicts(h, desired), func(c netstate.RouteConflict) string {
		return fmt.Sprintf("%s; to remove it: %s", c, c.Command())
	})
}

// failures says which changes the kernel refused: those without which pods can't talk, and the minor ones. What only
// follows from a device that could not be made is left out.
func failures(failed []netstate.Failure) (major, minor error) {
	var out, less []string
	noLink := slices.ContainsFunc(failed, func(f netstate.Failure) bool { return f.Kind() == "device" })
	for _, f := range failed {
		s, _ := f.Obj.(netstate.Sysctl)
		bridge := strings.HasPrefix(s.Path, "net/bridge/")
		switch {
		case bridge && errors.Is(f, fs.ErrNotExist):
			less = append(less, s.Path+" does not exist: load the module br_netfilter on the host (modprobe br_netfilter), "+
				"or pods lose replies of services whose endpoint is on their own node (or set --bridge-netfilter=false)")
		case noLink && strings.HasPrefix(s.Path, "net/ipv6/conf/"): // it may be that of the device
		case bridge, strings.HasSuffix(s.Path, "/accept_ra"):
			less = append(less, f.Error())
		case !noLink || f.Kind() == "device" || !errors.Is(f, netstate.ErrNoLink):
			out = append(out, f.Error())
		}
	}
	return problems(out, asItIs), problems(less, asItIs)
}

func unreachable(all []backend.Path) error {
	return problems(all, func(p backend.Path) string {
		if p.Kind != backend.Unreachable {
			return ""
		}
		return fmt.Sprintf("%s of node %s: %s", p.Subnet(), p.Peer.Name(), p.Reason)
	})
}

// inside says which endpoints of the store are inside the cluster network, where any node may lease the subnet that covers
// them.
func inside(store string, endpoints []netip.Addr, c subnet.Config, own addr.Per[netip.Prefix]) error {
	return problems(endpoints, func(ip netip.Addr) string {
		f := addr.FamilyOf(ip)
		if sn := own.Get(f); sn.Contains(ip) {
			return fmt.Sprintf("%s is at %s, inside this node's own subnet %s: that address leads to the pod bridge instead; "+
				"move it, or give this node another subnet", store, ip, sn)
		}
		return fmt.Sprintf("%s is at %s, inside the cluster network %s: a peer whose subnet covers it is unreachable from "+
			"here; move it, or choose another network", store, ip, c.Pools.Get(f).Network)
	})
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

// logPaths logs peers that came, went, or are reached by another path than before: a line for each while they are few,
// a count otherwise.
func logPaths(log *zap.Logger, changes []pathChange, peers int) {
	// what is pinged, or why there is no path, may be another alone
	changes = slices.DeleteFunc(slices.Clone(changes), func(c pathChange) bool {
		return c.was.Kind == c.is.Kind && c.was.Peer.PublicIP.Get(c.was.Family) == c.is.Peer.PublicIP.Get(c.is.Family)
	})
	if len(changes) > mostNamed {
		added, removed := map[*subnet.Lease]bool{}, map[*subnet.Lease]bool{} // they have a path in each family
		for _, c := range changes {
			added[c.is.Peer], removed[c.was.Peer] = true, true
		}
		delete(added, nil)
		delete(removed, nil)
		log.Info("peers changed", zap.Int("added", len(added)), zap.Int("removed", len(removed)), zap.Int("peers", peers))
		return
	}
	slices.SortFunc(changes, func(a, b pathChange) int { return a.subnet().Compare(b.subnet()) })
	for _, c := range changes {
		if c.is.Peer == nil {
			log.Info("peer removed", zap.String("peer", c.was.Peer.Name()), zap.Stringer("subnet", c.subnet()))
			continue
		}
		fields := []zap.Field{
			zap.String("peer", c.is.Peer.Name()), zap.Stringer("subnet", c.subnet()), zap.Stringer("path", c.is.Kind),
			zap.Stringer("via", c.is.Peer.PublicIP.Get(c.is.Family)),
		}
		if c.was.Peer == nil {
			log.Info("peer added", fields...)
		} else {
			before := fmt.Sprintf("%s via %s", c.was.Kind, c.was.Peer.PublicIP.Get(c.was.Family))
			log.Info("peer changed", append(fields, zap.String("before", before))...)
		}
	}
}
