package netstate

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/addr"
)

// keyOf says by which of its parts an object is told from others of its kind.
func keyOf(o Object) string {
	switch o := o.(type) {
	case Link:
		return "device " + o.Name
	case Sysctl:
		return "sysctl " + o.Path
	case Neighbour:
		return fmt.Sprint("neighbour ", o.Link, o.IP)
	case FDBEntry:
		return fmt.Sprint("fdb ", o.Link, o.MAC)
	case TunnelPeer:
		return fmt.Sprint("peer ", o.Link, o.Key)
	case Route:
		return fmt.Sprint("route ", o.Table, o.Dst, o.Metric)
	default: // all of an address or a rule is its key
		return o.String()
	}
}

// linkOf is the device that an object is on.
func linkOf(o Object) (string, bool) {
	switch o := o.(type) {
	case Address:
		return o.Link, true
	case Neighbour:
		return o.Link, true
	case FDBEntry:
		return o.Link, true
	case TunnelPeer:
		return o.Link, true
	case Route:
		return o.Link, true
	}
	return "", false
}

func objects(s State) []Object {
	var out []Object
	out = appendObjects(out, s.Links)
	out = appendObjects(out, s.Sysctls)
	out = appendObjects(out, s.Addresses)
	out = appendObjects(out, s.Neighbours)
	out = appendObjects(out, s.FDB)
	out = appendObjects(out, s.TunnelPeers)
	out = appendObjects(out, s.Routes)
	return appendObjects(out, s.Rules)
}

func appendObjects[T Object](out []Object, s []T) []Object {
	for _, x := range s {
		out = append(out, x)
	}
	return out
}

// stateOf is the inverse of objects.
func stateOf(os []Object) State {
	var s State
	for _, o := range os {
		switch o := o.(type) {
		case Link:
			s.Links = append(s.Links, o)
		case Sysctl:
			s.Sysctls = append(s.Sysctls, o)
		case Address:
			s.Addresses = append(s.Addresses, o)
		case Neighbour:
			s.Neighbours = append(s.Neighbours, o)
		case FDBEntry:
			s.FDB = append(s.FDB, o)
		case TunnelPeer:
			s.TunnelPeers = append(s.TunnelPeers, o)
		case Route:
			s.Routes = append(s.Routes, o)
		case Rule:
			s.Rules = append(s.Rules, o)
		}
	}
	s.Sort()
	return s
}

// world is a kernel that is surprised by nothing it should not be surprised by: any change that does not fit is an
// error.
type world map[string]Object

// foreignLink is a device of the host's that routes may use.
const foreignLink = "eth0"

func newWorld(s State) world {
	w := world{}
	for _, o := range objects(s) {
		w[keyOf(o)] = o
	}
	return w
}

func (w world) state() State { return stateOf(slices.Collect(maps.Values(w))) }

func (w world) hasLink(name string) bool {
	_, ok := w["device "+name]
	return ok || name == foreignLink
}

func (w world) apply(c Change) error {
	key := keyOf(c.Obj)
	there, exists := w[key]
	if link, ok := linkOf(c.Obj); ok && !w.hasLink(link) {
		return fmt.Errorf("%s: there is no device", c)
	}
	switch c.Op {
	case Add:
		if exists {
			return fmt.Errorf("%s: there is %s", c, there)
		}
		w[key] = c.Obj
	case Replace:
		if !exists || there != c.Old || keyOf(c.Old) != key || c.Obj == c.Old {
			return fmt.Errorf("%s: for %v, but there is %v", c, c.Old, there)
		}
		if l, ok := c.Obj.(Link); ok && l.VXLAN != there.(Link).VXLAN {
			return fmt.Errorf("%s: a device can't be changed from %s", c, there)
		}
		w[key] = c.Obj
	case Delete:
		if there != c.Obj || c.Obj.kind() == kindSysctl {
			return fmt.Errorf("%s: there is %v", c, there)
		}
		delete(w, key)
		if l, ok := c.Obj.(Link); ok {
			maps.DeleteFunc(w, func(_ string, o Object) bool { on, ok := linkOf(o); return ok && on == l.Name })
		}
	default:
		return fmt.Errorf("%s: no such operation", c)
	}
	return nil
}

// expect is desired, plus the settings that nobody asks for any more: they stay.
func (w world) expect(desired State) State {
	out := newWorld(desired)
	for k, o := range w {
		if _, wanted := out[k]; !wanted && o.kind() == kindSysctl {
			out[k] = o
		}
	}
	return out.state()
}

// gen makes random states out of a small stock of names, so that two states have much in common.
type gen struct{ *rand.Rand }

func pick[T any](g gen, of ...T) T { return of[g.IntN(len(of))] }

func (g gen) ip() netip.Addr {
	return pick(g, netip.MustParseAddr, func(s string) netip.Addr {
		return netip.MustParseAddr("fd00::" +
			strings.ReplaceAll(s, ".", ":"))
	})(
		fmt.Sprintf("10.244.%d.0", g.IntN(4)))
}

