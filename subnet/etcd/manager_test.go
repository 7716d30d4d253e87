package etcd

import (
	"testing"
	"time"

	"github.com/overlayd/overlayd/subnet"
)

func TestAcquire(t *testing.T) {
	t.Parallel()
	s := store(t)
	n, snap := join(t, s, 1)
	if got := n.sum(); got > 6 {
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
