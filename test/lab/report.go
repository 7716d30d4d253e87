package lab

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/overlayd/overlayd/addr"
)

// CheckName says what an outcome is the outcome of.
type CheckName string

// The checks of one cell of the matrix, and the two that stand beside it.
const (
	CheckPing     CheckName = "ping"     // one echo request and its reply
	CheckTCP      CheckName = "tcp"      // 1 MiB, and no NAT seen from either end
	CheckMTU      CheckName = "mtu"      // an echo request of the full pod MTU with DF set
	CheckInternet CheckName = "internet" // 1 MiB to the internet host, which sees the node's address
	CheckPath     CheckName = "path"     // in a tunnel or not, as the options ask for
)

// Outcome is one check between two endpoints in one family.
type Outcome struct {
	Check    CheckName   `json:"check"`
	From     string      `json:"from"`
	To       string      `json:"to"`
	Family   addr.Family `json:"family"`
	FromAddr netip.Addr  `json:"fromAddr"`
	ToAddr   netip.Addr  `json:"toAddr"`
	Path     string      `json:"path,omitempty"`
	Err      string      `json:"error,omitempty"` // empty: passed
}

func (o Outcome) String() string {
	return fmt.Sprintf("%-8s %s (%s) -> %s (%s): %s", o.Check, o.From, o.FromAddr, o.To, o.ToAddr, o.Err)
}

// Lease is what a node got, as its subnet.env says it.
type Lease struct {
	Node     string         `json:"node"`
	Segment  int            `json:"segment"`
	Underlay []netip.Addr   `json:"underlay"`
	Subnets  []netip.Prefix `json:"subnets"`
	MTU      int            `json:"mtu"`
	Pods     []string       `json:"pods"`
}

// Report is all that a check found.
type Report struct {
	Lab      string    `json:"lab"`
	Title    string    `json:"title"`
	Leases   []Lease   `json:"leases"`
	Checks   int       `json:"checks"`
	Failed   int       `json:"failed"`
	Failures []Outcome `json:"failures"`
	Outcomes []Outcome `json:"outcomes"`
}

// newReport counts the outcomes.
func newReport(t Topology, leases []Lease, outcomes []Outcome) Report {
	r := Report{
		Lab: t.Options.Name, Title: t.title(), Leases: leases,
		Outcomes: outcomes, Checks: len(outcomes), Failures: []Outcome{},
	}
	for _, o := range outcomes {
		if o.Err != "" {
			r.Failures = append(r.Failures, o)
		}
	}
	r.Failed = len(r.Failures)
	return r
}

func (t Topology) title() string {
	direct := ""
	if t.Options.Direct {
		direct = " with DirectRouting"
	}
	return fmt.Sprintf("%s, %s each, %s, %s%s, %s",
		plural(t.Options.Nodes, "node"), plural(t.Options.Pods, "pod"), plural(t.Options.Segments, "underlay segment"),
		t.Options.Backend, direct, t.Options.Stack)
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// families lists those that occur, IPv4 first.
func (r Report) families() []addr.Family {
	all := addr.Families()
	return slices.DeleteFunc(all[:], func(f addr.Family) bool {
		return !slices.ContainsFunc(r.Outcomes, func(o Outcome) bool { return o.Family == f })
	})
}

// Text renders the report for a terminal.
func (r Report) Text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Lab %s: %s\n\n", r.Lab, r.Title)
	r.writeLeases(&b)
	r.writeMatrices(&b)
	r.writePaths(&b)
	r.writeFailures(&b)
	fmt.Fprintf(&b, "%d checks, %d failed\n", r.Checks, r.Failed)
	return b.String()
}

func (r Report) writeLeases(b *strings.Builder) {
	rows := [][]string{{"NODE", "SEGMENT", "UNDERLAY", "SUBNET", "POD MTU"}}
	for _, l := range r.Leases {
		rows = append(rows, []string{l.Node, fmt.Sprint(l.Segment), join(l.Underlay), join(l.Subnets), fmt.Sprint(l.MTU)})
	}
	b.WriteString("Leases\n" + Table(rows, 2) + "\n")
}

