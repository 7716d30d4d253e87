package etcd

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlayd/overlayd/subnet"
)

// sim is a state without a store: the test gives the answers, and moves the clock.
type sim struct {
	t *testing.T
	*state
	now time.Time
}

func newSim(t *testing.T) *sim {
	o := must[Options](t)(Options{Endpoints: []string{"127.0.0.1:1"}, Prefix: prefix, LeaseTTL: time.Hour}.check())
	s := &sim{t, newState(o, zap.NewNop()), time.Unix(1000, 0)}
	s.random = func() float64 { return 0.5 }
	return s
}

// asks lets some time pass, and checks which requests are made then.
func (s *sim) asks(after time.Duration, want ...kind) {
	s.t.Helper()
	s.now = s.now.Add(after)
	s.settle(s.now, nil)
	var got []kind
	for _, r := range s.next(s.now) {
		got = append(got, r.kind)
	}
	if !slices.Equal(got, want) {
		s.t.Fatalf("it requests %v, want %v", got, want)
	}
	if again := s.next(s.now); len(again) > 0 {
		s.t.Fatalf("asked again, it requests %v too", again[0].kind)
	}
}

// passes moves the clock to the time for which the state waits.
func (s *sim) passes(least, most time.Duration, want ...kind) {
	s.t.Helper()
	wait := s.wake.Sub(s.now)
	if s.wake.IsZero() || wait < least || wait > most {
		s.t.Fatalf("it waits %s, want from %s to %s", wait, least, most)
	}
	s.asks(wait, want...)
}

func (s *sim) list(revision int64, kvs ...*mvccpb.KeyValue) {
	kvs = append([]*mvccpb.KeyValue{keyValue("config", config, 2)}, kvs...)
	s.listed(&clientv3.GetResponse{Header: header(revision), Kvs: kvs}, nil, s.now)
}

// own is the lease of node 1 in the store.
func own(revision int64) *mvccpb.KeyValue {
	return keyValue("subnets/10.244.5.0-24", string(subnet.FormatValue(claim(1).Attrs)), revision)
}

// probe answers a probe that is under way.
func (s *sim) probe(h *pb.ResponseHeader) {
	f := s.facts()
	var kvs []*mvccpb.KeyValue
	for key, revision := range f.revisions {
		kvs = append(kvs, &mvccpb.KeyValue{Key: []byte(key), ModRevision: revision})
	}
	r := &pb.ResponseOp{Response: &pb.ResponseOp_ResponseRange{ResponseRange: &pb.RangeResponse{Kvs: kvs}}}
	s.probed(f, &clientv3.TxnResponse{Header: h, Responses: []*pb.ResponseOp{r}}, nil, s.now)
}

// watching is a state that has its lease, and follows the store.
func watching(t *testing.T) *sim {
	t.Helper()
	s := newSim(t)
	s.asks(0, kindList)
	s.list(9, own(5))
	s.setClaim(claim(1), s.now)
	s.asks(0, kindWatch) // the lease is there: nothing to write
	s.watchCreated(&pb.WatchResponse{Header: header(9)}, s.now)
	return s
}

var gone = status.Error(codes.Unavailable, "connection refused")

func TestStart(t *testing.T) {
	s := newSim(t)
	s.asks(0, kindList)
	s.listed(nil, gone, s.now)
	s.asks(0)
	if s.snap.Err == nil || s.snap.Since != s.now {
		t.Errorf("the loss is %v since %s", s.snap.Err, s.snap.Since)
	}
	s.passes(backoffMin/2, backoffMin, kindList)
	s.list(9)
	s.asks(0)
	if s.snap.Err != nil {
		t.Errorf("after an answer the loss is %v", s.snap.Err)
	}
	s.setClaim(claim(1), s.now)
	s.asks(0, kindWrite)
	s.asks(time.Second) // the watch waits for what comes of it
	s.wrote(write{resp: &clientv3.TxnResponse{Header: header(10), Succeeded: true}, Decision: decided(t, s)}, s.now)
	s.asks(0, kindWatch)
	if !s.snap.Held() || s.snap.ClaimErr != nil || s.snap.Claimed != claim(1) {
		t.Errorf("it has %+v", s.snap)
	}
}

