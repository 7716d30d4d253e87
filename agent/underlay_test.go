package agent

import (
	"net/netip"
	"regexp"
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
		"both families":                        {config: dual, want: "eth0 192.0.2.10 eth0 2001:db8::10", public: "192.0.2.10 2001:db8::10", local: true},
		"by name":                              {o: InterfaceOptions{Names: []string{"eth1"}}, config: onlyV4, want: "eth1 198.51.100.10", public: "198.51.100.10", local: true},
		"first name that fits":                 {o: InterfaceOptions{Names: []string{"eth9", "eth2", "lo", "eth1"}}, config: onlyV4, want: "eth1 198.51.100.10", public: "198.51.100.10", local: true},
		"by second address":                    {o: InterfaceOptions{Names: []string{"192.0.2.11"}}, config: onlyV4, want: "eth0 192.0.2.11", public: "192.0.2.11", local: true},
		"by an address of one family":          {o: InterfaceOptions{Names: []string{"192.0.2.11"}}, config: dual, want: "eth0 192.0.2.11 eth0 2001:db8::10", public: "192.0.2.11 2001:db8::10", local: true},
		"by pattern of the name":               {o: InterfaceOptions{Regexes: regex("^eth[12]$")}, config: onlyV4, want: "eth1 198.51.100.10", public: "198.51.100.10", local: true},
		"by pattern of the address":            {o: InterfaceOptions{Regexes: regex(`^198\.51\.`)}, config: onlyV4, want: "eth1 198.51.100.10", public: "198.51.100.10", local: true},
		"by what it reaches":                   {o: InterfaceOptions{CanReach: a("198.51.100.77")}, config: onlyV4, want: "eth1 198.51.100.10", public: "198.51.100.10", local: true},
		"behind NAT":                           {o: InterfaceOptions{PublicIP: addr.Per[netip.Addr]{V4: a("203.0.113.77")}}, config: onlyV4, want: "eth0 192.0.2.10", public: "203.0.113.77"},
		"public IP is a second address":        {o: InterfaceOptions{PublicIP: addr.Per[netip.Addr]{V4: a("192.0.2.11")}}, config: onlyV4, want: "eth0 192.0.2.11", public: "192.0.2.11", local: true},
		"no such device":                       {o: InterfaceOptions{Names: []string{"eth9"}}, config: onlyV4, fails: "there is no device eth9"},
		"no such address":                      {o: InterfaceOptions{Names: []string{"192.0.2.99"}}, config: onlyV4, fails: "--iface 192.0.2.99"},
		"device is down":                       {o: InterfaceOptions{Names: []string{"eth2"}}, config: onlyV4, fails: "eth2 is down"},
		"only addresses inside the overlay":    {o: InterfaceOptions{Names: []string{"cni0"}}, config: onlyV4, fails: "inside the overlay network 10.244.0.0/16"},
		"loopback":                             {o: InterfaceOptions{Names: []string{"lo"}}, config: onlyV4, fails: "loopback"},
		"no address of the family":             {o: InterfaceOptions{Names: []string{"eth1"}}, config: dual, fails: "eth1 has no IPv6 address to use"},
		"nothing matches the pattern":          {o: InterfaceOptions{Regexes: regex("^wlan")}, config: onlyV4, fails: "--iface-regex"},
		"no way there":                         {o: InterfaceOptions{CanReach: a("2001:db8:1::1"), Names: nil}, config: onlyV4, want: "eth0 192.0.2.10", public: "192.0.2.10", local: true},
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
		})
	}
}
