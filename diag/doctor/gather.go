package doctor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/agent/state"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/backend/vxlan"
	"github.com/overlayd/overlayd/diag/doctor/packetfilter"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd"
)

// How long each part may take. The parts run side by side.
const (
	askDaemonFor = 3 * time.Second        // more than the two seconds after which it says by itself that its loop is busy
	hurry        = 500 * time.Millisecond // after which etcd is asked without waiting for the daemon's word where it is
	askStoreFor  = 1500 * time.Millisecond
	pingFor      = 500 * time.Millisecond // for the last answer
)

// Facts is all that the judges know.
type Facts struct {
	Settings
	Now        time.Time
	Took       time.Duration // for what is on this node
	Privileges error

	Daemon             DaemonFacts
	Survey             netstate.Survey
	Errs               map[string]error // what could not be looked at, by name
	Filter             packetfilter.Filter
	Legacy             []packetfilter.Legacy
	System             SystemFacts
	Store              *etcd.Examination // nil: it was not asked
	Memory             *state.Persisted  // of the state directory; nil: there is none
	MemoryErr          error
	IdentityFromMemory bool // and from nothing else

	Config     *subnet.Config // nil: not known
	ConfigFrom string
	Self       subnet.Lease // its subnets are not valid where this node has none that is known
	NoLease    string       // why none is known, where there is more to say than that
	Underlay   Underlay
	ChooseErr  error // why no device leads to the other nodes
	Peers      []peer
	PeersFrom  string
	Pings      PingFacts
	Flows      []flow // to peers
	ToStore    []flow
}

// DaemonFacts is what the daemon says.
type DaemonFacts struct {
	Running  bool
	Err      error
	Holder   error // who works on this node although nobody answers at the socket; nil: nobody
	Status   status.Node
	Peers    []status.Peer
	PeersErr error
	Diff     []string
	DiffErr  error
}

// peer is another node in one family.
type peer struct {
	name     string
	subnet   netip.Prefix
	publicIP netip.Addr
	way      string // "tunnel", "direct", or else
	reason   string
	target   netip.Addr // to ping
	odd      bool       // the daemon's own pings have found something
	full     int        // bytes of the largest packet that its pods are sent; 0: not known
}

func (p peer) family() addr.Family { return addr.FamilyOf(p.subnet.Addr()) }

func (f *Facts) failed(what string, err error) {
	if err != nil {
		f.Errs[what] = err
	}
}

func (f Facts) name() string { return cmp.Or(f.Daemon.Status.Name, f.Identity.NodeName) }

// gather collects the facts. What is on this node is read by the calling goroutine, in its network namespace.
func gather(ctx context.Context, o Options) Facts {
	began := time.Now()
	f := Facts{Settings: o.Settings, Now: o.Now(), Privileges: o.Privileges, Errs: map[string]error{}}
	asking, cancel := context.WithTimeout(ctx, askDaemonFor)
	defer cancel()
	node, peers := later(asking, o.Daemon.Status), later(asking, o.Daemon.Peers)
	var said answer[status.Node]
	var early examination
	select {
	case said = <-node:
	case <-time.After(hurry):
		early = f.askStore(ctx)
		said = <-node
	}
	f.takeStatus(o, said)
	store := early
	if !early.serves(f.storeOptions()) {
		store = f.askStore(ctx)
	}
	var diff <-chan answer[[]string]
	if f.Daemon.Running {
		diff = later(asking, o.Daemon.Diff)
	}
	f.look(o)
	listed := <-peers
	f.Daemon.Peers, f.Daemon.PeersErr = listed.value, listed.err
	if f.Daemon.Running {
		differs := <-diff
		f.Daemon.Diff, f.Daemon.DiffErr = differs.value, differs.err
	}
	f.Took = time.Since(began)
	timed := func(do func()) {
		began := time.Now()
		do()
		f.Took += time.Since(began)
	}
	if f.Daemon.Running && len(f.Daemon.Peers) > 0 { // the daemon knows all that the pings need
		timed(func() { f.conclude(ctx, o) })
		f.ping(ctx, o)
		f.Store = store.result()
		f.concludeConfig()
	} else {
		f.Store = store.result()
		timed(func() { f.conclude(ctx, o) })
		f.ping(ctx, o)
	}
	if f.Privileges == nil { // only now it is known what this node needs
		timed(func() { f.System.Support = trySupport(&f) })
	}
	return f
}

