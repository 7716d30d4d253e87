package page

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/overlayd/overlayd/diag/status"
)

func get(t testing.TB, s Source, path string) *httptest.ResponseRecorder {
	t.Helper()
	w := httptest.NewRecorder()
	Handler(s).ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w
}

func TestWhatIsServed(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]struct {
		code int
		kind string
	}{
		"/":                {200, "text/html; charset=utf-8"},
		"/page/page.css":   {200, "text/css; charset=utf-8"},
		"/page/page.js":    {200, "text/javascript; charset=utf-8"},
		"/page/icon.svg":   {200, "image/svg+xml"},
		"/page/node.json":  {200, "application/json"},
		"/page/peers.json": {200, "application/json"},
		"/page/page.html":  {404, "text/plain; charset=utf-8"},
		"/page/":           {404, "text/plain; charset=utf-8"},
		"/status":          {404, "text/plain; charset=utf-8"},
	} {
		r := get(t, network(3), path)
		if got := r.Header().Get("Content-Type"); r.Code != want.code || got != want.kind {
			t.Errorf("%s: %d %s, want %v", path, r.Code, got, want)
		}
		policy := r.Header().Get("Content-Security-Policy")
		if !strings.Contains(policy, "default-src 'none'") || !strings.Contains(policy, "frame-ancestors 'none'") ||
			strings.Contains(policy, "unsafe") {
			t.Errorf("%s: policy %q", path, policy)
		}
		if r.Header().Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s: a browser may guess what it is", path)
		}
	}
	w := httptest.NewRecorder()
	Handler(network(3)).ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/", nil))
	if w.Code != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", w.Code)
	}
}

// The headline has the peers that have problems now: no counts since the start, and no peers that linger as usual.
func TestHeadline(t *testing.T) {
	t.Parallel()
	n := status.Node{Peers: status.PeerCounts{Total: 9, Lingering: 2}, Probe: status.Probe{On: true, NotAllowed: 2}}
	if got := nodeView(n).Network; got != "" {
		t.Errorf("%q", got)
	}
	n.Peers.Unreachable, n.Peers.Rejected = 1, 2
	n.Probe.Silent, n.Probe.SmallOnly, n.Probe.Lossy, n.Probe.Size = 3, 1, 2, 1450
	want := "Of 9 peers: 1 unreachable, 2 rejected, 3 silent, 1 answering small packets but not 1450 bytes, 2 lossy."
	if got := nodeView(n).Network; got != want {
		t.Errorf("%q", got)
	}
}

func TestAssetsAreAskedForAgain(t *testing.T) {
	t.Parallel()
	first := get(t, network(0), "/page/page.js")
	r := httptest.NewRequest(http.MethodGet, "/page/page.js", nil)
	r.Header.Set("If-None-Match", first.Header().Get("ETag"))
	w := httptest.NewRecorder()
	Handler(network(0)).ServeHTTP(w, r)
	if w.Code != http.StatusNotModified {
		t.Errorf("%d", w.Code)
	}
}

// Nothing may be loaded from elsewhere, and nothing stand in the page that the policy forbids.
func TestNoOutsideAssets(t *testing.T) {
	t.Parallel()
	url := regexp.MustCompile(`(?i)(https?:)?//[a-z0-9-]+\.[a-z]|@import|url\(`)
	inline := regexp.MustCompile(`(?i)<script(>| [^>]*>[^<])|<style| style=| on[a-z]+=|javascript:`)
	markup := regexp.MustCompile(
		`innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|srcdoc`,
	)
	for path, wrong := range map[string][]*regexp.Regexp{
		"/": {inline, url}, "/page/page.css": {url}, "/page/page.js": {url, markup}, "/page/icon.svg": {inline},
	} {
		f := network(3)
		f.node.Store.Endpoints = nil // those are addresses, and only text
		text := get(t, f, path).Body.String()
		for _, w := range wrong {
			if found := w.FindString(text); found != "" {
				t.Errorf("%s has %q", path, found)
			}
		}
	}
}

const hostile = `<script>alert(1)</script>"'><img src=x onerror=alert(2)></noscript></title>`

// hostileNetwork has this wherever another node can put it.
func hostileNetwork() *fake {
	f := network(3)
	for i := range f.peers {
		p := &f.peers[i]
		p.Name, p.ID, p.Subnet, p.PublicIP, p.Reason, p.Cause, p.MAC = hostile, hostile, hostile, hostile, hostile, hostile,
			hostile
	}
	f.peers[1].Path = "rejected"
	f.peers[2].Name = strings.Repeat("\u202eö", 100_000)
	f.node.Name = hostile
	f.node.Problems = []status.Problem{{Name: hostile, Reason: hostile + strings.Repeat("x", 100_000), Since: f.node.Now}}
	f.node.Drift = []status.DriftKind{{Kind: hostile, Count: 1, Last: hostile}}
	f.node.Peers.RejectedBy = map[string]int{hostile: 1}
	f.node.Restart = []string{hostile}
	return f
}

func TestHostileNames(t *testing.T) {
	t.Parallel()
	f := hostileNetwork()
	text := get(t, f, "/").Body.String()
	for _, wrong := range []string{"<img", "<script>", "alert(1)</script>", `"'>`} {
		if strings.Contains(text, wrong) {
			t.Errorf("the page has %q", wrong)
		}
	}
	if got := strings.Count(text, "</noscript>"); got != 1 {
		t.Errorf("%d ends of noscript", got)
	}
	for path, most := range map[string]int{"/": 60_000, "/page/peers.json": 10_000, "/page/node.json": 20_000} {
		text := get(t, f, path).Body.String()
		if strings.Contains(text, "<script>alert") || len(text) > most {
			t.Errorf("%s: %d bytes, or it has markup", path, len(text))
		}
	}
}

