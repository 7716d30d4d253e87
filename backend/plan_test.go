package backend_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/backend/hostgw"
	"github.com/overlayd/overlayd/backend/vxlan"
	"github.com/overlayd/overlayd/backend/wireguard"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

var update = flag.Bool("update", false, "write the plans down as they are now")

const (
	only4 = `"Network": "10.244.0.0/16"`
	only6 = `"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48"`
	dual  = only4 + `, "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48"`
)

// plans are the inputs of the golden files; in all of them the node and its peers are those of input.
var plans = []struct {
	name, network, backend string
	change                 func(*backend.Input)
}{
	{"vxlan-v4", only4, `"Type": "vxlan"`, nil},
	{"vxlan-v6", only6, `"Type": "vxlan"`, nil},
	{"vxlan-dual", dual, `"Type": "vxlan"`, nil},
	{"vxlan-direct-dual", dual, `"Type": "vxlan", "DirectRouting": true`, nil},
	{
		"vxlan-settings", dual, `"Type": "vxlan", "VNI": 16777215, "Port": 4789, "GBP": true, "Learning": true, "MTU": 1420`,
		nil,
	},
	{"vxlan-mtu-too-large", dual, `"Type": "vxlan", "MTU": 9000`, func(in *backend.Input) { in.Peers = nil }},
	{"vxlan-mtu-too-small-for-v6", dual, `"Type": "vxlan"`, func(in *backend.Input) {
		in.Underlay.V4.MTU, in.Underlay.V6.MTU, in.Peers = 1300, 1300, nil
	}},
	{"vxlan-no-ipv6-in-kernel", only4, `"Type": "vxlan"`, func(in *backend.Input) { in.Host.IPv6, in.Peers = false, nil }},
	{"vxlan-direct-no-routes", dual, `"Type": "vxlan", "DirectRouting": true`, func(in *backend.Input) {
		in.Host.Routes = nil
		in.Host = in.Host.Indexed()
	}},
	{"vxlan-dual-beside-a-vpn", dual, `"Type": "vxlan"`, besideAVPN},
	{"hostgw-dual-beside-a-vpn", dual, `"Type": "host-gw"`, besideAVPN},
	{"wireguard-v4", only4, `"Type": "wireguard"`, nil},
	{"wireguard-dual", dual, `"Type": "wireguard", "ListenPort": 51000, "PersistentKeepaliveInterval": 25`, nil},
	{"hostgw-v4", only4, `"Type": "host-gw"`, nil},
	{"hostgw-v6", only6, `"Type": "host-gw"`, nil},
	{"hostgw-dual", dual, `"Type": "host-gw"`, nil},
	{"hostgw-settings", dual, `"Type": "host-gw", "MTU": 1400`, func(in *backend.Input) { in.Peers = nil }},
	{"hostgw-mtu-too-large", dual, `"Type": "host-gw", "MTU": 9000`, func(in *backend.Input) { in.Peers = nil }},
	{"hostgw-no-routes", only4, `"Type": "host-gw"`, func(in *backend.Input) {
		in.Host.Routes = nil
		in.Host = in.Host.Indexed()
	}},
}

// besideAVPN has a rule of another program, which is for marked packets, and one for all behind that.
func besideAVPN(in *backend.Input) {
	in.Peers = in.Peers[:1]
	for _, all := range []string{"0.0.0.0/0", "::/0"} {
		rule := func(priority, table, mark uint32) {
			p := netip.MustParsePrefix(all)
			r := netstate.HostRule{Action: netstate.RuleToTable, Mark: mark, Mask: mark}
			r.Priority, r.From, r.To, r.Table = priority, p, p, table
			in.Host.Rules = append(in.Host.Rules, r)
		}
		rule(0, 255, 0)
		rule(5210, 254, 0x80000)
		rule(5270, 52, 0)
		rule(32766, 254, 0)
	}
}

