package lab

import (
	"encoding/json"
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/addr"
)

func options(t *testing.T, change func(*Options)) Options {
	t.Helper()
	var o Options
	if change != nil {
		change(&o)
	}
	o, err := o.Defaults()
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Validate(); err != nil {
		t.Fatal(err)
	}
	return o
}

func TestTopologyOfTheDefaults(t *testing.T) {
	top := NewTopology(options(t, nil))
	want := []string{
		"lab-router", "lab-internet", "lab-etcd", "lab-seg1", "lab-seg2",
		"lab-n1", "lab-n1-p1", "lab-n1-p2", "lab-n2", "lab-n2-p1", "lab-n2-p2", "lab-n3", "lab-n3-p1", "lab-n3-p2",
	}
	if got := top.Namespaces(); !slices.Equal(got, want) {
		t.Errorf("namespaces %v, want %v", got, want)
	}
	n2 := top.Nodes[1]
	if n2.Segment != 2 || n2.Addr.V4 != netip.MustParseAddr("172.31.2.12") || n2.Addr.V6.IsValid() {
		t.Errorf("n2 is in segment %d with %v", n2.Segment, n2.Addr)
	}
	if via := n2.Routes[0].Via; via != netip.MustParseAddr("172.31.2.1") {
		t.Errorf("n2 goes out via %s", via)
	}
	if got := top.EtcdURLs(); !slices.Equal(got, []string{"http://172.31.100.2:2379"}) {
		t.Errorf("etcd at %v", got)
	}
}

// Whatever the options, no two interfaces share an address, every gateway is a router's address, and every cable end is
// used once.
func TestTopologyIsSound(t *testing.T) {
	for _, stack := range []Stack{StackIPv4, StackDual, StackIPv6} {
		for _, segments := range []int{1, 2} {
			top := NewTopology(options(t, func(o *Options) { o.Stack, o.Segments, o.Nodes = stack, segments, maxNodes }))
			checkSound(t, top)
		}
	}
}

func checkSound(t *testing.T, top Topology) {
	t.Helper()
	owner := map[netip.Addr]string{}
	for _, h := range underlayHosts(top) {
		for _, i := range h.Interfaces {
			if len(i.Addrs) != len(top.Options.Stack.Families()) {
				t.Errorf("%s/%s has the addresses %v", h.Name, i.Name, i.Addrs)
			}
			for _, p := range i.Addrs {
				if owner[p.Addr()] != "" {
					t.Errorf("%s belongs to %s and %s", p.Addr(), owner[p.Addr()], h.Name)
				}
				owner[p.Addr()] = h.Name
			}
		}
	}
	for _, h := range underlayHosts(top) {
		for _, r := range h.Routes {
			if owner[r.Via] != "router" {
				t.Errorf("%s goes to %s via %s, which is %q", h.Name, r.Dst, r.Via, owner[r.Via])
			}
		}
	}
	ports := map[Port]bool{}
	for _, c := range top.Cables {
		for _, p := range []Port{c.A, c.B} {
			if ports[p] || len(p.Name) > 15 {
				t.Errorf("port %v used twice, or its name is too long for a link", p)
			}
			ports[p] = true
		}
	}
}

func TestNodeIDsDiffer(t *testing.T) {
	seen := map[string]bool{}
	for _, name := range []string{"lab", "lab-2"} {
		for _, n := range NewTopology(options(t, func(o *Options) { o.Name = name })).Nodes {
			if len(n.ID) != 32 || seen[n.ID] {
				t.Errorf("%s of %s has the id %q", n.Name, name, n.ID)
			}
			seen[n.ID] = true
		}
	}
}

func TestFind(t *testing.T) {
	top := NewTopology(options(t, func(o *Options) { o.Name = "x" }))
	for name, want := range map[string]string{
		"n1": "x-n1", "n3-p2": "x-n3-p2", "router": "x-router", "internet": "x-internet", "etcd": "x-etcd", "seg2": "x-seg2",
		"n4": "", "n1-p3": "", "x-n1": "", "": "",
	} {
		if got, ok := top.Find(name); got != want || ok != (want != "") {
			t.Errorf("Find(%q) = %q, %v", name, got, ok)
		}
	}
}

