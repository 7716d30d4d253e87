package subnet

import (
	"cmp"
	"encoding/base64"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/overlayd/overlayd/addr"
)

// peer is a lease value that makes sense: node i, with addresses and MACs of its own.
func peer(i int) Attrs {
	b := addr.MAC{2, 0, 0, byte(i >> 16), byte(i >> 8), byte(i)}
	b6 := b
	b6[1] = 6
	return Attrs{
		PublicIP: addr.Per[netip.Addr]{
			V4: netip.AddrFrom4([4]byte{172, 16 + byte(i>>16), byte(i >> 8), byte(i)}),
			V6: netip.AddrFrom16([16]byte{0: 0x20, 1: 0x01, 2: 0x0d, 3: 0xb8, 13: byte(i >> 16), 14: byte(i >> 8), 15: byte(i)}),
		},
		PublicIPLocal: true, Backend: VXLAN, VTEP: addr.Per[VTEP]{V4: VTEP{1, b}, V6: VTEP{1, b6}}, Identity: nodeIdentity(i),
	}
}

func TestPeersRejects(t *testing.T) {
	self := Lease{Subnets: per("10.244.1.0/24", "fd00:10:244:1::/64"), Attrs: peer(1)}
	bad := func(change func(*Attrs)) []byte { return FormatValue(with(peer(7), change)) }
	v4 := func(s string) []byte { return bad(func(a *Attrs) { a.PublicIP.V4 = netip.MustParseAddr(s) }) }
	v6 := func(s string) []byte { return bad(func(a *Attrs) { a.PublicIP.V6 = netip.MustParseAddr(s) }) }
	mac4 := func(s string) []byte { return bad(func(a *Attrs) { a.VTEP.V4.MAC = mac(t, s) }) }
	good := bad(func(*Attrs) {})
	const (
		key  = "10.244.7.0-24"
		both = "10.244.7.0-24&fd00:10:244:7::-64"
	)

	for _, tt := range []struct {
		name, config, key string
		value             []byte
		want              string // in the reason
	}{
		{"host bits in the key", net4, "10.244.7.1-24", good, "no host bits"},
		{"a key that is no subnet", net4, "router", good, "not of the form"},
		{"an empty key", net4, "", good, "not of the form"},
		{"a key with IPv6 first", netTwo, "fd00:10:244:7::-64&10.244.7.0-24", good, "not of the form"},
		{"a key that is not canonical", net6, "fd00:10:244:7:0::-64", good, "not of the form"},
		{"a v4-mapped subnet", netTwo, "::ffff:10.244.7.0-120", good, "not of the form"},
		{"outside the network", net4, "10.99.7.0-24", good, "outside the network 10.244.0.0/16"},
		{"the network and more", net4, "10.244.0.0-15", good, "outside the network"},
		{"everything", net4, "0.0.0.0-0", good, "outside the network"},
		{"the whole network", net4, "10.244.0.0-16", good, "overlaps this node's own 10.244.1.0/24"},
		{"IPv6 outside the network", net6, "fd00:10:245:7::-64", good, "outside the network fd00:10:244::/48"},
		{
			"one family outside the network", netTwo, "10.244.7.0-24&fd00:10:245:7::-64", good,
			"outside the network fd00:10:244::/48",
		},
		{"no family that is in use", net4, "fd00:10:244:7::-64", good, "no subnet in a family"},
		{"around mine", net4, "10.244.0.0-23", good, "overlaps this node's own 10.244.1.0/24"},
		{"inside mine", net4, "10.244.1.128-25", good, "overlaps this node's own"},
		{"one address of mine", net4, "10.244.1.5-32", good, "overlaps this node's own"},
		{"mine, of one family only", netTwo, "10.244.1.0-24", good, "overlaps this node's own"},
		{"mine, in IPv6", netTwo, "10.244.7.0-24&fd00:10:244:1::-64", good, "overlaps this node's own fd00:10:244:1::/64"},

		{"no public IP", net4, key, bad(func(a *Attrs) { a.PublicIP = addr.Per[netip.Addr]{} }), "no public IPv4"},
		{"no public IP of this family", net4, key, bad(func(a *Attrs) { a.PublicIP.V4 = netip.Addr{} }), "no public IPv4"},
		{"no public IPv6", netTwo, both, bad(func(a *Attrs) { a.PublicIP.V6 = netip.Addr{} }), "no public IPv6"},
		{"unspecified", net4, key, []byte(`{"PublicIP":"0.0.0.0","BackendType":"vxlan"}`), "no public IPv4"},
		{"my public IP", net4, key, v4(self.PublicIP.V4.String()), "this node's own"},
		{"my public IPv6", netTwo, both, v6(self.PublicIP.V6.String()), "this node's own"},
		{"inside the overlay", net4, key, v4("10.244.200.1"), "inside the overlay network 10.244.0.0/16"},
		{
			"IPv6 inside the overlay", net6, "fd00:10:244:7::-64", v6("fd00:10:244:7::1"),
			"inside the overlay network fd00:10:244::/48",
		},
		{"multicast", net4, key, v4("224.0.0.1"), "not a usable unicast address"},
		{"IPv6 multicast", netTwo, both, v6("ff02::1"), "not a usable unicast address"},
		{"broadcast", net4, key, v4("255.255.255.255"), "not a usable unicast address"},
		{"loopback", net4, key, v4("127.0.0.1"), "not a usable unicast address"},
		{"IPv6 loopback", netTwo, both, v6("::1"), "not a usable unicast address"},
		{"link-local", net4, key, v4("169.254.169.254"), "not a usable unicast address"},
		{"IPv6 link-local", netTwo, both, v6("fe80::1"), "not a usable unicast address"},
		{"v4-mapped", netTwo, both, v6("::ffff:172.16.0.1"), "PublicIPv6"},
		{"public IP is no address", net4, key, []byte(`{"PublicIP":"a.example","BackendType":"vxlan"}`), "PublicIP"},

		{
			"another backend", net4, key, bad(func(a *Attrs) { a.Backend, a.VTEP = HostGW, addr.Per[VTEP]{} }),
			`its backend is "host-gw", but this network uses "vxlan"`,
		},
		{
			"no backend", net4, key, []byte(`{"PublicIP":"172.16.0.7","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:07"}}`),
			`its backend is ""`,
		},
		{
			"VXLAN in a host-gw network", `{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}`, key, good,
			`its backend is "vxlan", but this network uses "host-gw"`,
		},
		{"no MAC", net4, key, bad(func(a *Attrs) { a.VTEP = addr.Per[VTEP]{} }), "no IPv4 VtepMAC"},
		{"no MAC in IPv6", netTwo, both, bad(func(a *Attrs) { a.VTEP.V6 = VTEP{} }), "no IPv6 VtepMAC"},
		{"zero MAC", net4, key, mac4("00:00:00:00:00:00"), "no IPv4 VtepMAC"},
		{"group MAC", net4, key, mac4("03:00:00:00:00:01"), "group address"},
		{"broadcast MAC", net4, key, mac4("ff:ff:ff:ff:ff:ff"), "group address"},
		{"my MAC", net4, key, mac4(self.VTEP.V4.MAC.String()), "is this node's own"},
		{
			"MAC of eight octets", net4, key,
			[]byte(`{"PublicIP":"172.16.0.7","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:00:00:07"}}`), "BackendData.VtepMAC",
		},
		{"another peer's MAC", net4, key, mac4(peer(3).VTEP.V4.MAC.String()), "is that of node-3, which holds it"},
		{
			"another peer's public IP, written before", net4, key, v4(peer(3).PublicIP.V4.String()),
			"is that of node-3, whose lease 10.244.3.0-24 was written later",
		},
		{
			"another peer's public IPv6", netTwo, both, v6(peer(3).PublicIP.V6.String()),
			"is that of node-3, whose lease 10.244.3.0-24&fd00:10:244:3::-64 was written later",
		},
		{"another VNI", net4, key, bad(func(a *Attrs) { a.VTEP.V4.VNI = 2 }), "its VNI is 2, but this network uses 1"},
		{"another peer's subnet, a part of it", net4, "10.244.3.64-26", good, "overlaps 10.244.3.0-24"},
		{"another peer's subnet and more", net4, "10.244.2.0-23", good, "overlaps 10.244.3.0-24"},
		{
			"another peer's subnet in IPv6", netTwo, "10.244.7.0-24&fd00:10:244:3::-64", good,
			"overlaps 10.244.3.0-24&fd00:10:244:3::-64",
		},
		{"another peer's subnet, IPv6 dropped", net4, "10.244.3.0-24&fd00:10:244:7::-64", good, "overlaps 10.244.3.0-24"},

		{"no value", net4, key, nil, "empty"},
		{"empty JSON", net4, key, []byte("{}"), "empty"},
		{"null", net4, key, []byte("null"), "empty"},
		{"broken JSON", net4, key, good[:len(good)-3], "not a lease"},
		{"a value that is no object", net4, key, []byte("[1]"), "not a lease"},
		{"a name that can't be printed", net4, key, []byte(`{"NodeName":"\u001b]0;x\u0007"}`), "NodeName"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := mustConfig(t, tt.config)
			self, goodKey, goodValue := self, []string{"10.244.2.0-24", "10.244.3.0-24"}, peer
			switch {
			case c.Pools.V4.On() && c.Pools.V6.On():
				goodKey = []string{"10.244.2.0-24&fd00:10:244:2::-64", "10.244.3.0-24&fd00:10:244:3::-64"}
			case c.Pools.V6.On():
				goodKey, self.Subnets.V4 = []string{"fd00:10:244:2::-64", "fd00:10:244:3::-64"}, netip.Prefix{}
			default:
				self.Subnets.V6 = netip.Prefix{}
			}
			if c.Backend.Type == HostGW {
				goodValue = func(i int) Attrs {
					return with(peer(i), func(a *Attrs) { a.Backend, a.VTEP = HostGW, addr.Per[VTEP]{} })
				}
			}
			if tt.name == "another peer's subnet and more" {
				goodKey[0] = "10.244.4.0-24"
			}
			table := Table{Config: c, Entries: []*Entry{
				ParseEntry(tt.key, tt.value, 9, 9, 90),
				ParseEntry(goodKey[0], FormatValue(goodValue(2)), 12, 2, 20),
				ParseEntry(goodKey[1], FormatValue(goodValue(3)), 13, 3, 30),
				leaseAt(FormatKey(self.Subnets), self.Attrs, 1, 10),
				ParseEntry("10.244.100.0-24", nil, 4, 4, 0), // blank reservations are neither peers nor rejected
			}}
			peers, rejected := table.Peers(c, self)
			if len(rejected) != 1 || rejected[0].Key != tt.key || !strings.Contains(rejected[0].Reason, tt.want) {
				t.Fatalf("rejected %+v, want %q because of %q", rejected, tt.key, tt.want)
			}
			checkOneLine(t, errors.New(rejected[0].Reason))
			if len(peers) != 2 || FormatKey(peers[0].Subnets) != min(goodKey[0], goodKey[1]) || peers[0].Attrs != goodValue(2) &&
				peers[1].Attrs != goodValue(2) {
				t.Errorf("it held back others: %+v", peers)
			}
		})
	}
}

