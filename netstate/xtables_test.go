package netstate

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/internal/nstest"
)

func TestLegacyTable(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	n := openNFTables(t, ns)
	state := func(f addr.Family) (sum uint64) {
		t.Helper()
		ns.Do(func() {
			var err error
			if sum, err = n.LegacyTable(f, "nat"); err != nil {
				t.Error(err)
			}
		})
		return sum
	}
	ns.Do(func() {
		if _, err := n.LegacyTable(addr.IPv4, "nothing"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("no such table: %v", err)
		}
	})
	for f, c := range map[addr.Family]struct{ program, ping string }{
		addr.IPv4: {"iptables-legacy", "127.0.0.1"}, addr.IPv6: {"ip6tables-legacy", "::1"},
	} {
		seen := map[uint64]string{}
		for _, change := range []string{
			"-N OURS", "-A OURS -s 192.0.2.1 -j RETURN", "-A OURS -m comment --comment x -j MASQUERADE", "-I POSTROUTING -j OURS", "-A OURS -j RETURN",
			"-R OURS 2 -m comment --comment y -j MASQUERADE", "-D OURS 3", "-P POSTROUTING ACCEPT",
		} {
			if f == addr.IPv6 {
				change = strings.Replace(change, "192.0.2.1", "2001:db8::1", 1)
			}
			ns.Exec(append([]string{c.program, "-w", "20", "-t", "nat"}, strings.Fields(change)...)...)
			sum := state(f)
			if old, ok := seen[sum]; ok && change != "-P POSTROUTING ACCEPT" { // which it is
				t.Errorf("%s: %q is like %q", f, change, old)
			}
			seen[sum] = change
			_, _ = ns.Run("ping", "-c", "1", "-W", "0.1", c.ping) // counts
			ns.Exec(c.program, "-w", "20", "-t", "nat", "-Z")
			if again := state(f); again != sum {
				t.Errorf("%s: %q: not the same without a change", f, change)
			}
		}
	}
}
