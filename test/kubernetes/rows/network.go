package rows

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/overlayd/overlayd/test/kubernetes/cluster"
)

const (
	serverPort   = 8080
	hostPort     = 8088
	nodePort     = 30080
	nodePortUDP  = 30081
	nodePortHere = 30090 // with externalTrafficPolicy: Local
	hostServer   = 8090  // of netcheck on the hosts
)

// paths are all paths between pods and hosts, each over IPv4 and IPv6: no address may be translated on them.
func (s *Suite) paths(ctx context.Context) error {
	clients, servers, err := s.workload(ctx)
	if err != nil {
		return err
	}
	between := func(name string, from, to []place, toPort uint16, same bool) {
		s.run(ctx, name, func(ctx context.Context) (int, error) {
			var errs []error
			paths := 0
			for _, f := range from {
				for _, t := range to {
					if (f.node == t.node) == same {
						paths++
						errs = append(errs, untranslated(ctx, f, t, toPort))
					}
				}
			}
			if paths == 0 {
				errs = append(errs, errors.New("there is no such path here"))
			}
			return none, errors.Join(errs...)
		})
	}
	between("pod to pod on one node: TCP, UDP, ping; source kept", clients, servers, serverPort, true)
	between("pod to pod on another node: TCP, UDP, ping; source kept", clients, servers, serverPort, false)
	between("host to pod on this node: TCP, UDP, ping; source kept", s.hosts(), servers, serverPort, true)
	between("host to pod on another node: TCP, UDP, ping; source kept", s.hosts(), servers, serverPort, false)
	between("pod to this host: TCP, UDP, ping; source kept", clients, s.hosts(), hostServer, true)
	between("pod to another host: TCP, UDP, ping; source kept", clients, s.hosts(), hostServer, false)
	s.run(ctx, "a full MTU with DF passes, one byte more does not",
		func(ctx context.Context) (int, error) { return none, fullMTU(ctx, clients, servers) })
	s.run(ctx, "egress: the internet sees the node's address", func(ctx context.Context) (int, error) {
		return none,
			s.egress(ctx, clients)
	})
	s.run(ctx, "hostPort from another node and from outside; source kept",
		func(ctx context.Context) (int, error) { return none, s.hostPorts(ctx) })
	return nil
}

// podMTU is what the nodes' devices leave: 1500 bytes without what VXLAN takes over IPv6 (70), since pods have one MTU
// for both families.
const podMTU = 1430

func fullMTU(ctx context.Context, clients, servers []place) error {
	var errs []error
	text := strconv.Itoa(podMTU)
	for _, c := range clients {
		mtu, err := c.run(ctx, "mtu")
		if err == nil && mtu != text {
			err = fmt.Errorf("it has an MTU of %s, not %s", mtu, text)
		}
		errs = append(errs, wrap(err, "%s", c.where()))
		for _, t := range servers {
			for _, ip := range t.ips {
				lost, err := ping(ctx, c, ip, "-n", "3", "-df", "-size", text)
				if err == nil && lost > 0 {
					err = fmt.Errorf("%d of 3 pings of %s bytes were lost", lost, text)
				}
				errs = append(errs, wrap(err, "%s to %s on %s", c.where(), ip, t.node))
			}
		}
		for _, ip := range servers[0].ips {
			out, err := c.run(ctx, "ping", "-n", "1", "-df", "-size", strconv.Itoa(podMTU+1), ip.String())
			if err == nil && !strings.Contains(out, "message too long") {
				err = fmt.Errorf("it was not refused as too large: %s", out)
			}
			errs = append(errs, wrap(err, "%s: a ping of %d bytes to %s", c.where(), podMTU+1, ip))
		}
	}
	return errors.Join(errs...)
}