// answer is what came of a question.
type answer[T any] struct {
	value T
	err   error
}

// later asks the daemon beside other work. An answer that is late is told by how long was waited for it here: whoever asks knows only how
// long it would have waited itself.
func later[T any](asking context.Context, ask func(context.Context) (T, error)) <-chan answer[T] {
	c := make(chan answer[T], 1)
	go func() {
		v, err := ask(asking)
		if err != nil && errors.Is(asking.Err(), context.DeadlineExceeded) {
			err = fmt.Errorf("no answer within %v: is it stopped (ps -o pid,stat -C overlayd), or the machine overloaded?", askDaemonFor)
		}
		c <- answer[T]{v, err}
	}()
	return c
}

// examination is one of the store that is under way; the zero value is none.
type examination struct {
	of   etcd.Options
	came <-chan etcd.Examination
}

func (f *Facts) askStore(ctx context.Context) examination {
	o := f.storeOptions()
	came := make(chan etcd.Examination, 1)
	x := examination{of: o, came: came}
	o.RequestTimeout = askStoreFor
	go func() { came <- etcd.Examine(ctx, o) }()
	return x
}

// serves reports whether it asks the store that is meant: a daemon that answers late may know another one than the settings.
func (x examination) serves(o etcd.Options) bool {
	return x.came != nil && slices.Equal(x.of.Endpoints, o.Endpoints) && x.of.Prefix == o.Prefix
}

func (x examination) result() *etcd.Examination {
	e := <-x.came
	return &e
}

// takeStatus notes what the daemon says of itself, or why it says nothing.
func (f *Facts) takeStatus(o Options, said answer[status.Node]) {
	f.Daemon.Status, f.Daemon.Err = said.value, said.err
	f.Daemon.Running = f.Daemon.Err == nil
	if f.Daemon.Err != nil && o.NotRunning(f.Daemon.Err) {
		f.Daemon.Err = nil
		if o.Holder != nil {
			f.Daemon.Holder = o.Holder()
		}
	}
	if s := f.Daemon.Status; f.Daemon.Running {
		// A daemon says where its files are, whatever this command was told.
		f.SubnetFile, f.StateDir = cmp.Or(s.SubnetFile, f.SubnetFile), cmp.Or(s.StateDir, f.StateDir)
		f.Identity, f.IdentityErr = subnet.Identity{NodeName: f.Daemon.Status.Name, NodeID: f.Daemon.Status.ID}, nil
	}
}

func (f *Facts) storeOptions() etcd.Options {
	if f.Daemon.Running {
		return f.StoreOptions(&f.Daemon.Status)
	}
	return f.StoreOptions(nil)
}

// look reads what is on this node.
func (f *Facts) look(o Options) {
	var err error
	f.Survey, err = netstate.Look(o.Owned)
	f.failed("devices", err)
	f.lookAtFilter()
	f.remember()
	var bridges []netstate.PodBridge
	if f.Memory != nil {
		bridges = f.Memory.Bridges
	}
	f.System = lookAtSystem(root(o.Root), f.Survey, bridges)
	f.System.StateDirErr = tryDir(f.StateDir)
	f.System.SubnetEnv, f.System.SubnetEnvErr = readVars(f.SubnetFile)
}

func (f *Facts) lookAtFilter() {
	var err error
	f.Filter, err = packetfilter.Read()
	f.failed("nftables", err)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	f.Legacy, err = packetfilter.ReadLegacy(ctx)
	f.failed("iptables-legacy", err)
}

