package faults

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/lab"
)

// underlayFaults are what happens to the network below.
func underlayFaults() []Fault {
	rows := []Fault{
		{
			Name: "interface down and up", On: everywhere(), Short: true, Soak: true,
			Inject: linkDown, Hold: 2 * time.Second, Keeps: keepsState, Restore: linkUp,
			Log: `condition failed.*"underlay".*eth0`,
			Seen: unreadies("underlay",
				"eth0").diagnosed(`^FAIL interface .*eth0, (which leads to the other nodes|used so far), is down`),
		},
		{
			Name: "cable out and in", On: everywhere(), Soak: true,
			Inject: func(_ context.Context, s *Site) error { return s.Victim.Unplug() },
			Hold:   2 * time.Second, Keeps: keepsState,
			Restore: func(_ context.Context, s *Site) error { return s.Victim.Plug() },
		},
		{
			Name: "address replaced", On: everywhere(), Short: true,
			Inject:  Steps(moveTo("99"), Afterwards(moveBack)),
			Expect:  All(announces("99"), subnetKept, reaches),
			Restore: Undo, Log: `interface chosen.*[.:]99 on `,
			Seen: follows(`^Interface .*public IP .*[.:]99`, `overlayd_interface_changes_total +`),
		},
		{
			Name: "MTU lowered", On: everywhere(), Short: true, Soak: true,
			Inject:  Steps(Once(`ip link set eth0 mtu 1400`), Afterwards(Once(`ip link set eth0 mtu 1500`))),
			Expect:  All(lowerMTU, reaches),
			Restore: Undo, Log: `MTU changed`,
			Seen: follows(`^Network .*pod MTU (1400|13\d\d)`, `overlayd_mtu_changes_total +`),
		},
		{
			Name: "Backend.MTU of a smaller network between the nodes", On: everywhere(),
			Inject: backendMTU(1400), Expect: All(lowerMTU, reaches),
			Restore: Undo, Log: `MTU changed`,
			Seen: follows(`^Network .*pod MTU (1400|13\d\d)`, `overlayd_mtu_changes_total +`),
		},
		{
			Name: "Backend.MTU larger than the interface's", On: everywhere(),
			Inject: backendMTU(9000), Hold: time.Second, Keeps: All(KernelWhole, reaches), Restore: Undo,
			Log: `condition failed.*"plan"`, Seen: degrades("plan", "Backend.MTU is 9000, but eth0 has an MTU of 1500"),
		},
		{
			Name: "default route moved to another interface", On: tunnelled(), Short: true,
			Inject: Steps(secondInterface, On(`ip $F route replace default via $GW2 dev eth1`),
				Afterwards(On(`ip $F route replace default via $GW dev eth0`))),
			Expect:  All(leavesBy("eth1"), subnetKept, reaches),
			Restore: Undo, Log: `(?i)interface chosen.*eth1`,
			Seen: follows(`^Interface .*eth1.*default route`, `overlayd_interface_changes_total +`),
		},
		{
			Name: "second default route of a better metric", On: tunnelled(),
			Inject: Steps(secondInterface,
				On(`ip $F route replace default via $GW dev eth0 metric 200; [ $F = -6 ] && ip $F route del default via $GW dev eth0 metric 1024 || ip $F route del default via $GW dev eth0 metric 0
				ip $F route add default via $GW2 dev eth1 metric 100`),
				Afterwards(On(`ip $F route del default metric 100; ip $F route replace default via $GW dev eth0; ip $F route del default metric 200`))),
			Expect:  All(leavesBy("eth1"), subnetKept, reaches),
			Restore: Undo, Log: `(?i)interface chosen.*eth1`,
		},
		{
			Name: "interface deleted and made again", On: everywhere(), Short: true,
			Inject: recreate, Hold: 2 * time.Second, Restore: Undo, Log: `condition failed.*"underlay".*eth0`,
			Seen: unreadies("underlay", "eth0").diagnosed(`^FAIL interface .*eth0`),
		},
		{
			Name: "no interface fits for 5 s", On: everywhere(), Soak: true,
			Inject: Steps(Once(`ip address flush dev eth0 scope global`), Afterwards(linkUp)),
			Expect: LogSays(`no network interface|no IPv4 address|no IPv6 address`),
			Hold:   5 * time.Second, Keeps: keepsState, Restore: Undo, Log: `no network interface`,
			Seen: unreadies("underlay", "eth0").diagnosed(`^FAIL interface .*eth0.* address`),
		},
		{
			// A firewall that knows all nodes but this one.
			Name: "a peer's firewall drops this node's tunnel packets", On: []string{OnDual, OnVXLAN}, Short: true,
			Inject: onPeer(`nft add table inet host-$NFT_FAMILY; nft add chain inet host-$NFT_FAMILY in '{ type filter hook input priority -10; }'
				nft add rule inet host-$NFT_FAMILY in $NFT_FAMILY saddr $IP udp dport 8472 drop`, `nft delete table inet host-$NFT_FAMILY`),
			Restore: Undo, Log: `condition failed.*"silent-peers"`,
			Seen: pinged("silent-peers", `n1: pings are not answered`,
				`overlayd_probe_targets{verdict="silent"} `).diagnosed(`^(FAIL|warn) peers answer .*n1 `),
		},
		{
			Name: "a peer ignores pings", On: []string{OnDual}, Bound: lossless(2 * time.Second),
			Inject: onPeer(
				`[ $F = -4 ] && echo 1 > /proc/sys/net/ipv4/icmp_echo_ignore_all || `+
					`echo 1 > /proc/sys/net/ipv6/icmp/echo_ignore_all`,
				`echo 0 > /proc/sys/net/ipv4/icmp_echo_ignore_all; echo 0 > /proc/sys/net/ipv6/icmp/echo_ignore_all`),
			Expect: func(context.Context, *Site) error { return nil },
			Hold:   25 * time.Second, Keeps: allContent, Restore: Undo,
		},
		{
			Name: "this node's own firewall drops tunnel packets", On: []string{OnNFTables, OnVXLAN}, Short: true,
			Inject: Steps(
				Once(`nft add table inet host; nft add chain inet host in '{ type filter hook input priority -10; }'
					nft add rule inet host in udp dport 8472 drop`),
				Afterwards(Once(`nft delete table inet host`))),
			Restore: Undo, Log: `condition failed.*"silent-peers"`,
			Seen: pinged("silent-peers", `n1, n2: no peer answers pings`, `overlayd_probe_targets{verdict="silent"} `).
				diagnosed(`^FAIL tunnel in the firewall tunnel packets \(UDP port 8472\).* are dropped by table inet host, chain in`),
		},
		{
			// No packet of the traffic is as large.
			Name: "the router drops large packets of the tunnel", On: []string{OnDual, OnVXLAN}, Short: true,
			Inject: onRouter(`nft add table inet narrow; nft add chain inet narrow way '{ type filter hook forward priority 0; }'
				nft add rule inet narrow way udp dport 8472 meta length gt 1400 drop`, `nft delete table inet narrow`),
			Restore: Undo, Log: `condition failed.*"path-mtu"`, Bound: lossless(2 * time.Second),
			Seen: pinged("path-mtu", `n2: small packets arrive, those of 14\d\d bytes do not`,
				`overlayd_probe_targets{verdict="small-only"} `).
				diagnosed(`^FAIL full-size packets .*n2`),
		},
	}
	return append(in(Underlay, underlay(), rows), routeFaults()...)
}

