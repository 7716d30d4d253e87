package metrics

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/overlayd/overlayd/diag/status"
)

var update = flag.Bool("update", false, "write the golden text and the table of the documentation as they are now")

// full is a node of which there is everything to tell.
func full() status.Node {
	at := time.Date(2026, 1, 1, 1, 2, 3, 500e6, time.UTC)
	return status.Node{
		Name:    "n1",
		ID:      "dc1cef41719e",
		Version: "v1.0.0",
		Started: at.Add(-time.Hour),
		Now:     at,
		Problems: []status.Problem{
			{Name: "kernel", Reason: "add route 10.244.9.0/24: no such device", Since: at, Fatal: true},
			{Name: "store", Reason: "connection refused", Since: at},
		},
		Restart: []string{"another subnet"},
		Lease:   status.Lease{Subnets: []string{"10.244.5.0/24"}, Expires: at.Add(20 * time.Hour), Held: true},
		Store: status.Store{
			Revision: 42, Newest: 45, Entries: 9, Error: "connection refused", Since: at,
			Requests: map[string]int64{"Range": 3, "Txn": 2, "LeaseKeepAlive": 7, "Watch": 1},
		},
		Network: status.Network{
			Networks: []string{"10.244.0.0/16", "fd00:10:244::/48"},
			Backend:  "vxlan",
			MTU:      1430,
			Pools: []status.Pool{
				{Network: "10.244.0.0/16", Subnets: 255, Leased: 9},
				{Network: "fd00:10:244::/48", Subnets: 65535, Leased: 9},
			},
		},
		Devices: []status.Device{
			{
				Name:     "overlay.1",
				MTU:      1450,
				VNI:      1,
				Offloads: map[string]bool{"tx-checksum-ip-generic": true, "rx-udp-gro-forwarding": false},
			},
		},
		Peers: status.PeerCounts{
			Total: 7, Tunnel: 4, Direct: 2, Unreachable: 1, Rejected: 3, Lingering: 1, RejectedBy: map[string]int{"overlap": 2},
		},
		Firewall: status.Firewall{Kind: "nftables", Checked: at.Add(-time.Minute), Runs: 30, Failed: 2},
		Reconcile: status.Reconcile{
			Last:     at.Add(-time.Second),
			Took:     time.Millisecond,
			Rounds:   90,
			Resynced: at.Add(-30 * time.Second),
			Failures: 1,
		},
		Entries: []status.KindCount{{Kind: "device", Count: 1}, {Kind: "route", Count: 6}, {Kind: "fdb", Count: 4}},
		Changes: status.Changes{Interface: 1, MTU: 2},
		Drift: []status.DriftKind{
			{Kind: "route", Count: 12, Last: "add route 10.244.7.0/24"},
			{Kind: "firewall: chain", Count: 1},
		},
		Probe: status.Probe{
			On: true, Targets: 6, Size: 1430, Round: 5 * time.Minute, Answer: 3, Lossy: 1, SmallOnly: 1, Silent: 1, NotPinged: 1,
			Sent: 1000, Lost: 70, NotAllowed: 1, MedianRTT: 350 * time.Microsecond,
			Worst: []status.Peer{
				{
					Name: "n7",
					Probe: &status.PeerProbe{
						Address: "10.244.7.0",
						Verdict: status.Silent,
						Small:   status.Pings{Sent: 8, Lost: 8},
						Full:    status.Pings{Sent: 8, Lost: 8},
					},
				},
				{Name: "n8", Probe: &status.PeerProbe{
					Address: "10.244.8.0",
					Verdict: status.SmallOnly,
					Small: status.Pings{
						Sent: 8,
						RTT:  300 * time.Microsecond,
					},
					Full: status.Pings{Sent: 4, Lost: 3, RTT: 2 * time.Millisecond},
				}},
				{Name: "n9", Probe: &status.PeerProbe{Address: "10.244.9.0"}},
				{Name: "n10"},
			},
		},
	}
}