func TestPeersAccepts(t *testing.T) {
	self := Lease{Subnets: per("10.244.1.0/24", "fd00:10:244:1::/64"), Attrs: peer(1)}
	self4 := Lease{Subnets: per("10.244.1.0/24"), Attrs: peer(1)}
	flannel := with(peer(7), func(a *Attrs) {
		a.Identity, a.PublicIPLocal, a.PublicIP.V6, a.VTEP.V6 = Identity{}, false, netip.Addr{}, VTEP{}
	})
	for _, tt := range []struct {
		name, config string
		self         Lease
		key          string
		value        Attrs
		lease        int64
		want         addr.Per[netip.Prefix]
	}{
		{"flannel's", net4, self4, "10.244.7.0-24", flannel, 70, per("10.244.7.0/24")},
		{"a reservation that is in use", net4, self4, "10.244.7.0-24", peer(7), 0, per("10.244.7.0/24")},
		{"another length that overlaps nothing", net4, self4, "10.244.8.0-22", peer(7), 70, per("10.244.8.0/22")},
		{"the first subnet", net4, self4, "10.244.0.0-24", peer(7), 70, per("10.244.0.0/24")},
		{
			"outside SubnetMin to SubnetMax", `{"Network":"10.244.0.0/16","SubnetMax":"10.244.6.0"}`, self4, "10.244.7.0-24",
			peer(7), 70, per("10.244.7.0/24"),
		},
		{"dual", netTwo, self, "10.244.7.0-24&fd00:10:244:7::-64", peer(7), 70, per("10.244.7.0/24", "fd00:10:244:7::/64")},
		{"IPv4 alone in a dual network", netTwo, self, "10.244.7.0-24", flannel, 70, per("10.244.7.0/24")},
		{"IPv6 alone in a dual network", netTwo, self, "fd00:10:244:7::-64", peer(7), 70, per("fd00:10:244:7::/64")},
		{
			"the family that is not in use is dropped", net4, self4, "10.244.7.0-24&fd00:10:244:7::-64", peer(7), 70,
			per("10.244.7.0/24"),
		},
		{
			"the family that is not in use may be nonsense", net4, self4, "10.244.7.0-24&ff00::-8",
			with(peer(7), func(a *Attrs) {
				a.PublicIP.V6, a.VTEP.V6 = netip.MustParseAddr("ff02::1"), VTEP{9, addr.MAC{1}}
			}),
			70, per("10.244.7.0/24"),
		},
		{
			"IPv4 dropped", net6,
			Lease{Subnets: per("fd00:10:244:1::/64"), Attrs: peer(1)},
			"10.244.1.0-24&fd00:10:244:7::-64",
			peer(7), 70, per("fd00:10:244:7::/64"),
		},
		{
			"one MAC for both families", netTwo, self, "10.244.7.0-24&fd00:10:244:7::-64",
			with(peer(7), func(a *Attrs) { a.VTEP.V6 = a.VTEP.V4 }), 70, per("10.244.7.0/24", "fd00:10:244:7::/64"),
		},
		{
			"host-gw needs no MAC", `{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}`, self4, "10.244.7.0-24",
			Attrs{PublicIP: ips("172.16.0.7"), Backend: HostGW},
			70, per("10.244.7.0/24"),
		},
		{"before this node holds a lease", net4, Lease{}, "10.244.7.0-24", peer(7), 70, per("10.244.7.0/24")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := mustConfig(t, tt.config)
			table := Table{Config: c, Entries: []*Entry{leaseAt(tt.key, tt.value, 7, tt.lease)}}
			peers, rejected := table.Peers(c, tt.self)
			if len(rejected) != 0 || len(peers) != 1 || *peers[0] != (Lease{tt.want, tt.value}) {
				t.Errorf("got %+v, rejected %+v", peers, rejected)
			}
			if e := table.Entries[0]; FormatKey(e.Subnets) != tt.key {
				t.Errorf("the table was changed: %+v", e)
			}
		})
	}
}

