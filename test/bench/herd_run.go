package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd"
)

// HerdCommand is the hidden subcommand of overlay-bench that runs [HerdMain].
const HerdCommand = "herd-run"

// herdTimeout bounds each wait of a herd.
const herdTimeout = 90 * time.Second

// herdOptions say what a herd is to do.
type herdOptions struct {
	Endpoint, Prefix string
	Nodes, Restarts  int
	Quiet            time.Duration // how long to watch them do nothing
	Renewals         time.Duration // how long the renewals of those that started again are spread over
}

// herdReport is what came of it.
type herdReport struct {
	Held, Known time.Duration // since the start, until each had a lease, and until each knew all
	Requests    int64         // until then
	ByName      map[string]int64
	Busiest     int64 // requests in the busiest second

	QuietRequests, QuietWrites int64 // after that

	RestartEvents, RestartWrites, RestartRequests int64
	BusiestTenth                                  int64 // renewals

	Peak float64 // of memory, in bytes
}

// HerdMain is what the hidden subcommand does: it is told its options on the standard input, and reports on the standard output.
func HerdMain(ctx context.Context, in io.Reader, out io.Writer) error {
	var h herder
	if err := json.NewDecoder(in).Decode(&h.o); err != nil {
		return err
	}
	cli, err := clientv3.New(clientv3.Config{Endpoints: []string{h.o.Endpoint}, Logger: zap.NewNop()})
	if err != nil {
		return err
	}
	defer cli.Close()
	h.cli = cli
	for _, step := range []func(context.Context) error{h.begin, h.rest, h.restart} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return json.NewEncoder(out).Encode(h.report) // the managers end with the process
}

// herder is many nodes' managers.
type herder struct {
	o      herdOptions
	cli    *clientv3.Client
	nodes  []*herdNode
	known  sync.Map // entries by their revision: all managers share them
	report herdReport
}

// herdNode is one of them.
type herdNode struct {
	claim subnet.Claim
	m     *etcd.Manager
	stop  func()
	held  chan struct{} // closed when it has a lease
	since time.Time     // then
	all   chan struct{} // closed when it knows all others
}

func (h *herder) parse(key string, value []byte, revision, created, leaseID int64) *subnet.Entry {
	if e, ok := h.known.Load(revision); ok && e.(*subnet.Entry).Key == key {
		return e.(*subnet.Entry)
	}
	e := subnet.ParseEntry(key, value, revision, created, leaseID)
	h.known.Store(revision, e)
	return e
}

// start starts a node. A short TTL has no effect on a lease that is there, but on when it is renewed.
func (h *herder) start(ctx context.Context, claim subnet.Claim, ttl time.Duration) (*herdNode, error) {
	m, err := etcd.New(etcd.Options{
		Endpoints: []string{h.o.Endpoint}, Prefix: h.o.Prefix, LeaseTTL: ttl, RequestTimeout: herdTimeout, Parse: h.parse,
	}, zap.NewNop())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	n := &herdNode{claim: claim, m: m, held: make(chan struct{}), all: make(chan struct{})}
	m.Claim(claim)
	var wg sync.WaitGroup
	wg.Go(func() { _ = m.Run(ctx) })
	wg.Go(func() { n.read(ctx, h.o.Nodes) })
	n.stop = func() { cancel(); wg.Wait() }
	return n, nil
}

func (n *herdNode) read(ctx context.Context, all int) {
	for held, known := n.held, n.all; ; {
		select {
		case s := <-n.m.Updates():
			if s.Held() && held != nil {
				n.claim.Remembered, n.since = s.Lease.Subnets, time.Now()
				close(held)
				held = nil
			}
			if len(s.Table.Entries) == all && known != nil {
				close(known)
				known = nil
			}
		case <-ctx.Done():
			return
		}
	}
}

// begin starts all, and waits until each has a lease and knows all others.
func (h *herder) begin(ctx context.Context) error {
	began := time.Now()
	for i := range h.o.Nodes {
		n, err := h.start(ctx, subnet.Claim{Attrs: peerLease(i + 1).Attrs}, 0)
		if err != nil {
			return err
		}
		h.nodes = append(h.nodes, n)
	}
	done := make(chan struct{})
	var busiest int64
	var wg sync.WaitGroup
	wg.Go(func() { busiest = h.busiest(time.Second, done) })
	var err error
	h.report.Held, err = until(began, h.nodes, "a lease", func(n *herdNode) <-chan struct{} { return n.held })
	if err == nil {
		h.report.Known, err = until(began, h.nodes, "the whole table", func(n *herdNode) <-chan struct{} { return n.all })
	}
	close(done)
	wg.Wait()
	h.report.ByName = requestsOf(h.nodes)
	h.report.Requests, h.report.Busiest = total(h.report.ByName), busiest
	return err
}