// measured are instruments that have measured something of everything.
func measured() *Instruments {
	i := NewInstruments()
	i.Reconcile(3 * time.Millisecond)
	i.Firewall(40 * time.Millisecond)
	i.Netlink(OpObserve, 2*time.Millisecond)
	i.Netlink(OpAdjust, 200*time.Microsecond)
	i.Netlink("what nobody knows", time.Second)
	return i
}

func answering(n status.Node) func(context.Context) (status.Node, error) {
	return func(context.Context) (status.Node, error) { return n, nil }
}

// get scrapes as Prometheus does, and returns what is overlayd's own, then the rest.
func get(t *testing.T, h http.Handler) (own, rest string) {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil)
	r.Header.Set("Accept-Encoding", "gzip")
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if w.Code != http.StatusOK || !strings.HasPrefix(w.Header().Get("Content-Type"), "text/plain; version=0.0.4") ||
		w.Header().Get("Content-Encoding") != "" {
		t.Fatalf("status %d, headers %v, body %.300s", w.Code, w.Header(), w.Body)
	}
	for line := range strings.Lines(w.Body.String()) {
		if strings.Contains(line, "overlayd_") {
			own += line
		} else {
			rest += line
		}
	}
	return strings.ReplaceAll(own, runtime.Version(), "GOVERSION"), rest
}

func TestText(t *testing.T) {
	t.Parallel()
	silent := func(context.Context) (status.Node, error) {
		n := full()
		return n, errors.New("the daemon's main loop does not answer")
	}
	for name, h := range map[string]http.Handler{
		"full":   Handler(measured(), answering(full())),
		"empty":  Handler(NewInstruments(), answering(status.Node{})),
		"silent": Handler(measured(), silent),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			own, rest := get(t, h)
			golden(t, filepath.Join("testdata", name+".txt"), own)
			for _, want := range []string{"go_goroutines ", "process_resident_memory_bytes ", "process_start_time_seconds "} {
				if !strings.Contains(rest, "\n"+want) {
					t.Errorf("%s is missing", want)
				}
			}
			promtool(t, own+rest, "check", "metrics")
		})
	}
}

func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if diff := cmp.Diff(string(want), got); err != nil || diff != "" {
		t.Errorf("%v; %s is not what there is (-update): %s", err, file, diff)
	}
}

// promtool runs the tool that Prometheus comes with: it knows best what it likes.
func promtool(t *testing.T, stdin string, args ...string) {
	t.Helper()
	path, err := exec.LookPath("promtool")
	if err != nil {
		t.Fatalf("promtool is missing: install it (Debian: apt-get install prometheus): %v", err)
	}
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	} else if slices.Equal(args, []string{"check", "metrics"}) && len(bytes.TrimSpace(out)) > 0 {
		t.Errorf("promtool check metrics: %s", out)
	}
}

// family is a metric as a scrape shows it.
type family struct {
	kind, help string
	labels     []string
	samples    []string // as they are written
}

// families reads a scrape.
func families(t *testing.T, text string) map[string]family {
	t.Helper()
	sample := regexp.MustCompile(`^([a-z0-9_]+)(?:\{(.*)\})? \S+$`)
	label := regexp.MustCompile(`([a-zA-Z_]+)="(?:[^"\\]|\\.)*"`)
	out := map[string]family{}
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if rest, ok := strings.CutPrefix(line, "# HELP "); ok {
			name, help, _ := strings.Cut(rest, " ")
			f := out[name]
			f.help = help
			out[name] = f
			continue
		}
		if rest, ok := strings.CutPrefix(line, "# TYPE "); ok {
			name, kind, _ := strings.Cut(rest, " ")
			f := out[name]
			f.kind = kind
			out[name] = f
			continue
		}
		m := sample.FindStringSubmatch(line)
		if m == nil {
			t.Fatalf("not a sample: %q", line)
		}
		name := base(m[1], out)
		f := out[name]
		f.samples = append(f.samples, line)
		for _, l := range label.FindAllStringSubmatch(m[2], -1) {
			if l[1] != "le" && !slices.Contains(f.labels, l[1]) {
				f.labels = append(f.labels, l[1])
			}
		}
		out[name] = f
	}
	return out
}

