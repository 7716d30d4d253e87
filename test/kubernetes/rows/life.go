package rows

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/overlayd/overlayd/test/kubernetes/cluster"
	"github.com/overlayd/overlayd/test/kubernetes/nodes"
)

// readyWithin is how long nodes may take from the manifest to Ready, once they have the image.
const readyWithin = 15 * time.Second

// Run does all rows, and returns an error where it can't go on.
func (s *Suite) Run(ctx context.Context) error {
	for _, n := range s.K.Nodes {
		if err := s.proxied(ctx, n); err != nil {
			return err
		}
	}
	for _, n := range s.K.Nodes {
		state, err := snapshot(ctx, n)
		if err != nil {
			return err
		}
		s.before.add(state)
	}
	if err := s.must(ctx, "overlayd is applied: nodes Ready within 15 s, and its doctor is content", s.install); err != nil {
		return err
	}
	for _, h := range append(s.nodeHosts(), s.K.Lab.Internet) {
		if err := s.serve(h); err != nil {
			return err
		}
	}
	err := s.must(ctx, "pods, services and CoreDNS are there", func(ctx context.Context) error {
		for _, name := range []string{"coredns.yaml", "workload.yaml"} {
			if err := s.apply(ctx, name); err != nil {
				return err
			}
		}
		_, _, err := s.workload(ctx)
		if err != nil {
			return err
		}
		_, err = s.K.Kubectl(ctx, "-n", "kube-system", "rollout", "status", "deployment/coredns", "--request-timeout=0", "--timeout=60s")
		return err
	})
	if err != nil {
		return err
	}
	if err := s.paths(ctx); err != nil {
		return err
	}
	if err := s.services(ctx, s.K.ProxyMode); err != nil {
		return err
	}
	if err := s.otherProxy(ctx); err != nil {
		return err
	}
	s.changes(ctx)
	return s.chart(ctx)
}

func (s *Suite) apply(ctx context.Context, name string) error {
	text, err := manifest(name)
	if err != nil {
		return err
	}
	_, err = s.K.KubectlIn(ctx, text, "apply", "-f", "-")
	return err
}

func (s *Suite) install(ctx context.Context) error {
	start := time.Now()
	if err := s.Overlay.Install(ctx); err != nil {
		return err
	}
	if err := s.K.WaitReady(ctx, 60*time.Second, true, s.nodeNames()...); err != nil {
		return err
	}
	if took := time.Since(start); took > readyWithin {
		return fmt.Errorf("it took %s", took.Round(100*time.Millisecond))
	}
	return cluster.Poll(ctx, time.Minute, "overlayd", func() error { return s.Overlay.Healthy(ctx) })
}

// proxied waits until kube-proxy has done its part on a node: it changes settings of the kernel as well.
func (s *Suite) proxied(ctx context.Context, n *cluster.Node) error {
	return cluster.Poll(ctx, time.Minute, "kube-proxy on "+n.Name, func() error {
		out, err := n.Run(ctx, "sh", "-c", "iptables-save -t nat; nft list tables")
		if err == nil && !strings.Contains(out, "KUBE-SERVICES") && !strings.Contains(out, "kube-proxy") {
			err = errors.New("its rules are missing")
		}
		return err
	})
}

func (s *Suite) nodeNames() []string {
	var out []string
	for _, n := range s.K.Nodes {
		out = append(out, n.Name)
	}
	return out
}

func (s *Suite) nodeHosts() []*nodes.Host {
	var out []*nodes.Host
	for _, n := range s.K.Nodes {
		out = append(out, n.Host)
	}
	return out
}

// serve starts a server on a host.
func (s *Suite) serve(h *nodes.Host) error {
	_, err := s.K.Lab.Start(h, "control", "netcheck", s.K.Netcheck, "serve", "-port", strconv.Itoa(hostServer))
	return err
}

// otherProxy runs the rows on services again, with kube-proxy in its other mode.
func (s *Suite) otherProxy(ctx context.Context) error {
	mode := "nftables"
	if s.K.ProxyMode == mode {
		mode = "iptables"
	}
	s.run(ctx, "kube-proxy changes to "+mode+", under ping", func(ctx context.Context) (int, error) {
		clients, servers, err := s.workload(ctx)
		if err != nil {
			return none, err
		}
		return under(ctx, clients, servers, func() error {
			for _, n := range s.K.Nodes {
				if err := s.K.Proxy(ctx, n, mode); err != nil {
					return err
				}
			}
			s.K.ProxyMode = mode
			ips, err := s.clusterIPs(ctx, "web")
			if err != nil {
				return err
			}
			return cluster.Poll(ctx, 90*time.Second, "the service", func() error {
				for _, h := range s.hosts() {
					for _, ip := range ips {
						if _, err := ask(ctx, h, port(ip, 80)); err != nil {
							return err
						}
					}
				}
				return nil
			})
		})
	})
	if s.K.ProxyMode != mode {
		return nil // not asked for, or it has failed
	}
	return s.services(ctx, mode)
}