func TestSourceWithoutAnswer(t *testing.T) {
	t.Parallel()
	f := network(3)
	f.err = errors.New("the loop has not come round for 12s <b>")
	r := get(t, f, "/")
	text := r.Body.String()
	if r.Code != http.StatusServiceUnavailable ||
		!strings.Contains(text, "its status is unavailable: the loop has not come round for 12s &lt;b&gt;") ||
		!strings.Contains(text, "No answer") {
		t.Errorf("%d\n%s", r.Code, text)
	}
	for _, path := range []string{"/page/node.json", "/page/peers.json"} {
		if r := get(t, f, path); r.Code != http.StatusServiceUnavailable || !strings.Contains(r.Body.String(), "12s") {
			t.Errorf("%s: %d", path, r.Code)
		}
	}
}

// slow never answers; it only heeds the context.
type slow struct{}

func (slow) Status(ctx context.Context) (status.Node, error) {
	<-ctx.Done()
	return status.Node{}, ctx.Err()
}

func (s slow) Peers(ctx context.Context) ([]status.Peer, error) {
	_, err := s.Status(ctx)
	return nil, err
}

func TestSourceThatHangs(t *testing.T) {
	t.Parallel()
	if r := get(t, slow{}, "/"); r.Code != http.StatusServiceUnavailable {
		t.Errorf("%d", r.Code)
	}
}

func TestTableWithoutScript(t *testing.T) {
	t.Parallel()
	f := network(100)
	fail(&f.node)
	text := get(t, f, "/").Body.String()
	_, table, _ := strings.Cut(text, "<noscript>")
	if got := strings.Count(table, "<tr><td>"); got != 100 {
		t.Errorf("%d lines", got)
	}
	last := -1
	for _, p := range f.peers {
		if !strings.Contains(table, "<td>"+p.Name+"</td><td>"+p.Subnet+"</td>") {
			t.Errorf("%s is missing", p.Name)
		}
	}
	for _, s := range []state{silent, smallOnly, unreachable, lossy, rejected, leaving, notPinged, answers} {
		at := strings.Index(table, `class="tile `+string(s))
		if at < last {
			t.Errorf("%s stands too early: the worst come first", s)
		}
		last = at
	}
	for _, want := range []string{
		"Not ready", "flannel.1 has VNI 1", "since 2026-03-04 12:52:22 UTC", "for 1h13m0s",
		"not confirmed by etcd", "--lease-ttl",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	if strings.Index(text, "flannel.1 has") > strings.Index(text, "connection refused") {
		t.Error("what makes the node not ready comes first")
	}
}

func TestStates(t *testing.T) {
	t.Parallel()
	probe := func(v status.Verdict) *status.PeerProbe { return &status.PeerProbe{Verdict: v} }
	for want, p := range map[state]status.Peer{
		answers:     {Path: "tunnel", Probe: probe(status.Answers)},
		lossy:       {Path: "direct", Probe: probe(status.Lossy)},
		smallOnly:   {Path: "tunnel", Probe: probe(status.SmallOnly)},
		silent:      {Path: "tunnel", Probe: probe(status.Silent)},
		notPinged:   {Path: "tunnel"},
		unreachable: {Path: "unreachable", Probe: probe(status.Silent)},
		rejected:    {Path: "rejected", Leaving: true},
		leaving:     {Path: "tunnel", Leaving: true, Probe: probe(status.Silent)},
	} {
		if got := stateOf(p); got != want {
			t.Errorf("%v: %s", p, got)
		}
	}
	css := get(t, network(0), "/page/page.css").Body.String()
	for _, s := range states() {
		if !strings.Contains(css, ".tile."+string(s.State)+" {") {
			t.Errorf("%s has no colour", s.State)
		}
		if s.State != answers && !strings.Contains(css, ".tile."+string(s.State)+"::before") {
			t.Errorf("%s has no letter", s.State)
		}
	}
}

func TestSteps(t *testing.T) {
	t.Parallel()
	for rtt, want := range map[time.Duration]int{
		0: 0, 999 * time.Microsecond: 0, time.Millisecond: 1,
		5 * time.Millisecond: 2, 20 * time.Millisecond: 3, time.Second: 4,
	} {
		v := peerViews(
			[]status.Peer{{Probe: &status.PeerProbe{Verdict: status.Answers, Full: status.Pings{RTT: rtt}}}},
			time.Time{},
		)
		if v[0].Step != want {
			t.Errorf("%v: step %d", rtt, v[0].Step)
		}
	}
}

// What there is before anything is known: nothing of it may make the page fail.
func TestEmptyNode(t *testing.T) {
	t.Parallel()
	r := get(t, &fake{node: status.Node{Now: time.Now()}}, "/")
	if text := r.Body.String(); r.Code != http.StatusOK || strings.Contains(text, "%!") ||
		strings.Contains(text, "ZgotmplZ") {
		t.Errorf("%d\n%s", r.Code, text)
	}
	var n node
	if err := json.NewDecoder(get(t, &fake{}, "/page/node.json").Body).Decode(&n); err != nil || n.State != "not-ready" {
		t.Errorf("%v %+v", err, n)
	}
}

func BenchmarkPage(b *testing.B) {
	f := network(5000)
	for _, path := range []string{"/", "/page/node.json", "/page/peers.json"} {
		b.Run(strings.ReplaceAll(path, "/", "_"), func(b *testing.B) {
			h, size := Handler(f), 0
			b.ReportAllocs()
			for b.Loop() {
				w := httptest.NewRecorder()
				h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
				size = w.Body.Len()
			}
			b.ReportMetric(float64(size), "bytes")
		})
	}
}
