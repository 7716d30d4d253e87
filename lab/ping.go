package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// pingToken marks one echo request, so that its reply and its way through the underlay are recognised.
type pingToken [16]byte

func newToken() pingToken {
	var t pingToken
	_, _ = rand.Read(t[:]) // never fails
	return t
}

// Ping is one echo request.
type Ping struct {
	To    netip.Addr
	MTU   int           // the size of the whole IP packet; 0 for a small one
	DF    bool          // never to be fragmented
	Wait  time.Duration // for the reply
	token pingToken
}

const (
	icmpHeader  = 8
	smallPacket = 84
)

func headerLen(f addr.Family) int {
	if f == addr.IPv4 {
		return 20
	}
	return 40
}

// Ping sends one echo request from the machine and waits for its reply. It returns the source address that the kernel
// chose.
func (m Machine) Ping(ctx context.Context, p Ping) (netip.Addr, error) {
	if p.token == (pingToken{}) {
		p.token = newToken()
	}
	conn, err := m.dialICMP(ctx, p)
	if err != nil {
		return netip.Addr{}, err
	}
	defer conn.Close()
	local, _ := netip.AddrFromSlice(conn.LocalAddr().(*net.IPAddr).IP)
	if err := conn.SetDeadline(time.Now().Add(p.Wait)); err != nil {
		return local.Unmap(), err
	}
	msg, err := p.request()
	if err != nil {
		return local.Unmap(), err
	}
	if _, err := conn.Write(msg); err != nil {
		return local.Unmap(), err
	}
	return local.Unmap(), p.await(conn)
}

func (m Machine) dialICMP(ctx context.Context, p Ping) (*net.IPConn, error) {
	f := addr.FamilyOf(p.To)
	network := "ip4:icmp"
	if f == addr.IPv6 {
		network = "ip6:ipv6-icmp"
	}
	var conn net.Conn
	err := m.Do(func() (err error) {
		d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error { return setPingOptions(c, f, p.DF) }}
		conn, err = d.DialContext(ctx, network, p.To.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	return conn.(*net.IPConn), nil
}

// setPingOptions asks for DF, and for ICMP errors about the request to end the wait for its reply.
func setPingOptions(c syscall.RawConn, f addr.Family, df bool) error {
	var errs []error
	err := c.Control(func(fd uintptr) {
		set := func(level, name, value int) {
			errs = append(errs, os.NewSyscallError("setsockopt", unix.SetsockoptInt(int(fd), level, name, value)))
		}
		if f == addr.IPv4 {
			set(unix.IPPROTO_IP, unix.IP_RECVERR, 1)
		} else {
			set(unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1)
		}
		switch {
		case df && f == addr.IPv4:
			set(unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
		case df:
			set(unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO)
			set(unix.IPPROTO_IPV6, unix.IPV6_DONTFRAG, 1)
		}
	})
	return errors.Join(append(errs, err)...)
}

// request builds the message. Its token stands at the start of the data; the rest is filling.
func (p Ping) request() ([]byte, error) {
	f := addr.FamilyOf(p.To)
	size := p.MTU
	if size == 0 {
		size = smallPacket
	}
	data := make([]byte, max(len(p.token), size-headerLen(f)-icmpHeader))
	copy(data, p.token[:])
	var typ icmp.Type = ipv4.ICMPTypeEcho
	if f == addr.IPv6 {
		typ = ipv6.ICMPTypeEchoRequest // its checksum is the kernel's work
	}
	msg := icmp.Message{Type: typ, Body: &icmp.Echo{ID: p.id(), Seq: 1, Data: data}}
	return msg.Marshal(nil)
}

func (p Ping) id() int { return int(binary.BigEndian.Uint16(p.token[:2])) }

// await reads until the reply to this request comes.
func (p Ping) await(conn *net.IPConn) error {
	reply := byte(ipv4.ICMPTypeEchoReply)
	if p.To.Is6() {
		reply = byte(ipv6.ICMPTypeEchoReply)
	}
	buf := make([]byte, 1<<16)
	for {
		n, _, err := conn.ReadFromIP(buf) // without the IPv4 header
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("no reply within %s", p.Wait)
		}
		if err != nil {
			return err
		}
		got := buf[:n]
		if len(got) >= icmpHeader+len(p.token) && got[0] == reply && bytes.Equal(got[icmpHeader:][:len(p.token)], p.token[:]) {
			return nil
		}
	}
}
