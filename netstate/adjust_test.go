package netstate

import (
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/overlayd/overlayd/addr"
)

func (n *node) adjust(gone, come State) Result {
	n.t.Helper()
	var res Result
	var err error
	n.Do(func() { res, err = n.k.Reconcile(Update{Gone: gone, Come: come, Prune: n.k.prune}) })
	if err != nil {
		n.t.Fatal(err)
	}
	return res
}

// TestUncover: of our routes, those around an address go, and they come back only with the next Reconcile.
func TestUncover(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	desired := merge(fullState(), peersAt(map[int]int{1: 1, 2: 2}).state())
	n.converge(desired)
	var res Result
	var err error
	endpoints := []netip.Addr{netip.MustParseAddr("10.250.1.77"), netip.MustParseAddr("203.0.113.1")}
	n.Do(func() { res, err = n.k.Uncover(endpoints) })
	if err != nil || len(res.Failed) > 0 || len(res.Done) != 1 {
		t.Fatalf("%+v, %v", res, err)
	}
	out, err := n.Run("ip", "route", "show", "proto", "118")
	if err != nil || strings.Contains(out, "10.250.1.0/24") || !strings.Contains(out, "10.250.2.0/24") {
		t.Errorf("%s, %v", out, err)
	}
	n.converge(desired)
}

// peersAt is what some peers ask for, each of which may be found in one place or another.
func peersAt(at map[int]int) world {
	var s State
	for i, at := range at {
		sn, mac := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 250, byte(i), 0}), 24), addr.MAC{2, 1, 0, 0, 0, byte(i)}
		s.addPeer(dev4, sn, netip.AddrFrom4([4]byte{172, 17, byte(at), byte(i)}), mac)
	}
	return newWorld(s)
}

// TestAdjust: whatever others do in between, many adjustments end in what a Reconcile of the whole would make.
func TestAdjust(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	g := gen{rand.New(rand.NewPCG(1, 118))}
	base := fullState()
	n.converge(base)
	at := map[int]int{}
	for round := range 150 {
		before := peersAt(at)
		for range 1 + g.IntN(3) {
			if g.IntN(3) == 0 {
				delete(at, g.IntN(8))
			} else {
				at[g.IntN(8)] = g.IntN(3)
			}
		}
		after := peersAt(at)
		drift := ""
		if g.IntN(4) == 0 {
			d := drifts[g.IntN(len(drifts))]
			drift = d.name
			_, _ = n.Run("sh", "-c", d.script)
		}
		if g.IntN(4) == 0 {
			n.observe()
			drift = ""
		}
		res := n.adjust(before.minus(after), after.minus(before))
		if len(res.Failed) > 0 && drift == "" {
			t.Fatalf("round %d: %v", round, res.Failed)
		}
		if drift != "" { // it is heard of, and looked at
			n.observe()
			if res := n.adjust(State{}, State{}); len(res.Failed) > 0 || !res.Repaired {
				t.Fatalf("round %d, after %s: %+v", round, drift, res)
			}
		}
		if n.wantState(merge(base, after.state())); t.Failed() {
			t.Fatalf("round %d, after %q", round, drift)
		}
	}
	whole := merge(base, peersAt(at).state())
	if res := n.reconcile(whole); len(res.Done)+len(res.Failed) > 0 || !res.Repaired {
		t.Errorf("a Reconcile of the whole: %+v", res)
	}
	n.forget()
	if done := n.converge(whole); len(done) > 0 {
		t.Errorf("a Reconcile of the whole, after a look: %v", done)
	}
}

// TestAdjustAfterAddMissing: what is no longer wished for stays for as long as the wish may not be complete.
func TestAdjustAfterAddMissing(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	base, one, two := fullState(), peersAt(map[int]int{1: 0}).state(), peersAt(map[int]int{2: 0}).state()
	n.converge(merge(base, one))
	n.open()
	n.Do(func() {
		if _, err := n.k.Reconcile(Update{Come: base, All: true}); err != nil {
			t.Fatal(err)
		}
	})
	n.adjust(State{}, two)
	n.adjust(two, State{})
	n.wantState(merge(base, one, two))
	n.converge(base)
	n.wantState(base)
}

