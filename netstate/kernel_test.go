package netstate

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/nstest"
)

func TestReconcileFromNothing(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	want := fullState()
	n.converge(want)
	n.wantState(want)
	for name, look := range map[string]func(){
		"believing": func() {}, "after Forget": n.forget,
		"after Observe": func() { n.observe() },
	} {
		look()
		if done := n.converge(want); len(done) > 0 {
			t.Errorf("%s, a second time: %v", name, done)
		}
	}
	n.open() // as after a restart
	if done := n.converge(want); len(done) > 0 {
		t.Errorf("after a restart: %v", done)
	}
	n.converge(State{})
	n.wantState(State{})
}

// TestDeviceIsQuiet: no link-local address, no router advertisements, whatever the defaults are.
func TestDeviceIsQuiet(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.Sysctl("net.ipv6.conf.default.accept_ra", "2")
	n.converge(State{Links: fullState().Links})
	for _, dev := range []string{dev4, dev6} {
		if out := n.Exec("ip", "-o", "addr", "show", "dev", dev); out != "" {
			t.Errorf("%s has an address:\n%s", dev, out)
		}
		if out := n.Exec("cat", "/proc/sys/net/ipv6/conf/"+dev+"/accept_ra"); out != "0\n" {
			t.Errorf("%s: accept_ra is %s", dev, out)
		}
	}
}

