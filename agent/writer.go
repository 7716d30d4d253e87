package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/overlayd/overlayd/agent/state"
	"github.com/overlayd/overlayd/runner"
	"github.com/overlayd/overlayd/subnet"
)

const (
	// leaseEvery is the least time between two writes of lease.json, which is written at once; peersEvery is how long
	// after a change peers.json is: thousands of peers are 300 bytes each.
	leaseEvery, peersEvery = time.Second, 30 * time.Second
	// retryEvery is how long after a write that failed the next one comes, if nothing changes meanwhile.
	retryEvery = 30 * time.Second
	// leaseProgress is how much longer a lease must have become to be worth a write.
	leaseProgress = 10 * time.Minute
)

// stateWriter writes the files of the state directory when they change, in goroutines of its own: the disk may be slow,
// and no peer waits for it.
type stateWriter struct {
	save         func(file string, p state.Persisted) error
	health       *health
	lease, peers *stateFile

	// What the loop has handed over last.
	leaseGist string // without the ports of bridges, which come and go with the pods
	entries   []*subnet.Entry

	mu sync.Mutex // for the errors of both files
}

// stateFile is one of them.
type stateFile struct {
	path    string
	runner  *runner.Runner
	content atomic.Pointer[func() state.Persisted] // nil: what the file has is the newest
	err     error                                  // of the last write
}

func newStateWriter(dir state.Dir, h *health) *stateWriter {
	w := &stateWriter{save: dir.Save, health: h}
	file := func(path string, o runner.Options) *stateFile {
		o.RetryMin, o.RetryMax = retryEvery, retryEvery
		f := &stateFile{path: path}
		f.runner = runner.New(o, func(context.Context) error { return w.write(f) })
		return f
	}
	w.lease = file(dir.LeaseFile(), runner.Options{Min: leaseEvery})
	w.peers = file(dir.PeersFile(), runner.Options{Delay: peersEvery})
	return w
}

func (w *stateWriter) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return w.lease.runner.Run(ctx) })
	g.Go(func() error { return w.peers.runner.Run(ctx) })
	return g.Wait()
}

// flush writes what run has not written.
func (w *stateWriter) flush() {
	_ = w.write(w.lease) // reported
	_ = w.write(w.peers)
}

// put hands over what a file is to have.
func (f *stateFile) put(content func() state.Persisted) {
	f.content.Store(&content)
	f.runner.Wake()
}

// write writes the newest content of a file, if the file does not have it.
func (w *stateWriter) write(f *stateFile) error {
	content := f.content.Swap(nil)
	if content == nil {
		return nil
	}
	err := w.save(f.path, (*content)())
	if err != nil {
		f.content.CompareAndSwap(nil, content)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	f.err = err
	w.health.set(condStateDir, cmp.Or(w.lease.err, w.peers.err))
	return err
}

// save has what a start without the store needs written, so far as it has changed; last: and when it was.
func (a *Agent) save(last bool) {
	f, w := &a.facts, a.writer
	if !f.leases.online() || !f.snap.Held() {
		return
	}
	own := f.subnets
	lease := state.Persisted{
		Subnets: subnet.FormatKey(own), Expires: f.expires().UTC(), Config: json.RawMessage(f.configJSON),
		Addresses: f.addresses(a.opts.Identity), Bridges: a.bridges.known, Settings: f.settings,
	}
	gist := fmt.Sprint(own, f.configJSON, lease.Addresses, f.settings, a.bridges.gist(), lease.Expires.Truncate(leaseProgress))
	if gist != w.leaseGist || last {
		w.leaseGist = gist
		w.lease.put(func() state.Persisted { return lease })
	}
	// While the table is stale, the file keeps the peers that a restart has to know.
	if t := f.leases.table; f.leases.is == fresh && !slices.Equal(t.Entries, w.entries) {
		w.entries = t.Entries
		w.peers.put(func() state.Persisted {
			return state.Persisted{Revision: t.Revision, Peers: state.PeersOf(t, own)}
		})
	}
}

// expires is when this node's lease ends; zero for a reservation. Until the store has said so, the persisted time
// counts.
func (f facts) expires() time.Time {
	own := f.snap.Table.Find(subnet.FormatKey(f.subnets))
	switch {
	case own != nil && own.Reserved() || !f.snap.Expires.IsZero():
		return f.snap.Expires
	case f.persisted.Own() == f.subnets && !f.persisted.Expires.IsZero():
		return f.persisted.Expires
	}
	return time.Now()
}
