package subnet

import (
	"math/big"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/overlayd/overlayd/addr"
)

func number(a netip.Addr) *big.Int { return new(big.Int).SetBytes(a.AsSlice()) }

// bigPool is the naive twin of Pool's arithmetic, on numbers of any size.
type bigPool struct{ Pool }

func (p bigPool) index(a netip.Addr) *big.Int {
	d := new(big.Int).Sub(number(a), number(p.Min))
	return d.Rsh(d, uint(p.Min.BitLen()-p.SubnetLen))
}

func (p bigPool) size() *big.Int { return new(big.Int).Add(p.index(p.Max), big.NewInt(1)) }

func (p bigPool) subnet(i uint64) netip.Prefix {
	n := new(big.Int).SetUint64(i)
	n.Lsh(n, uint(p.Min.BitLen()-p.SubnetLen))
	a, _ := netip.AddrFromSlice(n.Add(n, number(p.Min)).FillBytes(make([]byte, p.Min.BitLen()/8)))
	return netip.PrefixFrom(a, p.SubnetLen)
}

// span clips x to the pool and tells the indices of both ends.
func (p bigPool) span(x netip.Prefix) (first, last *big.Int, ok bool) {
	if x.Addr().BitLen() != p.Min.BitLen() {
		return nil, nil, false
	}
	end := addr.Last(netip.PrefixFrom(p.Max, p.SubnetLen))
	lo, hi := x.Masked().Addr(), addr.Last(x)
	if number(hi).Cmp(number(p.Min)) < 0 || number(lo).Cmp(number(end)) > 0 {
		return nil, nil, false
	}
	if number(lo).Cmp(number(p.Min)) < 0 {
		lo = p.Min
	}
	if number(hi).Cmp(number(end)) > 0 {
		hi = end
	}
	return p.index(lo), p.index(hi), true
}

// randomPool has subnet lengths on both sides of the 64-bit boundary and sizes up to 2^124.
func randomPool(r *rand.Rand) Pool {
	network, most := netip.MustParsePrefix("0.0.0.0/0"), 30
	if r.IntN(3) > 0 {
		network, most = netip.MustParsePrefix("::/0"), 126
	}
	bits := r.IntN(most - 1)
	length := bits + 2 + r.IntN(most-bits-1)
	if most == 126 && r.IntN(2) == 0 && bits <= 60 {
		length = 63 + r.IntN(4)
	}
	p := Pool{Network: netip.PrefixFrom(randomAddr(r, network), bits).Masked(), SubnetLen: length}
	p.Min, p.Max = p.floor(randomAddr(r, p.Network)), p.floor(randomAddr(r, p.Network))
	if p.Max.Less(p.Min) {
		p.Min, p.Max = p.Max, p.Min
	}
	return p
}

func TestPoolAgainstBigNumbers(t *testing.T) {
	r := newRand(t, 3)
	limit := new(big.Int).SetUint64(maxSubnets)
	capped := 0
	for range 20_000 {
		p := randomPool(r)
		twin := bigPool{p}
		size := twin.size()
		if size.Cmp(limit) > 0 {
			size.Set(limit)
			capped++
		}
		if got := new(big.Int).SetUint64(p.Size()); got.Cmp(size) != 0 {
			t.Fatalf("%+v: Size() = %v, want %v", p, got, size)
		}
		for _, i := range []uint64{0, p.Size() - 1, r.Uint64N(p.Size())} {
			sn := p.Subnet(i)
			if want := twin.subnet(i); sn != want {
				t.Fatalf("%+v: Subnet(%d) = %v, want %v", p, i, sn, want)
			}
			inside := randomAddr(r, sn)
			if got := p.index(inside); got != i || p.floor(inside) != sn.Addr() || !p.fits(sn) {
				t.Fatalf("%+v: index(%v) = %d, want %d", p, inside, got, i)
			}
		}
		checkSpan(t, p, randomPrefix(r, p.Network, 0, p.Min.BitLen()))
		checkSpan(t, p, netip.PrefixFrom(randomAddr(r, p.Network), p.SubnetLen))
		checkSpan(t, p, netip.PrefixFrom(p.Max, p.SubnetLen))
	}
	if capped < 100 {
		t.Errorf("only %d pools were too large for the index", capped)
	}
}

func checkSpan(t *testing.T, p Pool, x netip.Prefix) {
	t.Helper()
	got, ok := p.span(x)
	first, last, want := bigPool{p}.span(x)
	most := new(big.Int).SetUint64(maxSubnets - 1)
	if want && first.Cmp(most) > 0 {
		want = false
	}
	if ok != want {
		t.Fatalf("%+v: span(%v) = %v, %t, want %t", p, x, got, ok, want)
	}
	if !want {
		return
	}
	if last.Cmp(most) > 0 {
		last = most
	}
	if got != (span{first.Uint64(), last.Uint64()}) {
		t.Fatalf("%+v: span(%v) = %v, want {%v %v}", p, x, got, first, last)
	}
}

func TestPoolSpan(t *testing.T) {
	p := pool("10.244.0.0/16", 24, "10.244.4.0", "10.244.7.0")
	for _, tt := range []struct {
		x    string
		want span
		ok   bool
	}{
		{"10.244.4.0/24", span{0, 0}, true},
		{"10.244.7.255/32", span{3, 3}, true},
		{"10.244.6.0/23", span{2, 3}, true},
		{"10.244.0.0/16", span{0, 3}, true},
		{"0.0.0.0/0", span{0, 3}, true},
		{"10.244.3.255/32", span{}, false},
		{"10.244.8.0/24", span{}, false},
		{"10.245.0.0/16", span{}, false},
		{"::/0", span{}, false},
		{"::ffff:10.244.4.0/120", span{}, false},
	} {
		if got, ok := p.span(netip.MustParsePrefix(tt.x)); got != tt.want || ok != tt.ok {
			t.Errorf("span(%s) = %v, %t, want %v, %t", tt.x, got, ok, tt.want, tt.ok)
		}
	}
	if _, ok := p.span(netip.Prefix{}); ok {
		t.Error("the zero prefix takes something up")
	}
	if _, ok := (Pool{}).span(netip.MustParsePrefix("10.244.4.0/24")); ok {
		t.Error("the zero pool has something to take up")
	}
}

func TestPoolFits(t *testing.T) {
	p := pool("10.244.0.0/16", 24, "10.244.4.0", "10.244.7.0")
	for x, want := range map[string]bool{
		"10.244.5.0/24": true, "10.244.200.0/24": true, "10.244.0.0/24": true, // Min and Max bound only what is chosen
		"10.244.5.1/24": false, "10.244.5.0/25": false, "10.244.4.0/23": false, "10.245.5.0/24": false, "fd00::/24": false,
	} {
		if got := p.fits(netip.MustParsePrefix(x)); got != want {
			t.Errorf("fits(%s) = %t, want %t", x, got, want)
		}
	}
}
