package status

import (
	"fmt"
	"io"
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
	for _, p := range n.Problems {
		colour := yellow
		if p.Fatal {
			colour = red
		}
		line("", "%s %s, for %s", s.paint(colour, p.Name+":"), p.Reason, ago(n.Now, p.Since))
	}
	line("Lease", "%s", n.Lease.text(n.Now))
	line("etcd", "%s", n.Store.text(n.Now))
	if n.Network.Backend != "" {
		line("Network", "%s, %s, pods' MTU %d", strings.Join(n.Network.Networks, " and "), n.Network.Backend, n.Network.MTU)
	}
	line("Interface", "%s", or(n.Interface.Reason, "none yet"))
	if len(n.Interface.PublicIPs) > 0 {
		line("Public IP", "%s%s", strings.Join(n.Interface.PublicIPs, " and "), unless(n.Interface.PublicIPLocal, " (not configured on this node)"))
	}
	for _, d := range n.Devices {
		line("Device", "%s, VNI %d, UDP %d from %s over %s, MAC %s, MTU %d", d.Name, d.VNI, d.Port, d.Local, d.Underlay, d.MAC, d.MTU)
	}
	line("Peers", "%s", n.Peers.text(s))
	if n.Firewall.Checked.IsZero() {
		line("Firewall", "not in place yet")
	} else {
		line("Firewall", "%s (%s), looked at %s ago", n.Firewall.Kind, n.Firewall.Reason, ago(n.Now, n.Firewall.Checked))
	}
	if n.Reconcile.Looked.IsZero() {
		return t.Flush()
	}
	line("Kernel", "brought up to date %s ago, in %s; looked at as a whole %s ago%s", ago(n.Now, n.Reconcile.Last), n.Reconcile.Took.Round(time.Microsecond),
		ago(n.Now, n.Reconcile.Looked), unless(n.Reconcile.Failures == 0, fmt.Sprintf("; it refused %d objects", n.Reconcile.Failures)))
	if len(n.Drift) == 0 {
		line("Repaired", "nothing: nobody has changed what is ours since the start")
	}
	for i, d := range n.Drift {
		line(unless(i > 0, "Repaired"), "%s: %d, last %s", d.Kind, d.Count, d.Last)
	}
	return t.Flush()
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
		s += fmt.Sprintf(", until %s unless it is renewed", l.Expires.Format(time.RFC3339))
		if now.After(l.Expires) {
			s += " (it has ended)"
		}
	}
	return s + unless(l.Held, "; etcd does not say so at the moment")
}

func (e Store) text(now time.Time) string {
	s := fmt.Sprintf("%s, prefix %s, revision %d, %d leases", strings.Join(e.Endpoints, " "), e.Prefix, e.Revision, e.Entries)
	if e.Error != "" {
		s += fmt.Sprintf("; not reached for %s: %s", ago(now, e.Since), e.Error)
	}
	return s
}

func (p PeerCounts) text(s Style) string {
	out := []string{fmt.Sprintf("%d: %d by tunnel, %d directly", p.Total, p.Tunnel, p.Direct)}
	for _, x := range []struct {
		n    int
		what string
	}{{p.Unreachable, "unreachable"}, {p.Refused, "refused"}, {p.Lingering, "kept although their leases are gone"}} {
		if x.n > 0 {
			out = append(out, s.paint(yellow, fmt.Sprintf("%d %s", x.n, x.what)))
		}
	}
	return strings.Join(out, ", ")
}

// PrintPeers writes a line for each peer.
func PrintPeers(w io.Writer, peers []Peer, s Style) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(t, "NODE\tSUBNET\tPUBLIC IP\tWAY\tREMARK")
	for _, p := range peers {
		remark := p.Reason
		if p.Leaving {
			remark = "its lease is gone; kept for a moment"
		}
		way := p.Way
		if p.Reason != "" {
			way = s.paint(yellow, way)
		}
		_, _ = fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", or(p.Name, "-"), p.Subnet, or(p.PublicIP, "-"), way, remark)
	}
	return t.Flush()
}

// PrintPeer writes all there is to know of one peer.
func PrintPeer(w io.Writer, p Peer, s Style) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, x := range [][2]string{
		{"Node", p.Name}, {"ID", p.ID}, {"Subnet", p.Subnet}, {"Public IP", p.PublicIP}, {"MAC", p.MAC}, {"Way", p.Way}, {"Reason", s.paint(yellow, p.Reason)},
	} {
		if x[1] != "" && x[1] != yellow+plain {
			_, _ = fmt.Fprintf(t, "%s\t%s\n", x[0], x[1])
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
