package masquerade

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/nstest"
)

func TestDriftIsRepaired(t *testing.T) {
	t.Parallel()
	const jump = "-m comment --comment overlayd -j OVERLAYD-POSTRTG"
	cases := []struct {
		name   string
		damage []string // iptables command lines
		want   []DriftKind
	}{
		{"jump missing", []string{"-t nat -D POSTROUTING " + jump}, []DriftKind{JumpMissing}},
		{"jump misplaced", []string{"-t nat -I POSTROUTING 1 -p tcp --dport 9999 -j ACCEPT"}, []DriftKind{JumpMisplaced}},
		{"jump twice", []string{"-t nat -I POSTROUTING 1 " + jump}, []DriftKind{JumpRepeated}},
		{"jump twice, apart", []string{"-t nat -A POSTROUTING -j OVERLAYD-POSTRTG"}, []DriftKind{JumpRepeated}},
		{"jump under a condition", []string{"-t nat -R POSTROUTING 1 -p udp -j OVERLAYD-POSTRTG"}, []DriftKind{JumpChanged}},
		{"jump as goto", []string{"-t nat -R POSTROUTING 1 -g OVERLAYD-POSTRTG"}, []DriftKind{JumpChanged}},
		{"rule deleted", []string{"-t nat -D OVERLAYD-POSTRTG 3"}, []DriftKind{RulesChanged}},
		{"rule changed", []string{"-t filter -R OVERLAYD-FWD 1 -p udp -j DROP"}, []DriftKind{RulesChanged}},
		{
			"rules reordered",
			[]string{"-t nat -I OVERLAYD-POSTRTG 1 -j MASQUERADE", "-t nat -D OVERLAYD-POSTRTG 2"},
			[]DriftKind{RulesChanged},
		},
		{"foreign rule at the end", []string{"-t nat -A OVERLAYD-POSTRTG -p udp -j RETURN"}, []DriftKind{RulesChanged}},
		{
			"rule twice",
			[]string{"-t filter -A OVERLAYD-FWD -p udp -j ACCEPT", "-t filter -A OVERLAYD-FWD -p udp -j ACCEPT"},
			[]DriftKind{RulesChanged},
		},
		{"chain flushed", []string{"-t nat -F OVERLAYD-POSTRTG"}, []DriftKind{ChainMissing}},
		{"table flushed", []string{"-t nat -F"}, []DriftKind{ChainMissing, JumpMissing}},
		{"chain missing", []string{"-t nat -F", "-t nat -X"}, []DriftKind{ChainMissing, JumpMissing}},
		{"chain missing in filter", []string{"-t filter -F", "-t filter -X"}, []DriftKind{ChainMissing, JumpMissing}},
		{
			"all gone",
			[]string{"-t nat -F", "-t nat -X", "-t filter -F", "-t filter -X"},
			[]DriftKind{ChainMissing, ChainMissing, JumpMissing, JumpMissing},
		},
	}
	eachVariant(t, func(t *testing.T, r *rig) {
		first, restores := r.ensure(both()...)
		if len(first) != 8 || restores != 2 {
			t.Errorf("first: %d restores, %v", restores, first)
		}
		intact := r.saved()
		r.quiet(both()...)
		for _, f := range addr.Families() {
			for _, c := range cases {
				for _, line := range c.damage {
					r.iptables(f, line)
				}
				drifts, restores := r.ensure(both()...)
				once := 1
				if r.variant == VariantNFT && len(c.want) == 1 && slices.Contains([]DriftKind{
					JumpMisplaced, JumpRepeated,
					JumpChanged,
				}, c.want[0]) {
					once = 0 // a jump takes no process
				}
				if diff := cmp.Diff(sorted(c.want), kindsOf(drifts)); diff != "" || restores != once {
					t.Errorf("%s, %s: %d restores, %v", f, c.name, restores, drifts)
				}
				for _, d := range drifts {
					if d.Family != f {
						t.Errorf("%s, %s: %s", f, c.name, d)
					}
				}
				r.quiet(both()...)
				// What another program put into the hook's chain is its own, and stays.
				if c.name == "jump misplaced" {
					r.iptables(f, "-t nat -D POSTROUTING -p tcp --dport 9999 -j ACCEPT")
				}
				if diff := cmp.Diff(intact, r.saved()); diff != "" {
					t.Errorf("%s, %s: repaired to something else:\n%s", f, c.name, diff)
				}
			}
		}
		// Of the rules of an earlier daemon it is known what they say only where iptables' words are compared.
		r.restart()
		drifts, restores := r.ensure(both()...)
		for _, d := range drifts {
			if d.Kind != Unverified {
				t.Errorf("after a restart: %s", d)
			}
		}
		if n := map[Variant]int{VariantNFT: 2}[r.variant]; restores != n || len(drifts) != 2*n {
			t.Errorf("after a restart: %d restores, %v", restores, drifts)
		}
		r.quiet(both()...)
		if diff := cmp.Diff(intact, r.saved()); diff != "" {
			t.Errorf("after a restart:\n%s", diff)
		}
	})
}

