package agent

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/internal/atomicfile"
	"github.com/overlayd/overlayd/subnet"
)

// writeIfChanged replaces a file in one step; a file that has the content already is left alone.
func writeIfChanged(path string, content []byte) (changed bool, err error) {
	if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, content) {
		return false, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return false, err
	}
	return true, atomicfile.Write(path, content, 0o644)
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
