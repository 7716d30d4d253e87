package netstate

import (
	"maps"
	"slices"
	"testing"
)

// some is a random part of a state.
func (g gen) some(s State) State {
	return stateOf(slices.DeleteFunc(objects(s), func(Object) bool { return g.IntN(3) > 0 }))
}

// swap does to a world what patch does to a state.
func (w world) swap(gone, come State) {
	for _, o := range objects(gone) {
		if w[keyOf(o)] == o {
			delete(w, keyOf(o))
		}
	}
	maps.Copy(w, newWorld(come))
}

// minus is what a world has and another has not, or not so.
func (w world) minus(o world) State {
	out := maps.Clone(w)
	maps.DeleteFunc(out, func(k string, x Object) bool { return o[k] == x })
	return out.state()
}

// TestPatchesAddUp: a state that was patched again and again is the one that is made from scratch, and each time the
// two parts that patch returns are just what changed.
func TestPatchesAddUp(t *testing.T) {
	t.Parallel()
	forSeeds(t, seeds, func(t *testing.T, g gen) {
		var s State
		w := world{}
		for range 20 {
			gone, come := g.some(s), g.some(g.state())
			if g.IntN(3) == 0 { // also what is not there, or not so
				foreign := newWorld(gone)
				foreign.swap(State{}, g.some(g.state()))
				gone = foreign.state()
			}
			copied, before := s.clone(), maps.Clone(w)
			w.swap(gone, come)
			was, is := s.patch(gone, come)
			for _, c := range []struct {
				what      string
				got, want State
			}{
				{"the state", s, w.state()},
				{"what is no more", was, before.minus(w)},
				{"what is new", is, w.minus(before)},
				{"a copy of what was", copied, before.state()},
			} {
				if !slices.Equal(objects(c.got), objects(c.want)) {
					t.Errorf("%s, patched by -%v +%v:\ngot  %v\nwant %v", c.what, objects(gone), objects(come), objects(c.got),
						objects(c.want))
				}
			}
		}
	})
}
