// Package deploy brings overlayd to a cluster as users do, with dist/kubernetes or with the chart, and takes it away
// again.
package deploy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/overlayd/overlayd/test/kubernetes/cluster"
	"github.com/overlayd/overlayd/test/kubernetes/nodes"
)

// Tags of the image: what is installed, and what it is upgraded to.
const (
	image  = "ghcr.io/overlayd/overlayd"
	first  = "test-1"
	second = "test-2"
)

// Versions are those of overlayd that the nodes need, with the names of their images.
func Versions() map[string]string {
	return map[string]string{first: image + ":" + first, second: image + ":" + second}
}

// patience is that of the rest of the test, for kubectl.
func patience() string { return "--timeout=" + cluster.Patience.String() }

// closedPort is a port where no program listens: wrong settings have it.
const (
	closedPort = "2999"
	nowhere    = "https://" + nodes.ControlIP + ":" + closedPort
)

// Network is the network config with a backend.
func Network(backend string) string {
	return fmt.Sprintf(`{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48", "Backend": {"Type": %q}}`,
		backend)
}

// overlay is what both ways have in common.
type overlay struct {
	k       *cluster.Cluster
	dir     string // for the user's own files
	network string // the network config
}

func newOverlay(k *cluster.Cluster, name, network string) (overlay, error) {
	o := overlay{k, filepath.Join(k.Lab.Dir, name), network}
	return o, os.MkdirAll(o.dir, 0o755)
}

// write writes a file of the user's, and returns its path.
func (o overlay) write(name, content string) (string, error) {
	path := filepath.Join(o.dir, name)
	return path, os.WriteFile(path, []byte(content), 0o644)
}

// secret makes the secret with the certificates for etcd, if there is an etcd. Its namespace is there.
func (o overlay) secret(ctx context.Context) error {
	if !o.k.Etcd {
		return nil
	}
	ca, cert, key := o.k.EtcdClient()
	_, err := o.k.Kubectl(ctx, "-n", "overlayd", "create", "secret", "generic", "overlayd-etcd-tls",
		"--from-file=ca.crt="+ca, "--from-file=tls.crt="+cert, "--from-file=tls.key="+key)
	return err
}

// rollout waits until a DaemonSet is on every node.
func (o overlay) rollout(ctx context.Context, namespace, name string) error {
	_, err := o.k.Kubectl(ctx, "-n", namespace, "rollout", "status", "daemonset", name, "--request-timeout=0",
		patience())
	return err
}

// Healthy asks overlayd's doctor on all nodes, by `kubectl exec`. It may warn of drift only: kube-proxy puts its own
// jump before ours when it starts, and that is said for two minutes.
func (o overlay) Healthy(ctx context.Context) error {
	var pods struct {
		Items []struct{ Metadata struct{ Name string } }
	}
	if err := o.k.Get(ctx, &pods, cluster.Namespace("overlayd")+"/pods"); err != nil {
		return err
	}
	if len(pods.Items) != len(o.k.Nodes) {
		return fmt.Errorf("%d nodes have %d pods of overlayd", len(o.k.Nodes), len(pods.Items))
	}
	errs := make([]error, len(pods.Items))
	var wg sync.WaitGroup
	for i, p := range pods.Items {
		wg.Go(func() { errs[i] = o.examine(ctx, p.Metadata.Name) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (o overlay) examine(ctx context.Context, pod string) error {
	out, err := o.k.Kubectl(ctx, "-n", "overlayd", "exec", pod, "-c", "overlayd", "--", "overlayd", "doctor")
	var fails []string
	for _, line := range strings.Split(out, "\n") {
		if strings.HasPrefix(line, "FAIL") || strings.HasPrefix(line, "warn") && !strings.HasPrefix(line, "warn  drift") {
			fails = append(fails, line)
		}
	}
	if len(fails) > 0 {
		return fmt.Errorf("%s: doctor says:\n%s", pod, strings.Join(fails, "\n"))
	}
	return err
}

// Forget deletes the lease of a node that is gone for good, as Documentation/leases.md says. In the Kubernetes API, the
// Node was the lease.
func (o overlay) Forget(ctx context.Context, node string) error {
	if !o.k.Etcd {
		return nil
	}
	ca, cert, key := o.k.EtcdClient()
	etcdctl := []string{"etcdctl", "--endpoints=" + cluster.OverlayEtcd, "--cacert=" + ca, "--cert=" + cert, "--key=" +
		key, "--dial-timeout=20s", "--command-timeout=60s"}
	out, err := o.k.Lab.Control.Run(ctx, append(etcdctl, "get", "--prefix", "/overlayd/network/subnets")...)
	if err != nil {
		return err
	}
	lines := strings.Split(out, "\n") // a key, its value, and so on
	for i := 1; i < len(lines); i += 2 {
		if strings.Contains(lines[i], fmt.Sprintf("%q:%q", "NodeName", node)) {
			_, err := o.k.Lab.Control.Run(ctx, append(etcdctl, "del", lines[i-1])...)
			return err
		}
	}
	return fmt.Errorf("%s has no lease", node)
}
