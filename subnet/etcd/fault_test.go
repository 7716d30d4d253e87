package etcd

import (
	"fmt"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/test/nstest"
)

func entries(n int) func(subnet.Snapshot) bool {
	return func(s subnet.Snapshot) bool { return reachable(s) && len(s.Table.Entries) == n }
}

func TestStoppedAndBack(t *testing.T) {
	t.Parallel()
	s := store(t)
	n, first := join(t, s, 1)
	lists := n.m.Requests()["Range"]
	s.Stop()
	gone := n.until("a fault", away)
	if !strings.Contains(gone.Err.Error(), "connection refused") || gone.Lease != first.Lease ||
		time.Since(gone.Since) > patience {
		t.Errorf("got %v since %s, lease %v", gone.Err, gone.Since, gone.Lease)
	}
	time.Sleep(3 * time.Second)
	before := n.sum()
	s.Restart()
	start := time.Now()
	back := n.until("the store", held)
	t.Logf("back after %s; %d requests while it was away", time.Since(start), before)
	if back.Lease != first.Lease {
		t.Errorf("it held %v, and holds %v", first.Lease, back.Lease)
	}
	if now := n.m.Requests()["Range"]; now > lists+20 {
		t.Errorf("%d lists", now-lists)
	}
	if lost := n.lost(); len(lost) != 1 {
		t.Errorf("it went away %d times: %v", len(lost), lost)
	}
	join(t, s, 2) // the watch goes on
	n.until("the other's lease", entries(2))
}

func TestCompactionWhileAway(t *testing.T) {
	t.Parallel()
	s := store(t)
	relay := newRelay(t, s.Addr())
	o := options(s)
	o.Endpoints = []string{"http://" + relay.addr}
	n := start(t, o)
	n.m.Claim(claim(1))
	n.untilHeld()
	relay.cut()
	n.until("a fault", away)
	join(t, s, 2)
	cli := s.Client()
	for range 3 {
		s.Put(prefix+"/elsewhere", "x")
	}
	must[*clientv3.CompactResponse](t)(cli.Compact(ctxFor(t), s.Revision()))
	relay.mend()
	n.until("the other's lease", entries(2))
	join(t, s, 3)
	n.until("one more", entries(3))
}

// What gathers while a node is away may be more than fits into one answer: the watch brings it in parts, without a list.
func TestMuchWhileAway(t *testing.T) {
	t.Parallel()
	s := store(t)
	relay := newRelay(t, s.Addr())
	o := options(s)
	o.Endpoints = []string{"http://" + relay.addr}
	n := start(t, o)
	n.m.Claim(claim(1))
	n.untilHeld()
	untilWatching(t, n.m)
	relay.cut()
	n.until("a fault", away)
	junk := strings.Repeat("x", 1400<<10)
	for range 30 {
		s.Put(prefix+"/subnets/junk", junk)
	}
	lists := n.m.Requests()["Range"]
	join(t, s, 2)
	relay.mend()
	n.until("the other's lease", entries(3))
	if now := n.m.Requests()["Range"]; now != lists {
		t.Errorf("%d lists", now-lists)
	}
}

// Whatever stands under the prefix, a node can start.
func TestListOfJunk(t *testing.T) {
	t.Parallel()
	s := store(t)
	junk := strings.Repeat("x", 1400<<10)
	for i := range 30 {
		s.Put(fmt.Sprintf("%s/junk-%d", prefix, i), junk)
		s.Put(fmt.Sprintf("%s/subnets/10.244.%d.0-24", prefix, i), junk)
	}
	for i := range 3000 {
		s.Put(fmt.Sprintf("%s/subnets/%d", prefix, i), "")
	}
	n, first := join(t, s, 1)
	n.until("everything", entries(30+3000+1))
	if e := n.until("", held).Table.Find("10.244.7.0-24"); e == nil || e.Err == nil {
		t.Errorf("the lease with a large value is %+v", e)
	}
	if first.Lease.Subnets.V4.Addr().As4()[2] < 30 {
		t.Errorf("it got %s, which is taken up", first.Lease.Subnets.V4)
	}
}

func TestEmptied(t *testing.T) {
	t.Parallel()
	s := store(t)
	for range 50 { // so that the new store's revisions stay below for long
		s.Put("/elsewhere", "x")
	}
	n, first := join(t, s, 1)
	other, second := join(t, s, 2)
	s.Wipe()
	s.Restart()
	for _, n := range []*node{n, other} {
		n.until("an empty table", func(s subnet.Snapshot) bool {
			return reachable(s) && s.Table.ConfigErr != nil &&
				!s.Held()
		})
	}
	s.Put(prefix+"/config", config)
	if got := n.untilHeld(); got.Lease != first.Lease {
		t.Errorf("it held %v, and holds %v", first.Lease, got.Lease)
	}
	if got := other.untilHeld(); got.Lease != second.Lease {
		t.Errorf("the other held %v, and holds %v", second.Lease, got.Lease)
	}
	n.until("both", entries(2))
	join(t, s, 3) // the watch is not one that waits for the future
	n.until("one more", entries(3))
}

