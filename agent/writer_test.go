package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/overlayd/overlayd/agent/state"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// A disk that was full for a moment is written to as soon as it is not, though nothing changes; and one that stays full
// is not worn out.
func TestWhatWasNotWrittenIsTriedAgain(t *testing.T) {
	inRig(t, func(r *rig) {
		load := func() state.Persisted {
			m, err := r.agent.opts.dir().Load()
			if err != nil {
				t.Fatal(err)
			}
			return m
		}
		// breaks has nothing written to the state directory: not even root can make it where there is a file.
		dir := r.agent.opts.StateDir
		breaks := func() {
			if err := errors.Join(os.Rename(dir, dir+".away"), os.WriteFile(dir, nil, 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		mends := func() {
			if err := errors.Join(os.Remove(dir), os.Rename(dir+".away", dir)); err != nil {
				t.Fatal(err)
			}
		}
		r.table(onlyV4, peer(1))
		r.sleep(2 * retryEvery)
		if m := load(); len(m.Peers) != 1 {
			t.Fatalf("remembered: %+v", m)
		}

		breaks()
		r.table(onlyV4, peer(1), peer(2))
		r.sleep(retryEvery)
		if r.problem(condStateDir) == "" {
			t.Fatal("nobody said that nothing was written")
		}
		if lease, peers := r.writes(5*retryEvery, func() {}); lease > 0 || peers < 4 || peers > 6 {
			t.Errorf("%d and %d tries within five times %v", lease, peers, retryEvery)
		}
		mends()
		r.sleep(retryEvery)
		if m := load(); len(m.Peers) != 2 || r.problem(condStateDir) != "" {
			t.Errorf("remembered afterwards: %+v, problem %q", m, r.problem(condStateDir))
		}
		if lease, peers := r.writes(10*retryEvery, func() {}); lease+peers > 0 {
			t.Error("what is written was written again")
		}

		// Also the own subnet alone, while what is known of the others is not to be written.
		r.store.deliver(func(s *subnet.Snapshot) { s.Table.Epoch++; s.Table.Entries = nil })
		r.sleep(retryEvery)
		breaks()
		other := subnet.Lease{Subnets: peer(9).Subnets}
		r.store.deliver(func(s *subnet.Snapshot) { s.Lease.Subnets = other.Subnets })
		r.sleep(time.Second)
		mends()
		r.sleep(retryEvery)
		if m := load(); m.Own() != other.Subnets {
			t.Errorf("the own subnet: %+v", m)
		}
	})
}

// Without a lease there is nothing to write, and no reason for a round.
func TestNothingIsWrittenWithoutALease(t *testing.T) {
	inRig(t, func(r *rig) {
		r.table(onlyV4, peer(1))
		r.sleep(2 * retryEvery)
		r.store.deliver(func(s *subnet.Snapshot) { s.Lease = subnet.Lease{} })
		r.table(onlyV4, peer(1), peer(2))
		r.sleep(time.Second)
		rounds := func() (n int) {
			_ = r.agent.ask(r.t.Context(), func() { n = r.agent.applied.work.Rounds })
			return n
		}
		before := rounds()
		lease, peers := r.writes(2*retryEvery, func() {})
		if n := rounds() - before; n > 1 {
			t.Errorf("%d rounds with nothing to do", n)
		}
		if lease+peers > 0 {
			t.Errorf("lease.json is written %d times, peers.json %d times", lease, peers)
		}
	})
}

// What a start without the store needs is written when it changes: the config in use and the address at once, peers
// within half a minute. So much is there after a SIGKILL, too.
func TestWhatChangesIsRemembered(t *testing.T) {
	const port, vni = `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","Port":8473}}`,
		`{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":7}}`
	inRig(t, func(r *rig) {
		load := func() state.Persisted {
			m, err := r.agent.opts.dir().Load()
			if err != nil {
				t.Fatal(err)
			}
			return m
		}
		remembers := func(what, config, address string, peers int) {
			t.Helper()
			m := load()
			if string(m.Config) != config || m.Addresses.V4.String() != address || len(m.Peers) != peers {
				t.Errorf("%s: remembered config %s, address %s, %d peers", what, m.Config, m.Addresses.V4, len(m.Peers))
			}
		}
		r.table(onlyV4, peer(1))
		r.sleep(peersEvery + leaseEvery)
		remembers("at the start", onlyV4, "192.0.2.10", 1)
		r.table(port, peer(1))
		remembers("port", port, "192.0.2.10", 1)
		for _, bad := range []string{"{", `{"Network":"10.99.0.0/16"}`, `{"Network":"10.244.0.0/16","Backend":{"Port":-1}}`} {
			r.sleep(leaseEvery)
			r.table(bad, peer(1))
			remembers("a config that is not used: "+bad, port, "192.0.2.10", 1)
		}
		r.table(port, peer(1), peer(2))
		r.sleep(peersEvery)
		remembers("a peer", port, "192.0.2.10", 2)

		// The same value of a config every time: 100 changes within 10 s, and the last one counts.
		i := 0
		if n, _ := r.writes(10*time.Second, func() {
			r.table([]string{port, vni}[i%2], peer(1), peer(2))
			i++
		}); n > 12 {
			t.Errorf("written %d times within ten seconds", n)
		}
		r.sleep(leaseEvery)
		remembers("the last of many", vni, "192.0.2.10", 2)

		// While the store has lost its peers they stay remembered, and the config is followed all the same.
		r.store.deliver(func(s *subnet.Snapshot) { s.Table.Epoch++ })
		r.table(port)
		r.sleep(2 * leaseEvery)
		remembers("peers that were lost", port, "192.0.2.10", 2)

		// Of two addresses that fit, a start without the store takes the one that the others know.
		r.stop()
		two := testHost()
		at := slices.IndexFunc(two.Addresses,
			func(a netstate.HostAddress) bool { return a.Prefix.Addr().String() == "192.0.2.10" })
		newer := two.Addresses[at]
		newer.Prefix = netip.MustParsePrefix("192.0.2.9/24")
		two.Addresses = slices.Insert(two.Addresses, at, newer)
		r.change(func() { r.kernel.host = two.Indexed() })
		again := newAgent(r)
		again.start()
		defer again.stop()
		r.sleep(2 * offlineAfter)
		l := again.state().Links
		if len(l) != 1 || l[0].VXLAN.Port != 8473 || l[0].VXLAN.Local.String() != "192.0.2.10" || again.routes() != 4 {
			t.Errorf("started without the store: %d routes, devices %+v", again.routes(), l)
		}
	})
}

// writes counts those of both files, and tries that fail, while something is done ten times a second.
func (r *rig) writes(within time.Duration, do func()) (lease, peers int) {
	w := r.agent.writer
	before := map[string]int{}
	count := func(file string) int {
		r.saves.mu.Lock()
		defer r.saves.mu.Unlock()
		return r.saves.of[file]
	}
	for _, f := range []*stateFile{w.lease, w.peers} {
		before[f.path] = count(f.path)
	}
	for range within / (100 * time.Millisecond) {
		do()
		r.sleep(100 * time.Millisecond)
	}
	return count(w.lease.path) - before[w.lease.path], count(w.peers.path) - before[w.peers.path]
}

// counter counts how often each file is written.
type counter struct {
	mu sync.Mutex
	of map[string]int
}

func (c *counter) count(save func(string, state.Persisted) error) func(string, state.Persisted) error {
	c.of = map[string]int{}
	return func(file string, p state.Persisted) error {
		c.mu.Lock()
		c.of[file]++
		c.mu.Unlock()
		return save(file, p)
	}
}

// Peers change again while a slow disk still writes them: they are written once more, not once for each half minute.
func TestSlowWriteIsNotQueuedAgain(t *testing.T) {
	inRig(t, func(r *rig) {
		r.stop()
		r = newAgent(r)
		save := r.agent.writer.save
		r.agent.writer.save = func(file string, p state.Persisted) error {
			if file == r.agent.writer.peers.path {
				time.Sleep(10 * peersEvery)
			}
			return save(file, p)
		}
		r.start()
		r.table(onlyV4, peer(1))
		if _, peers := r.writes(12*peersEvery, func() {}); peers != 1 {
			t.Errorf("written %d times", peers)
		}
		r.table(onlyV4, peer(1), peer(2))
		if _, peers := r.writes(12*peersEvery, func() {}); peers != 1 {
			t.Errorf("written %d times after a change", peers)
		}
		r.stop()
	})
}

// Thousands of peers that come and go have the file written every half minute.
func TestManyPeersAreWrittenSeldom(t *testing.T) {
	inRig(t, func(r *rig) {
		var many []*subnet.Entry
		for i := range 5000 {
			raw := fmt.Sprintf(
				`{"PublicIP":"198.18.%d.%d","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:%02x:%02x"},`+
					`"NodeName":"m%d","NodeID":"m%d"}`,
				i>>8, i&255, i>>8, i&255, i, i)
			many = append(many, subnet.ParseEntry(fmt.Sprintf("10.%d.%d.0-24", 128+i>>8, i&255), []byte(raw), 1, 1, 1))
		}
		const big = `{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}`
		r.table(big, many...)
		r.sleep(2 * retryEvery)
		i := 0
		if lease, peers := r.writes(time.Minute, func() {
			if i++; i%10 == 0 {
				r.table(big, many[i%20/10:]...)
			}
		}); lease > 0 || peers < 1 || peers > 2 {
			t.Errorf("written %d and %d times within a minute", lease, peers)
		}
	})
}
