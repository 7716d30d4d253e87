package netstate

import (
	"bytes"
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// The dumps of routes, neighbours and FDB entries are read by hand: they are the only ones that grow with the number of
// peers, and a parser that builds no tree takes a quarter of the time.

const (
	attrTypeMask  = 0x3fff // NLA_TYPE_MASK, uapi/linux/netlink.h
	attrNexthopID = 30     // RTA_NH_ID, uapi/linux/rtnetlink.h
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

// rawRoute is a route as the kernel says it; links are still numbers.
type rawRoute struct {
	Route
	protocol, kind uint8
	oif            uint32
	src            netip.Addr
	hops           []hop  // of a multipath route
	nexthop        uint32 // the number of its nexthop object; 0: it has none
}

// hop is one next hop of a route.
type hop struct {
	oif uint32
	via netip.Addr
}

// drops reports whether it is a route that throws packets away.
func (r rawRoute) drops() bool {
	return r.kind == unix.RTN_BLACKHOLE || r.kind == unix.RTN_UNREACHABLE || r.kind == unix.RTN_PROHIBIT
}

// parseRoute reads an RTM_NEWROUTE body (struct rtmsg and its attributes).
func parseRoute(b []byte) (rawRoute, bool) {
	if len(b) < unix.SizeofRtMsg {
		return rawRoute{}, false
	}
	family, dstLen := b[0], int(b[1])
	r := rawRoute{protocol: b[5], kind: b[7]}
	r.Table = uint32(b[4])
	r.OnLink = binary.NativeEndian.Uint32(b[8:])&unix.RTNH_F_ONLINK != 0
	dst := netip.IPv4Unspecified()
	if family == unix.AF_INET6 {
		dst = netip.IPv6Unspecified()
	}
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
			r.src = ipOf(data)
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
	r.Dst = netip.PrefixFrom(dst, dstLen)
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
	const (
		sizeofNhmsg  = 8
		sizeofMember = 8 // struct nexthop_grp: the number, then the weight
	)
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

// parseNeighbour reads an RTM_NEWNEIGH body (struct ndmsg) of an ARP or NDP entry. Only permanent ones are set by somebody; the
// others are the kernel's own findings.
func parseNeighbour(b []byte) (n Neighbour, ifindex uint32, permanent bool) {
	ip, mac, ifindex, permanent := parseNeigh(b)
	return Neighbour{IP: ip, MAC: mac}, ifindex, permanent && ip.IsValid()
}

// parseFDB reads an RTM_NEWNEIGH body of an FDB entry. What is not permanent, the device has learned.
func parseFDB(b []byte) (e FDBEntry, ifindex uint32, permanent bool) {
	ip, mac, ifindex, permanent := parseNeigh(b)
	return FDBEntry{MAC: mac, Dst: ip}, ifindex, permanent && ip.IsValid()
}

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
		case unix.NDA_PORT, unix.NDA_VNI, unix.NDA_IFINDEX: // said of an FDB entry only where they are not the device's own
			odd = true
		}
	})
	if odd && ip.IsValid() {
		ip = netip.IPv4Unspecified() // leads where no entry of ours does; for a deletion, it stands for any
	}
	return ip, mac, u32(b[4:]), binary.NativeEndian.Uint16(b[8:])&unix.NUD_PERMANENT != 0
}