func decided(t *testing.T, s *sim) subnet.Decision {
	d := must[subnet.Decision](t)(subnet.Decide(s.view.table(), claim(1), 0))
	d.LeaseID = 77
	return d
}

// The watch waits for what comes of the claim, and for nothing else.
func TestWatchComesAfterTheClaim(t *testing.T) {
	for name, tt := range map[string]struct {
		claimed     bool
		after       func(*sim) // 100 ms
		least, most time.Duration
	}{
		"nothing is claimed":    {least: claimSoon, most: claimSoon},
		"nothing comes of it":   {claimed: true, least: claimPatience, most: claimPatience},
		"the claim is rejected": {claimed: true, after: func(s *sim) { s.outcome(subnet.ErrNoConfig) }},
		"the lease is held":     {claimed: true, after: func(s *sim) { s.hold(decided(t, s), nil) }},
		"it is held, in a crowd": {
			claimed: true, least: 500 * time.Millisecond, most: 500 * time.Millisecond,
			after: func(s *sim) { s.hold(decided(t, s), nil); s.claim.wrote = s.view.watched + crowd },
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSim(t)
			s.asks(0, kindList)
			s.list(9)
			if tt.claimed {
				s.setClaim(claim(1), s.now)
				s.asks(0, kindWrite)
			}
			if tt.after != nil {
				s.now = s.now.Add(100 * time.Millisecond)
				tt.after(s)
			}
			if wait := s.watchDue(s.now).Sub(s.now); wait < tt.least || wait > tt.most {
				t.Errorf("the watch begins in %s", wait)
			}
		})
	}
}

// After an interruption the watch goes on from where it was, if a probe finds the same store; else everything is read.
func TestInterruption(t *testing.T) {
	for name, tt := range map[string]struct {
		header *pb.ResponseHeader
		then   kind
	}{
		"the same store": {header(12), kindWatch},
		"another store":  {header(3), kindList},
	} {
		t.Run(name, func(t *testing.T) {
			s := watching(t)
			s.watchEnded(true, gone, s.now)
			s.asks(0)
			if s.snap.Err != nil {
				t.Errorf("a watch that worked until now is a loss: %v", s.snap.Err)
			}
			s.passes(backoffMin/2, backoffMin, kindProbe)
			s.probed(facts{}, nil, gone, s.now)
			s.asks(0)
			if s.snap.Err == nil {
				t.Error("no loss")
			}
			s.passes(backoffMin/2, backoffMin, kindProbe)
			s.probe(tt.header)
			s.asks(0, tt.then)
			if s.snap.Err != nil || !s.snap.Held() {
				t.Errorf("loss %v, lease %v", s.snap.Err, s.snap.Lease)
			}
		})
	}
}

// A probe that finds another store ends the watch first: what that still tells must not get into the new table.
func TestReplacedUnderTheWatch(t *testing.T) {
	s := watching(t)
	stopped := false
	s.stopWatch = func() { stopped = true }
	s.verify(s.now)
	s.asks(0, kindProbe)
	s.probe(&pb.ResponseHeader{ClusterId: 8, RaftTerm: 2, Revision: 20})
	s.asks(0)
	if !stopped {
		t.Fatal("the watch goes on")
	}
	s.watchEnded(true, errRelist, s.now)
	s.asks(0, kindList)
	s.listed(&clientv3.GetResponse{Header: &pb.ResponseHeader{ClusterId: 8, RaftTerm: 2, Revision: 20}}, nil, s.now)
	if s.snap.Held() || s.snap.Losses != 1 || s.snapshot().Table.Epoch != 1 {
		t.Errorf("got %+v", s.snap)
	}
}

