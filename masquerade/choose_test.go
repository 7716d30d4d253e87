package masquerade

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/nstest"
)

func TestDecide(t *testing.T) {
	t.Parallel()
	plain := VariantFacts{Program: true}
	rules := func(n int) VariantFacts { return VariantFacts{Program: true, Rules: n} }
	kube := VariantFacts{Program: true, KubeProxy: true, Kubelet: true, Rules: 40}
	kubelet := VariantFacts{Program: true, Kubelet: true, Rules: 3}
	for _, c := range []struct {
		name    string
		kind    Kind
		variant Variant
		facts   Facts
		want    Kind
		wantV   Variant
		reason  string
	}{
		{"nothing special", KindAuto, "", Facts{true, false, plain, plain}, KindIPTables, "", "the host's default"},
		{"kube-proxy in nftables", KindAuto, "", Facts{true, true, plain, plain}, KindNFTables, "", "kube-proxy"},
		{
			"kube-proxy in nftables, the kubelet's hint is in iptables", KindAuto, "",
			Facts{true, true, kubelet, plain},
			KindNFTables, "", "kube-proxy",
		},
		{
			"kube-proxy in nftables, but there is no nft", KindAuto, "",
			Facts{false, true, kubelet, plain},
			KindIPTables, "nft",
			"kubelet",
		},
		{"kube-proxy in both", KindAuto, "", Facts{true, true, kube, plain}, KindIPTables, "nft", "kube-proxy"},
		{"kube-proxy in iptables-nft", KindAuto, "", Facts{true, false, kube, rules(99)}, KindIPTables, "nft", "kube-proxy"},
		{
			"kube-proxy in iptables-legacy", KindAuto, "",
			Facts{true, false, kubelet, kube},
			KindIPTables, "legacy",
			"kube-proxy",
		},
		{
			"kubelet in iptables-legacy", KindAuto, "",
			Facts{true, false, rules(99), kubelet},
			KindIPTables, "legacy",
			"kubelet",
		},
		{
			"Docker in iptables-legacy", KindAuto, "",
			Facts{true, false, plain, rules(12)},
			KindIPTables, "legacy",
			"legacy 12",
		},
		{"Docker in iptables-nft", KindAuto, "", Facts{true, false, rules(12), rules(3)}, KindIPTables, "nft", "nft 12"},
		{"no iptables", KindAuto, "", Facts{NFT: true}, KindNFTables, "", "iptables not found"},
		{"neither", KindAuto, "", Facts{}, KindIPTables, "", "the host's default"},
		{
			"only iptables-nft", KindAuto, "",
			Facts{NFT: true, IPTablesNFT: plain},
			KindIPTables, "nft",
			"iptables-legacy not found",
		},
		{
			"only iptables-legacy", KindAuto, "",
			Facts{NFT: true, Legacy: plain},
			KindIPTables, "legacy",
			"iptables-nft not found",
		},
		{"told iptables", KindIPTables, "", Facts{true, true, plain, rules(2)}, KindIPTables, "legacy", "legacy 2"},
		{"told nftables", KindNFTables, "", Facts{true, false, kube, plain}, KindNFTables, "", "configured"},
		{"told the variant", KindAuto, VariantLegacy, Facts{true, false, kube, plain}, KindIPTables, "legacy", "configured"},
	} {
		got := Decide(c.kind, c.variant, c.facts)
		if got.Kind != c.want || got.Variant != c.wantV || !strings.Contains(got.Reason, c.reason) {
			t.Errorf("%s: %+v", c.name, got)
		}
	}
}

