package faults

import (
	"context"
	"time"

	"github.com/overlayd/overlayd/addr"
)

// kernel is the drift of what the daemon put into the kernel. The scripts run on the victim; what they name is in
// Site.variables.
func kernel() []Fault {
	rows := []Fault{
		{
			Name: "route deleted", On: everywhere(), Short: true, Soak: true,
			Inject: On(`ip $F route del $PEER_SUBNET`), Log: `reverted external change.*"route"`,
			Seen: repairs("route", "add route"),
		},
		{
			Name: "route through another gateway", On: withGateways(), Short: true,
			Inject: On(`ip $F route show $PEER_SUBNET | sed 's/via [^ ]*/via '"$WRONG_GW"'/' | while read -r r; do ip $F route replace $r; done`),
			Log:    `reverted external change.*"route"`, Seen: repairs("route", "found route"),
		},
		{
			Name: "all routes flushed (ip route flush proto 118)", On: everywhere(), Short: true, Soak: true,
			Inject: On(`ip $F route flush proto 118 table all`), Log: `reverted external change.*"route"`,
			Seen: repairs("route", "add route"),
		},
		{
			Name: "policy table's route deleted", On: tunnelled(), Soak: true,
			Inject: On(`ip $F route del $PEER_IP table 118`), Log: `reverted external change.*"route"`,
		},
		{
			Name: "rule deleted", On: tunnelled(), Soak: true,
			Inject: On(`ip $F rule del from $SUBNET lookup 118`), Log: `reverted external change.*"rule"`,
		},
		{
			Name: "forwarding entry deleted", On: tunnelled(), Short: true, Soak: true,
			Inject: On(`bridge fdb del $PEER_MAC dev $DEV`), Log: `reverted external change.*"fdb"`,
			Seen: repairs("fdb", "add "),
		},
		{
			Name: "forwarding entry to another node", On: tunnelled(), Soak: true,
			Inject: On(`bridge fdb replace $PEER_MAC dev $DEV dst $TARGET_IP`), Log: `reverted external change.*"fdb"`,
		},
		{
			Name: "neighbour deleted", On: tunnelled(), Soak: true,
			Inject: On(`ip $F neigh del $PEER_FIRST dev $DEV`), Log: `reverted external change.*"neighbour"`,
		},
		{
			Name: "neighbour with another MAC", On: tunnelled(),
			Inject: On(`ip $F neigh replace $PEER_FIRST lladdr 02:00:00:00:00:99 nud permanent dev $DEV`),
			Log:    `reverted external change.*"neighbour"`,
		},
		{
			Name: "neighbours flushed", On: tunnelled(), Soak: true,
			Inject: On(`ip $F neigh flush dev $DEV nud permanent`), Log: `reverted external change.*"neighbour"`,
		},
		{
			Name: "device's address deleted", On: tunnelled(), Soak: true,
			Inject: On(`ip $F address del $FIRST/$BITS dev $DEV`), Log: `reverted external change.*"address"`,
		},
		{
			Name: "device deleted", On: tunnelled(), Short: true, Soak: true,
			Inject: On(`ip link del $DEV`), Log: `reverted external change.*"device"`, Seen: repairs("device", "add "),
		},
		{
			Name: "device set down", On: tunnelled(), Short: true, Soak: true,
			Inject: On(`ip link set $DEV down`), Log: `reverted external change.*"device"`, Seen: repairs("device", " down"),
		},
		{
			Name: "device's MTU changed", On: tunnelled(), Short: true, Soak: true,
			Inject: On(`ip link set $DEV mtu 1300`), Log: `reverted external change.*"device"`, Seen: repairs("device", "1300"),
		},
		{
			Name: "device's MAC changed", On: tunnelled(), Soak: true,
			Inject: On(`ip link set $DEV address 02:00:00:00:00:98`), Log: `reverted external change.*"device"`,
		},
		{
			Name: "another process deletes a route for 10 s", On: everywhere(), Short: true,
			Inject: keepsDeleting(`ip $F route del $PEER_SUBNET`, `ip $F route show proto 118 | grep "^$PEER_SUBNET "`),
			Bound:  Bound{Lost: Any, Repair: withinASecond, Lines: 30}, Log: `reverted external change.*"route"`,
			Seen: repairs("route", "add route"),
		},
		{
			Name: "another process deletes the device for 10 s", On: tunnelled(),
			Inject: keepsDeleting(`ip link del $DEV`, `ip link show $DEV`),
			Bound:  Bound{Lost: Any, Repair: withinASecond, Lines: 60}, Log: `reverted external change.*"device"`,
		},
		foreignRoute("foreign route of a better metric over a peer's subnet", `$PEER_SUBNET via $GW dev eth0 metric 1`,
			everywhere()...).short(),
		foreignRoute("foreign route to a part of a peer's subnet", `${PEER_SUBNET%%/*}/$PART via $GW dev eth0`,
			everywhere()...),
		flannelsRoute(),
		foreignRoute("foreign blackhole over a peer's subnet", `blackhole $PEER_SUBNET metric 1`, OnVXLAN, OnDual),
		{
			// The daemon is stopped for a moment, so that the other device surely comes first.
			Name: "another program's device has the VNI", On: []string{OnVXLAN}, Short: true,
			Inject: Steps(pauseDaemon,
				On(`ip link del $DEV; ip link add thief type vxlan id 1 dstport 8472 local $IP dev eth0; ip link set thief up`),
				Afterwards(On(`ip link del thief`)), resumeDaemon),
			Hold: time.Second, Restore: Undo, Bound: Bound{Lost: Any, Repair: 2 * time.Second},
			Log:  `condition failed.*"kernel".*thief`,
			Seen: unreadies("kernel", "thief").diagnosed(`^FAIL tunnel port the VXLAN device thief has VNI 1`),
		},
		{
			Name: "forwarding switched off", On: everywhere(), Short: true, Soak: true,
			Inject: On(`if [ $F = -4 ]; then echo 0 > /proc/sys/net/ipv4/ip_forward; else echo 0 > /proc/sys/net/ipv6/conf/all/forwarding; fi`),
			Log:    `reverted external change.*"sysctl"`, Seen: repairs("sysctl", "forward"),
		},
		{
			Name: "device deleted while new devices get no IPv6", On: []string{OnDual}, Short: true,
			Inject: Steps(
				Once(`echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6; ip link del overlay-v6.1`),
				Afterwards(Once(`echo 0 > /proc/sys/net/ipv6/conf/default/disable_ipv6`))),
			Expect: All(Whole, reaches), Log: `reverted external change.*"device"`,
		},
		{
			Name: "IPv6 switched off on the device", On: []string{OnDual}, Short: true,
			Inject: Once(`echo 1 > /proc/sys/net/ipv6/conf/overlay-v6.1/disable_ipv6`), Expect: All(Whole, reaches),
			Log: `reverted external change.*"sysctl"`, Seen: repairs("sysctl", "disable_ipv6"),
		},
		diverted("a VPN's rule before the main table", `5269`, vpnUp, vpnDown),
		diverted("source routing of the node's own address", `[0-9]*`,
			`ip $F route add default via $GW dev eth0 table 500; ip $F rule add from $IP lookup 500`,
			`ip $F rule del from $IP lookup 500; ip $F route flush table 500`),
		diverted("private addresses prohibited by a rule", `5269`, `ip $F rule add pref 5270 to $WIDE prohibit`,
			`ip $F rule del pref 5270`),
		startsDiverted(),
		{
			Name: "the pods' bridge stripped of its addresses and ports, as a network manager does",
			On:   []string{OnVXLAN, OnHostGW, OnDual}, Short: true,
			Inject: Once(stripBridge), Hold: 2 * time.Second, Log: `condition failed.*"pod-bridge"`,
			Restore: Once(giveBridgeBack),
			Bound:   Bound{Lost: Any, Repair: 8 * time.Second},
			Seen: degrades("pod-bridge", "cni0 has lost its address .*cni0 has lost 1 of its ports .*: ip ").in(8 * time.Second).
				diagnosed(`^FAIL bridge cni0 is down: .*cni0 has lost its address .*cni0 has lost 1 of its ports`),
		},
		{
			Name: "the pods' bridge stripped while the daemon is down", On: []string{OnVXLAN, OnDual},
			Inject: Steps(Wait(2*time.Second), stopDaemon, Once(stripBridge), startDaemon),
			Hold:   2 * time.Second, Log: `condition failed.*"pod-bridge"`,
			Restore: Once(giveBridgeBack),
			Bound:   Bound{Lost: Any, Repair: 8 * time.Second},
			Seen: degrades("pod-bridge", "cni0 has lost its address ").in(12 * time.Second).
				diagnosed(`^FAIL bridge cni0 is down: .*cni0 has lost its address .*cni0 has lost 1 of its ports`),
		},
	}
	return in(Kernel, drift(), rows)
}

