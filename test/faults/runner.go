package faults

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/overlayd/overlayd/test/lab"
)

// Options say what to run.
type Options struct {
	Name     string // of the labs, with a number behind it
	Overlayd string
	Only     *regexp.Regexp // rows whose area, name and setup match
	Short    bool
	Parallel int // labs at a time
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
	jobs := plan(Catalogue(o.Short), setups(o.Overlayd), o)
	if len(jobs) == 0 {
		return Report{}, ErrNoRow
	}
	queue, results := make(chan job), make(chan Result)
	var workers sync.WaitGroup
	for i := range max(1, o.Parallel) {
		w := worker{name: fmt.Sprintf("%s-%d", o.Name, i+1), progress: o.Progress}
		workers.Go(func() {
			for j := range queue {
				w.run(ctx, j, results)
			}
		})
	}
	go func() {
		for _, j := range jobs {
			queue <- j
		}
		close(queue)
		workers.Wait()
		close(results)
	}()
	var rows []Result
	for r := range results {
		rows = append(rows, r)
		o.Progress(r.line())
	}
	if ctx.Err() != nil {
		return Report{}, fmt.Errorf("faults: %w", context.Cause(ctx))
	}
	return newReport(rows, time.Since(began)), nil
}

// plan sorts the rows into jobs, the longest first.
func plan(rows []Fault, all []Setup, o Options) []job {
	var jobs []job
	for _, s := range all {
		at := map[Area]int{}
		for _, f := range rows {
			if !o.wants(f, s.Name) {
				continue
			}
			area := f.Area
			if o.Short {
				area = "" // few rows: bringing labs up would take longer
			}
			if _, ok := at[area]; !ok {
				at[area] = len(jobs)
				jobs = append(jobs, job{setup: s})
			}
			jobs[at[area]].rows = append(jobs[at[area]].rows, f)
		}
	}
	slices.SortStableFunc(jobs, func(a, b job) int { return cmp.Compare(b.length(), a.length()) })
	return jobs
}

// wants says which rows run in a setup. The short form runs each of its rows in one setup.
func (o Options) wants(f Fault, setup string) bool {
	return slices.Contains(f.setups(), setup) && (o.Only == nil || o.Only.MatchString(rowName(f, setup))) &&
		(!o.Short || f.Short && f.setups()[0] == setup)
}

func rowName(f Fault, setup string) string { return fmt.Sprintf("%s: %s (%s)", f.Area, f.Name, setup) }

// length is about how long a job takes.
func (j job) length() (d time.Duration) {
	for _, f := range j.rows {
		d += 3*time.Second + f.Hold
	}
	return d
}

// worker runs jobs in labs of its own, one after the other.
type worker struct {
	name     string
	progress func(string)
	site     *Site
}

func (w *worker) run(ctx context.Context, j job, results chan<- Result) {
	defer w.down(ctx)
	for _, f := range j.rows {
		r := newResult(f, j.setup.Name)
		if ctx.Err() == nil {
			w.row(ctx, j.setup, f.in(j.setup.Name), &r)
		}
		if ctx.Err() == nil {
			results <- r
		}
	}
}

// row runs one row in a lab that is whole, and leaves none behind that is not.
func (w *worker) row(ctx context.Context, setup Setup, f Fault, r *Result) {
	defer func() {
		if p := recover(); p != nil { // the other rows have something to say
			r.fail("panic: %v", p)
			r.Log = strings.Split(string(debug.Stack()), "\n")
			w.down(ctx)
		}
	}()
	if w.site == nil {
		if err := w.up(ctx, setup); err != nil {
			r.fail("the lab did not come up: %v", err)
			w.down(ctx)
			return
		}
	}
	w.site.run(ctx, f, r)
	if err := Undo(ctx, w.site); err != nil {
		r.fail("undo: %v", err)
	}
	if f.Ruins || len(r.Problems) > 0 && !w.site.sound(ctx) {
		w.down(ctx)
	}
}

// sound says whether a lab in which a row has failed is whole for the next one.
func (s *Site) sound(ctx context.Context) bool {
	_, err := s.await(ctx, Whole, time.Now(), 500*time.Millisecond)
	now := time.Now()
	return err == nil && len(s.traffic.between(now, now).Broken) == 0
}

func (w *worker) up(ctx context.Context, setup Setup) error {
	o := setup.Lab
	o.Name = w.name
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
	var w *watch
	if f.Seen != nil {
		var err error
		if w, err = newWatch(s.Victim, *f.Seen); err == nil {
			_, err = s.await(ctx, w.first, time.Now(), beginWithin)
		}
		if err != nil {
			r.fail("observe %s before the fault: %v", s.Victim.Name, err)
			return
		}
	}
	began := time.Now()
	ended := s.steps(ctx, f, w, r)
	if !f.Ruins && len(r.Problems) == 0 { // nobody misses a ping any more when the next row begins
		if _, err := s.await(ctx, allContent, time.Now(), backWithin); err != nil {
			r.fail("afterwards: %v", err)
		}
	}
	w.after(ctx, s, r)
	if ctx.Err() != nil {
		return
	}
	s.judgeTraffic(ctx, f, r, began, ended)
	s.judgeLog(ctx, f, r)
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
	w.during(ctx, s, at, f, r)
	s.hold(ctx, f, r)
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

func (s *Site) repaired(ctx context.Context, c Check, at time.Time, f Fault, r *Result) {
	took, err := s.await(ctx, c, at, f.Bound.Repair+patience)
	if err != nil {
		r.fail("%v", err)
		return
	}
	r.Repair = max(r.Repair, seconds(took))
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

// judgeTraffic counts what was sent until now. An answer that is there and only was not read yet is not lost: what looks bad is
// counted again for a while.
func (s *Site) judgeTraffic(ctx context.Context, f Fault, r *Result, began, ended time.Time) {
	now := time.Now()
	_ = sleep(ctx, inFlight)
	hit := []*lab.Node{s.Victim}
	if f.Peer {
		hit = append(hit, s.Peer)
	}
	l := s.traffic.between(began, now, hit...)
	for time.Since(now) < lab.LateAnswer && (len(l.problems(f)) > 0 || l.Last.Sub(ended) > f.Bound.Repair) && ctx.Err() == nil {
		_ = sleep(ctx, 50*time.Millisecond)
		l = s.traffic.between(began, now, hit...)
	}
	r.Lost = l.Lost
	if l.Lost > 0 {
		r.Repair = max(r.Repair, seconds(l.Last.Sub(ended)))
	}
	for _, p := range l.problems(f) {
		r.fail("%s", p)
	}
}

// judgeLog looks for the line that the fault must have, and for a flood of them.
func (s *Site) judgeLog(ctx context.Context, f Fault, r *Result) {
	if r.Repair > seconds(f.Bound.Repair) {
		r.fail("repaired after %s s: at most %s", r.Repair, f.Bound.Repair)
	}
	pattern := regexp.MustCompile(f.Log) // TestCatalogue holds that it compiles
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
			for _, v := range s.vars.Get(f) {
				if value, ok := strings.CutPrefix(v, variable+"="); ok && !strings.Contains(text, value) {
					return fmt.Errorf("the log does not name %s", value)
				}
			}
		}
		return nil
	}
}