// changes are the rows on what may happen to a running cluster.
func (s *Suite) changes(ctx context.Context) {
	s.pinging(ctx, "rolling update of the DaemonSet, under ping", s.Overlay.Upgrade)
	s.pinging(ctx, "an upgrade with a wrong etcd endpoint stops at its first node, under ping", s.wrongUpgrade)
	s.pinging(ctx, "overlayd's etcd away for a minute, under ping", func(ctx context.Context) error { return s.away(ctx, "overlay-etcd") })
	s.pinging(ctx, "API server away for a minute, under ping", func(ctx context.Context) error { return s.away(ctx, "kube-apiserver") })
	s.pinging(ctx, "110 pods on a node, under ping", s.crowd)
	s.pinging(ctx, "node n3 crashes and returns, the others under ping", s.crash, "n1", "n2")
	s.run(ctx, "its pods are back, on all ways", func(ctx context.Context) (int, error) { return none, s.allWays(ctx) })
	s.pinging(ctx, "node n3 is removed and n4 added, the others under ping", s.replace, "n1", "n2")
	s.run(ctx, "its pods are there, on all ways", func(ctx context.Context) (int, error) { return none, s.allWays(ctx) })
	s.run(ctx, "overlayd's doctor finds nothing wrong on any node", func(ctx context.Context) (int, error) {
		return none, cluster.Poll(ctx, podsWithin, "overlayd", func() error { return s.Overlay.Healthy(ctx) })
	})
}

// chart are the rows on the Helm chart. The other way of installing ends here.
func (s *Suite) chart(ctx context.Context) error {
	const (
		removed   = "overlayd is removed: no trace on the nodes, which are not Ready"
		installed = "helm install: nodes Ready within 15 s, and overlayd's doctor is content"
		ways      = "helm: its pods are there, on all ways"
		upgraded  = "helm upgrade, under ping"
		wrong     = "helm: an upgrade with a wrong etcd endpoint stops at its first node, under ping"
		gone      = "helm uninstall: no trace on the nodes, which are not Ready"
	)
	if !s.wants(installed, ways, upgraded, wrong, gone) {
		s.run(ctx, removed, func(ctx context.Context) (int, error) { return none, s.remove(ctx) })
		return ctx.Err()
	}
	if err := s.must(ctx, removed, s.remove); err != nil {
		return err
	}
	s.Overlay = s.Chart
	// A kubelet that has never been ready says so at once when it is; one that was before looks every ten seconds only.
	for _, n := range s.K.Nodes {
		if err := s.K.StartKubelet(n); err != nil {
			return err
		}
	}
	for _, h := range s.hosts() {
		err := cluster.Poll(ctx, time.Minute, "the kubelet of "+h.node, func() error {
			_, err := h.run(ctx, "get", "http://127.0.0.1:10248/healthz")
			return err
		})
		if err != nil {
			return err
		}
	}
	if err := s.must(ctx, installed, s.install); err != nil {
		return err
	}
	err := s.must(ctx, ways, func(ctx context.Context) error {
		if err := s.apply(ctx, "workload.yaml"); err != nil {
			return err
		}
		return s.allWays(ctx)
	})
	if err != nil {
		return err
	}
	s.pinging(ctx, upgraded, s.Overlay.Upgrade)
	s.pinging(ctx, wrong, s.wrongUpgrade)
	s.run(ctx, gone, func(ctx context.Context) (int, error) { return none, s.remove(ctx) })
	return ctx.Err()
}

// pinging runs a row while all clients ping all servers, of these nodes only where some are named. A ping that is lost fails it.
func (s *Suite) pinging(ctx context.Context, name string, f func(ctx context.Context) error, only ...string) {
	s.run(ctx, name, func(ctx context.Context) (int, error) {
		clients, servers, err := s.workload(ctx)
		if err != nil {
			return none, err
		}
		other := func(p place) bool { return len(only) > 0 && !slices.Contains(only, p.node) }
		return under(ctx, slices.DeleteFunc(clients, other), slices.DeleteFunc(servers, other), func() error { return f(ctx) })
	})
}

