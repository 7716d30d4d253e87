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

// About is what an agent can say of itself only if it is told.
type About struct {
	Version   string
	Endpoints []string // of etcd
	Prefix    string
	Firewall  func() (kind, reason string) // nil: not known
	Traffic   Traffic                      // with the store; nil: not known
	Restart   func() []string              // what would be otherwise after a restart; nil: nothing
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

// work is what status tells of the loop.
type work struct {
	last, looked time.Time
	took         time.Duration
	rounds       int
}

// ask has the loop do something between two rounds: all that it knows is its own.
func (a *Agent) ask(ctx context.Context, question func()) error {
	done := make(chan struct{})
	select {
	case a.questions <- func() { question(); close(done) }:
		<-done
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrBusy, context.Cause(ctx))
	}
}

// Status says how the node is.
func (a *Agent) Status(ctx context.Context) (s status.Node, err error) {
	err = a.ask(ctx, func() { s = a.status() })
	s.Probe = a.mesh.summary() // takes its time, which need not be the loop's
	return s, err
}

// Peers lists the other nodes, those that are refused among them: one for each family.
func (a *Agent) Peers(ctx context.Context) (ps []status.Peer, err error) {
	err = a.ask(ctx, func() { ps = a.listPeers() })
	return ps, err
}

// Peer says all about the peers that a text names: by node name, ID, public IP, subnet, or an address in that.
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

// Compare looks at the kernel and says what would have to be done for it to be as planned, one line for each change.
func (a *Agent) Compare(ctx context.Context) (lines []string, err error) {
	askErr := a.ask(ctx, func() {
		var changes []netstate.Change
		changes, err = a.kernel.Compare()
		for _, c := range changes {
			line := c.String()
			if c.Old != nil {
				line += ", found " + c.Old.String()
			}
			lines = append(lines, line)
		}
	})
	return lines, errors.Join(askErr, err)
}

func (a *Agent) status() status.Node {
	now := time.Now()
	s := status.Node{
		Name: a.opts.Identity.NodeName, ID: a.opts.Identity.NodeID, Version: a.about.Version, Started: a.started, Now: now,
		SubnetFile: a.opts.SubnetFile, StateDir: a.opts.StateDir,
		Ready: true, Problems: []status.Problem{}, Devices: []status.Device{}, Drift: []status.DriftKind{}, Entries: []status.KindCount{},
		Changes: a.changes,
		Store: status.Store{
			Endpoints: a.about.Endpoints, Prefix: a.about.Prefix, Revision: a.table().Revision, Entries: len(a.table().Entries),
			Losses: a.losses, LostAt: a.lostAt,
		},
		Lease:     a.leaseStatus(),
		Reconcile: status.Reconcile{Last: a.work.last, Took: a.work.took, Rounds: a.work.rounds, Looked: a.work.looked, Failures: len(a.refused)},
		Peers:     a.peerCounts(),
	}
	for _, p := range a.health.list() {
		s.Problems = append(s.Problems, p)
		s.Ready = s.Ready && !p.Fatal
	}
	if a.snap.Err != nil {
		s.Store.Error, s.Store.Since = a.snap.Err.Error(), a.snap.Since
	}
	if a.config != nil {
		s.Network = status.Network{Backend: string(a.config.Backend.Type), MTU: a.mtu}
		for _, f := range a.config.Families() {
			pool := a.config.Pools.Get(f)
			s.Network.Networks = append(s.Network.Networks, pool.Network.String())
			s.Network.Pools = append(s.Network.Pools, status.Pool{
				Network: pool.Network.String(), Subnets: int(min(pool.Size(), math.MaxInt)), Leased: pool.Leased(a.table()),
			})
		}
	}
	if a.choice != nil {
		s.Interface = status.Interface{
			Reason: a.choice.Reason, ByDefault: a.choice.ByDefault,
			PublicIPLocal: a.choice.PublicIPLocal, PublicIPs: texts(a.choice.PublicIP),
		}
	}
	if p := a.planned; p != nil {
		s.Devices = a.deviceStatus(p.devices)
		for kind, n := range p.entries {
			s.Entries = append(s.Entries, status.KindCount{Kind: kind, Count: n})
		}
		slices.SortFunc(s.Entries, func(a, b status.KindCount) int { return strings.Compare(a.Kind, b.Kind) })
	}
	if a.about.Firewall != nil {
		s.Firewall.Kind, s.Firewall.Reason = a.about.Firewall()
	}
	a.firewall.seen(&s.Firewall)
	if t := a.about.Traffic; t != nil {
		s.Store.Requests = t.Requests()
		complete, newest := t.Revisions()
		s.Store.Revision = max(s.Store.Revision, complete)
		s.Store.Newest = max(s.Store.Revision, newest)
	}
	s.Restart = a.afterRestart()
	s.Drift = append(a.drift.counts(), a.firewall.drift.counts()...)
	slices.SortFunc(s.Drift, func(a, b status.DriftKind) int { return strings.Compare(a.Kind, b.Kind) })
	return s
}

