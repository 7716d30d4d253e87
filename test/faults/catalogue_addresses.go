package faults

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/overlayd/overlayd/test/lab"
)

// addresses is what may happen to addresses of which two nodes are said to have one.
func addresses() []Fault {
	return in(Underlay, Bound{Lost: Any, Repair: 10 * time.Second}, []Fault{
		{
			Name: "two nodes swap their addresses", On: everywhere(), Short: true, Peer: true,
			Inject: Steps(Afterwards(unswap), swap), Expect: All(swapped, subnetKept, reaches), Restore: Undo,
		},
		{
			Name: "the address of a node that is no more is taken over", On: withGateways(), Short: true,
			Inject: Steps(ghostAddress.appears, Until(ghostAddress.routed, 3*time.Second),
				Afterwards(moveBack), moveTo(ghostAddress.host())),
			Expect: All(announces(ghostAddress.host()), subnetKept, reaches, isReady), Restore: Undo,
		},
		{
			Name: "this node is given the address of another one that runs", Short: true, Peer: true,
			Inject: Steps(Afterwards(unswap), duplicate),
			Expect: bothReport, Hold: 3 * time.Second, Keeps: bothReport, Restore: Undo,
			Log: `condition failed.*"lease".*public IP`, Seen: unreadies("lease", "public IP .* is also that of"),
		},
		{
			Name: "another name and another address in one restart", On: everywhere(), Short: true,
			Inject: Steps(Afterwards(renamedTo("")), Afterwards(moveBack), Afterwards(stopDaemon),
				stopDaemon, moveTo("98"), renamedTo("another"), startDaemon),
			Expect: All(subnetKept, isReady, reaches), Hold: time.Second, Keeps: All(subnetKept, oneLeaseEach, noClone),
			Restore: Steps(Undo, startDaemon), Bound: Bound{Lost: Any, Repair: 5 * time.Second}, Log: `lease written`,
		},
		{
			// The router leads there; a peer's route to the subnet would lead the node's requests into the tunnel.
			Name: "a peer leases the subnet that an endpoint of etcd is in", On: everywhere(), Short: true,
			Inject: Steps(stopDaemon, func(_ context.Context, s *Site) error {
				s.Victim.With("--etcd-endpoints", "http://"+ghostEndpoint.inside(s).String()+":2379")
				return nil
			}, startDaemon, Until(isNamed("store-inside: etcd is at "), 5*time.Second), ghostEndpoint.appears),
			Expect: All(isNamed("covers "), reaches), Hold: time.Second,
			Keeps:   Sees(`! ip route show proto 118 | grep -F "` + ghostEndpoint.network() + `"`),
			Restore: Steps(ghostEndpoint.goes, stopDaemon, renamedTo(""), startDaemon),
			Bound:   Bound{Lost: 0, Repair: letGo}, Log: `condition failed.*"store-inside"`,
			Seen: degrades("store-inside", "inside the cluster network"),
		},
	})
}

// hostOf is the last part of a node's addresses, which is the same in both families.
func (s *Site) hostOf(n *lab.Node) string {
	ip := n.Addr(s.families[0]).String()
	return ip[strings.LastIndexAny(ip, ".:")+1:]
}

// swap gives the victim the peer's addresses and the peer the victim's, while both run.
func swap(ctx context.Context, s *Site) error {
	if err := s.readdress(ctx, s.Victim, s.hostOf(s.Peer)); err != nil {
		return err
	}
	if err := s.readdress(ctx, s.Peer, s.hostOf(s.Victim)); err != nil {
		return err
	}
	return s.forgetNeighbours(ctx)
}

func unswap(ctx context.Context, s *Site) error {
	return errors.Join(s.moveBack(ctx, s.Victim), s.moveBack(ctx, s.Peer), s.forgetNeighbours(ctx))
}

// forgetNeighbours stands for the announcements with which a network tool tells all others that an address has another
// MAC now.
func (s *Site) forgetNeighbours(ctx context.Context) error {
	machines := []lab.Machine{s.Lab.Router()}
	for _, n := range s.Lab.Nodes() {
		machines = append(machines, n.Machine)
	}
	for _, m := range machines {
		if _, err := m.Shell(ctx, `ip neigh flush nud reachable nud stale nud delay nud probe nud failed`); err != nil {
			return err
		}
	}
	return nil
}

