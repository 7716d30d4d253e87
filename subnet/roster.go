package subnet

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/overlayd/overlayd/addr"
)

// Roster is the list of peers to act on while one table follows another. It believes whom Table.Peers believes, and keeps peers for
// a while whose leases are gone. A table costs what changed in it since the one before: entries that did not change are known by
// their pointers. The zero Roster has nobody.
type Roster struct {
	config Config
	self   Lease
	table  []*Entry // that was looked at last
	known  bool     // there was one

	believed circle
	beaten   []*Lease             // see verdict
	refused  map[string]Refusal   // by key
	leaving  map[*Lease]time.Time // those that linger, and when they have to go

	young    map[*Entry]time.Time // entries that were written a moment ago, and until when they count as such
	withheld time.Time            // when a lease is no longer too young to take another one's address; zero: none is
}

// challengeStands is how long a lease has to stand before it takes the address of another one. A node that runs and has
// the address answers within that time, so that nothing of its traffic is lost: see Contest.
const challengeStands = time.Second

// Change is what a table changed: Gone are those who were in the list and are not, or not like this; Come are new, or new like this.
type Change struct {
	Gone, Come []*Lease
	Refused    bool // who is refused, or why, is another than before
}

// Peers lists them in the order of their subnets. The list is good until the next Update.
func (r *Roster) Peers() []*Lease {
	if len(r.leaving) == 0 {
		return r.believed.leases
	}
	all := slices.AppendSeq(slices.Clone(r.believed.leases), maps.Keys(r.leaving))
	slices.SortFunc(all, bySubnets)
	return all
}

// Refused lists those whose leases are not believed, by key.
func (r *Roster) Refused() []Refusal {
	return slices.SortedFunc(maps.Values(r.refused), func(a, b Refusal) int { return strings.Compare(a.Key, b.Key) })
}

// Lingering counts those whose leases are gone.
func (r *Roster) Lingering() int { return len(r.leaving) }

// Lingers tells whether a peer's lease is gone.
func (r *Roster) Lingers(l *Lease) bool { _, ok := r.leaving[l]; return ok }

// Next is when the next Update is due although the table stays the same; the zero time: never.
func (r *Roster) Next() time.Time {
	first := r.withheld
	for _, t := range r.leaving {
		if first.IsZero() || t.Before(first) {
			first = t
		}
	}
	return first
}

// Update takes the next table. A peer that is newly missing lingers for the time given, unless something contradicts it: somebody
// else, this node included, has a part of its subnets or one of its addresses, or its node has another lease.
func (r *Roster) Update(t Table, c Config, self Lease, now time.Time, linger time.Duration) Change {
	same := r.known && r.config == c && r.self == self && (r.withheld.IsZero() || now.Before(r.withheld))
	r.age(t, now)
	r.config, r.self = c, self
	var gone, come []*Lease
	var refused bool
	ok := false
	if same {
		gone, come, refused, ok = r.follow(t)
	}
	if !ok {
		gone, come, refused = r.anew(t)
	}
	r.known, r.table = true, t.Entries
	ch := r.linger(gone, come, now, linger)
	ch.Refused = refused
	return ch
}

// age takes note of the entries that are new, and forgets those that no longer are. Of the first table none is.
func (r *Roster) age(t Table, now time.Time) {
	maps.DeleteFunc(r.young, func(_ *Entry, until time.Time) bool { return !now.Before(until) })
	if !r.known {
		return
	}
	gone, come := compareEntries(r.table, t.Entries)
	for _, e := range gone {
		delete(r.young, e)
	}
	if len(come) > 0 && r.young == nil {
		r.young = map[*Entry]time.Time{}
	}
	for _, e := range come {
		r.young[e] = now.Add(challengeStands)
	}
}

