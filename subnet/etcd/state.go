package etcd

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/overlayd/overlayd/subnet"
)

// state is what a Manager knows, and what it is waiting for. One goroutine owns it: events and the answers to requests
// change it, next says what to request then. It does no I/O, and takes the time as an argument.
type state struct {
	opts   Options
	keys   keys
	log    *zap.Logger
	random func() float64 // in [0, 1): a node's own chance

	initial subnet.Config // what to put into a store without a network config; zero: nothing

	view  *view
	trust trust
	claim claimState
	snap  subnet.Snapshot // the next one, without the table

	changed bool      // snap or the table, since the last snapshot
	tell    time.Time // when to act on what the watch told; zero: nothing is left
	noTell  time.Time // not before this

	read, watch, write, renew task // of each kind, one request at a time

	stopWatch func()
	works     bool      // the watch that runs has told something, or had nothing to tell
	proven    time.Time // when it counts as working although it has told nothing: it may be about others' keys; zero: never
	free      time.Time // since when a watch could run, but for the claim
	watchFrom time.Time // when it may; zero: nothing came of the claim yet
	wake      time.Time // the earliest time that next waits for; zero: none
}

// trust is how far the view can be relied on.
type trust int

const (
	trustNone   trust = iota // everything has to be read
	trustBefore              // it was right when the watch ended; a probe decides whether the next can go on from there
	trustNow                 // decisions are made by it
)

// task is one kind of request.
type task struct {
	busy     bool      // one is under way
	due      time.Time // the next one; zero: only an event makes one necessary
	failures int       // in a row
	err      error     // of the last one, if the store could not be reached
}

// again asks for the next request no later than at a time.
func (t *task) again(at time.Time) {
	if t.due.IsZero() || at.Before(t.due) {
		t.due = at
	}
}

// retry asks for another request after one that failed: later with each failure in a row.
func (s *state) retry(t *task, now time.Time) {
	t.again(now.Add(backoff(t.failures, s.random())))
	t.failures++
}

func newState(o Options, log *zap.Logger) *state {
	s := &state{opts: o, keys: newKeys(o.Prefix), log: log, random: chance, view: newView(o.Prefix, o.Parse)}
	s.read.due, s.stopWatch = time.Unix(0, 0), func() {}
	if o.InitConfig != nil {
		s.initial, _ = subnet.ParseConfig(o.InitConfig) // checked by New
	}
	return s
}

// snapshot is what has become known.
func (s *state) snapshot() subnet.Snapshot {
	s.changed = false
	s.snap.Table = s.view.table()
	s.snap.InitConfigErr = s.initConfigErr(s.snap.Table)
	return s.snap
}

// told takes note that the snapshot is handed on, and how long that took.
func (s *state) told(now time.Time, took time.Duration) { s.noTell = now.Add(gather(took)) }

// initConfigErr says that the initial config is not the one in use.
func (s *state) initConfigErr(t subnet.Table) error {
	if what := Overruled(t, s.initial); what != "" {
		return fmt.Errorf("%s; etcd's is in use: put the other one at %s, or make --init-config the same", what, s.keys.config)
	}
	return nil
}

// Overruled names what an initial config says otherwise than the one in the store, which is never overwritten; "":
// nothing, or one of the two is not there.
func Overruled(t subnet.Table, initial subnet.Config) string {
	none := subnet.Config{}
	if initial == none || t.Config == none || t.Config == initial {
		return ""
	}
	var out []string
	for _, d := range t.Config.Differences(initial) {
		out = append(out, fmt.Sprintf("%s is %s in etcd, %s in --init-config", d.Key, d.Value, d.Other))
	}
	return strings.Join(out, "; ")
}

// settle takes in what needs no request: time that has passed, the addresses of the endpoints, and how the last
// requests went.
func (s *state) settle(now time.Time, endpoints []netip.Addr) {
	if !s.tell.IsZero() && !now.Before(s.tell) {
		s.tableChanged(now)
	}
	if !s.proven.IsZero() && !now.Before(s.proven) {
		s.watchWorks(now)
	}
	if !slices.Equal(s.snap.Endpoints, endpoints) {
		s.snap.Endpoints, s.changed = endpoints, true
		s.write.again(now) // no subnet that covers one of them is free
	}
	s.observeLoss(now)
}

