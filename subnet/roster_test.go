package subnet

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/overlayd/overlayd/addr"
)

// naiveRoster does what a Roster does, from the whole table each time.
type naiveRoster struct {
	all   []Lease
	until map[addr.Per[netip.Prefix]]time.Time
	born  map[*Entry]time.Time            // of all in the table; the zero time for the first one's, and for answers of a holder
	holds map[string]addr.Per[netip.Addr] // the addresses of the leases that are accepted, by key
	grown []time.Time                     // when those are no longer young that are rejected for being so
}

func (n *naiveRoster) next() time.Time {
	if all := slices.AppendSeq(slices.Clone(n.grown), maps.Values(n.until)); len(all) > 0 {
		return slices.MinFunc(all, time.Time.Compare)
	}
	return time.Time{}
}

func (n *naiveRoster) update(tb testing.TB, t Table, c Config, self Lease, now time.Time,
	linger time.Duration,
) []Rejection {
	born, young := map[*Entry]time.Time{}, map[*Entry]time.Time{}
	for _, e := range t.Entries {
		at, known := n.born[e]
		held, answers := n.holds[e.Key]
		if !known && n.born != nil && (!answers || held != e.PublicIP) {
			at = now
		}
		if born[e] = at; now.Before(at.Add(challengeStands)) {
			young[e] = at.Add(challengeStands)
		}
	}
	n.born, n.grown, n.holds = born, nil, map[string]addr.Per[netip.Addr]{}
	whole := Roster{young: young}
	whole.Update(t, c, self, now, 0)
	rejected := whole.Rejected()
	var accepted []Lease
	listed := keys(t.Entries)
	for _, c := range whole.candidates {
		if c.accepted {
			n.holds[c.Key] = c.PublicIP
		}
	}
	var subnets, keys []string
	for _, p := range whole.Peers() {
		accepted, subnets = append(accepted, *p), append(subnets, FormatKey(p.Subnets))
	}
	for _, x := range rejected {
		keys = append(keys, x.Key)
		if e := t.Find(x.Key); strings.Contains(x.Reason, "may still have it") {
			n.grown = append(n.grown, young[e])
		}
	}
	if a, r := naivePeers(t, c, self, young); !slices.Equal(a, subnets) || !slices.Equal(r, keys) {
		tb.Fatalf("of %s accepted %q, want %q\nrejected %q, want %q", listed, subnets, a, keys, r)
	}
	until := map[addr.Per[netip.Prefix]]time.Time{}
	all := slices.Clone(accepted)
	for _, l := range n.all {
		end, known := n.until[l.Subnets]
		if !known {
			end = now.Add(linger)
		}
		if now.Before(end) && n.mayStay(l, accepted, c, self) {
			all, until[l.Subnets] = append(all, l), end
		}
	}
	slices.SortFunc(all, func(a, b Lease) int { return CompareSubnets(a.Subnets, b.Subnets) })
	n.all, n.until = all, until
	return rejected
}

func (n *naiveRoster) mayStay(l Lease, accepted []Lease, c Config, self Lease) bool {
	if _, reason := (&judge{config: c, self: self}).alone(&Entry{Lease: l}); reason != (objection{}) {
		return false
	}
	for _, o := range append(slices.Clone(accepted), self) {
		moved := l.NodeID != "" && o.NodeID == l.NodeID && !slices.Contains(n.all, o)
		if o.Subnets == l.Subnets || moved || l.contradicts(&o) {
			return false
		}
	}
	return true
}

// mutate makes the next table: a few entries go, come, change, or are written again as they were.
func mutate(r *rand.Rand, c Config, t Table) Table {
	t.Revision++
	byKey := map[string]*Entry{}
	for _, e := range t.Entries {
		byKey[e.Key] = e
	}
	for range 1 + r.IntN(3) {
		switch fresh := randomTable(r, c, 40).Entries; {
		case r.IntN(3) == 0 && len(t.Entries) > 0: // goes, or changes its owner
			e := t.Entries[r.IntN(len(t.Entries))]
			delete(byKey, e.Key)
			if r.IntN(3) == 0 && len(fresh) > 0 {
				byKey[e.Key] = ParseEntry(e.Key, FormatValue(fresh[0].Attrs), t.Revision, e.Created, 1)
			}
		case r.IntN(6) == 0 && len(t.Entries) > 0: // written again
			e := *t.Entries[r.IntN(len(t.Entries))]
			e.Revision = t.Revision
			byKey[e.Key] = &e
		case len(fresh) > 0:
			e := fresh[r.IntN(len(fresh))]
			byKey[e.Key] = e
		}
	}
	t.Entries = slices.SortedFunc(maps.Values(byKey), func(a, b *Entry) int { return strings.Compare(a.Key, b.Key) })
	return t
}

