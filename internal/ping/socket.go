// Package ping sends ICMP echo requests of both families and takes the replies to them: one at a time, many targets
// over one socket, or one target in a stream.
package ping

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// PMTU says what the kernel does with packets that are larger than the path takes: IP_PMTUDISC_* of uapi/linux/in.h,
// and the same numbers for IPv6.
type PMTU int

const (
	// Fragment lets packets be cut up.
	Fragment PMTU = unix.IP_PMTUDISC_WANT
	// DontFragment refuses to send packets that are larger than the path MTU that the kernel knows of.
	DontFragment PMTU = unix.IP_PMTUDISC_DO
	// Probe sends all that the device takes, whatever the kernel knows of the path, and lets nothing be cut up.
	Probe PMTU = unix.IP_PMTUDISC_PROBE
)

// family is what the two differ in.
type family struct {
	addr.Family
	domain, proto, level, mtuDiscover, recvErr int
	header                                     int // of IP, in bytes (RFC 791, RFC 8200)
	request                                    icmp.Type
	reply                                      uint32
}

func familyOf(f addr.Family) family {
	if f == addr.IPv6 {
		return family{
			f, unix.AF_INET6, unix.IPPROTO_ICMPV6, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_RECVERR,
			40, ipv6.ICMPTypeEchoRequest, uint32(ipv6.ICMPTypeEchoReply),
		}
	}
	return family{
		f, unix.AF_INET, unix.IPPROTO_ICMP, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_RECVERR,
		20, ipv4.ICMPTypeEcho, uint32(ipv4.ICMPTypeEchoReply),
	}
}

const (
	icmpHeader    = 8 // and that of UDP, in bytes (RFC 792, RFC 768)
	largestPacket = 65535
)

// Socket sends echo requests of one family with one identifier, and receives the replies to them and nothing else.
type Socket struct {
	family family
	fd     int
	udp    int // see Knock; -1: not yet made
	id     uint16
	answer [256]byte // what is behind the headers does not matter
	oob    [128]byte
}

// Reply is an answer to one packet.
type Reply struct {
	From netip.Addr
	Seq  uint16
	At   time.Time // when the kernel got it
}

// Open makes a socket in the network namespace of the calling thread, which takes CAP_NET_RAW. Several sockets are told
// apart by their identifiers.
func Open(f addr.Family, id uint16, pmtu PMTU) (*Socket, error) {
	s := &Socket{family: familyOf(f), fd: -1, udp: -1, id: id}
	var err error
	if s.fd, err = s.open(unix.SOCK_RAW, s.family.proto, pmtu); err == nil {
		err = s.filter()
	}
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("ping socket (%s): %w", f, err)
	}
	// Room for as many packets of the largest kind as go out together, and for their answers, which may not be read for
	// seconds. It takes CAP_NET_ADMIN.
	const room = 4 << 20
	_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, room)
	_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, room)
	return s, nil
}

// open makes a descriptor.
func (s *Socket) open(kind, proto int, pmtu PMTU) (int, error) {
	fd, err := unix.Socket(s.family.domain, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	err = cmp.Or(
		unix.SetsockoptInt(fd, s.family.level, s.family.mtuDiscover, int(pmtu)),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS_NEW, 1),
	)
	if err != nil {
		_ = unix.Close(fd)
		return -1, os.NewSyscallError("setsockopt", err)
	}
	return fd, nil
}

// refusals has ICMP errors about the packets that a socket sent reported at it.
func (s *Socket) refusals(fd int) error {
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, s.family.level, s.family.recvErr, 1))
}

// Close releases the socket.
func (s *Socket) Close() {
	for _, fd := range []int{s.fd, s.udp} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// filter lets the answers to this socket's packets in. A raw socket gets all of the protocol's packets otherwise, from
// the IP header on with IPv4 and from behind it with IPv6.
func (s *Socket) filter() error {
	start := bpf.Instruction(bpf.LoadMemShift{Off: 0})
	if s.family.Family == addr.IPv6 {
		start = bpf.LoadConstant{Dst: bpf.RegX, Val: 0}
	}
	raw, err := bpf.Assemble([]bpf.Instruction{
		start,
		bpf.LoadIndirect{Off: 0, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: s.family.reply, SkipTrue: 3},
		bpf.LoadIndirect{Off: 4, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(s.id), SkipTrue: 1},
		bpf.RetConstant{Val: largestPacket},
		bpf.RetConstant{Val: 0},
	})
	if err != nil {
		return err
	}
	code := make([]unix.SockFilter, 0, len(raw))
	for _, i := range raw {
		code = append(code, unix.SockFilter{Code: i.Op, Jt: i.Jt, Jf: i.Jf, K: i.K})
	}
	return os.NewSyscallError("setsockopt", unix.SetsockoptSockFprog(s.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}))
}

