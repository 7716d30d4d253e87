package agent

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/overlayd/overlayd/test/bubble"
)

// A loop that waits is alive however long it waits; one that is at work for minutes is stuck.
func TestHealthz(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		h := newHealth(zap.NewNop())
		step := func(d time.Duration, want int) {
			t.Helper()
			time.Sleep(d)
			w := httptest.NewRecorder()
			if h.serveHealthz(w, httptest.NewRequest(http.MethodGet, "/healthz", nil)); w.Code != want {
				t.Errorf("%d %s", w.Code, w.Body)
			}
		}
		step(30*time.Second, 200)
		step(31*time.Second, 503) // it never came to an end of its first round
		h.waits()
		step(time.Hour, 200)
		h.works()
		step(59*time.Second, 200)
		step(2*time.Second, 503)
	})
}

func TestReadyz(t *testing.T) {
	t.Parallel()
	h := newHealth(zap.NewNop())
	ask := func(path string) (int, string) {
		w := httptest.NewRecorder()
		h.serveReadyz(w, httptest.NewRequest(http.MethodGet, path, nil))
		return w.Code, w.Body.String()
	}
	if code, text := ask("/readyz?verbose"); code != 503 || strings.Count(text, "not ready: ") != len(needed()) {
		t.Errorf("at the start: %d %s", code, text)
	}
	for _, c := range needed() {
		h.set(c, nil)
	}
	if code, text := ask("/readyz"); code != 200 || text != "ok\n" {
		t.Errorf("%d %s", code, text)
	}
	if code, text := ask("/readyz?verbose"); code != 200 || strings.Count(text, "ok: ") != len(needed()) {
		t.Errorf("%d %s", code, text)
	}
	h.set(condStore, errors.New("connection refused"))
	if code, text := ask("/readyz"); code != 200 || !strings.Contains(text, "degraded: store: connection refused (since ") {
		t.Errorf("degraded: %d %s", code, text)
	}
	if code, _ := ask("/readyz?online"); code != 200 {
		t.Errorf("etcd, which was reached before, is away: %d", code)
	}
	h.set(condOffline, errors.New("not since the start"))
	if code, _ := ask("/readyz"); code != 200 {
		t.Errorf("offline: %d", code)
	}
	if code, text := ask("/readyz?online"); code != 503 || !strings.Contains(text,
		"not ready: offline: not since the start") || !strings.Contains(text, "degraded: store: ") {
		t.Errorf("offline, of one that must not be: %d %s", code, text)
	}
	h.set(condLease, errors.New("gone"))
	if code, text := ask("/readyz?verbose"); code != 503 || !strings.Contains(text, "not ready: lease: gone") ||
		strings.Contains(text, "ok: lease") || !strings.Contains(text, "ok: kernel") {
		t.Errorf("without a lease: %d %s", code, text)
	}
}

// pipes is a listener without a network, for a bubble of its own time.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	close  func()
}

func newPipes() *pipes {
	p := &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
	p.close = sync.OnceFunc(func() { close(p.closed) })
	return p
}

func (p *pipes) dial() net.Conn {
	here, there := net.Pipe()
	p.conns <- there
	return here
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { p.close(); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipes", Net: "unix"} }

// Whoever is slow, or says nothing, keeps his connection for a while only.
func TestServeOutlastsSlowClients(t *testing.T) {
	const question = "GET / HTTP/1.1\r\nHost: node\r\n"
	for _, c := range []struct {
		name   string
		says   string
		answer string        // its first line; empty: any
		reads  bool          // the rest of it, too
		within time.Duration // until the connection ends, and no less than half of that
	}{
		{"half a header", "GET / HT", "", true, headerWithin},
		{"half a body", question + "Content-Length: 2\r\n\r\nx", "HTTP/1.1 200 OK", true, questionWithin},
		{"no second question", question + "\r\n", "HTTP/1.1 200 OK", true, idleFor},
		{"an answer that nobody reads", question + "\r\n", "HTTP/1.1 200 OK", false, readWithin},
		{
			"a long header", question + "Cookie: " + strings.Repeat("x", 2*largestHeader) + "\r\n\r\n",
			"HTTP/1.1 431 Request Header Fields Too Large", true, time.Second,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				l, done, ended := newPipes(), make(chan error), make(chan struct{})
				go func() {
					done <- serve(ctx, l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
						_, _ = io.Copy(w, io.LimitReader(zeros{}, 1<<20))
					}))
				}()
				conn := l.dial()
				go func() {
					_, _ = io.WriteString(conn, c.says) // as much as the server takes
				}()
				began := time.Now()
				answer := bufio.NewReader(conn)
				line, _ := answer.ReadString('\n')
				if got := strings.TrimSpace(line); c.answer != "" && got != c.answer {
					t.Errorf("answer: %q", got)
				}
				if !c.reads {
					time.Sleep(c.within + time.Second/2)
				}
				go func() {
					defer close(ended)
					_, _ = io.Copy(io.Discard, answer)
				}()
				select {
				case <-ended:
				case <-time.After(time.Hour):
					t.Error("the connection is still open")
				}
				if took := time.Since(began); took > c.within+time.Second || took < c.within/2 && c.within > time.Second {
					t.Errorf("it took %v", took)
				}
				_ = conn.Close()
				cancel()
				if err := <-done; !errors.Is(err, context.Canceled) {
					t.Errorf("serve returned %v", err)
				}
			})
		})
	}
}

// zeros never ends.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// Thousands of clients that hold connections cost a bounded number of them, and keep out neither the kubelet's question
// nor the operator at the socket.
func TestManyConnections(t *testing.T) {
	t.Parallel()
	h := newHealth(zap.NewNop())
	h.waits()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", h.serveHealthz)
	socket := filepath.Join(t.TempDir(), "sock")
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	listen := func(network, address string) string {
		l, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() { _ = serve(ctx, l, mux) })
		return l.Addr().String()
	}
	tcp := listen("tcp", "127.0.0.1:0")
	listen("unix", socket)
	defer wg.Wait()
	defer cancel()
	ask := func(network, address string) error {
		client := http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, address)
			},
		}}
		resp, err := client.Get("http://node/healthz")
		if err == nil {
			_ = resp.Body.Close()
		}
		return err
	}
	const clients = 2000
	var held []net.Conn
	for i := range clients {
		c, err := net.Dial("tcp", tcp)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		switch i % 3 { // silent; half a question; answered once
		case 1:
			_, _ = io.WriteString(c, "GET /healthz HT")
		case 2:
			_, _ = io.WriteString(c, "GET /healthz HTTP/1.1\r\nHost: node\r\n\r\n")
		}
		if held = append(held, c); i%100 == 99 {
			if err := errors.Join(ask("tcp", tcp), ask("unix", socket)); err != nil {
				t.Fatalf("with %d connections: %v", i+1, err)
			}
		}
	}
	open := 0
	for end := time.Now().Add(5 * time.Second); open == 0 || open > mostConnections && time.Now().Before(end); {
		open = 0 // the last ones may still be on their way
		for _, c := range held {
			_ = c.SetReadDeadline(time.Now().Add(time.Millisecond))
			if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
				open++
			}
		}
	}
	if open > mostConnections || open < mostConnections/2 {
		t.Errorf("%d of %d connections are open, at most %d may be", open, clients, mostConnections)
	}
}
