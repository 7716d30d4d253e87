package subnet

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/addr"
)

// simStore is a store as etcd is one, with nothing but the guards that a Decision asks for.
type simStore struct {
	rev, configRev int64
	config         Config
	keys           map[string]*Entry
	listed         Table // what table returned last
	unpaired       int64 // revision of the last dual-stack lease that was not a pair (see Decision.Unchanged)
	lastLease      int64
}

func (s *simStore) setConfig(c Config) {
	s.rev++
	s.config, s.configRev = c, s.rev
}

func (s *simStore) put(key string, value []byte, lease int64) {
	s.rev++
	created := s.rev
	if before, ok := s.keys[key]; ok {
		created = before.Created
	}
	s.keys[key] = ParseEntry(key, value, s.rev, created, lease)
}

func (s *simStore) remove(key string) {
	s.rev++
	delete(s.keys, key)
}

func (s *simStore) revisionOf(key string) int64 {
	if e := s.keys[key]; e != nil {
		return e.Revision
	}
	return 0
}

func (s *simStore) newLease() int64 {
	s.lastLease++
	return s.lastLease
}

func (s *simStore) table() Table {
	if s.listed.Revision == s.rev {
		return s.listed
	}
	s.listed = Table{Revision: s.rev, Config: s.config, ConfigRevision: s.configRev}
	for _, k := range slices.Sorted(maps.Keys(s.keys)) {
		s.listed.Entries = append(s.listed.Entries, s.keys[k])
	}
	return s.listed
}

// commit is the transaction that a decision stands for; false where a guard fails.
func (s *simStore) commit(t Table, d Decision) bool {
	if s.configRev != t.ConfigRevision {
		return false
	}
	if d.Expect != 0 && s.revisionOf(d.Key) != d.Expect {
		return false
	}
	for k, r := range s.keys {
		if d.Expect == 0 && strings.HasPrefix(k, d.Unchanged) && r.Revision > t.Revision {
			return false
		}
	}
	if d.Expect == 0 && s.unpaired > t.Revision {
		return false
	}
	for _, e := range d.Drop {
		if s.revisionOf(e.Key) != e.Revision {
			return false
		}
	}
	for _, e := range d.Drop {
		delete(s.keys, e.Key)
	}
	lease := d.LeaseID
	if lease == 0 && !d.Reserved {
		lease = s.newLease()
	}
	s.put(d.Key, FormatValue(d.Lease.Attrs), lease)
	if d.Expect == 0 && d.Unchanged == "" {
		s.unpaired = s.rev
	}
	return true
}

// simNode is a node between reading the table and writing its decision.
type simNode struct {
	claim    Claim
	attempt  int
	table    Table
	decision *Decision
	err      error
}

type sim struct {
	t       *testing.T
	r       *rand.Rand
	store   simStore
	nodes   []*simNode
	tables  []Table // the last few, for those whose watch lags behind
	configs []Config
	lost    int // races
	written int
}

func newSim(t *testing.T, seed uint64, nodes int, configs ...string) *sim {
	s := &sim{t: t, r: rand.New(rand.NewPCG(seed, seed)), store: simStore{keys: map[string]*Entry{}}}
	for _, c := range configs {
		s.configs = append(s.configs, mustConfig(t, c))
	}
	s.store.setConfig(s.configs[0])
	for i := range nodes {
		n := &simNode{claim: Claim{Attrs: Attrs{Backend: VXLAN, Identity: nodeIdentity(i)}}}
		s.nodes = append(s.nodes, n)
		s.move(n)
		if s.r.IntN(4) == 0 { // flannel ran there before
			s.flannel(n)
		}
	}
	return s
}

// move gives a node a public IP that no node had before.
func (s *sim) move(n *simNode) {
	x := s.store.newLease()
	n.claim.VTEP = vteps(n.claim.NodeName)
	n.claim.PublicIP = ips(fmt.Sprintf("192.168.%d.%d", x/250%250, x%250+1), fmt.Sprintf("2001:db8::%x", x))
}

func vteps(name string) addr.Per[VTEP] {
	h := hash(Identity{NodeName: name}, 0)
	m := addr.MAC{2, byte(h), byte(h >> 8), byte(h >> 16), byte(h >> 24), byte(h >> 32)}
	return addr.Per[VTEP]{V4: VTEP{1, m}, V6: VTEP{1, m}}
}

func (s *sim) flannel(n *simNode) {
	c := s.store.config
	var sn addr.Per[netip.Prefix]
	for _, f := range c.Families() {
		candidates := freeSubnets(c.Pools.Get(f), s.store.table().Entries)
		if len(candidates) == 0 {
			return
		}
		sn.Set(f, candidates[s.r.IntN(len(candidates))])
	}
	s.store.put(FormatKey(sn), FormatValue(Attrs{
		PublicIP: n.claim.PublicIP, Backend: VXLAN,
		VTEP: vteps("flannel on " + n.claim.NodeName),
	}), s.store.newLease())
	if len(c.Families()) == 2 {
		s.store.unpaired = s.store.rev
	}
}

