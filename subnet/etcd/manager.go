package etcd

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
)

// Manager is the subnet.Manager on etcd. Four loops share one view of the store: sync brings the table in, claim brings this
// node's claim out, keep renews its etcd lease, and probe makes sure that the store is still the one that the view is of.
type Manager struct {
	opts Options
	keys keys
	log  *zap.Logger
	conn *conn

	running atomic.Bool
	updates chan subnet.Snapshot

	// Each wakes up one loop.
	wakeSync, wakeClaim, wakeKeep, wakeProbe chan struct{}

	mu     sync.Mutex // guards what follows
	view   *view
	synced bool // the view was found to be right, and no watch has ended since: it is safe to decide by it
	relist bool // the view has to be read again as a whole
	claim  claimState
	health health
}

var _ subnet.Manager = (*Manager)(nil)

// claimState is what this node wants and what it has.
type claimState struct {
	wanted  *subnet.Claim // as the caller said it; nil before
	decided subnet.Claim  // the one that held and err are about
	held    holding
	before  addr.Per[netip.Prefix] // the subnets held last, to come back to
	err     error
	losses  int       // how often the lease was gone
	lostAt  time.Time // the last time
	said    string    // the text of err that was logged
	wrote   int64     // the revision of the last write
	behind  bool      // a write failed because something is gone: only the watch tells what
}

// holding is this node's lease in the store.
type holding struct {
	lease   subnet.Lease
	key     string
	leaseID int64
	expires time.Time // zero where that is not known (yet), or never
}

// New checks the options. It does not talk to the store.
func New(o Options, log *zap.Logger) (*Manager, error) {
	o, err := o.check()
	if err != nil {
		return nil, err
	}
	one := func() chan struct{} { return make(chan struct{}, 1) }
	m := &Manager{
		opts: o, keys: newKeys(o.Prefix), log: log, conn: newConn(o),
		updates:  make(chan subnet.Snapshot, 1),
		wakeSync: one(), wakeClaim: one(), wakeKeep: one(), wakeProbe: one(),
		view: newView(o.Prefix, o.Parse),
	}
	m.conn.hosts.learned = func() {
		m.update(func() bool { return true })
		poke(m.wakeClaim)
	}
	return m, nil
}

// Run does the work until ctx ends; it can be called once. When it returns, all that it started has ended.
func (m *Manager) Run(ctx context.Context) error {
	if !m.running.CompareAndSwap(false, true) {
		return errors.New("etcd: the manager runs already")
	}
	defer m.Close()
	var wg sync.WaitGroup
	for _, loop := range []func(context.Context){m.syncLoop, m.claimLoop, m.keepLoop, m.probeLoop} {
		wg.Go(func() { loop(ctx) })
	}
	wg.Go(func() { m.conn.hosts.resolve(ctx, net.DefaultResolver.LookupNetIP) })
	wg.Wait()
	return ctx.Err()
}

// Close ends the connection to the store. Who calls Run needn't.
func (m *Manager) Close() { m.conn.close() }

// Updates delivers the newest snapshot.
func (m *Manager) Updates() <-chan subnet.Snapshot { return m.updates }

// Claim says what this node's lease is to be.
func (m *Manager) Claim(c subnet.Claim) {
	m.mu.Lock()
	before := m.claim.wanted
	m.claim.wanted = &c
	m.mu.Unlock()
	if before != nil && before.PublicIP != c.PublicIP {
		// The connections may come from an address that is gone: nothing would tell, and the news would wait for their time-out.
		m.conn.drop(m.conn.current())
	}
	poke(m.wakeClaim)
	poke(m.wakeSync)
}

// Requests counts the requests sent to the store since New, by the name of the RPC (Range, Txn, Watch, LeaseGrant, ...).
func (m *Manager) Requests() map[string]int64 { return m.conn.count.snapshot() }

// Revisions tells up to which revision the table is known to be complete, which goes on while nothing of ours changes, and which one the
// store named last: that of any key, also of those who share it with us. 0: not known yet.
func (m *Manager) Revisions() (complete, newest int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.view.complete, max(m.conn.newest.Load(), m.view.complete)
}

// update changes the shared state under the lock, and delivers a snapshot where f asks for it.
func (m *Manager) update(f func() (deliver bool)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f() {
		m.deliver()
	}
}

// deliver replaces the snapshot that waits to be read, if any. m.mu is held: there is no other writer, so that the channel has
// room once it was emptied.
func (m *Manager) deliver() {
	s := subnet.Snapshot{
		Table:   m.view.table(),
		Claimed: m.claim.decided, Lease: m.claim.held.lease, Expires: m.claim.held.expires, ClaimErr: m.claim.err,
		Losses: m.claim.losses, LostAt: m.claim.lostAt, Endpoints: m.conn.hosts.addresses(),
	}
	s.Since, s.Err = m.health.state()
	select {
	case <-m.updates:
	default:
	}
	m.updates <- s
}

// distrust has the whole table read again, since the view can't be right.
func (m *Manager) distrust(why error) {
	m.mu.Lock()
	again := m.relist
	m.relist = true
	m.mu.Unlock()
	if !again {
		m.log.Warn("resyncing the lease table", zap.Error(why))
	}
	poke(m.wakeSync)
}

func chance() float64 { return rand.Float64() }
