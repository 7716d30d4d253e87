package netstate

import (
	"bytes"
	"encoding/binary"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// Messages are read by hand: the dumps of routes, neighbours and FDB entries grow with the number of peers, and a
// parser that builds no tree takes a quarter of the time.

const (
	attrTypeMask  = 0x3fff // NLA_TYPE_MASK, uapi/linux/netlink.h
	attrNexthopID = 30     // RTA_NH_ID, uapi/linux/rtnetlink.h
	sizeofNhmsg   = 8      // struct nhmsg, uapi/linux/nexthop.h
)

// eachAttr walks rtattrs (struct rtattr, uapi/linux/rtnetlink.h).
func eachAttr(b []byte, f func(typ uint16, data []byte)) {
	for len(b) >= unix.SizeofRtAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofRtAttr || n > len(b) {
			return
		}
		f(binary.NativeEndian.Uint16(b[2:])&attrTypeMask, b[unix.SizeofRtAttr:n])
		b = b[min((n+3)&^3, len(b)):]
	}
}

func cString(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

func ipOf(b []byte) netip.Addr {
	a, _ := netip.AddrFromSlice(b)
	return a
}

func u32(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(b)
}

func macOf(b []byte) addr.MAC {
	if len(b) != len(addr.MAC{}) {
		return addr.MAC{}
	}
	return addr.MAC(b)
}

func isIP(family uint8) bool { return family == unix.AF_INET || family == unix.AF_INET6 }

func unspecified(six bool) netip.Addr {
	if six {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// parseDevice reads what can make a difference of an RTM_NEWLINK body (struct ifinfomsg): name, MTU, MAC, master,
// whether it is up, and all settings of a VXLAN device.
func parseDevice(b []byte) (ifindex uint32, d device, ok bool) {
	if len(b) < unix.SizeofIfInfomsg {
		return 0, d, false
	}
	content := []byte{byte(u32(b[8:]) & unix.IFF_UP)}
	eachAttr(b[unix.SizeofIfInfomsg:], func(typ uint16, data []byte) {
		switch typ {
		case unix.IFLA_IFNAME:
			d.name = cString(data)
		case unix.IFLA_MTU, unix.IFLA_ADDRESS, unix.IFLA_MASTER:
			content = append(append(content, byte(typ)), data...)
		case unix.IFLA_LINKINFO:
			if bytes.Contains(data, []byte("vxlan\x00")) { // that of a bridge or a bond has timers
				content = append(content, data...)
			}
		}
	})
	d.content = string(content)
	return u32(b[4:]), d, true
}

// parseAddress reads an RTM_NEWADDR body (struct ifaddrmsg). An address with a peer address has no network.
func parseAddress(b []byte) (p netip.Prefix, ifindex, flags uint32, ok bool) {
	if len(b) < unix.SizeofIfAddrmsg {
		return p, 0, 0, false
	}
	h := nl.DeserializeIfAddrmsg(b)
	flags = uint32(h.Flags)
	var local, ip netip.Addr
	eachAttr(b[unix.SizeofIfAddrmsg:], func(typ uint16, data []byte) {
		switch typ {
		case unix.IFA_LOCAL:
			local = ipOf(data)
		case unix.IFA_ADDRESS:
			ip = ipOf(data)
		case unix.IFA_FLAGS:
			flags = u32(data)
		}
	})
	p = netip.PrefixFrom(ip, int(h.Prefixlen))
	if local.IsValid() && local != ip {
		p = addr.Host(local)
	}
	return p, h.Index, flags, p.IsValid()
}

// rawRoute is a route as it is in a message; devices are numbers.
type rawRoute struct {
	Route
	protocol, kind uint8
	oif            uint32
	hops           []hop  // of a multipath route
	nexthop        uint32 // the number of its nexthop object; 0: it has none
}

// hop is one next hop of a route.
type hop struct {
	oif uint32
	via netip.Addr
}

// drops reports whether packets that take the route are dropped.
func (r rawRoute) drops() bool {
	return r.kind == unix.RTN_BLACKHOLE || r.kind == unix.RTN_UNREACHABLE || r.kind == unix.RTN_PROHIBIT
}

func (r rawRoute) ours() bool { return r.protocol == Protocol && !r.drops() }

// parseRoute reads an RTM_NEWROUTE body (struct rtmsg) of a unicast route, or of one that drops packets.
func parseRoute(b []byte) (r rawRoute, ok bool) {
	if len(b) < unix.SizeofRtMsg {
		return r, false
	}
	h := nl.DeserializeRtMsg(b)
	r.protocol, r.kind, r.Table, r.OnLink = h.Protocol, h.Type, uint32(h.Table), h.Flags&unix.RTNH_F_ONLINK != 0
	if !isIP(h.Family) || r.kind != unix.RTN_UNICAST && !r.drops() {
		return r, false
	}
	dst := unspecified(h.Family == unix.AF_INET6)
	eachAttr(b[unix.SizeofRtMsg:], func(typ uint16, data []byte) {
		switch typ {
		case unix.RTA_DST:
			dst = ipOf(data)
		case unix.RTA_GATEWAY:
			r.Via = ipOf(data)
		case unix.RTA_VIA:
			r.Via = otherFamily(data)
		case unix.RTA_OIF:
			r.oif = u32(data)
		case unix.RTA_PREFSRC:
			r.Src = ipOf(data)
		case unix.RTA_MULTIPATH:
			r.hops = parseHops(data)
		case attrNexthopID:
			r.nexthop = u32(data)
		case unix.RTA_PRIORITY:
			r.Metric = u32(data)
		case unix.RTA_TABLE:
			r.Table = u32(data)
		}
	})
	r.Dst = netip.PrefixFrom(dst, int(h.Dst_len))
	return r, r.Dst.IsValid()
}

// otherFamily reads a gateway of the other family: struct rtvia is the family, then the address.
func otherFamily(data []byte) netip.Addr { return ipOf(data[min(2, len(data)):]) }

// parseHops reads the next hops of a multipath route: each is a struct rtnexthop (length, flags, weight, device) and
// its attributes.
func parseHops(b []byte) []hop {
	var out []hop
	for len(b) >= unix.SizeofRtNexthop {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofRtNexthop || n > len(b) {
			break
		}
		h := hop{oif: u32(b[4:])}
		eachAttr(b[unix.SizeofRtNexthop:n], func(typ uint16, data []byte) {
			switch typ {
			case unix.RTA_GATEWAY:
				h.via = ipOf(data)
			case unix.RTA_VIA:
				h.via = otherFamily(data)
			}
		})
		out = append(out, h)
		b = b[min((n+3)&^3, len(b)):]
	}
	return out
}

// parseNexthop reads an RTM_NEWNEXTHOP body (struct nhmsg, uapi/linux/nexthop.h): an object that is one next hop, or a
// group of others, by their numbers. One that drops packets is neither.
func parseNexthop(b []byte) (id uint32, own []hop, group []uint32) {
	const sizeofMember = 8 // struct nexthop_grp: the number, then the weight
	if len(b) < sizeofNhmsg {
		return 0, nil, nil
	}
	var h hop
	eachAttr(b[sizeofNhmsg:], func(typ uint16, data []byte) {
		switch typ {
		case unix.NHA_ID:
			id = u32(data)
		case unix.NHA_GROUP:
			for ; len(data) >= sizeofMember; data = data[sizeofMember:] {
				group = append(group, u32(data))
			}
		case unix.NHA_OIF:
			h.oif = u32(data)
		case unix.NHA_GATEWAY:
			h.via = ipOf(data)
		}
	})
	if h.oif != 0 {
		own = []hop{h}
	}
	return id, own, group
}

// parseNeighbour reads an RTM_NEWNEIGH body of an ARP or NDP entry. Only permanent ones are configured; the others are
// found by the kernel.
func parseNeighbour(b []byte) (n Neighbour, ifindex uint32, permanent bool) {
	n.IP, n.MAC, ifindex, permanent = parseNeigh(b)
	return n, ifindex, permanent && n.IP.IsValid()
}

// parseFDB reads an RTM_NEWNEIGH body of an FDB entry. What is not permanent, the device has learned.
func parseFDB(b []byte) (e FDBEntry, ifindex uint32, permanent bool) {
	e.Dst, e.MAC, ifindex, permanent = parseNeigh(b)
	return e, ifindex, permanent && e.Dst.IsValid()
}

// parseNeigh reads struct ndmsg and its attributes.
func parseNeigh(b []byte) (ip netip.Addr, mac addr.MAC, ifindex uint32, permanent bool) {
	if len(b) < unix.SizeofNdMsg {
		return ip, mac, 0, false
	}
	odd := false
	eachAttr(b[unix.SizeofNdMsg:], func(typ uint16, data []byte) {
		switch typ {
		case unix.NDA_DST:
			ip = ipOf(data)
		case unix.NDA_LLADDR:
			mac = macOf(data)
		case unix.NDA_PORT, unix.NDA_VNI, unix.NDA_IFINDEX: // only where they are not the device's own
			odd = true
		}
	})
	if odd && ip.IsValid() {
		ip = netip.IPv4Unspecified() // where no entry of ours leads; for a deletion, it stands for any
	}
	return ip, mac, u32(b[4:]), binary.NativeEndian.Uint16(b[8:])&unix.NUD_PERMANENT != 0
}