// remember reads what the daemon remembers. Where neither it nor the settings say who this node is, that does.
func (f *Facts) remember() {
	f.Memory, f.MemoryErr = state.Dir{Path: f.StateDir}.Read()
	if m := f.Memory; !f.Daemon.Running && !f.GivenIdentity && m != nil && m.Node.Check() == nil {
		f.IdentityFromMemory = m.Node != f.Identity
		f.Identity, f.IdentityErr = m.Node, nil
	}
	if m := f.Memory; m != nil && m.Prefix != "" && m.Prefix != storePrefix(f.storeOptions()) {
		m.Config, m.Peers = nil, nil // those of another network, as the daemon sees it
	}
}

// tryDir writes a file and removes it.
func tryDir(dir string) error {
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil // the daemon makes it
	}
	t, err := os.CreateTemp(dir, ".doctor.*")
	if err != nil {
		return err
	}
	_, err = t.WriteString("x")
	return errors.Join(err, t.Sync(), t.Close(), os.Remove(t.Name()))
}

// conclude works out what several facts say together: the config, this node's subnets, its device, its peers.
func (f *Facts) conclude(ctx context.Context, o Options) {
	f.concludeConfig()
	f.concludeSelf()
	f.concludeUnderlay(o)
	f.concludePeers()
	f.askKernel(ctx)
	f.nameHolders(root(o.Root))
}

// nameHolders finds out which programs have the ports that ours need: mostly none, and then nothing is looked for.
func (f *Facts) nameHolders(r root) {
	for _, d := range f.devices() {
		for i, s := range f.System.Sockets {
			if s.inTheWayOf(d) {
				f.System.Sockets[i].holder = holderOf(r, s.inode)
			}
		}
	}
}

func (f *Facts) concludeConfig() {
	if x := f.Store; x != nil && x.OptionsErr == nil && x.TableErr == nil && x.Table.ConfigErr == nil && !x.NoConfig {
		f.Config, f.ConfigFrom = &x.Table.Config, "etcd"
		return
	}
	if f.Memory != nil && len(f.Memory.Config) > 0 {
		if c, err := subnet.ParseConfig(f.Memory.Config); err == nil {
			f.Config, f.ConfigFrom = &c, "memory"
		}
	}
}

func (f *Facts) concludeSelf() {
	f.Self.Identity = f.Identity
	if f.NoLease = f.leaseIsNotOurs(); f.NoLease != "" {
		return
	}
	for _, s := range f.Daemon.Status.Lease.Subnets {
		if p, err := netip.ParsePrefix(s); err == nil {
			f.Self.Subnets.Set(addr.FamilyOf(p.Addr()), p)
		}
	}
	if f.Store != nil && f.Self.Subnets == (addr.Per[netip.Prefix]{}) {
		if own := f.ownEntry(); own != nil {
			f.Self = own.Lease
		}
	}
	if f.Memory != nil && f.Self.Subnets == (addr.Per[netip.Prefix]{}) && f.Memory.Node == f.Identity {
		f.Self.Subnets = f.Memory.Own()
	}
}

// ownEntry is the lease in etcd that carries this node's identity; nil: there is none.
func (f Facts) ownEntry() *subnet.Entry {
	if f.Store == nil || f.Identity.NodeID == "" {
		return nil
	}
	var own *subnet.Entry
	for _, e := range f.Store.Table.Entries {
		if e.Err == nil && e.Identity == f.Identity {
			own = e
		}
	}
	return own
}

