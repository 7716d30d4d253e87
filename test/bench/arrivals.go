package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// arrivals notes when data of the store arrives at the node, by the kernel's time of each packet: what comes before is
// the store's time, what comes after it the daemon's.
type arrivals struct {
	fd         int
	stop, done chan struct{}

	mu  sync.Mutex
	all []arrival
}

type arrival struct {
	at    time.Time
	bytes int
}

// arrivals starts to note them.
func (s *site) arrivals() (*arrivals, error) {
	a := &arrivals{stop: make(chan struct{}), done: make(chan struct{})}
	err := s.node.Do(func() error {
		link, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		ip := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_IP))
		if a.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(ip)); err != nil {
			return fmt.Errorf("a packet socket: %w", err)
		}
		return errors.Join(
			unix.Bind(a.fd, &unix.SockaddrLinklayer{Protocol: ip, Ifindex: link.Index}),
			unix.SetsockoptInt(a.fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1),
			unix.SetsockoptInt(a.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, monitorBuffer),
			unix.SetsockoptTimeval(a.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}))
	})
	if err != nil {
		return nil, err
	}
	go a.run(s.leases.port())
	return a, nil
}

func (a *arrivals) close() {
	close(a.stop)
	<-a.done
	_ = unix.Close(a.fd)
}

func (a *arrivals) run(port uint16) {
	defer close(a.done)
	const headers = 120 // the longest of IPv4 and TCP
	packet, control := make([]byte, headers), make([]byte, 64)
	for {
		n, controls, _, from, err := unix.Recvmsg(a.fd, packet, control, 0)
		link, ok := from.(*unix.SockaddrLinklayer)
		if err == nil && ok && link.Pkttype != unix.PACKET_OUTGOING {
			a.note(port, packet[:n], control[:controls])
		}
		select {
		case <-a.stop:
			return
		default:
		}
	}
}

func (a *arrivals) note(port uint16, packet, control []byte) {
	bytes := payload(port, packet)
	messages, err := unix.ParseSocketControlMessage(control)
	if bytes <= 0 || err != nil || len(messages) == 0 || len(messages[0].Data) < 16 {
		return
	}
	stamp := messages[0].Data
	at := time.Unix(int64(binary.NativeEndian.Uint64(stamp)), int64(binary.NativeEndian.Uint64(stamp[8:])))
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = append(a.all, arrival{at, bytes})
}

// payload is how much an IPv4 packet carries of a TCP connection from a port; 0: it is none of one.
func payload(port uint16, p []byte) int {
	if len(p) < 20 || p[9] != unix.IPPROTO_TCP {
		return 0
	}
	ip := int(p[0]&15) * 4
	if len(p) < ip+20 || binary.BigEndian.Uint16(p[ip:]) != port {
		return 0
	}
	return int(binary.BigEndian.Uint16(p[2:])) - ip - int(p[ip+12]>>4)*4
}

// first is when the first data since a time came.
func (a *arrivals) first(since time.Time) (time.Time, error) {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		a.mu.Lock()
		i := slices.IndexFunc(a.all, func(x arrival) bool { return !x.at.Before(since) })
		if i >= 0 {
			defer a.mu.Unlock()
			return a.all[i].at, nil
		}
		a.mu.Unlock()
	}
	return time.Time{}, errors.New("no data of the store has arrived")
}

// most is when all data had come but the last few bytes, and how much came.
func (a *arrivals) most(last int) (at time.Time, bytes int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, x := range a.all {
		bytes += x.bytes
	}
	left := bytes
	for _, x := range a.all {
		if left -= x.bytes; left <= last {
			return x.at, bytes
		}
	}
	return at, bytes
}