// The first change is told at once, those that follow in one go.
func TestChangesAreGathered(t *testing.T) {
	s := watching(t)
	s.now = s.now.Add(time.Second)
	tell := func(revision int64) bool {
		s.watched(&pb.WatchResponse{Events: []*mvccpb.Event{put(keyValue("subnets/10.244.7.0-24", "", revision))}}, s.now)
		s.changed = false
		if s.settle(s.now, nil); s.changed {
			s.told(s.now, 3*time.Millisecond)
		}
		return s.changed
	}
	if !tell(11) {
		t.Error("the first change waits")
	}
	s.now = s.now.Add(time.Millisecond)
	if tell(12) || tell(13) {
		t.Error("the next is told at once")
	}
	s.next(s.now)
	if wait := s.wake.Sub(s.now); wait != 29*time.Millisecond {
		t.Errorf("it is told after %s", wait)
	}
	s.now = s.wake
	if s.settle(s.now, nil); !s.changed || s.snapshot().Table.Revision != 13 {
		t.Error("it is never told")
	}
}

// A renewal is tried again while the store is away, also without a watch, and is a matter of its own.
func TestRenewal(t *testing.T) {
	s := watching(t)
	s.read.due = time.Time{}
	s.asks(0)
	s.passes(0, unknownTTL, kindRenew)
	for i := range 3 {
		s.renewedLease(1, 0, s.now, gone, s.now)
		s.read.due = time.Time{} // the probe that it asks for is of no interest here
		s.asks(0)
		if s.snap.Err == nil {
			t.Error("no loss")
		}
		s.passes(backoffMin<<i/2, backoffMin<<i, kindRenew)
	}
	s.renewedLease(1, time.Hour, s.now, nil, s.now)
	s.asks(0)
	if s.snap.Err != nil || s.snap.Expires != s.now.Add(time.Hour) {
		t.Errorf("loss %v, the lease expires at %s", s.snap.Err, s.snap.Expires)
	}
	s.passes(15*time.Minute, 30*time.Minute, kindRenew)
	s.renewedLease(1, 0, s.now, rpctypes.ErrLeaseNotFound, s.now)
	s.asks(0, kindProbe) // its key has to be gone
	if s.snap.Err != nil {
		t.Errorf("an expired lease is no loss of the store: %v", s.snap.Err)
	}
}

// A rejected write is no loss of the store; one that does not reach it is, until there is nothing to write any more.
func TestFailedWrites(t *testing.T) {
	s := newSim(t)
	s.asks(0, kindList)
	s.list(9)
	s.setClaim(claim(1), s.now)
	s.asks(0, kindWrite)
	s.wrote(write{err: rpctypes.ErrPermissionDenied}, s.now)
	s.asks(0, kindProbe, kindWatch)
	if s.snap.Err != nil || !errors.Is(s.snap.ClaimErr, rpctypes.ErrPermissionDenied) {
		t.Errorf("loss %v, claim %v", s.snap.Err, s.snap.ClaimErr)
	}
	s.passes(backoffMin/2, backoffMin, kindWrite)
	s.wrote(write{err: gone, spare: grant{id: 7}}, s.now)
	s.asks(0)
	if s.snap.Err == nil {
		t.Error("no loss")
	}
	s.passes(backoffMin, 2*backoffMin, kindWrite)
	s.wrote(write{err: gone, spare: grant{id: 7, expires: s.now.Add(time.Hour)}}, s.now)
	lost := keyValue("subnets/10.244.5.0-24", string(subnet.FormatValue(claim(1).Attrs)), 10)
	lost.Lease = 7 // the write came through, only its answer did not
	s.watched(&pb.WatchResponse{Events: []*mvccpb.Event{put(lost)}}, s.now.Add(time.Second))
	s.asks(time.Second)
	s.settle(s.now, nil)
	if s.snap.Err != nil || !s.snap.Held() || s.snap.Expires.IsZero() || s.claim.spare.id != 0 {
		t.Errorf("loss %v, lease %v until %s", s.snap.Err, s.snap.Lease, s.snap.Expires)
	}
}

