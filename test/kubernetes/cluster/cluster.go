// Package cluster runs a real Kubernetes on the machines of package nodes: the control plane, its etcd, and where overlayd
// is to have one, another etcd for it on the host "control", and containerd, a kubelet and kube-proxy on each node.
package cluster

import (
	"context"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
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
	Etcd       bool     // overlayd has an etcd; without one, nodes get podCIDRs
}

// Cluster is a running cluster.
type Cluster struct {
	Config
	Lab     *nodes.Lab
	Nodes   []*Node
	pki     *pki
	daemons map[string]*nodes.Process // on the control host, by name
	api     *http.Client              // by way of `kubectl proxy`
	noCIDRs bool                      // the controller manager gives none for the time being
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
	k.api = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", k.proxySocket())
		},
	}}
	var err error
	if k.pki, err = newPKI(filepath.Join(lab.Dir, "pki")); err != nil {
		return nil, err
	}
	err = errors.Join(
		k.pki.issue("apiserver", pkix.Name{CommonName: "kube-apiserver"}, apiServer, "127.0.0.1", "10.96.0.1", "fd00:96::1",
			"kubernetes", "kubernetes.default", "kubernetes.default.svc"),
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
	first := []string{"etcd", "kube-apiserver", "kubectl"}
	if k.Etcd {
		first = append(first, "overlay-etcd")
	}
	for _, name := range first {
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
	return k, Poll(ctx, "the service account of the namespace default", func() error {
		return k.Get(ctx, &struct{}{}, Namespace("default")+"/serviceaccounts/default")
	})
}

// proxySocket is where `kubectl proxy` listens.
func (k *Cluster) proxySocket() string { return filepath.Join(k.Lab.Dir, "api.sock") }

// StartControl starts a daemon of the control plane: etcd, overlay-etcd, kube-apiserver, kube-controller-manager,
// kube-scheduler or kubectl (as a proxy).
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
			"etcd", "--data-dir=" + filepath.Join(k.Lab.Dir, name), "--listen-client-urls=" + client,
			"--advertise-client-urls=" + client,
			fmt.Sprintf("--listen-peer-urls=http://127.0.0.1:%d", peer), "--unsafe-no-fsync",
		}, more...)
	}
	switch name {
	case "etcd":
		return etcd("http://127.0.0.1:2379", 2380)
	case "overlay-etcd":
		return etcd(OverlayEtcd, 2480, "--client-cert-auth", "--trusted-ca-file="+f("ca.crt"),
			"--cert-file="+f("overlay-etcd.crt"), "--key-file="+f("overlay-etcd.key"))
	case "kube-apiserver":
		return []string{
			name, "--etcd-servers=http://127.0.0.1:2379", "--advertise-address=" + apiServer, "--secure-port=6443",
			"--tls-cert-file=" + f("apiserver.crt"), "--tls-private-key-file=" + f("apiserver.key"), "--client-ca-file=" +
				f("ca.crt"),
			"--kubelet-client-certificate=" + f("admin.crt"), "--kubelet-client-key=" + f("admin.key"),
			"--kubelet-certificate-authority=" + f("ca.crt"),
			"--kubelet-preferred-address-types=InternalIP", "--service-cluster-ip-range=" + serviceNet,
			"--authorization-mode=Node,RBAC",
			"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file=" + f("sa.key"),
			"--service-account-signing-key-file=" + f("sa.key"),
			"--allow-privileged=true",
		}
	case "kubectl":
		return []string{name, "proxy", "--kubeconfig=" + k.AdminConfig(), "--unix-socket=" + k.proxySocket()}
	case "kube-controller-manager":
		config := f("controllers.kubeconfig")
		return append([]string{
			name, "--kubeconfig=" + config, "--authentication-kubeconfig=" + config, "--authorization-kubeconfig=" + config,
			"--use-service-account-credentials", "--service-account-private-key-file=" + f("sa.key"), "--root-ca-file=" +
				f("ca.crt"),
			"--service-cluster-ip-range=" + serviceNet, "--leader-elect=false", "--bind-address=127.0.0.1",
			"--node-monitor-grace-period=20s",
		}, k.podCIDRs()...)
	default:
		config := f("scheduler.kubeconfig")
		return []string{
			name, "--kubeconfig=" + config, "--authentication-kubeconfig=" + config,
			"--authorization-kubeconfig=" + config, "--leader-elect=false", "--bind-address=127.0.0.1",
		}
	}
}

// podCIDRs are the arguments with which the controller manager gives nodes podCIDRs.
func (k *Cluster) podCIDRs() []string {
	if k.Etcd || k.noCIDRs {
		return nil
	}
	return []string{"--allocate-node-cidrs", "--cluster-cidr=" + podNet + "," + podNet6}
}

