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

// routeFaults are hosts whose way to the others is another one than a single default route by a device with a single
// address: what becomes of a running daemon when a node becomes one, and of one that starts there.
func routeFaults() []Fault {
	routes := Bound{Lost: Any, Repair: 5 * time.Second}
	rows := []Fault{
		{
			Name: "default route becomes one by two uplinks", On: tunnelled(), Short: true,
			Inject: Steps(uplinks, twoUplinks),
			Expect: All(bound(""), announcesAt(ownAddr), subnetKept, reachesAll), Hold: 2 * time.Second, Keeps: reachesAll,
			Restore: Undo, Log: `interface chosen.* of eth0 by eth0 and eth1, bound to no device \(they have the default route`,
			Seen: follows(`^Interface .*by eth0 and eth1, bound to no device`, `overlayd_interface_changes_total +`),
		},
		{
			Name: "start beside a default route by two uplinks", On: tunnelled(),
			Inject: Steps(uplinks, twoUplinks, restart()),
			Expect: All(ready, bound(""), announcesAt(ownAddr), subnetKept, reachesAll),
			Bound:  routes, Restore: Undo, Log: `interface chosen.*by eth0 and eth1, bound to no device`,
		},
		{
			Name: "one of two uplinks is narrower", On: tunnelled(),
			Inject: Steps(uplinks, twoUplinks, Once(`ip link set eth1 mtu 1400`)),
			Expect: All(bound(""), lowerMTU, reachesAll), Restore: Undo, Log: `MTU changed`,
			Seen: follows(`^Network .*pod MTU 13\d\d`, `overlayd_mtu_changes_total +`),
		},
		{
			Name: "node becomes a routed host, with its address on lo", On: tunnelled(), Short: true,
			Inject: Steps(uplinks, routedHost),
			Expect: All(bound(""), announcesAt(loAddr), subnetKept, reachesAll), Hold: 2 * time.Second, Keeps: reachesAll,
			Restore: Undo, Log: `interface chosen.* of lo by eth0 and eth1, bound to no device`,
			Seen: follows(`^Interface .* of lo by eth0 and eth1`, `overlayd_interface_changes_total +`), Bound: routes,
		},
		{
			Name: "an uplink of a routed host goes down", On: tunnelled(),
			Inject: Steps(uplinks, routedHost, Until(All(bound(""), announcesAt(loAddr), reachesAll), 10*time.Second),
				loseUplink),
			Expect: All(bound(""), announcesAt(loAddr), sameDevices, reachesAll), Hold: time.Second,
			Keeps:   All(sameDevices, reachesAll),
			Restore: Undo, Log: `interface chosen.* of lo by eth0 and eth1, bound to no device`, Bound: routes,
		},
		{
			Name: "start of a routed host", On: tunnelled(),
			Inject: Steps(uplinks, routedHost, restart()),
			Expect: All(ready, bound(""), announcesAt(loAddr), subnetKept, reachesAll),
			Bound:  routes, Restore: Undo, Log: `interface chosen.* of lo by eth0 and eth1`,
		},
		{
			Name: "start of a routed host with --iface lo", On: tunnelled(),
			Inject: Steps(uplinks, routedHost, restart("--iface", "lo")),
			Expect: All(ready, bound(""), announcesAt(loAddr), reachesAll),
			Bound:  routes, Restore: Undo, Log: `interface chosen.* of lo by .*--iface lo`,
		},
		{
			Name: "start of a routed host with --iface ADDRESS", On: tunnelled(),
			Inject: Steps(uplinks, routedHost, restart("--iface", "LO")),
			Expect: All(ready, bound(""), announcesAt(loAddr), reachesAll),
			Bound:  routes, Restore: Undo, Log: `interface chosen.* of lo by .*--iface 10.255.0.1`,
		},
		{
			Name: "start of a routed host with --public-ip ADDRESS", On: tunnelled(),
			Inject: Steps(uplinks, routedHost, restart("--public-ip", "LO", "--public-ipv6", "LO6")),
			Expect: All(ready, bound(""), announcesAt(loAddr), reachesAll),
			Bound:  routes, Restore: Undo, Log: `interface chosen.* of lo by .*--public-ip`,
		},
		{
			Name: "start with --public-ip of a second interface", On: tunnelled(), Short: true,
			Inject: Steps(uplinks, Once(`ip link set eth1 mtu 1400`), restart("--public-ip", "ETH1", "--public-ipv6", "ETH1_6")),
			Expect: All(ready, bound("eth1"), announcesAt(secondAddr), lowerMTU, reachesAll), Hold: time.Second,
			Keeps: reachesAll,
			Bound: routes, Restore: Undo, Log: `interface chosen.*on eth1 .*--public-ip`,
			Seen: &Seen{Status: `^Interface .* on eth1 \(--public-ip`},
		},
		{
			Name: "--public-ip of a second interface, strict rp_filter there", On: []string{OnVXLAN},
			Inject: Steps(secondInterface, anySource, restart("--public-ip", "ETH1"),
				Until(All(bound("eth1"), reachesAll), 10*time.Second),
				Once(`echo 1 > /proc/sys/net/ipv4/conf/eth1/rp_filter`)),
			Expect: not(reaches), Hold: time.Second, Keeps: not(reaches),
			Restore: Steps(doctorFixes,
				Once(
					`[ "$(cat /proc/sys/net/ipv4/conf/eth1/rp_filter)" = 2 ] && `+
						`[ "$(cat /proc/sys/net/ipv4/conf/eth0/rp_filter)" = 1 ]`),
				Until(reachesAll, 5*time.Second), Undo),
			Bound: routes, Log: `interface chosen.*on eth1`,
			Seen: (&Seen{Status: `^Interface .* on eth1 \(--public-ip`}).
				diagnosed(`^FAIL rp_filter .*strict on eth1, and the return path to \d nodes leaves by another device`),
		},
		{
			Name: "preferred source of the default route changes", On: everywhere(),
			Inject: Steps(On(`case $F in -4) NEW=${IP%.*}.98;; *) NEW=${IP%:*}:98; NODAD=nodad;; esac
				ip $F address add $NEW/$NET_BITS dev eth0 $NODAD; ip $F route replace default via $GW dev eth0 src $NEW`),
				Afterwards(On(`case $F in -4) NEW=${IP%.*}.98;; *) NEW=${IP%:*}:98;; esac
				ip $F route replace default via $GW dev eth0; ip $F address del $NEW/$NET_BITS dev eth0`))),
			Expect:  All(announces("98"), subnetKept, reachesAll),
			Restore: Undo, Log: `interface chosen.*[.:]98 on eth0`,
			Seen: follows(`^Interface .*public IP .*[.:]98`, `overlayd_interface_changes_total +`),
		},
		{
			Name: "start with --iface-can-reach, whose route has a source", On: tunnelled(),
			Inject: Steps(On(`case $F in -4) NEW=${IP%.*}.98;; *) NEW=${IP%:*}:98; NODAD=nodad;; esac
				ip $F address add $NEW/$NET_BITS dev eth0 $NODAD; ip $F route add $TARGET_IP via $GW dev eth0 src $NEW`),
				Afterwards(On(`case $F in -4) NEW=${IP%.*}.98;; *) NEW=${IP%:*}:98;; esac
				ip $F route del $TARGET_IP; ip $F address del $NEW/$NET_BITS dev eth0`)),
				restart("--iface-can-reach", "TARGET")),
			Expect: All(ready, announces4("98"), subnetKept, reachesAll),
			Bound:  routes, Restore: Undo, Log: `interface chosen.*\.98 on eth0 \(route to`,
		},
		{
			// As a DHCP client does that takes any device for one of its own.
			Name: "another program puts an address and a default route on the tunnel device", On: tunnelled(),
			Inject: intoTheTunnel,
			Expect: bound("eth0"), Hold: 2 * time.Second, Keeps: All(bound("eth0"), announcesAt(ownAddr)),
			Restore: Undo, Log: `condition failed.*"foreign-route".*leads the tunnel's own packets into the tunnel`,
			Seen: unreadies("foreign-route", "leads the tunnel's own packets into the tunnel").
				diagnosed(`^FAIL routes the route to (0\.0\.0\.0|::)/0 by overlay.* into the tunnel`),
		},
		{
			Name: "the only default route leads into the tunnel", On: tunnelled(),
			Inject: Steps(intoTheTunnel, On(`ip $F route del default via $GW`)),
			Expect: LogSays(`condition failed.*"underlay".*is a tunnel device of overlayd itself`), Hold: 2 * time.Second,
			Keeps: All(bound("eth0"), announcesAt(ownAddr)),
			// etcd is away
			Restore: Undo, Bound: Bound{Lost: Any, Repair: 10 * time.Second},
			Log: `condition failed.*"underlay".*is a tunnel device of overlayd itself`,
			Seen: unreadies("underlay", "is a tunnel device of overlayd itself").
				diagnosed(`^FAIL interface .*is a tunnel device of overlayd itself`),
		},
		{
			Name: "start beside a default route into the tunnel", On: tunnelled(),
			Inject: Steps(noteDevices, stopDaemon, intoTheTunnel, startDaemon),
			Expect: All(LogSays(`interface chosen`), sameDevices, bound("eth0"), announcesAt(ownAddr)), Hold: 2 * time.Second,
			Keeps: All(sameDevices, bound("eth0")),
			// etcd is away
			Restore: Undo, Bound: Bound{Lost: Any, Repair: 10 * time.Second}, Log: `interface chosen.* on eth0 .*default route`,
		},
		{
			Name: "start with an alternative name", On: []string{OnVXLAN, OnDual, OnHostGW},
			Inject: Steps(Once(`ip link property add dev eth0 altname enp0s31f6-the-long-one`),
				Afterwards(Once(`ip link property del dev eth0 altname enp0s31f6-the-long-one`)),
				restart("--iface", "enp0s31f6-the-long-one")),
			Expect: All(ready, announcesAt(ownAddr), reachesAll), Bound: routes, Restore: Undo,
			Log: `interface chosen.* on eth0 \(--iface enp0s31f6-the-long-one`,
		},
		{
			Name: "start with the name that ip prints", On: []string{OnVXLAN},
			Inject: restart("--iface", "eth0@if5"),
			Expect: LogSays(`condition failed.*"underlay".*device eth0@if5 does not exist: its name is eth0`),
			Bound:  routes, Restore: Undo, Log: `condition failed.*"underlay".*device eth0@if5 does not exist: its name is eth0`,
			Seen: unreadies("underlay", "its name is eth0"),
		},
	}
	return in(Underlay, underlay(), rows)
}