func join[T fmt.Stringer](values []T) string {
	var out []string
	for _, v := range values {
		out = append(out, v.String())
	}
	return strings.Join(out, " ")
}

const matrixLegend = `  ✓ = ping; 1 MiB over TCP, each end seeing the other's own address (no NAT); ping of the full pod MTU with DF set
      (to the internet: 1 MiB over TCP, the host there seeing the node's address)
`

const failureLegend = `  p, t, m = the ping (after which no more is tried), the TCP transfer, the full-MTU ping failed; ✗ = several of them
`

func (r Report) writeMatrices(b *strings.Builder) {
	marks := r.marks()
	for _, f := range r.families() {
		fmt.Fprintf(b, "%s, from row to column\n%s\n", f, Table(r.matrix(f, marks), 1))
	}
	b.WriteString(matrixLegend)
	if r.Failed > 0 {
		b.WriteString(failureLegend)
	}
	b.WriteString("\n")
}

func (r Report) matrix(f addr.Family, marks map[cell]string) [][]string {
	header := []string{""}
	var rows [][]string
	for _, l := range r.Leases {
		header = append(header, "│", l.Node)
		for _, p := range l.Pods {
			header = append(header, strings.TrimPrefix(p, l.Node+"-")) // the node stands to their left
		}
		for _, from := range append([]string{l.Node}, l.Pods...) {
			row := []string{from}
			for _, l := range r.Leases {
				row = append(row, "│")
				for _, to := range append([]string{l.Node}, l.Pods...) {
					row = append(row, mark(marks[cell{from, to, f}]))
				}
			}
			rows = append(rows, append(row, "│", mark(marks[cell{from, string(KindInternet), f}])))
		}
	}
	return append([][]string{append(header, "│", "internet")}, rows...)
}

type cell struct {
	from, to string
	family   addr.Family
}

// mark shows what was not checked as a dot.
func mark(m string) string { return cmp.Or(m, "·") }

// marks sums up the outcomes of every cell in one character.
func (r Report) marks() map[cell]string {
	const passed, several = "✓", "✗"
	marks := map[cell]string{}
	for _, o := range r.Outcomes {
		c := cell{o.From, o.To, o.Family}
		switch before := marks[c]; {
		case o.Check == CheckPath:
		case o.Err == "":
			marks[c] = cmp.Or(before, passed)
		case before != "" && before != passed || o.Check == CheckInternet:
			marks[c] = several
		default:
			marks[c] = string(o.Check[:1])
		}
	}
	return marks
}

// writePaths shows the way between the first pods of each two nodes; the ways from and to the nodes themselves were held
// against the same options, and are among the failures where they differ.
func (r Report) writePaths(b *strings.Builder) {
	paths := map[cell]string{}
	for _, o := range r.Outcomes {
		if o.Check == CheckPath {
			paths[cell{o.From, o.To, o.Family}] = o.Path
		}
	}
	if len(paths) == 0 {
		return
	}
	for _, f := range r.families() {
		rows := [][]string{{""}}
		for _, from := range r.Leases {
			row := []string{fmt.Sprintf("%s (seg%d)", from.Node, from.Segment)}
			rows[0] = append(rows[0], row[0])
			for _, to := range r.Leases {
				row = append(row, mark(paths[cell{from.Pods[0], to.Pods[0], f}]))
			}
			rows = append(rows, row)
		}
		fmt.Fprintf(b, "%s, how a packet from pod to pod leaves the row's node for the column's, seen on the wire\n%s\n", f,
			Table(rows, 2))
	}
}

func (r Report) writeFailures(b *strings.Builder) {
	if r.Failed == 0 {
		return
	}
	b.WriteString("Failed\n")
	for _, o := range r.Failures {
		fmt.Fprintf(b, "  %s\n", o)
	}
	b.WriteString("\n")
}
