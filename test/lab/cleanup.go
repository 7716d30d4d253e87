package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// runDir holds one directory per lab.
const runDir = "/run/overlay-lab"

func labDir(name string) string { return filepath.Join(runDir, name) }

// Down removes all that the named lab left on this machine, whether it is up, half up, or crashed: the processes in its
// namespaces, the namespaces, what is mounted in its directory, the directory. Processes elsewhere are never touched. A
// lab that is not there is no error.
func Down(ctx context.Context, name string) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("%q is not the name of a lab", name)
	}
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	namespaces, err := labNamespaces(name)
	if err != nil {
		return err
	}
	if err := killInside(ctx, identify(namespaces)); err != nil {
		return fmt.Errorf("take lab %s down: %w", name, err)
	}
	var errs []error
	for _, ns := range namespaces {
		errs = append(errs, deleteNS(ns))
	}
	errs = append(errs, unmountBelow(labDir(name)))
	if err := os.RemoveAll(labDir(name)); err != nil {
		errs = append(errs, fmt.Errorf("remove the lab's directory: %w", err))
	}
	_ = os.Remove(runDir) // succeeds only for the last lab
	return errors.Join(errs...)
}

// unmountBelow takes away what a fault has mounted below a directory, the newest first.
func unmountBelow(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("list the mounts: %w", err)
	}
	var errs []error
	for _, line := range slices.Backward(strings.Split(string(b), "\n")) {
		const mountPoint = 4 // of the fields, see proc_pid_mountinfo(5)
		fields := strings.Fields(line)
		if len(fields) <= mountPoint || !strings.HasPrefix(fields[mountPoint], dir+"/") {
			continue
		}
		// it went with another
		if err := unix.Unmount(fields[mountPoint], unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", fields[mountPoint], err))
		}
	}
	return errors.Join(errs...)
}

// identify gives the identities of named namespaces. A name with no namespace mounted on it has none: the file beneath
// is on another file system than any process's namespace, so that its identity cannot match one.
func identify(namespaces []string) map[nsID]bool {
	ids := map[nsID]bool{}
	for _, ns := range namespaces {
		if id, err := idOf(nsPath(ns)); err == nil {
			ids[id] = true
		}
	}
	return ids
}

// killInside kills every process in the namespaces, and those that they start meanwhile, until there is none.
func killInside(ctx context.Context, ids map[nsID]bool) error {
	return poll(ctx, 10*time.Millisecond, func() error {
		pids, err := processesIn(ids)
		if err != nil {
			return fatal{err}
		}
		for _, pid := range pids {
			err := signalIf(pid, unix.SIGKILL, func() bool { return isIn(pid, ids) }, goOn)
			if err != nil && !errors.Is(err, errNotOurs) {
				return err
			}
		}
		if len(pids) > 0 {
			return fmt.Errorf("processes that do not end: %v", pids)
		}
		return nil
	})
}

// processesIn lists the processes in the namespaces, but for this one. Our own children that have ended are collected
// on the way; they are in no namespace any more.
func processesIn(ids map[nsID]bool) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var out []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err == nil && pid != os.Getpid() && isIn(pid, ids) {
			out = append(out, pid)
		}
	}
	return out, nil
}

func isIn(pid int, ids map[nsID]bool) bool {
	id, err := idOf(fmt.Sprintf("/proc/%d/ns/net", pid))
	return err == nil && ids[id]
}

// Leftovers names what is still there of a lab, in words; nothing after a [Down] that worked.
func Leftovers(name string) ([]string, error) {
	var out []string
	namespaces, err := labNamespaces(name)
	if err != nil {
		return nil, err
	}
	for _, ns := range namespaces {
		out = append(out, "namespace "+ns)
	}
	pids, err := processesIn(identify(namespaces))
	if err != nil {
		return nil, err
	}
	for _, pid := range pids {
		out = append(out, fmt.Sprintf("process %d", pid))
	}
	if _, err := os.Stat(labDir(name)); err == nil {
		out = append(out, "directory "+labDir(name))
	}
	return out, nil
}
