// Package cluster runs a real Kubernetes on the machines of package nodes: the control plane and two etcd servers (one for Kubernetes,
// one for overlayd) on the host "control", and containerd, a kubelet and kube-proxy on each node.
package cluster

import (
	"context"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/overlayd/overlayd/test/kubernetes/nodes"
)

const (
	apiServer  = nodes.ControlIP
	podNet     = "10.244.0.0/16"
	podNet6    = "fd00:10:244::/48"
	serviceNet = "10.96.0.0/16,fd00:96::/112"
	// DNSService is the address of the cluster's DNS.
	DNSService = "10.96.0.10"
	// OverlayEtcd is where overlayd's etcd is.
	OverlayEtcd = "https://" + nodes.ControlIP + ":2479"
)

// Config says what the cluster is made of.
type Config struct {
	Kubernetes string // the program of cmd/kubernetes
	Helm       string
	Containerd string   // directory with the programs of containerd 2; the machine's own are those of version 1
	Netcheck   string   // the program of test/netcheck
	Images     []string // archives that each node gets at first
	ProxyMode  string   // of kube-proxy: iptables or nftables
}

// Cluster is a running cluster.
type Cluster struct {
	Config
	Lab     *nodes.Lab
	Nodes   []*Node
	pki     *pki
	daemons map[string]*nodes.Process // on the control host, by name
}

// Node is a node of the cluster.
type Node struct {
	*nodes.Node
	path    string // PATH, with the programs of its containerd
	daemons map[string]*nodes.Process
}

// Up starts the control plane. Nodes are added with Add.
func Up(ctx context.Context, lab *nodes.Lab, c Config) (*Cluster, error) {
	k := &Cluster{Config: c, Lab: lab, daemons: map[string]*nodes.Process{}}
	var err error
	if k.pki, err = newPKI(filepath.Join(lab.Dir, "pki")); err != nil {
		return nil, err
	}
	err = errors.Join(
		k.pki.issue("apiserver", pkix.Name{CommonName: "kube-apiserver"}, apiServer, "127.0.0.1", "10.96.0.1", "fd00:96::1", "kubernetes", "kubernetes.default", "kubernetes.default.svc"),
		k.pki.issue("overlay-etcd", pkix.Name{CommonName: "etcd"}, nodes.ControlIP),
		k.pki.issue("overlayd", pkix.Name{CommonName: "overlayd"}),
		k.pki.user("admin", pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}}),
		k.pki.user("controllers", pkix.Name{CommonName: "system:kube-controller-manager"}),
		k.pki.user("scheduler", pkix.Name{CommonName: "system:kube-scheduler"}),
		k.pki.user("proxy", pkix.Name{CommonName: "system:kube-proxy"}),
	)
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"etcd", "overlay-etcd", "kube-apiserver"} {
		if err := k.StartControl(name); err != nil {
			return nil, err
		}
	}
	if err := k.WaitAPI(ctx); err != nil {
		return nil, err
	}
	for _, name := range []string{"kube-controller-manager", "kube-scheduler"} {
		if err := k.StartControl(name); err != nil {
			return nil, err
		}
	}
	return k, Poll(ctx, 3*time.Minute, "the service account of the namespace default", func() error {
		_, err := k.Kubectl(ctx, "get", "serviceaccount", "default")
		return err
	})
}

// StartControl starts a daemon of the control plane: etcd, overlay-etcd, kube-apiserver, kube-controller-manager or kube-scheduler.
func (k *Cluster) StartControl(name string) error {
	p, err := k.Lab.Start(k.Lab.Control, "control", name, append([]string{k.Kubernetes}, k.controlArgs(name)...)...)
	k.daemons[name] = p
	return err
}

// StopControl stops a daemon of the control plane.
func (k *Cluster) StopControl(name string) { k.daemons[name].Stop() }