// afterRestart lists what would be otherwise if the daemon were restarted now.
func (a *Agent) afterRestart() []string {
	out := []string{}
	if a.online() && a.lease != (subnet.Lease{}) && a.snap.Table.ConfigErr == nil && !a.snap.Table.Config.Fits(a.lease.Subnets) {
		out = append(out, fmt.Sprintf("this node gets another subnet: %s does not fit the changed network config", subnet.FormatKey(a.lease.Subnets)))
	}
	if a.about.Restart != nil {
		out = append(out, a.about.Restart()...)
	}
	return out
}

func (a *Agent) leaseStatus() status.Lease {
	l := status.Lease{Held: a.snap.Held(), Subnets: []string{}, Losses: a.snap.Losses, LostAt: a.snap.LostAt}
	if a.lease == (subnet.Lease{}) {
		return l
	}
	l.Subnets = texts(a.lease.Subnets)
	own := a.table().Find(subnet.FormatKey(a.lease.Subnets))
	l.Reserved = own != nil && own.Reserved()
	if l.Expires = a.snap.Expires; !a.online() {
		l.Expires = a.remembered.Expires
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

func (a *Agent) deviceStatus(links []netstate.Link) []status.Device {
	out := []status.Device{}
	for _, l := range links {
		offloads := map[string]bool{}
		for _, o := range a.kernel.Offloads(l.Name) {
			offloads[o.Name] = o.On
		}
		out = append(out, status.Device{
			Offloads: offloads, Name: l.Name, MAC: l.MAC.String(), MTU: l.MTU, VNI: l.VXLAN.VNI, Port: l.VXLAN.Port, Local: l.VXLAN.Local.String(), Underlay: l.VXLAN.Underlay,
		})
	}
	return out
}

func (a *Agent) peerCounts() status.PeerCounts {
	refused := a.roster.Refused()
	c := status.PeerCounts{Total: len(a.peers.ways), Refused: len(refused), Lingering: a.roster.Lingering()}
	for _, r := range refused {
		if c.RefusedBy == nil {
			c.RefusedBy = map[string]int{}
		}
		c.RefusedBy[string(r.Cause)]++
	}
	for _, kinds := range a.peers.ways {
		worst := max(kinds.V4, kinds.V6)
		switch worst {
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
	for _, l := range a.roster.Peers() {
		for _, f := range addr.Families() {
			sn, kind := l.Subnets.Get(f), a.peers.ways[l].Get(f)
			if !sn.IsValid() {
				continue
			}
			p := status.Peer{
				Name: l.NodeName, ID: l.NodeID, Subnet: sn.String(), PublicIP: l.PublicIP.Get(f).String(), Way: kind.String(),
				Reason: a.unreachable[sn], Leaving: a.roster.Lingers(l), Probe: a.mesh.Peer(sn),
			}
			if mac := l.VTEP.Get(f).MAC; !mac.IsZero() {
				p.MAC = mac.String()
			}
			out = append(out, p)
		}
	}
	for _, r := range a.roster.Refused() {
		out = append(out, status.Peer{Name: r.Node, Subnet: r.Key, Way: "rejected", Reason: r.Reason, Cause: string(r.Cause)})
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
func (a *Agent) entriesFor(p status.Peer) []string {
	if a.planned == nil {
		return nil
	}
	in := a.planned.input
	for _, l := range a.roster.Peers() {
		if texts := texts(l.Subnets); slices.Contains(texts, p.Subnet) {
			in.Peers = append(in.Peers, l)
		}
	}
	var out []string
	for _, c := range netstate.Diff(netstate.State{}, ofPeers(backendOf(in.Config.Backend.Type).Plan(in).State)) {
		out = append(out, c.Obj.String())
	}
	return out
}
