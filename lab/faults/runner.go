package faults

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/overlayd/overlayd/lab"
)

// Options say what to run.
type Options struct {
	Name     string // of the labs, with a number behind it
	Overlayd string
	Only     *regexp.Regexp // rows whose area, name and setup match
	Short    bool
	Backend  lab.Backend // only setups with it; "": all
	Stack    lab.Stack   // likewise
	Direct   bool        // only the setup with DirectRouting
	Parallel int         // labs at a time; default 2
	Progress func(string)
}

// job is rows that share a lab.
type job struct {
	setup Setup
	rows  []Fault
}

// patience is how much longer than its bound a repair is waited for, so that the table can say how long it really takes.
const patience = 10 * time.Second

// ErrNoRow says that the options leave nothing to run.
var ErrNoRow = errors.New("no row of the catalogue matches")

// Run runs the catalogue.
func Run(ctx context.Context, o Options) (Report, error) {
	began := time.Now()
	jobs := plan(Catalogue(o.Short), setups(ctx, o.Overlayd), o)
	queue := make(chan job, len(jobs))
	planned := 0
	for _, j := range jobs {
		queue <- j
		planned += len(j.rows)
	}
	close(queue)
	if planned == 0 {
		return Report{}, ErrNoRow
	}
	var mu sync.Mutex
	var results []Result
	var wg sync.WaitGroup
	for i := range max(1, o.Parallel) {
		wg.Go(func() {
			w := worker{name: fmt.Sprintf("%s-%d", o.Name, i+1), progress: o.Progress, report: func(r Result) {
				mu.Lock()
				defer mu.Unlock()
				results = append(results, r)
				o.Progress(r.line())
			}}
			for j := range queue {
				w.run(ctx, j)
			}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return Report{}, fmt.Errorf("faults: %w", context.Cause(ctx))
	}
	if len(results) != planned {
		return Report{}, fmt.Errorf("faults: %d rows of %d have a result", len(results), planned)
	}
	return newReport(results, time.Since(began)), nil
}

// plan sorts the rows into jobs, the longest first.
func plan(rows []Fault, all []Setup, o Options) []job {
	type key struct {
		setup string
		area  Area
	}
	byKey := map[key]*job{}
	var jobs []*job
	for _, s := range all {
		if !o.wants(s) {
			continue
		}
		for _, f := range rows {
			if !slices.Contains(f.setups(), s.Name) || o.Only != nil && !o.Only.MatchString(rowName(f, s.Name)) || o.Short && !f.shortIn(s.Name) {
				continue
			}
			k := key{s.Name, f.Area}
			if o.Short {
				k.area = "" // few rows: bringing labs up would take longer
			}
			if byKey[k] == nil {
				byKey[k] = &job{setup: s}
				jobs = append(jobs, byKey[k])
			}
			byKey[k].rows = append(byKey[k].rows, f)
		}
	}
	slices.SortStableFunc(jobs, func(a, b *job) int { return int(b.length() - a.length()) })
	out := make([]job, 0, len(jobs))
	for _, j := range jobs {
		out = append(out, *j)
	}
	return out
}

// shortIn: the short form runs each of its rows in one setup.
func (f Fault) shortIn(setup string) bool { return f.Short && f.setups()[0] == setup }

func rowName(f Fault, setup string) string { return fmt.Sprintf("%s: %s (%s)", f.Area, f.Name, setup) }

func (o Options) wants(s Setup) bool {
	stack := s.Lab.Stack
	if stack == "" {
		stack = lab.StackIPv4
	}
	return (o.Backend == "" || o.Backend == s.Lab.Backend) && (o.Stack == "" || o.Stack == stack) && (!o.Direct || s.Lab.Direct)
}

// length is about how long a job takes.
func (j job) length() time.Duration {
	d := 4 * time.Second
	for _, f := range j.rows {
		d += 2*time.Second + f.Hold
		if f.Seen != nil {
			d += f.Seen.Within
		}
	}
	return d
}

// worker runs jobs in labs of its own, one after the other.
type worker struct {
	name     string
	progress func(string)
	report   func(Result)
	site     *Site
}

func (w *worker) run(ctx context.Context, j job) {
	defer w.down(ctx)
	for _, f := range j.rows {
		r := newResult(f, j.setup.Name)
		switch {
		case ctx.Err() != nil:
			return
		case j.setup.Unavailable != "":
			r.fail("%s", j.setup.Unavailable)
		default:
			w.row(ctx, j, f.in(j.setup.Name), &r)
		}
		if ctx.Err() == nil {
			w.report(r)
		}
	}
}

// row runs one row in a lab that is whole, and leaves none behind that is not.
func (w *worker) row(ctx context.Context, j job, f Fault, r *Result) {
	defer func() {
		if p := recover(); p != nil { // no lab may be left behind, and the other rows have something to say
			r.fail("panic: %v", p)
			r.Log = strings.Split(string(debug.Stack()), "\n")
			w.down(ctx)
		}
	}()
	if w.site == nil {
		if err := w.up(ctx, j.setup); err != nil {
			r.fail("the lab did not come up: %v", err)
			w.down(ctx)
			return
		}
	}
	w.site.run(ctx, f, r)
	if err := Undo(context.WithoutCancel(ctx), w.site); err != nil {
		r.fail("undo: %v", err)
	}
	if f.Ruins || !w.sound(ctx, r) {
		w.down(ctx)
	}
}

// sound makes the lab whole again for the next row, if it can be done quickly.
func (w *worker) sound(ctx context.Context, r *Result) bool {
	s := w.site
	if len(r.Problems) == 0 {
		return true
	}
	if _, err := s.await(ctx, Whole, time.Now(), 500*time.Millisecond); err == nil {
		now := time.Now()
		return len(s.traffic.between(now, now, s.Victim).Broken) == 0
	}
	return false
}

func (w *worker) up(ctx context.Context, setup Setup) error {
	o := setup.Lab
	o.Name = w.name
	o.OverlaydEnv = append(o.OverlaydEnv, "XTABLES_LOCKFILE="+lockFile(o.Name))
	l, err := lab.Up(ctx, o)
	if err != nil {
		return err
	}
	s, err := openSite(ctx, l, setup.Name, 3, 1)
	if err != nil {
		return err
	}
	if s.traffic, err = startTraffic(context.WithoutCancel(ctx), l); err != nil {
		return err
	}
	w.site = s
	return sleep(ctx, 200*time.Millisecond)
}

func (w *worker) down(ctx context.Context) {
	if w.site != nil {
		w.site.traffic.stop()
		w.site = nil
	}
	if err := lab.Down(context.WithoutCancel(ctx), w.name); err != nil {
		w.progress(fmt.Sprintf("take %s down: %v", w.name, err))
	}
}

// run makes one fault and writes down what came of it.
func (s *Site) run(ctx context.Context, f Fault, r *Result) {
	if err := s.markLog(); err != nil {
		r.fail("%v", err)
		return
	}
	clear(s.facts)
	w, err := watchFor(ctx, s.Victim, f.Seen)
	if err != nil {
		r.fail("look at %s before the fault: %v", s.Victim.Name, err)
		return
	}
	defer w.end() // if one of the steps panics
	began := time.Now()
	ended := s.steps(ctx, f, w, r)
	s.settled(ctx, f, r)
	w.after(ctx, r)
	if ctx.Err() != nil {
		return
	}
	s.judgeTraffic(ctx, f, r, began, ended)
	s.judgeLog(ctx, f, r)
	r.Facts = s.facts["repeated"]
}

// steps injects, expects and restores. It returns when the fault had been made, or had ended.
func (s *Site) steps(ctx context.Context, f Fault, w *watch, r *Result) time.Time {
	if err := f.Inject(ctx, s); err != nil {
		r.fail("%v", err)
		if f.Restore != nil && ctx.Err() == nil { // of what was done before it failed
			if err := f.Restore(ctx, s); err != nil {
				r.fail("end the fault: %v", err)
			}
		}
		return time.Now()
	}
	at := time.Now()
	if f.Expect != nil {
		s.repaired(ctx, f.Expect, at, f, r)
	}
	if f.Expect == nil && f.Restore == nil {
		s.repaired(ctx, Whole, at, f, r)
	}
	s.hold(ctx, f, r)
	w.during(ctx, at, r)
	if f.Restore == nil {
		return at
	}
	if err := f.Restore(ctx, s); err != nil {
		r.fail("end the fault: %v", err)
		return time.Now()
	}
	at = time.Now()
	if !f.Ruins {
		s.repaired(ctx, Whole, at, f, r)
	}
	return at
}

// settled waits until the next row can begin: nobody misses a ping any more.
func (s *Site) settled(ctx context.Context, f Fault, r *Result) {
	pinged := func(ctx context.Context, s *Site) error { return s.pinged(ctx) }
	if f.Ruins || len(r.Problems) > 0 {
		return
	}
	if _, err := s.await(ctx, pinged, time.Now(), backWithin); err != nil && ctx.Err() == nil {
		r.fail("afterwards: %v", err)
	}
}

func (s *Site) repaired(ctx context.Context, c Check, at time.Time, f Fault, r *Result) {
	took, err := s.await(ctx, c, at, f.Bound.Repair+patience)
	if err != nil {
		r.fail("%v", err)
		return
	}
	r.Repair = max(r.Repair, took)
}

func (s *Site) hold(ctx context.Context, f Fault, r *Result) {
	for end := time.Now().Add(f.Hold); time.Now().Before(end) && ctx.Err() == nil; {
		if f.Keeps == nil {
			_ = sleep(ctx, time.Until(end))
			return
		}
		if err := f.Keeps(ctx, s); err != nil && ctx.Err() == nil {
			r.fail("while it lasts: %v", err)
			return
		}
		_ = sleep(ctx, min(500*time.Millisecond, time.Until(end)))
	}
}

// judgeTraffic looks at what was sent until now. An answer that is there and only was not read yet is not lost: what looks bad is looked
// at again for a while.
func (s *Site) judgeTraffic(ctx context.Context, f Fault, r *Result, began, ended time.Time) {
	now := time.Now()
	_ = sleep(ctx, inFlight)
	hit := []*lab.Node{s.Victim}
	if f.Peer {
		hit = append(hit, s.Peer)
	}
	l := s.traffic.between(began, now, hit...)
	bad := func() bool { return len(l.problems(f)) > 0 || l.Last.Sub(ended) > f.Bound.Repair }
	for bad() && time.Since(now) < lab.LateAnswer && ctx.Err() == nil {
		_ = sleep(ctx, 50*time.Millisecond)
		l = s.traffic.between(began, now, hit...)
	}
	r.Lost, r.Stall = l.Lost, l.Stall
	if l.Lost > 0 && l.Last.After(ended) {
		r.Repair = max(r.Repair, l.Last.Sub(ended))
	}
	for _, p := range l.problems(f) {
		r.fail("%s", p)
	}
}

// judgeLog looks for the line that the fault must have, and for a flood of them.
func (s *Site) judgeLog(ctx context.Context, f Fault, r *Result) {
	if r.Repair > f.Bound.Repair {
		r.fail("repaired after %s: at most %s", r.Repair.Round(10*time.Millisecond), f.Bound.Repair)
	}
	pattern, err := regexp.Compile(f.Log)
	if err != nil {
		r.fail("the row's pattern: %v", err)
		return
	}
	said := func(context.Context, *Site) error {
		line, ok := findLine(s.logged(), pattern)
		if r.Logged = line; !ok {
			return errors.New("nothing like it")
		}
		return nil
	}
	if _, err := s.await(ctx, said, time.Now(), 300*time.Millisecond); err != nil && f.Log != "" {
		line, ok := findLine(s.loggedBefore(), pattern)
		if r.Logged = "(less than a minute before) " + line; !ok {
			r.Logged = ""
			r.fail("the daemon did not log /%s/", f.Log)
		}
	}
	lines := s.logged()
	if n := len(lines); n > f.Bound.lines() {
		r.fail("%d log lines: at most %d", n, f.Bound.lines())
	}
	if len(r.Problems) > 0 {
		r.Log = lines[max(0, len(lines)-mostLogged):]
	}
}

// mostLogged is how many log lines are shown of a failed row.
const mostLogged = 12

// LogNames holds when a line of the victim's log has the value of a variable in it, for each family.
func LogNames(variable string) Check {
	return func(_ context.Context, s *Site) error {
		text := strings.Join(s.logged(), "\n")
		for _, f := range s.families {
			_, rest, _ := strings.Cut("\n"+s.vars.Get(f), "\n"+variable+"=")
			value, _, _ := strings.Cut(rest, "\n")
			if value == "" || !strings.Contains(text, value) {
				return fmt.Errorf("the log does not name %s", value)
			}
		}
		return nil
	}
}
