package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd"
)

const (
	// HerdCommand is the hidden subcommand of overlay-bench that runs [HerdMain].
	HerdCommand = "herd-run"

	herdPrefix = "/herd"
	// herdTimeout bounds each wait of a herd.
	herdTimeout = 5 * time.Minute
)

// herdOptions say what a herd is to do.
type herdOptions struct {
	Endpoint        string
	EtcdPID         int
	Nodes, Restarts int
	Quiet           time.Duration // how long to watch them do nothing
	Renewals        time.Duration // how long the renewals of those that started again are spread over
}

// herd measures the store's side of many nodes that start together, and of some of them that start again. The managers
// of all of them run in one process beside etcd, in its namespace.
func herd(ctx context.Context, e *Env) error {
	s, err := newSite(ctx, e, false)
	if err != nil {
		return err
	}
	defer s.close(ctx)
	self, errSelf := os.Executable()
	in, errOptions := json.Marshal(herdOptions{
		Endpoint: s.lab.Etcd().LocalURL(), EtcdPID: s.lab.Etcd().PID(),
		Nodes: pick(e, 5000, 200), Restarts: pick(e, 500, 100),
		Quiet: pick(e, 10*time.Second, 2*time.Second), Renewals: pick(e, 5*time.Second, 2*time.Second),
	})
	if err := errors.Join(errSelf, errOptions); err != nil {
		return err
	}
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, self, HerdCommand)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, os.Stderr
	if err := s.lab.Etcd().Do(cmd.Start); err != nil {
		return err
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("the process of all managers: %w", err)
	}
	var rows []Row
	if err := json.Unmarshal(out.Bytes(), &rows); err != nil {
		return fmt.Errorf("what the process of all managers said: %w", err)
	}
	e.Add(rows...)
	return nil
}

// HerdMain is what the hidden subcommand does: it is told its options on the standard input, and writes its rows to the
// standard output.
func HerdMain(ctx context.Context, in io.Reader, out io.Writer) error {
	var h herder
	if err := json.NewDecoder(in).Decode(&h.o); err != nil {
		return err
	}
	h.all = fmt.Sprintf("%s nodes at once: ", thousands(strconv.Itoa(h.o.Nodes)))
	h.some = fmt.Sprintf("%d of them again: ", h.o.Restarts)
	cli, err := clientv3.New(clientv3.Config{Endpoints: []string{h.o.Endpoint}, Logger: zap.NewNop()})
	if err != nil {
		return err
	}
	defer cli.Close()
	h.cli = cli
	for _, step := range []func(context.Context) error{h.begin, h.rest, h.restart, h.leases, h.memory} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return json.NewEncoder(out).Encode(h.rows) // the managers end with the process
}

// herder is many nodes' managers.
type herder struct {
	o         herdOptions
	all, some string // names of what is measured, at the start of a row
	cli       *clientv3.Client
	nodes     []*herdNode
	known     sync.Map // entries by their revision: all managers share them, else they would not fit into memory
	rows      []Row
}

func (h *herder) add(r Row) { h.rows = append(h.rows, r) }

// count is a row of something that is the same on every machine.
func count(name string, n float64) Row { return row("herd", name, Count, n) }

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
		Endpoints: []string{h.o.Endpoint}, Prefix: herdPrefix, LeaseTTL: ttl, RequestTimeout: herdTimeout, Parse: h.parse,
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

// begin starts all, and waits until each has a lease and knows all others. Each needs four requests at its start, and
// more where it loses a race.
func (h *herder) begin(ctx context.Context) error {
	if _, err := h.cli.Put(ctx, herdPrefix+"/config", siteNetwork); err != nil {
		return err
	}
	began := time.Now()
	for i := range h.o.Nodes {
		n, err := h.start(ctx, subnet.Claim{Attrs: peerLease(i + 1).Attrs}, 0)
		if err != nil {
			return err
		}
		h.nodes = append(h.nodes, n)
	}
	done := make(chan struct{})
	var busiest float64
	var wg sync.WaitGroup
	wg.Go(func() { busiest = h.busiest(time.Second, done) })
	err := h.until(began, "each has a lease", func(n *herdNode) <-chan struct{} { return n.held })
	if err == nil {
		err = h.until(began, "each knows all", func(n *herdNode) <-chan struct{} { return n.all })
	}
	close(done)
	wg.Wait()
	nodes := float64(h.o.Nodes)
	h.add(count(h.all+"requests of each", requestsOf(h.nodes)/nodes).atMost(12))
	h.add(count(h.all+"requests in the busiest second", busiest).atMost(6 * nodes))
	return err
}