// anew judges a whole table.
func (r *Roster) anew(t Table) (gone, come []*Lease, refused bool) {
	v := t.judge(r.config, r.self, r.young)
	r.withheld = time.Time{}
	for _, e := range v.withheld {
		if until := r.young[e]; r.withheld.IsZero() || until.Before(r.withheld) {
			r.withheld = until
		}
	}
	refused = len(v.refused) != len(r.refused) || slices.ContainsFunc(v.refused, func(x Refusal) bool { return r.refused[x.Key] != x })
	gone, come = compareLeases(r.believed.leases, v.believed)
	r.believed, r.beaten, r.refused = newCircle(v.believed), v.beaten, make(map[string]Refusal, len(v.refused))
	for _, x := range v.refused {
		r.refused[x.Key] = x
	}
	return gone, come, refused
}

// follow judges only what changed since the last table. It can do so as long as nothing that changed has to do with a dispute: who
// is in nobody's way comes and goes without a difference to anybody else. Not ok: the table has to be judged anew.
func (r *Roster) follow(t Table) (gone, come []*Lease, changed, ok bool) {
	left, new := compareEntries(r.table, t.Entries)
	gone, ok = r.departed(left)
	if !ok {
		return nil, nil, false, false
	}
	r.believed.remove(gone)
	come, refused, ok := r.arrived(new)
	if !ok {
		r.believed.insert(gone)
		return nil, nil, false, false
	}
	r.believed.insert(come)
	before := len(r.refused)
	for _, e := range left {
		delete(r.refused, e.Key)
	}
	changed = len(r.refused) != before || len(refused) > 0
	for _, x := range refused {
		r.refused[x.Key] = x
	}
	return gone, come, changed, true
}

// sift looks at entries by themselves: which of their leases make sense, and which are refused. Those that are no peers are in neither.
func (r *Roster) sift(es []*Entry) (sound []*Lease, refused []Refusal) {
	j := judge{config: r.config, self: r.self}
	for _, e := range es {
		if e.passedOver(r.self) {
			continue
		}
		if l, o := j.alone(e); o.is() {
			refused = append(refused, e.refusal(o))
		} else {
			sound = append(sound, l)
		}
	}
	return sound, refused
}

// departed finds which of those believed these entries are.
func (r *Roster) departed(es []*Entry) (gone []*Lease, ok bool) {
	sound, _ := r.sift(es)
	for _, l := range sound {
		l = r.believed.find(l.Subnets)
		if l == nil || r.disputed(l) {
			return nil, false
		}
		gone = append(gone, l)
	}
	slices.SortFunc(gone, bySubnets)
	return gone, true
}

// arrived judges new entries. They are in nobody's way, not even in each other's, or it is not ok.
func (r *Roster) arrived(es []*Entry) (come []*Lease, refused []Refusal, ok bool) {
	come, refused = r.sift(es)
	for _, l := range come {
		if r.believed.meets(l) || r.disputed(l) {
			return nil, nil, false
		}
	}
	if len(come) > 1 {
		among := newCircle(nil)
		for _, l := range come {
			if among.meets(l) {
				return nil, nil, false
			}
			among.insert([]*Lease{l})
		}
		come = among.leases
	}
	return come, refused, true
}

// disputed reports whether a lease has to do with one that was refused for another one's sake.
func (r *Roster) disputed(l *Lease) bool { return slices.ContainsFunc(r.beaten, l.contradicts) }

// linger sorts out who of those gone may stay for a while, and who of those that stayed has to go.
func (r *Roster) linger(gone, come []*Lease, now time.Time, linger time.Duration) Change {
	ch := Change{Come: come}
	if len(gone) == 0 && len(r.leaving) == 0 {
		return ch
	}
	moved := r.moved(gone, come)
	leaving, returned := map[*Lease]time.Time{}, map[*Lease]bool{}
	sort := func(l *Lease, until time.Time) {
		back := r.believed.find(l.Subnets)
		switch {
		case back != nil && *back == *l: // it never left
			returned[back] = true
			r.believed.swap(back, l)
		case back != nil || moved[l.NodeID] || !now.Before(until) || r.contradicted(l):
			ch.Gone = append(ch.Gone, l)
		default:
			leaving[l] = until
		}
	}
	for l, until := range r.leaving {
		sort(l, until)
	}
	for _, l := range gone {
		sort(l, now.Add(linger))
	}
	r.leaving = leaving
	slices.SortFunc(ch.Gone, bySubnets)
	ch.Come = slices.DeleteFunc(come, func(l *Lease) bool { return returned[l] })
	return ch
}

