package agent

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// About is what an agent reports of itself and does not know otherwise.
type About struct {
	Version  string
	Store    status.Store                 // which store it is, and where; the agent adds what comes of it
	Firewall func() (kind, reason string) // nil: not known
	Traffic  Traffic                      // with the store; nil: not known
	Restart  func() []string              // what would be otherwise after a restart; nil: nothing
}

// Traffic is what a store's client knows of it.
type Traffic interface {
	// Requests counts them by the name of the method since the start.
	Requests() map[string]int64
	// Revisions tells up to which revision the table is complete, and which one the store named last.
	Revisions() (complete, newest int64)
}

// ErrBusy says that the loop does not answer.
var ErrBusy = errors.New("the daemon's main loop does not answer")

// ask has the loop answer a question between two rounds: what it knows belongs to its goroutine.
func (a *Agent) ask(ctx context.Context, question func()) error {
	err := a.rounds.Do(ctx, func() {
		a.health.works()
		defer a.health.waits()
		question()
	})
	if err != nil {
		return fmt.Errorf("%w: %w", ErrBusy, err)
	}
	return nil
}

// Status says how the node is.
func (a *Agent) Status(ctx context.Context) (s status.Node, err error) {
	err = a.ask(ctx, func() { s = a.status() })
	s.Probe = a.mesh.summary() // takes its time, which need not be the loop's
	return s, err
}

// Peers lists the other nodes, also those whose leases are rejected: one for each family.
func (a *Agent) Peers(ctx context.Context) (ps []status.Peer, err error) {
	err = a.ask(ctx, func() { ps = a.listPeers() })
	return ps, err
}

// Peer reports the peers that a text names (by node name, ID, public IP, subnet, or an address in that) in full.
func (a *Agent) Peer(ctx context.Context, text string) (found []status.Peer, err error) {
	err = a.ask(ctx, func() {
		for _, p := range a.listPeers() {
			if names(p, text) {
				p.Entries = a.entriesFor(p)
				found = append(found, p)
			}
		}
	})
	return found, err
}

// Compare observes the kernel and lists what would have to be done for it to be as desired, one line for each change.
func (a *Agent) Compare(ctx context.Context) (lines []string, err error) {
	askErr := a.ask(ctx, func() {
		var changes []netstate.Change
		changes, err = a.parts.Kernel.Compare()
		for _, c := range changes {
			lines = append(lines, describe(c))
		}
	})
	return lines, errors.Join(askErr, err)
}

func (a *Agent) status() status.Node {
	about, table := a.parts.About, a.facts.leases.table
	s := status.Node{
		Name: a.opts.Identity.NodeName, ID: a.opts.Identity.NodeID, Version: about.Version,
		Started: a.facts.started, Now: time.Now(), SubnetFile: a.opts.SubnetFile, StateDir: a.opts.StateDir,
		Ready: true, Problems: []status.Problem{}, Devices: []status.Device{},
		Entries:   []status.KindCount{},
		Changes:   a.applied.changes,
		Store:     about.Store,
		Lease:     a.leaseStatus(),
		Network:   a.networkStatus(),
		Reconcile: a.applied.work,
		Peers:     a.peerCounts(),
		Firewall:  a.firewall.status(),
		Drift:     a.drift.counts(),
	}
	s.Store.Name, s.Store.Revision, s.Store.Entries = a.facts.store, table.Revision, len(table.Entries)
	s.Store.Losses, s.Store.LostAt = a.facts.leases.losses, a.facts.leases.lostAt
	s.Reconcile.Failures = len(a.applied.failed)
	for _, p := range a.health.list() {
		s.Problems = append(s.Problems, p)
		s.Ready = s.Ready && !p.Fatal
	}
	if err := withoutName(a.facts.snap.Err); err != nil {
		s.Store.Error, s.Store.Since = err.Error(), a.facts.snap.Since
	}
	if c := a.facts.choice; c != nil {
		s.Interface = status.Interface{
			Reason: c.Reason, ByDefault: c.ByDefault, PublicIPLocal: c.PublicIPLocal, PublicIPs: texts(c.PublicIP),
		}
	}
	if p := a.peers.planned; p != nil {
		s.Devices = a.deviceStatus(p)
	}
	for kind, n := range a.parts.Kernel.Desired() {
		s.Entries = append(s.Entries, status.KindCount{Kind: kind, Count: n})
	}
	slices.SortFunc(s.Entries, func(a, b status.KindCount) int { return strings.Compare(a.Kind, b.Kind) })
	if about.Firewall != nil {
		s.Firewall.Kind, s.Firewall.Reason = about.Firewall()
	}
	if t := about.Traffic; t != nil {
		s.Store.Requests = t.Requests()
		complete, newest := t.Revisions()
		s.Store.Revision = max(s.Store.Revision, complete)
		s.Store.Newest = max(s.Store.Revision, newest)
	}
	s.Restart = a.pendingRestart()
	slices.SortFunc(s.Drift, func(a, b status.DriftKind) int { return strings.Compare(a.Kind, b.Kind) })
	return s
}

func (a *Agent) networkStatus() (n status.Network) {
	c := a.facts.config
	if c == nil {
		return n
	}
	n.Backend, n.MTU = string(c.Backend.Type), a.applied.mtu
	for _, f := range c.Families() {
		pool := c.Pools.Get(f)
		n.Networks = append(n.Networks, pool.Network.String())
		n.Pools = append(n.Pools, status.Pool{
			Network: pool.Network.String(), Subnets: int(min(pool.Size(), math.MaxInt)),
			Leased: pool.Leased(a.facts.leases.table),
		})
	}
	return n
}

