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
	born  map[*Entry]time.Time // of all in the table; the zero time for those of the first one
}

func (n *naiveRoster) update(t Table, c Config, self Lease, now time.Time, linger time.Duration) []Refusal {
	born, young := map[*Entry]time.Time{}, map[*Entry]time.Time{}
	for _, e := range t.Entries {
		at, known := n.born[e]
		if !known && n.born != nil {
			at = now
		}
		if born[e] = at; now.Before(at.Add(challengeStands)) {
			young[e] = at
		}
	}
	n.born = born
	v := t.judge(c, self, young)
	peers, refused := v.believed, v.refused
	var believed []Lease
	for _, p := range peers {
		believed = append(believed, *p)
	}
	until := map[addr.Per[netip.Prefix]]time.Time{}
	all := slices.Clone(believed)
	for _, l := range n.all {
		end, known := n.until[l.Subnets]
		if !known {
			end = now.Add(linger)
		}
		if now.Before(end) && n.mayStay(l, believed, c, self) {
			all, until[l.Subnets] = append(all, l), end
		}
	}
	slices.SortFunc(all, func(a, b Lease) int { return CompareSubnets(a.Subnets, b.Subnets) })
	n.all, n.until = all, until
	return refused
}

func (n *naiveRoster) mayStay(l Lease, believed []Lease, c Config, self Lease) bool {
	if _, reason := (&judge{config: c, self: self}).alone(&Entry{Lease: l}); reason.is() {
		return false
	}
	for _, o := range append(slices.Clone(believed), self) {
		if o.Subnets == l.Subnets || l.NodeID != "" && o.NodeID == l.NodeID || l.contradicts(&o) {
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
	self := Lease{Subnets: per("10.244.255.0/24", "fd00:10:244:ffff::/64"), Attrs: peer(1)}
	lingered, followed, withheld := 0, 0, 0
	for seed, config := range []string{net4, net6, netTwo, net4, netTwo} {
		c := mustConfig(t, config)
		r := newRand(t, uint64(900+seed))
		now := time.Unix(0, 0)
		var roster Roster
		var naive naiveRoster
		acted := map[addr.Per[netip.Prefix]]*Lease{}
		table := Table{Revision: 1}
		for step := range 400 {
			now = now.Add(time.Duration(r.IntN(6)) * time.Second / 2)
			if r.IntN(4) > 0 {
				table = mutate(r, c, table)
			}
			if r.IntN(100) == 0 {
				table.Entries = nil
			}
			before := roster.Refused()
			ch := roster.Update(table, c, self, now, 5*time.Second)
			refused := naive.update(table, c, self, now, 5*time.Second)
			if got := roster.Refused(); !slices.Equal(got, refused) {
				t.Fatalf("%s, step %d: refused\n%v, want\n%v", config, step, got, refused)
			}
			if ch.Refused != !slices.Equal(before, refused) {
				// Who is written again as he was may be counted as another one.
				if !ch.Refused {
					t.Fatalf("%s, step %d: it does not say that others are refused now", config, step)
				}
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
			if end := roster.Next(); end.IsZero() != (len(naive.until) == 0 && roster.withheld.IsZero()) {
				t.Fatalf("%s, step %d: the next has to go at %v, %d linger", config, step, end, len(naive.until))
			}
			if !roster.withheld.IsZero() {
				withheld++
			}
			lingered += len(naive.until)
			if len(roster.beaten) == 0 {
				followed++
			}
		}
	}
	if lingered < 100 || followed < 100 || withheld < 100 {
		t.Errorf("%d lingered, %d were withheld, in %d steps there was no dispute: the test has lost its point",
			lingered, withheld, followed)
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

// A lease that announces the address of another one takes it only when it has stood for a moment: a holder that runs
// answers before that, and its peers never let go of it.
func TestRosterWithholdsAChallenge(t *testing.T) {
	c, self := mustConfig(t, net4), Lease{Subnets: per("10.244.255.0/24"), Attrs: peer(1)}
	holder, challenger := peer(2), with(peer(3), func(a *Attrs) { a.PublicIP = peer(2).PublicIP })
	at := func(key string, a Attrs, revision int64) *Entry {
		return ParseEntry(key, FormatValue(a), revision, 2, 7)
	}
	first := at("10.244.2.0-24", holder, 2)
	challenge := at("10.244.3.0-24", challenger, 5)
	now := time.Unix(0, 0)
	peers := func(r *Roster, es ...*Entry) string {
		r.Update(Table{Entries: es}, c, self, now, 5*time.Second)
		var out []string
		for _, l := range r.Peers() {
			out = append(out, l.NodeName)
		}
		return strings.Join(out, " ")
	}
	for _, answers := range []bool{true, false} {
		var r Roster
		now = now.Add(time.Hour)
		steps := []string{peers(&r, first), peers(&r, first, challenge)}
		if due := r.Next(); !due.Equal(now.Add(challengeStands)) {
			t.Errorf("looks again at %v, it is %v", due, now)
		}
		last, want := first, "node-2 node-2 node-3"
		if answers {
			last, want = at("10.244.2.0-24", holder, 6), "node-2 node-2 node-2"
		}
		now = now.Add(challengeStands / 2)
		peers(&r, last, challenge)
		now = now.Add(challengeStands)
		peers(&r, last, challenge)
		now = now.Add(challengeStands)
		if steps = append(steps, peers(&r, last, challenge)); strings.Join(steps, " ") != want {
			t.Errorf("answered: %t: the peers are %q, want %q", answers, steps, want)
		}
		if refused := r.Refused(); len(refused) != 1 || !strings.Contains(refused[0].Reason, "was written later") {
			t.Errorf("refused %v", refused)
		}
	}
}
