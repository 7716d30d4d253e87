package subnet

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/overlayd/overlayd/addr"
)

const (
	small4 = `{"Network":"10.1.0.0/24","SubnetLen":28,"SubnetMin":"10.1.0.16","SubnetMax":"10.1.0.224"}`
	small6 = `{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd01::/60"}`
	dual   = `{"Network":"10.1.0.0/24","SubnetLen":28,"EnableIPv6":true,"IPv6Network":"fd01::/60"}`
	// The IPv6 pool is half as large as the IPv4 one, and the other way round.
	unequal6 = `{"Network":"10.1.0.0/24","SubnetLen":28,"EnableIPv6":true,"IPv6Network":"fd01::/61"}`
	unequal4 = `{"Network":"10.1.0.0/25","SubnetLen":28,"EnableIPv6":true,"IPv6Network":"fd01::/60"}`
)

// Many nodes on an empty network: every subnet from SubnetMin to SubnetMax is as likely as any other.
func TestPickIsUniform(t *testing.T) {
	r := newRand(t, 4)
	for _, config := range []string{
		`{"Network":"10.244.0.0/16"}`,
		`{"Network":"10.244.0.0/16","SubnetMin":"10.244.10.0","SubnetMax":"10.244.109.0"}`,
		`{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/56"}`,
		`{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48"}`,
		dual,
	} {
		c := mustConfig(t, config)
		for _, name := range []func(i int) Identity{
			func(int) Identity { return Identity{fmt.Sprintf("node-%d", r.Uint64()), fmt.Sprintf("%x", r.Uint64())} },
			nodeIdentity, // as regular as they come
			func(i int) Identity { return Identity{NodeName: fmt.Sprintf("n%d", i)} },
		} {
			p := c.Pools.Get(c.Families()[0])
			n := int(p.Size())
			count := make([]float64, n)
			const each = 50
			for i := range n * each {
				ch, err := pick(c, nil, addr.Per[netip.Prefix]{}, name(i), 0)
				if err != nil {
					t.Fatal(err)
				}
				count[p.index(ch.Get(c.Families()[0]).Addr())]++
			}
			chi2 := 0.0
			for _, k := range count {
				chi2 += (k - each) * (k - each) / each
			}
			// Mean n-1, standard deviation √(2(n-1)): five of them apart from the mean is not chance.
			mean := float64(n - 1)
			if dev := (chi2 - mean) / math.Sqrt(2*mean); math.Abs(dev) > 5 {
				t.Errorf("%s: χ² = %.1f over %d subnets, %.1f deviations from its mean", config, chi2, n, dev)
			}
			if slices.Min(count) == 0 {
				t.Errorf("%s: a subnet is never chosen", config)
			}
		}
	}
}

func TestPickIsStable(t *testing.T) {
	c := mustConfig(t, `{"Network":"10.0.0.0/8","EnableIPv6":true,"IPv6Network":"fd00::/16"}`)
	seen := map[addr.Per[netip.Prefix]]bool{}
	for attempt := range 5 {
		first, _ := pick(c, nil, addr.Per[netip.Prefix]{}, nodeIdentity(1), attempt)
		again, _ := pick(c, nil, addr.Per[netip.Prefix]{}, nodeIdentity(1), attempt)
		if first != again || seen[first] {
			t.Errorf("attempt %d: %v, then %v; seen in another attempt: %t", attempt, first, again, seen[first])
		}
		seen[first] = true
	}
	for _, id := range []Identity{{"node-1", "x"}, {"x", nodeIdentity(1).NodeID}, {"nod", "e-1"}, {"node-", "1"}} {
		ch, _ := pick(c, nil, addr.Per[netip.Prefix]{}, id, 0)
		if seen[ch] {
			t.Errorf("%v starts where another one starts: %v", id, ch)
		}
		seen[ch] = true
	}
}

// randomEntries are leases and reservations of random prefix lengths, overlapping or not, in and around the pools.
func randomEntries(r *rand.Rand, c Config, most int) []*Entry {
	var es []*Entry
	for range r.IntN(most + 1) {
		var s addr.Per[netip.Prefix]
		for _, f := range addr.Families() {
			if p := c.Pools.Get(f); p.On() && r.IntN(3) > 0 {
				lo, hi := p.SubnetLen, p.SubnetLen
				if r.IntN(3) == 0 {
					lo, hi = max(p.Network.Bits(), p.SubnetLen-2), f.Bits()
				}
				if r.IntN(100) == 0 {
					lo = 0
				}
				s.Set(f, randomPrefix(r, p.Network, lo, hi))
			}
		}
		if s != (addr.Per[netip.Prefix]{}) {
			es = append(es, leaseAt(FormatKey(s), Attrs{Identity: Identity{NodeName: "other"}}, int64(len(es)+1),
				int64(r.IntN(2))))
		}
	}
	return es
}

