package agent

import (
	"os"
	"testing"
	"time"

	"github.com/overlayd/overlayd/subnet"
)

// A disk that was full for a moment is written to as soon as it is not, though nothing changes; and one that stays full is not worn out.
func TestWhatWasNotWrittenIsTriedAgain(t *testing.T) {
	inRig(t, func(r *rig) {
		load := func() memory {
			m, err := r.agent.state.load(r.agent.opts.Identity)
			if err != nil {
				t.Fatal(err)
			}
			return m
		}
		// breaks has nothing written to the state directory: not even root can make it where there is a file.
		dir := r.agent.opts.StateDir
		breaks := func() {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(dir, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		mends := func() {
			if err := os.Remove(dir); err != nil {
				t.Fatal(err)
			}
		}
		r.table(onlyV4, peer(1))
		r.sleep(2 * rememberEvery)
		if m := load(); len(m.Peers) != 1 {
			t.Fatalf("remembered: %+v", m)
		}

		breaks()
		r.table(onlyV4, peer(1), peer(2))
		r.sleep(rememberEvery)
		if r.problem(condStateDir) == "" {
			t.Fatal("nobody said that nothing was written")
		}
		handed := func() (n uint64) {
			_ = r.agent.ask(r.t.Context(), func() { n = r.agent.keeper.number })
			return n
		}
		before := handed()
		r.sleep(5 * rememberEvery)
		if tries := handed() - before; tries < 4 || tries > 6 {
			t.Errorf("%d tries within five times %v", tries, rememberEvery)
		}
		mends()
		r.sleep(rememberEvery)
		if m := load(); len(m.Peers) != 2 || r.problem(condStateDir) != "" {
			t.Errorf("remembered afterwards: %+v, problem %q", m, r.problem(condStateDir))
		}
		before = handed()
		r.sleep(10 * rememberEvery)
		if handed() != before {
			t.Error("what is written was written again")
		}

		// Also the own subnet alone, while what is known of the others is not to be written.
		r.store.deliver(func(s *subnet.Snapshot) { s.Table.Epoch++; s.Table.Entries = nil })
		r.sleep(rememberEvery)
		breaks()
		other := subnet.Lease{Subnets: peer(9).Subnets}
		r.store.deliver(func(s *subnet.Snapshot) { s.Lease.Subnets = other.Subnets })
		r.sleep(time.Second)
		mends()
		r.sleep(rememberEvery)
		if m := load(); m.subnets() != other.Subnets {
			t.Errorf("the own subnet: %+v", m)
		}
	})
}

// Without a lease there is nothing to write, and no reason to go round.
func TestNothingIsWrittenWithoutALease(t *testing.T) {
	inRig(t, func(r *rig) {
		r.table(onlyV4, peer(1))
		r.sleep(2 * rememberEvery)
		r.table(onlyV4, peer(1), peer(2))
		r.store.deliver(func(s *subnet.Snapshot) { s.Lease = subnet.Lease{} })
		r.sleep(time.Second)
		rounds := func() (n int) {
			_ = r.agent.ask(r.t.Context(), func() { n = r.agent.work.rounds })
			return n
		}
		before := rounds()
		r.sleep(2 * rememberEvery)
		if n := rounds() - before; n > 1 {
			t.Errorf("%d rounds with nothing to do", n)
		}
	})
}
