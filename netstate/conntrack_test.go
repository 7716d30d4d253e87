package netstate

import (
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestForget: what goes into the network from that address is tracked no more, what goes elsewhere is.
func TestForget(t *testing.T) {
	t.Parallel()
	for _, f := range []struct {
		family                             netlink.InetFamily
		source, network, inside, elsewhere string
	}{
		{unix.AF_INET, node4, "192.0.2.128/25", "192.0.2.130", "192.0.2.9"},
		{unix.AF_INET6, node6, "2001:db8::8000/113", "2001:db8::8001", "2001:db8::9"},
	} {
		n := newNode(t)
		n.sh(`nft 'add table inet t { chain c { type filter hook output priority 0; ct state new; }; }'`)
		tracked := func() (out []string) {
			n.Do(func() {
				flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, f.family)
				if err != nil {
					t.Error(err)
				}
				for _, flow := range flows {
					if flow.Forward.Protocol == unix.IPPROTO_UDP {
						out = append(out, flow.Forward.DstIP.String())
					}
				}
			})
			slices.Sort(out)
			return out
		}
		n.Do(func() {
			for _, to := range []string{f.inside, f.elsewhere} {
				c, err := net.Dial("udp", net.JoinHostPort(to, "7"))
				if err == nil {
					_, err = c.Write([]byte("x"))
					_ = c.Close()
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
		if got := tracked(); !slices.Equal(got, slices.Sorted(slices.Values([]string{f.inside, f.elsewhere}))) {
			t.Fatalf("tracked before: %v", got)
		}
		n.Do(func() {
			if err := n.k.Forget(netip.MustParsePrefix(f.network), netip.MustParseAddr(f.source)); err != nil {
				t.Error(err)
			}
		})
		if got := tracked(); !slices.Equal(got, []string{f.elsewhere}) {
			t.Errorf("tracked afterwards: %v, want %s", got, f.elsewhere)
		}
	}
}
