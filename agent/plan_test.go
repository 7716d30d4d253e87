package agent

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

const dualDirect = `{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48",
	"Backend":{"Type":"vxlan","DirectRouting":true}}`

// dualPeer is a peer in both families. Of five, one is behind a gateway in IPv4, and another one in IPv6.
func dualPeer(i int) *subnet.Entry {
	v4, v6 := "192.0.2", "2001:db8:"
	switch i % 5 {
	case 1:
		v4 = "203.0.113"
	case 2:
		v6 = "2001:db8:1:"
	}
	value := fmt.Sprintf(`{"PublicIP":"%s.%d","PublicIPv6":"%s:%d","BackendType":"vxlan",`+
		`"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:04:%02x"},"BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:06:%02x"},`+
		`"NodeName":"n%d","NodeID":"id%d","PublicIPLocal":true}`, v4, 100+i, v6, 100+i, i, i, i, i)
	key := fmt.Sprintf("10.244.%d.0-24&fd00:10:244:%d::-64", 100+i, 100+i)
	return subnet.ParseEntry(key, []byte(value), int64(i), int64(i), 1)
}

// Peers that come and go one after another leave the node as planning everything anew would.
func TestAdjustedIsWhatWouldBePlanned(t *testing.T) {
	for _, network := range []struct {
		config string
		peer   func(int) *subnet.Entry
		always []int
	}{
		{config: onlyV4, peer: peer},
		{config: `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}`, peer: peer},
		{config: dualDirect, peer: dualPeer},
		{config: dualDirect, peer: dualPeer, always: []int{21, 22}}, // both rules are needed, but by no single peer
	} {
		inRig(t, func(r *rig) {
			host := testHost()
			host.Routes = append(host.Routes, netstate.HostRoute{Dst: netip.MustParsePrefix("2001:db8::/64"), Link: "eth0"})
			r.host(host)
			g := rand.New(rand.NewPCG(118, 7))
			present := map[int]bool{}
			for step := range 300 {
				for range 1 + g.IntN(3) {
					i := 1 + g.IntN(20)
					present[i] = !present[i]
				}
				var entries []*subnet.Entry
				for _, i := range network.always {
					present[i] = true
				}
				for i, there := range present {
					if e := network.peer(i); there {
						if g.IntN(12) == 0 {
							e.PublicIP = network.peer(1).PublicIP // a dispute
						}
						entries = append(entries, e)
					}
				}
				r.table(network.config, entries...)
				r.sleep(time.Duration(g.IntN(3)) * time.Second)

				in := r.agent.peers.planned.input
				in.Peers = r.agent.peers.roster.Peers()
				plan := backendOf(in.Config.Backend.Type).Plan(in)
				want := plan.State
				want.Sysctls = append(want.Sysctls, sysctls(r.agent.opts, in.Config, in.Host)...)
				want.Sort()
				if got := locked(r.kernel, func(k *fakeKernel) netstate.State { return k.want }); !reflect.DeepEqual(got, want) {
					t.Fatalf("step %d: to do to get to the plan: %v", step, netstate.Diff(got, want))
				}
				for _, f := range in.Config.Families() {
					direct := []netip.Addr{}
					for _, p := range plan.Paths {
						if p.Kind == backend.Direct && p.Family == f {
							direct = append(direct, p.Peer.PublicIP.Get(f))
						}
					}
					if nodes, _ := r.agent.peers.nodes(f); !slices.Equal(nodes, direct) {
						t.Fatalf("step %d: direct nodes %v, want %v", step, nodes, direct)
					}
				}
			}
			if n := locked(r.kernel, func(k *fakeKernel) int { return k.adjusted }); n < 100 {
				t.Errorf("%s: in %d of 300 steps only what changed was looked at", network.config, n)
			}
		})
	}
}

// Pods reach a node without SNAT if there is no tunnel between, and its lease has the node's own address: of a peer
// behind a NAT, it is that of another machine.
func TestNodes(t *testing.T) {
	const (
		v4, v6 = `"Network":"10.244.0.0/16"`, `"EnableIPv6":true,"IPv6Network":"fd00:10:244::/48"`
		only6  = `"EnableIPv4":false,` + v6
		vxlan  = `"Backend":{"Type":"vxlan"}`
		direct = `"Backend":{"Type":"vxlan","DirectRouting":true}`
		hostGW = `"Backend":{"Type":"host-gw"}`
	)
	for _, c := range []struct {
		network, backend string
		want             addr.Per[string] // the nodes, and the subnets behind the tunnel of peers behind a NAT
	}{
		{v4, vxlan, addr.Per[string]{V4: "[] [10.244.113.0/24 10.244.116.0/24]", V6: "[] []"}},
		{v4, direct, addr.Per[string]{V4: "[192.0.2.110 192.0.2.112] [10.244.116.0/24]", V6: "[] []"}},
		{v4, hostGW, addr.Per[string]{V4: "[192.0.2.110 192.0.2.112] []", V6: "[] []"}},
		{only6, direct, addr.Per[string]{V4: "[] []", V6: "[2001:db8::110 2001:db8::111] []"}},
		{only6, hostGW, addr.Per[string]{V4: "[] []", V6: "[2001:db8::110 2001:db8::111] []"}},
		{v4 + "," + v6, vxlan, addr.Per[string]{
			V4: "[] [10.244.113.0/24 10.244.116.0/24]", V6: "[] [fd00:10:244:113::/64 fd00:10:244:116::/64]",
		}},
		{v4 + "," + v6, direct, addr.Per[string]{
			V4: "[192.0.2.110 192.0.2.112] [10.244.116.0/24]", V6: "[2001:db8::110 2001:db8::111] []",
		}},
		{v4 + "," + v6, hostGW, addr.Per[string]{
			V4: "[192.0.2.110 192.0.2.112] []", V6: "[2001:db8::110 2001:db8::111] []",
		}},
	} {
		network := "{" + c.network + "," + c.backend + "}"
		config, err := subnet.ParseConfig([]byte(network))
		if err != nil {
			t.Fatal(err)
		}
		host := testHost()
		host.Routes = append(host.Routes, netstate.HostRoute{Dst: netip.MustParsePrefix("2001:db8::/64"), Link: "eth0"})
		in := backend.Input{Config: config, Host: host.Indexed()}
		p := peers{}
		// 10 is near, 11 behind a gateway in IPv4, 12 in IPv6. Behind a NAT are 13, which is near, and 16, as 11 is.
		var entries []*subnet.Entry
		for _, i := range []int{10, 11, 12, 13, 16} {
			e := dualPeer(i)
			e.PublicIPLocal = i < 13
			e.Backend = config.Backend.Type
			for _, f := range addr.Families() {
				if config.Pools.Get(f).Network == (netip.Prefix{}) {
					e.Subnets.Set(f, netip.Prefix{})
				}
			}
			entries = append(entries, e)
		}
		p.roster.Update(subnet.Table{Config: config, Entries: entries}, config, subnet.Lease{}, time.Now(), 0)
		p.paths.follow(step{come: planFor(in, p.roster.Peers()...), all: true})
		for _, f := range addr.Families() {
			nodes, bare := p.nodes(f)
			if got := fmt.Sprint(nodes, bare); got != c.want.Get(f) {
				t.Errorf("%s, %s: %s, want %s; rejected: %v", network, f, got, c.want.Get(f), p.roster.Rejected())
			}
		}
	}
}
