package deploy

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/overlayd/overlayd/test/kubernetes/cluster"
)

// kustomization is what a user writes who keeps his changes apart, as dist/kubernetes/kustomization.yaml shows it.
const kustomization = `apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [dist]
components: [%s]
configMapGenerator:
  - {name: overlayd-settings, namespace: overlayd, behavior: merge, literals: [%s]}
  - {name: overlayd-network, namespace: overlayd, behavior: merge, files: [net-conf.json]}
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
type Kustomize struct{ overlay }

// NewKustomize makes a directory with the user's part beside a copy of dist/kubernetes, which is in the repository at
// root.
func NewKustomize(k *cluster.Cluster, root, network string) (Kustomize, error) {
	o, err := newOverlay(k, "kustomize", network)
	if err != nil {
		return Kustomize{}, err
	}
	if err := os.CopyFS(filepath.Join(o.dir, "dist"), os.DirFS(filepath.Join(root, "dist", "kubernetes"))); err != nil {
		return Kustomize{}, err
	}
	_, err = o.write("net-conf.json", network)
	return Kustomize{o}, err
}

func (d Kustomize) apply(ctx context.Context, kustomization string) error {
	if _, err := d.write("kustomization.yaml", kustomization); err != nil {
		return err
	}
	_, err := d.k.Kubectl(ctx, "apply", "-k", d.dir)
	return err
}

func (d Kustomize) remove(ctx context.Context) error {
	_, err := d.k.Kubectl(ctx, "delete", "-k", d.dir, "--request-timeout=0", patience())
	return err
}

// with is the kustomization for the store, with an image, and with settings that are right or wrong.
func (d Kustomize) with(tag string, right bool) string {
	components, setting := "", ""
	switch {
	case d.k.Etcd && right:
		components, setting = etcdComponents, "OVERLAYD_ETCD_ENDPOINTS="+cluster.OverlayEtcd
	case d.k.Etcd:
		components, setting = etcdComponents, "OVERLAYD_ETCD_ENDPOINTS="+nowhere
	case !right:
		setting = "KUBERNETES_SERVICE_PORT=" + closedPort
	}
	return fmt.Sprintf(kustomization, components, setting, image, tag)
}

const etcdComponents = "dist/components/etcd, dist/components/etcd-tls"

// Install makes the namespace with the certificates for etcd, and applies.
func (d Kustomize) Install(ctx context.Context) error {
	if _, err := d.k.Kubectl(ctx, "apply", "-f", filepath.Join(d.dir, "dist", "namespace.yaml")); err != nil {
		return err
	}
	if err := d.secret(ctx); err != nil {
		return err
	}
	return d.apply(ctx, d.with(first, true))
}

// Upgrade applies with another image, and waits until every node has it.
func (d Kustomize) Upgrade(ctx context.Context) error {
	if err := d.apply(ctx, d.with(second, true)); err != nil {
		return err
	}
	return d.rollout(ctx, "overlayd", "overlayd")
}

// Misconfigure applies with a store that is not there.
func (d Kustomize) Misconfigure(ctx context.Context) error {
	return d.apply(ctx, d.with(second, false))
}

// Uninstall does what dist/kubernetes/uninstall says.
func (d Kustomize) Uninstall(ctx context.Context) error {
	if err := d.remove(ctx); err != nil {
		return err
	}
	if err := d.apply(ctx, fmt.Sprintf(removal, image, second)); err != nil {
		return err
	}
	if err := d.rollout(ctx, "overlayd-uninstall", "overlayd-uninstall"); err != nil {
		return err
	}
	return d.remove(ctx)
}
