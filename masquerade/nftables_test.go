package masquerade

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/nstest"
)

func withNodes(f addr.Family, nodes ...string) Ruleset {
	in := fullInput(f)
	for _, n := range nodes {
		in.Nodes = append(in.Nodes, netip.MustParseAddr(n))
	}
	return Rules(in)
}

func bothWithNodes() []Ruleset {
	return []Ruleset{
		withNodes(addr.IPv4, "192.168.3.10", "192.168.3.9"),
		withNodes(addr.IPv6, "2001:db8:2::2", "2001:db8:2::1", "2001:db8:2::"),
	}
}

// ruleset is all that nft shows, in an order of its own: nft's is the one in which the tables were made.
func (r *rig) ruleset() string {
	r.t.Helper()
	tables := strings.SplitAfter(r.ns.Exec("nft", "list", "ruleset"), "\n}\n")
	slices.Sort(tables)
	return strings.Join(tables, "")
}

// nftDamage is what damages our table. %s is the family, ip or ip6, and %d its digit.
func nftDamage() map[string]struct {
	line string
	want DriftKind
} {
	return map[string]struct {
		line string
		want DriftKind
	}{
		"table deleted": {"delete table %s overlayd", ChainMissing},
		"chain flushed": {"flush chain %s overlayd postrouting", RulesChanged},
		"table flushed": {"flush table %s overlayd", RulesChanged},
		"rule inserted": {"insert rule %s overlayd postrouting accept", RulesChanged},
		"rule appended": {"add rule %s overlayd postrouting udp dport 53 accept", RulesChanged},
		"foreign chain": {"add chain %s overlayd mine", RulesChanged},
		"foreign base chain": {
			"add chain %s overlayd mine { type filter hook forward priority 0 ; policy drop ; }",
			RulesChanged,
		},
		"foreign set":     {"add set %s overlayd mine { type inet_service ; }", RulesChanged},
		"foreign map":     {"add map %s overlayd mine { type inet_service : verdict ; }", RulesChanged},
		"foreign counter": {"add counter %s overlayd mine", RulesChanged},
		"dormant":         {"add table %s overlayd { flags dormant ; }", RulesChanged},
		"policy":          {"add chain %s overlayd postrouting { policy drop ; }", RulesChanged},
		"members flushed": {"flush set %s overlayd overlayd-nodes%d", SetChanged},
	}
}

func TestNFTDriftIsRepaired(t *testing.T) {
	t.Parallel()
	r := newNFTRig(t, nstest.New(t), VariantNFT)
	r.ns.Exec("nft", "add table ip foreign { chain c { type nat hook postrouting priority srcnat ; ip saddr 10.0.0.0/8 masquerade ; } ; }")
	foreign := r.ruleset()
	want := bothWithNodes()
	if first, _ := r.ensure(want...); len(first) != 2 {
		t.Errorf("first: %v", first)
	}
	intact := r.ruleset()
	r.quiet(want...)
	damage := func(name, line string, kinds ...DriftKind) {
		r.ns.Exec("nft", line)
		drifts, _ := r.ensure(want...)
		if diff := cmp.Diff(kinds, kindsOf(drifts)); diff != "" {
			t.Errorf("%s: %v", name, drifts)
		}
		r.quiet(want...)
		if diff := cmp.Diff(intact, r.ruleset()); diff != "" {
			t.Errorf("%s: repaired to something else:\n%s", name, diff)
		}
	}
	for f, family := range map[string]string{"4": "ip", "6": "ip6"} {
		for name, c := range nftDamage() {
			line := strings.NewReplacer("%s", family, "%d", f).Replace(c.line)
			damage(family+" "+name, line, c.want)
		}
	}
	damage("member added", "add element ip overlayd overlayd-nodes4 { 192.0.2.77 }", SetChanged)
	damage("member deleted", "delete element ip overlayd overlayd-nodes4 { 192.168.3.9 }", SetChanged)
	damage("reordered", "insert rule ip overlayd postrouting ip saddr 10.244.0.0/16 ip daddr @overlayd-nodes4 return "+
		`comment "pod to a node directly" ; delete rule ip overlayd postrouting handle `+r.handle("ip", 3), RulesChanged)
	damage("rule replaced", "replace rule ip overlayd postrouting handle "+r.handle("ip",
		1)+" ip saddr 10.244.0.0/16 accept", RulesChanged)
	r.ns.Exec("nft", "flush ruleset")
	if drifts, _ := r.ensure(want...); len(drifts) != 2 {
		t.Errorf("all flushed: %v", drifts)
	}
	if diff := cmp.Diff(strings.Replace(intact, foreign, "", 1), r.ruleset()); diff != "" {
		t.Errorf("repaired to something else:\n%s", diff)
	}
	r.restart()
	r.quiet(want...) // what the kernel has is what is desired, whoever wrote it
}

