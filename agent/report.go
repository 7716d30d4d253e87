package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"go.uber.org/zap"

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
		out = append(out, fmt.Sprintf("lease %.100q of node %q is left out: %s", r.Key, r.Node, r.Reason))
	}
	return joined(out)
}

// shadowed finds routes of somebody else that packets to a peer's subnet would take before ours: for the same destination with
// a better metric, or for a part of it.
func shadowed(h netstate.Host, desired netstate.State) error {
	ours := map[netip.Prefix]uint32{}
	lengths := map[int]bool{}
	for _, r := range desired.Routes {
		if r.Table == netstate.MainTable {
			ours[r.Dst] = r.Metric
			lengths[r.Dst.Bits()] = true
		}
	}
	var out []string
	for _, r := range h.Routes {
		for bits := range lengths {
			p, err := r.Dst.Addr().Prefix(bits)
			if metric, ok := ours[p]; err == nil && ok && bits <= r.Dst.Bits() && (bits < r.Dst.Bits() || r.Metric <= metric) {
				out = append(out, describe(r, p))
			}
		}
	}
	return joined(out)
}

func describe(r netstate.HostRoute, peer netip.Prefix) string {
	what, how := fmt.Sprintf("the route to %s by %s", r.Dst, r.Link), fmt.Sprintf("%s dev %s", r.Dst, r.Link)
	if r.Drops {
		what, how = fmt.Sprintf("the route that drops packets to %s", r.Dst), r.Dst.String()
	}
	return fmt.Sprintf("%s, metric %d, is not ours and comes before the way to the peer %s; to remove it: ip route del %s metric %d", what, r.Metric, peer, how, r.Metric)
}

// failures says which changes the kernel refused: those without which pods can't talk, and the minor ones. What only follows from
// a device that could not be made is left out.
func failures(failed []netstate.Failure) (major, minor error) {
	var out, less []string
	noLink := slices.ContainsFunc(failed, func(f netstate.Failure) bool { return f.Kind() == "device" })
	for _, f := range failed {
		s, setting := f.Obj.(netstate.Sysctl)
		switch {
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

func unknownKeys(config string) error {
	if keys := subnet.UnknownKeys([]byte(config)); len(keys) > 0 {
		return fmt.Errorf("the network config has keys that mean nothing here: %q", keys)
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
		if entry := log.Check(zap.DebugLevel, "kernel changed"); entry != nil {
			entry.Write(zap.Stringer("change", c))
		}
		counts[c.Op.String()+" "+c.Kind()]++
	}
	log.Info("kernel state brought up to date", zap.Any("changes", counts))
}

// peerLog says which peers came, went, or are reached in another way than before.
type peerLog struct {
	log  *zap.Logger
	ways map[string]string
}

func (p *peerLog) note(ways []backend.Way) {
	now := make(map[string]string, len(ways))
	var lines []string
	for _, w := range ways {
		key := fmt.Sprintf("%s %s", w.Peer.Name(), w.Peer.Subnets.Get(w.Family))
		now[key] = fmt.Sprintf("%s to %s", w.Kind, w.Peer.PublicIP.Get(w.Family))
		if w.Kind == backend.Unreachable {
			now[key] = "unreachable: " + w.Reason
		}
		if old, ok := p.ways[key]; !ok {
			lines = append(lines, fmt.Sprintf("new: %s, %s", key, now[key]))
		} else if old != now[key] {
			lines = append(lines, fmt.Sprintf("changed: %s, %s (was %s)", key, now[key], old))
		}
	}
	for key := range p.ways {
		if _, ok := now[key]; !ok {
			lines = append(lines, "gone: "+key)
		}
	}
	p.ways = now
	if len(lines) > mostNamed {
		p.log.Info("peers changed", zap.Int("changes", len(lines)), zap.Int("peers", len(ways)), zap.Strings("some", lines[:mostNamed]))
		return
	}
	for _, l := range lines {
		p.log.Info("peer " + l)
	}
}
