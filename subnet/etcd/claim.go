package etcd

import (
	"context"
	"errors"
	"fmt"
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

const forever = time.Duration(-1)

// claimer makes the claim good. What it knows besides the shared state is only of use while it tries.
type claimer struct {
	*Manager
	attempt  int   // races lost in a row
	failures int   // other failures in a row
	spare    grant // an etcd lease that no key hangs on yet
	dispute  dispute
	contest  subnet.Contest
}

// dispute is what a node remembers while another machine with its ID writes over its lease: a clone, with or without
// another name.
type dispute struct {
	wrote int64     // the revision of our own last write
	since time.Time // when it was last put right after another machine had written over it
	by    string    // the name of that machine
	until time.Time // when to put it right again, where that came to nothing
	// took is when this node wrote over the lease of a machine with its ID and another name, since it remembers that
	// lease: it has been given a new name and a new address, or it is the clone.
	took time.Time
	// left are the subnets that it has left to that machine.
	left addr.Per[netip.Prefix]
}

const (
	// disputeFor is how long the memory of it lasts: once in this time the lease is written again, since it may have been
	// a mistake.
	disputeFor = time.Minute
	// takenBackWithin is how soon a machine that runs takes its lease back.
	takenBackWithin = 10 * time.Second
	// answeredAtOnce is how soon it does so again and again. A machine that is started again, or one more copy of it,
	// needs longer.
	answeredAtOnce = 500 * time.Millisecond
)

// disputed reports whether a decision would be one more turn in a fight that neither can win. held says that the lease
// was this node's since it started. Where it is the other machine that had the lease first, leave says so.
func (d *dispute) disputed(
	t subnet.Table, c subnet.Claim, dec subnet.Decision, held bool, now time.Time,
) (conflict *subnet.ConflictError, leave bool) {
	e := t.Find(dec.Key)
	if e == nil || e.NodeID != c.NodeID || e.Identity == c.Identity && e.PublicIP == c.PublicIP {
		return nil, false
	}
	renamed := e.NodeName != c.NodeName
	switch {
	case renamed && !held:
		d.took = now
		return nil, false
	case renamed && now.Sub(d.took) < takenBackWithin:
		return nil, true
	case !renamed && (d.wrote == 0 || dec.Expect <= d.wrote): // the address is one that this node had before
		return nil, false
	case now.Before(d.until):
	case renamed && (e.NodeName != d.by || now.Sub(d.since) > answeredAtOnce), now.Sub(d.since) > disputeFor:
		d.since, d.by = now, e.NodeName
		return nil, false
	default:
		d.until = now.Add(disputeFor)
	}
	what := "this node's name and id"
	if renamed {
		what = "this node's id"
	}
	return &subnet.ConflictError{
		Holder: e, What: what,
		Advice: fmt.Sprintf("it says that it is at %s; one of the two machines is a clone of the other and needs an "+
			"/etc/machine-id (or --node-id) of its own", addresses(e)),
	}, false
}

func addresses(e *subnet.Entry) string {
	var out []string
	for _, f := range addr.Families() {
		if ip := e.PublicIP.Get(f); ip.IsValid() {
			out = append(out, ip.String())
		}
	}
	return strings.Join(out, " and ")
}

// grant is an etcd lease that was granted to this node.
type grant struct {
	id      int64
	expires time.Time
}

// claimLoop is level-triggered: whenever the table or the claim changes, it asks anew what there is to do.
func (m *Manager) claimLoop(ctx context.Context) {
	c := &claimer{Manager: m}
	for ctx.Err() == nil {
		sleep(ctx, c.settle(ctx), m.wakeClaim)
	}
	c.giveBackSpare(context.WithoutCancel(ctx))
}

// settle does what there is to do at the moment, and says how long to wait before looking again if nobody wakes us up.
func (c *claimer) settle(ctx context.Context) time.Duration {
	table, claim, ok := c.situation()
	if !ok {
		return forever
	}
	// Before the claim: what a node claims may depend on the config.
	if errors.Is(table.ConfigErr, subnet.ErrNoConfig) && c.opts.InitConfig != nil {
		put, err := c.initConfig(ctx, table)
		switch {
		case err != nil:
			return c.retry(ctx, err)
		case put:
			return 0
		}
		c.failures++
		return raceDelay(c.failures, chance())
	}
	if claim == nil {
		return forever
	}
	d, err := subnet.Decide(table, *claim, c.attempt)
	if err != nil {
		c.attempt, c.failures = 0, 0
		c.refuse(err)
		c.giveBackSpare(ctx)
		return around(claimAgain, chance())
	}
	contested := c.contest.Judge(&d, time.Now())
	refused := contested != nil && contested.Refused
	if e := table.Find(d.Key); refused && e != nil { // it stays as it is
		d.Lease = e.Lease
	}
	if refused || !d.Write {
		c.attempt, c.failures = 0, 0
		c.hold(d, c.expiryOf(d.LeaseID), contested)
		c.giveBackSpare(ctx)
		return c.contest.Next(time.Now())
	}
	switch conflict, leave := c.dispute.disputed(table, *claim, d, c.hasHeld(d.Lease.Subnets), time.Now()); {
	case leave:
		c.log.Warn("another machine with this node's ID took back the persisted lease",
			zap.String("key", d.Key))
		c.leave(d.Lease.Subnets)
		return 0
	case conflict != nil:
		c.refuse(conflict)
		return around(claimAgain, chance())
	}
	won, err := c.write(ctx, table, d)
	switch {
	case err != nil:
		return c.retry(ctx, err)
	case won:
		c.attempt, c.failures = 0, 0
		return 0 // does another node contest it? The watch tells of nothing new where the answer came first
	}
	c.attempt++
	return raceDelay(c.attempt, chance())
}

// situation is what Decide needs. The subnets held last are what this node remembers, whatever the caller does: a key that was
// lost comes back with the same ones.
func (c *claimer) situation() (t subnet.Table, claim *subnet.Claim, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.synced || c.relist {
		return subnet.Table{}, nil, false
	}
	if c.claim.wanted == nil {
		return c.view.table(), nil, true
	}
	c.claim.decided = *c.claim.wanted
	claim = new(c.claim.decided)
	if c.claim.before != (addr.Per[netip.Prefix]{}) {
		claim.Remembered = c.claim.before
	}
	if claim.Remembered == c.dispute.left {
		claim.Remembered, claim.Keep = addr.Per[netip.Prefix]{}, false
	}
	return c.view.table().Reserving(c.conn.hosts.addresses()), claim, true
}

// hasHeld reports whether the subnets are those that this node held last since it started.
func (c *claimer) hasHeld(sn addr.Per[netip.Prefix]) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.claim.before == sn
}