// randomTable is full of leases that nest, that share MACs and addresses, and that were made in one transaction.
func randomTable(r *rand.Rand, c Config, n int) Table {
	table := Table{Config: c}
	seen := map[string]bool{}
	for i := range n {
		var s addr.Per[netip.Prefix]
		for _, f := range addr.Families() {
			if r.IntN(5) > 0 {
				p := netip.MustParsePrefix(map[addr.Family]string{addr.IPv4: "10.244.0.0/16", addr.IPv6: "fd00:10:244::/48"}[f])
				lo := p.Bits() + 4
				s.Set(f, randomPrefix(r, p, lo, lo+8))
			}
		}
		a := peer(2 + i)
		for _, f := range addr.Families() {
			if r.IntN(6) == 0 {
				v := a.VTEP.Get(f)
				v.MAC[5], v.MAC[4] = byte(r.IntN(4)), 0xff
				a.VTEP.Set(f, v)
			}
			if r.IntN(6) == 0 {
				a.PublicIP.Set(f, peer(0x300+r.IntN(4)).PublicIP.Get(f))
			}
		}
		if k := FormatKey(s); k != "" && !seen[k] {
			seen[k] = true
			created := 1 + int64(r.IntN(n))
			table.Entries = append(table.Entries, ParseEntry(k, FormatValue(a), created+int64(r.IntN(n)), created, 1))
		}
	}
	return table
}