// What a lost race was lost to is in its answer. If it is not, a key was deleted, and only the watch tells which.
func TestLostRace(t *testing.T) {
	s := newSim(t)
	s.asks(0, kindList)
	s.list(9)
	s.setClaim(claim(1), s.now)
	s.asks(0, kindWrite)
	lost := func(revision int64, kvs ...*mvccpb.KeyValue) {
		r := &pb.ResponseOp{Response: &pb.ResponseOp_ResponseRange{ResponseRange: &pb.RangeResponse{Kvs: kvs}}}
		resp := &clientv3.TxnResponse{Header: header(revision), Responses: []*pb.ResponseOp{r}}
		s.wrote(write{table: s.view.table(), Decision: decided(t, s), resp: resp}, s.now)
	}
	lost(11, keyValue("subnets/10.244.7.0-24", "", 10))
	s.asks(0)
	if got := s.snapshot().Table; got.Revision != 11 || len(got.Entries) != 1 {
		t.Errorf("the table is %+v", got)
	}
	s.passes(0, raceDelayUnit, kindWrite)
	lost(12)
	s.asks(0, kindWatch) // tells at once, and costs less than a list
	s.passes(backoffMin/2, backoffMin, kindWrite)
	s.write.failures = 0
	for i := range 4 {
		lost(int64(13 + i))
		if s.read.busy || s.trust != trustNow {
			t.Fatal("it does not wait for the watch")
		}
		if i < 3 {
			s.asks(0)
			s.passes(backoffMin<<i/2, backoffMin<<i, kindWrite)
		}
	}
	s.asks(0, kindProbe) // the watch does not tell: is it of this store?
}

// Another node that writes the initial config took no subnet: the first choice is as good as before.
func TestLostRaceForTheConfig(t *testing.T) {
	s := newSim(t)
	s.opts.InitConfig = []byte(config)
	s.asks(0, kindList)
	s.listed(&clientv3.GetResponse{Header: header(9)}, nil, s.now)
	s.setClaim(claim(1), s.now)
	s.asks(0, kindWrite)
	found := []*mvccpb.KeyValue{keyValue("config", config, 10)}
	r := &pb.ResponseOp{Response: &pb.ResponseOp_ResponseRange{ResponseRange: &pb.RangeResponse{Kvs: found}}}
	resp := &clientv3.TxnResponse{Header: header(10), Responses: []*pb.ResponseOp{r}}
	s.wrote(write{table: s.view.table(), resp: resp}, s.now)
	if s.view.table().ConfigErr != nil || s.claim.attempt != 0 {
		t.Errorf("config error %v, %d attempts", s.view.table().ConfigErr, s.claim.attempt)
	}
}

// A proxy may take the watch to another cluster than the list. To read everything again does not help.
func TestWatchOfAnotherCluster(t *testing.T) {
	s := watching(t)
	s.watchEnded(true, errRelist, s.now)
	s.renew.due = time.Time{} // of no interest here
	s.asks(0)
	s.passes(backoffMin/2, backoffMin, kindList)
	s.list(9, own(5))
	s.asks(0, kindWatch)
	for i := range 8 {
		s.watchEnded(false, errOtherCluster, s.now)
		s.asks(0)
		if lost := s.snap.Err != nil; lost != (i > 0) { // the first time, the store may have been replaced
			t.Errorf("loss %v after %d in a row", s.snap.Err, i+1)
		}
		wait := min(backoffMin<<i, backoffMax)
		s.passes(wait/2, wait, kindList)
		s.list(9, own(5))
		s.asks(0, kindWatch)
	}
	s.watchCreated(&pb.WatchResponse{Header: header(9)}, s.now)
	if s.asks(0); s.snap.Err != nil {
		t.Errorf("loss %v", s.snap.Err)
	}
}