func config(t testing.TB, network, be string) subnet.Config {
	t.Helper()
	c, err := subnet.ParseConfig(fmt.Appendf(nil, `{%s, "Backend": {%s}}`, network, be))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func backendOf(c subnet.Config) backend.Backend {
	switch c.Backend.Type {
	case subnet.HostGW:
		return hostgw.Backend{}
	case subnet.WireGuard:
		return wireguard.Backend{}
	}
	return vxlan.Backend{}
}

// keyOf is the private key of node n.
func keyOf(n int) netstate.PrivateKey { return netstate.PrivateKey{1: byte(n)} }

// lease is that of node n, with an address on the underlay that ends in host; in the families that the network uses.
func lease(c subnet.Config, name string, n int, v4, v6 string) *subnet.Lease {
	l := &subnet.Lease{Attrs: subnet.Attrs{
		Backend: c.Backend.Type, Identity: subnet.Identity{NodeName: name, NodeID: "id-" + name}, PublicIPLocal: true,
	}}
	for _, f := range c.Families() {
		sn, ip := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(n), 0}), 24), v4
		if f == addr.IPv6 {
			sn, ip = netip.MustParsePrefix(fmt.Sprintf("fd00:10:244:%x::/64", n)), v6
		}
		if ip != "" {
			l.Subnets.Set(f, sn)
			l.PublicIP.Set(f, netip.MustParseAddr(ip))
		}
	}
	l.VTEP = backendOf(c).VTEPs(c, l.Identity)
	l.PublicKey = subnet.PublicKey(keyOf(n).Public().String())
	return l
}

func input(c subnet.Config) backend.Input {
	prefix, ip := netip.MustParsePrefix, netip.MustParseAddr
	in := backend.Input{
		Config: c,
		Self:   *lease(c, "self", 1, "192.0.2.1", "2001:db8::1"),
		Key:    keyOf(1),
		Peers: []*subnet.Lease{
			lease(c, "same-segment", 2, "192.0.2.2", "2001:db8::2"),
			lease(c, "same-segment-behind-nat", 3, "192.0.2.3", "2001:db8::3"),
			lease(c, "other-segment", 4, "198.51.100.4", "2001:db8:1::4"),
			lease(c, "default-route-only", 5, "203.0.113.5", "2001:db8:2::5"),
			lease(c, "two-ways", 6, "100.64.6.6", "2001:db8:3::6"),
			lease(c, "address-of-this-node", 7, "192.0.2.77", "2001:db8::77"),
		},
		Host: netstate.Host{
			IPv6:  true,
			Links: []netstate.HostLink{{Index: 2, Name: "eth0", MTU: 1500, Up: true}},
			Addresses: []netstate.HostAddress{
				{Link: "eth0", Prefix: prefix("192.0.2.1/24")},
				{Link: "eth0", Prefix: prefix("2001:db8::1/64")},
				{Link: "eth1", Prefix: prefix("192.0.2.77/32")},
				{Link: "eth1", Prefix: prefix("2001:db8::77/128")},
			},
			Routes: []netstate.HostRoute{
				{Dst: prefix("0.0.0.0/0"), Via: ip("192.0.2.254"), Link: "eth0"},
				{Dst: prefix("::/0"), Via: ip("2001:db8::fe"), Link: "eth0"},
				{Dst: prefix("192.0.2.0/24"), Link: "eth0"},
				{Dst: prefix("2001:db8::/64"), Link: "eth0"},
				{Dst: prefix("192.0.2.0/24"), Via: ip("192.0.2.254"), Link: "eth0", Metric: 9},
				{Dst: prefix("198.51.100.0/24"), Via: ip("192.0.2.253"), Link: "eth0"},
				{Dst: prefix("2001:db8:1::/48"), Via: ip("2001:db8::fd"), Link: "eth0"},
				{Dst: prefix("100.64.6.0/24")},
				{Dst: prefix("2001:db8:3::/48")},
			},
		}.Indexed(),
	}
	in.Peers[1].PublicIPLocal = false
	for _, f := range c.Families() {
		in.Underlay.Set(f, backend.Underlay{Device: "eth0", Addr: in.Self.PublicIP.Get(f), MTU: 1500})
	}
	if len(c.Families()) == 2 {
		in.Peers = append(in.Peers, lease(c, "v4-only", 8, "192.0.2.8", ""), lease(c, "v6-only", 9, "", "2001:db8::9"))
		in.Peers[len(in.Peers)-2].NodeName = "" // as flannel writes it
	}
	return in
}

