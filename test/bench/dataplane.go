package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

// The kinds of traffic, as the rows call them.
const (
	oneStream   = "one stream"
	fourStreams = "four streams"
	oneRequest  = "request/response"
	oneConnect  = "connect/request/response"
)

// One sample takes some 100 ms of iperf3, or some 20 ms of requests. Many short ones in turn say more than a few long ones: what
// disturbs a machine comes and goes within seconds, and so meets all set-ups alike. The buffers have a size of their own because
// the one that the kernel finds for itself differs from connection to connection, and throughput on one core with it.
const (
	streamBytes  = "100M"
	streamBuffer = "256K" // what any process may have
	requestTimes = 500
	connectTimes = 100
)

// dataplane measures the way from pod to pod, beside the same way without overlayd. All of it is on one core, both ends and the nodes
// between them, so that each figure says what a packet costs. Where the kernel puts two ends that may move decides more about
// throughput than anything between them does.
func dataplane(ctx context.Context, e *Env) (err error) {
	labs := pathLabs(e)
	defer func() { err = errors.Join(err, lowerPaths(ctx, labs)) }()
	paths, err := raisePaths(ctx, labs)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute) // on a path that breaks the ends would wait for ever
	defer cancel()
	ends, stop, err := startEnds(ctx, paths)
	defer stop()
	if err != nil {
		return err
	}
	samples := pathSamples{}
	began, budget := time.Now(), pick(e, 50*time.Second, 0)
	for first := true; first || time.Since(began) < budget; first = false {
		if err := samples.round(ctx, ends); err != nil {
			return err
		}
	}
	e.Add(samples.rows()...)
	return nil
}

// traffic is one of the things that are measured on every path.
type traffic struct {
	name   string
	unit   Unit
	times  int // samples in a round
	sample func(ctx context.Context, p *pathEnds) (float64, error)
	bound  Bound // of what should be like its base
	ruled  Bound // the same, with the routing rule for what pods send to other nodes
}

// traffics has the bounds. Two equal hand-made set-ups were seen to differ by 1 % at most, in runs of 45 s on a machine that had other
// things to do. A routing rule, of whatever kind, makes the kernel look up all routes the long way: added to a hand-made set-up it was
// seen to cost 8 % for each request, 10 % for each connection and 4 to 7 % of a stream. It is what pods pay for being seen with their own
// addresses by other nodes.
func traffics() []traffic {
	stream := func(n int) func(context.Context, *pathEnds) (float64, error) {
		return func(ctx context.Context, p *pathEnds) (float64, error) { return p.stream(ctx, n) }
	}
	exchanges := func(x exchange, times int) func(context.Context, *pathEnds) (float64, error) {
		return func(_ context.Context, p *pathEnds) (float64, error) { return p.exchange(x, times) }
	}
	return []traffic{
		{oneStream, Gbit, 2, stream(1), RatioAtLeast(0.95), RatioAtLeast(0.88)},
		{fourStreams, Gbit, 2, stream(4), RatioAtLeast(0.95), RatioAtLeast(0.88)},
		{oneRequest, PerEvent, 2, exchanges(oneConnection, requestTimes), RatioAtMost(1.05), RatioAtMost(1.13)},
		{oneConnect, PerEvent, 2, exchanges(newConnection, connectTimes), RatioAtMost(1.05), RatioAtMost(1.15)},
	}
}

// onPath says what a sample is of.
type onPath struct{ traffic, path string }

type pathSamples map[onPath][]float64

// round takes samples of everything on every path. The order is another one each time, so that nothing else that comes back at
// regular times always meets the same one.
func (s pathSamples) round(ctx context.Context, ends []*pathEnds) error {
	for _, t := range traffics() {
		for range t.times {
			for _, i := range rand.Perm(len(ends)) {
				v, err := t.sample(ctx, ends[i])
				if err != nil {
					return fmt.Errorf("%s: %s: %w", ends[i].name, t.name, err)
				}
				at := onPath{t.name, ends[i].name}
				s[at] = append(s[at], v)
			}
		}
	}
	return nil
}

// rows has for every traffic first what should be alike. overlayd's VXLAN is held against what a person would make with the same
// firewall: none, or the one rule without which pods don't reach the world. With that rule the kernel tracks all connections, which
// costs more than anything else on the way; what all of it costs together, the third row shows.
func (s pathSamples) rows() []Row {
	var rows []Row
	for _, t := range traffics() {
		row := func(path, base string, b Bound) {
			r := Row{
				Group: "data plane", Name: t.name + ": " + path, Unit: t.unit, Bound: b,
				Ours: s[onPath{t.name, path}], Base: s[onPath{t.name, base}], BaseName: base,
			}
			if b != (Bound{}) {
				r.Note = fmt.Sprintf("on one core; %d samples each; half of them within ±%.0f %% (ours) and ±%.0f %% (beside)",
					len(r.Ours), 100*halfSpread(r.Ours), 100*halfSpread(r.Base))
			}
			rows = append(rows, r)
		}
		row(oursDirect, handMade, t.bound)
		row(oursNoRules, handMade, t.ruled)
		row(oursVXLAN, handMadeMasq, t.ruled)
		row(oursVXLAN, handMade, Bound{})
		for _, path := range []string{handMade, handMadeMasq, oursDirect, oursHostGW} {
			row(path, rawUnderlay, Bound{})
		}
	}
	return rows
}

// halfSpread is how far from the median, as a share of it, the middle half of the samples goes.
func halfSpread(samples []float64) float64 {
	return (Quantile(samples, 0.75) - Quantile(samples, 0.25)) / 2 / Median(samples)
}
