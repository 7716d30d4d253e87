package doctor

import (
	"fmt"
	"io"
	"strings"
)

// Style is how to print a report.
type Style struct {
	Colour   bool
	Problems bool // only what is not as it should be
}

const (
	red, yellow, green, grey, plain = "\x1b[31m", "\x1b[33m", "\x1b[32m", "\x1b[90m", "\x1b[0m"
)

func (s Style) mark(m Mark) string {
	text := fmt.Sprintf("%-4s", map[Mark]string{OK: "ok", Warn: "warn", Fail: "FAIL", Skipped: "-"}[m])
	if !s.Colour {
		return text
	}
	return map[Mark]string{OK: green, Warn: yellow, Fail: red, Skipped: grey}[m] + text + plain
}

// Print writes a line for each finding, and below it how to fix it.
func (r Report) Print(w io.Writer, s Style) error {
	longest := 0
	for _, f := range r.Findings {
		longest = max(longest, len(f.Check))
	}
	var b strings.Builder
	fixable := 0
	for _, f := range r.Findings {
		if s.Problems && (f.Mark == OK || f.Mark == Skipped) {
			continue
		}
		reason := f.Reason
		if f.Mark == Skipped {
			reason = "not checked: " + reason
		}
		fmt.Fprintf(&b, "%s  %-*s  %s\n", s.mark(f.Mark), longest, f.Check, reason)
		for _, m := range f.Fix {
			fmt.Fprintf(&b, "%*sfix: %s\n", 4+2+longest+2, "", m)
		}
		if f.Fixable {
			fixable++
		}
	}
	fmt.Fprintf(&b, "%d fail, %d warn, %d ok, %d not checked", r.Count(Fail), r.Count(Warn), r.Count(OK), r.Count(Skipped))
	if fixable > 0 {
		fmt.Fprintf(&b, "; overlayd doctor --fix fixes %d of them", fixable)
	}
	b.WriteString("\n")
	_, err := io.WriteString(w, b.String())
	return err
}
