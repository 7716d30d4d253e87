// Package deploy brings overlayd to a cluster as a user would, with dist/kubernetes, and takes it away again.
package deploy

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/overlayd/overlayd/test/kubernetes/cluster"
)

// Tags of the image: what is installed, and what it is upgraded to.
const (
	Image   = "ghcr.io/overlayd/overlayd"
	First   = Image + ":test-1"
	Second  = Image + ":test-2"
	network = `{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48", "Backend": {"Type": "vxlan"}}`
)

// kustomization is what a user writes who keeps his changes apart, as dist/kubernetes/kustomization.yaml shows it.
const kustomization = `apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [dist]
components: [dist/components/etcd-tls]
configMapGenerator:
  - {name: overlayd-settings, namespace: overlayd, behavior: merge, literals: ["OVERLAYD_ETCD_ENDPOINTS=%s"]}
  - {name: overlayd, namespace: overlayd, behavior: merge, files: [net-conf.json]}
images:
  - {name: %s, newTag: %s}
`

const removal = `apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [dist/uninstall]
images:
  - {name: %s, newTag: %s}
`

// Kustomize installs with `kubectl apply -k`.
type Kustomize struct {
	K    *cluster.Cluster
	Root string // of the repository
	dir  string
}

// New makes a directory with the user's part beside a copy of dist/kubernetes.
func New(k *cluster.Cluster, root string) (*Kustomize, error) {
	d := &Kustomize{k, root, filepath.Join(k.Lab.Dir, "deploy")}
	if err := os.MkdirAll(d.dir, 0o755); err != nil {
		return nil, err
	}
	if err := os.CopyFS(filepath.Join(d.dir, "dist"), os.DirFS(filepath.Join(root, "dist", "kubernetes"))); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(d.dir, "net-conf.json"), []byte(network), 0o644); err != nil {
		return nil, err
	}
	return d, nil
}

func (d *Kustomize) write(content string) error {
	return os.WriteFile(filepath.Join(d.dir, "kustomization.yaml"), []byte(content), 0o644)
}

func (d *Kustomize) with(image string) error {
	return d.write(fmt.Sprintf(kustomization, cluster.OverlayEtcd, Image, strings.TrimPrefix(image, Image+":")))
}

// Install makes the namespace with the certificates for etcd, and applies.
func (d *Kustomize) Install(ctx context.Context) error {
	if err := d.with(First); err != nil {
		return err
	}
	if _, err := d.K.Kubectl(ctx, "apply", "-f", filepath.Join(d.dir, "dist", "namespace.yaml")); err != nil {
		return err
	}
	ca, cert, key := d.K.EtcdClient()
	_, err := d.K.Kubectl(ctx, "-n", "overlayd", "create", "secret", "generic", "overlayd-etcd-tls", "--from-file=ca.crt="+ca, "--from-file=tls.crt="+cert, "--from-file=tls.key="+key)
	if err != nil {
		return err
	}
	_, err = d.K.Kubectl(ctx, "apply", "-k", d.dir)
	return err
}

// Upgrade applies with another image, and waits until every node has it.
func (d *Kustomize) Upgrade(ctx context.Context) error {
	if err := d.with(Second); err != nil {
		return err
	}
	if _, err := d.K.Kubectl(ctx, "apply", "-k", d.dir); err != nil {
		return err
	}
	_, err := d.K.Kubectl(ctx, "-n", "overlayd", "rollout", "status", "daemonset/overlayd", "--request-timeout=0", "--timeout=180s")
	return err
}

// Healthy asks overlayd's doctor on every node, by `kubectl exec`.
func (d *Kustomize) Healthy(ctx context.Context) error {
	out, err := d.K.Kubectl(ctx, "-n", "overlayd", "get", "pods", "-o", "name")
	if err != nil {
		return err
	}
	pods := strings.Fields(out)
	if len(pods) != len(d.K.Nodes) {
		return fmt.Errorf("%d nodes have %d pods of overlayd", len(d.K.Nodes), len(pods))
	}
	for _, p := range pods {
		out, err := d.K.Kubectl(ctx, "-n", "overlayd", "exec", p, "-c", "overlayd", "--", "/usr/local/bin/overlayd", "doctor")
		var fails []string
		for _, line := range strings.Split(out, "\n") {
			if strings.HasPrefix(line, "FAIL") {
				fails = append(fails, line)
			}
		}
		if len(fails) > 0 {
			return fmt.Errorf("%s: doctor says:\n%s", p, strings.Join(fails, "\n"))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Forget deletes the lease of a node that is gone for good, as Documentation/leases.md says.
func (d *Kustomize) Forget(ctx context.Context, node string) error {
	ca, cert, key := d.K.EtcdClient()
	etcdctl := []string{"etcdctl", "--endpoints=" + cluster.OverlayEtcd, "--cacert=" + ca, "--cert=" + cert, "--key=" + key}
	out, err := d.K.Lab.Control.Run(ctx, append(etcdctl, "get", "--prefix", "/overlayd/network/subnets")...)
	if err != nil {
		return err
	}
	lines := strings.Split(out, "\n") // a key, its value, and so on
	for i := 1; i < len(lines); i += 2 {
		if strings.Contains(lines[i], fmt.Sprintf("%q:%q", "NodeName", node)) {
			_, err := d.K.Lab.Control.Run(ctx, append(etcdctl, "del", lines[i-1])...)
			return err
		}
	}
	return fmt.Errorf("%s has no lease", node)
}

// Uninstall does what dist/kubernetes/uninstall says.
func (d *Kustomize) Uninstall(ctx context.Context) error {
	if _, err := d.K.Kubectl(ctx, "delete", "-k", d.dir, "--request-timeout=0", "--timeout=90s"); err != nil {
		return err
	}
	if err := d.write(fmt.Sprintf(removal, Image, strings.TrimPrefix(Second, Image+":"))); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"apply", "-k", d.dir},
		{"-n", "overlayd-uninstall", "rollout", "status", "daemonset/overlayd-uninstall", "--request-timeout=0", "--timeout=90s"},
		{"delete", "-k", d.dir, "--request-timeout=0", "--timeout=90s"},
	} {
		if _, err := d.K.Kubectl(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

// Leftovers returns what is still there of overlayd on a node, and of the bridge that its CNI plugin made; "" is nothing. The directories
// /run/overlayd and /var/lib/overlayd may stay, empty: a pod can't remove what is mounted into it.
func (d *Kustomize) Leftovers(ctx context.Context, n *cluster.Node) (string, error) {
	return n.Run(ctx, "sh", "-c", `
ip -o link | grep -E 'overlay|ovl|cni0'
ip route show table all proto 118; ip -6 route show table all proto 118
ip rule | grep 118; ip -6 rule | grep 118
{ iptables-save; ip6tables-save; nft list ruleset; } 2>/dev/null | grep -i overlay
ls -d /opt/cni/bin/overlay-cni /opt/cni/bin/bridge /etc/cni/net.d/*overlayd* /var/lib/cni/overlay /var/lib/cni/networks/overlayd 2>/dev/null
find /run/overlayd /var/lib/overlayd -mindepth 1
true`)
}
