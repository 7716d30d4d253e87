package subnet

import (
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/overlayd/overlayd/addr"
)

// benchEntries are n leases as overlayd writes them.
func benchEntries(n int) []*Entry {
	es := make([]*Entry, n)
	for i := range es {
		es[i] = leaseAt(benchKey(i), benchAttrs(i), int64(i+2), int64(i+1))
	}
	return es
}

// as many digits everywhere: keys in order
func benchKey(i int) string { return fmt.Sprintf("10.%03d.%03d.0-24", 100+i/156, 100+i%156) }

func benchAttrs(i int) Attrs {
	return Attrs{
		PublicIP:      addr.Per[netip.Addr]{V4: netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)})},
		PublicIPLocal: true, Backend: VXLAN,
		VTEP:     addr.Per[VTEP]{V4: VTEP{VNI: 1, MAC: addr.MAC{2, 0, 0, 0, byte(i >> 8), byte(i)}}},
		Identity: nodeIdentity(i),
	}
}

func benchDual(i int) Attrs {
	a := benchAttrs(i)
	a.PublicIP.V6, a.VTEP.V6 = netip.MustParseAddr("2001:db8::a"), a.VTEP.V4
	return a
}

func benchTable(b *testing.B, n int) Table {
	return Table{
		Revision: int64(n + 2), ConfigRevision: 1, Config: mustConfig(b, `{"Network":"10.0.0.0/8"}`),
		Entries: benchEntries(n),
	}
}

func BenchmarkParseKey(b *testing.B) {
	for name, key := range map[string]string{
		"stack=ipv4": "10.244.105.0-24",
		"stack=dual": "10.244.105.0-24&fd00:10:244:69::-64",
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := ParseKey(key); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func benchValues() map[string][]byte {
	return map[string][]byte{
		"by=overlayd":      FormatValue(benchAttrs(300)),
		"by=overlayd-dual": FormatValue(benchDual(300)),
		"by=flannel":       []byte(`{"PublicIP":"192.168.1.10","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"5e:fd:0c:11:22:33"}}`),
	}
}

func BenchmarkParseValue(b *testing.B) {
	for name, value := range benchValues() {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := ParseValue(value); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkParseEntry(b *testing.B) {
	value := FormatValue(benchAttrs(300))
	b.ReportAllocs()
	for b.Loop() {
		if e := ParseEntry("10.244.105.0-24", value, 3, 2, 1); e.Err != nil {
			b.Fatal(e.Err)
		}
	}
}

func BenchmarkFormatValue(b *testing.B) {
	a := benchAttrs(300)
	b.ReportAllocs()
	for b.Loop() {
		FormatValue(a)
	}
}

// BenchmarkDecide is what a node does when something in the table has changed: it holds its lease already, or it wants
// its first.
func BenchmarkDecide(b *testing.B) {
	t := benchTable(b, 5000)
	for name, tt := range map[string]struct {
		claim Claim
		write bool
	}{
		"held":       {Claim{Attrs: benchAttrs(2500), Remembered: t.Entries[2500].Subnets, Keep: true}, false},
		"joins":      {Claim{Attrs: benchAttrs(6000)}, true},
		"comes back": {Claim{Attrs: benchAttrs(6000), Remembered: per("10.99.5.0/24")}, true},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if d, err := Decide(t, tt.claim, 0); err != nil || d.Write != tt.write {
					b.Fatal(d, err)
				}
			}
		})
	}
}

// BenchmarkRoster is one more lease, or one less.
func BenchmarkRoster(b *testing.B) {
	for _, n := range []int{500, 5000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			table, self := benchTable(b, n+1), Lease{Attrs: benchAttrs(n + 2)}
			less := table
			less.Entries = slices.Delete(slices.Clone(table.Entries), n/2, n/2+1)
			var r Roster
			now := time.Now()
			r.Update(less, table.Config, self, now, 0)
			b.ReportAllocs()
			for i := 1; b.Loop(); i++ {
				t := less
				if i%2 == 1 {
					t = table
				}
				if ch := r.Update(t, t.Config, self, now, 0); len(ch.Gone)+len(ch.Come) != 1 {
					b.Fatal(ch)
				}
			}
		})
	}
}

// BenchmarkHeap is what one peer more takes up in the table and in the roster, from 1,000 peers to 20,000.
func BenchmarkHeap(b *testing.B) {
	heap := func() float64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc)
	}
	held := func(n int) (table, roster float64) {
		empty := heap()
		t := benchTable(b, n)
		listed := heap()
		var r Roster
		r.Update(t, t.Config, Lease{Attrs: benchAttrs(n)}, time.Now(), 0)
		accepted := heap()
		runtime.KeepAlive(t)
		runtime.KeepAlive(&r)
		return listed - empty, accepted - listed
	}
	for b.Loop() {
		fewTable, fewRoster := held(1000)
		table, roster := held(20_000)
		b.ReportMetric((table-fewTable)/19_000, "B/entry")
		b.ReportMetric((roster-fewRoster)/19_000, "B/peer")
	}
}