func (g gen) prefix() netip.Prefix {
	a := g.ip()
	return netip.PrefixFrom(a, a.BitLen()-8*g.IntN(2))
}

func (g gen) mac() addr.MAC { return addr.MAC{2, 0, 0, 0, 0, byte(g.IntN(5))} }

func (g gen) state() State {
	var os []Object
	links := []string{}
	for _, name := range []string{"overlay.1", "overlay.7", "overlay-v6.1"} {
		if g.IntN(3) > 0 {
			links = append(links, name)
			os = append(os, Link{
				Name: name, MAC: g.mac(), MTU: pick(g, 1400, 1450), Down: g.IntN(8) == 0,
				VXLAN: VXLAN{
					VNI: pick[uint32](g, 1, 1, 1, 7), Port: 8472, Local: g.ip(), Underlay: foreignLink,
					Learning: g.IntN(5) == 0,
				},
			})
		}
	}
	for n := g.IntN(12); n > 0 && len(links) > 0; n-- {
		link := pick(g, links...)
		os = append(os, pick[Object](g,
			Address{link, g.prefix()},
			Neighbour{link, g.ip(), g.mac()},
			FDBEntry{link, g.mac(), g.ip()}))
	}
	for n := g.IntN(8); n > 0; n-- {
		r := Route{
			Table: pick[uint32](g, MainTable, OwnTable), Dst: g.prefix(), Metric: uint32(g.IntN(3)),
			Link: pick(g, append(links, foreignLink)...),
		}
		if g.IntN(3) > 0 {
			r.Via, r.OnLink = g.ip(), g.IntN(2) == 0
		}
		os = append(os, r)
	}
	for n := g.IntN(3); n > 0; n-- {
		os = append(os, pick[Object](g,
			Rule{Priority: uint32(g.IntN(2)), From: g.prefix(), Table: OwnTable},
			Sysctl{"net/" + pick(g, "a", "b"), pick(g, "0", "1")}))
	}
	g.Shuffle(len(os), func(i, j int) { os[i], os[j] = os[j], os[i] })
	return newWorld(stateOf(os)).state() // one object for a key
}

// forSeeds runs a law for many seeds, and names the one that breaks it.
func forSeeds(t *testing.T, n uint64, law func(t *testing.T, g gen)) {
	t.Helper()
	for seed := range n {
		if ok := t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			law(t,
				gen{rand.New(rand.NewPCG(seed, 118))})
		}); !ok {
			return
		}
	}
}

const seeds = 2000

func TestDiffLeadsToTheDesiredState(t *testing.T) {
	t.Parallel()
	forSeeds(t, seeds, func(t *testing.T, g gen) {
		w, desired := newWorld(g.state()), g.state()
		want := w.expect(desired)
		for _, c := range Diff(w.state(), desired) {
			if err := w.apply(c); err != nil {
				t.Fatal(err)
			}
		}
		if got := w.state(); !reflect.DeepEqual(got, want) {
			t.Errorf("got  %v\nwant %v", objects(got), objects(want))
		}
	})
}

func TestDiffOfEqualStatesIsEmpty(t *testing.T) {
	t.Parallel()
	forSeeds(t, seeds/4, func(t *testing.T, g gen) {
		s := g.state()
		if cs := Diff(s, s); len(cs) > 0 {
			t.Errorf("got %v", cs)
		}
	})
}

// TestDiffThroughManyStates stops half-way to each state but the last, as a crash does.
func TestDiffThroughManyStates(t *testing.T) {
	t.Parallel()
	forSeeds(t, seeds/4, func(t *testing.T, g gen) {
		w := world{}
		for i := range 4 {
			desired := g.state()
			want, changes := w.expect(desired), Diff(w.state(), desired)
			if i < 3 {
				changes = changes[:g.IntN(len(changes)+1)]
			}
			for _, c := range changes {
				if err := w.apply(c); err != nil {
					t.Fatal(err)
				}
			}
			if got := w.state(); i == 3 && !reflect.DeepEqual(got, want) {
				t.Errorf("got  %v\nwant %v", objects(got), objects(want))
			}
		}
	})
}

func TestDiffAddsBeforeItDeletes(t *testing.T) {
	t.Parallel()
	forSeeds(t, seeds/4, func(t *testing.T, g gen) {
		actual, desired := newWorld(g.state()), newWorld(g.state())
		deletes := false
		for _, c := range Diff(actual.state(), desired.state()) {
			if l, ok := c.Obj.(Link); ok && c.Op == Delete && desired.hasLink(l.Name) {
				continue // has to make room for another of its name
			}
			if next, ok := desired[keyOf(c.Obj)].(Route); ok && c.Op == Delete && hidesGateway(Change{Replace, next, c.Obj}) {
				continue // the kernel would look for the next one's gateway by it
			}
			if deletes && c.Op != Delete {
				t.Errorf("%s comes after a deletion", c)
			}
			deletes = deletes || c.Op == Delete
		}
	})
}