// step lets one node go one step: read and decide, or write.
func (s *sim) step(n *simNode) {
	if n.decision == nil {
		s.tables = append(s.tables, s.store.table())
		s.tables = s.tables[max(0, len(s.tables)-4):]
		n.table = s.tables[s.r.IntN(len(s.tables))]
		d, err := Decide(n.table, n.claim, n.attempt)
		if n.err = err; err == nil && d.Write {
			n.decision = &d
		} else if err == nil {
			n.claim.Remembered = d.Lease.Subnets
		}
		return
	}
	d := *n.decision
	n.decision = nil
	_, existed := s.store.keys[d.Key]
	if !s.store.commit(n.table, d) {
		s.lost++
		n.attempt++
		return
	}
	s.written++
	n.attempt, n.claim.Remembered = 0, d.Lease.Subnets
	if existed != (d.Expect != 0) {
		s.t.Fatalf("%v wrote %+v; the key was there: %t", n.claim.Identity, d, existed)
	}
	if d.Expect != 0 {
		return // the subnets are those from before
	}
	for _, e := range s.store.table().Entries {
		if e.Key != d.Key && e.overlaps(&d.Lease) {
			s.t.Fatalf("%v took %s (unchanged: %q), which overlaps %s of %v", n.claim.Identity, d.Key, d.Unchanged, e.Key,
				e.Identity)
		}
	}
}

// event is something that happens to the network, or to a node at any point.
func (s *sim) event() {
	n := s.nodes[s.r.IntN(len(s.nodes))]
	switch s.r.IntN(8) {
	case 0: // the daemon starts again
		n.decision, n.attempt = nil, 0
	case 1: // and has lost its memory
		n.decision, n.attempt, n.claim.Remembered = nil, 0, addr.Per[netip.Prefix]{}
	case 2:
		n.decision = nil
		s.move(n)
	case 3:
		n.decision, n.claim.NodeName = nil, fmt.Sprintf("renamed-%d", s.store.newLease())
		n.claim.VTEP = vteps(n.claim.NodeName)
	case 4: // an etcd lease ends
		for _, e := range s.store.table().Entries { // in order, so that a seed always tells the same story
			if e.LeaseID != 0 && s.r.IntN(10) == 0 {
				s.store.remove(e.Key)
				break
			}
		}
	case 5: // an operator reserves a subnet that is free, for a node or for none
		c := s.store.config
		if free := freeSubnets(c.Pools.Get(c.Families()[0]), s.store.table().Entries); len(free) > 0 {
			var value []byte
			if s.r.IntN(2) == 0 {
				value = FormatValue(Attrs{Identity: Identity{NodeName: n.claim.NodeName}})
			}
			s.store.put(FormatKey(per(free[s.r.IntN(len(free))].String())), value, 0)
		}
	case 6: // or takes a reservation back
		for _, e := range s.store.table().Entries {
			if e.Reserved() {
				s.store.remove(e.Key)
				break
			}
		}
	case 7:
		if s.r.IntN(3) == 0 {
			s.store.setConfig(s.configs[s.r.IntN(len(s.configs))])
		}
	}
}

// settle lets the nodes go on until each one has what it wants or knows that it can't have it.
func (s *sim) settle() {
	for round := 0; ; round++ {
		if round > 60*len(s.nodes) {
			s.t.Fatalf("no end after %d rounds: %d writes, %d lost races", round, s.written, s.lost)
		}
		s.tables = nil // no watch lags for ever
		busy := false
		for _, i := range s.r.Perm(len(s.nodes)) {
			s.step(s.nodes[i])
		}
		now := s.store.table()
		for _, n := range s.nodes {
			d, err := Decide(now, n.claim, n.attempt)
			busy = busy || n.decision != nil || err == nil && d.Write
		}
		if !busy {
			break
		}
	}
	s.checkSettled()
}

// checkSettled: every node holds a lease that fits and that no other entry overlaps, or a pool is really full.
func (s *sim) checkSettled() {
	now := s.store.table()
	for _, n := range s.nodes {
		d, err := Decide(now, n.claim, n.attempt)
		var full *PoolFullError
		switch {
		case err == nil:
			if !now.Config.Fits(d.Lease.Subnets) || d.Lease.Attrs != n.claim.Attrs {
				s.t.Fatalf("%v holds %+v", n.claim.Attrs, d.Lease)
			}
			if peers, rejected := now.Peers(now.Config, Lease{}); !slices.ContainsFunc(peers,
				func(l *Lease) bool { return *l == d.Lease }) {
				s.t.Fatalf("the others do not accept %v with %s: %+v", n.claim.Identity, d.Key, rejected)
			}
		case errors.As(err, &full):
			_, drop := ownEntries(now, &n.claim)
			if err := checkFull(now.Config, without(now.Entries, drop), err); err != nil {
				s.t.Fatalf("%v: %v", n.claim.Identity, err)
			}
		default:
			s.t.Fatalf("%v: %v", n.claim.Identity, err)
		}
	}
	for i, e := range now.Entries {
		for _, o := range now.Entries[:i] {
			if e.overlaps(&o.Lease) && e.NodeID != "" && o.NodeID != "" {
				s.t.Fatalf("%s of %v overlaps %s of %v", e.Key, e.Identity, o.Key, o.Identity)
			}
		}
	}
}

