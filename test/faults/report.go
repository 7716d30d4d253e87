package faults

import (
	"fmt"
	"runtime/debug"
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
	Seen     string   `json:"seen,omitempty"` // what an operator saw
	Problems []string `json:"problems,omitempty"`
	// Details are the end of the daemon's log and its status, where there are problems.
	Details []string `json:"details,omitempty"`
}

func (r *Result) fail(format string, args ...any) {
	r.Problems = append(r.Problems, strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", "; "))
}

func (r *Result) check(err error) {
	if err != nil {
		r.fail("%v", err)
	}
}

// guard calls a function whose panic is a problem of this row alone.
func (r *Result) guard(f func()) {
	defer func() {
		if cause := recover(); cause != nil {
			r.fail("panic: %v", cause)
			r.Details = append(r.Details, string(debug.Stack()))
		}
	}()
	f()
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
	areas := []Area{Kernel, Firewall, Underlay, Etcd, Boot, Daemon, Peers, Kubernetes}
	slices.SortStableFunc(r.Rows, func(a, b Result) int {
		return slices.Index(areas, a.Area) - slices.Index(areas,
			b.Area)
	})
	for _, row := range rows {
		if len(row.Problems) > 0 {
			r.Failed++
		}
	}
	return r
}

// Text renders the report for a terminal: a table, failed rows at length, and their reasons once more in the last
// lines, which are all that is kept of a long output.
func (r Report) Text() string {
	rows := [][]string{{"FAULT", "SETUP", "LOST", "SECONDS", "THE LOG SAYS", "AN OPERATOR SEES", "OK"}}
	details, failed := "", ""
	for _, x := range r.Rows {
		rows = append(rows, []string{
			cut(string(x.Area)+": "+x.Fault, 60), x.Setup, fmt.Sprint(x.Lost), x.Repair.String(),
			cut(x.Logged, 70), cut(x.Seen, 200), cut(x.verdict(), 200),
		})
		if len(x.Problems) > 0 {
			details += fmt.Sprintf("\n%s\n    | %s\n", x.line(), strings.ReplaceAll(strings.Join(x.Details, "\n"), "\n",
				"\n    | "))
			failed += fmt.Sprintf("failed: %s %s: %s: %s\n", x.Setup, x.Area, x.Fault, x.verdict())
		}
	}
	n := len(r.Rows)
	return lab.Table(rows, 2) + details + fmt.Sprintf("\n%d rows in %s: %d within their bounds, %d not\n",
		n, time.Duration(r.Took).Round(time.Second), n-r.Failed, r.Failed) + failed
}

func cut(s string, n int) string {
	switch {
	case s == "":
		return "-"
	case utf8.RuneCountInString(s) <= n:
		return s
	}
	return string([]rune(s)[:n-1]) + "…"
}
