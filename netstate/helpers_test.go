package netstate

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/nstest"
)

// node is a namespace with an underlay device eth0, and the kernel state in it.
type node struct {
	*nstest.NS
	t testing.TB
	k *Kernel
}

const (
	dev4, dev6 = "overlay.1", "overlay-v6.1"
	node4      = "192.0.2.1"
	node6      = "2001:db8::1"
)

func ownedName(name string) bool { return strings.HasPrefix(name, "overlay") }

func newNode(t testing.TB) *node {
	t.Helper()
	n := &node{NS: nstest.New(t), t: t}
	nstest.Link(n.NS, "eth0", nstest.New(t), "eth0")
	n.Addr("eth0", node4+"/24")
	n.Addr("eth0", node6+"/64")
	n.open()
	return n
}

func (n *node) open() {
	n.t.Helper()
	var err error
	n.Do(func() { n.k, err = Open(ownedName) })
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(n.k.Close)
}

// all is an update after which nothing but a state is desired.
func all(desired State) Update { return Update{Come: desired, All: true, Prune: true} }

// forget makes the Kernel observe before it does anything.
func (n *node) forget() { n.k.observed, n.k.synced = nil, false }

// reconcile leaves the desired state with its caller.
func (n *node) reconcile(desired State) Result { n.t.Helper(); return n.handOver(desired.clone()) }

func (n *node) handOver(desired State) Result {
	n.t.Helper()
	var res Result
	var err error
	n.Do(func() { res, err = n.k.Reconcile(all(desired)) })
	if err != nil {
		n.t.Fatal(err)
	}
	return res
}

// converge is reconcile where nothing may be refused.
func (n *node) converge(desired State) []Change {
	n.t.Helper()
	res := n.reconcile(desired)
	for _, f := range res.Failed {
		n.t.Errorf("refused: %v", f)
	}
	return res.Done
}

func (n *node) observe() Host {
	n.t.Helper()
	var h Host
	var err error
	n.Do(func() { h, err = n.k.Observe() })
	if err != nil {
		n.t.Fatal(err)
	}
	return h
}

// sh runs commands, one in a line, that must succeed.
func (n *node) sh(script string) {
	n.t.Helper()
	n.Exec("sh", "-e", "-c", script)
}

func (n *node) wantState(want State) {
	n.t.Helper()
	if got := n.witness(want.Sysctls); !reflect.DeepEqual(got, want) {
		g, w := newWorld(got), newWorld(want)
		for k, o := range w {
			if g[k] != o {
				n.t.Errorf("want %v, the kernel has %v", o, g[k])
			}
		}
		for k, o := range g {
			if _, ok := w[k]; !ok {
				n.t.Errorf("the kernel has %v", o)
			}
		}
		if !n.t.Failed() {
			n.t.Errorf("got  %v\nwant %v", got, want)
		}
	}
}

// fullState has every kind of object, in both families.
func fullState() State {
	s := State{Sysctls: []Sysctl{Forwarding(addr.IPv4), Forwarding(addr.IPv6), AcceptRA(dev4), AcceptRA(dev6)}}
	for i, f := range []struct{ dev, local, own, peer, public, direct string }{
		{dev4, node4, "10.244.1.0/24", "10.244.%d.0/24", "192.0.2.%d", "10.244.9.0/24"},
		{dev6, node6, "fd00:0:0:1::/64", "fd00:0:0:%d::/64", "2001:db8::%d", "fd00:0:0:9::/64"},
	} {
		own := netip.MustParsePrefix(f.own)
		mac := addr.MAC{2, 0, 0, byte(i), 0, 1}
		s.Links = append(s.Links, Link{
			Name: f.dev, MAC: mac, MTU: 1400, VXLAN: VXLAN{
				VNI: 1, Port: 8472, Local: netip.MustParseAddr(f.local),
				Underlay: "eth0",
			},
		})
		s.Addresses = append(s.Addresses, Address{f.dev, addr.Host(own.Addr())})
		s.Rules = append(s.Rules, Rule{Priority: 11800, From: own, To: orAny(netip.Prefix{}, own), Table: OwnTable})
		network := netip.PrefixFrom(own.Addr(), 16).Masked()
		s.Rules = append(s.Rules,
			Rule{Priority: 20000, From: orAny(netip.Prefix{}, own), To: network, Table: MainTable, AtLeast: 16, Unmarked: 5})
		direct := netip.MustParsePrefix(f.direct)
		s.Routes = append(s.Routes, Route{
			Table: MainTable, Dst: direct, Metric: Metric(direct),
			Via: netip.MustParseAddr(fmt.Sprintf(f.public, 9)), Link: "eth0",
		})
		for p := 2; p <= 4; p++ {
			s.addPeer(f.dev, netip.MustParsePrefix(fmt.Sprintf(f.peer, p)), netip.MustParseAddr(fmt.Sprintf(f.public, p)),
				addr.MAC{2, 0, 0, byte(i), 0, byte(p)})
			if p < 4 { // the last one's is the kernel's choice
				s.Routes[len(s.Routes)-2].Src = netip.MustParseAddr(f.local)
			}
		}
	}
	s.Sort()
	return s
}