// wrongUpgrade waits until a node has a wrong setting, sees that no other gets it, and mends it.
func (s *Suite) wrongUpgrade(ctx context.Context) error {
	if err := s.Overlay.Misconfigure(ctx); err != nil {
		return err
	}
	// Nodes that the rollout has reached, and an error unless it stands at the first one.
	rollout := func() (reached int, err error) {
		var d struct {
			Status struct{ UpdatedNumberScheduled, NumberReady int }
		}
		if err := s.K.Get(ctx, &d, "-n", "overlayd", "daemonset", "overlayd"); err != nil {
			return 0, err
		}
		got := d.Status
		if got.UpdatedNumberScheduled != 1 || got.NumberReady != len(s.K.Nodes)-1 {
			err = fmt.Errorf("%d nodes have the wrong setting, and %d of %d are ready", got.UpdatedNumberScheduled, got.NumberReady, len(s.K.Nodes))
		}
		return got.UpdatedNumberScheduled, err
	}
	stands := func() error { _, err := rollout(); return err }
	err := cluster.Poll(ctx, time.Minute, "the first node", stands)
	for end := time.Now().Add(20 * time.Second); err == nil && time.Now().Before(end); {
		if reached, at := rollout(); reached > 1 {
			err = at
		}
		err = errors.Join(err, sleep(ctx, time.Second))
	}
	if err == nil {
		err = cluster.Poll(ctx, 30*time.Second, "still the first node only", stands)
	}
	if err = errors.Join(err, s.Overlay.Upgrade(ctx)); err != nil {
		return err
	}
	return s.healthy(ctx)
}

