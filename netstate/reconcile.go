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

// apply makes the kernel's state the desired one. What is desired differs from the time before in that was is gone and is has come, be it
// all of it or the objects of one peer.
func (k *Kernel) apply(was, is State) (Result, error) {
	same := was.equal(&is)
	res := Result{Repaired: same && k.applied}
	// A device takes with it what is on it, and a setting may have any value.
	if k.synced && slices.Equal(was.Links, is.Links) && slices.Equal(was.Sysctls, is.Sysctls) {
		res.Done, res.Failed = k.carryOut(Diff(was, is))
		k.synced = len(res.Failed) == 0
		return res, nil
	}
	k.synced, k.applied = false, res.Repaired
	if err := k.see(); err != nil {
		return res, err
	}
	if err := k.prepare(&res); err != nil {
		return res, err
	}
	k.applied = true
	for range rounds {
		if err := k.see(); err != nil {
			return res, err
		}
		done, failed := k.carryOut(k.pending())
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

// prepare makes the devices and the settings the desired ones, before anything is put on a device: what is on one that was recreated or
// went up is only known once it was observed again. What the kernel notifies of here can't be told from what others do; so the monitor
// ignores what is ours meanwhile: the devices are observed afterwards, and the settings are read.
func (k *Kernel) prepare(res *Result) error {
	actual := State{Links: k.observed.Links, Sysctls: readSysctls(k.desired.Sysctls)}
	changes := withoutSweep(Diff(actual, State{Links: k.desired.Links, Sysctls: k.desired.Sysctls}))
	if len(changes) == 0 {
		return nil
	}
	k.monitor.mu.Lock()
	defer k.monitor.mu.Unlock()
	k.monitor.drain(false)
	res.Done, res.Failed = k.carryOut(changes)
	k.monitor.drain(true)
	if !slices.ContainsFunc(res.Done, aboutDevice) {
		return nil
	}
	_, err := k.look()
	k.monitor.expect.devices = k.devices
	return err
}

// see observes the kernel if it was changed since the last time.
func (k *Kernel) see() error {
	if k.observed != nil {
		return nil
	}
	_, err := k.Observe()
	return err
}

// pending lists what is to be done.
func (k *Kernel) pending() []Change {
	actual := *k.observed
	actual.Sysctls = readSysctls(k.desired.Sysctls)
	changes := Diff(actual, k.desired)
	if !k.prune {
		changes = withoutSweep(changes)
	}
	return changes
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
			for end < len(all) && batched(all[end].Obj) {
				end++
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
	return sorted(all, refused)
}

func batched(o Object) bool { return o.kind() != kindLink && o.kind() != kindSysctl }

// sorted tells what was done from what was refused.
func sorted(all []Change, refused map[int]error) (done []Change, failed []Failure) {
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
	return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, ErrNoLink)
}

// ErrNoLink is why nothing can be put on a device that could not be made.
var ErrNoLink = errors.New("no such device")

func (k *Kernel) writeSysctl(s Sysctl) error {
	dir := k.SysctlDir
	if dir == "" {
		dir = "/proc/sys"
	}
	f, err := os.OpenFile(filepath.Join(dir, s.Path), os.O_WRONLY, 0) // never made: a setting that is not there is an error
	if err == nil {
		_, err = f.WriteString(s.Value)
		err = errors.Join(err, f.Close())
	}
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%w (set it on the host: sysctl -w %s=%s)", err, strings.ReplaceAll(s.Path, "/", "."), s.Value)
	}
	return err
}
