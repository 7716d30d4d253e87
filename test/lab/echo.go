package lab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

const (
	echoPort = 7008
	echoSize = 8
)

// TCPStream is one TCP connection over which something is sent at an interval and comes back, until it is stopped: what
// a long-lived connection of an application sees of a fault.
type TCPStream struct {
	stop func()

	mu     sync.Mutex
	broken error
}

// StreamTCP connects the machine to a server that it starts on another one.
func (m Machine) StreamTCP(
	ctx context.Context, server Machine, at netip.Addr, interval time.Duration,
) (*TCPStream, error) {
	where := netip.AddrPortFrom(at, echoPort).String()
	l, err := server.Listen(ctx, where)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", server.Name, err)
	}
	defer l.Close()
	conn, err := m.DialContext(ctx, "tcp", where)
	if err != nil {
		return nil, fmt.Errorf("connect %s to %s: %w", m.Name, server.Name, err)
	}
	peer, err := l.Accept()
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("accept on %s: %w", server.Name, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	s := &TCPStream{}
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = io.Copy(peer, peer) })
	wg.Go(func() {
		_, err := io.Copy(io.Discard, conn)
		s.breaks(ctx, cmp.Or(err, io.EOF))
	})
	wg.Go(func() { s.breaks(ctx, send(ctx, conn, interval)) })
	// Neither end may hear of the other: a fault may have cut the way.
	context.AfterFunc(ctx, func() { _, _ = conn.Close(), peer.Close() })
	s.stop = func() {
		cancel()
		wg.Wait()
	}
	return s, nil
}

// Stop ends the stream.
func (s *TCPStream) Stop() { s.stop() }

// Broken says why the connection has ended, if it has.
func (s *TCPStream) Broken() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.broken
}

func send(ctx context.Context, conn net.Conn, interval time.Duration) error {
	for tick := time.Tick(interval); ; {
		if _, err := conn.Write(make([]byte, echoSize)); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick:
		}
	}
}

func (s *TCPStream) breaks(ctx context.Context, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ctx.Err() == nil && s.broken == nil && !errors.Is(err, net.ErrClosed) {
		s.broken = err
	}
}
