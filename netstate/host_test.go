package netstate

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/test/nstest"
)

// uplinks gives a node a second device, and an address of its own on the loopback device.
func (n *node) uplinks() {
	n.t.Helper()
	nstest.Link(n.NS, "eth1", nstest.New(n.t), "eth0")
	n.Addr("eth1", "198.51.100.1/24")
	n.Addr("eth1", "2001:db8:1::1/64")
	n.sh(`ip address add 10.255.0.1/32 dev lo; ip address add 2001:db8:ff::1/128 dev lo nodad`)
}

// hops is what the host's routes say about an address, in words.
func hops(h Host, ip string) string {
	var out []string
	for _, r := range h.NextHops(netip.MustParseAddr(ip)) {
		s := r.Link
		if r.Via.IsValid() {
			s = fmt.Sprintf("%s via %s", s, r.Via)
		}
		if r.Src.IsValid() {
			s += fmt.Sprintf(" src %s", r.Src)
		}
		if r.Drops {
			s = "drops"
		}
		out = append(out, s)
	}
	return strings.Join(out, ", ")
}

// A host is what the kernel's routes make of it, whichever way they are written down there, and each change to them is
// an event.
func TestHostRoutes(t *testing.T) {
	t.Parallel()
	const out4, out6 = "8.8.8.8", "2001:4860::8888"
	for _, tt := range []struct{ name, setup, dst, want string }{
		{
			"several next hops", `ip route add default nexthop via 192.0.2.254 dev eth0 nexthop via 198.51.100.254 dev eth1`,
			out4,
			"eth0 via 192.0.2.254, eth1 via 198.51.100.254",
		},
		{
			"several next hops, IPv6",
			`ip -6 route add default nexthop via 2001:db8::fe dev eth0 nexthop via 2001:db8:1::fe dev eth1`, out6,
			"eth0 via 2001:db8::fe, eth1 via 2001:db8:1::fe",
		},
		{
			"a next hop appended, IPv6",
			`ip -6 route add default via fe80::fe dev eth0 src 2001:db8:ff::1; ` +
				`ip -6 route append default via fe80::fe dev eth1 src 2001:db8:ff::1`, out6,
			"eth0 via fe80::fe src 2001:db8:ff::1, eth1 via fe80::fe src 2001:db8:ff::1",
		},
		{
			"gateways of the other family, and a source",
			`ip route add default src 10.255.0.1 nexthop via inet6 fe80::fe dev eth0 nexthop via inet6 fe80::fe dev eth1`, out4,
			"eth0 via fe80::fe src 10.255.0.1, eth1 via fe80::fe src 10.255.0.1",
		},
		{
			"one gateway of the other family", `ip -4 route add default via inet6 fe80::fe dev eth1 src 10.255.0.1`, out4,
			"eth1 via fe80::fe src 10.255.0.1",
		},
		{
			"nexthop objects",
			`ip nexthop add id 1 via 192.0.2.254 dev eth0; ip nexthop add id 2 via 198.51.100.254 dev eth1; ` +
				`ip nexthop add id 3 group 1/2; ip route add default nhid 3`, out4,
			"eth0 via 192.0.2.254, eth1 via 198.51.100.254",
		},
		{
			"nexthop objects that the kernel only names", `echo 0 > /proc/sys/net/ipv4/nexthop_compat_mode
			ip nexthop add id 1 via fe80::fe dev eth0; ip nexthop add id 2 via fe80::fe dev eth1; ip nexthop add id 3 group 1/2
			ip route add default nhid 3 src 10.255.0.1`, out4,
			"eth0 via fe80::fe src 10.255.0.1, eth1 via fe80::fe src 10.255.0.1",
		},
		{
			"nexthop objects that the kernel only names, IPv6", `echo 0 > /proc/sys/net/ipv4/nexthop_compat_mode
			ip -6 nexthop add id 1 via fe80::fe dev eth0; ip -6 nexthop add id 2 via fe80::fe dev eth1
			ip nexthop add id 3 group 1/2; ip -6 route add default nhid 3`, out6,
			"eth0 via fe80::fe, eth1 via fe80::fe",
		},
		{
			"a nexthop object that drops",
			`echo 0 > /proc/sys/net/ipv4/nexthop_compat_mode; ip nexthop add id 1 blackhole; ip route add default nhid 1`, out4,
			"drops",
		},
		{
			"the better metric has one next hop",
			`ip route add default metric 100 nexthop via 192.0.2.254 dev eth0 nexthop via 198.51.100.254 dev eth1; ` +
				`ip route add default via 192.0.2.253 metric 50`, out4,
			"eth0 via 192.0.2.253",
		},
		{
			"a source on the same device",
			`ip address add 192.0.2.77/24 dev eth0; ip route add default via 192.0.2.254 src 192.0.2.77`, out4,
			"eth0 via 192.0.2.254 src 192.0.2.77",
		},
		{"a connected network", `true`, "198.51.100.9", "eth1 src 198.51.100.1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			n.uplinks()
			n.watch()
			n.converge(State{})
			for heard(n.k, 0) {
			}
			n.sh(tt.setup)
			if tt.setup != "true" && !heard(n.k, patience) {
				t.Error("no event")
			}
			h := n.observe()
			if got := hops(h, tt.dst); got != tt.want {
				t.Errorf("got  %s\nwant %s\n%s", got, tt.want, n.Exec("sh", "-c", "ip route; ip -6 route"))
			}
			if again := n.observe(); !h.Equal(again) {
				t.Error("a second look found another host")
			}
		})
	}
}