// Connect binds the socket to one address: Receive fails with what ICMP errors say about packets to it. It returns the
// source address that the kernel chose.
func (s *Socket) Connect(to netip.Addr) (netip.Addr, error) {
	err := cmp.Or(s.refusals(s.fd), os.NewSyscallError("connect", unix.Connect(s.fd, sockaddr(to, 0))))
	if err != nil {
		return netip.Addr{}, err
	}
	local, err := unix.Getsockname(s.fd)
	return addressOf(local), os.NewSyscallError("getsockname", err)
}

// Send sends an echo request of size bytes, its IP header among them, with some data at its start and zeros behind it.
// An error is why the kernel refused: a packet larger than the device's MTU, no route.
func (s *Socket) Send(to netip.Addr, seq uint16, size int, data []byte) error {
	echo := icmp.Message{Type: s.family.request, Body: &icmp.Echo{ID: int(s.id), Seq: int(seq), Data: data}}
	// Zeros behind it change no checksum; with IPv6 that is the kernel's work (RFC 3542 section 3.1).
	msg, err := echo.Marshal(nil)
	if err != nil {
		return err
	}
	n := min(max(size-s.family.header, len(msg)), largestPacket-s.family.header)
	packet := make([]byte, n)
	copy(packet, msg)
	return unix.Sendto(s.fd, packet, 0, sockaddr(to, 0))
}

func sockaddr(to netip.Addr, port int) unix.Sockaddr {
	if to.Is4() {
		return &unix.SockaddrInet4{Addr: to.As4(), Port: port}
	}
	return &unix.SockaddrInet6{Addr: to.As16(), Port: port}
}

// Wait waits until something has come, but no longer than d.
func (s *Socket) Wait(d time.Duration) {
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}, int(max(d, 0)/time.Millisecond)+1)
}

// Receive hands over what has come; it does not wait.
func (s *Socket) Receive(take func(Reply)) error {
	if err := s.refused(take); err != nil {
		return err
	}
	return s.each(s.fd, unix.MSG_TRUNC, func(b, oob []byte, from unix.Sockaddr) {
		if s.family.Family == addr.IPv4 && len(b) > 0 {
			b = b[min(len(b), int(b[0]&0xf)*4):]
		}
		// What came in before the filter was there may be an answer to another socket.
		if len(b) >= icmpHeader && binary.BigEndian.Uint16(b[4:]) == s.id {
			take(Reply{From: addressOf(from), Seq: binary.BigEndian.Uint16(b[6:]), At: received(oob)})
		}
	})
}

// each calls do with each message that waits at a socket.
func (s *Socket) each(fd, flags int, do func(b, oob []byte, from unix.Sockaddr)) error {
	for {
		n, oobn, _, from, err := unix.Recvmsg(fd, s.answer[:], s.oob[:], flags)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return os.NewSyscallError("recvmsg", err)
		}
		do(s.answer[:min(n, len(s.answer))], s.oob[:oobn], from)
	}
}

func addressOf(from unix.Sockaddr) netip.Addr {
	switch f := from.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrFrom4(f.Addr)
	case *unix.SockaddrInet6:
		return netip.AddrFrom16(f.Addr)
	}
	return netip.Addr{}
}

// received is when the kernel got a packet; now, where it doesn't say.
func received(oob []byte) time.Time {
	messages, _ := unix.ParseSocketControlMessage(oob)
	for _, m := range messages {
		// struct __kernel_timespec: two 64-bit numbers, in the machine's order.
		if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SO_TIMESTAMPNS_NEW && len(m.Data) >= 16 {
			return time.Unix(int64(binary.NativeEndian.Uint64(m.Data)), int64(binary.NativeEndian.Uint64(m.Data[8:])))
		}
	}
	return time.Now()
}
