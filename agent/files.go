package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
)

// writeIfChanged puts a file in place in one step, so that no reader ever sees half of it; a file that says so already is left alone.
func writeIfChanged(path string, content []byte) (changed bool, err error) {
	if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, content) {
		return false, nil
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return false, err
	}
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return false, err
	}
	defer func() { _ = os.Remove(tmp.Name()) }()
	_, err = tmp.Write(content)
	err = errors.Join(err, tmp.Chmod(0o644), tmp.Sync(), tmp.Close())
	if err != nil {
		return false, err
	}
	return true, os.Rename(tmp.Name(), path)
}

// fileGap is the least time between two pieces of news of a file.
const fileGap = 100 * time.Millisecond

// FileWatch tells when somebody touches a file.
type FileWatch struct {
	path    string
	watcher *fsnotify.Watcher
	changed chan struct{}
}

// WatchFile begins to watch a file, which need not be there yet, nor its directory.
func WatchFile(path string) (*FileWatch, error) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", path, err)
	}
	f := &FileWatch{path: filepath.Clean(path), watcher: w, changed: make(chan struct{}, 1)}
	f.again()
	return f, nil
}

// again watches the directory, which may be another one by now; to do so twice is the same as once.
func (f *FileWatch) again() {
	if f != nil {
		_ = f.watcher.Add(filepath.Dir(f.path)) // as soon as it is there, by the next write
	}
}

// news is nil, and never tells of anything, where nothing is watched.
func (f *FileWatch) news() <-chan struct{} {
	if f == nil {
		return nil
	}
	return f.changed
}

// run passes the news on until ctx ends, not too fast for somebody who keeps touching the file.
func (f *FileWatch) run(ctx context.Context) error {
	defer func() { _ = f.watcher.Close() }()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e := <-f.watcher.Events:
			if e.Name != f.path && e.Name != filepath.Dir(f.path) {
				continue
			}
		case <-f.watcher.Errors: //nolint:errcheck // some news may have been lost: that is news
		}
		select {
		case f.changed <- struct{}{}:
		default:
		}
		select {
		case <-ctx.Done():
		case <-time.After(fileGap):
		}
	}
}

// subnetEnv is the file that CNI plugins and scripts read. Every variable stands there twice: with the name that those written
// for flannel look for, and with our own.
func subnetEnv(c subnet.Config, l subnet.Lease, mtu int, ipMasq bool) []byte {
	type variable struct{ name, value string }
	var vars []variable
	for _, f := range c.Families() {
		prefix := map[addr.Family]string{addr.IPv4: "", addr.IPv6: "IPV6_"}[f]
		sn := l.Subnets.Get(f)
		vars = append(vars,
			variable{prefix + "NETWORK", c.Pools.Get(f).Network.String()},
			// The bridge's own address; the one before it is the tunnel device's.
			variable{prefix + "SUBNET", netip.PrefixFrom(sn.Addr().Next(), sn.Bits()).String()})
	}
	vars = append(vars, variable{"MTU", strconv.Itoa(mtu)}, variable{"IPMASQ", strconv.FormatBool(ipMasq)})
	var b strings.Builder
	for _, prefix := range []string{"FLANNEL_", "OVERLAYD_"} {
		for _, v := range vars {
			fmt.Fprintf(&b, "%s%s=%s\n", prefix, v.name, v.value)
		}
	}
	return []byte(b.String())
}

// ErrRunning says that another daemon works on this node.
var ErrRunning = errors.New("another overlayd is running on this node")

// Lock keeps a second daemon off this network namespace, whatever container it is in, until the returned function is called or
// the process ends. The lock is an abstract unix socket (unix(7)), of which each network namespace has its own.
//
// A daemon that was killed holds it until the kernel, and a command that it was just starting, have let go: so it is tried for a while.
func Lock(name string, patience time.Duration) (unlock func(), err error) {
	for deadline := time.Now().Add(patience); ; time.Sleep(lockRetry) {
		unlock, err = tryLock(name)
		if !errors.Is(err, ErrRunning) || time.Now().After(deadline) {
			return unlock, err
		}
	}
}

const lockRetry = 20 * time.Millisecond

func tryLock(name string) (unlock func(), err error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: "@" + name, Net: "unix"})
	if err == nil {
		return func() { _ = l.Close() }, nil
	}
	if !errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("lock: %w", err)
	}
	holder, err := lockHolder(name)
	if err != nil { // it is just ending
		return nil, fmt.Errorf("%w: %w", ErrRunning, err)
	}
	// Anybody can take the name. Who could not run the daemon can't keep it from running either.
	if int(holder.Uid) != os.Geteuid() && holder.Uid != 0 {
		return func() {}, nil
	}
	return nil, fmt.Errorf("%w: process %d", ErrRunning, holder.Pid)
}

func lockHolder(name string) (*unix.Ucred, error) {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: "@" + name, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return cred, errors.Join(err, credErr)
}
