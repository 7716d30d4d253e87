package agent

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/subnet"
)

// condition names one thing that must hold for the node to be ready, or that may be worse than it should be.
type condition string

const (
	condUnderlay    condition = "underlay"       // a device leads to the other nodes
	condConfig      condition = "config"         // the network config is valid, and the lease fits it
	condLease       condition = "lease"          // this node holds its lease
	condStore       condition = "store"          // the store answers
	condKernel      condition = "kernel"         // the kernel state is the planned one
	condFirewall    condition = "firewall"       // the rules are in place
	condSubnetEnv   condition = "subnet-file"    // subnet.env is written
	condNodeSet     condition = "node-set"       // traffic between pods and nodes on one network is not masqueraded
	condStateDir    condition = "state-dir"      // the state is persisted
	condConfigKeys  condition = "config-keys"    // every key of the network config means something
	condInitConfig  condition = "init-config"    // the network config in the store is the one that this node was given
	condClaim       condition = "claim"          // the lease says what it should
	condUnreachable condition = "unreachable"    // there is a path to every peer
	condReported    condition = "node-condition" // the store is told whether the node is ready
	condNode        condition = "node-settings"  // what the store has for this node alone is valid
	condSettings    condition = "settings"       // the lesser settings of the kernel are as they should be
	condOffline     condition = "offline"        // the leases are those of the store, not the persisted ones
	condCNI         condition = "cni-config"     // the container runtime uses overlayd's CNI configuration
	condMoved       condition = "subnet-moved"   // the pods that run have addresses of the subnet that this node holds
	condBridge      condition = "pod-bridge"     // the pods' bridge has what it had
	condRoutes      condition = "foreign-route"  // no route of another program comes before one of ours
	condEndpoints   condition = "store-inside"   // the store is outside of the cluster network
	condPlan        condition = "plan"           // nothing in the plan is known not to work
	condPeers       condition = "rejected-lease" // all leases of others make sense
	condSilent      condition = "silent-peers"   // every peer answers when it is pinged
	condPathMTU     condition = "path-mtu"       // packets as large as pods may send get through
	condProbe       condition = "mesh-probe"     // pinging works at all
)

// needed are the conditions without which a node is not ready. The others degrade it: pods still talk.
func needed() []condition {
	return []condition{condUnderlay, condLease, condKernel, condRoutes, condFirewall, condSubnetEnv}
}

// health is the one place that knows what is wrong on this node, since when and why. A problem is logged when it comes,
// when its reason changes, and when it goes.
type health struct {
	mu       sync.Mutex
	log      *zap.Logger
	problems map[condition]status.Problem
	logged   map[condition]time.Time // when a problem was logged last
	recent   map[condition]lines
	changed  chan struct{}             // closed when there is another problem, or one less; then there is a new one
	busy     atomic.Pointer[time.Time] // since when the loop has been at work without a pause; nil while it waits
}

// errStarting is what is wrong with everything in the first moments. It is not worth a line in the log.
var errStarting = errors.New("overlayd is starting")

// newHealth starts with everything that is needed missing, until it was found to hold.
func newHealth(log *zap.Logger) *health {
	h := &health{
		log: log, problems: map[condition]status.Problem{}, logged: map[condition]time.Time{}, recent: map[condition]lines{}, changed: make(chan struct{}),
	}
	h.works()
	for _, c := range needed() {
		h.problems[c] = problemOf(c, errStarting, time.Now())
	}
	return h
}

func problemOf(c condition, err error, since time.Time) status.Problem {
	p := status.Problem{Name: string(c), Reason: err.Error(), Since: since, Fatal: slices.Contains(needed(), c)}
	if errors.Is(err, errStarting) {
		p.Code = status.Starting
	} else if conflict := (*subnet.ConflictError)(nil); errors.As(err, &conflict) {
		p.Code = status.Conflict
	}
	return p
}

// logEvery bounds how often the log has the same trouble with other names: a thousand peers may fall silent one by one.
const logEvery = 30 * time.Second

