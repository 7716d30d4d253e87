// Package probe pings other nodes the way that pods' packets go, in small packets and in as large ones as pods may send, which are
// not to be cut up on the way. It knows addresses, and nothing of leases.
package probe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// ICMP and ICMPv6 (RFC 792, RFC 4443 section 4): type, code, checksum, identifier, sequence number.
const (
	icmpHeader    = 8
	echoRequest4  = 8
	echoReply4    = 0
	echoRequest6  = 128
	echoReply6    = 129
	ipv4Header    = 20
	ipv6Header    = 40
	largestPacket = 65535
)

// SmallSize is the size of a small ping in bytes, with the IP header of either family.
const SmallSize = 64

// discard is the UDP port at which nothing listens, or what throws all away (RFC 863).
const discard = 9

// socket sends echo requests of one family, and receives the answers to them and nothing else. A node may ignore those:
// so it can knock, too, that is send a datagram to a closed port, which the other node's kernel refuses.
type socket struct {
	family addr.Family
	fd     int
	udp    int // a second socket
	id     uint16
	packet []byte
	answer [256]byte // what is behind the headers does not matter
	oob    [128]byte
}

// pong is an answer.
type pong struct {
	from netip.Addr
	seq  uint16
	at   time.Time // when the kernel got it
}

// open makes a socket, which takes CAP_NET_RAW and CAP_NET_ADMIN.
func open(f addr.Family, id uint16) (*socket, error) {
	s := &socket{family: f, udp: -1, id: id}
	domain, proto := unix.AF_INET, unix.IPPROTO_ICMP
	if f == addr.IPv6 {
		domain, proto = unix.AF_INET6, unix.IPPROTO_ICMPV6
	}
	var err error
	if s.fd, err = unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto); err != nil {
		return nil, fmt.Errorf("ping socket (%s): %w", f, err)
	}
	if s.udp, err = unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK,
		unix.IPPROTO_UDP); err == nil {
		err = s.prepare()
	}
	if err != nil {
		s.close()
		return nil, fmt.Errorf("ping socket (%s): %w", f, err)
	}
	return s, nil
}

func (s *socket) close() {
	_ = unix.Close(s.fd)
	if s.udp >= 0 {
		_ = unix.Close(s.udp)
	}
}

func (s *socket) prepare() error {
	filter, err := s.filter()
	if err != nil {
		return err
	}
	// Packets that are larger than what the path takes are lost instead of cut up, also where the kernel knows of it beforehand.
	level, option, mode, refusals := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE, unix.IP_RECVERR
	if s.family == addr.IPv6 {
		level, option, mode, refusals = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE, unix.IPV6_RECVERR
	}
	// Room for as many packets of the largest kind as go out together, and for their answers, which nobody reads for seconds.
	const room = 4 << 20
	return errors.Join(
		unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, room),
		unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, room),
		unix.SetsockoptSockFprog(s.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, filter),
		unix.SetsockoptInt(s.fd, level, option, mode),
		unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS_NEW, 1),
		unix.SetsockoptInt(s.udp, level, option, mode),
		unix.SetsockoptInt(s.udp, level, refusals, 1),
		unix.SetsockoptInt(s.udp, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS_NEW, 1),
	)
}

// filter lets the answers to this socket's packets in. A raw socket gets all of the protocol's packets otherwise, from the IP header on
// with IPv4 and from behind it with IPv6.
func (s *socket) filter() (*unix.SockFprog, error) {
	reply, start := uint32(echoReply4), bpf.Instruction(bpf.LoadMemShift{Off: 0})
	if s.family == addr.IPv6 {
		reply, start = echoReply6, bpf.LoadConstant{Dst: bpf.RegX, Val: 0}
	}
	raw, err := bpf.Assemble([]bpf.Instruction{
		start,
		bpf.LoadIndirect{Off: 0, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: reply, SkipTrue: 3},
		bpf.LoadIndirect{Off: 4, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(s.id), SkipTrue: 1},
		bpf.RetConstant{Val: largestPacket},
		bpf.RetConstant{Val: 0},
	})
	if err != nil {
		return nil, err
	}
	code := make([]unix.SockFilter, 0, len(raw))
	for _, i := range raw {
		code = append(code, unix.SockFilter{Code: i.Op, Jt: i.Jt, Jf: i.Jf, K: i.K})
	}
	return &unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}, nil
}

// send sends one packet of this many bytes, its IP header among them: an echo request, or a knock, whose header is as
// long.
func (s *socket) send(to netip.Addr, seq uint16, size int, knock bool) error {
	header, kind := ipv4Header, byte(echoRequest4)
	if s.family == addr.IPv6 {
		header, kind = ipv6Header, echoRequest6
	}
	if knock {
		return s.knock(to, seq, size-header-icmpHeader)
	}
	n := min(max(size-header, icmpHeader), largestPacket-header)
	if cap(s.packet) < n {
		s.packet = make([]byte, n)
	}
	p := s.packet[:n]
	p[0], p[1], p[2], p[3] = kind, 0, 0, 0
	binary.BigEndian.PutUint16(p[4:], s.id)
	binary.BigEndian.PutUint16(p[6:], seq)
	var dst unix.Sockaddr
	if s.family == addr.IPv6 { // the kernel does the checksum (RFC 3542 section 3.1)
		dst = &unix.SockaddrInet6{Addr: to.As16()}
	} else {
		binary.BigEndian.PutUint16(p[2:], checksum(p[:icmpHeader])) // what is behind it is zero
		dst = &unix.SockaddrInet4{Addr: to.As4()}
	}
	return unix.Sendto(s.fd, p, 0, dst)
}

