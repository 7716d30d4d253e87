package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
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
		counts := map[string]int{}
		var errs []error
		for what, family := range map[string]int{"neighbours": unix.AF_INET, "FDB entries": unix.AF_BRIDGE} {
			l, err := h.NeighList(dev.Attrs().Index, family)
			counts[what], errs = len(l), append(errs, err)
		}
		for what, table := range map[string]int{"routes to pods": netstate.MainTable, "routes to nodes": netstate.OwnTable} {
			l, err := h.RouteListFiltered(unix.AF_INET, &netlink.Route{Table: table, Protocol: netstate.Protocol},
				netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
			counts[what], errs = len(l), append(errs, err)
		}
		for what, got := range counts {
			if got != n {
				errs = append(errs, fmt.Errorf("%d %s of %d", got, what, n))
			}
		}
		return errors.Join(errs...)
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

// revision is etcd's: every write to it makes a new one. Reading the metrics or asking for this is no request of the
// daemon's, and is done before or after its are counted.
func (s *site) revision(ctx context.Context) (int64, error) {
	resp, err := s.cli.Get(ctx, "/bench/none")
	if err != nil {
		return 0, err
	}
	return resp.Header.Revision, nil
}

// monitorBuffer is how much may wait to be read of what the kernel notifies.
const monitorBuffer = 64 << 20

// kernelChanges counts what changes in the node's kernel until the returned function is called. A neighbour that the
// kernel has found itself (not a permanent one) does not count.
func (s *site) kernelChanges() (count func() (float64, error), err error) {
	var socket *nl.NetlinkSocket
	err = s.node.Do(func() (err error) {
		socket, err = nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR,
			unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE)
		return err
	})
	if err != nil {
		return nil, err
	}
	err = errors.Join(socket.SetReceiveBufferSize(monitorBuffer, true),
		socket.SetReceiveTimeout(&unix.Timeval{Usec: 10_000}))
	return func() (float64, error) {
		defer socket.Close()
		changes := 0.0
		for {
			messages, _, err := socket.Receive()
			if errors.Is(err, unix.EAGAIN) {
				return changes, nil
			}
			if err != nil {
				return changes, err
			}
			for _, m := range messages {
				neighbour := m.Header.Type == unix.RTM_NEWNEIGH || m.Header.Type == unix.RTM_DELNEIGH
				if !neighbour || binary.NativeEndian.Uint16(m.Data[8:])&unix.NUD_PERMANENT != 0 {
					changes++
				}
			}
		}
	}, err
}

// monitor is notified of the routes that the daemon adds for subnets of pods.
type monitor struct {
	routes chan netlink.RouteUpdate
	done   chan struct{}
}

func (s *site) monitor() (monitor, error) {
	m := monitor{make(chan netlink.RouteUpdate), make(chan struct{})}
	return m, s.node.Do(func() error {
		return netlink.RouteSubscribeWithOptions(m.routes, m.done, netlink.RouteSubscribeOptions{
			ReceiveBufferSize: monitorBuffer, ReceiveBufferForceSize: true,
		})
	})
}

func (m monitor) close() {
	close(m.done)
	go func() {
		for range m.routes { // the library may be about to send one
		}
	}()
}

// await waits for n more routes, or for the one to a subnet if that is given, and tells when the last one came.
func (m monitor) await(n int, subnet netip.Prefix) (time.Time, error) {
	timeout := time.After(patience)
	for {
		select {
		case u, ok := <-m.routes:
			now := time.Now()
			if !ok {
				return now, errors.New("the notifications of routes have ended")
			}
			if u.Type != unix.RTM_NEWROUTE || u.Table != netstate.MainTable || u.Protocol != netstate.Protocol {
				continue
			}
			if subnet.IsValid() && u.Dst.String() != subnet.String() {
				continue
			}
			if n--; n == 0 {
				return now, nil
			}
		case <-timeout:
			return time.Time{}, fmt.Errorf("%d more routes (%s) did not come in %v", n, subnet, patience)
		}
	}
}

// deleteRoute deletes the route to a subnet, as another program would.
func deleteRoute(subnet netip.Prefix) error {
	dst := &net.IPNet{IP: subnet.Addr().AsSlice(), Mask: net.CIDRMask(subnet.Bits(), subnet.Addr().BitLen())}
	return netlink.RouteDel(&netlink.Route{Dst: dst, Table: netstate.MainTable})
}
