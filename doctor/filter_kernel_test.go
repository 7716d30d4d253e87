package doctor

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/internal/nstest"
	"github.com/overlayd/overlayd/netstate"
)

// rulesets are packet filters as they are found in the wild, and what becomes of a peer's VXLAN packet (UDP port 8472 from 192.0.2.2 by
// eth0): "pass", "drop", or "maybe" where it can't be told from the rules alone.
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
		"nothing":                  {"true", "pass", false},
		"policy":                   {nft("chain in { type filter hook input priority 0; policy drop; }"), "drop", false},
		"port":                     {input("udp dport 8472 drop"), "drop", false},
		"other port":               {input("udp dport 4789 drop"), "pass", false},
		"other protocol":           {input("tcp dport 8472 drop"), "pass", false},
		"another port is open":     {nft("chain in { type filter hook input priority 0; policy drop; tcp dport 22 accept; }"), "drop", false},
		"without a protocol":       {nft("chain in { type filter hook input priority 0; policy drop; th dport 22 accept; }"), "drop", false},
		"open without a protocol":  {nft("chain in { type filter hook input priority 0; policy drop; th dport { 22, 8472 } accept; }"), "pass", false},
		"range of ports":           {input("udp dport 8000-9000 drop"), "drop", false},
		"ports above":              {input("udp dport > 8472 drop"), "pass", false},
		"ports from":               {input("udp dport >= 8472 drop"), "drop", false},
		"set of ports":             {input("udp dport { 53, 123, 8472 } drop"), "drop", false},
		"set without":              {input("udp dport { 53, 123 } drop"), "pass", false},
		"set of ranges":            {input("udp dport { 1-100, 8400-8500, 9000-9999 } drop"), "drop", false},
		"gap of ranges":            {input("udp dport { 1-100, 8473-8500, 9000-9999 } drop"), "pass", false},
		"not in a set":             {input("udp dport != { 53, 8472 } drop"), "pass", false},
		"source":                   {input("ip saddr 192.0.2.0/24 drop"), "drop", false},
		"source of odd length":     {input("ip saddr 192.0.2.0/30 drop"), "drop", false},
		"other source":             {input("ip saddr 192.0.2.128/25 drop"), "pass", false},
		"set of sources":           {input("ip saddr { 10.0.0.0/8, 192.0.2.0/29 } drop"), "drop", false},
		"named set of sources":     {nft("set bad { type ipv4_addr; flags interval; elements = { 192.0.2.0-192.0.2.9 } }\nchain in { type filter hook input priority 0; ip saddr @bad drop; }"), "drop", false},
		"concatenation":            {input("ip saddr . udp dport { 192.0.2.2 . 8472 } drop"), "drop", false},
		"concatenation, other":     {input("ip saddr . udp dport { 192.0.2.2 . 53, 192.0.2.3 . 8472 } drop"), "pass", false},
		"concatenation of ranges":  {input("ip saddr . udp dport { 192.0.2.0/24 . 8000-9000 } drop"), "drop", false},
		"device":                   {input(`iifname "eth0" drop`), "drop", false},
		"device by prefix":         {input(`iifname "eth*" drop`), "drop", false},
		"other device":             {input(`iifname "eth1" drop`), "pass", false},
		"device by number":         {input(`iif lo drop; iif eth0 accept; drop`), "pass", false},
		"states":                   {input("ct state established,related accept; ct state invalid drop; ct state new drop"), "drop", false},
		"map of states":            {input("ct state vmap { established : accept, invalid : drop }; udp dport 8472 accept; drop"), "pass", false},
		"map of ports":             {nft("chain no { drop; }\nchain in { type filter hook input priority 0; udp dport vmap { 53 : accept, 8472 : jump no }; }"), "drop", false},
		"map of devices":           {nft("chain yes { accept; }\nchain in { type filter hook input priority 0; policy drop; iifname vmap { lo : accept, eth0 : goto yes }; }"), "pass", false},
		"jump and return":          {nft("chain sub { udp dport 8472 return; drop; }\nchain in { type filter hook input priority 0; jump sub; }"), "pass", false},
		"goto and the policy":      {nft("chain sub { tcp dport 22 accept; }\nchain in { type filter hook input priority 0; policy drop; goto sub; accept; }"), "drop", false},
		"reject":                   {input("meta l4proto { tcp, udp } reject"), "drop", false},
		"icmp alone is open":       {nft("chain in { type filter hook input priority 0; policy drop; meta l4proto icmp accept; }"), "drop", false},
		"log and count":            {input(`udp dport 8472 counter log prefix "x" drop`), "drop", false},
		"two chains":               {nft("chain a { type filter hook input priority -5; accept; }\nchain b { type filter hook input priority 5; udp dport 8472 drop; }"), "drop", false},
		"in raw":                   {nft("chain a { type filter hook prerouting priority raw; udp dport 8472 drop; }"), "drop", false},
		"of the address's kind":    {input("fib daddr type local udp dport 8472 drop"), "drop", false},
		"rate":                     {input("udp dport 8472 limit rate over 1000/second drop"), "maybe", false},
		"rate, then all":           {input("udp dport 8472 limit rate 1000/second accept; udp dport 8472 drop"), "maybe", false},
		"mark that somebody sets":  {nft("chain a { type filter hook prerouting priority mangle; udp sport 1000-65535 meta mark set 7; }\nchain in { type filter hook input priority 0; meta mark 7 drop; }"), "maybe", false},
		"mark that nobody sets":    {input("meta mark 7 drop"), "pass", false},
		"IPv6 rules":               {input("ip6 saddr ::/0 drop"), "pass", false},
		"dormant by other device":  {input(`iifname { "eth7", "eth8" } drop`), "pass", false},
		"IPv6":                     {input("ip6 saddr 2001:db8::/32 udp dport 8472 drop"), "drop", true},
		"IPv6, set":                {input("ip6 saddr { 2001:db8::2, 2001:db8::3 } drop"), "drop", true},
		"IPv6, other":              {input("ip6 saddr 2001:db8:1::/48 drop"), "pass", true},
		"firewalld":                {firewalld(""), "drop", false},
		"firewalld, open":          {firewalld("udp dport 8472 accept"), "pass", false},
		"firewalld, IPv6":          {firewalld(""), "drop", true},
		"firewalld, IPv6, open":    {firewalld("udp dport 8472 accept"), "pass", true},
		"ufw":                      {ufw(""), "drop", false},
		"ufw, open":                {ufw("iptables-nft -A ufw-user-input -i eth0 -p udp --dport 8472 -j ACCEPT"), "pass", false},
		"iptables-nft":             {"iptables-nft -A INPUT -p udp --dport 8472 -j DROP", "drop", false},
		"iptables-nft, chains":     {"iptables-nft -N sub; iptables-nft -A INPUT -i eth0 -j sub; iptables-nft -A sub -p udp -m multiport --dports 53,8000:8500 -j DROP", "drop", false},
		"iptables-nft, open":       {"iptables-nft -P INPUT DROP; iptables-nft -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT; iptables-nft -A INPUT -s 192.0.2.0/24 -p udp -m udp --dport 8472 -m comment --comment vxlan -j ACCEPT", "pass", false},
		"iptables-nft, closed":     {"iptables-nft -P INPUT DROP; iptables-nft -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT; iptables-nft -A INPUT -p tcp --dport 22 -j ACCEPT", "drop", false},
		"iptables-nft, hashlimit":  {"iptables-nft -A INPUT -p udp --dport 8472 -m hashlimit --hashlimit-above 1000/s --hashlimit-name x -j DROP", "maybe", false},
		"iptables-nft, addrtype":   {"iptables-nft -A INPUT -m addrtype --dst-type LOCAL -p udp --dport 8472 -j REJECT", "drop", false},
		"ip6tables-nft":            {"ip6tables-nft -A INPUT -s 2001:db8::/64 -p udp --dport 8472 -j DROP", "drop", true},
		"legacy":                   {"iptables-legacy -w 20 -A INPUT -p udp --dport 8472 -j DROP", "drop", false},
		"legacy, other":            {"iptables-legacy -w 20 -A INPUT -p udp --dport 4789 -j DROP; iptables-legacy -w 20 -A INPUT ! -i eth0 -j DROP; iptables-legacy -w 20 -A INPUT -s 192.0.2.128/25 -j DROP", "pass", false},
		"legacy, policy":           {"iptables-legacy -w 20 -P INPUT DROP; iptables-legacy -w 20 -A INPUT -p tcp --dport 22 -j ACCEPT", "drop", false},
		"legacy, chains":           {"iptables-legacy -w 20 -N a; iptables-legacy -w 20 -N b; iptables-legacy -w 20 -A INPUT -i eth+ -j a; iptables-legacy -w 20 -A a -p tcp -j RETURN; iptables-legacy -w 20 -A a -g b; iptables-legacy -w 20 -A a -j ACCEPT; iptables-legacy -w 20 -A b -p udp -m multiport --dports 22,8472 -j DROP", "drop", false},
		"legacy, return":           {"iptables-legacy -w 20 -P INPUT DROP; iptables-legacy -w 20 -N a; iptables-legacy -w 20 -A INPUT -j a; iptables-legacy -w 20 -A INPUT -p udp --dport 8000:9000 -m conntrack --ctstate NEW -j ACCEPT; iptables-legacy -w 20 -A a -s 192.0.2.2 -j RETURN; iptables-legacy -w 20 -A a -j DROP", "pass", false},
		"legacy, reject":           {"iptables-legacy -w 20 -A INPUT -m addrtype --dst-type LOCAL -j REJECT", "drop", false},
		"legacy, mangle":           {"iptables-legacy -w 20 -t mangle -A PREROUTING -p udp --dport 8472 -j DROP", "drop", false},
		"ip6tables-legacy":         {"ip6tables-legacy -w 20 -A INPUT -s 2001:db8::2 -i eth0 -p udp --dport 8472 -j DROP", "drop", true},
		"ip6tables-legacy, chains": {"ip6tables-legacy -w 20 -P INPUT DROP; ip6tables-legacy -w 20 -N a; ip6tables-legacy -w 20 -A INPUT -g a; ip6tables-legacy -w 20 -A a ! -s 2001:db8::3 -j ACCEPT", "pass", true},
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

			facts, link := readFilter(t, node)
			f := facts.Filter
			p := newPacket(remote, local, unix.IPPROTO_UDP).in("eth0", link.Index)
			p[netstate.FieldPort], p[netstate.FieldTypeOfDst], p[netstate.FieldReverse] = port16(8472), native32(typeLocal), native32(1)
			got := f.through(p, tt.v6, "ingress", "prerouting", "input")
			verdict := map[bool]string{true: "drop", false: "pass"}[got.drops]
			if got.maybe {
				verdict = "maybe"
			}
			if verdict != tt.want {
				t.Errorf("judged %s, want %s: %s %s %s\n%s", verdict, tt.want, where(got.chain), got.by, got.unclear, node.Exec("sh", "-c", "nft list ruleset; iptables-legacy-save; ip6tables-legacy-save"))
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

func readFilter(t *testing.T, node *nstest.NS) (Facts, netstate.SurveyLink) {
	t.Helper()
	var f Facts
	var link netstate.SurveyLink
	node.Do(func() {
		f.Errs = map[string]error{}
		f.lookAtFilter()
		s, err := netstate.Look(func(string) bool { return false })
		if err != nil {
			t.Error(err)
		}
		f.Survey = s
		link, _ = s.Link("eth0")
	})
	for what, err := range f.Errs {
		t.Errorf("%s: %v", what, err)
	}
	return f, link
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
		"nothing":              {"true", false},
		"all":                  {nft("masquerade"), true},
		"by source":            {nft("ip saddr 10.244.0.0/16 masquerade"), true},
		"but for the network":  {nft("ip saddr 10.244.0.0/16 ip daddr 10.244.0.0/16 accept; masquerade"), false},
		"other source":         {nft("ip saddr 172.17.0.0/16 masquerade"), false},
		"other device":         {nft(`oifname "eth7" masquerade`), false},
		"in another chain":     {nft(`oifname "eth0" jump sub`), true},
		"snat":                 {nft("snat ip to 192.0.2.1"), true},
		"accept is no way out": {nft("accept") + `nft 'add table ip o; add chain ip o p { type nat hook postrouting priority 200; }; add rule ip o p masquerade'`, true},
		"marked":               {nft("meta mark & 0x4000 == 0x4000 masquerade"), false},
		"iptables-nft":         {"iptables-nft -t nat -A POSTROUTING -s 10.244.0.0/16 -j MASQUERADE", true},
		"kube-proxy's":         {"iptables-nft -t nat -N K; iptables-nft -t nat -A POSTROUTING -j K; iptables-nft -t nat -A K -m mark ! --mark 0x4000/0x4000 -j RETURN; iptables-nft -t nat -A K -j MASQUERADE", false},
		"legacy":               {"iptables-legacy -w 20 -t nat -A POSTROUTING ! -d 10.244.1.0/24 -j MASQUERADE", true},
		"legacy, excepted":     {"iptables-legacy -w 20 -t nat -A POSTROUTING ! -d 10.244.0.0/16 -j MASQUERADE", false},
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
			facts, link := readFilter(t, node)
			src, dst := netip.MustParseAddr("10.244.1.5"), netip.MustParseAddr("10.244.2.5")
			got := facts.Translation.through(newPacket(src, dst, unix.IPPROTO_UDP).out("eth0", link.Index).ports(49151, 49151), false, "postrouting")
			if got.drops != tt.translates || got.maybe {
				t.Errorf("judged %+v, want %v", got, tt.translates)
			}
			if from := senderOf(t, node, other, src, dst); (from != src) != tt.translates {
				t.Errorf("the kernel lets it come from %s; judged %v", from, got.drops)
			}
		})
	}
}

