package page

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/overlayd/overlayd/diag/status"
)

// line is one line of a fact. Alert is set where it is not as it should be.
type line struct {
	Text  string `json:"text"`
	Alert bool   `json:"alert,omitempty"`
}

// fact is one thing about the node: the first line is what matters most.
type fact struct {
	Label string `json:"label"`
	Lines []line `json:"lines"`
}

// problem is what is wrong, why, and since when.
type problem struct {
	Name   string `json:"name"`
	Reason string `json:"reason"`
	Since  string `json:"since"`
	Word   string `json:"word"` // what it makes of the node
	Fatal  bool   `json:"fatal,omitempty"`
}

// node is the node at a glance, in words.
type node struct {
	Name     string    `json:"name"`
	About    string    `json:"about"`
	State    string    `json:"state"` // ready, degraded, not-ready or unknown: a CSS class
	Word     string    `json:"word"`
	Say      string    `json:"say"`
	Network  string    `json:"network"` // what is wrong with peers, empty if nothing is
	Problems []problem `json:"problems"`
	Restart  []string  `json:"restart"`
	Facts    []fact    `json:"facts"`
	Mark     string    `json:"mark"` // is another one as soon as peers are likely to be other ones
}

func unknownNode() node {
	return node{Name: "this node", State: "unknown", Word: "No answer", Say: "The values below are unknown."}
}

func nodeView(n status.Node) node {
	v := node{
		Name: n.Name, About: fmt.Sprintf("id %s, overlayd %s, up %s", n.ID, n.Version, since(n.Now, n.Started)), Network: troubled(n.Probe, n.Peers),
		Problems: []problem{}, Restart: n.Restart, Mark: fmt.Sprint(n.Store.Revision, n.Peers, n.Probe.Answer, n.Probe.Lossy, n.Probe.SmallOnly, n.Probe.Silent),
	}
	fatal := 0
	for _, p := range n.Problems {
		word := "degraded"
		if p.Fatal {
			fatal, word = fatal+1, "not ready"
		}
		v.Problems = append(v.Problems, problem{
			Name: p.Name, Reason: shorten(p.Reason, longText), Word: word, Fatal: p.Fatal,
			Since: fmt.Sprintf("for %s, since %s", since(n.Now, p.Since), p.Since.Format("2006-01-02 15:04:05 MST")),
		})
	}
	slices.SortStableFunc(v.Problems, func(a, b problem) int { return fatalFirst(a) - fatalFirst(b) })
	switch {
	case !n.Ready:
		v.State, v.Word, v.Say = "not-ready", "Not ready", fmt.Sprintf("%s that pods need %s missing.", count(fatal, "thing"), isAre(fatal))
	case len(n.Problems) > 0:
		v.State, v.Word, v.Say = "degraded", "Degraded", "Ready for pods, with problems."
	default:
		v.State, v.Word, v.Say = "ready", "Ready", "Ready for pods."
	}
	v.Facts = facts(n)
	return v
}

func fatalFirst(p problem) int {
	if p.Fatal {
		return 0
	}
	return 1
}

// troubled says how many peers packets don't reach as they should.
func troubled(p status.Probe, c status.PeerCounts) string {
	var out []string
	for _, x := range []struct {
		n    int
		what string
	}{
		{p.Silent, "silent"}, {p.SmallOnly, "reached only by small packets (MTU)"}, {p.Lossy, "lossy"}, {c.Unreachable, "unreachable"}, {c.Refused, "rejected"},
	} {
		if x.n > 0 {
			out = append(out, fmt.Sprintf("%d %s", x.n, x.what))
		}
	}
	if len(out) == 0 {
		return ""
	}
	return fmt.Sprintf("Of %s: %s.", count(c.Total, "peer"), strings.Join(out, ", "))
}

func facts(n status.Node) []fact {
	out := []fact{leaseFact(n), storeFact(n), networkFact(n.Network), interfaceFact(n.Interface)}
	for _, d := range n.Devices {
		out = append(out, deviceFact(d))
	}
	return append(out, peersFact(n.Peers), probeFact(n.Probe), firewallFact(n), kernelFact(n), repairedFact(n.Drift))
}

func (f *fact) add(format string, args ...any) {
	f.Lines = append(f.Lines, line{Text: shorten(fmt.Sprintf(format, args...), longText)})
}

