package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// nsDir is where `ip netns` looks for namespaces.
const nsDir = "/run/netns"

func nsPath(ns string) string { return filepath.Join(nsDir, ns) }

// inNS runs f on an OS thread inside the named namespace. Sockets and processes that f makes stay there; goroutines
// that f starts do not run there. The thread is never the process's first one: that one's namespace is what
// /proc/PID/ns/net shows, and must stay.
func inNS(ns string, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// While this goroutine holds the first thread, the next one gets another.
			done <- inNS(ns, f)
			runtime.UnlockOSThread()
			return
		}
		home, err := netns.Get()
		if err != nil {
			done <- fmt.Errorf("open this thread's namespace: %w", err)
			return
		}
		defer home.Close()
		if err = enterNS(ns); err == nil {
			err = f()
		}
		if netns.Set(home) == nil { // else the thread ends with the goroutine
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// enterNS moves the calling thread, which must be locked, into the named namespace.
func enterNS(ns string) error {
	h, err := netns.GetFromName(ns)
	if err != nil {
		return fmt.Errorf("open namespace %s: %w", ns, err)
	}
	defer h.Close()
	if err := netns.Set(h); err != nil {
		return fmt.Errorf("enter namespace %s: %w", ns, err)
	}
	return nil
}

// createNS makes a namespace that `ip netns` shows.
func createNS(ns string) error {
	if out, err := exec.Command("ip", "netns", "add", ns).CombinedOutput(); err != nil {
		return fmt.Errorf("create namespace %s: %w: %s", ns, err, out)
	}
	return nil
}

// deleteNS removes the name; the kernel frees the namespace once its last process and socket are gone. What is not
// there is no error, and neither is a name with nothing mounted on it (left by a crash between the two steps of
// creation).
func deleteNS(ns string) error {
	err := unix.Unmount(nsPath(ns), unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount namespace %s: %w", ns, err)
	}
	if err := os.Remove(nsPath(ns)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("delete namespace %s: %w", ns, err)
	}
	return nil
}

// nsID identifies a network namespace as the kernel does.
type nsID struct{ dev, ino uint64 }

// idOf reads the identity of a namespace file: one in /run/netns or /proc/PID/ns/net.
func idOf(path string) (nsID, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nsID{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return nsID{dev: st.Dev, ino: st.Ino}, nil
}

// labNamespaces lists the namespaces on this machine that belong to the named lab, whatever its options were. Only
// names that a lab makes count: "lab" must not lay hands on "lab-2-n1", which is the namespace of a lab called "lab-2".
func labNamespaces(lab string) ([]string, error) {
	entries, err := os.ReadDir(nsDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list namespaces: %w", err)
	}
	ours := namespacePattern(lab)
	var out []string
	for _, e := range entries {
		if ours.MatchString(e.Name()) {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

func namespacePattern(lab string) *regexp.Regexp {
	return regexp.MustCompile(`^` + regexp.QuoteMeta(lab) + `-(n\d+(-p\d+)?|seg\d+|router|internet|etcd)$`)
}