// drifts are what others may do to our state. Each is found at the next look, and put right.
var drifts = []struct{ name, script string }{
	{"route gone", "ip route del 10.244.2.0/24"},
	{"route gone v6", "ip -6 route del fd00:0:0:2::/64"},
	{"route in the own table gone", "ip route del 192.0.2.2 table 118; ip -6 route flush table 118"},
	{"direct route gone", "ip route del 10.244.9.0/24; ip -6 route del fd00:0:0:9::/64"},
	{"all routes gone", "ip route flush proto 118; ip -6 route flush proto 118"},
	{
		"route with another gateway",
		"ip route change $(ip -N route show 10.244.2.0/24 | sed 's/via 10.244.2.0/via 10.244.3.0/')",
	},
	{
		"route with another gateway v6",
		"ip -6 route change $(ip -N -6 route show fd00:0:0:2::/64 | sed 's/via fd00:0:0:2::/via fd00:0:0:3::/; s/pref.*//')",
	},
	{
		"route without its source", `for f in "-4 10.244.2.0/24" "-6 fd00:0:0:2::/64"; do set -- $f
			ip $1 route change $(ip -N $1 route show $2 | sed 's/ src [^ ]*//; s/pref.*//'); done`,
	},
	{
		"route with another source", `for f in "-4 10.244.2.0/24 10.244.1.0" "-6 fd00:0:0:2::/64 fd00:0:0:1::"; do set -- $f
			ip $1 route change $(ip -N $1 route show $2 | sed "s/ src [^ ]*/ src $3/; s/pref.*//"); done`,
	},
	{"the routes' source gone for a moment", `ip addr del 192.0.2.1/24 dev eth0; ip addr add 192.0.2.1/24 dev eth0
		ip addr del 2001:db8::1/64 dev eth0; ip addr add 2001:db8::1/64 dev eth0 nodad`},
	{
		"route by another device",
		"ip route change 10.244.2.0/24 via 192.0.2.9 dev eth0 proto 118 $(ip route show 10.244.2.0/24 | grep -o 'metric [0-9]*')",
	},
	{
		"second route behind ours",
		"ip route append $(ip -N route show 10.244.2.0/24 | sed 's/via 10.244.2.0/via 10.244.3.0/')",
	},
	{
		"second route before ours",
		"ip route prepend $(ip -N route show 10.244.2.0/24 | sed 's/via 10.244.2.0/via 10.244.3.0/')",
	},
	{"second way v6", "ip -6 route append $(ip -N -6 route show fd00:0:0:2::/64 | sed 's/via fd00:0:0:2::/via fd00:0:0:3::/; s/pref.*//')"},
	{"own route too many", "ip route add 10.244.77.0/24 via 10.244.2.0 dev overlay.1 onlink proto 118 metric 7"},
	{"own route too many v6", "ip -6 route add fd00:0:0:77::/64 dev eth0 proto 118 metric 7"},
	{
		"own route in a high table",
		"ip route add 10.244.77.0/24 dev eth0 proto 118 table 1000; ip -6 route add fd00:0:0:77::/64 dev eth0 proto 118 table 1000",
	},
	{"neighbour gone", "ip neigh del 10.244.2.0 dev overlay.1; ip neigh del fd00:0:0:2:: dev overlay-v6.1"},
	{"neighbour with another MAC", "ip neigh change 10.244.2.0 lladdr 02:00:00:00:00:99 dev overlay.1 nud permanent"},
	{
		"neighbour with another MAC v6",
		"ip neigh change fd00:0:0:2:: lladdr 02:00:00:00:00:99 dev overlay-v6.1 nud permanent",
	},
	{"neighbour that may age", "ip neigh change 10.244.2.0 lladdr 02:00:00:00:00:99 dev overlay.1 nud reachable"},
	{"neighbours flushed", "ip neigh flush dev overlay.1 nud permanent"},
	{
		"neighbour too many",
		"ip neigh add 10.244.77.0 lladdr 02:00:00:00:00:99 dev overlay.1; ip neigh add fd00::77 lladdr 02:00:00:00:00:99 dev overlay-v6.1",
	},
	{"FDB entry gone", "bridge fdb del 02:00:00:00:00:02 dev overlay.1; bridge fdb del 02:00:00:01:00:02 dev overlay-v6.1"},
	{"FDB entry to another node", "bridge fdb replace 02:00:00:00:00:02 dev overlay.1 dst 192.0.2.99"},
	{"FDB entry to another node v6", "bridge fdb replace 02:00:00:01:00:02 dev overlay-v6.1 dst 2001:db8::99"},
	{"FDB entry to another port", "bridge fdb replace 02:00:00:00:00:02 dev overlay.1 dst 192.0.2.2 port 99"},
	{"FDB entry to another VNI", "bridge fdb replace 02:00:00:00:00:02 dev overlay.1 dst 192.0.2.2 vni 99"},
	{"FDB entry by another device", "bridge fdb replace 02:00:00:00:00:02 dev overlay.1 dst 192.0.2.2 via lo"},
	{"FDB entry that may age", "bridge fdb replace 02:00:00:00:00:02 dev overlay.1 dst 192.0.2.99 dynamic"},
	{"FDB entry too many", "bridge fdb add 02:00:00:00:00:99 dev overlay.1 dst 192.0.2.99"},
	{"odd FDB entry too many", "bridge fdb add 02:00:00:00:00:99 dev overlay.1 dst 192.0.2.99 port 99 vni 7"},
	{"flooding", "bridge fdb append 00:00:00:00:00:00 dev overlay.1 dst 192.0.2.98; bridge fdb append 00:00:00:00:00:00 dev overlay.1 dst 192.0.2.99"},
	{"address gone", "ip addr del 10.244.1.0/32 dev overlay.1; ip addr del fd00:0:0:1::/128 dev overlay-v6.1"},
	{"address too many", "ip addr add 10.9.9.9/24 dev overlay.1; ip addr add fd09::9/64 dev overlay-v6.1"},
	{"MTU", "ip link set overlay.1 mtu 1300; ip link set overlay-v6.1 mtu 1300"},
	{"MTU too small for IPv6", "ip link set overlay-v6.1 mtu 1000"},
	{"MAC", "ip link set overlay.1 address 02:00:00:00:00:99"},
	{"device down", "ip link set overlay.1 down; ip link set overlay-v6.1 down"},
	{"device gone", "ip link del overlay.1; ip link del overlay-v6.1"},
	{
		"device with another VNI",
		"ip link del overlay.1; ip link add overlay.1 type vxlan id 9 dstport 8472 local 192.0.2.1 dev eth0",
	},
	{
		"device with another port",
		"ip link del overlay-v6.1; ip link add overlay-v6.1 type vxlan id 1 dstport 4789 local 2001:db8::1 dev eth0",
	},
	{"device that learns", "ip link set overlay.1 type vxlan learning"},
	{"device renamed", "ip link set overlay.1 down; ip link set overlay.1 name overlay.7; ip link set overlay.7 up"},
	{
		"leftover of another VNI",
		`ip link add overlay.7 type vxlan id 7 dstport 8472 local 192.0.2.1 dev eth0; ip link set overlay.7 up
		ip addr add 10.9.9.9/32 dev overlay.7; ip route add 10.9.8.0/24 via 10.9.9.1 dev overlay.7 onlink proto 118
		ip neigh add 10.9.9.1 lladdr 02:00:00:00:00:99 dev overlay.7; bridge fdb add 02:00:00:00:00:99 dev overlay.7 dst 192.0.2.99`,
	},
	{"rule gone", "ip rule del priority 11800; ip -6 rule del priority 11800"},
	{
		"rule into another table",
		"ip rule del priority 11800; ip rule add priority 11800 from 10.244.1.0/24 lookup 119 protocol 118",
	},
	{"rule too many", "ip rule add from 10.9.0.0/16 lookup 118 priority 11801 protocol 118; ip -6 rule add from fd09::/64 lookup 118 priority 11801 protocol 118"},
	{
		"rule for all too many",
		"ip rule add lookup 118 priority 11801 protocol 118; ip -6 rule add lookup 118 priority 11801 protocol 118",
	},
	{"rule into a high table", "ip rule add from 10.9.0.0/16 lookup 1000 priority 11801 protocol 118"},
	{"setting", "sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0 net/ipv6/conf/overlay.1/accept_ra=2"},
	{"underlay down", "ip link set eth0 down; ip link set eth0 up; ip addr replace 2001:db8::1/64 dev eth0 nodad"},
	{"many at once", `ip route flush table 118; ip route flush proto 118; ip neigh flush dev overlay.1 nud permanent; ip addr flush dev overlay-v6.1
		ip link set overlay.1 mtu 1300; ip rule del priority 11800`},
}

