package vxlan

import (
	"fmt"
	"math"
	"net/netip"
	"testing"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

const maxVNI = 1<<24 - 1 // RFC 7348 §5

func TestDeviceNames(t *testing.T) {
	t.Parallel()
	for vni, want := range map[uint32][2]string{
		1:      {"overlay.1", "overlay-v6.1"},
		9999:   {"overlay.9999", "overlay-v6.9999"},
		10000:  {"overlay.10000", "ovl6.10000"},
		maxVNI: {"ovl.16777215", "ovl6.16777215"},
	} {
		if got := [2]string{DeviceName(addr.IPv4, vni), DeviceName(addr.IPv6, vni)}; got != want {
			t.Errorf("VNI %d: %q, want %q", vni, got, want)
		}
	}
	seen := map[string]string{}
	for vni := uint32(1); vni <= maxVNI; vni += 1 + vni/500 {
		for _, f := range addr.Families() {
			name, what := DeviceName(f, vni), fmt.Sprint(f, vni)
			if len(name) > maxDeviceName || !Owns(name) || seen[name] != "" {
				t.Fatalf("%s is %q (of %s too), owned: %v", what, name, seen[name], Owns(name))
			}
			seen[name] = what
		}
	}
}

func TestOwns(t *testing.T) {
	t.Parallel()
	for _, name := range []string{
		"", ".", "overlay", "overlay.", "overlay.x", "overlay.01", "overlay.+1", "overlay.-1", "overlay.1.2", "overlay.1 ",
		" overlay.1", "Overlay.1",
		"overlay.16777216", "overlay.16777215", "ovl.1", "ovl6.1", "ovl6.9999", "overlay-v6.10000", "overlay-v4.1",
		"flannel.1",
		"vxlan.1", "overlay_1",
	} {
		if Owns(name) {
			t.Errorf("%q is taken for ours", name)
		}
	}
}

func TestMACs(t *testing.T) {
	t.Parallel()
	c := subnet.Config{Backend: subnet.Backend{Type: subnet.VXLAN, VNI: 1}}
	c.Pools.V4.Network, c.Pools.V6.Network = netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00::/48")
	seen := map[addr.MAC]string{}
	for i := range 5000 {
		for _, vni := range []uint32{1, 2} {
			c.Backend.VNI = vni
			id := subnet.Identity{NodeName: fmt.Sprint("node-", i), NodeID: "machine"}
			vteps := Backend{}.VTEPs(c, id)
			if vteps != (Backend{}).VTEPs(c, id) {
				t.Fatalf("%v has two answers", id)
			}
			for _, f := range addr.Families() {
				m, what := vteps.Get(f).MAC, fmt.Sprint(id, f, vni)
				if m.IsGroup() || m[0]&2 == 0 || seen[m] != "" || vteps.Get(f).VNI != vni {
					t.Fatalf("%s: %s, which %q has too", what, m, seen[m])
				}
				seen[m] = what
			}
		}
	}
	// What stands in leases already must not change.
	c.Backend.VNI = 1
	got := Backend{}.VTEPs(c, subnet.Identity{NodeName: "a", NodeID: "b"}).V4.MAC.String()
	if want := "fa:df:2c:f0:60:d9"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	c.Pools.V6 = subnet.Pool{}
	if v := (Backend{}).VTEPs(c, subnet.Identity{NodeName: "a"}); v.V6 != (subnet.VTEP{}) || v.V4.MAC.IsZero() {
		t.Errorf("a family not in use: %v", v)
	}
}

// TestLargestPacketFits: what the overhead leaves is what the headers of RFC 7348 §5 take: outer IP, UDP, VXLAN, inner
// Ethernet.
func TestLargestPacketFits(t *testing.T) {
	t.Parallel()
	for f, ip := range map[addr.Family]int{addr.IPv4: 20, addr.IPv6: 40} {
		if got := (subnet.Backend{Type: subnet.VXLAN}).Overhead(f); got != ip+8+8+14 {
			t.Errorf("%s: %d", f, got)
		}
	}
}

func BenchmarkPlan(b *testing.B) {
	for _, n := range []int{5000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			in := manyPeers(n)
			b.ReportAllocs()
			for b.Loop() {
				if p := (Backend{}).Plan(in); len(p.State.Routes) != 2*n {
					b.Fatal(len(p.State.Routes))
				}
			}
		})
	}
}

func manyPeers(n int) backend.Input {
	c := subnet.Config{Backend: subnet.Backend{Type: subnet.VXLAN, VNI: 1, Port: 8472}}
	c.Pools.V4.Network = netip.MustParsePrefix("10.0.0.0/8")
	node := func(i int) subnet.Lease {
		hi, lo := byte(i>>8), byte(i)
		l := subnet.Lease{Attrs: subnet.Attrs{
			Backend: subnet.VXLAN, PublicIPLocal: true,
			Identity: subnet.Identity{NodeName: fmt.Sprint("node-", i), NodeID: "machine"},
		}}
		l.Subnets.V4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, hi, lo, 0}), 24)
		l.PublicIP.V4 = netip.AddrFrom4([4]byte{172, 16, hi, lo})
		l.VTEP = Backend{}.VTEPs(c, l.Identity)
		return l
	}
	in := backend.Input{Config: c, Self: node(math.MaxUint16), Host: netstate.Host{IPv6: true}.Indexed()}
	in.Underlay.V4 = backend.Underlay{Device: "eth0", Addr: in.Self.PublicIP.V4, MTU: 1500}
	for i := range n {
		in.Peers = append(in.Peers, new(node(i)))
	}
	return in
}

// A site's route that covers the pods' network would keep the IPv6 stack from taking a peer's gateway.
func TestIPv6GatewayBesideASiteRoute(t *testing.T) {
	t.Parallel()
	c, err := subnet.ParseConfig([]byte(`{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/48"}`))
	if err != nil {
		t.Fatal(err)
	}
	gw := netip.MustParseAddr("fd00:10:244:5::")
	peer := subnet.Lease{Attrs: subnet.Attrs{Backend: subnet.VXLAN}}
	peer.Subnets.V6, peer.PublicIP.V6 = netip.PrefixFrom(gw, 64), netip.MustParseAddr("2001:db8::5")
	for _, tt := range []struct {
		route string
		want  int
	}{{"::/0", 1}, {"fd00::/8", 2}} {
		h := netstate.Host{Routes: []netstate.HostRoute{{Dst: netip.MustParsePrefix(tt.route), Link: "eth0"}}}.Indexed()
		got := Backend{}.Plan(backend.Input{Config: c, Peers: []*subnet.Lease{&peer}, Host: h}).State.Routes
		if len(got) != tt.want || got[len(got)-1].Dst != addr.Host(gw) && tt.want == 2 {
			t.Errorf("beside %s: %v", tt.route, got)
		}
	}
}
