package faults

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
)

func TestStolen(t *testing.T) {
	t.Parallel()
	for stat, want := range map[string]time.Duration{
		"cpu  1483712 130471 939693 4293780 18554 0 175270 3314 7 9\ncpu0 1 2 3 4 5 6 7 8 9 10\n": 33140 * time.Millisecond,
		"cpu  1 2 3 4 5 6 7\n":          0, // Linux before 2.6.11
		"cpu0 1 2 3 4 5 6 7 800 9 10\n": 0,
		"cpu  1 2 3 4 5 6 7 none 0 0\n": 0,
		"":                              0,
	} {
		if got := stolen(stat); got != want {
			t.Errorf("%q: %s, want %s", stat, got, want)
		}
	}
}

// A row is repeated once, if it failed and the machine stood still; nothing of that is hidden.
func TestRepeated(t *testing.T) {
	t.Parallel()
	bad, good := []string{"too late"}, []string(nil)
	for name, c := range map[string]struct {
		tries [][]string // problems
		lost  bool       // packets, more than may be
		still time.Duration
		made  int
		want  []string // problems
	}{
		"all is well":                 {[][]string{good}, false, time.Minute, 1, good},
		"it failed all by itself":     {[][]string{bad}, false, mostStill, 1, bad},
		"it failed on a busy machine": {[][]string{bad, good}, false, mostStill + 1, 2, good},
		"it failed twice":             {[][]string{bad, {"again"}}, false, time.Minute, 2, []string{"again"}},
		"packets were lost":           {[][]string{bad, good}, true, time.Minute, 1, bad},
	} {
		now, made, said := time.Duration(0), 0, 0
		r := repeated(func() Result {
			made++
			now += c.still
			return Result{Area: Kernel, Fault: "route", Setup: OnVXLAN, Problems: c.tries[made-1], suffered: c.lost}
		}, func() time.Duration { return now }, func(Result, string) { said++ })
		if made != c.made || said != c.made-1 || strings.Join(r.Problems, ";") != strings.Join(c.want, ";") {
			t.Errorf("%s: made %d times, said %d times, %q", name, made, said, r.Problems)
		}
		if again := c.made > 1; (r.Repeated != "") != again || (len(r.FirstTry) > 0) != again {
			t.Errorf("%s: repeated %q, first try %q", name, r.Repeated, r.FirstTry)
		}
		report := newReport([]Result{r}, 0)
		raw, err := json.Marshal(report)
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"repeated, since the machine stood still", "first try: too late", "1 repeated"} {
			if strings.Contains(report.Text(), want) != (c.made > 1) {
				t.Errorf("%s: %q in the table:\n%s", name, want, report.Text())
			}
		}
		if strings.Contains(string(raw), `"firstTry":["too late"]`) != (c.made > 1) || strings.Contains(string(raw), `"repeated":1`) != (c.made > 1) {
			t.Errorf("%s: %s", name, raw)
		}
	}
}
