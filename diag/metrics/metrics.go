// Package metrics tells Prometheus how a node is. Nearly all of it is read from the node's status at the moment of a scrape, so that
// nothing runs and nothing is counted twice between two scrapes; only durations are noted as they happen.
package metrics

import (
	"context"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/overlayd/overlayd/diag/status"
)

// answerWithin bounds how long a scrape waits for the daemon's loop: less than the shortest scrape timeout that is usual.
const answerWithin = 2 * time.Second

// The netlink operations that are told apart.
const (
	OpObserve   = "observe"   // reading the kernel's state
	OpAdjust    = "adjust"    // changing what a few peers make different
	OpReconcile = "reconcile" // comparing all, and changing what differs
)

// Instruments are what is measured as it happens. Methods are cheap and safe for concurrent use.
type Instruments struct {
	registry  *prometheus.Registry
	reconcile prometheus.Histogram
	firewall  prometheus.Histogram
	netlink   *prometheus.HistogramVec
}

// NewInstruments makes instruments that have measured nothing yet.
func NewInstruments() *Instruments {
	netlink := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "overlayd_netlink_duration_seconds", Help: "Duration of operations on kernel state, by operation: observe, adjust, reconcile.",
		Buckets: []float64{.0001, .0005, .001, .005, .01, .05, .1, .5, 1, 5},
	}, []string{"op"})
	i := &Instruments{
		registry: prometheus.NewRegistry(),
		reconcile: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "overlayd_reconcile_duration_seconds", Help: "Duration of the main loop's reconciliations.",
			Buckets: []float64{.0001, .0005, .001, .005, .01, .05, .1, .5, 1, 5},
		}),
		firewall: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "overlayd_firewall_run_duration_seconds", Help: "Duration of firewall reconciliations, including waiting for other programs' locks.",
			Buckets: []float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 30},
		}),
		netlink: netlink,
	}
	for _, op := range []string{OpObserve, OpAdjust, OpReconcile} {
		netlink.WithLabelValues(op) // there before it is needed, so that the first operation is an increase
	}
	i.registry.MustRegister(i.reconcile, i.firewall, netlink,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return i
}

// Reconcile notes a round of the loop.
func (i *Instruments) Reconcile(took time.Duration) { i.reconcile.Observe(took.Seconds()) }

// Firewall notes a look at the firewall rules, with what was done to them.
func (i *Instruments) Firewall(took time.Duration) { i.firewall.Observe(took.Seconds()) }

// Netlink notes an operation on the kernel's state: OpObserve, OpAdjust or OpReconcile.
func (i *Instruments) Netlink(op string, took time.Duration) {
	switch op {
	case OpObserve, OpAdjust, OpReconcile:
	default:
		op = others
	}
	i.netlink.WithLabelValues(op).Observe(took.Seconds())
}

// Handler serves the metrics. It calls ask for the node's status once for each scrape, with a context that ends after two seconds. If
// ask returns an error, the loop doesn't answer: then overlayd_loop_responsive is 0, of the status only Version is made use of, and what
// was measured is served all the same.
func Handler(i *Instruments, ask func(context.Context) (status.Node, error)) http.Handler {
	list := compile()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), answerWithin)
		defer cancel()
		s := scrape{metrics: list}
		var err error
		if s.node, err = ask(ctx); err != nil {
			s.node, s.silent = status.Node{Version: s.node.Version}, true
		}
		own := prometheus.NewRegistry() // of this scrape alone: two at a time don't see each other's answer
		own.MustRegister(s)
		promhttp.HandlerFor(prometheus.Gatherers{i.registry, own}, promhttp.HandlerOpts{
			ErrorHandling: promhttp.ContinueOnError, DisableCompression: true,
		}).ServeHTTP(w, r)
	})
}

// scrape is one answer.
type scrape struct {
	metrics []compiled
	node    status.Node
	silent  bool // the loop gave no answer
}

// Describe tells nothing: what Collect gives is checked there, and registering costs nothing.
func (scrape) Describe(chan<- *prometheus.Desc) {}

// Collect turns the status into metrics.
func (s scrape) Collect(out chan<- prometheus.Metric) {
	for _, m := range s.metrics {
		if s.silent && !m.always {
			continue
		}
		seen := map[string]bool{}
		m.read(reading{Node: &s.node, silent: s.silent}, func(value float64, labels ...string) {
			key := ""
			for i := range labels {
				labels[i] = clean(labels[i])
				key += labels[i] + "\x00" // which clean leaves in none
			}
			if seen[key] {
				return
			}
			seen[key] = true
			sample, err := prometheus.NewConstMetric(m.desc, m.kind, value, labels...)
			if err != nil {
				sample = prometheus.NewInvalidMetric(m.desc, err)
			}
			out <- sample
		})
	}
}

// compiled is a metric with what client_golang wants to know of it, made once.
type compiled struct {
	metric
	desc *prometheus.Desc
}

func compile() []compiled {
	out := []compiled{}
	for _, m := range table() {
		out = append(out, compiled{m, prometheus.NewDesc(m.name, m.help, m.labels, nil)})
	}
	return out
}
