package subnet

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// contender is a node that claims an address, and what it says of it.
type contender struct {
	claim   Claim
	contest Contest
	off     bool
	err     error
	writes  int
}

// arena is a store with nodes that take turns, each of which knows the newest table.
type arena struct {
	t     *testing.T
	store simStore
	nodes []*contender
	now   time.Time
}

func contends(i int, ip string) *contender {
	name := fmt.Sprint("n", i)
	return &contender{claim: Claim{Attrs: with(attrs(name, ip), func(x *Attrs) { x.VTEP = vteps(name) })}}
}

func newArena(t *testing.T, addresses ...string) *arena {
	a := &arena{t: t, store: simStore{keys: map[string]*Entry{}}, now: time.Unix(1e9, 0)}
	a.store.setConfig(mustConfig(t, net4))
	for i, ip := range addresses {
		a.nodes = append(a.nodes, contends(i+1, ip))
		a.settle()
	}
	return a
}

// turn is that of one node.
func (a *arena) turn(n *contender) (wrote bool) {
	if n.off {
		return false
	}
	table := a.store.table()
	d, err := Decide(table, n.claim, 0)
	n.err = err
	if err != nil {
		return false
	}
	if conflict := n.contest.Judge(&d, a.now); conflict != nil {
		if n.err = conflict; conflict.Refused {
			return false
		}
	}
	if !d.Write {
		return false
	}
	if !a.store.commit(table, d) {
		a.t.Fatalf("%s lost a race against itself", n.claim.NodeName)
	}
	n.contest.Wrote(d, a.now)
	n.claim.Remembered = d.Lease.Subnets
	n.writes++
	return true
}

// settle gives all nodes turns until none writes any more.
func (a *arena) settle() (writes int) {
	for again := true; again; {
		again = false
		for _, n := range a.nodes {
			if a.turn(n) {
				again, writes, a.now = true, writes+1, a.now.Add(5*time.Millisecond)
			}
		}
		if writes > 50 {
			a.t.Fatalf("no end of writes")
		}
	}
	return writes
}

func (a *arena) at(i int, ip string) { a.nodes[i-1].claim.PublicIP = ips(ip) }

func (a *arena) restart(i int) { a.nodes[i-1].contest = Contest{} }

func (a *arena) pass(d time.Duration) { a.now = a.now.Add(d) }

// reached are the nodes that the others go by, by address.
func (a *arena) reached() map[string]netip.Addr {
	out := map[string]netip.Addr{}
	table := a.store.table()
	peers, _ := table.Peers(table.Config, Lease{})
	for _, l := range peers {
		out[l.NodeName] = l.PublicIP.V4
	}
	return out
}

// check: these nodes are reached at their addresses, and these report a conflict; of those, the ones that are not
// reached say so.
func (a *arena) check(reached, report string) {
	a.t.Helper()
	var got, errs []string
	for _, n := range a.nodes {
		at := a.reached()[n.claim.NodeName]
		if at == n.claim.PublicIP.V4 {
			got = append(got, n.claim.NodeName)
		}
		var conflict *ConflictError
		if errors.As(n.err, &conflict) {
			errs = append(errs, n.claim.NodeName)
			if conflict.Refused == at.IsValid() {
				a.t.Errorf("%s is reached at %q, and says: %v", n.claim.NodeName, at, conflict)
			}
		}
	}
	if fmt.Sprint(got) != reached || fmt.Sprint(errs) != report {
		a.t.Errorf("reached are %v, want %s; conflicts are reported by %v, want %s", got, reached, errs, report)
	}
}

const ipA, ipB, ipC, ipD = "192.168.1.1", "192.168.1.2", "192.168.1.3", "192.168.1.4"

