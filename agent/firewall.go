package agent

import (
	"context"
	"fmt"
	"net/netip"
	"reflect"
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
	kernel  Kernel
	changes <-chan struct{} // notifications of the kernel; nil or closed: it sends none
	runner  *runner.Runner
	health  *health
	log     *zap.Logger
	drift   *driftLog
	took    func(time.Duration) // told how long each reconcile took

	// Of the runner.
	driver    masquerade.Driver
	applied   *rulesets            // what the last reconcile put in place; nil: it failed
	contested time.Time            // when a contested jump was logged last
	source    addr.Per[netip.Addr] // that is given to connections into the tunnel

	mu     sync.Mutex
	inputs []masquerade.Input // what the desired rules are made of; none: nothing is desired yet
	report status.Firewall
}

// Bounds of the reconciles that notifications cause, and of those that errors cause. Rules are to be repaired within a
// second.
const (
	firewallMin, firewallBurst = 500 * time.Millisecond, 5
	firewallRetry              = time.Second
)

// stopWithin is how long the end of the daemon waits for iptables, which may be waiting for its lock.
const stopWithin = time.Second

// newFirewall makes one that compares at each resync what the kernel sends no notifications for.
func newFirewall(p Parts, resync time.Duration, h *health, d *driftLog, took func(time.Duration)) *firewall {
	f := &firewall{
		choose: p.Firewall, kernel: p.Kernel, changes: p.FirewallChanges, health: h, log: p.Log, took: took, drift: d,
	}
	f.runner = runner.New(runner.Options{
		Min: firewallMin, Burst: firewallBurst, Max: resync, RetryMin: firewallRetry, RetryMax: resync,
	}, f.reconcile)
	return f
}

// put hands over what is desired. The rules are made of it by the runner.
func (f *firewall) put(inputs []masquerade.Input) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !reflect.DeepEqual(f.inputs, inputs) {
		f.inputs = inputs
		f.runner.Wake()
	}
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

// reconcile makes the firewall hold the desired rules.
func (f *firewall) reconcile(ctx context.Context) error {
	if f.driver == nil {
		f.driver = f.choose(ctx)
	}
	f.mu.Lock()
	inputs := f.inputs
	f.mu.Unlock()
	if len(inputs) == 0 {
		return nil
	}
	desired := &rulesets{}
	for _, in := range inputs {
		desired.Set(in.Family(), masquerade.Rules(in))
	}
	again := f.applied != nil && desired.V4.Equal(f.applied.V4) && desired.V6.Equal(f.applied.V6)
	began := time.Now()
	res, err := f.driver.Ensure(ctx, *desired)
	f.took(time.Since(began))
	if ctx.Err() != nil {
		return err
	}
	contested := f.logResult(res, again)
	f.health.set(condFirewall, err)
	if f.applied = desired; err != nil {
		f.applied = nil
	} else {
		f.forget(inputs)
	}
	if res.ChooseAgain {
		f.driver, f.applied = nil, nil
		f.runner.Wake()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.report.Runs++; err != nil {
		f.report.Failed++
	} else {
		f.report.Checked = time.Now()
	}
	if contested { // it was left where it is
		f.runner.WakeAfter(masquerade.MoveEvery)
	}
	return err
}

// forget ends the connections into the tunnel that were given an address which the node no longer goes by: peers do not
// answer it.
func (f *firewall) forget(inputs []masquerade.Input) {
	for _, in := range inputs {
		was, is := f.source.Get(in.Family()), in.Source()
		f.source.Set(in.Family(), is)
		if !was.IsValid() || was == is {
			continue
		}
		if err := f.kernel.Forget(in.Network, was); err != nil {
			f.log.Warn("connections keep an address that peers no longer answer", zap.Error(err))
		}
	}
}

// logResult logs what has been repaired, and tells whether a jump is contested. What differs from rules that were in
// place before has been changed by another process.
func (f *firewall) logResult(res masquerade.Result, again bool) (contested bool) {
	if !again && len(res.Drifts) > 0 {
		f.log.Info("firewall rules applied", zap.Stringers("found", res.Drifts))
	}
	for _, d := range res.Drifts {
		if d.Kind == masquerade.JumpContested {
			contested = true
			if time.Since(f.contested) >= driftEvery {
				f.contested = time.Now()
				f.log.Warn("another process keeps moving the jump to our chain; moving it back only every few seconds",
					zap.Stringer("place", d))
			}
		} else if again {
			f.drift.count("firewall: "+string(d.Kind), 1, d.String())
		}
	}
	noSets := res.NoSets
	if noSets != nil {
		noSets = fmt.Errorf("some packets between pods and nodes are masqueraded: %w", noSets)
	}
	f.health.set(condNodeSet, noSets)
	return contested
}

// status says when the rules were last found or put in place, and how often they were compared.
func (f *firewall) status() status.Firewall {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.report
}

// rulesets are the rules of both families.
type rulesets = addr.Per[masquerade.Ruleset]

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
