package apiserver

import (
	"net"
	"sync"
	"testing"
)

// Relay is another address of the server, from which connections can be ended or held.
type Relay struct {
	URL string

	server string
	mu     sync.Mutex
	pass   *sync.Cond
	cut    bool // new connections are closed
	made   int  // how many connections there were
	held   int  // of so many of them, the first, nothing is passed on
	conns  []net.Conn
}

// NewRelay starts one, which ends with the test.
func (s *Server) NewRelay(t testing.TB) *Relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &Relay{URL: "https://" + l.Addr().String(), server: "127.0.0.1:" + s.port}
	r.pass = sync.NewCond(&r.mu)
	var running sync.WaitGroup
	t.Cleanup(func() {
		_ = l.Close()
		r.Cut()
		running.Wait()
	})
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			running.Go(func() { r.serve(c) })
		}
	})
	return r
}

// Cut ends all connections, and each that comes from now on.
func (r *Relay) Cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cut = true
	for _, c := range r.conns {
		_ = c.Close()
	}
	r.conns = nil
	r.pass.Broadcast()
}

// Pass lets connections be made again.
func (r *Relay) Pass() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cut = false
}

// Hold passes nothing on of the connections that there are, and keeps them: to each side, the other one has vanished
// without a word. New connections work.
func (r *Relay) Hold() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.held = r.made
}

func (r *Relay) serve(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("tcp", r.server)
	if err != nil {
		return
	}
	defer server.Close()
	r.mu.Lock()
	cut, number := r.cut, r.made
	r.made++
	r.conns = append(r.conns, client, server)
	r.mu.Unlock()
	if cut {
		return
	}
	var both sync.WaitGroup
	both.Go(func() { r.copy(number, client, server) })
	both.Go(func() { r.copy(number, server, client) })
	both.Wait()
}

// copy passes on what comes from one side, and ends both with it.
func (r *Relay) copy(number int, to, from net.Conn) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		r.mu.Lock()
		for number < r.held && !r.cut {
			r.pass.Wait()
		}
		r.mu.Unlock()
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}
