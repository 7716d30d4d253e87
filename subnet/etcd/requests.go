package etcd

import (
	"context"
	"errors"
	"fmt"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlayd/overlayd/subnet"
)

var (
	// errRelist ends a watch after which the table has to be read again. It is no failure of the store.
	errRelist = errors.New("the lease table must be read again")

	errOtherCluster = fmt.Errorf("the watch was answered by another etcd cluster than the list: %w", errRelist)
)

func listRequest() request {
	return request{kindList, func(ctx context.Context, m *Manager) answer {
		resp, err := m.readAll(ctx)
		return func(s *state, now time.Time) { s.listed(resp, err, now) }
	}}
}

// A page of a listing has firstPage keys at first, then as many as may fill pageBytes: four times as many as the one
// before at most, and at most mostKeys.
const (
	firstPage = 1000
	mostKeys  = 10_000
	pageBytes = 4 << 20
)

// readAll reads everything at one revision, page by page. A page that is too large for one answer is asked for again
// with half as many keys; of a key that is too large even alone, only the name is read. What can be no lease stays
// without its value: whatever stands under the prefix, a node can read it in little memory.
func (m *Manager) readAll(ctx context.Context) (*clientv3.GetResponse, error) {
	all, from, n := (*clientv3.GetResponse)(nil), m.keys.all, int64(firstPage)
	for {
		page, err := m.readPage(ctx, from, n, all)
		switch {
		case status.Code(err) == codes.ResourceExhausted && n > 1:
			n /= 2
			continue
		case status.Code(err) == codes.ResourceExhausted:
			page, err = m.readPage(ctx, from, n, all, clientv3.WithKeysOnly())
		}
		if err != nil {
			return nil, err
		}
		if all == nil {
			all = &clientv3.GetResponse{Header: page.Header}
		}
		bytes := 1
		for _, kv := range page.Kvs {
			bytes += len(kv.Key) + len(kv.Value)
			m.keys.trim(kv)
		}
		all.Kvs = append(all.Kvs, page.Kvs...)
		if !page.More {
			return all, nil
		}
		got := int64(len(page.Kvs))
		from = string(page.Kvs[got-1].Key) + "\x00"
		n = min(max(got*pageBytes/int64(bytes), 1), 4*n, mostKeys)
	}
}

// readPage reads at the revision of the first page. Its error is as the client gives it where the answer is too large.
func (m *Manager) readPage(
	ctx context.Context, from string, n int64, first *clientv3.GetResponse, opts ...clientv3.OpOption,
) (page *clientv3.GetResponse, err error) {
	opts = append(opts, clientv3.WithRange(clientv3.GetPrefixRangeEnd(m.keys.all)), clientv3.WithLimit(n))
	if first != nil {
		opts = append(opts, clientv3.WithRev(first.Header.GetRevision()))
	}
	var tooLarge error
	err = m.conn.request(ctx, func(ctx context.Context, cli *client) (err error) {
		page, err = cli.Get(ctx, from, opts...)
		if tooLarge = nil; status.Code(err) == codes.ResourceExhausted {
			tooLarge = err
		}
		return err
	})
	switch {
	case tooLarge != nil:
		return nil, tooLarge
	case err == nil && first != nil && page.Header.GetClusterId() != first.Header.GetClusterId():
		return nil, errOtherCluster
	}
	return page, err
}

func probeRequest(f facts) request {
	return request{kindProbe, func(ctx context.Context, m *Manager) answer {
		var gets []clientv3.Op
		for key := range f.revisions {
			gets = append(gets, clientv3.OpGet(key, clientv3.WithKeysOnly()))
		}
		resp, err := m.txn(ctx, nil, gets)
		return func(s *state, now time.Time) { s.probed(f, resp, err, now) }
	}}
}

func (m *Manager) txn(
	ctx context.Context, cmps []clientv3.Cmp, ops []clientv3.Op,
) (r *clientv3.TxnResponse, err error) {
	err = m.conn.request(ctx, func(ctx context.Context, cli *client) (err error) {
		r, err = cli.Txn(ctx).If(cmps...).Then(ops...).Commit()
		return err
	})
	return r, err
}

// write is one guarded transaction: what was decided by which table, and what came of it.
type write struct {
	table           subnet.Table
	subnet.Decision       // its Key is empty for the initial config
	spare           grant // an etcd lease that no key is attached to, before and after
	resp            *clientv3.TxnResponse
	err             error
}

func writeRequest(w write) request {
	return request{kindWrite, func(ctx context.Context, m *Manager) answer {
		w.err = m.conn.request(ctx, func(ctx context.Context, cli *client) error { return m.commit(ctx, cli, &w) })
		return func(s *state, now time.Time) { s.wrote(w, now) }
	}}
}

