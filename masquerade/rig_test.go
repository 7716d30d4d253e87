package masquerade

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/internal/nstest"
)

// rig is a driver on the real iptables in a namespace of its own, whose every command is counted.
type rig struct {
	t       *testing.T
	ns      *nstest.NS
	variant Variant
	d       *IPTables
	calls   []string
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
	r := &rig{t: t, ns: ns, variant: v}
	r.restart()
	return r
}

// restart gives the rig a driver that remembers nothing.
func (r *rig) restart() {
	r.d = NewIPTables(r.variant, 0)
	r.d.run = r.counted(execRun)
}

func (r *rig) counted(run runner) runner {
	return func(ctx context.Context, stdin, name string, args ...string) (string, error) {
		r.calls = append(r.calls, name+" "+strings.Join(args, " "))
		return run(ctx, stdin, name, args...)
	}
}

// ensure runs the driver once and returns what it put right and how many restores that took.
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
	r.ns.Do(func() { drifts, err = r.d.Ensure(r.t.Context(), want) })
	for _, c := range r.calls {
		if strings.Contains(c, "-restore ") {
			restores++
		}
	}
	return drifts, restores, err
}

// quiet checks that all is in place, and that to see it took nothing but the two listings for each of our chains.
func (r *rig) quiet(want ...Ruleset) {
	r.t.Helper()
	drifts, restores := r.ensure(want...)
	chains := 0
	for _, rs := range want {
		chains += len(rs.Chains)
	}
	if len(drifts) != 0 || restores != 0 || len(r.calls) != 2*chains {
		r.t.Errorf("not quiet: %v\n%s", drifts, strings.Join(r.calls, "\n"))
	}
	for _, c := range r.calls {
		if !strings.Contains(c, " -S ") {
			r.t.Errorf("not a listing: %s", c)
		}
	}
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
