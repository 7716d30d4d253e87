package agent

import (
	"errors"
	"slices"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/overlayd/overlayd/test/bubble"
)

// What is missing at the start has not failed, and does not recover.
func TestWhatIsLoggedOfConditions(t *testing.T) {
	core, logs := observer.New(zap.InfoLevel)
	h := newHealth(zap.New(core))
	refused := errors.New("refused")
	for i, step := range []struct {
		cond condition
		err  error
		want []string
	}{
		{condKernel, errStarting, nil},
		{condKernel, nil, nil},
		{condLease, refused, []string{"condition failed"}},
		{condLease, refused, nil},
		{condLease, nil, []string{"condition recovered"}},
		{condLease, nil, nil},
		{condSilent, refused, []string{"condition failed"}},
		{condSilent, errors.New("again"), nil}, // too soon
		{condSilent, nil, []string{"condition recovered"}},
		{condSilent, refused, []string{"condition failed"}},
	} {
		h.set(step.cond, step.err)
		var got []string
		for _, e := range logs.TakeAll() {
			got = append(got, e.Message)
		}
		if !slices.Equal(got, step.want) {
			t.Errorf("step %d, %s: %v: logged %q, want %q", i, step.cond, step.err, got, step.want)
		}
	}
}

// A condition that comes and goes all the time has a bounded number of lines, and the next one has the number of others.
func TestFlappingCondition(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.InfoLevel)
		h := newHealth(zap.New(core))
		const flaps = 600
		for range flaps {
			h.set(condPeers, errors.New("a lease makes no sense"))
			h.set(condPeers, nil)
			time.Sleep(100 * time.Millisecond)
		}
		if n := logs.Len(); n != mostLines {
			t.Errorf("%d lines in a minute, at most %d may be", n, mostLines)
		}
		h.set(condLease, errors.New("another condition")) // is not held back
		h.set(condPeers, errors.New("a lease makes no sense"))
		all := logs.All()
		if got := all[len(all)-1].ContextMap()["omitted"]; len(all) != mostLines+2 || got != int64(2*flaps-mostLines) {
			t.Errorf("%d lines, the last one omits %v", len(all), got)
		}
	})
}
