package netstate

import (
	"fmt"
	"testing"
)

// benchmarkPeers is the size that the benchmarks are run at.
const benchmarkPeers = 5000

func benchmark(b *testing.B, run func(b *testing.B, n *node, want State)) {
	b.Run(fmt.Sprint(benchmarkPeers), func(b *testing.B) {
		n := newNode(b)
		b.ReportAllocs()
		run(b, n, manyPeers(benchmarkPeers))
	})
}

// BenchmarkReconcileCold looks at the kernel, and makes the device and all entries.
func BenchmarkReconcileCold(b *testing.B) {
	benchmark(b, func(b *testing.B, n *node, want State) {
		for b.Loop() {
			n.k.Forget()
			n.converge(want)
			b.StopTimer()
			n.sh("ip link del " + dev4)
			b.StartTimer()
		}
	})
}

// BenchmarkReconcileUnchanged looks at the kernel, and finds nothing to do.
func BenchmarkReconcileUnchanged(b *testing.B) {
	benchmark(b, func(b *testing.B, n *node, want State) {
		n.converge(want)
		for b.Loop() {
			n.k.Forget()
			n.converge(want)
		}
	})
}

func BenchmarkObserve(b *testing.B) {
	benchmark(b, func(b *testing.B, n *node, want State) {
		n.converge(want)
		for b.Loop() {
			n.observe()
		}
	})
}

func BenchmarkDiffUnchanged(b *testing.B) {
	b.Run(fmt.Sprint(benchmarkPeers), func(b *testing.B) {
		actual, desired := manyPeers(benchmarkPeers), manyPeers(benchmarkPeers)
		b.ReportAllocs()
		for b.Loop() {
			if cs := Diff(actual, desired); len(cs) > 0 {
				b.Fatal(cs[0])
			}
		}
	})
}