func (k *Cluster) controlArgs(name string) []string {
	f := k.pki.path
	etcd := func(client string, peer int, more ...string) []string {
		return append([]string{
			"etcd", "--data-dir=" + filepath.Join(k.Lab.Dir, name), "--listen-client-urls=" + client, "--advertise-client-urls=" + client,
			fmt.Sprintf("--listen-peer-urls=http://127.0.0.1:%d", peer), "--unsafe-no-fsync",
		}, more...)
	}
	switch name {
	case "etcd":
		return etcd("http://127.0.0.1:2379", 2380)
	case "overlay-etcd":
		return etcd(OverlayEtcd, 2480, "--client-cert-auth", "--trusted-ca-file="+f("ca.crt"), "--cert-file="+f("overlay-etcd.crt"), "--key-file="+f("overlay-etcd.key"))
	case "kube-apiserver":
		return []string{
			name, "--etcd-servers=http://127.0.0.1:2379", "--advertise-address=" + apiServer, "--secure-port=6443",
			"--tls-cert-file=" + f("apiserver.crt"), "--tls-private-key-file=" + f("apiserver.key"), "--client-ca-file=" + f("ca.crt"),
			"--kubelet-client-certificate=" + f("admin.crt"), "--kubelet-client-key=" + f("admin.key"), "--kubelet-certificate-authority=" + f("ca.crt"),
			"--kubelet-preferred-address-types=InternalIP", "--service-cluster-ip-range=" + serviceNet, "--authorization-mode=Node,RBAC",
			"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file=" + f("sa.key"), "--service-account-signing-key-file=" + f("sa.key"),
			"--allow-privileged=true",
		}
	case "kube-controller-manager":
		config := f("controllers.kubeconfig")
		return []string{
			name, "--kubeconfig=" + config, "--authentication-kubeconfig=" + config, "--authorization-kubeconfig=" + config,
			"--use-service-account-credentials", "--service-account-private-key-file=" + f("sa.key"), "--root-ca-file=" + f("ca.crt"),
			"--service-cluster-ip-range=" + serviceNet, "--leader-elect=false", "--bind-address=127.0.0.1",
			"--node-monitor-grace-period=20s",
		}
	default:
		config := f("scheduler.kubeconfig")
		return []string{name, "--kubeconfig=" + config, "--authentication-kubeconfig=" + config, "--authorization-kubeconfig=" + config, "--leader-elect=false", "--bind-address=127.0.0.1"}
	}
}

// EtcdClient returns files with what a client of overlayd's etcd needs: the CA, a certificate and its key.
func (k *Cluster) EtcdClient() (ca, cert, key string) {
	return k.pki.path("ca.crt"), k.pki.path("overlayd.crt"), k.pki.path("overlayd.key")
}

// WaitAPI waits until the API server is ready.
func (k *Cluster) WaitAPI(ctx context.Context) error {
	return Poll(ctx, 3*time.Minute, "the API server", func() error {
		if k.daemons["kube-apiserver"].Ended() {
			return errors.New("kube-apiserver has ended: see its log")
		}
		_, err := k.Kubectl(ctx, "get", "--raw", "/readyz")
		return err
	})
}

// Kubectl runs kubectl as an administrator.
func (k *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return k.KubectlIn(ctx, "", args...)
}

// KubectlIn is Kubectl with a text on standard input.
func (k *Cluster) KubectlIn(ctx context.Context, stdin string, args ...string) (string, error) {
	return k.administer(ctx, stdin, append([]string{k.Kubernetes, "kubectl", "--request-timeout=20s"}, args...)...)
}

// RunHelm runs helm as an administrator.
func (k *Cluster) RunHelm(ctx context.Context, args ...string) (string, error) {
	return k.administer(ctx, "", append([]string{k.Helm}, args...)...)
}

func (k *Cluster) administer(ctx context.Context, stdin string, args ...string) (string, error) {
	c := k.Lab.Control.Command(ctx, args...)
	c.Stdin = strings.NewReader(stdin)
	c.Env = append(os.Environ(), "KUBECONFIG="+k.pki.path("admin.kubeconfig"), "HOME="+k.Lab.Dir) // their caches
	return nodes.Output(c)
}

// Get decodes what `kubectl get -o json` prints.
func (k *Cluster) Get(ctx context.Context, into any, args ...string) error {
	out, err := k.Kubectl(ctx, append([]string{"get", "-o", "json"}, args...)...)
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(out), into)
}

// Poll calls f until it returns nil, at most for so long. The last error is part of the one returned.
func Poll(ctx context.Context, wait time.Duration, what string, f func() error) error {
	for end := time.Now().Add(wait); ; {
		err := f()
		if err == nil {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s: not within %s: %w", what, wait, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}
