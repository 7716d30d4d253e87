package faults

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
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
	node  *lab.Node
	seen  Seen
	moves []*move

	beforeStatus, beforeDoctor []string // lines

	said, unready string   // the lines of the status and of /readyz that match
	verdicts      []string // what /readyz said, each change of it
}

// newWatch reads what a row says is to be seen.
func newWatch(n *lab.Node, seen Seen) (*watch, error) {
	w := &watch{node: n, seen: seen, verdicts: []string{"ok"}} // else no row begins
	var errs error
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
	err = w.read(ctx)
	for _, m := range w.moves {
		m.before, m.peak = m.now, nil
	}
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
		w.said = added(lines, w.beforeStatus, w.seen.Status)
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
	if v := verdict(lines); w.verdicts[len(w.verdicts)-1] != v {
		w.verdicts = append(w.verdicts, v)
	}
	if w.unready == "" {
		w.unready = added(lines, nil, w.seen.Ready)
	}
	_ = w.read(ctx) // each move says so
}

// read reads the metrics.
func (w *watch) read(ctx context.Context) error {
	if len(w.moves) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	text, err := w.node.Metrics(ctx)
	for _, m := range w.moves {
		m.read(text, err)
	}
	return err
}

// added is the first line that matches and was not there before, "" where there is none.
func added(lines, before []string, pattern string) string {
	re := regexp.MustCompile(pattern) // TestSeen holds that it compiles
	for _, l := range lines {
		if re.MatchString(l) && !slices.Contains(before, l) {
			return l
		}
	}
	return ""
}

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
	if len(lines) == 0 {
		return "an empty answer"
	}
	var names []string
	for _, l := range lines {
		if fields := strings.SplitN(l, ": ", 3); len(fields) > 1 {
			names = append(names, fields[1])
		}
	}
	slices.Sort(names)
	switch code, text, _ := strings.Cut(lines[0], " "); {
	case lines[0] == NoAnswer:
		return NoAnswer
	case len(names) == 0:
		return text
	case code == "200":
		return "degraded: " + strings.Join(names, ", ")
	default:
		return code + ": " + strings.Join(names, ", ")
	}
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
	return append(out, w.each((*move).missing)...)
}

// left says what still looks like a fault.
func (w *watch) left() (out []string) {
	if w.verdicts[len(w.verdicts)-1] != "ok" {
		out = append(out, "/readyz does not say ok, but "+strings.Join(w.verdicts, ", "))
	}
	return append(out, w.each((*move).left)...)
}

func (w *watch) each(says func(*move) string) (out []string) {
	for _, m := range w.moves {
		if text := says(m); text != "" {
			out = append(out, text)
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
	if r.Doctor = added(lines, w.beforeDoctor, w.seen.Doctor); r.Doctor == "" {
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
	for _, m := range w.moves {
		if m.peak != nil {
			r.Metrics = append(r.Metrics, m.path())
		}
	}
}