// TestCompare: it lists what would be done, and does nothing. What would not be removed is not listed.
func TestCompare(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	base, one := fullState(), peersAt(map[int]int{1: 0}).state()
	whole := merge(base, one)
	n.converge(whole)
	n.open()
	changes := func(when string, want ...Op) {
		t.Helper()
		n.Do(func() {
			got, err := n.k.Compare()
			ops := []Op{}
			for _, c := range got {
				ops = append(ops, c.Op)
			}
			if err != nil || !slices.Equal(ops, want) {
				t.Errorf("%s: %v, %v", when, got, err)
			}
		})
	}
	changes("nothing is desired yet")
	n.Do(func() {
		if _, err := n.k.Reconcile(Update{Come: base.clone(), All: true}); err != nil {
			t.Fatal(err)
		}
	})
	changes("what is too many may stay")
	n.wantState(whole)
	n.converge(whole)
	changes("in sync")
	n.sh("ip route del 10.250.1.0/24")
	changes("a route is gone", Add)
	if res := n.adjust(State{}, State{}); len(res.Done) != 1 || !res.Repaired {
		t.Errorf("%+v", res)
	}
	changes("in sync again")
}

// TestAdjustFirst: before anything was wished for as a whole, nothing is swept.
func TestAdjustFirst(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	base, one := fullState(), peersAt(map[int]int{1: 0}).state()
	n.converge(base)
	n.open()
	if res := n.adjust(State{}, one); len(res.Failed) > 0 || res.Repaired {
		t.Errorf("%+v", res)
	}
	n.wantState(merge(base, one))
}

// TestAdjustOfDevices: what is on a device that has to be made anew comes back.
func TestAdjustOfDevices(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	want := fullState()
	n.converge(want)
	other := slices.Clone(want.Links)
	for i := range other {
		other[i].VXLAN.Port = 4789
	}
	n.adjust(State{Links: want.Links}, State{Links: other, Sysctls: []Sysctl{{"net/ipv4/conf/eth0/forwarding", "0"}}})
	want.Links = other
	n.wantState(want)
	n.adjust(State{Links: other}, State{})
	n.adjust(State{}, State{Links: other})
	n.wantState(want)
}

func TestRepaired(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	want, more := fullState(), peersAt(map[int]int{1: 0}).state()
	drift := func() {
		n.sh("ip route flush proto 118")
		n.forget()
	}
	for _, step := range []struct {
		does string
		do   func() Result
		want bool
	}{
		{"the first", func() Result { return n.reconcile(want) }, false},
		{"the same", func() Result { return n.reconcile(fullState()) }, true},
		{"the same, after a drift", func() Result { drift(); return n.reconcile(want) }, true},
		{"an adjustment", func() Result { return n.adjust(State{}, more) }, false},
		{"the same adjustment", func() Result { return n.adjust(State{}, more) }, true},
		{"no adjustment, after a drift", func() Result { drift(); return n.adjust(State{}, State{}) }, true},
		{"an adjustment, after a drift", func() Result { drift(); return n.adjust(more, State{}) }, false},
		{"the same as a whole", func() Result { drift(); return n.reconcile(want) }, true},
		{"another", func() Result { drift(); return n.reconcile(merge(want, more)) }, false},
	} {
		if res := step.do(); res.Repaired != step.want || len(res.Failed) > 0 {
			t.Errorf("%s: %+v", step.does, res)
		}
	}
	n.inject(1<<30, interrupted)
	n.Do(func() {
		n.forget()
		if _, err := n.k.Reconcile(all(want)); err == nil {
			t.Error("an interrupted dump was believed")
		}
	})
	n.inject(0, nil)
	if res := n.reconcile(want); res.Repaired { // nothing had been done about this wish
		t.Errorf("after one that did nothing: %+v", res)
	}
}

// TestAdjustWakesNobody: what it does is no news, and what others do afterwards is.
func TestAdjustWakesNobody(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.watch()
	n.converge(fullState())
	for heard(n.k, 300*time.Millisecond) {
		n.forget()
		n.converge(fullState())
	}
	at := map[int]int{}
	for i := range 30 {
		before := peersAt(at)
		at[i%7] = i % 4
		delete(at, (i+4)%7)
		after := maps.Clone(peersAt(at))
		if res := n.adjust(before.minus(after), after.minus(before)); len(res.Failed) > 0 || len(res.Done) == 0 {
			t.Errorf("%+v", res)
		}
	}
	if heard(n.k, 300*time.Millisecond) {
		t.Error("it was taken for somebody else's doing")
	}
	for i := range at {
		n.Exec("bridge", "fdb", "del", addr.MAC{2, 1, 0, 0, 0, byte(i)}.String(), "dev", dev4)
		break
	}
	if !heard(n.k, patience) {
		t.Error("what somebody else did was not heard of")
	}
}