func (s *Suite) egress(ctx context.Context, clients []place) error {
	var errs []error
	for _, c := range clients {
		n, err := s.K.Node(c.node)
		if err != nil {
			return err
		}
		for _, path := range []struct{ to, from netip.Addr }{{s.K.Lab.Internet.IP, n.IP}, {s.K.Lab.Internet.IP6, n.IP6}} {
			a, err := askOne(ctx, c, port(path.to, hostServer))
			if err == nil && a.seen != path.from.String() {
				err = fmt.Errorf("was seen as %s, not as %s", a.seen, path.from)
			}
			errs = append(errs, wrap(err, "%s to %s", c.where(), path.to))
		}
	}
	return errors.Join(errs...)
}

func (s *Suite) hostPorts(ctx context.Context) error {
	_, servers, err := s.workload(ctx)
	if err != nil {
		return err
	}
	on := map[string]string{}
	for _, p := range servers {
		on[p.node] = p.self
	}
	var errs []error
	for _, to := range s.K.Nodes {
		for _, from := range append(s.hosts(), s.internet()) {
			if from.node == to.Name {
				continue
			}
			for _, ip := range []netip.Addr{to.IP, to.IP6} {
				a, err := askOne(ctx, from, port(ip, hostPort))
				if err == nil {
					err = a.from(on[to.Name])
				}
				errs = append(errs, wrap(err, "%s to %s", from.where(), port(ip, hostPort)))
			}
		}
	}
	return errors.Join(errs...)
}

// services are the rows on what kube-proxy does, above the network.
func (s *Suite) services(ctx context.Context, mode string) error {
	clients, servers, err := s.workload(ctx)
	if err != nil {
		return err
	}
	ips, err := s.clusterIPs(ctx, "web")
	if err != nil {
		return err
	}
	row := func(name string, f func(ctx context.Context) error) {
		s.run(ctx, mode+": "+name, func(ctx context.Context) (int, error) { return none, f(ctx) })
	}
	row("ClusterIP from pods: TCP, UDP; all servers; source kept", func(ctx context.Context) error {
		var errs []error
		for _, c := range clients {
			for _, ip := range ips {
				errs = append(errs, reachAll(ctx, c, port(ip, 80), tcp, servers, true),
					reachAll(ctx, c, port(ip, 81), udp, servers, true))
			}
		}
		return errors.Join(errs...)
	})
	row("ClusterIP from a pod that is behind it itself", func(ctx context.Context) error {
		var errs []error
		for _, ip := range ips {
			errs = append(errs, reachAll(ctx, servers[0], port(ip, 80), tcp, servers, false))
		}
		return errors.Join(errs...)
	})
	row("ClusterIP from hosts", func(ctx context.Context) error {
		var errs []error
		for _, h := range s.hosts() {
			for _, ip := range ips {
				errs = append(errs, reachAll(ctx, h, port(ip, 80), tcp, servers, false))
			}
		}
		return errors.Join(errs...)
	})
	row("ClusterIP with affinity: one server answers a client", func(ctx context.Context) error {
		sticky, err := s.clusterIPs(ctx, "web-sticky")
		errs := []error{err}
		for _, c := range clients {
			for _, ip := range sticky {
				errs = append(errs, reachOne(ctx, c, port(ip, 80)))
			}
		}
		return errors.Join(errs...)
	})
	row("NodePort of every node from pods, hosts and outside: TCP, UDP", func(ctx context.Context) error {
		var errs []error
		for _, from := range append(append(s.hosts(), clients[0]), s.internet()) {
			for _, n := range s.K.Nodes {
				for _, ip := range []netip.Addr{n.IP, n.IP6} {
					errs = append(errs, reachAll(ctx, from, port(ip, nodePort), tcp, servers, false),
						reachAll(ctx, from, port(ip, nodePortUDP), udp, servers, false))
				}
			}
		}
		return errors.Join(errs...)
	})
	row("NodePort from outside, externalTrafficPolicy Local: source kept", func(ctx context.Context) error {
		var errs []error
		for _, n := range s.K.Nodes {
			for _, ip := range []netip.Addr{n.IP, n.IP6} {
				errs = append(errs, reachAll(ctx, s.internet(), port(ip, nodePortHere), tcp, onNode(servers, n.Name), true))
			}
		}
		return errors.Join(errs...)
	})
	row("DNS over UDP and TCP; a service and a headless one by name",
		func(ctx context.Context) error { return dns(ctx, clients, servers, ips) })
	row("the API server from pods by its service", func(ctx context.Context) error {
		for _, c := range clients { // it speaks TLS only, and says so in plain text
			if out, err := c.run(ctx, "get", "http://10.96.0.1:443/"); err != nil || !strings.Contains(out, "HTTPS server") {
				return fmt.Errorf("%s: %q, %w", c.where(), out, err)
			}
		}
		return nil
	})
	return s.balanced(ctx, mode)
}

