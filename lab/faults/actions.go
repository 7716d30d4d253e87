package faults

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// On runs a shell script on the victim, once for each family, with the site's variables.
func On(script string) Action {
	return func(ctx context.Context, s *Site) error {
		return s.script(ctx, script)
	}
}

// Once is On for a script that concerns no family.
func Once(script string) Action {
	return func(ctx context.Context, s *Site) error {
		_, err := s.Victim.Run(ctx, "sh", "-ec", s.vars.Get(s.families[0])+script)
		return err
	}
}

// Sees holds when a shell script on the victim succeeds for each family.
func Sees(script string) Check {
	return func(ctx context.Context, s *Site) error {
		return s.script(ctx, script)
	}
}

// Whole holds when every node has the planned state and its daemon has nothing to complain about.
func Whole(ctx context.Context, s *Site) error { return s.whole(ctx) }

// KernelWhole holds when every node has the planned state, whatever the daemons say.
func KernelWhole(ctx context.Context, s *Site) error { return s.asPlanned(ctx) }

// RoutesWhole is KernelWhole but for the firewall.
func RoutesWhole(ctx context.Context, s *Site) error { return s.asPlanned(ctx, secFirewall, "sets") }

// Steps is several actions, one after the other.
func Steps(actions ...Action) Action {
	return func(ctx context.Context, s *Site) error {
		for _, a := range actions {
			if err := a(ctx, s); err != nil {
				return err
			}
		}
		return nil
	}
}

// All holds when each of the checks does.
func All(checks ...Check) Check {
	return func(ctx context.Context, s *Site) error {
		for _, c := range checks {
			if err := c(ctx, s); err != nil {
				return err
			}
		}
		return nil
	}
}

// Wait lets some time pass.
func Wait(d time.Duration) Action {
	return func(ctx context.Context, _ *Site) error { return sleep(ctx, d) }
}

// Until is a check as a step: it waits until the check holds.
func Until(c Check, patience time.Duration) Action {
	return func(ctx context.Context, s *Site) error {
		_, err := s.await(ctx, c, time.Now(), patience)
		return err
	}
}

// Afterwards has an action done by Undo.
func Afterwards(a Action) Action {
	return func(ctx context.Context, s *Site) error {
		s.Defer(func() error { return a(context.WithoutCancel(ctx), s) })
		return nil
	}
}

// Deleter is somebody who keeps deleting something for a while.
type Deleter struct {
	Back   string // succeeds while the thing is there
	Delete string
	For    time.Duration
	Within time.Duration // each time it must be back so soon
	CPU    time.Duration // that the daemon may use meanwhile
}

// Do deletes, sees it come back, and deletes again.
func (d Deleter) Do(ctx context.Context, s *Site) error {
	before, err := cpuTime(s.Victim.PID())
	if err != nil {
		return err
	}
	var longest time.Duration
	times := 0
	for end := time.Now().Add(d.For); time.Now().Before(end); times++ {
		if err := s.script(ctx, d.Delete); err != nil {
			return err
		}
		took, err := s.await(ctx, Sees(d.Back), time.Now(), 10*time.Second)
		if err != nil {
			return fmt.Errorf("deletion %d: it is not back: %w", times+1, err)
		}
		longest = max(longest, took)
	}
	after, err := cpuTime(s.Victim.PID())
	if err != nil {
		return err
	}
	s.facts["repeated"] = fmt.Sprintf("%d times, back within %s at worst, %s of CPU", times, longest.Round(10*time.Millisecond), after-before)
	return errors.Join(
		unless(longest <= d.Within, "of %d times, it once took %s to come back: want %s", times, longest.Round(time.Millisecond), d.Within),
		unless(after-before <= d.CPU, "the daemon used %s of CPU in %s: want %s at most", after-before, d.For, d.CPU))
}

func unless(ok bool, format string, args ...any) error {
	if ok {
		return nil
	}
	return fmt.Errorf(format, args...)
}
