package packetfilter

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/test/nstest"
)

// rulesets are packet filters as they are found in the wild, and what becomes of a peer's VXLAN packet (UDP port 8472
// from 192.0.2.2 by eth0): "pass", "drop", or "maybe" where it can't be told from the rules alone.
func rulesets() map[string]struct {
	script, want string
	v6           bool
} {
	type set = struct {
		script, want string
		v6           bool
	}
	nft := func(body string) string { return "nft -f - <<'EOF'\ntable inet t {\n" + body + "\n}\nEOF\n" }
	input := func(rules string) string {
		return nft("chain in { type filter hook input priority 0; policy accept;\n" + rules + "\n}")
	}
	return map[string]set{
		"nothing":        {"true", "pass", false},
		"policy":         {nft("chain in { type filter hook input priority 0; policy drop; }"), "drop", false},
		"port":           {input("udp dport 8472 drop"), "drop", false},
		"other port":     {input("udp dport 4789 drop"), "pass", false},
		"other protocol": {input("tcp dport 8472 drop"), "pass", false},
		"another port is open": {
			nft("chain in { type filter hook input priority 0; policy drop; tcp dport 22 accept; }"),
			"drop", false,
		},
		"without a protocol": {
			nft("chain in { type filter hook input priority 0; policy drop; th dport 22 accept; }"),
			"drop", false,
		},
		"open without a protocol": {
			nft("chain in { type filter hook input priority 0; policy drop; th dport { 22, 8472 } accept; }"),
			"pass", false,
		},
		"range of ports":       {input("udp dport 8000-9000 drop"), "drop", false},
		"ports above":          {input("udp dport > 8472 drop"), "pass", false},
		"ports from":           {input("udp dport >= 8472 drop"), "drop", false},
		"set of ports":         {input("udp dport { 53, 123, 8472 } drop"), "drop", false},
		"set without":          {input("udp dport { 53, 123 } drop"), "pass", false},
		"set of ranges":        {input("udp dport { 1-100, 8400-8500, 9000-9999 } drop"), "drop", false},
		"gap of ranges":        {input("udp dport { 1-100, 8473-8500, 9000-9999 } drop"), "pass", false},
		"not in a set":         {input("udp dport != { 53, 8472 } drop"), "pass", false},
		"source":               {input("ip saddr 192.0.2.0/24 drop"), "drop", false},
		"source of odd length": {input("ip saddr 192.0.2.0/30 drop"), "drop", false},
		"other source":         {input("ip saddr 192.0.2.128/25 drop"), "pass", false},
		"set of sources":       {input("ip saddr { 10.0.0.0/8, 192.0.2.0/29 } drop"), "drop", false},
		"named set of sources": {
			nft("set bad { type ipv4_addr; flags interval; elements = { 192.0.2.0-192.0.2.9 } }\n" +
				"chain in { type filter hook input priority 0; ip saddr @bad drop; }"),
			"drop", false,
		},
		"concatenation":           {input("ip saddr . udp dport { 192.0.2.2 . 8472 } drop"), "drop", false},
		"concatenation, other":    {input("ip saddr . udp dport { 192.0.2.2 . 53, 192.0.2.3 . 8472 } drop"), "pass", false},
		"concatenation of ranges": {input("ip saddr . udp dport { 192.0.2.0/24 . 8000-9000 } drop"), "drop", false},
		"device":                  {input(`iifname "eth0" drop`), "drop", false},
		"device by prefix":        {input(`iifname "eth*" drop`), "drop", false},
		"other device":            {input(`iifname "eth1" drop`), "pass", false},
		"device by number":        {input(`iif lo drop; iif eth0 accept; drop`), "pass", false},
		"states": {
			input("ct state established,related accept; ct state invalid drop; ct state new drop"),
			"drop", false,
		},
		"map of states": {
			input("ct state vmap { established : accept, invalid : drop }; udp dport 8472 accept; drop"),
			"pass", false,
		},
		"map of ports": {
			nft("chain no { drop; }\n" +
				"chain in { type filter hook input priority 0; udp dport vmap { 53 : accept, 8472 : jump no }; }"),
			"drop", false,
		},
		"map of devices": {
			nft("chain yes { accept; }\n" +
				"chain in { type filter hook input priority 0; policy drop; iifname vmap { lo : accept, eth0 : goto yes }; }"),
			"pass", false,
		},
		"jump and return": {
			nft("chain sub { udp dport 8472 return; drop; }\nchain in { type filter hook input priority 0; jump sub; }"),
			"pass", false,
		},
		"goto and the policy": {
			nft("chain sub { tcp dport 22 accept; }\n" +
				"chain in { type filter hook input priority 0; policy drop; goto sub; accept; }"),
			"drop", false,
		},
		"reject": {input("meta l4proto { tcp, udp } reject"), "drop", false},
		"icmp alone is open": {
			nft("chain in { type filter hook input priority 0; policy drop; meta l4proto icmp accept; }"),
			"drop", false,
		},
		"log and count": {input(`udp dport 8472 counter log prefix "x" drop`), "drop", false},
		"two chains": {
			nft("chain a { type filter hook input priority -5; accept; }\n" +
				"chain b { type filter hook input priority 5; udp dport 8472 drop; }"),
			"drop", false,
		},
		"in raw": {
			nft("chain a { type filter hook prerouting priority raw; udp dport 8472 drop; }"),
			"drop", false,
		},
		"of the address's kind": {input("fib daddr type local udp dport 8472 drop"), "drop", false},
		"rate":                  {input("udp dport 8472 limit rate over 1000/second drop"), "maybe", false},
		"rate, then all": {
			input("udp dport 8472 limit rate 1000/second accept; udp dport 8472 drop"),
			"maybe", false,
		},
		"mark that a rule sets": {
			nft("chain a { type filter hook prerouting priority mangle; udp sport 1000-65535 meta mark set 7; }\n" +
				"chain in { type filter hook input priority 0; meta mark 7 drop; }"),
			"maybe", false,
		},
		"mark that no rule sets":  {input("meta mark 7 drop"), "pass", false},
		"IPv6 rules":              {input("ip6 saddr ::/0 drop"), "pass", false},
		"dormant by other device": {input(`iifname { "eth7", "eth8" } drop`), "pass", false},
		"IPv6":                    {input("ip6 saddr 2001:db8::/32 udp dport 8472 drop"), "drop", true},
		"IPv6, set":               {input("ip6 saddr { 2001:db8::2, 2001:db8::3 } drop"), "drop", true},
		"IPv6, other":             {input("ip6 saddr 2001:db8:1::/48 drop"), "pass", true},
		"both addresses":          {input("ip saddr 192.0.2.2 ip daddr 192.0.2.1 udp dport 8472 drop"), "drop", false},
		"both addresses, other":   {input("ip saddr 192.0.2.2 ip daddr 192.0.2.3 udp dport 8472 drop"), "pass", false},
		"range of sources":        {input("ip saddr 192.0.2.0-192.0.2.9 drop"), "drop", false},
		"beside a range":          {input("ip saddr 192.0.2.0-192.0.2.1 drop"), "pass", false},
		"both ports":              {input("udp sport 53 udp dport 8472 drop"), "maybe", false},
		"range up to the end":     {input("udp dport { 8000-65535 } drop"), "drop", false},
		"map with a rest": {
			nft("chain in { type filter hook input priority 0; udp dport vmap { 53 : accept, 80-90 : accept, * : drop }; }"),
			"drop", false,
		},
		"map without it": {
			nft("chain in { type filter hook input priority 0; udp dport vmap { 53 : drop, 80-90 : drop }; }"),
			"pass", false,
		},
		"dormant": {
			nft("flags dormant; chain in { type filter hook input priority 0; drop; }"),
			"pass", false,
		},
		"ingress": {
			"nft 'table netdev t { chain c { type filter hook ingress device eth0 priority 0; udp dport 8472 drop; }; }'",
			"maybe", false,
		},
		"masked mark": {input("meta mark and 0xff == 0 drop"), "drop", false},
		"counted by name": {
			nft("counter n {}\nchain in { type filter hook input priority 0; udp dport 8472 counter name n drop; }"),
			"drop", false,
		},
		"helper by name": {
			nft("ct helper h { type \"tftp\" protocol udp; }\n" +
				"chain in { type filter hook input priority 0; ct helper set \"h\" drop; }"),
			"drop", false,
		},
		"ct mark set":            {input("ct mark set 7 drop"), "drop", false},
		"mark set before a test": {input("meta mark set 7 udp dport 1 accept; meta mark 7 drop"), "maybe", false},
		"address set before": {
			nft("chain a { type filter hook prerouting priority raw; ip daddr set 192.0.2.9; }\n" +
				"chain in { type filter hook input priority 0; ip daddr 192.0.2.1 drop; }"),
			"maybe", false,
		},
		"set of all": {
			nft("set s { type ipv4_addr; flags interval; elements = { 192.0.2.9, * }; }\n" +
				"chain in { type filter hook input priority 0; ip saddr @s drop; }"),
			"drop", false,
		},
		"set of nothing but all": {
			nft("set s { type ipv4_addr; elements = { * }; }\n" +
				"chain in { type filter hook input priority 0; ip saddr @s drop; }"),
			"drop", false,
		},
		"data map without it":  {input("meta mark set ip saddr map { 192.0.2.9 : 7 } drop"), "maybe", false},
		"socket's mark":        {input("meta mark set socket mark drop"), "maybe", false},
		"socket's mark for ct": {input("ct mark set socket mark drop"), "maybe", false},
		"socket, no verdict":   {input("socket transparent 1 meta mark set 1"), "pass", false},
		// What the library leaves out, or that only the kernel can tell.
		"byteorder":                {input("meta mark 1-10 drop"), "maybe", false},
		"byteorder, no range":      {input("meta mark > 5 drop"), "maybe", false},
		"byteorder, set":           {input("meta mark { 1-10, 20 } drop"), "maybe", false},
		"byteorder, concatenation": {input("meta mark . ip saddr { 0-5 . 192.0.2.2 } drop"), "maybe", false},
		"socket":                   {input("socket transparent 1 drop"), "maybe", false},
		"socket after a test":      {input("meta mark 0 socket mark 0 drop"), "maybe", false},
		"osf in a used register":   {input("ip saddr 192.0.2.0/24 osf name \"Linux\" drop"), "maybe", false},
		"osf, not":                 {input("ip saddr 192.0.2.0/24 osf name != \"Linux\" drop"), "maybe", false},
		"xfrm":                     {input("ipsec in reqid 1 drop"), "maybe", false},
		"secpath":                  {input("meta ipsec exists drop"), "maybe", false},
		"rt":                       {input("rt classid 1 drop"), "maybe", false},
		"rt in a concatenation":    {input("ip saddr . rt classid { 192.0.2.2 . 7 } drop"), "maybe", false},
		"tproxy": {
			nft("chain a { type filter hook prerouting priority mangle; meta l4proto udp tproxy ip to :50080 accept; udp dport 8472 drop; }"),
			"maybe", false,
		},
		"tproxy to an address": {
			nft("chain a { type filter hook prerouting priority mangle; meta l4proto udp tproxy ip to 127.0.0.1:50080 drop; }"),
			"maybe", false,
		},
		"dup": {
			"nft 'table ip t { chain in { type filter hook input priority 0; dup to 192.0.2.9; }; }'",
			"pass", false,
		},
		"fwd": {
			"nft 'table netdev t { chain c { type filter hook ingress device eth0 priority 0; udp dport 8472 fwd to lo; }; }'",
			"maybe", false,
		},
		"exthdr": {input("exthdr frag exists drop"), "maybe", true},
		"numgen": {input("numgen random mod 2 == 0 drop"), "maybe", false},
		"hash":   {input("jhash ip saddr mod 2 == 0 drop"), "maybe", false},
		"data map": {
			input("meta mark set ip saddr map { 192.0.2.2 : 7 }; meta mark 7 drop"),
			"maybe", false,
		},
		"connections": {input("ct count over 5 drop"), "maybe", false},
		"ethernet":    {input("ether saddr 02:00:00:00:00:09 drop"), "maybe", false},
		"limit by name": {
			nft("limit l { rate over 1000/second; }\n" +
				"chain in { type filter hook input priority 0; limit name \"l\" drop; }"),
			"maybe", false,
		},
		"limit by a map": {
			nft("limit l { rate over 1000/second; }\n" +
				"chain in { type filter hook input priority 0; limit name udp dport map { 8472 : \"l\" } drop; }"),
			"maybe", false,
		},
		"quota by name": {
			nft("quota q { over 1000 mbytes; }\nchain in { type filter hook input priority 0; quota name \"q\" drop; }"),
			"maybe", false,
		},
		"meter": {
			nft("set s { type ipv4_addr; flags dynamic; size 100; }\n" +
				"chain in { type filter hook input priority 0; update @s { ip saddr limit rate over 1000/second } drop; }"),
			"maybe", false,
		},
		"set of limits": {
			nft("set s { type ipv4_addr; limit rate over 1000/second; elements = { 192.0.2.2 }; }\n" +
				"chain in { type filter hook input priority 0; ip saddr @s drop; }"),
			"maybe", false,
		},
		"not in a set of limits": {
			nft("set s { type ipv4_addr; limit rate over 1000/second; elements = { 192.0.2.3 }; }\n" +
				"chain in { type filter hook input priority 0; ip saddr @s drop; }"),
			"pass", false,
		},
		"iptables-nft, state": {"iptables-nft -A INPUT -m state --state NEW -j DROP", "drop", false},
		"iptables-nft, DNAT": {
			"iptables-nft -P INPUT DROP; iptables-nft -A INPUT -m conntrack --ctstate DNAT -j ACCEPT",
			"drop", false,
		},
		"iptables-nft, untracked": {"iptables-nft -A INPUT -m conntrack --ctstate UNTRACKED -j DROP", "pass", false},
		"iptables-nft, SNAT":      {"iptables-nft -A INPUT -m conntrack --ctstate SNAT -j DROP", "maybe", false},
		"iptables-nft, mark":      {"iptables-nft -A INPUT -m mark --mark 0/1 -j DROP", "drop", false},
		"iptables-nft, mac":       {"iptables-nft -A INPUT -m mac --mac-source 02:00:00:00:00:09 -j DROP", "maybe", false},
		"iptables-nft, TEE":       {"iptables-nft -t mangle -A PREROUTING -j TEE --gateway 192.0.2.9", "maybe", false},
		"firewalld":               {firewalld(""), "drop", false},
		"firewalld, open":         {firewalld("udp dport 8472 accept"), "pass", false},
		"firewalld, IPv6":         {firewalld(""), "drop", true},
		"firewalld, IPv6, open":   {firewalld("udp dport 8472 accept"), "pass", true},
		"ufw":                     {ufw(""), "drop", false},
		"ufw, open": {
			ufw("iptables-nft -A ufw-user-input -i eth0 -p udp --dport 8472 -j ACCEPT"),
			"pass", false,
		},
		"iptables-nft": {"iptables-nft -A INPUT -p udp --dport 8472 -j DROP", "drop", false},
		"iptables-nft, chains": {
			"iptables-nft -N sub; " +
				"iptables-nft -A INPUT -i eth0 -j sub; " +
				"iptables-nft -A sub -p udp -m multiport --dports 53,8000:8500 -j DROP",
			"drop", false,
		},
		"iptables-nft, open": {
			"iptables-nft -P INPUT DROP; " +
				"iptables-nft -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT; " +
				"iptables-nft -A INPUT -s 192.0.2.0/24 -p udp -m udp --dport 8472 -m comment --comment vxlan -j ACCEPT",
			"pass", false,
		},
		"iptables-nft, closed": {
			"iptables-nft -P INPUT DROP; " +
				"iptables-nft -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT; " +
				"iptables-nft -A INPUT -p tcp --dport 22 -j ACCEPT",
			"drop", false,
		},
		"iptables-nft, hashlimit": {
			"iptables-nft -A INPUT -p udp --dport 8472 -m hashlimit --hashlimit-above 1000/s --hashlimit-name x -j DROP",
			"maybe", false,
		},
		"iptables-nft, addrtype": {
			"iptables-nft -A INPUT -m addrtype --dst-type LOCAL -p udp --dport 8472 -j REJECT",
			"drop", false,
		},
		"ip6tables-nft": {"ip6tables-nft -A INPUT -s 2001:db8::/64 -p udp --dport 8472 -j DROP", "drop", true},
	}
}

