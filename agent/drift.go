package agent

import (
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/netstate"
)

// driftLog counts external changes that were reverted, and logs them once a minute for each kind of object.
type driftLog struct {
	mu    sync.Mutex
	log   *zap.Logger
	kinds map[string]*driftCount
}

type driftCount struct {
	status.DriftKind
	pending int       // not logged yet
	logged  time.Time // when the last line was
}

const (
	driftEvery = time.Minute
	driftDelay = 100 * time.Millisecond // what one round reverts makes one line
)

func newDriftLog(log *zap.Logger) *driftLog {
	return &driftLog{log: log, kinds: map[string]*driftCount{}}
}

// reverted counts changes of the kernel, and describes only one of each kind: they may be thousands.
func (d *driftLog) reverted(changes []netstate.Change) {
	counts, last := map[string]int{}, map[string]netstate.Change{}
	for _, c := range changes {
		counts[c.Kind()]++
		last[c.Kind()] = c
	}
	for kind, c := range last {
		d.count(kind, counts[kind], describe(c))
	}
}

// count counts n changes of a kind; last describes the last of them.
func (d *driftLog) count(kind string, n int, last string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	k := d.kinds[kind]
	if k == nil {
		k = &driftCount{}
		d.kinds[kind] = k
	}
	k.DriftKind = status.DriftKind{Kind: kind, Count: k.Count + n, Last: last, At: time.Now()}
	if k.pending += n; k.pending == n {
		time.AfterFunc(max(driftDelay, time.Until(k.logged.Add(driftEvery))), func() { d.flush(k) })
	}
}

func (d *driftLog) flush(k *driftCount) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.write(k)
}

// flushAll is for the end of the daemon, when no minute has to pass any more.
func (d *driftLog) flushAll() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, k := range d.kinds {
		d.write(k)
	}
}

func (d *driftLog) write(k *driftCount) {
	if k.pending == 0 {
		return
	}
	d.log.Warn("reverted external change", zap.String("kind", k.Kind), zap.Int("count", k.pending),
		zap.Int("total", k.Count), zap.String("last", k.Last))
	k.pending, k.logged = 0, time.Now()
}

// counts are those since the start.
func (d *driftLog) counts() []status.DriftKind {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := []status.DriftKind{}
	for _, k := range d.kinds {
		out = append(out, k.DriftKind)
	}
	return out
}

// describe says what a change of the kernel is, and what it replaces.
func describe(c netstate.Change) string {
	if c.Old == nil {
		return c.String()
	}
	return c.String() + ", found " + c.Old.String()
}
