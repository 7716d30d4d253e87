package faults

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/overlayd/overlayd/test/lab"
)

const (
	// beginWithin is how long a row waits for the answers to its first questions.
	beginWithin = 10 * time.Second
	// backWithin is how long after everything is as planned all signs of the fault may take to be gone. Peers whose pings got lost are
	// asked again every ten seconds.
	backWithin = 30 * time.Second
	// watchEvery is how often the victim is asked.
	watchEvery = 100 * time.Millisecond
	// answerWithin is after how long a question counts as not answered.
	answerWithin = time.Second
)

// watch asks the victim what an operator would: before the fault, while it lasts, and afterwards.
type watch struct {
	node                  *lab.Node
	seen                  Seen
	status, doctor, ready *regexp.Regexp
	moves                 []move

	before                     []float64 // values of the moves
	beforeStatus, beforeDoctor []string  // lines

	said     string     // the line of the status
	unready  string     // the line of /readyz
	verdicts []string   // what /readyz said, each change of it
	ok       bool       // /readyz said so, the last time
	peaks    []*float64 // the values of those that moved
	now      []float64  // the values that were read last; nil if they could not be
}

// newWatch reads what a row says is to be seen.
func newWatch(n *lab.Node, seen Seen) (*watch, error) {
	w := &watch{node: n, seen: seen, peaks: make([]*float64, len(seen.Metrics)), verdicts: []string{"ok"}} // else no row begins
	var errStatus, errDoctor, errReady error
	w.status, errStatus = regexp.Compile(seen.Status)
	w.doctor, errDoctor = regexp.Compile(seen.Doctor)
	w.ready, errReady = regexp.Compile(seen.Ready)
	errs := errors.Join(errStatus, errDoctor, errReady)
	for _, text := range seen.Metrics {
		m, err := parseMove(text)
		errs = errors.Join(errs, err)
		w.moves = append(w.moves, m)
	}
	return w, errs
}

// first is the Check that takes down what there is before the fault.
func (w *watch) first(ctx context.Context, _ *Site) (err error) {
	var errStatus, errDoctor error
	w.before, err = w.values(ctx)
	w.beforeStatus, errStatus = w.statusLines(ctx)
	if w.seen.Doctor != "" {
		w.beforeDoctor, errDoctor = w.doctorLines(ctx)
	}
	return errors.Join(err, errStatus, errDoctor)
}

// appeared is the Check that holds when all was seen that the row says. The status comes last, since a process is started for it.
func (w *watch) appeared(ctx context.Context, _ *Site) error {
	w.ask(ctx)
	if w.said == "" && w.seen.Status != "" && len(w.missing()) == 1 {
		lines, _ := w.statusLines(ctx) // without an answer it is asked again
		w.said, _ = w.added(lines, w.beforeStatus, w.status)
	}
	return pause(ctx, w.missing())
}

// gone is the Check that holds when no sign of the fault is left.
func (w *watch) gone(ctx context.Context, _ *Site) error {
	w.ask(ctx)
	return pause(ctx, w.left())
}

// pause makes an error of what was found, after which the victim is left alone for a moment.
func pause(ctx context.Context, found []string) error {
	if len(found) == 0 {
		return nil
	}
	_ = sleep(ctx, watchEvery)
	return errors.New(strings.Join(found, "; "))
}

// ask reads /readyz and the metrics.
func (w *watch) ask(ctx context.Context) {
	lines := readyLines(ctx, w.node)
	w.ok = len(lines) == 1 && lines[0] == readyOK
	if v := verdict(lines); w.verdicts[len(w.verdicts)-1] != v {
		w.verdicts = append(w.verdicts, v)
	}
	if i := slices.IndexFunc(lines, w.ready.MatchString); i >= 0 && w.unready == "" {
		w.unready = lines[i]
	}
	var err error
	w.now, err = w.values(ctx)
	for i, m := range w.moves {
		switch {
		case err != nil && m.name == up:
			w.peaks[i] = new(float64)
		case err == nil && m.moved(w.before[i], w.now[i]):
			w.peaks[i] = &w.now[i]
		}
	}
}

// added is the first line that matches and was not there before.
func (w *watch) added(lines, before []string, pattern *regexp.Regexp) (string, bool) {
	for _, l := range lines {
		if pattern.MatchString(l) && !slices.Contains(before, l) {
			return l, true
		}
	}
	return "", false
}

// readyOK is all that /readyz of a node says with which nothing is wrong.
const readyOK = "200 ok"

// readyLines are the lines of /readyz with the HTTP status in front of each.
func readyLines(ctx context.Context, n *lab.Node) []string {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	code, body, err := n.Readyz(ctx)
	if err != nil {
		return []string{NoAnswer}
	}
	var out []string
	for line := range strings.Lines(body) {
		out = append(out, fmt.Sprintf("%d %s", code, strings.TrimSpace(line)))
	}
	return out
}

