package masquerade

import (
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/masquerade/ipset"
	"github.com/overlayd/overlayd/test/nstest"
)

// benchmarkNodes is how many peers are reached without the tunnel, where there are any.
const benchmarkNodes = 5000

// benchmarkHost is a node in a namespace of its own.
type benchmarkHost struct {
	ns      *nstest.NS
	options Options
	want    []Ruleset

	children time.Duration // what the programs have used that were started
}

// eachDriver runs a benchmark for all drivers, with the tunnel alone and with thousands of peers that are reached
// without it. What the programs cost that are started is reported beside what the driver itself takes.
func eachDriver(b *testing.B, run func(b *testing.B, h *benchmarkHost)) {
	for _, o := range []Options{{Kind: KindIPTables}, {Kind: KindIPTables, Variant: VariantLegacy}, {Kind: KindNFTables}} {
		for _, nodes := range []int{0, benchmarkNodes} {
			b.Run(fmt.Sprintf("firewall=%s%s/direct=%d", o.Kind, o.Variant, nodes), func(b *testing.B) {
				h := newBenchmarkHost(b, o, nodes)
				b.ReportAllocs()
				run(b, h)
				h.report(b)
			})
		}
	}
}

func newBenchmarkHost(b *testing.B, o Options, nodes int) *benchmarkHost {
	ns := nstest.New(b)
	in := fullDesired(addr.IPv4)
	if in.DirectNodes = nodes > 0; in.DirectNodes {
		for a := netip.MustParseAddr("172.16.0.1"); len(in.Nodes) < nodes; a = a.Next() {
			in.Nodes = append(in.Nodes, a)
		}
	}
	h := &benchmarkHost{ns: ns, options: o, want: []Ruleset{Rules(in)}}
	h.connect(b)
	return h
}

// connect gives the host connections to the kernel that nothing was learned by.
func (h *benchmarkHost) connect(b *testing.B) {
	b.Helper()
	h.options.Sets = ipset.New()
}

// do is what is measured.
func (h *benchmarkHost) do(fn func()) {
	before := childCPU()
	h.ns.Do(fn)
	h.children += childCPU() - before
}

func (h *benchmarkHost) report(b *testing.B) {
	b.ReportMetric(float64(h.children.Nanoseconds())/float64(b.N), "child-ns/op")
}

// childCPU is what the programs have used that were started and have ended.
func childCPU() time.Duration {
	var r syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_CHILDREN, &r)
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

func (h *benchmarkHost) ensure(b *testing.B, d Driver) []Drift {
	b.Helper()
	res, err := d.Ensure(b.Context(), per(h.want))
	if err != nil || res.NoSets != nil {
		b.Fatal(err, res.NoSets)
	}
	return res.Drifts
}

// clean takes all away, as it is on a new host.
func (h *benchmarkHost) clean(b *testing.B) {
	b.Helper()
	h.ns.Exec("nft", "flush", "ruleset")
	if h.options.Variant == VariantLegacy {
		h.ns.Do(func() {
			if err := Remove(b.Context(), nil); err != nil {
				b.Fatal(err)
			}
		})
	}
	h.ns.Do(func() {
		if err := h.options.Sets.Remove(nodeSet(addr.IPv4)); err != nil {
			b.Fatal(err)
		}
	})
}

// BenchmarkEnsureCold makes and chooses the driver, and puts the rules where nothing is.
func BenchmarkEnsureCold(b *testing.B) {
	eachDriver(b, func(b *testing.B, h *benchmarkHost) {
		for b.Loop() {
			b.StopTimer()
			h.clean(b)
			b.StartTimer()
			h.do(func() {
				d, _ := New(b.Context(), h.options)
				if drifts := h.ensure(b, d); len(drifts) == 0 {
					b.Fatal("nothing to do")
				}
			})
		}
	})
}

// BenchmarkEnsureWarm makes and chooses the driver, where an earlier daemon has put the rules in place.
func BenchmarkEnsureWarm(b *testing.B) {
	eachDriver(b, func(b *testing.B, h *benchmarkHost) {
		h.ns.Do(func() {
			d, _ := New(b.Context(), h.options)
			h.ensure(b, d)
		})
		for b.Loop() {
			b.StopTimer()
			h.connect(b)
			b.StartTimer()
			h.do(func() {
				d, _ := New(b.Context(), h.options)
				h.ensure(b, d)
			})
		}
	})
}

// BenchmarkEnsureUnchanged is what a daemon does after a notification.
func BenchmarkEnsureUnchanged(b *testing.B) {
	eachDriver(b, func(b *testing.B, h *benchmarkHost) {
		var d Driver
		h.ns.Do(func() {
			d, _ = New(b.Context(), h.options)
			h.ensure(b, d) // puts the rules in place
			h.ensure(b, d) // sees them there
		})
		h.do(func() {
			for b.Loop() {
				if drifts := h.ensure(b, d); len(drifts) > 0 {
					b.Fatal(drifts)
				}
			}
		})
	})
}

// BenchmarkGather gathers the facts of a host with some rules of other programs, and of one on which kube-proxy has
// many.
func BenchmarkGather(b *testing.B) {
	for _, services := range []int{0, 5000} {
		b.Run("services="+fmt.Sprint(services), func(b *testing.B) {
			h := newBenchmarkHost(b, Options{Kind: KindAuto}, 0)
			h.ns.Exec("iptables-nft", "-t", "filter", "-A", "FORWARD", "-s", "172.17.0.0/16", "-j", "ACCEPT")
			if services > 0 {
				line := "-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment \"default/kubernetes:https cluster IP\" -m tcp --dport 443 -j KUBE-MARK-MASQ\n"
				rules := "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n" + strings.Repeat(line, services) + "COMMIT\n"
				if out, err := h.ns.Feed(rules, "iptables-nft-restore", "--noflush"); err != nil {
					b.Fatal(out, err)
				}
			}
			b.ReportAllocs()
			h.do(func() {
				for b.Loop() {
					if _, d := New(b.Context(), h.options); d.Kind != KindIPTables || d.Variant != VariantNFT {
						b.Fatal(d)
					}
				}
			})
			h.report(b)
		})
	}
}

// BenchmarkEnsureJoin is what a peer costs that comes or goes, with the notification of the daemon's own change.
func BenchmarkEnsureJoin(b *testing.B) {
	eachDriver(b, func(b *testing.B, h *benchmarkHost) {
		in := fullDesired(addr.IPv4)
		in.DirectNodes = true
		for a := netip.MustParseAddr("172.16.0.1"); len(in.Nodes) < benchmarkNodes; a = a.Next() {
			in.Nodes = append(in.Nodes, a)
		}
		steps := [][]Ruleset{{Rules(in)}, nil}
		in.Nodes = in.Nodes[1:]
		steps[1] = []Ruleset{Rules(in)}
		var d Driver
		h.ns.Do(func() {
			d, _ = New(b.Context(), h.options)
			h.ensure(b, d)
		})
		h.do(func() {
			for i := 0; b.Loop(); i++ {
				h.want = steps[i%2]
				h.ensure(b, d)
				if drifts := h.ensure(b, d); len(drifts) > 0 && i > 1 {
					b.Fatal(drifts)
				}
			}
		})
	})
}
