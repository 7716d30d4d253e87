package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/netstate"
)

// etcdPort is the lab's.
const etcdPort = 2379

// complete reports an error unless the node has every entry for n peers.
func (s *site) complete(n int) error {
	return s.node.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		dev, err := h.LinkByName("overlay.1")
		if err != nil {
			return err
		}
		for what, list := range map[string]func() (int, error){
			"routes to pods":  func() (int, error) { return routes(h, netstate.MainTable) },
			"routes to nodes": func() (int, error) { return routes(h, netstate.OwnTable) },
			"neighbours": func() (int, error) {
				l, err := h.NeighList(dev.Attrs().Index, unix.AF_INET)
				return len(l), err
			},
			"FDB entries": func() (int, error) {
				l, err := h.NeighList(dev.Attrs().Index, unix.AF_BRIDGE)
				return len(l), err
			},
		} {
			if got, err := list(); err != nil || got != n {
				return fmt.Errorf("%d %s of %d: %w", got, what, n, errors.Join(err))
			}
		}
		return nil
	})
}

// untilComplete waits until the node has every entry for n peers, and none of those that have left.
func (s *site) untilComplete(n int) error {
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		if err := s.complete(n); err == nil || time.Now().After(end) {
			return err
		}
	}
}

func routes(h *netlink.Handle, table int) (int, error) {
	l, err := h.RouteListFiltered(unix.AF_INET, &netlink.Route{Table: table, Protocol: netstate.Protocol}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
	return len(l), err
}

// requests counts the requests that etcd was sent so far, by its own metrics.
func (s *site) requests(ctx context.Context) (float64, error) {
	text, err := s.lab.Etcd().Get(ctx, s.lab.Etcd().LocalURL()+"/metrics")
	if err != nil {
		return 0, err
	}
	total := 0.0
	for _, m := range regexp.MustCompile(`(?m)^grpc_server_started_total\{.*\} (\S+)$`).FindAllStringSubmatch(text, -1) {
		v, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			return 0, err
		}
		total += v
	}
	return total, nil
}

// revision is etcd's: every write to it makes a new one. Reading the metrics or asking for this is no request of the daemon's, and is
// done before or after its are counted.
func (s *site) revision(ctx context.Context) (int64, error) {
	resp, err := s.cli.Get(ctx, "/bench/none")
	if err != nil {
		return 0, err
	}
	return resp.Header.Revision, nil
}

// monitor hears what changes in the node's kernel.
type monitor struct {
	file *os.File
	buf  []byte
}

const monitorBuffer = 64 << 20

func (s *site) monitor() (*monitor, error) {
	return s.monitorOf(unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE)
}

func (s *site) monitorOf(groups ...int) (*monitor, error) {
	m := &monitor{buf: make([]byte, 1<<20)}
	return m, s.node.Do(func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		m.file = os.NewFile(uintptr(fd), "rtnetlink")
		err = errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, monitorBuffer),
			unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))
		for _, g := range groups {
			err = errors.Join(err, unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g))
		}
		return err
	})
}

func (m *monitor) close() { _ = m.file.Close() }

// event is one message of the kernel, good until the next are read.
type event struct {
	typ  uint16
	body []byte
	at   time.Time
}

// next waits for messages until the deadline.
func (m *monitor) next(deadline time.Time) ([]event, error) {
	if err := m.file.SetReadDeadline(deadline); err != nil {
		return nil, err
	}
	n, err := m.file.Read(m.buf)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	var out []event
	for b := m.buf[:n]; len(b) >= unix.NLMSG_HDRLEN; {
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.NLMSG_HDRLEN || size > len(b) {
			return nil, errors.New("a netlink message is cut off")
		}
		out = append(out, event{binary.NativeEndian.Uint16(b[4:]), b[unix.NLMSG_HDRLEN:size], now})
		b = b[min((size+3)&^3, len(b)):]
	}
	return out, nil
}

// count counts the changes that were heard of. A neighbour that the kernel has found itself (not a permanent one) is none.
func (m *monitor) count() (int, error) {
	changes := 0
	for {
		es, err := m.next(time.Now().Add(10 * time.Millisecond))
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return changes, nil
		}
		if err != nil {
			return changes, err
		}
		for _, e := range es {
			neighbour := e.typ == unix.RTM_NEWNEIGH || e.typ == unix.RTM_DELNEIGH
			if neighbour && len(e.body) >= unix.SizeofNdMsg && binary.NativeEndian.Uint16(e.body[8:])&unix.NUD_PERMANENT == 0 {
				continue
			}
			changes++
		}
	}
}

// isRouteTo reports whether a message says that the daemon's route to a subnet is there.
func (e event) isRouteTo(subnet netip.Prefix) bool {
	if e.typ != unix.RTM_NEWROUTE || len(e.body) < unix.SizeofRtMsg+8 || e.body[5] != netstate.Protocol || int(e.body[1]) != subnet.Bits() {
		return false
	}
	attrs, err := nl.ParseRouteAttr(e.body[unix.SizeofRtMsg:])
	if err != nil {
		return false
	}
	for _, a := range attrs {
		if a.Attr.Type == unix.RTA_DST {
			dst, _ := netip.AddrFromSlice(a.Value)
			return dst == subnet.Addr()
		}
	}
	return false
}

// deleteRoute deletes the route to a subnet, as somebody would who knows nothing of the daemon.
func deleteRoute(subnet netip.Prefix) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	dst := &net.IPNet{IP: subnet.Addr().AsSlice(), Mask: net.CIDRMask(subnet.Bits(), subnet.Addr().BitLen())}
	return h.RouteDel(&netlink.Route{Dst: dst, Table: netstate.MainTable})
}
