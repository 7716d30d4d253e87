package masquerade

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/internal/nstest"
	"github.com/overlayd/overlayd/masquerade/ipset"
	"github.com/overlayd/overlayd/netstate"
)

// rig is a driver on the real iptables or nftables in a namespace of its own, whose every command is counted.
type rig struct {
	t       *testing.T
	ns      *nstest.NS
	variant Variant // of iptables
	d       *IPTables
	nft     *NFTables // instead of d, if not nil
	sets    Sets
	watch   *netstate.NFTablesWatch
	kernel  Kernel
	calls   []string
	noSets  error // of the last Ensure
}

// eachVariant runs a test on iptables-nft and on iptables-legacy, side by side.
func eachVariant(t *testing.T, test func(t *testing.T, r *rig)) {
	for _, v := range []Variant{VariantNFT, VariantLegacy} {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			test(t, newRig(t, nstest.New(t), v))
		})
	}
}

func newRig(t *testing.T, ns *nstest.NS, v Variant) *rig {
	r := &rig{t: t, ns: ns, variant: v, kernel: kernelIn(t, ns)}
	r.restart()
	return r
}

// newNFTRig is for the driver on nftables. The variant is that of the iptables beside it.
func newNFTRig(t *testing.T, ns *nstest.NS, v Variant) *rig {
	r := &rig{t: t, ns: ns, variant: v, nft: NewNFTables(0), kernel: kernelIn(t, ns)}
	r.restart()
	return r
}

func kernelIn(t testing.TB, ns *nstest.NS) *netstate.NFTables {
	t.Helper()
	var kernel *netstate.NFTables
	var err error
	ns.Do(func() { kernel, err = netstate.OpenNFTables() })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(kernel.Close)
	return kernel
}

// withSets gives the rig the kernel's sets.
func (r *rig) withSets() *rig {
	r.t.Helper()
	r.sets = ipset.New()
	r.restart()
	return r
}

// withWatch lets the rig hear of changes.
func (r *rig) withWatch() *rig {
	r.t.Helper()
	r.watch = watchIn(r.t, r.ns)
	r.restart()
	return r
}

func watchIn(t testing.TB, ns *nstest.NS) *netstate.NFTablesWatch {
	t.Helper()
	var watch *netstate.NFTablesWatch
	var err error
	ns.Do(func() {
		watch, err = netstate.WatchNFTables(func(c netstate.NFTablesChange) bool { return Concerns(c.Table, c.Chain) })
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(watch.Close)
	return watch
}

// restart gives the rig a driver that remembers nothing.
func (r *rig) restart() {
	h := host{r.counted(execRun), r.kernel}
	var m memory
	if r.watch != nil {
		m.watch = r.watch
	}
	if r.nft != nil {
		r.nft = NewNFTables(0)
		r.nft.use(h)
		r.nft.sets, r.nft.memory = r.sets, m
		return
	}
	r.d = NewIPTables(r.variant, 0)
	r.d.host, r.d.sets, r.d.memory = h, r.sets, m
}

func (r *rig) driver() Driver {
	if r.nft != nil {
		return r.nft
	}
	return r.d
}

func (r *rig) counted(run runner) runner {
	return func(ctx context.Context, stdin, name string, args ...string) (string, error) {
		r.calls = append(r.calls, name+" "+strings.Join(args, " ")+" : "+stdin)
		return run(ctx, stdin, name, args...)
	}
}

// ensure runs the driver once and returns what it put right and how many transactions that took.
func (r *rig) ensure(want ...Ruleset) ([]Drift, int) {
	r.t.Helper()
	drifts, restores, err := r.tryEnsure(want...)
	if err != nil {
		r.t.Fatal(err)
	}
	return drifts, restores
}

func (r *rig) tryEnsure(want ...Ruleset) (drifts []Drift, restores int, err error) {
	r.calls = nil
	var res Result
	r.ns.Do(func() { res, err = r.driver().Ensure(r.t.Context(), want) })
	for _, c := range r.calls {
		if strings.Contains(c, "-restore ") || strings.HasPrefix(c, "nft -f ") {
			restores++
		}
	}
	r.noSets = res.NoSets
	return res.Drifts, restores, err
}

// quiet checks that all is in place, and that to see it took no process; with iptables-legacy, at most the two listings for
// each of our chains, and the second time nothing either.
func (r *rig) quiet(want ...Ruleset) {
	r.t.Helper()
	if r.variant != VariantLegacy {
		r.silent(want...)
		return
	}
	drifts, restores := r.ensure(want...)
	chains := 0
	for _, rs := range want {
		chains += len(rs.Chains)
	}
	if len(drifts) != 0 || restores != 0 || len(r.calls) > 2*chains {
		r.t.Errorf("not quiet: %v\n%s", drifts, strings.Join(r.calls, "\n"))
	}
	for _, c := range r.calls {
		if !strings.Contains(c, " -S ") {
			r.t.Errorf("not a listing: %s", c)
		}
	}
}

// silent checks that all is in place, and that to see it took no process.
func (r *rig) silent(want ...Ruleset) {
	r.t.Helper()
	drifts, _ := r.ensure(want...)
	if len(drifts) != 0 || len(r.calls) != 0 {
		r.t.Errorf("not silent: %v\n%s", drifts, strings.Join(r.calls, "\n"))
	}
}

// remove runs the driver's Remove.
func (r *rig) remove() {
	r.t.Helper()
	r.ns.Do(func() {
		if err := r.driver().Remove(r.t.Context()); err != nil {
			r.t.Error(err)
		}
	})
}

// command names the program of a family in the variant under test.
func command(f addr.Family, v Variant) string {
	if f == addr.IPv6 {
		return "ip6tables-" + string(v)
	}
	return "iptables-" + string(v)
}

// iptables runs the real program with the words of a command line (no quoting).
func (r *rig) iptables(f addr.Family, words string) string {
	r.t.Helper()
	return r.ns.Exec(append([]string{command(f, r.variant), "-w", "20"}, strings.Fields(words)...)...)
}

// saved lists both tables of both families.
func (r *rig) saved() string {
	r.t.Helper()
	var all strings.Builder
	for _, f := range addr.Families() {
		for _, table := range []Table{NAT, Filter} {
			for line := range strings.Lines(r.iptables(f, "-t "+string(table)+" -S")) {
				if strings.HasPrefix(line, "-") {
					all.WriteString(string(table) + " " + line)
				}
			}
		}
	}
	return all.String()
}

// wanted is an input with every kind of rule but the one on a set, for which there has to be a set.
func wanted(f addr.Family) Input {
	in := Input{Tunnel: "overlay.1", Masquerade: true, Forward: true}
	if f == addr.IPv4 {
		in.Network, in.Subnet = netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("10.244.5.0/24")
		in.Node = netip.MustParseAddr("192.0.2.1")
	} else {
		in.Network, in.Subnet = netip.MustParsePrefix("fd00:10:244::/48"), netip.MustParsePrefix("fd00:10:244:5::/64")
		in.Node = netip.MustParseAddr("2001:db8::1")
	}
	in.Exclude = []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("2001:db8:3::/48")}
	return in
}

func both() []Ruleset { return []Ruleset{Rules(wanted(addr.IPv4)), Rules(wanted(addr.IPv6))} }

func kindsOf(drifts []Drift) []DriftKind {
	var kinds []DriftKind
	for _, d := range drifts {
		kinds = append(kinds, d.Kind)
	}
	slices.Sort(kinds)
	return kinds
}
