// Package agent ties a node together: leases come in from the store, a backend plans the kernel state, and one loop makes the kernel
// equal to the plan and keeps it so. Nothing is done because of an event; an event only says that it is time to look again.
package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/agent/state"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/backend/hostgw"
	"github.com/overlayd/overlayd/backend/vxlan"
	"github.com/overlayd/overlayd/diag/metrics"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/masquerade"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

const (
	// auditEvery is how often the kernel is looked at without any reason to. Everything that changes there is told of, so that this
	// finds something only if that failed; and with thousands of peers it is most of what an idle daemon costs.
	auditEvery = 5 * time.Minute
	// A round that did not reach its goal is tried again after firstRetry, then ever more slowly.
	firstRetry, lastRetry = 500 * time.Millisecond, 30 * time.Second
	// waitForInterface is how often to look for an interface while none fits, or for the tunnel's device; most often an
	// event says so first.
	waitForInterface = 2 * time.Second
	// noteEvery is how often to look whether an operator has removed the note that the subnet was lost.
	noteEvery = 10 * time.Second
	// offlineAfter is how long to wait for etcd before starting from what is remembered.
	offlineAfter = 3 * time.Second
)

// Kernel is the node's kernel state; netstate.Kernel is the real one.
type Kernel interface {
	// Observe looks at the kernel, and returns what of it is not ours.
	Observe() (netstate.Host, error)
	// Reconcile makes the objects with our marks equal to the desired state, which it takes over; AddMissing removes none.
	Reconcile(desired netstate.State) (netstate.Result, error)
	AddMissing(desired netstate.State) (netstate.Result, error)
	// Uncover removes those of our routes that cover one of these addresses.
	Uncover(ips []netip.Addr) (netstate.Result, error)
	// Adjust does what the last of these two did, with a desired state that differs by a few objects.
	Adjust(gone, come netstate.State) (netstate.Result, error)
	// Compare observes the kernel, and lists what the next of these would do if nothing else were desired.
	Compare() ([]netstate.Change, error)
	// Offloads tells which features of a device are on.
	Offloads(device string) []netstate.Offload
	// Watch fills Changed with hints that something changed, until ctx ends.
	Watch(ctx context.Context) error
	Changed() <-chan struct{}
}

// Parts are what an agent works with.
type Parts struct {
	Store  subnet.Manager
	Kernel Kernel
	// Firewall chooses the driver. It may start processes, and is called once, beside what the agent does meanwhile.
	Firewall func(context.Context) masquerade.Driver
	// FirewallChanges notifies of changes in the firewall; nil or closed: not of any more.
	FirewallChanges <-chan struct{}
	SubnetFile      *FileWatch         // nil: changes of the subnet file are not notified
	Health          net.Listener       // for /healthz, /readyz and /status; nil: none
	Control         net.Listener       // for the operator's commands on this node; nil: none
	Notify          func(state string) // to systemd, see sd_notify(3); nil: it does not run the daemon
	Watchdog        time.Duration      // within which systemd has to be told that the loop comes round; zero: it has not
	LogLevel        zap.AtomicLevel
	About           About
	Log             *zap.Logger
}

