package sorted

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"testing"
)

type element struct{ key, value int }

func (e element) Compare(o element) int { return cmp.Compare(e.key, o.key) }

// A list that is patched again and again is the one that a map with the same keys gives.
func TestPatch(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	some := func() (out []element) {
		for key := range 20 {
			if random.IntN(3) == 0 {
				out = append(out, element{key, random.IntN(2)})
			}
		}
		return out
	}
	var list []element
	want := map[int]element{}
	for range 2000 {
		gone, come, before := some(), some(), slices.Clone(list)
		for _, g := range gone {
			if want[g.key] == g {
				delete(want, g.key)
			}
		}
		for _, c := range come {
			want[c.key] = c
		}
		var was, is []element
		list, was, is = Patch(list, gone, come)
		for key := range 20 {
			at := element{key: key}
			e, ok := Find(list, at)
			if w, there := want[key]; ok != there || e != w {
				t.Fatalf("%v -%v +%v: %v", before, gone, come, list)
			}
			old, had := Find(before, at)
			_, ends := Find(was, at)
			_, begins := Find(is, at)
			if differs := had != ok || old != e; ends != (had && differs) || begins != (ok && differs) {
				t.Fatalf("%v -%v +%v: %v is no more, %v is new", before, gone, come, was, is)
			}
		}
		if len(list) != len(want) || !slices.IsSortedFunc(list, element.Compare) {
			t.Fatalf("%v", list)
		}
	}
}