// leave gives subnets up, and what is remembered of them.
func (c *claimer) leave(sn addr.Per[netip.Prefix]) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dispute.left, c.claim.before = sn, addr.Per[netip.Prefix]{}
}

// retry is how long to wait after a failure to reach the store, or its refusal to do as asked.
func (c *claimer) retry(ctx context.Context, err error) time.Duration {
	switch {
	case unreachable(err):
		c.fails(ctx, partRequests, err)
	case !errors.Is(err, rpctypes.ErrLeaseNotFound): // no permission, no space, ...
		c.refuse(err)
	}
	poke(c.wakeProbe)
	c.failures++
	return backoff(c.failures-1, chance())
}

// write executes a decision as one transaction that succeeds only if what it was decided under still holds.
func (c *claimer) write(ctx context.Context, t subnet.Table, d subnet.Decision) (won bool, err error) {
	lease, value := d.LeaseID, subnet.FormatValue(d.Lease.Attrs)
	var resp *clientv3.TxnResponse
	err = c.conn.request(ctx, func(ctx context.Context, cli *client) (err error) {
		if d.LeaseID == 0 && !d.Reserved {
			if lease, err = c.granted(ctx, cli); err != nil {
				return err
			}
		}
		resp, err = cli.Txn(ctx).
			If(c.keys.guards(t, d)...).
			Then(c.keys.writes(d, value, lease)...).
			Else(clientv3.OpGet(c.keys.all, clientv3.WithPrefix(), clientv3.WithMinModRev(t.Revision+1))).
			Commit()
		if errors.Is(err, rpctypes.ErrLeaseNotFound) {
			c.spare = grant{}
		}
		return err
	})
	if err != nil {
		return false, err
	}
	c.works(partRequests)
	if !resp.Succeeded {
		c.learn(resp, t)
		return false, nil
	}
	if resp.Header.GetRevision() <= t.Revision { // a write makes a new revision: this is not the store that the table is of
		poke(c.wakeProbe)
	}
	c.took(d, value, lease, resp.Header.GetRevision())
	return true, nil
}