// `nft flush ruleset` takes tables and base chains away; a rule made with nft in our chain makes it unreadable.
func TestDamageByNft(t *testing.T) {
	t.Parallel()
	r := newRig(t, nstest.New(t), VariantNFT)
	r.ensure(both()...)
	intact := r.saved()
	for _, damage := range []string{
		"flush ruleset", "add rule ip nat OVERLAYD-POSTRTG ct expiration 10 accept",
		"delete table ip6 nat",
	} {
		r.ns.Exec(append([]string{"nft"}, strings.Fields(damage)...)...)
		if drifts, _ := r.ensure(both()...); len(drifts) == 0 {
			t.Errorf("%s: not found", damage)
		}
		r.quiet(both()...)
		if diff := cmp.Diff(intact, r.saved()); diff != "" {
			t.Errorf("%s:\n%s", damage, diff)
		}
	}
}

func TestDesiredRulesChange(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, r *rig) {
		r.iptables(addr.IPv4, "-t nat -A POSTROUTING -p tcp -j ACCEPT")
		r.ensure(both()...)
		for _, change := range []func(*Input){
			func(in *Input) { in.Tunnel = "overlay.7" },
			func(in *Input) { in.Node = netip.Addr{} },
			func(in *Input) {
				in.Exclude = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
			},
		} {
			in4, in6 := fullDesired(addr.IPv4), fullDesired(addr.IPv6)
			change(&in4)
			change(&in6)
			drifts, restores := r.ensure(Rules(in4), Rules(in6))
			if !slices.Equal(kindsOf(drifts), []DriftKind{RulesChanged, RulesChanged}) || restores != 2 {
				t.Errorf("%d restores, %v", restores, drifts)
			}
			r.quiet(Rules(in4), Rules(in6))
		}
		noNAT := fullDesired(addr.IPv4)
		noNAT.Masquerade = false
		drifts, restores := r.ensure(Rules(noNAT)) // and IPv6 not at all
		if kinds := kindsOf(drifts); !slices.Equal(kinds, []DriftKind{Leftover, Leftover, Leftover}) ||
			restores != map[Variant]int{VariantLegacy: 2}[r.variant] {
			t.Errorf("%d restores, %v", restores, drifts)
		}
		left := r.saved()
		if strings.Contains(left, "POSTRTG") || strings.Count(left, "-j OVERLAYD-FWD") != 1 ||
			!strings.Contains(left, "-A POSTROUTING -p tcp -j ACCEPT") {
			t.Errorf("left:\n%s", left)
		}
		r.quiet(Rules(noNAT))
		r.ensure(both()...)
		r.quiet(both()...)
	})
}

// legacyTables lists the tables of iptables-legacy that exist in the namespace.
func (r *rig) legacyTables() string {
	return r.ns.Exec("cat", "/proc/net/ip_tables_names", "/proc/net/ip6_tables_names")
}

func TestRemoveTakesOnlyWhatIsOurs(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, r *rig) {
		for _, f := range addr.Families() {
			for _, line := range []string{
				"-t nat -N KUBE-POSTROUTING", "-t nat -A POSTROUTING -j KUBE-POSTROUTING",
				"-t nat -A KUBE-POSTROUTING -p udp -j MASQUERADE",
				"-t filter -N OVERLAYD-OTHER", "-t filter -A FORWARD -j OVERLAYD-OTHER", "-t filter -P FORWARD DROP",
			} {
				r.iptables(f, line)
			}
		}
		before := r.saved()
		r.ensure(both()...)
		r.iptables(addr.IPv4, "-t nat -A POSTROUTING -p udp -j OVERLAYD-POSTRTG")
		for range 2 {
			r.ns.Do(func() {
				if err := remove(t.Context(), r.sets, r.open); err != nil {
					t.Error(err)
				}
			})
			if diff := cmp.Diff(before, r.saved()); diff != "" {
				t.Error(diff)
			}
		}
		if drifts, _ := r.ensure(both()...); len(drifts) != 8 {
			t.Errorf("after Remove: %v", drifts)
		}
		if tables := r.legacyTables(); r.variant == VariantNFT && tables != "" {
			t.Errorf("legacy tables made: %s", tables)
		}
	})
}