func TestDriftIsFoundAndRepaired(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	want := fullState()
	n.converge(want)
	foreign := n.foreign()
	for i, d := range drifts {
		ok := t.Run(d.name, func(t *testing.T) {
			n := &node{NS: n.NS, t: t, k: n.k}
			n.sh(d.script)
			if i%2 == 0 {
				n.forget()
			} else {
				n.observe()
			}
			if done := n.converge(want); len(done) == 0 {
				t.Error("nothing was found")
			}
			n.wantState(want)
			n.forget()
			if done := n.converge(want); len(done) > 0 {
				t.Errorf("a second time: %v", done)
			}
		})
		if !ok { // the next ones start afresh
			n.converge(State{})
			n.converge(want)
		}
	}
	if d := lineDiff(foreign, n.foreign()); d != "" {
		t.Errorf("others' state has changed:\n%s", d)
	}
}

// foreign is what is on the node and not ours.
func (n *node) foreign() string {
	n.t.Helper()
	var out []string
	for _, command := range []string{
		"ip -N -o link", "ip -N -o addr", "ip -N route show table all", "ip -N -6 route show table all", "ip -N rule",
		"ip -N -6 rule",
		"ip -N neigh show nud permanent", "bridge fdb",
	} {
		out = append(out, "# "+command)
		for line := range strings.Lines(n.Exec(strings.Fields(command)...)) {
			own := strings.Contains(line, "table 255") || strings.HasPrefix(line, "33:33:") // the kernel's own
			if !own && !strings.Contains(line, "overlay") && !strings.Contains(line, "proto 118") &&
				!strings.Contains(line, "protocol 118") && !strings.Contains(line, "lookup 118 proto") {
				line, _, _ = strings.Cut(line, "valid_lft")
				out = append(out, strings.TrimSpace(line))
			}
		}
	}
	return strings.ReplaceAll(strings.Join(out, "\n"), " tentative", "")
}

// lineDiff is what went (-) and what came (+).
func lineDiff(before, now string) string {
	b, a := strings.Split(before, "\n"), strings.Split(now, "\n")
	var out []string
	for _, l := range b {
		if !slices.Contains(a, l) {
			out = append(out, "- "+l)
		}
	}
	for _, l := range a {
		if !slices.Contains(b, l) {
			out = append(out, "+ "+l)
		}
	}
	return strings.Join(out, "\n")
}

const foreigners = `
	ip link add br0 type bridge; ip link set br0 up; ip addr add 10.50.0.1/24 dev br0; ip addr add fd50::1/64 dev br0 nodad
	ip link add flannel.5 type vxlan id 5 dstport 8472 local 192.0.2.1 dev eth0 nolearning; ip link set flannel.5 up
	ip addr add 10.60.0.0/32 dev flannel.5
	ip addr add 192.0.2.77/24 dev eth0
	bridge fdb add 02:00:00:00:60:02 dev flannel.5 dst 192.0.2.2
	ip neigh add 10.60.2.0 lladdr 02:00:00:00:60:02 dev flannel.5 nud permanent
	ip neigh add 192.0.2.88 lladdr 02:00:00:00:60:03 dev eth0 nud permanent
	ip neigh add 2001:db8::88 lladdr 02:00:00:00:60:03 dev eth0 nud permanent
	ip route add 10.60.2.0/24 via 10.60.2.0 dev flannel.5 onlink
	ip route add default via 192.0.2.254
	ip route add 10.61.0.0/16 via 192.0.2.254 proto 117 metric 5
	ip route add 10.62.0.0/16 via 192.0.2.254 table 118
	ip route add blackhole 10.63.0.0/16
	ip -6 route add fd61::/64 via 2001:db8::254 proto 117 metric 5
	ip -6 route add fd62::/64 via 2001:db8::254 table 118
	ip rule add from 10.60.0.0/16 lookup 118 priority 11800
	ip rule add from 10.244.1.0/24 lookup 118 priority 11799
	ip rule add fwmark 1 lookup 100 priority 11800 protocol 117
	ip -6 rule add from fd60::/64 lookup 100 priority 11800`