func TestRestored(t *testing.T) {
	t.Parallel()
	s := store(t)
	n, first := join(t, s, 1)
	restore := s.Backup()
	n.untilHeld()
	late, lateLease := join(t, s, 2) // the backup doesn't know of it
	n.until("both", entries(2))
	s.Put(prefix+"/config", `{"Network":"10.244.0.0/16","Backend":{"MTU":1400}}`)
	n.until("the new config", func(s subnet.Snapshot) bool { return s.Table.Config.Backend.MTU == 1400 })
	restore()
	n.until("the old config", func(s subnet.Snapshot) bool { return held(s) && s.Table.Config.Backend.MTU == 0 })
	if got := late.until("its lease again", func(s subnet.Snapshot) bool {
		return held(s) &&
			s.Table.Config.Backend.MTU == 0
	}); got.Lease != lateLease.Lease {
		t.Errorf("it held %v, and holds %v", lateLease.Lease, got.Lease)
	}
	if got := n.until("both again", entries(2)); got.Lease != first.Lease {
		t.Errorf("it held %v, and holds %v", first.Lease, got.Lease)
	}
}

// A restored store that has gone on: its revisions are beyond ours, and only what was lost tells.
func TestRestoredAndAhead(t *testing.T) {
	t.Parallel()
	s := store(t)
	n, _ := join(t, s, 1)
	restore := s.Backup()
	n.untilHeld()
	late, _ := join(t, s, 2)
	n.until("both", entries(2))
	late.stop()
	relay := newRelay(t, s.Addr())
	o := options(s)
	o.Endpoints = []string{"http://" + relay.addr}
	far := start(t, o)
	far.until("both", entries(2))
	relay.cut()
	far.until("a fault", away)
	restore()
	for range 50 {
		s.Put("/elsewhere", "x")
	}
	relay.mend()
	far.until("the lost lease to be gone", entries(1))
}

func TestOwnKeyDeleted(t *testing.T) {
	t.Parallel()
	s := store(t)
	n, first := join(t, s, 1)
	cli := s.Client()
	_, lease, mod := get(t, cli, subnetKey(first))
	must[*clientv3.DeleteResponse](t)(cli.Delete(ctxFor(t), subnetKey(first)))
	again := n.until("the key again", func(snap subnet.Snapshot) bool {
		return held(snap) && len(snap.Table.Entries) == 1 && snap.Table.Entries[0].Revision > mod
	})
	if again.Lease != first.Lease {
		t.Errorf("it held %v, and holds %v", first.Lease, again.Lease)
	}
	if _, now, _ := get(t, cli, subnetKey(first)); now == 0 || now == lease {
		t.Errorf("it hangs on %d", now)
	}
}

func TestLeaseRevoked(t *testing.T) {
	t.Parallel()
	s := store(t)
	n, first := join(t, s, 1)
	cli := s.Client()
	_, lease, _ := get(t, cli, subnetKey(first))
	must[*clientv3.LeaseRevokeResponse](t)(cli.Revoke(ctxFor(t), clientv3.LeaseID(lease)))
	again := n.until("another etcd lease", func(snap subnet.Snapshot) bool {
		return held(snap) && len(snap.Table.Entries) == 1 && snap.Table.Entries[0].LeaseID != lease
	})
	if again.Lease != first.Lease || again.Expires.IsZero() {
		t.Errorf("it held %v, and holds %v until %s", first.Lease, again.Lease, again.Expires)
	}
}

func TestOverwrittenByAnother(t *testing.T) {
	t.Parallel()
	s := store(t)
	n, first := join(t, s, 1)
	putLease(t, s, subnet.FormatKey(first.Lease.Subnets), string(subnet.FormatValue(claim(7).Attrs)))
	again := n.until("another subnet", func(s subnet.Snapshot) bool { return held(s) && len(s.Table.Entries) == 2 })
	if again.Lease.Subnets == first.Lease.Subnets {
		t.Error("two nodes hold one subnet")
	}
}

func TestKeptAlive(t *testing.T) {
	t.Parallel()
	s := store(t)
	o := options(s)
	o.LeaseTTL = shortTTL
	n := start(t, o)
	n.m.Claim(claim(1))
	first := n.untilHeld()
	before := n.m.Requests()["LeaseKeepAlive"]
	now := n.untilKept(first)
	if now.Lease != first.Lease {
		t.Errorf("it held %v, and holds %v", first.Lease, now.Lease)
	}
	// A renewal may be late, but none comes within the first quarter of the time. One more may be on its way by now.
	most := 1 + int64(now.Expires.Sub(first.Expires)/(shortTTL/4))
	if r := n.m.Requests(); r["LeaseGrant"] != 1 || r["LeaseKeepAlive"] > before+most {
		t.Errorf("at most %d renewals were due; requests: %v", before+most, r)
	}
	n.stop()
	n = start(t, o) // it finds the key, and has to renew soon
	n.m.Claim(claim(1))
	n.until("a renewal", func(s subnet.Snapshot) bool { return held(s) && !s.Expires.IsZero() })
	if r := n.m.Requests(); r["LeaseGrant"] != 0 {
		t.Errorf("requests: %v", r)
	}
}

