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

// TCPStream is one TCP connection over which something is sent at an interval and comes back, until it is stopped: what a
// long-lived connection of an application sees of a fault.
type TCPStream struct {
	listener net.Listener
	conn     net.Conn
	wg       sync.WaitGroup
	stop     context.CancelFunc

	mu     sync.Mutex
	broken error
}

// StreamTCP connects the machine to a server that it starts on another one.
func (m Machine) StreamTCP(ctx context.Context, server Machine, at netip.Addr, interval time.Duration) (*TCPStream, error) {
	where := netip.AddrPortFrom(at, echoPort).String()
	l, err := server.Listen(ctx, where)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", server.Name, err)
	}
	s := &TCPStream{listener: l}
	ctx, s.stop = context.WithCancel(ctx)
	s.wg.Go(func() { s.serve(ctx) })
	s.conn, err = m.DialContext(ctx, "tcp", where)
	if err != nil {
		s.stop()
		_ = l.Close()
		s.wg.Wait()
		return nil, fmt.Errorf("connect %s to %s: %w", m.Name, server.Name, err)
	}
	s.wg.Go(func() { s.send(ctx, interval) })
	s.wg.Go(func() {
		if _, err := io.Copy(io.Discard, s.conn); ctx.Err() == nil {
			s.breaks(ctx, cmp.Or(err, io.EOF))
		}
	})
	return s, nil
}

// Stop ends the stream.
func (s *TCPStream) Stop() {
	s.stop()
	_ = s.conn.Close()
	_ = s.listener.Close()
	s.wg.Wait()
}

// Broken says why the connection has ended, if it has.
func (s *TCPStream) Broken() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.broken
}

func (s *TCPStream) serve(ctx context.Context) {
	conn, err := s.listener.Accept()
	if err != nil {
		return
	}
	// The client's end may never be heard of: a fault may have cut the way.
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	defer conn.Close()
	_, _ = io.Copy(conn, conn)
}

func (s *TCPStream) send(ctx context.Context, interval time.Duration) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		if _, err := s.conn.Write(make([]byte, echoSize)); err != nil {
			s.breaks(ctx, err)
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
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
