package etcd

import (
	"errors"
	"net/netip"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
)

// claimState is what this node wants its lease to be, and how far it is. What it holds is in the snapshot.
type claimState struct {
	desired *subnet.Claim          // nil: nothing yet
	decided subnet.Claim           // the one that the last decision is about
	key     string                 // of the lease that is held
	leaseID int64                  // the etcd lease that the key is attached to
	before  addr.Per[netip.Prefix] // the subnets held last, to come back to

	attempt int   // races lost in a row
	wrote   int64 // the revision of the last write
	spare   grant // an etcd lease that no key is attached to yet
	revoke  int64 // one that is no longer needed
	renewed int64 // the etcd lease that renewals are scheduled for

	dispute dispute
	contest subnet.Contest
}

// grant is an etcd lease that was granted to this node.
type grant struct {
	id      int64
	expires time.Time
	unsure  bool // a write failed that may yet attach a key to it
}

// setClaim reports whether this node's public IP has changed.
func (s *state) setClaim(c subnet.Claim, now time.Time) (moved bool) {
	if s.claim.desired == nil {
		s.free = now // until now it was not the store that took its time
	} else {
		moved = s.claim.desired.PublicIP != c.PublicIP
	}
	s.claim.desired = &c
	s.write.again(now)
	return moved
}

// decide finds out what there is to write. It is asked whenever the table or the claim has changed.
func (s *state) decide(now time.Time) []request {
	c, table := &s.claim, s.view.table()
	// Before the claim: what a node claims may depend on the config.
	if errors.Is(table.ConfigErr, subnet.ErrNoConfig) && s.opts.InitConfig != nil {
		return s.startWrite(write{table: table})
	}
	if c.desired == nil {
		return nil
	}
	c.decided = *c.desired
	desired := s.remembering(c.decided)
	d, err := subnet.Decide(table.Reserving(s.snap.Endpoints), desired, c.attempt)
	if err != nil {
		s.rejected(err, now)
		return nil
	}
	contested := c.contest.Judge(&d, now)
	lost := contested != nil && contested.Refused
	if e := table.Find(d.Key); lost && e != nil { // it stays as it is
		d.Lease = e.Lease
	}
	if lost || !d.Write {
		s.hold(d, contested)
		if again := c.contest.Next(now); again >= 0 {
			s.write.due = now.Add(again)
		}
		return nil
	}
	switch conflict, leave := c.dispute.judge(table, desired, d, c, now); {
	case leave:
		s.log.Warn("another machine with this node's ID took back the persisted lease", zap.String("key", d.Key))
		c.dispute.left, c.before = d.Lease.Subnets, addr.Per[netip.Prefix]{}
		return s.decide(now)
	case conflict != nil:
		s.rejected(conflict, now)
		return nil
	}
	return s.startWrite(write{table: table, Decision: d})
}

// remembering adds the subnets held last to a claim. They are what this node remembers, whatever its caller does: a key
// that was lost comes back with the same ones.
func (s *state) remembering(c subnet.Claim) subnet.Claim {
	none := addr.Per[netip.Prefix]{}
	if s.claim.before != none {
		c.Remembered = s.claim.before
	}
	if c.Remembered == s.claim.dispute.left {
		c.Remembered, c.Keep = none, false
	}
	return c
}

func (s *state) startWrite(w write) []request {
	s.write.busy, w.spare = true, s.claim.spare
	return []request{writeRequest(w)}
}

