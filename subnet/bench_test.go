package subnet

import (
	"fmt"
	"net/netip"
	"testing"

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

func benchKey(i int) string { return fmt.Sprintf("10.%03d.%03d.0-24", 100+i/156, 100+i%156) } // as many digits everywhere: keys in order

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
	return Table{Revision: int64(n + 2), ConfigRevision: 1, Config: mustConfig(b, `{"Network":"10.0.0.0/8"}`), Entries: benchEntries(n)}
}

func BenchmarkParseKey(b *testing.B) {
	for name, key := range map[string]string{"stack=ipv4": "10.244.105.0-24", "stack=dual": "10.244.105.0-24&fd00:10:244:69::-64"} {
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

// BenchmarkDecide is what a node does when something in the table has changed: it holds its lease already, or it wants its first.
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
