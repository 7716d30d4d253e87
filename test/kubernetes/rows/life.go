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

// readyWithin is how long nodes take at most from the manifest to Ready on an idle machine, once they have the image.
const readyWithin = 15 * time.Second

// ready is the end of the names of rows that bring overlayd to the cluster.
const ready = ": nodes Ready, and overlayd's doctor is content"

// Begin brings overlayd and CoreDNS to the cluster, which all other rows need.
func (s *Suite) Begin(ctx context.Context) error {
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
	if err := s.install(ctx, "kubectl apply"); err != nil {
		return err
	}
	return s.must(ctx, "CoreDNS is there", func(ctx context.Context) error {
		if err := s.apply(ctx, "coredns.yaml"); err != nil {
			return err
		}
		_, err := s.K.Kubectl(ctx, "-n", "kube-system", "rollout", "status", "deployment/coredns", "--request-timeout=0",
			"--timeout=300s")
		return err
	})
}

// Run does all rows, and returns an error where it can't go on.
func (s *Suite) Run(ctx context.Context) error {
	if err := s.Begin(ctx); err != nil {
		return err
	}
	for _, h := range append(s.nodeHosts(), s.K.Lab.Internet) {
		if err := s.serve(h); err != nil {
			return err
		}
	}
	err := s.must(ctx, "pods and services are there", func(ctx context.Context) error {
		if err := s.apply(ctx, "workload.yaml"); err != nil {
			return err
		}
		_, _, err := s.workload(ctx)
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
	if err := s.dnsNames(ctx); err != nil {
		return err
	}
	if err := s.ingress(ctx); err != nil {
		return err
	}
	if err := s.otherProxy(ctx); err != nil {
		return err
	}
	for _, c := range append(s.changes(), s.ofKubernetes()...) {
		s.change(ctx, c)
	}
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

// install brings overlayd to the cluster, which all later rows need, and records how long that takes.
func (s *Suite) install(ctx context.Context, how string) error {
	var took time.Duration
	err := s.must(ctx, how+ready, func(ctx context.Context) error {
		start := time.Now()
		if err := s.Overlay.Install(ctx); err != nil {
			return err
		}
		if err := s.K.WaitReady(ctx, true, s.nodeNames()...); err != nil {
			return err
		}
		took = time.Since(start)
		return s.healthy(ctx)
	})
	if err == nil {
		s.timed("from "+how+" to nodes Ready", took, readyWithin)
	}
	return err
}

// proxied waits until kube-proxy has done its part on a node: it changes settings of the kernel as well.
func (s *Suite) proxied(ctx context.Context, n *cluster.Node) error {
	return cluster.Poll(ctx, "kube-proxy on "+n.Name, func() error {
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
			return cluster.Poll(ctx, "the service", func() error {
				for _, h := range s.hosts() {
					for _, ip := range ips {
						if _, err := askOne(ctx, h, port(ip, 80)); err != nil {
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

// change is a row on what may happen to a running cluster.
type change struct {
	name  string
	store string   // the only store that it is about; "": any
	quiet bool     // no pings meanwhile
	pings []string // nodes whose pods ping each other meanwhile; none: all
	do    func(ctx context.Context) error
}

func (s *Suite) changes() []change {
	others := []string{"n1", "n2"}
	away := func(name string) func(context.Context) error {
		return func(ctx context.Context) error { return s.away(ctx, name) }
	}
	return []change{
		{name: "rolling update of the DaemonSet, under ping", do: s.Overlay.Upgrade},
		{name: "an upgrade with a wrong setting stops at its first node, under ping", do: s.wrongUpgrade},
		{name: "overlayd's etcd away for 30 s, under ping", store: Etcd, do: away("overlay-etcd")},
		{name: "API server away for 30 s, under ping", do: away("kube-apiserver")},
		// Without the API server, a kubelet may be unable to start a container that has settings from a ConfigMap.
		{name: "a daemon restarts while its store is away, under ping", store: Etcd, do: s.restartAlone},
		{name: "110 pods on a node, under ping", do: s.crowd},
		{name: "node n3 crashes and returns, the others under ping", pings: others, do: s.crash},
		{name: "its pods are back, on all paths", quiet: true, do: s.allPaths},
		{name: "node n3 is removed and n4 added, the others under ping", pings: others, do: s.replace},
		{name: "its pods are there, on all paths", quiet: true, do: s.allPaths},
		{name: "overlayd's doctor finds nothing wrong on any node", quiet: true, do: s.healthy},
	}
}

// change runs such a row, unless it is about another store. A ping that is lost fails it.
func (s *Suite) change(ctx context.Context, c change) {
	if c.store != "" && c.store != s.Store {
		return
	}
	s.run(ctx, c.name, func(ctx context.Context) (int, error) {
		if c.quiet {
			return none, c.do(ctx)
		}
		clients, servers, err := s.workload(ctx)
		if err != nil {
			return none, err
		}
		other := func(p place) bool { return len(c.pings) > 0 && !slices.Contains(c.pings, p.node) }
		return under(ctx, slices.DeleteFunc(clients, other), slices.DeleteFunc(servers, other),
			func() error { return c.do(ctx) })
	})
}

// chart are the rows on the Helm chart. The other way of installing ends here.
func (s *Suite) chart(ctx context.Context) error {
	const (
		removed  = "overlayd is removed: no trace on the nodes, which are not Ready"
		install  = "helm install"
		allPaths = "helm: its pods are there, on all paths"
		upgraded = "helm upgrade, under ping"
		wrong    = "helm: an upgrade with a wrong setting stops at its first node, under ping"
		gone     = "helm uninstall: no trace on the nodes, which are not Ready"
	)
	if !s.wants(install+ready, allPaths, upgraded, wrong, gone) {
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
		err := cluster.Poll(ctx, "the kubelet of "+h.node, func() error {
			_, err := h.run(ctx, "get", "http://127.0.0.1:10248/healthz")
			return err
		})
		if err != nil {
			return err
		}
	}
	if err := s.install(ctx, install); err != nil {
		return err
	}
	err := s.must(ctx, allPaths, func(ctx context.Context) error {
		if err := s.apply(ctx, "workload.yaml"); err != nil {
			return err
		}
		return s.allPaths(ctx)
	})
	if err != nil {
		return err
	}
	s.change(ctx, change{name: upgraded, do: s.Overlay.Upgrade})
	s.change(ctx, change{name: wrong, do: s.wrongUpgrade})
	s.run(ctx, gone, func(ctx context.Context) (int, error) { return none, s.remove(ctx) })
	return ctx.Err()
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
		if err := s.K.Get(ctx, &d, "/apis/apps/v1/namespaces/overlayd/daemonsets/overlayd"); err != nil {
			return 0, err
		}
		got := d.Status
		if got.UpdatedNumberScheduled != 1 || got.NumberReady != len(s.K.Nodes)-1 {
			err = fmt.Errorf("%d nodes have the wrong setting, and %d of %d are ready", got.UpdatedNumberScheduled,
				got.NumberReady, len(s.K.Nodes))
		}
		return got.UpdatedNumberScheduled, err
	}
	stands := func() error { _, err := rollout(); return err }
	err := cluster.Poll(ctx, "the first node", stands)
	for end := time.Now().Add(10 * time.Second); err == nil && time.Now().Before(end); {
		if reached, at := rollout(); reached > 1 {
			err = at
		}
		err = errors.Join(err, sleep(ctx, time.Second))
	}
	if err == nil {
		err = cluster.Poll(ctx, "still the first node only", stands)
	}
	if err = errors.Join(err, s.Overlay.Upgrade(ctx)); err != nil {
		return err
	}
	return s.healthy(ctx)
}

// healthy waits until doctor is content on all nodes. Without its store, a daemon may wait for 20 s until it tries again.
func (s *Suite) healthy(ctx context.Context) error {
	return cluster.Poll(ctx, "overlayd", func() error { return s.Overlay.Healthy(ctx) })
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// awayFor is longer than clients of etcd and of the API server wait until they try again (20 s), and than the
// controllers wait for word of a kubelet.
const awayFor = 30 * time.Second

// away stops a daemon of the control plane for a while.
func (s *Suite) away(ctx context.Context, name string) error {
	s.K.StopControl(name)
	if err := sleep(ctx, awayFor); err != nil {
		return err
	}
	if err := s.peers(ctx, len(s.K.Nodes)-1); err != nil {
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
	if err := s.K.WaitReady(ctx, false, n.Name); err != nil {
		return err
	}
	if err := s.peers(ctx, len(s.K.Nodes)-1); err != nil { // it may come back
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
	return s.K.WaitReady(ctx, true, n.Name)
}

// withoutSubnet is what a node says whose overlayd has no subnet yet: what its containerd heard when it asked the
// plugin for its status.
var withoutSubnet = regexp.MustCompile(`NetworkPluginNotReady.* /run/overlayd/subnet\.env: no such file or directory: is overlayd running on this node\?`)

// replace takes n3 out of the cluster for good, and adds n4 while there are no subnets for new nodes.
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
	if err := s.peers(ctx, len(s.K.Nodes)-1); err != nil {
		return err
	}
	if err := s.K.Subnets(false); err != nil {
		return err
	}
	err = s.K.Add(ctx, 4)
	if err == nil {
		err = cluster.Poll(ctx, "n4, which has no subnet,",
			func() error { return s.notReady(ctx, "n4", withoutSubnet) })
	}
	if err == nil && s.Store == Kubernetes {
		err = s.names(ctx, "n4", "has no podCIDRs yet")
	}
	if err = errors.Join(err, s.K.Subnets(true)); err != nil {
		return err
	}
	added, err := s.K.Node("n4")
	if err != nil {
		return err
	}
	if err := s.serve(added.Host); err != nil {
		return err
	}
	if err := s.K.WaitReady(ctx, true, added.Name); err != nil {
		return err
	}
	return s.healthy(ctx)
}

// notReady fails where a node is Ready, or says something else.
func (s *Suite) notReady(ctx context.Context, name string, why *regexp.Regexp) error {
	conditions, err := s.conditions(ctx, name)
	for _, c := range conditions {
		if c.Type == "Ready" && c.Status == "False" && why.MatchString(c.Message) {
			return nil
		}
	}
	return errors.Join(err, fmt.Errorf("it says %+v", conditions))
}

// nodeCondition is a condition of a Node.
type nodeCondition struct{ Type, Status, Message string }

func (s *Suite) conditions(ctx context.Context, node string) ([]nodeCondition, error) {
	var n struct {
		Status struct{ Conditions []nodeCondition }
	}
	err := s.K.Get(ctx, &n, "/api/v1/nodes/"+node)
	return n.Status.Conditions, err
}

// allPaths is the table's first part, in one.
func (s *Suite) allPaths(ctx context.Context) error {
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
	to := make([][]string, len(clients))
	for i, p := range crowd {
		for _, ip := range p.ips {
			to[i%len(to)] = append(to[i%len(to)], port(ip, serverPort))
		}
	}
	for i, c := range clients {
		_, err := ask(ctx, c, tcp, to[i]...)
		errs = append(errs, wrap(err, "%s", c.where()))
	}
	errs = append(errs, s.scale(ctx, 0, &crowd))
	return errors.Join(errs...)
}

// count is how many pods a node has.
func (s *Suite) count(ctx context.Context, node string) (int, error) {
	var list podList
	err := s.K.Get(ctx, &list, "/api/v1/pods?fieldSelector=spec.nodeName%3D"+node)
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
	if _, err := s.K.Kubectl(ctx, "rollout", "status", "deployment/crowd", "--request-timeout=0",
		"--timeout=600s"); err != nil {
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
	if _, err := s.K.Kubectl(ctx, "-n", "kube-system", "delete", "deployment", "coredns", "--ignore-not-found",
		"--request-timeout=0"); err != nil {
		return err
	}
	for _, app := range []string{"client", "server", "crowd"} {
		if _, err := s.pods(ctx, app, 0); err != nil {
			return err
		}
	}
	err := cluster.Poll(ctx, "the end of CoreDNS", func() error {
		var list podList
		err := s.K.Get(ctx, &list, cluster.Namespace("kube-system")+"/pods")
		if err == nil && len(list.Items) > 0 {
			err = fmt.Errorf("%d pods are there", len(list.Items))
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := s.Overlay.Uninstall(ctx); err != nil {
		return err
	}
	return errors.Join(s.traces(ctx), s.K.WaitReady(ctx, false, s.nodeNames()...))
}
