package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

const (
	transferSize    = 1 << 20
	transferTimeout = 20 * time.Second
	checkPort       = 7007
)

// tcpReport is the server's answer: what it got, and between which addresses as it saw them.
type tcpReport struct {
	Bytes  int64          `json:"bytes"`
	Client netip.AddrPort `json:"client"`
	Server netip.AddrPort `json:"server"`
}

// tcpServer takes in what clients send, and answers with a tcpReport.
type tcpServer struct {
	listener net.Listener
	done     sync.WaitGroup
}

func serveTCP(ctx context.Context, m Machine, at netip.Addr) (*tcpServer, error) {
	l, err := m.Listen(ctx, netip.AddrPortFrom(at, checkPort).String())
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", m.Name, err)
	}
	s := &tcpServer{listener: l}
	s.done.Go(s.accept)
	return s, nil
}

func (s *tcpServer) accept() {
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			return
		}
		s.done.Go(func() { answer(conn) })
	}
}

// answer serves one client; a failure shows at the client's end.
func answer(conn net.Conn) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(transferTimeout))
	n, err := io.Copy(io.Discard, conn)
	if err != nil {
		return
	}
	_ = json.NewEncoder(conn).Encode(tcpReport{n, addrPort(conn.RemoteAddr()), addrPort(conn.LocalAddr())})
}

func addrPort(a net.Addr) netip.AddrPort {
	p := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}

// close stops the server and waits for its connections.
func (s *tcpServer) close() {
	s.listener.Close()
	s.done.Wait()
}

// transfer is what both ends of a connection saw of each other.
type transfer struct {
	local, remote netip.AddrPort // the client's view
	seen          tcpReport      // the server's
}

// sendTCP sends 1 MiB from the machine and returns what the two ends saw.
func sendTCP(ctx context.Context, m Machine, to netip.Addr) (transfer, error) {
	ctx, cancel := context.WithTimeout(ctx, transferTimeout)
	defer cancel()
	conn, err := m.DialContext(ctx, "tcp", netip.AddrPortFrom(to, checkPort).String())
	if err != nil {
		return transfer{}, err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return transfer{}, err
	}
	t := transfer{local: addrPort(conn.LocalAddr()), remote: addrPort(conn.RemoteAddr())}
	if n, err := conn.Write(make([]byte, transferSize)); err != nil {
		return t, fmt.Errorf("after %d of %d bytes: %w", n, transferSize, err)
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return t, err
	}
	if err := json.NewDecoder(conn).Decode(&t.seen); err != nil {
		return t, fmt.Errorf("all %d bytes sent, no answer: %w", transferSize, err)
	}
	return t, nil
}

// noNAT says what is wrong with a transfer in which each end should have seen the other as it sees itself.
func (t transfer) noNAT(server netip.Addr) error {
	return errors.Join(t.arrived(server),
		unless(t.seen.Client == t.local, "the server saw the client as %s instead of %s", t.seen.Client, t.local))
}

// masqueraded says what is wrong with a transfer in which the server should have seen the client as the given address.
func (t transfer) masqueraded(as, server netip.Addr) error {
	return errors.Join(t.arrived(server),
		unless(t.seen.Client.Addr() == as, "the server saw the client as %s instead of %s", t.seen.Client.Addr(), as))
}

func (t transfer) arrived(server netip.Addr) error {
	dialled := netip.AddrPortFrom(server, checkPort)
	return errors.Join(
		unless(t.seen.Bytes == transferSize, "the server got %d of %d bytes", t.seen.Bytes, transferSize),
		unless(t.seen.Server == dialled, "the server was reached as %s instead of %s", t.seen.Server, dialled),
		unless(t.remote == dialled, "the client reached %s instead of %s", t.remote, dialled),
	)
}