// Many nodes, in any order of reads and writes, with restarts, moves, lost leases, reservations and changes of the
// config in between: no two ever hold overlapping subnets, and it comes to an end.
func TestNodesNeverOverlap(t *testing.T) {
	const (
		len26   = `{"Network":"10.1.0.0/22","SubnetLen":26}`
		len28   = `{"Network":"10.1.0.0/23","SubnetLen":28,"SubnetMax":"10.1.0.240"}`
		shifted = `{"Network":"10.1.0.0/22","SubnetLen":28,"SubnetMin":"10.1.1.0","EnableIPv6":true,"IPv6Network":"fd01::/60"}`
	)
	for _, tt := range []struct {
		name    string
		configs []string
	}{
		{"IPv4", []string{small4}},
		{"IPv6", []string{small6}},
		{"dual", []string{dual}},
		{"dual, IPv6 pool smaller", []string{unequal6}},
		{"dual, IPv4 pool smaller", []string{unequal4}},
		{"dual, IPv4 pool shifted", []string{shifted}},
		{"IPv4, lengths change", []string{len26, len28, small4}},
		{"families change", []string{small4, dual, small6}},
		{"everything changes", []string{dual, unequal6, unequal4, shifted, small4, small6, len26, len28}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			lost := 0
			for seed := range uint64(18) {
				t.Logf("seed %d", seed) // shown when it fails, the last one is the one
				s := newSim(t, seed, 2+int(seed*7)%23, tt.configs...)
				for range 250 {
					if s.r.IntN(6) == 0 {
						s.event()
					}
					s.step(s.nodes[s.r.IntN(len(s.nodes))])
				}
				s.settle()
				lost += s.lost
				if t.Failed() {
					return
				}
			}
			if lost == 0 {
				t.Error("no node ever lost a race: the simulation simulates nothing")
			}
		})
	}
}

// Sixty-four at once on sixty-four subnets: all get one; the pairs of a dual-stack network do not conflict with each
// other.
func TestStampede(t *testing.T) {
	for _, config := range []string{
		`{"Network":"10.1.0.0/17","SubnetMin":"10.1.0.0","SubnetMax":"10.1.63.0"}`,
		`{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd01::/57","IPv6SubnetMin":"fd01::","IPv6SubnetMax":"fd01:0:0:3f::"}`,
		`{"Network":"10.1.0.0/17","SubnetMin":"10.1.0.0","SubnetMax":"10.1.63.0","EnableIPv6":true,"IPv6Network":"fd01::/57","IPv6SubnetMin":"fd01::","IPv6SubnetMax":"fd01:0:0:3f::"}`,
	} {
		s := newSim(t, 8, 0, config)
		for i := range 64 {
			n := &simNode{claim: Claim{Attrs: Attrs{Backend: VXLAN, Identity: nodeIdentity(i)}}}
			s.nodes = append(s.nodes, n)
			s.move(n)
		}
		for _, n := range s.nodes {
			s.step(n) // all read before any writes
		}
		s.settle()
		if s.written != 64 || len(s.store.keys) != 64 {
			t.Errorf("%s: %d writes, %d keys", config, s.written, len(s.store.keys))
		}
		if s.lost > 64*8 {
			t.Errorf("%s: %d races were lost", config, s.lost)
		}
	}
}

// A lease that is not a pair is not found under the IPv4 half of a pair's key: Unchanged alone would not keep the two
// apart, and the store has to let an unpaired write fail the pairs that were decided before it.
func TestPairAgainstUnpaired(t *testing.T) {
	s := newSim(t, 9, 0, dual)
	pair := Claim{Attrs: attrs("pair", "192.168.1.1"), Remembered: per("10.1.0.80/28", "fd01:0:0:5::/64")}
	odd := Claim{Attrs: attrs("odd", "192.168.1.2"), Remembered: per("10.1.0.144/28", "fd01:0:0:5::/64")}
	table := s.store.table()
	first, err1 := Decide(table, odd, 0)
	second, err2 := Decide(table, pair, 0)
	if err1 != nil || err2 != nil || first.Unchanged != "" || second.Unchanged != "10.1.0.80-28" ||
		!first.Lease.overlaps(&second.Lease) {
		t.Fatalf("got %+v, %v and %+v, %v", first, err1, second, err2)
	}
	if !s.store.commit(table, first) || s.store.commit(table, second) {
		t.Error("want the first write to succeed, and the second to fail")
	}
	again, err := Decide(s.store.table(), pair, 1)
	if err != nil || again.Lease.overlaps(&first.Lease) || again.Lease.Subnets.V4 != pair.Remembered.V4 ||
		again.Unchanged != "" {
		t.Errorf("got %+v, %v, want the IPv4 subnet kept and another one of IPv6", again, err)
	}
}
