package agent

import (
	"errors"
	"slices"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
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
