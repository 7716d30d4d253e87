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
	"golang.org/x/sync/errgroup"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/internal/atomicfile"
	"github.com/overlayd/overlayd/internal/cniconf"
	"github.com/overlayd/overlayd/internal/ownfile"
	"github.com/overlayd/overlayd/runner"
	"github.com/overlayd/overlayd/subnet"
)

// writeIfChanged replaces a file in one step; a file of ours that has the content already is left alone.
func writeIfChanged(path string, content []byte) (changed bool, err error) {
	if have, err := ownfile.Read(path, int64(len(content))); err == nil && bytes.Equal(have, content) {
		return false, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return false, err
	}
	return true, atomicfile.Write(path, content, 0o644)
}

// fileGap is the least time between two events of a file.
const fileGap = 100 * time.Millisecond

// FileWatch notifies of changes of a file, or of all files of a directory.
type FileWatch struct {
	dir     string
	path    string // of the file; empty: all
	watcher *fsnotify.Watcher
}

// WatchFile begins to watch a file, which need not be there yet, nor its directory.
func WatchFile(path string) (*FileWatch, error) {
	path = filepath.Clean(path)
	return watch(filepath.Dir(path), path)
}

// WatchDir begins to watch the files of a directory, which need not be there yet.
func WatchDir(dir string) (*FileWatch, error) { return watch(filepath.Clean(dir), "") }

func watch(dir, path string) (*FileWatch, error) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", dir, err)
	}
	f := &FileWatch{dir, path, w}
	f.again()
	return f, nil
}

// again watches the directory, which may be another one by now; to do so twice is the same as once.
func (f *FileWatch) again() {
	if f != nil {
		_ = f.watcher.Add(f.dir) // as soon as it is there, by the next write
	}
}

// run notifies until ctx ends, a few times each second if another process keeps changing the file.
func (f *FileWatch) run(ctx context.Context, changed func()) error {
	defer func() { _ = f.watcher.Close() }()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e := <-f.watcher.Events:
			if f.path != "" && e.Name != f.path && e.Name != f.dir {
				continue
			}
		case <-f.watcher.Errors: //nolint:errcheck // events may have been lost, which counts as one
		}
		changed()
		select {
		case <-ctx.Done():
		case <-time.After(fileGap):
		}
	}
}

// lookAgain is the least time between two comparisons of the CNI configurations.
const lookAgain = time.Second

// followCNI reports a CNI configuration that the container runtime uses instead of overlayd's, until ctx ends: it looks
// when one changes, and as often as the kernel is observed without a reason.
//
// It degrades the node and leaves it ready: what runs keeps its network, whether another plugin leads to ours can't
// always be told, and the update that a rollout brings is not to wait for it.
func (a *Agent) followCNI(ctx context.Context) error {
	look := runner.New(runner.Options{Min: lookAgain, Max: resyncEvery}, func(context.Context) error {
		a.parts.CNIConf.again()
		a.health.set(condCNI, cniconf.Check(a.opts.CNIConf))
		return nil
	})
	look.Wake()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return look.Run(ctx) })
	if w := a.parts.CNIConf; w != nil {
		g.Go(func() error { return w.run(ctx, look.Wake) })
	}
	return g.Wait()
}

// subnetEnv is the file that CNI plugins and scripts read. It has every variable twice: under flannel's name, and under
// our own.
func subnetEnv(c subnet.Config, own addr.Per[netip.Prefix], mtu int, ipMasq bool) []byte {
	type variable struct{ name, value string }
	var vars []variable
	for _, f := range c.Families() {
		prefix := map[addr.Family]string{addr.IPv4: "", addr.IPv6: "IPV6_"}[f]
		sn := own.Get(f)
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