// uplinks gives the victim a second interface, where packets may come and go by any.
func uplinks(ctx context.Context, s *Site) error {
	return Steps(secondInterface, anySource, Once(`echo 2 > /proc/sys/net/ipv4/conf/eth0/rp_filter`),
		Afterwards(Once(`echo 1 > /proc/sys/net/ipv4/conf/eth0/rp_filter`)))(ctx, s)
}

// anySource makes the router take packets from any source by any interface, as routers do where a node has several
// uplinks.
func anySource(ctx context.Context, s *Site) error {
	return onRouter(
		`for i in all seg1 seg2; do echo 0 > /proc/sys/net/ipv4/conf/$i/rp_filter; done; `+
			`ip -6 rule add priority 900 lookup main`,
		`for i in all seg1 seg2; do echo 1 > /proc/sys/net/ipv4/conf/$i/rp_filter; done; ip -6 rule del priority 900`)(ctx, s)
}

// twoUplinks makes the default route one with two next hops.
func twoUplinks(ctx context.Context, s *Site) error {
	return Steps(On(`ip $F route replace default nexthop via $GW dev eth0 nexthop via $GW2 dev eth1`),
		Afterwards(On(`ip $F route replace default via $GW dev eth0`)))(ctx, s)
}

// loAddr is the address that a routed host has.
func loAddr(_ *Site, f addr.Family) netip.Addr {
	if f == addr.IPv4 {
		return netip.MustParseAddr("10.255.0.1")
	}
	return netip.MustParseAddr("2001:db8:255::1")
}