func TestContestOfAddressesThatMoved(t *testing.T) {
	for _, tt := range []struct {
		name string
		move func(a *arena)
	}{
		{"a swap of nodes that were stopped", func(a *arena) {
			for i := range 3 {
				a.restart(i + 1)
			}
			a.at(1, ipB)
			a.at(2, ipA)
		}},
		{"a swap of running nodes, both at once", func(a *arena) { a.at(1, ipB); a.at(2, ipA) }},
		{"a swap of running nodes, one after the other", func(a *arena) {
			a.at(1, ipB)
			a.settle()
			a.pass(time.Second)
			a.at(2, ipA)
		}},
		{"a swap by a third address", func(a *arena) { a.at(1, ipD); a.settle(); a.at(2, ipA); a.settle(); a.at(1, ipB) }},
		{"a rotation", func(a *arena) { a.at(1, ipB); a.at(2, ipC); a.at(3, ipA) }},
		{"a rotation, one after the other", func(a *arena) {
			a.at(1, ipB)
			a.settle()
			a.at(2, ipC)
			a.settle()
			a.at(3, ipA)
		}},
		{"a rotation in the other direction", func(a *arena) {
			a.at(3, ipA)
			a.settle()
			a.at(2, ipC)
			a.settle()
			a.at(1, ipB)
		}},
		{"a chain", func(a *arena) { a.at(3, ipB); a.settle(); a.at(2, ipA); a.settle(); a.at(1, ipD) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := newArena(t, ipA, ipB, ipC)
			subnets := a.store.table().Entries
			a.pass(time.Hour)
			tt.move(a)
			a.settle()
			a.check("[n1 n2 n3]", "[]")
			for i, e := range a.store.table().Entries {
				if e.Subnets != subnets[i].Subnets || e.Identity != subnets[i].Identity {
					t.Errorf("%s holds %s, %s held %s", e.NodeName, e.Key, subnets[i].NodeName, subnets[i].Key)
				}
			}
			if n := a.settle(); n > 0 {
				t.Errorf("%d writes without a reason", n)
			}
		})
	}
}

func TestContestOfAnAddressTakenOverFromTheDead(t *testing.T) {
	a := newArena(t, ipA, ipB)
	a.nodes[0].off = true
	a.at(2, ipA)
	if n := a.settle(); n != 1 {
		t.Errorf("%d writes", n)
	}
	a.check("[n2]", "[]")

	// It comes back after a week and takes the address for its own still: the one that has it now keeps it.
	a.pass(7 * 24 * time.Hour)
	a.nodes[0].off = false
	a.restart(1)
	if n := a.settle(); n != 2 {
		t.Errorf("%d writes, want a challenge and an answer", n)
	}
	a.check("[n2]", "[n1 n2]")
}

func TestContestOfALivingNodesAddress(t *testing.T) {
	for _, first := range []int{1, 2} { // whoever is first
		a := newArena(t, ipA, ipB)
		a.pass(time.Minute)
		a.at(2, ipA)
		if first == 1 {
			slices.Reverse(a.nodes)
		}
		if n := a.settle(); n != 2 {
			t.Errorf("%d writes, want a challenge and an answer", n)
		}
		if first == 1 {
			slices.Reverse(a.nodes)
		}
		a.check("[n1]", "[n1 n2]")
		if a.pass(time.Minute); a.settle() != 0 {
			t.Error("written again within a minute")
		}

		for range 5 { // the challenger is started again and again
			a.pass(time.Second)
			a.restart(2)
			if n := a.settle(); n != 2 {
				t.Errorf("%d writes after a restart, want a challenge and an answer", n)
			}
			a.check("[n1]", "[n1 n2]")
		}
		a.pass(time.Second)
		a.restart(1)
		if n := a.settle(); n != 0 {
			t.Errorf("%d writes after a restart of the holder", n)
		}
		a.restart(2)
		a.settle()
		a.check("[n1]", "[n1 n2]")

		// The holder is switched off: at the latest after some minutes the other one has the address.
		a.nodes[0].off = true
		if wait := a.nodes[1].contest.Next(a.now); wait <= 0 || wait > challengeAgain {
			t.Fatalf("its next turn is after %s", wait)
		} else {
			a.pass(wait)
		}
		a.settle()
		a.nodes[0].err = nil
		a.check("[n2]", "[]")
	}
}