// base is the metric that a series belongs to: histograms and summaries have several.
func base(series string, known map[string]family) string {
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		if name, ok := strings.CutSuffix(series, suffix); ok {
			if f, there := known[name]; there && (f.kind == "histogram" || f.kind == "summary") {
				return name
			}
		}
	}
	return series
}

// all are the metrics that there can be, as the full example shows them.
func all(t *testing.T) (own, rest map[string]family) {
	t.Helper()
	a, b := get(t, Handler(measured(), answering(full())))
	return families(t, a), families(t, b)
}

func TestFullIsFull(t *testing.T) {
	t.Parallel()
	own, _ := all(t)
	for _, m := range table() {
		f, ok := own[m.name]
		want := slices.Sorted(slices.Values(m.labels))
		if !ok || len(f.samples) == 0 || !slices.Equal(slices.Sorted(slices.Values(f.labels)), want) {
			t.Errorf("%s: in the table with labels %v, in a full scrape %+v", m.name, m.labels, f)
		}
		if m.kind == counter != strings.HasSuffix(m.name, "_total") || !strings.HasPrefix(m.name, "overlayd_") {
			t.Errorf("%s: counters and no others end in _total", m.name)
		}
	}
}

// Whatever another node calls itself, a scrape stays one that can be read, and small.
func TestHostileNames(t *testing.T) {
	t.Parallel()
	n := full()
	n.Probe.Worst = nil
	for i, name := range []string{
		strings.Repeat("a", 1<<20), strings.Repeat("é", 5000), "a" + strings.Repeat("\xff", 200),
		"x\"} 1\noverlayd_ready 1\n", "\x1b[31mred\x00", "\u202eevil",
		`back\slash`, "", "", strings.Repeat("\xf0\x9f", 99),
	} {
		address := fmt.Sprintf("10.244.%d.0", i)
		if name == "" {
			address = "10.244.99.0" // twice the same
		}
		n.Probe.Worst = append(
			n.Probe.Worst,
			status.Peer{Name: name, Probe: &status.PeerProbe{Address: address, Small: status.Pings{Sent: 8, RTT: 1}}},
		)
	}
	for i := range 100 {
		n.Probe.Worst = append(
			n.Probe.Worst,
			status.Peer{Name: fmt.Sprint("n", i), Probe: &status.PeerProbe{Address: "x", Small: status.Pings{Sent: 8}}},
		)
	}
	n.Store.Requests = map[string]int64{}
	for i := range 1000 {
		n.Store.Requests[fmt.Sprint("m", i)] = 1
	}
	text, rest := get(t, Handler(NewInstruments(), answering(n)))
	promtool(t, text+rest, "check", "metrics")
	fs := families(t, text)
	if got := len(fs["overlayd_probe_peer_loss_ratio"].samples); got != status.WorstPeers-1 {
		t.Errorf("%d peers, expected the %d worst but for the one that is there twice", got, status.WorstPeers)
	}
	if got := fs["overlayd_ready"].samples; !slices.Equal(got, []string{"overlayd_ready 0"}) {
		t.Errorf("ready: %q", got)
	}
	requests := fs["overlayd_store_requests_total"].samples
	if len(requests) != mostValues+1 ||
		!slices.Contains(requests, fmt.Sprintf(`overlayd_store_requests_total{method="other"} %d`, 1000-mostValues)) {
		t.Errorf("requests: %q", requests)
	}
	for line := range strings.Lines(text) {
		if len(line) > 400 || !utf8.ValidString(line) || strings.ContainsAny(line, "\x00\x1b\u202e") {
			t.Errorf("%.500q", line)
		}
	}
}

