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
	"github.com/overlayd/overlayd/metrics"
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
	steers  addr.Per[int]            // see steered
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
	res, ok, err := a.adjust(be, in, ch)
	if !ok {
		res, err = a.reconcile(be, in)
	}
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
	case !ok:
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
			a.log.Warn("peers that did not come back after etcd lost its data are given up", zap.Int("peers", len(ch.Gone)))
		}
		a.lostUntil = time.Time{}
	}
	return ch
}

// adjust brings in the peers that came and went, if nothing else changed. Not ok: everything has to be planned anew.
func (a *Agent) adjust(be backend.Backend, in backend.Input, ch subnet.Change) (res netstate.Result, ok bool, err error) {
	p := a.planned
	if p == nil || p.online != a.online() || !sameInput(p.input, in) {
		return res, false, nil
	}
	in.Peers = ch.Gone
	gone := be.Plan(in)
	in.Peers = ch.Come
	come := be.Plan(in)
	if len(in.Peers)+len(ch.Gone) > 0 && (!p.plain || !plain(come, shadowed(in.Host, come.State))) {
		return res, false, nil
	}
	steers, same := p.steered(gone, come)
	if !same {
		return res, false, nil
	}
	p.steers = steers
	began := time.Now()
	if res, err = a.kernel.Adjust(ofPeers(gone.State), ofPeers(come.State)); err != nil {
		a.planned = nil
	}
	a.instruments.Netlink(metrics.OpAdjust, time.Since(began))
	p.count(gone.State, come.State)
	a.peers.change(gone.Ways, come.Ways)
	a.mesh.change(gone.Ways, come.Ways)
	if p.follow(gone, come) {
		a.firewall.put(a.firewallWish(p))
	}
	return res, true, err
}

// reconcile plans everything anew.
func (a *Agent) reconcile(be backend.Backend, in backend.Input) (netstate.Result, error) {
	in.Peers = a.roster.Peers()
	plan := be.Plan(in)
	in.Peers = nil
	desired := plan.State
	desired.Sysctls = append(desired.Sysctls, a.settings()...)
	slices.SortFunc(desired.Sysctls, netstate.Sysctl.Compare)
	inTheWay := shadowed(a.host, desired)
	p := &planned{
		input: in, mtu: plan.MTU, tunnel: plan.Tunnel, devices: desired.Links, steers: steered(plan),
		direct: plan.DirectNodes, bare: plan.BareSubnets,
		entries: desired.Counts(), online: a.online(), plain: plain(plan, inTheWay),
	}
	a.firewall.put(a.firewallWish(p)) // it works meanwhile

	// Until the store has said what there is, nothing that is there may go.
	reconcile := a.kernel.Reconcile
	if !a.online() {
		reconcile = a.kernel.AddMissing
	}
	began := time.Now()
	res, err := reconcile(desired)
	a.instruments.Netlink(metrics.OpReconcile, time.Since(began))

	if a.planned = p; err != nil {
		a.planned = nil
	}
	a.health.set(condPlan, joined(plan.Problems))
	a.health.set(condUnreachable, unreachable(plan.Ways))
	a.unreachable = reasons(plan.Ways)
	a.health.set(condRoutes, inTheWay)
	a.peers.replace(plan.Ways)
	a.mesh.replace(plan.Ways, p.mtu)
	if a.mtu != 0 && a.mtu != p.mtu {
		a.changes.MTU++
		a.log.Info("the pods' MTU has changed; those that run keep theirs until they are made anew", zap.Int("mtu", p.mtu), zap.Int("before", a.mtu))
	}
	a.mtu = p.mtu
	return res, err
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

// steered counts them once some peers have gone and others come; same if there are such in the same families as before, so that the
// rules for them are the same.
func (p *planned) steered(gone, come backend.Plan) (now addr.Per[int], same bool) {
	less, more := steered(gone), steered(come)
	same = true
	for _, f := range addr.Families() {
		now.Set(f, p.steers.Get(f)-less.Get(f)+more.Get(f))
		same = same && (now.Get(f) > 0) == (p.steers.Get(f) > 0)
	}
	return now, same
}

// count takes note of the objects that peers came and went with.
func (p *planned) count(gone, come netstate.State) {
	less, more := ofPeers(gone).Counts(), ofPeers(come).Counts()
	for kind := range p.entries {
		p.entries[kind] += more[kind] - less[kind]
	}
}

// follow takes note of the peers that the firewall has to know, and reports whether they changed.
func (p *planned) follow(gone, come backend.Plan) (changed bool) {
	for _, f := range addr.Families() {
		direct, a := replaced(p.direct.Get(f), gone.DirectNodes.Get(f), come.DirectNodes.Get(f))
		bare, b := replaced(p.bare.Get(f), gone.BareSubnets.Get(f), come.BareSubnets.Get(f))
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