// naiveDiff is the set of changes, without an order.
func naiveDiff(actual, desired world) map[string]bool {
	out := map[string]bool{}
	lost := map[string]bool{}
	for key, a := range actual {
		if l, ok := a.(Link); ok {
			if d, ok := desired[key]; ok && d.(Link).VXLAN != l.VXLAN {
				out[Change{Op: Delete, Obj: l}.String()], lost[l.Name] = true, true
			}
		}
	}
	kept := world{}
	for key, a := range actual {
		on, _ := linkOf(a)
		if l, ok := a.(Link); lost[on] || ok && lost[l.Name] {
			continue
		}
		kept[key] = a
		if _, wanted := desired[key]; !wanted && a.kind() != kindSysctl {
			out[Change{Op: Delete, Obj: a}.String()] = true
		}
	}
	for key, d := range desired {
		a, ok := kept[key]
		if _, is := d.(Route); is && ok && hidesGateway(Change{Replace, d, a}) {
			out[Change{Op: Delete, Obj: a}.String()], ok = true, false
		}
		switch {
		case !ok:
			out[Change{Op: Add, Obj: d}.String()] = true
		case a != d:
			out[Change{Op: Replace, Obj: d}.String()] = true
		}
	}
	return out
}

func TestDiffAgainstNaiveTwin(t *testing.T) {
	t.Parallel()
	forSeeds(t, seeds, func(t *testing.T, g gen) {
		actual, desired := newWorld(g.state()), newWorld(g.state())
		got := map[string]bool{}
		for _, c := range Diff(actual.state(), desired.state()) {
			if got[c.String()] {
				t.Errorf("%s comes twice", c)
			}
			got[c.String()] = true
		}
		if want := naiveDiff(actual, desired); !maps.Equal(got, want) {
			t.Errorf("got  %v\nwant %v", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
		}
	})
}

func TestDiffOfADeviceThatCannotBeChanged(t *testing.T) {
	t.Parallel()
	dev := Link{Name: "overlay.1", MTU: 1450, VXLAN: VXLAN{VNI: 1, Port: 8472, Underlay: foreignLink}}
	actual := State{
		Links:      []Link{dev},
		Addresses:  []Address{{dev.Name, netip.MustParsePrefix("10.244.1.0/32")}},
		Neighbours: []Neighbour{{dev.Name, netip.MustParseAddr("10.244.2.0"), addr.MAC{2, 2}}},
		FDB:        []FDBEntry{{dev.Name, addr.MAC{2, 2}, netip.MustParseAddr("192.0.2.2")}},
		Routes:     []Route{{Table: MainTable, Dst: netip.MustParsePrefix("10.244.2.0/24"), Metric: 1, Link: dev.Name}},
		Rules:      []Rule{{Priority: 1, From: netip.MustParsePrefix("10.244.1.0/24"), Table: OwnTable}},
	}
	for part, change := range map[string]func(*VXLAN){
		"VNI":      func(v *VXLAN) { v.VNI = 2 },
		"Port":     func(v *VXLAN) { v.Port = 4789 },
		"Local":    func(v *VXLAN) { v.Local = netip.MustParseAddr("192.0.2.9") },
		"Underlay": func(v *VXLAN) { v.Underlay = "eth1" },
		"Learning": func(v *VXLAN) { v.Learning = true },
		"GBP":      func(v *VXLAN) { v.GBP = true },
	} {
		t.Run(part, func(t *testing.T) {
			desired := actual
			desired.Links = slices.Clone(actual.Links)
			change(&desired.Links[0].VXLAN)
			var got []string
			for _, c := range Diff(actual, desired) {
				got = append(got, c.Op.String()+" "+c.Kind())
			}
			want := []string{"delete device", "add device", "add address", "add fdb", "add neighbour", "add route"}
			if !slices.Equal(got, want) {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
}

// The kernel can hold several routes of ours under one key, if somebody appended one. What is right is not touched.
func TestDiffOfSeveralUnderOneKey(t *testing.T) {
	t.Parallel()
	var r [3]Route
	for i := range r {
		r[i] = Route{
			Table: MainTable, Dst: netip.MustParsePrefix("10.244.2.0/24"), Metric: 1, Link: foreignLink,
			Via: netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}),
		}
	}
	right := State{Routes: r[:1]}
	for _, test := range []struct {
		name   string
		actual []Route
		want   []Change
	}{
		{"behind", []Route{r[0], r[1]}, []Change{{Op: Delete, Obj: r[1]}}},
		{"before", []Route{r[1], r[0]}, []Change{{Op: Delete, Obj: r[1]}}},
		{"around", []Route{r[1], r[0], r[2]}, []Change{{Op: Delete, Obj: r[1]}, {Op: Delete, Obj: r[2]}}},
		{"none is right", []Route{r[1], r[2]}, []Change{{Op: Replace, Obj: r[0], Old: r[1]}, {Op: Delete, Obj: r[2]}}},
		{"seen twice", []Route{r[0], r[0]}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := Diff(State{Routes: test.actual}, right); !reflect.DeepEqual(got, test.want) {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
}
