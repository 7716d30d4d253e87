package faults

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/overlayd/overlayd/diag/status"
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
	area  Area
	rows  []Fault
}

const (
	// patience is how much longer than its bound a repair is waited for, so that the table can say how long it really
	// takes.
	patience = 10 * time.Second
	// mostLogged is how many log lines are shown of a failed row.
	mostLogged = 12
)

// ErrNoRow says that the options leave nothing to run.
var ErrNoRow = errors.New("no row of the catalogue matches")

// Run runs the catalogue.
func Run(ctx context.Context, o Options) (Report, error) {
	began := time.Now()
	jobs := plan(Catalogue(o.Short), setups(o.Overlayd), o)
	if len(jobs) == 0 {
		return Report{}, ErrNoRow
	}
	names := make(chan string, max(1, o.Parallel))
	for i := range cap(names) {
		names <- fmt.Sprintf("%s-%d", o.Name, i+1)
	}
	var mu sync.Mutex
	var rows []Result
	var wg sync.WaitGroup
	for _, j := range jobs {
		name := <-names
		wg.Go(func() {
			defer func() { names <- name }()
			j.run(ctx, name, func(r Result) {
				mu.Lock()
				defer mu.Unlock()
				rows = append(rows, r)
				o.Progress(r.line())
			})
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return Report{}, fmt.Errorf("faults: %w", context.Cause(ctx))
	}
	return newReport(rows, time.Since(began)), nil
}

// plan sorts the rows into jobs.
func plan(rows []Fault, all []Setup, o Options) (jobs []job) {
	for _, s := range all {
		for _, f := range rows {
			if !o.selects(f, s.Name) {
				continue
			}
			area := f.Area
			if o.Short {
				area = "" // few rows: bringing labs up would take longer
			}
			i := slices.IndexFunc(jobs, func(j job) bool { return j.setup.Name == s.Name && j.area == area })
			if i < 0 {
				i = len(jobs)
				jobs = append(jobs, job{setup: s, area: area})
			}
			jobs[i].rows = append(jobs[i].rows, f)
		}
	}
	return jobs
}

// selects says which rows run in a setup. The short form runs each of its rows in one setup.
func (o Options) selects(f Fault, setup string) bool {
	return slices.Contains(f.setups(), setup) && (o.Only == nil || o.Only.MatchString(rowName(f, setup))) &&
		(!o.Short || f.Short && f.setups()[0] == setup)
}

func rowName(f Fault, setup string) string { return fmt.Sprintf("%s: %s (%s)", f.Area, f.Name, setup) }

// run runs the rows in a lab that is whole, and leaves none behind.
func (j job) run(ctx context.Context, name string, done func(Result)) {
	var s *Site
	down := func(r *Result) {
		if s != nil {
			s.traffic.stop()
		}
		s = nil
		if err := lab.Down(context.WithoutCancel(ctx), name); err != nil {
			r.fail("remove the lab: %v", err)
		}
	}
	for i, f := range j.rows {
		r := Result{Area: f.Area, Fault: f.Name, Setup: j.setup.Name}
		if s == nil {
			var err error
			if s, err = j.setup.open(ctx, name); err != nil {
				r.fail("the lab did not come up: %v", err)
			}
		}
		if s != nil {
			r.guard(func() { s.run(ctx, f.in(j.setup.Name), &r) })
			r.guard(func() { r.check(Undo(ctx, s)) })
		}
		last := i == len(j.rows)-1 || ctx.Err() != nil
		if s == nil || last || f.Ruins || len(r.Problems) > 0 && !s.sound(ctx) {
			down(&r)
		}
		if ctx.Err() != nil {
			return // that proves nothing
		}
		done(r)
	}
}

// open brings a lab up, with traffic in it.
func (s Setup) open(ctx context.Context, name string) (*Site, error) {
	s.Lab.Name = name
	l, err := lab.Up(ctx, s.Lab)
	if err != nil {
		return nil, err
	}
	site, err := openSite(ctx, l, s.Name, 3, 1)
	if err != nil {
		return nil, err
	}
	if site.traffic, err = startTraffic(context.WithoutCancel(ctx), l); err != nil {
		return nil, err
	}
	return site, sleep(ctx, 200*time.Millisecond)
}

// sound says whether a lab in which a row has failed is whole for the next one.
func (s *Site) sound(ctx context.Context) bool {
	_, err := s.await(ctx, Whole, time.Now(), 500*time.Millisecond)
	now := time.Now()
	return err == nil && len(s.traffic.between(now, now).Broken) == 0
}

// run makes one fault and judges what came of it.
func (s *Site) run(ctx context.Context, f Fault, r *Result) {
	var w *watch
	if f.Seen != nil {
		var err error
		if w, err = newWatch(s, *f.Seen); err == nil {
			_, err = s.await(ctx, w.begin, time.Now(), beginWithin)
		}
		if err != nil {
			r.fail("observe %s before the fault: %v", s.Victim.Name, err)
			return
		}
	}
	s.begin()
	ended := s.provoke(ctx, f, w, r)
	if ctx.Err() != nil {
		return
	}
	s.judgeTraffic(ctx, f, r, ended)
	s.judgeLog(ctx, f, r)
	if len(r.Problems) > 0 {
		lines := s.logged()
		text, _ := s.asked.Overlayd(ctx, "status")
		r.Details = slices.Concat(lines[max(0, len(lines)-mostLogged):], []string{text})
	}
}

// provoke makes the fault, waits for what it leads to, and ends it. It returns when the fault was made, or had ended.
// What can't be made is not waited for.
func (s *Site) provoke(ctx context.Context, f Fault, w *watch, r *Result) (at time.Time) {
	r.check(f.Inject(ctx, s))
	at = time.Now()
	if len(r.Problems) > 0 {
		return at
	}
	if f.Expect != nil {
		s.repaired(ctx, f.Expect, at, f, r)
	} else if f.Restore == nil {
		s.repaired(ctx, s.whole, at, f, r)
	}
	if w != nil {
		r.check(w.during(ctx, at, f))
		r.Seen = w.summary()
	}
	if len(r.Problems) == 0 {
		r.check(s.hold(ctx, f))
	}
	if f.Restore != nil && ctx.Err() == nil {
		if err := f.Restore(ctx, s); err != nil {
			r.fail("end the fault: %v", err)
		}
		if at = time.Now(); !f.Ruins {
			s.repaired(ctx, s.whole, at, f, r)
		}
	}
	if w != nil {
		_, err := s.await(ctx, w.gone, time.Now(), backWithin)
		r.check(err)
	}
	if !f.Ruins && len(r.Problems) == 0 { // no daemon misses a ping any more when the next row begins
		_, err := s.await(ctx, allContent, time.Now(), backWithin)
		r.check(err)
	}
	return at
}

// repaired waits until a check holds, and notes how long that took.
func (s *Site) repaired(ctx context.Context, c Check, at time.Time, f Fault, r *Result) {
	took, err := s.await(ctx, c, at, f.Bound.Repair+patience)
	r.Repair = max(r.Repair, seconds(took))
	r.check(err)
}

// hold lets the fault last.
func (s *Site) hold(ctx context.Context, f Fault) error {
	for end := time.Now().Add(f.Hold); time.Now().Before(end) && ctx.Err() == nil; {
		if f.Keeps != nil {
			if err := f.Keeps(ctx, s); err != nil {
				return fmt.Errorf("while it lasts: %w", err)
			}
		}
		_ = sleep(ctx, min(500*time.Millisecond, time.Until(end)))
	}
	return nil
}

// judgeTraffic counts what was sent until now. An answer that has not been read yet is not lost: what looks bad is
// counted again for a while.
func (s *Site) judgeTraffic(ctx context.Context, f Fault, r *Result, ended time.Time) {
	now := time.Now()
	hit := []*lab.Node{s.Victim}
	if f.Peer {
		hit = append(hit, s.Peer)
	}
	_ = sleep(ctx, inFlight)
	l := s.traffic.between(s.began, now, hit...)
	for time.Since(now) < lab.LateAnswer && (len(l.problems(f)) > 0 || l.Last.Sub(ended) > f.Bound.Repair) {
		_ = sleep(ctx, 50*time.Millisecond)
		l = s.traffic.between(s.began, now, hit...)
	}
	r.Lost = l.Lost
	if l.Lost > 0 {
		r.Repair = max(r.Repair, seconds(l.Last.Sub(ended)))
	}
	for _, p := range l.problems(f) {
		r.fail("%s", p)
	}
	if r.Repair > seconds(f.Bound.Repair) {
		r.fail("repaired after %s s: at most %s", r.Repair, f.Bound.Repair)
	}
}

// judgeLog looks for the line that the fault must have, and for a flood of them.
func (s *Site) judgeLog(ctx context.Context, f Fault, r *Result) {
	_, err := s.await(ctx, LogSays(f.Log), time.Now(), 300*time.Millisecond)
	lines := s.logged()
	if n := len(lines); n > f.Bound.lines() {
		r.fail("%d log lines: at most %d", n, f.Bound.lines())
	}
	if err != nil && findLine(strings.Split(s.log(), "\n"), f.Log) != "" {
		lines = s.reverted(ctx) // that kind of drift was logged less than a minute ago
	}
	if r.Logged = findLine(lines, f.Log); r.Logged == "" {
		r.check(err)
	}
}

// reverted is what the victim reverted since the fault was made, from its status, in the words of its log: there it has
// a line a minute for each kind of object.
func (s *Site) reverted(ctx context.Context) (out []string) {
	text, _ := s.asked.Overlayd(ctx, "status", "-o", "json") // without an answer there is no such line
	var node struct{ Drift []status.DriftKind }
	_ = json.Unmarshal([]byte(text), &node)
	for _, d := range node.Drift {
		if d.At.After(s.began) {
			out = append(out, fmt.Sprintf("reverted external change {\"kind\": %q, \"last\": %q}", d.Kind, d.Last))
		}
	}
	return out
}
