package doctor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/agent/state"
	"github.com/overlayd/overlayd/diag/doctor/packetfilter"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/internal/cniconf"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/examine"
)

// How long each part may take.
const (
	askDaemonFor = 3 * time.Second // more than the two seconds after which it says by itself that its loop is busy
	askStoreFor  = 1500 * time.Millisecond
	runToolFor   = 2 * time.Second
)

// defaultCNIConf is where overlay-install puts the CNI configuration.
const defaultCNIConf = "/etc/cni/net.d/10-overlayd.conflist"

// What may be unreadable, as a key of Facts.Errs.
const (
	readDevices  = "devices"
	readNFTables = "nftables"
	readLegacy   = "iptables-legacy"
)

// Facts is all that checks know: what gather has read, what follows from it, and what was tried out.
type Facts struct {
	Settings
	Now        time.Time
	Privileges error
	Choose     Choose

	Daemon       DaemonFacts
	Survey       netstate.Survey
	Errs         map[string]error // what could not be read, by name
	Filter       packetfilter.Filter
	Legacy       []packetfilter.Legacy
	System       SystemFacts
	Store        *examine.Store  // nil: it was not asked
	Persisted    state.Persisted // in the state directory
	PersistedErr error
	Exposed      []Exposure // of the secrets of the store
	CNIErr       error      // why the container runtime does not use overlayd's CNI configuration

	Derived
	Probes
}

// DaemonFacts is what the daemon says.
type DaemonFacts struct {
	Running  bool
	Err      error
	Holder   error // which daemon runs on this node although none answers at the socket; nil: none
	Status   status.Node
	Peers    []status.Peer
	PeersErr error
	Diff     []string
	DiffErr  error
}

func (f Facts) name() string { return cmp.Or(f.Daemon.Status.Name, f.Identity.NodeName) }

// gather reads the facts. What is on this node is read by the calling goroutine, in its network namespace.
func gather(ctx context.Context, o Options) Facts {
	f := Facts{
		Settings: o.Settings, Now: o.Now(), Privileges: o.Privileges, Choose: o.Choose, Errs: map[string]error{},
	}
	asked := f.storeOptions()
	store := examineStore(ctx, asked) // meanwhile: the daemon may be slow
	f.Daemon = askDaemon(ctx, o)
	f.Settings = f.ofDaemon(f.Daemon)
	if s := f.storeOptions(); !sameStore(asked, s) {
		store = examineStore(ctx, s)
	}
	note := func(what string, err error) {
		if err != nil {
			f.Errs[what] = err
		}
	}
	var err error
	f.Survey, err = netstate.Look(o.Owned)
	note(readDevices, err)
	f.Filter, err = packetfilter.Read()
	note(readNFTables, err)
	f.Legacy, err = packetfilter.ReadLegacy(ctx)
	note(readLegacy, err)
	persisted, err := state.Dir{Path: f.StateDir}.Read()
	if f.PersistedErr = err; persisted != nil {
		f.Persisted = ofNetwork(*persisted, f.storeOptions().Network())
	}
	f.Exposed = f.storeOptions().Exposed()
	f.System = readSystem(root(o.Root), f.Survey, f.Persisted.Bridges)
	f.System.Dirs = []dirFacts{readDir(f.StateDir), readDir(filepath.Dir(f.SubnetFile))}
	if f.System.SubnetEnv, err = readSubnetEnv(f.SubnetFile); f.System.SubnetEnv == nil {
		f.System.SubnetEnvErr = cmp.Or(err, fs.ErrNotExist)
	}
	if f.CNIConf == "" && root(o.Root).exists(defaultCNIConf) {
		f.CNIConf = root(o.Root).path(defaultCNIConf)
	}
	if f.CNIConf != "" {
		f.CNIErr = cniconf.Check(f.CNIConf)
	}
	x := <-store
	f.Store = &x
	return f
}

// askDaemon asks for all at once. An answer that is late is told by how long was waited for it here.
func askDaemon(ctx context.Context, o Options) DaemonFacts {
	ctx, cancel := context.WithTimeout(ctx, askDaemonFor)
	defer cancel()
	var d DaemonFacts
	var wg sync.WaitGroup
	late := func(err error) error {
		if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return fmt.Errorf("no answer within %v: is it stopped (ps -o pid,stat -C overlayd), or the machine overloaded?",
				askDaemonFor)
		}
		return err
	}
	wg.Go(func() { d.Err = late(o.Ask(ctx, "/status", &d.Status)) })
	wg.Go(func() { d.PeersErr = late(o.Ask(ctx, "/peers", &d.Peers)) })
	wg.Go(func() { d.DiffErr = late(o.Ask(ctx, "/diff", &d.Diff)) })
	wg.Wait()
	d.Running = d.Err == nil
	if d.Err != nil && o.NotRunning(d.Err) {
		d.Err = nil
		if o.Holder != nil {
			d.Holder = o.Holder()
		}
	}
	return d
}

// ofDaemon are the settings of a daemon that runs: it says where its files are, whatever this command was told.
func (s Settings) ofDaemon(d DaemonFacts) Settings {
	if d.Running {
		s.SubnetFile = cmp.Or(d.Status.SubnetFile, s.SubnetFile)
		s.StateDir = cmp.Or(d.Status.StateDir, s.StateDir)
		s.Identity, s.IdentityErr = subnet.Identity{NodeName: d.Status.Name, NodeID: d.Status.ID}, nil
	}
	return s
}

// ofNetwork is what is persisted, without config, peers and settings of another network.
func ofNetwork(p state.Persisted, network string) state.Persisted {
	if p.Prefix != network {
		p.Config, p.Peers, p.Settings = nil, nil, subnet.NodeSettings{}
	}
	return p
}

// root is where files are read.
type root string

func (r root) path(p string) string { return filepath.Join(cmp.Or(string(r), "/"), p) }

func (r root) read(p string) (string, bool) {
	b, err := os.ReadFile(r.path(p))
	return strings.TrimSpace(string(b)), err == nil
}

func (r root) exists(p string) bool {
	_, err := os.Stat(r.path(p))
	return err == nil
}

// dirFacts are those of a directory that the daemon writes to, or where it will make it.
type dirFacts struct {
	dir          string
	bytes, files uint64 // left
	err          error  // a write fails
}

func readDir(dir string) dirFacts {
	var st unix.Statfs_t
	d := dirFacts{dir: dir}
	at := dir
	for ; errors.Is(unix.Statfs(at, &st), unix.ENOENT) && at != "/"; at = filepath.Dir(at) {
	}
	if st.Files == 0 { // a file system that does not count them
		st.Ffree = 1 << 20
	}
	d.bytes, d.files = st.Bavail*uint64(st.Bsize), st.Ffree
	t, err := os.CreateTemp(at, ".doctor.*")
	if err == nil {
		_, err = t.WriteString("x")
		err = errors.Join(err, t.Sync(), t.Close(), os.Remove(t.Name()))
	}
	d.err = err
	return d
}