func TestGather(t *testing.T) {
	t.Parallel()
	both := VariantFacts{Program: true}
	for name, c := range map[string]struct {
		prepare []string
		want    Facts
	}{
		"nothing": {nil, Facts{true, false, both, both}},
		"kube-proxy in nftables": {
			[]string{"nft add table ip6 kube-proxy", "iptables-nft -t mangle -N KUBE-IPTABLES-HINT"},
			Facts{true, true, VariantFacts{Program: true, Kubelet: true}, both},
		},
		"kube-proxy in iptables-legacy": {
			[]string{
				"iptables-legacy -w 20 -t nat -N KUBE-SERVICES", "iptables-legacy -w 20 -t nat -A OUTPUT -j KUBE-SERVICES",
				"ip6tables-legacy -w 20 -t mangle -N KUBE-KUBELET-CANARY",
			},
			Facts{true, false, both, VariantFacts{Program: true, KubeProxy: true, Kubelet: true, Rules: 1}},
		},
		"rules of ours do not count": {
			[]string{
				"iptables-nft -N OVERLAYD-FWD", "iptables-nft -A FORWARD -j OVERLAYD-FWD",
				"ip6tables-nft -A FORWARD -j ACCEPT",
			},
			Facts{true, false, VariantFacts{Program: true, Rules: 1}, both},
		},
	} {
		ns := nstest.New(t)
		for _, line := range c.prepare {
			ns.Exec(strings.Fields(line)...)
		}
		before := ns.Exec("nft", "list", "ruleset") + ns.Exec("cat", "/proc/net/ip_tables_names",
			"/proc/net/ip6_tables_names")
		var got Facts
		ns.Do(func() { got = gather(t.Context()) })
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s:\n%s", name, diff)
		}
		if after := ns.Exec("nft", "list", "ruleset") + ns.Exec("cat", "/proc/net/ip_tables_names",
			"/proc/net/ip6_tables_names"); after != before {
			t.Errorf("%s: gathering the facts changed something:\n%s", name, after)
		}
	}
}

// A driver on iptables that was chosen before kube-proxy came, in its mode nftables, says once that it is the wrong one.
func TestKubeProxyComesLater(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	first := func(kind Kind) (d Driver, is Kind) {
		var decision Decision
		ns.Do(func() { d, decision = New(t.Context(), Options{Kind: kind}) })
		return d, decision.Kind
	}
	again := func(d Driver) (choose bool) {
		ns.Do(func() {
			res, err := d.Ensure(t.Context(), per(both()))
			if err != nil {
				t.Error(err)
			}
			choose = res.ChooseAgain
		})
		return choose
	}
	auto, kind := first(KindAuto)
	told, _ := first(KindIPTables)
	if kind != KindIPTables || again(auto) || again(told) {
		t.Fatalf("%s is chosen without a kube-proxy, and at once another one", kind)
	}
	ns.Exec("nft", "add table ip6 kube-proxy")
	if !again(auto) || again(auto) || again(told) {
		t.Error("want one call for another driver, of the one that the host has chosen")
	}
	if auto, kind = first(KindAuto); kind != KindNFTables || again(auto) {
		t.Errorf("beside kube-proxy, %s is chosen", kind)
	}
	if left := ns.Exec("iptables-nft-save") + ns.Exec("ip6tables-nft-save"); strings.Contains(left, "POSTRTG") {
		t.Errorf("rules in both: %s", left)
	}
}

func TestNewAndRemove(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	r := newRig(t, ns, VariantNFT).withSets()
	for _, o := range []Options{
		{Kind: KindNFTables},
		{Kind: KindIPTables},
		{Kind: KindIPTables, Variant: VariantLegacy},
		{Kind: KindAuto},
	} {
		o.Sets = r.sets
		ns.Do(func() {
			d, why := New(t.Context(), o)
			if o.Kind != KindAuto && why.Kind != o.Kind || why.Reason == "" || why.Kind == KindAuto {
				t.Errorf("%+v: %+v", o, why)
			}
			if res, err := d.Ensure(t.Context(), per(bothWithNodes())); err != nil || res.NoSets != nil {
				t.Errorf("%+v: %v, %v", o, err, res.NoSets)
			}
		})
		if place := ns.Exec("nft", "list", "ruleset"); strings.Contains(place,
			"table ip overlayd") != (o.Kind == KindNFTables) {
			t.Errorf("%+v:\n%s", o, place)
		}
	}
	ns.Do(func() {
		if err := Remove(t.Context(), r.sets); err != nil {
			t.Error(err)
		}
	})
	left := ns.Exec("nft", "list", "ruleset") + ns.Exec("ipset", "list", "-n") + r.saved() +
		ns.Exec("iptables-legacy-save") + ns.Exec("ip6tables-legacy-save")
	if strings.Contains(strings.ToLower(left), "overlayd") {
		t.Errorf("left:\n%s", left)
	}
	if got := nodeSet(addr.IPv4); strings.Contains(left, got) {
		t.Error("the set is left")
	}
}

func TestParseKind(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"auto", "iptables", "nftables"} {
		if k, err := ParseKind(s); err != nil || string(k) != s {
			t.Errorf("%q: %v, %v", s, k, err)
		}
	}
	for _, s := range []string{"", "nft", "ipset"} {
		if _, err := ParseKind(s); err == nil {
			t.Errorf("took %q", s)
		}
	}
}