func TestRosterAgainstTheWholeTable(t *testing.T) {
	t.Parallel()
	own := Lease{Subnets: per("10.244.255.0/24", "fd00:10:244:ffff::/64"), Attrs: peer(1)}
	lingered, withheld, disputed := 0, 0, 0
	configs := []string{net4, net6, netTwo, net4, netTwo}
	for seed, config := range configs {
		c := mustConfig(t, config)
		r := newRand(t, uint64(900+seed))
		now, self := time.Unix(0, 0), own
		var roster Roster
		var naive naiveRoster
		acted := map[addr.Per[netip.Prefix]]*Lease{}
		table := Table{Revision: 1}
		for step := range 500 {
			now = now.Add(time.Duration(r.IntN(6)) * time.Second / 2)
			if r.IntN(4) > 0 {
				table = mutate(r, c, table)
			}
			switch r.IntN(100) {
			case 0:
				table.Entries = nil
			case 1:
				c = mustConfig(t, configs[r.IntN(len(configs))])
			case 2:
				self.Attrs = peer(1 + r.IntN(20))
			case 3:
				self.Subnets = per("10.244.224.0/20", "fd00:10:244:fff0::/60")
			}
			before := roster.Rejected()
			ch := roster.Update(table, c, self, now, 5*time.Second)
			rejected := naive.update(t, table, c, self, now, 5*time.Second)
			if got := roster.Rejected(); !slices.Equal(got, rejected) {
				t.Fatalf("%s, step %d: rejected\n%v, want\n%v", config, step, got, rejected)
			}
			// A lease that is written again as it was may be counted as another one.
			if !ch.Rejected && !slices.Equal(before, rejected) {
				t.Fatalf("%s, step %d: it does not say that others are rejected now", config, step)
			}
			for _, l := range ch.Gone {
				if acted[l.Subnets] != l {
					t.Fatalf("%s, step %d: %s is gone, but was not there like this", config, step, FormatKey(l.Subnets))
				}
				delete(acted, l.Subnets)
			}
			for _, l := range ch.Come {
				if acted[l.Subnets] != nil {
					t.Fatalf("%s, step %d: %s comes, but was there", config, step, FormatKey(l.Subnets))
				}
				acted[l.Subnets] = l
			}
			if err := sameLeases(roster.Peers(), naive.all, acted); err != nil {
				t.Fatalf("%s, step %d: %v", config, step, err)
			}
			if end := roster.Next(); !end.Equal(naive.next()) {
				t.Fatalf("%s, step %d: the next update is due at %v, want %v", config, step, end, naive.next())
			}
			withheld += len(naive.grown)
			lingered += len(naive.until)
			for _, x := range rejected {
				disputed += strings.Count(x.Reason, "which holds it") + strings.Count(x.Reason, "was written later")
			}
		}
		roster.Update(Table{}, c, self, now, 0)
		roster.Update(Table{}, c, self, now.Add(time.Hour), 0)
		x := &roster.index
		left := len(roster.candidates) + len(x.ips.first) + len(x.ips.more) + len(x.ends.first) + len(x.ends.more) +
			len(x.subnets.V4) + len(x.subnets.V6) + len(roster.rejected) + len(roster.young) +
			len(roster.leaving) + len(roster.peers)
		if left > 0 || slices.Max(append(slices.Concat(x.lengths.V4, x.lengths.V6), 0)) > 0 {
			t.Errorf("%s: of an empty table, it keeps\n%+v", config, roster)
		}
	}
	if lingered < 100 || withheld < 100 || disputed < 1000 {
		t.Errorf("%d lingered, %d were withheld, %d disputed: the test has lost its point", lingered, withheld, disputed)
	}
}

// Several Nodes may have one podCIDR, and so one key. What happens to one of them changes nothing of another: whatever
// came before, the peers are those of the table as a whole.
func TestRosterWithOneKeyTwice(t *testing.T) {
	t.Parallel()
	c, own := mustConfig(t, net4), Lease{Attrs: peer(1)}
	own.Subnets.V4 = netip.MustParsePrefix("10.244.255.0/24")
	const key = "10.244.2.0-24"
	node := func(i int) *Entry {
		e := leaseAt(key, peer(i), int64(i), 0)
		e.NodeName = fmt.Sprintf("node-%d", i)
		return e
	}
	moved := func(e *Entry) *Entry {
		next := *e
		next.PublicIP = peer(50).PublicIP
		return &next
	}
	unannounced := ParseEntry(key, nil, 9, 9, 0)
	unannounced.NodeName = "unannounced"
	b, d := node(2), node(3)
	b2, d2 := moved(b), moved(d)
	for name, tables := range map[string][][]*Entry{
		"one that announces nothing goes":     {{b, unannounced}, {b}},
		"one that announces nothing is first": {{unannounced, b}, {b}},
		"the first one moves":                 {{b, d}, {b2, d}, {b2}},
		"the second one moves":                {{b, d}, {b, d2}, {d2}},
		"the first one goes":                  {{b, d}, {d}},
		"both go":                             {{b, d}, {}},
	} {
		var r Roster
		now := time.Unix(0, 0)
		for _, entries := range tables {
			for range 2 { // the second time after all lingering
				now = now.Add(time.Minute)
				r.Update(Table{Entries: entries}, c, own, now, time.Second)
			}
			var names []string
			for _, p := range r.Peers() {
				names = append(names, fmt.Sprint(p.NodeName, " ", p.PublicIP.V4))
			}
			peers, rejected := Table{Entries: entries}.Peers(c, own)
			var want []string
			for _, p := range peers {
				want = append(want, fmt.Sprint(p.NodeName, " ", p.PublicIP.V4))
			}
			if !slices.Equal(names, want) || !slices.Equal(r.Rejected(), rejected) {
				t.Errorf("%s: %q, rejected %v; want %q, rejected %v", name, names, r.Rejected(), want, rejected)
			}
		}
	}
}

