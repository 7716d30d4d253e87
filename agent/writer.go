package agent

import (
	"cmp"
	"encoding/json"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/agent/state"
	"github.com/overlayd/overlayd/subnet"
)

const (
	// leaseEvery and peersEvery are the least time between two writes of a file: thousands of peers are 300 bytes each.
	leaseEvery, peersEvery = time.Second, 30 * time.Second
	// retryEvery is how long after a write that failed the next one comes, if nothing changes meanwhile.
	retryEvery = 30 * time.Second
	// leaseProgress is how much longer a lease must have become to be worth a write.
	leaseProgress = 10 * time.Minute
)

// stateWriter writes the files of the state directory when they change.
type stateWriter struct {
	health       *health
	lease, peers stateFile

	state   leaseState      // in lease.json
	entries []*subnet.Entry // in peers.json
}

// stateFile is one of them. It is written by a goroutine of its own: the disk may be slow, and no peer waits for it.
type stateFile struct {
	every    time.Duration
	at, next time.Time // the last write, and when the next may be due; zero: when something changes
	jobs     mailbox[func() error]
	pending  atomic.Bool // the last write has not succeeded, or not yet
	err      error       // of the last write
}

// leaseState tells whether lease.json has changed. It has no ports of bridges, which come and go with the pods.
type leaseState struct {
	subnets addr.Per[netip.Prefix]
	config  string // the network config in use
	addrs   addr.Per[netip.Addr]
	bridges string // their names and addresses, and what they have lost
	expires int64  // in units of leaseProgress
}

func newStateWriter(h *health) *stateWriter {
	file := func(every time.Duration) stateFile {
		return stateFile{every: every, jobs: newMailbox[func() error]()}
	}
	w := &stateWriter{health: h, lease: file(leaseEvery), peers: file(peersEvery)}
	w.peers.at = time.Now() // a start has other things to do than to write down thousands of peers
	return w
}

// note has the file written if it has changed, or could not be written before, and it is time; last: there is no other time.
func (f *stateFile) note(changed, last bool, write func() error) (noted bool) {
	now, gap := time.Now(), retryEvery
	if changed {
		gap = f.every
	} else if !f.pending.Load() {
		f.next = time.Time{}
		return false
	}
	if f.next = f.at.Add(gap); now.Before(f.next) && !last {
		return false
	}
	f.pending.Store(true)
	f.jobs.put(write)
	f.at, f.next = now, now.Add(retryEvery)
	return true
}

// end lets run end once everything is written.
func (w *stateWriter) end() {
	close(w.lease.jobs)
	close(w.peers.jobs)
}

func (w *stateWriter) run() {
	var mu sync.Mutex
	var files sync.WaitGroup
	for _, f := range []*stateFile{&w.lease, &w.peers} {
		files.Go(func() {
			for write := range f.jobs {
				err := write()
				mu.Lock()
				f.err = err
				w.health.set(condStateDir, cmp.Or(w.lease.err, w.peers.err))
				mu.Unlock()
				f.pending.Store(err != nil)
			}
		})
	}
	files.Wait()
}

// save has written what a start without etcd needs.
func (a *Agent) save(last bool) {
	w, dir := a.writer, a.state
	if !a.online() || !a.snap.Held() {
		w.lease.next, w.peers.next = time.Time{}, time.Time{} // the store says when there is something again
		return
	}
	expires, bridges := a.expires(), a.bridges.known
	s := leaseState{a.lease.Subnets, a.configJSON, a.current(), a.bridges.gist(), expires.Unix() / int64(leaseProgress.Seconds())}
	if w.lease.note(s != w.state || last, last, func() error {
		return dir.Save(dir.LeaseFile(), state.Persisted{
			Subnets: subnet.FormatKey(s.subnets), Expires: expires.UTC(),
			Config: json.RawMessage(s.config), Addresses: s.addrs, Bridges: bridges,
		})
	}) {
		w.state = s
	}
	t := a.snap.Table
	if time.Now().Before(a.lostUntil) { // a restart has to find out again which peers the store has lost
		w.peers.next = time.Time{}
	} else if w.peers.note(!slices.Equal(t.Entries, w.entries), last, func() error {
		return dir.Save(dir.PeersFile(), state.Persisted{Revision: t.Revision, Peers: state.PeersOf(t, s.subnets)})
	}) {
		w.entries = t.Entries
	}
}

// expires is when this node's lease ends; zero for a reservation. What the store has not said yet, memory knows better.
func (a *Agent) expires() time.Time {
	own := a.snap.Table.Find(subnet.FormatKey(a.lease.Subnets))
	switch {
	case own != nil && own.Reserved() || !a.snap.Expires.IsZero():
		return a.snap.Expires
	case a.remembered.Own() == a.lease.Subnets && !a.remembered.Expires.IsZero():
		return a.remembered.Expires
	}
	return time.Now()
}