// When the store is back, a renewal and a write that did not reach it are repeated at once, however long their backoff.
func TestRecovery(t *testing.T) {
	for name, back := range map[string]func(*sim){
		"probe": func(s *sim) { s.read.failures = 3; s.probe(header(9)) },
		"watch": func(s *sim) { s.watch.failures = 3; s.watchCreated(&pb.WatchResponse{Header: header(9)}, s.now) },
	} {
		t.Run(name, func(t *testing.T) {
			s := watching(t)
			s.asks(unknownTTL, kindRenew)
			s.renew.failures = 10
			s.renewedLease(1, 0, s.now, gone, s.now)
			s.asks(0, kindProbe)
			if s.snap.Err == nil {
				t.Error("no loss")
			}
			back(s)
			s.asks(0, kindRenew)
			if s.snap.Err != nil {
				t.Errorf("the store is back, and the loss is %v", s.snap.Err)
			}
			s.renewedLease(1, 0, s.now, gone, s.now)
			if name == "probe" {
				s.asks(0, kindProbe)
				s.probe(header(9)) // only the renewal fails
			}
			s.asks(0)
			s.passes(backoffMin/2, backoffMin, kindRenew)
		})
	}
}

// A watch that breaks each time before it has told anything is a loss, leads to a list, and is retried ever more rarely.
func TestWatchWithoutProgress(t *testing.T) {
	s := watching(t)
	broken := status.Error(codes.ResourceExhausted, "received message larger than max")
	s.watchEnded(true, gone, s.now)
	s.asks(0)
	s.passes(backoffMin/2, backoffMin, kindProbe)
	s.probe(header(12))
	s.asks(0, kindWatch)
	s.watchCreated(&pb.WatchResponse{Header: header(12)}, s.now)
	s.watchEnded(true, broken, s.now)
	s.asks(0)
	s.passes(backoffMin/2, backoffMin, kindProbe)
	s.probe(header(12))
	s.asks(0, kindWatch)
	s.watchCreated(&pb.WatchResponse{Header: header(12)}, s.now)
	s.watchEnded(true, broken, s.now)
	if s.asks(0); s.snap.Err == nil || s.watch.failures != 2 {
		t.Fatalf("after %d failures the loss is %v", s.watch.failures, s.snap.Err)
	}
	s.passes(backoffMin, 2*backoffMin, kindList)
	s.list(12, own(5))
	s.asks(0, kindWatch)
	s.watchCreated(&pb.WatchResponse{Header: header(12)}, s.now)
	if s.asks(0); s.snap.Err != nil || s.watch.failures != 0 {
		t.Errorf("after a list %d failures, the loss is %v", s.watch.failures, s.snap.Err)
	}
	// What is new may be others' keys, of which the watch tells nothing.
	s.watch.failures = 2
	s.works = false
	s.watchCreated(&pb.WatchResponse{Header: header(20)}, s.now)
	if s.settle(s.now.Add(s.opts.RequestTimeout), nil); s.watch.failures != 0 {
		t.Errorf("a watch that stands counts as failed")
	}
}

// A watch that is stopped while it waits for a connection is no loss of the store.
func TestStoppedWatch(t *testing.T) {
	s := watching(t)
	m := must[*Manager](t)(New(s.opts, zap.NewNop()))
	m.conn.making <- struct{}{} // another request connects
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s.relist(s.now)
	watchRequest(s.view.position).run(ctx, m)(s.state, s.now)
	if s.asks(backoffMin, kindList); s.snap.Err != nil {
		t.Errorf("loss %v", s.snap.Err)
	}
}