// One network more or less changes the set and no rule, also where one takes the place of a larger one, or of several.
func TestBareSubnetsFollow(t *testing.T) {
	t.Parallel()
	for name, make := range map[string]func(*testing.T, *nstest.NS, Variant) *rig{
		"iptables": newRig,
		"nftables": newNFTRig,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := make(t, nstest.New(t), VariantNFT).withSets()
			in := fullInput(addr.IPv4)
			in.Bare = bareSubnets()[:3]
			r.ensure(Rules(in))
			for _, c := range []struct {
				with, without string
				commits       int // that the rules take
			}{
				{"10.244.100.0/24", "", 0},
				{"", "10.244.8.0/24", 0},
				{"10.244.16.0/24", "10.244.16.0/20", 0},
				{"10.244.16.0/20", "10.244.16.0/24", 0},
				{"10.244.100.0/23", "10.244.100.0/24", 0},
				{"", "10.244.9.0/24 10.244.16.0/20", 0},
				{"", "10.244.100.0/23", 1},
				{"10.244.7.0/24", "", 1},
			} {
				in.Bare = slices.DeleteFunc(slices.Clone(in.Bare),
					func(p netip.Prefix) bool { return strings.Contains(c.without, p.String()) })
				if c.with != "" {
					in.Bare = append(in.Bare, netip.MustParsePrefix(c.with))
				}
				want := Rules(in)
				table := r.handleOfTable()
				drifts, commits := r.ensure(want)
				if len(drifts) == 0 || !r.native && commits != c.commits {
					t.Errorf("%+v: %d commits, %v", c, commits, drifts)
				}
				if replaced := r.handleOfTable() != table; r.native && replaced != (c.commits > 0) {
					t.Errorf("%+v: the whole table is replaced: %v", c, replaced)
				}
				r.quiet(want)
				shown := r.ns.Exec("ipset", "list") + r.ruleset()
				for _, p := range in.Bare {
					if !strings.Contains(shown, p.String()) {
						t.Errorf("%+v: no %s in\n%s", c, p, shown)
					}
				}
				if without, _, _ := strings.Cut(c.without, " "); without != "" && strings.Contains(shown, without) ||
					len(in.Bare) == 0 && strings.Contains(shown, bareSet(addr.IPv4)) {
					t.Errorf("%+v: left in\n%s", c, shown)
				}
			}
		})
	}
}

// handleOfTable is the number by which nft knows our table, which another table never has.
func (r *rig) handleOfTable() string {
	r.t.Helper()
	for line := range strings.Lines(r.ns.Exec("nft", "-a", "list", "ruleset")) {
		if handle, ok := strings.CutPrefix(line, "table ip overlayd { # handle "); ok {
			return handle
		}
	}
	return ""
}

// handle is the number by which nft knows the n-th rule of our chain.
func (r *rig) handle(family string, n int) string {
	r.t.Helper()
	var handles []string
	for line := range strings.Lines(r.ns.Exec("nft", "-a", "list", "chain", family, "overlayd", "postrouting")) {
		if rule, h, ok := strings.Cut(strings.TrimSpace(line), " # handle "); ok && !strings.HasSuffix(rule, "{") {
			handles = append(handles, h)
		}
	}
	return handles[n]
}

func TestNFTDesiredRulesChange(t *testing.T) {
	t.Parallel()
	r := newNFTRig(t, nstest.New(t), VariantNFT)
	r.ensure(bothWithNodes()...)
	// Another peer costs one element, not a table.
	more := []Ruleset{withNodes(addr.IPv4, "192.168.3.9", "192.168.3.11"), bothWithNodes()[1]}
	table := r.handleOfTable()
	if drifts, _ := r.ensure(more...); !slices.Equal(kindsOf(drifts), []DriftKind{SetChanged}) ||
		r.handleOfTable() != table {
		t.Errorf("%v", drifts)
	}
	r.quiet(more...)
	all := fullDesired(addr.IPv4)
	all.Exclude = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
	if drifts, _ := r.ensure(Rules(all), more[1]); !slices.Equal(kindsOf(drifts), []DriftKind{RulesChanged}) {
		t.Errorf("%v", drifts)
	}
	r.quiet(Rules(all), more[1])
	noNAT := fullDesired(addr.IPv4)
	noNAT.Masquerade = false
	if drifts, _ := r.ensure(Rules(noNAT)); !slices.Equal(kindsOf(drifts), []DriftKind{Leftover, Leftover}) {
		t.Errorf("%v", drifts)
	}
	if left := r.ruleset(); strings.Contains(left, "overlayd") {
		t.Errorf("left:\n%s", left)
	}
	r.quiet(Rules(noNAT))
}