// commit is a transaction that succeeds only if what it was decided by still holds. Otherwise it gets what has changed.
func (m *Manager) commit(ctx context.Context, cli *client, w *write) (err error) {
	value := m.opts.InitConfig
	if w.Key != "" {
		value = subnet.FormatValue(w.Lease.Attrs)
	}
	d := w.Decision
	if d.Key != "" && d.LeaseID == 0 && !d.Reserved {
		if err := m.granted(ctx, cli, &w.spare); err != nil {
			return err
		}
		d.LeaseID = w.spare.id
	}
	w.resp, err = cli.Txn(ctx).
		If(m.keys.guards(w.table, d)...).
		Then(m.keys.writes(d, value)...).
		Else(clientv3.OpGet(m.keys.all, clientv3.WithPrefix(), clientv3.WithMinModRev(w.table.Revision+1))).
		Commit()
	switch {
	case errors.Is(err, rpctypes.ErrLeaseNotFound):
		w.spare = grant{}
	case err != nil: // even for lack of space: etcd may say so of what it has applied
		w.spare.unsure = true
	case w.resp.Succeeded:
		w.Decision = d
	}
	return err
}

// granted makes certain of an etcd lease for a new key: the one left from a lost race if there is one, else a new one.
func (m *Manager) granted(ctx context.Context, cli *client, g *grant) error {
	if g.id != 0 && time.Until(g.expires) > m.opts.LeaseTTL/2 {
		return nil
	}
	asked := time.Now()
	resp, err := cli.Grant(ctx, int64(m.opts.LeaseTTL/time.Second))
	if err == nil {
		*g = grant{id: int64(resp.ID), expires: asked.Add(time.Duration(resp.TTL) * time.Second)}
	}
	return err
}

// revokeRequest is tried once: if it fails, the etcd lease expires by itself.
func revokeRequest(id int64) request {
	return request{kindRevoke, func(ctx context.Context, m *Manager) answer {
		_ = m.conn.request(ctx, func(ctx context.Context, cli *client) error {
			_, err := cli.Revoke(ctx, clientv3.LeaseID(id))
			return err
		})
		return func(*state, time.Time) {}
	}}
}

func renewRequest(id int64) request {
	return request{kindRenew, func(ctx context.Context, m *Manager) answer {
		sent := time.Now()
		var ttl time.Duration
		err := m.conn.request(ctx, func(ctx context.Context, cli *client) (err error) {
			ttl, err = keepAlive(ctx, cli, id)
			return err
		})
		return func(s *state, now time.Time) { s.renewedLease(id, ttl, sent, err, now) }
	}}
}

// keepAlive is one renewal. clientv3's KeepAliveOnce would try again at once, and again, while there is no connection.
func keepAlive(ctx context.Context, cli *client, id int64) (time.Duration, error) {
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

func watchRequest(from position) request {
	return request{kindWatch, func(ctx context.Context, m *Manager) answer {
		created := false
		cli, err := m.conn.get(ctx)
		if err == nil {
			created, err = m.watch(ctx, cli, from)
		}
		if ctx.Err() != nil { // it was stopped, if only while it waited for a connection: the client is as good as before
			created, err = true, errRelist
		} else if cli != nil {
			err = m.conn.failed(cli, err)
		}
		return func(s *state, now time.Time) { s.watchEnded(created, err, now) }
	}}
}

// watch follows the store from a revision, until something breaks. It works on the gRPC stream itself: clientv3's
// watcher reconnects without telling its caller, and waits for ever on a store whose revisions begin again.
func (m *Manager) watch(ctx context.Context, cli *client, from position) (created bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timeout := time.AfterFunc(m.opts.RequestTimeout, func() { cancel(context.DeadlineExceeded) })
	stream, err := pb.NewWatchClient(cli.cc).Watch(ctx)
	if err == nil {
		err = stream.Send(m.watchFrom(from))
	}
	for err == nil {
		var r *pb.WatchResponse
		r, err = stream.Recv()
		switch {
		case err != nil:
		case r.GetHeader().GetClusterId() != from.cluster:
			err = errOtherCluster
		case r.CompactRevision != 0: // no longer to be had one by one
			err = errRelist
		case r.Canceled:
			err = cancelled(r.CancelReason)
		case r.Created:
			created = true
			timeout.Stop()
			m.answers <- func(s *state, now time.Time) { s.watchCreated(r, now) }
		default:
			m.answers <- func(s *state, now time.Time) { s.watched(r, now) }
		}
	}
	if !created && errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
		err = context.DeadlineExceeded
	}
	return created, err
}

func (m *Manager) watchFrom(from position) *pb.WatchRequest {
	return &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key:           []byte(m.keys.all),
		RangeEnd:      []byte(clientv3.GetPrefixRangeEnd(m.keys.all)),
		StartRevision: from.watched + 1,
		// Now and then the store tells its revision while nothing changes, so that an interrupted watch can go on from
		// there although the store has compacted what was long ago.
		ProgressNotify: true,
		// What has gathered while the node was away may be more than fits into one answer.
		Fragment: true,
	}}}
}
