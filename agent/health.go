package agent

import (
	"cmp"
	"errors"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/subnet"
)

// condition names one thing that must hold for the node to be ready, or that may be worse than it should be.
type condition string

const (
	condUnderlay    condition = "underlay"       // a device leads to the other nodes
	condConfig      condition = "config"         // the network config is valid, and the lease fits it
	condLease       condition = "lease"          // this node holds its lease
	condStore       condition = "etcd"           // etcd answers
	condKernel      condition = "kernel"         // the kernel state is the planned one
	condFirewall    condition = "firewall"       // the rules are in place
	condSubnetEnv   condition = "subnet-file"    // subnet.env is written
	condNodeSet     condition = "node-set"       // pods and nodes on one network see each other untranslated
	condStateDir    condition = "state-dir"      // what has to be remembered is
	condConfigKeys  condition = "config-keys"    // every key of the network config means something
	condClaim       condition = "claim"          // the lease says what it should
	condUnreachable condition = "unreachable"    // there is a way to every peer
	condSettings    condition = "settings"       // the lesser settings of the kernel are as they should be
	condOffline     condition = "offline"        // the leases are those of the store, not of memory
	condMoved       condition = "subnet-moved"   // the pods that run have addresses of the subnet that this node holds
	condBridge      condition = "pod-bridge"     // the pods' bridge has what it had
	condRoutes      condition = "foreign-route"  // no route of another program comes before one of ours
	condEndpoints   condition = "etcd-inside"    // etcd is outside of the cluster network
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

// health is the one place that knows what is wrong on this node, since when and why. A problem is logged when it comes, when its
// reason changes, and when it goes.
type health struct {
	mu       sync.Mutex
	log      *zap.Logger
	now      func() time.Time
	problems map[condition]status.Problem
	changed  mailbox[struct{}] // there is another problem, or one less
	busy     time.Time         // since when the loop has been at work without a pause; zero while it waits
}

// errStarting is what is wrong with everything in the first moments. It is not worth a line in the log.
var errStarting = errors.New("overlayd is starting")

// newHealth starts with everything that is needed missing: ready is what has been seen to be so.
func newHealth(log *zap.Logger, now func() time.Time) *health {
	h := &health{log: log, now: now, problems: map[condition]status.Problem{}, changed: newMailbox[struct{}]()}
	for _, c := range needed() {
		h.problems[c] = problemOf(c, errStarting, now())
	}
	h.busy = now()
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

// set notes that a condition holds (no error) or why it does not.
func (h *health) set(c condition, err error) { h.note(c, err, true) }

// note does so, and says in the log that the reason has changed only if it is told to.
func (h *health) note(c condition, err error, say bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	old, was := h.problems[c]
	if err == nil {
		if was {
			delete(h.problems, c)
			h.changed.put(struct{}{})
			h.log.Info("condition recovered", zap.String("condition", string(c)), zap.Duration("after", h.now().Sub(old.Since).Round(time.Millisecond)))
		}
		return
	}
	if was && old.Reason == err.Error() {
		return
	}
	p := problemOf(c, err, h.now())
	if was {
		p.Since = old.Since
	}
	h.problems[c] = p
	h.changed.put(struct{}{})
	if was && !say {
		return
	}
	h.log.Warn("condition failed", zap.String("condition", string(c)), zap.Error(err))
}

// list returns what is wrong, the longest-standing first; what is only not there yet comes behind what keeps it from being there.
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
func (h *health) works() { h.setBusy(h.now()) }
func (h *health) waits() { h.setBusy(time.Time{}) }

func (h *health) setBusy(t time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.busy = t
}

// stuck is how long the loop has been at work without coming to an end.
func (h *health) stuck() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.busy.IsZero() {
		return 0
	}
	return h.now().Sub(h.busy)
}