func TestLeftoversOfTheOtherVariant(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, r *rig) {
		other := newRig(t, r.ns, map[Variant]Variant{VariantNFT: VariantLegacy, VariantLegacy: VariantNFT}[r.variant])
		other.iptables(addr.IPv4, "-t nat -A POSTROUTING -p tcp -j ACCEPT")
		other.iptables(addr.IPv6, "-t nat -A POSTROUTING -p tcp -j ACCEPT")
		before := other.saved()
		other.ensure(both()...)
		r.ensure(both()...)
		if diff := cmp.Diff(before, other.saved()); diff != "" {
			t.Errorf("Ensure left:\n%s", diff)
		}
		r.quiet(both()...)
		other.ensure(both()...) // the old daemon was started again
		r.ns.Do(func() {
			if err := remove(t.Context(), r.sets, r.open); err != nil {
				t.Error(err)
			}
		})
		if diff := cmp.Diff(before, other.saved()); diff != "" {
			t.Errorf("Remove left:\n%s", diff)
		}
	})
}

func TestRemoveNamesWhatStillUsesTheChain(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, r *rig) {
		r.ensure(both()...)
		r.iptables(addr.IPv4, "-t filter -A INPUT -j OVERLAYD-FWD")
		var err error
		r.ns.Do(func() { err = remove(t.Context(), r.sets, r.open) })
		if err == nil || !strings.Contains(err.Error(), "OVERLAYD-FWD") || strings.Contains(err.Error(), "\n") {
			t.Errorf("got %v", err)
		}
		if strings.Contains(r.ns.Exec(command(addr.IPv6, r.variant), "-t", "nat", "-S"), "OVERLAYD") {
			t.Error("IPv6 was held back")
		}
	})
}

// A rule that another program slips in right behind a restore must not be taken for ours.
func TestWritingRace(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, r *rig) {
		raced := false
		r.run = func(ctx context.Context, stdin, name string, args ...string) (string, error) {
			out, err := execRun(ctx, stdin, name, args...)
			if strings.HasSuffix(name, "-restore") && !raced {
				raced = true
				r.iptables(addr.IPv4, "-t nat -I OVERLAYD-POSTRTG 1 -j RETURN")
			}
			return out, err
		}
		if _, _, err := r.tryEnsure(both()...); err == nil || !strings.Contains(err.Error(), "OVERLAYD-POSTRTG") {
			t.Errorf("got %v", err)
		}
		if drifts, _ := r.ensure(both()...); len(drifts) == 0 {
			t.Errorf("got %v", drifts)
		}
		r.quiet(both()...)
	})
}

// Where the kernel cannot match on sets, iptables is not run at each comparison to hear that again.
func TestRefusedSetIsTriedAgainLater(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, r *rig) {
		r.withSets()
		refuse := true
		r.run = func(ctx context.Context, stdin, name string, args ...string) (string, error) {
			if before, _, found := strings.Cut(stdin, "--match-set"); refuse && found {
				line := 1 + strings.Count(before, "\n")
				return "", commandError{errors.New("no such match"), 2, fmt.Sprintf("Error occurred at line: %d", line)}
			}
			return execRun(ctx, stdin, name, args...)
		}
		want := []Ruleset{Rules(fullInput(addr.IPv4))}
		runs := func(when string, none bool) {
			t.Helper()
			if _, n := r.ensure(want...); none != (n == 0) || refuse != errors.Is(r.noSets, ErrSet) {
				t.Errorf("%s: %d runs of iptables-restore, %v", when, n, r.noSets)
			}
		}
		runs("refused", false)
		runs("right after", true)
		r.driver.families.V4.tables[r.variant].refused = time.Now().Add(-setsAgain)
		runs("later", false)
		runs("right after that", true)
		r.ns.Exec("ipset", "flush")
		runs("when a set was put right", false)
		refuse = false
		r.driver.families.V4.tables[r.variant].refused = time.Now().Add(-setsAgain)
		runs("no longer refused", false)
		runs("in place", true)
	})
}

func TestMissingSet(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, r *rig) {
		want := []Ruleset{Rules(fullInput(addr.IPv4)), Rules(fullDesired(addr.IPv6))}
		r.ensure(want...)
		err := r.noSets
		if !errors.Is(err, ErrSet) {
			t.Fatalf("got %v", err)
		}
		for _, part := range []string{
			command(addr.IPv4, r.variant) + "-restore", "overlayd-bare4 doesn't exist",
			"-A OVERLAYD-POSTRTG",
		} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("no %q in %q", part, err)
			}
		}
		if strings.Contains(err.Error(), "\n") {
			t.Errorf("more than one line: %q", err)
		}
		after := r.saved()
		if !strings.Contains(after, "10.244.0.0") || strings.Contains(after, "match-set") ||
			!strings.Contains(after, "fd00:10:244::/48") {
			t.Errorf("not all but the set:\n%s", after)
		}
		r.withSets()
		r.ensure(want...)
		if left := r.saved(); r.noSets != nil || !strings.Contains(left, "match-set overlayd-nodes4") {
			t.Errorf("%v, with sets:\n%s", r.noSets, left)
		}
		r.quiet(want...)
		r.ensure(both()...)
		if sets := r.ns.Exec("ipset", "list", "-n"); sets != "" {
			t.Errorf("sets that no rule names: %s", sets)
		}
	})
}

