package lab

import (
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"

	"github.com/overlayd/overlayd/addr"
)

func sampleReport(t *testing.T) Report {
	t.Helper()
	top := NewTopology(options(t, func(o *Options) { o.Nodes, o.Pods = 2, 1 }))
	lease := func(n, subnet string, segment int) Lease {
		return Lease{
			Node: n, Segment: segment, MTU: 1450, Pods: []string{n + "-p1"},
			Underlay: []netip.Addr{netip.MustParseAddr("172.31.1.11")}, Subnets: []netip.Prefix{netip.MustParsePrefix(subnet)},
		}
	}
	at := netip.MustParseAddr("10.244.1.2")
	out := func(c CheckName, from, to, err string) Outcome {
		return Outcome{Check: c, From: from, To: to, Family: addr.IPv4, FromAddr: at, ToAddr: at, Err: err}
	}
	path := out(CheckPath, "n1-p1", "n2-p1", "")
	path.Path = "tunnel"
	return newReport(top, []Lease{lease("n1", "10.244.1.0/24", 1), lease("n2", "10.244.2.0/24", 2)}, []Outcome{
		out(CheckPing, "n1", "n2-p1", ""), out(CheckTCP, "n1", "n2-p1", "saw 1.2.3.4"), out(CheckMTU, "n1", "n2-p1", ""),
		out(CheckPing, "n1-p1", "n2-p1", "no reply"), out(CheckTCP, "n1-p1", "n2-p1", "no reply"),
		out(CheckPing, "n1-p1", "n1", ""), out(CheckMTU, "n1-p1", "n2", "too long"),
		out(CheckInternet, "n1-p1", "internet", ""), path,
	})
}

func TestReportText(t *testing.T) {
	r := sampleReport(t)
	if r.Checks != 9 || r.Failed != 4 {
		t.Errorf("%d checks, %d failed", r.Checks, r.Failed)
	}
	text := r.Text()
	for _, want := range []string{
		"Lab lab: 2 nodes, 1 pod each, 2 underlay segments, vxlan, ipv4\n",
		"  n1    1        172.31.1.11  10.244.1.0/24  1450\n",
		"        │ n1 p1 │ n2 p1 │ internet\n",
		"  n1    │ ·  ·  │ ·  t  │ ·\n",
		"  n1-p1 │ ✓  ·  │ m  ✗  │ ✓\n",
		"  n1 (seg1)  ·          tunnel\n",
		"  tcp      n1 (10.244.1.2) -> n2-p1 (10.244.1.2): saw 1.2.3.4\n",
		"\n9 checks, 4 failed\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in:\n%s", want, text)
		}
	}
}

func TestSighting(t *testing.T) {
	for want, s := range map[string]sighting{
		"tunnel":              {PathTunnel, PathTunnel},
		"tunnel, back direct": {PathTunnel, PathDirect},
		"direct, back unseen": {out: PathDirect},
		"unseen":              {},
		"unseen, back tunnel": {back: PathTunnel},
	} {
		if s.String() != want {
			t.Errorf("%#v reads %q, want %q", s, s, want)
		}
	}
}

// A ping's token is found bare and in VXLAN, in both families, and nowhere in frames that are something else.
func TestPathOf(t *testing.T) {
	want := newToken()
	msg, err := (&icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{Data: want[:]}}).Marshal(nil)
	if err != nil {
		t.Fatal(err)
	}
	eth := func(hi, lo byte, rest []byte) []byte { return append(append(make([]byte, 12), hi, lo), rest...) }
	v4 := func(proto byte, rest ...byte) []byte {
		h := make([]byte, 20)
		h[0], h[9] = 0x45, proto
		return append(h, rest...)
	}
	v6 := func(proto byte, rest ...byte) []byte {
		h := make([]byte, 40)
		h[0], h[6] = 0x60, proto
		return append(h, rest...)
	}
	ip4 := func(b []byte) []byte { return eth(0x08, 0x00, b) }
	ip6 := func(b []byte) []byte { return eth(0x86, 0xdd, b) }
	vxlan := func(inner []byte) []byte {
		return append([]byte{0xc0, 0, 0x21, 0x18, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 1, 0}, inner...)
	}
	for _, c := range []struct {
		name  string
		frame []byte
		want  Path
	}{
		{"bare IPv4", ip4(v4(1, msg...)), PathDirect},
		{"bare IPv6", ip6(v6(58, append([]byte{128}, msg[1:]...)...)), PathDirect},
		{"IPv4 in VXLAN over IPv4", ip4(v4(17, vxlan(ip4(v4(1, msg...)))...)), PathTunnel},
		{"IPv6 in VXLAN over IPv6", ip6(v6(17, vxlan(ip6(v6(58, append([]byte{129}, msg[1:]...)...)))...)), PathTunnel},
		{"other UDP", ip4(v4(17, append([]byte{0, 53, 0, 53, 0, 0, 0, 0}, msg...)...)), ""},
		{"ARP", eth(0x08, 0x06, msg), ""},
	} {
		if got := pathOf(c.frame, want); got != c.want {
			t.Errorf("%s: %q", c.name, got)
		}
	}
}
