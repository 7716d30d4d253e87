package ipset

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/nstest"
)

// sets are those of a namespace of the test.
type sets struct {
	*Sets
	ns *nstest.NS
}

func open(ns *nstest.NS) sets { return sets{New(), ns} }

func (s sets) Ensure(name string, f addr.Family, networks bool, members []netip.Prefix) (changed int, err error) {
	s.ns.Do(func() { changed, err = s.Sets.Ensure(name, f, networks, members) })
	return changed, err
}

func (s sets) Remove(name string) (err error) {
	s.ns.Do(func() { err = s.Sets.Remove(name) })
	return err
}

func addrs(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, addr.Host(netip.MustParseAddr(s)))
	}
	return out
}

func nets(list ...string) []netip.Prefix {
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

func TestFollowsTheMembers(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	s := open(ns)
	for _, c := range []struct {
		f        addr.Family
		networks bool
		all      []netip.Prefix
	}{
		{addr.IPv4, false, addrs("10.0.0.1", "192.0.2.1", "192.0.2.2", "192.0.2.9")},
		{addr.IPv6, false, addrs("2001:db8::1", "2001:db8::2", "2001:db8::9", "fd00::1")},
		{addr.IPv4, true, nets("10.244.0.0/24", "10.244.1.0/24", "10.244.4.128/25", "10.244.128.0/18")},
		{addr.IPv6, true, nets("fd00:10:244::/64", "fd00:10:244:1::/64", "fd00:10:244:2::/65", "fd00:10:244:1000::/52")},
	} {
		f, all, name := c.f, c.all, fmt.Sprintf("nodes-%s-%v", c.f, c.networks)
		for i, step := range []struct {
			members []netip.Prefix
			changed int
		}{
			{nil, 1},
			{nil, 0},
			{all[:3], 3},
			{all[:3], 0},
			{all[:2], 1},
			{all[2:], 4},
			{all, 2},
			{nil, 4},
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
					t.Errorf("%s step %d: %s expected %v:\n%s", f, i, a, want, out)
				}
			}
		}
		ns.Exec("ipset", "add", name, member(all[3]))
		if changed, err := s.Ensure(name, f, c.networks, all[:1]); err != nil || changed != 2 {
			t.Errorf("%s: a foreign member: %d changes, %v", f, changed, err)
		}
	}
}

func TestRemove(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	s := open(ns)
	if err := s.Remove("nodes"); err != nil {
		t.Errorf("nothing there: %v", err)
	}
	if _, err := s.Ensure("nodes", addr.IPv4, false, nil); err != nil {
		t.Fatal(err)
	}
	ns.Exec("ipset", "create", "nodes-new", "hash:ip") // left by a process that was killed
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

func TestOfAnotherType(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	s := open(ns)
	for name, create := range map[string]string{
		"net": "hash:net family inet", "six": "hash:ip family inet6", "fading": "hash:ip timeout 30",
		"map": "bitmap:ip range 10.0.0.0/24",
	} {
		ns.Exec(append([]string{"ipset", "create", name}, strings.Fields(create)...)...)
		_, err := s.Ensure(name, addr.IPv4, false, addrs("192.0.2.1"))
		if !errors.Is(err, ErrType) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", create, err)
		}
		if strings.Contains(ns.Exec("ipset", "list", name), "192.0.2.1") {
			t.Errorf("%s: the foreign set was changed", create)
		}
	}
}

// A hundred thousand is more than the kernel's default bound of 65536.
func TestGrows(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	s := open(ns)
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

// A set that other processes have filled, or made too small, is replaced while a rule names it.
func TestReplace(t *testing.T) {
	t.Parallel()
	members := addrs("192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4")
	for name, c := range map[string]struct {
		made    string
		changed int
	}{
		"full":      {"create nodes hash:ip maxelem 2", 1},
		"others":    {"create nodes hash:ip\nadd nodes 192.0.2.1\nadd nodes 192.0.2.8\nadd nodes 192.0.2.9", 5},
		"left over": {"create nodes hash:ip\nadd nodes 192.0.2.9\ncreate nodes-new hash:net\nadd nodes-new 10.0.0.0/8", 5},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := nstest.New(t)
			s := open(ns)
			if out, err := ns.Feed(c.made+"\n", "ipset", "restore"); err != nil {
				t.Fatal(err, out)
			}
			ns.Exec("iptables-nft", "-A", "OUTPUT", "-m", "set", "--match-set", "nodes", "dst", "-j", "DROP")
			for i, want := range []int{c.changed, 0} {
				if changed, err := s.Ensure("nodes", addr.IPv4, false, members); changed != want || err != nil {
					t.Errorf("run %d: %d changes, %v; want %d", i, changed, err, want)
				}
			}
			if out := ns.Exec("ipset", "list", "-name"); out != "nodes\n" {
				t.Errorf("sets: %q", out)
			}
			out := ns.Exec("ipset", "list", "nodes")
			if _, got, _ := strings.Cut(out, "Members:\n"); len(strings.Fields(got)) != len(members) {
				t.Errorf("%s", out)
			}
			if out := ns.Exec("iptables-nft", "-S", "OUTPUT"); !strings.Contains(out, "--match-set nodes dst") {
				t.Errorf("the rule names another set: %s", out)
			}
		})
	}
}