func ownAddr(s *Site, f addr.Family) netip.Addr { return s.Victim.Addr(f) }

// secondAddr is the victim's address on its second interface.
func secondAddr(s *Site, f addr.Family) netip.Addr { return s.second.Get(f) }

// uplinkHops are the next hops by eth0 and eth1, as ip writes them: those of the victim, and the router's back to it.
// Where there is IPv6, the gateways are link-local addresses, and no other address is needed.
func uplinkHops(ctx context.Context, s *Site) (there, back []string, err error) {
	linkLocal := func(m lab.Machine, dev string) string {
		out, runErr := m.Shell(ctx, fmt.Sprintf(`ip -6 -o address show dev %s scope link | sed 's/.*inet6 \([^/]*\).*/\1/'`,
			dev))
		err = errors.Join(err, runErr)
		return strings.TrimSpace(out)
	}
	segment := s.Victim.Spec().Segment
	for i, dev := range []string{"eth0", "eth1"} {
		port := fmt.Sprintf("seg%d", []int{segment, 3 - segment}[i])
		if len(s.families) > 1 {
			there = append(there, fmt.Sprintf("nexthop via inet6 %s dev %s", linkLocal(s.Lab.Router(), port), dev))
			back = append(back, fmt.Sprintf("nexthop via inet6 %s dev %s", linkLocal(s.Victim.Machine, dev), port))
			continue
		}
		there = append(there, fmt.Sprintf("nexthop via %s dev %s onlink", []string{"$GW", "$GW2"}[i], dev))
		back = append(back, "nexthop dev "+port)
	}
	return there, back, err
}

