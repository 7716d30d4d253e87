package bench

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/overlayd/overlayd/backend"
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
	table := tableOf(in)
	actual := vxlan.Backend{}.Plan(in).State
	joined := subnet.Table{Config: in.Config, Entries: slices.Concat(table.Entries[:n/2], []*subnet.Entry{entryOf(peerLease(newPeer))}, table.Entries[n/2:])}
	slices.SortFunc(joined.Entries, byKey)
	values := make([][]byte, n)
	for i, e := range table.Entries {
		values[i] = subnet.FormatValue(e.Attrs)
	}
	var problem error
	for _, x := range []struct {
		what   string
		bound  Bound
		allocs float64
		do     func()
	}{
		{"Plan + Diff, unchanged", AtMost(2), 60, func() {
			if d := netstate.Diff(actual, vxlan.Backend{}.Plan(in).State); len(d) > 0 {
				problem = fmt.Errorf("the plan differs from itself: %v", d[0])
			}
		}},
		{"which leases to believe, the whole table", Bound{}, 100, func() {
			if peers, refused := table.Peers(in.Config, in.Self); len(peers) != n || len(refused) > 0 {
				problem = errors.New("good leases are refused")
			}
		}},
		{"decoding the whole table", Bound{}, 10 * n, func() {
			for i, e := range table.Entries {
				if again := subnet.ParseEntry(e.Key, values[i], 1, 1, 1); again.Err != nil {
					problem = again.Err
				}
			}
		}},
		{"choosing a subnet", Bound{}, 100, func() {
			if _, err := subnet.Decide(table, subnet.Claim{Attrs: in.Self.Attrs}, 0); err != nil {
				problem = err
			}
		}},
	} {
		took, allocs := measure(pick(e, 31, 3), x.do)
		e.Add(Row{Group: "compute", Name: peers(n) + ": " + x.what, Unit: Millis, Ours: took, Bound: x.bound},
			Row{Group: "compute", Name: peers(n) + ": " + x.what + ", allocations", Unit: Count, Ours: allocs, Bound: AtMost(x.allocs)})
	}
	e.Add(rosterRows(e, table, joined, in)...)
	return problem
}

// rosterRows are what one join costs of what is pure.
func rosterRows(e *Env, table, joined subnet.Table, in backend.Input) []Row {
	var r subnet.Roster
	now := time.Now()
	r.Update(table, in.Config, in.Self, now, 0)
	next := false
	took, allocs := measure(pick(e, 101, 3), func() {
		if next = !next; next {
			r.Update(joined, in.Config, in.Self, now, 0)
		} else {
			r.Update(table, in.Config, in.Self, now, 0)
		}
	})
	for i := range took {
		took[i] *= 1000
	}
	return []Row{
		{Group: "compute", Name: peers(len(table.Entries)) + ": which leases to believe, one more or less", Unit: Micros, Ours: took},
		{Group: "compute", Name: peers(len(table.Entries)) + ": the same, allocations", Unit: Count, Ours: allocs, Bound: AtMost(60)},
	}
}

// measure times a function, and counts what it allocates.
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

func tableOf(in backend.Input) subnet.Table {
	t := subnet.Table{Revision: 1, Config: in.Config, ConfigRevision: 1}
	for _, l := range in.Peers {
		t.Entries = append(t.Entries, entryOf(*l))
	}
	slices.SortFunc(t.Entries, byKey)
	return t
}

func byKey(a, b *subnet.Entry) int { return strings.Compare(a.Key, b.Key) }

func entryOf(l subnet.Lease) *subnet.Entry {
	return subnet.ParseEntry(subnet.FormatKey(l.Subnets), subnet.FormatValue(l.Attrs), 1, 1, 1)
}