// leaseIsNotOurs says why a lease that carries this node's identity is not known to be this node's. Machines that were copied have
// the same one: what is judged by the other one's lease would be fixed at its cost.
func (f Facts) leaseIsNotOurs() string {
	if f.Daemon.Running {
		l, p := f.Daemon.Status.Lease, f.problem("lease")
		switch {
		case len(l.Subnets) == 0 && p != nil && p.Code != status.Starting:
			return "the daemon holds no lease: see problems"
		case len(l.Subnets) == 0:
			return "the daemon holds no lease"
		case !l.Held && p != nil && p.Code == status.Conflict:
			return "another node has this node's lease: see problems"
		}
		return ""
	}
	if own := f.ownEntry(); own != nil {
		if ip := f.elsewhere(own); ip.IsValid() {
			return fmt.Sprintf("the lease of this node's name and ID announces %s, which no device of this node has", ip)
		}
	}
	return ""
}

// elsewhere is the public IP of a lease that should be on a device of this node and is on none; not valid where there is none.
func (f Facts) elsewhere(e *subnet.Entry) netip.Addr {
	for _, fam := range addr.Families() {
		if ip := e.PublicIP.Get(fam); ip.IsValid() && e.PublicIPLocal && f.Errs["devices"] == nil && !f.Survey.Host.Has(ip) {
			return ip
		}
	}
	return netip.Addr{}
}

// problem is one that the daemon knows of itself; nil: it has no such.
func (f Facts) problem(name string) *status.Problem {
	i := slices.IndexFunc(f.Daemon.Status.Problems, func(p status.Problem) bool { return p.Name == name })
	if i < 0 {
		return nil
	}
	return &f.Daemon.Status.Problems[i]
}

func (f *Facts) concludeUnderlay(o Options) {
	s := f.Daemon.Status
	f.Underlay.ByDefault = f.ByDefault
	if f.Daemon.Running && s.Interface.Reason != "" {
		f.Underlay.ByDefault = s.Interface.ByDefault
		for _, text := range s.Interface.PublicIPs {
			if a, err := netip.ParseAddr(text); err == nil {
				f.Underlay.PublicIP.Set(addr.FamilyOf(a), a)
			}
		}
		for _, d := range s.Devices {
			if a, err := netip.ParseAddr(d.Local); err == nil {
				l, _ := f.Survey.Link(d.Underlay)
				f.Underlay.By.Set(addr.FamilyOf(a), backend.Underlay{Device: d.Underlay, Addr: a, MTU: l.MTU})
			}
		}
		if len(s.Devices) > 0 {
			return
		}
	}
	if f.Config == nil || o.Choose == nil || f.Errs["devices"] != nil {
		return
	}
	u, err := o.Choose(f.Survey.Host, *f.Config)
	if f.ChooseErr = err; err == nil {
		f.Underlay = u
	}
	if f.Self.PublicIP == (addr.Per[netip.Addr]{}) {
		f.Self.PublicIP = f.Underlay.PublicIP
	}
}

func (f *Facts) concludePeers() {
	switch {
	case f.Daemon.Running && f.Daemon.PeersErr == nil:
		f.PeersFrom = "the daemon"
		for _, p := range f.Daemon.Peers {
			sn, err := netip.ParsePrefix(p.Subnet)
			if err != nil { // a refused lease has its key there
				continue
			}
			ip, _ := netip.ParseAddr(p.PublicIP)
			q := peer{name: cmp.Or(p.Name, p.Subnet), subnet: sn, publicIP: ip, way: p.Way, reason: p.Reason}
			if p.Probe != nil {
				q.target, _ = netip.ParseAddr(p.Probe.Address)
				q.odd = p.Probe.Verdict != status.Answers && p.Probe.Verdict != status.NotPinged
			}
			f.Peers = append(f.Peers, q)
		}
	case f.Config == nil:
	case f.Store != nil && f.Store.OptionsErr == nil && f.Store.TableErr == nil:
		f.PeersFrom = "etcd"
		f.peersOf(f.Store.Table)
	case f.Memory != nil:
		f.PeersFrom = "the persisted state"
		if t, err := f.Memory.Table(); err == nil {
			f.peersOf(t)
		}
	}
	for i := range f.Peers {
		f.aim(&f.Peers[i])
	}
}

