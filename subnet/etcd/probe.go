package etcd

import (
	"context"
	"errors"
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// probeLoop looks now and then, and whenever something odd happened, whether the store is still the one that the view is of.
// A watch alone does not notice: on a store that was emptied it may wait for a revision of the future.
func (m *Manager) probeLoop(ctx context.Context) {
	for failures := 0; ctx.Err() == nil; {
		wait := around(probeEvery, chance())
		if failures > 0 { // soon: the watch may go on, so that nothing else tells that it is over
			wait = backoff(failures-1, chance())
		}
		sleep(ctx, wait, m.wakeProbe)
		m.mu.Lock()
		synced := m.synced
		m.mu.Unlock()
		if !synced || ctx.Err() != nil {
			failures = 0
			continue // whoever gets in sync probes first
		}
		err := m.probe(ctx)
		if errors.Is(err, errRelist) {
			err = nil
		}
		m.outcome(ctx, err)
		if failures++; err == nil {
			failures = 0
		}
	}
}

// outcome takes note of how a request went.
func (m *Manager) outcome(ctx context.Context, err error) {
	if err != nil {
		m.fails(ctx, partRequests, err)
		return
	}
	m.works(partRequests)
}

// facts are the few things by which a view is compared with the store: which revisions some keys are at.
type facts struct {
	view      view // only its header's fields are in use
	revisions map[string]int64
}

// facts picks the config, this node's own key and the key that changed last: a backup that is older than the view lacks that one.
func (m *Manager) facts() facts {
	m.mu.Lock()
	defer m.mu.Unlock()
	v := m.view
	f := facts{
		view:      view{cluster: v.cluster, term: v.term, watched: v.watched},
		revisions: map[string]int64{m.keys.config: v.configRevision},
	}
	for _, key := range []string{m.claim.held.key, v.newest()} {
		if e, ok := v.entry(key); ok {
			f.revisions[m.keys.subnets+key] = e.Revision
		}
	}
	return f
}

// probe asks for the facts in one request. errRelist: they don't fit the view, and it was marked so.
func (m *Manager) probe(ctx context.Context) error {
	f := m.facts()
	if f.view.watched == 0 {
		return nil
	}
	var gets []clientv3.Op
	for key := range f.revisions {
		gets = append(gets, clientv3.OpGet(key, clientv3.WithKeysOnly()))
	}
	var resp *clientv3.TxnResponse
	err := m.conn.request(ctx, func(ctx context.Context, cli *client) (err error) {
		resp, err = cli.Txn(ctx).Then(gets...).Commit()
		return err
	})
	if err != nil {
		return err
	}
	if err := f.check(resp.Header, revisionsIn(resp.Responses)); err != nil {
		m.distrust(err)
		return errRelist
	}
	m.mu.Lock()
	m.view.term = max(m.view.term, resp.Header.GetRaftTerm())
	m.mu.Unlock()
	return nil
}

func revisionsIn(answers []*pb.ResponseOp) map[string]int64 {
	out := map[string]int64{}
	for _, a := range answers {
		for _, kv := range a.GetResponseRange().GetKvs() {
			out[string(kv.Key)] = kv.ModRevision
		}
	}
	return out
}

// check says what in an answer of the store can't be, given the view.
func (f facts) check(h *pb.ResponseHeader, found map[string]int64) error {
	if err := f.view.otherStore(h); err != nil {
		return err
	}
	for key, known := range f.revisions {
		switch now := found[key]; {
		case now == known || now > f.view.watched: // as we know it, or changed since: the watch will tell
		case now == 0:
			return fmt.Errorf("the key %s is gone", key)
		default:
			return fmt.Errorf("the key %s is at revision %d, it was at %d", key, now, known)
		}
	}
	return nil
}
