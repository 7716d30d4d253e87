package netstate

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// monitor hears of changes in the kernel and says that it is time to look. What it hears is never acted on: an event that was
// missed, doubled or late does no harm. Events that only confirm what is wished for are passed over; those are our own doing.
type monitor struct {
	file    *os.File
	fd      int           // of the file
	changed chan struct{} // holds at most one wake

	mu     sync.Mutex
	buf    []byte
	expect expectation
}

// expectation is what there should be, as of the last Reconcile or Adjust, and what the devices are, as of the last look.
type expectation struct {
	state *State // nil: nothing was wished for yet
	devices
	deaf bool // to what is ours: it will be looked at
}

// devices are known by their numbers. The maps are not changed once they are handed over.
type devices struct {
	names map[uint32]string   // of all
	index map[uint32]string   // of ours alone
	cared map[uint32]hostLink // others that carry an address or a route, or are VXLAN devices: what they are may matter
	// nexthops says that nexthop objects matter: routes of the host follow from them, of which the kernel says nothing
	// itself.
	nexthops bool
}

// hostLink is what of a device of the host's decisions may depend on.
type hostLink struct {
	name string
	mtu  int
	up   bool
}

// monitorBuffer holds what comes while the reader is busy. An overrun is no harm: then everything is looked at.
const monitorBuffer = 4 << 20

// newMonitor opens the monitor. What the requests that come from the socket own do is not even heard of.
func newMonitor(own int) (*monitor, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	m := &monitor{file: os.NewFile(uintptr(fd), "rtnetlink"), fd: fd, changed: make(chan struct{}, 1), buf: make([]byte, 64<<10)}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, monitorBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, monitorBuffer)
	}
	err = passOver(fd, own)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	for _, group := range []int{
		unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE,
		unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE, unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF,
	} {
		if err == nil {
			err = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group)
		}
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, unix.RTNLGRP_NEXTHOP) // since Linux 5.3
	if err != nil {
		_ = m.file.Close()
		return nil, fmt.Errorf("netlink socket for events: %w", err)
	}
	return m, nil
}

// passOver makes the kernel not tell a socket of what is done by requests from another. It says with most changes which socket asked
// for them (nlmsg_pid); with those of FDB entries it does not. At the start, that saves three messages of four.
func passOver(fd, own int) error {
	addr, err := unix.Getsockname(own)
	if err != nil {
		return err
	}
	sa, ok := addr.(*unix.SockaddrNetlink)
	if !ok {
		return unix.EAFNOSUPPORT
	}
	const offset, all = 12, 1<<32 - 1                                              // of nlmsg_pid in struct nlmsghdr; of a message
	port := binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, sa.Pid)) // as the filter's load has it
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: port},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
		{Code: unix.BPF_RET | unix.BPF_K, K: all},
	}
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
}

// run reads until ctx ends.
func (m *monitor) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = m.file.SetReadDeadline(time.Unix(0, 0)) })
	defer stop()
	raw, err := m.file.SyscallConn()
	if err != nil {
		return err
	}
	err = raw.Read(func(uintptr) bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.drain()
		return false // wait for more
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("netlink events: %w", err)
}

// change changes what is expected. What came before is held against what was expected before: the kernel tells of what we do
// before it answers us, so that nothing of our own doing is ever held against a newer wish.
func (m *monitor) change(f func(e *expectation)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.drain()
	f(&m.expect)
}

// drain reads all that has come. The lock is held.
func (m *monitor) drain() {
	for {
		n, err := unix.Read(m.fd, m.buf)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return
		case errors.Is(err, unix.EINTR):
		case err != nil: // an overrun, most likely: something was missed
			m.wake()
			if !errors.Is(err, unix.ENOBUFS) {
				return
			}
		case m.expect.contradicted(m.buf[:n]):
			m.wake()
		}
	}
}

func (m *monitor) wake() {
	select {
	case m.changed <- struct{}{}:
	default:
	}
}

// contradicted reports whether one of the messages says something else than is expected.
func (e *expectation) contradicted(b []byte) bool {
	for len(b) >= unix.NLMSG_HDRLEN {
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.NLMSG_HDRLEN || size > len(b) {
			return true
		}
		if e.state == nil || e.contradicts(binary.NativeEndian.Uint16(b[4:]), b[unix.NLMSG_HDRLEN:size]) {
			return true
		}
		b = b[min((size+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1), len(b)):]
	}
	return false
}

// contradicts judges one message.
func (e *expectation) contradicts(typ uint16, body []byte) bool {
	switch typ {
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return e.route(typ == unix.RTM_NEWROUTE, body)
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		return e.neighbour(typ == unix.RTM_NEWNEIGH, body)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return e.address(typ == unix.RTM_NEWADDR, body)
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		return e.link(typ == unix.RTM_NEWLINK, body)
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		r, ours, ok := parseRule(body)
		return ok && (!ours || !e.deaf && slices.Contains(e.state.Rules, r.Rule) != (typ == unix.RTM_NEWRULE))
	case unix.RTM_NEWNEXTHOP, unix.RTM_DELNEXTHOP:
		return e.nexthops
	case unix.RTM_NEWNETCONF: // a setting such as forwarding, or a device that came
		return e.netconf(body)
	}
	return false
}

