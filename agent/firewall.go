package agent

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/overlayd/overlayd/masquerade"
	"github.com/overlayd/overlayd/status"
)

// firewall keeps the rules in place in a goroutine of its own: iptables may wait long for its lock, and routes must not wait with it.
type firewall struct {
	driver  masquerade.Driver
	changed <-chan struct{} // hints that somebody changed the firewall; nil: nothing tells
	resync  time.Duration
	health  *health
	log     *zap.Logger
	drift   *driftLog
	took    func(time.Duration) // told how long each look took

	contested bool      // another program wants the place of a jump of ours
	said      time.Time // when that was said last

	mu      sync.Mutex
	checked time.Time // when it was last looked at, without an error
	runs    int
	failed  int // of the runs
	wishes  mailbox[[]masquerade.Input]
}

// run looks whenever there is a reason to, and on a period: not everything is told of. Where everything is, a look at what
// has not changed starts no process.
func (f *firewall) run(ctx context.Context) error {
	tick := time.NewTicker(f.resync)
	defer tick.Stop()
	var pace throttle
	later := time.NewTimer(time.Hour)
	defer later.Stop()
	var wish, done []masquerade.Ruleset
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case w := <-f.wishes:
			wish = rulesets(w)
			if done != nil && same(wish, done) {
				continue // every round of the loop says it again
			}
		case <-tick.C:
		case <-later.C:
			pace.looked(time.Now())
		case <-f.changed:
			now := time.Now()
			if due := pace.due(now); now.Before(due) {
				later.Reset(time.Until(due))
				continue
			}
			pace.looked(now)
		}
		if wish == nil {
			continue
		}
		err := f.ensure(ctx, wish, done != nil && same(wish, done))
		if ctx.Err() == nil {
			f.health.set(condFirewall, err)
		}
		if f.contested {
			later.Reset(masquerade.MoveEvery)
		}
		if done = nil; err == nil {
			done = wish
		}
	}
}

// ensure makes the rules the wished ones. If they were so before, somebody else has changed what has to be put right.
func (f *firewall) ensure(ctx context.Context, wish []masquerade.Ruleset, again bool) error {
	began := time.Now()
	res, err := f.driver.Ensure(ctx, wish)
	f.took(time.Since(began))
	f.saw(err)
	f.contested = slices.ContainsFunc(res.Drifts,
		func(d masquerade.Drift) bool { return d.Kind == masquerade.JumpContested })
	if !again && len(res.Drifts) > 0 {
		f.log.Info("firewall rules put in place", zap.Stringers("found", res.Drifts))
	}
	if again {
		for _, d := range res.Drifts {
			if d.Kind == masquerade.JumpContested {
				f.leave(d)
				continue
			}
			f.drift.count("firewall: "+d.Kind.String(), d.String())
		}
		f.drift.flush()
	}
	if ctx.Err() != nil {
		return err
	}
	noSets := res.NoSets
	if noSets != nil {
		noSets = fmt.Errorf("some packets between pods and nodes arrive with a translated address: %w", noSets)
	}
	f.health.set(condNodeSet, noSets)
	return err
}

// leave says once a minute that a jump is not where it belongs, and left there for the time being.
func (f *firewall) leave(d masquerade.Drift) {
	if time.Since(f.said) >= driftEvery {
		f.said = time.Now()
		f.log.Warn("another program keeps putting its rules behind the jump to ours in FORWARD, "+
			"which is now moved behind them only every few seconds", zap.Stringer("place", d))
	}
}

// saw takes note of a look.
func (f *firewall) saw(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.runs++
	if err != nil {
		f.failed++
		return
	}
	f.checked = time.Now()
}

// seen adds to a status when the rules were last found or put in place, and how often they were looked at.
func (f *firewall) seen(s *status.Firewall) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s.Checked, s.Runs, s.Failed = f.checked, f.runs, f.failed
}

func same(a, b []masquerade.Ruleset) bool { return slices.EqualFunc(a, b, masquerade.Ruleset.Equal) }

// rulesets is never nil: no inputs are a wish too.
func rulesets(inputs []masquerade.Input) []masquerade.Ruleset {
	out := []masquerade.Ruleset{}
	for _, in := range inputs {
		out = append(out, masquerade.Rules(in))
	}
	return out
}

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
