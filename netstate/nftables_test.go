package netstate

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/internal/nstest"
)

func openNFTables(t testing.TB, ns *nstest.NS) *NFTables {
	t.Helper()
	var n *NFTables
	var err error
	ns.Do(func() { n, err = OpenNFTables() })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	return n
}

// What is read is what iptables itself prints.
func TestNFTablesRulesAsIPTablesPrintsThem(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		f        addr.Family
		iptables string
		known    []string
	}{
		{addr.IPv4, "iptables-nft", []string{
			"-s 10.244.0.0/16 -d 10.244.0.0/16 -j RETURN", "-s 10.0.0.0/8 -j ACCEPT", "-s 10.64.0.0/12 ! -d 224.0.0.0/4 -j ACCEPT",
			"-d 10.244.5.0/25 -o overlay.1 -j RETURN", "! -s 192.0.2.1/32 ! -i eth+ ! -o eth0 -j FOREIGN", "-d 128.0.0.0/1 -g FOREIGN",
			"-m mark --mark 0x4000/0x4000 -j RETURN", "-m mark ! --mark 0x1 -j RETURN", "-m mark --mark 0x0/0xffff -j RETURN",
			"-s 10.244.0.0/16 -m set --match-set nodes4 dst -m comment --comment why -j RETURN",
			"-m set ! --match-set nodes4 dst -j RETURN", "-j MASQUERADE --random-fully",
			"-s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment why -j MASQUERADE", "-m comment --comment alone", "-d 192.0.2.7/32",
		}},
		{addr.IPv6, "ip6tables-nft", []string{
			"-s fd00:10:244::/48 -d fd00:10:244::/48 -j RETURN", "-s fd00::/8 ! -d ff00::/8 -o overlay-v6.1 -j MASQUERADE --random-fully",
			"-d 2001:db8::1/128 -j ACCEPT", "-d 2000::/3 -j ACCEPT", "! -s fd00:10:244:5::/65 -j FOREIGN", "-m mark --mark 0x4000/0x4000 -j RETURN",
			"-m set --match-set nodes6 dst -j RETURN", "-d 2001:db8::/33 -m comment --comment why -j MASQUERADE",
		}},
	} {
		ns := nstest.New(t)
		ns.Exec("ipset", "create", "other", "hash:ip")
		ns.Exec("ipset", "create", "nodes4", "hash:ip")
		ns.Exec("ipset", "create", "nodes6", "hash:ip", "family", "inet6")
		restore := "*nat\n:FOREIGN - [0:0]\n:OURS - [0:0]\n-A OURS " + strings.Join(c.known, "\n-A OURS ") + "\nCOMMIT\n"
		if out, err := ns.Feed(restore, c.iptables+"-restore", "--noflush"); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		n := openNFTables(t, ns)
		rules, err := n.Rules(c.f, "nat", "OURS")
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, words := range rules {
			got = append(got, strings.Join(words, " "))
		}
		printed := strings.Split(strings.TrimSpace(ns.Exec(c.iptables, "-t", "nat", "-S", "OURS")), "\n")[1:]
		if len(got) != len(printed) || len(got) != len(c.known) {
			t.Fatalf("%d rules, iptables prints %d", len(got), len(printed))
		}
		for i := range got {
			if got[i] != printed[i] || got[i] != "-A OURS "+c.known[i] {
				t.Errorf("%s: got %q, iptables prints %q", c.iptables, got[i], printed[i])
			}
		}
		all, err := n.Rules(c.f, "nat", "")
		if err != nil || len(all) != len(rules) {
			t.Errorf("%d rules in the table, %v", len(all), err)
		}
	}
}