// forward switches forwarding on before a comparison: the kernel then joins some groups on every device.
func (n *node) forward() {
	n.t.Helper()
	n.converge(State{Sysctls: []Sysctl{Forwarding(addr.IPv4), Forwarding(addr.IPv6)}})
}

func TestForeignStateIsNeverTouched(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.forward()
	n.sh(foreigners)
	n.converge(fullState())
	n.forget()
	if done := n.converge(fullState()); len(done) > 0 {
		t.Errorf("taken for ours: %v", done)
	}
	// On our own device too, routes that are not of our making are not ours.
	n.sh("ip route add 10.70.0.0/16 dev overlay.1; ip -6 route add fd70::/64 dev overlay-v6.1")
	before, onDevice := n.foreign(), n.Exec("ip", "route", "show", "dev", dev4, "proto", "boot")
	for _, desired := range []State{
		fullState(),
		{Links: fullState().Links, Addresses: fullState().Addresses},
		fullState(),
	} {
		n.forget()
		n.converge(desired)
	}
	if now := n.Exec("ip", "route", "show", "dev", dev4, "proto", "boot"); now != onDevice || onDevice == "" {
		t.Errorf("others' routes on our device were %q and are %q", onDevice, now)
	}
	n.forget()
	n.converge(State{})
	n.wantState(State{})
	if d := lineDiff(before, n.foreign()); d != "" {
		t.Errorf("others' state has changed:\n%s", d)
	}
}

// wantFailures checks that just these changes were refused; each failure has to name its object and speak the given
// words.
func (n *node) wantFailures(got []Failure, want map[string]string) {
	n.t.Helper()
	for _, f := range got {
		words, ok := want[f.String()]
		if !ok {
			n.t.Errorf("not expected: %v", f)
		} else if !strings.Contains(f.Error(), words) || !strings.HasPrefix(f.Error(), f.String()) {
			n.t.Errorf("%q does not say %q", f.Error(), words)
		}
	}
	if len(got) != len(want) {
		n.t.Errorf("%d refusals, want %d: %v", len(got), len(want), got)
	}
}

func without[T comparable](s []T, x T) []T {
	return slices.DeleteFunc(slices.Clone(s), func(o T) bool { return o == x })
}

func TestForeignRouteWithOurKey(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	want := fullState()
	n.forward()
	rest, refused := want, map[string]string{}
	for _, r := range want.Routes {
		if dst := r.Dst.String(); dst == "10.244.2.0/24" || dst == "10.244.9.0/24" || dst == "fd00:0:0:9::/64" {
			n.Exec("ip", "route", "add", dst, "dev", "eth0", "metric", fmt.Sprint(r.Metric))
			rest.Routes = without(rest.Routes, r)
			refused["add "+r.String()] = unix.EEXIST.Error()
		}
	}
	before := n.foreign()
	for range 2 {
		res := n.reconcile(want)
		n.wantFailures(res.Failed, refused)
		for _, f := range res.Failed {
			if !errors.Is(f, unix.EEXIST) {
				t.Errorf("%v is no EEXIST", f)
			}
		}
		n.wantState(rest)
	}
	n.converge(State{})
	if d := lineDiff(before, n.foreign()); d != "" {
		t.Errorf("others' state has changed:\n%s", d)
	}
}

// TestForeignRouteToAnIPv6Gateway: in IPv6 the kernel takes no gateway, onlink or not, that another route but the
// default one leads to by another device. The peer behind it is named; the others are reached.
func TestForeignRouteToAnIPv6Gateway(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.sh("ip route add default via 2001:db8::254; ip route add fd00:0:0:2::/64 dev eth0")
	want := fullState()
	rest, refused := want, map[string]string{}
	for _, r := range want.Routes {
		if r.Via.String() == "fd00:0:0:2::" {
			rest.Routes = without(rest.Routes, r)
			refused["add "+r.String()] = "(Nexthop has invalid gateway or device mismatch)"
		}
	}
	n.wantFailures(n.reconcile(want).Failed, refused)
	n.wantState(rest)
	n.sh("ip route del fd00:0:0:2::/64 dev eth0")
	n.converge(want)
	n.wantState(want)
}

