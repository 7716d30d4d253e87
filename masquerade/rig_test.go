package masquerade

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/masquerade/ipset"
	"github.com/overlayd/overlayd/test/nstest"
)

// rig is a driver on the real iptables or nftables in a namespace of its own, whose every run of iptables is counted.
type rig struct {
	t       *testing.T
	ns      *nstest.NS
	variant Variant // of iptables
	native  bool    // the driver on nftables
	driver  *driver
	sets    Sets
	run     runner        // for iptables-restore
	wait    time.Duration // for the xtables lock
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
	r := &rig{t: t, ns: ns, variant: v, wait: lockWait, run: execRun}
	r.restart()
	return r
}

// newNFTRig is for the driver on nftables. The variant is that of the iptables beside it.
func newNFTRig(t *testing.T, ns *nstest.NS, v Variant) *rig {
	r := &rig{t: t, ns: ns, variant: v, wait: lockWait, run: execRun, native: true}
	r.restart()
	return r
}

// withSets gives the rig the kernel's sets.
func (r *rig) withSets() *rig {
	r.t.Helper()
	r.sets = ipset.New()
	r.restart()
	return r
}

// restart gives the rig a driver that knows nothing.
func (r *rig) restart() {
	o := Options{Kind: KindIPTables, Variant: r.variant, Sets: r.sets}
	if r.native {
		o.Kind = KindNFTables
	}
	r.driver = newDriver(o, r.open)
}

// open counts what the tables start.
func (r *rig) open(ctx context.Context, f addr.Family, v Variant) (*tables, error) {
	t, err := openTables(r.wait)(ctx, f, v)
	if err != nil {
		return nil, err
	}
	t.run = func(ctx context.Context, stdin, name string, args ...string) (string, error) {
		r.calls = append(r.calls, name+" "+strings.Join(args, " ")+" : "+stdin)
		return r.run(ctx, stdin, name, args...)
	}
	return t, nil
}

// ensure runs the driver once and returns what it repaired and how many runs of iptables-restore that took.
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
	r.ns.Do(func() { res, err = r.driver.Ensure(r.t.Context(), per(want)) })
	for _, c := range r.calls {
		if strings.Contains(c, "-restore ") {
			restores++
		}
	}
	r.noSets = res.NoSets
	return res.Drifts, restores, err
}

// quiet checks that all is in place, and that it took no process to know; with iptables-legacy, at most the two
// listings for each of our chains.
func (r *rig) quiet(want ...Ruleset) {
	r.t.Helper()
	drifts, restores := r.ensure(want...)
	chains := 0
	for _, rs := range want {
		if chains += len(rs.Chains); r.variant != VariantLegacy {
			chains = 0
		}
	}
	if len(drifts) != 0 || restores != 0 || len(r.calls) > 2*chains {
		r.t.Errorf("not quiet: %v\n%s", drifts, strings.Join(r.calls, "\n"))
	}
}

// remove takes everything of ours away.
func (r *rig) remove() {
	r.t.Helper()
	r.ns.Do(func() {
		if err := remove(r.t.Context(), r.sets, r.open); err != nil {
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

// fullDesired is an input with every kind of rule but the one on a set, for which there has to be a set.
func fullDesired(f addr.Family) Input {
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

func both() []Ruleset { return []Ruleset{Rules(fullDesired(addr.IPv4)), Rules(fullDesired(addr.IPv6))} }

// per is the rulesets by their families.
func per(rulesets []Ruleset) (out addr.Per[Ruleset]) {
	for _, rs := range rulesets {
		out.Set(rs.Family, rs)
	}
	return out
}

func kindsOf(drifts []Drift) []DriftKind {
	var kinds []DriftKind
	for _, d := range drifts {
		kinds = append(kinds, d.Kind)
	}
	slices.Sort(kinds)
	return kinds
}

func sorted(kinds []DriftKind) []DriftKind {
	kinds = slices.Clone(kinds)
	slices.Sort(kinds)
	return kinds
}
