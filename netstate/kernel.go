package netstate

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Kernel is the network state of one network namespace: the one that the thread was in that opened it. It belongs to one
// goroutine.
type Kernel struct {
	conn    *conn
	links   *netlink.Handle
	monitor *monitor
	owned   func(name string) bool

	index map[string]int // of the links, by name, as of the last look
	known *State         // what is in the kernel, so far as we know; nil: look; wanted itself: all is as it should be

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
	m, err := newMonitor()
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

// rounds bounds how often one Reconcile looks again: a device that was made new or went up takes its entries with it.
const rounds = 3

// Forget makes the next Reconcile look at the kernel instead of believing what it last left there.
func (k *Kernel) Forget() { k.known = nil }

// Reconcile makes the kernel's state the desired one. One object that the kernel refuses holds none of the others back. The error
// says that the kernel could not be looked at: then nothing was changed. The desired state is kept: it must not be changed any more.
func (k *Kernel) Reconcile(desired State) (Result, error) { return k.wish(desired, true) }

// AddMissing is Reconcile without removing what is not desired, for as long as the wish may not be complete.
func (k *Kernel) AddMissing(desired State) (Result, error) { return k.wish(desired, false) }

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
		return k.fulfil(was.empty() && is.empty())
	case len(was.Links)+len(is.Links)+len(was.Sysctls)+len(is.Sysctls) > 0:
		k.known = nil // a device takes with it what is on it, and a setting may have any value
		return k.fulfil(false)
	}
	res := Result{Repaired: was.empty() && is.empty()}
	res.Done, res.Failed = k.apply(Diff(was, is))
	if len(res.Failed) > 0 {
		k.known = nil
	}
	return res, nil
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

// expect changes the wish, which is also what tells the monitor what is no surprise.
func (k *Kernel) expect(change func()) {
	k.monitor.change(func(e *expectation) {
		change()
		e.state = k.wanted
	})
}

// fulfil makes the kernel's state what is wished for.
func (k *Kernel) fulfil(sameWish bool) (Result, error) {
	res := Result{Repaired: sameWish && k.acted}
	k.acted = false
	for range rounds {
		if k.known == nil {
			actual, _, err := k.look()
			if err != nil {
				return res, err
			}
			k.known = &actual
		}
		k.acted = true
		actual := *k.known
		actual.Sysctls = readSysctls(k.wanted.Sysctls)
		changes := Diff(actual, *k.wanted)
		if !k.whole {
			changes = withoutSweep(changes)
		}
		if len(changes) == 0 {
			res.Failed = nil
			if k.whole {
				k.known = k.wanted
			}
			break
		}
		done, failed := k.apply(changes)
		res.Done, res.Failed = append(res.Done, done...), failed
		k.known = nil
		touchedLinks := slices.ContainsFunc(done, func(c Change) bool { return c.Obj.kind() == kindLink })
		if len(failed) == 0 && !touchedLinks {
			if k.whole {
				k.known = k.wanted
			}
			break
		}
		if len(done) == 0 {
			break // looking again would only meet the same refusals
		}
	}
	return res, nil
}

// apply carries the changes out in their order: netlink messages in batches, devices and settings one by one.
func (k *Kernel) apply(changes []Change) (done []Change, failed []Failure) {
	var batch []Change
	var reqs []*nl.NetlinkRequest
	note := func(c Change, err error) {
		if err == nil || c.Op == Delete && isGone(err) {
			done = append(done, c)
		} else {
			failed = append(failed, Failure{c, err})
		}
	}
	flush := func() {
		for i, err := range k.conn.do(reqs) {
			note(batch[i], err)
		}
		batch, reqs = batch[:0], reqs[:0]
	}
	for _, c := range changes {
		switch obj := c.Obj.(type) {
		case Link:
			flush()
			note(c, k.applyLink(c, obj))
		case Sysctl:
			flush()
			note(c, writeSysctl(obj))
		default:
			req, err := k.request(c)
			if err != nil {
				note(c, err)
				continue
			}
			batch, reqs = append(batch, c), append(reqs, req)
		}
	}
	flush()
	return done, failed
}

// isGone: deleting what is not there is no failure.
func isGone(err error) bool {
	return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, ErrNoLink)
}

// ErrNoLink is why nothing can be put on a device that could not be made.
var ErrNoLink = errors.New("there is no such device")

func writeSysctl(s Sysctl) error {
	err := os.WriteFile(filepath.Join("/proc/sys", s.Path), []byte(s.Value), 0)
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%w (set it on the host: sysctl -w %s=%s)", err, strings.ReplaceAll(s.Path, "/", "."), s.Value)
	}
	return err
}