// wrote takes the answer to a write.
func (s *state) wrote(w write, now time.Time) {
	c := &s.claim
	s.write.busy, s.write.err, c.spare = false, nil, w.spare
	switch {
	case w.err != nil:
		s.writeFailed(w.err, now)
		return
	case !w.resp.Succeeded:
		s.raceLost(w, now)
		return
	}
	revision := w.resp.Header.GetRevision()
	if revision <= w.table.Revision { // a write makes a new revision: this is not the store that the table is of
		s.verify(now)
	}
	c.attempt, s.write.failures = 0, 0
	s.write.again(now) // is it contested? The watch tells of nothing new if the answer to that came first
	if w.Key == "" {
		s.log.Info("wrote the initial network config", zap.String("key", s.keys.config))
		s.relist(now)
		return
	}
	put := &mvccpb.KeyValue{
		Key: []byte(s.keys.subnets + w.Key), Value: subnet.FormatValue(w.Lease.Attrs), Lease: w.LeaseID,
		ModRevision: revision, CreateRevision: revision,
	}
	if e := s.view.table().Find(w.Key); e != nil {
		put.CreateRevision = e.Created
	}
	s.view.wrote(put, w.Drop, revision)
	c.wrote = revision
	c.contest.Wrote(w.Decision, now)
	s.log.Info("lease written",
		zap.String("key", w.Key), zap.Int64("revision", revision), zap.Int("deleted", len(w.Drop)))
	s.hold(w.Decision, nil)
}

// writeFailed tries again later. Where the store was reached, it is the claim that it rejects.
func (s *state) writeFailed(err error, now time.Time) {
	switch {
	case unreachable(err):
		s.write.err = err
	case !errors.Is(err, rpctypes.ErrLeaseNotFound): // no permission, no space, ...
		s.outcome(err)
	}
	s.verify(now)
	s.retry(&s.write, now)
}

// raceLost takes in what the transaction found instead of what it was decided by. If it found nothing, a key was
// deleted: the watch will tell, well before the next try; and if it doesn't, the view is not of this store.
func (s *state) raceLost(w write, now time.Time) {
	c := &s.claim
	var found []*mvccpb.KeyValue
	for _, r := range w.resp.Responses {
		found = append(found, r.GetResponseRange().GetKvs()...)
	}
	revision := w.resp.Header.GetRevision()
	if len(found) > 0 {
		if w.Key != "" { // who wrote the config took no subnet: the first choice is as good as before
			c.attempt++
		}
		s.write.again(now.Add(raceDelay(c.attempt, s.random())))
		s.changed = s.view.merge(found, revision) || s.changed
		return
	}
	s.retry(&s.write, now)
	if !s.watch.busy {
		s.watchFrom = now
	}
	if revision < w.table.Revision || s.write.failures > 3 {
		s.verify(now)
	}
}

// hold says that the store says what was claimed, and whether another node's lease says the same of it.
func (s *state) hold(d subnet.Decision, contested *subnet.ConflictError) {
	c := &s.claim
	expires := time.Time{}
	switch d.LeaseID {
	case 0:
	case c.spare.id: // even if the answer to that write was lost
		expires, c.spare = c.spare.expires, grant{}
	case c.leaseID:
		expires = s.snap.Expires
	}
	s.revokeSpare()
	c.attempt, s.write.failures, s.write.err = 0, 0, nil
	if s.snap.Lease != d.Lease || s.snap.Expires != expires {
		s.changed = true
	}
	c.key, c.leaseID, c.before = d.Key, d.LeaseID, d.Lease.Subnets
	s.snap.Lease, s.snap.Expires = d.Lease, expires
	var err error
	if contested != nil {
		err = contested
	}
	s.outcome(err)
}

// rejected says why the store can't say what was claimed. That may pass, so it is tried again.
func (s *state) rejected(err error, now time.Time) {
	s.revokeSpare()
	s.claim.attempt, s.write.failures, s.write.err = 0, 0, nil
	s.outcome(err)
	s.write.again(now.Add(around(claimAgain, s.random())))
}

// revokeSpare gives back the etcd lease of a lost race once the claim needs none: or each start would leave one in the
// store for a day. One that a key may be attached to expires by itself: to revoke it would delete the key.
func (s *state) revokeSpare() {
	if c := &s.claim; c.spare.id != 0 && !c.spare.unsure {
		c.revoke, c.spare = c.spare.id, grant{}
	}
}

// outcome says what came of the claim: nil if the store says what was claimed.
func (s *state) outcome(err error) {
	if text(s.snap.ClaimErr) != text(err) || s.snap.Claimed != s.claim.decided {
		s.changed = true
	}
	s.snap.Claimed, s.snap.ClaimErr = s.claim.decided, err
}

