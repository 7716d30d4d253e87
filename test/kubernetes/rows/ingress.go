package rows

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/overlayd/overlayd/test/kubernetes/cluster"
)

// Ports of the ingress controller on the nodes.
const (
	ingressHTTP  = 30480
	ingressHTTPS = 30443
)

// ingress are the rows on an ingress controller: rules of hosts and paths, over HTTP and TLS.
func (s *Suite) ingress(ctx context.Context) error {
	const (
		byNode     = "ingress through every node's NodePort: hosts, paths, TLS; source kept"
		byBalancer = "ingress through a load balancer's address: hosts, paths, TLS; source kept"
	)
	if !s.Ingress || !s.wants(byNode, byBalancer) {
		return nil
	}
	clients, servers, err := s.workload(ctx)
	if err != nil {
		return err
	}
	ca, cert, key, err := s.K.Certificate("ingress", "one.test", "two.test")
	if err != nil {
		return err
	}
	if _, err := s.K.Kubectl(ctx, "create", "secret", "tls", "ingress", "--cert="+cert, "--key="+key); err != nil {
		return err
	}
	if err := s.apply(ctx, "ingress.yaml"); err != nil {
		return err
	}
	if _, err := s.pods(ctx, "ingress", len(s.K.Nodes)); err != nil {
		return err
	}
	rules := map[string][]place{
		"://one.test/": servers, "://one.test/clients": clients, "://one.test/clients/x": clients,
		"://one.test/clients/exactly": servers, "://two.test/clients/exactly": clients, "://three.test/": nil,
	}
	follows := func(ctx context.Context, to string, scheme string) error {
		var errs []error
		for rule, behind := range rules {
			if scheme == "https" && len(behind) == 0 {
				continue // it has no certificate
			}
			errs = append(errs, wrap(through(ctx, s.internet(), to, ca, scheme+rule, behind), "%s%s at %s", scheme, rule, to))
		}
		return errors.Join(errs...)
	}
	s.run(ctx, byNode, func(ctx context.Context) (int, error) {
		var errs []error
		for _, n := range s.K.Nodes {
			for _, ip := range []netip.Addr{n.IP, n.IP6} {
				errs = append(errs, follows(ctx, port(ip, ingressHTTP), "http"), follows(ctx, port(ip, ingressHTTPS), "https"))
			}
		}
		return none, errors.Join(errs...)
	})
	s.run(ctx, byBalancer, func(ctx context.Context) (int, error) {
		b, err := s.balance(ctx, "ingress", 12)
		if err != nil {
			return none, err
		}
		return none, b.everywhere(ctx, func(*cluster.Node) error {
			var errs []error
			for _, ip := range b.ips {
				errs = append(errs, follows(ctx, port(ip, 80), "http"), follows(ctx, port(ip, 443), "https"))
			}
			return errors.Join(errs...)
		})
	})
	return s.takeAway(ctx, "ingress.yaml", "ingress")
}

// through asks the controller at an address for a URL, and fails unless one of these places answered, which knows the
// client's address. Without any, there must be no rule.
func through(ctx context.Context, from place, to, ca, url string, behind []place) error {
	out, err := from.run(ctx, "get", "-to", to, "-ca", ca, url)
	if err != nil {
		return err
	}
	if len(behind) == 0 {
		if !strings.HasPrefix(out, "404 page not found") {
			err = fmt.Errorf("there should be no rule: %s", out)
		}
		return err
	}
	all, err := parse(out, 1)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(behind, func(p place) bool { return all[0].from(p.self) == nil }) {
		err = fmt.Errorf("%s answered, who saw %s for %s", all[0].server, all[0].seen, all[0].own)
	}
	return err
}
