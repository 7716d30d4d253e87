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

// dnsNames are the rows on what the cluster's DNS knows beside plain services.
func (s *Suite) dnsNames(ctx context.Context) error {
	clients, servers, err := s.workload(ctx)
	if err != nil {
		return err
	}
	web, err := s.clusterIPs(ctx, "web")
	if err != nil {
		return err
	}
	row := func(name string, f func(ctx context.Context, c place) error) {
		s.run(ctx, name, func(ctx context.Context) (int, error) {
			var errs []error
			for _, c := range clients {
				errs = append(errs, f(ctx, c))
			}
			return none, errors.Join(errs...)
		})
	}
	row("ExternalName of a service: resolved, all its servers reached", func(ctx context.Context, c place) error {
		return errors.Join(resolved(ctx, c, "web-alias", web...), reachAll(ctx, c, "web-alias:80", tcp, servers, true))
	})
	row("ExternalName of a host outside: resolved and reached", func(ctx context.Context, c place) error {
		_, err := askOne(ctx, c, fmt.Sprintf("outside:%d", hostServer))
		return errors.Join(resolved(ctx, c, "outside", s.internet().ips...), wrap(err, "%s to outside", c.where()))
	})
	row("DNS records of pods by their first addresses, none where no pod is", func(ctx context.Context, c place) error {
		var errs []error
		for _, p := range servers {
			errs = append(errs, resolved(ctx, c, podRecord(p.ips[0]), p.ips[0])) // CoreDNS knows no other than the first
		}
		gone := podRecord(netip.MustParseAddr("10.244.255.254"))
		if out, err := c.run(ctx, "dns", gone); err == nil || !strings.Contains(err.Error(), "no such host") {
			errs = append(errs, fmt.Errorf("%s asks for %s, which is no pod: %q, %w", c.where(), gone, out, err))
		}
		return errors.Join(errs...)
	})
	const named = "DNS records of pods by hostname and subdomain; reached by them"
	if !s.wants(named) {
		return nil
	}
	if err := s.apply(ctx, "named.yaml"); err != nil {
		return err
	}
	pods, err := s.pods(ctx, "named", 2)
	row(named, func(ctx context.Context, c place) error {
		errs := []error{err}
		for _, p := range pods {
			name := p.name + ".named.default.svc.cluster.local" // a StatefulSet's pods have their names as hostnames
			a, err := askOne(ctx, c, fmt.Sprintf("%s:%d", name, serverPort))
			if err == nil {
				err = a.from(p.self)
			}
			errs = append(errs, resolved(ctx, c, name, p.ips...), wrap(err, "%s to %s", c.where(), name))
		}
		return errors.Join(errs...)
	})
	return s.takeAway(ctx, "named.yaml", "named")
}

// podRecord is the name of a pod by its IPv4 address.
func podRecord(ip netip.Addr) string {
	return strings.ReplaceAll(ip.String(), ".", "-") + ".default.pod.cluster.local"
}

// resolved waits until a name has exactly these addresses: that it has none may have been kept for some seconds.
func resolved(ctx context.Context, from place, name string, want ...netip.Addr) error {
	return cluster.Poll(ctx, from.where()+" asks for "+name, func() error {
		out, err := from.run(ctx, "dns", name)
		if err != nil {
			return err
		}
		found := strings.Fields(out)
		for _, ip := range want {
			if !slices.Contains(found, ip.String()) {
				return fmt.Errorf("%s is missing in %s", ip, out)
			}
		}
		if len(found) != len(want) {
			return fmt.Errorf("expected %v, found %s", want, out)
		}
		return nil
	})
}

// takeAway deletes what a manifest has, and returns when the pods of an app are gone.
func (s *Suite) takeAway(ctx context.Context, name, app string) error {
	text, err := manifest(name)
	if err != nil {
		return err
	}
	if _, err := s.K.KubectlIn(ctx, text, "delete", "--request-timeout=0", "-f", "-"); err != nil {
		return err
	}
	_, err = s.pods(ctx, app, 0)
	return err
}