// naivePeers compares every lease with every other one, those that fit the network first: for subnets and MACs the
// oldest first, then for addresses the one written last, but young ones at the end, as they were written.
func naivePeers(table Table, c Config, self Lease, young map[*Entry]time.Time) (accepted, rejected []string) {
	var es []*Entry
	isYoung := map[string]int{}
	for _, e := range table.Entries {
		if e.passedOver(self) {
			continue
		}
		if _, is := young[e]; is {
			isYoung[e.Key] = 1
		}
		l, reason := (&judge{config: c, self: self}).alone(e)
		if reason != (objection{}) {
			rejected = append(rejected, e.Key)
			continue
		}
		trimmed := *e
		trimmed.Lease = *l
		es = append(es, &trimmed)
	}
	sift := func(age func(a, b *Entry) int, both func(l, h Lease, f, g addr.Family) bool) {
		slices.SortFunc(es, func(a, b *Entry) int {
			byAge := cmp.Or(cmp.Compare(a.Created, b.Created), strings.Compare(a.Key, b.Key))
			return cmp.Or(b2i(c.Fits(b.Subnets))-b2i(c.Fits(a.Subnets)), age(a, b), byAge)
		})
		var held []*Entry
		for _, e := range es {
			bad := false
			for _, h := range held {
				for _, f := range addr.Families() {
					for _, g := range addr.Families() {
						bad = bad || e.Subnets.Get(f).IsValid() && h.Subnets.Get(g).IsValid() && both(e.Lease, h.Lease, f, g)
					}
				}
			}
			if bad {
				rejected = append(rejected, e.Key)
				continue
			}
			held = append(held, e)
		}
		es = held
	}
	sift(func(a, b *Entry) int { return 0 }, func(l, h Lease, f, g addr.Family) bool {
		return h.Subnets.Get(g).Overlaps(l.Subnets.Get(f)) || h.VTEP.Get(g).MAC == l.VTEP.Get(f).MAC
	})
	sift(func(a, b *Entry) int {
		if isYoung[a.Key]+isYoung[b.Key] == 2 {
			return cmp.Compare(a.Revision, b.Revision)
		}
		return cmp.Or(isYoung[a.Key]-isYoung[b.Key], cmp.Compare(b.Revision, a.Revision))
	}, func(l, h Lease, f, g addr.Family) bool {
		return h.PublicIP.Get(g) == l.PublicIP.Get(f)
	})
	slices.SortFunc(es, func(a, b *Entry) int { return CompareSubnets(a.Subnets, b.Subnets) })
	for _, h := range es {
		accepted = append(accepted, FormatKey(h.Subnets))
	}
	slices.Sort(rejected)
	return accepted, rejected
}