// moved are the IDs of nodes that have another lease than one that is gone, or that lingers.
func (r *Roster) moved(gone, come []*Lease) map[string]bool {
	left := map[string]bool{}
	for _, l := range gone {
		if l.NodeID != "" {
			left[l.NodeID] = true
		}
	}
	moved := map[string]bool{}
	if len(left) > 0 {
		for _, l := range r.believed.leases {
			if left[l.NodeID] {
				moved[l.NodeID] = true
			}
		}
	}
	for _, l := range come {
		if l.NodeID != "" {
			moved[l.NodeID] = true
		}
	}
	if r.self.NodeID != "" {
		moved[r.self.NodeID] = true
	}
	return moved
}

// contradicted reports whether a lease that is gone can't be acted on any more: the config may be another one now.
func (r *Roster) contradicted(l *Lease) bool {
	j := judge{config: r.config, self: r.self}
	_, o := j.alone(&Entry{Lease: *l})
	return o.is() || r.believed.meets(l)
}

// compareLeases finds what is in one list only. Where both have an equal lease, the new list gets the old pointer.
func compareLeases(before, now []*Lease) (gone, come []*Lease) {
	for i := 0; len(before) > 0 || i < len(now); {
		c := 0
		switch {
		case len(before) == 0:
			c = 1
		case i == len(now):
			c = -1
		default:
			c = bySubnets(before[0], now[i])
		}
		if c == 0 && *before[0] == *now[i] {
			now[i] = before[0]
			before, i = before[1:], i+1
			continue
		}
		if c <= 0 {
			gone, before = append(gone, before[0]), before[1:]
		}
		if c >= 0 {
			come, i = append(come, now[i]), i+1
		}
	}
	return gone, come
}

// compareEntries finds what is in one list only, by pointer. Both are in the order of the keys.
func compareEntries(before, now []*Entry) (gone, come []*Entry) {
	for len(before) > 0 && len(now) > 0 {
		if before[0] == now[0] {
			before, now = before[1:], now[1:]
			continue
		}
		c := strings.Compare(before[0].Key, now[0].Key)
		if c <= 0 {
			gone, before = append(gone, before[0]), before[1:]
		}
		if c >= 0 {
			come, now = append(come, now[0]), now[1:]
		}
	}
	return append(gone, before...), append(come, now...)
}

func bySubnets(a, b *Lease) int { return CompareSubnets(a.Subnets, b.Subnets) }

// contradicts reports whether two leases can't both be acted on: they have a part of a subnet, an address or a MAC in common.
func (l *Lease) contradicts(o *Lease) bool {
	for _, f := range addr.Families() {
		if !l.Subnets.Get(f).IsValid() {
			continue
		}
		if overlap(l.Subnets.Get(f), o.Subnets.Get(f)) {
			return true
		}
		ip, mac := l.PublicIP.Get(f), l.VTEP.Get(f).MAC
		for _, g := range addr.Families() {
			if o.Subnets.Get(g).IsValid() && (ip == o.PublicIP.Get(g) || !mac.IsZero() && mac == o.VTEP.Get(g).MAC) {
				return true
			}
		}
	}
	return false
}

// circle is a set of leases of which no two contradict each other.
type circle struct {
	leases []*Lease           // in the order of their subnets
	by     addr.Per[[]*Lease] // those with a subnet of the family, in its order
	ips    map[netip.Addr]bool
	macs   map[addr.MAC]bool
}