func sameLeases(got []*Lease, want []Lease, acted map[addr.Per[netip.Prefix]]*Lease) error {
	if len(got) != len(want) || len(acted) != len(want) {
		return fmt.Errorf("%d peers, %d by what came and went, want %d", len(got), len(acted), len(want))
	}
	for i := range want {
		if *got[i] != want[i] {
			return fmt.Errorf("peer %d is\n%+v, want\n%+v", i, *got[i], want[i])
		}
		if acted[got[i].Subnets] != got[i] {
			return fmt.Errorf("%s came and went otherwise", FormatKey(got[i].Subnets))
		}
	}
	return nil
}

// A lease that announces the address of another one takes it only when it has stood for a second. A holder that runs
// answers before that, and its peers never let go of it, not even for a moment.
func TestRosterWithholdsAChallenge(t *testing.T) {
	c, self := mustConfig(t, net4), Lease{Subnets: per("10.244.255.0/24"), Attrs: peer(1)}
	// Each write is at a time in milliseconds after the first table, and gives a node's lease node 2's address.
	type write struct{ at, node int }
	for _, tt := range []struct {
		name   string
		writes []write
		want   string // who is reached at the address, and since when
	}{
		{"not answered", []write{{-1, 2}, {5000, 3}}, "node-2 6000:node-3"},
		{"answered at once", []write{{-1, 2}, {5000, 3}, {5010, 2}}, "node-2"},
		{"answered at the last moment", []write{{-1, 2}, {5000, 3}, {5999, 2}}, "node-2"},
		{"answered too late", []write{{-1, 2}, {5000, 3}, {6010, 2}}, "node-2 6000:node-3 7010:node-2"},
		{"an answer too late, and that answered", []write{{-1, 2}, {5000, 3}, {6010, 2}, {6020, 3}}, "node-2 6000:node-3"},
		{"challenged when it had just joined", []write{{5000, 2}, {5010, 3}, {5020, 2}}, "5000:node-2"},
		{"not answered by one that had just joined", []write{{5000, 2}, {5010, 3}}, "5000:node-2 6010:node-3"},
		{"challenged twice", []write{{-1, 2}, {5000, 3}, {5010, 2}, {5500, 4}, {5510, 2}}, "node-2"},
		{"challenged in turns", []write{{-1, 2}, {5000, 3}, {5010, 2}, {5500, 3}, {5510, 2}}, "node-2"},
		{"two challenge, and are not answered", []write{{-1, 2}, {5000, 3}, {5500, 4}}, "node-2 6000:node-3 6500:node-4"},
		{"found in the first table", []write{{-2, 2}, {-1, 3}}, "node-3"},
	} {
		var r Roster
		var reached []string
		table := map[int]*Entry{}
		for ms := range 10_000 {
			now := time.Unix(0, 0).Add(time.Duration(ms) * time.Millisecond)
			changed := ms == 0 || !r.Next().IsZero() && !now.Before(r.Next())
			for i, w := range tt.writes {
				if max(w.at, 0) != ms {
					continue
				}
				a := with(peer(w.node), func(a *Attrs) { a.PublicIP = peer(2).PublicIP })
				key := fmt.Sprintf("10.244.%d.0-24", w.node)
				table[w.node], changed = ParseEntry(key, FormatValue(a), int64(10+i), int64(w.node), 7), true
			}
			if !changed {
				continue
			}
			es := slices.SortedFunc(maps.Values(table), func(a, b *Entry) int { return strings.Compare(a.Key, b.Key) })
			for _, l := range r.Update(Table{Entries: es}, c, self, now, 5*time.Second).Come {
				at := fmt.Sprintf("%d:%s", ms, l.NodeName)
				reached = append(reached, strings.TrimPrefix(at, "0:"))
			}
		}
		if got := strings.Join(reached, " "); got != tt.want {
			t.Errorf("%s: reached is %q, want %q", tt.name, got, tt.want)
		}
	}
}