// guards are the conditions of a decision's transaction. A range compare holds if it holds for every key of the range, and for an
// empty range as if there were one key with all revisions 0 (etcd: applyCompare in server/etcdserver/txn).
func (k keys) guards(t subnet.Table, d subnet.Decision) []clientv3.Cmp {
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

func (k keys) writes(d subnet.Decision, value []byte, lease int64) []clientv3.Op {
	// WithLease(0) is a key without an etcd lease: a reservation stays one.
	ops := []clientv3.Op{clientv3.OpPut(k.subnets+d.Key, string(value), clientv3.WithLease(clientv3.LeaseID(lease)))}
	if d.Expect == 0 && dualStack(d) && d.Unchanged == "" {
		ops = append(ops, clientv3.OpPut(k.unpaired, d.Key))
	}
	for _, e := range d.Drop {
		ops = append(ops, clientv3.OpDelete(k.subnets+e.Key))
	}
	return ops
}

func dualStack(d subnet.Decision) bool { return strings.Contains(d.Key, "&") }

// learn takes in what the transaction found instead of what it was decided under. If it found nothing, a key was deleted: the
// watch will tell; and if it doesn't, the view is not of this store.
func (c *claimer) learn(resp *clientv3.TxnResponse, t subnet.Table) {
	var found []*mvccpb.KeyValue
	for _, r := range resp.Responses {
		found = append(found, r.GetResponseRange().GetKvs()...)
	}
	c.update(func() bool {
		c.claim.behind = len(found) == 0
		return c.view.merge(found, resp.Header.GetRevision())
	})
	poke(c.wakeSync)
	if len(found) == 0 && (resp.Header.GetRevision() < t.Revision || max(c.attempt, c.failures) >= 3) {
		poke(c.wakeProbe)
	}
}

// took takes note of a write that succeeded.
func (c *claimer) took(d subnet.Decision, value []byte, lease, revision int64) {
	put := &mvccpb.KeyValue{
		Key: []byte(c.keys.subnets + d.Key), Value: value, Lease: lease, ModRevision: revision, CreateRevision: revision,
	}
	var dropped []string
	for _, e := range d.Drop {
		dropped = append(dropped, e.Key)
	}
	c.mu.Lock()
	if e, ok := c.view.entry(d.Key); ok {
		put.CreateRevision = e.Created
	}
	c.view.wrote(put, dropped, revision)
	c.claim.wrote = revision
	c.mu.Unlock()

	expires := c.expiryOf(lease)
	if lease == c.spare.id && lease != 0 {
		expires, c.spare = c.spare.expires, grant{}
	}
	d.LeaseID = lease
	c.dispute.wrote = revision
	c.contest.Wrote(d, time.Now())
	c.log.Info("lease written", zap.String("key", d.Key), zap.Int64("revision", revision), zap.Int("deleted", len(dropped)))
	c.hold(d, expires, nil)
}

// hold says that the store says what was claimed, and whether another node's lease says the same of it.
func (c *claimer) hold(d subnet.Decision, expires time.Time, contested *subnet.ConflictError) {
	held := holding{d.Lease, d.Key, d.LeaseID, expires}
	var err error
	if contested != nil {
		err = contested
	}
	if c.spare.id == d.LeaseID {
		c.spare = grant{} // it came through although the answer was lost
	}
	c.update(func() bool {
		s := &c.claim
		same := s.held == held && text(s.err) == text(err)
		s.held, s.before, s.err, s.said = held, d.Lease.Subnets, err, text(err)
		if !same {
			poke(c.wakeKeep)
			poke(c.wakeSync)
		}
		return !same
	})
}

// expiryOf is when the etcd lease ends, as far as that is known.
func (c *claimer) expiryOf(id int64) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case id != 0 && c.spare.id == id:
		return c.spare.expires
	case id != 0 && c.claim.held.leaseID == id:
		return c.claim.held.expires
	}
	return time.Time{}
}

