package netstate

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestRules: the rules of other programs are read in their order, with all that a packet is chosen by.
func TestRules(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.sh(`ip rule add pref 9 fwmark 0x200/0xf00 lookup 2004
		ip rule add pref 10 not from 192.0.2.0/24 to 10.0.0.0/8 iif eth0 oif lo lookup 52 suppress_prefixlength 0
		ip rule add pref 11 from 192.0.2.1 prohibit
		ip rule add pref 12 dport 53 blackhole
		ip rule add pref 14 nop
		ip rule add pref 13 goto 14
		ip rule add pref 15 to 10.244.0.0/16 fwmark 0/0x5 lookup main suppress_prefixlength 15 proto 118
		ip rule add pref 16 lookup main suppress_ifgroup 3
		ip -6 rule add pref 17 to fd00::/8 unreachable`)
	var got []string
	var other []uint32
	h := n.observe()
	for _, r := range h.Rules {
		got = append(got, r.String())
		if r.Other {
			other = append(other, r.Priority)
		}
	}
	want := []string{
		"0 from all lookup 255",
		"9 from all fwmark 0x200/0xf00 lookup 2004",
		"10 not from 192.0.2.0/24 to 10.0.0.0/8 iif eth0 oif lo lookup 52 suppress_prefixlength 0",
		"11 from 192.0.2.1/32 prohibit",
		"12 from all blackhole",
		"13 from all goto",
		"14 from all nop",
		"16 from all lookup 254",
		"32766 from all lookup 254",
		"32767 from all lookup 253",
		"0 from all lookup 255",
		"17 from all to fd00::/8 unreachable",
		"32766 from all lookup 254",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if !slices.Equal(other, []uint32{12, 16}) {
		t.Errorf("rules %d depend on something else", other)
	}
	n.converge(State{})
	if left := n.observe(); !left.Equal(h) {
		t.Errorf("rules of other programs were changed: %v", left.Rules)
	}
}

// precedence are rules of other programs, and what becomes of ours beside them. In the scripts, table 52 has a default
// route by vpn0.
var precedence = []struct {
	name, rules string
	to, from    string // ours, by priority and what is special
	problem     bool
}{
	{name: "none of another program", from: "11800"},
	{name: "a VPN for everything", rules: "pref 5270 lookup 52", to: "5269", from: "5269"},
	{name: "a VPN that is later than ours", rules: "pref 20000 lookup 52", to: "19999", from: "11800"},
	{name: "a VPN for private addresses", rules: "pref 5270 to 10.0.0.0/8 lookup 52", to: "5269", from: "5269"},
	{name: "source routing", rules: "from 192.0.2.1 lookup 52", to: "32764", from: "11800"},
	{name: "source routing of pods", rules: "pref 100 from 10.244.0.0/16 lookup 52", to: "99", from: "99"},
	{name: "another network", rules: "pref 5270 to 198.51.100.0/24 lookup 52", from: "5269"},
	{name: "a rule with number 1", rules: "pref 1 lookup 52", to: "0", from: "0"},
	{name: "a rule with number 0", rules: "pref 0 lookup 52", to: "0", from: "0", problem: true},
	{name: "for marked packets", rules: "pref 100 fwmark 1 lookup 52", from: "11800"},
	{
		name:  "for marked packets behind a VPN",
		rules: "pref 100 lookup 52\npref 200 fwmark 0x200/0xf00 lookup 53\npref 300 fwmark 1 lookup 53", to: "99 0x201",
		from: "99 0x201",
	},
	{name: "for packets without a mark", rules: "pref 100 not fwmark 0xca6c lookup 52", to: "99", from: "99"},
	{name: "for packets whose bit is not set", rules: "pref 100 fwmark 0/0x10 lookup 52", to: "99", from: "99"},
	{
		name:  "a look into main before the VPN",
		rules: "pref 100 lookup main suppress_prefixlength 0\npref 200 not fwmark 0xca6c lookup 52", from: "99",
	},
	{
		name:  "a look into main that skips peers' subnets",
		rules: "pref 100 lookup main suppress_prefixlength 28\npref 200 lookup 52", to: "199", from: "99",
	},
	{name: "the pods' network left out", rules: "pref 100 not to 10.244.0.0/16 lookup 52", from: "99"},
	{name: "a part of the pods' network left out", rules: "pref 100 not to 10.244.1.0/24 lookup 52", to: "99", from: "99"},
	{name: "for a device", rules: "pref 100 iif eth0 lookup 52", to: "99", from: "99"},
	{name: "for sockets bound to a device", rules: "pref 100 oif vpn0 lookup 52", from: "11800"},
	{name: "for a port", rules: "pref 100 ipproto tcp dport 80 lookup 52", to: "99", from: "99"},
	{name: "private addresses dropped", rules: "pref 100 to 10.0.0.0/8 unreachable", to: "99", from: "99"},
	{name: "everything dropped", rules: "pref 100 blackhole", to: "99", from: "99"},
	{name: "a guest network dropped", rules: "pref 100 from 198.51.100.0/24 prohibit", from: "11800"},
	{name: "a device's packets dropped", rules: "pref 100 iif eth0 prohibit", from: "11800"},
	{name: "a jump over main", rules: "pref 32767 nop\npref 100 goto 32767", to: "99", from: "99"},
	{name: "nothing done", rules: "pref 100 nop", from: "11800"},
	{name: "main again", rules: "pref 100 from 192.0.2.1 lookup main", from: "11800"},
}

// TestPrecedence: whatever rules other programs have, packets to a peer's pods leave by our device, pods' packets to a
// peer node too; a destination of no lease goes where it went before, and marked packets too.
func TestPrecedence(t *testing.T) {
	t.Parallel()
	network, own := netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("10.244.1.0/24")
	for _, tt := range precedence {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			n.sh(`ip link add vpn0 type bridge; ip link set vpn0 up; ip address add 198.18.0.1/24 dev vpn0
				ip link add other type bridge; ip link set other up; ip address add 198.18.1.1/24 dev other
				ip link add br0 type bridge; ip link set br0 up; ip address add 10.244.1.1/24 dev br0
				ip route add default dev vpn0 table 52; ip route add default dev other table 53
				ip route add default via 192.0.2.254`)
			for rule := range strings.Lines(tt.rules) {
				n.sh("ip rule add " + rule)
			}
			get := func(flow string) string {
				out, err := n.Run(append([]string{"ip", "route", "get"}, strings.Fields(flow)...)...)
				if err != nil {
					return "refused"
				}
				_, dev, _ := strings.Cut(out, " dev ")
				dev, _, _ = strings.Cut(dev, " ")
				return dev
			}
			const unleased, marked = "10.244.99.9", "10.244.2.5 mark 0x200"
			before, markedBefore := get(unleased), get(marked)
			want := only(fullState(), dev4)
			want.Rules = nil
			h := n.observe()
			var problem error
			for _, r := range []Rule{ToMain(network), {Priority: 11800, From: own, Table: OwnTable}} {
				placed, err := h.Precede(r)
				want.Rules = append(want.Rules, placed...)
				if err != nil {
					problem = err
				}
			}
			want.Sort()
			n.converge(want)
			n.wantState(want)
			to, from := "", ""
			for _, r := range want.Rules {
				s := fmt.Sprint(r.Priority)
				if r.Unmarked != 0 {
					s += fmt.Sprintf(" %#x", r.Unmarked)
				}
				if r.From == own {
					from = s
				} else {
					to += s
				}
			}
			if to != tt.to || from != tt.from || (problem != nil) != tt.problem {
				t.Errorf("rules to main at %q, from the own subnet at %q, %v; want %q, %q", to, from, problem, tt.to, tt.from)
			}
			if tt.problem {
				return
			}
			for flow, want := range map[string]string{
				"10.244.2.5": dev4, "10.244.2.5 from 192.0.2.1": dev4, "10.244.2.5 from 10.244.1.7 iif br0": dev4,
				"192.0.2.2 from 10.244.1.7 iif br0": dev4,
				"10.244.1.7":                        "br0", "10.244.1.1": "lo", unleased: before,
			} {
				if got := get(flow); got != want {
					t.Errorf("packets to %s leave by %s, want %s", flow, got, want)
				}
			}
			if strings.Contains(tt.rules, "0x200") && get(marked) != markedBefore {
				t.Errorf("marked packets leave by %s, before by %s", get(marked), markedBefore)
			}
			if again, _ := n.observe().Precede(ToMain(network)); !slices.Equal(again,
				slices.DeleteFunc(slices.Clone(want.Rules), func(r Rule) bool { return r.From == own })) {
				t.Errorf("with ours in place, it is to be at %v", again)
			}
		})
	}
}