// Agent is the daemon of one node.
type Agent struct {
	opts     Options
	store    subnet.Manager
	kernel   Kernel
	firewall *firewall
	health   *health
	listener net.Listener
	control  net.Listener
	notify   func(state string)
	watchdog time.Duration
	level    zap.AtomicLevel
	about    About
	log      *zap.Logger
	state    state.Dir
	started  time.Time
	audit    time.Time // when to look at the kernel without any reason to

	questions chan func() // for the loop, between two rounds
	work      work

	// What the loop knows. Each stays as it was while nothing better is known.
	snap       subnet.Snapshot
	roster     subnet.Roster
	lost       bool      // the store was just found to have lost data
	losses     int       // how often it was
	lostAt     time.Time // the last time
	lostUntil  time.Time // peers that are missing because the store lost its data are kept until then
	host       netstate.Host
	config     *subnet.Config // the last valid one that the lease fits
	configJSON string         // the text of it
	choice     *Choice
	claim      subnet.Claim
	lease      subnet.Lease
	planned    *planned        // nil: the next round plans everything
	mtu        int             // that pods were told last
	subnetEnv  []byte          // the subnet file as it was written last
	watch      *FileWatch      // of that
	remembered state.Persisted // what the state directory said at the start
	uncovered  []netip.Addr    // the endpoints that no route covers any more
	offline    subnet.Table    // made of it, while the store has not been read
	writer     *stateWriter
	bridges    podBridges
	peers      peerLog
	// unreachable says why of the peers that are.
	unreachable map[netip.Prefix]string
	drift       *driftLog
	mesh        *mesh
	moved       bool               // there is a note that the subnet was lost
	refused     []netstate.Failure // in the last round
	changes     status.Changes
	instruments *metrics.Instruments
}

// New makes an agent of its parts.
func New(o Options, p Parts) *Agent {
	h := newHealth(p.Log, time.Now)
	instruments := metrics.NewInstruments()
	dir := state.Dir{Path: o.StateDir, Prefix: "/" + strings.Trim(p.About.Prefix, "/"), Node: o.Identity}
	return &Agent{
		opts: o, store: p.Store, kernel: p.Kernel, health: h, listener: p.Health, control: p.Control, notify: p.Notify, watchdog: p.Watchdog, level: p.LogLevel, about: p.About, log: p.Log,
		questions: make(chan func()), state: dir,
		firewall: newFirewall(p, o.IPTablesResync, h, instruments.Firewall),
		writer:   newStateWriter(h),
		peers:    peerLog{log: p.Log, ways: map[*subnet.Lease]wayKinds{}},
		drift:    newDriftLog(p.Log),
		mesh:     newMesh(h, o.MeshProbe),
		watch:    p.SubnetFile,

		instruments: instruments,
	}
}

// Run works until ctx ends. It leaves the data plane as it is: pods go on talking while there is no daemon.
func (a *Agent) Run(ctx context.Context) error {
	var err error
	a.remembered, err = a.state.Load()
	a.health.set(condStateDir, err) // a node that forgot its subnet still has its lease in etcd
	a.claim.Remembered = a.remembered.Own()
	a.bridges.known = a.remembered.Bridges

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.store.Run(ctx) })
	g.Go(func() error { return a.firewall.run(ctx) })
	g.Go(func() error { return a.kernel.Watch(ctx) })
	if a.listener != nil {
		g.Go(func() error { return serve(ctx, a.listener, a.public()) })
	}
	if a.control != nil {
		g.Go(func() error { return serve(ctx, a.control, a.private()) })
	}
	if a.notify != nil {
		g.Go(func() error { return a.health.notifySystemd(ctx, a.notify, a.watchdog) })
	}
	if a.watch != nil {
		g.Go(func() error { return a.watch.run(ctx) })
	}
	if a.opts.MeshProbe {
		g.Go(func() error { return a.mesh.Run(ctx) })
	}
	g.Go(func() error { a.writer.run(); return nil })
	g.Go(func() error { return a.loop(ctx) })
	return g.Wait()
}

// loop goes round whenever there may be something to do, and at a period.
func (a *Agent) loop(ctx context.Context) error {
	defer a.writer.end()
	a.started = time.Now()
	look := true // at the kernel, instead of believing what was left there
	retry := firstRetry
	var pace throttle
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		if look {
			a.audit = time.Now().Add(jitter(auditEvery))
		}
		began := time.Now()
		err := a.round(look)
		a.work.last, a.work.took, a.work.rounds = time.Now(), time.Since(began), a.work.rounds+1
		a.instruments.Reconcile(a.work.took)
		var next time.Time
		next, retry = a.next(err, retry)
		timer.Reset(time.Until(next))
		a.health.waits()
		look, err = a.wait(ctx, timer, next, &pace, err != nil)
		a.health.works()
		if err != nil {
			a.save(true)
			return err
		}
	}
}

