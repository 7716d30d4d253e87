package status

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Style is how to print: with or without colours.
type Style struct{ Colour bool }

const (
	red, yellow, green, plain = "\x1b[31m", "\x1b[33m", "\x1b[32m", "\x1b[0m"
)

func (s Style) paint(colour, text string) string {
	if !s.Colour {
		return text
	}
	return colour + text + plain
}

// word says in one word how the node is.
func (n Node) word(s Style) string {
	switch {
	case !n.Ready:
		return s.paint(red, "NOT READY")
	case len(n.Problems) > 0:
		return s.paint(yellow, "degraded")
	}
	return s.paint(green, "ready")
}

// ExitCode is 0 for a node that is as it should be, 1 for one that is not.
func (n Node) ExitCode() int {
	if !n.Ready || len(n.Problems) > 0 {
		return 1
	}
	return 0
}

// Print writes a node on one screen.
func (n Node) Print(w io.Writer, s Style) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(what, format string, args ...any) {
		_, _ = fmt.Fprintf(t, "%s\t%s\n", what, fmt.Sprintf(format, args...))
	}
	line("Node", "%s (id %s), overlayd %s, up %s", n.Name, n.ID, n.Version, ago(n.Now, n.Started))
	line("State", "%s", n.word(s))
	for _, p := range folded(n.Problems) {
		colour := yellow
		if p.Fatal {
			colour = red
		}
		line("", "%s %s, for %s", s.paint(colour, p.Name+":"), p.Reason, ago(n.Now, p.Since))
	}
	line("Lease", "%s", n.Lease.text(n.Now))
	line("etcd", "%s", n.Store.text(n.Now))
	if n.Network.Backend != "" {
		mtu := ""
		if n.Network.MTU > 0 {
			mtu = fmt.Sprintf(", pod MTU %d", n.Network.MTU)
		}
		line("Network", "%s, %s%s%s", strings.Join(n.Network.Networks, " and "), n.Network.Backend, mtu, poolsText(n.Network.Pools))
	}
	line("Interface", "%s", or(n.Interface.Reason, "none yet"))
	if len(n.Interface.PublicIPs) > 0 {
		line("Public IP", "%s%s", strings.Join(n.Interface.PublicIPs, " and "), unless(n.Interface.PublicIPLocal, " (not configured on this node)"))
	}
	for _, d := range n.Devices {
		line("Device", "%s, VNI %d, UDP %d from %s over %s, MAC %s, MTU %d%s", d.Name, d.VNI, d.Port, d.Local, d.Over(),
			d.MAC, d.MTU, d.offloads(s))
	}
	line("Peers", "%s", n.Peers.text(s))
	line("Pings", "%s", n.Probe.text(s))
	if n.Firewall.Checked.IsZero() {
		line("Firewall", "not applied yet")
	} else {
		line("Firewall", "%s (%s), verified %s ago", n.Firewall.Kind, n.Firewall.Reason, ago(n.Now, n.Firewall.Checked))
	}
	if n.Reconcile.Looked.IsZero() {
		return t.Flush()
	}
	line("Kernel", "reconciled %s ago in %s, full resync %s ago%s", ago(n.Now, n.Reconcile.Last), n.Reconcile.Took.Round(time.Microsecond),
		ago(n.Now, n.Reconcile.Looked), unless(n.Reconcile.Failures == 0, fmt.Sprintf("; %d objects refused", n.Reconcile.Failures)))
	line("Entries", "%s", entriesText(n.Entries))
	if len(n.Drift) == 0 {
		line("Drift", "none since start")
	}
	for i, d := range n.Drift {
		line(unless(i > 0, "Drift"), "%s: %d, last %s, %s ago", d.Kind, d.Count, d.Last, ago(n.Now, d.At))
	}
	if len(n.Restart) == 0 {
		line("Pending restart", "none")
	}
	for i, r := range n.Restart {
		line(unless(i > 0, "Pending restart"), "%s", s.paint(yellow, r))
	}
	return t.Flush()
}