// duplicate gives the victim the peer's address. Both go on to reach etcd: the victim from its own address, which it
// has still but which is deprecated, and the peer since the router knows where it is.
func duplicate(ctx context.Context, s *Site) error {
	mac, err := s.Peer.Shell(ctx, `ip -o link show eth0 | sed 's/.*link.ether \([^ ]*\).*/\1/'`)
	if err != nil {
		return err
	}
	neighbour := func(nud string) Action {
		return once(router, `ip neigh replace $PEER_IP dev $(ip -o route get $PEER_IP | sed 's/.* dev \([^ ]*\).*/\1/') lladdr `+
			strings.TrimSpace(mac)+` nud `+nud)
	}
	etcd := s.Lab.Topology().Etcd.Interfaces[0].Addrs[0].Addr()
	return Steps(neighbour("permanent"), Afterwards(neighbour("stale")), Once(fmt.Sprintf(`ip route add %s via $GW src $IP
		ip address change $IP/$NET_BITS dev eth0 preferred_lft 0
		ip address add $PEER_IP/32 dev eth0`, etcd)))(ctx, s)
}

// swapped holds when the leases say so, and both nodes are ready.
func swapped(ctx context.Context, s *Site) error {
	if err := errors.Join(s.says(ctx, s.Victim, ending(s.hostOf(s.Peer))),
		s.says(ctx, s.Peer, ending(s.hostOf(s.Victim)))); err != nil {
		return err
	}
	return s.content(ctx)
}

func isReady(ctx context.Context, s *Site) error {
	return contentOne(ctx, s.Victim, "rejected-lease", "silent-peers", "path-mtu")
}

// bothReport holds when the victim says that it is not reached because of the peer, the peer speaks of the victim and
// stays ready, and the third node goes by the peer's lease.
func bothReport(ctx context.Context, s *Site) error {
	for n, want := range map[*lab.Node][2]string{
		s.Victim:      {"not ready: lease: the public IP ", s.Peer.Name},
		s.Peer:        {"degraded: claim: ", s.Victim.Name},
		s.otherThan(): {"degraded: rejected-lease: ", s.Victim.Name},
	} {
		_, text, err := n.Readyz(ctx)
		if err != nil {
			return err
		}
		if !strings.Contains(text, want[0]) || !strings.Contains(text, fmt.Sprintf("node %q", want[1])) {
			return fmt.Errorf("%s does not speak of %s: %s", n.Name, want[1], strings.TrimSpace(text))
		}
	}
	return nil
}

// inside is an address of the ghost's subnet, and network how its subnet begins.
func (g ghost) inside(s *Site) netip.Addr { return g.subnets(s).V4.Addr().Next() }

func (g ghost) network() string { return fmt.Sprintf("10.244.%d.", uint8(g)) }

// renamedTo gives the victim's daemon a name from its next start on; "" is its own.
func renamedTo(name string) Action {
	return func(_ context.Context, s *Site) error {
		if s.Victim.With(); name != "" {
			s.Victim.With("--node-name", name)
		}
		return nil
	}
}

// oneLeaseEach holds when there are as many leases as nodes.
func oneLeaseEach(ctx context.Context, s *Site) error {
	return s.withStore(ctx, func(ctx context.Context, cli *clientv3.Client) error {
		resp, err := cli.Get(ctx, subnets, clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			return fmt.Errorf("count the leases: %w", err)
		}
		return unless(int(resp.Count) == len(s.Lab.Nodes()), "%d leases of %d nodes", resp.Count, len(s.Lab.Nodes()))
	})
}

// noClone holds when no doctor takes one of the machines for a clone.
func noClone(ctx context.Context, s *Site) error {
	return s.everyNode(func(n *lab.Node) error {
		out, err := n.Doctor(ctx)
		if err != nil && out == "" {
			return err
		}
		return unless(!strings.Contains(out, "clone"), "the doctor on %s: %s", n.Name, out)
	})
}