// render says all that is in a plan.
func render(p backend.Plan) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	for _, c := range netstate.Diff(netstate.State{}, p.State) {
		line("%s", c.Obj)
	}
	line("pod MTU %d", p.MTU)
	for _, f := range addr.Families() {
		if p.Tunnel.Get(f) != "" {
			line("%s: tunnel device %q", f, p.Tunnel.Get(f))
		}
	}
	for _, w := range p.Paths {
		line("%s", strings.TrimSpace(fmt.Sprintf("path to %s %s: %s %s", w.Peer.Name(), w.Family, w.Kind, w.Reason)))
	}
	for _, problem := range p.Problems {
		line("problem: %s", problem)
	}
	return b.String()
}

func TestPlans(t *testing.T) {
	t.Parallel()
	for _, test := range plans {
		t.Run(test.name, func(t *testing.T) {
			in := input(config(t, test.network, test.backend))
			if test.change != nil {
				test.change(&in)
			}
			got := render(backendOf(in.Config).Plan(in))
			file := filepath.Join("testdata", test.name+".txt")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("%s is another plan; got\n%s\nwant\n%s", file, got, want)
			}
		})
	}
}

// randomInput has a random network, and peers with random addresses that are all different.
func randomInput(t *testing.T, g *rand.Rand) backend.Input {
	of := func(s ...string) string { return s[g.IntN(len(s))] }
	c := config(t, of(only4, only6, dual), of(`"Type": "host-gw"`, `"Type": "vxlan"`,
		`"Type": "vxlan", "DirectRouting": true`, `"Type": "vxlan", "VNI": 123456, "MTU": 1400`, `"Type": "wireguard"`))
	in := input(c)
	in.Peers = nil
	for _, n := range g.Perm(254)[:g.IntN(40)] {
		v4 := of("192.0.2.%d", "198.51.100.%d", "203.0.113.%d", "100.64.6.%d", "192.0.2.%d")
		v6 := of("2001:db8::%x", "2001:db8:1::%x", "2001:db8:2::%x", "2001:db8:3::%x")
		l := lease(c, fmt.Sprintf("node-%d", n+2), n+2, fmt.Sprintf(v4, n+2), fmt.Sprintf(v6, n+2))
		if l.PublicIPLocal = g.IntN(2) == 0; g.IntN(8) == 0 && len(c.Families()) == 2 {
			l.Subnets.V6, l.PublicIP.V6 = netip.Prefix{}, netip.Addr{}
		}
		in.Peers = append(in.Peers, l)
	}
	return in
}

// A route that covers an endpoint of etcd is never planned, by no backend and in no family; the other peers are not
// held back.
func TestNoRouteCoversAnEndpoint(t *testing.T) {
	t.Parallel()
	for _, network := range []string{only4, only6, dual} {
		for _, be := range []string{
			`"Type": "vxlan"`, `"Type": "vxlan", "DirectRouting": true`, `"Type": "host-gw"`, `"Type": "wireguard"`,
		} {
			in := input(config(t, network, be))
			for _, f := range in.Config.Families() {
				in.Endpoints = append(in.Endpoints, in.Peers[0].Subnets.Get(f).Addr().Next())
			}
			p := backendOf(in.Config).Plan(in)
			for _, w := range p.Paths {
				covers := w.Peer == in.Peers[0]
				if covers != strings.Contains(w.Reason, "an endpoint of the store") {
					t.Errorf("%s, %s: path to %s: %s %s", network, be, w.Peer.Name(), w.Kind, w.Reason)
				}
			}
			for _, r := range p.State.Routes {
				if r.Table == netstate.MainTable && slices.ContainsFunc(in.Endpoints, r.Dst.Contains) {
					t.Errorf("%s, %s: %s", network, be, r)
				}
			}
			checkPaths(t, in, p)
		}
	}
}