// The search against a naive twin that enumerates the whole pool.
func TestPickAgainstEnumeration(t *testing.T) {
	for seed, config := range []string{small4, small6, dual, unequal6, unequal4} {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			c := mustConfig(t, config)
			r := newRand(t, uint64(100+seed))
			full := 0
			for i := range 1000 {
				taken := randomEntries(r, c, 30)
				before := addr.Per[netip.Prefix]{}
				for _, f := range addr.Families() {
					if p := c.Pools.Get(f); p.On() && r.IntN(2) == 0 {
						before.Set(f, randomPrefix(r, p.Network, p.SubnetLen-r.IntN(2), p.SubnetLen))
					}
				}
				if err := checkPick(c, taken, before, nodeIdentity(i), r.IntN(3)); err != nil {
					t.Fatalf("with %s, before %v: %v", keys(taken), before, err)
				}
				if isFull(c, taken) {
					full++
				}
			}
			if full < 10 || full > 900 {
				t.Errorf("%d of 1000 pools were full: the test tests too little", full)
			}
		})
	}
}

func isFull(c Config, taken []*Entry) bool {
	return slices.ContainsFunc(c.Families(), func(f addr.Family) bool {
		return len(freeSubnets(c.Pools.Get(f),
			taken)) == 0
	})
}

func checkPick(c Config, taken []*Entry, before addr.Per[netip.Prefix], id Identity, attempt int) error {
	order := slices.Clone(taken)
	ch, err := pick(c, taken, before, id, attempt)
	if !slices.EqualFunc(order, taken, func(a, b *Entry) bool { return a.Key == b.Key }) {
		return errors.New("the table was changed")
	}
	keep := func(f addr.Family) bool { // what fits and is free stays, outside SubnetMin and SubnetMax too
		p, sn := c.Pools.Get(f), before.Get(f)
		return sn.IsValid() && sn.Bits() == p.SubnetLen && p.Network.Contains(sn.Addr()) &&
			!slices.ContainsFunc(taken, func(e *Entry) bool {
				return e.Subnets.Get(f).IsValid() &&
					e.Subnets.Get(f).Overlaps(sn)
			})
	}
	if err != nil {
		for _, f := range c.Families() {
			if !keep(f) && len(freeSubnets(c.Pools.Get(f), taken)) == 0 {
				return checkFull(c, taken, err)
			}
		}
		return fmt.Errorf("%w: but it is not", err)
	}
	kept := false
	indices := map[uint64]bool{}
	for _, f := range c.Families() {
		p, sn := c.Pools.Get(f), ch.Get(f)
		switch {
		case keep(f):
			kept = true
			if sn != before.Get(f) {
				return fmt.Errorf("%v: chose %v", f, sn)
			}
		case !slices.Contains(freeSubnets(p, taken), sn):
			return fmt.Errorf("chose %v, which is not free", sn)
		}
		indices[bigPool{p}.index(sn.Addr()).Uint64()] = true
	}
	if paired(c, ch) && len(indices) != 1 {
		return fmt.Errorf("%v are not a pair", ch)
	}
	if !kept && !paired(c, ch) {
		return checkNoPair(c, taken)
	}
	if !kept && len(c.Families()) == 1 {
		return checkFirstFree(c.Pools.Get(c.Families()[0]), taken, ch.Get(c.Families()[0]), hash(id, attempt))
	}
	return nil
}

func checkNoPair(c Config, taken []*Entry) error {
	for i := range min(c.Pools.V4.Size(), c.Pools.V6.Size()) {
		if free(c.Pools.V4.Subnet(i), taken) && free(c.Pools.V6.Subnet(i), taken) {
			return fmt.Errorf("no pair was chosen, and %d is free", i)
		}
	}
	return nil
}

func checkFirstFree(p Pool, taken []*Entry, got netip.Prefix, start uint64) error {
	free := freeSubnets(p, taken)
	for i := range p.Size() {
		if sn := p.Subnet((start%p.Size() + i) % p.Size()); slices.Contains(free, sn) {
			if sn != got {
				return fmt.Errorf("chose %v, the first free one is %v", got, sn)
			}
			return nil
		}
	}
	return fmt.Errorf("chose %v from a full pool", got)
}

// checkFull checks that a PoolFullError names the pool that is full, its size, and what takes it up.
func checkFull(c Config, taken []*Entry, err error) error {
	var full *PoolFullError
	if !errors.As(err, &full) {
		return fmt.Errorf("want a PoolFullError: %w", err)
	}
	p, leases, reservations := full.Pool, 0, 0
	for _, e := range taken {
		_, _, v4 := bigPool{p}.span(e.Subnets.V4)
		_, _, v6 := bigPool{p}.span(e.Subnets.V6)
		switch in := v4 && e.Subnets.V4.IsValid() || v6 && e.Subnets.V6.IsValid(); {
		case in && e.LeaseID == 0:
			reservations++
		case in:
			leases++
		}
	}
	if n := len(freeSubnets(p, taken)); n > 0 {
		return fmt.Errorf("%w: %d of %v are free", err, n, p.Network)
	}
	if full.Size != (bigPool{p}).size().Uint64() {
		return fmt.Errorf("%w: size %d", err, full.Size)
	}
	if full.Leases != leases || full.Reservations != reservations {
		return fmt.Errorf("%w: want %d leases, %d reservations", err, leases, reservations)
	}
	return nil
}

