package cluster

import (
	"context"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/overlayd/overlayd/test/kubernetes/nodes"
)

// containerdConfig is in the form that containerd 1 reads, and containerd 2 turns into its own.
const containerdConfig = `version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  sandbox_image = "registry.k8s.io/pause:3.10"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
`

const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: %s
failSwapOn: false
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: %s}}
authorization: {mode: Webhook}
tlsCertFile: %s
tlsPrivateKeyFile: %s
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
resolvConf: ""
clusterDNS: [%s]
clusterDomain: cluster.local
enforceNodeAllocatable: []
evictionHard: {memory.available: "50Mi", nodefs.available: "1%%", imagefs.available: "1%%", nodefs.inodesFree: "1%%"}
imageGCHighThresholdPercent: 100
maxPods: 130
nodeStatusReportFrequency: 5s
syncFrequency: 5s
`

const proxyConfig = `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: %s
clusterCIDR: %s,%s
hostnameOverride: %s
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 1h0m0s}
clientConnection: {kubeconfig: %s}
`

// Add makes nodes with these numbers and starts what belongs on them. It returns without waiting for them to be known.
func (k *Cluster) Add(ctx context.Context, numbers ...int) error {
	added, errs := make([]*Node, len(numbers)), make([]error, len(numbers))
	var wg sync.WaitGroup
	for i, number := range numbers {
		wg.Go(func() { added[i], errs[i] = k.add(ctx, number) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	k.Nodes = append(k.Nodes, added...)
	return nil
}

func (k *Cluster) add(ctx context.Context, number int) (*Node, error) {
	machine, err := k.Lab.Node(ctx, number)
	if err != nil {
		return nil, err
	}
	n := &Node{Node: machine}
	err = errors.Join(
		k.pki.user(n.Name, pkix.Name{CommonName: "system:node:" + n.Name, Organization: []string{"system:nodes"}}),
		k.pki.issue(n.Name+"-server", pkix.Name{CommonName: "system:node:" + n.Name}, n.Name, n.IP.String(), n.IP6.String()),
	)
	if err != nil {
		return nil, err
	}
	return n, k.Boot(ctx, n, k.Images)
}

// oldNode is the node with the machine's containerd of version 1, as older nodes have it. The others have version 2.
const oldNode = "n1"

// withPath runs a command with the node's containerd in its PATH.
func (n *Node) withPath(args ...string) []string {
	return append([]string{"env", "PATH=" + n.path}, args...)
}

// Boot starts containerd, the kubelet and kube-proxy on a node that has been switched on, and gives it images.
func (k *Cluster) Boot(ctx context.Context, n *Node, images []string) error {
	n.daemons = map[string]*nodes.Process{}
	config, err := k.write(n, "containerd.toml", containerdConfig)
	if err != nil {
		return err
	}
	n.path = os.Getenv("PATH")
	if n.Name != oldNode {
		n.path = k.Containerd + ":" + n.path // containerd looks there for its shim, too
	}
	if n.daemons["containerd"], err = n.Start("containerd", n.withPath("containerd", "--config", config)...); err != nil {
		return err
	}
	err = Poll(ctx, "containerd on "+n.Name, func() error {
		_, err := n.Run(ctx, n.withPath("ctr", "version")...)
		return err
	})
	if err != nil {
		return err
	}
	if err := n.Import(ctx, images...); err != nil {
		return err
	}
	if err := k.StartKubelet(n); err != nil {
		return err
	}
	return k.Proxy(ctx, n, k.ProxyMode)
}

// StartKubelet starts the kubelet on a node; where it runs, it is stopped before.
func (k *Cluster) StartKubelet(n *Node) error {
	if old := n.daemons["kubelet"]; old != nil {
		old.Stop()
	}
	f := k.pki.path
	config, err := k.write(n, "kubelet.yaml", fmt.Sprintf(kubeletConfig, n.Cgroup(), f("ca.crt"), f(n.Name+"-server.crt"),
		f(n.Name+"-server.key"), DNSService))
	if err != nil {
		return err
	}
	n.daemons["kubelet"], err = n.Start("kubelet", k.Kubernetes, "kubelet", "--config="+config,
		"--kubeconfig="+f(n.Name+".kubeconfig"),
		"--hostname-override="+n.Name, "--node-ip="+n.IP.String()+","+n.IP6.String(), "--v=2")
	return err
}

// Proxy starts kube-proxy on a node; where it runs, it is stopped before, and its rules are removed.
func (k *Cluster) Proxy(ctx context.Context, n *Node, mode string) error {
	if old := n.daemons["kube-proxy"]; old != nil {
		old.Stop()
		err := Poll(ctx, "the end of kube-proxy's rules", func() error { // others change the firewall, too
			_, err := n.Run(ctx, k.Kubernetes, "kube-proxy", "--cleanup")
			return err
		})
		if err != nil {
			return err
		}
	}
	config, err := k.write(n, "kube-proxy.yaml", fmt.Sprintf(proxyConfig, mode, podNet, podNet6, n.Name,
		k.pki.path("proxy.kubeconfig")))
	if err != nil {
		return err
	}
	n.daemons["kube-proxy"], err = n.Start("kube-proxy", k.Kubernetes, "kube-proxy", "--config="+config, "--v=2")
	return err
}

// Import gives a node images from archives.
func (n *Node) Import(ctx context.Context, archives ...string) error {
	for _, a := range archives {
		if _, err := n.Run(ctx, n.withPath("ctr", "--namespace", "k8s.io", "images", "import", a)...); err != nil {
			return err
		}
	}
	return nil
}

func (k *Cluster) write(n *Node, name, content string) (string, error) {
	dir := filepath.Join(k.Lab.Dir, "config-"+n.Name)
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	return path, os.WriteFile(path, []byte(content), 0o644)
}

// Node finds a node by its name.
func (k *Cluster) Node(name string) (*Node, error) {
	for _, n := range k.Nodes {
		if n.Name == name {
			return n, nil
		}
	}
	return nil, fmt.Errorf("there is no node %s", name)
}

// nodeList is what is needed of the list of nodes.
type nodeList struct {
	Items []struct {
		Metadata struct{ Name string }
		Status   struct {
			Conditions []struct{ Type, Status string }
			NodeInfo   struct{ ContainerRuntimeVersion string }
		}
	}
}

// WaitReady waits until these nodes are Ready (or, with ready false, known and not Ready).
func (k *Cluster) WaitReady(ctx context.Context, ready bool, names ...string) error {
	return Poll(ctx, "nodes "+strings.Join(names, " "), func() error {
		var list nodeList
		if err := k.Get(ctx, &list, "/api/v1/nodes"); err != nil {
			return err
		}
		is := map[string]bool{}
		for _, n := range list.Items {
			for _, c := range n.Status.Conditions {
				if c.Type == "Ready" {
					is[n.Metadata.Name] = c.Status == "True"
				}
			}
		}
		for _, name := range names {
			if got, known := is[name]; !known || got != ready {
				return fmt.Errorf("known nodes, and whether they are Ready: %v", is)
			}
		}
		return nil
	})
}

// Runtimes says which container runtime each node has, and fails where it is another one than it should be.
func (k *Cluster) Runtimes(ctx context.Context) (string, error) {
	var list nodeList
	if err := k.Get(ctx, &list, "/api/v1/nodes"); err != nil {
		return "", err
	}
	var out []string
	for _, n := range list.Items {
		version := n.Status.NodeInfo.ContainerRuntimeVersion
		if strings.HasPrefix(version, "containerd://1.") != (n.Metadata.Name == oldNode) {
			return "", fmt.Errorf("%s has %s, and only %s should have version 1", n.Metadata.Name, version, oldNode)
		}
		out = append(out, n.Metadata.Name+": "+version)
	}
	return strings.Join(out, ", "), nil
}
