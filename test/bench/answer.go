package bench

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// answerer stands for the nodes that don't exist: what the one real node sends them through the tunnel leaves it by a
// tap device, as it would by a network card, and pings are answered. All of that is this process's work, and none of
// the daemon's.
type answerer struct {
	tap        int
	stop, done chan struct{}
}

// pollEvery is how often the device is polled. A process that waited for packets would be woken up for each of them,
// and that is the sender's work; a network card is not woken up.
const pollEvery = 10 * time.Millisecond

// Offsets in a packet of the tunnel (RFC 7348 section 5): the outer Ethernet, IPv4, UDP and VXLAN headers, and then the
// same of the inner one up to ICMP (RFC 792).
const (
	outerIP   = 14
	outerUDP  = outerIP + 20
	innerEth  = outerUDP + 8 + 8
	innerIP   = innerEth + 14
	innerICMP = innerIP + 20
	tapName   = "tap0"
)

// newAnswerer makes the device in the node's namespace, and hands what the node sends to UDP port 8472 over to it.
func newAnswerer(ctx context.Context, s *site) (*answerer, error) {
	a := &answerer{stop: make(chan struct{}), done: make(chan struct{})}
	var mac net.HardwareAddr
	err := s.node.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("/dev/net/tun: %w", err)
		}
		req, err := unix.NewIfreq(tapName)
		if err == nil {
			req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
		}
		if err != nil {
			_ = unix.Close(fd)
			return fmt.Errorf("a tap device: %w", err)
		}
		a.tap = fd
		link, err := net.InterfaceByName(tapName)
		if err == nil {
			mac = link.HardwareAddr
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	// The answers come from where the node has no route to by this device.
	_, err = s.node.Run(ctx, "sh", "-c", `sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.tap0.rp_filter=0 &&
		ip link set dev tap0 mtu 1600 up &&
		nft 'add table netdev bench;
			add chain netdev bench out { type filter hook egress device "eth0" priority 0; };
			add rule netdev bench out udp dport 8472 fwd to "tap0"'`)
	if err != nil {
		_ = unix.Close(a.tap)
		return nil, err
	}
	go a.run(mac)
	return a, nil
}

func (a *answerer) close() {
	close(a.stop)
	<-a.done
	_ = unix.Close(a.tap)
}

func (a *answerer) run(mac net.HardwareAddr) {
	defer close(a.done)
	buf := make([]byte, 2048)
	for {
		n, err := unix.Read(a.tap, buf)
		if err == nil {
			if p := buf[:n]; answer(p, mac) {
				_, _ = unix.Write(a.tap, p)
			}
			continue
		}
		select {
		case <-a.stop:
			return
		case <-time.After(pollEvery):
		}
	}
}

// answer turns an echo request inside the tunnel into its reply; false: it is none.
func answer(p []byte, mac net.HardwareAddr) bool {
	const icmp, udp, request, reply = 1, 17, 8, 0
	if len(p) < innerICMP+8 || p[outerIP] != 0x45 || p[outerIP+9] != udp || p[innerIP] != 0x45 || p[innerIP+9] != icmp ||
		p[innerICMP] != request {
		return false
	}
	copy(p, mac)
	swap(p[outerIP+12:], p[outerIP+16:], 4)
	binary.BigEndian.PutUint16(p[outerUDP+6:], 0) // no checksum (RFC 7348 section 5)
	swap(p[innerEth:], p[innerEth+6:], 6)
	swap(p[innerIP+12:], p[innerIP+16:], 4)
	// Swapped addresses leave the checksum of a header as it is. The type goes from 8 to 0 in its upper byte (RFC 1624).
	p[innerICMP] = reply
	sum := uint32(binary.BigEndian.Uint16(p[innerICMP+2:])) + request<<8
	binary.BigEndian.PutUint16(p[innerICMP+2:], uint16(sum+sum>>16))
	return true
}

func swap(a, b []byte, n int) {
	for i := range n {
		a[i], b[i] = b[i], a[i]
	}
}