// next is when to go round again if nothing happens, and how long to wait after the failure that may follow.
func (a *Agent) next(err error, retry time.Duration) (time.Time, time.Duration) {
	now := time.Now()
	next := a.audit
	switch {
	case errors.Is(err, errNoDevice): // what else is due has to wait for it
		return now.Add(waitForInterface), firstRetry
	case errors.Is(err, errNoInterface):
		next = earlier(next, now.Add(waitForInterface))
	case err != nil:
		return now.Add(retry), min(2*retry, lastRetry)
	}
	for _, due := range []time.Time{a.roster.Next(), a.drift.due(), a.writer.lease.next, a.writer.peers.next, a.bridges.due(now)} {
		if !due.IsZero() {
			next = earlier(next, due)
		}
	}
	if a.moved { // until an operator has removed the note
		next = earlier(next, now.Add(noteEvery))
	}
	if offline := a.started.Add(offlineAfter); !a.online() && now.Before(offline) {
		next = earlier(next, offline)
	}
	return next, firstRetry
}

// wait returns when there may be something to do, and whether the kernel has to be looked at for it.
func (a *Agent) wait(ctx context.Context, timer *time.Timer, next time.Time, pace *throttle, failed bool) (look bool, err error) {
	heard := false // of a change in the kernel that it is too early to look at
	for {
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case s := <-a.store.Updates():
			a.take(s)
			if heard {
				pace.looked(time.Now())
			}
			return failed || heard, nil
		case <-a.watch.news():
			return failed || heard, nil
		case question := <-a.questions:
			a.health.works()
			question()
			a.health.waits()
		case <-timer.C:
			if heard {
				pace.looked(time.Now())
			}
			return failed || heard || !time.Now().Before(a.audit), nil
		case <-a.kernel.Changed():
			now := time.Now()
			due := pace.due(now)
			if !now.Before(due) {
				pace.looked(now)
				return true, nil
			}
			heard = true
			timer.Reset(time.Until(earlier(next, due)))
		}
	}
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// jitter spreads what many nodes do at a period.
func jitter(d time.Duration) time.Duration { return d*4/5 + rand.N(d*2/5) }

var (
	errNoInterface = errors.New("waiting for a network interface")
	errNoDevice    = errors.New("waiting for the tunnel's device")
)

// online reports whether the store has been read since the start.
func (a *Agent) online() bool { return a.snap.Table.Revision != 0 }

// take replaces what is known of the store. When its data was lost, the peers that are missing now are kept for a while: a table
// that vanished is not a thousand removed nodes.
func (a *Agent) take(s subnet.Snapshot) {
	lost := a.online() && s.Table.Epoch != a.snap.Table.Epoch
	if !a.online() && s.Table.Revision != 0 && s.Table.Revision < a.remembered.Revision { // while this daemon was not running
		lost = true
		if old, err := a.remembered.Table(); err == nil && len(a.roster.Peers()) == 0 {
			self := subnet.Lease{Subnets: a.remembered.Own(), Attrs: a.claim.Attrs}
			a.roster.Update(old, old.Config, self, time.Now(), 0)
		}
	}
	if lost {
		a.lost, a.lostUntil = true, time.Now().Add(a.opts.StalePeerGrace)
		a.losses, a.lostAt = a.losses+1, time.Now()
		a.log.Warn("etcd lost data or was restored from a backup; keeping peers whose leases are missing",
			zap.Duration("for", a.opts.StalePeerGrace))
	}
	a.snap = s
	if a.online() { // what follows is in the store now
		a.remembered.Peers, a.offline = nil, subnet.Table{}
	}
}

// table is the lease table to act on.
func (a *Agent) table() subnet.Table {
	if !a.online() {
		return a.offline
	}
	return a.snap.Table
}