func newCircle(leases []*Lease) circle {
	c := circle{ips: make(map[netip.Addr]bool, len(leases)), macs: make(map[addr.MAC]bool, len(leases))}
	c.insert(leases)
	return c
}

// inFamily gives the order of leases by one family's subnet.
func inFamily(f addr.Family) func(a, b *Lease) int {
	return func(a, b *Lease) int { return addr.ComparePrefix(a.Subnets.Get(f), b.Subnets.Get(f)) }
}

func (c *circle) insert(leases []*Lease) {
	c.leases = insertSorted(c.leases, leases, bySubnets)
	for _, f := range addr.Families() {
		var of []*Lease
		for _, l := range leases {
			if l.Subnets.Get(f).IsValid() {
				of = append(of, l)
				c.ips[l.PublicIP.Get(f)] = true
				c.macs[l.VTEP.Get(f).MAC] = true
			}
		}
		c.by.Set(f, insertSorted(c.by.Get(f), of, inFamily(f)))
	}
}

func (c *circle) remove(leases []*Lease) {
	c.leases = removeSorted(c.leases, leases, bySubnets)
	for _, f := range addr.Families() {
		var of []*Lease
		for _, l := range leases {
			if l.Subnets.Get(f).IsValid() {
				of = append(of, l)
				delete(c.ips, l.PublicIP.Get(f))
				delete(c.macs, l.VTEP.Get(f).MAC)
			}
		}
		c.by.Set(f, removeSorted(c.by.Get(f), of, inFamily(f)))
	}
}

// few is up to how many changes to a list are made one by one.
const few = 16

func insertSorted(list, more []*Lease, order func(a, b *Lease) int) []*Lease {
	if len(more) > few {
		list = append(list, more...)
		slices.SortFunc(list, order)
		return list
	}
	for _, l := range more {
		i, _ := slices.BinarySearchFunc(list, l, order)
		list = slices.Insert(list, i, l)
	}
	return list
}

func removeSorted(list, less []*Lease, order func(a, b *Lease) int) []*Lease {
	if len(less) > few {
		out := make(map[*Lease]bool, len(less))
		for _, l := range less {
			out[l] = true
		}
		return slices.DeleteFunc(list, func(l *Lease) bool { return out[l] })
	}
	for _, l := range less {
		if i, ok := slices.BinarySearchFunc(list, l, order); ok {
			list = slices.Delete(list, i, i+1)
		}
	}
	return list
}

// find gives the lease of these subnets, nil where there is none.
func (c *circle) find(subnets addr.Per[netip.Prefix]) *Lease {
	if i, ok := slices.BinarySearchFunc(c.leases, subnets, func(l *Lease, s addr.Per[netip.Prefix]) int { return CompareSubnets(l.Subnets, s) }); ok {
		return c.leases[i]
	}
	return nil
}

// swap puts an equal lease in the place of another.
func (c *circle) swap(old, equal *Lease) {
	put := func(list []*Lease, order func(a, b *Lease) int) {
		if i, ok := slices.BinarySearchFunc(list, old, order); ok {
			list[i] = equal
		}
	}
	put(c.leases, bySubnets)
	for _, f := range addr.Families() {
		put(c.by.Get(f), inFamily(f))
	}
}

// meets reports whether one of the set contradicts a lease.
func (c *circle) meets(l *Lease) bool {
	for _, f := range addr.Families() {
		sn, mac := l.Subnets.Get(f), l.VTEP.Get(f).MAC
		if !sn.IsValid() {
			continue
		}
		if c.ips[l.PublicIP.Get(f)] || !mac.IsZero() && c.macs[mac] {
			return true
		}
		// Being disjoint, the only ones that may overlap it are those beside it.
		list := c.by.Get(f)
		i, _ := slices.BinarySearchFunc(list, l, inFamily(f))
		for _, o := range list[max(i-1, 0):min(i+1, len(list))] {
			if o.Subnets.Get(f).Overlaps(sn) {
				return true
			}
		}
	}
	return false
}