// checkHeld compares what is held with the table.
func (s *state) checkHeld(now time.Time) {
	c := &s.claim
	if c.key == "" {
		return
	}
	e := s.view.table().Find(c.key)
	if e == nil || e.Identity != s.snap.Lease.Identity {
		s.log.Warn("subnet lease disappeared from etcd", zap.String("key", c.key))
		c.key, c.leaseID = "", 0
		s.snap.Lease, s.snap.Expires = subnet.Lease{}, time.Time{}
		s.snap.Losses, s.snap.LostAt = s.snap.Losses+1, now
		return
	}
	if e.LeaseID != c.leaseID {
		c.leaseID, s.snap.Expires = e.LeaseID, time.Time{}
	}
	s.snap.Lease = e.Lease
}

// keep renews the etcd lease that this node's key is attached to. It needs no table: it goes on while the watch is
// broken.
func (s *state) keep(now time.Time) []request {
	c, r := &s.claim, &s.renew
	if c.leaseID != c.renewed {
		c.renewed, r.failures, r.err = c.leaseID, 0, nil
		r.due = firstRenewal(s.snap.Expires, s.opts.LeaseTTL, now, s.random())
	}
	if c.renewed == 0 || r.busy || !s.due(r.due, now) {
		return nil
	}
	r.busy, r.due = true, time.Time{}
	return []request{renewRequest(c.renewed)}
}

// renewedLease takes the answer to a renewal that was sent at a time.
func (s *state) renewedLease(id int64, ttl time.Duration, sent time.Time, err error, now time.Time) {
	r := &s.renew
	r.busy = false
	if id != s.claim.renewed {
		return
	}
	r.err = err
	if err != nil {
		if errors.Is(err, rpctypes.ErrLeaseNotFound) {
			r.err = nil
			s.log.Warn("etcd lease expired or was revoked; recreating the key attached to it", zap.Int64("lease", id))
		}
		s.verify(now)
		s.retry(r, now)
		return
	}
	r.failures = 0
	r.again(now.Add(renewal(ttl, s.random())))
	s.snap.Expires, s.changed = sent.Add(ttl), true
}

// guards are the conditions of a decision's transaction. A range compare holds if it holds for every key of the range,
// and for an empty range as if there were one key with all revisions 0 (etcd: applyCompare in server/etcdserver/txn).
func (k keys) guards(t subnet.Table, d subnet.Decision) []clientv3.Cmp {
	if d.Key == "" { // the initial config
		return []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(k.config), "=", 0)}
	}
	cmps := []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(k.config), "=", t.ConfigRevision)}
	if d.Expect != 0 {
		cmps = append(cmps, clientv3.Compare(clientv3.ModRevision(k.subnets+d.Key), "=", d.Expect))
	} else {
		cmps = append(cmps,
			clientv3.Compare(clientv3.CreateRevision(k.subnets+d.Key), "=", 0),
			clientv3.Compare(clientv3.ModRevision(k.subnets+d.Unchanged), "<", t.Revision+1).WithPrefix())
		if dualStack(d) && d.Unchanged != "" {
			cmps = append(cmps, clientv3.Compare(clientv3.ModRevision(k.unpaired), "<", t.Revision+1))
		}
	}
	for _, e := range d.Drop {
		cmps = append(cmps, clientv3.Compare(clientv3.ModRevision(k.subnets+e.Key), "=", e.Revision))
	}
	return cmps
}

// writes are what a decision's transaction does. A key without an etcd lease is a reservation, and stays one.
func (k keys) writes(d subnet.Decision, value []byte) []clientv3.Op {
	if d.Key == "" {
		return []clientv3.Op{clientv3.OpPut(k.config, string(value))}
	}
	lease := clientv3.WithLease(clientv3.LeaseID(d.LeaseID))
	ops := []clientv3.Op{clientv3.OpPut(k.subnets+d.Key, string(value), lease)}
	if d.Expect == 0 && dualStack(d) && d.Unchanged == "" {
		ops = append(ops, clientv3.OpPut(k.unpaired, d.Key))
	}
	for _, e := range d.Drop {
		ops = append(ops, clientv3.OpDelete(k.subnets+e.Key))
	}
	return ops
}

func dualStack(d subnet.Decision) bool { return strings.Contains(d.Key, "&") }
