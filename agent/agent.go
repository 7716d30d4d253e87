// Package agent ties a node together: leases come in from the store, a backend plans the kernel state, and one loop makes the kernel
// equal to the plan and keeps it so. Nothing is done because of an event; an event only says that it is time to look again.
package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/backend/hostgw"
	"github.com/overlayd/overlayd/backend/vxlan"
	"github.com/overlayd/overlayd/masquerade"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

const (
	// auditEvery is how often the kernel is looked at without any reason to.
	auditEvery = time.Minute
	// A round that did not reach its goal is tried again after firstRetry, then ever more slowly.
	firstRetry, lastRetry = 500 * time.Millisecond, 30 * time.Second
	// waitForInterface is how often to look for an interface while none fits.
	waitForInterface = 2 * time.Second
)

// Kernel is the node's kernel state; netstate.Kernel is the real one.
type Kernel interface {
	Observe() (netstate.Host, error)
	Reconcile(desired netstate.State) (netstate.Result, error)
}

// Parts are what an agent works with.
type Parts struct {
	Store    subnet.Manager
	Kernel   Kernel
	Firewall masquerade.Driver
	Sets     masquerade.Sets
	Health   net.Listener // for /healthz and /readyz; nil: none
	Log      *zap.Logger
}

// Agent is the daemon of one node.
type Agent struct {
	opts     Options
	store    subnet.Manager
	kernel   Kernel
	firewall *firewall
	health   *health
	listener net.Listener
	log      *zap.Logger
	state    stateDir

	// What the loop knows. Each stays as it was while nothing better is known.
	snap   subnet.Snapshot
	host   netstate.Host
	config *subnet.Config // the last valid one that the lease fits
	choice *Choice
	claim  subnet.Claim
	lease  subnet.Lease
	peers  peerLog
}

// New makes an agent of its parts.
func New(o Options, p Parts) *Agent {
	h := newHealth(p.Log, time.Now)
	return &Agent{
		opts: o, store: p.Store, kernel: p.Kernel, health: h, listener: p.Health, log: p.Log, state: stateDir(o.StateDir),
		firewall: &firewall{
			driver: p.Firewall, sets: p.Sets, resync: o.IPTablesResync, health: h, log: p.Log, wishes: newMailbox[firewallWish](),
		},
		peers: peerLog{log: p.Log},
	}
}

// Run works until ctx ends. It leaves the data plane as it is: pods go on talking while there is no daemon.
func (a *Agent) Run(ctx context.Context) error {
	remembered, err := a.state.load()
	a.health.set(condStateDir, err) // a node that forgot its subnet still has its lease in etcd
	a.claim.Remembered = remembered

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.store.Run(ctx) })
	g.Go(func() error { return a.firewall.run(ctx) })
	if a.listener != nil {
		g.Go(func() error { return a.health.serve(ctx, a.listener) })
	}
	g.Go(func() error { return a.loop(ctx) })
	return g.Wait()
}

func (a *Agent) loop(ctx context.Context) error {
	look := true // at the kernel, instead of believing what was left there
	retry := firstRetry
	for {
		err := a.round(look)
		a.health.alive()
		wait := jitter(auditEvery)
		if err != nil {
			wait = retry
			retry = min(2*retry, lastRetry)
			if errors.Is(err, errNoInterface) {
				wait = waitForInterface
			}
		} else {
			retry = firstRetry
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case a.snap = <-a.store.Updates():
			look = err != nil
		case <-timer.C:
			look = true
		}
		timer.Stop()
	}
}

// jitter spreads what many nodes do at a period.
func jitter(d time.Duration) time.Duration { return d*4/5 + rand.N(d*2/5) }

var errNoInterface = errors.New("waiting for a network interface")

// round goes once from what is known to what should be. An error means that it has to be tried again; it has been reported.
func (a *Agent) round(look bool) error {
	if look {
		host, err := a.kernel.Observe()
		if err != nil {
			a.health.set(condKernel, err)
			return err
		}
		a.host = host
	}
	a.learn()
	if a.config == nil {
		return nil // the next snapshot brings it
	}
	choice, err := Choose(a.host, a.opts.Interface, *a.config)
	a.health.set(condUnderlay, err)
	if err != nil {
		return errNoInterface
	}
	if a.choice == nil || a.choice.Reason != choice.Reason {
		a.log.Info("external interface chosen", zap.String("reason", choice.Reason), zap.Bool("public_ip_local", choice.PublicIPLocal))
	}
	a.choice = &choice
	be := backendOf(a.config.Backend.Type)
	a.announce(be)
	if a.lease == (subnet.Lease{}) {
		return nil
	}
	return a.program(be)
}

