package masquerade

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/nstest"
)

// forwardOrder is FORWARD with "ours" for the call of our chain, without the words that all rules have.
func (r *rig) forwardOrder(f addr.Family) string {
	r.t.Helper()
	var order []string
	for line := range strings.Lines(r.iptables(f, "-S FORWARD")) {
		if rule, ok := strings.CutPrefix(strings.TrimSpace(line), "-A FORWARD "); ok {
			rule = strings.ReplaceAll(rule, "-j OVERLAYD-FWD", "ours")
			for _, word := range []string{
				"icmp-host-prohibited", "icmp-port-unreachable", "icmp6-adm-prohibited",
				"icmp6-port-unreachable",
			} {
				rule = strings.ReplaceAll(rule, " --reject-with "+word, "")
			}
			order = append(order, strings.TrimPrefix(rule, "-j "))
		}
	}
	return strings.Join(order, ", ")
}

// Our call stands behind all that others decide, and before what decides for the rest.
func TestPlaceInForward(t *testing.T) {
	t.Parallel()
	prohibited := map[addr.Family]string{addr.IPv4: "icmp-host-prohibited", addr.IPv6: "icmp6-adm-prohibited"}
	cases := []struct {
		name   string
		before []string // rules that are there when the daemon comes
		then   []string // what others do afterwards
		want   string
	}{
		{"nothing", nil, nil, "ours"},
		{
			"rules of others",
			[]string{"-A FORWARD -j ENGINE", "-A FORWARD -i eth1 -j REJECT"},
			nil,
			"ENGINE, -i eth1 -j REJECT, ours",
		},
		{
			"first",
			[]string{"-A FORWARD -j ENGINE"},
			[]string{"-I FORWARD 1 -i eth1 -j DROP"},
			"-i eth1 -j DROP, ENGINE, ours",
		},
		{
			"appended",
			[]string{"-A FORWARD -j ENGINE"},
			[]string{"-A FORWARD -i eth1 -j DROP", "-A FORWARD -j DOCKER-USER"},
			"ENGINE, -i eth1 -j DROP, DOCKER-USER, ours",
		},
		{
			"final REJECT",
			[]string{"-A FORWARD -j ENGINE", "-A FORWARD -j REJECT --reject-with %s"},
			nil,
			"ENGINE, ours, REJECT",
		},
		{"only a REJECT", []string{"-A FORWARD -j REJECT --reject-with %s"}, nil, "ours, REJECT"},
		{
			"REJECT comes later",
			[]string{"-A FORWARD -j ENGINE"},
			[]string{"-A FORWARD -j REJECT --reject-with %s"},
			"ENGINE, ours, REJECT",
		},
		{
			"with a comment",
			[]string{"-A FORWARD -j ENGINE", "-A FORWARD -m comment --comment nothing-else -j DROP"},
			nil,
			"ENGINE, ours, -m comment --comment nothing-else -j DROP",
		},
		{
			"several",
			[]string{"-A FORWARD -j ENGINE", "-A FORWARD -j REJECT", "-A FORWARD -j DROP"},
			[]string{"-A FORWARD -j DROP"},
			"ENGINE, ours, REJECT, DROP, DROP",
		},
		{"back to the policy", []string{"-A FORWARD -j ENGINE", "-A FORWARD -j RETURN"}, nil, "ENGINE, ours, RETURN"},
		{"appended in vain", []string{"-A FORWARD -j REJECT"}, []string{"-A FORWARD -j ENGINE"}, "ours, REJECT, ENGINE"},
		{"appended in vain before", []string{"-A FORWARD -j REJECT", "-A FORWARD -j ENGINE"}, nil, "ours, REJECT, ENGINE"},
		{"before the REJECT", []string{"-A FORWARD -j REJECT"}, []string{"-I FORWARD 2 -j ENGINE"}, "ENGINE, ours, REJECT"},
		{"all stopped", []string{"-A FORWARD -j ENGINE"}, []string{"-I FORWARD 1 -j DROP"}, "DROP, ENGINE, ours"},
		{
			"all stopped, then more",
			[]string{"-A FORWARD -j ENGINE"},
			[]string{"-I FORWARD 1 -j DROP", "-A FORWARD -j DOCKER-USER"},
			"DROP, ENGINE, DOCKER-USER, ours",
		},
		{
			"put first",
			[]string{"-A FORWARD -j ENGINE"},
			[]string{"-D FORWARD -j OVERLAYD-FWD", "-I FORWARD 1 -j OVERLAYD-FWD"},
			"ENGINE, ours",
		},
		{"twice", []string{"-A FORWARD -j ENGINE"}, []string{"-I FORWARD 1 -j OVERLAYD-FWD"}, "ENGINE, ours"},
		{
			"flushed",
			[]string{"-A FORWARD -j ENGINE"},
			[]string{"-F FORWARD", "-A FORWARD -i eth1 -j DROP", "-A FORWARD -j REJECT"},
			"-i eth1 -j DROP, ours, REJECT",
		},
		{"a goto", nil, []string{"-A FORWARD -g ENGINE"}, "-g ENGINE, ours"},
		{
			"logged and rejected",
			[]string{"-A FORWARD -j ENGINE", "-A FORWARD -j LOG", "-A FORWARD -j REJECT"},
			nil,
			"ENGINE, ours, LOG, REJECT",
		},
		{"logged and dropped later", []string{"-A FORWARD -j ENGINE"}, []string{
			"-A FORWARD -m limit --limit 3/min -j LOG",
			"-A FORWARD -j DROP",
		}, "ENGINE, ours, -m limit --limit 3/min -j LOG, DROP"},
		{"only logged", []string{"-A FORWARD -j LOG"}, nil, "LOG, ours"},
		{"some are logged", []string{"-A FORWARD -i eth1 -j LOG", "-A FORWARD -j DROP"}, nil, "-i eth1 -j LOG, ours, DROP"},
		{
			"under a condition", nil,
			[]string{"-A FORWARD -p udp -j REJECT", "-A FORWARD -m mark --mark 0x1 -j DROP"},
			"-p udp -j REJECT, -m mark --mark 0x1 -j DROP, ours",
		},
	}
	eachRig := map[string]func(*testing.T, *nstest.NS, Variant) *rig{"iptables": newRig, "nftables": newNFTRig}
	for driver, make := range eachRig {
		for _, v := range []Variant{VariantNFT, VariantLegacy} {
			t.Run(driver+"/"+string(v), func(t *testing.T) {
				t.Parallel()
				for _, c := range cases {
					r := make(t, nstest.New(t), v)
					apply := func(lines []string) {
						for _, f := range addr.Families() {
							for _, line := range lines {
								if strings.Contains(line, "%s") {
									line = fmt.Sprintf(line, prohibited[f])
								}
								r.iptables(f, line)
							}
						}
					}
					apply([]string{"-N ENGINE", "-N DOCKER-USER", "-P FORWARD DROP"})
					apply(c.before)
					r.ensure(both()...)
					apply(c.then)
					r.ensure(both()...)
					for _, f := range addr.Families() {
						if got := r.forwardOrder(f); got != c.want {
							t.Errorf("%s, %s: %s, want %s", f, c.name, got, c.want)
						}
					}
					if drifts, restores := r.ensure(both()...); len(drifts) != 0 || restores != 0 {
						t.Errorf("%s: not left alone: %v", c.name, drifts)
					}
				}
			})
		}
	}
}

