// Package metrics exports a node's status to Prometheus. Nearly all of it is read from the status when scraped, so that
// nothing runs between two scrapes; only durations are recorded as they happen.
package metrics

import (
	"context"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/overlayd/overlayd/diag/status"
)

// answerWithin bounds how long a scrape waits for the daemon's loop. It is shorter than any usual scrape timeout.
const answerWithin = 2 * time.Second

// The netlink operations, for the label op.
const (
	OpObserve   = "observe"   // reading the kernel's state
	OpAdjust    = "adjust"    // applying the changes of a few peers
	OpReconcile = "reconcile" // comparing everything, and applying the differences
)

// Instruments record durations as they happen. Methods are cheap and safe for concurrent use.
type Instruments struct {
	registry  *prometheus.Registry
	reconcile prometheus.Histogram
	firewall  prometheus.Histogram
	netlink   *prometheus.HistogramVec
}

// NewInstruments returns empty instruments.
func NewInstruments() *Instruments {
	netlink := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "overlayd_netlink_duration_seconds",
		Help:    "Duration of operations on kernel state, by operation: observe, adjust, reconcile.",
		Buckets: []float64{.0001, .0005, .001, .005, .01, .05, .1, .5, 1, 5},
	}, []string{"op"})
	i := &Instruments{
		registry: prometheus.NewRegistry(),
		reconcile: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "overlayd_reconcile_duration_seconds",
			Help:    "Duration of the main loop's reconciliations.",
			Buckets: []float64{.0001, .0005, .001, .005, .01, .05, .1, .5, 1, 5},
		}),
		firewall: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "overlayd_firewall_run_duration_seconds",
			Help:    "Duration of firewall reconciliations, including waiting for other programs' locks.",
			Buckets: []float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 30},
		}),
		netlink: netlink,
	}
	for _, op := range []string{OpObserve, OpAdjust, OpReconcile} {
		netlink.WithLabelValues(op) // exported from the start, so that increase() counts the first operation
	}
	i.registry.MustRegister(i.reconcile, i.firewall, netlink,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return i
}

// Reconcile records a round of the loop.
func (i *Instruments) Reconcile(took time.Duration) { i.reconcile.Observe(took.Seconds()) }

// Firewall records a reconciliation of the firewall rules.
func (i *Instruments) Firewall(took time.Duration) { i.firewall.Observe(took.Seconds()) }

// Netlink records an operation on the kernel's state: OpObserve, OpAdjust or OpReconcile.
func (i *Instruments) Netlink(op string, took time.Duration) {
	switch op {
	case OpObserve, OpAdjust, OpReconcile:
	default:
		op = others
	}
	i.netlink.WithLabelValues(op).Observe(took.Seconds())
}

// Handler serves the metrics. It calls ask for the node's status once per scrape, with a context that ends after two
// seconds. If ask returns an error, the loop does not answer: overlayd_loop_responsive is 0, only Version of the status
// is used, and the histograms are served as usual.
func Handler(i *Instruments, ask func(context.Context) (status.Node, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), answerWithin)
		defer cancel()
		node, err := ask(ctx)
		s := scrape{metrics: table(), reading: reading{Node: &node}}
		if err != nil {
			s.metrics, s.reading = aliveMetrics(), reading{Node: &status.Node{Version: node.Version}, silent: true}
		}
		own := prometheus.NewRegistry() // one per scrape: concurrent scrapes do not mix
		own.MustRegister(s)
		promhttp.HandlerFor(prometheus.Gatherers{i.registry, own}, promhttp.HandlerOpts{
			ErrorHandling: promhttp.ContinueOnError, DisableCompression: true,
		}).ServeHTTP(w, r)
	})
}

// scrape is one answer.
type scrape struct {
	metrics []metric
	reading reading
}

// Describe sends nothing, so that registering is cheap; the registry checks what Collect sends.
func (scrape) Describe(chan<- *prometheus.Desc) {}

// Collect turns the status into metrics.
func (s scrape) Collect(out chan<- prometheus.Metric) {
	for _, m := range s.metrics {
		desc := prometheus.NewDesc(m.name, m.help, m.labels, nil)
		seen := map[string]bool{}
		m.read(s.reading, func(value float64, labels ...string) {
			for i := range labels {
				labels[i] = clean(labels[i])
			}
			key := strings.Join(labels, "\x00") // clean leaves no NUL
			if seen[key] {
				return
			}
			seen[key] = true
			sample, err := prometheus.NewConstMetric(desc, m.kind, value, labels...)
			if err != nil {
				sample = prometheus.NewInvalidMetric(desc, err)
			}
			out <- sample
		})
	}
}