func TestPoolFullError(t *testing.T) {
	c := mustConfig(t, unequal6)
	taken := []*Entry{
		leaseAt("10.1.0.16-28", Attrs{}, 1, 0),                      // of the other family, which has room
		leaseAt("10.1.0.32-28&fd01:0:0:1::-64", Attrs{}, 2, 7),      // one subnet
		leaseAt("10.1.0.48-28&fd01:0:0:2::-63", Attrs{}, 3, 8),      // two
		ParseEntry("fd01:0:0:4::-62", []byte("router"), 4, 4, 0),    // the rest; its value says nothing
		leaseAt("10.1.0.64-28&fd01:0:0:9::-64", Attrs{}, 5, 9),      // outside
		leaseAt("10.1.0.80-28&fd01:0:0:1:8000::-65", Attrs{}, 6, 9), // half of one that is taken already
	}
	_, err := pick(c, taken, addr.Per[netip.Prefix]{}, nodeIdentity(1), 0)
	var full *PoolFullError
	if !errors.As(err, &full) || full.Size != 7 || full.Leases != 3 || full.Reservations != 1 {
		t.Errorf("got %v, %+v", err, full)
	}
	want := "no free subnet: all 7 (fd01:0:0:1::/64 to fd01:0:0:7::/64) are taken by 3 leases and 1 reservations"
	if err == nil || err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
}

// Half of an immense pool is one reservation: the search steps over it at once. One that does not never ends.
func TestPickStepsOverWideReservations(t *testing.T) {
	c := mustConfig(t, `{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/16","IPv6SubnetLen":64}`)
	var taken []*Entry
	for _, k := range []string{"fd00::-17", "fd00:8000::-18", "fd00:c000::-19", "fd00:e000::-20", "fd00:f000::-21"} {
		taken = append(taken, leaseAt(k, Attrs{}, 1, 0))
	}
	for i := range 1000 {
		ch, err := pick(c, taken, addr.Per[netip.Prefix]{}, nodeIdentity(i), 0)
		if err != nil || !netip.MustParsePrefix("fd00:f800::/21").Contains(ch.V6.Addr()) {
			t.Fatalf("%v, %v", ch, err)
		}
	}
}

// Pairs are guarded by their IPv4 half alone, so that two subnets outside SubnetMin..SubnetMax must not pass for one.
func TestPairedOutsideThePool(t *testing.T) {
	c := mustConfig(t, `{"Network":"10.1.0.0/16","SubnetMin":"10.1.8.0","SubnetMax":"10.1.9.0","EnableIPv6":true,"IPv6Network":"fd01::/48","IPv6SubnetMin":"fd01:0:0:8::","IPv6SubnetMax":"fd01:0:0:9::"}`)
	for _, tt := range []struct {
		before addr.Per[netip.Prefix]
		want   bool
	}{
		{per("10.1.8.0/24", "fd01:0:0:8::/64"), true},
		{per("10.1.9.0/24", "fd01:0:0:8::/64"), false},
		{per("10.1.6.0/24", "fd01:0:0:7::/64"), false},
		{per("10.1.7.0/24", "fd01:0:0:6::/64"), false},
		{per("10.1.3.0/24", "fd01:0:0:7::/64"), false},
	} {
		ch, err := pick(c, nil, tt.before, nodeIdentity(1), 0)
		if err != nil || ch != tt.before || paired(c, ch) != tt.want {
			t.Errorf("%v: %+v, %v, want paired = %t", tt.before, ch, err, tt.want)
		}
	}
}

func BenchmarkPick(b *testing.B) {
	for _, bb := range []struct{ name, config string }{
		{"IPv4_8", `{"Network":"10.0.0.0/8"}`},
		{"IPv6_16", `{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/16"}`},
		{"dual", `{"Network":"10.0.0.0/8","EnableIPv6":true,"IPv6Network":"fd00::/16"}`},
	} {
		for _, n := range []int{500, 5000} {
			b.Run(fmt.Sprintf("%s/%d", bb.name, n), func(b *testing.B) {
				c := mustConfig(b, bb.config)
				var taken []*Entry
				for i := range n {
					ch, err := pick(c, nil, addr.Per[netip.Prefix]{}, nodeIdentity(i), 0)
					if err != nil {
						b.Fatal(err)
					}
					taken = append(taken, leaseAt(FormatKey(ch), Attrs{}, int64(i), 1))
				}
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					if _, err := pick(c, taken, addr.Per[netip.Prefix]{}, nodeIdentity(n+i), 0); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
