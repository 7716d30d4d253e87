package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"
)

// pinging sends echo requests at a steady pace, whether or not the ones before were answered.
type pinging struct {
	to    string
	n     int // 0: until stdin ends
	every time.Duration
	size  int // of the whole IP packet; 0 for a small one
	df    bool
}

// replyWait is how long the last request may take: what is answered later is lost. A machine that stands still for some seconds loses
// nothing.
const replyWait = 15 * time.Second

const icmpHeader = 8

func (p pinging) run() error {
	to, err := netip.ParseAddr(p.to)
	if err != nil {
		return err
	}
	conn, err := p.dial(to)
	if err != nil {
		return err
	}
	defer conn.Close()
	answered := p.listen(conn, to)
	sent, refused, err := p.send(conn, to)
	for wait := time.Now().Add(replyWait); time.Now().Before(wait) && len(answered()) < sent-refused; {
		time.Sleep(5 * time.Millisecond)
	}
	got := answered()
	lost, longest := 0, 0
	for seq, run := 0, 0; seq < sent; seq++ {
		if got[uint16(seq)] {
			run = 0
			continue
		}
		lost++
		run++
		longest = max(longest, run)
	}
	fmt.Printf("sent %d lost %d longest %s", sent, lost, time.Duration(longest)*p.every)
	if err != nil {
		fmt.Printf(", the last one refused: %v", err)
	}
	fmt.Println()
	return nil
}

func (p pinging) dial(to netip.Addr) (*net.IPConn, error) {
	network := "ip4:icmp"
	if to.Is6() {
		network = "ip6:ipv6-icmp"
	}
	c, err := net.Dial(network, to.String())
	if err != nil {
		return nil, err
	}
	conn := c.(*net.IPConn)
	raw, err := conn.SyscallConn()
	if err != nil || !p.df {
		return conn, err
	}
	var setErr error
	err = raw.Control(func(fd uintptr) {
		if to.Is6() {
			setErr = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IPV6, syscall.IPV6_MTU_DISCOVER, syscall.IPV6_PMTUDISC_DO)
		} else {
			setErr = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, syscall.IP_MTU_DISCOVER, syscall.IP_PMTUDISC_DO)
		}
	})
	return conn, errors.Join(err, setErr)
}

// listen gathers the sequence numbers of the replies until it is asked for them.
func (p pinging) listen(conn *net.IPConn, to netip.Addr) (answered func() map[uint16]bool) {
	reply := byte(0)
	if to.Is6() {
		reply = 129
	}
	var mu sync.Mutex
	got := map[uint16]bool{}
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, err := conn.Read(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			b := buf[:max(n, 0)]
			if len(b) > 20 && to.Is4() && b[0]>>4 == 4 { // Read of a connected raw socket keeps the IPv4 header
				b = b[int(b[0]&15)*4:]
			}
			if err != nil || len(b) < icmpHeader || b[0] != reply || binary.BigEndian.Uint16(b[4:]) != p.id() {
				continue
			}
			mu.Lock()
			got[binary.BigEndian.Uint16(b[6:])] = true
			mu.Unlock()
		}
	}()
	return func() map[uint16]bool {
		mu.Lock()
		defer mu.Unlock()
		return maps.Clone(got)
	}
}

func (p pinging) id() uint16 { return uint16(os.Getpid()) }

// send returns how many were to go out, how many of them were refused, and why the last of those.
func (p pinging) send(conn *net.IPConn, to netip.Addr) (sent, refused int, last error) {
	end := make(chan struct{})
	if p.n == 0 {
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			close(end)
		}()
	}
	tick := time.NewTicker(p.every)
	defer tick.Stop()
	for ; p.n == 0 && sent < 1<<16 || sent < p.n; sent++ {
		if _, err := conn.Write(p.request(to, sent)); err != nil {
			refused, last = refused+1, err
		}
		select {
		case <-tick.C:
		case <-end:
			return sent + 1, refused, last
		}
	}
	return sent, refused, last
}

func (p pinging) request(to netip.Addr, seq int) []byte {
	header := 20
	typ := byte(8)
	if to.Is6() {
		header, typ = 40, 128
	}
	b := make([]byte, max(64, p.size-header))
	b[0] = typ
	binary.BigEndian.PutUint16(b[4:], p.id())
	binary.BigEndian.PutUint16(b[6:], uint16(seq))
	if to.Is4() { // for IPv6 the kernel does it
		binary.BigEndian.PutUint16(b[2:], checksum(b))
	}
	return b
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