func (f *fact) alert(when bool, format string, args ...any) {
	if when {
		f.Lines = append(f.Lines, line{Text: shorten(fmt.Sprintf(format, args...), longText), Alert: true})
	}
}

func leaseFact(n status.Node) fact {
	f, l := fact{Label: "Lease"}, n.Lease
	f.alert(len(l.Subnets) == 0, "none")
	for _, s := range l.Subnets {
		f.add("%s", s)
	}
	if len(l.Subnets) == 0 {
		return f
	}
	left := l.Expires.Sub(n.Now)
	switch {
	case l.Reserved:
		f.add("reserved for this node: does not expire")
	case l.Expires.IsZero():
	case left < 0:
		f.alert(true, "expired %s ago", span(-left))
	default:
		f.add("expires in %s unless renewed", span(left))
	}
	f.alert(!l.Held, "not confirmed by etcd")
	return f
}

func storeFact(n status.Node) fact {
	f, e := fact{Label: "etcd"}, n.Store
	f.alert(e.Error != "", "unreachable for %s: %s", since(n.Now, e.Since), e.Error)
	if e.Revision == 0 {
		f.alert(true, "no lease table read yet")
	} else {
		f.add("revision %d, %s", e.Revision, count(e.Entries, "lease"))
	}
	f.add("%s", strings.Join(e.Endpoints, " "))
	f.add("prefix %s", e.Prefix)
	requests := 0
	for _, r := range e.Requests {
		requests += int(r)
	}
	if requests > 0 {
		f.add("%s since start", count(requests, "request"))
	}
	return f
}

func networkFact(n status.Network) fact {
	f := fact{Label: "Network"}
	f.alert(n.Backend == "", "unknown yet")
	if n.Backend == "" {
		return f
	}
	f.add("%s, pod MTU %d", n.Backend, n.MTU)
	for _, s := range n.Networks {
		if !slices.ContainsFunc(n.Pools, func(p status.Pool) bool { return p.Network == s }) {
			f.add("%s", s)
		}
	}
	for _, p := range n.Pools {
		used := fmt.Sprintf("%s: %d of %s leased", p.Network, p.Leased, count(p.Subnets, "subnet"))
		if p.Leased*10 >= p.Subnets*9 {
			f.alert(true, "%s", used)
		} else {
			f.add("%s", used)
		}
	}
	return f
}

func interfaceFact(i status.Interface) fact {
	f := fact{Label: "Interface"}
	f.alert(i.Reason == "", "none yet")
	for _, ip := range i.PublicIPs {
		f.add("%s", ip)
	}
	if i.Reason != "" {
		f.add("%s", i.Reason)
	}
	if len(i.PublicIPs) > 0 && !i.PublicIPLocal {
		f.add("the public IP is not configured on this node")
	}
	return f
}

func deviceFact(d status.Device) fact {
	f := fact{Label: "Device"}
	f.add("%s", d.Name)
	f.add("VNI %d, UDP %d, MTU %d", d.VNI, d.Port, d.MTU)
	f.add("from %s over %s", d.Local, d.Over())
	f.add("MAC %s", d.MAC)
	var on, off []string
	for _, name := range slices.Sorted(maps.Keys(d.Offloads)) {
		if d.Offloads[name] {
			on = append(on, name)
		} else {
			off = append(off, name)
		}
	}
	if len(on) > 0 {
		f.add("offloads on: %s", strings.Join(on, ", "))
	}
	if len(off) > 0 {
		f.add("offloads off: %s", strings.Join(off, ", "))
	}
	return f
}

func peersFact(c status.PeerCounts) fact {
	f := fact{Label: "Peers"}
	f.add("%d", c.Total)
	f.add("%d tunnel, %d direct", c.Tunnel, c.Direct)
	f.alert(c.Unreachable > 0, "%d unreachable", c.Unreachable)
	f.alert(c.Refused > 0, "%d rejected%s", c.Refused, causes(c.RefusedBy))
	f.alert(c.Lingering > 0, "%d kept without a lease", c.Lingering)
	return f
}

func causes(by map[string]int) string {
	var out []string
	for _, why := range slices.Sorted(maps.Keys(by)) {
		out = append(out, fmt.Sprintf("%d %s", by[why], why))
	}
	if len(out) == 0 {
		return ""
	}
	return " (" + strings.Join(out, ", ") + ")"
}

