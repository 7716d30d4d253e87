package faults

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/overlayd/overlayd/test/lab"
)

// place is a machine of a site.
type place = func(*Site) lab.Machine

func victim(s *Site) lab.Machine { return s.Victim.Machine }
func peer(s *Site) lab.Machine   { return s.Peer.Machine }
func router(s *Site) lab.Machine { return s.Lab.Router() }
func store(s *Site) lab.Machine  { return s.Lab.Etcd().Machine }

// each runs a shell script at a place, once for each family, with the site's variables.
func each(at place, script string) Action {
	return func(ctx context.Context, s *Site) error { return s.script(ctx, at(s), script) }
}

// once is each for a script that concerns no family: it has the variables of the first one.
func once(at place, script string) Action {
	return func(ctx context.Context, s *Site) error {
		_, err := at(s).Shell(ctx, script, s.vars.Get(s.families[0])...)
		return err
	}
}

// On runs a shell script on the victim, once for each family.
func On(script string) Action { return each(victim, script) }

// Once runs a shell script on the victim that concerns no family.
func Once(script string) Action { return once(victim, script) }

// Sees holds when a shell script on the victim succeeds for each family.
func Sees(script string) Check { return On(script) }

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
func All(checks ...Check) Check { return Steps(checks...) }

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
	return func(_ context.Context, s *Site) error {
		s.Defer(a)
		return nil
	}
}

// keepsDeleting is another program that deletes an object again and again for ten seconds; the other script succeeds
// while the object exists.
func keepsDeleting(del, back string) Action {
	const lasts, within, mostCPU = 10 * time.Second, time.Second, 3 * time.Second
	return func(ctx context.Context, s *Site) error {
		before, errBefore := usageOf(s.Victim.PID())
		for end := time.Now().Add(lasts); time.Now().Before(end); {
			if err := Steps(On(del+` 2>/dev/null || true`), Until(Sees(back), within))(ctx, s); err != nil {
				return err
			}
		}
		after, errAfter := usageOf(s.Victim.PID())
		used := after.CPU - before.CPU
		return errors.Join(errBefore, errAfter,
			unless(used <= mostCPU, "the daemon used %s of CPU in %s: want %s at most", used, lasts, mostCPU))
	}
}

func unless(ok bool, format string, args ...any) error {
	if ok {
		return nil
	}
	return fmt.Errorf(format, args...)
}
