package agent

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/diag/metrics"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// lingerFor is how long a peer stays whose lease is gone or can't be believed any more. A lease that was deleted or overwritten by
// mistake is back within that time, and no packet is lost; and nothing is gained by taking the routes of a node that is gone at once.
const lingerFor = 5 * time.Second

// planned is what the node's plan was made of, and what the next one follows from if only a few peers come and go.
type planned struct {
	input   backend.Input // without the peers
	mtu     int
	tunnel  addr.Per[string]
	devices []netstate.Link          // of the node itself
	steers  addr.Per[int]            // see steered; that there are such makes a rule
	direct  addr.Per[[]netip.Addr]   // see backend.Plan.DirectNodes
	bare    addr.Per[[]netip.Prefix] // see backend.Plan.BareSubnets
	entries map[string]int           // how many objects are planned, by kind
	online  bool                     // the peers are those of the store, not of memory
	// plain: no peer is unreachable and nobody else's route is in the way, so that peers that come and go make no difference to others.
	plain bool
}

// program makes the node what the lease and its peers ask for. If nothing changed but a few peers, it costs what they cost.
func (a *Agent) program(be backend.Backend, looked bool) error {
	// What the device must be follows from what is claimed, which may be newer than what the store says by now.
	self := subnet.Lease{Subnets: a.lease.Subnets, Attrs: a.claim.Attrs}
	ch := a.believe(self)
	in := backend.Input{
		Config: *a.config, Self: self, Underlay: a.choice.Underlay, Host: a.host, Endpoints: a.endpointsInside(),
	}
	for _, f := range in.Config.Families() {
		u := in.Underlay.Get(f)
		u.MTU = narrowest(a.host, in.Config, f, u.MTU, a.roster.Peers)
		in.Underlay.Set(f, u)
	}
	st := a.step(be, in, ch)
	res, err := a.apply(st)
	before := a.refused
	a.refused = res.Failed
	failed, minor := failures(res.Failed)
	err = errors.Join(err, failed)
	a.health.set(condKernel, err)
	a.health.set(condSettings, minor)
	switch {
	case looked && res.Repaired:
		a.drift.note(slices.DeleteFunc(res.Done, func(c netstate.Change) bool { // what the kernel takes at last, nobody has changed
			return slices.ContainsFunc(before, func(f netstate.Failure) bool { return f.Obj == c.Obj })
		}))
	case st.all:
		logChanges(a.log, res.Done)
	}
	return errors.Join(err, a.writeSubnetFile())
}

// believe sorts out which peers to act on.
func (a *Agent) believe(self subnet.Lease) subnet.Change {
	now, keep := time.Now(), lingerFor
	if a.lost { // what is missing now, nobody has removed; what goes missing later is removed as ever
		keep, a.lost = max(lingerFor, a.lostUntil.Sub(now)), false
	}
	ch := a.roster.Update(a.table(), *a.config, self, now, keep)
	if ch.Refused {
		a.health.set(condPeers, refusals(a.roster.Refused()))
	}
	if !a.lostUntil.IsZero() && !now.Before(a.lostUntil) {
		if len(ch.Gone) > 0 {
			a.log.Warn("removed peers whose leases did not return after etcd lost data", zap.Int("peers", len(ch.Gone)))
		}
		a.lostUntil = time.Time{}
	}
	return ch
}

// step leads from one plan to the next: what gone has goes, what come has comes. The two hold what single peers add; or all of the
// plan before goes and come is the next one as a whole.
type step struct {
	gone, come backend.Plan
	all        bool
	planned    *planned
	inTheWay   error
}

// step plans for the peers that came and went, or for all where anything else changed or these may make a difference to others.
func (a *Agent) step(be backend.Backend, in backend.Input, ch subnet.Change) step {
	plan := func(peers []*subnet.Lease) backend.Plan {
		in := in
		in.Peers = peers
		return be.Plan(in)
	}
	if p := a.planned; p != nil && p.online == a.online() && sameInput(p.input, in) {
		st := step{gone: plan(ch.Gone), come: plan(ch.Come), planned: p}
		few := len(ch.Gone)+len(ch.Come) == 0 || p.plain && plain(st.come, shadowed(in.Host, st.come.State))
		st.gone.State, st.come.State = ofPeers(st.gone.State), ofPeers(st.come.State)
		if few && p.sameRules(st) {
			return st
		}
	}
	st := step{come: plan(a.roster.Peers()), all: true}
	st.come.State.Sysctls = append(st.come.State.Sysctls, a.settings()...)
	slices.SortFunc(st.come.State.Sysctls, netstate.Sysctl.Compare)
	st.inTheWay = shadowed(in.Host, st.come.State)
	st.planned = &planned{
		input: in, mtu: st.come.MTU, tunnel: st.come.Tunnel, devices: slices.Clone(st.come.State.Links), entries: map[string]int{},
		online: a.online(), plain: plain(st.come, st.inTheWay),
	}
	return st
}

