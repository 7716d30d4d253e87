package masquerade

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/nstest"
)

// These tests send real packets through a node with the rules, and compare the source address that arrives:
//
//	pod ── cni0 ┐         ┌ overlay.1 ══════ peer: a node and the pods on it
//	            │         │ eth0 ─────────── peer
//	            └─ node ──┤ eth1 ─────────── external: the internet, and a host that is excluded from masquerade
//	                      └ eth2 ─────────── direct: a peer node that is reached without the tunnel
//
// A veth pair stands in for the tunnel: the rules know it by its name alone. The node checks reverse paths strictly.

// plan holds the addresses of one family.
type plan struct {
	f                                         addr.Family
	pod, podGW, vtep                          string
	node, nodeOther, nodeExternal, nodeDirect string
	peer, peerPod, peerVTEP, peerSubnet       string
	external, excluded, direct, multicast     string
	hostBits, netBits                         int // of the addresses on one host, and on the links
}

func plans() []plan {
	return []plan{{
		f: addr.IPv4, pod: "10.244.5.2", podGW: "10.244.5.1", vtep: "10.244.5.0",
		node: "192.0.2.1", nodeOther: "172.16.9.1", nodeExternal: "198.51.100.1", nodeDirect: "192.168.3.1",
		peer: "192.0.2.2", peerPod: "10.244.6.2", peerVTEP: "10.244.6.0", peerSubnet: "10.244.6.0/24",
		external: "198.51.100.9", excluded: "203.0.113.9", direct: "192.168.3.2", multicast: "239.1.2.3",
		hostBits: 32, netBits: 24,
	}, {
		f: addr.IPv6, pod: "fd00:10:244:5::2", podGW: "fd00:10:244:5::1", vtep: "fd00:10:244:5::",
		node: "2001:db8::1", nodeOther: "2001:db8:9::1", nodeExternal: "2001:db8:1::1", nodeDirect: "2001:db8:2::1",
		peer: "2001:db8::2", peerPod: "fd00:10:244:6::2", peerVTEP: "fd00:10:244:6::", peerSubnet: "fd00:10:244:6::/64",
		external: "2001:db8:1::9", excluded: "2001:db8:3::9", direct: "2001:db8:2::2", multicast: "ff02::1:2345",
		hostBits: 128, netBits: 64,
	}}
}

type testbed struct {
	t                                 *testing.T
	plan                              plan
	pod, node, peer, external, direct *nstest.NS
}

func newTestbed(t *testing.T, p plan) *testbed {
	w := &testbed{t, p, nstest.New(t), nstest.New(t), nstest.New(t), nstest.New(t), nstest.New(t)}
	in := fullDesired(p.f)
	subnet, network := in.Subnet.String(), in.Network.String()
	for _, ns := range []*nstest.NS{w.node, w.peer} {
		ns.Sysctl("net.ipv4.ip_forward", "1")
		ns.Sysctl("net.ipv6.conf.all.forwarding", "1")
		ns.Sysctl("net.ipv4.conf.default.rp_filter", "0")
		ns.Sysctl("net.ipv4.conf.all.rp_filter", map[bool]string{true: "1", false: "0"}[ns == w.node])
	}
	nstest.Link(w.node, "cni0", w.pod, "eth0")
	nstest.Link(w.node, "overlay.1", w.peer, "overlay.1")
	nstest.Link(w.node, "eth0", w.peer, "eth0")
	nstest.Link(w.node, "eth1", w.external, "eth0")
	nstest.Link(w.node, "eth2", w.direct, "eth0")

	wide, host := fmt.Sprintf("/%d", p.netBits), fmt.Sprintf("/%d", p.hostBits)
	w.node.Addr("overlay.1", p.vtep+host)
	w.node.Addr("cni0", p.podGW+wide)
	w.node.Addr("eth0", p.node+wide)
	w.node.Addr("eth1", p.nodeExternal+wide)
	w.node.Addr("eth2", p.nodeDirect+wide)
	w.node.Addr("lo", p.nodeOther+host)
	w.pod.Addr("eth0", p.pod+wide)
	w.peer.Addr("overlay.1", p.peerVTEP+host)
	w.peer.Addr("eth0", p.peer+wide)
	w.peer.Addr("lo", p.peerPod+host)
	w.external.Addr("eth0", p.external+wide)
	w.external.Addr("lo", p.excluded+host)
	w.direct.Addr("eth0", p.direct+wide)

	w.ip(w.pod, "route add default via "+p.podGW)
	w.ip(w.node, "route add "+p.peerSubnet+" via "+p.peerVTEP+" dev overlay.1 onlink")
	w.ip(w.node, "route add "+p.peer+" via "+p.peerVTEP+" dev overlay.1 onlink table 100")
	w.ip(w.node, "rule add from "+subnet+" lookup 100")
	w.ip(w.node, "route add "+p.excluded+" via "+p.external)
	w.ip(w.peer, "route add "+subnet+" via "+p.vtep+" dev overlay.1 onlink")
	w.ip(w.peer, "route add "+p.node+" via "+p.vtep+" dev overlay.1 onlink table 100")
	w.ip(w.peer, "rule add from "+p.peerSubnet+" lookup 100")
	w.ip(w.external, "route add "+network+" via "+p.nodeExternal)
	w.ip(w.direct, "route add "+network+" via "+p.nodeDirect)
	if p.f == addr.IPv4 {
		w.ip(w.node, "route add 239.0.0.0/8 dev eth0")
	}
	return w
}

