package netstate

import (
	"errors"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/nstest"
)

// A survey tells devices apart, who is a port of whom, and what is ours.
func TestLook(t *testing.T) {
	t.Parallel()
	node, other := nstest.New(t), nstest.New(t)
	nstest.Link(node, "eth0", other, "eth0")
	node.Addr("eth0", "192.0.2.1/24")
	node.Exec("sh", "-ec",
		`ip link add br0 type bridge; ip link add v0 type veth peer name v1; ip link set v0 master br0 up; ip link set br0 up
ip link add overlay.1 type vxlan id 1 dstport 8472 local 192.0.2.1 dev eth0; ip link set overlay.1 up; ip address add 10.244.1.0/32 dev overlay.1
ip route add 10.244.2.0/24 via 10.244.2.0 dev overlay.1 onlink proto 118 metric 7; ip route add 10.9.0.0/16 via 192.0.2.2`)
	var s Survey
	var err error
	node.Do(func() { s, err = Look(func(name string) bool { return name == "overlay.1" }) })
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]SurveyLink{
		"br0": {HostLink: HostLink{Kind: "bridge"}}, "v0": {HostLink: HostLink{Kind: "veth", Master: "br0"}},
		"eth0": {HostLink: HostLink{Kind: "veth"}, Carrier: true}, "lo": {HostLink: HostLink{Kind: "device"}, Carrier: true},
		"overlay.1": {HostLink: HostLink{Kind: "vxlan", Tunnel: true}, Carrier: true},
	} {
		got, there := s.Link(name)
		if !there || got.Kind != want.Kind || got.Master != want.Master || got.Tunnel != want.Tunnel ||
			want.Carrier && !got.Carrier {
			t.Errorf("%s: %+v", name, got)
		}
	}
	o, _ := s.Link("overlay.1")
	if o.VXLAN.VNI != 1 || o.VXLAN.Underlay != "eth0" || o.MAC.IsZero() ||
		!slices.Contains(o.Offloads, Offload{"gso", true}) || !slices.Contains(o.Offloads, Offload{"tx", true}) {
		t.Errorf("%+v", o)
	}
	if len(s.Ours.Routes) != 1 || len(s.Ours.Addresses) != 1 || !slices.ContainsFunc(s.Host.Routes,
		func(r HostRoute) bool { return r.Dst.String() == "10.9.0.0/16" }) {
		t.Errorf("ours %+v, the host's %+v", s.Ours, s.Host.Routes)
	}
}

// What is tried leaves nothing where it was tried from.
func TestTrial(t *testing.T) {
	t.Parallel()
	node := nstest.New(t)
	before := node.Exec("ip", "-br", "link")
	var tried, outside error
	node.Do(func() {
		outside = InTrial(func() {
			for _, f := range addr.Families() {
				tried = errors.Join(tried, TryVXLAN(f))
			}
			if again := TryVXLAN(addr.IPv4); !errors.Is(again, unix.EEXIST) {
				tried = errors.Join(tried, errors.New("a second one with the same settings was made"))
			}
		})
	})
	if tried != nil || outside != nil {
		t.Error(tried, outside)
	}
	if after := node.Exec("ip", "-br", "link"); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}