func probeFact(p status.Probe) fact {
	f := fact{Label: "Probe"}
	f.alert(p.Error != "", "%s", p.Error)
	if !p.On {
		f.add("off")
		return f
	}
	if p.MedianRTT > 0 {
		f.add("median %s", roundTrip(p.MedianRTT))
	}
	f.add("%d of %d answer", p.Answer, p.Targets)
	f.alert(p.Silent > 0, "%d silent", p.Silent)
	f.alert(p.SmallOnly > 0, "%d small only: MTU", p.SmallOnly)
	f.alert(p.Lossy > 0, "%d lossy", p.Lossy)
	if p.NotPinged > 0 {
		f.add("%d not pinged yet", p.NotPinged)
	}
	f.alert(p.NotAllowed > 0, "the kernel refused to send %s", count(p.NotAllowed, "ping"))
	f.add("one round every %s, up to %d bytes", span(p.Round), p.Size)
	return f
}

func firewallFact(n status.Node) fact {
	f, w := fact{Label: "Firewall"}, n.Firewall
	if w.Checked.IsZero() {
		f.alert(true, "not applied yet")
		return f
	}
	f.add("%s", w.Kind)
	if w.Reason != "" {
		f.add("%s", w.Reason)
	}
	f.add("verified %s ago, %s", since(n.Now, w.Checked), count(w.Runs, "run"))
	f.alert(w.Failed > 0, "%s failed", count(w.Failed, "run"))
	return f
}

func kernelFact(n status.Node) fact {
	f, r := fact{Label: "Kernel"}, n.Reconcile
	if r.Last.IsZero() {
		f.alert(true, "not reconciled yet")
		return f
	}
	if r.Failures > 0 {
		f.alert(true, "refused %s in the last reconciliation", count(r.Failures, "object"))
	} else {
		f.add("in sync")
	}
	f.add("reconciled %s ago in %s", since(n.Now, r.Last), roundTrip(r.Took))
	if !r.Looked.IsZero() {
		f.add("full resync %s ago", since(n.Now, r.Looked))
	}
	var kinds []string
	for _, k := range n.Entries {
		kinds = append(kinds, fmt.Sprintf("%d %s", k.Count, k.Kind))
	}
	if len(kinds) > 0 {
		f.add("%s", strings.Join(kinds, ", "))
	}
	return f
}

func repairedFact(drift []status.DriftKind) fact {
	f := fact{Label: "Drift"}
	if len(drift) == 0 {
		f.add("none since start")
	}
	for _, d := range drift {
		f.alert(true, "%s: %d, last %s", d.Kind, d.Count, d.Last)
	}
	return f
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func isAre(n int) string {
	if n == 1 {
		return "is"
	}
	return "are"
}

// since is how long ago something was.
func since(now, then time.Time) string {
	if then.IsZero() {
		return "an unknown time"
	}
	return span(now.Sub(then))
}

// span is a duration as a person reads it: its two biggest units.
func span(d time.Duration) string {
	d = max(d, 0)
	const day = 24 * time.Hour
	two := func(big time.Duration, bigs string, small time.Duration, smalls string) string {
		if d%big < small {
			return fmt.Sprintf("%d %s", d/big, bigs)
		}
		return fmt.Sprintf("%d %s %d %s", d/big, bigs, d%big/small, smalls)
	}
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s", d/time.Second)
	case d < time.Hour:
		return two(time.Minute, "min", time.Second, "s")
	case d < 2*day:
		return two(time.Hour, "h", time.Minute, "min")
	}
	return two(day, "days", time.Hour, "h")
}

// roundTrip is a short duration in milliseconds, with as many digits as matter; empty for none.
func roundTrip(d time.Duration) string {
	ms := float64(d) / float64(time.Millisecond)
	switch {
	case d <= 0:
		return ""
	case ms < 10:
		return fmt.Sprintf("%.2f ms", ms)
	case ms < 100:
		return fmt.Sprintf("%.1f ms", ms)
	}
	return fmt.Sprintf("%.0f ms", ms)
}

// Names and reasons come from other nodes, and may be of any length.
const (
	shortText = 128
	longText  = 2000
)

// shorten cuts a text that is longer than most bytes.
func shorten(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}