func (f *Facts) peersOf(t subnet.Table) {
	believed, _ := t.Peers(*f.Config, f.Self)
	for _, l := range believed {
		for _, fam := range f.Config.Families() {
			if sn := l.Subnets.Get(fam); sn.IsValid() {
				p := peer{name: l.Name(), subnet: sn, publicIP: l.PublicIP.Get(fam), way: "tunnel"}
				if f.Config.Backend.Type == subnet.HostGW {
					p.way = "direct"
				}
				f.Peers = append(f.Peers, p)
			}
		}
	}
}

// aim decides what to ping at a peer, as the daemon does: the address of its tunnel device, or its own where there is no such device. Its
// pods' bridge is no target: it comes with the first pod.
func (f *Facts) aim(p *peer) {
	if !p.target.IsValid() {
		p.target = p.subnet.Addr()
		if f.backend() == subnet.HostGW {
			p.target = p.publicIP
		}
	}
	p.full = f.podMTU()
}

func (f *Facts) backend() subnet.BackendType {
	if b := f.Daemon.Status.Network.Backend; b != "" {
		return subnet.BackendType(b)
	}
	if f.Config != nil {
		return f.Config.Backend.Type
	}
	return subnet.VXLAN
}

// podMTU is what pods are told.
func (f *Facts) podMTU() int {
	if m := f.Daemon.Status.Network.MTU; m > 0 {
		return m
	}
	least := 0
	for _, d := range f.devices() {
		if d.there && (least == 0 || d.link.MTU < least) {
			least = d.link.MTU
		}
	}
	if least == 0 {
		least, _ = strconv.Atoi(f.System.SubnetEnv["FLANNEL_MTU"])
	}
	return least
}

// tunnel is a tunnel device as it should be, and as it is.
type tunnel struct {
	family   addr.Family
	name     string
	vni      uint32
	port     uint16
	underlay string
	local    netip.Addr
	mtu      int // that it should have; 0: not known
	mac      string
	link     netstate.SurveyLink
	there    bool
}

// devices lists the tunnel devices that there must be, by what the daemon says, or else the config.
func (f *Facts) devices() []tunnel {
	var out []tunnel
	if f.Daemon.Running && len(f.Daemon.Status.Devices) > 0 {
		for _, d := range f.Daemon.Status.Devices {
			local, _ := netip.ParseAddr(d.Local)
			out = append(out, tunnel{family: addr.FamilyOf(local), name: d.Name, vni: d.VNI, port: d.Port, underlay: d.Underlay, local: local, mtu: d.MTU, mac: d.MAC})
		}
	} else if f.Config != nil && f.Config.Backend.Type == subnet.VXLAN {
		for _, fam := range f.Config.Families() {
			u := f.Underlay.By.Get(fam)
			t := tunnel{family: fam, name: vxlan.DeviceName(fam, f.Config.Backend.VNI), vni: f.Config.Backend.VNI, port: f.Config.Backend.Port, underlay: u.Device, local: u.Addr}
			for _, l := range f.uplinks(fam) {
				u.MTU = min(u.MTU, l.MTU)
			}
			if u.MTU > 0 {
				t.mtu = backend.PodMTU(f.Config.Backend, fam, u.MTU)
			}
			out = append(out, t)
		}
	}
	for i := range out {
		out[i].link, out[i].there = f.Survey.Link(out[i].name)
	}
	return out
}

// root is where files are looked for.
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

func freeSpace(dir string) (bytes, files uint64, readOnly bool, err error) {
	var st unix.Statfs_t
	for {
		if err = unix.Statfs(dir, &st); !errors.Is(err, unix.ENOENT) || dir == "/" {
			break
		}
		dir = filepath.Dir(dir)
	}
	if st.Files == 0 { // a file system that does not count them
		st.Ffree = 1 << 20
	}
	return st.Bavail * uint64(st.Bsize), st.Ffree, st.Flags&unix.ST_RDONLY != 0, err
}