func TestSecondRun(t *testing.T) {
	m := must[*Manager](t)(New(newSim(t).opts, zap.NewNop()))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := m.Run(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("the first ends with %v", err)
	}
	if err := m.Run(ctx); err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("the second ends with %v", err)
	}
}

// An etcd lease that was granted for a lost race is revoked, unless a key may be attached to it.
func TestSpareLease(t *testing.T) {
	for name, tt := range map[string]struct {
		spare grant
		next  []kind
	}{
		"no key":      {grant{id: 7}, []kind{kindRevoke, kindWatch}},
		"maybe a key": {grant{id: 7, unsure: true}, []kind{kindWatch}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSim(t)
			s.asks(0, kindList)
			s.list(9)
			s.setClaim(claim(1), s.now)
			s.asks(0, kindWrite)
			r := &pb.ResponseOp{Response: &pb.ResponseOp_ResponseRange{ResponseRange: &pb.RangeResponse{
				Kvs: []*mvccpb.KeyValue{own(10)}, // an operator's, say
			}}}
			resp := &clientv3.TxnResponse{Header: header(10), Responses: []*pb.ResponseOp{r}}
			s.wrote(write{table: s.view.table(), Decision: decided(t, s), resp: resp, spare: tt.spare}, s.now)
			s.asks(0)
			var got []kind
			s.now = s.now.Add(raceDelayUnit)
			for _, r := range s.next(s.now) {
				got = append(got, r.kind)
			}
			slices.Sort(got)
			if !slices.Equal(got, tt.next) || !s.snap.Held() {
				t.Errorf("it holds %v and requests %v, want %v", s.snap.Lease, got, tt.next)
			}
		})
	}
}

// leases grants etcd leases. It can do nothing else, such as revoke one.
type leases struct {
	clientv3.Lease
	granted int64
}

func (l *leases) Grant(_ context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error) {
	l.granted++
	return &clientv3.LeaseGrantResponse{ID: clientv3.LeaseID(l.granted), TTL: ttl}, nil
}

// answers gives the same answer to each transaction.
type answers struct {
	pb.KVClient
	err error
}

func (a answers) Txn(context.Context, *pb.TxnRequest, ...grpc.CallOption) (*pb.TxnResponse, error) {
	return &pb.TxnResponse{Header: header(10)}, a.err
}

// A write that failed leaves its etcd lease to the next one. That a key may be attached to it is not forgotten.
func TestLeaseOfFailedWrite(t *testing.T) {
	for name, tt := range map[string]struct {
		err     error
		age     time.Duration
		granted int64
		unsure  bool
	}{
		"race lost": {granted: 1},
		"no answer": {err: context.DeadlineExceeded, granted: 1, unsure: true},
		// etcd applies the transaction that exceeds its quota, and then answers this.
		"no space":             {err: rpctypes.ErrGRPCNoSpace, granted: 1, unsure: true},
		"lease gone":           {err: rpctypes.ErrGRPCLeaseNotFound, granted: 2},
		"half of the TTL over": {age: 31 * time.Minute, granted: 2},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSim(t)
			s.list(9)
			s.setClaim(claim(1), s.now)
			m := must[*Manager](t)(New(s.opts, zap.NewNop()))
			l := &leases{}
			cli := &client{KV: clientv3.NewKVFromKVClient(answers{err: tt.err}, nil), Lease: l}
			w := write{table: s.view.table(), Decision: decided(t, s)}
			w.LeaseID = 0
			for range 2 {
				w.spare.expires = w.spare.expires.Add(-tt.age)
				if err := m.commit(t.Context(), cli, &w); (err != nil) != (tt.err != nil) {
					t.Fatal(err)
				}
			}
			if l.granted != tt.granted || w.spare.unsure != tt.unsure || w.LeaseID != 0 {
				t.Errorf("%d were granted; left is %+v, want %d, unsure %v", l.granted, w.spare, tt.granted, tt.unsure)
			}
		})
	}
}
