package netstate

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/internal/sorted"
)

// monitor is notified of changes in the kernel and says that it is time to observe. An event is never acted on: one
// that was missed, doubled or late does no harm. Events that only confirm what is desired are dropped; those follow
// from our own requests.
type monitor struct {
	file    *os.File
	fd      int           // of the file
	changed chan struct{} // holds at most one wake

	mu     sync.Mutex
	buf    []byte
	expect expectation
}

// expectation is what events are compared with.
type expectation struct {
	desired  *State       // nil: nothing was desired yet
	observed *observation // the last one; nil: none yet
}

// newMonitor opens the monitor. It is not notified of what is requested by the socket own.
func newMonitor(own int) (*monitor, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	m := &monitor{
		file: os.NewFile(uintptr(fd), "rtnetlink"), fd: fd, changed: make(chan struct{}, 1), buf: make([]byte, 64<<10),
	}
	setBuffer(fd)
	err = ignoreRequests(fd, own)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	for _, group := range []int{
		unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE,
		unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE, unix.RTNLGRP_IPV4_NETCONF,
		unix.RTNLGRP_IPV6_NETCONF, unix.RTNLGRP_NEXTHOP,
	} {
		if err == nil {
			err = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group)
		}
	}
	if err != nil {
		_ = m.file.Close()
		return nil, fmt.Errorf("netlink socket for events: %w", err)
	}
	return m, nil
}

// ignoreRequests makes the kernel not notify a socket of what is requested by another. It says with most changes which
// socket requested them (nlmsg_pid); with those of FDB entries it does not. At the start, that saves three messages of
// four.
func ignoreRequests(fd, own int) error {
	addr, err := unix.Getsockname(own)
	if err != nil {
		return err
	}
	sa, ok := addr.(*unix.SockaddrNetlink)
	if !ok {
		return unix.EAFNOSUPPORT
	}
	const offset, all = 12, 1<<32 - 1 // of nlmsg_pid in struct nlmsghdr; of a message
	// As the filter's load has it.
	port := binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, sa.Pid))
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: port},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
		{Code: unix.BPF_RET | unix.BPF_K, K: all},
	}
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
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
		m.change(func(*expectation) {})
		return false // wait for more
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("netlink events: %w", err)
}

// change changes what is expected. What came before is compared with what was expected before: the kernel notifies of
// what we do before it answers us, so that nothing of our own doing is ever compared with a newer state.
func (m *monitor) change(f func(e *expectation)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.drain(m.expect.contradicted)
	f(&m.expect)
}

// drain reads all that has come. The lock is held.
func (m *monitor) drain(contradicted func(b []byte) bool) {
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
		case contradicted(m.buf[:n]):
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
		h, body, rest, err := cutMessage(b)
		if err != nil || e.desired == nil || e.observed == nil || e.unexpected(h.Type, body) {
			return true
		}
		b = rest
	}
	return false
}

// unexpected judges one message.
func (e *expectation) unexpected(typ uint16, body []byte) bool {
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
		_, _, ok := parseRule(body)
		return ok
	case unix.RTM_NEWNEXTHOP, unix.RTM_DELNEXTHOP: // the kernel does not notify of the routes that follow from them
		return len(e.observed.bare) > 0
	case unix.RTM_NEWNETCONF: // a setting such as forwarding, or a device that came
		return e.netconf(body)
	}
	return false
}

// ours is the name of a device of ours.
func (e *expectation) ours(ifindex uint32) (string, bool) {
	name := e.observed.devices[ifindex].name
	return name, e.observed.isOurs(name)
}

func (e *expectation) route(body []byte) bool {
	r, ok := parseRoute(body)
	if !ok || r.ours() {
		return ok
	}
	if _, ours := e.ours(r.oif); ours && r.protocol == unix.RTPROT_KERNEL {
		return false // that of an address of ours
	}
	return r.Table == MainTable && !r.Dst.Addr().IsLinkLocalUnicast() && !r.Dst.Addr().IsMulticast()
}

func (e *expectation) neighbour(added bool, body []byte) bool {
	if len(body) > 0 && body[0] == unix.AF_BRIDGE {
		f, ifindex, permanent := parseFDB(body)
		name, ours := e.ours(ifindex)
		f.Link = name
		return ours && unexpected(e.desired.FDB, f, added, permanent)
	}
	n, ifindex, permanent := parseNeighbour(body)
	name, ours := e.ours(ifindex)
	n.Link = name
	return ours && unexpected(e.desired.Neighbours, n, added, permanent)
}

// unexpected judges an entry that may be learned (not permanent): those come and go, unless they stand where one of
// ours should.
func unexpected[T object[T]](desired []T, entry T, added, permanent bool) bool {
	d, there := sorted.Find(desired, entry)
	switch {
	case !added:
		return there
	case there:
		return !permanent || d != entry
	default:
		return permanent
	}
}

func (e *expectation) address(added bool, body []byte) bool {
	p, ifindex, _, ok := parseAddress(body)
	if !ok || p.Addr().IsLinkLocalUnicast() {
		return false
	}
	name, ours := e.ours(ifindex)
	_, there := sorted.Find(e.desired.Addresses, Address{Link: name, Prefix: p})
	return !ours || there != added
}

// link: of a device of ours, all that is desired of it matters; of another one, if it carries an address or a route,
// or is a VXLAN device, since such a one may have the VNI that one of ours is to have.
func (e *expectation) link(added bool, body []byte) bool {
	if len(body) > 0 && body[0] == unix.AF_BRIDGE { // a port, perhaps of the pods' bridge: only its loss matters
		return !added
	}
	ifindex, now, ok := parseDevice(body)
	was, known := e.observed.devices[ifindex]
	if !ok || added && known && was == now {
		return false
	}
	for _, name := range []string{was.name, now.name} {
		if _, desired := sorted.Find(e.desired.Links, Link{Name: name}); desired {
			return true
		}
	}
	l, _ := e.observed.host.Link(was.name)
	return known && !l.Tunnel && (l.VXLAN != VXLAN{} || e.observed.host.carries(was.name))
}

// netconf: only settings that are desired matter, and those of all devices or of ours.
func (e *expectation) netconf(body []byte) bool {
	const attrIfindex, all = 1, -1 // NETCONFA_IFINDEX, NETCONFA_IFINDEX_ALL, uapi/linux/netconf.h
	ifindex := int32(0)
	eachAttr(body[min(4, len(body)):], func(typ uint16, data []byte) {
		if typ == attrIfindex {
			ifindex = int32(u32(data))
		}
	})
	_, ours := e.ours(uint32(ifindex))
	return ifindex == all || ours
}