func linkDown(_ context.Context, s *Site) error { return s.Victim.LinkDown() }
func linkUp(_ context.Context, s *Site) error   { return s.Victim.LinkUp() }

func recreate(_ context.Context, s *Site) error {
	back, err := s.Victim.RecreateLink()
	if err != nil {
		return err
	}
	s.Defer(func(context.Context, *Site) error { return back() })
	return nil
}

// keepsState holds while the victim keeps what it has for its peers, although there is no underlay to it.
func keepsState(ctx context.Context, s *Site) error {
	if s.Setup == OnHostGW || s.Setup == OnDirect {
		return nil // the kernel itself removes routes through an interface that is down
	}
	script := `ip $F route show proto 118 | grep "^$PEER_SUBNET " && grep SUBNET= "$SUBNET_FILE"`
	if s.Setup != OnWireGuard {
		script += ` && bridge fdb show dev $DEV | grep $PEER_MAC`
	}
	return Sees(script)(ctx, s)
}

// elsewhere is the victim's address with another last part.
func elsewhere(s *Site, f addr.Family, last string) netip.Prefix {
	own := s.Victim.Addr(f).String()
	a := netip.MustParseAddr(own[:strings.LastIndexAny(own, ".:")+1] + last)
	if f == addr.IPv6 {
		return netip.PrefixFrom(a, 64)
	}
	return netip.PrefixFrom(a, 24)
}

