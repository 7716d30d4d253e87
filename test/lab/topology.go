package lab

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/netip"

	"github.com/overlayd/overlayd/addr"
)

// Numbers that every lab shares; labs do not see each other, so they may all use the same addresses.
const (
	vni         = 1
	vxlanPort   = 8472
	healthzPort = 8471
	etcdPort    = 2379
	underlayMTU = 1500

	firstNodeHost = 11  // n1 is .11, n2 is .12, ...
	etcdSegment   = 100 // the third octet of etcd's own little network
)

// Host is one machine of the underlay: a namespace with interfaces and routes.
type Host struct {
	Name       string // as the user calls it: "n1", "router"
	NS         string // the namespace: "lab-n1"
	Interfaces []Interface
	Routes     []Route
	Forwards   bool // a router between its interfaces; the nodes' forwarding is overlayd's business
}

// Interface is one network card of a host.
type Interface struct {
	Name  string
	Addrs []netip.Prefix
}

// Route is a static route of a host.
type Route struct {
	Dst netip.Prefix
	Via netip.Addr
}

// Port is one end of a cable.
type Port struct{ NS, Name string }

// Cable joins two ports, as a veth pair does.
type Cable struct{ A, B Port }

// Switch is one L2 segment: a bridge in a namespace of its own that takes in every port plugged there.
type Switch struct{ Name, NS string }

// NodeSpec is what the topology says about a node beyond its being a host.
type NodeSpec struct {
	Host
	Segment int // 1 or 2
	Addr    addr.Per[netip.Addr]
	ID      string // for --node-id
	Pods    []PodSpec
	host    int // its number in the networks of the underlay
}

// PodSpec names one pod; its address follows from the node's subnet.
type PodSpec struct {
	Name string // "n1-p1"
	NS   string // "lab-n1-p1"
	Port string // its port on the node's bridge: "veth-p1"
}

// Topology is a lab as a value: who there is, where, with which address. It follows from the options alone.
type Topology struct {
	Options  Options
	Nodes    []NodeSpec
	Router   Host
	Internet Host
	Etcd     Host
	Switches []Switch
	Cables   []Cable
}

// NewTopology derives the topology from checked options.
func NewTopology(o Options) Topology {
	t := Topology{Options: o}
	t.Router = t.router()
	t.Internet = t.leaf("internet", internetNet, 10, underlayRoutes)
	t.Etcd = t.leaf("etcd", etcdNet, 2, defaultRoutes)
	t.Cables = append(t.Cables,
		Cable{Port{t.Internet.NS, "eth0"}, Port{t.Router.NS, "internet"}},
		Cable{Port{t.Etcd.NS, "eth0"}, Port{t.Router.NS, "etcd"}})
	for s := 1; s <= o.Segments; s++ {
		sw := Switch{Name: segmentName(s), NS: t.ns(segmentName(s))}
		t.Switches = append(t.Switches, sw)
		t.Cables = append(t.Cables, Cable{Port{t.Router.NS, sw.Name}, Port{sw.NS, "router"}})
	}
	for i := 1; i <= o.Nodes; i++ {
		n := t.node(i)
		t.Nodes = append(t.Nodes, n)
		t.Cables = append(t.Cables, Cable{Port{n.NS, "eth0"}, Port{t.Switches[n.Segment-1].NS, n.Name}})
	}
	return t
}

func segmentName(s int) string { return fmt.Sprintf("seg%d", s) }

func (t Topology) ns(name string) string { return t.Options.Name + "-" + name }

// network gives the prefix of one underlay network in one family.
type network func(f addr.Family) netip.Prefix

func segmentNet(s int) network {
	return func(f addr.Family) netip.Prefix {
		if f == addr.IPv4 {
			return netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 31, byte(s), 0}), 24)
		}
		return netip.MustParsePrefix(fmt.Sprintf("fd31:0:0:%d::/64", s))
	}
}

func etcdNet(f addr.Family) netip.Prefix { return segmentNet(etcdSegment)(f) }

func internetNet(f addr.Family) netip.Prefix {
	if f == addr.IPv4 {
		return netip.MustParsePrefix("203.0.113.0/24")
	}
	return netip.MustParsePrefix("2001:db8:113::/64")
}

// underlayNet covers every segment and etcd, but neither the internet nor the pods.
func underlayNet(f addr.Family) netip.Prefix {
	if f == addr.IPv4 {
		return netip.MustParsePrefix("172.31.0.0/16")
	}
	return netip.MustParsePrefix("fd31::/48")
}

// hostAddr is host number n of a network, with the network's length. In IPv6 the number is written as it is read in
// IPv4, ::11 for .11, so that the two addresses of a host are recognised as a pair.
func hostAddr(p netip.Prefix, n int) netip.Prefix {
	b := p.Addr().AsSlice()
	if p.Addr().Is4() {
		b[3] = byte(n)
	} else {
		b[14], b[15] = byte(n/100), byte(n/10%10<<4|n%10)
	}
	a, _ := netip.AddrFromSlice(b)
	return netip.PrefixFrom(a, p.Bits())
}

func (t Topology) addrs(net network, n int) []netip.Prefix {
	var out []netip.Prefix
	for _, f := range t.Options.Stack.Families() {
		out = append(out, hostAddr(net(f), n))
	}
	return out
}

