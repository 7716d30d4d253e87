package faults

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// up is the metric of Prometheus' own that is 1 if a scrape brought metrics.
const up = "up"

// move is one of Seen.Metrics, taken apart, with the values that it had.
type move struct {
	text, name string
	labels     []string // as they are written: kind="route"
	rises      bool     // a counter
	more       bool     // a gauge that is to be higher than before
	to         float64

	before, now float64
	peak        *float64 // the value when it had moved
	unread      bool     // the metrics could not be read, the last time
}

func parseMove(text string) (*move, error) {
	series, to, ok := strings.Cut(text, " ")
	name, labels, _ := strings.Cut(strings.TrimSuffix(series, "}"), "{")
	m := &move{text: series, name: name, rises: to == "+", more: to == "more"}
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
func (m *move) value(exposition string) (sum float64) {
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

// read takes a value from an exposition; there is none where the metrics could not be read.
func (m *move) read(exposition string, err error) {
	m.unread = err != nil
	switch {
	case m.name == up && err != nil:
		m.peak = new(float64)
	case m.name == up:
		m.now = 1
	case err == nil:
		m.now = m.value(exposition)
	}
	if err == nil && m.moved() {
		now := m.now
		m.peak = &now
	}
}

// moved reports whether the value is what the fault has to make of the one before.
func (m *move) moved() bool {
	if m.rises || m.more {
		return m.now > m.before
	}
	return m.now == m.to
}

// missing says in what it has not moved as it should, and left in what the fault is not over; "" in nothing.
func (m *move) missing() string {
	switch {
	case m.peak != nil:
		return ""
	case m.unread:
		return m.text + " can't be read"
	}
	return fmt.Sprintf("%s did not move as it should: it was %g, it is %g", m.text, m.before, m.now)
}

func (m *move) left() string {
	switch {
	case m.unread:
		return m.text + " can't be read"
	case m.now == m.before, m.rises && m.now > m.before:
		return ""
	}
	return fmt.Sprintf("%s is %g: it was %g", m.text, m.now, m.before)
}

// path shows how it moved: `problem{name="etcd"} 0→1→0`.
func (m *move) path() string {
	name := strings.TrimPrefix(m.text, "overlayd_")
	if m.rises {
		return fmt.Sprintf("%s %g→%g", name, m.before, m.now)
	}
	return fmt.Sprintf("%s %g→%g→%g", name, m.before, *m.peak, m.now)
}