func (w *testbed) ip(ns *nstest.NS, words string) {
	w.t.Helper()
	ns.Exec(append([]string{"ip", fmt.Sprintf("-%d", w.plan.f)}, strings.Fields(words)...)...)
}

// sentAs sends a datagram to target, from the address bind if there is one, and returns the source address that
// arrived. The answer has to come back to the sender.
func (w *testbed) sentAs(from *nstest.NS, bind string, to *nstest.NS, target string, port int) (string, error) {
	w.t.Helper()
	var server net.PacketConn
	var client net.Conn
	var err error
	to.Do(func() { server, err = net.ListenPacket("udp", net.JoinHostPort(target, fmt.Sprint(port))) })
	if err != nil {
		return "", err
	}
	defer func() { _ = server.Close() }()
	dialer := net.Dialer{}
	if bind != "" {
		dialer.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(bind), 0))
	}
	from.Do(func() { client, err = dialer.Dial("udp", server.LocalAddr().String()) })
	if err != nil {
		return "", err
	}
	defer func() { _ = client.Close() }()
	source, err := exchange(client, server)
	if err != nil {
		return "", err
	}
	if _, err := server.WriteTo([]byte("welcome"), source); err != nil {
		return "", err
	}
	_ = client.SetReadDeadline(time.Now().Add(3 * time.Second))
	if _, err := client.Read(make([]byte, 16)); err != nil {
		return "", fmt.Errorf("seen as %s, but no answer: %w", source, err)
	}
	return source.(*net.UDPAddr).AddrPort().Addr().Unmap().String(), nil
}

func exchange(client net.Conn, server net.PacketConn) (net.Addr, error) {
	if _, err := client.Write([]byte("hello")); err != nil {
		return nil, err
	}
	_ = server.SetReadDeadline(time.Now().Add(3 * time.Second))
	_, source, err := server.ReadFrom(make([]byte, 16))
	return source, err
}

// multicastSentAs sends to the group out of the node's eth0, from an address of the pod network.
func (w *testbed) multicastSentAs() (string, error) {
	var server, client net.Conn
	var err error
	group := &net.UDPAddr{IP: net.ParseIP(w.plan.multicast), Port: 6000}
	w.peer.Do(func() {
		var eth0 *net.Interface
		if eth0, err = net.InterfaceByName("eth0"); err == nil {
			server, err = net.ListenMulticastUDP("udp", eth0, group)
		}
	})
	if err != nil {
		return "", err
	}
	defer func() { _ = server.Close() }()
	w.node.Do(func() {
		dialer := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(w.plan.podGW)}, Control: multicastBy("eth0")}
		client, err = dialer.Dial("udp", group.String())
	})
	if err != nil {
		return "", err
	}
	defer func() { _ = client.Close() }()
	source, err := exchange(client, server.(net.PacketConn))
	if err != nil {
		return "", err
	}
	return source.(*net.UDPAddr).AddrPort().Addr().Unmap().String(), nil
}

