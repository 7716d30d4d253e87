package lab

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/overlayd/overlayd/addr"
)

const (
	// Settle is how long, from the start of a check, what does not work yet is usually tried again: a node may be ready a
	// moment before it knows its last peer.
	Settle = 10 * time.Second
	// parallel bounds the cells that are checked at once.
	parallel = 16

	pingWait   = time.Second           // for one reply
	retryPause = 50 * time.Millisecond // between two tries
)

// Check runs the whole matrix; what does not work is tried again until it is settled. A cell that fails is in the
// report; an error means that there is none.
func (l *Lab) Check(ctx context.Context, settle time.Duration) (Report, error) {
	endpoints, err := l.Endpoints()
	if err != nil {
		return Report{}, err
	}
	leases, err := l.Leases()
	if err != nil {
		return Report{}, err
	}
	stop, err := l.serve(ctx, append(endpoints, l.internetEndpoint()))
	if err != nil {
		return Report{}, err
	}
	defer stop()
	settled, cancel := context.WithTimeout(ctx, settle)
	defer cancel()
	c := checker{families: l.topology.Options.Stack.Families(), settled: settled}
	paths, err := c.paths(ctx, l.topology, endpoints)
	if err != nil {
		return Report{}, err
	}
	cells := c.cells(ctx, endpoints, l.internetEndpoint())
	if ctx.Err() != nil {
		return Report{}, fmt.Errorf("check: %w", context.Cause(ctx))
	}
	return newReport(l.topology, leases, append(cells, paths...)), nil
}

// Leases lists what every node got.
func (l *Lab) Leases() ([]Lease, error) {
	var out []Lease
	for _, n := range l.nodes {
		lease, err := n.Lease()
		if err != nil {
			return nil, err
		}
		out = append(out, lease)
	}
	return out, nil
}

// serve starts a TCP server on every address of every endpoint.
func (l *Lab) serve(ctx context.Context, endpoints []Endpoint) (stop func(), err error) {
	var servers []*http.Server
	stop = func() {
		for _, s := range servers {
			_ = s.Close()
		}
	}
	for _, e := range endpoints {
		for _, f := range l.topology.Options.Stack.Families() {
			s, err := serveTCP(ctx, e.Machine, e.Addr.Get(f))
			if err != nil {
				stop()
				return nil, err
			}
			servers = append(servers, s)
		}
	}
	return stop, nil
}

// checker runs checks, some at a time.
type checker struct {
	families []addr.Family
	settled  context.Context // while it lasts, what fails is tried again
}

// route is the way from one endpoint to another in one family.
type route struct {
	from, to Endpoint
	family   addr.Family
}

func (r route) outcome(check CheckName, err error) Outcome {
	o := Outcome{
		Check: check, From: r.from.Name, To: r.to.Name, Family: r.family,
		FromAddr: r.from.Addr.Get(r.family), ToAddr: r.to.Addr.Get(r.family),
	}
	if err != nil {
		o.Err = strings.ReplaceAll(err.Error(), "\n", "; ") // joined errors stand on lines of their own
	}
	return o
}

// each runs f for every route, some at a time, and returns the outcomes in the routes' order.
func (c checker) each(ctx context.Context, routes []route, f func(context.Context, route) []Outcome) []Outcome {
	results := make([][]Outcome, len(routes))
	var g errgroup.Group
	g.SetLimit(parallel)
	for i, r := range routes {
		g.Go(func() error {
			if ctx.Err() == nil {
				results[i] = f(ctx, r)
			}
			return nil
		})
	}
	_ = g.Wait() // f reports failures in its outcomes
	var out []Outcome
	for _, r := range results {
		out = append(out, r...)
	}
	return out
}

// again calls f until it succeeds or the time to settle is over, and twice at least.
func (c checker) again(ctx context.Context, f func() error) error {
	for try := 1; ; try++ {
		err := f()
		if err == nil || ctx.Err() != nil || try > 1 && c.settled.Err() != nil {
			return err
		}
		time.Sleep(retryPause)
	}
}

// cells checks the matrix: pod to pod, node to pod, pod to node, and pod to the internet.
func (c checker) cells(ctx context.Context, endpoints []Endpoint, internet Endpoint) []Outcome {
	var routes []route
	for _, f := range c.families {
		for _, from := range endpoints {
			for _, to := range endpoints {
				if from.Name != to.Name && (from.Kind == KindPod || to.Kind == KindPod) {
					routes = append(routes, route{from, to, f})
				}
			}
			if from.Kind == KindPod {
				routes = append(routes, route{from, internet, f})
			}
		}
	}
	return c.each(ctx, routes, c.cell)
}

func (c checker) cell(ctx context.Context, r route) []Outcome {
	if r.to.Kind == KindInternet {
		return []Outcome{r.outcome(CheckInternet, c.again(ctx, func() error { return r.reachInternet(ctx) }))}
	}
	if err := c.again(ctx, func() error { return r.ping(ctx, 0) }); err != nil {
		return []Outcome{r.outcome(CheckPing, err)} // the others would fail, too, and take their time
	}
	return []Outcome{
		r.outcome(CheckPing, nil),
		r.outcome(CheckTCP, r.transfer(ctx)),
		r.outcome(CheckMTU, c.again(ctx, func() error { return r.ping(ctx, r.from.MTU) })),
	}
}

// ping sends one echo request: a small one, or one that fills the MTU and must not be fragmented.
func (r route) ping(ctx context.Context, mtu int) error {
	p := Ping{To: r.to.Addr.Get(r.family), MTU: mtu, DF: mtu > 0, Wait: pingWait}
	if _, err := r.from.Ping(ctx, p); err != nil {
		if mtu > 0 {
			return fmt.Errorf("packet of %d bytes with DF: %w", mtu, err)
		}
		return err
	}
	return nil
}

// transfer sends 1 MiB over TCP, with no NAT seen from either end.
func (r route) transfer(ctx context.Context) error {
	t, err := sendTCP(ctx, r.from.Machine, r.to.Addr.Get(r.family))
	own := r.from.Addr.Get(r.family)
	return errors.Join(err,
		unless(err != nil || t.Client == t.local, "the server saw the client as %s instead of %s", t.Client, t.local),
		unless(err != nil || r.from.Kind != KindPod || t.local.Addr() == own, "the pod sends from %s instead of %s",
			t.local.Addr(), own))
}

// reachInternet does the same to the internet host, which has to see the node's address.
func (r route) reachInternet(ctx context.Context) error {
	t, err := sendTCP(ctx, r.from.Machine, r.to.Addr.Get(r.family))
	node := r.from.Node.Addr(r.family)
	return errors.Join(err,
		unless(err != nil || t.Client.Addr() == node, "the server saw the client as %s instead of %s", t.Client.Addr(), node))
}
