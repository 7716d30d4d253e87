package masquerade

import (
	"errors"
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
	"github.com/overlayd/overlayd/internal/nstest"
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

// nftDamage is every way to damage our table. %s is the family, ip or ip6, and %d its digit.
func nftDamage() map[string]struct {
	line string
	want DriftKind
} {
	return map[string]struct {
		line string
		want DriftKind
	}{
		"table deleted":      {"delete table %s overlayd", ChainMissing},
		"chain flushed":      {"flush chain %s overlayd postrouting", RulesChanged},
		"table flushed":      {"flush table %s overlayd", RulesChanged},
		"rule inserted":      {"insert rule %s overlayd postrouting accept", RulesChanged},
		"rule appended":      {"add rule %s overlayd postrouting udp dport 53 accept", RulesChanged},
		"foreign chain":      {"add chain %s overlayd mine", RulesChanged},
		"foreign base chain": {"add chain %s overlayd mine { type filter hook forward priority 0 ; policy drop ; }", RulesChanged},
		"foreign set":        {"add set %s overlayd mine { type inet_service ; }", RulesChanged},
		"foreign map":        {"add map %s overlayd mine { type inet_service : verdict ; }", RulesChanged},
		"foreign counter":    {"add counter %s overlayd mine", RulesChanged},
		"dormant":            {"add table %s overlayd { flags dormant ; }", RulesChanged},
		"policy":             {"add chain %s overlayd postrouting { policy drop ; }", RulesChanged},
		"members flushed":    {"flush set %s overlayd overlayd-nodes%d", SetChanged},
	}
}

func TestNFTDriftIsSeenAndRepaired(t *testing.T) {
	t.Parallel()
	r := newNFTRig(t, nstest.New(t), VariantNFT).withWatch()
	r.ns.Exec("nft", "add table ip foreign { chain c { type nat hook postrouting priority srcnat ; ip saddr 10.0.0.0/8 masquerade ; } ; }")
	foreign := r.ruleset()
	want := bothWithNodes()
	first, commits := r.ensure(want...)
	if len(first) != 2 || commits != 2 {
		t.Errorf("first: %d transactions, %v", commits, first)
	}
	intact := r.ruleset()
	r.silent(want...)
	damage := func(name, line string, kinds ...DriftKind) {
		r.ns.Exec("nft", line)
		drifts, commits := r.ensure(want...)
		if diff := cmp.Diff(kinds, kindsOf(drifts)); diff != "" || commits != len(kinds) {
			t.Errorf("%s: %d transactions, %v", name, commits, drifts)
		}
		r.silent(want...)
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
	damage("reordered", "insert rule ip overlayd postrouting "+nftText(addr.IPv4, want[0].Chains[0].Rules[3])+
		" ; delete rule ip overlayd postrouting handle "+r.handle("ip", 3), RulesChanged)
	damage("rule replaced", "replace rule ip overlayd postrouting handle "+r.handle("ip", 1)+" ip saddr 10.244.0.0/16 accept", RulesChanged)
	r.ns.Exec("nft", "flush ruleset")
	if drifts, commits := r.ensure(want...); len(drifts) != 2 || commits != 2 {
		t.Errorf("all flushed: %d transactions, %v", commits, drifts)
	}
	if diff := cmp.Diff(strings.Replace(intact, foreign, "", 1), r.ruleset()); diff != "" {
		t.Errorf("repaired to something else:\n%s", diff)
	}
	r.restart()
	if drifts, commits := r.ensure(want...); len(drifts) != 0 || commits != 0 {
		t.Errorf("after a restart: %d transactions, %v", commits, drifts)
	}
	r.silent(want...)
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
				drifts, commits := r.ensure(want)
				if r.nft != nil {
					commits--
					if c.commits == 0 && strings.Contains(strings.Join(r.calls, ""), "delete table") {
						t.Errorf("%+v: the whole table is replaced: %s", c, r.calls)
					}
				}
				if len(drifts) == 0 || r.nft == nil && commits != c.commits || r.nft != nil && commits != 0 {
					t.Errorf("%+v: %d commits, %v", c, commits, drifts)
				}
				r.silent(want)
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

func TestNFTChangedWishes(t *testing.T) {
	t.Parallel()
	r := newNFTRig(t, nstest.New(t), VariantNFT).withWatch()
	r.ensure(bothWithNodes()...)
	// Another peer costs one element, not a table.
	more := []Ruleset{withNodes(addr.IPv4, "192.168.3.9", "192.168.3.11"), bothWithNodes()[1]}
	drifts, commits := r.ensure(more...)
	if commits != 1 || !slices.Equal(kindsOf(drifts), []DriftKind{SetChanged}) || strings.Contains(strings.Join(r.calls, "\n"), "chain") {
		t.Errorf("%d transactions, %v:\n%s", commits, drifts, strings.Join(r.calls, "\n"))
	}
	r.silent(more...)
	all := wanted(addr.IPv4)
	all.Exclude = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
	if drifts, commits := r.ensure(Rules(all), more[1]); commits != 1 {
		t.Errorf("%d transactions, %v", commits, drifts)
	}
	r.silent(Rules(all), more[1])
	noNAT := wanted(addr.IPv4)
	noNAT.Masquerade = false
	if drifts, commits := r.ensure(Rules(noNAT)); commits != 2 || !slices.Equal(kindsOf(drifts), []DriftKind{Leftover, Leftover}) {
		t.Errorf("%d transactions, %v", commits, drifts)
	}
	if left := r.ruleset(); strings.Contains(left, "overlayd") {
		t.Errorf("left:\n%s", left)
	}
	r.silent(Rules(noNAT))
}

// A kernel that tells nothing is looked at each time, which takes no process.
func TestNFTUnheard(t *testing.T) {
	t.Parallel()
	r := newNFTRig(t, nstest.New(t), VariantNFT)
	r.ensure(both()...)
	if r.silent(both()...); r.nft.Notified() {
		t.Error("notified")
	}
	r.ns.Exec("nft", "flush chain ip overlayd postrouting")
	if drifts, _ := r.ensure(both()...); len(drifts) != 1 {
		t.Errorf("got %v", drifts)
	}
}

// otherWay is a kernel that shows rules in its own way.
type otherWay struct{ Kernel }

func (k otherWay) Rules(f addr.Family, table, chain string) ([][]string, error) {
	rules, err := k.Kernel.Rules(f, table, chain)
	for _, words := range rules {
		for i, w := range words {
			if w == "-s" || w == "--random-fully" {
				words[i] = "?unheard"
			}
		}
	}
	return rules, err
}

// An nft that makes something unknown of our rules costs one transaction, not one at every look.
func TestNFTAnotherWay(t *testing.T) {
	t.Parallel()
	r := newNFTRig(t, nstest.New(t), VariantNFT)
	r.kernel = otherWay{r.kernel}
	r.restart()
	if _, commits := r.ensure(bothWithNodes()...); commits != 2 {
		t.Errorf("%d transactions", commits)
	}
	for range 2 {
		r.silent(bothWithNodes()...)
	}
	r.ns.Exec("nft", "delete", "rule", "ip", "overlayd", "postrouting", "handle", r.handle("ip", 2))
	if drifts, _ := r.ensure(bothWithNodes()...); !slices.Equal(kindsOf(drifts), []DriftKind{RulesChanged}) {
		t.Errorf("drift among odd rules: %v", drifts)
	}
}

// A kernel that cannot be asked is an error, not an empty table.
func TestNFTKernelUnknown(t *testing.T) {
	t.Parallel()
	r := newNFTRig(t, nstest.New(t), VariantNFT)
	r.ensure(both()...)
	r.kernel = noKernel{}
	r.restart()
	if _, _, err := r.tryEnsure(both()...); !errors.Is(err, errNoKernel) || !strings.Contains(err.Error(), "overlayd") {
		t.Errorf("got %v", err)
	}
	r.remove()
	if left := r.ruleset(); strings.Contains(left, "overlayd") {
		t.Errorf("left:\n%s", left)
	}
}

// The accepts stand in iptables' FORWARD where there is one, come when it comes, and never make one.
func TestNFTForward(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, base *rig) {
		r := newNFTRig(t, base.ns, base.variant).withWatch()
		r.ensure(both()...)
		r.silent(both()...)
		if !r.nft.Notified() {
			t.Error("not notified")
		}
		if all := r.ruleset() + r.legacyTables(); strings.Contains(all, "filter") || strings.Contains(all, "FORWARD") {
			t.Errorf("made what nobody had:\n%s", all)
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
		if drifts, commits := r.ensure(both()...); commits != 2 || !slices.Equal(kindsOf(drifts), []DriftKind{JumpMissing, JumpMissing}) {
			t.Errorf("%d transactions, %v", commits, drifts)
		}
		if r.nft.Notified() != (r.variant == VariantNFT) {
			t.Errorf("notified: %v", r.nft.Notified())
		}
		if r.variant == VariantNFT {
			r.silent(both()...)
		}
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
			if strings.Contains(saved, "POSTRTG") || strings.Count(saved, "-j OVERLAYD-FWD") != 2 || next.ns.Exec("ipset", "list", "-n") != "" {
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

// iptables-nft with a watch: no process while nothing of ours has changed, whatever others do elsewhere.
func TestIPTablesWatched(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, r *rig) {
		r.withSets().withWatch()
		want := bothWithNodes()
		r.ensure(want...)
		if r.variant == VariantLegacy {
			if r.d.Notified() {
				t.Error("iptables-legacy is notified")
			}
			r.ensure(want...)
			r.silent(want...) // its tables are still the same
			for _, f := range addr.Families() {
				r.iptables(f, "-t nat -F")
				if drifts, _ := r.ensure(want...); len(drifts) != 2 {
					t.Errorf("got %v", drifts)
				}
				r.quiet(want...)
				r.silent(want...)
			}
			return
		}
		if !r.d.Notified() {
			t.Error("not notified")
		}
		r.silent(want...)
		r.iptables(addr.IPv4, "-t nat -N KUBE-X")
		r.iptables(addr.IPv4, "-t nat -A KUBE-X -p tcp -j RETURN")
		r.iptables(addr.IPv4, "-t mangle -A POSTROUTING -p tcp -j RETURN")
		r.silent(want...)
		// A set that no process is needed for.
		r.ns.Exec("ipset", "flush", "overlayd-nodes4")
		if drifts, _ := r.ensure(want...); !slices.Equal(kindsOf(drifts), []DriftKind{SetChanged}) || len(r.calls) != 0 {
			t.Errorf("set emptied: %v\n%s", drifts, strings.Join(r.calls, "\n"))
		}
		r.silent(want...)
		if members := r.ns.Exec("ipset", "list", "overlayd-nodes4"); !strings.Contains(members, "192.168.3.9") {
			t.Errorf("members:\n%s", members)
		}
		for _, damage := range []string{"-t nat -F", "-t filter -F FORWARD", "-t nat -D OVERLAYD-POSTRTG 2", "-t nat -I POSTROUTING 1 -p tcp -j ACCEPT"} {
			r.iptables(addr.IPv6, damage)
			if drifts, commits := r.ensure(want...); len(drifts) == 0 || commits != 1 {
				t.Errorf("%s: %d transactions, %v", damage, commits, drifts)
			}
			r.silent(want...)
		}
	})
}

// Every kind of change wakes, and what we do ourselves does not.
func TestWakes(t *testing.T) {
	t.Parallel()
	for name, make := range map[string]func(*testing.T, *nstest.NS, Variant) *rig{"iptables": newRig, "nftables": newNFTRig} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := make(t, nstest.New(t), VariantNFT).withSets().withWatch()
			want := bothWithNodes()
			for _, f := range addr.Families() {
				r.iptables(f, "-P FORWARD DROP")
			}
			r.ensure(want...)
			damages := []string{"nft flush ruleset", "iptables-nft -P FORWARD DROP", "iptables-nft -F FORWARD", "ip6tables-nft -P FORWARD DROP"}
			if r.nft != nil {
				damages = append(damages, "nft delete table ip overlayd", "nft insert rule ip6 overlayd postrouting accept",
					"nft flush chain ip overlayd postrouting", "nft flush set ip overlayd overlayd-nodes4")
			} else {
				damages = append(damages, "iptables-nft -t nat -F", "ip6tables-nft -t nat -F POSTROUTING", "iptables-nft -t nat -F OVERLAYD-POSTRTG")
			}
			for _, damage := range damages {
				r.noWake("after our own changes")
				start := time.Now()
				r.ns.Exec(strings.Fields(damage)...)
				select {
				case <-r.watch.Wakes():
				case <-time.After(20 * time.Second):
					t.Errorf("%s: no wake", damage)
				}
				r.ensure(want...)
				t.Logf("%s: put right after %s", damage, time.Since(start).Round(time.Millisecond))
				r.silent(want...)
			}
			r.noWake("after our own changes")
			r.ns.Exec("iptables-nft", "-t", "mangle", "-A", "POSTROUTING", "-j", "RETURN")
			r.ns.Exec("nft", "add table ip kube-proxy { chain x { type nat hook postrouting priority srcnat ; } ; }")
			r.ns.Exec("nft", "add table inet firewalld")
			r.noWake("after changes that are not about us")
			r.remove()
		})
	}
}

func (r *rig) noWake(when string) {
	r.t.Helper()
	select {
	case <-r.watch.Wakes():
		r.t.Errorf("a wake %s", when)
	case <-time.After(50 * time.Millisecond):
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
		if !r.nft.written.Get(f).printed.equal(nftTableOf(bothWithNodes()[f/6])) {
			t.Errorf("%s: rendered %+v\nprinted %+v", f, nftTableOf(bothWithNodes()[f/6]), r.nft.written.Get(f).printed)
		}
	}
}

// Not in parallel: it changes PATH.
func TestNFTMissingPrograms(t *testing.T) {
	r := newNFTRig(t, nstest.New(t), VariantNFT)
	r.iptables(addr.IPv4, "-P FORWARD DROP")
	dir := onlyPrograms(t, "nft")
	if _, _, err := r.tryEnsure(both()...); err == nil || !strings.Contains(err.Error(), "FORWARD chain drops") {
		t.Errorf("no iptables, and FORWARD drops: %v", err)
	}
	r.ns.Exec(dir+"/nft", "add chain ip filter FORWARD { policy accept ; }")
	if _, _, err := r.tryEnsure(both()...); err != nil {
		t.Errorf("no iptables, and FORWARD accepts: %v", err)
	}
	r.ns.Exec(dir+"/nft", "flush chain ip overlayd postrouting")
	onlyPrograms(t)
	if _, _, err := r.tryEnsure(both()...); err == nil || !strings.Contains(err.Error(), "nft") {
		t.Errorf("no nft: %v", err)
	}
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
