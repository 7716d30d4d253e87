// Package agent ties a node together: leases come in from the store, a backend plans the kernel state, and one loop
// makes the kernel equal to the plan and keeps it so. An event only means that it is time for a round.
package agent

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/diag/metrics"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/internal/owner"
	"github.com/overlayd/overlayd/masquerade"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/runner"
	"github.com/overlayd/overlayd/subnet"
)

const (
	// resyncEvery is how often the kernel is observed without any reason to. It notifies of every change, so that this
	// finds something only if that failed; and with thousands of peers it is most of what an idle daemon costs.
	resyncEvery = 5 * time.Minute
	// observeMin and observeBurst bound how often the kernel is observed because it notifies of changes: at once after a
	// quiet time, so that what another process changed is reverted, and seldom if that goes on.
	observeMin, observeBurst = 500 * time.Millisecond, 5
	// A round that did not reach its goal is tried again after firstRetry, then ever more slowly.
	firstRetry, lastRetry = 500 * time.Millisecond, 30 * time.Second
	// waitForInterface is how often to look for an interface while none fits, or for the tunnel's device; mostly an event
	// comes first.
	waitForInterface = 2 * time.Second
	// noteEvery is how often to look whether an operator has removed the note that the subnet was lost.
	noteEvery = 10 * time.Second
	// offlineAfter is how long to wait for the store before starting from the persisted state.
	offlineAfter = 3 * time.Second
)

// Kernel is the node's kernel state; netstate.Kernel is the real one.
type Kernel interface {
	// Observe reads the kernel, and returns what of it is not ours.
	Observe() (netstate.Host, error)
	// Reconcile makes the objects with our marks equal to the desired state after an update.
	Reconcile(u netstate.Update) (netstate.Result, error)
	// Uncover removes those of our routes that cover one of these addresses.
	Uncover(ips []netip.Addr) (netstate.Result, error)
	// Forget ends the tracked connections into a network that have an address of this node. Any goroutine may call it.
	Forget(network netip.Prefix, source netip.Addr) error
	// Desired counts the desired objects by kind.
	Desired() map[string]int
	// Compare observes the kernel, and lists what the next Reconcile would do if nothing else were desired.
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
	// Firewall chooses the driver. It may start processes, and is called beside what the agent does meanwhile: once, and
	// when a driver says that the choice would be another one by now.
	Firewall func(context.Context) masquerade.Driver
	// FirewallChanges notifies of changes in the firewall; nil or closed: not of any more.
	FirewallChanges <-chan struct{}
	SubnetFile      *FileWatch   // nil: changes of the subnet file are not notified
	CNIConf         *FileWatch   // nil: changes of the CNI configurations are not notified
	Health          net.Listener // for /healthz, /readyz and /status; nil: none
	Control         net.Listener // for the operator's commands on this node; nil: none
	// Ready is called with whether the node is ready for pods, and why not, each time that this changes, and not
	// before it is known. At the end it is not called: traffic goes on flowing. It must not wait. nil: not of interest.
	Ready    func(ready bool, reason string)
	Notify   func(state string) // to systemd, see sd_notify(3); nil: it does not run the daemon
	Watchdog time.Duration      // within which systemd expects to be told that the loop runs; zero: it does not
	LogLevel zap.AtomicLevel
	About    About
	Log      *zap.Logger
}

// Agent is the daemon of one node.
type Agent struct {
	opts        Options
	parts       Parts
	log         *zap.Logger
	health      *health
	instruments *metrics.Instruments

	rounds   *runner.Runner // runs round; what follows belongs to its goroutine
	observe  *runner.Runner // has the next round observe the kernel
	facts    facts
	peers    peers
	applied  applied
	bridges  podBridges
	drift    *driftLog
	firewall *firewall
	mesh     *mesh
	writer   *stateWriter
}

// applied is what came of the rounds so far.
type applied struct {
	mtu       int          // that pods were told last
	subnetEnv []byte       // the subnet file as it was written last
	uncovered []netip.Addr // the endpoints that no route covers any more
	failed    []netstate.Failure
	expired   bool // peers that the store has lost are no longer kept, and are removed with the next plan
	changes   status.Changes
	work      status.Reconcile
}