// pendingRestart lists what would change if the daemon were restarted now.
func (a *Agent) pendingRestart() []string {
	out := []string{}
	f := &a.facts
	none := f.subnets == (addr.Per[netip.Prefix]{})
	if t := f.leases.table; f.leases.online() && !none && t.ConfigErr == nil && !t.Config.Fits(f.subnets) {
		out = append(out, fmt.Sprintf("this node needs another subnet: %s does not fit the changed network config",
			subnet.FormatKey(f.subnets)))
	}
	if a.parts.About.Restart != nil {
		out = append(out, a.parts.About.Restart()...)
	}
	return out
}

func (a *Agent) leaseStatus() status.Lease {
	f := &a.facts
	l := status.Lease{Held: f.snap.Held(), Subnets: texts(f.subnets), Losses: f.snap.Losses, LostAt: f.snap.LostAt}
	if len(l.Subnets) == 0 {
		return l
	}
	own := f.leases.table.Find(subnet.FormatKey(f.subnets))
	l.Reserved = own != nil && own.Reserved()
	if l.Expires = f.snap.Expires; !f.leases.online() {
		l.Expires = f.persisted.Expires
	}
	return l
}

// texts are the valid ones of a pair, IPv4 first.
func texts[T interface {
	comparable
	fmt.Stringer
}](p addr.Per[T]) []string {
	out := []string{}
	for _, f := range addr.Families() {
		var none T
		if v := p.Get(f); v != none {
			out = append(out, v.String())
		}
	}
	return out
}

func (a *Agent) deviceStatus(p *planned) []status.Device {
	out := []status.Device{}
	for _, l := range p.node.State.Links {
		offloads := map[string]bool{}
		for _, o := range a.parts.Kernel.Offloads(l.Name) {
			offloads[o.Name] = o.On
		}
		d := status.Device{
			Offloads: offloads, Name: l.Name, MAC: l.MAC.String(), MTU: l.MTU, VNI: l.VXLAN.VNI, Port: l.VXLAN.Port,
			Local: l.VXLAN.Local.String(), Underlay: l.VXLAN.Underlay,
		}
		for _, f := range addr.Families() {
			if key := p.input.Self.PublicKey; key != "" && p.node.Tunnel.Get(f) == l.Name {
				d.MAC, d.PublicKey, d.Port = "", string(key), l.WireGuard.Port
				d.Local = p.input.Underlay.Get(f).Addr.String()
			}
		}
		out = append(out, d)
	}
	return out
}

func (a *Agent) peerCounts() status.PeerCounts {
	roster := &a.peers.roster
	rejected := roster.Rejected()
	c := status.PeerCounts{Total: len(roster.Peers()), Rejected: len(rejected), Lingering: roster.Lingering()}
	for _, r := range rejected {
		if c.RejectedBy == nil {
			c.RejectedBy = map[string]int{}
		}
		c.RejectedBy[string(r.Cause)]++
	}
	for _, l := range roster.Peers() {
		switch max(a.peers.paths.to(l, addr.IPv4).Kind, a.peers.paths.to(l, addr.IPv6).Kind) { // the worst
		case backend.Tunnel:
			c.Tunnel++
		case backend.Direct:
			c.Direct++
		case backend.Unreachable:
			c.Unreachable++
		}
	}
	return c
}

func (a *Agent) listPeers() []status.Peer {
	out := []status.Peer{}
	roster := &a.peers.roster
	for _, l := range roster.Peers() {
		for _, f := range addr.Families() {
			sn := l.Subnets.Get(f)
			if !sn.IsValid() {
				continue
			}
			path := a.peers.paths.to(l, f)
			p := status.Peer{
				Name: l.NodeName, ID: l.NodeID, Subnet: sn.String(), PublicIP: l.PublicIP.Get(f).String(),
				Path: path.Kind.String(), Reason: path.Reason, Leaving: roster.Lingers(l), Probe: a.mesh.Peer(sn),
			}
			p.PublicKey = string(l.PublicKey)
			if mac := l.VTEP.Get(f).MAC; !mac.IsZero() {
				p.MAC = mac.String()
			}
			out = append(out, p)
		}
	}
	for _, r := range roster.Rejected() {
		out = append(out, status.Peer{
			Name: r.Node, Subnet: r.Key, Path: "rejected", Reason: r.Reason, Cause: string(r.Cause),
		})
	}
	return out
}

// names reports whether a text means a peer.
func names(p status.Peer, text string) bool {
	if text == p.Name || text == p.ID || text == p.Subnet || text == p.PublicIP {
		return text != ""
	}
	ip, err := netip.ParseAddr(text)
	sn, snErr := netip.ParsePrefix(p.Subnet)
	return err == nil && snErr == nil && sn.Contains(ip)
}

// entriesFor lists what is planned for a peer.
func (a *Agent) entriesFor(p status.Peer) (out []string) {
	if a.peers.planned == nil {
		return nil
	}
	for _, l := range a.peers.roster.Peers() {
		if slices.Contains(texts(l.Subnets), p.Subnet) {
			for _, c := range netstate.Diff(netstate.State{}, ofPeers(planFor(a.peers.planned.input, l).State)) {
				out = append(out, c.Obj.String())
			}
		}
	}
	return out
}