// moveTo replaces the victim's addresses by others of the same network, as a DHCP server may.
func moveTo(last string) Action {
	return func(ctx context.Context, s *Site) error { return s.readdress(ctx, s.Victim, last) }
}

func (s *Site) readdress(ctx context.Context, n *lab.Node, last string) error {
	return s.everyFamily(func(f addr.Family) error {
		_, err := n.Shell(ctx, fmt.Sprintf(`ip $F address flush dev eth0 scope global
			ip $F address add %s dev eth0 %s; ip $F route replace default via $GW dev eth0`,
			elsewhere(s, f, last), nodad(f)), s.vars.Get(f)...)
		return err
	})
}

func nodad(f addr.Family) string {
	if f == addr.IPv6 {
		return "nodad"
	}
	return ""
}

func moveBack(ctx context.Context, s *Site) error { return s.moveBack(ctx, s.Victim) }

func (s *Site) moveBack(ctx context.Context, n *lab.Node) error {
	if err := s.script(ctx, n.Machine, `ip $F address flush dev eth0 scope global`); err != nil {
		return err
	}
	return n.LinkUp()
}

// announces holds when the victim's lease and its peers' entries have the new address, and the device sends from it.
func announces(last string) Check { return announcesAt(ending(last)) }

// ending is a node's address with another last part.
func ending(last string) func(*Site, addr.Family) netip.Addr {
	return func(s *Site, f addr.Family) netip.Addr { return elsewhere(s, f, last).Addr() }
}

// announces4 is announces of the IPv4 address alone.
func announces4(last string) Check {
	return announcesAt(func(s *Site, f addr.Family) netip.Addr {
		if f == addr.IPv4 {
			return elsewhere(s, f, last).Addr()
		}
		return s.Victim.Addr(f)
	})
}

func announcesAt(at func(*Site, addr.Family) netip.Addr) Check {
	return func(ctx context.Context, s *Site) error {
		if err := s.says(ctx, s.Victim, at); err != nil {
			return err
		}
		return s.everyFamily(func(f addr.Family) error { return s.sendsFrom(ctx, f, at(s, f)) })
	}
}

// says reports whether a node's lease announces these addresses.
func (s *Site) says(ctx context.Context, n *lab.Node, at func(*Site, addr.Family) netip.Addr) error {
	lease, err := s.leaseOf(ctx, n)
	if err != nil {
		return err
	}
	return s.everyFamily(func(f addr.Family) error {
		to := at(s, f).String()
		return unless(strings.Contains(lease.value, `"`+to+`"`), "the lease of %s does not say %s: %s", n.Name, to,
			lease.value)
	})
}

// sendsFrom looks at the two ends of a tunnel, or at the peer's route.
func (s *Site) sendsFrom(ctx context.Context, f addr.Family, from netip.Addr) error {
	if s.Setup == OnWireGuard {
		return nil // only the program in user space knows; that the peer is reached shows it
	}
	script := fmt.Sprintf(`ip $F route show proto 118 | grep -F "via %s "`, from)
	if s.Setup == OnVXLAN || s.Setup == OnDual {
		if _, err := s.Victim.Shell(ctx, fmt.Sprintf(`ip -d link show $DEV | grep -F "local %s "`, from),
			s.vars.Get(f)...); err != nil {
			return fmt.Errorf("the device does not send from %s", from)
		}
		script = fmt.Sprintf(`bridge fdb show dev $DEV | grep -F "dst %s "`, from)
	}
	if _, err := s.Peer.Shell(ctx, script, s.vars.Get(f)...); err != nil {
		return fmt.Errorf("%s does not send to %s", s.Peer.Name, from)
	}
	return nil
}