// healthy waits until doctor is content on all nodes. After a minute without etcd, a daemon may wait for 20 s until it tries again.
func (s *Suite) healthy(ctx context.Context) error {
	return cluster.Poll(ctx, time.Minute, "overlayd", func() error { return s.Overlay.Healthy(ctx) })
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// away stops a daemon of the control plane for a minute.
func (s *Suite) away(ctx context.Context, name string) error {
	s.K.StopControl(name)
	if err := sleep(ctx, time.Minute); err != nil {
		return err
	}
	if err := s.K.StartControl(name); err != nil {
		return err
	}
	if err := s.K.WaitAPI(ctx); err != nil {
		return err
	}
	if _, _, err := s.workload(ctx); err != nil {
		return err
	}
	return s.healthy(ctx)
}

// crash switches n3 off, waits until the cluster has seen it, and switches it on again.
func (s *Suite) crash(ctx context.Context) error {
	n, err := s.K.Node("n3")
	if err != nil {
		return err
	}
	if err := n.Off(ctx); err != nil {
		return err
	}
	if err := s.K.WaitReady(ctx, 3*time.Minute, false, n.Name); err != nil {
		return err
	}
	if err := n.On(ctx); err != nil {
		return err
	}
	if err := s.K.Boot(ctx, n, nil); err != nil {
		return err
	}
	if err := s.serve(n.Host); err != nil {
		return err
	}
	return s.K.WaitReady(ctx, 60*time.Second, true, n.Name)
}

// withoutSubnet is what a node says whose overlayd has no subnet yet: what its containerd heard when it asked the plugin for its status.
var withoutSubnet = regexp.MustCompile(`NetworkPluginNotReady.* /run/overlayd/subnet\.env: no such file or directory: is overlayd running on this node\?`)

// replace takes n3 out of the cluster for good, and adds n4 while overlayd's etcd is away.
func (s *Suite) replace(ctx context.Context) error {
	n, err := s.K.Node("n3")
	if err != nil {
		return err
	}
	if err := n.Off(ctx); err != nil {
		return err
	}
	s.K.Nodes = slices.DeleteFunc(s.K.Nodes, func(k *cluster.Node) bool { return k == n })
	if _, err := s.K.Kubectl(ctx, "delete", "node", n.Name); err != nil {
		return err
	}
	if err := s.Overlay.Forget(ctx, n.Name); err != nil {
		return err
	}
	s.K.StopControl("overlay-etcd")
	added, err := s.K.Add(ctx, 4)
	if err == nil {
		err = cluster.Poll(ctx, 2*time.Minute, "n4, which has no subnet,", func() error { return s.notReady(ctx, added.Name, withoutSubnet) })
	}
	if err = errors.Join(err, s.K.StartControl("overlay-etcd")); err != nil {
		return err
	}
	if err := s.serve(added.Host); err != nil {
		return err
	}
	if err := s.K.WaitReady(ctx, 2*time.Minute, true, added.Name); err != nil {
		return err
	}
	return s.healthy(ctx)
}

// notReady fails where a node is Ready, or says something else.
func (s *Suite) notReady(ctx context.Context, name string, why *regexp.Regexp) error {
	var n struct {
		Status struct {
			Conditions []struct{ Type, Status, Message string }
		}
	}
	if err := s.K.Get(ctx, &n, "node", name); err != nil {
		return err
	}
	for _, c := range n.Status.Conditions {
		if c.Type == "Ready" && c.Status == "False" && why.MatchString(c.Message) {
			return nil
		}
	}
	return fmt.Errorf("it says %+v", n.Status.Conditions)
}

// allWays is the table's first part, in one.
func (s *Suite) allWays(ctx context.Context) error {
	clients, servers, err := s.workload(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, c := range append(clients, s.hosts()...) {
		for _, t := range servers {
			errs = append(errs, untranslated(ctx, c, t, serverPort))
		}
	}
	return errors.Join(errs...)
}

// crowd fills n2 with pods, reaches every one of them from the other nodes, and removes them.
func (s *Suite) crowd(ctx context.Context) error {
	const all = 110
	if err := s.apply(ctx, "crowd.yaml"); err != nil {
		return err
	}
	crowd, err := s.pods(ctx, "crowd", 1)
	if err != nil {
		return err
	}
	there, err := s.count(ctx, "n2")
	if err != nil {
		return err
	}
	clients, err := s.pods(ctx, "client", len(s.K.Nodes))
	if err != nil {
		return err
	}
	clients = slices.DeleteFunc(clients, func(p place) bool { return p.node == "n2" })
	errs := []error{s.scale(ctx, all-there+len(crowd), &crowd)}
	now, err := s.count(ctx, "n2")
	if err == nil && now != all {
		err = fmt.Errorf("n2 has %d pods, not %d", now, all)
	}
	errs = append(errs, err)
	for i, p := range crowd {
		for _, ip := range p.ips {
			_, err := ask(ctx, clients[i%len(clients)], port(ip, serverPort))
			errs = append(errs, wrap(err, "%s to %s", clients[i%len(clients)].where(), p.name))
		}
	}
	errs = append(errs, s.scale(ctx, 0, &crowd))
	return errors.Join(errs...)
}

// count is how many pods a node has.
func (s *Suite) count(ctx context.Context, node string) (int, error) {
	var list podList
	err := s.K.Get(ctx, &list, "pods", "-A", "--field-selector", "spec.nodeName="+node)
	n := 0
	for _, p := range list.Items {
		if p.Metadata.DeletionTimestamp == nil {
			n++
		}
	}
	return n, err
}

func (s *Suite) scale(ctx context.Context, replicas int, pods *[]place) error {
	if _, err := s.K.Kubectl(ctx, "scale", "deployment", "crowd", "--replicas", strconv.Itoa(replicas)); err != nil {
		return err
	}
	if _, err := s.K.Kubectl(ctx, "rollout", "status", "deployment/crowd", "--request-timeout=0", "--timeout=600s"); err != nil {
		return err
	}
	var err error
	*pods, err = s.pods(ctx, "crowd", replicas)
	return err
}

// remove ends all pods and overlayd, and fails where something is left.
func (s *Suite) remove(ctx context.Context) error {
	if _, err := s.K.Kubectl(ctx, "delete", "daemonsets,deployments", "--all", "--request-timeout=0"); err != nil {
		return err
	}
	if _, err := s.K.Kubectl(ctx, "-n", "kube-system", "delete", "deployment", "coredns", "--ignore-not-found", "--request-timeout=0"); err != nil {
		return err
	}
	for _, app := range []string{"client", "server", "crowd"} {
		if _, err := s.pods(ctx, app, 0); err != nil {
			return err
		}
	}
	err := cluster.Poll(ctx, 60*time.Second, "the end of CoreDNS", func() error {
		out, err := s.K.Kubectl(ctx, "-n", "kube-system", "get", "pods", "-o", "name")
		if err == nil && strings.TrimSpace(out) != "" {
			err = errors.New(out)
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := s.Overlay.Uninstall(ctx); err != nil {
		return err
	}
	return errors.Join(s.traces(ctx), s.K.WaitReady(ctx, 90*time.Second, false, s.nodeNames()...))
}