// New makes an agent of its parts.
func New(o Options, p Parts) *Agent {
	h := newHealth(p.Log)
	instruments := metrics.NewInstruments()
	drift := newDriftLog(p.Log)
	a := &Agent{
		opts: o, parts: p, log: p.Log, health: h, instruments: instruments,
		drift:    drift,
		firewall: newFirewall(p, o.IPTablesResync, h, drift, instruments.Firewall),
		mesh:     newMesh(h, o.MeshProbe),
		writer:   newStateWriter(o.dir(), h),
	}
	a.facts.store = p.Store.Name()
	a.rounds = runner.New(runner.Options{RetryMin: firstRetry, RetryMax: lastRetry}, a.round)
	resync := resyncEvery*4/5 + rand.N(resyncEvery*2/5) // nodes that start together are not in step
	a.observe = runner.New(runner.Options{Min: observeMin, Burst: observeBurst, Max: resync}, a.resync)
	return a
}

// Run works until ctx ends. It leaves the data plane as it is: pods go on talking while there is no daemon.
func (a *Agent) Run(ctx context.Context) error {
	p, err := a.opts.dir().LoadOwn()
	a.health.set(condStateDir, err) // a node without persisted state still has its lease in the store
	a.facts.persisted, a.facts.started = p, time.Now()
	a.facts.claimed.Remembered, a.facts.settings = p.Own(), p.Settings
	a.bridges.known = p.Bridges
	a.rounds.Wake()

	defer a.drift.flushAll()
	g, ctx := errgroup.WithContext(ctx)
	run := func(on bool, f func(context.Context) error) {
		if on {
			g.Go(func() error { return f(ctx) })
		}
	}
	parts := a.parts
	run(true, parts.Store.Run)
	run(true, parts.Kernel.Watch)
	run(true, a.firewall.run)
	run(true, a.events)
	run(true, a.observe.Run)
	run(true, a.loop)
	run(parts.Health != nil, func(ctx context.Context) error { return serve(ctx, parts.Health, a.public()) })
	run(parts.Control != nil, func(ctx context.Context) error { return serve(ctx, parts.Control, a.private()) })
	run(parts.Notify != nil, func(ctx context.Context) error {
		return a.health.notifySystemd(ctx, parts.Notify, parts.Watchdog)
	})
	run(parts.Ready != nil, func(ctx context.Context) error { return a.health.notifyReady(ctx, parts.Ready) })
	run(parts.SubnetFile != nil, func(ctx context.Context) error { return parts.SubnetFile.run(ctx, a.rounds.Wake) })
	run(a.opts.Owner != "", func(ctx context.Context) error { return owner.Hold(ctx, a.opts.StateDir, a.opts.Owner) })
	run(a.opts.CNIConf != "", a.followCNI)
	run(a.opts.MeshProbe, a.mesh.Run)
	return g.Wait()
}

// loop runs the rounds until ctx ends. Then it writes what a restart has to know, beside the end of the other parts: it
// does not wait for any of them.
func (a *Agent) loop(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.rounds.Run(ctx) })
	g.Go(func() error { return a.writer.run(ctx) })
	err := g.Wait()
	a.save(true)
	a.writer.flush()
	return err
}

// events turns what happens into rounds until ctx ends.
func (a *Agent) events(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case s := <-a.parts.Store.Updates():
			_ = a.rounds.Do(ctx, func() { a.take(s); a.rounds.Wake() }) // the error of ctx
		case <-a.parts.Kernel.Changed():
			a.observe.Wake()
		}
	}
}

// resync has the next round observe the kernel.
func (a *Agent) resync(ctx context.Context) error {
	return a.rounds.Do(ctx, func() { a.facts.observed = false; a.rounds.Wake() })
}