func FuzzClean(f *testing.F) {
	f.Add("n1")
	f.Add("a\xff\x00" + strings.Repeat("é", 40))
	f.Add(strings.Repeat("\xf0\x9f\x98", 30))
	f.Fuzz(func(t *testing.T, s string) {
		got := clean(s)
		if len(got) > longestLabel || !utf8.ValidString(got) || strings.ContainsAny(got, "\n\x00") || clean(got) != got {
			t.Errorf("%q becomes %q", s, got)
		}
		if s == "n1" && got != s {
			t.Errorf("%q becomes %q", s, got)
		}
	})
}

// A loop that hangs costs a scrape two seconds and no more; a client that goes away, nothing.
func TestAskIsGivenUp(t *testing.T) {
	t.Parallel()
	hanging := func(ctx context.Context) (status.Node, error) {
		<-ctx.Done()
		return status.Node{Version: "v1.0.0"}, context.Cause(ctx)
	}
	began := time.Now()
	own, _ := get(t, Handler(NewInstruments(), hanging))
	if took := time.Since(
		began,
	); took < answerWithin || !strings.Contains(own, "\noverlayd_loop_responsive 0\n") ||
		strings.Contains(own, "overlayd_ready") {
		t.Errorf("after %v:\n%s", took, own)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	w := httptest.NewRecorder()
	var why error
	Handler(NewInstruments(), func(ctx context.Context) (status.Node, error) {
		n, err := hanging(ctx)
		why = err
		return n, err
	}).ServeHTTP(w, httptest.NewRequestWithContext(ctx, http.MethodGet, "/metrics", nil))
	if w.Code != http.StatusOK || !errors.Is(why, context.Canceled) { // not the end of the two seconds
		t.Errorf("status %d, given up for: %v", w.Code, why)
	}
}

// Scrapes and measurements don't disturb each other. This is for the race detector; the count is what it ends with.
func TestAtTheSameTime(t *testing.T) {
	t.Parallel()
	i := NewInstruments()
	h := Handler(i, answering(full()))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 20 {
				i.Reconcile(time.Millisecond)
				i.Netlink(OpObserve, time.Millisecond)
				i.Firewall(time.Millisecond)
				get(t, h)
			}
		})
	}
	wg.Wait()
	own, _ := get(t, h)
	for _, want := range []string{
		"overlayd_reconcile_duration_seconds_count 80\n",
		"overlayd_firewall_run_duration_seconds_count 80\n", `overlayd_netlink_duration_seconds_count{op="observe"} 80` +
			"\n",
	} {
		if !strings.Contains(own, want) {
			t.Errorf("%s is missing in\n%s", want, own)
		}
	}
}

// BenchmarkScrape is a scrape of a node with as much to tell as there can be: the number of peers makes no difference
// by then.
func BenchmarkScrape(b *testing.B) {
	n := full()
	n.Probe.Worst = nil
	for i := range status.WorstPeers {
		n.Probe.Worst = append(n.Probe.Worst, status.Peer{Name: fmt.Sprintf("node-%04d", i), Probe: &status.PeerProbe{
			Address: fmt.Sprintf(
				"10.244.%d.0",
				i,
			),
			Small: status.Pings{Sent: 8, RTT: time.Millisecond},
			Full:  status.Pings{Sent: 8, RTT: time.Millisecond},
		}})
	}
	h := Handler(measured(), answering(n))
	r := httptest.NewRequestWithContext(b.Context(), http.MethodGet, "/metrics", nil)
	var w *httptest.ResponseRecorder
	b.ReportAllocs()
	for b.Loop() {
		w = httptest.NewRecorder()
		h.ServeHTTP(w, r)
	}
	b.ReportMetric(float64(w.Body.Len()), "bytes")
}

func BenchmarkNetlink(b *testing.B) {
	i := NewInstruments()
	b.ReportAllocs()
	for b.Loop() {
		i.Netlink(OpAdjust, time.Millisecond)
	}
}