// routedHost takes the victim's addresses from its interfaces and gives it one on lo, to which the router has a route
// by both.
func routedHost(ctx context.Context, s *Site) error {
	s.Defer(moveBack)
	for _, f := range s.families {
		there, back, err := uplinkHops(ctx, s)
		if err != nil {
			return err
		}
		lo := loAddr(s, f)
		own := fmt.Sprintf(
			`ip $F address add %s dev lo %s; for d in eth0 eth1; do ip $F address flush dev $d scope global; done
			ip $F route replace default src %s %s`, addr.Host(lo), nodad(f), lo, strings.Join(there, " "))
		undo := fmt.Sprintf(`ip $F route del default || true; ip $F address del %s dev lo`, addr.Host(lo))
		s.Defer(func(ctx context.Context, s *Site) error {
			_, err := s.Victim.Shell(ctx, undo, s.vars.Get(f)...)
			return err
		})
		route := fmt.Sprintf("ip -%d route", uint8(f))
		if err := onRouter(fmt.Sprintf("%s replace %s %s", route, lo, strings.Join(back, " ")),
			fmt.Sprintf("%s del %s", route, lo))(ctx, s); err != nil {
			return err
		}
		if _, err := s.Victim.Shell(ctx, own, s.vars.Get(f)...); err != nil {
			return err
		}
	}
	return nil
}

// loseUplink takes the second uplink down; the router sends by the first alone.
func loseUplink(ctx context.Context, s *Site) error {
	if err := noteDevices(ctx, s); err != nil {
		return err
	}
	for _, f := range s.families {
		_, back, err := uplinkHops(ctx, s)
		if err != nil {
			return err
		}
		if _, err := s.Lab.Router().Shell(ctx, fmt.Sprintf("ip -%d route replace %s %s", f, loAddr(s, f),
			back[0])); err != nil {
			return err
		}
	}
	return Once(`ip link set eth1 down`)(ctx, s)
}

