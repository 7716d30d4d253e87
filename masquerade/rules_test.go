package masquerade

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/overlayd/overlayd/addr"
)

func fullInput(f addr.Family) Input {
	in := fullDesired(f)
	in.DirectNodes, in.Bare = true, bareSubnets()
	in.Exclude = append(in.Exclude, netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("100.64.0.0/10"))
	return in
}

// bareSubnets are of several lengths, and side by side.
func bareSubnets() (out []netip.Prefix) {
	for _, s := range []string{
		"10.244.8.0/24", "10.244.9.0/24", "10.244.16.0/20", "10.244.255.128/25",
		"fd00:10:244:8::/64", "fd00:10:244:9::/64", "fd00:10:244:1000::/52",
	} {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// The golden files are what `iptables -S` prints: TestGoldenIsWhatIptablesPrints holds them against the real program.
func golden(t *testing.T, f addr.Family, got string) string {
	t.Helper()
	return goldenFile(t, "testdata/"+f.String()+".rules", got)
}

func goldenFile(t *testing.T, name, got string) string {
	t.Helper()
	if os.Getenv("OVERLAYD_UPDATE_GOLDEN") == "1" {
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(want)
}

func TestRulesGolden(t *testing.T) {
	for _, f := range addr.Families() {
		var got strings.Builder
		for _, c := range Rules(fullInput(f)).Chains {
			got.WriteString("# " + string(c.Table) + ", from " + string(c.Hook) + "\n")
			got.WriteString(strings.Join(render(c, true), "\n") + "\n")
		}
		if diff := cmp.Diff(golden(t, f, got.String()), got.String()); diff != "" {
			t.Errorf("%s:\n%s", f, diff)
		}
	}
}

func TestGoldenIsWhatIptablesPrints(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, r *rig) {
		for _, f := range addr.Families() {
			family := map[addr.Family]string{addr.IPv4: "inet", addr.IPv6: "inet6"}[f]
			r.ns.Exec("ipset", "create", nodeSet(f), "hash:ip", "family", family)
			r.ns.Exec("ipset", "create", bareSet(f), "hash:net", "family", family)
			r.ensure(Rules(fullInput(f)))
			var got strings.Builder
			for line := range strings.Lines(golden(t, f, "")) {
				if table, _, ok := strings.Cut(strings.TrimPrefix(line, "# "), ","); ok && line[0] == '#' {
					p := Places()[slices.IndexFunc(Places(), func(p Place) bool { return string(p.Table) == table })]
					got.WriteString(line)
					for l := range strings.Lines(r.iptables(f, "-t "+table+" -S "+p.Name)) {
						if strings.HasPrefix(l, "-A") {
							got.WriteString(l)
						}
					}
				}
			}
			if diff := cmp.Diff(golden(t, f, ""), got.String()); diff != "" {
				t.Errorf("%s:\n%s", f, diff)
			}
		}
	})
}

func TestRulesFollowTheInput(t *testing.T) {
	base := fullDesired(addr.IPv4)
	base.Exclude = []netip.Prefix{netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("203.0.113.0/24")}
	with := func(change func(*Input)) Ruleset {
		in := base
		change(&in)
		return Rules(in)
	}
	names := func(rs Ruleset) (out []string) {
		for _, c := range rs.Chains {
			out = append(out, c.Name)
		}
		return out
	}
	if got := names(with(func(in *Input) { in.Masquerade = false })); !slices.Equal(got, []string{"OVERLAYD-FWD"}) {
		t.Errorf("no masquerade: %v", got)
	}
	if got := names(with(func(in *Input) { in.Forward = false })); !slices.Equal(got, []string{"OVERLAYD-POSTRTG"}) {
		t.Errorf("no forward: %v", got)
	}
	if got := with(func(in *Input) { in.Masquerade, in.Forward = false, false }); got.Chains != nil ||
		got.Family != addr.IPv4 {
		t.Errorf("neither: %v", got)
	}
	bare := with(func(in *Input) { in.Tunnel, in.Node, in.Exclude, in.Subnet = "", netip.Addr{}, nil, netip.Prefix{} })
	if n := len(bare.Chains[0].Rules); n != 4 {
		t.Errorf("%d rules: %v", n, bare.Chains[0].Rules)
	}
	for _, r := range bare.Chains[0].Rules {
		if r.Verdict == Return && r.Mark == (Mark{}) && !r.Src.IsValid() && !r.Dst.IsValid() {
			t.Errorf("matches everything: %v", r)
		}
	}
	hostBits := with(func(in *Input) {
		in.Network, in.Subnet = netip.MustParsePrefix("10.244.7.9/16"), netip.MustParsePrefix("10.244.5.1/24")
		in.Exclude = slices.Clone(in.Exclude)
		slices.Reverse(in.Exclude)
	})
	if diff := cmp.Diff(Rules(base), hostBits, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

// With 5000 peers there are as many rules as with one; and no rule may need quoting beyond a pair of quotes.
func TestRulesAreFewAndPlain(t *testing.T) {
	for _, f := range addr.Families() {
		for _, c := range Rules(fullInput(f)).Chains {
			seen := map[Rule]bool{}
			for _, r := range c.Rules {
				if seen[r] || r.Comment == "" || len(r.Comment) > 80 || strings.ContainsAny(r.Comment, `"'\;{}`) {
					t.Errorf("%v", r)
				}
				seen[r] = true
			}
			if len(c.Rules) > 12 {
				t.Errorf("%s: %d rules", c.Name, len(c.Rules))
			}
		}
	}
}
