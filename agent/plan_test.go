package agent

import (
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// Peers that come and go one after another leave the node as planning everything anew would.
func TestAdjustedIsWhatWouldBePlanned(t *testing.T) {
	const directConfig = `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}`
	for _, network := range []string{onlyV4, directConfig} {
		inRig(t, func(r *rig) {
			g := rand.New(rand.NewPCG(118, 7))
			present := map[int]bool{}
			for step := range 300 {
				for range 1 + g.IntN(3) {
					i := 1 + g.IntN(20)
					present[i] = !present[i]
				}
				var entries []*subnet.Entry
				for i, there := range present {
					if e := peer(i); there {
						if g.IntN(12) == 0 {
							e.PublicIP = peer(1).PublicIP // a dispute
						}
						entries = append(entries, e)
					}
				}
				r.table(network, entries...)
				r.sleep(time.Duration(g.IntN(3)) * time.Second)

				in := r.agent.planned.input
				in.Peers = r.agent.roster.Peers()
				plan := backendOf(in.Config.Backend.Type).Plan(in)
				want := netstate.Merge(plan.State, netstate.State{Sysctls: r.agent.settings()})
				if got := locked(r.kernel, func(k *fakeKernel) netstate.State { return k.want }); !reflect.DeepEqual(got, want) {
					t.Fatalf("step %d: to do to get to the plan: %v", step, netstate.Diff(got, want))
				}
				if nodes := r.agent.planned.direct.V4; len(nodes) != len(plan.DirectNodes.V4) || slices.ContainsFunc(nodes, func(ip netip.Addr) bool { return !slices.Contains(plan.DirectNodes.V4, ip) }) {
					t.Fatalf("step %d: direct nodes %v, want %v", step, nodes, plan.DirectNodes.V4)
				}
			}
			if n := locked(r.kernel, func(k *fakeKernel) int { return k.adjusted }); n < 100 {
				t.Errorf("in %d of 300 steps only what changed was looked at", n)
			}
		})
	}
}