func strictlySorted[T interface{ Compare(T) int }](s []T) bool {
	for i := 1; i < len(s); i++ {
		if s[i-1].Compare(s[i]) >= 0 {
			return false
		}
	}
	return true
}

func TestPlanLaws(t *testing.T) {
	t.Parallel()
	for seed := range uint64(500) {
		g := rand.New(rand.NewPCG(seed, 118))
		in := randomInput(t, g)
		p := backendOf(in.Config).Plan(in)
		s := p.State
		if !strictlySorted(s.Links) || !strictlySorted(s.Sysctls) || !strictlySorted(s.Addresses) ||
			!strictlySorted(s.Neighbours) || !strictlySorted(s.FDB) || !strictlySorted(s.Routes) || !strictlySorted(s.Rules) ||
			!strictlySorted(s.TunnelPeers) {
			t.Fatalf("seed %d: not in order, or two of one key:\n%s", seed, render(p))
		}
		checkPaths(t, in, p)
		checkRoutes(t, in, s.Routes)
		shuffled := in
		shuffled.Peers = slices.Clone(in.Peers)
		g.Shuffle(len(in.Peers), func(i, j int) {
			shuffled.Peers[i], shuffled.Peers[j] = shuffled.Peers[j], shuffled.Peers[i]
		})
		if other := backendOf(in.Config).Plan(shuffled); !reflect.DeepEqual(other.State, s) {
			t.Errorf("the order of the peers changes the plan:\n%s\n%s", render(p), render(other))
		}
		checkParts(t, in, p, g.IntN(len(in.Peers)+1))
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// checkParts: the plan for some peers and the plan for the others are together the plan for all.
func checkParts(t *testing.T, in backend.Input, all backend.Plan, at int) {
	t.Helper()
	some, others := in, in
	some.Peers, others.Peers = in.Peers[:at], in.Peers[at:]
	a, b := backendOf(in.Config).Plan(some), backendOf(in.Config).Plan(others)
	both := a.State
	both.Neighbours = append(both.Neighbours, b.State.Neighbours...)
	both.FDB = append(both.FDB, b.State.FDB...)
	both.TunnelPeers = append(both.TunnelPeers, b.State.TunnelPeers...)
	both.Routes = append(both.Routes, b.State.Routes...)
	both.Rules = append(both.Rules, b.State.Rules...)
	both.Sort()
	both.Rules = slices.Compact(both.Rules)
	if d := netstate.Diff(both, all.State); len(d) > 0 {
		t.Errorf("from the parts to the whole: %v", d)
	}
	if a.MTU != all.MTU || a.Tunnel != all.Tunnel || len(a.Paths)+len(b.Paths) != len(all.Paths) {
		t.Errorf("parts with MTU %d, tunnel %v, %d and %d paths; the whole has %d, %v, %d",
			a.MTU, a.Tunnel, len(a.Paths), len(b.Paths), all.MTU, all.Tunnel, len(all.Paths))
	}
}

// checkPaths: each peer has exactly one path in each family, and a reason where it has none.
func checkPaths(t *testing.T, in backend.Input, p backend.Plan) {
	t.Helper()
	paths := map[string]int{}
	for _, w := range p.Paths {
		paths[fmt.Sprint(w.Peer.Subnets.Get(w.Family))]++
		if (w.Kind == backend.Unreachable) != (w.Reason != "") {
			t.Errorf("%s: %s %q", w.Peer.Name(), w.Kind, w.Reason)
		}
		sn := w.Peer.Subnets.Get(w.Family)
		routed := slices.ContainsFunc(p.State.Routes, func(r netstate.Route) bool { return r.Dst == sn })
		if routed != (w.Kind != backend.Unreachable) {
			t.Errorf("%s is %s, but that there is a route is %v", w.Peer.Name(), w.Kind, routed)
		}
	}
	for _, peer := range in.Peers {
		for _, f := range in.Config.Families() {
			sn := peer.Subnets.Get(f)
			if sn.IsValid() && paths[sn.String()] != 1 {
				t.Errorf("%s has %d paths", sn, paths[sn.String()])
			}
		}
	}
}

// checkRoutes: nothing is routed but the peers' subnets and, in our own table, the addresses that peers say are their
// own.
func checkRoutes(t *testing.T, in backend.Input, routes []netstate.Route) {
	t.Helper()
	wg := in.Config.Backend.Type == subnet.WireGuard // which needs no gateway
	for _, r := range routes {
		owner := slices.IndexFunc(in.Peers, func(l *subnet.Lease) bool {
			f := addr.FamilyOf(r.Dst.Addr())
			if r.Table == netstate.OwnTable {
				return l.PublicIPLocal && r.Dst == addr.Host(l.PublicIP.Get(f)) &&
					(r.Via == l.Gateway(f) || wg && !r.Via.IsValid())
			}
			return r.Table == netstate.MainTable && r.Dst == l.Subnets.Get(f) &&
				(r.Via == l.PublicIP.Get(f) || r.Via == l.Gateway(f) || wg && !r.Via.IsValid())
		})
		var src netip.Addr // into the tunnel, where the answer comes back
		if f := addr.FamilyOf(r.Dst.Addr()); owner >= 0 && (r.OnLink || wg) && r.Table == netstate.MainTable &&
			in.Peers[owner].PublicIPLocal {
			src = in.Self.PublicIP.Get(f)
		}
		if r.Src != src {
			t.Errorf("%s has not the source %s", r, src)
		}
		if owner < 0 || r.Metric < 1 || r.Metric > 1023 || r.Dst != r.Dst.Masked() {
			t.Errorf("%s belongs to no peer", r)
		}
	}
}

// A peer is on a network of this node where one device leads to it, with no gateway between.
func TestOnLink(t *testing.T) {
	t.Parallel()
	p, a := netip.MustParsePrefix, netip.MustParseAddr
	h := netstate.Host{
		Links: []netstate.HostLink{{Name: "eth0"}, {Name: "eth1"}, {Name: "overlay.1", Tunnel: true}},
		Routes: []netstate.HostRoute{
			{Dst: p("0.0.0.0/0"), Via: a("192.0.2.254"), Link: "eth0", Multipath: true},
			{Dst: p("0.0.0.0/0"), Via: a("198.51.100.254"), Link: "eth1", Multipath: true},
			{Dst: p("192.0.2.0/24"), Link: "eth0"},
			{Dst: p("203.0.113.0/24"), Link: "eth0", Multipath: true},
			{Dst: p("203.0.113.0/24"), Link: "eth1", Multipath: true},
			{Dst: p("203.0.113.128/25"), Link: "eth1"},
			{Dst: p("10.9.0.0/16"), Link: "overlay.1"},
			{Dst: p("2001:db8::/64"), Link: "eth1"},
		},
	}.Indexed()
	for ip, want := range map[string]string{
		"192.0.2.7": "eth0", "2001:db8::7": "eth1", "203.0.113.200": "eth1",
		"8.8.8.8": "2 next hops", "203.0.113.7": "2 next hops", "10.9.0.1": "leads into the tunnel device overlay.1",
		"2001:db8:9::9": "no route",
	} {
		r, err := backend.OnLink(h, a(ip))
		if err == nil && r.Link != want || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %s, %v; want %s", ip, r.Link, err, want)
		}
	}
}
