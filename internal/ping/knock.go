package ping

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// discard is the UDP port at which nothing listens, or what throws all away (RFC 863).
const discard = 9

// Knock sends a datagram of size bytes, its IP header among them, to a closed port, for nodes that ignore echo
// requests: their kernels refuse it, which is an answer, too.
func (s *Socket) Knock(to netip.Addr, seq uint16, size int) error {
	if err := s.openUDP(); err != nil {
		return fmt.Errorf("UDP socket (%s): %w", s.family, err)
	}
	headers := s.family.header + icmpHeader
	p := make([]byte, min(max(size-headers, 4), largestPacket-headers))
	binary.BigEndian.PutUint16(p, s.id)
	binary.BigEndian.PutUint16(p[2:], seq)
	err := unix.Sendto(s.udp, p, 0, sockaddr(to, discard))
	if err != nil { // perhaps the answer to an earlier one, to whatever address: the kernel returns that first, and once
		err = unix.Sendto(s.udp, p, 0, sockaddr(to, discard))
	}
	return err
}

func (s *Socket) openUDP() error {
	if s.udp >= 0 {
		return nil
	}
	fd, err := s.open(unix.SOCK_DGRAM, unix.IPPROTO_UDP, Probe)
	if err != nil {
		return err
	}
	s.udp = fd
	return s.refusals(fd)
}

// refused hands over the datagrams that the nodes themselves have refused: their kernels are there, and the path is
// open in both directions.
func (s *Socket) refused(take func(Reply)) error {
	if s.udp < 0 {
		return nil
	}
	return s.each(s.udp, unix.MSG_ERRQUEUE, func(b, oob []byte, from unix.Sockaddr) {
		to, by := addressOf(from), refusedBy(oob)
		if len(b) >= 4 && to == by && binary.BigEndian.Uint16(b) == s.id {
			take(Reply{From: by, Seq: binary.BigEndian.Uint16(b[2:]), At: received(oob)})
		}
	})
}

// refusedBy is which node says that the port is closed: struct sock_extended_err (uapi/linux/errqueue.h), then that
// node's address.
func refusedBy(oob []byte) netip.Addr {
	const size = 16
	messages, _ := unix.ParseSocketControlMessage(oob)
	for _, m := range messages {
		h, data := m.Header, m.Data
		v4 := h.Level == unix.IPPROTO_IP && h.Type == unix.IP_RECVERR && len(data) >= size+unix.SizeofSockaddrInet4
		v6 := h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_RECVERR && len(data) >= size+unix.SizeofSockaddrInet6
		switch {
		case v4 && [3]byte(data[4:]) == [3]byte{unix.SO_EE_ORIGIN_ICMP, 3, 3}: // destination and port unreachable (RFC 792)
			return netip.AddrFrom4([4]byte(data[size+4:]))
		case v6 && [3]byte(data[4:]) == [3]byte{unix.SO_EE_ORIGIN_ICMP6, 1, 4}: // the same (RFC 4443 section 3.1)
			return netip.AddrFrom16([16]byte(data[size+8:]))
		}
	}
	return netip.Addr{}
}