func TestPeersAgainstAllPairs(t *testing.T) {
	self := Lease{Subnets: per("10.244.255.0/24", "fd00:10:244:ffff::/64"), Attrs: peer(1)}
	for seed, config := range []string{net4, net6, netTwo} {
		c := mustConfig(t, config)
		r := newRand(t, uint64(200+seed))
		total, nested := 0, 0
		for range 150 {
			table := randomTable(r, c, 1+r.IntN(40))
			peers, rejected := table.Peers(c, self)
			wantPeers, wantRejected := naivePeers(table, c, self, nil)
			var gotPeers, gotRejected []string
			for _, l := range peers {
				gotPeers = append(gotPeers, FormatKey(l.Subnets))
			}
			for _, x := range rejected {
				gotRejected = append(gotRejected, x.Key)
				if strings.Contains(x.Reason, "which holds it") || strings.Contains(x.Reason, "was written later") {
					nested++
				}
			}
			if !slices.Equal(gotPeers, wantPeers) || !slices.Equal(gotRejected, wantRejected) {
				t.Fatalf("%s: of %s\nfor %q, want %q\nrejected %q, want %q", config, keys(table.Entries), gotPeers, wantPeers,
					gotRejected, wantRejected)
			}
			total += len(table.Entries)

			r.Shuffle(len(table.Entries), func(a, b int) {
				table.Entries[a], table.Entries[b] = table.Entries[b],
					table.Entries[a]
			})
			again, rejectedAgain := table.Peers(c, self)
			if !slices.EqualFunc(again, peers, func(a, b *Lease) bool { return *a == *b }) ||
				!slices.EqualFunc(rejectedAgain, rejected, func(a, b Rejection) bool { return a.Key == b.Key }) {
				t.Fatalf("in another order: %+v\nrejected %+v\nwas %+v\nrejected %+v", again, rejectedAgain, peers, rejected)
			}
		}
		if nested < total/20 {
			t.Errorf("%s: %d of %d overlapped: the test tests too little", config, nested, total)
		}
	}
}

// largeTable has n good leases, and junk between them.
func largeTable(n, junk int) (Table, Lease) {
	table := Table{}
	for i := range n {
		k := fmt.Sprintf("10.%d.%d.0-24", i/256, i%256)
		table.Entries = append(table.Entries, leaseAt(k, peer(i+2), int64(i+2), 1))
	}
	for i := range junk {
		k := fmt.Sprintf("10.%d.%d.%d-32", i/256%16, i%256, i/4096)
		v := []string{"", "{}", "[", `{"PublicIP":"1.2.3.4"}`, string(FormatValue(peer(i + 50_000)))}[i%5]
		table.Entries = append(table.Entries, ParseEntry(k, []byte(v), 99_999, 99_999, 1))
	}
	return table, Lease{Subnets: per("10.255.0.0/24"), Attrs: peer(1)}
}

