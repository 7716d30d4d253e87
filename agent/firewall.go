package agent

import (
	"context"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/masquerade"
	"github.com/overlayd/overlayd/runner"
)

// firewall keeps the rules in place in a goroutine of its own: iptables may wait long for its lock, and routes must not
// wait with it.
type firewall struct {
	choose  func(context.Context) masquerade.Driver // makes the driver, when it is needed first
	changes <-chan struct{}                         // notifications of the kernel; nil or closed: it sends none
	resync  time.Duration                           // for what the kernel sends no notifications for
	runner  *runner.Runner
	health  *health
	log     *zap.Logger
	drift   *driftLog
	took    func(time.Duration) // told how long each reconcile took

	driver  masquerade.Driver
	desired *rulesets // nil before there are any
	applied *rulesets // what the last reconcile without an error put in place
	began   time.Time // when the last reconcile began
	said    time.Time // when a contested jump was logged last

	mu      sync.Mutex
	inputs  []masquerade.Input
	posted  bool      // the inputs may have changed
	full    bool      // all is to be compared
	deaf    bool      // the kernel sends no notifications
	checked time.Time // when the rules were last found or put in place, without an error
	runs    int
	failed  int // of the runs
}

// Bounds of the reconciles that notifications cause, and of those that errors cause. Rules are to be repaired within a
// second.
const (
	firewallMin, firewallBurst = 500 * time.Millisecond, 5
	firewallRetry              = time.Second
)

// stopWithin is how long the end of the daemon waits for iptables, which may be waiting for its lock.
const stopWithin = time.Second

func newFirewall(p Parts, resync time.Duration, h *health, took func(time.Duration)) *firewall {
	f := &firewall{
		choose: p.Firewall, changes: p.FirewallChanges, resync: resync, health: h, log: p.Log, took: took,
		drift: newDriftLog(p.Log), deaf: p.FirewallChanges == nil,
	}
	f.runner = runner.New(runner.Options{
		Min: firewallMin, Burst: firewallBurst, RetryMin: firewallRetry, RetryMax: resync,
	}, f.reconcile)
	return f
}

// put says what is to be in the firewall. It only takes note: the rules are made of it by run.
func (f *firewall) put(inputs []masquerade.Input) {
	f.mu.Lock()
	f.inputs, f.posted = inputs, true
	f.mu.Unlock()
	f.runner.Wake()
}

// run reconciles until ctx ends. What is still running then may be waiting for the lock of iptables, and is left to it.
func (f *firewall) run(ctx context.Context) error {
	f.runner.Wake() // the driver can be chosen before there are rules
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = f.runner.Run(ctx) // the error of ctx
	}()
	for {
		select {
		case _, ok := <-f.changes:
			if !ok {
				f.changes = nil
			}
			f.mu.Lock()
			f.full, f.deaf = true, !ok
			f.mu.Unlock()
			f.runner.Wake()
		case <-ctx.Done():
			select {
			case <-ended:
			case <-time.After(stopWithin):
			}
			return ctx.Err()
		}
	}
}

// reconcile makes the firewall hold the desired rules, if there is a reason to: other rules are desired, a notification
// came, the last time failed, or it is time to compare what the kernel sends no notifications for.
func (f *firewall) reconcile(ctx context.Context) error {
	if f.driver == nil {
		f.driver = f.choose(ctx)
	}
	desired, full := f.take()
	if desired == nil {
		return nil
	}
	again := f.applied != nil && same(*desired, *f.applied)
	full = full || !again
	if rest := f.resync - time.Since(f.began); !full && rest > 0 {
		f.runner.WakeAfter(rest)
		return nil
	}
	f.began = time.Now()
	f.runner.WakeAfter(f.resync)
	res, err := f.driver.Ensure(ctx, *desired, full)
	f.took(time.Since(f.began))
	f.note(err)
	if ctx.Err() != nil {
		return err
	}
	if f.report(res, again) {
		f.mu.Lock()
		f.full = true // it was left where it is
		f.mu.Unlock()
		f.runner.WakeAfter(masquerade.MoveEvery)
	}
	f.health.set(condFirewall, err)
	if f.applied = desired; err != nil {
		f.applied = nil
	}
	return err
}

// take returns the desired rules, nil before the first, and whether all is to be compared.
func (f *firewall) take() (desired *rulesets, full bool) {
	f.mu.Lock()
	posted, inputs := f.posted, f.inputs
	full = f.full || f.deaf
	f.posted, f.full = false, false
	f.mu.Unlock()
	if posted {
		f.desired = &rulesets{} // without inputs, there are to be no rules
		for _, in := range inputs {
			f.desired.Set(in.Family(), masquerade.Rules(in))
		}
	}
	return f.desired, full
}

// report logs what has been repaired, and tells whether a jump is contested. What differs from rules that were in place
// before has been changed by another process.
func (f *firewall) report(res masquerade.Result, again bool) (contested bool) {
	if !again && len(res.Drifts) > 0 {
		f.log.Info("firewall rules applied", zap.Stringers("found", res.Drifts))
	}
	for _, d := range res.Drifts {
		if d.Kind == masquerade.JumpContested {
			contested = true
			if time.Since(f.said) >= driftEvery {
				f.said = time.Now()
				f.log.Warn("another process keeps moving the jump to our chain; moving it back only every few seconds", zap.Stringer("place", d))
			}
		} else if again {
			f.drift.count("firewall: "+string(d.Kind), d.String())
		}
	}
	if again {
		f.drift.flush()
	}
	noSets := res.NoSets
	if noSets != nil {
		noSets = fmt.Errorf("some packets between pods and nodes are masqueraded: %w", noSets)
	}
	f.health.set(condNodeSet, noSets)
	return contested
}

// note counts a reconcile.
func (f *firewall) note(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.runs++
	if err != nil {
		f.failed++
		return
	}
	f.checked = time.Now()
}

// seen adds to a status when the rules were last found or put in place, and how often they were compared.
func (f *firewall) seen(s *status.Firewall) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s.Checked, s.Runs, s.Failed = f.checked, f.runs, f.failed
}

// rulesets are the rules of both families.
type rulesets = addr.Per[masquerade.Ruleset]

func same(a, b rulesets) bool { return a.V4.Equal(b.V4) && a.V6.Equal(b.V6) }

// mailbox holds the newest value for a reader that may be slow. It has one writer.
type mailbox[T any] chan T

func newMailbox[T any]() mailbox[T] { return make(chan T, 1) }

func (m mailbox[T]) put(v T) {
	select {
	case <-m:
	default:
	}
	m <- v
}
