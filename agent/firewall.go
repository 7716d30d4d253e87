package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/masquerade"
)

// firewallWish is all that the firewall has to hold.
type firewallWish struct {
	inputs []masquerade.Input
	nodes  addr.Per[[]netip.Addr] // members of the node sets
}

// firewall keeps the rules in place in a goroutine of its own: iptables may wait long for its lock, and routes must not wait with it.
type firewall struct {
	driver masquerade.Driver
	sets   masquerade.Sets
	resync time.Duration
	health *health
	log    *zap.Logger
	wishes mailbox[firewallWish]
}

func (f *firewall) run(ctx context.Context) error {
	tick := time.NewTicker(f.resync)
	defer tick.Stop()
	var wish *firewallWish
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case w := <-f.wishes:
			wish = &w
		case <-tick.C:
		}
		if wish == nil {
			continue
		}
		if err := f.ensure(ctx, *wish); ctx.Err() == nil {
			f.health.set(condFirewall, err)
		}
	}
}

// ensure makes sets and rules the wished ones: a set before the rules that name it, and no longer than they do.
func (f *firewall) ensure(ctx context.Context, w firewallWish) error {
	setErr := f.ensureSets(&w)
	res, err := f.driver.Ensure(ctx, w.rulesets())
	setErr = errors.Join(setErr, res.NoSets)
	if len(res.Drifts) > 0 {
		f.log.Info("firewall rules put in place", zap.Stringers("found", res.Drifts))
	}
	if setErr != nil {
		// These packets then get the node's address: not what is promised, but they arrive.
		setErr = fmt.Errorf("pods reach the nodes on their own network with a translated address: %w", setErr)
	}
	f.health.set(condNodeSet, setErr)
	if err != nil {
		return err
	}
	for _, in := range w.inputs {
		if !in.DirectNodes {
			err = errors.Join(err, f.sets.Remove(masquerade.NodeSet(in.Family())))
		}
	}
	return err
}

// ensureSets fills the sets that rules will name; where that fails, the wish is changed to do without.
func (f *firewall) ensureSets(w *firewallWish) error {
	for _, in := range w.inputs {
		if !in.DirectNodes {
			continue
		}
		if _, err := f.sets.Ensure(masquerade.NodeSet(in.Family()), in.Family(), w.nodes.Get(in.Family())); err != nil {
			w.withoutSets()
			return err
		}
	}
	return nil
}

func (w *firewallWish) withoutSets() {
	w.inputs = slices.Clone(w.inputs)
	for i := range w.inputs {
		w.inputs[i].DirectNodes = false
	}
}

func (w firewallWish) rulesets() []masquerade.Ruleset {
	var out []masquerade.Ruleset
	for _, in := range w.inputs {
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