const listDevices = "ip -o link show type vxlan | cut -d: -f1"

// noteDevices remembers which the tunnel devices are, by their numbers.
func noteDevices(ctx context.Context, s *Site) (err error) {
	s.facts["devices"], err = s.Victim.Shell(ctx, listDevices)
	return err
}

// sameDevices holds while the tunnel devices are those that were noted.
func sameDevices(ctx context.Context, s *Site) error {
	out, err := s.Victim.Shell(ctx, listDevices)
	return errors.Join(err, unless(out == s.facts["devices"], "the tunnel device was made again"))
}

// intoTheTunnel puts an address and a default route on the tunnel device, before all others.
func intoTheTunnel(ctx context.Context, s *Site) error {
	return Steps(
		Afterwards(On(`ip $F route replace default via $GW dev eth0; ip $F route del default dev $DEV || true
			ip $F route del default metric 2000 || true`)),
		On(`case $F in -4) A=192.168.77.9/24;; *) A=2001:db8:77::9/64; NODAD=nodad;; esac
			ip $F route add default via $GW dev eth0 metric 2000; ip $F route del default via $GW dev eth0
			ip $F address add $A dev $DEV $NODAD; ip $F route add default dev $DEV metric 1`),
	)(ctx, s)
}

// restart starts the daemon with more arguments, in which an address may be named; what comes afterwards has the usual
// ones.
func restart(more ...string) Action {
	return func(ctx context.Context, s *Site) error {
		var args []string
		for i := 0; i < len(more); i++ {
			a, ok := s.named(more[i])
			if !ok && len(args) > 0 { // of a family that is not in use: no flag for it
				args = args[:len(args)-1]
				continue
			}
			args = append(args, a)
		}
		with := func(args ...string) Action {
			return Steps(stopDaemon, func(_ context.Context, s *Site) error { s.Victim.With(args...); return nil }, startDaemon)
		}
		// Undone last: a daemon that starts while its addresses are taken away waits for etcd.
		s.undo = append([]Action{with()}, s.undo...)
		return with(args...)(ctx, s)
	}
}

// named puts an address in the place of its name.
func (s *Site) named(word string) (string, bool) {
	f, name := addr.IPv4, word
	if four, six := strings.CutSuffix(word, "6"); six && strings.ToUpper(word) == word {
		f, name = addr.IPv6, strings.TrimSuffix(four, "_")
	}
	if f == addr.IPv6 && len(s.families) == 1 {
		return "", false
	}
	switch name {
	case "LO":
		return loAddr(s, f).String(), true
	case "ETH1":
		return secondAddr(s, f).String(), true
	case "TARGET":
		return s.otherThan().Addr(f).String(), true
	}
	return word, true
}

func ready(ctx context.Context, s *Site) error { return s.Victim.Ready(ctx) }

// not holds while a check does not.
func not(c Check) Check {
	return func(ctx context.Context, s *Site) error {
		return unless(c(ctx, s) != nil, "what should fail does not")
	}
}

// reachesThird holds when pods of the node that is neither the peer nor the victim reach the victim's.
func reachesThird(ctx context.Context, s *Site) error {
	return s.pingPod(ctx, s.otherThan().Pods()[0], s.Victim)
}

// reachesAll holds when the victim's pods and those of the nodes in both segments reach each other.
func reachesAll(ctx context.Context, s *Site) error { return All(reaches, reachesThird)(ctx, s) }

// bound holds when the tunnel devices are bound to an interface; "": to none.
func bound(name string) Check {
	if name != "" {
		return leavesBy(name)
	}
	return Sees(`ip -d link show $DEV > /dev/null; if ip -d link show $DEV | grep 'vxlan id .* dev '; then exit 1; fi`)
}

func doctorFixes(ctx context.Context, s *Site) error {
	_, err := s.Victim.Doctor(ctx, "--fix")
	return err
}