// What nft itself puts into iptables' chain counts as well.
func TestPlaceInForwardByNFT(t *testing.T) {
	t.Parallel()
	for _, rules := range [][]string{
		{`iifname "eth1" drop`, "OVERLAYD-FWD", "counter reject", `drop comment "all else"`},
		{
			`iifname "eth1" log drop`, "OVERLAYD-FWD", `limit rate 3/minute log prefix "end" comment "x"`,
			`log prefix "drop" counter drop`,
		},
		{`iifname "eth1" counter name "c" drop`, "OVERLAYD-FWD", `counter name "c" drop comment "all else"`},
	} {
		r := newRig(t, nstest.New(t), VariantNFT)
		r.ensure(both()...)
		r.ns.Exec("nft", "add counter ip filter c")
		for _, rule := range rules {
			if rule != "OVERLAYD-FWD" {
				r.ns.Exec("nft", "add rule ip filter FORWARD "+rule)
			}
		}
		r.ensure(both()...)
		var order []string
		for line := range strings.Lines(r.ns.Exec("nft", "list", "chain", "ip", "filter", "FORWARD")) {
			for _, word := range []string{"eth1", "OVERLAYD-FWD", "reject", "all else", `"end"`, `"drop"`} {
				if strings.Contains(line, word) {
					order = append(order, word)
				}
			}
		}
		if len(order) != len(rules) || order[1] != "OVERLAYD-FWD" {
			t.Errorf("got %s, want %s", order, rules)
		}
	}
}

// Against a program that wants the last place too, our call is moved a few times, and then now and again.
func TestContestedPlaceInForward(t *testing.T) {
	t.Parallel()
	for name, make := range map[string]func(*testing.T, *nstest.NS, Variant) *rig{
		"iptables": newRig,
		"nftables": newNFTRig,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := make(t, nstest.New(t), VariantNFT)
			r.iptables(addr.IPv4, "-A FORWARD -j ACCEPT -i eth1")
			r.ensure(both()...)
			moved, contested := 0, 0
			for range 3 * moveBurst {
				r.iptables(addr.IPv4, "-D FORWARD -j ACCEPT -i eth1")
				r.iptables(addr.IPv4, "-A FORWARD -j ACCEPT -i eth1")
				drifts, _ := r.ensure(both()...)
				if slices.Contains(kindsOf(drifts), JumpMisplaced) {
					moved++
				}
				if slices.Contains(kindsOf(drifts), JumpContested) {
					contested++
				}
			}
			if moved < moveBurst || moved > moveBurst+3 || moved+contested != 3*moveBurst {
				t.Errorf("moved %d times, left %d times", moved, contested)
			}
			// Nothing is kept of a place that is not ours, and other damage is repaired at once.
			if drifts, _ := r.ensure(both()...); len(drifts) == 0 {
				t.Error("not compared")
			}
			r.iptables(addr.IPv4, "-F OVERLAYD-FWD")
			if _, restores := r.ensure(both()...); restores != 1 {
				t.Errorf("flushed meanwhile: %d restores", restores)
			}
			r.quiet(both()...)
		})
	}
}