// take takes over what the store says.
func (a *Agent) take(s subnet.Snapshot) {
	f, now := &a.facts, time.Now()
	was := f.leases
	var lost bool
	f.snap = s
	f.leases, lost = was.follow(s.Table, f.persisted.Revision, now, a.opts.StalePeerGrace)
	if lost {
		a.log.Warn("store lost data or was restored from a backup; keeping peers whose leases are missing",
			zap.Duration("for", a.opts.StalePeerGrace))
		if !was.online() && len(a.peers.roster.Peers()) == 0 {
			// Lost while the daemon was not running. One that started from the persisted state may not have got to its peers.
			a.loadPeers()
			if old, err := f.persisted.Table(); err == nil {
				self := subnet.Lease{Subnets: f.persisted.Own(), Attrs: f.claimed.Attrs}
				a.peers.roster.Update(old, old.Config, self, now, 0)
			}
		}
	}
	if f.leases.online() {
		f.persisted.Peers = nil // of no use any more
	}
}

// loadPeers completes the persisted state with the peers, once it is clear that they are needed.
func (a *Agent) loadPeers() {
	p, err := a.opts.dir().Load()
	a.health.set(condStateDir, err)
	a.facts.persisted.Peers = p.Peers
}

// round goes once from the facts to the desired state. An error, which has been reported, means that it has to be tried
// again.
func (a *Agent) round(context.Context) error {
	a.health.works()
	defer a.health.waits()
	began := time.Now()
	err := a.reconcile()
	if errors.Is(err, errNoInterface) || errors.Is(err, errNoDevice) {
		a.rounds.WakeAfter(waitForInterface)
		a.facts.observed, err = false, nil
	} else if err != nil {
		a.facts.observed = false
	}
	w := &a.applied.work
	w.Last, w.Took, w.Rounds = time.Now(), time.Since(began), w.Rounds+1
	a.instruments.Reconcile(w.Took)
	return err
}

// wakeAt has a round run at a time even if nothing happens until then; the zero time: none.
func (a *Agent) wakeAt(t time.Time) {
	if !t.IsZero() {
		a.rounds.WakeAfter(time.Until(t))
	}
}

var (
	errNoInterface = errors.New("waiting for a network interface")
	errNoDevice    = errors.New("waiting for the tunnel's device")
)

func (a *Agent) reconcile() error {
	reverting := !a.facts.observed // what is done now reverts external changes
	if err := a.read(); err != nil {
		a.health.set(condKernel, err)
		return err
	}
	a.uncover()
	d := desire(a.opts, a.facts)
	if d.lacksKey(a.facts) {
		key, err := a.opts.dir().WireGuardKey()
		if a.health.set(condStateDir, err); err != nil {
			return err
		}
		a.facts.key = key
		d = desire(a.opts, a.facts)
	}
	a.adopt(d)
	var waiting error
	if d.conditions[condUnderlay] != nil {
		waiting = errNoInterface
	}
	if d.config == nil || d.choice == nil {
		return waiting // the next snapshot brings the config
	}
	if err := a.announce(d); err != nil {
		return err
	}
	if d.subnets == (addr.Per[netip.Prefix]{}) {
		return waiting
	}
	err := a.program(d, reverting)
	a.followBridges(time.Now())
	a.save(false)
	return errors.Join(err, waiting)
}

// read brings the facts up to date.
func (a *Agent) read() error {
	f := &a.facts
	if !f.observed {
		began := time.Now()
		host, err := a.parts.Kernel.Observe()
		a.instruments.Netlink(metrics.OpObserve, time.Since(began))
		if err != nil {
			return err
		}
		f.host, f.observed, a.applied.work.Resynced = host, true, time.Now()
	}
	if f.moved = a.opts.dir().MovedProblem(); f.moved != nil {
		a.rounds.WakeAfter(noteEvery)
	}
	f.now = time.Now()
	if f.leases.is == unread {
		if patience := f.started.Add(offlineAfter); f.now.Before(patience) {
			a.wakeAt(patience)
		} else if f.persisted.Subnets != "" && f.persisted.Peers == nil {
			a.loadPeers()
		}
	}
	return nil
}

