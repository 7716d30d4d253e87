package faults

import (
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/overlayd/overlayd/test/lab"
)

// seconds is a duration as the table and JSON show it.
type seconds time.Duration

func (s seconds) String() string               { return fmt.Sprintf("%.2f", time.Duration(s).Seconds()) }
func (s seconds) MarshalJSON() ([]byte, error) { return []byte(s.String()), nil }

// Result is what came of one row in one setup.
type Result struct {
	Area     Area     `json:"area"`
	Fault    string   `json:"fault"`
	Setup    string   `json:"setup"`
	Lost     int      `json:"packetsLost"`
	Repair   seconds  `json:"secondsToRepair"`
	Logged   string   `json:"logged"`
	Problems []string `json:"problems,omitempty"`
	// What an operator saw: a line of `overlayd status` or of `overlayd doctor`, what /readyz said from before the fault to its end,
	// and the metrics that moved.
	Status  string   `json:"status,omitempty"`
	Doctor  string   `json:"doctor,omitempty"`
	Ready   string   `json:"ready,omitempty"`
	Metrics []string `json:"metrics,omitempty"`
	// All that the status said, and the end of the daemon's log, where there are problems.
	StatusText []string `json:"statusText,omitempty"`
	Log        []string `json:"log,omitempty"`
}

func newResult(f Fault, setup string) Result {
	return Result{Area: f.Area, Fault: f.Name, Setup: setup}
}

func (r *Result) fail(format string, args ...any) {
	r.Problems = append(r.Problems, strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", "; "))
}

func (r Result) verdict() string {
	if len(r.Problems) == 0 {
		return "ok"
	}
	return strings.Join(r.Problems, "; ")
}

func (r Result) line() string {
	return fmt.Sprintf("%s: %s (%s): %d lost, %s: %s", r.Area, r.Fault, r.Setup, r.Lost, r.Repair, r.verdict())
}

// Report is the table.
type Report struct {
	Rows   []Result `json:"rows"`
	Failed int      `json:"failed"`
	Took   seconds  `json:"seconds"`
}

func newReport(rows []Result, took time.Duration) Report {
	r := Report{Rows: rows, Took: seconds(took)}
	areas := []Area{Kernel, Firewall, Underlay, Etcd, Boot, Daemon, Peers}
	slices.SortStableFunc(r.Rows, func(a, b Result) int { return slices.Index(areas, a.Area) - slices.Index(areas, b.Area) })
	for _, row := range rows {
		if len(row.Problems) > 0 {
			r.Failed++
		}
	}
	return r
}

// The widest that a column may be.
const (
	widestFault   = 60
	widestLogged  = 70
	widestSays    = 110
	widestReady   = 60
	widestMetrics = 120
	widestVerdict = 200
)

// Text renders the report for a terminal.
func (r Report) Text() string {
	rows := [][]string{{"FAULT", "SETUP", "LOST", "SECONDS", "THE LOG SAYS", "STATUS OR DOCTOR SAYS", "/READYZ", "METRICS", "OK"}}
	for _, x := range r.Rows {
		rows = append(rows, []string{
			cut(string(x.Area)+": "+x.Fault, widestFault), x.Setup, fmt.Sprint(x.Lost), x.Repair.String(),
			cut(x.Logged, widestLogged), cut(x.says(), widestSays), cut(or(x.Ready), widestReady), cut(or(strings.Join(x.Metrics, ", ")), widestMetrics),
			cut(x.verdict(), widestVerdict),
		})
	}
	var b strings.Builder
	b.WriteString(lab.Table(rows, 2))
	for _, x := range r.Rows {
		if len(x.Problems) > 0 {
			b.WriteString(x.details())
		}
	}
	n := len(r.Rows)
	fmt.Fprintf(&b, "\n%d rows in %s: %d within their bounds, %d not\n", n, time.Duration(r.Took).Round(time.Second), n-r.Failed, r.Failed)
	return b.String()
}

// details shows a failed row at length.
func (r Result) details() string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n%s: %s (%s)\n", r.Area, r.Fault, r.Setup)
	for _, p := range r.Problems {
		fmt.Fprintf(&b, "  - %s\n", p)
	}
	for _, l := range r.Log {
		fmt.Fprintf(&b, "    | %s\n", l)
	}
	for _, l := range r.StatusText {
		fmt.Fprintf(&b, "    status| %s\n", l)
	}
	return b.String()
}

// says is what names the fault.
func (r Result) says() string {
	switch {
	case r.Status != "" && r.Doctor != "":
		return r.Status + " / doctor: " + r.Doctor
	case r.Doctor != "":
		return "doctor: " + r.Doctor
	}
	return or(r.Status)
}

func or(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func cut(s string, n int) string {
	if utf8.RuneCountInString(s) <= n {
		return s
	}
	return string([]rune(s)[:n-1]) + "…"
}
