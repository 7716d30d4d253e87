package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/overlayd/overlayd/diag/metrics"
	"github.com/overlayd/overlayd/diag/page"
	"github.com/overlayd/overlayd/diag/status"
)

const (
	// stuckAfter is how long one round may take before the process counts as stuck: a long one takes a second.
	stuckAfter = time.Minute
	// answerWithin bounds how long a question waits for the loop.
	answerWithin = 2 * time.Second

	// The port may be one that strangers reach: none of them may hold a connection, and what it takes, without end. A
	// question has a few headers, and a body of one word at most.
	headerWithin, questionWithin = 5 * time.Second, 10 * time.Second
	// readWithin bounds an answer from the question to its last byte: /peers of a large cluster has megabytes, and the
	// line may be slow.
	readWithin = 30 * time.Second
	// idleFor is how long a connection stays open for the next question: longer than it is from one scrape to the next,
	// usually.
	idleFor = 2 * time.Minute
	// largestHeader has room for the cookies that a browser brings from whatever else is at the same address.
	largestHeader = 32 << 10
	// mostConnections bounds what connections take: some 25 kB each. A node has a few clients.
	mostConnections = 256
)

// serve answers until ctx ends.
func serve(ctx context.Context, l net.Listener, h http.Handler) error {
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: headerWithin, ReadTimeout: questionWithin, WriteTimeout: readWithin,
		IdleTimeout: idleFor, MaxHeaderBytes: largestHeader, ConnState: new(connections).changed,
	}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("http: %w", err)
	}
	return ctx.Err()
}

// connections closes the one of which nothing was heard for longest when there are too many. To let new ones wait instead
// would let whoever holds the old ones keep the kubelet's questions out, and have a healthy daemon restarted.
type connections struct {
	mu    sync.Mutex
	since map[net.Conn]time.Time // of the last change: opened, a request begins, a request was answered
}

func (c *connections) changed(conn net.Conn, to http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if to == http.StateClosed || to == http.StateHijacked {
		delete(c.since, conn)
		return
	}
	if c.since == nil {
		c.since = map[net.Conn]time.Time{}
	}
	if to == http.StateNew && len(c.since) >= mostConnections {
		oldest := conn
		at := time.Now()
		for other, since := range c.since {
			if since.Before(at) {
				oldest, at = other, since
			}
		}
		delete(c.since, oldest)
		_ = oldest.Close()
	}
	c.since[conn] = time.Now()
}

// public is what any client that reaches the port may ask: /healthz (the loop runs), /readyz (all that pods need is in
// place), the documents /status and /peers, /metrics, and the page.
func (a *Agent) public() *http.ServeMux {
	mux := http.NewServeMux()
	mux.Handle("GET /", page.Handler(a))
	mux.Handle("GET /metrics", metrics.Handler(a.instruments, a.Status))
	mux.HandleFunc("GET /peers", answer(func(r *http.Request) (any, error) { return a.Peers(r.Context()) }))
	mux.HandleFunc("GET /healthz", a.health.serveHealthz)
	mux.HandleFunc("GET /readyz", a.health.serveReadyz)
	mux.HandleFunc("GET /status", answer(func(r *http.Request) (any, error) { return a.Status(r.Context()) }))
	return mux
}

// private is what the operator's commands ask, through a socket that only root can open.
func (a *Agent) private() *http.ServeMux {
	mux := a.public()
	mux.HandleFunc("GET /peer", answer(func(r *http.Request) (any, error) {
		return a.Peer(r.Context(), r.URL.Query().Get("name"))
	}))
	mux.HandleFunc("GET /diff", answer(func(r *http.Request) (any, error) { return a.Compare(r.Context()) }))
	mux.Handle("GET /log-level", a.parts.LogLevel)
	mux.Handle("PUT /log-level", a.parts.LogLevel)
	return mux
}

// answer serves a value as JSON.
func answer(question func(r *http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), answerWithin)
		defer cancel()
		v, err := question(r.WithContext(ctx))
		switch {
		case errors.Is(err, ErrBusy):
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		case err != nil:
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v)
	}
}

func (h *health) serveHealthz(w http.ResponseWriter, _ *http.Request) {
	if d := h.stuck(); d > stuckAfter {
		http.Error(w, fmt.Sprintf("the main loop has been busy for %v", d.Round(time.Second)), http.StatusServiceUnavailable)
		return
	}
	_, _ = fmt.Fprintln(w, "ok")
}

// serveReadyz lists what is wrong, and with ?verbose also what is needed and right. With ?online, a daemon is not ready
// that has not reached the store since its start and works from the persisted state: a rolling update is to stop there.
func (h *health) serveReadyz(w http.ResponseWriter, r *http.Request) {
	code, text := http.StatusOK, ""
	problems := h.list()
	if r.URL.Query().Has("verbose") {
		for _, c := range needed() {
			if !slices.ContainsFunc(problems, func(p status.Problem) bool { return p.Name == string(c) }) {
				text += fmt.Sprintf("ok: %s\n", c)
			}
		}
	}
	for _, p := range problems {
		word := "degraded"
		if p.Fatal || p.Name == string(condOffline) && r.URL.Query().Has("online") {
			code, word = http.StatusServiceUnavailable, "not ready"
		}
		text += fmt.Sprintf("%s: %s: %s (since %s)\n", word, p.Name, p.Reason, p.Since.Format(time.RFC3339))
	}
	w.WriteHeader(code)
	if code == http.StatusOK {
		text = "ok\n" + text
	}
	_, _ = fmt.Fprint(w, text)
}