// uncover removes what an earlier run has left and what would keep this one from ever reaching the store: routes to peers'
// subnets that cover an endpoint, which may have been another one then.
func (a *Agent) uncover() {
	endpoints := a.facts.snap.Endpoints
	if a.facts.leases.online() || a.facts.snap.Err == nil || slices.Equal(a.applied.uncovered, endpoints) {
		return
	}
	res, err := a.parts.Kernel.Uncover(endpoints)
	if a.applied.uncovered = endpoints; err != nil || len(res.Failed) > 0 {
		refused, _ := failures(res.Failed)
		a.applied.uncovered = nil
		a.log.Warn("cannot remove routes that cover an endpoint of the store", zap.Error(cmp.Or(err, refused)))
	}
	for _, c := range res.Done {
		a.log.Warn("removed route that covers an endpoint of the store", zap.Stringer("route", c.Obj))
	}
}

// adopt takes over what the node goes by from now on, and reports what is another than before.
func (a *Agent) adopt(d desired) {
	was := a.facts.basis
	a.facts.basis = d.basis
	a.applied.expired = a.applied.expired || d.expired
	now := subnet.FormatKey(d.subnets)
	switch {
	case d.leases.is == persisted && was.leases.is == unread:
		a.log.Warn("store unreachable; starting from persisted state", zap.String("subnet", now),
			zap.Int("peers", len(d.leases.table.Entries)))
	case d.acquired && d.before == (addr.Per[netip.Prefix]{}):
		a.log.Info("lease acquired", zap.String("subnet", now))
	case d.acquired: // a break for the pods that run: an operator has to know
		before := subnet.FormatKey(d.before)
		a.log.Error("subnet lease lost to another node; running pods are unreachable",
			zap.String("subnet", now), zap.String("before", before))
		a.health.set(condStateDir, a.opts.dir().NoteMove(before, now))
		d.conditions[condMoved] = a.opts.dir().MovedProblem()
		a.rounds.WakeAfter(noteEvery)
	}
	if c := d.choice; c != nil && d.conditions[condUnderlay] == nil {
		if was.choice != nil && was.choice.Underlay != c.Underlay {
			a.applied.changes.Interface++
		}
		if was.choice == nil || was.choice.Reason != c.Reason {
			a.log.Info("external interface chosen", zap.String("reason", c.Reason),
				zap.Bool("public_ip_local", c.PublicIPLocal))
		}
	}
	for _, c := range slices.Sorted(maps.Keys(d.conditions)) {
		a.health.set(c, d.conditions[c])
	}
}

// announce claims the desired lease, once there is what it announces.
func (a *Agent) announce(d desired) error {
	if !d.claim.SameEnds(d.claimed.Attrs) && !announced(a.facts.snap.Table, d.claim) {
		if err := a.makeDevices(d); err != nil {
			return err
		}
	}
	if d.claim != d.claimed {
		a.facts.claimed = d.claim
		a.parts.Store.Claim(d.claim)
	}
	return nil
}

// announced reports whether the lease that a claim comes down to says already where to send to: to claim it changes
// nothing for peers.
func announced(t subnet.Table, c subnet.Claim) bool {
	d, err := subnet.Decide(t, c, 0)
	e := t.Find(d.Key)
	return err == nil && e != nil && e.Identity == c.Identity && e.SameEnds(c.Attrs)
}

// makeDevices makes the tunnel's devices before a lease announces them: from then on peers send there, and if a device
// can't be had (another one has its VNI, a program its port, there is no such module), all that they send is lost.
func (a *Agent) makeDevices(d desired) error {
	in := backend.Input{
		Config: *d.config, Self: subnet.Lease{Attrs: d.claim.Attrs}, Underlay: d.choice.Underlay, Host: a.facts.host,
		Key: a.facts.key,
	}
	missing := slices.DeleteFunc(d.backend().Plan(in).State.Links, func(l netstate.Link) bool {
		h, ok := a.facts.host.Link(l.Name)
		return ok && h.Up && h.VXLAN.VNI == l.VXLAN.VNI && h.VXLAN.Port == l.VXLAN.Port
	})
	if len(missing) == 0 {
		return nil
	}
	res, err := a.parts.Kernel.Reconcile(netstate.Update{Come: netstate.State{Links: missing}, All: true})
	refused, _ := failures(res.Failed)
	if err = cmp.Or(err, refused); err != nil {
		a.peers.planned = nil // the kernel was asked for something else than what is planned
		a.health.set(condKernel, fmt.Errorf("the lease is not announced until this succeeds: %w", err))
		return errNoDevice
	}
	if a.peers.planned == nil {
		a.health.set(condKernel, errStarting)
	}
	return nil
}

