package subnet

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/overlayd/overlayd/addr"
)

// Roster is the list of peers to act on, while one table follows another. It accepts leases as Table.Peers does, and
// keeps peers for a while whose leases are gone. An update costs what changed in the table, for entries that did not
// change are the same pointers: only leases that have something in common with a changed one are judged again. The zero
// Roster is empty.
type Roster struct {
	judge
	known      bool // there was a table
	table      []*Entry
	candidates []*candidate             // of all nodes but this one, in the order of their keys
	index      leaseIndex               // of those that are not rejected by themselves
	rejected   map[*candidate]objection // and why
	young      map[*Entry]time.Time     // entries that may be a challenge, and until when: see age

	peers   []*Lease             // in the order of their subnets
	leaving map[*Lease]time.Time // those that linger, and until when
}

// challengeStands is how long a lease has to stand before it takes the address of another one. A node that runs and has
// the address answers within that time, so that no traffic is lost: see Contest.
const challengeStands = time.Second

// Change is what an update changed: Gone were among the peers and are not, or not like this; Come are new, or new like
// this.
type Change struct {
	Gone, Come []*Lease
	Rejected   bool // other leases are rejected than before, or for other reasons
}

// Peers lists them in the order of their subnets. The list is good until the next Update.
func (r *Roster) Peers() []*Lease { return r.peers }

// Rejected lists the leases that are not accepted, by key.
func (r *Roster) Rejected() (out []Rejection) {
	for c, why := range r.rejected {
		out = append(out, Rejection{Key: c.Key, Node: c.NodeName, Cause: why.cause, Reason: why.reason})
	}
	slices.SortFunc(out, func(a, b Rejection) int { return strings.Compare(a.Key, b.Key) })
	return out
}

// Lingering counts the peers whose leases are gone.
func (r *Roster) Lingering() int { return len(r.leaving) }

// Lingers reports whether a peer's lease is gone.
func (r *Roster) Lingers(l *Lease) bool { _, ok := r.leaving[l]; return ok }

// Next is when the next Update is due although the table stays the same; the zero time: never.
func (r *Roster) Next() (next time.Time) {
	sooner := func(t time.Time) {
		if next.IsZero() || t.Before(next) {
			next = t
		}
	}
	for _, until := range r.leaving {
		sooner(until)
	}
	for e, until := range r.young {
		if r.rejected[r.candidate(e)].young {
			sooner(until)
		}
	}
	return next
}

// Update takes the next table. A peer whose lease is newly missing lingers for the time given, unless that contradicts
// something: an accepted lease or this node has a part of its subnets or one of its addresses, or its node comes with
// another lease.
func (r *Roster) Update(t Table, c Config, self Lease, now time.Time, linger time.Duration) Change {
	gone, come := compareEntries(r.table, t.Entries)
	grown := r.age(gone, come, now)
	var ch Change
	until := now.Add(linger)
	if j := (judge{c, self}); !r.known || r.judge != j { // the same table means something else
		r.restart(j, len(t.Entries), until, &ch)
		gone, come = nil, t.Entries
	}
	r.known, r.table = true, t.Entries

	again := r.remove(gone, until, &ch)
	passed, met := r.add(come, &ch)
	again = append(again, met...)
	for _, e := range grown {
		if c := r.candidate(e); c != nil && c.lease != nil {
			again = append(again, c)
		}
	}
	r.decide(again, passed, until, &ch)
	r.release(now, &ch)
	slices.SortFunc(ch.Gone, bySubnets)
	slices.SortFunc(ch.Come, bySubnets)
	for _, l := range ch.Gone {
		i, _ := r.find(l)
		r.peers = slices.Delete(r.peers, i, i+1)
	}
	if len(r.peers) == 0 {
		r.peers = slices.Clone(ch.Come)
		return ch
	}
	for _, l := range ch.Come {
		i, _ := r.find(l)
		r.peers = slices.Insert(r.peers, i, l)
	}
	return ch
}

// restart forgets all candidates. Their peers linger, unless they are accepted again.
func (r *Roster) restart(j judge, n int, until time.Time, ch *Change) {
	ch.Rejected = len(r.rejected) > 0
	for _, c := range r.candidates {
		r.retract(c, until)
	}
	r.judge, r.index = j, newIndex(n)
	r.candidates, r.rejected = make([]*candidate, 0, n), map[*candidate]objection{}
}