// round goes once from what is known to what should be. An error means that it has to be tried again; it has been reported.
func (a *Agent) round(look bool) error {
	if look {
		began := time.Now()
		host, err := a.kernel.Observe()
		a.instruments.Netlink(metrics.OpObserve, time.Since(began))
		if err != nil {
			a.health.set(condKernel, err)
			return err
		}
		a.host, a.work.looked = host, time.Now()
	}
	a.drift.flush()
	a.mesh.judge()
	a.uncover()
	a.learn()
	if a.config == nil {
		return nil // the next snapshot brings it
	}
	a.health.set(condEndpoints, inside(a.endpointsInside(), *a.config, a.lease))
	underlayErr := a.choose()
	if a.choice == nil {
		return underlayErr
	}
	be := backendOf(a.config.Backend.Type)
	if err := a.announce(be); err != nil {
		return errors.Join(underlayErr, err)
	}
	if a.lease == (subnet.Lease{}) {
		return underlayErr
	}
	err := a.program(be, look)
	a.followBridges(time.Now())
	a.save(false)
	return errors.Join(underlayErr, err)
}

// choose decides by which device and address the node goes on. While none fits, it goes on with the last ones: the others' leases
// are followed all the same.
func (a *Agent) choose() error {
	choice, err := Choose(a.host, a.opts.Interface, *a.config, a.current())
	if none := (noUnderlay{}); errors.As(err, &none) && a.choice != nil {
		if was := a.choice.Underlay.Get(none.family); was.Addr.IsValid() {
			err = fmt.Errorf("%w; %s", err, whatBecame(a.host, was))
		}
	}
	a.health.set(condUnderlay, err)
	if err != nil {
		return errNoInterface
	}
	if a.choice != nil && a.choice.Underlay != choice.Underlay {
		a.changes.Interface++
	}
	if a.choice == nil || a.choice.Reason != choice.Reason {
		a.log.Info("external interface chosen", zap.String("reason", choice.Reason), zap.Bool("public_ip_local", choice.PublicIPLocal))
	}
	a.choice = &choice
	return nil
}

// current is the address that the node goes by, so far as that is known: after a restart from its lease, or from
// memory.
func (a *Agent) current() addr.Per[netip.Addr] {
	if a.choice != nil {
		return addr.Per[netip.Addr]{V4: a.choice.Underlay.V4.Addr, V6: a.choice.Underlay.V6.Addr}
	}
	var out addr.Per[netip.Addr]
	known := func(ips addr.Per[netip.Addr]) { // so far as the node has them still
		for _, f := range addr.Families() {
			if ip := ips.Get(f); a.host.Has(ip) {
				out.Set(f, ip)
			}
		}
	}
	known(a.remembered.Addresses)
	for _, e := range a.snap.Table.Entries {
		if e.Identity == a.opts.Identity {
			known(e.PublicIP)
		}
	}
	return out
}

// uncover takes away what an earlier run has left and what would keep this one from ever reaching etcd: routes to
// peers' subnets that cover an endpoint, which may have been another one then.
func (a *Agent) uncover() {
	if a.online() || a.snap.Err == nil || slices.Equal(a.uncovered, a.snap.Endpoints) {
		return
	}
	res, err := a.kernel.Uncover(a.snap.Endpoints)
	if a.uncovered = a.snap.Endpoints; err != nil || len(res.Failed) > 0 {
		a.uncovered = nil // once more in the next round
		refused, _ := failures(res.Failed)
		a.log.Warn("cannot remove routes that cover an etcd endpoint", zap.Error(cmp.Or(err, refused)))
	}
	for _, c := range res.Done {
		a.log.Warn("removed route that covers an etcd endpoint", zap.Stringer("route", c.Obj))
	}
}

// endpointsInside are the addresses of etcd that a peer's subnet, or this node's own, may cover.
func (a *Agent) endpointsInside() (inside []netip.Addr) {
	for _, ip := range a.snap.Endpoints {
		if a.config.Contains(ip) {
			inside = append(inside, ip)
		}
	}
	return inside
}

