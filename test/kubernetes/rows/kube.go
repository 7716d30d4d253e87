package rows

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/overlayd/overlayd/test/kubernetes/cluster"
)

// ofKubernetes are the rows on what may happen where the Kubernetes API is the store.
func (s *Suite) ofKubernetes() []change {
	all := []change{
		{name: "every Node has the condition NetworkUnavailable False", quiet: true, do: s.available},
		{name: "a changed ConfigMap is followed, under ping", do: s.configured},
		{name: "podCIDRs outside a changed network are named, the old one stays, under ping", do: s.outside},
		{name: "a node may not patch another Node", quiet: true, do: s.ownNodeOnly},
		{name: "RBAC taken from a daemon that restarts, and given back, under ping", do: s.forbidden},
		{
			name:  "a Node is deleted and registers again, the others under ping",
			pings: []string{"n1", "n2"}, do: s.registerAgain,
		},
		{name: "all paths after that", quiet: true, do: s.allPaths},
	}
	for i := range all {
		all[i].store = Kubernetes
	}
	return all
}

// available waits until the condition NetworkUnavailable of every Node is False.
func (s *Suite) available(ctx context.Context) error {
	var errs []error
	for _, n := range s.K.Nodes {
		errs = append(errs, s.unavailable(ctx, n.Name, "False", ""))
	}
	return errors.Join(errs...)
}

// unavailable waits until the condition NetworkUnavailable of a Node has a status and a text in its message.
func (s *Suite) unavailable(ctx context.Context, node, is, says string) error {
	return cluster.Poll(ctx, "NetworkUnavailable of "+node, func() error {
		conditions, err := s.conditions(ctx, node)
		for _, c := range conditions {
			if c.Type == "NetworkUnavailable" && c.Status == is && strings.Contains(c.Message, says) {
				return nil
			}
		}
		return errors.Join(err, fmt.Errorf("expected %s and %q, found %+v", is, says, conditions))
	})
}

// configure changes the network config; "" is that of the installation.
func (s *Suite) configure(ctx context.Context, network string) error {
	_, err := s.K.Kubectl(ctx, "-n", "overlayd", "patch", "configmap", "overlayd-network", "--type=merge",
		fmt.Sprintf(`--patch={"data": {"net-conf.json": %q}}`, network))
	return err
}

func (s *Suite) configured(ctx context.Context) error {
	if err := s.configure(ctx, strings.Replace(s.Network, `"vxlan"`, `"vxlan", "DirectRouting": true`, 1)); err != nil {
		return err
	}
	err := s.until(ctx, "n1", "all peers direct", func(got status) bool { return got.Peers.Direct == len(s.K.Nodes)-1 })
	if err = errors.Join(err, s.configure(ctx, s.Network)); err != nil {
		return err
	}
	err = s.until(ctx, "n1", "no peer direct", func(got status) bool { return got.Peers.Tunnel == len(s.K.Nodes)-1 })
	return errors.Join(err, s.healthy(ctx))
}

// outside has a network that the nodes' podCIDRs are not in. The last one that fits stays in use, and the node ready.
func (s *Suite) outside(ctx context.Context) error {
	if err := s.configure(ctx, strings.Replace(s.Network, "10.244.0.0", "10.99.0.0", 1)); err != nil {
		return err
	}
	const why = "outside the network 10.99.0.0/16"
	err := errors.Join(s.names(ctx, "n1", why), s.available(ctx))
	if err = errors.Join(err, s.configure(ctx, s.Network)); err != nil {
		return err
	}
	return errors.Join(s.available(ctx), s.healthy(ctx))
}

// names waits until one of a daemon's problems has a text in its reason.
func (s *Suite) names(ctx context.Context, node, text string) error {
	return s.until(ctx, node, fmt.Sprintf("a problem with %q", text), func(got status) bool {
		for _, p := range got.Problems {
			if strings.Contains(p.Reason, text) {
				return true
			}
		}
		return false
	})
}

// ownNodeOnly patches Nodes as the daemon on n1, whose token names its node. RBAC allows it to patch all of them, so that
// what refuses is the policy.
func (s *Suite) ownNodeOnly(ctx context.Context) error {
	patch := func(node, metadata string) error {
		return s.K.PatchAs(ctx, "system:serviceaccount:overlayd:overlayd", "n1", "/api/v1/nodes/"+node,
			`{"metadata": `+metadata+`}`)
	}
	const ours = `{"annotations": {"overlayd.io/test": "yes"}}`
	if err := patch("n1", ours); err != nil {
		return err
	}
	var errs []error
	for _, c := range []struct{ node, metadata, why string }{
		{"n2", ours, "may not change the Node n2"},
		{"n2/status", ours, "may not change the Node n2"},
		{"n1", `{"labels": {"overlayd.io/test": "yes"}}`, "may change only annotations"},
	} {
		if err := patch(c.node, c.metadata); err == nil || !strings.Contains(err.Error(), c.why) {
			errs = append(errs, fmt.Errorf("a patch of %s by n1: expected %q, found: %w", c.node, c.why, err))
		}
	}
	_, err := s.K.Kubectl(ctx, "annotate", "node", "n1", "overlayd.io/test-")
	return errors.Join(append(errs, err)...)
}

// forbidden restarts the daemon of n1 without any permission.
func (s *Suite) forbidden(ctx context.Context) error {
	if _, err := s.K.Kubectl(ctx, "delete", "clusterrolebinding", "overlayd"); err != nil {
		return err
	}
	err := s.kill(ctx, "n1")
	if err == nil {
		err = s.names(ctx, "n1", "permission denied")
	}
	if err = errors.Join(err, s.Overlay.Upgrade(ctx)); err != nil {
		return err
	}
	return s.healthy(ctx)
}

// registerAgain deletes a Node whose machine runs on. It comes back with other podCIDRs; its pods are still the old ones,
// until an operator does what doctor says.
func (s *Suite) registerAgain(ctx context.Context) error {
	n := s.K.Nodes[len(s.K.Nodes)-1] // n3, or n4
	if _, err := s.K.Kubectl(ctx, "delete", "node", n.Name); err != nil {
		return err
	}
	if err := s.peers(ctx, len(s.K.Nodes)-2); err != nil {
		return err
	}
	if err := s.K.StartKubelet(n); err != nil { // only then does it register
		return err
	}
	if err := s.K.WaitReady(ctx, true, n.Name); err != nil {
		return err
	}
	if err := s.peers(ctx, len(s.K.Nodes)-1); err != nil {
		return err
	}
	if err := s.names(ctx, n.Name, "recreate the pods created before"); err != nil {
		return err
	}
	if _, err := n.Run(ctx, "sh", "-c",
		"ip link delete cni0; rm -r /var/lib/cni/networks/overlayd /var/lib/overlayd/subnet-changed"); err != nil {
		return err
	}
	if _, err := s.K.Kubectl(ctx, "delete", "pods", "--field-selector=spec.nodeName="+n.Name,
		"--request-timeout=0"); err != nil {
		return err
	}
	if _, _, err := s.workload(ctx); err != nil {
		return err
	}
	return s.healthy(ctx)
}