// set notes that a condition holds (no error) or why it does not.
func (h *health) set(c condition, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	old, was := h.problems[c]
	if err == nil {
		if was {
			delete(h.problems, c)
			h.tell()
			if _, failed := h.logged[c]; failed { // else it was not there yet
				h.write(c, zap.InfoLevel, "condition recovered",
					zap.Duration("after", time.Since(old.Since).Round(time.Millisecond)))
			}
			delete(h.logged, c)
		}
		return
	}
	if was && old.Reason == err.Error() {
		return
	}
	now := time.Now()
	p := problemOf(c, err, now)
	if was {
		p.Since = old.Since
	}
	h.problems[c] = p
	h.tell()
	if was && (c == condSilent || c == condPathMTU) && now.Sub(h.logged[c]) < logEvery {
		return
	}
	h.logged[c] = now
	h.write(c, zap.WarnLevel, "condition failed", zap.Error(err))
}

// lines are those about one condition since a time.
type lines struct {
	since          time.Time
	count, omitted int
}

// mostLines bounds the lines about one condition in a minute: one that comes and goes with a lease that another program
// keeps rewriting would fill the disk.
const mostLines = 20

// write logs, or counts what it omits; the next line has the count. The mutex is held.
func (h *health) write(c condition, level zapcore.Level, message string, field zap.Field) {
	l := h.recent[c]
	if now := time.Now(); now.Sub(l.since) >= time.Minute {
		l.since, l.count = now, 0
	}
	if l.count++; l.count > mostLines {
		l.omitted++
	} else {
		omitted := zap.Skip()
		if l.omitted > 0 {
			omitted = zap.Int("omitted", l.omitted)
		}
		h.log.Log(level, message, zap.String("condition", string(c)), field, omitted)
		l.omitted = 0
	}
	h.recent[c] = l
}

// tell wakes all who wait for a change. The mutex is held.
func (h *health) tell() {
	close(h.changed)
	h.changed = make(chan struct{})
}

// change is closed by the next change. Who has it before the list misses none.
func (h *health) change() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.changed
}

// list returns what is wrong, the longest-standing first; what is only not there yet comes behind what keeps it from
// being there.
func (h *health) list() []status.Problem {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []status.Problem
	for _, p := range h.problems {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b status.Problem) int {
		return cmp.Or(starting(a)-starting(b), a.Since.Compare(b.Since), cmp.Compare(a.Name, b.Name))
	})
	return out
}

func starting(p status.Problem) int {
	if p.Code == status.Starting {
		return 1
	}
	return 0
}

// works notes that the loop has something to do, and waits that it has done it.
func (h *health) works() { h.busy.Store(new(time.Now())) }
func (h *health) waits() { h.busy.Store(nil) }

// stuck is how long the loop has been at work without coming to an end.
func (h *health) stuck() time.Duration {
	if since := h.busy.Load(); since != nil {
		return time.Since(*since)
	}
	return 0
}

// notifyReady reports whether the node is ready for pods, and why not, when that changes, until ctx ends. In the first
// moments it is not known: a daemon that restarts has found nothing wrong with what its predecessor left.
func (h *health) notifyReady(ctx context.Context, notify func(ready bool, reason string)) error {
	type report struct {
		ready  bool
		reason string
	}
	var last report
	for ctx.Err() == nil {
		changed := h.change()
		now := report{ready: true, reason: "ready for pods"}
		problems := h.list()
		if i := slices.IndexFunc(problems, func(p status.Problem) bool { return p.Fatal }); i >= 0 {
			now = report{reason: problems[i].Name + ": " + problems[i].Reason}
			if starting(problems[i]) == 1 { // the others, too: they come last
				now = last
			}
		}
		if now != last {
			last = now
			notify(now.ready, now.reason)
		}
		select {
		case <-ctx.Done():
		case <-changed:
		}
	}
	return ctx.Err()
}
