package doctor

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/backend/vxlan"
	"github.com/overlayd/overlayd/backend/wireguard"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// Derived is what several facts say together.
type Derived struct {
	Config    *subnet.Config // nil: not known
	Self      subnet.Lease   // its subnets are not valid where this node has none that is known
	NoLease   string         // why none is known, where there is more to say than that
	Underlay  Underlay
	ChooseErr error // why no device leads to the other nodes
	Peers     []peer
	PeersFrom string // "": they are not known
}

// derive is pure. Each part may use those before it.
func derive(f Facts) Derived {
	f.Derived = Derived{}
	f.Config = f.config()
	f.NoLease = f.leaseIsNotOurs()
	f.Self = f.self()
	f.Underlay, f.ChooseErr = f.underlay()
	if f.Self.PublicIP == (addr.Per[netip.Addr]{}) {
		f.Self.PublicIP = f.Underlay.PublicIP
	}
	f.Peers, f.PeersFrom = f.peers()
	return f.Derived
}

// peer is another node in one family.
type peer struct {
	name     string
	subnet   netip.Prefix
	publicIP netip.Addr
	path     string // pathTunnel, pathDirect, or else
	reason   string
	target   netip.Addr // to ping
	odd      bool       // the daemon's own pings have found something
}

// How a peer's pods are reached.
const (
	pathTunnel      = "tunnel"
	pathDirect      = "direct"
	pathUnreachable = "unreachable"
)

func (p peer) family() addr.Family { return addr.FamilyOf(p.subnet.Addr()) }
func (p peer) reachable() bool     { return p.path == pathTunnel || p.path == pathDirect }

// config is that of the store, or else the persisted one.
func (f Facts) config() *subnet.Config {
	if x := f.Store; needsStore(f) == "" && x.Table.ConfigErr == nil && !x.NoConfig {
		return &x.Table.Config
	}
	return f.persistedConfig()
}

func (f Facts) persistedConfig() *subnet.Config {
	c, err := subnet.ParseConfig(f.Persisted.Config)
	if err != nil {
		return nil
	}
	return &c
}

// self is this node's lease: of the daemon, else of the store, else the persisted one.
func (f Facts) self() subnet.Lease {
	var l subnet.Lease
	l.Identity = f.Identity
	if f.NoLease != "" {
		return l
	}
	for _, s := range f.Daemon.Status.Lease.Subnets {
		if p := parsePrefix(s); p.IsValid() {
			l.Subnets.Set(addr.FamilyOf(p.Addr()), p)
		}
	}
	none := addr.Per[netip.Prefix]{}
	if own := f.ownEntry(); own != nil && l.Subnets == none {
		l = own.Lease
	}
	if l.Subnets == none && f.Persisted.Node == f.Identity {
		l.Subnets = f.Persisted.Own()
	}
	return l
}

// ownEntry is the lease in the store that carries this node's identity; nil: there is none.
func (f Facts) ownEntry() *subnet.Entry {
	if f.Store == nil || f.Identity.NodeID == "" {
		return nil
	}
	var own *subnet.Entry
	for _, e := range f.Store.Table.Entries {
		if e.Err == nil && e.Identity == f.Identity {
			own = e
		}
	}
	return own
}

// leaseIsNotOurs says why a lease that carries this node's identity is not known to be this node's. Machines that were
// copied have the same one: what is judged by the other machine's lease would be fixed at its cost.
func (f Facts) leaseIsNotOurs() string {
	if f.Daemon.Running {
		l, p := f.Daemon.Status.Lease, f.problem("lease")
		switch {
		case len(l.Subnets) == 0:
			return "the daemon holds no lease: see problems"
		case !l.Held && p != nil && p.Code == status.Conflict:
			return "another node has this node's lease: see problems"
		}
		return ""
	}
	if own := f.ownEntry(); own != nil {
		if ip := f.elsewhere(own); ip.IsValid() {
			return fmt.Sprintf("the lease of this node's name and ID announces %s, which no device of this node has", ip)
		}
	}
	return ""
}

// elsewhere is the public IP of a lease that should be on a device of this node and is on none; not valid: none is.
func (f Facts) elsewhere(e *subnet.Entry) netip.Addr {
	for _, fam := range addr.Families() {
		ip := e.PublicIP.Get(fam)
		if ip.IsValid() && e.PublicIPLocal && f.Errs[readDevices] == nil && !f.Survey.Host.Has(ip) {
			return ip
		}
	}
	return netip.Addr{}
}