// The accepts stand in iptables' FORWARD where there is one, come when it comes, and never make one.
func TestNFTForward(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, base *rig) {
		r := newNFTRig(t, base.ns, base.variant)
		r.ensure(both()...)
		r.quiet(both()...)
		if all := r.ruleset() + r.legacyTables(); strings.Contains(all, "filter") || strings.Contains(all, "FORWARD") {
			t.Errorf("made a FORWARD chain where there was none:\n%s", all)
		}
		for _, f := range addr.Families() {
			r.iptables(f, "-P FORWARD DROP")
		}
		if drifts, commits := r.ensure(both()...); commits != 2 || len(drifts) != 4 {
			t.Errorf("%d transactions, %v", commits, drifts)
		}
		for _, f := range addr.Families() {
			if rules := r.iptables(f, "-S FORWARD"); strings.Count(rules, "-j OVERLAYD-FWD") != 1 {
				t.Errorf("%s:\n%s", f, rules)
			}
			if rules := r.iptables(f, "-t nat -S"); strings.Contains(rules, "OVERLAYD") {
				t.Errorf("%s:\n%s", f, rules)
			}
			r.iptables(f, "-F FORWARD")
		}
		if drifts, commits := r.ensure(both()...); commits != 2 || !slices.Equal(kindsOf(drifts),
			[]DriftKind{JumpMissing, JumpMissing}) {
			t.Errorf("%d transactions, %v", commits, drifts)
		}
		r.quiet(both()...)
		r.remove()
		if left := r.ruleset() + base.saved(); strings.Contains(left, "OVERLAYD") || strings.Contains(left, "overlayd") {
			t.Errorf("Remove left:\n%s", left)
		}
	})
}

func TestDriverSwitch(t *testing.T) {
	t.Parallel()
	for _, p := range []Variant{VariantNFT, VariantLegacy} {
		t.Run(string(p), func(t *testing.T) {
			t.Parallel()
			old := newRig(t, nstest.New(t), p).withSets()
			next := newNFTRig(t, old.ns, p).withSets()
			for _, f := range addr.Families() {
				old.iptables(f, "-t nat -A POSTROUTING -p tcp -j ACCEPT")
				old.iptables(f, "-t filter -A FORWARD -p tcp -j ACCEPT")
			}
			foreign := old.saved()
			old.ensure(bothWithNodes()...)
			next.ensure(bothWithNodes()...)
			saved := old.saved()
			if strings.Contains(saved, "POSTRTG") || strings.Count(saved, "-j OVERLAYD-FWD") != 2 ||
				next.ns.Exec("ipset", "list", "-n") != "" {
				t.Errorf("iptables beside nftables:\n%s\n%s", saved, next.ns.Exec("ipset", "list", "-n"))
			}
			old.restart()
			old.ensure(bothWithNodes()...)
			old.quiet(bothWithNodes()...)
			if tables := old.ns.Exec("nft", "list", "tables"); strings.Contains(tables, "overlayd") {
				t.Errorf("nftables beside iptables:\n%s", tables)
			}
			next.restart()
			next.ensure(bothWithNodes()...)
			old.remove()
			if diff := cmp.Diff(foreign, old.saved()); diff != "" || strings.Contains(old.ruleset(), "overlayd") {
				t.Errorf("Remove left:\n%s\n%s", diff, old.ruleset())
			}
		})
	}
}

// While nothing changes in nf_tables, no program is run, and the sets are compared.
func TestUnnotified(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, r *rig) {
		r.withSets()
		want := bothWithNodes()
		r.ensure(want...)
		unnotified := func() []Drift {
			r.calls = nil
			var res Result
			var err error
			r.ns.Do(func() { res, err = r.driver.Ensure(t.Context(), per(want)) })
			if err != nil {
				t.Error(err)
			}
			return res.Drifts
		}
		r.ns.Exec("ipset", "flush", "overlayd-nodes4")
		if got := unnotified(); !slices.Equal(kindsOf(got), []DriftKind{SetChanged}) {
			t.Errorf("set flushed: %v", got)
		}
		if r.variant == VariantNFT && len(r.calls) > 0 {
			t.Errorf("ran %s", r.calls)
		}
		if members := r.ns.Exec("ipset", "list", "overlayd-nodes4"); !strings.Contains(members, "192.168.3.9") {
			t.Errorf("members:\n%s", members)
		}
		r.iptables(addr.IPv6, "-t nat -F")
		if got := unnotified(); len(got) != 2 {
			t.Errorf("flushed: %v", got)
		}
	})
}

