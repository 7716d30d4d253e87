package etcd

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.uber.org/zap"

	"github.com/overlayd/overlayd/subnet"
)

const benchPeers = 5000

func benchLease(i int, revision int64) *mvccpb.KeyValue {
	c := claim(i)
	c.NodeName, c.NodeID = fmt.Sprintf("node-%d.example.net", i), fmt.Sprintf("%032x", i)
	return &mvccpb.KeyValue{
		// as many digits everywhere: keys in order
		Key:            fmt.Appendf(nil, "%s/subnets/10.%d.%d.0-24", prefix, 100+i/156, 100+i%156),
		Value:          subnet.FormatValue(c.Attrs),
		CreateRevision: int64(i + 2), ModRevision: revision, Lease: int64(i + 1),
	}
}

// benchListing is what the store answers when n nodes hold a lease.
func benchListing(n int) []*mvccpb.KeyValue {
	kvs := []*mvccpb.KeyValue{keyValue("config", `{"Network":"10.0.0.0/8"}`, 1)}
	for i := range n {
		kvs = append(kvs, benchLease(i, int64(i+2)))
	}
	return kvs
}

func benchView(n int) *view {
	v := newView(prefix, subnet.ParseEntry)
	v.reset(benchListing(n), header(int64(n+2)))
	return v
}

// BenchmarkReset takes in a whole listing: the first one, and one in which nothing has changed.
func BenchmarkReset(b *testing.B) {
	kvs := benchListing(benchPeers)
	b.Run("first", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			v := newView(prefix, subnet.ParseEntry)
			v.reset(kvs, header(benchPeers+2))
		}
	})
	b.Run("again", func(b *testing.B) {
		v := benchView(benchPeers)
		b.ReportAllocs()
		for b.Loop() {
			v.reset(kvs, header(benchPeers+2))
		}
	})
}

// BenchmarkEvent takes in one change and hands out the table.
func BenchmarkEvent(b *testing.B) {
	v := benchView(benchPeers)
	kv := benchLease(2500, 0)
	revision := int64(benchPeers + 2)
	b.ReportAllocs()
	for b.Loop() {
		revision++
		kv.ModRevision = revision
		if !v.events([]*mvccpb.Event{put(kv)}, false) {
			b.Fatal("it is news")
		}
		v.table()
	}
}

// BenchmarkJoin is what lies between the store's word that a node has come, and the snapshot that has it.
func BenchmarkJoin(b *testing.B) {
	for _, n := range []int{100, 1000, 5000, 20000} {
		b.Run(fmt.Sprintf("peers=%d", n), func(b *testing.B) {
			s := benchState(n)
			kv := benchLease(n/3, 0)
			r := &pb.WatchResponse{Header: header(0), Events: []*mvccpb.Event{put(kv)}}
			revision := int64(n + 2)
			b.ReportAllocs()
			for b.Loop() {
				revision++
				kv.ModRevision = revision
				now := time.Now()
				s.noTell = now
				s.watched(r, now)
				s.settle(now, nil)
				if snap := s.snapshot(); snap.Table.Revision != revision || !snap.Held() {
					b.Fatal(snap.Table.Revision)
				}
			}
		})
	}
}

// benchState holds one of the leases of its table.
func benchState(n int) *state {
	s := newState(Options{Prefix: prefix, Parse: subnet.ParseEntry, LeaseTTL: DefaultLeaseTTL}, zap.NewNop())
	s.view, s.trust, s.watch.busy = benchView(n), trustNow, true
	own := s.view.Entries[n/2]
	s.claim.key, s.claim.leaseID, s.snap.Lease = own.Key, own.LeaseID, own.Lease
	return s
}

// BenchmarkHeap tells what one peer takes up in memory once the listing is gone.
func BenchmarkHeap(b *testing.B) {
	for b.Loop() {
		before := heap()
		v := benchView(benchPeers)
		b.ReportMetric(float64(heap()-before)/benchPeers, "B/peer")
		runtime.KeepAlive(v)
	}
}

func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
