// Package runner runs a function when there may be something for it to do: soon, but not too often, and again after an
// error.
package runner

import (
	"context"
	"sync"
	"time"
)

// Options say when a Runner runs its function. All may be zero.
type Options struct {
	// Delay is how long after a wake the function runs: the wakes that come meanwhile are answered by the same run.
	Delay time.Duration
	// Min is the least time between the starts of two runs. After a rest, Burst runs (0 means 1) may follow each other
	// without it; each Min without a run gives one of them back.
	Min   time.Duration
	Burst int
	// Max is the most time between the start of a run and that of the next; 0: it runs only when woken.
	Max time.Duration
	// RetryMin is how long after the end of a run that returned an error the function runs again; with each further error
	// twice as long, up to RetryMax. A run without error begins again with RetryMin. 0: an error causes no run.
	RetryMin, RetryMax time.Duration
}

// Runner runs one function in one goroutine. It is level-triggered: a run answers all that was asked for before it
// began, and what is asked for during a run causes one more. While nothing is asked for, it costs nothing.
//
// A wake waits for Delay and Min, not for the end of a backoff. The backoff bounds tries for which there is no new
// reason; a wake is one: what failed because a lock was held or the store was away may succeed now. So a firewall whose
// lock another process holds for 20 s while the kernel keeps notifying is tried as soon as Min allows: a try mostly
// waits for the lock, and the rules are right as soon as it is free. The return of the store is a wake, and acted on at
// once. The price: a function whose failing runs cause wakes runs every Min.
type Runner struct {
	o     Options
	run   func(ctx context.Context) error
	moved chan struct{} // due has become earlier
	calls chan func()   // see Do

	mu  sync.Mutex
	due time.Time // when to run; zero: there is no reason to
}

// New returns a Runner of this function. The function reports its errors itself: they only make the Runner try again.
func New(o Options, run func(ctx context.Context) error) *Runner {
	return &Runner{o: o, run: run, moved: make(chan struct{}, 1), calls: make(chan func())}
}

// Wake makes the function run after Delay. It never blocks, and may be called from the function and before Run.
func (r *Runner) Wake() { r.WakeAfter(r.o.Delay) }

// WakeAfter makes the function run after d, or with the next run if that begins sooner. It never blocks, and may be
// called from the function and before Run.
func (r *Runner) WakeAfter(d time.Duration) {
	at := time.Now().Add(d)
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.due.IsZero() && !at.Before(r.due) {
		return
	}
	r.due = at
	select {
	case r.moved <- struct{}{}:
	default:
	}
}

// Do runs f in the goroutine of Run, between two runs of the function: what the function works with is its own then. It
// returns when f has, or with the error of ctx if that ends before f begins.
func (r *Runner) Do(ctx context.Context, f func()) error {
	done := make(chan struct{})
	select {
	case r.calls <- func() { defer close(done); f() }:
		<-done
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Run runs the function until ctx ends, and returns the error of ctx. The function is handed ctx, and Run waits for its
// return. It may be called once.
func (r *Runner) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var used time.Time // each run uses one Min of the time, up to Burst of them in advance: so far it is used
	var backoff time.Duration
	r.wakeWithin(r.o.Max)
	for ctx.Err() == nil {
		timer.Stop()
		if due := r.next(); !due.IsZero() {
			free := used.Add(-r.o.Min * time.Duration(max(r.o.Burst, 1)-1))
			timer.Reset(max(time.Until(due), time.Until(free)))
		}
		select {
		case <-ctx.Done():
			continue
		case <-r.moved:
			continue
		case f := <-r.calls:
			f()
			continue
		case <-timer.C:
		}
		r.answer()
		if now := time.Now(); used.Before(now) {
			used = now
		}
		used = used.Add(r.o.Min)
		r.wakeWithin(r.o.Max)
		if r.run(ctx) == nil {
			backoff = 0
			continue
		}
		backoff = max(r.o.RetryMin, min(2*backoff, r.o.RetryMax))
		r.wakeWithin(backoff)
	}
	return ctx.Err()
}

// wakeWithin is WakeAfter for an interval that may be off.
func (r *Runner) wakeWithin(d time.Duration) {
	if d > 0 {
		r.WakeAfter(d)
	}
}

func (r *Runner) next() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.due
}

// answer forgets what was asked for, as a run begins.
func (r *Runner) answer() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.due = time.Time{}
}