// Every kind of change of what is ours is notified of, and no other.
func TestWatch(t *testing.T) {
	t.Parallel()
	for name, make := range map[string]func(*testing.T, *nstest.NS, Variant) *rig{
		"iptables": newRig,
		"nftables": newNFTRig,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := make(t, nstest.New(t), VariantNFT).withSets()
			var changes <-chan struct{}
			var err error
			ctx, cancel := context.WithCancel(t.Context())
			r.ns.Do(func() { changes, err = Watch(ctx) })
			if err != nil {
				t.Fatal(err)
			}
			want := bothWithNodes()
			for _, f := range addr.Families() {
				r.iptables(f, "-P FORWARD DROP")
			}
			silent := func(when string) {
				t.Helper()
				for quiet := false; !quiet; {
					select {
					case <-changes: // of our own changes
					case <-time.After(50 * time.Millisecond):
						quiet = true
					}
				}
			}
			r.ensure(want...)
			damages := []string{
				"nft flush ruleset", "iptables-nft -P FORWARD DROP", "iptables-nft -F FORWARD",
				"ip6tables-nft -P FORWARD DROP",
			}
			if r.native {
				damages = append(damages, "nft delete table ip overlayd", "nft insert rule ip6 overlayd postrouting accept",
					"nft flush chain ip overlayd postrouting", "nft flush set ip overlayd overlayd-nodes4")
			} else {
				damages = append(damages, "iptables-nft -t nat -F", "ip6tables-nft -t nat -F POSTROUTING",
					"iptables-nft -t nat -F OVERLAYD-POSTRTG", "nft delete table ip6 nat")
			}
			for _, damage := range damages {
				silent("after our own changes")
				r.ns.Exec(strings.Fields(damage)...)
				select {
				case <-changes:
				case <-time.After(20 * time.Second):
					t.Errorf("%s: no notification", damage)
				}
				r.ensure(want...)
				r.quiet(want...)
			}
			silent("after our own changes")
			r.quiet(want...) // which changes nothing
			r.ns.Exec("iptables-nft", "-t", "mangle", "-A", "POSTROUTING", "-j", "RETURN")
			r.ns.Exec("iptables-nft", "-t", "nat", "-N", "KUBE-POSTROUTING")
			r.ns.Exec("nft", "add table ip kube-proxy { chain x { type nat hook postrouting priority srcnat ; } ; }")
			r.ns.Exec("nft", "add table inet firewalld")
			select {
			case <-changes:
				t.Error("a notification of changes that are not about us")
			case <-time.After(100 * time.Millisecond):
			}
			cancel()
			for range changes { // until it is closed
			}
		})
	}
}

// What we say to nft and what nft says of it: the text is kept to be read by people.
func TestNFTGolden(t *testing.T) {
	t.Parallel()
	r := newNFTRig(t, nstest.New(t), VariantNFT)
	r.ensure(bothWithNodes()...)
	for f, family := range map[addr.Family]string{addr.IPv4: "ip", addr.IPv6: "ip6"} {
		got := r.ns.Exec("nft", "list", "table", family, "overlayd")
		if diff := cmp.Diff(goldenFile(t, "testdata/"+f.String()+".nft", got), got); diff != "" {
			t.Errorf("%s:\n%s", f, diff)
		}
	}
}

// Not in parallel: it changes PATH.
func TestNFTMissingPrograms(t *testing.T) {
	r := newNFTRig(t, nstest.New(t), VariantNFT)
	r.iptables(addr.IPv4, "-P FORWARD DROP")
	dir := onlyPrograms(t, "nft")
	if _, _, err := r.tryEnsure(both()...); err == nil || !strings.Contains(err.Error(),
		"FORWARD chain of iptables-nft drops") {
		t.Errorf("no iptables, and FORWARD drops: %v", err)
	}
	r.ns.Exec(dir+"/nft", "add chain ip filter FORWARD { policy accept ; }")
	r.ns.Exec(dir+"/nft", "flush chain ip overlayd postrouting")
	onlyPrograms(t)
	r.ensure(both()...)
	r.quiet(both()...)
	r.remove()
}

// onlyPrograms leaves the test with these programs alone.
func onlyPrograms(t *testing.T, names ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range names {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		if path, err = filepath.EvalSymlinks(path); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(path, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
	return dir
}