// subnetKept holds while the victim has the subnet that it had.
func subnetKept(_ context.Context, s *Site) error {
	env, err := s.Victim.SubnetEnv()
	if err != nil {
		return err
	}
	return unless(env.Gateway == s.own.Gateway, "subnet.env says %v: it was %v", env.Gateway, s.own.Gateway)
}

// reaches holds when pods of the victim and of the peer reach each other.
func reaches(ctx context.Context, s *Site) error {
	if err := s.pingPod(ctx, s.Victim.Pods()[0], s.Peer); err != nil {
		return err
	}
	return s.pingPod(ctx, s.Peer.Pods()[0], s.Victim)
}

// pingPod pings the first pod of a node in each family.
func (s *Site) pingPod(ctx context.Context, from lab.Machine, node *lab.Node) error {
	env, err := node.SubnetEnv()
	if err != nil {
		return err
	}
	return s.everyFamily(func(f addr.Family) error {
		return reachesOne(ctx, from, "a pod of "+node.Name, env.PodAddr(f, 0).Addr())
	})
}

func reachesOne(ctx context.Context, from lab.Machine, what string, to netip.Addr) error {
	_, err := from.Ping(ctx, lab.Ping{To: to, Wait: 200 * time.Millisecond})
	if err != nil {
		return fmt.Errorf("%s does not reach %s: %w", from.Name, what, err)
	}
	return nil
}

// backendMTU sets Backend.MTU in the network config.
func backendMTU(mtu int) Action {
	return changeConfig(func(old string) string {
		return strings.Replace(old, `"Type"`, fmt.Sprintf(`"MTU":%d,"Type"`, mtu), 1)
	})
}

// lowerMTU holds when device and subnet.env have followed a network of 1400 between the nodes.
func lowerMTU(ctx context.Context, s *Site) error {
	env, err := s.Victim.SubnetEnv()
	if err != nil {
		return err
	}
	want, device := 1400, ""
	if s.Setup != OnHostGW {
		want, device = 1350, `ip link show $DEV | grep "mtu $((1400 - (${F#-} == 4 ? 50 : 70)))"`
	}
	switch s.Setup {
	case OnDual:
		want = 1330
	case OnWireGuard:
		want, device = 1320, `ip link show $DEV | grep "mtu 1320"`
	}
	return errors.Join(
		unless(env.MTU == want, "subnet.env says MTU %d: want %d", env.MTU, want),
		Sees(device+"\n:")(ctx, s))
}

// secondInterface gives the victim eth1 in the other segment, and scripts GW2.
func secondInterface(_ context.Context, s *Site) error {
	t := s.Lab.Topology()
	at, via, err := s.Victim.AddLink(t, "eth1", 3-s.Victim.Spec().Segment)
	if err != nil {
		return err
	}
	s.Defer(func(context.Context, *Site) error { return s.Victim.RemoveLink("eth1") })
	for _, f := range s.families {
		s.vars.Set(f, append(s.vars.Get(f), "GW2="+via.Get(f).Addr().String()))
		s.second.Set(f, at.Get(f).Addr())
	}
	return nil
}

// leavesBy holds when the tunnels use an interface.
func leavesBy(name string) Check {
	return Sees(`ip -d link show $DEV | grep "dev ` + name + ` "`)
}

// pinged is what is seen of peers that don't answer as they should, which takes a few pings.
func pinged(problem, reason, metric string) *Seen {
	return degrades(problem, reason, metric+"more").in(45 * time.Second)
}

// onPeer runs a script on the peer for each family, with the victim's variables, and another to undo it.
func onPeer(script, undo string) Action {
	return Steps(Afterwards(each(peer, undo)), each(peer, script))
}

// onRouter runs a script on the machine between the segments, and another to undo it.
func onRouter(script, undo string) Action {
	return Steps(Afterwards(once(router, undo)), once(router, script))
}