func (e *expectation) route(added bool, body []byte) bool {
	r, ok := parseRoute(body)
	if !ok || r.kind != unix.RTN_UNICAST && !r.drops() {
		return false
	}
	if _, ours := e.index[r.oif]; ours && r.protocol == unix.RTPROT_KERNEL {
		return false // that of an address of ours
	}
	if r.protocol != Protocol || r.drops() { // one of the host's, from which decisions follow
		return r.Table == MainTable && !r.Dst.Addr().IsLinkLocalUnicast() && !r.Dst.Addr().IsMulticast()
	}
	if e.deaf {
		return false
	}
	r.Link = e.names[r.oif] // a device that came since has none: it is ours, and just being filled
	want, there := find(e.state.Routes, r.Route)
	if added {
		return !there || r.Link != "" && want != r.Route
	}
	return there && (r.Link == "" || want == r.Route)
}

func (e *expectation) neighbour(added bool, body []byte) bool {
	if len(body) == 0 || e.deaf {
		return false
	}
	if body[0] == unix.AF_BRIDGE {
		f, ifindex, permanent := parseFDB(body)
		name, ours := e.index[ifindex]
		f.Link = name
		want, there := find(e.state.FDB, f)
		return ours && unexpected(added, permanent, there, want == f)
	}
	n, ifindex, permanent := parseNeighbour(body)
	name, ours := e.index[ifindex]
	n.Link = name
	want, there := find(e.state.Neighbours, n)
	return ours && unexpected(added, permanent, there, want == n)
}

// unexpected judges an entry that may be learned (not permanent): those come and go, unless they stand where one of ours should.
func unexpected(added, permanent, there, equal bool) bool {
	switch {
	case !added:
		return there
	case there:
		return !permanent || !equal
	default:
		return permanent
	}
}

func (e *expectation) address(added bool, body []byte) bool {
	if len(body) < unix.SizeofIfAddrmsg {
		return false
	}
	bits, ifindex := int(body[1]), u32(body[4:])
	var ip netip.Addr
	eachAttr(body[unix.SizeofIfAddrmsg:], func(typ uint16, data []byte) {
		if typ == unix.IFA_LOCAL || typ == unix.IFA_ADDRESS && !ip.IsValid() {
			ip = ipOf(data)
		}
	})
	if !ip.IsValid() || ip.IsLinkLocalUnicast() {
		return false
	}
	name, ours := e.index[ifindex]
	if !ours {
		return true
	}
	_, there := find(e.state.Addresses, Address{Link: name, Prefix: netip.PrefixFrom(ip, bits)})
	return there != added && !e.deaf
}

func (e *expectation) link(added bool, body []byte) bool {
	if len(body) < unix.SizeofIfInfomsg {
		return false
	}
	if body[0] == unix.AF_BRIDGE { // a port, perhaps of the pods' bridge: whether it comes makes no difference
		return !added
	}
	ifindex, flags := u32(body[4:]), u32(body[8:])
	l := Link{Down: flags&unix.IFF_UP == 0}
	eachAttr(body[unix.SizeofIfInfomsg:], func(typ uint16, data []byte) {
		switch typ {
		case unix.IFLA_IFNAME:
			l.Name = cString(data)
		case unix.IFLA_MTU:
			l.MTU = int(u32(data))
		case unix.IFLA_ADDRESS:
			l.MAC = macOf(data)
		case unix.IFLA_LINKINFO:
			l.VXLAN.Local, l.VXLAN.Underlay = e.vxlan(data)
		}
	})
	want, named := find(e.state.Links, l)
	was, ours := e.index[ifindex]
	switch {
	case !named && !ours:
		cared, ok := e.cared[ifindex]
		return ok && (!added || cared != hostLink{l.Name, l.MTU, !l.Down})
	case e.deaf:
		return false
	case !added:
		return named
	case !named: // it is about to go, or it was renamed
		_, wanted := find(e.state.Links, Link{Name: was})
		return wanted
	}
	want.VXLAN = VXLAN{Local: want.VXLAN.Local, Underlay: want.VXLAN.Underlay} // the rest can't be changed on a device
	return !ours || l != want
}

// vxlan reads what of a VXLAN device can be changed in place.
func (e *expectation) vxlan(linkinfo []byte) (local netip.Addr, underlay string) {
	eachAttr(linkinfo, func(typ uint16, data []byte) {
		if typ != unix.IFLA_INFO_DATA {
			return
		}
		eachAttr(data, func(typ uint16, data []byte) {
			switch typ {
			case nl.IFLA_VXLAN_LOCAL, nl.IFLA_VXLAN_LOCAL6:
				local = ipOf(data)
			case nl.IFLA_VXLAN_LINK:
				underlay = e.names[u32(data)]
			}
		})
	})
	return local, underlay
}

// netconf: only settings that are wished for matter, and those of all devices or of ours.
func (e *expectation) netconf(body []byte) bool {
	const attrIfindex, all = 1, -1 // NETCONFA_IFINDEX, NETCONFA_IFINDEX_ALL, uapi/linux/netconf.h
	ifindex := int32(0)
	if len(body) >= 4 {
		eachAttr(body[4:], func(typ uint16, data []byte) {
			if typ == attrIfindex {
				ifindex = int32(u32(data))
			}
		})
	}
	_, ours := e.index[uint32(ifindex)]
	return (ifindex == all || ours) && !e.deaf
}

// find looks a key up in a sorted list.
func find[T object[T]](list []T, key T) (T, bool) {
	i, ok := slices.BinarySearchFunc(list, key, T.Compare)
	if !ok {
		var none T
		return none, false
	}
	return list[i], true
}