func (t Topology) router() Host {
	r := Host{Name: "router", NS: t.ns("router"), Forwards: true}
	add := func(name string, net network) {
		r.Interfaces = append(r.Interfaces, Interface{Name: name, Addrs: t.addrs(net, 1)})
	}
	add("internet", internetNet)
	add("etcd", etcdNet)
	for s := 1; s <= t.Options.Segments; s++ {
		add(segmentName(s), segmentNet(s))
	}
	return r
}

// leaf is a host with one interface, whose routes go through the router.
func (t Topology) leaf(name string, net network, n int, dst network) Host {
	h := Host{Name: name, NS: t.ns(name), Interfaces: []Interface{{Name: "eth0", Addrs: t.addrs(net, n)}}}
	for _, f := range t.Options.Stack.Families() {
		h.Routes = append(h.Routes, Route{Dst: dst(f), Via: hostAddr(net(f), 1).Addr()})
	}
	return h
}

func defaultRoutes(f addr.Family) netip.Prefix {
	if f == addr.IPv4 {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

// underlayRoutes lets the internet answer the underlay, and nothing else: a pod's own address means nothing out there.
func underlayRoutes(f addr.Family) netip.Prefix { return underlayNet(f) }

func (t Topology) node(i int) NodeSpec {
	name := fmt.Sprintf("n%d", i)
	segment := (i-1)%t.Options.Segments + 1
	n := NodeSpec{
		host:    firstNodeHost - 1 + i,
		Segment: segment,
		ID:      nodeID(t.Options.Name, name),
	}
	n.Host = t.leaf(name, segmentNet(segment), n.host, defaultRoutes)
	for _, p := range n.Interfaces[0].Addrs {
		n.Addr.Set(addr.FamilyOf(p.Addr()), p.Addr())
	}
	for j := 1; j <= t.Options.Pods; j++ {
		pod := fmt.Sprintf("%s-p%d", name, j)
		n.Pods = append(n.Pods, PodSpec{Name: pod, NS: t.ns(pod), Port: fmt.Sprintf("veth-p%d", j)})
	}
	return n
}

// nodeID is what /etc/machine-id would be: stable for the node, 32 hexadecimal digits.
func nodeID(lab, node string) string {
	sum := sha256.Sum256([]byte("overlay-lab/" + lab + "/" + node))
	return hex.EncodeToString(sum[:16])
}

// EtcdURLs are the client URLs under which the nodes reach etcd, one per member and family.
func (t Topology) EtcdURLs() []string {
	var out []string
	for i := 1; i <= max(1, t.Options.EtcdMembers); i++ {
		out = append(out, t.memberURLs(i)...)
	}
	return out
}

func (t Topology) memberURLs(i int) []string {
	scheme := "http"
	if t.Options.Secure {
		scheme = "https"
	}
	var out []string
	for _, p := range t.Etcd.Interfaces[0].Addrs {
		out = append(out, fmt.Sprintf("%s://%s", scheme, netip.AddrPortFrom(p.Addr(), clientPort(i))))
	}
	return out
}

// Namespaces lists every namespace of the lab.
func (t Topology) Namespaces() []string {
	out := []string{t.Router.NS, t.Internet.NS, t.Etcd.NS}
	for _, s := range t.Switches {
		out = append(out, s.NS)
	}
	for _, n := range t.Nodes {
		out = append(out, n.NS)
		for _, p := range n.Pods {
			out = append(out, p.NS)
		}
	}
	return out
}

// Find gives the namespace of what the user calls "n1", "n1-p2", "router", "internet", "etcd" or "seg1".
func (t Topology) Find(name string) (string, bool) {
	for _, ns := range t.Namespaces() {
		if ns == t.ns(name) {
			return ns, true
		}
	}
	return "", false
}

// Path is how a packet between two nodes crosses the underlay.
type Path string

// The paths that a packet can be seen on.
const (
	PathTunnel    Path = "tunnel"    // inside VXLAN
	PathDirect    Path = "direct"    // as the pod sent it
	PathEncrypted Path = "encrypted" // nothing of it can be seen, but WireGuard sends something
)

// ExpectedPath is the path that the options ask for between two nodes.
func (t Topology) ExpectedPath(a, b NodeSpec) Path {
	if t.Options.Backend == HostGW || t.Options.Direct && a.Segment == b.Segment {
		return PathDirect
	}
	if t.Options.Backend == WireGuard {
		return PathEncrypted
	}
	return PathTunnel
}

// NetworkConfig renders the network config for overlayd's --init-config.
func (t Topology) NetworkConfig() ([]byte, error) {
	backend := map[string]any{"Type": t.Options.Backend}
	if t.Options.Backend == VXLAN {
		backend["VNI"], backend["Port"], backend["DirectRouting"] = vni, vxlanPort, t.Options.Direct
	}
	c := map[string]any{"Backend": backend}
	if t.Options.Stack == StackIPv6 {
		c["EnableIPv4"] = false
	} else {
		c["Network"], c["SubnetLen"] = "10.244.0.0/16", 24
	}
	if t.Options.Stack != StackIPv4 {
		c["EnableIPv6"], c["IPv6Network"], c["IPv6SubnetLen"] = true, "fd00:10:244::/48", 64
	}
	return json.MarshalIndent(c, "", "  ")
}

// addrs are all addresses of the host.
func (h Host) addrs() []netip.Addr {
	var out []netip.Addr
	for _, i := range h.Interfaces {
		for _, p := range i.Addrs {
			out = append(out, p.Addr())
		}
	}
	return out
}
