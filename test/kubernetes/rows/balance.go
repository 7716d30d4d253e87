package rows

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/overlayd/overlayd/test/kubernetes/cluster"
)

// balancer stands in for a load balancer outside the cluster: it gives a service of type LoadBalancer its addresses,
// and leads them to one node, by routes on the router as an announcer with BGP does. They are on no device: kube-proxy
// alone knows what to do with such a packet.
type balancer struct {
	s       *Suite
	service string
	ips     []netip.Addr
}

// balance gives a service the balancer's addresses with this number.
func (s *Suite) balance(ctx context.Context, service string, number int) (balancer, error) {
	b := balancer{s, service, []netip.Addr{
		netip.MustParseAddr(fmt.Sprintf("198.51.100.%d", number)),
		netip.MustParseAddr(fmt.Sprintf("2001:db8:51::%d", number)),
	}}
	_, err := s.K.Kubectl(ctx, "patch", "service", service, "--subresource=status", "--type=merge", fmt.Sprintf(
		`--patch={"status": {"loadBalancer": {"ingress": [{"ip": "%s"}, {"ip": "%s"}]}}}`, b.ips[0], b.ips[1]))
	return b, err
}

// everywhere leads the addresses to one node after the other, and calls f meanwhile.
func (b balancer) everywhere(ctx context.Context, f func(on *cluster.Node) error) error {
	var errs []error
	for _, n := range b.s.K.Nodes {
		err := b.lead(ctx, n)
		if err == nil {
			err = f(n)
		}
		errs = append(errs, wrap(err, "%v leads to %s", b.ips, n.Name))
	}
	return errors.Join(errs...)
}

// lead leads the addresses to a node, and returns when the service answers from outside. A connection begun before
// kube-proxy knows the address is lost.
func (b balancer) lead(ctx context.Context, to *cluster.Node) error {
	for i, via := range []netip.Addr{to.IP, to.IP6} {
		if _, err := b.s.K.Lab.Router.Run(ctx, "ip", "route", "replace", b.ips[i].String(), "via", via.String()); err != nil {
			return err
		}
		err := cluster.Poll(ctx, b.service, func() error {
			_, err := b.s.internet().run(ctx, "get", "-wait", "2s", "http://"+port(b.ips[i], 80)+"/")
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// balanced are the rows on services of type LoadBalancer.
func (s *Suite) balanced(ctx context.Context, mode string) error {
	clients, servers, err := s.workload(ctx)
	if err != nil {
		return err
	}
	row := func(name, service string, number int, f func(ctx context.Context, on *cluster.Node, ip netip.Addr) error) {
		s.run(ctx, mode+": "+name, func(ctx context.Context) (int, error) {
			b, err := s.balance(ctx, service, number)
			if err != nil {
				return none, err
			}
			return none, b.everywhere(ctx, func(on *cluster.Node) error {
				return errors.Join(f(ctx, on, b.ips[0]), f(ctx, on, b.ips[1]))
			})
		})
	}
	row("LoadBalancer's address from outside, hosts and a pod: TCP, UDP", "web-balanced", 10,
		func(ctx context.Context, _ *cluster.Node, ip netip.Addr) error {
			var errs []error
			for _, from := range append(s.hosts(), clients[0], s.internet()) {
				errs = append(errs, reachAll(ctx, from, port(ip, 80), tcp, servers, false),
					reachAll(ctx, from, port(ip, 81), udp, servers, false))
			}
			return errors.Join(errs...)
		})
	row("LoadBalancer's address from outside, externalTrafficPolicy Local: source kept", "web-balanced-local", 11,
		func(ctx context.Context, on *cluster.Node, ip netip.Addr) error {
			return reachAll(ctx, s.internet(), port(ip, 80), tcp, onNode(servers, on.Name), true)
		})
	return nil
}

// onNode are those of places that are on a node.
func onNode(places []place, node string) (out []place) {
	for _, p := range places {
		if p.node == node {
			out = append(out, p)
		}
	}
	return out
}
