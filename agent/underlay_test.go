package agent

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// testHost is a node with two networks, a container bridge, a pod bridge, and a device that is down.
func testHost() netstate.Host {
	p, a := netip.MustParsePrefix, netip.MustParseAddr
	return netstate.Host{
		Links: []netstate.HostLink{
			{Name: "lo", MTU: 65536, Up: true, Loopback: true},
			{Name: "eth0", MTU: 1500, Up: true},
			{Name: "eth1", MTU: 9000, Up: true},
			{Name: "eth2", MTU: 1500},
			{Name: "docker0", MTU: 1500, Up: true},
			{Name: "cni0", MTU: 1450, Up: true},
		},
		Addresses: []netstate.HostAddress{
			{Link: "lo", Prefix: p("127.0.0.1/8")},
			{Link: "eth0", Prefix: p("192.0.2.10/24")},
			{Link: "eth0", Prefix: p("192.0.2.11/24")},
			{Link: "eth0", Prefix: p("fe80::1/64")},
			{Link: "eth0", Prefix: p("2001:db8::99/64"), Fleeting: true},
			{Link: "eth0", Prefix: p("2001:db8::10/64")},
			{Link: "eth1", Prefix: p("198.51.100.10/24")},
			{Link: "eth2", Prefix: p("203.0.113.10/24")},
			{Link: "docker0", Prefix: p("172.17.0.1/16")},
			{Link: "cni0", Prefix: p("10.244.5.1/24")},
		},
		Routes: []netstate.HostRoute{
			{Dst: p("0.0.0.0/0"), Via: a("198.51.100.1"), Link: "eth1", Metric: 200},
			{Dst: p("0.0.0.0/0"), Via: a("192.0.2.1"), Link: "eth0", Metric: 100},
			{Dst: p("::/0"), Via: a("fe80::ff"), Link: "eth0", Metric: 1024},
			{Dst: p("192.0.2.0/24"), Link: "eth0"},
			{Dst: p("198.51.100.0/24"), Link: "eth1"},
		},
	}.Indexed()
}

