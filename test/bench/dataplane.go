package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

// One sample takes some 100 ms of iperf3, or some 20 ms of requests. Many short ones in turn say more than a few long
// ones: what disturbs a machine comes and goes within seconds, and so meets all set-ups alike. The buffers have a size
// of their own because the one that the kernel finds for itself differs from connection to connection, and throughput
// on one core with it.
const (
	streamBytes  = "100M"
	streamBuffer = "256K" // what any process may have
	requestTimes = 500
	connectTimes = 100
	samplesEach  = 2 // in a round
)

// dataplane measures the way from pod to pod, beside the same way without overlayd. All of it is on one core, both ends
// and the nodes between them, so that each figure says what a packet costs. Where the kernel puts two ends that may
// move decides more about throughput than anything between them does.
func dataplane(ctx context.Context, e *Env) (err error) {
	labs := pathLabs(e)
	defer func() { err = errors.Join(err, lowerPaths(ctx, labs)) }()
	paths, err := raisePaths(ctx, labs)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	for _, p := range paths {
		stop, err := p.serve(ctx)
		defer stop()
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	samples := pathSamples{}
	began, budget := time.Now(), pick(e, 50*time.Second, 0)
	for first := true; first || time.Since(began) < budget; first = false {
		if err := samples.round(ctx, paths); err != nil {
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
	sample func(ctx context.Context, p path) (float64, error)
	bound  Bound // of what should be like its base
	ruled  Bound // the same, with the routing rule for what pods send to other nodes
}

// traffics has the bounds. Two equal hand-made set-ups were seen to differ by 1 % at most, in runs of 45 s on a machine
// that had other things to do. A routing rule, of whatever kind, makes the kernel look up all routes the long way:
// added to a hand-made set-up it was seen to cost 8 % for each request, 10 % for each connection and 4 to 7 % of a
// stream. It is what pods pay for being seen with their own addresses by other nodes.
func traffics() []traffic {
	stream := func(n int) func(context.Context, path) (float64, error) {
		return func(ctx context.Context, p path) (float64, error) { return p.stream(ctx, n) }
	}
	requests := func(_ context.Context, p path) (float64, error) { return p.requests() }
	connections := func(_ context.Context, p path) (float64, error) { return p.connections() }
	return []traffic{
		{"one stream", Gbit, stream(1), Bound{"≥", 0.95, true}, Bound{"≥", 0.88, true}},
		{"four streams", Gbit, stream(4), Bound{"≥", 0.95, true}, Bound{"≥", 0.88, true}},
		{"request/response", PerEvent, requests, Bound{"≤", 1.05, true}, Bound{"≤", 1.13, true}},
		{"connect/request/response", PerEvent, connections, Bound{"≤", 1.05, true}, Bound{"≤", 1.15, true}},
	}
}

// pathSamples are the samples of each traffic on each path.
type pathSamples map[[2]string][]float64

// round takes samples of everything on every path. The order is another one each time, so that nothing else that comes
// back at regular times always meets the same one.
func (s pathSamples) round(ctx context.Context, paths []path) error {
	for _, t := range traffics() {
		for range samplesEach {
			for _, i := range rand.Perm(len(paths)) {
				v, err := t.sample(ctx, paths[i])
				if err != nil {
					return fmt.Errorf("%s: %s: %w", paths[i].name, t.name, err)
				}
				at := [2]string{t.name, paths[i].name}
				s[at] = append(s[at], v)
			}
		}
	}
	return nil
}

// rows has for every traffic first what should be alike. overlayd's VXLAN is held against what a person would make with
// the same firewall: none, or the one rule without which pods don't reach external addresses. With that rule the kernel
// tracks all connections, which costs more than anything else on the way; what all of it costs together, the fourth row
// shows.
func (s pathSamples) rows() []Row {
	var rows []Row
	for _, t := range traffics() {
		for _, x := range []struct {
			path, base string
			bound      Bound
		}{
			{oursDirect, handMade, t.bound},
			{oursNoRules, handMade, t.ruled},
			{oursVXLAN, handMadeMasq, t.ruled},
			{oursVXLAN, handMade, Bound{}},
			{handMade, rawUnderlay, Bound{}},
			{oursHostGW, rawUnderlay, Bound{}},
		} {
			r := row("data plane", t.name+": "+x.path, t.unit, s[[2]string{t.name, x.path}]...)
			rows = append(rows, r.beside(x.base, s[[2]string{t.name, x.base}]).judgedBy(x.bound))
		}
	}
	return rows
}