// TestWayAroundAForeignRouteToAnIPv6Gateway: a route to the gateway alone makes the kernel take it.
func TestWayAroundAForeignRouteToAnIPv6Gateway(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.sh("ip route add fd00::/16 dev eth0")
	want := fullState()
	for _, r := range want.Routes {
		if r.OnLink && r.Via.Is6() && r.Table == MainTable {
			want.Routes = append(want.Routes, Route{Table: MainTable, Dst: addr.Host(r.Via), Metric: r.Metric, Link: r.Link})
		}
	}
	want.Sort()
	n.converge(want)
	n.wantState(want)
	n.forget()
	if done := n.converge(want); len(done) > 0 {
		t.Errorf("not at rest: %v", done)
	}
}

// TestFromDirectToTunnelAndBack: the IPv6 stack looks for the gateway of the route into the tunnel by the one that it is
// to replace, and refuses it. What is there stays so where nothing may be removed yet.
func TestFromDirectToTunnelAndBack(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	tunnel, direct := fullState(), fullState()
	for i, r := range direct.Routes {
		if r.Via == r.Dst.Addr() {
			public := map[addr.Family]string{addr.IPv4: "192.0.2.2", addr.IPv6: "2001:db8::2"}[addr.FamilyOf(r.Via)]
			direct.Routes[i] = Route{
				Table: r.Table, Dst: r.Dst, Metric: r.Metric, Via: netip.MustParseAddr(public), Link: "eth0",
			}
		}
	}
	for _, want := range []State{direct, tunnel, direct} {
		n.converge(want)
		n.wantState(want)
	}
	n.Do(func() {
		if res, err := n.k.Reconcile(Update{Come: tunnel.clone(), All: true}); err != nil || len(res.Failed) > 0 {
			t.Errorf("without pruning: %v, %v", res.Failed, err)
		}
	})
	n.converge(tunnel)
	n.wantState(tunnel)
}

func TestRefusedObjectsHoldNobodyBack(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	want := fullState()
	bad := State{
		Links: []Link{{
			Name: "overlay.8", MTU: 1400, MAC: want.Links[0].MAC,
			VXLAN: VXLAN{VNI: 8, Port: 8472, Local: parseAddr(t, node4), Underlay: "eth7"},
		}},
		Sysctls:    []Sysctl{{"net/ipv4/no_such_thing", "1"}},
		Addresses:  []Address{{"overlay.9", fullState().Addresses[0].Prefix}},
		Neighbours: []Neighbour{{"overlay.9", parseAddr(t, "10.9.9.9"), want.Links[0].MAC}},
		FDB:        []FDBEntry{{"overlay.9", want.Links[0].MAC, parseAddr(t, node4)}},
		Routes: []Route{
			{Table: MainTable, Dst: fullState().Rules[0].From, Metric: 1, Link: "eth7"},
			{Table: MainTable, Dst: fullState().Rules[0].From, Metric: 2, Link: "eth0", Via: parseAddr(t, "198.51.100.1")},
		},
	}
	refused := map[string]string{
		"add " + bad.Links[0].String():      "no such device: eth7",
		"add " + bad.Sysctls[0].String():    "no such file",
		"add " + bad.Addresses[0].String():  "no such device: overlay.9",
		"add " + bad.Neighbours[0].String(): "no such device: overlay.9",
		"add " + bad.FDB[0].String():        "no such device: overlay.9",
		"add " + bad.Routes[0].String():     "no such device: eth7",
		"add " + bad.Routes[1].String():     "(Nexthop has invalid gateway)", // the kernel's own words
	}
	n.wantFailures(n.reconcile(merge(bad, want)).Failed, refused)
	n.wantState(want)
}

// TestRefusalsAmongMany: each is laid at the door of the object that was refused, whichever send it was in.
func TestRefusalsAmongMany(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	want := manyPeers(1500)
	rest, refused := want.clone(), map[string]string{}
	for i := 7; i < len(want.Routes); i += 7 {
		r := &want.Routes[i]
		r.Via, r.OnLink = parseAddr(t, "198.51.100.1"), false
		refused["add "+r.String()] = "(Nexthop has invalid gateway)"
	}
	for i := 0; i < len(want.Neighbours); i += 11 {
		nb := &want.Neighbours[i]
		nb.Link = "overlay.9"
		refused["add "+nb.String()] = "no such device: overlay.9"
	}
	want.Sort()
	rest.Routes = reject(rest.Routes, func(r Route) bool { return !slices.Contains(want.Routes, r) })
	rest.Neighbours = reject(rest.Neighbours, func(nb Neighbour) bool { return !slices.Contains(want.Neighbours, nb) })
	n.wantFailures(n.reconcile(want).Failed, refused)
	n.wantState(rest)
}