// What is found at once in a set that is desired as it was left, and what later.
func TestLeftAlone(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	s := open(ns)
	members := addrs("192.0.2.1", "192.0.2.2", "192.0.2.3")
	for _, step := range []struct {
		damage  string
		late    bool // the set was checked long ago
		changed int
	}{
		{"", false, 4},
		{"", false, 0},
		{"", true, 0},
		{"add nodes 192.0.2.9", false, 1},
		{"del nodes 192.0.2.1", false, 1},
		{"flush nodes", false, 3},
		{"destroy nodes", false, 4},
		{"del nodes 192.0.2.1\nadd nodes 192.0.2.9", false, 0}, // as many as before
		{"", true, 2},
		{
			"destroy nodes\ncreate nodes hash:ip timeout 9\nadd nodes 192.0.2.1\nadd nodes 192.0.2.2\nadd nodes 192.0.2.3",
			false, -1,
		},
		{"destroy nodes\ncreate nodes hash:ip family inet6\nadd nodes ::1\nadd nodes ::2\nadd nodes ::3", false, -1},
		{"destroy nodes", false, 4},
	} {
		if out, err := ns.Feed(step.damage+"\n", "ipset", "restore"); err != nil {
			t.Fatalf("%s: %v\n%s", step.damage, err, out)
		}
		if left := s.left["nodes"]; step.late {
			s.left["nodes"] = leftSet{left.members, left.checked.Add(-trustFor)}
		}
		changed, err := s.Ensure("nodes", addr.IPv4, false, members)
		if step.changed < 0 && !errors.Is(err, ErrType) || step.changed >= 0 && (changed != step.changed || err != nil) {
			t.Errorf("%q: %d changes, %v; want %d", step.damage, changed, err, step.changed)
		}
	}
}

const benchmarkMembers = 5000

func benchmark(b *testing.B, run func(b *testing.B, s sets, members []netip.Prefix, ns *nstest.NS)) {
	b.Run(fmt.Sprint(benchmarkMembers), func(b *testing.B) {
		ns := nstest.New(b)
		members := make([]netip.Prefix, 0, benchmarkMembers)
		for a := netip.MustParseAddr("172.16.0.1"); len(members) < cap(members); a = a.Next() {
			members = append(members, addr.Host(a))
		}
		b.ReportAllocs()
		run(b, open(ns), members, ns)
	})
}

func ensureSet(b *testing.B, s sets, members []netip.Prefix) {
	b.Helper()
	if _, err := s.Ensure("nodes", addr.IPv4, false, members); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkCold makes a set.
func BenchmarkCold(b *testing.B) {
	benchmark(b, func(b *testing.B, s sets, members []netip.Prefix, _ *nstest.NS) {
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

// BenchmarkUnchanged checks a set that is as it was left.
func BenchmarkUnchanged(b *testing.B) {
	benchmark(b, func(b *testing.B, s sets, members []netip.Prefix, _ *nstest.NS) {
		for b.Loop() {
			ensureSet(b, s, members)
		}
	})
}

// BenchmarkWarm checks a set that another process has made.
func BenchmarkWarm(b *testing.B) {
	benchmark(b, func(b *testing.B, s sets, members []netip.Prefix, ns *nstest.NS) {
		ensureSet(b, s, members)
		for b.Loop() {
			ensureSet(b, open(ns), members)
		}
	})
}

// BenchmarkJoin adds one member and deletes it.
func BenchmarkJoin(b *testing.B) {
	benchmark(b, func(b *testing.B, s sets, members []netip.Prefix, _ *nstest.NS) {
		ensureSet(b, s, members)
		for b.Loop() {
			ensureSet(b, s, members[1:])
			ensureSet(b, s, members)
		}
	})
}

func TestErrors(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	ns.Do(func() {
		err := unsupported(create("nodes", header{typ: "hash:none", family: addr.IPv4}, 0))
		if !errors.Is(err, ErrUnsupported) || !strings.HasSuffix(err.Error(), "create: invalid type") {
			t.Errorf("a type that the kernel does not have: %v", err)
		}
	})
	for err, want := range map[error]bool{
		unix.EINVAL: true, unix.EPROTONOSUPPORT: true, nl.IPSetError(nl.IPSET_ERR_FIND_TYPE): true,
		unix.EPERM: false, unix.ENOENT: false, nl.IPSetError(nl.IPSET_ERR_BUSY): false,
	} {
		if got := unsupported(err); errors.Is(got, ErrUnsupported) != want || !errors.Is(got, err) {
			t.Errorf("%v: %v", err, got)
		}
	}
	s := open(ns)
	if _, err := s.Ensure("nodes", addr.IPv4, true, nets("0.0.0.0/0")); err == nil ||
		!strings.Contains(err.Error(), "ipset nodes: 1 members from 0.0.0.0/0 to 0.0.0.0/0: add: invalid cidr") {
		t.Errorf("a member that the kernel rejects: %v", err)
	}
	if out := ns.Exec("ipset", "list", "-name"); out != "nodes\n" {
		t.Errorf("sets: %q", out)
	}
}
