package lab

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/overlayd/overlayd/addr"
)

// pollInterval is how often something awaited is looked at.
const pollInterval = 50 * time.Millisecond

// Node is one node of a lab that is up: a machine, and the overlayd process on it.
type Node struct {
	Machine
	Process
	spec    NodeSpec
	options Options
	dir     string
	segment string // the namespace of the segment it is plugged into
}

func newNode(t Topology, spec NodeSpec, dir string) *Node {
	n := &Node{
		Machine: Machine{Name: spec.Name, NS: spec.NS},
		spec:    spec,
		options: t.Options,
		dir:     filepath.Join(dir, spec.Name),
		segment: t.Switches[spec.Segment-1].NS,
	}
	n.Process = Process{name: spec.Name, ns: spec.NS, dir: dir, argv: func() []string {
		return n.overlaydArgv(t.EtcdURLs(), filepath.Join(dir, networkFile))
	}}
	return n
}

func (n *Node) overlaydArgv(etcd []string, config string) []string {
	argv := []string{
		n.options.Overlayd,
		"--etcd-endpoints", strings.Join(etcd, ","),
		"--node-name", n.Name,
		"--node-id", n.spec.ID,
		"--state-dir", n.StateDir(),
		"--subnet-file", n.SubnetFile(),
		"--healthz-port", strconv.Itoa(healthzPort),
		"--init-config", config,
	}
	return append(argv, n.options.OverlaydArgs...)
}

// StateDir is overlayd's --state-dir.
func (n *Node) StateDir() string { return filepath.Join(n.dir, "state") }

// SubnetFile is overlayd's --subnet-file.
func (n *Node) SubnetFile() string { return filepath.Join(n.dir, "subnet.env") }

// Spec is the node as the topology has it.
func (n *Node) Spec() NodeSpec { return n.spec }

// Addr is the node's address in the underlay.
func (n *Node) Addr(f addr.Family) netip.Addr { return n.spec.Addr.Get(f) }

// Pods are the pods of the node.
func (n *Node) Pods() []Machine {
	var out []Machine
	for _, p := range n.spec.Pods {
		out = append(out, Machine{Name: p.Name, NS: p.NS})
	}
	return out
}

// Ready asks the daemon's /readyz.
func (n *Node) Ready(ctx context.Context) error {
	_, err := n.Get(ctx, fmt.Sprintf("http://127.0.0.1:%d/readyz", healthzPort))
	return err
}

// WaitReady waits until the daemon says that it is ready.
func (n *Node) WaitReady(ctx context.Context) error {
	return poll(ctx, pollInterval, func() error {
		if !n.Running() {
			return fatal{fmt.Errorf("overlayd on %s has ended", n.Name)}
		}
		return n.Ready(ctx)
	})
}

// SubnetEnv reads the node's subnet.env as it is now.
func (n *Node) SubnetEnv() (SubnetEnv, error) {
	b, err := os.ReadFile(n.SubnetFile())
	if err != nil {
		return SubnetEnv{}, fmt.Errorf("read the subnet of %s: %w", n.Name, err)
	}
	env, err := ParseSubnetEnv(string(b), n.options.Stack.Families())
	if err != nil {
		return SubnetEnv{}, fmt.Errorf("%s: %w", n.SubnetFile(), err)
	}
	return env, nil
}

// Lease is what the node got, as its subnet.env says it.
func (n *Node) Lease() (Lease, error) {
	env, err := n.SubnetEnv()
	if err != nil {
		return Lease{}, err
	}
	lease := Lease{Node: n.Name, Segment: n.spec.Segment, MTU: env.MTU}
	for _, f := range n.options.Stack.Families() {
		lease.Underlay = append(lease.Underlay, n.Addr(f))
		lease.Subnets = append(lease.Subnets, env.Gateway.Get(f).Masked())
	}
	for _, p := range n.Pods() {
		lease.Pods = append(lease.Pods, p.Name)
	}
	return lease, nil
}

// Unplug pulls the node's cable at the switch: its interface stays up, without a carrier.
func (n *Node) Unplug() error {
	return withLinks(n.segment, func(nl *netlink.Handle) error { return setDown(nl, n.Name) })
}

// Plug puts the cable back.
func (n *Node) Plug() error {
	return withLinks(n.segment, func(nl *netlink.Handle) error { return setUp(nl, n.Name) })
}

// LinkDown takes the node's interface down; the kernel drops its routes, and its IPv6 addresses.
func (n *Node) LinkDown() error {
	return withLinks(n.NS, func(nl *netlink.Handle) error { return setDown(nl, underlayLink) })
}

// LinkUp brings the interface up again with its addresses and routes, as a host's network manager does.
func (n *Node) LinkUp() error { return configureHost(n.spec.Host) }

// makeDirs makes the directories that the daemon is given.
func (n *Node) makeDirs() error {
	if err := os.MkdirAll(n.StateDir(), 0o755); err != nil {
		return fmt.Errorf("make the directories of %s: %w", n.Name, err)
	}
	return nil
}