// TestDeviceInTheWay: somebody else's device is named, and left alone with all that is on it.
func TestDeviceInTheWay(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, script, words string }{
		{
			"VNI and port", "ip link add flannel.1 type vxlan id 1 dstport 8472 local 192.0.2.1 dev eth0 nolearning",
			"the VXLAN device flannel.1 has VNI 1 on UDP port 8472 already",
		},
		{
			"no local address", "ip link add flannel.1 type vxlan id 1 dstport 8472 nolearning",
			"the VXLAN device flannel.1 has VNI 1 on UDP port 8472 already",
		},
		{
			"another kind", "ip link add overlay.1 type bridge; ip link set overlay.1 up",
			"another program's bridge device has this name",
		},
		{
			"same port with other flags",
			"ip link add vx0 type vxlan id 5 dstport 8472 local 192.0.2.1 dev eth0 gbp; ip link set vx0 up",
			"vx0",
		},
	} {
		for _, order := range []string{"before", "after"} {
			t.Run(test.name+" "+order, func(t *testing.T) {
				t.Parallel()
				n := newNode(t)
				want := fullState()
				if order == "after" { // the other of our devices is there already, and is not the culprit
					n.converge(State{Links: only(want, dev6).Links})
				}
				n.forward()
				n.sh(test.script)
				before := n.foreignDevices()
				res := n.reconcile(want)
				if len(res.Failed) == 0 || res.Failed[0].Kind() != "device" ||
					!strings.Contains(res.Failed[0].Error(), test.words) {
					t.Errorf("got %v, want %q", res.Failed, test.words)
				}
				if d := lineDiff(before, n.foreignDevices()); d != "" {
					t.Errorf("others' state has changed:\n%s", d)
				}
				n.forget()
				n.converge(only(want, dev6))
				n.wantState(only(want, dev6))
				if d := lineDiff(before, n.foreignDevices()); d != "" {
					t.Errorf("others' state has changed:\n%s", d)
				}
			})
		}
	}
}

// foreignDevices is all that is on devices other than ours, ours being VXLAN devices of our names.
func (n *node) foreignDevices() string {
	n.t.Helper()
	var out string
	for _, l := range query[ipLink](n, "ip", "-j", "-d", "link", "show") {
		if l.Name == "eth0" || l.Name == "lo" || ownedName(l.Name) && l.Info.Kind == "vxlan" {
			continue
		}
		for _, command := range []string{
			"ip addr show dev", "ip neigh show dev", "ip route show dev", "ip -6 route show dev",
			"bridge fdb show dev",
		} {
			for line := range strings.Lines(n.Exec(append(strings.Fields(command), l.Name)...)) {
				if !strings.HasPrefix(line, "33:33:") { // the groups that the kernel joins by itself
					out += line
				}
			}
		}
	}
	return strings.ReplaceAll(out, " tentative", "")
}

// only is the part of a state that has to do with one device.
func only(s State, dev string) State {
	out := newWorld(s)
	for k, o := range out {
		if on, ok := linkOf(o); ok && on != dev || o.kind() == kindLink && o.(Link).Name != dev || o.kind() == kindSysctl &&
			strings.Contains(o.String(), "overlay") && !strings.Contains(o.String(), dev) {
			delete(out, k)
		}
	}
	return out.state()
}

func TestUDPPortTaken(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	var c net.PacketConn
	var err error
	n.Do(func() { c, err = net.ListenPacket("udp4", "0.0.0.0:8472") })
	if err != nil {
		t.Fatal(err)
	}
	want := fullState()
	for range 2 { // the first time when it is made, the second time when it is there
		res := n.reconcile(want)
		if len(res.Failed) == 0 || res.Failed[0].Kind() != "device" ||
			!strings.Contains(res.Failed[0].Error(), "UDP port 8472 is taken by another program") {
			t.Errorf("got %v", res.Failed)
		}
	}
	_ = c.Close()
	// A command that is just being started by another test may hold on to the socket for a moment.
	for start := time.Now(); len(n.reconcile(want).Failed) > 0 && time.Since(start) < patience; {
		time.Sleep(10 * time.Millisecond)
	}
	n.wantState(want)
}

