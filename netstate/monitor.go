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

	"golang.org/x/sys/unix"
)

// monitor is notified of changes in the kernel and says that it is time to observe. An event is never acted on: one that was missed,
// doubled or late does no harm. Events that only confirm what is desired are passed over; those are our own doing.
type monitor struct {
	file    *os.File
	fd      int           // of the file
	changed chan struct{} // holds at most one wake

	mu     sync.Mutex
	buf    []byte
	expect expectation
}

// expectation is what is desired, and what the devices were when they were last observed.
type expectation struct {
	state *State // nil: nothing was desired yet
	devices
}

// cause is why an event asks to observe.
type cause uint8

const (
	none   cause = iota // it confirms what is desired, or makes no difference
	ofHost              // the rest of the host changed
	ofOurs              // something of ours is not as desired
)

// when is the cause that a condition makes.
func (c cause) when(condition bool) cause {
	if condition {
		return c
	}
	return none
}

// devices are known by their numbers. The maps are not changed once they are handed over.
type devices struct {
	index map[uint32]string   // of ours alone
	cared map[uint32]hostLink // others that carry an address or a route, or are VXLAN devices: what they are may matter
	// nexthops says that nexthop objects matter: routes of the host follow from them, of which the kernel sends no notification then.
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
		m.drain(false)
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
	m.drain(false)
	f(&m.expect)
}

// drain reads all that has come. The lock is held.
func (m *monitor) drain(ignoreOwn bool) {
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
		case m.expect.contradicted(m.buf[:n], ignoreOwn):
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
func (e *expectation) contradicted(b []byte, ignoreOwn bool) bool {
	for len(b) >= unix.NLMSG_HDRLEN {
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.NLMSG_HDRLEN || size > len(b) {
			return true
		}
		if e.state == nil {
			return true
		}
		if c := e.judge(binary.NativeEndian.Uint16(b[4:]), b[unix.NLMSG_HDRLEN:size]); c == ofHost || c == ofOurs && !ignoreOwn {
			return true
		}
		b = b[min((size+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1), len(b)):]
	}
	return false
}

// judge judges one message.
func (e *expectation) judge(typ uint16, body []byte) cause {
	switch typ {
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return e.route(body)
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		return e.neighbour(typ == unix.RTM_NEWNEIGH, body)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return e.address(typ == unix.RTM_NEWADDR, body)
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		return e.link(typ == unix.RTM_NEWLINK, body)
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		_, ours, ok := parseRule(body)
		return max(ofOurs.when(ok && ours), ofHost.when(ok && !ours))
	case unix.RTM_NEWNEXTHOP, unix.RTM_DELNEXTHOP:
		return ofHost.when(e.nexthops)
	case unix.RTM_NEWNETCONF: // a setting such as forwarding, or a device that came
		return e.netconf(body)
	}
	return none
}

func (e *expectation) route(body []byte) cause {
	r, ok := parseRoute(body)
	if !ok || r.kind != unix.RTN_UNICAST && !r.drops() {
		return none
	}
	if _, ours := e.index[r.oif]; ours && r.protocol == unix.RTPROT_KERNEL {
		return none // that of an address of ours
	}
	if r.protocol != Protocol || r.drops() { // one of the host's, from which decisions follow
		return ofHost.when(r.Table == MainTable && !r.Dst.Addr().IsLinkLocalUnicast() && !r.Dst.Addr().IsMulticast())
	}
	return ofOurs
}

func (e *expectation) neighbour(added bool, body []byte) cause {
	if len(body) == 0 {
		return none
	}
	if body[0] == unix.AF_BRIDGE {
		f, ifindex, permanent := parseFDB(body)
		name, ours := e.index[ifindex]
		f.Link = name
		want, there := find(e.state.FDB, f)
		return ofOurs.when(ours && unexpected(added, permanent, there, want == f))
	}
	n, ifindex, permanent := parseNeighbour(body)
	name, ours := e.index[ifindex]
	n.Link = name
	want, there := find(e.state.Neighbours, n)
	return ofOurs.when(ours && unexpected(added, permanent, there, want == n))
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

func (e *expectation) address(added bool, body []byte) cause {
	if len(body) < unix.SizeofIfAddrmsg {
		return none
	}
	bits, ifindex := int(body[1]), u32(body[4:])
	var ip netip.Addr
	eachAttr(body[unix.SizeofIfAddrmsg:], func(typ uint16, data []byte) {
		if typ == unix.IFA_LOCAL || typ == unix.IFA_ADDRESS && !ip.IsValid() {
			ip = ipOf(data)
		}
	})
	if !ip.IsValid() || ip.IsLinkLocalUnicast() {
		return none
	}
	name, ours := e.index[ifindex]
	if !ours {
		return ofHost
	}
	_, there := find(e.state.Addresses, Address{Link: name, Prefix: netip.PrefixFrom(ip, bits)})
	return ofOurs.when(there != added)
}

func (e *expectation) link(added bool, body []byte) cause {
	if len(body) < unix.SizeofIfInfomsg {
		return none
	}
	if body[0] == unix.AF_BRIDGE { // a port, perhaps of the pods' bridge: whether it comes makes no difference
		return ofHost.when(!added)
	}
	ifindex, l := u32(body[4:]), hostLink{up: u32(body[8:])&unix.IFF_UP != 0}
	eachAttr(body[unix.SizeofIfInfomsg:], func(typ uint16, data []byte) {
		switch typ {
		case unix.IFLA_IFNAME:
			l.name = cString(data)
		case unix.IFLA_MTU:
			l.mtu = int(u32(data))
		}
	})
	was, ours := e.index[ifindex]
	_, desired := find(e.state.Links, Link{Name: l.name})
	_, renamed := find(e.state.Links, Link{Name: was})
	if ours || desired {
		return ofOurs.when(desired || renamed) // or it is about to go
	}
	cared, ok := e.cared[ifindex]
	return ofHost.when(ok && (!added || cared != l))
}

// netconf: only settings that are desired matter, and those of all devices or of ours.
func (e *expectation) netconf(body []byte) cause {
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
	return ofOurs.when(ifindex == all || ours)
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
