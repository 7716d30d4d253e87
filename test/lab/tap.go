package lab

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// sighting is how one ping was seen on the sending node's underlay interface.
type sighting struct{ out, back Path }

func (s sighting) String() string {
	out, back := cmp.Or(s.out, "unseen"), cmp.Or(s.back, "unseen")
	if out == back {
		return string(out)
	}
	return string(out + ", back " + back)
}

// tap watches a node's underlay interface and keeps the frames that may be pings.
type tap struct {
	file *os.File
	done sync.WaitGroup

	mu     sync.Mutex
	frames []frame
}

type frame struct {
	data     []byte
	outgoing bool
}

// maxPing is more than any frame has with a small ping in it.
const maxPing = 256

func openTap(m Machine) (*tap, error) {
	t := &tap{}
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
		return os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrLinklayer{
			Protocol: htons(unix.ETH_P_ALL),
			Ifindex:  link.Index,
		}))
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
	buf := make([]byte, maxPing)
	for {
		var n int
		var from unix.Sockaddr
		var rerr error
		err := raw.Read(func(fd uintptr) bool {
			n, from, rerr = unix.Recvfrom(int(fd), buf, unix.MSG_TRUNC)
			return !errors.Is(rerr, unix.EAGAIN)
		})
		if err != nil || rerr != nil && !errors.Is(rerr, unix.EINTR) && !errors.Is(rerr, unix.ENETDOWN) {
			return
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && rerr == nil && n <= maxPing {
			t.mu.Lock()
			t.frames = append(t.frames, frame{slices.Clone(buf[:n]), ll.Pkttype == unix.PACKET_OUTGOING})
			t.mu.Unlock()
		}
	}
}

func (t *tap) sighting(token pingToken) (s sighting) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range t.frames {
		seen := &s.back
		if f.outgoing {
			seen = &s.out
		}
		// What any frame shows of the ping counts, whatever else is encrypted.
		if p := pathOf(f.data, token); p != "" && (p != PathEncrypted || *seen == "") {
			*seen = p
		}
	}
	return s
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

// pathOf tells by where the token of a ping stands in an Ethernet frame whether it came bare or in VXLAN. A frame of
// WireGuard that has data (message type 4 and three zeros, then 28 bytes, then at least a tag of 16 bytes; WireGuard's
// protocol document) may have it in it. "" if the frame is of something else.
func pathOf(frame []byte, token pingToken) Path {
	const ethernet, icmp, udp, vxlan, wgEmpty = 14, 8, 8, 8, 32
	ipHeaders := []int{20, 40}
	at := bytes.Index(frame, token[:])
	if at < 0 {
		for _, outer := range ipHeaders {
			data := ethernet + outer + udp
			if len(frame) > data+wgEmpty && bytes.HasPrefix(frame[data:], []byte{4, 0, 0, 0}) {
				return PathEncrypted
			}
		}
	}
	for _, inner := range ipHeaders {
		bare := ethernet + inner + icmp
		if at == bare {
			return PathDirect
		}
		for _, outer := range ipHeaders {
			if at == ethernet+outer+udp+vxlan+bare {
				return PathTunnel
			}
		}
	}
	return ""
}
