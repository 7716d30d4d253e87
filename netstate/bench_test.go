package netstate

import (
	"fmt"
	"runtime"
	"testing"
)

// The sizes that the benchmarks are run at: a cluster such as most are, a large one, and more than anybody has.
func benchmarkSizes() []int { return []int{100, 5000, 20000} }

func bySize(b *testing.B, run func(b *testing.B, peers int)) {
	for _, peers := range benchmarkSizes() {
		b.Run(fmt.Sprintf("peers=%d", peers), func(b *testing.B) {
			b.ReportAllocs()
			run(b, peers)
		})
	}
}

// onNode has a node for each size; want is what it should be, and is made anew each time it is asked for.
func onNode(b *testing.B, run func(b *testing.B, n *node, want func() State)) {
	bySize(b, func(b *testing.B, peers int) {
		n := newNode(b)
		n.watch()
		run(b, n, func() State { return manyPeers(peers) })
	})
}

// BenchmarkReconcileCold looks at the kernel, and makes the device and all entries.
func BenchmarkReconcileCold(b *testing.B) {
	onNode(b, func(b *testing.B, n *node, want func() State) {
		wish := want()
		for b.Loop() {
			n.forget()
			n.handOver(wish)
			b.StopTimer()
			n.sh("ip link del " + dev4)
			n.observe()
			runtime.GC()
			b.StartTimer()
		}
	})
}

// BenchmarkReconcileUnchanged looks at the kernel, and finds nothing to do.
func BenchmarkReconcileUnchanged(b *testing.B) {
	onNode(b, func(b *testing.B, n *node, want func() State) {
		wish := want()
		n.handOver(wish)
		for b.Loop() {
			n.forget()
			n.handOver(wish)
		}
	})
}

func BenchmarkObserve(b *testing.B) {
	onNode(b, func(b *testing.B, n *node, want func() State) {
		n.handOver(want())
		for b.Loop() {
			n.observe()
		}
	})
}

// oneMore is a step there and back: what goes, and what comes.
func oneMore() [2][2]State {
	peer := peersAt(map[int]int{1: 0}).state()
	return [2][2]State{{{}, peer}, {peer, {}}}
}

// BenchmarkAdjust is one peer that comes, and goes again.
func BenchmarkAdjust(b *testing.B) {
	onNode(b, func(b *testing.B, n *node, want func() State) {
		n.handOver(want())
		n.adjust(State{}, State{})
		steps := oneMore()
		n.Do(func() {
			for i := 0; b.Loop(); i++ {
				u := Update{Gone: steps[i%2][0], Come: steps[i%2][1], Prune: true}
				if res, err := n.k.Reconcile(u); err != nil || len(res.Done) != 4 || len(res.Failed) > 0 {
					b.Fatal(res, err)
				}
			}
		})
	})
}

// BenchmarkPatch is what of that is not the kernel's.
func BenchmarkPatch(b *testing.B) {
	bySize(b, func(b *testing.B, peers int) {
		s, steps := manyPeers(peers), oneMore()
		for i := 0; b.Loop(); i++ {
			if was, is := s.patch(steps[i%2][0], steps[i%2][1]); len(objects(was))+len(objects(is)) != 4 {
				b.Fatal(was, is)
			}
		}
	})
}

func BenchmarkDiffUnchanged(b *testing.B) {
	bySize(b, func(b *testing.B, peers int) {
		actual, desired := manyPeers(peers), manyPeers(peers)
		for b.Loop() {
			if cs := Diff(actual, desired); len(cs) > 0 {
				b.Fatal(cs[0])
			}
		}
	})
}

func BenchmarkDiffAll(b *testing.B) {
	bySize(b, func(b *testing.B, peers int) {
		desired := manyPeers(peers)
		for b.Loop() {
			if cs := Diff(State{}, desired); len(cs) != 1+4*peers {
				b.Fatal(len(cs))
			}
		}
	})
}

// BenchmarkDecode reads the messages of one kind that were recorded.
func BenchmarkDecode(b *testing.B) {
	read := map[string]func(body []byte){
		"route": func(body []byte) { parseRoute(body) }, "neighbour": func(body []byte) { parseNeighbour(body) },
		"fdb": func(body []byte) { parseFDB(body) }, "rule": func(body []byte) { parseRule(body) },
	}
	for _, kind := range []string{"route", "neighbour", "fdb", "rule"} {
		b.Run("kind="+kind, func(b *testing.B) {
			b.ReportAllocs()
			var bodies [][]byte
			for _, m := range readMessages(b) {
				if m.kind == kind {
					bodies = append(bodies, m.body)
				}
			}
			for i := 0; b.Loop(); i++ {
				read[kind](bodies[i%len(bodies)])
			}
		})
	}
}

// BenchmarkEncode writes the messages that add all of a state.
func BenchmarkEncode(b *testing.B) {
	bySize(b, func(b *testing.B, peers int) {
		k := &Kernel{index: map[string]int{dev4: 7}}
		changes := Diff(State{}, manyPeers(peers))[1:]
		var out messages
		for b.Loop() {
			out.reset()
			for _, c := range changes {
				if err := k.put(&out, c); err != nil {
					b.Fatal(err)
				}
			}
		}
		b.SetBytes(int64(len(out.buf)))
	})
}

// BenchmarkHear judges one message about an FDB entry that is as it should be, by far the most frequent ones.
func BenchmarkHear(b *testing.B) {
	bySize(b, func(b *testing.B, peers int) {
		want := manyPeers(peers)
		e := expecting(&want, map[uint32]string{7: dev4})
		k := &Kernel{index: map[string]int{dev4: 7}}
		var all [][]byte
		for _, f := range want.FDB {
			var out messages
			if err := k.put(&out, Change{Op: Add, Obj: f}); err != nil {
				b.Fatal(err)
			}
			all = append(all, out.buf)
		}
		for i := 0; b.Loop(); i++ {
			if e.contradicted(all[i%len(all)]) {
				b.Fatal("taken for somebody else's doing")
			}
		}
	})
}

// heap is what is in use after a collection, and what was asked for so far.
func heap() (live, total int) {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc), int(m.TotalAlloc)
}

// TestMemory bounds what a large network costs beside the desired state itself, which is 1.4 MB. It runs alone: what
// others ask for would count too.
func TestMemory(t *testing.T) {
	const peers, mb = 5000, 1_000_000
	n := newNode(t)
	want := manyPeers(peers)
	live, _ := heap()
	for _, step := range []struct {
		what       string
		do         func()
		kept, used int // at most
	}{
		{"programming all", func() { n.handOver(want); want = State{} }, mb / 2, 6 * mb},
		{"looking and finding nothing", func() {
			n.observe()
			n.adjust(State{}, State{})
		}, mb / 2, 2 * mb},
		{"the first adjustment", func() { n.adjust(State{}, peersAt(map[int]int{1: 0}).state()) }, mb, 2 * mb},
		{"another one", func() { n.adjust(peersAt(map[int]int{1: 0}).state(), State{}) }, mb, mb / 10},
	} {
		_, before := heap()
		step.do()
		kept, used := heap()
		kept, used = kept-live, used-before
		t.Logf("%s: keeps %d bytes, takes %d", step.what, kept, used)
		if kept > step.kept || used > step.used {
			t.Errorf("%s: may keep %d bytes, and take %d", step.what, step.kept, step.used)
		}
	}
}
