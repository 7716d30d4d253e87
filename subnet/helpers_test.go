package subnet

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/addr"
)

// newRand gives a generator with a fixed seed, which a failing test prints.
func newRand(t testing.TB, seed uint64) *rand.Rand {
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the random seed was %d", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, seed))
}

func mustConfig(t testing.TB, json string) Config {
	t.Helper()
	c, err := ParseConfig([]byte(json))
	if err != nil {
		t.Fatalf("ParseConfig(%s): %v", json, err)
	}
	return c
}

// per makes a pair out of prefixes such as "10.244.5.0/24".
func per(prefixes ...string) addr.Per[netip.Prefix] {
	var out addr.Per[netip.Prefix]
	for _, s := range prefixes {
		p := netip.MustParsePrefix(s)
		out.Set(addr.FamilyOf(p.Addr()), p)
	}
	return out
}

func ips(addrs ...string) addr.Per[netip.Addr] {
	var out addr.Per[netip.Addr]
	for _, s := range addrs {
		a := netip.MustParseAddr(s)
		out.Set(addr.FamilyOf(a), a)
	}
	return out
}

func mac(t testing.TB, s string) addr.MAC {
	t.Helper()
	m, err := addr.ParseMAC(s)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// leaseAt is an entry as it would be read back from the store, with revision = created.
func leaseAt(key string, a Attrs, created, leaseID int64) *Entry {
	return ParseEntry(key, FormatValue(a), created, created, leaseID)
}

// randomPrefix is a prefix of that family, inside p most of the time, of a random length from lo to hi.
func randomPrefix(r *rand.Rand, p netip.Prefix, lo, hi int) netip.Prefix {
	a := randomAddr(r, p)
	if r.IntN(10) == 0 {
		a = randomAddr(r, netip.PrefixFrom(p.Addr(), max(p.Bits()-3, 0)).Masked())
	}
	return netip.PrefixFrom(a, lo+r.IntN(hi-lo+1)).Masked()
}

// randomAddr is an address inside p; now and then its first or last one, or one close to them.
func randomAddr(r *rand.Rand, p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	fill := func(int) byte { return byte(r.UintN(256)) }
	switch r.IntN(6) {
	case 0:
		fill = func(int) byte { return 0 }
	case 1:
		fill = func(int) byte { return 0xff }
	case 2:
		fill = func(i int) byte { return byte(r.UintN(2)) * byte(i/(len(b)-1)) }
	}
	for i := p.Bits(); i < len(b)*8; {
		x, bit := fill(i/8), i%8
		b[i/8] |= x & (0xff >> bit)
		i += 8 - bit
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// freeSubnets is the naive twin of the search: every subnet of a small pool that overlaps no entry.
func freeSubnets(p Pool, taken []*Entry) []netip.Prefix {
	var out []netip.Prefix
	for i := range p.Size() {
		sn, isFree := p.Subnet(i), true
		for _, e := range taken {
			if x := e.Subnets.Get(addr.FamilyOf(sn.Addr())); x.IsValid() && x.Overlaps(sn) {
				isFree = false
				break
			}
		}
		if isFree {
			out = append(out, sn)
		}
	}
	return out
}

func keys(es []*Entry) string {
	out := make([]string, 0, len(es))
	for _, e := range es {
		out = append(out, e.Key)
	}
	return strings.Join(out, " ")
}

func nodeIdentity(i int) Identity {
	return Identity{NodeName: fmt.Sprintf("node-%d", i), NodeID: fmt.Sprintf("%032x", i)}
}

// contradicts reports whether two leases can't both be acted on: they have a part of a subnet, an address or a MAC in
// common.
func (l *Lease) contradicts(o *Lease) bool {
	for _, f := range addr.Families() {
		for _, g := range addr.Families() {
			a, b := l.Subnets.Get(f), o.Subnets.Get(g)
			switch mac := l.VTEP.Get(f).MAC; {
			case !a.IsValid() || !b.IsValid():
			case a.Overlaps(b), l.PublicIP.Get(f) == o.PublicIP.Get(g), !mac.IsZero() && mac == o.VTEP.Get(g).MAC:
				return true
			}
		}
	}
	return false
}
