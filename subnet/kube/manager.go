package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	utilnet "k8s.io/apimachinery/pkg/util/net"

	"github.com/overlayd/overlayd/subnet"
)

// gatherFor is the least time between two snapshots: of a thousand Nodes that come at once, the first is acted on at
// once, the others in few steps.
const gatherFor = 20 * time.Millisecond

// Manager is the subnet.Manager on the Kubernetes API. Run owns the state; one reflector of client-go each lists and
// watches Nodes and the ConfigMap, and each write has a goroutine of its own. They all report to Run.
type Manager struct {
	opts Options
	log  *zap.Logger
	conn connection

	complete atomic.Int64 // revision up to which the Nodes are known
	requests requests
	updates  chan subnet.Snapshot
	claims   chan subnet.Claim
	ready    chan readiness
	events   chan event
	ran      atomic.Bool
}

var _ subnet.Manager = (*Manager)(nil)

// event changes the state. Only the goroutine that owns the state calls it.
type event func(s *state, now time.Time)

// New checks the options. It does not talk to the API server.
func New(o Options, log *zap.Logger) (*Manager, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	m := &Manager{
		opts: o, log: log, requests: requests{counts: map[string]int64{}},
		updates: make(chan subnet.Snapshot, 1), claims: make(chan subnet.Claim, 1), ready: make(chan readiness, 1),
		events: make(chan event),
	}
	var err error
	m.conn, err = o.connect(m.requests.count, m.complete.Store)
	return m, err
}

// Run does the work until ctx ends; a second call is an error. When it returns, all that it started has ended.
func (m *Manager) Run(ctx context.Context) error {
	if m.ran.Swap(true) {
		return errors.New("kube: Run was called before")
	}
	s := newState(m.opts, m.log)
	s.snap.Endpoints = addresses(m.conn.server)
	var workers sync.WaitGroup
	defer workers.Wait()
	send := func(e event) {
		select {
		case m.events <- e:
		case <-ctx.Done():
		}
	}
	for _, r := range []*reflected{m.nodes(send), m.configMaps(send)} {
		workers.Go(func() { r.run(ctx) })
	}
	var told, tell <-chan time.Time // told: until then, snapshots are gathered
	wake := time.NewTimer(0)
	defer wake.Stop()
	for ctx.Err() == nil {
		if s.changed && told == nil {
			subnet.Replace(m.updates, s.snapshot())
			told = time.After(gatherFor)
		}
		writes, next := s.next(time.Now())
		for w, p := range writes {
			workers.Go(func() {
				err := m.conn.patch(ctx, m.opts.Node, p)
				send(func(s *state, now time.Time) { s.wrote(w, err, now) })
			})
		}
		if tell = nil; !next.IsZero() {
			wake.Reset(time.Until(next))
			tell = wake.C
		}
		select {
		case e := <-m.events:
			e(s, time.Now())
		case c := <-m.claims:
			s.setClaim(c)
		case r := <-m.ready:
			s.readiness = &r
		case <-told:
			told = nil
		case <-tell:
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}

// patch changes a Node.
func (c connection) patch(ctx context.Context, node string, p patch) error {
	body, err := json.Marshal(p.body)
	if err != nil {
		return err
	}
	r := c.client.Patch(p.kind).Resource(nodesResource).Name(node).Param("fieldManager", fieldManager).Timeout(c.within)
	if p.kind == types.ApplyPatchType {
		r = r.Param("force", "true") // the annotations are ours, whoever has written them before
	}
	if p.subresource != "" {
		r = r.SubResource(p.subresource)
	}
	return c.explain(r.Body(body).Do(ctx).Error())
}

// SetReady publishes whether the node is ready for pods, as the Node's condition NetworkUnavailable, and why not. It
// does not wait.
func (m *Manager) SetReady(ready bool, reason string) {
	subnet.Replace(m.ready, readiness{ready, reason})
}

// Updates delivers the newest snapshot.
func (m *Manager) Updates() <-chan subnet.Snapshot { return m.updates }

// Claim says what this node's lease is to be.
func (m *Manager) Claim(c subnet.Claim) { subnet.Replace(m.claims, c) }

// Name is what to call the store in a message.
func (m *Manager) Name() string { return "the Kubernetes API" }

// Endpoints is where the API server is.
func (m *Manager) Endpoints() []string { return []string{m.conn.server} }

// Close ends the connections that are not in use.
func (m *Manager) Close() { utilnet.CloseIdleConnectionsFor(m.conn.client.Client.Transport) }

// Revisions tells up to which resource version the Nodes are known, twice: the API server names no later one.
func (m *Manager) Revisions() (complete, newest int64) { return m.complete.Load(), m.complete.Load() }

// Requests counts the requests sent to the API server since New, by what they are.
func (m *Manager) Requests() map[string]int64 { return m.requests.snapshot() }

// List reads the table once.
func (m *Manager) List(ctx context.Context) (subnet.Table, error) {
	s := newState(m.opts, zap.NewNop())
	for _, r := range []*reflected{m.nodes(nil), m.configMaps(nil)} {
		list, err := r.list(ctx, metav1.ListOptions{})
		if err != nil {
			return subnet.Table{}, err
		}
		items, err := meta.ExtractList(list)
		if err != nil {
			return subnet.Table{}, fmt.Errorf("kube: %w", err)
		}
		r.all(s, items, revisionOf(list), time.Time{})
	}
	return s.snapshot().Table, nil
}

// requests counts requests by what they are.
type requests struct {
	mu     sync.Mutex
	counts map[string]int64
}

func (c *requests) count(r *http.Request) {
	what := map[string]string{http.MethodGet: "list", http.MethodPatch: "patch"}[r.Method]
	if r.URL.Query().Has("watch") {
		what = "watch"
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts[what]++
}

func (c *requests) snapshot() map[string]int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.counts)
}
