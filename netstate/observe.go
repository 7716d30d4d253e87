package netstate

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Observe reads the kernel: it returns the part of the host's network that is not ours, and keeps the part that is for
// the next Reconcile.
func (k *Kernel) Observe() (Host, error) {
	o, err := k.observe()
	if err != nil {
		return Host{}, err
	}
	k.monitor.change(func(e *expectation) { e.observed = o })
	return o.host, nil
}

// observation is what is read from the kernel at one time.
type observation struct {
	owned func(name string) bool
	conn  *conn

	devices map[uint32]device // all, by index
	links   []SurveyLink
	bare    []rawRoute // for which the kernel names only a nexthop object (net.ipv4.nexthop_compat_mode=0)

	ours State // without the settings: which of those matter is said by the desired state
	host Host
}

// device is what the monitor compares a device with.
type device struct{ name, content string }

// observe reads all but the settings.
func (k *Kernel) observe() (*observation, error) {
	k.observed, k.synced = nil, false
	o := &observation{owned: k.owned, conn: k.conn, ours: k.room()}
	_, err := os.Stat("/proc/sys/net/ipv6")
	o.host.IPv6 = err == nil
	for _, step := range []struct {
		what string
		read func() error
	}{
		{"devices", o.readLinks},
		{"addresses", o.readAddresses},
		{"routes", o.readRoutes},
		{"rules", o.readRules},
		{"neighbours", o.readNeighbours},
		{"WireGuard devices", o.readWireGuard},
	} {
		if err := step.read(); err != nil {
			return nil, fmt.Errorf("reading the %s: %w", step.what, err)
		}
	}
	ours := o.ours
	ours.Sort()
	o.ours, o.host = State{Links: ours.Links}, o.host.Indexed() // the rest is not needed for long
	k.observed, k.last, k.index = &ours, o, map[string]int{}
	for i, d := range o.devices {
		if o.isOurs(d.name) || !k.owned(d.name) { // nothing is put on another program's device with a name of ours
			k.index[d.name] = int(i)
		}
	}
	return o, nil
}

// room is an empty state with room for as much as is most likely there, and a little more.
func (k *Kernel) room() State {
	if !k.applied {
		return State{}
	}
	with := func(n int) int { return n + n/64 + 16 }
	return State{
		Neighbours: make([]Neighbour, 0, with(len(k.desired.Neighbours))),
		FDB:        make([]FDBEntry, 0, with(len(k.desired.FDB))),
		Routes:     make([]Route, 0, with(len(k.desired.Routes))),
	}
}

// add is append, but doubles the room: at the start it is not known how much there is, and append would copy thousands
// of objects five times.
func add[T any](list []T, x T) []T {
	if len(list) == cap(list) {
		list = slices.Grow(list, len(list)+16)
	}
	return append(list, x)
}

// isOurs reports whether a device is one of our tunnel devices.
func (o *observation) isOurs(name string) bool {
	return slices.ContainsFunc(o.ours.Links, func(l Link) bool { return l.Name == name })
}

// isVXLAN reports whether a device is one of our VXLAN devices.
func (o *observation) isVXLAN(name string) bool {
	return slices.ContainsFunc(o.ours.Links, func(l Link) bool { return l.Name == name && !l.wireGuard() })
}

func (o *observation) readLinks() error {
	var all []netlink.Link
	var failed error
	err := o.conn.dump(unix.RTM_GETLINK, nl.NewIfInfomsg(unix.AF_UNSPEC), nil, func() {
		all, o.devices = nil, map[uint32]device{}
	}, func(b []byte) {
		l, err := netlink.LinkDeserialize(nil, slices.Clone(b))
		if err != nil {
			failed = err
			return
		}
		all = append(all, l)
		i, d, _ := parseDevice(b)
		o.devices[i] = d
	})
	if err = errors.Join(err, failed); err != nil {
		return err
	}
	for _, l := range all {
		a := l.Attrs()
		hl := HostLink{
			Index: a.Index, Name: a.Name, AltNames: strings.Join(a.AltNames, "\n"), Kind: l.Type(),
			Master: o.devices[uint32(a.MasterIndex)].name, MTU: a.MTU,
			Up: a.RawFlags&unix.IFF_UP != 0, Loopback: a.RawFlags&unix.IFF_LOOPBACK != 0,
		}
		mac := macOf(a.HardwareAddr)
		if v, ok := l.(*netlink.Vxlan); ok {
			hl.VXLAN = vxlanOf(v, o.devices[uint32(v.VtepDevIndex)].name)
			if hl.Tunnel = o.owned(a.Name); hl.Tunnel {
				o.ours.Links = append(o.ours.Links, Link{Name: a.Name, VXLAN: hl.VXLAN, MAC: mac, MTU: a.MTU, Down: !hl.Up})
			}
		}
		switch l.(type) {
		case *netlink.Wireguard, *netlink.Tuntap: // the kernel's, or that of a program in user space
			if hl.Tunnel = o.owned(a.Name); hl.Tunnel {
				o.ours.Links = append(o.ours.Links, Link{Name: a.Name, MTU: a.MTU, Down: !hl.Up})
			}
		}
		o.host.Links = append(o.host.Links, hl)
		o.links = append(o.links, SurveyLink{HostLink: hl, MAC: mac, Carrier: a.RawFlags&unix.IFF_LOWER_UP != 0})
	}
	return nil
}