func (s *State) addPeer(dev string, sn netip.Prefix, public netip.Addr, mac addr.MAC) {
	s.Neighbours = append(s.Neighbours, Neighbour{dev, sn.Addr(), mac})
	s.FDB = append(s.FDB, FDBEntry{dev, mac, public})
	r := Route{Table: MainTable, Dst: sn, Metric: Metric(sn), Via: sn.Addr(), Link: dev, OnLink: true}
	s.Routes = append(s.Routes, r)
	r.Table, r.Dst = OwnTable, addr.Host(public)
	r.Metric = Metric(r.Dst)
	s.Routes = append(s.Routes, r)
}

// manyPeers is a state with n peers on one device.
func manyPeers(n int) State {
	s := State{Links: fullState().Links}
	s.Links = s.Links[1:] // overlay.1
	for i := range n {
		hi, lo := byte(i>>8), byte(i)
		s.addPeer(dev4, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 128 + hi, lo, 0}), 24),
			netip.AddrFrom4([4]byte{172, 16, hi, lo}), addr.MAC{2, 0, 1, 0, hi, lo})
	}
	s.Sort()
	return s
}

// witness reads the state that is ours through iproute2, which shares no code with this package.
func (n *node) witness(sysctls []Sysctl) State {
	n.t.Helper()
	var s State
	for _, l := range query[ipLink](n, "ip", "-N", "-j", "-d", "link", "show") {
		if l.Info.Kind != "vxlan" || !ownedName(l.Name) {
			continue
		}
		s.Links = append(s.Links, l.link(n.t))
		n.witnessEntries(l.Name, &s)
	}
	for _, f := range []string{"-4", "-6"} {
		for _, r := range query[ipRoute](n, "ip", "-N", "-j", f, "route", "show", "table", "all", "proto", "118") {
			s.Routes = append(s.Routes, r.route(n.t, f))
		}
		for _, r := range query[ipRule](n, "ip", "-N", "-j", f, "rule", "show") {
			if r.Protocol == "118" {
				s.Rules = append(s.Rules, r.rule(n.t, f == "-6"))
			}
		}
	}
	n.Do(func() {
		for _, want := range sysctls {
			v, _ := os.ReadFile(filepath.Join("/proc/sys", want.Path))
			s.Sysctls = append(s.Sysctls, Sysctl{want.Path, strings.TrimSpace(string(v))})
		}
	})
	s.Sort()
	return s
}

func (n *node) witnessEntries(dev string, s *State) {
	n.t.Helper()
	for _, l := range query[ipLink](n, "ip", "-N", "-j", "addr", "show", "dev", dev) {
		for _, a := range l.Addrs {
			if ip := parseAddr(n.t, a.Local); !ip.IsLinkLocalUnicast() { // the kernel's own
				s.Addresses = append(s.Addresses, Address{dev, netip.PrefixFrom(ip, a.Len)})
			}
		}
	}
	for _, e := range query[ipNeigh](n, "ip", "-N", "-j", "neigh", "show", "dev", dev, "nud", "permanent") {
		s.Neighbours = append(s.Neighbours, Neighbour{dev, parseAddr(n.t, e.Dst), parseMAC(n.t, e.LLAddr)})
	}
	for _, e := range query[ipNeigh](n, "bridge", "-j", "fdb", "show", "dev", dev) {
		if e.State == "permanent" && e.Port == 0 && e.VNI == 0 {
			s.FDB = append(s.FDB, FDBEntry{dev, parseMAC(n.t, e.MAC), parseAddr(n.t, e.Dst)})
		}
	}
}

type ipLink struct {
	Name  string   `json:"ifname"`
	Flags []string `json:"flags"`
	MTU   int      `json:"mtu"`
	MAC   string   `json:"address"`
	Info  struct {
		Kind string `json:"info_kind"`
		Data struct {
			ID       uint32 `json:"id"`
			Local    string `json:"local"`
			Local6   string `json:"local6"`
			Link     string `json:"link"`
			Port     uint16 `json:"port"`
			Learning bool   `json:"learning"`
			GBP      bool   `json:"gbp"`
		} `json:"info_data"`
	} `json:"linkinfo"`
	Addrs []struct {
		Local string `json:"local"`
		Len   int    `json:"prefixlen"`
	} `json:"addr_info"`
}