// What keeps single pods from being reached is found with the pods' own addresses, and named with what to do about it.
func TestPodsThatAreNotReached(t *testing.T) {
	t.Parallel()
	nstest.NeedRoot(t)
	docker := func(unpublished string) string {
		return `for c in DOCKER-USER DOCKER-FORWARD DOCKER OVERLAYD-FWD; do iptables-nft -N $c; done
			iptables-nft -P FORWARD DROP
			for c in DOCKER-USER DOCKER-FORWARD OVERLAYD-FWD; do iptables-nft -A FORWARD -j $c; done
			iptables-nft -A DOCKER-FORWARD -o cni0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
			iptables-nft -A DOCKER-FORWARD -o cni0 -j DOCKER
			iptables-nft -A DOCKER-FORWARD -i cni0 -j ACCEPT; iptables-nft -A DOCKER ! -i cni0 -o cni0 -j ` + unpublished + `
			iptables-nft -A OVERLAYD-FWD -d 10.244.0.0/16 -j ACCEPT; iptables-nft -A OVERLAYD-FWD -s 10.244.0.0/16 -j ACCEPT; `
	}
	const raw = "-t raw -A PREROUTING -d 10.244.1.7 ! -i cni0 -j DROP; "
	for name, tt := range map[string]struct {
		script, pods  string
		mark          Mark
		text, command string
	}{
		"nothing": {"true", "10.244.1.7", OK, "", ""},
		"Docker 28": {
			docker("ACCEPT") + "iptables-nft " + raw, "10.244.1.7 10.244.1.8", Fail,
			"from pods of other nodes to 10.244.1.7 are dropped by table ip raw, chain PREROUTING",
			`"allow-direct-routing": true`,
		},
		"Docker 28, legacy": {
			"iptables-legacy -w 20 " + raw, "10.244.1.7", Fail,
			"to 10.244.1.7 are dropped by iptables-legacy, table raw", `"allow-direct-routing": true`,
		},
		"Docker 28, idle container": {
			"iptables-nft " + raw, "", Fail, "to 10.244.1.7 are dropped",
			`"allow-direct-routing": true`,
		},
		"Docker 29 with nftables": {
			`nft 'table ip docker-bridges { chain raw-PREROUTING { type filter hook prerouting priority raw; ` +
				`ip daddr 10.244.1.7 iifname != "cni0" counter drop; }; }'`,
			"10.244.1.7", Fail, "table ip docker-bridges, chain raw-PREROUTING", `"allow-direct-routing": true`,
		},
		"Docker 28, three containers": {
			"for i in 7 8 9; do iptables-nft -t raw -A PREROUTING -d 10.244.1.$i ! -i cni0 -j DROP; done", "10.244.1.9", Fail,
			"to 10.244.1.7 (and to 2 more of 3 pods) are dropped", `"allow-direct-routing": true`,
		},
		"a trusted interface": {
			"iptables-nft -t raw -A PREROUTING -d 10.244.1.7 -i overlay.1 -j ACCEPT; iptables-nft " + raw,
			"10.244.1.7", OK, "", "",
		},
		"a container of another": {
			"iptables-nft -t raw -A PREROUTING -d 172.17.0.2 ! -i docker0 -j DROP", "10.244.1.7",
			OK, "", "",
		},
		"Docker, unpublished ports": {
			docker("DROP"), "10.244.1.7", Fail, "are dropped by table ip filter, chain DOCKER",
			"iptables -I DOCKER-USER -s 10.244.0.0/16 -d 10.244.1.0/24 -j ACCEPT",
		},
		"Docker, nat-unprotected": {docker("ACCEPT"), "10.244.1.7", OK, "", ""},
		"Docker, opened": {docker("DROP") +
			"iptables-nft -I DOCKER-USER -s 10.244.0.0/16 -d 10.244.1.0/24 -j ACCEPT", "10.244.1.7", OK, "", ""},
		"a policy for one pod": {
			"iptables-nft -I FORWARD -d 10.244.1.7 -j DROP", "10.244.1.7 10.244.1.8 10.244.1.9",
			Warn, "from pods of other nodes to 10.244.1.7 are dropped by table ip filter, chain FORWARD", "iptables -I FORWARD",
		},
		"a policy for what it says": {
			"iptables-nft -I FORWARD -s 10.244.1.8 -j DROP", "10.244.1.7 10.244.1.8", Warn,
			"to pods of other nodes from 10.244.1.8 are dropped", "iptables -I FORWARD",
		},
		"all pods": {
			"iptables-nft -P FORWARD DROP", "10.244.1.7 10.244.1.8", Fail,
			"packets from pods of other nodes are dropped by table ip filter, chain FORWARD: its policy", "iptables -I FORWARD",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			node := nstest.New(t)
			node.Exec("sh", "-ec",
				"ip link add cni0 address 02:00:00:00:01:01 type bridge; ip address add 10.244.1.1/24 dev cni0; "+
					"ip link set cni0 up\n"+tt.script)
			for _, pod := range strings.Fields(tt.pods) {
				node.Exec("ip", "neigh", "add", pod, "lladdr", "02:00:00:00:01:02", "dev", "cni0", "nud", "stale")
			}
			read, _ := readFilter(t, node)
			f := healthy(t)
			f.Filter, f.Survey.Neighbours = read.Filter, read.Survey.Neighbours
			got := judgeForwardFilter(f)
			if len(got) == 0 || got[0].Mark != tt.mark || !strings.Contains(got[0].Reason, tt.text) ||
				tt.command != "" && !strings.Contains(strings.Join(got[0].Mend, "\n"), tt.command) {
				t.Errorf("%+v", got)
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
		c, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(src, 4001)), net.UDPAddrFromAddrPort(netip.AddrPortFrom(dst, 4000)))
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

// receives sends a packet and looks whether it comes; one that is expected is waited for longer.
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

// A limited number of kinds of iptables-legacy's rules is counted.
func TestLegacyRulesAreCounted(t *testing.T) {
	t.Parallel()
	node := nstest.New(t)
	node.Exec("sh", "-ec", "iptables-legacy -w 20 -N a; iptables-legacy -w 20 -A a -j DROP; iptables-legacy -w 20 -A FORWARD -j a; iptables-legacy -w 20 -t nat -A POSTROUTING -o eth0 -j MASQUERADE")
	node.Do(func() {
		chains, rules, err := netstate.LegacyFilterChains(addr.IPv4)
		if err != nil || rules != 3 || len(chains) != 5 {
			t.Errorf("%d rules in %d chains, %v: %+v", rules, len(chains), err, chains)
		}
	})
}