// firewalld makes such a table for a node with one zone.
func firewalld(allow string) string {
	return `nft -f - <<'EOF'
table inet firewalld {
	chain mangle_PRE_public { ct mark 7 return; }
	chain mangle_PREROUTING_ZONES { iifname "eth0" goto mangle_PRE_public; goto mangle_PRE_public; }
	chain mangle_PREROUTING { type filter hook prerouting priority mangle + 10; policy accept; jump mangle_PREROUTING_ZONES; }
	chain filter_PREROUTING {
		type filter hook prerouting priority filter + 10; policy accept;
		icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
		meta nfproto ipv6 fib saddr . mark . iif oif missing drop
	}
	chain filter_IN_public_allow { tcp dport 22 accept; ip6 daddr fe80::/64 udp dport 546 accept; ` + allow + `; }
	chain filter_IN_public { jump filter_IN_public_allow; meta l4proto { icmp, ipv6-icmp } accept; reject with icmpx admin-prohibited; }
	chain filter_INPUT_ZONES { iifname "eth0" goto filter_IN_public; goto filter_IN_public; }
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		ct state invalid drop
		jump filter_INPUT_ZONES
		reject with icmpx admin-prohibited
	}
}
EOF
`
}

// ufw makes such chains.
func ufw(allow string) string {
	return `for c in before-input not-local user-input after-input skip-to-policy-input reject-input; do iptables-nft -N ufw-$c; done
iptables-nft -P INPUT DROP
for c in before-input after-input reject-input; do iptables-nft -A INPUT -j ufw-$c; done
iptables-nft -A ufw-before-input -i lo -j ACCEPT
iptables-nft -A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
iptables-nft -A ufw-before-input -m conntrack --ctstate INVALID -j DROP
iptables-nft -A ufw-before-input -p icmp -m icmp --icmp-type 8 -j ACCEPT
iptables-nft -A ufw-before-input -p udp -m udp --sport 67 --dport 68 -j ACCEPT
iptables-nft -A ufw-before-input -j ufw-not-local
iptables-nft -A ufw-before-input -d 224.0.0.251/32 -p udp --dport 5353 -j ACCEPT
iptables-nft -A ufw-before-input -j ufw-user-input
iptables-nft -A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN
iptables-nft -A ufw-not-local -m limit --limit 3/min --limit-burst 10 -j LOG --log-prefix x
iptables-nft -A ufw-not-local -j DROP
iptables-nft -A ufw-after-input -p udp -m udp --dport 137 -j ufw-skip-to-policy-input
iptables-nft -A ufw-skip-to-policy-input -j DROP
` + allow + "\n"
}