// problem is one that the daemon has; nil: it has no such.
func (f Facts) problem(name string) *status.Problem {
	i := slices.IndexFunc(f.Daemon.Status.Problems, func(p status.Problem) bool { return p.Name == name })
	if i < 0 {
		return nil
	}
	return &f.Daemon.Status.Problems[i]
}

// underlay is the daemon's, or what it would choose.
func (f Facts) underlay() (Underlay, error) {
	s := f.Daemon.Status
	u := Underlay{ByDefault: f.ByDefault}
	if f.Daemon.Running && s.Interface.Reason != "" {
		u.ByDefault = s.Interface.ByDefault
		for _, text := range s.Interface.PublicIPs {
			if a, err := netip.ParseAddr(text); err == nil {
				u.PublicIP.Set(addr.FamilyOf(a), a)
			}
		}
		for _, d := range s.Devices {
			if a, err := netip.ParseAddr(d.Local); err == nil {
				l, _ := f.Survey.Link(d.Underlay)
				u.By.Set(addr.FamilyOf(a), backend.Underlay{Device: d.Underlay, Addr: a, MTU: l.MTU})
			}
		}
		if len(s.Devices) > 0 {
			return u, nil
		}
	}
	if f.Config == nil || f.Choose == nil || f.Errs[readDevices] != nil {
		return u, nil
	}
	chosen, err := f.Choose(f.Survey.Host, *f.Config, f.Persisted.Settings)
	if err != nil {
		return u, err
	}
	return chosen, nil
}

// peers are those that the daemon lists, else those of the leases in the store, else the persisted ones.
func (f Facts) peers() (out []peer, from string) {
	switch {
	case f.Daemon.Running && f.Daemon.PeersErr == nil:
		return f.peersOfDaemon(), "the daemon"
	case f.Config == nil:
		return nil, ""
	case needsStore(f) == "":
		return f.peersOf(f.Store.Table), f.storeName()
	}
	t, _ := f.Persisted.Table() // none, where it can't be read
	return f.peersOf(t), "the persisted state"
}

func (f Facts) peersOfDaemon() (out []peer) {
	for _, p := range f.Daemon.Peers {
		sn := parsePrefix(p.Subnet)
		if !sn.IsValid() { // a rejected lease has its key there
			continue
		}
		q := peer{name: cmp.Or(p.Name, p.Subnet), subnet: sn, path: p.Path, reason: p.Reason}
		q.publicIP, _ = netip.ParseAddr(p.PublicIP)
		q.target = f.target(q)
		if p.Probe != nil {
			q.target, _ = netip.ParseAddr(p.Probe.Address)
			q.odd = p.Probe.Verdict != status.Answers && p.Probe.Verdict != status.NotPinged
		}
		out = append(out, q)
	}
	return out
}

func (f Facts) peersOf(t subnet.Table) (out []peer) {
	accepted, _ := t.Peers(*f.Config, f.Self)
	for _, l := range accepted {
		for _, fam := range f.Config.Families() {
			sn := l.Subnets.Get(fam)
			if !sn.IsValid() {
				continue
			}
			p := peer{name: l.Name(), subnet: sn, publicIP: l.PublicIP.Get(fam), path: pathTunnel}
			if f.Config.Backend.Type == subnet.HostGW {
				p.path = pathDirect
			}
			p.target = f.target(p)
			out = append(out, p)
		}
	}
	return out
}

// target is what to ping at a peer, as the daemon does: the address of its tunnel device, or its own where there is no
// such device. Its pods' bridge comes with the first pod only.
func (f Facts) target(p peer) netip.Addr {
	if f.backend() == subnet.HostGW {
		return p.publicIP
	}
	return p.subnet.Addr()
}

func (f Facts) backend() subnet.BackendType {
	if b := f.Daemon.Status.Network.Backend; b != "" {
		return subnet.BackendType(b)
	}
	if f.Config != nil {
		return f.Config.Backend.Type
	}
	return subnet.VXLAN
}