func TestLock(t *testing.T) {
	t.Parallel()
	lock := filepath.Join(t.TempDir(), "lock")
	held, err := os.Create(lock)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = held.Close() }()
	if err := syscall.Flock(int(held.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	locked := func(wait time.Duration) *rig {
		r := newRig(t, nstest.New(t), VariantLegacy)
		r.wait = wait
		r.run = func(ctx context.Context, stdin, name string, args ...string) (string, error) {
			return execRun(ctx, stdin, "env", append([]string{"XTABLES_LOCKFILE=" + lock, name}, args...)...)
		}
		return r
	}
	t.Run("bounded", func(t *testing.T) {
		r, start := locked(time.Second), time.Now()
		_, _, err := r.tryEnsure(both()...)
		if err == nil || !strings.Contains(err.Error(), "xtables lock") { // by iptables itself, when it has waited
			t.Errorf("got %v", err)
		}
		if took := time.Since(start); took < time.Second {
			t.Errorf("took %s", took)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		r, start := locked(time.Minute), time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		var err error
		r.ns.Do(func() { _, err = r.driver.Ensure(ctx, per(both())) })
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > execTimeout/2 { // it did not wait for the lock
			t.Errorf("after %s: %v", time.Since(start), err)
		}
	})
}

// Not in parallel: it changes PATH.
func TestMissingPrograms(t *testing.T) {
	ns := nstest.New(t)
	r := newRig(t, ns, VariantDefault)
	real, err := exec.LookPath("iptables-nft")
	if err != nil {
		t.Fatal(err)
	}
	if real, err = filepath.EvalSymlinks(real); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	if _, _, err := r.tryEnsure(Rules(fullDesired(addr.IPv4))); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("no iptables at all: %v", err)
	}
	if _, _, err := r.tryEnsure(); err != nil {
		t.Errorf("nothing desired: %v", err)
	}
	ns.Do(func() { err = remove(t.Context(), r.sets, r.open) })
	if err != nil {
		t.Errorf("nothing to remove with: %v", err)
	}
	for _, name := range []string{"iptables", "iptables-restore"} {
		if err := os.Symlink(real, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if _, restores, err := r.tryEnsure(Rules(fullDesired(addr.IPv4))); err != nil || restores != 1 {
		t.Errorf("installed since: %d restores, %v", restores, err)
	}
	r.quiet(Rules(fullDesired(addr.IPv4)))
	if _, _, err := r.tryEnsure(both()...); !errors.Is(err, exec.ErrNotFound) ||
		!strings.Contains(err.Error(), "ip6tables") {
		t.Errorf("IPv6 without ip6tables: %v", err)
	}
}

// Where the program is a script around it, as in some images of Kubernetes, it says itself which variant it is.
// Not in parallel: it changes PATH.
func TestProgramsThatSayNothing(t *testing.T) {
	for _, v := range []Variant{VariantNFT, VariantLegacy} {
		dir := t.TempDir()
		for _, f := range addr.Families() {
			for _, end := range []string{"", "-restore"} {
				script := "#!/bin/sh\nexec " + programName(f, v) + end + ` "$@"` + "\n"
				if err := os.WriteFile(filepath.Join(dir, programName(f, VariantDefault)+end), []byte(script), 0o755); err != nil {
					t.Fatal(err)
				}
			}
		}
		t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
		r := newRig(t, nstest.New(t), VariantDefault)
		r.ensure(both()...)
		for _, f := range addr.Families() {
			if tables := r.driver.families.Get(f).tables[VariantDefault]; tables.legacy != (v == VariantLegacy) ||
				!tables.random {
				t.Errorf("%s: %+v", v, tables)
			}
		}
		r.variant = v
		r.quiet(both()...)
	}
}

func TestParseVariant(t *testing.T) {
	for _, s := range []string{"", "nft", "legacy"} {
		if v, err := ParseVariant(s); err != nil || string(v) != s {
			t.Errorf("%q: %v, %v", s, v, err)
		}
	}
	if _, err := ParseVariant("iptables"); err == nil {
		t.Error("took nonsense")
	}
}
