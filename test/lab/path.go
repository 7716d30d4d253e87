package lab

import (
	"context"
	"fmt"
)

// paths finds out how packets cross the underlay between every two nodes, and whether that is what the options ask for.
func (c checker) paths(ctx context.Context, t Topology, endpoints []Endpoint) ([]Outcome, error) {
	taps := map[string]*tap{}
	defer func() {
		for _, t := range taps {
			t.close()
		}
	}()
	for _, e := range endpoints {
		if e.Kind != KindNode {
			continue
		}
		tap, err := openTap(e.Machine)
		if err != nil {
			return nil, err
		}
		taps[e.Name] = tap
	}
	return c.each(ctx, c.pathRoutes(endpoints), func(ctx context.Context, r route) []Outcome {
		return []Outcome{c.path(ctx, r, taps[r.from.Node.Name], t.ExpectedPath(r.from.Node.spec, r.to.Node.spec))}
	}), nil
}

// pathRoutes are the ways between the first pods of each two nodes, and between such a pod and the other node.
func (c checker) pathRoutes(endpoints []Endpoint) []route {
	var ends []Endpoint
	for i, e := range endpoints {
		if e.Kind == KindNode || endpoints[i-1].Kind == KindNode {
			ends = append(ends, e)
		}
	}
	var routes []route
	for _, f := range c.families {
		for _, from := range ends {
			for _, to := range ends {
				if from.Node != to.Node && (from.Kind == KindPod || to.Kind == KindPod) {
					routes = append(routes, route{from, to, f})
				}
			}
		}
	}
	return routes
}

func (c checker) path(ctx context.Context, r route, tap *tap, want Path) Outcome {
	var seen sighting
	err := c.again(ctx, func() error {
		p := Ping{To: r.to.Addr.Get(r.family), Wait: pingWait, token: newToken()}
		_, err := r.from.Ping(ctx, p)
		if err != nil {
			seen = tap.sighting(p.token)
			return fmt.Errorf("%w (on the wire: %s)", err, seen)
		}
		seen = tap.wait(ctx, p.token)
		return unless(seen == sighting{want, want}, "went %s instead of %s", seen, want)
	})
	o := r.outcome(CheckPath, err)
	o.Path = seen.String()
	return o
}