// offloads says which are on, and which off.
func (d Device) offloads(s Style) string {
	var on, off []string
	for _, name := range slices.Sorted(maps.Keys(d.Offloads)) {
		if d.Offloads[name] {
			on = append(on, name)
		} else {
			off = append(off, name)
		}
	}
	out := ""
	if len(on) > 0 {
		out += ", offloads on: " + strings.Join(on, " ")
	}
	if len(off) > 0 {
		out += ", " + s.paint(yellow, "off: "+strings.Join(off, " "))
	}
	return out
}

// poolsText says how much is taken, of the pool that has the least left.
func poolsText(pools []Pool) string {
	worst, share := Pool{}, -1.0
	for _, p := range pools {
		if used := float64(p.Leased) / float64(max(p.Subnets, 1)); used > share {
			worst, share = p, used
		}
	}
	if share < 0 {
		return ""
	}
	return fmt.Sprintf(", %d of %d subnets leased", worst.Leased, worst.Subnets)
}

func entriesText(entries []KindCount) string {
	var out []string
	for _, e := range entries {
		if e.Count > 0 {
			out = append(out, fmt.Sprintf("%s %d", e.Kind, e.Count))
		}
	}
	return or(strings.Join(out, ", "), "none")
}

func (p Probe) text(s Style) string {
	switch {
	case !p.On:
		return "off"
	case p.Error != "":
		return s.paint(yellow, p.Error)
	case p.Targets == 0:
		return "no peers"
	}
	out := fmt.Sprintf("%d of %d answer", p.Answer+p.Lossy+p.SmallOnly, p.Targets)
	if p.MedianRTT > 0 {
		out += fmt.Sprintf(", median RTT %s", short(p.MedianRTT))
	}
	for _, x := range []struct {
		n    int
		what string
	}{{p.Silent, "silent"}, {p.SmallOnly, fmt.Sprintf("answering only small packets, not %d bytes", p.Size)}, {p.Lossy, "lossy"}} {
		if x.n > 0 {
			out += ", " + s.paint(yellow, fmt.Sprintf("%d %s", x.n, x.what))
		}
	}
	if p.NotPinged > 0 {
		out += fmt.Sprintf(", %d not pinged yet", p.NotPinged)
	}
	return out + fmt.Sprintf("; one round every %s", p.Round.Round(time.Second))
}

// short is a round trip as a person reads it.
func short(d time.Duration) string {
	if d < 10*time.Millisecond {
		return d.Round(time.Microsecond).String()
	}
	return d.Round(100 * time.Microsecond).String()
}

// folded puts problems with one and the same reason into one line.
func folded(problems []Problem) []Problem {
	var out []Problem
	for _, p := range problems {
		i := slices.IndexFunc(out, func(o Problem) bool { return o.Reason == p.Reason && o.Fatal == p.Fatal })
		if i < 0 {
			out = append(out, p)
			continue
		}
		out[i].Name += ", " + p.Name
	}
	return out
}

func (l Lease) text(now time.Time) string {
	if len(l.Subnets) == 0 {
		return "none"
	}
	s := strings.Join(l.Subnets, " and ")
	switch {
	case l.Reserved:
		s += ", reserved for this node"
	case !l.Expires.IsZero():
		s += fmt.Sprintf(", expires %s unless renewed", l.Expires.Format(time.RFC3339))
		if now.After(l.Expires) {
			s += " (expired)"
		}
	}
	if l.Losses > 0 {
		s += fmt.Sprintf("; disappeared from etcd %s, last %s ago", times(l.Losses), ago(now, l.LostAt))
	}
	return s + unless(l.Held, "; not confirmed by etcd")
}

func (e Store) text(now time.Time) string {
	s := fmt.Sprintf("%s, prefix %s, revision %d, %d leases", strings.Join(e.Endpoints, " "), e.Prefix, e.Revision, e.Entries)
	if e.Losses > 0 {
		s += fmt.Sprintf("; lost data or was restored from a backup %s, last %s ago", times(e.Losses), ago(now, e.LostAt))
	}
	if e.Error != "" {
		s += fmt.Sprintf("; unreachable for %s: %s", ago(now, e.Since), e.Error)
	}
	return s
}

