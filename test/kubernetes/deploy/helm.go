package deploy

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/overlayd/overlayd/test/kubernetes/cluster"
)

// values of a user, for the chart.
const (
	etcdValues    = "etcd: {endpoints: [%q], tls: {secretName: overlayd-etcd-tls}}\n"
	networkValues = "network: %s\n"
)

// Helm installs with `helm install`.
type Helm struct {
	overlay
	chart string
}

// NewHelm is for the chart in the repository at root.
func NewHelm(k *cluster.Cluster, root, network string) (Helm, error) {
	o, err := newOverlay(k, "helm", network)
	return Helm{o, filepath.Join(root, "dist", "helm", "overlayd")}, err
}

func (d Helm) helm(ctx context.Context, args ...string) error {
	_, err := d.k.RunHelm(ctx, append(args, "--namespace", "overlayd")...)
	return err
}

// Install makes the namespace with the certificates for etcd, and installs the chart.
func (d Helm) Install(ctx context.Context) error {
	values := fmt.Sprintf(networkValues, d.network)
	if d.k.Etcd {
		values += fmt.Sprintf(etcdValues, cluster.OverlayEtcd)
	}
	path, err := d.write("values.yaml", values)
	if err != nil {
		return err
	}
	if _, err := d.k.Kubectl(ctx, "create", "namespace", "overlayd"); err != nil {
		return err
	}
	if err := d.secret(ctx); err != nil {
		return err
	}
	return d.helm(ctx, "install", "overlayd", d.chart, "--values", path, "--set", "image.tag="+first)
}

// Upgrade takes another image, and waits until every node has it.
func (d Helm) Upgrade(ctx context.Context) error {
	settings := "extraEnv=[]"
	if d.k.Etcd {
		settings = fmt.Sprintf("etcd.endpoints=[%q]", cluster.OverlayEtcd)
	}
	if err := d.change(ctx, fmt.Sprintf("image.tag=%q", second), settings); err != nil {
		return err
	}
	return d.rollout(ctx, "overlayd", "overlayd")
}

// Misconfigure has the daemons ask a store that is not there.
func (d Helm) Misconfigure(ctx context.Context) error {
	if d.k.Etcd {
		return d.change(ctx, fmt.Sprintf("etcd.endpoints=[%q]", nowhere))
	}
	return d.change(ctx, fmt.Sprintf(`extraEnv=[{"name": "KUBERNETES_SERVICE_PORT", "value": %q}]`, closedPort))
}

func (d Helm) change(ctx context.Context, values ...string) error {
	args := []string{"upgrade", "overlayd", d.chart, "--reset-then-reuse-values"}
	for _, v := range values {
		args = append(args, "--set-json", v)
	}
	return d.helm(ctx, args...)
}

// Uninstall cleans the nodes first, as the chart's notes say.
func (d Helm) Uninstall(ctx context.Context) error {
	if err := d.change(ctx, "uninstall=true"); err != nil {
		return err
	}
	if err := d.rollout(ctx, "overlayd", "overlayd-uninstall"); err != nil {
		return err
	}
	if err := d.helm(ctx, "uninstall", "overlayd", "--wait"); err != nil {
		return err
	}
	_, err := d.k.Kubectl(ctx, "delete", "namespace", "overlayd", "--request-timeout=0", patience())
	return err
}