// next lists what is to be requested, and sets wake. Asked again, it lists nothing unless something has happened.
func (s *state) next(now time.Time) (out []request) {
	s.wake = time.Time{}
	s.due(s.tell, now)
	s.due(s.proven, now)
	// While the view is not trusted, the old watch has to end first: what it still tells may be of another store.
	if (s.trust == trustNow || !s.watch.busy) && !s.read.busy && s.due(s.read.due, now) {
		s.read.busy, s.read.due = true, time.Time{}
		if s.trust == trustNone {
			out = append(out, listRequest())
		} else {
			out = append(out, probeRequest(s.facts()))
		}
	}
	if s.trust == trustNow {
		if !s.write.busy && s.due(s.write.due, now) {
			s.write.due = time.Time{}
			out = append(out, s.decide(now)...)
			s.due(s.write.due, now)
		}
		if !s.watch.busy && s.due(s.watchDue(now), now) {
			s.watch.busy = true
			out = append(out, watchRequest(s.view.position))
		}
	}
	if id := s.claim.revoke; id != 0 {
		s.claim.revoke = 0
		out = append(out, revokeRequest(id))
	}
	return append(out, s.keep(now)...)
}

// due reports whether a time has come. If not, next is to be asked again then.
func (s *state) due(at, now time.Time) bool {
	if at.IsZero() || !now.Before(at) {
		return !at.IsZero()
	}
	if s.wake.IsZero() || at.Before(s.wake) {
		s.wake = at
	}
	return false
}

// watchDue puts the watch off while this node's claim is on its way, and after it for a while if many nodes claim. Of
// thousands that start together, each would be told of every other's claim one by one, which is more work for the store
// than all the rest, and delays the claims. What happens before the watch begins, it tells at once.
func (s *state) watchDue(now time.Time) time.Time {
	c := &s.claim
	switch settled := c.key != "" || s.snap.ClaimErr != nil; {
	case !s.watchFrom.IsZero():
	case settled:
		s.watchFrom = now.Add(watchDelay(max(c.wrote-s.view.watched, 0), now.Sub(s.free), s.random()))
	case c.desired != nil:
		return s.free.Add(claimPatience)
	default:
		return s.free.Add(claimSoon)
	}
	return s.watchFrom
}

// listed takes the answer to a request for everything.
func (s *state) listed(resp *clientv3.GetResponse, err error, now time.Time) {
	if !s.readDone(err, now) {
		return
	}
	s.view.reset(resp.Kvs, resp.Header)
	s.tableChanged(now)
	s.trusted(now)
}

// probed takes the answer to a probe. It is checked against the view of the time when it was asked for: the watch may
// have overtaken it.
func (s *state) probed(asked facts, resp *clientv3.TxnResponse, err error, now time.Time) {
	if !s.readDone(err, now) {
		return
	}
	if why := asked.check(resp.Header, revisionsIn(resp.Responses)); why != nil && s.trust != trustNone {
		s.log.Warn("resyncing the lease table", zap.Error(why))
		s.relist(now)
	}
	if s.trust == trustNone { // by this answer, or since it was asked for
		s.read.again(now)
		return
	}
	s.view.term = max(s.view.term, resp.Header.GetRaftTerm())
	s.trusted(now)
}

func (s *state) readDone(err error, now time.Time) (ok bool) {
	s.read.busy, s.read.err = false, err
	if err != nil {
		s.retry(&s.read, now)
		return false
	}
	if s.read.failures > 0 {
		s.recovered(now)
	}
	s.read.failures = 0
	s.read.again(now.Add(around(probeEvery, s.random())))
	return true
}

// recovered brings forward what could not reach the store either: its backoff may have many seconds left. It is for the
// first answer after a failure only. A renewal that fails asks for a probe, and would be repeated at once for ever where
// only probes are answered.
func (s *state) recovered(now time.Time) {
	for _, t := range []*task{&s.write, &s.renew} {
		if t.err != nil {
			t.err, t.failures = nil, 0
			t.again(now)
		}
	}
}

// relist has the whole table read again, once the watch has ended.
func (s *state) relist(now time.Time) {
	s.trust = trustNone
	s.stopWatch()
	s.read.again(now)
}

// trusted goes on with claim and watch.
func (s *state) trusted(now time.Time) {
	if s.trust == trustNow {
		return
	}
	s.trust, s.free, s.watchFrom = trustNow, now, time.Time{}
	s.write.again(now)
}

// verify asks for a probe soon, since something odd has happened. Before the view is trusted, there is one anyway.
func (s *state) verify(now time.Time) {
	if s.trust == trustNow {
		s.read.again(now)
	}
}