// apply makes the node what a step leads to.
func (a *Agent) apply(st step) (netstate.Result, error) {
	p := st.planned
	if changed := p.follow(st); changed || st.all {
		a.firewall.put(a.firewallWish(p)) // it works meanwhile
	}
	began, op := time.Now(), metrics.OpReconcile
	var res netstate.Result
	var err error
	switch {
	case !st.all:
		op = metrics.OpAdjust
		res, err = a.kernel.Adjust(st.gone.State, st.come.State)
	case p.online:
		res, err = a.kernel.Reconcile(st.come.State)
	default: // until the store has said what there is, nothing that is there may go
		res, err = a.kernel.AddMissing(st.come.State)
	}
	a.instruments.Netlink(op, time.Since(began))
	if a.planned = p; err != nil {
		a.planned = nil
	}
	if st.all {
		a.health.set(condPlan, joined(st.come.Problems))
		a.health.set(condUnreachable, unreachable(st.come.Ways))
		a.unreachable = reasons(st.come.Ways)
		a.health.set(condRoutes, st.inTheWay)
		a.setMTU(p.mtu)
	}
	a.peers.change(st.gone.Ways, st.come.Ways, st.all)
	a.mesh.change(st.gone.Ways, st.come.Ways, st.all)
	return res, err
}

func (a *Agent) setMTU(mtu int) {
	if a.mtu != 0 && a.mtu != mtu {
		a.changes.MTU++
		a.log.Info("MTU changed; existing pods keep the old one until recreated", zap.Int("mtu", mtu), zap.Int("before", a.mtu))
	}
	a.mtu = mtu
	a.mesh.resize(mtu)
}

func sameInput(a, b backend.Input) bool {
	return a.Config == b.Config && a.Self == b.Self && a.Underlay == b.Underlay && a.Host.Equal(b.Host) &&
		slices.Equal(a.Endpoints, b.Endpoints)
}

func plain(p backend.Plan, inTheWay error) bool {
	return inTheWay == nil && !slices.ContainsFunc(p.Ways, func(w backend.Way) bool { return w.Kind == backend.Unreachable })
}

// ofPeers is what of a plan's state is for single peers.
func ofPeers(s netstate.State) netstate.State {
	return netstate.State{Neighbours: s.Neighbours, FDB: s.FDB, Routes: s.Routes}
}

// steered counts the routes of a plan that only the traffic from this node's pods takes.
func steered(p backend.Plan) (n addr.Per[int]) {
	for _, r := range p.State.Routes {
		if f := addr.FamilyOf(r.Dst.Addr()); r.Table == netstate.OwnTable {
			n.Set(f, n.Get(f)+1)
		}
	}
	return n
}

// sameRules reports whether there are such routes in the same families as before.
func (p *planned) sameRules(st step) bool {
	now := p.steered(st)
	return (now.V4 > 0) == (p.steers.V4 > 0) && (now.V6 > 0) == (p.steers.V6 > 0)
}

// steered counts such routes after a step.
func (p *planned) steered(st step) (now addr.Per[int]) {
	less, more := steered(st.gone), steered(st.come)
	return addr.Per[int]{V4: p.steers.V4 - less.V4 + more.V4, V6: p.steers.V6 - less.V6 + more.V6}
}

// follow takes note of a step, and reports whether the peers changed that the firewall has to know.
func (p *planned) follow(st step) (changed bool) {
	p.steers = p.steered(st)
	less := st.gone.State.Counts()
	for kind, more := range st.come.State.Counts() {
		p.entries[kind] += more - less[kind]
	}
	for _, f := range addr.Families() {
		direct, a := replaced(p.direct.Get(f), st.gone.DirectNodes.Get(f), st.come.DirectNodes.Get(f))
		bare, b := replaced(p.bare.Get(f), st.gone.BareSubnets.Get(f), st.come.BareSubnets.Get(f))
		p.direct.Set(f, direct)
		p.bare.Set(f, bare)
		changed = changed || a || b
	}
	return changed
}

// replaced is a list without some entries and with others. The firewall works with the one from before, which must not
// change under its hands.
func replaced[T comparable](list, out, in []T) (now []T, changed bool) {
	if slices.Equal(out, in) {
		return list, false
	}
	left := make(map[T]bool, len(out))
	for _, e := range out {
		left[e] = true
	}
	return append(slices.DeleteFunc(slices.Clone(list), func(e T) bool { return left[e] }), in...), true
}

// writeSubnetFile tells CNI plugins the subnet and the MTU.
func (a *Agent) writeSubnetFile() error {
	self := subnet.Lease{Subnets: a.lease.Subnets, Attrs: a.claim.Attrs}
	content := subnetEnv(*a.config, self, a.mtu, a.opts.IPMasq)
	changed, err := writeIfChanged(a.opts.SubnetFile, content)
	switch {
	case err != nil:
		err = fmt.Errorf("%s: %w", a.opts.SubnetFile, err)
	case changed:
		if bytes.Equal(content, a.subnetEnv) { // that was there, and is gone or another
			a.drift.count("subnet-file", "write "+a.opts.SubnetFile)
			a.drift.flush()
		}
		a.watch.again()
	}
	if err == nil {
		a.subnetEnv = content
	}
	a.health.set(condSubnetEnv, err)
	return err
}
