package netstate

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Kernel is the network state of one network namespace: the one that the thread was in that opened it. It belongs to one
// goroutine.
type Kernel struct {
	SysctlDir string // where settings are written, /proc/sys if empty: in a container that one may be read-only

	conn    *conn
	links   *netlink.Handle
	monitor *monitor
	owned   func(name string) bool

	index   map[string]int // of the devices, by name, when they were last observed
	devices devices        // the same for the monitor

	desired  State  // the monitor reads it too, see change
	prune    bool   // what is ours and not desired is removed
	observed *State // what was last observed, until something is changed
	synced   bool   // nothing more is to be applied; observed is not needed then
	applied  bool   // what is desired was applied before
}

// Open opens the kernel's state. owned tells by its name whether a VXLAN device is ours; what is on such a device is ours too.
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

// Watch hears of changes in the kernel until ctx ends, in a goroutine of its own.
func (k *Kernel) Watch(ctx context.Context) error { return k.monitor.run(ctx) }

// Changed gives a value when something in the kernel is no longer as it was last reconciled, or changed in the rest of the host.
// It is a hint to Observe, no more.
func (k *Kernel) Changed() <-chan struct{} { return k.monitor.changed }

// Failure is a change that the kernel refused.
type Failure struct {
	Change
	Err error
}

func (f Failure) Error() string { return fmt.Sprintf("%s: %v", f.Change, f.Err) }

// Unwrap gives the kernel's error.
func (f Failure) Unwrap() error { return f.Err }

// Result is what came of a Reconcile or an Adjust.
type Result struct {
	Done   []Change
	Failed []Failure
	// Repaired says that nothing else was desired than the time before: what was done reverts an external change.
	Repaired bool
}

// Reconcile makes the kernel's state the desired one, which belongs to the Kernel from then on: the caller may neither change nor read
// its slices any more. One object that the kernel refuses holds none of the others back. The error says that the kernel could not be
// observed: then nothing was changed.
func (k *Kernel) Reconcile(desired State) (Result, error) { return k.replace(desired, true) }

// AddMissing is Reconcile without removing what is not desired, for as long as that may not be complete.
func (k *Kernel) AddMissing(desired State) (Result, error) { return k.replace(desired, false) }

func (k *Kernel) replace(desired State, prune bool) (Result, error) {
	if k.prune != prune {
		k.prune, k.synced, k.applied = prune, false, false
	}
	was := k.desired
	k.change(func() { k.desired = desired })
	return k.apply(was, desired)
}

// Adjust is Reconcile, or AddMissing if that was the last, with a desired state that differs a little from the one before: without the
// objects of gone, if they were exactly so, and with those of come, in the place of what had their keys. While the kernel is as it was
// left, the work depends on what changes, not on how much there is.
func (k *Kernel) Adjust(gone, come State) (Result, error) {
	var was, is State
	k.change(func() { was, is = k.desired.patch(gone, come) })
	return k.apply(was, is)
}

// change changes the desired state, which also tells the monitor what is no external change.
func (k *Kernel) change(f func()) {
	k.monitor.change(func(e *expectation) {
		f()
		e.state, e.devices = &k.desired, k.devices
	})
}

// Compare observes the kernel, and lists what the next Reconcile, AddMissing or Adjust would do if it changed nothing of what is desired.
func (k *Kernel) Compare() ([]Change, error) {
	if _, err := k.look(); err != nil {
		return nil, err
	}
	return k.pending(), nil
}

// Uncover removes those of our routes that lead packets to one of these addresses elsewhere, whatever is desired.
func (k *Kernel) Uncover(ips []netip.Addr) (Result, error) {
	if _, err := k.look(); err != nil {
		return Result{}, err
	}
	var covering State
	for _, r := range k.observed.Routes {
		if r.Table == MainTable && slices.ContainsFunc(ips, r.Dst.Contains) {
			covering.Routes = append(covering.Routes, r)
		}
	}
	var res Result
	res.Done, res.Failed = k.carryOut(Diff(covering, State{}))
	k.observed = nil
	return res, nil
}
