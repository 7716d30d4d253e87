package faults

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Seen is what an operator gets to see of a fault on the victim while it lasts, or after the repair where that is
// immediate. When it is over, /readyz says ok again and the gauges are back.
type Seen struct {
	// Status is a regular expression for a line of `overlayd status` that was not there before.
	Status string
	// Doctor is one for a line of `overlayd doctor` that was not there before. It is run once, when the rest was seen.
	Doctor string
	// Ready is one for a line of /readyz, with the HTTP status in front: "^503 not ready: lease". Or it is NoAnswer.
	// Empty: what the fault breaks is repaired, or has an alternative, before an operator can ask.
	Ready string
	// Metrics have to move: `overlayd_ready 0` is a gauge with the value that it has meanwhile, or "more" where only that
	// it rises is sure; `overlayd_drift_reverted_total{kind="route"} +` a counter that rises. Labels that are not named
	// are summed up.
	Metrics []string
	// Within is how long all that may take from the fault on; 0: seenSoon.
	Within time.Duration
}

const (
	// NoAnswer is what is read at /readyz where the daemon does not answer.
	NoAnswer = "no answer"
	// seenSoon is more than a second, since a command takes a while to start on a busy machine.
	seenSoon = 3 * time.Second
	// beginWithin is how long a row waits for the first answers.
	beginWithin = 10 * time.Second
	// backWithin is how long all signs of the fault may remain once the state is as planned: peers whose pings got lost
	// are pinged again every ten seconds.
	backWithin = 30 * time.Second
	// watchEvery is how often the victim is asked, and answerWithin the time for an answer.
	watchEvery   = 100 * time.Millisecond
	answerWithin = time.Second
)

// repairs is what is seen of drift: it is repaired before an operator can ask, and reported afterwards, with the
// object.
func repairs(kind, object string) *Seen {
	return &Seen{
		Status:  `(^|Drift )` + kind + `: \d+, last .*(` + object + `)`,
		Metrics: []string{`overlayd_drift_reverted_total{kind="` + kind + `"} +`},
	}
}

// degrades is what is seen of a fault that leaves the node ready: a problem with a reason.
func degrades(problem, reason string, metrics ...string) *Seen {
	return &Seen{
		Status:  `\b` + problem + `: .*(` + reason + `)`,
		Ready:   `^200 degraded: ` + problem + `: .*(` + reason + `)`,
		Metrics: append([]string{`overlayd_problem{name="` + problem + `",fatal="false"} 1`}, metrics...),
	}
}

// unreadies is what is seen of a fault with which a node is not ready.
func unreadies(problem, reason string) *Seen {
	return &Seen{
		Status:  `\b` + problem + `: .*(` + reason + `)`,
		Ready:   `^503 not ready: ` + problem + `: .*(` + reason + `)`,
		Metrics: []string{`overlayd_problem{name="` + problem + `",fatal="true"} 1`, `overlayd_ready 0`},
	}
}

// follows is what is seen of a change that the node follows: a line of the status, and metrics.
func follows(status string, metrics ...string) *Seen { return &Seen{Status: status, Metrics: metrics} }

// diagnosed adds what the doctor says.
func (s *Seen) diagnosed(pattern string) *Seen {
	s.Doctor = pattern
	return s
}

// in gives more time than usual.
func (s *Seen) in(d time.Duration) *Seen {
	s.Within = d
	return s
}

// metric is one of Seen.Metrics, taken apart.
type metric struct {
	name   string
	labels []string // as they are written: kind="route"
	to     string   // "+", "more", or a number
}

func parseMetric(text string) (metric, error) {
	series, to, _ := strings.Cut(text, " ")
	name, labels, _ := strings.Cut(strings.TrimSuffix(series, "}"), "{")
	m := metric{name: name, to: to}
	if labels != "" {
		m.labels = strings.Split(labels, ",")
	}
	_, err := strconv.ParseFloat(to, 64)
	if to != "+" && to != "more" && err != nil || !strings.HasPrefix(name, "overlayd_") ||
		(to == "+") != strings.HasSuffix(name, "_total") {
		return m, fmt.Errorf("the row's metric %q: expected `overlayd_ready 0` or `overlayd_drift_reverted_total{kind=\"route\"} +`", text)
	}
	return m, nil
}