func (h *herder) until(began time.Time, what string, event func(*herdNode) <-chan struct{}) error {
	timeout := time.After(herdTimeout)
	for i, n := range h.nodes {
		select {
		case <-event(n):
		case <-timeout:
			return fmt.Errorf("%s: node %d has waited %v for that", what, i+1, herdTimeout)
		}
	}
	h.add(row("herd", h.all+what, Millis, millis(time.Since(began))))
	return nil
}

// busiest is the most requests in one of the intervals until done.
func (h *herder) busiest(interval time.Duration, done <-chan struct{}) (most float64) {
	var before float64
	for tick := time.Tick(interval); ; {
		select {
		case <-tick:
		case <-done:
			return max(most, requestsOf(h.nodes)-before)
		}
		now := requestsOf(h.nodes)
		most, before = max(most, now-before), now
	}
}

func requestsOf(nodes []*herdNode) (sum float64) {
	for _, n := range nodes {
		for _, count := range n.m.Requests() {
			sum += float64(count)
		}
	}
	return sum
}

// rest measures what they do when there is nothing to do: they probe the store about once a minute, for the first time
// 45 to 75 s after their start.
func (h *herder) rest(ctx context.Context) error {
	revision, errBefore := h.revision(ctx)
	requests := requestsOf(h.nodes)
	time.Sleep(h.o.Quiet)
	now, errAfter := h.revision(ctx)
	each := (requestsOf(h.nodes) - requests) / float64(h.o.Nodes)
	h.add(count(fmt.Sprintf("%srequests of each in %v after that", h.all, h.o.Quiet), each).atMost(0.5))
	h.add(count(fmt.Sprintf("%swrites in %v after that", h.all, h.o.Quiet), float64(now-revision)).atMost(0))
	return errors.Join(errBefore, errAfter)
}

func (h *herder) revision(ctx context.Context) (int64, error) {
	resp, err := h.cli.Get(ctx, herdPrefix+"/config", clientv3.WithKeysOnly())
	if err != nil {
		return 0, err
	}
	return resp.Header.Revision, nil
}

// restart ends some nodes and starts them again, as a daemon comes back: with its identity, and the subnets that it
// remembers.
func (h *herder) restart(ctx context.Context) error {
	before, err := h.revision(ctx)
	if err != nil {
		return err
	}
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
	busiest, err := h.busiestTenth(some)
	if err != nil {
		return err
	}
	after, err := h.revision(ctx)
	n := float64(h.o.Restarts)
	h.add(count(h.some+"writes, and so events for the others", float64(after-before)).atMost(0))
	h.add(count(h.some+"requests of each, a renewal among them", requestsOf(some)/n).atMost(12))
	h.add(row("herd", h.some+"renewals in the busiest tenth of their time", PerTime, busiest).
		beside("spread evenly", []float64{n / 10}).ratioAtMost(2.5))
	return err
}

// busiestTenth waits until each node has renewed its lease for the first time, and says how many did so in the same
// tenth of the time that they have for it: the etcd lease of an existing key is renewed at a random time in its first
// quarter.
func (h *herder) busiestTenth(nodes []*herdNode) (float64, error) {
	var tenths [10]float64
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

// leases judges the keys that are in etcd at the end.
func (h *herder) leases(ctx context.Context) error {
	const keys = herdPrefix + "/subnets/"
	resp, err := h.cli.Get(ctx, keys, clientv3.WithPrefix())
	if err != nil {
		return err
	}
	owners := map[subnet.Identity]bool{}
	var subnets []netip.Prefix
	for _, kv := range resp.Kvs {
		e := subnet.ParseEntry(string(kv.Key[len(keys):]), kv.Value, kv.ModRevision, kv.CreateRevision, kv.Lease)
		if e.Err == nil {
			owners[e.Identity] = true
			subnets = append(subnets, e.Subnets.V4)
		}
	}
	h.add(count(h.all+"without a lease of their own", float64(h.o.Nodes-len(owners))).atMost(0))
	h.add(count(h.all+"leases that overlap another", float64(overlaps(subnets))).atMost(0))
	return nil
}

// overlaps counts the prefixes that share addresses with one that stands before them in the order of the addresses.
func overlaps(all []netip.Prefix) (count int) {
	slices.SortFunc(all, addr.ComparePrefix)
	for i := 1; i < len(all); i++ { // prefixes are disjoint or nested
		if all[i].Overlaps(all[i-1]) {
			count++
			all[i] = all[i-1] // the wider one, for those that follow
		}
	}
	return count
}

func (h *herder) memory(context.Context) error {
	own, errOwn := peakRSS(os.Getpid())
	etcd, errEtcd := peakRSS(h.o.EtcdPID)
	h.add(row("herd", h.all+"memory of all nodes and etcd", MB, own+etcd).atMost(8000))
	return errors.Join(errOwn, errEtcd)
}