// find is where the peer with the subnets of a lease is, or has to be.
func (r *Roster) find(l *Lease) (int, bool) { return search(r.peers, l, bySubnets) }

// candidate is the one of an entry; nil: it is passed over.
func (r *Roster) candidate(e *Entry) *candidate {
	if i, found := r.place(e); found {
		return r.candidates[i]
	}
	return nil
}

// place is where the candidate of an entry is. In Kubernetes, several Nodes may have one podCIDR, which is the key.
func (r *Roster) place(e *Entry) (int, bool) {
	i, _ := search(r.candidates, e.Key, byKey)
	for ; i < len(r.candidates) && r.candidates[i].Key == e.Key; i++ {
		if r.candidates[i].Entry == e {
			return i, true
		}
	}
	return i, false
}

func byKey(c *candidate, key string) int { return strings.Compare(c.Key, key) }

// age notes which entries are young, and lists those that no longer are. In the first table none is. Nor is one that
// takes the place of an accepted one with the same address: it is the holder's answer to a challenge, and had it to
// stand for a second as well, the challenge would come to age before it.
func (r *Roster) age(gone, come []*Entry, now time.Time) (grown []*Entry) {
	holds := map[string]addr.Per[netip.Addr]{}
	for _, e := range gone {
		if c := r.candidate(e); c != nil && c.accepted {
			holds[e.Key] = e.PublicIP
		}
		delete(r.young, e)
	}
	for e, until := range r.young {
		if !now.Before(until) {
			delete(r.young, e)
			grown = append(grown, e)
		}
	}
	if !r.known {
		return nil
	}
	if r.young == nil {
		r.young = map[*Entry]time.Time{}
	}
	for _, e := range come {
		if held, ok := holds[e.Key]; !ok || held != e.PublicIP {
			r.young[e] = now.Add(challengeStands)
		}
	}
	return grown
}

// remove forgets entries, and lists the leases that had something in common with theirs.
func (r *Roster) remove(gone []*Entry, until time.Time, ch *Change) (linked []*candidate) {
	var removed []*candidate
	for _, e := range gone {
		i, found := r.place(e)
		if !found {
			continue
		}
		c := r.candidates[i]
		r.candidates = slices.Delete(r.candidates, i, i+1)
		if _, rejected := r.rejected[c]; rejected {
			delete(r.rejected, c)
			ch.Rejected = true
		}
		if c.lease != nil {
			r.index.remove(c)
			r.retract(c, until)
			removed = append(removed, c)
		}
	}
	for _, c := range removed {
		linked = slices.AppendSeq(linked, r.index.linked(c))
	}
	return linked
}

// retract lets the peer of a lease linger, unless it is accepted again.
func (r *Roster) retract(c *candidate, until time.Time) {
	if !c.accepted {
		return
	}
	c.accepted = false
	if r.leaving == nil {
		r.leaving = map[*Lease]time.Time{}
	}
	r.leaving[c.lease] = until
}

// add judges new entries by themselves, and lists the leases that pass, and those of them that are linked to others.
func (r *Roster) add(come []*Entry, ch *Change) (passed, met []*candidate) {
	passed = make([]*candidate, 0, len(come))
	all := make([]candidate, len(come)) // one allocation: there are thousands at the start
	for i, e := range come {
		if e.passedOver(r.self) {
			continue
		}
		c := &all[i]
		c.Entry = e
		at, _ := search(r.candidates, e.Key, byKey)
		r.candidates = slices.Insert(r.candidates, at, c)
		lease, why := r.alone(e)
		if lease == nil {
			r.rejected[c], ch.Rejected = why, true
			continue
		}
		c.lease = lease
		passed = append(passed, c)
	}
	slices.SortFunc(passed, func(a, b *candidate) int { return bySubnets(a.lease, b.lease) })
	for _, c := range passed {
		if r.index.add(c) {
			met = append(met, c)
		}
	}
	return passed, met
}