// A VPN has a rule before the main table, and a table in which a wide network leads elsewhere.
const (
	vpnUp   = `ip $F route add $WIDE via $GW dev eth0 table 52; ip $F rule add pref 5270 lookup 52`
	vpnDown = `ip $F rule del pref 5270; ip $F route flush table 52`
)

// wide is a network around that of the pods, and POOL is that.
const wide = `[ $F = -4 ] && { WIDE=10.0.0.0/8; POOL=10.244.0.0/16; } || { WIDE=fd00::/12; POOL=fd00:10:244::/48; }
`

// diverted is a rule of another program that would take the pods' packets elsewhere: ours comes before it, with a
// priority that matches, and goes with it.
func diverted(name, priority, add, remove string) Fault {
	return Fault{
		Name: name, On: everywhere(), Short: true, Soak: true,
		Inject: Steps(On(wide+add), Afterwards(On(wide+remove))),
		Expect: All(Sees(wide+`ip $F rule show | grep -E "^`+priority+
			`:.*to $POOL lookup main suppress_prefixlength .* proto 118"`), reaches, reachesAcross),
		Hold: time.Second, Keeps: All(reaches, reachesAcross), Restore: Undo, Log: `rule`,
	}
}

func startsDiverted() Fault {
	f := diverted("start beside a VPN's rule before the main table", `5269`, vpnUp, vpnDown)
	f.Inject = Steps(stopDaemon, f.Inject, startDaemon)
	f.Bound.Repair, f.Bound.Lost, f.Soak = comeBack, Any, false
	return f
}

