package netstate

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Kernel is the network state of one network namespace: the one that the thread was in that opened it. It belongs to
// one goroutine.
type Kernel struct {
	SysctlDir string // where settings are written, /proc/sys if empty: in a container that one may be read-only
	// WireGuardProgram makes a WireGuard device, whose name is its argument, where the kernel has none; empty: no program.
	WireGuardProgram string

	conn    *conn
	links   *netlink.Handle
	monitor *monitor
	owned   func(name string) bool
	index   map[string]int // of the devices that something can be put on, by name

	desired  State        // the monitor reads it too, see change
	prune    bool         // owned objects that are not desired are removed
	last     *observation // without the owned objects
	observed *State       // the owned objects as last observed, until the daemon changes one
	synced   bool         // nothing more is to be applied; observed is not needed then
	applied  bool         // what is desired was applied before
}

// Open opens the kernel's state. owned tells by its name whether a tunnel device is ours; what is on such a device is
// ours too.
func Open(owned func(name string) bool) (*Kernel, error) {
	c, err := dial()
	if err != nil {
		return nil, err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		c.close()
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	m, err := newMonitor(c.fd)
	if err != nil {
		c.close()
		h.Close()
		return nil, err
	}
	return &Kernel{conn: c, links: h, monitor: m, owned: owned}, nil
}

// Close gives the sockets back. The kernel's state stays as it is.
func (k *Kernel) Close() {
	k.conn.close()
	k.links.Close()
	_ = k.monitor.file.Close()
}

// Watch receives the kernel's notifications until ctx ends, in a goroutine of its own.
func (k *Kernel) Watch(ctx context.Context) error { return k.monitor.run(ctx) }

// Changed gives a value when something in the kernel is no longer as it was last reconciled, or changed in the rest of
// the host. It is a hint to Observe, no more.
func (k *Kernel) Changed() <-chan struct{} { return k.monitor.changed }

// Failure is a change that the kernel refused.
type Failure struct {
	Change
	Err error
}

func (f Failure) Error() string { return fmt.Sprintf("%s: %v", f.Change, f.Err) }

// Unwrap gives the kernel's error.
func (f Failure) Unwrap() error { return f.Err }

// Update leads from one desired state to the next. What Gone has goes, if it was desired exactly so; what Come has comes,
// in the place of what had its keys.
type Update struct {
	Gone, Come State
	All        bool // all that was desired goes, whatever Gone has
	Prune      bool // what is not desired is removed; without it, for as long as that may not be complete, it stays
}

// Result is what came of a Reconcile.
type Result struct {
	Done   []Change
	Failed []Failure
	// Repaired says that nothing else was desired than the time before: what was done reverts an external change.
	Repaired bool
}

// Reconcile makes the kernel's state the desired one after an update. The slices of an update of all belong to the
// Kernel from then on: the caller may neither change nor read them any more. While the kernel is as it was left, only
// what differs is sent to it, otherwise it is observed first. One object that the kernel refuses holds none of the
// others back. The error says that the kernel could not be observed: then nothing was changed.
func (k *Kernel) Reconcile(u Update) (Result, error) {
	if k.prune != u.Prune {
		k.prune, k.synced, k.applied = u.Prune, false, false
	}
	was, is := k.desired, u.Come
	k.change(func() {
		if u.All {
			k.desired = is
		} else {
			was, is = k.desired.patch(u.Gone, u.Come)
		}
	})
	return k.apply(was, is)
}

// change changes the desired state, which also tells the monitor what is no external change.
func (k *Kernel) change(f func()) {
	k.monitor.change(func(e *expectation) {
		f()
		e.desired, e.observed = &k.desired, k.last
	})
}

// Desired counts the desired objects by kind.
func (k *Kernel) Desired() map[string]int { return k.desired.Counts() }

// Compare observes the kernel, and lists what the next Reconcile would do if it changed nothing of what is desired.
func (k *Kernel) Compare() ([]Change, error) {
	if _, err := k.observe(); err != nil {
		return nil, err
	}
	return k.pending()
}

// Uncover removes those of our routes that lead packets to one of these addresses elsewhere, whatever is desired.
func (k *Kernel) Uncover(ips []netip.Addr) (Result, error) {
	if _, err := k.observe(); err != nil {
		return Result{}, err
	}
	covering := State{Routes: reject(k.observed.Routes, func(r Route) bool {
		return r.Table != MainTable || !slices.ContainsFunc(ips, r.Dst.Contains)
	})}
	var res Result
	res.Done, res.Failed = k.carryOut(Diff(covering, State{}))
	k.observed = nil
	return res, nil
}