// learn takes from the newest snapshot what holds, or from memory while there is none.
func (a *Agent) learn() {
	a.health.set(condStore, ofStore(a.snap.Err))
	if !a.online() {
		a.learnOffline()
		return
	}
	a.health.set(condOffline, nil)
	a.health.set(condLease, a.leaseProblem())
	a.health.set(condClaim, a.claimProblem())
	if a.snap.Held() && a.snap.Lease.Subnets != a.lease.Subnets {
		a.hold(a.snap.Lease)
	}
	moved := a.state.MovedProblem()
	a.moved = moved != nil
	a.health.set(condMoved, moved)
	switch {
	case a.snap.Table.ConfigErr != nil:
		a.health.set(condConfig, a.snap.Table.ConfigErr)
		if a.config == nil {
			a.configFromMemory()
		}
	case a.lease != (subnet.Lease{}) && !a.snap.Table.Config.Fits(a.lease.Subnets):
		a.health.set(condConfig, fmt.Errorf("%s %w", subnet.FormatKey(a.lease.Subnets), subnet.ErrMoved))
	default:
		a.health.set(condConfig, nil)
		a.follow(a.snap.Table)
	}
}

// follow goes on with the config of a table.
func (a *Agent) follow(t subnet.Table) {
	if t.ConfigJSON != a.configJSON {
		a.configJSON = t.ConfigJSON
		a.health.set(condConfigKeys, unknownKeys(t.ConfigJSON))
	}
	a.config = &t.Config
}

// configFromMemory goes on, after a restart, with the config that the node had before the one in the store was broken, and with the
// lease that still stands there.
func (a *Agent) configFromMemory() {
	t, err := a.remembered.Table()
	mine := func(e *subnet.Entry) bool {
		return e.Identity == a.opts.Identity && e.Subnets == a.remembered.Own()
	}
	if err == nil && t.Config.Fits(a.remembered.Own()) && slices.ContainsFunc(a.snap.Table.Entries, mine) {
		a.follow(t)
		a.lease = subnet.Lease{Subnets: a.remembered.Own()}
	}
}

// hold notes the lease that this node has from now on. Another one than before is a break for the pods that run: it has to be seen.
func (a *Agent) hold(l subnet.Lease) {
	now, before := subnet.FormatKey(l.Subnets), subnet.FormatKey(a.lease.Subnets)
	if before == "" && a.remembered.Subnets != now && a.inUse(a.remembered.Own()) && !a.inUse(l.Subnets) {
		before = a.remembered.Subnets // it was lost while the daemon was not running
	}
	if before == "" {
		a.log.Info("lease acquired", zap.String("subnet", now))
	} else {
		a.log.Error("subnet lease lost to another node; running pods are unreachable",
			zap.String("subnet", now), zap.String("before", before))
		a.health.set(condStateDir, a.state.NoteMove(before, now))
	}
	a.lease = l
}

// inUse reports whether something on the node, the pods' bridge most likely, has an address of these subnets.
func (a *Agent) inUse(sn addr.Per[netip.Prefix]) bool {
	return slices.ContainsFunc(a.host.Addresses, func(h netstate.HostAddress) bool {
		p := sn.Get(addr.FamilyOf(h.Prefix.Addr()))
		return p.IsValid() && p.Contains(h.Prefix.Addr())
	})
}

// ofStore is an error of the store without the store's name, which the condition has already.
func ofStore(err error) error {
	if e := (interface{ Reason() string })(nil); errors.As(err, &e) {
		return errors.New(e.Reason())
	}
	return err
}

