package faults

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// up is the metric of Prometheus' own that is 1 if a scrape brought metrics.
const up = "up"

// move is one of Seen.Metrics, taken apart.
type move struct {
	text, name string
	labels     []string // as they are written: kind="route"
	rises      bool     // a counter
	more       bool     // a gauge that is to be higher than before
	to         float64
}

func parseMove(text string) (move, error) {
	series, to, ok := strings.Cut(text, " ")
	name, labels, _ := strings.Cut(strings.TrimSuffix(series, "}"), "{")
	m := move{text: series, name: name, rises: to == "+", more: to == "more"}
	if labels != "" {
		m.labels = strings.Split(labels, ",")
	}
	var err error
	if !m.rises && !m.more {
		m.to, err = strconv.ParseFloat(to, 64)
	}
	if !ok || err != nil || name != up && !strings.HasPrefix(name, "overlayd_") || m.rises != strings.HasSuffix(name, "_total") {
		return m, fmt.Errorf("the row's metric %q: expected such as `overlayd_ready 0` or `overlayd_drift_reverted_total{kind=\"route\"} +`", text)
	}
	return m, nil
}

// value sums up the series in an exposition that a move is about. None is 0: a problem that there is not, a kind that was never repaired.
func (m move) value(exposition string) (sum float64) {
	for line := range strings.Lines(exposition) {
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), m.name)
		if !ok || rest == "" || rest[0] != ' ' && rest[0] != '{' {
			continue
		}
		cut := strings.LastIndexByte(rest, ' ')
		v, err := strconv.ParseFloat(rest[cut+1:], 64)
		if err == nil && !slices.ContainsFunc(m.labels, func(l string) bool { return !strings.Contains(rest[:cut], l) }) {
			sum += v
		}
	}
	return sum
}

// moved reports whether a value is what the fault has to make of the one before.
func (m move) moved(before, now float64) bool {
	if m.rises || m.more {
		return now > before
	}
	return now == m.to
}

// back reports whether a value is such that the fault is over.
func (m move) back(before, now float64) bool { return m.rises && now > before || now == before }

// path shows how a metric moved: `problem{name="etcd"} 0→1→0`.
func (m move) path(before, peak, now float64) string {
	name := strings.TrimPrefix(m.text, "overlayd_")
	if m.rises {
		return fmt.Sprintf("%s %g→%g", name, before, now)
	}
	return fmt.Sprintf("%s %g→%g→%g", name, before, peak, now)
}