// watchCreated takes the store's confirmation of a watch. A revision below ours means that the member lags behind, or
// that the store is another one now, whose revision may take long to reach ours. With one above ours, what the watch
// has to tell first may be more than can be taken in.
func (s *state) watchCreated(r *pb.WatchResponse, now time.Time) {
	revision := r.GetHeader().GetRevision()
	if revision < s.view.watched {
		s.verify(now)
	}
	if revision <= s.view.watched {
		s.watchWorks(now)
		return
	}
	s.proven = now.Add(s.opts.RequestTimeout)
}

// watchWorks takes note that the watch makes progress.
func (s *state) watchWorks(now time.Time) {
	s.works, s.proven = true, time.Time{}
	if s.watch.failures > 0 {
		s.recovered(now)
	}
	s.watch.err, s.watch.failures = nil, 0
}

// watched takes one message of the watch. The first change is acted on at once, a burst after it in few steps.
func (s *state) watched(r *pb.WatchResponse, now time.Time) {
	if !s.works {
		s.watchWorks(now)
	}
	if len(r.Events) == 0 {
		s.view.progress(r.GetHeader().GetRevision())
		return
	}
	if s.view.events(r.Events, r.Fragment) && s.tell.IsZero() {
		s.tell = now
		if s.noTell.After(now) {
			s.tell = s.noTell
		}
	}
}

// watchEnded says why a watch ended. It is tried once more before that is called a failure, perhaps at another endpoint.
// If another cluster answered, the store may have been replaced since the list. If it was not, a proxy takes the two to
// different stores, and to list again helps no more than to wait. A watch that breaks again and again before it has told
// anything would do so for ever: what it can't bring over is read by a list, and the next one begins behind that.
func (s *state) watchEnded(created bool, err error, now time.Time) {
	s.watch.busy = false
	s.stopWatch()
	worked := created && (s.works || errors.Is(err, errRelist))
	s.works, s.proven = false, time.Time{}
	switch {
	case errors.Is(err, errRelist) || created && !worked && s.watch.failures > 0:
		s.trust = trustNone
	case s.trust == trustNow:
		s.trust = trustBefore
	}
	s.read.again(now.Add(backoff(s.watch.failures, s.random())))
	if worked {
		return
	}
	if s.watch.failures > 0 {
		s.watch.err = err
		if created {
			s.watch.err = noProgress(err)
		}
	}
	s.watch.failures++
}

// tableChanged acts on what was read: is this node's lease still there?
func (s *state) tableChanged(now time.Time) {
	s.tell, s.changed = time.Time{}, true
	s.write.again(now)
	s.checkHeld(now)
}

// observeLoss tells whether the store can be reached: it can if the last request of each kind was answered.
func (s *state) observeLoss(now time.Time) {
	err := cmp.Or(s.read.err, s.watch.err, s.write.err, s.renew.err)
	if text(err) == text(s.snap.Err) {
		return
	}
	switch {
	case s.snap.Err == nil:
		s.snap.Since = now
	case err == nil:
		s.snap.Since = time.Time{}
	}
	s.snap.Err, s.changed = err, true
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// facts are the few things by which the view is compared with the store: which revisions some keys are at.
type facts struct {
	position
	revisions map[string]int64
}

// facts picks the config, this node's own key, and the key that changed last: a backup that is older than the view
// lacks that one.
func (s *state) facts() facts {
	t := s.view.table()
	f := facts{s.view.position, map[string]int64{s.keys.config: t.ConfigRevision}}
	if e := t.Find(s.claim.key); e != nil {
		f.revisions[s.keys.subnets+e.Key] = e.Revision
	}
	if len(t.Entries) > 0 {
		e := slices.MaxFunc(t.Entries, func(a, b *subnet.Entry) int { return cmp.Compare(a.Revision, b.Revision) })
		f.revisions[s.keys.subnets+e.Key] = e.Revision
	}
	return f
}

// check says what in an answer of the store can't be, given the facts.
func (f facts) check(h *pb.ResponseHeader, found map[string]int64) error {
	if err := f.otherStore(h); err != nil {
		return err
	}
	for key, known := range f.revisions {
		switch now := found[key]; {
		case now == known || now > f.watched: // as we know it, or changed since: the watch will tell
		case now == 0:
			return fmt.Errorf("the key %s is gone", key)
		default:
			return fmt.Errorf("the key %s is at revision %d, it was at %d", key, now, known)
		}
	}
	return nil
}

func revisionsIn(answers []*pb.ResponseOp) map[string]int64 {
	out := map[string]int64{}
	for _, a := range answers {
		for _, kv := range a.GetResponseRange().GetKvs() {
			out[string(kv.Key)] = kv.ModRevision
		}
	}
	return out
}
