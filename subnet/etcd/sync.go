package etcd

import (
	"context"
	"errors"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// errRelist ends a watch whose view has to be read again as a whole. It is no fault of the store.
var errRelist = errors.New("the lease table must be read again")

// syncLoop keeps the view equal to the store: one read of everything, then a watch from there; and again, when that breaks.
func (m *Manager) syncLoop(ctx context.Context) {
	for attempt := 0; ctx.Err() == nil; attempt++ {
		watched, err := m.syncOnce(ctx)
		switch {
		case watched: // it worked until now: worth another try before it is called a fault
			attempt = 0
		case !errors.Is(err, errRelist):
			m.fails(ctx, partTable, err)
		}
		sleep(ctx, backoff(attempt, chance()), nil)
	}
}

// syncOnce reports whether it came to watch, and why that ended.
func (m *Manager) syncOnce(ctx context.Context) (watched bool, err error) {
	if err := m.catchUp(ctx); err != nil {
		return false, err
	}
	m.works(partRequests)
	m.setSynced(true)
	defer m.setSynced(false)
	poke(m.wakeClaim)
	if err = m.letClaim(ctx); err != nil {
		return false, err
	}
	var broke error
	err = m.conn.try(ctx, func(cli *client) error {
		if watched, broke = m.watch(ctx, cli); !watched {
			return broke
		}
		broke = m.conn.failed(cli, broke)
		return nil
	})
	if watched {
		err = broke
	}
	return watched, err
}

// letClaim puts the watch off while this node's claim is on its way, and for a while behind it where many claim. Of thousands of nodes
// that start together, each would be told of every other's claim one by one, which is more work for the store than all the rest, and
// keeps it from the claims. What happens before the watch begins, it tells in one piece.
func (m *Manager) letClaim(ctx context.Context) error {
	began := time.Now()
	until := began.Add(claimSoon)
	for settled := false; ; {
		switch wanted, done, others := m.claiming(); {
		case settled:
		case done:
			settled, until = true, time.Now().Add(watchDelay(others, time.Since(began), chance()))
		case wanted:
			until = began.Add(claimPatience)
		default:
			began = time.Now() // it is not the store that takes its time
		}
		left := time.Until(until)
		switch {
		case m.mustRelist():
			return errRelist
		case left <= 0 || ctx.Err() != nil:
			return ctx.Err()
		}
		sleep(ctx, left, m.wakeSync)
	}
}

// claiming reports whether this node claims a lease, whether the watch need not wait for that (it is known what came of it, or it can't
// go on without), and how many wrote to the store meanwhile.
func (m *Manager) claiming() (wanted, done bool, others int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := &m.claim
	return c.wanted != nil, c.held.key != "" || c.err != nil || c.behind, max(c.wrote-m.view.watched, 0)
}

func (m *Manager) setSynced(to bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.synced, m.claim.behind = to, false
}

// catchUp makes the view one that a watch can go on from. After a mere interruption it is that already, so that a store which
// comes back isn't asked for the whole table by all nodes at once; but first it has to be sure that it is the same store.
func (m *Manager) catchUp(ctx context.Context) error {
	m.mu.Lock()
	list := m.relist || m.view.watched == 0
	m.mu.Unlock()
	if !list {
		err := m.probe(ctx)
		if !errors.Is(err, errRelist) {
			return err
		}
	}
	return m.list(ctx)
}

// list reads everything at one revision.
func (m *Manager) list(ctx context.Context) error {
	resp, err := m.readAll(ctx)
	if err != nil {
		return err
	}
	m.update(func() bool {
		m.view.reset(resp.Kvs, resp.Header)
		m.relist = false
		m.checkHeld()
		return true
	})
	return nil
}

// watch follows the store from where the view is, until something breaks. It works on the gRPC stream itself: clientv3's watcher
// reconnects behind its caller's back, and goes on waiting for ever on a store whose revisions start anew.
func (m *Manager) watch(ctx context.Context, cli *client) (watched bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := pb.NewWatchClient(cli.cc).Watch(ctx)
	if err != nil {
		return false, err
	}
	if err := stream.Send(m.watchRequest()); err != nil {
		return false, err
	}
	var recvErr error
	responses := make(chan *pb.WatchResponse, 4)
	go func() {
		defer close(responses)
		recvErr = receive(ctx, stream, responses)
	}()
	defer func() { // the goroutine has ended when the channel is closed
		cancel()
		for range responses {
		}
	}()
	if err := m.watchCreated(ctx, responses, &recvErr); err != nil {
		return false, err
	}
	m.works(partTable)
	return true, m.follow(ctx, responses, &recvErr)
}

func (m *Manager) watchRequest() *pb.WatchRequest {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key:           []byte(m.keys.all),
		RangeEnd:      []byte(clientv3.GetPrefixRangeEnd(m.keys.all)),
		StartRevision: m.view.watched + 1,
		// Now and then the store tells its revision while nothing changes, so that an interrupted watch can go on from there
		// although the store has compacted what was long ago.
		ProgressNotify: true,
	}}}
}