// value sums up the series of an exposition that are meant. Without any it is 0: a problem that does not exist.
func (m metric) value(exposition string) (sum float64) {
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

// moved reports whether a value is what the fault makes of it, and isBack whether the fault is over.
func (m metric) moved(before, now float64) bool {
	if m.to == "+" || m.to == "more" {
		return now > before
	}
	to, err := strconv.ParseFloat(m.to, 64)
	return err == nil && now == to
}

func (m metric) isBack(before, now float64) bool { return now == before || m.to == "+" && now > before }

// watch asks the victim what an operator would: before the fault, while it lasts, and afterwards.
type watch struct {
	*Site
	Seen
	found          map[string]string // what was seen, by what the row expects
	metrics        []metric
	values         []float64 // of the metrics, before
	status, doctor []string  // their lines, before
}

func newWatch(s *Site, seen Seen) (*watch, error) {
	w := &watch{Site: s, Seen: seen, found: map[string]string{}}
	for _, text := range seen.Metrics {
		m, err := parseMetric(text)
		if err != nil {
			return nil, err
		}
		w.metrics = append(w.metrics, m)
	}
	return w, nil
}

// begin is the Check that notes what there is before the fault.
func (w *watch) begin(ctx context.Context, _ *Site) (err error) {
	if w.values, err = w.read(ctx); err != nil {
		return err
	}
	if w.status, err = plainLines(w.asked.Overlayd(ctx, "status")); err == nil && w.Doctor != "" {
		w.doctor, err = plainLines(w.asked.Doctor(ctx))
	}
	return err
}

// read reads the metrics.
func (w *watch) read(ctx context.Context) (values []float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	text, err := w.asked.Metrics(ctx)
	if err != nil {
		return nil, err
	}
	for _, m := range w.metrics {
		values = append(values, m.value(text))
	}
	return values, nil
}

// appeared is the Check that holds when all was seen that the row expects.
func (w *watch) appeared(ctx context.Context, _ *Site) error {
	ready := w.readyz(ctx)
	w.note(w.Ready, ready, nil)
	values, _ := w.read(ctx) // without an answer there are none
	for i, v := range values {
		if m := w.metrics[i]; m.moved(w.values[i], v) {
			w.found[w.Metrics[i]] = fmt.Sprintf("%s %g→%g", m.name, w.values[i], v)
		}
	}
	if missing := w.missing(); len(missing) == 1 && missing[0] == w.Status { // last, since a process is started for it
		lines, _ := plainLines(w.asked.Overlayd(ctx, "status")) // without an answer it is asked again
		w.note(w.Status, lines, w.status)
	}
	if missing := w.missing(); len(missing) > 0 {
		_ = sleep(ctx, watchEvery)
		return fmt.Errorf("not seen: %q; /readyz says %q, the metrics went from %v to %v", missing, ready, w.values, values)
	}
	return nil
}

// missing is what the row expects and was not seen.
func (w *watch) missing() []string {
	expected := append([]string{w.Ready, w.Status}, w.Metrics...)
	return slices.DeleteFunc(expected, func(e string) bool { return e == "" || w.found[e] != "" })
}

// summary is what was seen.
func (w *watch) summary() string {
	var out []string
	for _, e := range append([]string{w.Status, w.Doctor, w.Ready}, w.Metrics...) {
		if w.found[e] != "" {
			out = append(out, w.found[e])
		}
	}
	return strings.Join(out, " / ")
}

// note keeps the first line that matches and was not there before.
func (w *watch) note(pattern string, lines, before []string) {
	if pattern == "" || w.found[pattern] != "" {
		return
	}
	re := regexp.MustCompile(pattern) // TestSeen holds that it compiles
	i := slices.IndexFunc(lines, func(l string) bool { return re.MatchString(l) && !slices.Contains(before, l) })
	if i >= 0 {
		w.found[pattern] = lines[i]
	}
}

// readyz is the lines of /readyz with the HTTP status in front of each.
func (w *watch) readyz(ctx context.Context) (out []string) {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	code, body, err := w.asked.Readyz(ctx)
	if err != nil {
		return []string{NoAnswer}
	}
	for line := range strings.Lines(body) {
		out = append(out, fmt.Sprintf("%d %s", code, strings.TrimSpace(line)))
	}
	return out
}

// during waits until all that the row expects was seen of a fault that began at a time and lasts.
func (w *watch) during(ctx context.Context, began time.Time, f Fault) error {
	// The time may be over already where the row itself took long, and some faults are noticed late while they last.
	patience := max(w.Within, f.Hold+seenSoon, time.Since(began)+seenSoon)
	if _, err := w.await(ctx, w.appeared, began, patience); err != nil || w.Doctor == "" {
		return err
	}
	lines, err := plainLines(w.asked.Doctor(ctx)) // it observes by itself, and need not be waited for
	if err != nil {
		return err
	}
	w.note(w.Doctor, lines, w.doctor)
	return unless(w.found[w.Doctor] != "", "overlayd doctor does not say /%s/, but %s", w.Doctor,
		strings.Join(lines, " | "))
}

// gone is the Check that holds when no sign of the fault is left.
func (w *watch) gone(ctx context.Context, _ *Site) error {
	if ready := w.readyz(ctx); !slices.Equal(ready, []string{"200 ok"}) {
		_ = sleep(ctx, watchEvery)
		return fmt.Errorf("/readyz does not say ok, but %q", ready)
	}
	values, err := w.read(ctx)
	for i, v := range values {
		if !w.metrics[i].isBack(w.values[i], v) {
			err = fmt.Errorf("%s: it was %g, and is %g", w.Metrics[i], w.values[i], v)
		}
	}
	if err != nil {
		_ = sleep(ctx, watchEvery)
	}
	return err
}

// plainLines leaves out blanks that only make columns, and how long something has lasted or how long ago it was: with
// that, a line that was there before would be a new one.
func plainLines(text string, err error) ([]string, error) {
	const duration = `(?:\d+ days|(?:\d+(?:\.\d+)?(?:h|ms|m|µs|ns|s))+)`
	age := regexp.MustCompile(`(\b(?:for|up|in) )` + duration + `\b|\b` + duration + `( ago\b)`)
	var out []string
	for line := range strings.Lines(text) {
		out = append(out, age.ReplaceAllString(strings.Join(strings.Fields(line), " "), "$1…$2"))
	}
	return out, err
}
