package etcd

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"github.com/overlayd/overlayd/subnet"
)

const (
	askAtOnce    = 16 // requests for a TTL that are under way at the same time
	releaseTries = 5
)

// List reads the table once. It is for the operator's commands, and works without Run.
func (m *Manager) List(ctx context.Context) (subnet.Table, error) {
	resp, err := m.readAll(ctx)
	if err != nil {
		return subnet.Table{}, err
	}
	v := newView(m.opts.Prefix, m.opts.Parse)
	v.reset(resp.Kvs, resp.Header)
	return v.table(), nil
}

// Expiries asks how long each etcd lease of the table still has, by its id; one that has ended is not in the answer. It
// is one request for each: for an operator, not for the daemon.
func (m *Manager) Expiries(ctx context.Context, t subnet.Table) (map[int64]time.Duration, error) {
	var mu sync.Mutex
	out := map[int64]time.Duration{}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(askAtOnce)
	for id := range leaseIDs(t) {
		g.Go(func() error {
			left, err := m.timeToLive(ctx, id)
			if err == nil && left >= 0 {
				mu.Lock()
				defer mu.Unlock()
				out[id] = left
			}
			return err
		})
	}
	return out, g.Wait()
}

func leaseIDs(t subnet.Table) map[int64]bool {
	ids := map[int64]bool{}
	for _, e := range t.Entries {
		if !e.Reserved() {
			ids[e.LeaseID] = true
		}
	}
	return ids
}

// timeToLive is negative for a lease that has ended.
func (m *Manager) timeToLive(ctx context.Context, id int64) (left time.Duration, err error) {
	err = m.conn.request(ctx, func(ctx context.Context, cli *client) error {
		resp, err := cli.TimeToLive(ctx, clientv3.LeaseID(id))
		if err == nil {
			left = time.Duration(resp.TTL) * time.Second
		}
		return err
	})
	return left, err
}

// Release deletes the leases that carry exactly this identity, and says which. Reservations stay. It takes a node out
// of service: the node's daemon has to be stopped before, or it registers again.
func (m *Manager) Release(ctx context.Context, id subnet.Identity) ([]*subnet.Entry, error) {
	if id.NodeID == "" {
		return nil, errors.New("--node-id: expected the id of the node whose lease is to be released")
	}
	for range releaseTries {
		t, err := m.List(ctx)
		if err != nil {
			return nil, err
		}
		var own []*subnet.Entry
		for _, e := range t.Entries {
			if e.Identity == id && !e.Reserved() {
				own = append(own, e)
			}
		}
		done, err := m.remove(ctx, own)
		if done || err != nil {
			return own, err
		}
	}
	return nil, fmt.Errorf("the lease of node %q changed %d times while it was being released: is its daemon running?",
		id.NodeName, releaseTries)
}

// remove deletes entries in one transaction, if none of them has changed.
func (m *Manager) remove(ctx context.Context, es []*subnet.Entry) (done bool, err error) {
	if len(es) == 0 {
		return true, nil
	}
	var guards []clientv3.Cmp
	var deletes []clientv3.Op
	for _, e := range es {
		guards = append(guards, clientv3.Compare(clientv3.ModRevision(m.keys.subnets+e.Key), "=", e.Revision))
		deletes = append(deletes, clientv3.OpDelete(m.keys.subnets+e.Key))
	}
	resp, err := m.txn(ctx, guards, deletes)
	return err == nil && resp.Succeeded, err
}
