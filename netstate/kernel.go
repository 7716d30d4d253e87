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

	index   map[string]int // of the devices, by name, as of the last look
	devices devices        // the same for the monitor
	// nexthops says that routes of the host have nexthop objects, of which the kernel tells by themselves.
	nexthops bool
	known    *State // what is in the kernel, so far as we know; nil: look; wanted itself: all is as it should be
	had      sizes  // of what was there when it was last known

	wanted *State // what was last wished for; the monitor reads it too: see expect
	lent   bool   // what it is made of belongs to who wished for it
	whole  bool   // it is all that there is to be of ours: what is not in it goes
	acted  bool   // something was done about it
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
	// Repaired says that nothing else was wished for than the time before: what was done puts right what somebody else changed.
	Repaired bool
}

// Forget makes the next Reconcile look at the kernel instead of believing what it last left there.
func (k *Kernel) Forget() {
	k.measure()
	k.known = nil
}

// Reconcile makes the kernel's state the desired one. One object that the kernel refuses holds none of the others back. The error
// says that the kernel could not be looked at: then nothing was changed. The desired state is kept: it must not be changed any more.
func (k *Kernel) Reconcile(desired State) (Result, error) { return k.wish(desired, true) }

// AddMissing is Reconcile without removing what is not desired, for as long as the wish may not be complete.
func (k *Kernel) AddMissing(desired State) (Result, error) { return k.wish(desired, false) }

// Uncover removes those of our routes that lead packets to one of these addresses elsewhere, whatever is desired.
func (k *Kernel) Uncover(ips []netip.Addr) (Result, error) {
	if _, err := k.look(); err != nil {
		return Result{}, err
	}
	var covering State
	for _, r := range k.known.Routes {
		if r.Table == MainTable && slices.ContainsFunc(ips, r.Dst.Contains) {
			covering.Routes = append(covering.Routes, r)
		}
	}
	var res Result
	res.Done, res.Failed = k.apply(Diff(covering, State{}))
	k.known = nil
	return res, nil
}

func (k *Kernel) wish(desired State, whole bool) (Result, error) {
	same := k.wanted != nil && k.whole == whole && k.wanted.equal(&desired)
	if !same {
		k.expect(func() { k.wanted, k.lent, k.whole = &desired, true, whole })
	}
	return k.fulfil(same)
}

// Adjust is Reconcile, or AddMissing if that was the last, with a wish that differs a little from the one before: the objects of gone
// are no longer wished for, if they were exactly so, and those of come are, in the place of what had their keys. While the kernel is as it
// was left, the work depends on what changes, not on how much there is.
func (k *Kernel) Adjust(gone, come State) (Result, error) {
	was, is := k.patch(gone, come)
	switch {
	case k.known == nil || k.known != k.wanted:
		return k.fulfil(was.size()+is.size() == 0)
	case len(was.Links)+len(is.Links)+len(was.Sysctls)+len(is.Sysctls) > 0:
		k.known = nil // a device takes with it what is on it, and a setting may have any value
		return k.fulfil(false)
	}
	res := Result{Repaired: was.size()+is.size() == 0}
	res.Done, res.Failed = k.apply(Diff(was, is))
	if len(res.Failed) > 0 {
		k.known = nil
	}
	return res, nil
}

// Compare looks at the kernel, and lists what would make it the state that was last wished for. It changes nothing.
func (k *Kernel) Compare() ([]Change, error) {
	if k.wanted == nil {
		return nil, nil
	}
	if _, err := k.look(); err != nil {
		return nil, err
	}
	actual := *k.known
	actual.Sysctls = readSysctls(k.wanted.Sysctls)
	return Diff(actual, *k.wanted), nil
}

// patch changes the wish, and what is known with it if the two are one.
func (k *Kernel) patch(gone, come State) (was, is State) {
	k.expect(func() {
		synced := k.known != nil && k.known == k.wanted
		switch {
		case k.wanted == nil:
			k.wanted = &State{}
		case k.lent:
			k.wanted = new(k.wanted.clone())
		}
		if synced {
			k.known = k.wanted
		}
		k.lent = false
		was, is = k.wanted.patch(gone, come)
	})
	return was, is
}

func (k *Kernel) tell(e *expectation) { e.state, e.devices = k.wanted, k.devices }

// expect changes the wish, which is also what tells the monitor what is no surprise.
func (k *Kernel) expect(change func()) {
	k.monitor.change(func(e *expectation) {
		change()
		k.tell(e)
	})
}