// What is read of the rules and judged agrees with what the kernel does with a packet.
func TestFilterAgreesWithKernel(t *testing.T) {
	t.Parallel()
	nstest.NeedRoot(t)
	for name, tt := range rulesets() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			node, other := nstest.New(t), nstest.New(t)
			nstest.Link(node, "eth0", other, "eth0")
			local, remote := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
			if tt.v6 {
				local, remote = netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")
			}
			bits := map[bool]string{true: "/64", false: "/24"}[tt.v6]
			node.Addr("eth0", local.String()+bits)
			other.Addr("eth0", remote.String()+bits)
			at := netip.AddrPortFrom(local, 8472)
			if !receives(t, node, other, at, true) {
				t.Fatal("nothing arrives even without rules")
			}
			node.Exec("sh", "-ec", tt.script)

			f, index := readIn(t, node)
			p := Packet{
				Source: remote, Destination: local, V6: tt.v6, Protocol: unix.IPPROTO_UDP,
				In: Device{"eth0", index}, Port: 8472, Local: true, Answered: true,
			}
			got := f.Through(p, "ingress", "prerouting", "input")
			verdict := map[bool]string{true: "drop", false: "pass"}[got.Drops]
			if got.Unsure {
				verdict = "maybe"
			}
			if verdict != tt.want {
				t.Errorf("judged %s, want %s: %s %s %s\n%s", verdict, tt.want, got.Chain, got.By, got.Unclear,
					node.Exec("nft", "list", "ruleset"))
			}
			if tt.want == "maybe" {
				return
			}
			if arrives := receives(t, node, other, at, tt.want == "pass"); arrives != (tt.want == "pass") {
				t.Errorf("the kernel lets it through: %v; judged %s", arrives, verdict)
			}
		})
	}
}

