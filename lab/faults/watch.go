package faults

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/overlayd/overlayd/lab"
)

const (
	// beginWithin is how long a row waits for the answers to its first questions.
	beginWithin = 10 * time.Second
	// backWithin is how long after everything is as planned all signs of the fault may take to be gone. Peers whose pings got lost are
	// asked again every ten seconds.
	backWithin = 30 * time.Second
	// watchEvery is how often /readyz and the metrics are read, statusEvery how often `overlayd status` is run.
	watchEvery, statusEvery = 100 * time.Millisecond, 400 * time.Millisecond
	// answerWithin is after how long a question counts as not answered.
	answerWithin = time.Second
)

// watch looks at the victim as an operator does, again and again.
type watch struct {
	node   *lab.Node
	seen   Seen
	status *regexp.Regexp
	ready  *regexp.Regexp
	moves  []move

	doctor       *regexp.Regexp
	before       []float64 // values of the moves
	beforeStatus []string  // lines
	beforeDoctor []string

	stop func() // looking; more than once is no harm

	mu       sync.Mutex
	said     string        // the line of the status
	unready  string        // the line of /readyz
	verdicts []string      // what /readyz said, each change of it
	peaks    []*float64    // the values of those that moved
	now      []float64     // the values that the last look read; nil if it could not
	took     time.Duration // from the fault until all was seen
	ok       bool          // /readyz said so, the last time
	panicked string        // why nobody looks any more
}

