package netstate

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// rounds bounds how often one call observes again: a device that was recreated or went up takes its entries with it.
const rounds = 3

// apply makes the kernel's state the desired one. What is desired differs from the time before in that was is gone and
// is has come, be it all of it or the objects of one peer.
func (k *Kernel) apply(was, is State) (Result, error) {
	var differs []Change
	if k.applied {
		differs = Diff(was, is)
	}
	res := Result{Repaired: k.applied && len(differs) == 0}
	// A device takes with it what is on it, and a setting may have any value.
	if k.synced && !slices.ContainsFunc(differs, single) {
		res.Done, res.Failed = k.carryOut(differs)
		k.synced = len(res.Failed) == 0
		return res, nil
	}
	k.synced, k.applied = false, res.Repaired
	if err := k.prepare(&res); err != nil {
		return res, err
	}
	k.applied = true
	for range rounds {
		changes, err := k.pending()
		if err != nil {
			return res, err
		}
		done, failed := k.carryOut(changes)
		res.Done, res.Failed = append(res.Done, done...), failed
		k.observed = nil
		if len(failed) == 0 && !slices.ContainsFunc(done, aboutDevice) {
			k.synced = k.prune
			break
		}
		if len(done) == 0 {
			break // to observe again would only meet the same refusals
		}
	}
	return res, nil
}

// prepare makes the devices and the settings the desired ones, before anything is put on a device: what is on one that
// was recreated or went up is only known once it was observed again. The kernel's notifications of these changes can't
// be told from those of external ones, so they are dropped, and everything is observed again.
func (k *Kernel) prepare(res *Result) error {
	if err := k.refresh(); err != nil {
		return err
	}
	actual := State{Links: k.observed.Links, Sysctls: readSysctls(k.desired.Sysctls)}
	changes := withoutPruning(Diff(actual, State{Links: k.desired.Links, Sysctls: k.desired.Sysctls}))
	if len(changes) == 0 {
		return nil
	}
	var err error
	k.monitor.change(func(e *expectation) {
		before := k.last.host.external()
		if res.Done, res.Failed = k.carryOut(changes); len(res.Done) == 0 {
			return
		}
		k.monitor.drain(func([]byte) bool { return false })
		if _, err = k.observe(); err != nil {
			return
		}
		if e.observed = k.last; !before.Equal(k.last.host.external()) {
			k.monitor.wake()
		}
	})
	return err
}

// refresh observes the kernel if it was changed since the last time.
func (k *Kernel) refresh() error {
	if k.observed != nil {
		return nil
	}
	_, err := k.Observe()
	return err
}

// pending lists what is to be done.
func (k *Kernel) pending() ([]Change, error) {
	if err := k.refresh(); err != nil {
		return nil, err
	}
	actual := *k.observed
	actual.Sysctls = readSysctls(k.desired.Sysctls)
	settle(actual.TunnelPeers, k.desired.TunnelPeers)
	changes := Diff(actual, k.desired)
	if !k.prune {
		changes = withoutPruning(changes)
	}
	return changes, nil
}

func aboutDevice(c Change) bool { return c.Obj.kind() == kindLink }

// carryOut carries the changes out in their order: netlink messages in batches, devices and settings one by one.
func (k *Kernel) carryOut(all []Change) (done []Change, failed []Failure) {
	refused := map[int]error{}
	for i := 0; i < len(all); i++ {
		var err error
		switch obj := all[i].Obj.(type) {
		case Link:
			err = k.applyLink(all[i], obj)
		case Sysctl:
			err = k.writeSysctl(obj)
		default:
			end := i + 1
			for end < len(all) && sendsWith(all[i], all[end]) {
				end++
			}
			if all[i].Obj.kind() == kindTunnelPeer {
				if err := k.putPeers(all[i:end]); err != nil {
					for n := i; n < end; n++ {
						refused[n] = err
					}
				}
				i = end - 1
				break
			}
			for n, err := range k.conn.each(end-i, func(n int, out *messages) error { return k.put(out, all[i+n]) }) {
				refused[i+n] = err
			}
			i = end - 1
		}
		if err != nil {
			refused[i] = err
		}
	}
	return outcome(all, refused)
}

// single reports whether a change is no netlink message that can be sent with others.
func single(c Change) bool { return aboutDevice(c) || c.Obj.kind() == kindSysctl }

// sendsWith reports whether two changes, of which the first is no single one, can be sent together.
func sendsWith(first, next Change) bool {
	p, is := first.Obj.(TunnelPeer)
	q, too := next.Obj.(TunnelPeer)
	return is == too && p.Link == q.Link && !single(next)
}

// outcome tells what was done from what was refused.
func outcome(all []Change, refused map[int]error) (done []Change, failed []Failure) {
	maps.DeleteFunc(refused, func(i int, err error) bool { return all[i].Op == Delete && isGone(err) })
	if len(refused) == 0 {
		return all, nil
	}
	for i, c := range all {
		if err := refused[i]; err != nil {
			failed = append(failed, Failure{c, err})
		} else {
			done = append(done, c)
		}
	}
	return done, failed
}

// isGone: deleting what is not there is no failure.
func isGone(err error) bool {
	return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EADDRNOTAVAIL) ||
		errors.Is(err, ErrNoLink)
}

// ErrNoLink is why nothing can be put on a device that could not be made.
var ErrNoLink = errors.New("no such device")

func (k *Kernel) writeSysctl(s Sysctl) error {
	dir := k.SysctlDir
	if dir == "" {
		dir = "/proc/sys"
	}
	// It is never created: a setting that is not there is an error.
	f, err := os.OpenFile(filepath.Join(dir, s.Path), os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(s.Value)
		err = errors.Join(err, f.Close())
	}
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%w (set it on the host: sysctl -w %s=%s)", err, strings.ReplaceAll(s.Path, "/", "."), s.Value)
	}
	return err
}