func TestContestEnds(t *testing.T) {
	t.Run("a third one", func(t *testing.T) {
		a := newArena(t, ipA, ipB, ipC)
		a.pass(time.Minute)
		a.at(2, ipA)
		a.at(3, ipA)
		if n := a.settle(); n > 4 {
			t.Errorf("%d writes", n)
		}
		a.check("[n1]", "[n1 n2 n3]")
		a.at(2, ipB)
		a.at(3, ipC)
		a.settle()
		a.check("[n1 n2 n3]", "[]")
	})
	t.Run("new ones at the same moment", func(t *testing.T) {
		a := newArena(t, ipC)
		for i := range 2 {
			a.nodes = append(a.nodes, contends(i+2, ipA))
		}
		table := a.store.table()
		for _, n := range a.nodes[1:] { // both decide before either writes
			d, err := Decide(table, n.claim, 0)
			if err != nil || n.contest.Judge(&d, a.now) != nil || !a.store.commit(table, d) {
				t.Fatalf("%+v, %v", d, err)
			}
			n.contest.Wrote(d, a.now)
		}
		if n := a.settle(); n > 4 {
			t.Errorf("%d writes", n)
		}
		if got := a.reached(); len(got) != 2 {
			t.Errorf("reached are %v, want n1 and one of the two", got)
		}
	})
	t.Run("two that both take themselves for the holder", func(t *testing.T) {
		a := newArena(t, ipA, ipB)
		a.nodes[0].off = true // paused, say: it does not answer, and does not notice that
		a.at(2, ipA)
		a.settle()
		a.pass(time.Hour)
		a.nodes[0].off = false
		if n := a.settle(); n > 4 {
			t.Errorf("%d writes", n)
		}
		if got := a.reached(); len(got) != 1 {
			t.Errorf("reached are %v, want one of the two", got)
		}
	})
	t.Run("revisions that are equal", func(t *testing.T) {
		a := newArena(t, ipA, ipB)
		a.nodes[1].claim.PublicIP = ips(ipA)
		for key, e := range a.store.keys {
			same := with(e.Attrs, func(x *Attrs) { x.PublicIP = ips(ipA) })
			a.store.keys[key] = ParseEntry(key, FormatValue(same), 9, 9, e.LeaseID)
		}
		a.store.rev = 9
		if n := a.settle(); n > 4 {
			t.Errorf("%d writes", n)
		}
		if got := a.reached(); len(got) != 1 {
			t.Errorf("reached are %v, want one of the two", got)
		}
	})
}

// Addresses that are not on the nodes themselves (--public-ip behind NAT) move as others do.
func TestContestBehindNAT(t *testing.T) {
	behindNAT := func(a *arena) {
		for i, n := range a.nodes {
			n.claim.PublicIPLocal = false
			a.restart(i + 1)
		}
		a.settle()
		a.pass(time.Hour)
	}
	a := newArena(t, ipA, ipB, ipC)
	behindNAT(a)
	a.at(1, ipB)
	a.restart(1)
	a.settle() // it waits for node 2
	a.at(2, ipC)
	a.restart(2)
	a.settle()
	a.at(3, ipA)
	a.restart(3)
	a.settle()
	a.check("[n1 n2 n3]", "[]")

	a = newArena(t, ipA, ipB)
	behindNAT(a)
	a.at(2, ipA)
	if n := a.settle(); n != 2 {
		t.Errorf("%d writes, want a challenge and an answer", n)
	}
	a.check("[n1]", "[n1 n2]")

	// What another node has on a device is not challenged.
	a = newArena(t, ipA, ipB)
	a.at(2, ipA)
	a.nodes[1].claim.PublicIPLocal = false
	if n := a.settle(); n != 0 {
		t.Errorf("%d writes", n)
	}
	a.check("[n1]", "[n2]")

	// One that is there already makes room for a node that has the address.
	a = newArena(t, ipA, ipB)
	a.nodes[0].claim.PublicIPLocal = false
	a.settle()
	a.at(2, ipA)
	if n := a.settle(); n != 1 {
		t.Errorf("%d writes", n)
	}
	a.check("[n2]", "[n1]")
}

// Both families count, and only those that the network uses.
func TestContestInOneFamily(t *testing.T) {
	a := newArena(t)
	a.store.setConfig(mustConfig(t, netTwo))
	for i := range 2 {
		n := &contender{claim: Claim{Attrs: peer(i + 1)}}
		a.nodes = append(a.nodes, n)
	}
	a.settle()
	v6 := a.nodes[0].claim.PublicIP.V6
	a.nodes[1].claim.PublicIP.V6 = v6
	if n := a.settle(); n != 2 {
		t.Errorf("%d writes, want a challenge and an answer", n)
	}
	var conflict *ConflictError
	for _, n := range a.nodes {
		if !errors.As(n.err, &conflict) || conflict.What != "the public IP "+v6.String() {
			t.Errorf("%s says %v", n.claim.NodeName, n.err)
		}
	}
	a.nodes[0].claim.PublicIP.V6 = peer(3).PublicIP.V6
	a.settle()
	a.check("[node-1 node-2]", "[]")

	a.store.setConfig(mustConfig(t, net4))
	a.settle()
	a.nodes[1].claim.PublicIP.V6 = a.nodes[0].claim.PublicIP.V6
	a.settle()
	a.check("[node-1 node-2]", "[]")
}
