package etcd

import (
	"context"
	"errors"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.uber.org/zap"
)

// keeper is the schedule of one etcd lease's renewals.
type keeper struct {
	id       int64
	due      time.Time
	failures int
}

// keepLoop renews the etcd lease that this node's key hangs on. It needs no table: it goes on while the watch is broken.
func (m *Manager) keepLoop(ctx context.Context) {
	var k keeper
	for ctx.Err() == nil {
		held := m.holding()
		if held.leaseID != k.id {
			k = startKeeping(held, m.opts.LeaseTTL, time.Now(), chance())
		}
		if k.id == 0 {
			sleep(ctx, forever, m.wakeKeep)
			continue
		}
		if wait := time.Until(k.due); wait > 0 {
			sleep(ctx, wait, m.wakeKeep)
			continue
		}
		ttl, err := m.renew(ctx, k.id)
		k.next(ttl, err, time.Now(), chance())
	}
}

func (m *Manager) holding() holding {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.claim.held
}

func startKeeping(h holding, ttl time.Duration, now time.Time, rnd float64) keeper {
	k := keeper{id: h.leaseID, due: now.Add(unknownRenewal(ttl, rnd))}
	if left := h.expires.Sub(now); !h.expires.IsZero() {
		k.due = now.Add(renewal(max(left, 0), rnd))
	}
	return k
}

func (k *keeper) next(ttl time.Duration, err error, now time.Time, rnd float64) {
	if err != nil {
		k.due = now.Add(backoff(k.failures, rnd))
		k.failures++
		return
	}
	k.due, k.failures = now.Add(renewal(ttl, rnd)), 0
}

// renew renews once, and takes note of when the lease ends now.
func (m *Manager) renew(ctx context.Context, id int64) (time.Duration, error) {
	sent := time.Now()
	ttl, err := m.keepAlive(ctx, id)
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		m.works(partRequests)
		m.log.Warn("etcd lease expired or was revoked; recreating the key attached to it", zap.Int64("lease", id))
		poke(m.wakeProbe)
		return 0, err
	}
	if err != nil {
		m.fails(ctx, partRequests, err)
		poke(m.wakeProbe)
		return 0, err
	}
	m.works(partRequests)
	m.update(func() bool {
		mine := m.claim.held.leaseID == id
		if mine {
			m.claim.held.expires = sent.Add(ttl)
		}
		return mine
	})
	return ttl, nil
}

// keepAlive is one renewal. clientv3's KeepAliveOnce would try again at once, and again, while there is no connection.
func (m *Manager) keepAlive(ctx context.Context, id int64) (ttl time.Duration, err error) {
	err = m.conn.request(ctx, func(ctx context.Context, cli *client) (err error) {
		ttl, err = keepAliveOnce(ctx, cli, id)
		return err
	})
	return ttl, err
}

func keepAliveOnce(ctx context.Context, cli *client, id int64) (time.Duration, error) {
	stream, err := pb.NewLeaseClient(cli.cc).LeaseKeepAlive(ctx)
	if err != nil {
		return 0, err
	}
	if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: id}); err != nil {
		return 0, err
	}
	resp, err := stream.Recv()
	switch {
	case err != nil:
		return 0, err
	case resp.TTL <= 0:
		return 0, rpctypes.ErrLeaseNotFound
	}
	return time.Duration(resp.TTL) * time.Second, nil
}