// A rule with anything in it that is not known never looks like one that is. (Of a LOG, a REJECT and a limit, what is
// left out makes no rule of ours of it.)
func TestNFTablesUnknownRules(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	n := openNFTables(t, ns)
	ns.Exec("nft", "add table ip t ; add chain ip t c ; add set ip t s { type ipv4_addr ; } ; add set ip t i { type ipv4_addr ; flags interval ; }")
	ns.Exec("iptables-nft", "-t", "nat", "-N", "OURS")
	ns.Exec("ipset", "create", "nodes", "hash:ip")
	for _, rule := range []string{
		"udp dport 53 accept", "ct state new accept", "ct expiration 10 accept", "meta mark set 1", "meta iif lo accept",
		"ip saddr != @s accept", "ip saddr @s accept", "ip daddr & 255.0.255.0 == 10.0.1.0 accept", "ip saddr > 10.0.0.1 accept",
		"ip saddr 10.0.0.1-10.0.0.9 accept", "ip saddr { 10.0.0.1, 10.0.0.2 } accept", "meta l4proto tcp masquerade to :1-2",
		"masquerade persistent", "snat to 192.0.2.1",
		"ip saddr 10.0.0.1 ip saddr 10.0.0.1 accept", "ip daddr set 10.0.0.1", "ip ttl 1 accept", "ip daddr vmap { 10.0.0.1 : accept }", "continue",
		`oifname { "a", "b" } accept`, "fib saddr type local accept", "meta mark > 1 accept",
	} {
		ns.Exec("nft", "add rule ip t c "+rule)
	}
	for _, rule := range []string{
		"-p udp", "-p udp --dport 53", "-m conntrack --ctstate NEW", "-m set --match-set nodes src", "-j MASQUERADE --random",
		"-j MASQUERADE -p udp --to-ports 1-2",
		"-m addrtype --dst-type LOCAL", "-f", "-j MARK --set-mark 1", "-m state --state NEW",
	} {
		ns.Exec(append([]string{"iptables-nft", "-t", "nat", "-A", "OURS"}, strings.Fields(rule)...)...)
	}
	for table, chain := range map[string]string{"t": "c", "nat": "OURS"} {
		rules, err := n.Rules(addr.IPv4, table, chain)
		if err != nil || len(rules) < 10 {
			t.Fatalf("%d rules, %v", len(rules), err)
		}
		for i, words := range rules {
			if !slices.ContainsFunc(words, func(w string) bool { return strings.HasPrefix(w, "?") }) {
				t.Errorf("rule %d of %s passes for %q", i, chain, words)
			}
		}
	}
}

// What nft says of our kinds of rules reads like what iptables says of them.
func TestNFTablesRulesByNFT(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	n := openNFTables(t, ns)
	ns.Exec("nft", "add table ip6 t ; add chain ip6 t c ; add set ip6 t s { type ipv6_addr ; }")
	for rule, want := range map[string]string{
		`ip6 saddr fd00:10:244::/48 ip6 daddr fd00:10:244::/48 return comment "pod to pod"`: "-s fd00:10:244::/48 -d fd00:10:244::/48 -m comment --comment pod to pod -j RETURN",
		`ip6 saddr 2001:db8::1 ip6 daddr fd00:10:244::/49 return`:                           "-s 2001:db8::1/128 -d fd00:10:244::/49 -j RETURN",
		`meta mark & 0x00004000 == 0x00004000 return`:                                       "-m mark --mark 0x4000/0x4000 -j RETURN",
		`oifname "overlay.1" ip6 daddr @s counter accept`:                                   "-o overlay.1 -m set --match-set s dst -j ACCEPT",
		`ip6 daddr != ff00::/8 masquerade fully-random`:                                     "! -d ff00::/8 -j MASQUERADE --random-fully",
	} {
		ns.Exec("nft", "flush chain ip6 t c ; add rule ip6 t c "+rule)
		rules, err := n.Rules(addr.IPv6, "t", "c")
		if err != nil || len(rules) != 1 || strings.Join(rules[0], " ") != "-A c "+want {
			t.Errorf("%s: %q, %v", rule, rules, err)
		}
	}
}