// TestVRF: what the kernel's own rule for VRFs (priority 1000) says is for packets of their devices alone.
func TestVRF(t *testing.T) {
	t.Parallel()
	body := []byte{
		2, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 5, 0, unix.FRA_L3MDEV, 0, 1, 0, 0, 0, 8, 0, unix.FRA_PRIORITY, 0,
		0xe8, 3, 0, 0,
	}
	vrf, ours, ok := parseRule(body)
	if ours || !ok || vrf.String() != "1000 from all lookup [l3mdev-table]" {
		t.Fatalf("read %s", vrf)
	}
	main := vrf
	main.VRF, main.Action, main.Table, main.Priority = false, RuleToTable, MainTable, MainPriority
	if got, err := (Host{Rules: []HostRule{vrf, main}}).
		Precede(ToMain(netip.MustParsePrefix("10.244.0.0/16"))); len(got) > 0 || err != nil {
		t.Errorf("beside a VRF: %v, %v", got, err)
	}
}

// TestLocalTableBehind: where the local table is not asked first, our rule has it asked before the main one.
func TestLocalTableBehind(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.sh(`ip link add br0 type bridge; ip link set br0 up; ip address add 10.244.1.1/24 dev br0
		ip link add vpn0 type bridge; ip link set vpn0 up; ip route add default dev vpn0 table 52
		ip rule add pref 100 lookup local; ip rule del pref 0; ip rule add pref 50 to 10.0.0.0/8 lookup 52`)
	want := only(fullState(), dev4)
	var err error
	if want.Rules, err = n.observe().Precede(ToMain(netip.MustParsePrefix("10.244.0.0/16"))); err != nil {
		t.Fatal(err)
	}
	n.converge(want)
	n.wantState(want)
	for to, dev := range map[string]string{
		"10.244.1.1": " lo ", "10.244.1.9": " br0 ", "10.244.2.5": " overlay.1 ",
		"10.1.2.3": " vpn0 ",
	} {
		if out := n.Exec("ip", "route", "get", to); !strings.Contains(out, dev) {
			t.Errorf("to %s: %s, want%s", to, out, dev)
		}
	}
	n.sh("ip rule add pref 1 lookup 52; ip rule del pref 50")
	if got, err := n.observe().Precede(ToMain(netip.MustParsePrefix("10.244.0.0/16"))); err == nil {
		t.Errorf("there is no room before 1, but it is to be at %v", got)
	}
}