func readIn(t *testing.T, node *nstest.NS) (f Filter, eth0 int) {
	t.Helper()
	var err error
	node.Do(func() {
		if f, err = Read(); err == nil {
			var i *net.Interface
			i, err = net.InterfaceByName("eth0")
			eth0 = i.Index
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return f, eth0
}

// Whether a rule gives a packet another sender is judged as the kernel does it.
func TestTranslationAgreesWithKernel(t *testing.T) {
	t.Parallel()
	nstest.NeedRoot(t)
	nft := func(rules string) string {
		return "nft -f - <<'EOF'\ntable inet t {\nchain sub { masquerade; }\nchain post { type nat hook postrouting priority srcnat;\n" + rules + "\n}\n}\nEOF\n"
	}
	for name, tt := range map[string]struct {
		script     string
		translates bool
	}{
		"nothing":             {"true", false},
		"all":                 {nft("masquerade"), true},
		"by source":           {nft("ip saddr 10.244.0.0/16 masquerade"), true},
		"but for the network": {nft("ip saddr 10.244.0.0/16 ip daddr 10.244.0.0/16 accept; masquerade"), false},
		"other source":        {nft("ip saddr 172.17.0.0/16 masquerade"), false},
		"other device":        {nft(`oifname "eth7" masquerade`), false},
		"in another chain":    {nft(`oifname "eth0" jump sub`), true},
		"snat":                {nft("snat ip to 192.0.2.1"), true},
		"accept is not final": {
			nft("accept") +
				`nft 'add table ip o; add chain ip o p { type nat hook postrouting priority 200; }; add rule ip o p masquerade'`,
			true,
		},
		"marked":       {nft("meta mark & 0x4000 == 0x4000 masquerade"), false},
		"iptables-nft": {"iptables-nft -t nat -A POSTROUTING -s 10.244.0.0/16 -j MASQUERADE", true},
		"kube-proxy's": {"iptables-nft -t nat -N K; iptables-nft -t nat -A POSTROUTING -j K; iptables-nft -t nat -A K -m mark ! --mark 0x4000/0x4000 -j RETURN; iptables-nft -t nat -A K -j MASQUERADE", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			node, other := nstest.New(t), nstest.New(t)
			nstest.Link(node, "eth0", other, "eth0")
			node.Addr("eth0", "192.0.2.1/24")
			other.Addr("eth0", "192.0.2.2/24")
			other.Addr("lo", "10.244.2.5/32")
			node.Addr("lo", "10.244.1.5/32")
			node.Exec("ip", "route", "add", "10.244.2.0/24", "via", "192.0.2.2")
			other.Exec("ip", "route", "add", "10.244.1.0/24", "via", "192.0.2.1")
			node.Exec("sh", "-ec", tt.script)
			f, index := readIn(t, node)
			src, dst := netip.MustParseAddr("10.244.1.5"), netip.MustParseAddr("10.244.2.5")
			got := f.Translated(Packet{
				Source: src, Destination: dst, Protocol: unix.IPPROTO_UDP, Out: Device{"eth0", index}, SourcePort: 49151,
				Port: 49151,
			})
			if got.Drops != tt.translates || got.Unsure {
				t.Errorf("judged %+v, want %v", got, tt.translates)
			}
			if from := senderOf(t, node, other, src, dst); (from != src) != tt.translates {
				t.Errorf("the kernel lets it come from %s; judged %v", from, got.Drops)
			}
		})
	}
}

// senderOf is where a packet comes from in the eyes of who gets it.
func senderOf(t *testing.T, node, other *nstest.NS, src, dst netip.Addr) netip.Addr {
	t.Helper()
	var l, c *net.UDPConn
	var err error
	other.Do(func() { l, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(dst, 4000))) })
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	node.Do(func() {
		c, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(src, 4001)),
			net.UDPAddrFromAddrPort(netip.AddrPortFrom(dst, 4000)))
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	_ = l.SetReadDeadline(time.Now().Add(20 * time.Second))
	_, from, err := l.ReadFromUDPAddrPort(make([]byte, 8))
	if err != nil {
		t.Fatal(err)
	}
	return from.Addr().Unmap()
}

