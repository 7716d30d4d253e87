package lab

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/apiserver/command"
)

const (
	apiPort = 6443
	// apiTimeout bounds how long a kube-apiserver may take to be ready: some seconds on a machine that is not busy.
	apiTimeout = 2 * time.Minute
)

// APIServer is a real kube-apiserver in front of the lab's etcd, on the same machine, in a process of its own. It has a
// Node for each node of the lab, with its pod CIDRs, and the ConfigMap with the network config.
type APIServer struct {
	Machine
	Process
	command command.Server
}

func newAPIServer(t Topology, dir string) *APIServer {
	e := newEtcd(t, dir, 1)
	a := &APIServer{Machine: e.Machine, command: command.Server{
		Dir: filepath.Join(dir, "apiserver"), Address: t.Etcd.Interfaces[0].Addrs[0].Addr().String(),
		Port: strconv.Itoa(apiPort), Etcd: e.LocalURL(),
	}}
	a.Process = Process{name: "apiserver", ns: a.NS, dir: dir, argv: func() []string {
		return a.command.Argv(t.Options.kubernetes())
	}}
	return a
}

func (a *APIServer) url() string {
	return "https://" + netip.AddrPortFrom(netip.MustParseAddr(a.command.Address), apiPort).String()
}

// Kubeconfig is the path of the file by which the daemons reach the server.
func (a *APIServer) Kubeconfig() string { return filepath.Join(a.command.Dir, "kubeconfig") }

func (a *APIServer) writeFiles() error {
	config := a.command.Kubeconfig(fmt.Sprintf("server: %q", a.url()), "token: "+command.Admin)
	return errors.Join(os.MkdirAll(a.command.Dir, 0o700), a.command.WriteFiles(),
		os.WriteFile(a.Kubeconfig(), []byte(config), 0o600))
}

// WaitReady waits until it answers that it is ready.
func (a *APIServer) WaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	return poll(ctx, 2*pollInterval, func() error {
		if !a.Running() {
			return fatal{fmt.Errorf("kube-apiserver has ended; the end of %s:\n%s", a.Log(), a.tail(10))}
		}
		return a.Do(ctx, http.MethodGet, "/readyz", "", nil)
	})
}

// Do sends a request as the administrator, with a body as JSON where there is one. Of a patch, kind is merge,
// strategic-merge or apply.
func (a *APIServer) Do(ctx context.Context, method, path, kind string, body any) error {
	ctx, cancel := context.WithTimeout(ctx, 10*getTimeout)
	defer cancel()
	return a.do(ctx, method, path, kind, body, func(io.Reader) error { return nil })
}

// Watch calls a function with each event of a watch until the context ends, or the watch.
func (a *APIServer) Watch(ctx context.Context, path string, f func(json.RawMessage)) error {
	return a.do(ctx, http.MethodGet, path, "", nil, func(r io.Reader) error {
		for d := json.NewDecoder(r); ; {
			var event json.RawMessage
			if err := d.Decode(&event); err != nil {
				return err
			}
			f(event)
		}
	})
}

func (a *APIServer) do(ctx context.Context, method, path, kind string, body any, read func(io.Reader) error) error {
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	r, err := http.NewRequestWithContext(ctx, method, a.url()+path, bytes.NewReader(text))
	if err != nil {
		return err
	}
	r.Header.Set("Authorization", "Bearer "+command.Admin)
	r.Header.Set("Content-Type", "application/json")
	if kind != "" {
		r.Header.Set("Content-Type", "application/"+kind+"-patch+json")
	}
	client := http.Client{Transport: &http.Transport{
		DialContext: a.DialContext, DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // the certificate is made at the start
	}}
	resp, err := client.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode >= http.StatusMultipleChoices {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, bytes.TrimSpace(text))
	}
	return read(resp.Body)
}

// AddNode makes the Node of a node, as its kubelet and kube-controller-manager would.
func (a *APIServer) AddNode(ctx context.Context, n *Node) error {
	cidrs := n.podCIDRs()
	return a.Do(ctx, http.MethodPost, "/api/v1/nodes", "", map[string]any{
		"metadata": map[string]any{"name": n.Name}, "spec": map[string]any{"podCIDR": cidrs[0], "podCIDRs": cidrs},
	})
}

// NodePath is where the Node of a node is.
func NodePath(n *Node) string { return "/api/v1/nodes/" + n.Name }

// podCIDRs are the subnets of the node's Node.
func (n *Node) podCIDRs() (out []string) {
	for _, f := range n.options.Stack.Families() {
		if i := n.spec.host; f == addr.IPv4 {
			out = append(out, fmt.Sprintf("10.244.%d.0/24", i))
		} else {
			out = append(out, fmt.Sprintf("fd00:10:244:%x::/64", i))
		}
	}
	return out
}

func (l *Lab) startAPIServer(ctx context.Context) error {
	a := l.api
	if a == nil {
		return nil
	}
	if err := errors.Join(a.writeFiles(), a.Start()); err != nil {
		return err
	}
	if err := a.WaitReady(ctx); err != nil {
		return err
	}
	for _, n := range l.nodes {
		if err := a.AddNode(ctx, n); err != nil {
			return err
		}
	}
	network, err := l.topology.NetworkConfig()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	return poll(ctx, 2*pollInterval, func() error { // the namespace is made by the server
		return a.Do(ctx, http.MethodPost, "/api/v1/namespaces/kube-system/configmaps", "", map[string]any{
			"metadata": map[string]any{"name": "overlayd"}, "data": map[string]any{"net-conf.json": string(network)},
		})
	})
}

// storeArgs tell the daemon and its commands where the lease store is.
func (n *Node) storeArgs(etcd []string) []string {
	if n.api != nil {
		return []string{"--store", "kubernetes", "--kubeconfig", n.api.Kubeconfig()}
	}
	args := []string{"--etcd-endpoints", strings.Join(etcd, ",")}
	if n.options.Secure {
		args = append(args, secrets{filepath.Dir(n.dir)}.overlaydArgs()...)
	}
	return args
}