// Where routes only name a nexthop object, a change to the object is an event.
func TestNexthopObjectChanges(t *testing.T) {
	t.Parallel()
	for _, compat := range []string{"0", "1"} {
		n := newNode(t)
		n.uplinks()
		n.Sysctl("net.ipv4.nexthop_compat_mode", compat)
		n.sh(
			`ip nexthop add id 1 via 192.0.2.254 dev eth0; ip nexthop add id 2 via 198.51.100.254 dev eth1; ` +
				`ip nexthop add id 3 group 1/2; ip route add default nhid 3`)
		n.watch()
		n.converge(State{})
		for heard(n.k, 0) {
		}
		n.sh(`ip nexthop replace id 3 group 2`)
		if !heard(n.k, patience) {
			t.Error("no event")
		}
		if got := hops(n.observe(), "8.8.8.8"); got != "eth1 via 198.51.100.254" {
			t.Errorf("compat mode %s: %s", compat, got)
		}
	}
}

func TestHostLinks(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.sh(`ip link property add dev eth0 altname enp0s31f6np0 altname a-name-longer-than-fifteen-characters
		ip link add br0 type bridge; ip link add v0 type veth peer name v1; ip link set v0 master br0`)
	n.converge(only(fullState(), dev4))
	h := n.observe()
	for name, want := range map[string]HostLink{
		"eth0": {Kind: "veth"}, "br0": {Kind: "bridge"}, "v0": {Kind: "veth", Master: "br0"},
		dev4: {Kind: "vxlan", Tunnel: true}, "lo": {Kind: "device"},
	} {
		if got, ok := h.Link(name); !ok || got.Kind != want.Kind || got.Master != want.Master || got.Tunnel != want.Tunnel {
			t.Errorf("%s: %+v", name, got)
		}
	}
	for _, name := range []string{"eth0", "enp0s31f6np0", "a-name-longer-than-fifteen-characters"} {
		if i := slices.IndexFunc(h.Links, func(l HostLink) bool { return l.HasName(name) }); i < 0 ||
			h.Links[i].Name != "eth0" {
			t.Errorf("%s is not found", name)
		}
	}
	if slices.ContainsFunc(h.Links, func(l HostLink) bool {
		return l.HasName("") || l.HasName("enp0s31f6np0\na-name-longer-than-fifteen-characters")
	}) {
		t.Error("a device is found by no name of its own")
	}
}

// A tunnel that is bound to no device is made, becomes bound and is released, and outlives any uplink.
func TestUnboundTunnel(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.uplinks()
	n.watch()
	bound := fullState()
	unbound := fullState()
	for i := range unbound.Links {
		unbound.Links[i].VXLAN.Underlay = ""
	}
	for _, want := range []State{unbound, bound, unbound} {
		n.converge(want)
		n.wantState(want)
		if again := n.converge(want); len(again) > 0 {
			t.Errorf("a second time: %v", again)
		}
	}
	for heard(n.k, 0) {
	}
	n.sh(`ip link set overlay.1 type vxlan id 1 dev eth1`)
	if !heard(n.k, patience) {
		t.Error("no event when another process bound it")
	}
	n.observe()
	n.converge(unbound)
	n.wantState(unbound)
	n.sh(`ip link del eth1; ip link show overlay.1; ip link show overlay-v6.1`)
}

// An address that may not stay, or can't be used yet, is told from one that is only not the first of its network.
func TestFleetingAddresses(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.sh(
		`ip address add 192.0.2.77/24 dev eth0; ip address add 2001:db8::77/64 dev eth0 nodad; ` +
			`ip address add 2001:db8::88/64 dev eth0 nodad preferred_lft 0`)
	got := map[string]bool{}
	for _, a := range n.observe().Addresses {
		got[a.Prefix.Addr().String()] = a.Fleeting
	}
	for ip, want := range map[string]bool{
		node4: false, "192.0.2.77": false, node6: false, "2001:db8::77": false,
		"2001:db8::88": true,
	} {
		if fleeting, there := got[ip]; !there || fleeting != want {
			t.Errorf("%s: there %v, fleeting %v", ip, there, fleeting)
		}
	}
}