// verdict is what /readyz said, in a few words: the HTTP status and the names of what is wrong.
func verdict(lines []string) string {
	var names []string
	for _, l := range lines {
		if fields := strings.SplitN(l, ": ", 3); len(fields) > 1 {
			names = append(names, fields[1])
		}
	}
	slices.Sort(names)
	if len(lines) == 0 {
		return "an empty answer"
	}
	code, _, _ := strings.Cut(lines[0], " ")
	switch {
	case lines[0] == NoAnswer:
		return NoAnswer
	case len(names) == 0:
		return "ok"
	case code == strconv.Itoa(http.StatusOK):
		return "degraded: " + strings.Join(names, ", ")
	}
	return code + ": " + strings.Join(names, ", ")
}

func (w *watch) values(ctx context.Context) ([]float64, error) {
	if len(w.moves) == 0 {
		return []float64{}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	text, err := w.node.Metrics(ctx)
	if err != nil {
		return nil, err
	}
	var out []float64
	for _, m := range w.moves {
		v := m.value(text)
		if m.name == up {
			v = 1
		}
		out = append(out, v)
	}
	return out, nil
}

// statusLines are those of `overlayd status`, without the blanks that only make columns of them.
func (w *watch) statusLines(ctx context.Context) ([]string, error) {
	text, err := w.node.Overlayd(ctx, "status")
	return plainLines(text), err
}

func (w *watch) doctorLines(ctx context.Context) ([]string, error) {
	text, err := w.node.Doctor(ctx)
	return plainLines(text), err
}

// plainLines leaves out how long something has lasted or how long ago it was: with it, a line that was there before would be a new one.
func plainLines(text string) []string {
	const duration = `(?:\d+ days|(?:\d+(?:\.\d+)?(?:h|ms|m|µs|ns|s))+)`
	age := regexp.MustCompile(`(\b(?:for|up|in) )` + duration + `\b|\b` + duration + `( ago\b)`)
	var out []string
	for line := range strings.Lines(text) {
		out = append(out, age.ReplaceAllString(strings.Join(strings.Fields(line), " "), "$1…$2"))
	}
	return out
}

// missing says what has not been seen.
func (w *watch) missing() (out []string) {
	if w.seen.Status != "" && w.said == "" {
		out = append(out, fmt.Sprintf("overlayd status does not say /%s/", w.seen.Status))
	}
	if w.seen.Ready != "" && w.unready == "" {
		out = append(out, fmt.Sprintf("/readyz does not say /%s/, but %s", w.seen.Ready, strings.Join(w.verdicts, ", ")))
	}
	for i, m := range w.moves {
		switch {
		case w.peaks[i] != nil:
		case w.now == nil:
			out = append(out, m.text+" can't be read")
		default:
			out = append(out, fmt.Sprintf("%s did not move as it should: it was %g, it is %g", m.text, w.before[i], w.now[i]))
		}
	}
	return out
}

// left says what still looks like a fault.
func (w *watch) left() (out []string) {
	if !w.ok {
		out = append(out, "/readyz does not say ok, but "+strings.Join(w.verdicts, ", "))
	}
	for i, m := range w.moves {
		switch {
		case w.now == nil:
			out = append(out, m.text+" can't be read")
		case !m.back(w.before[i], w.now[i]):
			out = append(out, fmt.Sprintf("%s is %g: it was %g", m.text, w.now[i], w.before[i]))
		}
	}
	return out
}

// during waits until all is seen that the row says, of a fault that began at a time and lasts.
func (w *watch) during(ctx context.Context, s *Site, began time.Time, f Fault, r *Result) {
	if w == nil {
		return
	}
	// The time may be over already where the row itself took long, and some faults are noticed late while they last.
	patience := max(w.seen.within(), f.Hold+seenSoon, time.Since(began)+seenSoon)
	if _, err := s.await(ctx, w.appeared, began, patience); err != nil {
		r.fail("%v", err)
	}
	r.Status = w.said
	if w.seen.Doctor != "" {
		w.askDoctor(ctx, r)
	}
	if len(r.Problems) > 0 {
		r.StatusText, _ = w.statusLines(ctx)
	}
}

// askDoctor runs it once: it observes by itself, and need not be waited for.
func (w *watch) askDoctor(ctx context.Context, r *Result) {
	lines, err := w.doctorLines(ctx)
	if err != nil {
		r.fail("%v", err)
		return
	}
	line, ok := w.added(lines, w.beforeDoctor, w.doctor)
	if r.Doctor = line; !ok {
		r.fail("overlayd doctor does not say /%s/, but %s", w.seen.Doctor, strings.Join(lines, " | "))
	}
}

// after waits until no sign of the fault is left, and writes down what moved.
func (w *watch) after(ctx context.Context, s *Site, r *Result) {
	if w == nil {
		return
	}
	if _, err := s.await(ctx, w.gone, time.Now(), backWithin); err != nil {
		r.fail("afterwards: %v", err)
	}
	r.Ready = strings.Join(w.verdicts, " → ")
	for i, m := range w.moves {
		if w.peaks[i] != nil && w.now != nil {
			r.Metrics = append(r.Metrics, m.path(w.before[i], *w.peaks[i], w.now[i]))
		}
	}
}
