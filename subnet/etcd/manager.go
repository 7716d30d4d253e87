package etcd

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/overlayd/overlayd/subnet"
)

// Manager is the subnet.Manager on etcd. Run owns the state; each request to etcd has a goroutine of its own, which
// sends back its answer.
type Manager struct {
	opts Options
	keys keys
	log  *zap.Logger
	conn *conn

	complete atomic.Int64 // revision up to which the table is known
	updates  chan subnet.Snapshot
	claims   chan subnet.Claim
	answers  chan answer
	resolved chan struct{} // the addresses of the endpoints have changed
	ran      atomic.Bool
}

var _ subnet.Manager = (*Manager)(nil)

// request is one thing to ask of etcd. What comes of it is for the owner of the state to apply.
type request struct {
	kind kind
	run  func(ctx context.Context, m *Manager) answer
}

type kind string

const (
	kindList  kind = "list"  // everything, at one revision
	kindProbe kind = "probe" // a few keys, to find out whether the view is still of this store
	kindWatch kind = "watch" // until it breaks
	kindWrite kind = "write" // the claim, or the initial config
	kindRenew kind = "renew" // the etcd lease

	kindRevoke kind = "revoke" // an etcd lease without a key
)

type answer func(s *state, now time.Time)

// New checks the options. It does not talk to the store.
func New(o Options, log *zap.Logger) (*Manager, error) {
	o, err := o.check()
	if err != nil {
		return nil, err
	}
	m := &Manager{
		opts: o, keys: newKeys(o.Prefix), log: log, conn: newConn(o),
		updates: make(chan subnet.Snapshot, 1), claims: make(chan subnet.Claim, 1),
		answers: make(chan answer), resolved: make(chan struct{}, 1),
	}
	m.conn.hosts.changed = func() { subnet.Replace(m.resolved, struct{}{}) }
	return m, nil
}

// Run does the work until ctx ends; a second call is an error. When it returns, all that it started has ended.
func (m *Manager) Run(ctx context.Context) error {
	if m.ran.Swap(true) {
		return errors.New("etcd: Run was called before")
	}
	defer m.Close()
	s := newState(m.opts, m.log)
	var workers sync.WaitGroup
	workers.Go(func() { m.conn.hosts.resolve(ctx, net.DefaultResolver.LookupNetIP) })
	for ctx.Err() == nil {
		now := time.Now()
		s.settle(now, m.conn.hosts.addresses())
		if s.changed {
			subnet.Replace(m.updates, s.snapshot())
			s.told(time.Now(), time.Since(now))
		}
		for _, r := range s.next(now) {
			m.start(ctx, &workers, s, r)
		}
		m.complete.Store(s.view.Revision)
		if !s.changed {
			m.wait(ctx, s)
		}
	}
	done := make(chan struct{})
	go func() { workers.Wait(); close(done) }()
	for {
		select {
		case <-m.answers: // of requests that ctx has ended
		case <-done:
			return ctx.Err()
		}
	}
}

func (m *Manager) start(ctx context.Context, workers *sync.WaitGroup, s *state, r request) {
	ctx, cancel := context.WithCancel(ctx)
	if r.kind == kindWatch {
		s.stopWatch = cancel
	}
	workers.Go(func() {
		defer cancel()
		m.answers <- r.run(ctx, m)
	})
}

// wait applies the next thing that happens to the state.
func (m *Manager) wait(ctx context.Context, s *state) {
	var timeout <-chan time.Time
	if !s.wake.IsZero() {
		timeout = time.After(time.Until(s.wake))
	}
	select {
	case a := <-m.answers:
		if ctx.Err() == nil { // what fails because Run ends is no failure
			a(s, time.Now())
		}
	case c := <-m.claims:
		if s.setClaim(c, time.Now()) {
			// The connection may come from an address that is gone. Its end would only show by a timeout.
			m.conn.close()
		}
	case <-m.resolved:
	case <-timeout:
	case <-ctx.Done():
	}
}

// Close ends the connection to the store. After Run it is not needed.
func (m *Manager) Close() { m.conn.close() }

// Name is what to call the store in a sentence.
func (m *Manager) Name() string { return "etcd" }

// Endpoints are the URLs of the store.
func (m *Manager) Endpoints() []string { return m.opts.Endpoints }

// Updates delivers the newest snapshot.
func (m *Manager) Updates() <-chan subnet.Snapshot { return m.updates }

// Claim says what this node's lease is to be.
func (m *Manager) Claim(c subnet.Claim) { subnet.Replace(m.claims, c) }

// Requests counts the requests sent to the store since New, by the name of the RPC (Range, Txn, Watch, ...).
func (m *Manager) Requests() map[string]int64 { return m.conn.count.snapshot() }

// Revisions tells up to which revision the table is known to be complete, which goes on while nothing of ours changes,
// and which one the store named last: that of any key, also of other users of the store. 0: not known yet.
func (m *Manager) Revisions() (complete, newest int64) {
	complete = m.complete.Load()
	return complete, max(m.conn.newest.Load(), complete)
}