// learn takes from the newest snapshot what holds.
func (a *Agent) learn() {
	a.health.set(condStore, a.snap.Err)
	a.health.set(condLease, a.leaseProblem())
	if a.snap.Held() && a.snap.Lease.Subnets != a.lease.Subnets {
		fields := []zap.Field{zap.String("subnet", subnet.FormatKey(a.snap.Lease.Subnets))}
		if a.lease != (subnet.Lease{}) {
			fields = append(fields, zap.String("instead_of", subnet.FormatKey(a.lease.Subnets)))
		}
		a.log.Info("lease held", fields...)
		a.lease = a.snap.Lease
	}
	switch {
	case a.snap.Table.Revision == 0:
		return // nothing was read yet; the store's own error says why
	case a.snap.Table.ConfigErr != nil:
		a.health.set(condConfig, a.snap.Table.ConfigErr)
	case a.lease != (subnet.Lease{}) && !a.snap.Table.Config.Fits(a.lease.Subnets):
		a.health.set(condConfig, fmt.Errorf("%s %w", subnet.FormatKey(a.lease.Subnets), subnet.ErrMoved))
	default:
		a.health.set(condConfig, nil)
		a.config = new(a.snap.Table.Config)
	}
}

// announce claims a lease that says what the others need to know.
func (a *Agent) announce(be backend.Backend) {
	c := subnet.Claim{
		Attrs: subnet.Attrs{
			PublicIP: a.choice.PublicIP, PublicIPLocal: a.choice.PublicIPLocal, Backend: a.config.Backend.Type,
			VTEP: be.VTEPs(*a.config, a.opts.Identity), Identity: a.opts.Identity,
		},
		Remembered: a.claim.Remembered,
	}
	if a.lease != (subnet.Lease{}) {
		c.Remembered, c.Keep = a.lease.Subnets, true
		a.health.set(condStateDir, a.state.save(a.lease.Subnets))
	}
	if c != a.claim {
		a.claim = c
		a.store.Claim(c)
	}
}

func (a *Agent) leaseProblem() error {
	switch {
	case a.snap.ClaimErr != nil:
		return a.snap.ClaimErr
	case !a.snap.Held() && a.snap.Err != nil:
		return fmt.Errorf("no lease is held: %w", a.snap.Err)
	case !a.snap.Held():
		return errStarting
	}
	return nil
}

// program makes the node what the lease and its peers ask for.
func (a *Agent) program(be backend.Backend) error {
	// What the device must be follows from what is claimed, which may be newer than what the store says by now.
	self := subnet.Lease{Subnets: a.lease.Subnets, Attrs: a.claim.Attrs}
	peers, refused := a.snap.Table.Peers(*a.config, self)
	plan := be.Plan(backend.Input{Config: *a.config, Self: self, Peers: peers, Underlay: a.choice.Underlay, Host: a.host})
	desired := netstate.Merge(plan.State, netstate.State{Sysctls: a.forwarding()})

	a.peers.note(plan.Ways)
	a.health.set(condPeers, refusals(refused))
	a.health.set(condPlan, joined(plan.Problems))
	a.firewall.wishes.put(a.firewallWish(self, plan))

	res, err := a.kernel.Reconcile(desired)
	err = errors.Join(err, failures(res.Failed))
	a.health.set(condKernel, err)
	logChanges(a.log, res.Done)

	envErr := writeIfChanged(a.opts.SubnetFile, subnetEnv(*a.config, self, plan.MTU, a.opts.IPMasq))
	if envErr != nil {
		envErr = fmt.Errorf("%s: %w", a.opts.SubnetFile, envErr)
	}
	a.health.set(condSubnetEnv, envErr)
	return errors.Join(err, envErr)
}

func (a *Agent) forwarding() []netstate.Sysctl {
	if !a.opts.IPForward {
		return nil
	}
	var out []netstate.Sysctl
	for _, f := range a.config.Families() {
		path := map[addr.Family]string{addr.IPv4: "net/ipv4/ip_forward", addr.IPv6: "net/ipv6/conf/all/forwarding"}[f]
		out = append(out, netstate.Sysctl{Path: path, Value: "1"})
	}
	return out
}

func (a *Agent) firewallWish(self subnet.Lease, plan backend.Plan) firewallWish {
	w := firewallWish{nodes: plan.DirectNodes}
	b := a.config.Backend
	for _, f := range a.config.Families() {
		in := masquerade.Input{
			Network: a.config.Pools.Get(f).Network, Subnet: self.Subnets.Get(f), Tunnel: plan.Tunnel.Get(f),
			DirectNodes: a.opts.IPMasq && (b.Type == subnet.HostGW || b.DirectRouting),
			Exclude:     a.opts.MasqExclude, Masquerade: a.opts.IPMasq, Forward: a.opts.ForwardRules,
		}
		if self.PublicIPLocal {
			in.Node = self.PublicIP.Get(f)
		}
		w.inputs = append(w.inputs, in)
	}
	return w
}

func backendOf(t subnet.BackendType) backend.Backend {
	if t == subnet.HostGW {
		return hostgw.Backend{}
	}
	return vxlan.Backend{}
}