func (p PeerCounts) text(s Style) string {
	out := []string{fmt.Sprintf("%d: %d tunnel, %d direct", p.Total, p.Tunnel, p.Direct)}
	for _, x := range []struct {
		n    int
		what string
	}{{p.Unreachable, "unreachable"}, {p.Refused, "rejected"}, {p.Lingering, "kept without a lease"}} {
		if x.n > 0 {
			out = append(out, s.paint(yellow, fmt.Sprintf("%d %s", x.n, x.what)))
		}
	}
	return strings.Join(out, ", ")
}

// PrintPeers writes a line for each peer.
func PrintPeers(w io.Writer, peers []Peer, s Style) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(t, "NODE\tSUBNET\tPUBLIC IP\tPATH\tPINGS\tREMARK")
	for _, p := range peers {
		remark := p.Reason
		if p.Leaving {
			remark = "its lease is gone; kept briefly"
		}
		way := p.Way
		if p.Reason != "" {
			way = s.paint(yellow, way)
		}
		_, _ = fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", or(p.Name, "-"), p.Subnet, or(p.PublicIP, "-"), way, p.Probe.word(s), remark)
	}
	return t.Flush()
}

// word is what came of pinging a peer, in a word or two.
func (p *PeerProbe) word(s Style) string {
	if p == nil {
		return "-"
	}
	switch p.Verdict {
	case NotPinged:
		return "not yet"
	case Answers:
		return short(p.RTT())
	}
	return s.paint(yellow, string(p.Verdict))
}

// RTT is the last round trip of a small packet, or of a full-size one where there was none; 0: neither was answered.
func (p *PeerProbe) RTT() time.Duration {
	if p.Small.RTT == 0 {
		return p.Full.RTT
	}
	return p.Small.RTT
}

func (p Pings) text(size string) string {
	if p.Sent == 0 {
		return size + ": not yet"
	}
	out := fmt.Sprintf("%s: %d of the last %d lost", size, p.Lost, p.Sent)
	if p.RTT > 0 {
		out += ", RTT " + short(p.RTT)
	}
	return out
}

// PrintPeer writes all there is to know of one peer.
func PrintPeer(w io.Writer, p Peer, s Style) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, x := range [][2]string{
		{"Node", p.Name}, {"ID", p.ID}, {"Subnet", p.Subnet}, {"Public IP", p.PublicIP}, {"MAC", p.MAC}, {"Path", p.Way}, {"Reason", s.paint(yellow, p.Reason)},
	} {
		if x[1] != "" && x[1] != yellow+plain {
			_, _ = fmt.Fprintf(t, "%s\t%s\n", x[0], x[1])
		}
	}
	if q := p.Probe; q != nil {
		_, _ = fmt.Fprintf(t, "Pings\t%s of %s\n\t%s\n\t%s\n", q.word(s), q.Address, q.Small.text("small"), q.Full.text("full size"))
		if !q.Heard.IsZero() {
			_, _ = fmt.Fprintf(t, "\tlast answer at %s\n", q.Heard.Format(time.RFC3339))
		}
	}
	for i, e := range p.Entries {
		_, _ = fmt.Fprintf(t, "%s\t%s\n", unless(i > 0, "Kernel"), e)
	}
	return t.Flush()
}

// ago is how long something was, in a form that a person reads.
func ago(now, then time.Time) string {
	if then.IsZero() {
		return "?"
	}
	d := now.Sub(then)
	switch {
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < time.Minute:
		return d.Round(100 * time.Millisecond).String()
	case d < 48*time.Hour:
		return d.Round(time.Second).String()
	}
	return fmt.Sprintf("%d days", int(d/(24*time.Hour)))
}

// times is a number as a person reads it.
func times(n int) string {
	if n == 1 {
		return "once"
	}
	return fmt.Sprintf("%d times", n)
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

func unless(not bool, s string) string {
	if not {
		return ""
	}
	return s
}