// learnOffline starts from what is remembered, once etcd has been away for a moment, if the subnet is still sure to be this node's.
func (a *Agent) learnOffline() {
	m := a.remembered
	switch {
	case a.lease != (subnet.Lease{}) || m.Subnets == "" || time.Since(a.started) < offlineAfter:
		return
	case time.Now().Before(m.Saved):
		a.health.set(condOffline, fmt.Errorf("waiting for etcd: the clock says %s, earlier than when %s was written", time.Now().Format(time.RFC3339), a.state.LeaseFile()))
		return
	case m.Node != a.opts.Identity:
		a.health.set(condOffline,
			fmt.Errorf(
				"waiting for etcd: %s is of node %q: this node was renamed, or its disk is a copy of that node's",
				a.state.LeaseFile(), m.Node.NodeName))
		return
	case m.Prefix != "" && m.Prefix != a.state.Prefix:
		a.health.set(condOffline,
			fmt.Errorf("waiting for etcd: %s is of another network, %s", a.state.LeaseFile(), m.Prefix))
		return
	case !m.Expires.IsZero() && time.Now().After(m.Expires):
		a.health.set(condOffline, fmt.Errorf("waiting for etcd: the persisted lease of %s expired at %s, another node may hold it", m.Subnets, m.Expires.Format(time.RFC3339)))
		return
	}
	t, err := m.Table()
	if err == nil && !t.Config.Fits(m.Own()) {
		err = errors.New("the persisted subnet does not fit the persisted network config")
	}
	if err != nil {
		a.health.set(condOffline, fmt.Errorf("waiting for etcd: %s: %w", a.state.LeaseFile(), err))
		return
	}
	a.log.Warn("etcd unreachable; starting from persisted state", zap.String("subnet", m.Subnets), zap.Int("peers", len(t.Entries)))
	a.health.set(condOffline, errors.New("no answer from etcd since the start: using persisted leases"))
	a.health.set(condLease, nil)
	a.follow(t)
	a.lease, a.offline = subnet.Lease{Subnets: m.Own()}, t
}

// announce claims a lease that says what the others need to know, once there is what it announces.
func (a *Agent) announce(be backend.Backend) error {
	c := subnet.Claim{
		Attrs: subnet.Attrs{
			PublicIP: a.choice.PublicIP, PublicIPLocal: a.choice.PublicIPLocal, Backend: a.config.Backend.Type,
			VTEP: be.VTEPs(*a.config, a.opts.Identity), Identity: a.opts.Identity,
		},
		Remembered: a.claim.Remembered,
	}
	if a.lease != (subnet.Lease{}) {
		c.Remembered, c.Keep = a.lease.Subnets, true
	}
	if c.VTEP != a.claim.VTEP && !a.announced(c) {
		if err := a.makeDevices(be, c.Attrs); err != nil {
			return err
		}
	}
	if c != a.claim {
		a.claim = c
		a.store.Claim(c)
		if a.snap.Held() { // what the store says may be about another address now
			a.health.set(condLease, a.leadsElsewhere())
		}
	}
	return nil
}

// announced reports whether the lease that a claim comes down to says already where to send to: to claim it changes
// nothing for peers.
func (a *Agent) announced(c subnet.Claim) bool {
	d, err := subnet.Decide(a.snap.Table, c, 0)
	e := a.snap.Table.Find(d.Key)
	return err == nil && e != nil && e.Identity == c.Identity && e.VTEP == c.VTEP
}

// makeDevices makes the tunnel's devices before a lease announces them: from then on peers send there, and if a device
// can't be had (another one has its VNI, a program its port, there is no such module), all that they send is lost.
func (a *Agent) makeDevices(be backend.Backend, self subnet.Attrs) error {
	in := backend.Input{Config: *a.config, Self: subnet.Lease{Attrs: self}, Underlay: a.choice.Underlay, Host: a.host}
	missing := slices.DeleteFunc(be.Plan(in).State.Links, func(l netstate.Link) bool {
		h, ok := a.host.Link(l.Name)
		return ok && h.Up && h.VXLAN.VNI == l.VXLAN.VNI && h.VXLAN.Port == l.VXLAN.Port
	})
	if len(missing) == 0 {
		return nil
	}
	res, err := a.kernel.AddMissing(netstate.State{Links: missing})
	refused, _ := failures(res.Failed)
	if err = cmp.Or(err, refused); err != nil {
		a.planned = nil // the kernel was asked for something else than what is planned
		a.health.set(condKernel, fmt.Errorf("the lease is not announced until this succeeds: %w", err))
		return errNoDevice
	}
	if a.planned == nil {
		a.health.set(condKernel, errStarting)
	}
	return nil
}