func receive(ctx context.Context, stream pb.Watch_WatchClient, to chan<- *pb.WatchResponse) error {
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		select {
		case to <- r:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// watchCreated waits for the store's word that the watch is there. A revision below ours means that the member lags behind, or
// that the store is another one now, whose revision may be long in reaching ours: a probe tells.
func (m *Manager) watchCreated(ctx context.Context, responses <-chan *pb.WatchResponse, recvErr *error) error {
	timeout := time.NewTimer(m.opts.RequestTimeout)
	defer timeout.Stop()
	select {
	case r, ok := <-responses:
		if !ok {
			return *recvErr
		}
		if _, err := m.take(r); err != nil {
			return err
		}
		m.mu.Lock()
		behind := r.GetHeader().GetRevision() < m.view.watched
		m.mu.Unlock()
		if behind {
			return m.probe(ctx)
		}
		return nil
	case <-timeout.C:
		return context.DeadlineExceeded
	}
}

// follow takes in what the watch tells. The first news goes out at once; a burst behind it is gathered into few snapshots.
func (m *Manager) follow(ctx context.Context, responses <-chan *pb.WatchResponse, recvErr *error) error {
	var next time.Time // before which no snapshot goes out
	var due <-chan time.Time
	tell := func() {
		due, next = nil, time.Now().Add(pace(m.tell()))
	}
	defer func() {
		if due != nil { // the next watch begins behind what was taken in: nobody would ever hear of it
			tell()
		}
	}()
	for {
		select {
		case r, ok := <-responses:
			if !ok {
				return *recvErr
			}
			changed, err := m.take(r)
			if err != nil {
				return err
			}
			switch wait := time.Until(next); {
			case !changed || due != nil:
			case wait > 0:
				due = time.After(wait)
			default:
				tell()
			}
		case <-due:
			tell()
		case <-m.wakeSync:
			if m.mustRelist() {
				return errRelist
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// tell hands on what has changed, and says how long that took.
func (m *Manager) tell() time.Duration {
	began := time.Now()
	m.update(func() bool { m.checkHeld(); return true })
	poke(m.wakeClaim)
	return time.Since(began)
}

func (m *Manager) mustRelist() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.relist
}

// take brings one message of the watch into the view.
func (m *Manager) take(r *pb.WatchResponse) (changed bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case r.GetHeader().GetClusterId() != m.view.cluster:
		m.relist = true
		return false, errRelist
	case r.CompactRevision != 0: // what came since the view is no longer to be had one by one
		m.relist = true
		return false, errRelist
	case r.Canceled:
		return false, cancelled(r.CancelReason)
	case len(r.Events) > 0:
		return m.view.events(r.Events), nil
	case !r.Created:
		m.view.progress(r.GetHeader().GetRevision())
	}
	return false, nil
}