// receives sends a packet and reports whether it comes; one that is expected is waited for longer.
func receives(t *testing.T, node, from *nstest.NS, at netip.AddrPort, expected bool) bool {
	t.Helper()
	var l *net.UDPConn
	var err error
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		node.Do(func() { l, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at)) })
		// A program that is about to be started by another test may have the last one open still.
		if !errors.Is(err, unix.EADDRINUSE) || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var c *net.UDPConn
	from.Do(func() { c, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(at)) })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	wait := 100 * time.Millisecond
	if expected {
		wait = 20 * time.Second
	}
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	_ = l.SetReadDeadline(time.Now().Add(wait))
	_, _, err = l.ReadFrom(make([]byte, 8))
	return err == nil
}

// What a rule does that can't be decoded is not known, and nothing is claimed of any other.
func TestRuleThatIsNotUnderstood(t *testing.T) {
	t.Parallel()
	nstest.NeedRoot(t)
	node, other := nstest.New(t), nstest.New(t)
	nstest.Link(node, "eth0", other, "eth0")
	node.Exec("nft", `table ip nat { chain POSTROUTING { type nat hook postrouting priority srcnat; }; }
		table inet t { chain out { type filter hook postrouting priority 0; udp dport 8472 drop; }; }`)
	// Revision 1 of SNAT is struct nf_nat_range, which the library takes for the structure of revision 0.
	info := xt.Unknown(append([]byte{3, 0, 0, 0}, make([]byte, 36)...))
	table := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: "nat"}
	node.Do(func() {
		c := &nftables.Conn{}
		c.AddRule(&nftables.Rule{Table: table, Chain: &nftables.Chain{Name: "POSTROUTING"}, Exprs: []expr.Any{
			&expr.Target{Name: "SNAT", Rev: 1, Info: &info},
		}})
		if err := c.Flush(); err != nil {
			t.Error(err)
		}
	})
	f, index := readIn(t, node)
	p := Packet{
		Source: netip.MustParseAddr("192.0.2.1"), Destination: netip.MustParseAddr("192.0.2.2"), Protocol: unix.IPPROTO_UDP,
		Out: Device{"eth0", index},
	}
	if got := f.Translated(p); !got.Unsure || !strings.Contains(got.Unclear, "target") {
		t.Errorf("%+v", got)
	}
	p.Port = 8472
	if got := f.Through(p, "output", "postrouting"); !got.Drops {
		t.Errorf("%+v", got)
	}
	p.Port = 53
	if got := f.Through(p, "output", "postrouting"); got.Drops || got.Unsure {
		t.Errorf("%+v", got)
	}
}

