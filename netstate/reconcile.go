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

// rounds bounds how often one Reconcile looks again: a device that was made new or went up takes its entries with it.
const rounds = 3

// fulfil makes the kernel's state what is wished for.
func (k *Kernel) fulfil(sameWish bool) (Result, error) {
	res := Result{Repaired: sameWish && k.acted}
	k.acted = false
	if err := k.see(); err != nil {
		return res, err
	}
	k.acted = true
	if err := k.prepare(&res); err != nil {
		return res, err
	}
	for range rounds {
		if err := k.see(); err != nil {
			return res, err
		}
		changes := k.pending()
		done, failed := k.apply(changes)
		res.Done, res.Failed = append(res.Done, done...), failed
		if len(changes) > 0 {
			k.known = nil
		}
		if len(failed) == 0 && !slices.ContainsFunc(done, aboutDevice) {
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

// prepare makes the devices and the settings what they should be, before anything is put on a device: what is on one that was made anew or
// went up is only known after another look. The kernel tells of both in ways that can't be told from what others do. So what it tells of
// ours meanwhile is not heard: the devices are looked at afterwards, and the settings are read.
func (k *Kernel) prepare(res *Result) error {
	actual := State{Links: k.known.Links, Sysctls: readSysctls(k.wanted.Sysctls)}
	changes := Diff(actual, State{Links: k.wanted.Links, Sysctls: k.wanted.Sysctls})
	changes = reject(changes, func(c Change) bool { return c.Op == Delete && !k.wants(c.Obj) })
	if len(changes) == 0 {
		return nil
	}
	k.monitor.mu.Lock()
	defer k.monitor.mu.Unlock()
	k.monitor.drain()
	res.Done, res.Failed = k.apply(changes)
	k.monitor.expect.deaf = true
	k.monitor.drain()
	k.monitor.expect.deaf = false
	if !slices.ContainsFunc(res.Done, aboutDevice) {
		return nil
	}
	_, err := k.look()
	k.tell(&k.monitor.expect)
	return err
}

// wants reports whether there is to be a device of that name.
func (k *Kernel) wants(device Object) bool {
	l, ok := device.(Link)
	_, wanted := find(k.wanted.Links, l)
	return ok && wanted
}

// see looks at the kernel if what is there is not known.
func (k *Kernel) see() error {
	if k.known != nil {
		return nil
	}
	_, err := k.Observe()
	return err
}

// pending lists what is to be done.
func (k *Kernel) pending() []Change {
	actual := *k.known
	actual.Sysctls = readSysctls(k.wanted.Sysctls)
	changes := Diff(actual, *k.wanted)
	if !k.whole {
		changes = withoutSweep(changes)
	}
	return changes
}

func aboutDevice(c Change) bool { return c.Obj.kind() == kindLink }

// apply carries the changes out in their order: netlink messages in batches, devices and settings one by one.
func (k *Kernel) apply(all []Change) (done []Change, failed []Failure) {
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
var ErrNoLink = errors.New("there is no such device")

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
