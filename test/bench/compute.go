package bench

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/overlayd/overlayd/backend/vxlan"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// compute measures what is pure: no kernel, no etcd.
func compute(_ context.Context, e *Env) error {
	const n = 5000
	in, err := inputFor(n)
	if err != nil {
		return err
	}
	actual := vxlan.Backend{}.Plan(in).State
	table := subnet.Table{Revision: 1, Config: in.Config, ConfigRevision: 1}
	for _, l := range in.Peers {
		table.Entries = append(table.Entries, entryOf(*l))
	}
	joined := table
	joined.Entries = append(slices.Clone(table.Entries), entryOf(peerLease(newPeer)))
	for _, t := range []subnet.Table{table, joined} {
		slices.SortFunc(t.Entries, func(a, b *subnet.Entry) int { return strings.Compare(a.Key, b.Key) })
	}
	values := make([][]byte, n)
	for i, e := range table.Entries {
		values[i] = subnet.FormatValue(e.Attrs)
	}
	var roster subnet.Roster
	turn, now := 0, time.Now()
	var problem error
	for _, x := range []struct {
		what         string
		most, allocs float64 // ms (0: any), and how many
		do           func()
	}{
		{"Plan + Diff, unchanged", 2, 60, func() {
			if d := netstate.Diff(actual, vxlan.Backend{}.Plan(in).State); len(d) > 0 {
				problem = fmt.Errorf("the plan differs from itself: %v", d[0])
			}
		}},
		{"which leases to accept, the whole table", 0, 200, func() {
			if peers, rejected := table.Peers(in.Config, in.Self); len(peers) != n || len(rejected) > 0 {
				problem = errors.New("good leases are rejected")
			}
		}},
		{"decoding the whole table", 0, 10 * n, func() {
			for i, e := range table.Entries {
				if again := subnet.ParseEntry(e.Key, values[i], 1, 1, 1); again.Err != nil {
					problem = again.Err
				}
			}
		}},
		{"choosing a subnet", 0, 100, func() {
			if _, err := subnet.Decide(table, subnet.Claim{Attrs: in.Self.Attrs}, 0); err != nil {
				problem = err
			}
		}},
		{"which leases to accept, one more or less", 0, 60, func() {
			roster.Update([]subnet.Table{table, joined}[turn%2], in.Config, in.Self, now, 0)
			turn++
		}},
	} {
		took, allocs := measure(pick(e, 31, 3), x.do)
		r := row("compute", x.what, Millis, took...).at(n)
		if x.most > 0 {
			r = r.atMost(x.most)
		}
		e.Add(r, row("compute", x.what+", allocations", Count, allocs...).at(n).atMost(x.allocs))
	}
	return problem
}

// measure times a function, and counts what it allocates. The first time does not count.
func measure(samples int, do func()) (took, allocs []float64) {
	var before, after runtime.MemStats
	do()
	for range samples {
		runtime.ReadMemStats(&before)
		began := time.Now()
		do()
		took = append(took, millis(time.Since(began)))
		runtime.ReadMemStats(&after)
		allocs = append(allocs, float64(after.Mallocs-before.Mallocs))
	}
	return took, allocs
}

func entryOf(l subnet.Lease) *subnet.Entry {
	return subnet.ParseEntry(subnet.FormatKey(l.Subnets), subnet.FormatValue(l.Attrs), 1, 1, 1)
}
