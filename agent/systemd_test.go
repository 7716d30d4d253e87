package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/overlayd/overlayd/test/bubble"
)

// told is what systemd was told.
type told struct {
	mu     sync.Mutex
	states []string
}

func (s *told) notify(state string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.states = append(s.states, state)
}

// take gives what systemd was told since the last call.
func (s *told) take() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := strings.Join(s.states, "|")
	s.states = nil
	return out
}

func TestNotifySystemd(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		h := newHealth(zap.NewNop())
		h.waits()
		var got told
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- h.notifySystemd(ctx, got.notify, 2*time.Minute) }()
		synctest.Wait()
		got.take()
		step := func(want string, act func()) {
			t.Helper()
			act()
			synctest.Wait()
			if said := got.take(); said != want {
				t.Errorf("got %q, want %q", said, want)
			}
		}
		step("STATUS=not ready: store: no answer MAINPID=1", func() { h.set(condStore, errors.New("no answer\nMAINPID=1")) })
		step("STATUS=not ready: lease: the pool is full", func() { h.set(condLease, errors.New("the pool is full")) })
		step("STATUS=degraded: store: no answer MAINPID=1|READY=1", func() {
			for _, c := range needed() {
				h.set(c, nil)
			}
		})
		step("STATUS=ready", func() { h.set(condStore, nil) })
		step("WATCHDOG=1|WATCHDOG=1", func() { time.Sleep(time.Minute) })
		step("STATUS=not ready: firewall: gone", func() { h.set(condFirewall, errors.New("gone")) })
		step("STATUS=ready", func() { h.set(condFirewall, nil) }) // READY=1 was said
		h.works()
		// the loop is stuck, after half a minute it is not known yet
		step("WATCHDOG=1", func() { time.Sleep(3 * time.Minute) })
		h.waits()
		step("WATCHDOG=1|WATCHDOG=1", func() { time.Sleep(time.Minute) })
		step("STOPPING=1\nSTATUS=stopping; the data plane stays as it is", func() {
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
	})
}

// A node that does not become ready is declared started before systemd ends the daemon; a long reason is cut.
func TestSystemdIsNotKeptWaiting(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		h := newHealth(zap.NewNop())
		h.set(condLease, errors.New(strings.Repeat("x", 5000)))
		var got told
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- h.notifySystemd(ctx, got.notify, 0) }()
		time.Sleep(readyWithin - time.Second)
		if s := got.take(); strings.Contains(s, "READY") || len(s) > 2*statusLength || !strings.Contains(s, "xxx") {
			t.Errorf("before: %q", s)
		}
		time.Sleep(2 * time.Second)
		if s := got.take(); s != "READY=1" {
			t.Errorf("after: %q", s)
		}
		cancel()
		<-ended
	})
}

// Readiness is reported when it changes, with why not; never before it is known, and not at the end. Both who wait for
// changes have all of them.
func TestNotifyReady(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		h := newHealth(zap.NewNop())
		var got, other told
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() {
			ended <- h.notifyReady(ctx, func(ready bool, reason string) { got.notify(fmt.Sprint(ready, " ", reason)) })
		}()
		go func() { ended <- h.notifySystemd(ctx, other.notify, 0) }()
		wrong := errors.New("wrong")
		for i, step := range []struct {
			cond condition
			err  error
			want string
		}{
			{condKernel, errStarting, ""},
			{condStore, wrong, ""}, // degraded
			{condLease, errors.New("the pool is full"), "false lease: the pool is full"},
			{condStateDir, wrong, ""},
			{condLease, wrong, "false lease: wrong"},
			{condLease, nil, ""}, // the others are starting still
			{condUnderlay, nil, ""},
			{condKernel, nil, ""},
			{condRoutes, nil, ""},
			{condSubnetEnv, nil, ""},
			{condFirewall, nil, "true ready for pods"},
			{condStore, nil, ""},
			{condFirewall, wrong, "false firewall: wrong"},
			{condFirewall, nil, "true ready for pods"},
		} {
			h.set(step.cond, step.err)
			synctest.Wait()
			if said := got.take(); said != step.want {
				t.Errorf("step %d, %s: %v: reported %q, want %q", i, step.cond, step.err, said, step.want)
			}
		}
		if s := other.take(); !strings.Contains(s, "not ready: firewall: wrong|STATUS=degraded: state-dir: wrong") {
			t.Errorf("systemd was told %q", s)
		}
		cancel()
		h.set(condFirewall, wrong)
		for range 2 {
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		}
		if s := got.take(); s != "" {
			t.Errorf("at the end: %q", s)
		}
	})
}

// A node that restarts is ready before and after, and nothing else is reported.
func TestReadyOverARestart(t *testing.T) {
	inRig(t, func(r *rig) {
		r.stop()
		for range 2 {
			r = newAgent(r)
			var got told
			r.agent.parts.Ready = func(ready bool, reason string) { got.notify(fmt.Sprint(ready, " ", reason)) }
			r.start()
			r.table(onlyV4)
			r.sleep(time.Minute)
			r.stop()
			if s := got.take(); s != "true ready for pods" {
				t.Errorf("reported %q", s)
			}
		}
	})
}

// The node is ready for systemd when it is for pods: not before the subnet file is written.
func TestReadyForSystemd(t *testing.T) {
	inRig(t, func(r *rig) {
		r.stop()
		r = newAgent(r)
		var got told
		r.agent.parts.Notify = got.notify
		r.start()
		defer r.stop()
		r.change(func() { r.firewall.err = errors.New("no iptables") })
		r.table(onlyV4)
		r.sleep(time.Minute)
		if s := got.take(); strings.Contains(s, "READY") || !strings.HasSuffix(s, "firewall: no iptables") {
			t.Errorf("got %q", s)
		}
		r.change(func() { r.firewall.err = nil })
		r.sleep(time.Minute)
		if s := got.take(); !strings.HasSuffix(s, "STATUS=ready|READY=1") {
			t.Errorf("got %q", s)
		}
	})
}