// Subnets says whether new nodes get a subnet: whether overlayd's etcd runs, or where it has none, whether the controller
// manager gives podCIDRs.
func (k *Cluster) Subnets(given bool) error {
	switch {
	case k.Etcd && given:
		return k.StartControl("overlay-etcd")
	case k.Etcd:
		k.StopControl("overlay-etcd")
		return nil
	}
	k.noCIDRs = !given
	k.StopControl("kube-controller-manager")
	return k.StartControl("kube-controller-manager")
}

// Certificate issues a certificate for hosts, and returns files: the CA, the certificate and its key.
func (k *Cluster) Certificate(name string, hosts ...string) (ca, cert, key string, err error) {
	err = k.pki.issue(name, pkix.Name{CommonName: name}, hosts...)
	return k.pki.path("ca.crt"), k.pki.path(name + ".crt"), k.pki.path(name + ".key"), err
}

// EtcdClient returns files with what a client of overlayd's etcd needs: the CA, a certificate and its key.
func (k *Cluster) EtcdClient() (ca, cert, key string) {
	return k.pki.path("ca.crt"), k.pki.path("overlayd.crt"), k.pki.path("overlayd.key")
}

// AdminConfig is the kubeconfig of an administrator.
func (k *Cluster) AdminConfig() string { return k.pki.path("admin.kubeconfig") }

// RoutePods gives the control plane routes to the pods of all nodes: the API server connects to webhooks, and proxies to
// pods and services. It has no overlayd. The routes are those of the subnets at this time.
func (k *Cluster) RoutePods(ctx context.Context) error {
	for _, n := range k.Nodes {
		env, err := n.Run(ctx, "cat", "/run/overlayd/subnet.env")
		if err != nil {
			return err
		}
		for line := range strings.Lines(env) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			via := n.IP
			switch name {
			case "FLANNEL_SUBNET":
			case "FLANNEL_IPV6_SUBNET":
				via = n.IP6
			default:
				continue
			}
			subnet, err := netip.ParsePrefix(value)
			if err != nil {
				return fmt.Errorf("%s of %s: %w", name, n.Name, err)
			}
			_, err = k.Lab.Control.Run(ctx, "ip", "route", "replace", subnet.Masked().String(), "via", via.String())
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// WaitAPI waits until the API server is ready.
func (k *Cluster) WaitAPI(ctx context.Context) error {
	return Poll(ctx, "the API server", func() error {
		if k.daemons["kube-apiserver"].Ended() {
			return errors.New("kube-apiserver has ended: see its log")
		}
		_, err := k.read(ctx, "/readyz")
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
	c.Env = append(os.Environ(), "KUBECONFIG="+k.AdminConfig(), "HOME="+k.Lab.Dir) // their caches
	return nodes.Output(c)
}

// Namespace is the path of a namespace's objects in the core API.
func Namespace(name string) string { return "/api/v1/namespaces/" + name }

// Get decodes what the API server has at a path, such as /api/v1/nodes. It is cheap enough to be asked all the time:
// each start of kubectl takes a quarter of a second of processor time.
func (k *Cluster) Get(ctx context.Context, into any, path string) error {
	raw, err := k.read(ctx, path)
	if err != nil {
		return err
	}
	return json.Unmarshal(raw, into)
}

func (k *Cluster) read(ctx context.Context, path string) ([]byte, error) {
	return k.request(ctx, http.MethodGet, path, nil, "")
}

// PatchAs merges JSON into an object as the service account of a pod on a node, whose token names that node.
func (k *Cluster) PatchAs(ctx context.Context, account, node, path, merge string) error {
	_, err := k.request(ctx, http.MethodPatch, path, http.Header{
		"Content-Type": {"application/merge-patch+json"}, "Impersonate-User": {account},
		"Impersonate-Extra-authentication.kubernetes.io%2fnode-name": {node},
	}, merge)
	return err
}

func (k *Cluster) request(ctx context.Context, method, path string, header http.Header, body string) ([]byte, error) {
	q, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	maps.Copy(q.Header, header)
	r, err := k.api.Do(q)
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	raw, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s: %s: %s", method, path, r.Status, raw)
	}
	return raw, err
}

// Patience is after how long something that does not come is taken to hang. It is no promise of a speed: a busy machine
// takes many times as long as an idle one.
const Patience = 5 * time.Minute

// Poll calls f until it returns nil, or [Patience] is over. The last error is part of the one returned.
func Poll(ctx context.Context, what string, f func() error) error {
	for end := time.Now().Add(Patience); ; {
		err := f()
		if err == nil {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s: not within %s: %w", what, Patience, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}
