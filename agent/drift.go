package agent

import (
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/netstate"
)

// throttle spaces out how often the kernel is looked at because something changed there: at once after a quiet time, then ever
// more slowly, so that somebody who keeps changing things costs little and is still undone within a second.
type throttle struct {
	gap  time.Duration
	last time.Time // the last look
}

const (
	firstGap, longestGap = 20 * time.Millisecond, 500 * time.Millisecond
	quiet                = 2 * time.Second
)

// due is when to look because of a change that was heard of now.
func (t *throttle) due(now time.Time) time.Time {
	if now.Sub(t.last) > quiet {
		t.gap = 0
	}
	return t.last.Add(t.gap)
}

// looked notes a look that a change asked for.
func (t *throttle) looked(now time.Time) {
	t.last = now
	t.gap = min(max(2*t.gap, firstGap), longestGap)
}

// driftLog counts what was changed behind our back and put right, and says so once a minute for each kind of object.
type driftLog struct {
	mu    sync.Mutex
	log   *zap.Logger
	now   func() time.Time
	kinds map[string]*driftCount
}

type driftCount struct {
	total, pending int
	example        string
	at, said       time.Time
}

const driftEvery = time.Minute

func newDriftLog(log *zap.Logger) *driftLog {
	return &driftLog{log: log, now: time.Now, kinds: map[string]*driftCount{}}
}

func (d *driftLog) note(repaired []netstate.Change) {
	for _, c := range repaired {
		example := c.String()
		if c.Old != nil {
			example += ", found " + c.Old.String()
		}
		d.count(c.Kind(), example)
	}
	d.flush()
}

func (d *driftLog) count(kind, example string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	k := d.kinds[kind]
	if k == nil {
		k = &driftCount{}
		d.kinds[kind] = k
	}
	k.total++
	k.pending++
	k.example, k.at = example, d.now()
}

// flush says what has not been said yet and may be by now.
func (d *driftLog) flush() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for kind, k := range d.kinds {
		if k.pending == 0 || !k.said.IsZero() && d.now().Sub(k.said) < driftEvery {
			continue
		}
		d.log.Warn("reverted external change", zap.String("kind", kind), zap.Int("count", k.pending), zap.Int("total", k.total), zap.String("last", k.example))
		k.pending, k.said = 0, d.now()
	}
}

// due is when something may be said that could not be yet; the zero time: nothing waits.
func (d *driftLog) due() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	var first time.Time
	for _, k := range d.kinds {
		if at := k.said.Add(driftEvery); k.pending > 0 && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	return first
}

// counts are those since the start.
func (d *driftLog) counts() []status.DriftKind {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := []status.DriftKind{}
	for kind, k := range d.kinds {
		out = append(out, status.DriftKind{Kind: kind, Count: k.total, Last: k.example, At: k.at})
	}
	return out
}
