package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"
)

// stuckAfter is how long the loop may be silent before the process counts as stuck: several audits.
const stuckAfter = 3 * auditEvery

// serve answers /healthz (the loop comes round) and /readyz (all that pods need is in place) until ctx ends.
func (h *health) serve(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if silent := h.now().Sub(h.lastBeat()); silent > stuckAfter {
			http.Error(w, fmt.Sprintf("the loop has not come round for %v", silent.Round(time.Second)), http.StatusServiceUnavailable)
			return
		}
		_, _ = fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		code, text := http.StatusOK, ""
		for _, p := range h.list() {
			word := "degraded"
			if p.Fatal {
				code, word = http.StatusServiceUnavailable, "not ready"
			}
			text += fmt.Sprintf("%s: %s: %s (since %s)\n", word, p.Name, p.Reason, p.Since.Format(time.RFC3339))
		}
		w.WriteHeader(code)
		if code == http.StatusOK {
			text = "ok\n" + text
		}
		_, _ = fmt.Fprint(w, text)
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("http: %w", err)
	}
	return ctx.Err()
}
