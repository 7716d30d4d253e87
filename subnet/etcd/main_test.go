package etcd

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd/etcdtest"
)

const (
	prefix   = "/overlayd/network"
	config   = `{"Network":"10.244.0.0/16"}`
	patience = time.Minute
)

// node is one manager under test, and the newest snapshot that it delivered.
type node struct {
	t    testing.TB
	m    *Manager
	logs *observer.ObservedLogs
	stop func()

	mu      sync.Mutex
	last    subnet.Snapshot
	next    chan struct{} // closed when there is another
	outages []error       // of the store
}

func options(s *etcdtest.Server) Options {
	return Options{
		Endpoints: []string{s.Endpoint()}, Prefix: prefix, LeaseTTL: time.Minute,
		RequestTimeout: 15 * time.Second,
	}
}

// start runs a manager until the end of the test, or stop.
func start(t testing.TB, o Options) *node {
	t.Helper()
	return run(t, must[*Manager](t)(New(o, zap.NewNop())))
}

func run(t testing.TB, m *Manager) *node {
	t.Helper()
	core, logs := observer.New(zap.DebugLevel)
	m.log = zap.New(core)
	n := &node{t: t, m: m, logs: logs, next: make(chan struct{})}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = m.Run(ctx) })
	wg.Go(func() { n.read(ctx) })
	n.stop = func() { cancel(); wg.Wait() }
	t.Cleanup(n.stop)
	return n
}

func (n *node) read(ctx context.Context) {
	for {
		select {
		case s := <-n.m.Updates():
			n.mu.Lock()
			if n.last.Err == nil && s.Err != nil {
				n.outages = append(n.outages, s.Err)
			}
			n.last = s
			close(n.next)
			n.next = make(chan struct{})
			n.mu.Unlock()
		case <-ctx.Done():
			return
		}
	}
}

func (n *node) state() (subnet.Snapshot, <-chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.last, n.next
}

// until waits for a snapshot that fits.
func (n *node) until(what string, fits func(subnet.Snapshot) bool) subnet.Snapshot {
	n.t.Helper()
	deadline := time.After(patience)
	for {
		s, next := n.state()
		if fits(s) {
			return s
		}
		select {
		case <-next:
		case <-deadline:
			for _, l := range n.logs.All() {
				n.t.Logf("log: %s %v", l.Message, l.ContextMap())
			}
			n.t.Fatalf("waited in vain for: %s; lease %v, ClaimErr %v, Err %v, table at %d with %d entries, ConfigErr %v",
				what, s.Lease.Subnets, s.ClaimErr, s.Err, s.Table.Revision, len(s.Table.Entries), s.Table.ConfigErr)
		}
	}
}

func held(s subnet.Snapshot) bool      { return s.Held() && s.ClaimErr == nil && s.Err == nil }
func away(s subnet.Snapshot) bool      { return s.Err != nil }
func reachable(s subnet.Snapshot) bool { return s.Table.Revision > 0 && s.Err == nil }

func (n *node) untilHeld() subnet.Snapshot {
	n.t.Helper()
	return n.until("a lease", held)
}

// claim is the i-th node's.
func claim(i int) subnet.Claim {
	ip := netip.AddrFrom4([4]byte{192, 168, byte(i >> 8), byte(i)})
	return subnet.Claim{Attrs: subnet.Attrs{
		PublicIP: addr.Per[netip.Addr]{V4: ip}, PublicIPLocal: true, Backend: subnet.VXLAN,
		VTEP:     addr.Per[subnet.VTEP]{V4: subnet.VTEP{VNI: 1, MAC: addr.MAC{2, 0, 0, 0, byte(i >> 8), byte(i)}}},
		Identity: subnet.Identity{NodeName: fmt.Sprintf("node-%d", i), NodeID: fmt.Sprintf("id-%d", i)},
	}}
}

func dual(c subnet.Claim, i int) subnet.Claim {
	a := netip.MustParseAddr("2001:db8::").As16()
	a[14], a[15] = byte(i>>8), byte(i)
	c.PublicIP.V6 = netip.AddrFrom16(a)
	c.VTEP.V6 = subnet.VTEP{VNI: 1, MAC: c.VTEP.V4.MAC}
	return c
}

// join starts a manager that claims for node i, and waits until it holds a lease and follows the store.
func join(t testing.TB, s *etcdtest.Server, i int) (*node, subnet.Snapshot) {
	t.Helper()
	n := start(t, options(s))
	n.m.Claim(claim(i))
	first := n.untilHeld()
	untilWatching(t, n.m)
	time.Sleep(50 * time.Millisecond) // until the store has created the watch
	return n, first
}

func (n *node) sum() (total int64) {
	for _, c := range n.m.Requests() {
		total += c
	}
	return total
}

// shortTTL is that of an etcd lease whose renewals a test waits for: the first comes after 3 to 6 seconds, with as much
// time left.
const shortTTL = 12 * time.Second

// untilKept waits until the etcd lease was renewed at a time when it would have ended otherwise.
func (n *node) untilKept(first subnet.Snapshot) subnet.Snapshot {
	n.t.Helper()
	n.until("a renewal", func(s subnet.Snapshot) bool { return s.Expires.After(first.Expires) })
	return n.until("a renewal after the first end", func(s subnet.Snapshot) bool {
		return held(s) &&
			s.Expires.After(first.Expires.Add(shortTTL))
	})
}

// untilWatching waits until the manager has asked for a watch.
func untilWatching(t testing.TB, m *Manager) {
	t.Helper()
	for began := time.Now(); m.Requests()["Watch"] == 0; time.Sleep(5 * time.Millisecond) {
		if time.Since(began) > patience {
			t.Fatal("waited in vain for a watch")
		}
	}
}

// lost tells each time that the store could not be reached.
func (n *node) lost() []error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.outages
}

func store(t testing.TB, opts ...etcdtest.Option) *etcdtest.Server {
	t.Helper()
	s := etcdtest.Start(t, opts...)
	s.Put(prefix+"/config", config)
	return s
}

func ctxFor(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func subnetKey(s subnet.Snapshot) string {
	return prefix + "/subnets/" + subnet.FormatKey(s.Lease.Subnets)
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// get reads one key.
func get(t testing.TB, cli *clientv3.Client, key string) (value string, lease, mod int64) {
	t.Helper()
	resp := must[*clientv3.GetResponse](t)(cli.Get(ctxFor(t), key))
	if len(resp.Kvs) == 0 {
		return "", 0, 0
	}
	return string(resp.Kvs[0].Value), resp.Kvs[0].Lease, resp.Kvs[0].ModRevision
}