func (l ipLink) link(t testing.TB) Link {
	d := l.Info.Data
	return Link{
		Name: l.Name, MAC: parseMAC(t, l.MAC), MTU: l.MTU, Down: !strings.Contains(strings.Join(l.Flags, ",")+",", "UP,"),
		VXLAN: VXLAN{
			VNI: d.ID, Port: d.Port, Local: parseAddr(t, d.Local+d.Local6), Underlay: d.Link, Learning: d.Learning,
			GBP: d.GBP,
		},
	}
}

type ipRoute struct {
	Dst, Gateway, Dev, Table, Prefsrc string
	Metric                            uint32
	Flags                             []string
}

func (r ipRoute) route(t testing.TB, family string) Route {
	out := Route{
		Table: table(t, r.Table), Metric: r.Metric, Via: parseAddr(t, r.Gateway), Link: r.Dev,
		OnLink: strings.Contains(strings.Join(r.Flags, " "), "onlink"), Src: parseAddr(t, r.Prefsrc),
	}
	dst := strings.Replace(r.Dst, "default", map[string]string{"-4": "0.0.0.0/0", "-6": "::/0"}[family], 1)
	if !strings.Contains(dst, "/") {
		dst = addr.Host(parseAddr(t, dst)).String()
	}
	out.Dst = netip.MustParsePrefix(dst)
	return out
}

type ipRule struct {
	Priority                          uint32
	Src, Dst, Table, Protocol, FwMask string
	SrcLen, DstLen                    int
	Suppress                          *uint8 `json:"suppress_prefixlen"`
}

func (r ipRule) rule(t testing.TB, six bool) Rule {
	prefix := func(a string, bits int) netip.Prefix {
		if a == "" || a == "all" {
			return netip.PrefixFrom(unspecified(six), 0)
		}
		return netip.PrefixFrom(parseAddr(t, a), bits)
	}
	out := Rule{Priority: r.Priority, From: prefix(r.Src, r.SrcLen), To: prefix(r.Dst, r.DstLen), Table: table(t, r.Table)}
	if r.Suppress != nil {
		out.AtLeast = *r.Suppress + 1
	}
	if r.FwMask != "" {
		mask, err := strconv.ParseUint(r.FwMask, 0, 32)
		if err != nil {
			t.Error(err)
		}
		out.Unmarked = uint32(mask)
	}
	return out
}

type ipNeigh struct {
	MAC, Dst, LLAddr string
	State            any
	Port, VNI        int
}

func query[T any](n *node, command ...string) []T {
	n.t.Helper()
	var out []T
	if text := n.Exec(command...); strings.TrimSpace(text) != "" {
		if err := json.Unmarshal([]byte(text), &out); err != nil {
			n.t.Fatalf("%q: %v\n%s", command, err, text)
		}
	}
	return out
}

func parseAddr(t testing.TB, s string) netip.Addr {
	t.Helper()
	if s == "" {
		return netip.Addr{}
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		t.Error(err)
	}
	return a
}

func parseMAC(t testing.TB, s string) addr.MAC {
	t.Helper()
	m, err := addr.ParseMAC(s)
	if err != nil {
		t.Error(err)
	}
	return m
}

func table(t testing.TB, s string) uint32 {
	t.Helper()
	out := uint32(MainTable)
	if s != "" {
		if _, err := fmt.Sscan(s, &out); err != nil {
			t.Error(err)
		}
	}
	return out
}

// clone shares nothing with the state.
func (s *State) clone() State {
	return State{
		Links: slices.Clone(s.Links), Sysctls: slices.Clone(s.Sysctls), Addresses: slices.Clone(s.Addresses),
		Neighbours: slices.Clone(s.Neighbours), FDB: slices.Clone(s.FDB), TunnelPeers: slices.Clone(s.TunnelPeers),
		Routes: slices.Clone(s.Routes), Rules: slices.Clone(s.Rules),
	}
}

// merge puts the objects of several states into one.
func merge(states ...State) State {
	var out State
	for _, s := range states {
		out.Links = append(out.Links, s.Links...)
		out.Sysctls = append(out.Sysctls, s.Sysctls...)
		out.Addresses = append(out.Addresses, s.Addresses...)
		out.Neighbours = append(out.Neighbours, s.Neighbours...)
		out.FDB = append(out.FDB, s.FDB...)
		out.TunnelPeers = append(out.TunnelPeers, s.TunnelPeers...)
		out.Routes = append(out.Routes, s.Routes...)
		out.Rules = append(out.Rules, s.Rules...)
	}
	out.Sort()
	return out
}