// knock sends a datagram with that many bytes in it.
func (s *socket) knock(to netip.Addr, seq uint16, size int) error {
	p := make([]byte, min(max(size, 4), largestPacket-ipv6Header-icmpHeader))
	binary.BigEndian.PutUint16(p, s.id)
	binary.BigEndian.PutUint16(p[2:], seq)
	var dst unix.Sockaddr = &unix.SockaddrInet6{Addr: to.As16(), Port: discard}
	if s.family == addr.IPv4 {
		dst = &unix.SockaddrInet4{Addr: to.As4(), Port: discard}
	}
	for {
		// An earlier knock that was refused is told first.
		if err := unix.Sendto(s.udp, p, 0, dst); !errors.Is(err, unix.ECONNREFUSED) {
			return err
		}
	}
}

// checksum is that of RFC 1071, over an even number of bytes.
func checksum(p []byte) uint16 {
	var sum uint32
	for i := 0; i < len(p); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	sum = sum&0xffff + sum>>16
	return ^uint16(sum + sum>>16)
}

// receive adds what has come to a list; it does not wait.
func (s *socket) receive(pongs []pong) ([]pong, error) {
	// What the targets themselves have refused: their kernels are there, and the path is open in both directions.
	err := s.each(s.udp, unix.MSG_ERRQUEUE, func(b, oob []byte, from unix.Sockaddr) {
		to, by := addressOf(from), refusedBy(oob)
		if len(b) >= 4 && to == by && binary.BigEndian.Uint16(b) == s.id {
			pongs = append(pongs, pong{from: by, seq: binary.BigEndian.Uint16(b[2:]), at: received(oob)})
		}
	})
	if err != nil {
		return pongs, err
	}
	err = s.each(s.fd, unix.MSG_TRUNC, func(b, oob []byte, from unix.Sockaddr) {
		if p, ok := s.parse(b, oob, from); ok {
			pongs = append(pongs, p)
		}
	})
	return pongs, err
}

// each calls do with each message that waits at a socket.
func (s *socket) each(fd, flags int, do func(b, oob []byte, from unix.Sockaddr)) error {
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

// refusedBy is which node says that the port is closed: struct sock_extended_err (uapi/linux/errqueue.h), then that
// node's address.
func refusedBy(oob []byte) netip.Addr {
	const size = 16
	for len(oob) >= unix.SizeofCmsghdr {
		h, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			break
		}
		v4 := h.Level == unix.IPPROTO_IP && h.Type == unix.IP_RECVERR && len(data) >= size+unix.SizeofSockaddrInet4
		v6 := h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_RECVERR && len(data) >= size+unix.SizeofSockaddrInet6
		switch {
		case v4 && [3]byte(data[4:]) == [3]byte{unix.SO_EE_ORIGIN_ICMP, 3, 3}: // destination and port unreachable (RFC 792)
			return netip.AddrFrom4([4]byte(data[size+4:]))
		case v6 && [3]byte(data[4:]) == [3]byte{unix.SO_EE_ORIGIN_ICMP6, 1, 4}: // the same (RFC 4443 section 3.1)
			return netip.AddrFrom16([16]byte(data[size+8:]))
		}
		oob = rest
	}
	return netip.Addr{}
}

func (s *socket) parse(b, oob []byte, from unix.Sockaddr) (pong, bool) {
	p := pong{at: received(oob)}
	switch f := from.(type) {
	case *unix.SockaddrInet4:
		p.from = netip.AddrFrom4(f.Addr)
		if len(b) == 0 || len(b) < int(b[0]&0xf)*4 {
			return p, false
		}
		b = b[int(b[0]&0xf)*4:]
	case *unix.SockaddrInet6:
		p.from = netip.AddrFrom16(f.Addr)
	}
	// What came in before the filter was there may be an answer to somebody else.
	if len(b) < icmpHeader || binary.BigEndian.Uint16(b[4:]) != s.id {
		return p, false
	}
	p.seq = binary.BigEndian.Uint16(b[6:])
	return p, true
}

// received is when the kernel got a packet; now, where it doesn't say.
func received(oob []byte) time.Time {
	for len(oob) >= unix.SizeofCmsghdr {
		h, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			break
		}
		// struct __kernel_timespec: two 64-bit numbers, in the machine's order.
		if h.Level == unix.SOL_SOCKET && h.Type == unix.SO_TIMESTAMPNS_NEW && len(data) >= 16 {
			return time.Unix(int64(binary.NativeEndian.Uint64(data)), int64(binary.NativeEndian.Uint64(data[8:])))
		}
		oob = rest
	}
	return time.Now()
}
