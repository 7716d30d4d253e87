package masquerade

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/nstest"
)

// A rule that neither google/nftables nor iptables can read holds back nothing.
func TestUnreadableRules(t *testing.T) {
	t.Parallel()
	rigs := map[string]func(*testing.T, *nstest.NS, Variant) *rig{"iptables": newRig, "nftables": newNFTRig}
	for name, make := range rigs {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := make(t, nstest.New(t), VariantNFT)
			for _, line := range []string{
				"add table ip nat { chain POSTROUTING { type nat hook postrouting priority srcnat ; ct original ip daddr 192.0.2.9 masquerade ; } ; }",
				"add table ip filter { chain FORWARD { type filter hook forward priority filter ; policy drop ; ct original packets > 5 accept ; } ; }",
			} {
				r.ns.Exec("nft", line)
			}
			intact := r.ruleset()
			r.ensure(both()...)
			r.quiet(both()...)
			inPlace := func(when string) {
				t.Helper()
				want := []string{"ct original packets", "jump OVERLAYD-FWD"}
				if !r.native {
					want = append(want, "jump OVERLAYD-POSTRTG", "ct original ip daddr")
				}
				rules := r.ns.Exec("nft", "list", "chain", "ip", "filter", "FORWARD") + r.ns.Exec("nft", "list", "chain", "ip",
					"nat", "POSTROUTING")
				for _, w := range want {
					_, behind, ok := strings.Cut(rules, w)
					if rules = behind; !ok {
						t.Errorf("%s: no %s, or before its place, in\n%s", when, w, r.ruleset())
					}
				}
			}
			inPlace("at first")
			r.ns.Exec("nft", "flush chain ip filter OVERLAYD-FWD")
			r.ns.Exec("nft", "add rule ip filter FORWARD ip saddr 192.0.2.1 drop")
			r.ensure(both()...)
			r.quiet(both()...)
			inPlace("after damage")
			r.ns.Exec("nft", "delete rule ip filter FORWARD handle "+r.handleOf("filter", "FORWARD", "192.0.2.1"))
			r.remove()
			if diff := cmp.Diff(intact, strings.ReplaceAll(r.ruleset(), "table ip6 nat {\n}\n", "")); diff != "" &&
				strings.Contains(diff, "OVERLAYD") {
				t.Errorf("left:\n%s", diff)
			}
		})
	}
}

// handleOf is the number by which nft knows the rule with these words.
func (r *rig) handleOf(table, chain, words string) string {
	r.t.Helper()
	for line := range strings.Lines(r.ns.Exec("nft", "-a", "list", "chain", "ip", table, chain)) {
		if rule, handle, ok := strings.Cut(strings.TrimSpace(line), " # handle "); ok && strings.Contains(rule, words) {
			return handle
		}
	}
	r.t.Fatalf("no rule with %s", words)
	return ""
}

// In a ruleset that another program has loaded again, handles stand for other rules.
func TestReloadedWhileWriting(t *testing.T) {
	t.Parallel()
	r := newRig(t, nstest.New(t), VariantNFT)
	r.iptables(addr.IPv4, "-A FORWARD -p icmp -j ACCEPT")
	r.ensure(both()...)
	r.iptables(addr.IPv4, "-A FORWARD -p sctp -j ACCEPT") // the jump has to move,
	r.iptables(addr.IPv4, "-F OVERLAYD-FWD")              // and the chain to be written
	const foreign = 12
	r.run = func(ctx context.Context, stdin, name string, args ...string) (string, error) {
		r.run = execRun
		var rules strings.Builder
		rules.WriteString("flush ruleset\nadd table ip filter\n" +
			"add chain ip filter FORWARD { type filter hook forward priority 0; policy accept; }\n")
		for i := range foreign {
			fmt.Fprintf(&rules, "add rule ip filter FORWARD ip saddr 192.0.2.%d counter drop\n", i+1)
		}
		if out, err := r.ns.Feed(rules.String(), "nft", "-f", "-"); err != nil {
			t.Error(out, err)
		}
		return execRun(ctx, stdin, name, args...)
	}
	for range 2 {
		_, _, _ = r.tryEnsure(both()...)
	}
	r.quiet(both()...)
	if rules := r.iptables(addr.IPv4, "-S FORWARD"); strings.Count(rules, "-j DROP") != foreign ||
		strings.Count(rules, "OVERLAYD") != 1 {
		t.Errorf("got\n%s", rules)
	}
}

// What is wrong at one place does not hold back the other.
func TestOnePlaceFails(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, r *rig) {
		r.run = func(ctx context.Context, stdin, name string, args ...string) (string, error) {
			if strings.Contains(stdin, "*filter") {
				return "", errors.New("no filter today")
			}
			return execRun(ctx, stdin, name, args...)
		}
		if _, _, err := r.tryEnsure(both()...); err == nil || !strings.Contains(err.Error(), "no filter today") {
			t.Errorf("got %v", err)
		}
		for _, f := range addr.Families() {
			if rules := r.iptables(f, "-t nat -S"); strings.Count(rules, "-j OVERLAYD-POSTRTG") != 1 {
				t.Errorf("%s:\n%s", f, rules)
			}
		}
		r.run = execRun
		r.ensure(both()...)
		r.quiet(both()...)
	})
}

// Rules of another driver that come back, as from a saved ruleset, go again.
func TestLeftoversComeBack(t *testing.T) {
	t.Parallel()
	for name, make := range map[string][2]func(*testing.T, *nstest.NS, Variant) *rig{
		"iptables": {newRig, newNFTRig},
		"nftables": {newNFTRig, newRig},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := make[0](t, nstest.New(t), VariantNFT)
			other := make[1](t, r.ns, VariantNFT)
			r.ensure(both()...)
			intact := r.ruleset()
			other.ensure(both()...)
			r.ensure(both()...)
			r.quiet(both()...)
			got := r.ruleset()
			if strings.Contains(got, "table ip overlayd") == !r.native || strings.Contains(got, "POSTRTG") == r.native {
				t.Errorf("%s\nbefore:\n%s", got, intact)
			}
		})
	}
}

// The host's iptables may become the other variant while the daemon runs.
// Not in parallel: it changes PATH.
func TestAlternativesChange(t *testing.T) {
	ns := nstest.New(t)
	r := newRig(t, ns, VariantDefault)
	dir := t.TempDir()
	link := func(v Variant) {
		for _, f := range addr.Families() {
			for _, end := range []string{"", "-restore"} {
				file, err := exec.LookPath(programName(f, v) + end)
				if err != nil {
					t.Fatal(err)
				}
				if file, err = filepath.EvalSymlinks(file); err != nil {
					t.Fatal(err)
				}
				name := filepath.Join(dir, programName(f, VariantDefault)+end)
				_ = os.Remove(name)
				if err := os.Symlink(file, name); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	link(VariantNFT)
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	r.ensure(both()...)
	link(VariantLegacy)
	ns.Exec("nft", "flush chain ip nat OVERLAYD-POSTRTG ; flush chain ip6 nat OVERLAYD-POSTRTG")
	for range 4 {
		_, _, _ = r.tryEnsure(both()...)
	}
	r.variant = VariantLegacy
	r.quiet(both()...)
	if saved := r.saved(); strings.Count(saved, "-j OVERLAYD-POSTRTG") != 2 ||
		strings.Count(saved, "-j OVERLAYD-FWD") != 2 {
		t.Errorf("got\n%s", saved)
	}
	if left := r.ruleset(); strings.Contains(left, "OVERLAYD-POSTRTG") {
		t.Errorf("left in nf_tables:\n%s", left)
	}
}
