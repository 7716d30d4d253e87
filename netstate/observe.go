package netstate

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Observe looks at the kernel: it returns the part of the host's network that is not ours, and remembers the part that is for the
// next Reconcile.
func (k *Kernel) Observe() (Host, error) {
	h, err := k.look()
	k.monitor.change(func(e *expectation) { e.devices = k.devices })
	return h, err
}

// room is an empty state with room for as much as is most likely there, and a little more.
func (k *Kernel) room() State {
	if !k.applied {
		return State{}
	}
	with := func(n int) int { return n + n/64 + 16 }
	return State{
		Neighbours: make([]Neighbour, 0, with(len(k.desired.Neighbours))), FDB: make([]FDBEntry, 0, with(len(k.desired.FDB))),
		Routes: make([]Route, 0, with(len(k.desired.Routes))),
	}
}

// grown is append, but doubles the room: how much comes is not known when the daemon starts beside what is there from before.
func grown[T any](s []T, x T) []T {
	if len(s) == cap(s) {
		s = slices.Grow(s, len(s)+1)
	}
	return append(s, x)
}

// look reads all but the settings: which of those matter is said by the wish.
func (k *Kernel) look() (Host, error) {
	s := k.room()
	k.observed, k.synced = nil, false
	var h Host
	_, err := os.Stat("/proc/sys/net/ipv6")
	h.IPv6 = err == nil
	names, err := k.observeLinks(&s, &h)
	if err != nil {
		return Host{}, fmt.Errorf("reading the devices: %w", err)
	}
	for what, read := range map[string]func(map[int]string, *State, *Host) error{
		"addresses": k.observeAddresses, "routes": k.observeRoutes, "rules": k.observeRules, "neighbours": k.observeNeighbours,
	} {
		if err := read(names, &s, &h); err != nil {
			return Host{}, fmt.Errorf("reading the %s: %w", what, err)
		}
	}
	s.Sort()
	k.observed, k.devices.cared, k.devices.index = &s, k.others(&s, h), map[uint32]string{}
	for name, i := range k.index {
		if k.owned(name) {
			k.devices.index[uint32(i)] = name
		}
	}
	return h.Indexed(), nil
}

func (k *Kernel) observeLinks(s *State, h *Host) (map[int]string, error) {
	all, err := k.linkList()
	if err != nil {
		return nil, err
	}
	names := make(map[int]string, len(all))
	k.index = make(map[string]int, len(all))
	for _, l := range all {
		names[l.Attrs().Index] = l.Attrs().Name
		k.index[l.Attrs().Name] = l.Attrs().Index
	}
	for _, l := range all {
		a := l.Attrs()
		hl := HostLink{
			Index: a.Index, Name: a.Name, AltNames: strings.Join(a.AltNames, "\n"), Kind: l.Type(), Master: names[a.MasterIndex],
			MTU: a.MTU,
			Up:  a.RawFlags&unix.IFF_UP != 0, Loopback: a.RawFlags&unix.IFF_LOOPBACK != 0,
		}
		if v, ok := l.(*netlink.Vxlan); ok {
			hl.VXLAN = vxlanOf(v, names)
			if hl.Tunnel = k.owned(a.Name); hl.Tunnel {
				s.Links = append(s.Links, Link{Name: a.Name, VXLAN: hl.VXLAN, MAC: macOf(a.HardwareAddr), MTU: a.MTU, Down: !hl.Up})
			}
		} else if k.owned(a.Name) {
			delete(k.index, a.Name) // somebody else's, in the way of ours: nothing is put on it
		}
		h.Links = append(h.Links, hl)
	}
	return names, nil
}

func (k *Kernel) linkList() ([]netlink.Link, error) {
	for range dumpTries {
		all, err := k.links.LinkList()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
	return nil, errInterrupted
}

func (k *Kernel) observeAddresses(names map[int]string, s *State, h *Host) error {
	const fleeting = unix.IFA_F_DEPRECATED | unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED
	var all []netlink.Addr
	err := error(netlink.ErrDumpInterrupted)
	for i := 0; i < dumpTries && errors.Is(err, netlink.ErrDumpInterrupted); i++ {
		all, err = k.links.AddrList(nil, netlink.FAMILY_ALL)
	}
	if err != nil {
		return err
	}
	for _, a := range all {
		ip, _ := netip.AddrFromSlice(a.IP)
		ip = ip.Unmap()
		bits, _ := a.Mask.Size()
		name, p := names[a.LinkIndex], netip.PrefixFrom(ip, bits)
		// the same bit says of an IPv4 address that it is a secondary one
		temporary := ip.Is6() && a.Flags&unix.IFA_F_TEMPORARY != 0
		h.Addresses = append(h.Addresses,
			HostAddress{Link: name, Prefix: p, Fleeting: temporary || a.Flags&fleeting != 0, Tunnel: k.ours(s, name)})
		if k.ours(s, name) && !ip.IsLinkLocalUnicast() {
			s.Addresses = append(s.Addresses, Address{Link: name, Prefix: p})
		}
	}
	return nil
}

// others lists the links by number that are not ours and carry an address or a route, or are VXLAN devices: such a one may have the VNI
// that one of ours is to have, and its end is all that tells that ours can be made.
func (k *Kernel) others(s *State, h Host) map[uint32]hostLink {
	on := map[string]bool{}
	for _, a := range h.Addresses {
		on[a.Link] = on[a.Link] || !a.Prefix.Addr().IsLinkLocalUnicast()
	}
	for _, r := range h.Routes {
		on[r.Link] = on[r.Link] || !r.Dst.Addr().IsLinkLocalUnicast()
	}
	out := map[uint32]hostLink{}
	for _, l := range h.Links {
		if (on[l.Name] || l.VXLAN != (VXLAN{})) && !k.ours(s, l.Name) {
			out[uint32(l.Index)] = hostLink{l.Name, l.MTU, l.Up}
		}
	}
	return out
}

// ours reports whether a link is one of those that were observed as ours.
func (k *Kernel) ours(s *State, name string) bool {
	return slices.ContainsFunc(s.Links, func(l Link) bool { return l.Name == name })
}

func (k *Kernel) observeRoutes(names map[int]string, s *State, h *Host) error {
	var bare []rawRoute // of which the kernel tells only the number of the nexthop object (net.ipv4.nexthop_compat_mode=0)
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		routes, host, before := len(s.Routes), len(h.Routes), len(bare)
		header := nl.NewRtMsg()
		header.RtMsg = unix.RtMsg{Family: family}
		err := k.conn.dump(unix.RTM_GETROUTE, header, nil, func() {
			s.Routes, h.Routes, bare = s.Routes[:routes], h.Routes[:host], bare[:before]
		}, func(b []byte) {
			r, ok := parseRoute(b)
			if !ok || r.kind != unix.RTN_UNICAST && !r.drops() {
				return
			}
			r.Link = names[int(r.oif)]
			switch {
			case r.protocol == Protocol && !r.drops():
				s.Routes = grown(s.Routes, r.Route)
			case r.Table != MainTable:
			case r.nexthop != 0 && r.oif == 0 && len(r.hops) == 0 && !r.drops():
				bare = append(bare, r)
			default:
				h.Routes = append(h.Routes, r.ofHost(names)...)
			}
		})
		if err != nil && !noFamily(err) {
			return err
		}
	}
	k.devices.nexthops = len(bare) > 0
	if !k.devices.nexthops {
		return nil
	}
	objects, err := k.nexthopObjects()
	for _, r := range bare {
		if r.hops = objects[r.nexthop]; len(r.hops) == 0 {
			r.kind = unix.RTN_BLACKHOLE
		}
		h.Routes = append(h.Routes, r.ofHost(names)...)
	}
	return err
}