// refuse says why the store does not say what was claimed.
func (c *claimer) refuse(err error) {
	c.update(func() bool {
		s := &c.claim
		changed := text(s.err) != text(err)
		s.err = err
		if changed {
			poke(c.wakeSync)
		}
		if changed && s.said != text(err) {
			s.said = text(err)
			c.log.Debug("cannot acquire the claimed lease", zap.Error(err))
		}
		return changed
	})
}

// checkHeld looks whether the lease is still there, after the view has changed. m.mu is held.
func (m *Manager) checkHeld() {
	s := &m.claim
	if s.held.key == "" {
		return
	}
	e, ok := m.view.entry(s.held.key)
	if !ok || e.Identity != s.held.lease.Identity {
		m.log.Warn("subnet lease disappeared from etcd", zap.String("key", s.held.key))
		s.held = holding{}
		s.losses, s.lostAt = s.losses+1, time.Now()
		poke(m.wakeKeep)
		return
	}
	if e.LeaseID != s.held.leaseID {
		s.held.leaseID, s.held.expires = e.LeaseID, time.Time{}
		poke(m.wakeKeep)
	}
	s.held.lease = e.Lease
}

// granted is an etcd lease for a new key: the one left from a lost race if there is one, else a new one.
func (c *claimer) granted(ctx context.Context, cli *client) (int64, error) {
	if c.spare.id != 0 && time.Until(c.spare.expires) > c.opts.LeaseTTL/2 {
		return c.spare.id, nil
	}
	asked := time.Now()
	resp, err := cli.Grant(ctx, int64(c.opts.LeaseTTL/time.Second))
	if err != nil {
		return 0, err
	}
	c.spare = grant{int64(resp.ID), asked.Add(time.Duration(resp.TTL) * time.Second)}
	return c.spare.id, nil
}

// giveBackSpare revokes a granted etcd lease that came to no use. If that fails, it ends by itself.
func (c *claimer) giveBackSpare(ctx context.Context) {
	id := c.spare.id
	cli := c.conn.current()
	if id == 0 || cli == nil || c.inUse(id) {
		return
	}
	c.spare = grant{}
	ctx, cancel := context.WithTimeout(ctx, min(c.opts.RequestTimeout, time.Second))
	defer cancel()
	_, _ = cli.Revoke(ctx, clientv3.LeaseID(id))
}

// inUse reports whether a key hangs on an etcd lease: to revoke that would delete the key.
func (c *claimer) inUse(id int64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.view.table().Entries {
		if e.LeaseID == id {
			return true
		}
	}
	return false
}

// initConfig puts the config that was given for the case that there is none, unless somebody else did first.
func (c *claimer) initConfig(ctx context.Context, t subnet.Table) (put bool, err error) {
	var resp *clientv3.TxnResponse
	err = c.conn.request(ctx, func(ctx context.Context, cli *client) (err error) {
		resp, err = cli.Txn(ctx).
			If(clientv3.Compare(clientv3.CreateRevision(c.keys.config), "=", 0)).
			Then(clientv3.OpPut(c.keys.config, string(c.opts.InitConfig))).
			Else(clientv3.OpGet(c.keys.all, clientv3.WithPrefix(), clientv3.WithMinModRev(t.Revision+1))).
			Commit()
		return err
	})
	if err != nil {
		return false, err
	}
	if !resp.Succeeded {
		c.learn(resp, t)
		return false, nil
	}
	c.log.Info("wrote the initial network config", zap.String("key", c.keys.config))
	rev := resp.Header.GetRevision()
	kv := &mvccpb.KeyValue{Key: []byte(c.keys.config), Value: c.opts.InitConfig, ModRevision: rev, CreateRevision: rev}
	c.update(func() bool { c.view.wrote(kv, nil, rev); return true })
	return true, nil
}