func TestLearnedEntriesAreLeftAlone(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	want := fullState()
	for i := range want.Links {
		want.Links[i].VXLAN.Learning = true
	}
	n.converge(want)
	n.wantState(want)
	n.sh("bridge fdb add 02:00:00:00:00:99 dev overlay.1 dst 192.0.2.99 dynamic")
	n.forget()
	if done := n.converge(want); len(done) > 0 {
		t.Errorf("done: %v", done)
	}
	if out := n.Exec("bridge", "fdb", "show", "dev", dev4); !strings.Contains(out, "02:00:00:00:00:99 dst 192.0.2.99") {
		t.Errorf("it is gone:\n%s", out)
	}
}

// TestIPv6SwitchedOff: IPv4 works as ever; in IPv6 each refusal is named.
func TestIPv6SwitchedOff(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.Sysctl("net.ipv6.conf.all.disable_ipv6", "1")
	n.Sysctl("net.ipv6.conf.default.disable_ipv6", "1")
	want := merge(manyPeers(3), State{
		Sysctls: []Sysctl{Forwarding(addr.IPv4), AcceptRA(dev4)}, Addresses: only(fullState(), dev4).Addresses,
		Rules: fullState().Rules[:1],
	})
	n.converge(want)
	n.wantState(want)
	n.forget()
	if done := n.converge(want); len(done) > 0 {
		t.Errorf("a second time: %v", done)
	}
	six := Address{dev4, only(fullState(), dev6).Addresses[0].Prefix}
	res := n.reconcile(merge(want, State{Addresses: []Address{six}}))
	n.wantFailures(res.Failed, map[string]string{"add " + six.String(): "IPv6 is disabled on this device"})
	n.wantState(want)
	n.converge(State{})
	n.wantState(State{})
}

// ipStats is a device with its counters.
type ipStats struct {
	Stats64 struct{ RX, TX struct{ Packets int } }
}

// TestLearning: a device that learns leaves our entries as they are, and drops frames of a peer that come from another
// address than its entry has; without learning they get in. Package doctor and the documents rely on it.
func TestLearning(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		learning bool
		from     string
		gets     bool
	}{{true, "192.0.2.22", false}, {true, "192.0.2.2", true}, {false, "192.0.2.22", true}} {
		n, peer := &node{NS: nstest.New(t), t: t}, &node{NS: nstest.New(t), t: t}
		nstest.Link(n.NS, "eth0", peer.NS, "eth0")
		n.Addr("eth0", node4+"/24")
		peer.Addr("eth0", "192.0.2.2/24")
		peer.Addr("eth0", "192.0.2.22/24")
		n.open()
		peer.open()
		end := func(local string, own, other byte, dst string) State {
			l := Link{Name: dev4, MAC: addr.MAC{2, 0, 0, 0, 0, own}, MTU: 1450}
			l.VXLAN = VXLAN{VNI: 1, Port: 8472, Local: netip.MustParseAddr(local), Underlay: "eth0", Learning: tt.learning}
			s := State{Links: []Link{l}, Addresses: []Address{{dev4, netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/32", own))}}}
			s.addPeer(dev4, netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", other)), netip.MustParseAddr(dst),
				addr.MAC{2, 0, 0, 0, 0, other})
			s.Sort()
			return s
		}
		want := end(node4, 1, 2, "192.0.2.2")
		n.converge(want)
		peer.converge(end(tt.from, 2, 1, node4))
		packets := func(n *node) (in, out int) {
			s := query[ipStats](n, "ip", "-j", "-s", "link", "show", dev4)[0].Stats64
			return s.RX.Packets, s.TX.Packets
		}
		peer.Do(func() {
			c, err := net.Dial("udp4", "10.244.1.0:9")
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = c.Close() }()
			for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
				_, _ = c.Write([]byte("x"))
				in, _ := packets(n)
				if _, sent := packets(peer); in > 0 || !tt.gets && sent >= 10 {
					break
				}
			}
		})
		if in, _ := packets(n); in > 0 != tt.gets {
			t.Errorf("learning %v, from %s: %d packets got in", tt.learning, tt.from, in)
		}
		n.wantState(want)
	}
}