func TestSlowConsumer(t *testing.T) {
	t.Parallel()
	s := store(t)
	m := must[*Manager](t)(New(options(s), zap.NewNop()))
	ctx := ctxFor(t)
	var wg sync.WaitGroup
	wg.Go(func() { _ = m.Run(ctx) })
	untilWatching(t, m)
	other, _ := join(t, s, 1)
	for i := range 20 {
		s.Put(prefix+"/subnets/10.244."+string(rune('1'+i%9))+"0.0-24", "")
	}
	want := s.Revision()
	other.until("all", func(s subnet.Snapshot) bool { return s.Table.Revision >= want })
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if complete, _ := m.Revisions(); complete >= want {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the newest revision never came")
		}
	}
	time.Sleep(time.Second) // the snapshot of that revision is about to take the place of the last one
	if got := <-m.Updates(); got.Table.Revision != want {
		t.Errorf("it got revision %d, the newest is %d", got.Table.Revision, want)
	}
	select {
	case <-m.Updates():
		t.Error("something was queued")
	case <-time.After(100 * time.Millisecond):
	}
}

func TestSeveralEndpoints(t *testing.T) {
	t.Parallel()
	s := store(t)
	dead := newRelay(t, s.Addr())
	dead.cut()
	o := options(s)
	o.Endpoints = []string{"http://" + dead.addr, s.Endpoint()}
	n := start(t, o)
	n.m.Claim(claim(1))
	n.untilHeld()
}

// A store that is hung: the connection stands, and nothing is answered.
func TestHung(t *testing.T) {
	t.Parallel()
	s := store(t)
	relay := newRelay(t, s.Addr())
	o := options(s)
	o.Endpoints = []string{"http://" + relay.addr}
	o.LeaseTTL, o.RequestTimeout = 4*time.Second, time.Second // a renewal comes within 2 s
	n := start(t, o)
	n.m.Claim(claim(1))
	first := n.untilHeld()
	relay.frozen.Store(true)
	snap := n.until("a fault", away)
	if !strings.Contains(snap.Err.Error(), "no answer from") {
		t.Errorf("it says %v", snap.Err)
	}
	relay.frozen.Store(false)
	if again := n.untilHeld(); again.Lease.Subnets != first.Lease.Subnets {
		t.Errorf("it held %v, and holds %v", first.Lease, again.Lease)
	}
}

// Not parallel: it counts all goroutines there are.
func TestNoGoroutineLeft(t *testing.T) {
	s := store(t)
	n, _ := join(t, s, 1)
	n.stop()
	before := runtime.NumGoroutine()
	for i := range 3 {
		n, _ := join(t, s, i)
		n.stop()
	}
	deadline := time.Now().Add(5 * time.Second)
	for runtime.NumGoroutine() > before+2 && time.Now().Before(deadline) {
		time.Sleep(20 * time.Millisecond)
	}
	if now := runtime.NumGoroutine(); now > before+2 {
		buf := make([]byte, 1<<20)
		t.Errorf("%d goroutines before, %d after\n%s", before, now, buf[:runtime.Stack(buf, true)])
	}
}

// relay stands between a manager and its store. Nobody else takes its address while it is cut.
type relay struct {
	t      testing.TB
	addr   string
	to     string
	frozen atomic.Bool // nothing gets through, and nobody is told

	mu    sync.Mutex
	ln    net.Listener
	conns map[net.Conn]bool
	wg    sync.WaitGroup
}

func newRelay(t testing.TB, to string) *relay {
	r := &relay{t: t, to: to, conns: map[net.Conn]bool{}}
	r.listen(net.JoinHostPort(nstest.Loopback().String(), "0"))
	r.addr = r.ln.Addr().String()
	t.Cleanup(func() { r.cut(); r.wg.Wait() })
	return r
}

func (r *relay) listen(addr string) {
	r.t.Helper()
	ln := must[net.Listener](r.t)(net.Listen("tcp", addr))
	r.mu.Lock()
	r.ln = ln
	r.mu.Unlock()
	r.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			r.wg.Go(func() { r.serve(c) })
		}
	})
}

func (r *relay) serve(c net.Conn) {
	up, err := net.Dial("tcp", r.to)
	if err != nil {
		_ = c.Close()
		return
	}
	r.mu.Lock()
	r.conns[c], r.conns[up] = true, true
	r.mu.Unlock()
	var wg sync.WaitGroup
	wg.Go(func() { r.pipe(up, c) })
	wg.Go(func() { r.pipe(c, up) })
	wg.Wait()
}

func (r *relay) pipe(to, from net.Conn) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		for r.frozen.Load() {
			time.Sleep(10 * time.Millisecond)
		}
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// cut ends all connections and refuses new ones.
func (r *relay) cut() {
	r.frozen.Store(false)
	r.mu.Lock()
	defer r.mu.Unlock()
	_ = r.ln.Close()
	for c := range r.conns {
		_ = c.Close()
	}
	clear(r.conns)
}

func (r *relay) mend() { r.listen(r.addr) }