// decide judges leases again, with all that these can make a difference to, and accepts new ones that are not among
// them.
func (r *Roster) decide(again, passed []*candidate, until time.Time, ch *Change) {
	all, disputed := r.index.related(again)
	rejected := r.settle(disputed)
	for _, c := range all {
		r.retract(c, until)
	}
	for _, c := range all {
		why, is := rejected[c]
		ch.Rejected = ch.Rejected || why != r.rejected[c]
		if is {
			r.rejected[c] = why
			continue
		}
		delete(r.rejected, c)
		r.accept(c, ch)
	}
	ch.Come = slices.Grow(ch.Come, len(passed))
	for _, c := range passed {
		if _, is := rejected[c]; !is && !c.accepted {
			r.accept(c, ch)
		}
	}
}

func (r *Roster) accept(c *candidate, ch *Change) {
	c.accepted = true
	if i, found := r.find(c.lease); found && *r.peers[i] == *c.lease { // this peer never left
		c.lease = r.peers[i]
		delete(r.leaving, c.lease)
	} else {
		ch.Come = append(ch.Come, c.lease)
	}
}

// release ends the lingering of those whose time is over, and of those that contradict what is accepted now.
func (r *Roster) release(now time.Time, ch *Change) {
	if len(r.leaving) == 0 {
		r.leaving = nil // a map keeps the size that it once had
		return
	}
	come, moved := newIndex(len(ch.Come)), map[string]bool{r.self.NodeID: true}
	for _, l := range ch.Come {
		come.add(&candidate{lease: l})
		moved[l.NodeID] = true
	}
	delete(moved, "") // flannel names no node
	for l, until := range r.leaving {
		_, why := r.fits(l) // the config may be another one
		if !now.Before(until) || moved[l.NodeID] || why != (objection{}) || come.meets(&candidate{lease: l}) {
			delete(r.leaving, l)
			ch.Gone = append(ch.Gone, l)
		}
	}
}

// settle decides between leases that have something in common, and gives those that are rejected. For a subnet or a
// MAC, a lease that this network hands out comes before a leftover of an older config, then the older one: the node
// that has it keeps it. An address may have moved to another node, and what was written last is closer to the truth;
// but young leases come behind the others, and behind those that are about to come to age before them.
func (r *Roster) settle(left []*candidate) map[*candidate]objection {
	if len(left) == 0 {
		return nil
	}
	rejected := make(map[*candidate]objection, len(left))
	young := func(c *candidate) bool { _, is := r.young[c.Entry]; return is }
	rank := func(c *candidate) int64 {
		if young(c) {
			return c.Revision
		}
		return -c.Revision
	}
	fits := func(c *candidate) int { return b2i(r.config.Fits(c.lease.Subnets)) }
	byAge := func(a, b *candidate) int { return cmp.Or(fits(b)-fits(a), a.compareAge(b.Entry)) }
	sift := func(object func(c, o *candidate) objection) {
		held := newIndex(len(left))
		left = slices.DeleteFunc(left, func(c *candidate) bool {
			for o := range held.linked(c) {
				if why := object(c, o); why != (objection{}) {
					rejected[c] = why
					return true
				}
			}
			held.add(c)
			return false
		})
	}
	slices.SortFunc(left, byAge)
	sift(func(c, o *candidate) objection {
		if c.lease.overlaps(o.lease) {
			return objectTo(CauseOverlap, "its subnet overlaps %s of %s, which holds it", o.Key, o.Name())
		}
		if e := c.lease.sharedEnd(o.lease); e != (tunnelEnd{}) {
			return objectTo(CauseVTEP, "its %s is that of %s, which holds it", e, o.Name())
		}
		return objection{}
	})
	slices.SortFunc(left, func(a, b *candidate) int {
		return cmp.Or(fits(b)-fits(a), cmp.Compare(rank(a), rank(b)), byAge(a, b))
	})
	sift(func(c, o *candidate) objection {
		ip := c.lease.sharedIP(o.lease)
		if young(c) {
			why := objectTo(CauseSharedIP, "its public IP %s is that of %s, which may still have it", ip, o.Name())
			why.young = true
			return why
		}
		return objectTo(CauseSharedIP, "its public IP %s is that of %s, whose lease %s was written later",
			ip, o.Name(), FormatKey(o.lease.Subnets))
	})
	return rejected
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