// reachAll asks until each of the servers has answered.
func reachAll(ctx context.Context, from place, to, how string, servers []place, sourceKept bool) error {
	if len(servers) == 0 {
		return fmt.Errorf("%s to %s: there is no server that should answer", from.where(), to)
	}
	missing := map[string]bool{}
	for _, p := range servers {
		missing[p.name] = true
	}
	for tries := 0; len(missing) > 0; tries++ {
		if tries == 20 {
			return fmt.Errorf("%s to %s: never answered by %v", from.where(), to, missing)
		}
		answers, err := ask(ctx, from, how, slices.Repeat([]string{to}, 2*len(servers))...)
		for _, a := range answers {
			if sourceKept && a.seen != a.own {
				err = errors.Join(err, fmt.Errorf("asked as %s and was seen as %s by %s", a.own, a.seen, a.server))
			}
			delete(missing, a.server)
		}
		if err != nil {
			return fmt.Errorf("%s to %s: %w", from.where(), to, err)
		}
	}
	return nil
}

// reachOne asks as often as would reach every server, and fails where more than one has answered.
func reachOne(ctx context.Context, from place, to string) error {
	// With three servers, by chance all answers are from one in 1 of 20,000 cases.
	answers, err := ask(ctx, from, tcp, slices.Repeat([]string{to}, 10)...)
	for _, a := range answers {
		if a.server != answers[0].server {
			err = fmt.Errorf("answered by %s, then by %s", answers[0].server, a.server)
		}
	}
	return wrap(err, "%s to %s", from.where(), to)
}

func (s *Suite) clusterIPs(ctx context.Context, service string) ([]netip.Addr, error) {
	var v struct {
		Spec struct{ ClusterIPs []netip.Addr }
	}
	err := s.K.Get(ctx, &v, cluster.Namespace("default")+"/services/"+service)
	if err == nil && len(v.Spec.ClusterIPs) != 2 {
		err = fmt.Errorf("service %s should have an address of each family, and has %v", service, v.Spec.ClusterIPs)
	}
	return v.Spec.ClusterIPs, err
}

func dns(ctx context.Context, clients, servers []place, web []netip.Addr) error {
	var pods []netip.Addr
	for _, p := range servers {
		pods = append(pods, p.ips...)
	}
	api := netip.MustParseAddr("10.96.0.1")
	var errs []error
	for _, c := range clients {
		for _, protocol := range []string{"-tcp=false", "-tcp=true"} {
			for name, want := range map[string][]netip.Addr{
				"web": web, "web-headless": pods,
				"kubernetes.default.svc.cluster.local": {api},
			} {
				out, err := c.run(ctx, "dns", protocol, name)
				found := strings.Fields(out)
				for _, ip := range want {
					if err == nil && !slices.Contains(found, ip.String()) {
						err = fmt.Errorf("%s is missing in %s", ip, out)
					}
				}
				errs = append(errs, wrap(err, "%s asks for %s, %s", c.where(), name, protocol))
			}
		}
		for _, name := range []string{"web:80", "web-headless:8080"} {
			a, err := askOne(ctx, c, name)
			if err == nil && a.seen != a.own {
				err = fmt.Errorf("asked as %s and was seen as %s", a.own, a.seen)
			}
			errs = append(errs, wrap(err, "%s to %s", c.where(), name))
		}
	}
	return errors.Join(errs...)
}