// The rules of iptables-legacy are listed, and no table comes to be by that.
func TestReadLegacy(t *testing.T) {
	t.Parallel()
	nstest.NeedRoot(t)
	node := nstest.New(t)
	list := func() (out []Legacy) {
		node.Do(func() {
			var err error
			if out, err = ReadLegacy(context.Background()); err != nil {
				t.Error(err)
			}
		})
		return out
	}
	if got := list(); len(got) != 0 {
		t.Errorf("%+v", got)
	}
	node.Exec("sh", "-ec",
		`for i in iptables ip6tables; do $i-legacy -w 20 -N a; $i-legacy -w 20 -A a -j DROP; $i-legacy -w 20 -A FORWARD -j a; done
		iptables-legacy -w 20 -P INPUT DROP`)
	got := list()
	slices.SortFunc(got, func(a, b Legacy) int { return strings.Compare(a.Save+a.Chain, b.Save+b.Chain) })
	want := []Legacy{
		{"ip6tables-legacy-save", "filter", "FORWARD", "ACCEPT", []string{"-A FORWARD -j a"}},
		{"ip6tables-legacy-save", "filter", "INPUT", "ACCEPT", nil},
		{"ip6tables-legacy-save", "filter", "OUTPUT", "ACCEPT", nil},
		{"ip6tables-legacy-save", "filter", "a", "-", []string{"-A a -j DROP"}},
		{"iptables-legacy-save", "filter", "FORWARD", "ACCEPT", []string{"-A FORWARD -j a"}},
		{"iptables-legacy-save", "filter", "INPUT", "DROP", nil},
		{"iptables-legacy-save", "filter", "OUTPUT", "ACCEPT", nil},
		{"iptables-legacy-save", "filter", "a", "-", []string{"-A a -j DROP"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if names := node.Exec("cat", "/proc/net/ip_tables_names"); strings.TrimSpace(names) != "filter" {
		t.Errorf("tables: %s", names)
	}
}

// A host with many services has thousands of chains.
func BenchmarkRead(b *testing.B) {
	nstest.NeedRoot(b)
	node := nstest.New(b)
	var rules strings.Builder
	rules.WriteString("table ip t {\n")
	for i := range 5000 {
		fmt.Fprintf(&rules, "chain c%d { ip saddr 10.0.0.1 tcp dport 80 meta mark set 7; ip daddr 10.1.0.1 drop; }\n", i)
	}
	rules.WriteString("chain in { type filter hook input priority 0;\n")
	for i := range 5000 {
		fmt.Fprintf(&rules, "ip saddr 10.%d.%d.1 jump c%d\n", i/250, i%250, i)
	}
	rules.WriteString("}\n}\n")
	file := filepath.Join(b.TempDir(), "rules")
	if err := os.WriteFile(file, []byte(rules.String()), 0o600); err != nil {
		b.Fatal(err)
	}
	node.Exec("nft", "-f", file)
	for b.Loop() {
		var f Filter
		var err error
		node.Do(func() { f, err = Read() })
		if err != nil || len(f) != 5001 {
			b.Errorf("%d chains, %v", len(f), err)
		}
	}
}