func TestNFTablesObjects(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	n := openNFTables(t, ns)
	_, _, tableErr := n.Table(addr.IPv4, "t")
	_, chainErr := n.Chain(addr.IPv4, "t", "c")
	_, rulesErr := n.Rules(addr.IPv4, "t", "c")
	_, _, setErr := n.Set(addr.IPv4, "t", "s")
	for _, err := range []error{tableErr, chainErr, rulesErr, setErr} {
		if !errors.Is(err, os.ErrNotExist) {
			t.Errorf("what is not there: %v", err)
		}
	}
	ns.Exec("nft", "add table ip t ; add chain ip t c ; add chain ip t b { type nat hook postrouting priority srcnat - 5 ; policy drop ; }")
	ns.Exec("nft", "add set ip t s { type ipv4_addr ; elements = { 192.0.2.9, 192.0.2.1, 10.0.0.1 } ; } ; add counter ip t n")
	if objects, plain, err := n.Table(addr.IPv4, "t"); objects != 4 || !plain || err != nil {
		t.Errorf("%d objects, %v, %v", objects, plain, err)
	}
	for chain, want := range map[string]string{"c": "", "b": "type nat hook postrouting priority 95 policy drop"} {
		if base, err := n.Chain(addr.IPv4, "t", chain); base != want || err != nil {
			t.Errorf("%s: %q, %v", chain, base, err)
		}
	}
	kind, members, err := n.Set(addr.IPv4, "t", "s")
	if kind != "ipv4_addr" || !slices.Equal(members, prefixes("10.0.0.1/32", "192.0.2.1/32", "192.0.2.9/32")) || err != nil {
		t.Errorf("%s, %v, %v", kind, members, err)
	}
	for _, odd := range []string{
		"type inet_service", "type ipv4_addr ; flags interval ; elements = { 10.0.0.1-10.0.0.9 }",
		"type ipv4_addr ; flags interval, timeout", "type ipv4_addr ; timeout 1h", "type ipv4_addr ; size 100",
		"type ipv4_addr ; flags dynamic",
		`type ipv4_addr ; elements = { 192.0.2.1 comment "x" }`, "type ipv4_addr ; counter", "type ipv4_addr . inet_service",
	} {
		ns.Exec("nft", "add set ip t odd { "+odd+" ; }")
		if kind, _, err := n.Set(addr.IPv4, "t", "odd"); !strings.HasSuffix(kind, "?") || err != nil {
			t.Errorf("%s: %q, %v", odd, kind, err)
		}
		ns.Exec("nft", "delete set ip t odd")
	}
	for f, want := range map[addr.Family][]netip.Prefix{
		addr.IPv4: prefixes("0.0.0.0/8", "10.244.0.0/24", "10.244.1.0/24", "10.244.2.1/32", "10.244.4.128/25",
			"10.244.128.0/18", "255.255.254.0/24"),
		addr.IPv6: prefixes("::/16", "fd00:10:244::/64", "fd00:10:244:1::/64", "fd00:10:244:2::1/128",
			"fd00:10:244:1000::/52", "fe00::/8"),
	} {
		var list []string
		for _, p := range want {
			list = append(list, p.String())
		}
		family := map[addr.Family]string{addr.IPv4: "ip", addr.IPv6: "ip6"}[f]
		ns.Exec("nft",
			fmt.Sprintf("add table %s n ; add set %[1]s n s { type ipv%d_addr ; flags interval ; elements = { %s } ; }", family,
				f, strings.Join(list, ", ")))
		kind, members, err := n.Set(f, "n", "s")
		if kind != fmt.Sprintf("ipv%d_addr interval", f) || !slices.Equal(members, want) || err != nil {
			t.Errorf("%s, %v, %v", kind, members, err)
		}
		ns.Exec("nft", fmt.Sprintf("flush set %s n s", family))
		if kind, members, err := n.Set(f, "n", "s"); kind != fmt.Sprintf("ipv%d_addr interval", f) || len(members) != 0 ||
			err != nil {
			t.Errorf("empty: %s, %v, %v", kind, members, err)
		}
	}
	ns.Exec("nft", "add table ip t { flags dormant ; }")
	if _, plain, err := n.Table(addr.IPv4, "t"); plain || err != nil {
		t.Errorf("dormant: %v, %v", plain, err)
	}
}

func FuzzParseNFRule(f *testing.F) {
	ns := nstest.New(f)
	ns.Exec("ipset", "create", "nodes", "hash:ip")
	for _, rule := range []string{"-s 10.64.0.0/12 ! -d 224.0.0.0/4 -o x -m mark --mark 1/2 -j MASQUERADE", "-m set --match-set nodes dst -m comment --comment x -j RETURN"} {
		ns.Exec(append([]string{"iptables-nft", "-t", "nat", "-A", "POSTROUTING"}, strings.Fields(rule)...)...)
	}
	n := openNFTables(f, ns)
	err := n.dump(unix.NFT_MSG_GETRULE, addr.IPv4, stringAttrs("nat", "POSTROUTING"), func() {}, func(attrs []byte) { f.Add(append([]byte{}, attrs...), true) })
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, attrs []byte, v4 bool) {
		family := addr.IPv6
		if v4 {
			family = addr.IPv4
		}
		for _, w := range parseNFRule(family, attrs).words(func(uint16) string { return "set" }) {
			if strings.Contains(w, setPlaceholder) {
				t.Errorf("%q", w)
			}
		}
	})
}

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}