func (o *observation) readAddresses() error {
	const fleeting = unix.IFA_F_DEPRECATED | unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED
	return o.conn.dump(unix.RTM_GETADDR, nl.NewIfAddrmsg(unix.AF_UNSPEC), nil, func() {
		o.host.Addresses, o.ours.Addresses = nil, nil
	}, func(b []byte) {
		p, ifindex, flags, ok := parseAddress(b)
		if !ok {
			return
		}
		name, ip := o.devices[ifindex].name, p.Addr()
		ours := o.isOurs(name)
		// the same bit says of an IPv4 address that it is a secondary one
		temporary := ip.Is6() && flags&unix.IFA_F_TEMPORARY != 0
		o.host.Addresses = append(o.host.Addresses,
			HostAddress{Link: name, Prefix: p, Fleeting: temporary || flags&fleeting != 0, Tunnel: ours})
		if ours && !ip.IsLinkLocalUnicast() {
			o.ours.Addresses = append(o.ours.Addresses, Address{Link: name, Prefix: p})
		}
	})
}

func (o *observation) readRoutes() error {
	err := o.conn.dump(unix.RTM_GETROUTE, &nl.RtMsg{}, nil, func() {
		o.ours.Routes, o.host.Routes, o.bare = o.ours.Routes[:0], nil, nil
	}, func(b []byte) {
		r, ok := parseRoute(b)
		if !ok {
			return
		}
		r.Link = o.devices[r.oif].name
		switch {
		case r.ours():
			o.ours.Routes = add(o.ours.Routes, r.Route)
		case r.Table != MainTable:
		case r.nexthop != 0 && r.oif == 0 && len(r.hops) == 0 && !r.drops():
			o.bare = append(o.bare, r)
		default:
			o.host.Routes = append(o.host.Routes, o.hostRoutes(r)...)
		}
	})
	if err != nil || len(o.bare) == 0 {
		return err
	}
	objects, err := o.nexthopObjects()
	for _, r := range o.bare {
		if r.hops = objects[r.nexthop]; len(r.hops) == 0 {
			r.kind = unix.RTN_BLACKHOLE
		}
		o.host.Routes = append(o.host.Routes, o.hostRoutes(r)...)
	}
	return err
}

// hostRoutes is a route with the names of the devices, one for each next hop.
func (o *observation) hostRoutes(r rawRoute) []HostRoute {
	if len(r.hops) == 0 {
		r.hops = []hop{{r.oif, r.Via}}
	}
	out := make([]HostRoute, 0, len(r.hops))
	for _, hop := range r.hops {
		out = append(out, HostRoute{
			Dst: r.Dst, Via: hop.via, Link: o.devices[hop.oif].name, Src: r.Src, Metric: r.Metric, Multipath: len(r.hops) > 1,
			Drops: r.drops(), Advertised: r.protocol == unix.RTPROT_RA,
		})
	}
	return out
}

// nexthopObjects reads the objects that routes may share instead of having next hops of their own, by number.
func (o *observation) nexthopObjects() (map[uint32][]hop, error) {
	out, groups := map[uint32][]hop{}, map[uint32][]uint32{}
	err := o.conn.dump(unix.RTM_GETNEXTHOP, nexthopHeader{}, nil, func() { clear(out); clear(groups) }, func(b []byte) {
		id, own, group := parseNexthop(b)
		out[id], groups[id] = own, group
	})
	for id, members := range groups {
		for _, m := range members { // a group has no groups in it
			out[id] = append(out[id], out[m]...)
		}
	}
	return out, err
}

// nexthopHeader is an empty struct nhmsg (uapi/linux/nexthop.h).
type nexthopHeader struct{}

func (nexthopHeader) Len() int          { return sizeofNhmsg }
func (nexthopHeader) Serialize() []byte { return make([]byte, sizeofNhmsg) }

func (o *observation) readRules() error {
	return o.conn.dump(unix.RTM_GETRULE, &nl.RtMsg{}, nil, func() {
		o.ours.Rules, o.host.Rules = nil, nil
	}, func(b []byte) {
		switch r, ours, ok := parseRule(b); {
		case ok && ours:
			o.ours.Rules = append(o.ours.Rules, r.Rule)
		case ok:
			o.host.Rules = append(o.host.Rules, r)
		}
	})
}

func (o *observation) readNeighbours() error {
	for ifindex, d := range o.devices {
		if !o.isVXLAN(d.name) {
			continue
		}
		neighbours, entries := len(o.ours.Neighbours), len(o.ours.FDB)
		filter := []*nl.RtAttr{nl.NewRtAttr(unix.NDA_IFINDEX, nl.Uint32Attr(ifindex))}
		err := o.conn.dump(unix.RTM_GETNEIGH, &netlink.Ndmsg{}, filter, func() {
			o.ours.Neighbours = o.ours.Neighbours[:neighbours]
		}, func(b []byte) {
			if n, at, ok := parseNeighbour(b); ok && at == ifindex { // an older kernel does not filter
				n.Link = d.name
				o.ours.Neighbours = add(o.ours.Neighbours, n)
			}
		})
		if err != nil {
			return err
		}
		err = o.conn.dump(unix.RTM_GETNEIGH, &netlink.Ndmsg{Family: unix.AF_BRIDGE, Index: ifindex}, nil, func() {
			o.ours.FDB = o.ours.FDB[:entries]
		}, func(b []byte) {
			if e, at, ok := parseFDB(b); ok && at == ifindex {
				e.Link = d.name
				o.ours.FDB = add(o.ours.FDB, e)
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// readSysctls reads the settings that are desired; one that can't be read is missing.
func readSysctls(desired []Sysctl) []Sysctl {
	var out []Sysctl
	for _, s := range desired {
		if v, err := os.ReadFile(filepath.Join("/proc/sys", s.Path)); err == nil {
			out = append(out, Sysctl{s.Path, strings.TrimSpace(string(v))})
		}
	}
	return out
}