// program makes the node what the lease and its peers ask for. If nothing changed but a few peers, it costs what they
// cost.
func (a *Agent) program(d desired, reverting bool) error {
	in := d.input(a.facts)
	ch := a.peers.accept(d.leases, *d.config, in.Self, a.facts.now)
	a.wakeAt(a.peers.roster.Next())
	if ch.Rejected {
		a.health.set(condPeers, rejections(a.peers.roster.Rejected()))
	}
	if a.applied.expired && len(ch.Gone) > 0 {
		a.log.Warn("removed peers whose leases did not return after the store lost data", zap.Int("peers", len(ch.Gone)))
	}
	a.applied.expired = false
	for _, f := range in.Config.Families() {
		u := in.Underlay.Get(f)
		u.MTU = narrowest(a.facts.host, in.Config, f, u.MTU, a.peers.roster.Peers)
		in.Underlay.Set(f, u)
	}
	st := a.peers.plan(in, sysctls(a.opts, in.Config, in.Host), d.leases.online(), ch)
	res, err := a.apply(st)
	before := a.applied.failed // what is accepted of it at last was changed by no other process
	a.applied.failed = res.Failed
	failed, minor := failures(res.Failed)
	err = errors.Join(err, failed)
	a.health.set(condKernel, err)
	a.health.set(condSettings, minor)
	switch {
	case reverting && res.Repaired:
		a.drift.reverted(slices.DeleteFunc(res.Done, func(c netstate.Change) bool {
			return slices.ContainsFunc(before, func(f netstate.Failure) bool { return f.Obj == c.Obj })
		}))
	case st.all:
		logChanges(a.log, res.Done)
	}
	return errors.Join(err, a.writeSubnetFile(d))
}

// apply makes the node what a step leads to.
func (a *Agent) apply(st step) (netstate.Result, error) {
	p := st.planned
	changes := a.peers.paths.follow(st)
	if st.all || slices.ContainsFunc(changes, pathChange.inFirewall) {
		a.firewall.put(firewallInputs(a.opts, p, a.peers.nodes)) // it works meanwhile
	}
	began, op := time.Now(), metrics.OpReconcile
	if !st.all {
		op = metrics.OpAdjust
	}
	res, err := a.parts.Kernel.Reconcile(
		netstate.Update{Gone: st.gone.State, Come: st.come.State, All: st.all, Prune: p.prune})
	a.instruments.Netlink(op, time.Since(began))
	if a.peers.planned = p; err != nil {
		a.peers.planned = nil
	}
	if st.all {
		a.health.set(condPlan, problems(st.come.Problems, asItIs))
		a.health.set(condUnreachable, unreachable(st.come.Paths))
		a.health.set(condRoutes, st.shadowed)
		a.setMTU(p.node.MTU)
	}
	logPaths(a.log, changes, len(a.peers.roster.Peers()))
	a.mesh.change(changes)
	return res, err
}

func (a *Agent) setMTU(mtu int) {
	before := a.applied.mtu
	if before != 0 && before != mtu {
		a.applied.changes.MTU++
		a.log.Info("MTU changed; existing pods keep the old one until recreated",
			zap.Int("mtu", mtu), zap.Int("before", before))
	}
	a.applied.mtu = mtu
	a.mesh.Resize(mtu)
}

// writeSubnetFile tells CNI plugins the subnet and the MTU.
func (a *Agent) writeSubnetFile(d desired) error {
	content := subnetEnv(*d.config, d.subnets, a.applied.mtu, a.opts.IPMasq)
	changed, err := writeIfChanged(a.opts.SubnetFile, content)
	switch {
	case err != nil:
		err = fmt.Errorf("%s: %w", a.opts.SubnetFile, err)
	case changed:
		if bytes.Equal(content, a.applied.subnetEnv) { // that was there, and is gone or another
			a.drift.count("subnet-file", 1, "write "+a.opts.SubnetFile)
		}
		a.parts.SubnetFile.again()
	}
	if err == nil {
		a.applied.subnetEnv = content
	}
	a.health.set(condSubnetEnv, err)
	return err
}