// watchFor begins to look. It returns nil where a row says nothing of what is to be seen.
func watchFor(ctx context.Context, n *lab.Node, seen *Seen) (*watch, error) {
	if seen == nil {
		return nil, nil
	}
	w := &watch{node: n, seen: *seen, peaks: make([]*float64, len(seen.Metrics)), verdicts: []string{"ok"}} // else no row begins
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
	if errs != nil {
		return nil, errs
	}
	if err := w.first(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var done sync.WaitGroup
	w.stop = func() { cancel(); done.Wait() }
	done.Go(func() { w.look(ctx) })
	return w, nil
}

// first takes down what there is before the fault, which may take some tries on a machine that has much to do.
func (w *watch) first(ctx context.Context) error {
	for end := time.Now().Add(beginWithin); ; {
		var errValues, errStatus, errDoctor error
		w.before, errValues = w.values(ctx)
		w.beforeStatus, errStatus = w.statusLines(ctx)
		if w.seen.Doctor != "" {
			w.beforeDoctor, errDoctor = w.doctorLines(ctx)
		}
		err := errors.Join(errValues, errStatus, errDoctor)
		if err == nil || ctx.Err() != nil || time.Now().After(end) {
			return err
		}
		_ = sleep(ctx, watchEvery)
	}
}

// end stops looking, where anybody does.
func (w *watch) end() {
	if w != nil {
		w.stop()
	}
}

// look goes on until ctx ends.
func (w *watch) look(ctx context.Context) {
	defer func() {
		if p := recover(); p != nil {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.panicked = fmt.Sprintf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	began := time.Now()
	var asked time.Time // for the status
	for ctx.Err() == nil {
		w.lookReady(ctx)
		w.lookMetrics(ctx)
		if w.saysNothing() && time.Since(asked) >= statusEvery {
			w.lookStatus(ctx)
			asked = time.Now()
		}
		w.time(began)
		_ = sleep(ctx, watchEvery)
	}
}

// saysNothing reports whether the status has not said yet what it has to.
func (w *watch) saysNothing() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.said == "" && w.seen.Status != ""
}

// time notes how long it took until all was seen.
func (w *watch) time(began time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.took == 0 && len(w.missing()) == 0 {
		w.took = time.Since(began)
	}
}

func (w *watch) lookReady(ctx context.Context) {
	lines := readyLines(ctx, w.node)
	if ctx.Err() != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ok = len(lines) == 1 && lines[0] == readyOK
	if v := verdict(lines); w.verdicts[len(w.verdicts)-1] != v {
		w.verdicts = append(w.verdicts, v)
	}
	for _, l := range lines {
		if w.unready == "" && w.seen.Ready != "" && w.ready.MatchString(l) {
			w.unready = l
		}
	}
}

func (w *watch) lookMetrics(ctx context.Context) {
	now, err := w.values(ctx)
	if ctx.Err() != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = now
	for i, m := range w.moves {
		if m.name == up && err != nil {
			w.peaks[i] = new(float64)
		}
		if err == nil && m.moved(w.before[i], now[i]) {
			w.peaks[i] = &now[i]
		}
	}
}

func (w *watch) lookStatus(ctx context.Context) {
	lines, err := w.statusLines(ctx)
	if err != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range lines {
		if w.said == "" && w.status.MatchString(l) && !slices.Contains(w.beforeStatus, l) {
			w.said = l
		}
	}
}

// readyOK is all that /readyz of a node says with which nothing is wrong.
const readyOK = "200 ok"

// readyLines are the lines of /readyz with the HTTP status in front of each.
func readyLines(ctx context.Context, n *lab.Node) []string {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	code, body, err := n.Ask(ctx, "http://127.0.0.1:8471/readyz")
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
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	text, err := w.node.Get(ctx, "http://127.0.0.1:8471/metrics")
	if err != nil {
		return nil, err
	}
	out := make([]float64, 0, len(w.moves))
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

// plainLines leaves out how long something has lasted or how long ago it was: with it, a line that was there before would be a new one.
func plainLines(text string) []string {
	var out []string
	age := ages()
	for line := range strings.Lines(text) {
		out = append(out, age.ReplaceAllString(strings.Join(strings.Fields(line), " "), "$1…$2"))
	}
	return out
}

// ages finds how long something has lasted, or how long ago it was, as a person reads it.
func ages() *regexp.Regexp {
	const duration = `(?:\d+ days|(?:\d+(?:\.\d+)?(?:h|ms|m|µs|ns|s))+)`
	return regexp.MustCompile(`(\b(?:for|up|in) )` + duration + `\b|\b` + duration + `( ago\b)`)
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

// await gives a sign some time until it is there, since it was missed first.
func (w *watch) await(ctx context.Context, missing func() []string, patience time.Duration) []string {
	for end := time.Now().Add(patience); ; {
		w.mu.Lock()
		out := missing()
		w.mu.Unlock()
		if len(out) == 0 || ctx.Err() != nil || time.Now().After(end) {
			return out
		}
		_ = sleep(ctx, lookEvery)
	}
}

// during waits until all is seen that the row says. The fault began at a time, and lasts.
func (w *watch) during(ctx context.Context, began time.Time, r *Result) {
	if w == nil {
		return
	}
	// The time may be over already where the row itself took long: then one look more would be too little.
	for _, m := range w.await(ctx, w.missing, max(time.Until(began.Add(w.seen.within())), seenSoon)) {
		r.fail("%s", m)
	}
	if w.seen.Doctor != "" {
		w.askDoctor(ctx, r)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	r.Status, r.See = w.said, w.took
	if len(r.Problems) > 0 {
		lines, _ := w.statusLines(ctx)
		r.StatusText = lines
	}
}

// askDoctor runs it once: it looks for itself, and need not be waited for.
func (w *watch) askDoctor(ctx context.Context, r *Result) {
	lines, err := w.doctorLines(ctx)
	if err != nil {
		r.fail("%v", err)
		return
	}
	lines = slices.DeleteFunc(lines, func(l string) bool { return slices.Contains(w.beforeDoctor, l) })
	if i := slices.IndexFunc(lines, w.doctor.MatchString); i >= 0 {
		r.Doctor = lines[i]
		return
	}
	r.fail("overlayd doctor does not say /%s/, but %s", w.seen.Doctor, strings.Join(lines, " | "))
}

func (w *watch) doctorLines(ctx context.Context) ([]string, error) {
	text, err := w.node.Doctor(ctx)
	return plainLines(text), err
}

// after waits until no sign of the fault is left, and writes down what moved.
func (w *watch) after(ctx context.Context, r *Result) {
	if w == nil {
		return
	}
	defer w.stop()
	for _, m := range w.await(ctx, w.left, backWithin) {
		r.fail("afterwards: %s", m)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.panicked != "" {
		r.fail("%s", w.panicked)
	}
	r.Ready = strings.Join(w.verdicts, " → ")
	for i, m := range w.moves {
		if w.peaks[i] != nil && w.now != nil {
			r.Metrics = append(r.Metrics, m.path(w.before[i], *w.peaks[i], w.now[i]))
		}
	}
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