func until(began time.Time, nodes []*herdNode, what string, event func(*herdNode) <-chan struct{}) (time.Duration, error) {
	timeout := time.After(herdTimeout)
	for i, n := range nodes {
		select {
		case <-event(n):
		case <-timeout:
			return 0, fmt.Errorf("node %d has waited %v for %s", i+1, herdTimeout, what)
		}
	}
	return time.Since(began), nil
}

// busiest is the most requests in one of the intervals until done.
func (h *herder) busiest(interval time.Duration, done <-chan struct{}) (most int64) {
	var before int64
	for tick := time.Tick(interval); ; {
		select {
		case <-tick:
		case <-done:
			return max(most, total(requestsOf(h.nodes))-before)
		}
		now := total(requestsOf(h.nodes))
		most, before = max(most, now-before), now
	}
}

// busiestTenth waits until each node has renewed its lease for the first time, and says how many did so in the same tenth of the time
// that they have for it.
func (h *herder) busiestTenth(nodes []*herdNode) (int64, error) {
	var tenths [10]int64
	for began := time.Now(); len(nodes) > 0; time.Sleep(h.o.Renewals / 100) {
		var left []*herdNode
		for _, n := range nodes {
			if n.m.Requests()["LeaseKeepAlive"] == 0 {
				left = append(left, n)
				continue
			}
			<-n.held // it has renewed what it holds
			tenths[min(10*time.Since(n.since)/h.o.Renewals, 9)]++
		}
		if nodes = left; time.Since(began) > herdTimeout && len(left) > 0 {
			return 0, fmt.Errorf("%d nodes have not renewed their lease in %v", len(left), herdTimeout)
		}
	}
	return slices.Max(tenths[:]), nil
}

func requestsOf(nodes []*herdNode) map[string]int64 {
	sum := map[string]int64{}
	for _, n := range nodes {
		for name, count := range n.m.Requests() {
			sum[name] += count
		}
	}
	return sum
}

func total(requests map[string]int64) (sum int64) {
	for n := range maps.Values(requests) {
		sum += n
	}
	return sum
}

// rest looks what they do when there is nothing to do.
func (h *herder) rest(ctx context.Context) error {
	revision, err := h.revision(ctx)
	if err != nil {
		return err
	}
	time.Sleep(h.o.Quiet)
	now, err := h.revision(ctx)
	h.report.QuietWrites = now - revision
	h.report.QuietRequests = total(requestsOf(h.nodes)) - h.report.Requests
	return err
}

func (h *herder) revision(ctx context.Context) (int64, error) {
	resp, err := h.cli.Get(ctx, h.o.Prefix+"/config", clientv3.WithKeysOnly())
	if err != nil {
		return 0, err
	}
	return resp.Header.Revision, nil
}

// restart ends some nodes and starts them again, as a daemon comes back: with its identity, and the subnets that it remembers.
func (h *herder) restart(ctx context.Context) error {
	before, err := h.revision(ctx)
	if err != nil {
		return err
	}
	watching, stop := context.WithCancel(ctx)
	defer stop()
	news := h.cli.Watch(watching, h.o.Prefix+"/", clientv3.WithPrefix(), clientv3.WithRev(before+1))

	some := h.nodes[:h.o.Restarts]
	var wg sync.WaitGroup
	for _, n := range some {
		wg.Go(n.stop)
	}
	wg.Wait()
	for i, n := range some {
		if some[i], err = h.start(ctx, n.claim, 4*h.o.Renewals); err != nil {
			return err
		}
	}
	if h.report.BusiestTenth, err = h.busiestTenth(some); err != nil {
		return err
	}
	h.report.RestartRequests = total(requestsOf(some))
	after, err := h.revision(ctx)
	if err != nil {
		return err
	}
	h.report.RestartWrites = after - before
	stop()
	for r := range news {
		if err := r.Err(); err != nil && !errors.Is(err, context.Canceled) {
			return err
		}
		h.report.RestartEvents += int64(len(r.Events))
	}
	return nil
}
