package lab

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"
)

// Relay passes TCP connections on to another port of its machine, and what goes through is late.
type Relay struct {
	listener net.Listener
	stop     context.CancelFunc
	wg       sync.WaitGroup
}

// relayDepth is how many pieces may be under way at a time.
const relayDepth = 1024

// StartRelay makes one. Everything is delayed in each direction.
func (m Machine) StartRelay(ctx context.Context, port, to uint16, delay time.Duration) (*Relay, error) {
	l, err := m.Listen(ctx, fmt.Sprintf("0.0.0.0:%d", port))
	if err != nil {
		return nil, fmt.Errorf("relay on %s: %w", m.Name, err)
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	r := &Relay{listener: l, stop: stop}
	r.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			r.wg.Go(func() { r.pass(ctx, m, conn, to, delay) })
		}
	})
	return r, nil
}

// Close ends the relay and all connections through it.
func (r *Relay) Close() error {
	r.stop()
	err := r.listener.Close()
	r.wg.Wait()
	return err
}

func (r *Relay) pass(ctx context.Context, m Machine, client net.Conn, to uint16, delay time.Duration) {
	defer client.Close()
	server, err := m.DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", to))
	if err != nil {
		return
	}
	defer server.Close()
	stop := context.AfterFunc(ctx, func() { _, _ = client.Close(), server.Close() })
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() { late(server, client, delay) })
	wg.Go(func() { late(client, server, delay) })
	wg.Wait()
}

// late copies, each piece its delay after it came.
func late(to, from net.Conn, delay time.Duration) {
	type piece struct {
		due  time.Time
		data []byte
	}
	pieces := make(chan piece, relayDepth)
	go func() {
		defer close(pieces)
		for {
			buf := make([]byte, 16<<10)
			n, err := from.Read(buf)
			if err != nil {
				return
			}
			pieces <- piece{time.Now().Add(delay), buf[:n]}
		}
	}()
	for p := range pieces {
		time.Sleep(time.Until(p.due))
		if _, err := to.Write(p.data); err != nil {
			_ = from.Close() // ends the reader
		}
	}
	_ = to.(*net.TCPConn).CloseWrite()
}
