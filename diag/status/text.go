package status

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Style selects the output: with or without colours.
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

// word is the state of the node in one word.
func (n Node) word(s Style) string {
	switch {
	case !n.Ready:
		return s.paint(red, "NOT READY")
	case len(n.Problems) > 0:
		return s.paint(yellow, "degraded")
	}
	return s.paint(green, "ready")
}

// ExitCode is 0 for a node without problems, 1 otherwise.
func (n Node) ExitCode() int {
	if !n.Ready || len(n.Problems) > 0 {
		return 1
	}
	return 0
}

// Print writes a node on one screen.
func (n Node) Print(w io.Writer, s Style) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(label, text string) { _, _ = fmt.Fprintf(t, "%s\t%s\n", label, text) }
	line("Node", fmt.Sprintf("%s (id %s), overlayd %s, up %s", n.Name, n.ID, n.Version, Ago(n.Now, n.Started)))
	line("State", n.word(s))
	for _, p := range folded(n.Problems) {
		colour := yellow
		if p.Fatal {
			colour = red
		}
		line("", fmt.Sprintf("%s %s, for %s", s.paint(colour, p.Name+":"), p.Reason, Ago(n.Now, p.Since)))
	}
	restart := Row{Label: "Pending restart", List: true}
	for _, r := range n.Restart {
		restart.alert(true, "%s", r)
	}
	if len(n.Restart) == 0 {
		restart.add("none")
	}
	for _, r := range append(n.Rows(), restart) {
		for i, text := range r.lines(s) {
			line(unless(i > 0, r.Label), text)
		}
	}
	return t.Flush()
}

// lines are the lines of a row: one for each part of a list, otherwise a single one.
func (r Row) lines(s Style) []string {
	var out []string
	for _, p := range r.Parts {
		text := p.Text
		if p.Alert {
			text = s.paint(yellow, text)
		}
		out = append(out, text)
	}
	if r.List {
		return out
	}
	return []string{strings.Join(out, ", ")}
}

// folded merges problems with the same reason.
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

// PrintPeers writes a line for each peer.
func PrintPeers(w io.Writer, peers []Peer, s Style) error {
	b := bufio.NewWriter(w) // tabwriter writes each cell by itself: a system call for each of thousands
	t := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(t, "NODE\tSUBNET\tPUBLIC IP\tPATH\tPINGS\tREMARK")
	for _, p := range peers {
		remark := p.Reason
		if p.Leaving {
			remark = "its lease is gone; kept briefly"
		}
		path := p.Path
		if p.Reason != "" {
			path = s.paint(yellow, path)
		}
		_, _ = fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", cmp.Or(p.Name, "-"), p.Subnet, cmp.Or(p.PublicIP, "-"), path,
			p.Probe.word(s), remark)
	}
	return errors.Join(t.Flush(), b.Flush())
}

// word is the result of pinging a peer, in a word or two.
func (p *PeerProbe) word(s Style) string {
	if p == nil {
		return "-"
	}
	switch p.Verdict {
	case NotPinged:
		return "not yet"
	case Answers:
		return Short(p.RTT())
	}
	return s.paint(yellow, string(p.Verdict))
}

// RTT is the last round-trip time of a small packet, or else of a full-size one; 0: neither was answered.
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
		out += ", RTT " + Short(p.RTT)
	}
	return out
}

// PrintPeer writes everything known about one peer.
func PrintPeer(w io.Writer, p Peer, s Style) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, x := range [][2]string{
		{"Node", p.Name},
		{"ID", p.ID},
		{"Subnet", p.Subnet},
		{"Public IP", p.PublicIP},
		{"MAC", p.MAC},
		{"Public key", p.PublicKey},
		{"Path", p.Path},
		{"Reason", s.paint(yellow, p.Reason)},
	} {
		if x[1] != "" && x[1] != yellow+plain {
			_, _ = fmt.Fprintf(t, "%s\t%s\n", x[0], x[1])
		}
	}
	if q := p.Probe; q != nil {
		_, _ = fmt.Fprintf(t, "Pings\t%s, pinged at %s\n\t%s\n\t%s\n", q.word(s), q.Address, q.Small.text("small"),
			q.Full.text("full size"))
		if !q.Last.IsZero() {
			_, _ = fmt.Fprintf(t, "\tlast answer at %s\n", q.Last.Format(time.RFC3339))
		}
	}
	for i, e := range p.Entries {
		_, _ = fmt.Fprintf(t, "%s\t%s\n", unless(i > 0, "Kernel"), e)
	}
	return t.Flush()
}