// TestNoIPv6OnNewDevices: our own device has it all the same, and has it back when another process takes it away.
func TestNoIPv6OnNewDevices(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.watch()
	n.Sysctl("net.ipv6.conf.default.disable_ipv6", "1")
	want := fullState()
	want.Sysctls = append(want.Sysctls, IPv6On(dev6))
	want.Sort()
	n.converge(want)
	n.wantState(want)
	if on := n.Exec("cat", "/proc/sys/net/ipv6/conf/"+dev4+"/disable_ipv6"); strings.TrimSpace(on) != "1" {
		t.Errorf("the device of IPv4 has it too: %s", on)
	}
	for _, which := range []string{dev6, "all"} {
		for heard(n.k, 300*time.Millisecond) {
		}
		n.sh("sysctl -qw net/ipv6/conf/" + which + "/disable_ipv6=1")
		if !heard(n.k, patience) {
			t.Errorf("%s: it is not heard of", which)
		}
		n.observe()
		now := want
		if which == "all" { // of the underlay's device, another process has to take care
			now.Routes = slices.DeleteFunc(slices.Clone(want.Routes),
				func(r Route) bool { return r.Link == "eth0" && r.Dst.Addr().Is6() })
			for i, r := range now.Routes {
				if r.Src.Is6() { // that was its address
					now.Routes[i].Src = netip.Addr{}
				}
			}
		}
		n.converge(now)
		n.wantState(now)
	}
}

// TestSmallMTU: a device too small for IPv6 has none of it, neither settings nor addresses; IPv4 works.
func TestSmallMTU(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	want := only(fullState(), dev4)
	want.Sysctls, want.Links[0].MTU = nil, 1000
	want.Rules = want.Rules[:1]
	n.converge(want)
	n.wantState(want)
	n.forget()
	if done := n.converge(want); len(done) > 0 {
		t.Errorf("a second time: %v", done)
	}
}

// TestMTUAboveTheUnderlay: the kernel makes such a device smaller without a word; it is noticed.
func TestMTUAboveTheUnderlay(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	want := State{Links: fullState().Links[1:]}
	want.Links[0].MTU = 1500
	res := n.reconcile(want)
	n.wantFailures(res.Failed, map[string]string{"replace " + want.Links[0].String(): unix.EINVAL.Error()})
}

func TestSecondFamilyComesAndGoes(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	full := fullState()
	for _, want := range []State{only(full, dev4), full, only(full, dev6), full, {}} {
		n.converge(want)
		want.Sysctls = nil
		n.wantState(want)
	}
}

func TestManyPeers(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	want := manyPeers(2000)
	if done := n.converge(want); len(done) != 1+4*2000 {
		t.Errorf("%d changes", len(done))
	}
	n.wantState(want)
	n.forget()
	if done := n.converge(want); len(done) > 0 {
		t.Errorf("a second time: %d changes, the first is %v", len(done), done[0])
	}
	n.sh("ip link del " + dev4)
	n.observe()
	n.converge(want)
	n.wantState(want)
	n.converge(State{})
	n.wantState(State{})
}

func TestHostOnly(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.sh("ip route add default via 192.0.2.254; ip route add 198.51.100.0/24 via inet6 2001:db8::7 dev eth0; ip route add 203.0.113.0/24 nexthop via 192.0.2.7 nexthop via 192.0.2.8")
	n.converge(fullState())
	h := n.observe()
	for ip, want := range map[string]HostRoute{
		"192.0.2.9":    {Link: "eth0"},
		"2001:db8::9":  {Link: "eth0"},
		"8.8.8.8":      {Link: "eth0", Via: parseAddr(t, "192.0.2.254")},
		"10.244.2.7":   {Link: "eth0", Via: parseAddr(t, "192.0.2.254")}, // our own routes are not the host's
		"198.51.100.1": {Link: "eth0", Via: parseAddr(t, "2001:db8::7")},
		"203.0.113.1":  {Link: "eth0", Via: parseAddr(t, "192.0.2.7")}, // the first of two
	} {
		r, ok := h.Route(parseAddr(t, ip))
		if !ok || r.Link != want.Link || r.Via != want.Via {
			t.Errorf("%s: %+v, want %+v", ip, r, want)
		}
	}
	if _, ok := h.Route(parseAddr(t, "2001:4860::8888")); ok {
		t.Error("a route where there is none")
	}
	for ip, want := range map[string]bool{node4: true, node6: true, "127.0.0.1": true, "192.0.2.2": false} {
		if h.Has(parseAddr(t, ip)) != want {
			t.Errorf("Has(%s) is not %v", ip, want)
		}
	}
	if l, ok := h.Link("eth0"); !ok || l.MTU != 1500 || !l.Up || l.VXLAN != (VXLAN{}) || !h.IPv6 {
		t.Errorf("eth0: %+v", l)
	}
	if l, ok := h.Link(dev6); !ok || l.VXLAN != fullState().Links[0].VXLAN {
		t.Errorf("%s: %+v", dev6, l)
	}
}
