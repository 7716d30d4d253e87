package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// sighting is how one ping was seen on the sending node's underlay interface.
type sighting struct{ out, back Path }

func (s sighting) String() string {
	out, back := orUnseen(s.out), orUnseen(s.back)
	if out == back {
		return out
	}
	return out + ", back " + back
}

func orUnseen(p Path) string {
	if p == "" {
		return "unseen"
	}
	return string(p)
}

// tap watches a node's underlay interface and notes the path of every ping that passes.
type tap struct {
	file *os.File
	done sync.WaitGroup

	mu   sync.Mutex
	seen map[pingToken]sighting
}

func openTap(m Machine) (*tap, error) {
	t := &tap{seen: map[pingToken]sighting{}}
	err := m.Do(func() error {
		link, err := net.InterfaceByName(underlayLink)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		t.file = os.NewFile(uintptr(fd), "tap")
		return os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: link.Index}))
	})
	if err != nil {
		t.close()
		return nil, fmt.Errorf("watch %s of %s: %w", underlayLink, m.Name, err)
	}
	t.done.Go(t.watch)
	return t, nil
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

func (t *tap) close() {
	if t.file != nil {
		t.file.Close()
	}
	t.done.Wait()
}

func (t *tap) watch() {
	raw, err := t.file.SyscallConn()
	if err != nil {
		return
	}
	buf := make([]byte, 1<<16)
	for {
		var n int
		var from unix.Sockaddr
		var rerr error
		err := raw.Read(func(fd uintptr) bool {
			n, from, rerr = unix.Recvfrom(int(fd), buf, 0)
			return !errors.Is(rerr, unix.EAGAIN)
		})
		if err != nil || rerr != nil && !errors.Is(rerr, unix.EINTR) && !errors.Is(rerr, unix.ENETDOWN) {
			return
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && rerr == nil {
			t.note(buf[:n], ll.Pkttype == unix.PACKET_OUTGOING)
		}
	}
}

func (t *tap) note(frame []byte, outgoing bool) {
	path, token, ok := classify(frame)
	if !ok {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.seen[token]
	if outgoing {
		s.out = path
	} else {
		s.back = path
	}
	t.seen[token] = s
}

func (t *tap) sighting(token pingToken) sighting {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.seen[token]
}

// wait gives the sighting of a ping that was answered; the tap's goroutine may still be a little behind.
func (t *tap) wait(ctx context.Context, token pingToken) sighting {
	ctx, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
	defer cancel()
	_ = poll(ctx, 2*time.Millisecond, func() error {
		if s := t.sighting(token); s.out == "" || s.back == "" {
			return errors.New("not seen yet")
		}
		return nil
	})
	return t.sighting(token)
}

const (
	ethHeader   = 14
	icmpHeader  = 8
	udpHeader   = 8
	vxlanHeader = 8
)

// classify finds the token of an echo request or reply in an Ethernet frame, and tells whether it came bare or in VXLAN.
func classify(frame []byte) (Path, pingToken, bool) {
	proto, payload := network4or6(frame)
	switch {
	case proto == unix.IPPROTO_ICMP || proto == unix.IPPROTO_ICMPV6:
		token, ok := echoToken(payload)
		return PathDirect, token, ok
	case proto == unix.IPPROTO_UDP && len(payload) > udpHeader+vxlanHeader && binary.BigEndian.Uint16(payload[2:]) == vxlanPort:
		_, inner := network4or6(payload[udpHeader+vxlanHeader:])
		token, ok := echoToken(inner)
		return PathTunnel, token, ok
	}
	return "", pingToken{}, false
}

// network4or6 gives the transport protocol of an Ethernet frame and what follows the IP header.
func network4or6(frame []byte) (proto byte, payload []byte) {
	if len(frame) < ethHeader+20 {
		return 0, nil
	}
	packet := frame[ethHeader:]
	switch binary.BigEndian.Uint16(frame[12:]) {
	case unix.ETH_P_IP:
		if n := int(packet[0]&0xf) * 4; len(packet) >= n {
			return packet[9], packet[n:]
		}
	case unix.ETH_P_IPV6:
		if len(packet) >= 40 {
			return packet[6], packet[40:]
		}
	}
	return 0, nil
}

func echoToken(message []byte) (pingToken, bool) {
	if len(message) < icmpHeader+len(pingToken{}) {
		return pingToken{}, false
	}
	switch message[0] {
	case 0, 8, 128, 129: // echo reply and request, of either family
		return pingToken(message[icmpHeader:][:len(pingToken{})]), true
	}
	return pingToken{}, false
}
