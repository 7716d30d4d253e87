package etcd

import (
	"fmt"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/overlayd/overlayd/subnet"
)

func TestAcquire(t *testing.T) {
	t.Parallel()
	s := store(t)
	n, snap := join(t, s, 1)
	if got := n.sum() - n.m.Requests()["LeaseKeepAlive"]; got > 6 {
		t.Errorf("%d requests at a fresh start: %v", got, n.m.Requests())
	}
	t.Logf("requests at a fresh start: %v", n.m.Requests())
	value, lease, _ := get(t, s.Client(), subnetKey(snap))
	if value != string(subnet.FormatValue(claim(1).Attrs)) || lease == 0 {
		t.Errorf("the store has %q with lease %d", value, lease)
	}
	if left := time.Until(snap.Expires); left <= 0 || left > time.Minute {
		t.Errorf("the lease expires in %s", left)
	}
	if snap.Claimed != claim(1) {
		t.Errorf("Claimed is %+v", snap.Claimed)
	}

	peer, _ := join(t, s, 2)
	for _, n := range []*node{n, peer} {
		n.until("both leases", func(s subnet.Snapshot) bool { return len(s.Table.Entries) == 2 })
	}
}

func TestRestart(t *testing.T) {
	t.Parallel()
	s := store(t)
	n, first := join(t, s, 1)
	n.stop()
	before := s.Revision()
	n, second := join(t, s, 1)
	time.Sleep(200 * time.Millisecond)
	if second.Lease != first.Lease {
		t.Errorf("it held %v, and holds %v", first.Lease, second.Lease)
	}
	if after := s.Revision(); after != before {
		t.Errorf("the store went from revision %d to %d", before, after)
	}
	if r := n.m.Requests(); r["Txn"] != 0 || r["LeaseGrant"] != 0 {
		t.Errorf("it wrote: %v", r)
	}
	t.Logf("requests at a restart: %v", n.m.Requests())
}

// A burst of changes comes in few snapshots, the last of which has all of it.
func TestBurst(t *testing.T) {
	t.Parallel()
	s := store(t)
	m := must[*Manager](t)(New(options(s), zap.NewNop()))
	ctx := ctxFor(t)
	var wg sync.WaitGroup
	wg.Go(func() { _ = m.Run(ctx) })
	for snap := range m.Updates() {
		if reachable(snap) {
			break
		}
	}
	untilWatching(t, m)
	cli := s.Client()
	const changes = 1000
	for i := 0; i < changes; i += 100 {
		var ops []clientv3.Op
		for j := i; j < i+100; j++ {
			ops = append(ops, clientv3.OpPut(fmt.Sprintf("%s/subnets/10.244.%d.%d-32", prefix, j/200, j%200), ""))
		}
		must[*clientv3.TxnResponse](t)(cli.Txn(ctx).Then(ops...).Commit())
	}
	began, snapshots := time.Now(), 0
	for snap := range m.Updates() {
		snapshots++
		if len(snap.Table.Entries) == changes {
			break
		}
	}
	t.Logf("%d snapshots, all there %s after the last change", snapshots, time.Since(began))
	if snapshots > 10 {
		t.Errorf("%d snapshots", snapshots)
	}
}

func TestParseOption(t *testing.T) {
	t.Parallel()
	s := store(t)
	_, snap := join(t, s, 1)
	o := options(s)
	asked := 0
	o.Parse = func(key string, value []byte, revision, created, leaseID int64) *subnet.Entry {
		asked++
		return subnet.ParseEntry(key, value, revision, created, leaseID)
	}
	m := must[*Manager](t)(New(o, zap.NewNop()))
	defer m.Close()
	table := must[subnet.Table](t)(m.List(ctxFor(t)))
	if asked != 1 || len(table.Entries) != 1 || table.Entries[0].Lease != snap.Lease {
		t.Errorf("asked %d times, got %+v", asked, table.Entries)
	}
}
