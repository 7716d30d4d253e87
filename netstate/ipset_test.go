package netstate

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/internal/nstest"
)

func openIPSets(t testing.TB, ns *nstest.NS) *IPSets {
	t.Helper()
	var s *IPSets
	var err error
	ns.Do(func() { s, err = NewIPSets() })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func ipsetAddrs(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, addr.Host(netip.MustParseAddr(s)))
	}
	return out
}

func ipsetNets(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// member is a member as ipset shows it.
func member(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

func TestIPSetFollowsTheMembers(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	s := openIPSets(t, ns)
	for _, c := range []struct {
		f        addr.Family
		networks bool
		all      []netip.Prefix
	}{
		{addr.IPv4, false, ipsetAddrs("192.0.2.1", "192.0.2.2", "10.0.0.1", "192.0.2.9")},
		{addr.IPv6, false, ipsetAddrs("2001:db8::1", "2001:db8::2", "fd00::1", "2001:db8::9")},
		{addr.IPv4, true, ipsetNets("10.244.0.0/24", "10.244.1.0/24", "10.244.128.0/18", "10.244.4.128/25")},
		{addr.IPv6, true, ipsetNets("fd00:10:244::/64", "fd00:10:244:1::/64", "fd00:10:244:1000::/52", "fd00:10:244:2::/65")},
	} {
		f, all, name := c.f, c.all, fmt.Sprintf("nodes-%s-%v", c.f, c.networks)
		for i, step := range []struct {
			members []netip.Prefix
			changed int
		}{
			{nil, 1}, {nil, 0}, {all[:3], 3}, {all[:3], 0}, {append(all[:1:1], all[0], all[1]), 1}, {all[2:], 4}, {all, 2}, {nil, 4},
		} {
			changed, err := s.Ensure(name, f, c.networks, step.members)
			if err != nil || changed != step.changed {
				t.Errorf("%s step %d: %d changes, %v; want %d", f, i, changed, err, step.changed)
			}
			out := ns.Exec("ipset", "list", name)
			_, got, _ := strings.Cut(out, "Members:\n")
			for _, a := range all {
				want := false
				for _, m := range step.members {
					want = want || m == a
				}
				if strings.Contains("\n"+got, "\n"+member(a)+"\n") != want {
					t.Errorf("%s step %d: %s wanted %v:\n%s", f, i, a, want, out)
				}
			}
		}
		ns.Exec("ipset", "add", name, member(all[3]))
		if changed, err := s.Ensure(name, f, c.networks, all[:1]); err != nil || changed != 2 {
			t.Errorf("%s: a foreign member: %d changes, %v", f, changed, err)
		}
	}
}

func TestIPSetRemove(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	s := openIPSets(t, ns)
	if err := s.Remove("nodes"); err != nil {
		t.Errorf("nothing there: %v", err)
	}
	if _, err := s.Ensure("nodes", addr.IPv4, false, nil); err != nil {
		t.Fatal(err)
	}
	rule := []string{"FORWARD", "-m", "set", "--match-set", "nodes", "dst", "-j", "ACCEPT"}
	ns.Exec(append([]string{"iptables-nft", "-A"}, rule...)...)
	if err := s.Remove("nodes"); err == nil || !strings.Contains(err.Error(), "nodes") {
		t.Errorf("in use: %v", err)
	}
	ns.Exec(append([]string{"iptables-nft", "-D"}, rule...)...)
	if err := s.Remove("nodes"); err != nil {
		t.Error(err)
	}
	if out := ns.Exec("ipset", "list", "-name"); out != "" {
		t.Errorf("left: %s", out)
	}
}

func TestIPSetOfAnotherType(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	s := openIPSets(t, ns)
	for name, create := range map[string]string{
		"net": "hash:net family inet", "six": "hash:ip family inet6", "fading": "hash:ip timeout 30", "map": "bitmap:ip range 10.0.0.0/24",
	} {
		ns.Exec(append([]string{"ipset", "create", name}, strings.Fields(create)...)...)
		_, err := s.Ensure(name, addr.IPv4, false, ipsetAddrs("192.0.2.1"))
		if !errors.Is(err, ErrIPSetType) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", create, err)
		}
		if strings.Contains(ns.Exec("ipset", "list", name), "192.0.2.1") {
			t.Errorf("%s: the foreign set was changed", create)
		}
	}
}

func TestIPSetRefusesOtherAddresses(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	s := openIPSets(t, ns)
	for f, bad := range map[addr.Family]netip.Addr{addr.IPv4: netip.MustParseAddr("::1"), addr.IPv6: netip.MustParseAddr("::ffff:1.2.3.4")} {
		for _, p := range []netip.Prefix{addr.Host(bad), {}} {
			if _, err := s.Ensure("nodes", f, false, []netip.Prefix{p}); err == nil {
				t.Errorf("%s took %s", f, p)
			}
		}
	}
	for p, networks := range map[string]bool{"10.0.0.0/24": false, "10.0.0.1/24": true} {
		if _, err := s.Ensure("nodes", addr.IPv4, networks, []netip.Prefix{netip.MustParsePrefix(p)}); err == nil {
			t.Errorf("took %s", p)
		}
	}
	if out := ns.Exec("ipset", "list", "-name"); out != "" {
		t.Errorf("made although refused: %s", out)
	}
}

// A hundred thousand is more than the kernel's default bound of 65536.
func TestIPSetGrows(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	s := openIPSets(t, ns)
	members := make([]netip.Prefix, 0, 100_000)
	for a := netip.MustParseAddr("10.0.0.0"); len(members) < cap(members); a = a.Next() {
		members = append(members, addr.Host(a))
	}
	for _, want := range []int{len(members) + 1, 0} {
		if changed, err := s.Ensure("nodes", addr.IPv4, false, members); err != nil || changed != want {
			t.Fatalf("%d changes, %v; want %d", changed, err, want)
		}
	}
}

func TestIPSetFull(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	s := openIPSets(t, ns)
	ns.Exec("ipset", "create", "nodes", "hash:ip", "maxelem", "2")
	changed, err := s.Ensure("nodes", addr.IPv4, false, ipsetAddrs("192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"))
	if changed != 2 || err == nil || !strings.Contains(err.Error(), "add 192.0.2.3") || !strings.Contains(err.Error(), "1 more") {
		t.Errorf("%d changes, %v", changed, err)
	}
}

// What is found at once in a set that is wanted as it was left, and what later.
func TestIPSetLeftAlone(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	s := openIPSets(t, ns)
	members := ipsetAddrs("192.0.2.1", "192.0.2.2", "192.0.2.2", "192.0.2.3")
	for _, step := range []struct {
		damage  string
		trust   time.Duration
		changed int
	}{
		{"", ipsetTrust, 4},
		{"", ipsetTrust, 0},
		{"add nodes 192.0.2.9", ipsetTrust, 1},
		{"del nodes 192.0.2.1", ipsetTrust, 1},
		{"flush nodes", ipsetTrust, 3},
		{"destroy nodes", ipsetTrust, 4},
		{"del nodes 192.0.2.1\nadd nodes 192.0.2.9", ipsetTrust, 0}, // as many as before
		{"", 0, 2},
		{"destroy nodes\ncreate nodes hash:ip timeout 9\nadd nodes 192.0.2.1\nadd nodes 192.0.2.2\nadd nodes 192.0.2.3", ipsetTrust, -1},
		{"destroy nodes\ncreate nodes hash:ip family inet6\nadd nodes ::1\nadd nodes ::2\nadd nodes ::3", ipsetTrust, -1},
		{"destroy nodes", ipsetTrust, 4},
	} {
		if out, err := ns.Feed(step.damage+"\n", "ipset", "restore"); err != nil {
			t.Fatalf("%s: %v\n%s", step.damage, err, out)
		}
		s.trust = step.trust
		changed, err := s.Ensure("nodes", addr.IPv4, false, members)
		if step.changed < 0 && !errors.Is(err, ErrIPSetType) || step.changed >= 0 && (changed != step.changed || err != nil) {
			t.Errorf("%q: %d changes, %v; want %d", step.damage, changed, err, step.changed)
		}
	}
}

const benchmarkMembers = 5000

func benchmarkIPSet(b *testing.B, run func(b *testing.B, s *IPSets, members []netip.Prefix, ns *nstest.NS)) {
	b.Run(fmt.Sprint(benchmarkMembers), func(b *testing.B) {
		ns := nstest.New(b)
		members := make([]netip.Prefix, 0, benchmarkMembers)
		for a := netip.MustParseAddr("172.16.0.1"); len(members) < cap(members); a = a.Next() {
			members = append(members, addr.Host(a))
		}
		b.ReportAllocs()
		run(b, openIPSets(b, ns), members, ns)
	})
}

func ensureSet(b *testing.B, s *IPSets, members []netip.Prefix) {
	b.Helper()
	if _, err := s.Ensure("nodes", addr.IPv4, false, members); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkIPSetCold makes a set.
func BenchmarkIPSetCold(b *testing.B) {
	benchmarkIPSet(b, func(b *testing.B, s *IPSets, members []netip.Prefix, _ *nstest.NS) {
		for b.Loop() {
			ensureSet(b, s, members)
			b.StopTimer()
			if err := s.Remove("nodes"); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
	})
}

// BenchmarkIPSetUnchanged looks at a set that is as it was left.
func BenchmarkIPSetUnchanged(b *testing.B) {
	benchmarkIPSet(b, func(b *testing.B, s *IPSets, members []netip.Prefix, _ *nstest.NS) {
		for b.Loop() {
			ensureSet(b, s, members)
		}
	})
}

// BenchmarkIPSetWarm looks at a set that another process has made.
func BenchmarkIPSetWarm(b *testing.B) {
	benchmarkIPSet(b, func(b *testing.B, s *IPSets, members []netip.Prefix, ns *nstest.NS) {
		ensureSet(b, s, members)
		for b.Loop() {
			b.StopTimer()
			other := openIPSets(b, ns)
			b.StartTimer()
			ensureSet(b, other, members)
		}
	})
}

func TestIPSetErrors(t *testing.T) {
	t.Parallel()
	if err := ipsetError(fmt.Errorf("x: %w", unix.Errno(nl.IPSET_ERR_BUSY))); err.Error() != "busy" {
		t.Errorf("got %v", err)
	}
	for err, want := range map[error]bool{
		unix.EINVAL: true, unix.EPROTONOSUPPORT: true, nl.IPSetError(nl.IPSET_ERR_FIND_TYPE): true,
		unix.EPERM: false, unix.ENOENT: false, nl.IPSetError(nl.IPSET_ERR_BUSY): false,
	} {
		if got := unsupported(err); errors.Is(got, ErrIPSetUnsupported) != want || !errors.Is(got, err) {
			t.Errorf("%v: %v", err, got)
		}
	}
}