// multicastBy chooses the device for a socket's multicast: the kernel would take the one that has the source address.
func multicastBy(device string) func(network, address string, c syscall.RawConn) error {
	return func(network, _ string, c syscall.RawConn) error {
		dev, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		set := func(fd uintptr) {
			if network == "udp6" {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_IF, dev.Index)
				return
			}
			err = unix.SetsockoptIPMreqn(int(fd), unix.IPPROTO_IP, unix.IP_MULTICAST_IF,
				&unix.IPMreqn{Ifindex: int32(dev.Index)})
		}
		if e := c.Control(set); e != nil {
			return e
		}
		return err
	}
}

func TestPackets(t *testing.T) {
	t.Parallel()
	for _, p := range plans() {
		for _, v := range []Variant{VariantNFT, VariantLegacy} {
			for name, make := range map[string]func(*testing.T, *nstest.NS, Variant) *rig{
				"iptables": newRig,
				"nftables": newNFTRig,
			} {
				t.Run(p.f.String()+"/"+name+"/"+string(v), func(t *testing.T) {
					t.Parallel()
					w := newTestbed(t, p)
					testPackets(t, w, make(t, w.node, v).withSets())
				})
			}
		}
	}
}

func testPackets(t *testing.T, w *testbed, r *rig) {
	const markedPort, lastMarked = 4000, 4099 // one for each row: a process that just starts may hold the last socket
	p := w.plan
	in := fullDesired(p.f)
	in.DirectNodes, in.Nodes = true, []netip.Addr{netip.MustParseAddr(p.direct)}
	r.iptables(p.f, "-P FORWARD DROP") // as Docker leaves it
	for _, hook := range []string{"PREROUTING", "OUTPUT"} {
		r.iptables(p.f, fmt.Sprintf("-t mangle -A %s -p udp --dport %d:%d -j MARK --set-xmark 0x4001/0x4001", hook,
			markedPort, lastMarked))
	}

	w.node.Exec("nft", `add table inet late { chain c { type filter hook postrouting priority 300 ;
		oifname "overlay.1" mark and 0x4001 == 0x4001 counter ; oifname "overlay.1" mark and 0x4001 == 0x1 counter ; } ; }`)

	if got, err := w.sentAs(w.pod, "", w.external, p.external, 0); err == nil {
		t.Fatalf("forwarded without our rules, seen as %s: the test shows nothing", got)
	}
	r.ensure(Rules(in))

	for i, row := range []struct {
		name   string
		from   *nstest.NS
		bind   string
		to     *nstest.NS
		target string
		port   int
		want   string
	}{
		{"pod to external", w.pod, "", w.external, p.external, 0, p.nodeExternal},
		{"pod to excluded", w.pod, "", w.external, p.excluded, 0, p.pod},
		{"pod to external, marked by kube-proxy", w.pod, "", w.external, p.external, markedPort, p.pod},
		{"pod to pod elsewhere", w.pod, "", w.peer, p.peerPod, 0, p.pod},
		{"pod to a node through the tunnel", w.pod, "", w.peer, p.peer, 0, p.pod},
		{"pod to a node directly", w.pod, "", w.direct, p.direct, 0, p.pod},
		{"pod to its own node", w.pod, "", w.node, p.node, 0, p.pod},
		{"node to its own pod", w.node, p.node, w.pod, p.pod, 0, p.node},
		{"node to its own pod, from another of its addresses", w.node, p.nodeOther, w.pod, p.pod, 0, p.nodeOther},
		{"node to pod elsewhere", w.node, "", w.peer, p.peerPod, 0, p.vtep},
		{"node to pod elsewhere, from the address that peers know", w.node, p.node, w.peer, p.peerPod, 0, p.node},
		{"node to pod elsewhere, from another of its addresses", w.node, p.nodeOther, w.peer, p.peerPod, 0, p.node},
		{"node to pod elsewhere, marked", w.node, "", w.peer, p.peerPod, markedPort, p.node},
		{"node's address to pod elsewhere, marked", w.node, p.node, w.peer, p.peerPod, markedPort, p.node},
		{"pod to pod elsewhere, marked", w.pod, "", w.peer, p.peerPod, markedPort, p.node},
		{"pod to a node through the tunnel, marked", w.pod, "", w.peer, p.peer, markedPort, p.pod},
		{"node to external", w.node, "", w.external, p.external, 0, p.nodeExternal},
		{"node to external, from its address on the bridge", w.node, p.podGW, w.external, p.external, 0, p.nodeExternal},
		{"peer's pod to pod", w.peer, p.peerPod, w.pod, p.pod, 0, p.peerPod},
		{"peer to pod", w.peer, p.peer, w.pod, p.pod, 0, p.peer},
		{"peer's pod to node", w.peer, p.peerPod, w.node, p.node, 0, p.peerPod},
		{"external to pod", w.external, p.external, w.pod, p.pod, 0, p.external},
		{"external to pod elsewhere", w.external, p.external, w.peer, p.peerPod, 0, p.node},
		{"external to pod elsewhere, marked", w.external, p.external, w.peer, p.peerPod, markedPort, p.node},
	} {
		if row.port != 0 {
			row.port += i
		}
		if got, err := w.sentAs(row.from, row.bind, row.to, row.target, row.port); err != nil || got != row.want {
			t.Errorf("%s: seen as %q, want %s; %v", row.name, got, row.want, err)
		}
	}
	// Of five marked packets, four were given an address: of their mark, kube-proxy's bit is gone, and no other.
	late := w.node.Exec("nft", "list", "table", "inet", "late")
	for mark, packets := range map[string]int{"0x00004001": 1, "0x00000001": 4} {
		if !strings.Contains(late, fmt.Sprintf("== %s counter packets %d ", mark, packets)) {
			t.Errorf("want %d packets with the mark %s: %s", packets, mark, late)
		}
	}
	if got, err := w.multicastSentAs(); err != nil || got != p.podGW {
		t.Errorf("multicast: seen as %q, want %s; %v", got, p.podGW, err)
	}

	// Towards the pods of a peer that answers without the tunnel, the node takes its address in it; between pods nothing
	// changes.
	in.Bare = []netip.Prefix{netip.MustParsePrefix(p.peerSubnet)}
	for _, want := range []string{p.vtep, p.node} {
		r.ensure(Rules(in))
		for _, row := range []struct {
			from       *nstest.NS
			bind, want string
			to         *nstest.NS
			target     string
		}{
			{w.node, p.node, want, w.peer, p.peerPod},
			{w.external, p.external, want, w.peer, p.peerPod},
			{w.pod, "", p.pod, w.peer, p.peerPod},
			{w.node, p.node, p.node, w.pod, p.pod},
		} {
			if got, err := w.sentAs(row.from, row.bind, row.to, row.target, 0); err != nil || got != row.want {
				t.Errorf("answers without the tunnel from %v: %s to %s seen as %q, want %s; %v", in.Bare, row.bind, row.target, got,
					row.want, err)
			}
		}
		in.Bare = nil
	}

	// A peer that is not in the set, and a node that peers know by an address which it does not have.
	in.Node, in.Nodes = netip.Addr{}, nil
	r.ensure(Rules(in))
	if got, err := w.sentAs(w.pod, "", w.direct, p.direct, 0); err != nil || got != p.nodeDirect {
		t.Errorf("pod to a node not in the set: seen as %q, want %s; %v", got, p.nodeDirect, err)
	}
	if got, err := w.sentAs(w.node, p.node, w.peer, p.peerPod, 0); err != nil || got != p.vtep {
		t.Errorf("node with a public address elsewhere: seen as %q, want %s; %v", got, p.vtep, err)
	}

	// What no driver can help against, as the documentation says: in nftables another table's drop is final.
	w.node.Exec("nft", "add table inet foreign { chain c { type filter hook forward priority 0 ; policy drop ; } ; }")
	r.ensure(Rules(in))
	if got, err := w.sentAs(w.pod, "", w.external, p.external, 0); err == nil {
		t.Errorf("forwarded against another table's policy, seen as %s", got)
	}
}
