package agent

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
)

// A loop that waits is alive however long it waits; one that is at work for minutes is stuck.
func TestHealthz(t *testing.T) {
	t.Parallel()
	now := time.Unix(1e9, 0)
	h := newHealth(zap.NewNop(), func() time.Time { return now })
	ask := func(path string, serve http.HandlerFunc) (int, string) {
		w := httptest.NewRecorder()
		serve(w, httptest.NewRequest(http.MethodGet, path, nil))
		return w.Code, w.Body.String()
	}
	step := func(d time.Duration, want int) {
		t.Helper()
		now = now.Add(d)
		if code, text := ask("/healthz", h.serveHealthz); code != want {
			t.Errorf("%d %s", code, text)
		}
	}
	step(30*time.Second, 200)
	step(31*time.Second, 503) // it never came to an end of its first round
	h.waits()
	step(time.Hour, 200)
	h.works()
	step(59*time.Second, 200)
	step(2*time.Second, 503)
}

func TestReadyz(t *testing.T) {
	t.Parallel()
	h := newHealth(zap.NewNop(), time.Now)
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
	if code, text := ask("/readyz"); code != 200 || !strings.Contains(text, "degraded: etcd: connection refused (since ") {
		t.Errorf("degraded: %d %s", code, text)
	}
	if code, _ := ask("/readyz?online"); code != 200 {
		t.Errorf("etcd, which was reached before, is away: %d", code)
	}
	h.set(condOffline, errors.New("not since the start"))
	if code, _ := ask("/readyz"); code != 200 {
		t.Errorf("offline: %d", code)
	}
	if code, text := ask("/readyz?online"); code != 503 || !strings.Contains(text, "not ready: offline: not since the start") || !strings.Contains(text, "degraded: etcd: ") {
		t.Errorf("offline, of one that must not be: %d %s", code, text)
	}
	h.set(condLease, errors.New("gone"))
	if code, text := ask("/readyz?verbose"); code != 503 || !strings.Contains(text, "not ready: lease: gone") || strings.Contains(text, "ok: lease") || !strings.Contains(text, "ok: kernel") {
		t.Errorf("without a lease: %d %s", code, text)
	}
}