// reachesAcross holds when the victim itself reaches a pod of the peer, and a pod of the victim the peer itself.
func reachesAcross(ctx context.Context, s *Site) error {
	if err := s.pingPod(ctx, s.Victim.Machine, s.Peer); err != nil {
		return err
	}
	return s.everyFamily(func(f addr.Family) error {
		return reachesOne(ctx, s.Victim.Pods()[0], s.Peer.Name+" itself", s.Peer.Addr(f))
	})
}

// foreignRoute is won (the planned state is back) or reported; either way it is named.
func foreignRoute(name, route string, on ...string) Fault {
	const part = `PART=$(( $BITS == 32 ? 25 : 65 )); `
	return Fault{
		Name: name, On: on,
		Inject: Steps(On(part+`ip $F route add `+route),
			Afterwards(On(part+`ip $F route del `+route+` 2>/dev/null || true`))),
		Expect: logNames(`PEER_FIRST`), Restore: Undo,
		Log: `another program`, Seen: unreadies("foreign-route", "belongs to another program"),
	}
}

// flannelsRoute has no metric, as with flannel's host-gw and DirectRouting, and leads to where the peer was before it
// moved.
func flannelsRoute() Fault {
	f := foreignRoute("flannel's route to where a peer was", `$PEER_SUBNET via $GW dev eth0`, OnHostGW, OnDirect, OnVXLAN)
	f.Seen = f.Seen.diagnosed(`^FAIL routes .* by eth0, metric .* belongs to another program and precedes the route to the peer`)
	return f
}

func (f Fault) short() Fault {
	f.Short = true
	return f
}

// in fills in what rows of an area have in common.
func in(a Area, b Bound, rows []Fault) []Fault {
	for i := range rows {
		rows[i].Area = a
		if rows[i].Bound == (Bound{}) {
			rows[i].Bound = b
		}
	}
	return rows
}

// stripBridge does to the pods' bridge what `nmcli networking off` does to one that NetworkManager manages.
const stripBridge = `ip -o addr show dev cni0 scope global | sed 's/.*inet6* \([^ ]*\).*/\1/' > "$STATE_DIR/addresses"
	ip -br link show master cni0 | sed 's/[@ ].*//' > "$STATE_DIR/ports"
	for p in $(cat "$STATE_DIR/ports"); do ip link set $p nomaster; done
	ip addr flush dev cni0; ip link set cni0 down`

const giveBridgeBack = `ip link set cni0 up; for a in $(cat "$STATE_DIR/addresses"); do
		case $a in *:*) ip addr replace $a dev cni0 nodad;; *) ip addr replace $a brd + dev cni0;; esac
	done
	for p in $(cat "$STATE_DIR/ports"); do ip link set $p up master cni0; bridge link set dev $p hairpin on; done
	rm "$STATE_DIR/addresses" "$STATE_DIR/ports"`