func TestPeersOfALargeTable(t *testing.T) {
	c := mustConfig(t, `{"Network":"10.0.0.0/8"}`)
	large, self := largeTable(5000, 10_000)
	for _, tt := range []struct {
		name   string
		add    []*Entry // beside 5,000 good leases and 10,000 bad ones
		want   int
		reject int
	}{
		{"junk", nil, 5000, 10_000},
		{"a young lease around all", []*Entry{leaseAt("10.0.0.0-9", peer(40_000), 99_999, 1)}, 5000, 10_001},
		{"an old lease around all", []*Entry{leaseAt("10.0.0.0-9", peer(40_000), 1, 1)}, 5000, 10_001},
	} {
		t.Run(tt.name, func(t *testing.T) {
			table := Table{Entries: append(slices.Clone(large.Entries), tt.add...)}
			peers, rejected := table.Peers(c, self)
			if len(peers) != tt.want || len(rejected) != tt.reject {
				t.Errorf("%d peers, %d rejected, want %d and %d", len(peers), len(rejected), tt.want, tt.reject)
			}
		})
	}
}

func BenchmarkPeers(b *testing.B) {
	c := mustConfig(b, `{"Network":"10.0.0.0/8"}`)
	for _, bb := range []struct {
		name string
		junk int
		add  []*Entry
	}{
		{"5000", 0, nil},
		{"5000_and_10000_junk", 10_000, nil},
		{"5000_inside_a_younger_one", 0, []*Entry{leaseAt("10.0.0.0-9", peer(40_000), 99_999, 1)}},
	} {
		b.Run(bb.name, func(b *testing.B) {
			table, self := largeTable(5000, bb.junk)
			table.Entries = append(table.Entries, bb.add...)
			b.ReportAllocs()
			for b.Loop() {
				if peers, _ := table.Peers(c, self); len(peers) != 5000 {
					b.Fatal(len(peers))
				}
			}
		})
	}
}

// A node whose reservation no longer fits the network is accepted with the lease that does, although the reservation is
// older.
func TestPeersPreferWhatFits(t *testing.T) {
	c := mustConfig(t, net4)
	old, now := leaseAt("10.244.7.0-25", peer(2), 1, 0), leaseAt("10.244.9.0-24", peer(2), 9, 7)
	peers, rejected := Table{Entries: []*Entry{old, now}}.Peers(c, Lease{Subnets: per("10.244.255.0/24"), Attrs: peer(1)})
	if len(peers) != 1 || peers[0].Subnets != now.Subnets || len(rejected) != 1 || rejected[0].Key != old.Key {
		t.Errorf("peers %+v\nrejected %+v", peers, rejected)
	}
}

// In a network of WireGuard, the public key is what only one node can have, and the older lease has it.
func TestPublicKeys(t *testing.T) {
	t.Parallel()
	c := mustConfig(t, `{"Network":"10.244.0.0/16","Backend":{"Type":"wireguard"}}`)
	key := func(n byte) PublicKey {
		return PublicKey(base64.StdEncoding.EncodeToString(append(make([]byte, publicKeySize-1), n)))
	}
	lease := func(i int, k PublicKey, revision int64) *Entry {
		a := peer(i)
		a.Backend, a.VTEP, a.PublicKey = WireGuard, addr.Per[VTEP]{}, k
		return leaseAt(fmt.Sprintf("10.244.%d.0-24", i), a, revision, 70)
	}
	self := Lease{Subnets: per("10.244.1.0/24"), Attrs: Attrs{
		PublicIP: ips("172.16.0.1"), Backend: WireGuard, PublicKey: key(1),
	}}
	table := Table{Config: c, Entries: []*Entry{
		lease(2, key(2), 20), lease(3, key(3), 12), lease(4, key(3), 11), lease(5, key(1), 13), lease(6, "", 14),
		leaseAt("10.244.7.0-24", peer(7), 15, 70),
	}}
	accepted, rejected := table.Peers(c, self)
	var got []string
	for _, l := range accepted {
		got = append(got, l.Subnets.V4.String()+" accepted")
	}
	for _, r := range rejected {
		got = append(got, r.Key+" "+r.Reason)
	}
	want := []string{
		"10.244.2.0/24 accepted", "10.244.4.0/24 accepted",
		"10.244.3.0-24 its PublicKey " + string(key(3)) + " is that of node-4, which holds it",
		"10.244.5.0-24 its PublicKey " + string(key(1)) + " is this node's own",
		"10.244.6.0-24 it has no PublicKey",
		`10.244.7.0-24 its backend is "vxlan", but this network uses "wireguard"`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}