// ofHost is a route with the names of the devices, one for each next hop.
func (r rawRoute) ofHost(names map[int]string) []HostRoute {
	if len(r.hops) == 0 {
		r.hops = []hop{{r.oif, r.Via}}
	}
	out := make([]HostRoute, 0, len(r.hops))
	for _, hop := range r.hops {
		out = append(out, HostRoute{
			Dst: r.Dst, Via: hop.via, Link: names[int(hop.oif)], Src: r.src, Metric: r.Metric, Multipath: len(r.hops) > 1,
			Drops: r.drops(), Advertised: r.protocol == unix.RTPROT_RA,
		})
	}
	return out
}

// nexthopObjects reads the objects that routes may share instead of having next hops of their own, by number.
func (k *Kernel) nexthopObjects() (map[uint32][]hop, error) {
	out, groups := map[uint32][]hop{}, map[uint32][]uint32{}
	header := &nexthopHeader{}
	err := k.conn.dump(unix.RTM_GETNEXTHOP, header, nil, func() { clear(out); clear(groups) }, func(b []byte) {
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

func (*nexthopHeader) Len() int          { return 8 }
func (*nexthopHeader) Serialize() []byte { return make([]byte, 8) }

func (k *Kernel) observeRules(_ map[int]string, s *State, h *Host) error {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		before, others := len(s.Rules), len(h.Rules)
		header := nl.NewRtMsg()
		header.RtMsg = unix.RtMsg{Family: family}
		err := k.conn.dump(unix.RTM_GETRULE, header, nil, func() {
			s.Rules, h.Rules = s.Rules[:before], h.Rules[:others]
		}, func(b []byte) {
			switch r, ours, ok := parseRule(b); {
			case ok && ours:
				s.Rules = append(s.Rules, r.Rule)
			case ok:
				h.Rules = append(h.Rules, r)
			}
		})
		if err != nil && !noFamily(err) {
			return err
		}
	}
	return nil
}

func (k *Kernel) observeNeighbours(names map[int]string, s *State, _ *Host) error {
	for _, l := range s.Links {
		ifindex := uint32(k.index[l.Name])
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			before := len(s.Neighbours)
			filter := nl.NewRtAttr(unix.NDA_IFINDEX, nl.Uint32Attr(ifindex))
			err := k.conn.dump(unix.RTM_GETNEIGH, &netlink.Ndmsg{Family: family}, []*nl.RtAttr{filter}, func() {
				s.Neighbours = s.Neighbours[:before]
			}, func(b []byte) {
				if n, at, ok := parseNeighbour(b); ok && at == ifindex { // an older kernel does not filter
					n.Link = names[int(at)]
					s.Neighbours = grown(s.Neighbours, n)
				}
			})
			if err != nil && !noFamily(err) {
				return err
			}
		}
		before := len(s.FDB)
		err := k.conn.dump(unix.RTM_GETNEIGH, &netlink.Ndmsg{Family: unix.AF_BRIDGE, Index: ifindex}, nil, func() {
			s.FDB = s.FDB[:before]
		}, func(b []byte) {
			if e, at, ok := parseFDB(b); ok && at == ifindex {
				e.Link = names[int(at)]
				s.FDB = grown(s.FDB, e)
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// noFamily: a kernel started without IPv6 has no such tables, which is as good as empty ones.
func noFamily(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

// readSysctls reads the settings that are wished for; one that can't be read is missing.
func readSysctls(wish []Sysctl) []Sysctl {
	var out []Sysctl
	for _, w := range wish {
		if v, err := os.ReadFile(filepath.Join("/proc/sys", w.Path)); err == nil {
			out = append(out, Sysctl{w.Path, strings.TrimSpace(string(v))})
		}
	}
	return out
}
