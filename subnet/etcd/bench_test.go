package etcd

import (
	"fmt"
	"runtime"
	"testing"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/overlayd/overlayd/subnet"
)

const benchPeers = 5000

func benchLease(i int, revision int64) *mvccpb.KeyValue {
	c := claim(i)
	c.NodeName, c.NodeID = fmt.Sprintf("node-%d.example.net", i), fmt.Sprintf("%032x", i)
	return &mvccpb.KeyValue{
		Key:            fmt.Appendf(nil, "%s/subnets/10.%d.%d.0-24", prefix, 100+i/156, 100+i%156), // in the order of the numbers
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
		if !v.events([]*mvccpb.Event{put(kv)}) {
			b.Fatal("it is news")
		}
		v.table()
	}
}

// BenchmarkHeap tells what one peer takes up in memory once the listing is gone.
func BenchmarkHeap(b *testing.B) {
	var before, after runtime.MemStats
	var v *view
	for b.Loop() {
		v = nil
		runtime.GC()
		runtime.ReadMemStats(&before)
		v = benchView(benchPeers)
		runtime.GC()
		runtime.ReadMemStats(&after)
	}
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/benchPeers, "B/peer")
	runtime.KeepAlive(v)
}