func TestExpectedPath(t *testing.T) {
	for _, c := range []struct {
		name        string
		change      func(*Options)
		same, other Path // n1 to n3, and n1 to n2
	}{
		{"vxlan", nil, PathTunnel, PathTunnel},
		{"direct", func(o *Options) { o.Direct = true }, PathDirect, PathTunnel},
		{"host-gw", func(o *Options) { o.Backend = HostGW }, PathDirect, PathDirect},
	} {
		top := NewTopology(options(t, c.change))
		n := top.Nodes
		if same, other := top.ExpectedPath(n[0], n[2]), top.ExpectedPath(n[0], n[1]); same != c.same || other != c.other {
			t.Errorf("%s: same segment %s, other segment %s", c.name, same, other)
		}
	}
}

func TestNetworkConfig(t *testing.T) {
	for _, c := range []struct {
		change func(*Options)
		want   string
	}{
		{nil, `{"Network":"10.244.0.0/16","SubnetLen":24,"Backend":{"Type":"vxlan","VNI":1,"Port":8472,"DirectRouting":false}}`},
		{func(o *Options) { o.Backend = HostGW }, `{"Network":"10.244.0.0/16","SubnetLen":24,"Backend":{"Type":"host-gw"}}`},
		{
			func(o *Options) { o.Stack, o.Direct = StackIPv6, true },
			`{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","IPv6SubnetLen":64,` +
				`"Backend":{"Type":"vxlan","VNI":1,"Port":8472,"DirectRouting":true}}`,
		},
	} {
		b, err := NewTopology(options(t, c.change)).NetworkConfig()
		if err != nil {
			t.Fatal(err)
		}
		var got, want any
		if err := errors.Join(json.Unmarshal(b, &got), json.Unmarshal([]byte(c.want), &want)); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got  %s\nwant %s", b, c.want)
		}
	}
}

func TestValidateNamesEveryFlag(t *testing.T) {
	o := Options{Name: "Lab!", Nodes: -1, Pods: maxPods + 1, Segments: 3, Backend: "wire", Stack: "ipx"}
	err := o.Validate()
	for _, flag := range []string{"--name", "--nodes", "--pods", "--segments", "--backend", "--stack"} {
		if err == nil || !strings.Contains(err.Error(), flag) {
			t.Errorf("no word of %s in: %v", flag, err)
		}
	}
	for _, change := range []func(*Options){
		func(o *Options) { o.Segments = 2 },
		func(o *Options) { o.Direct = true },
	} {
		o := options(t, func(o *Options) { o.Backend = HostGW })
		change(&o)
		if o.Validate() == nil {
			t.Errorf("host-gw accepted with %d segments, direct %v", o.Segments, o.Direct)
		}
	}
}

func TestNamespacePattern(t *testing.T) {
	ours := namespacePattern("lab")
	for name, want := range map[string]bool{
		"lab-n1": true, "lab-n12-p3": true, "lab-seg1": true, "lab-router": true, "lab-etcd": true, "lab-internet": true,
		"lab": false, "lab-2-n1": false, "lab-nginx": false, "xlab-n1": false, "lab-n1-n1": false, "lab-n1-router": false,
	} {
		if ours.MatchString(name) != want {
			t.Errorf("%q belongs to lab: want %v", name, want)
		}
	}
	for _, o := range []Options{options(t, nil), options(t, func(o *Options) { o.Stack, o.Nodes = StackDual, 12 })} {
		for _, ns := range NewTopology(o).Namespaces() {
			if !ours.MatchString(ns) {
				t.Errorf("%q would not be cleaned up", ns)
			}
		}
	}
}

func TestSubnetEnv(t *testing.T) {
	const text = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.5.1/24\nFLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n" +
		"FLANNEL_IPV6_NETWORK=fd00:10:244::/48\nFLANNEL_IPV6_SUBNET=fd00:10:244:5::1/64\n"
	env, err := ParseSubnetEnv(text, StackDual.Families())
	if err != nil {
		t.Fatal(err)
	}
	if env.MTU != 1430 || env.PodAddr(addr.IPv4, 0) != netip.MustParsePrefix("10.244.5.2/24") ||
		env.PodAddr(addr.IPv6, 1) != netip.MustParsePrefix("fd00:10:244:5::3/64") {
		t.Errorf("got %+v", env)
	}
	for _, bad := range []string{
		"", "FLANNEL_SUBNET=10.244.5.1/24\n", "FLANNEL_MTU=1430\n",
		"FLANNEL_SUBNET=fd00::1/64\nFLANNEL_MTU=1430\n", "FLANNEL_SUBNET=10.244.5.1/24\nFLANNEL_MTU=-1\n",
	} {
		if _, err := ParseSubnetEnv(bad, StackIPv4.Families()); err == nil {
			t.Errorf("accepted %q", bad)
		}
	}
}