// leaseProblem is why no lease is held that leads here, and claimProblem why the one that is held does not say what it
// should.
func (a *Agent) leaseProblem() error {
	switch {
	case a.snap.Held():
		return a.leadsElsewhere()
	case a.snap.ClaimErr != nil:
		return a.snap.ClaimErr
	case a.lease == (subnet.Lease{}):
		return errStarting // if it is etcd that is away, that is said by itself
	}
	if e := a.snap.Table.Find(subnet.FormatKey(a.lease.Subnets)); e != nil && e.Identity == a.opts.Identity {
		return nil // started without etcd, which has it, and has only not been asked for it yet
	}
	return errors.New("the lease disappeared from etcd and is being acquired again")
}

// leadsElsewhere is why peers that go by this node's lease do not reach it, or do not go by it.
func (a *Agent) leadsElsewhere() error {
	var conflict *subnet.ConflictError
	if errors.As(a.snap.ClaimErr, &conflict) && conflict.Refused {
		return conflict
	}
	for _, f := range addr.Families() {
		said, is := a.snap.Lease.PublicIP.Get(f), a.claim.PublicIP.Get(f)
		if a.snap.Lease.Subnets.Get(f).IsValid() && is.IsValid() && said != is {
			err := fmt.Errorf("the lease announces %s, but this node's address is %s", said, is)
			if a.snap.ClaimErr != nil {
				err = fmt.Errorf("%w: %w", err, a.snap.ClaimErr)
			}
			return err
		}
	}
	return nil
}

func (a *Agent) claimProblem() error {
	if !a.snap.Held() || a.snap.Table.ConfigErr != nil || errors.Is(a.snap.ClaimErr, subnet.ErrMoved) ||
		a.leadsElsewhere() != nil { // said elsewhere
		return nil
	}
	return a.snap.ClaimErr
}

// settings are those of the kernel that are the node's, not a device's.
func (a *Agent) settings() []netstate.Sysctl {
	var out []netstate.Sysctl
	for _, f := range a.config.Families() {
		if a.opts.BridgeNetfilter {
			out = append(out, netstate.BridgeNetfilter(f))
		}
		if a.opts.IPForward {
			out = append(out, netstate.Forwarding(f))
		}
	}
	if a.opts.IPForward && a.config.Pools.V6.On() {
		// A node that forwards takes no router advertisements any more, unless it is told to: it would lose its own way out.
		for _, link := range a.host.AdvertisedBy() {
			out = append(out, netstate.Sysctl{Path: "net/ipv6/conf/" + link + "/accept_ra", Value: "2"})
		}
	}
	return out
}

func (a *Agent) firewallWish(p *planned) []masquerade.Input {
	var inputs []masquerade.Input
	c, self := p.input.Config, p.input.Self
	for _, f := range c.Families() {
		in := masquerade.Input{
			Network: c.Pools.Get(f).Network, Subnet: self.Subnets.Get(f), Tunnel: p.tunnel.Get(f),
			DirectNodes: a.opts.IPMasq && (c.Backend.Type == subnet.HostGW || c.Backend.DirectRouting), Nodes: p.direct.Get(f),
			Bare: p.bare.Get(f), Exclude: a.opts.MasqExclude, Masquerade: a.opts.IPMasq, Forward: a.opts.ForwardRules,
		}
		if self.PublicIPLocal {
			in.Node = self.PublicIP.Get(f)
		}
		inputs = append(inputs, in)
	}
	return inputs
}

func backendOf(t subnet.BackendType) backend.Backend {
	if t == subnet.HostGW {
		return hostgw.Backend{}
	}
	return vxlan.Backend{}
}