func config(t *testing.T, json string) subnet.Config {
	t.Helper()
	c, err := subnet.ParseConfig([]byte(json))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

const (
	onlyV4 = `{"Network":"10.244.0.0/16"}`
	dual   = `{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48"}`
)

func TestChoose(t *testing.T) {
	t.Parallel()
	a := netip.MustParseAddr
	regex := func(s string) []*regexp.Regexp { return []*regexp.Regexp{regexp.MustCompile(s)} }
	for name, tt := range map[string]struct {
		o      InterfaceOptions
		config string
		want   string // device and address of each family
		public string
		local  bool
		fails  string // or: what the error says
	}{
		"default route with the lowest metric": {config: onlyV4, want: "eth0 192.0.2.10", public: "192.0.2.10", local: true},
		"both families": {
			config: dual, want: "eth0 192.0.2.10 eth0 2001:db8::10",
			public: "192.0.2.10 2001:db8::10", local: true,
		},
		"by name": {
			o: InterfaceOptions{Names: []string{"eth1"}}, config: onlyV4,
			want: "eth1 198.51.100.10", public: "198.51.100.10", local: true,
		},
		"first name that fits": {
			o:      InterfaceOptions{Names: []string{"eth9", "eth2", "lo", "eth1"}},
			config: onlyV4, want: "eth1 198.51.100.10", public: "198.51.100.10", local: true,
		},
		"by second address": {
			o: InterfaceOptions{Names: []string{"192.0.2.11"}}, config: onlyV4,
			want: "eth0 192.0.2.11", public: "192.0.2.11", local: true,
		},
		"by an address of one family": {
			o: InterfaceOptions{Names: []string{"192.0.2.11"}}, config: dual,
			want: "eth0 192.0.2.11 eth0 2001:db8::10", public: "192.0.2.11 2001:db8::10", local: true,
		},
		"by pattern of the name": {
			o: InterfaceOptions{Regexes: regex("^eth[12]$")}, config: onlyV4,
			want: "eth1 198.51.100.10", public: "198.51.100.10", local: true,
		},
		"by pattern, where no name fits": {o: InterfaceOptions{
			Names:   []string{"eth9", "eth2"},
			Regexes: regex("^eth1$"),
		}, config: onlyV4, want: "eth1 198.51.100.10", public: "198.51.100.10", local: true},
		"a name comes before a pattern": {
			o:      InterfaceOptions{Names: []string{"eth1"}, Regexes: regex("^eth0$")},
			config: onlyV4, want: "eth1 198.51.100.10", public: "198.51.100.10", local: true,
		},
		"by pattern of the address": {
			o: InterfaceOptions{Regexes: regex(`^198\.51\.`)}, config: onlyV4,
			want: "eth1 198.51.100.10", public: "198.51.100.10", local: true,
		},
		"by what it reaches": {
			o: InterfaceOptions{CanReach: a("198.51.100.77")}, config: onlyV4,
			want: "eth1 198.51.100.10", public: "198.51.100.10", local: true,
		},
		"behind NAT": {
			o:      InterfaceOptions{PublicIP: addr.Per[netip.Addr]{V4: a("203.0.113.77")}},
			config: onlyV4, want: "eth0 192.0.2.10", public: "203.0.113.77",
		},
		"public IP is a second address": {
			o:      InterfaceOptions{PublicIP: addr.Per[netip.Addr]{V4: a("192.0.2.11")}},
			config: onlyV4, want: "eth0 192.0.2.11", public: "192.0.2.11", local: true,
		},
		"no such device": {
			o: InterfaceOptions{Names: []string{"eth9"}}, config: onlyV4,
			fails: "device eth9 does not exist",
		},
		"no such address": {
			o: InterfaceOptions{Names: []string{"192.0.2.99"}}, config: onlyV4,
			fails: "--iface 192.0.2.99",
		},
		"device is down": {
			o: InterfaceOptions{Names: []string{"eth2"}}, config: onlyV4,
			fails: "eth2 is down",
		},
		"only addresses inside the overlay": {
			o: InterfaceOptions{Names: []string{"cni0"}}, config: onlyV4,
			fails: "inside the overlay network 10.244.0.0/16",
		},
		"the loopback device alone": {
			o: InterfaceOptions{Names: []string{"lo"}}, config: onlyV4,
			fails: "loopback",
		},
		"no address of the family": {
			o: InterfaceOptions{Names: []string{"eth1"}}, config: dual,
			fails: "eth1 has no usable IPv6 address",
		},
		"nothing matches the pattern": {o: InterfaceOptions{Regexes: regex("^wlan")}, config: onlyV4, fails: "--iface-regex"},
		"no way there": {
			o: InterfaceOptions{CanReach: a("2001:db8:1::1"), Names: nil}, config: onlyV4,
			want: "eth0 192.0.2.10", public: "192.0.2.10", local: true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := config(t, tt.config)
			got, err := Choose(testHost(), tt.o, c, addr.Per[netip.Addr]{})
			if tt.fails != "" {
				if err == nil || !strings.Contains(err.Error(), tt.fails) {
					t.Fatalf("got %+v, %v, want an error that says %q", got, err, tt.fails)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var have, public []string
			for _, f := range c.Families() {
				u := got.Underlay.Get(f)
				have = append(have, u.Device, u.Addr.String())
				public = append(public, got.PublicIP.Get(f).String())
			}
			if s := strings.Join(have, " "); s != tt.want {
				t.Errorf("got %s, want %s", s, tt.want)
			}
			if s := strings.Join(public, " "); s != tt.public || got.PublicIPLocal != tt.local {
				t.Errorf("public IP %s, local %v; want %s, %v", s, got.PublicIPLocal, tt.public, tt.local)
			}
			if got.Reason == "" {
				t.Error("no reason is given")
			}
			if got.ByDefault != strings.Contains(got.Reason, "default route") {
				t.Errorf("by the default route: %v, but %s", got.ByDefault, got.Reason)
			}
		})
	}
}

// An interface that the store names takes the place of all flags that choose one.
func TestWithNodeSettings(t *testing.T) {
	t.Parallel()
	flags := InterfaceOptions{
		Names: []string{"eth0"}, Regexes: []*regexp.Regexp{regexp.MustCompile("eth0")},
		CanReach: netip.MustParseAddr("192.0.2.1"),
	}
	flags.PublicIP.V6 = netip.MustParseAddr("2001:db8::10")
	for _, tt := range []struct{ device, v4, v6, want, fails string }{
		{want: "eth0 2001:db8::10"},
		{device: "eth1,eth0", want: "eth1 2001:db8::10"},
		{device: "198.51.100.10", v6: "2001:db8::7", want: "eth1 2001:db8::7"},
		{v4: "203.0.113.1", want: "eth0 2001:db8::10"},
		{device: ", ", fails: "d: expected interfaces"},
		{v4: "eth0", fails: "4: expected an IPv4 address"},
		{v4: "0.0.0.0", fails: "4: expected an IPv4 address"},
		{v6: "192.0.2.1", fails: "6: expected an IPv6 address"},
		{v6: "fe80::1%eth0", fails: "6: expected an IPv6 address"},
	} {
		s := subnet.NodeSettings{Interface: subnet.Setting{Name: "d", Value: tt.device}}
		s.PublicIP = addr.Per[subnet.Setting]{V4: subnet.Setting{Name: "4", Value: tt.v4}, V6: subnet.Setting{Name: "6", Value: tt.v6}}
		o, err := flags.With(s)
		if tt.fails != "" {
			if err == nil || !strings.Contains(err.Error(), tt.fails) {
				t.Errorf("%+v: %v", tt, err)
			}
			continue
		}
		c, chooseErr := Choose(testHost(), o, config(t, onlyV4), addr.Per[netip.Addr]{})
		if got := c.Underlay.V4.Device + " " + o.PublicIP.V6.String(); err != nil || chooseErr != nil || got != tt.want {
			t.Errorf("%+v: %s, %v, %v", tt, got, err, chooseErr)
		}
	}
}

// uplinkHost is a node with two uplinks, an address of its own on the loopback device and one on a dummy device, and
// our tunnel devices.
func uplinkHost(routes ...netstate.HostRoute) netstate.Host {
	p := netip.MustParsePrefix
	return netstate.Host{
		Links: []netstate.HostLink{
			{Name: "lo", Kind: "device", MTU: 65536, Up: true, Loopback: true},
			{Name: "eth0", AltNames: "enp1s0\nenx0123", Kind: "device", MTU: 9000, Up: true},
			{Name: "eth1", Kind: "device", MTU: 1500, Up: true},
			{Name: "eth2", Kind: "device", MTU: 1400, Up: true},
			{Name: "bare0", Kind: "device", MTU: 1500, Up: true},
			{Name: "bare1", Kind: "device", MTU: 1400, Up: true},
			{Name: "down0", Kind: "device", MTU: 1300},
			{Name: "dummy0", Kind: "dummy", MTU: 1500, Up: true},
			{Name: "br0", Kind: "bridge", MTU: 1500, Up: true},
			{Name: "cni0", Kind: "bridge", MTU: 1450, Up: true},
			{Name: "veth0", Kind: "veth", Master: "cni0", MTU: 1450, Up: true},
			{Name: "port0", Kind: "device", Master: "br0", MTU: 1500, Up: true},
			{Name: "red", Kind: "vrf", MTU: 65536, Up: true},
			{Name: "red0", Kind: "device", Master: "red", MTU: 1500, Up: true},
			{Name: "overlay.1", Kind: "vxlan", MTU: 1450, Up: true, Tunnel: true},
			{Name: "overlay-v6.1", Kind: "vxlan", MTU: 1430, Up: true, Tunnel: true},
		},
		Addresses: []netstate.HostAddress{
			{Link: "lo", Prefix: p("127.0.0.1/8")},
			{Link: "lo", Prefix: p("::1/128")},
			{Link: "lo", Prefix: p("10.255.0.5/32")},
			{Link: "lo", Prefix: p("2001:db8:ff::5/128")},
			{Link: "eth0", Prefix: p("192.0.2.10/24")},
			{Link: "eth0", Prefix: p("192.0.2.11/24")},
			{Link: "eth0", Prefix: p("10.64.0.11/24")},
			{Link: "eth0", Prefix: p("2001:db8::10/64")},
			{Link: "eth0", Prefix: p("2001:db8::11/64")},
			{Link: "eth0", Prefix: p("2001:db8:64::11/64")},
			{Link: "eth1", Prefix: p("198.51.100.10/24")},
			{Link: "eth1", Prefix: p("2001:db8:1::10/64")},
			{Link: "eth2", Prefix: p("203.0.113.10/24")},
			{Link: "eth2", Prefix: p("2001:db8:2::10/64"), Fleeting: true},
			{Link: "bare0", Prefix: p("fe80::1/64")},
			{Link: "bare1", Prefix: p("fe80::2/64")},
			{Link: "dummy0", Prefix: p("10.255.1.5/32")},
			{Link: "dummy0", Prefix: p("2001:db8:fe::5/128")},
			{Link: "cni0", Prefix: p("10.244.5.1/24")},
			{Link: "cni0", Prefix: p("192.168.77.9/24")},
			{Link: "br0", Prefix: p("10.244.5.2/24")},
			{Link: "br0", Prefix: p("192.0.2.77/24")},
			{Link: "red0", Prefix: p("192.0.2.88/24")},
			{Link: "overlay.1", Prefix: p("10.244.5.0/32"), Tunnel: true},
			{Link: "overlay.1", Prefix: p("192.0.2.99/24"), Tunnel: true},
			{Link: "overlay-v6.1", Prefix: p("2001:db8::99/64"), Tunnel: true},
		},
		Routes: routes,
	}.Indexed()
}

// route is one of the main table as `ip route` writes it: "default via A dev D src S metric M"; several next hops are
// one behind the other.
func route(t *testing.T, texts ...string) (out []netstate.HostRoute) {
	t.Helper()
	for _, text := range texts {
		words := strings.Fields(text)
		r := netstate.HostRoute{Multipath: len(texts) > 1}
		for i := 1; i < len(words); i += 2 {
			switch v := words[i+1]; words[i] {
			case "via":
				r.Via = netip.MustParseAddr(v)
			case "dev":
				r.Link = v
			case "src":
				r.Src = netip.MustParseAddr(v)
			case "metric":
				r.Metric = uint32(len(v)) // the longer, the higher
			}
		}
		r.Dst = netip.MustParsePrefix(map[string]string{"default": "0.0.0.0/0", "default6": "::/0"}[words[0]] +
			strings.TrimPrefix(strings.TrimPrefix(words[0], "default6"), "default"))
		out = append(out, r)
	}
	return out
}

func TestChooseAmongRoutes(t *testing.T) {
	t.Parallel()
	const onlyV6 = `{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/48"}`
	type routes = [][]string
	one4, one6 := []string{"default via 192.0.2.1 dev eth0"}, []string{"default6 via fe80::fe dev eth0"}
	two4 := []string{"default via 192.0.2.1 dev eth0", "default via 198.51.100.1 dev eth1"}
	two6 := []string{"default6 via fe80::fe dev eth0", "default6 via fe80::fe dev eth1"}
	bare4 := []string{"default via fe80::fe dev bare0 src 10.255.0.5", "default via fe80::fe dev bare1 src 10.255.0.5"}
	bare6 := []string{
		"default6 via fe80::fe dev bare0 src 2001:db8:ff::5",
		"default6 via fe80::fe dev bare1 src 2001:db8:ff::5",
	}
	iface := func(names ...string) InterfaceOptions { return InterfaceOptions{Names: names} }
	public := func(v4, v6 string) (o InterfaceOptions) {
		o.PublicIP.V4, _ = netip.ParseAddr(v4)
		o.PublicIP.V6, _ = netip.ParseAddr(v6)
		return o
	}
	reach := func(ip string) InterfaceOptions { return InterfaceOptions{CanReach: netip.MustParseAddr(ip)} }
	for name, tt := range map[string]struct {
		o       InterfaceOptions
		config  string
		routes  routes
		current string
		want    string // device ("-": none), address, MTU
		fails   string
	}{
		"several uplinks":       {config: onlyV4, routes: routes{two4}, want: "- 192.0.2.10 1500"},
		"several uplinks, IPv6": {config: onlyV6, routes: routes{two6}, want: "- 2001:db8::10 1500"},
		"several uplinks, the current address": {
			config: onlyV4, routes: routes{two4}, current: "198.51.100.10",
			want: "- 198.51.100.10 1500",
		},
		"several uplinks, a preferred source": {
			config: onlyV4,
			routes: routes{{two4[0] + " src 198.51.100.10", two4[1] + " src 198.51.100.10"}}, want: "- 198.51.100.10 1500",
		},
		"several gateways on one device": {
			config: onlyV4,
			routes: routes{{one4[0], "default via 192.0.2.2 dev eth0"}}, want: "eth0 192.0.2.10 9000",
		},
		"one uplink of two is down": {
			config: onlyV4,
			routes: routes{{"default via 192.0.2.1 dev down0", two4[1]}}, want: "- 198.51.100.10 1300",
		},
		"all uplinks are down": {
			config: onlyV4, routes: routes{{"default via 192.0.2.1 dev down0"}},
			fails: "down0 is down",
		},
		"unnumbered uplinks":       {config: onlyV4, routes: routes{bare4}, want: "- 10.255.0.5 1400"},
		"unnumbered uplinks, IPv6": {config: onlyV6, routes: routes{bare6}, want: "- 2001:db8:ff::5 1400"},
		"one unnumbered uplink":    {config: onlyV4, routes: routes{bare4[:1]}, want: "- 10.255.0.5 1500"},
		"unnumbered, and no source": {
			config: onlyV6, routes: routes{{"default6 via fe80::fe dev bare0"}},
			want: "- 2001:db8:ff::5 1500",
		},
		"the addresses are lost for a moment": {
			config: onlyV6, routes: routes{{"default6 via fe80::fe dev bare0"}},
			current: "2001:db8::77", fails: "bare0 has no usable IPv6 address",
		},
		"lo": {
			o: iface("lo"), config: onlyV4, routes: routes{two4},
			want: "- 10.255.0.5 1500",
		},
		"lo, IPv6": {
			o: iface("lo"), config: onlyV6, routes: routes{bare6},
			want: "- 2001:db8:ff::5 1400",
		},
		"lo, with routes to single networks": {
			o: iface("lo"), config: onlyV4,
			routes: routes{{"10.255.0.0/16 via fe80::fe dev bare1"}}, want: "- 10.255.0.5 1400",
		},
		"lo, without a route": {o: iface("lo"), config: onlyV4, fails: "no route leads from lo"},
		"address on lo": {
			o: iface("10.255.0.5"), config: onlyV4, routes: routes{bare4},
			want: "- 10.255.0.5 1400",
		},
		"address on lo, IPv6": {
			o: iface("2001:db8:ff::5"), config: onlyV6, routes: routes{two6},
			want: "- 2001:db8:ff::5 1500",
		},
		"address on lo of one family": {
			o: iface("10.255.0.5"), config: dual, routes: routes{bare4, bare6},
			want: "- 10.255.0.5 1400 - 2001:db8:ff::5 1400",
		},
		"public IP on lo": {
			o: public("10.255.0.5", "2001:db8:ff::5"), config: dual,
			routes: routes{bare4, bare6}, want: "- 10.255.0.5 1400 - 2001:db8:ff::5 1400",
		},
		"address on a dummy device": {
			o: iface("10.255.1.5"), config: onlyV4, routes: routes{bare4},
			want: "- 10.255.1.5 1400",
		},
		"a dummy device by name": {
			o: iface("dummy0"), config: onlyV4, routes: routes{bare4},
			want: "dummy0 10.255.1.5 1500",
		},
		"an unnumbered device by name": {
			o: iface("bare1"), config: onlyV4, routes: routes{bare4},
			want: "- 10.255.0.5 1400",
		},
		"127.0.0.1": {
			o: iface("127.0.0.1"), config: onlyV4, routes: routes{one4},
			fails: "127.0.0.1 is a loopback address, unreachable from other nodes",
		},
		"public IP of a second device": {
			o: public("198.51.100.10", "2001:db8:1::10"), config: dual,
			routes: routes{one4, one6}, want: "eth1 198.51.100.10 1500 eth1 2001:db8:1::10 1500",
		},
		"public IP of a second device, one family": {
			o: public("198.51.100.10", ""), config: dual, routes: routes{one4, one6},
			want: "eth1 198.51.100.10 1500 eth0 2001:db8::10 9000",
		},
		"public IP beside --iface": {o: InterfaceOptions{
			Names:    []string{"eth0"},
			PublicIP: public("198.51.100.10", "").PublicIP,
		}, config: onlyV4, routes: routes{one4}, want: "eth0 192.0.2.10 9000"},
		"public IP by NAT": {
			o: public("192.0.2.200", ""), config: onlyV4, routes: routes{one4},
			want: "eth0 192.0.2.10 9000",
		},
		"public IP that is gone": {
			o: public("192.0.2.200", ""), config: onlyV4, routes: routes{one4},
			current: "192.0.2.200", fails: "--public-ip 192.0.2.200 is no longer on any device",
		},
		"preferred source": {
			config: onlyV4,
			routes: routes{{"default via 192.0.2.1 dev eth0 src 10.64.0.11"}}, want: "eth0 10.64.0.11 9000",
		},
		"preferred source, IPv6": {
			config: onlyV6,
			routes: routes{{"default6 via fe80::fe dev eth0 src 2001:db8:64::11"}}, want: "eth0 2001:db8:64::11 9000",
		},
		"preferred source that is new": {
			config: onlyV4,
			routes: routes{{"default via 192.0.2.1 dev eth0 src 10.64.0.11"}}, current: "192.0.2.10",
			want: "eth0 10.64.0.11 9000",
		},
		"preferred source of a named device": {
			o: iface("eth0"), config: onlyV4,
			routes: routes{{"default via 192.0.2.1 dev eth0 src 10.64.0.11"}}, want: "eth0 10.64.0.11 9000",
		},
		"address beside a preferred source": {
			o: iface("192.0.2.11"), config: onlyV4,
			routes: routes{{"default via 192.0.2.1 dev eth0 src 10.64.0.11"}}, want: "eth0 192.0.2.11 9000",
		},
		"public IP beside a preferred source": {
			o: public("192.0.2.11", ""), config: onlyV4,
			routes: routes{{"default via 192.0.2.1 dev eth0 src 10.64.0.11"}}, want: "eth0 192.0.2.11 9000",
		},
		"preferred source inside the overlay": {
			config: onlyV4,
			routes: routes{{"default via 192.0.2.1 dev eth0 src 10.244.5.0"}}, want: "eth0 192.0.2.10 9000",
		},
		"address in the gateway's network": {
			config: onlyV4, routes: routes{{"default via 10.64.0.1 dev eth0"}},
			want: "eth0 10.64.0.11 9000",
		},
		"current address": {
			config: onlyV4, routes: routes{one4}, current: "192.0.2.11",
			want: "eth0 192.0.2.11 9000",
		},
		"can reach": {
			o: reach("8.8.8.8"), config: onlyV4,
			routes: routes{one4, {"8.0.0.0/8 via 198.51.100.1 dev eth1"}}, want: "eth1 198.51.100.10 1500",
		},
		"can reach, preferred source": {
			o: reach("8.8.8.8"), config: onlyV4,
			routes: routes{one4, {"8.0.0.0/8 via 192.0.2.1 dev eth0 src 10.64.0.11"}}, want: "eth0 10.64.0.11 9000",
		},
		"can reach, the connected network": {
			o: reach("10.64.0.9"), config: onlyV4,
			routes: routes{one4, {"10.64.0.0/24 dev eth0 src 10.64.0.11"}}, want: "eth0 10.64.0.11 9000",
		},
		"can reach, the other family": {
			o: reach("8.8.8.8"), config: dual,
			routes: routes{
				{"default via 192.0.2.1 dev eth0 src 10.64.0.11"},
				{"default6 via fe80::fe dev eth0 src 2001:db8:64::11"},
			},
			want: "eth0 10.64.0.11 9000 eth0 2001:db8:64::11 9000",
		},
		"can reach by several": {
			o: reach("2001:db8:9::9"), config: onlyV6, routes: routes{two6},
			want: "- 2001:db8::10 1500",
		},
		"can reach from lo": {
			o: reach("8.8.8.8"), config: onlyV4, routes: routes{bare4},
			want: "- 10.255.0.5 1400",
		},
		"default route by our own device": {
			config: onlyV4,
			routes: routes{{"default via 192.0.2.98 dev overlay.1"}, {one4[0] + " metric xx"}}, want: "eth0 192.0.2.10 9000",
		},
		"no other default route": {
			config: onlyV4, routes: routes{{"default dev overlay.1"}},
			fails: "overlay.1 is a tunnel device of overlayd itself",
		},
		"no other default route, IPv6": {
			config: onlyV6, routes: routes{{"default6 via fe80::1 dev overlay-v6.1"}},
			fails: "overlay-v6.1 is a tunnel device of overlayd itself",
		},
		"default route by the pods' bridge": {
			config: onlyV4,
			routes: routes{{"default via 192.168.77.1 dev cni0"}, {one4[0] + " metric xx"}}, want: "eth0 192.0.2.10 9000",
		},
		"the pods' bridge alone": {
			config: onlyV4, routes: routes{{"default via 192.168.77.1 dev cni0"}},
			fails: "cni0 is the pod bridge",
		},
		"the pods' bridge by name": {
			o: iface("cni0"), config: onlyV4, routes: routes{one4},
			want: "cni0 192.168.77.9 1450",
		},
		"pods on the uplink's bridge": {
			config: onlyV4, routes: routes{{"default via 192.0.2.1 dev br0"}},
			want: "br0 192.0.2.77 1500",
		},
		"our own device by name": {
			o: iface("overlay.1"), config: onlyV4, routes: routes{one4},
			fails: "overlay.1 is a tunnel device of overlayd itself",
		},
		"our own device by its address": {
			o: iface("192.0.2.99"), config: onlyV4, routes: routes{one4},
			fails: "overlay.1 is a tunnel device of overlayd itself",
		},
		"our own device as the public IP": {
			o: public("192.0.2.99", ""), config: onlyV4, routes: routes{one4},
			fails: "overlay.1 is a tunnel device of overlayd itself",
		},
		"our own device by pattern": {o: InterfaceOptions{Regexes: []*regexp.Regexp{regexp.MustCompile(
			"^overlay|^eth1")}}, config: onlyV4, routes: routes{one4}, want: "eth1 198.51.100.10 1500"},
		"lo does not leave by our own device": {
			o: iface("lo"), config: onlyV4,
			routes: routes{{"default dev overlay.1"}, {one4[0] + " metric xx"}}, want: "- 10.255.0.5 9000",
		},
		"alternative name": {
			o: iface("enx0123"), config: dual, routes: routes{one4, one6},
			want: "eth0 192.0.2.10 9000 eth0 2001:db8::10 9000",
		},
		"alternative name by pattern": {
			o:      InterfaceOptions{Regexes: []*regexp.Regexp{regexp.MustCompile("^enp1")}},
			config: onlyV4, routes: routes{one4}, want: "eth0 192.0.2.10 9000",
		},
		"name as ip prints it": {
			o: iface("eth0@if5"), config: onlyV4, routes: routes{one4},
			fails: "device eth0@if5 does not exist: its name is eth0",
		},
		"alternative name as ip prints it": {
			o: iface("enp1s0@if5"), config: onlyV4, routes: routes{one4},
			fails: "its name is enp1s0",
		},
		"no device at all": {
			o: iface("eth9@if5"), config: onlyV4, routes: routes{one4},
			fails: "device eth9@if5 does not exist",
		},
		"port of a bridge": {
			o: iface("port0"), config: onlyV4, routes: routes{one4},
			fails: "port0 has no usable IPv4 address: it is a port of br0; use that device",
		},
		"in a VRF": {
			o: iface("red0"), config: onlyV4, routes: routes{one4},
			fails: "red0 is in the VRF red",
		},
		"only a deprecated address": {
			o: iface("eth2"), config: onlyV6, routes: routes{one6},
			fails: "the address 2001:db8:2::10 of eth2 is tentative, deprecated or temporary",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var all []netstate.HostRoute
			for _, hops := range tt.routes {
				all = append(all, route(t, hops...)...)
			}
			var current addr.Per[netip.Addr]
			if ip, err := netip.ParseAddr(tt.current); err == nil {
				current.Set(addr.FamilyOf(ip), ip)
			}
			c := config(t, tt.config)
			got, err := Choose(uplinkHost(all...), tt.o, c, current)
			if tt.fails != "" {
				if err == nil || !strings.Contains(err.Error(), tt.fails) {
					t.Fatalf("got %+v, %v, want an error that says %q", got, err, tt.fails)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got.ByDefault != strings.Contains(got.Reason, "default route") {
				t.Errorf("by the default route: %v, but %s", got.ByDefault, got.Reason)
			}
			var have []string
			for _, f := range c.Families() {
				u := got.Underlay.Get(f)
				if u.Device == "" {
					u.Device = "-"
				}
				have = append(have, u.Device, u.Addr.String(), strconv.Itoa(u.MTU))
			}
			if s := strings.Join(have, " "); s != tt.want {
				t.Errorf("got %s (%s), want %s", s, got.Reason, tt.want)
			}
		})
	}
}

// The pod MTU follows the narrowest device by which packets leave towards a peer, and no other.
func TestNarrowest(t *testing.T) {
	t.Parallel()
	c := config(t, dual)
	peer := func(v4, v6 string) *subnet.Lease {
		l := &subnet.Lease{}
		l.PublicIP.V4, _ = netip.ParseAddr(v4)
		l.PublicIP.V6, _ = netip.ParseAddr(v6)
		return l
	}
	near, far, v6 := peer("192.0.2.20", ""), peer("203.0.113.20", ""), peer("", "2001:db8:2::20")
	h := uplinkHost(append(append(append(route(t, "default via 192.0.2.1 dev eth0"), route(t, "192.0.2.0/24 dev eth0")...),
		route(t, "203.0.113.0/24 via 192.0.2.1 dev eth0", "203.0.113.0/24 via 198.51.100.1 dev eth2")...),
		append(route(t, "2001:db8:2::/64 dev eth1"), route(t, "10.244.5.0/24 dev bare1")...)...)...)
	for _, tt := range []struct {
		f     addr.Family
		peers []*subnet.Lease
		want  int
	}{
		{addr.IPv4, nil, 9000},
		{addr.IPv4, []*subnet.Lease{near, v6}, 9000},
		{addr.IPv4, []*subnet.Lease{near, far}, 1400},
		{addr.IPv6, []*subnet.Lease{near, far, v6}, 1500},
		{addr.IPv6, []*subnet.Lease{near, far}, 9000},
	} {
		if got := narrowest(h, c, tt.f, 9000, func() []*subnet.Lease { return tt.peers }); got != tt.want {
			t.Errorf("%s, %d peers: %d, want %d", tt.f, len(tt.peers), got, tt.want)
		}
	}
}

// Routes by which the tunnel's packets would enter the tunnel are named, unless another one comes before them.
func TestRoutesIntoTheTunnel(t *testing.T) {
	t.Parallel()
	direct := route(t, "default via 192.0.2.1 dev eth0 metric xx")
	desired := netstate.State{FDB: []netstate.FDBEntry{{Link: "overlay.1", Dst: netip.MustParseAddr("203.0.113.7")}}}
	for _, tt := range []struct{ route, want string }{
		{"default via 192.0.2.98 dev overlay.1", "ip route del 0.0.0.0/0 dev overlay.1 metric 0"},
		{"default6 dev overlay-v6.1", "ip -6 route del ::/0 dev overlay-v6.1 metric 0"},
		{"default dev overlay.1 metric xxx", ""},
		{"128.0.0.0/1 dev overlay.1", "ip route del 128.0.0.0/1 dev overlay.1"},
		{"203.0.113.0/24 dev overlay.1", "ip route del 203.0.113.0/24 dev overlay.1"},
		{"198.51.100.0/24 dev overlay.1", ""},
		{"203.0.113.0/24 via 192.0.2.1 dev eth0", ""},
	} {
		err := shadowed(uplinkHost(append(route(t, tt.route), direct...)...), desired)
		if got := fmt.Sprint(err); tt.want != "" && !strings.Contains(got, tt.want) || (tt.want == "") != (err == nil) {
			t.Errorf("%s: %v, want %q", tt.route, err, tt.want)
		}
	}
}