// families are those of the network; IPv4 where it is not known.
func (f Facts) families() []addr.Family {
	var out []addr.Family
	for _, fam := range addr.Families() {
		if f.Config != nil && f.Config.Pools.Get(fam).On() || f.Self.Subnets.Get(fam).IsValid() {
			out = append(out, fam)
		}
	}
	if len(out) == 0 {
		out = []addr.Family{addr.IPv4}
	}
	return out
}

// network is the whole pod network.
func (f Facts) network(fam addr.Family) netip.Prefix {
	if f.Config != nil {
		return f.Config.Pools.Get(fam).Network
	}
	for _, n := range f.Daemon.Status.Network.Networks {
		if p := parsePrefix(n); p.IsValid() && addr.FamilyOf(p.Addr()) == fam {
			return p
		}
	}
	return parsePrefix(f.System.SubnetEnv[envKey(fam, "NETWORK")])
}

// envKey is a variable of subnet.env.
func envKey(fam addr.Family, name string) string {
	if fam == addr.IPv6 {
		name = "IPV6_" + name
	}
	return "FLANNEL_" + name
}

// podMTU is what pods are told.
func (f Facts) podMTU() int {
	if m := f.Daemon.Status.Network.MTU; m > 0 {
		return m
	}
	least := 0
	for _, d := range f.tunnels() {
		if d.exists && (least == 0 || d.link.MTU < least) {
			least = d.link.MTU
		}
	}
	if least == 0 {
		least, _ = strconv.Atoi(f.System.SubnetEnv["FLANNEL_MTU"])
	}
	return least
}

// tunnel is a tunnel device as it should be, and as it is.
type tunnel struct {
	family   addr.Family
	name     string
	vni      uint32
	port     uint16
	underlay string
	local    netip.Addr
	mtu      int // that it should have; 0: not known
	mac      string
	wg       bool // of WireGuard, which has no VNI and no MAC
	link     netstate.SurveyLink
	exists   bool
}

// tunnels are the tunnel devices that there must be, by what the daemon says, or else the config.
func (f Facts) tunnels() []tunnel {
	var out []tunnel
	if f.Daemon.Running && len(f.Daemon.Status.Devices) > 0 {
		for _, d := range f.Daemon.Status.Devices {
			local, _ := netip.ParseAddr(d.Local)
			out = append(out, tunnel{
				family: addr.FamilyOf(local), name: d.Name, vni: d.VNI, port: d.Port, underlay: d.Underlay, local: local,
				mtu: d.MTU, mac: d.MAC, wg: d.PublicKey != "",
			})
		}
	} else if f.Config != nil && f.Config.Backend.Type != subnet.HostGW {
		b := f.Config.Backend
		for _, fam := range f.Config.Families() {
			u := f.Underlay.By.Get(fam)
			t := tunnel{
				family: fam, name: vxlan.DeviceName(fam, b.VNI), vni: b.VNI, port: b.Port, underlay: u.Device, local: u.Addr,
			}
			if b.Type == subnet.WireGuard {
				t.name, t.vni, t.port, t.underlay, t.wg = wireguard.DeviceName(fam), 0, b.ListenPort.Get(fam), "", true
			}
			for _, l := range f.uplinks(fam) {
				u.MTU = min(u.MTU, l.MTU)
			}
			if u.MTU > 0 {
				t.mtu = backend.PodMTU(b, fam, u.MTU)
			}
			if m := f.Self.VTEP.Get(fam).MAC; !m.IsZero() {
				t.mac = m.String()
			}
			out = append(out, t)
		}
	}
	for i := range out {
		out[i].link, out[i].exists = f.Survey.Link(out[i].name)
	}
	return out
}

// bridges are the devices that have an address inside this node's own subnet, but for the tunnels.
func (f Facts) bridges() []netstate.SurveyLink {
	var out []netstate.SurveyLink
	for _, a := range f.Survey.Host.Addresses {
		own := f.Self.Subnets.Get(addr.FamilyOf(a.Prefix.Addr()))
		if l, exists := f.Survey.Link(a.Link); exists && !a.Tunnel && own.Contains(a.Prefix.Addr()) &&
			!slices.Contains(namesOf(out), l.Name) {
			out = append(out, l)
		}
	}
	return out
}

func namesOf(links []netstate.SurveyLink) []string {
	var out []string
	for _, l := range links {
		out = append(out, l.Name)
	}
	return out
}

func parsePrefix(s string) netip.Prefix {
	p, _ := netip.ParsePrefix(s)
	return p
}
