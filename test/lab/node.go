package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

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
	api     *APIServer // nil: the leases are in etcd itself
	segment string     // the namespace of the segment it is plugged into
	where   func() []string
	more    []string // arguments of the daemon, behind all others
}

func newNode(t Topology, spec NodeSpec, dir string, api *APIServer) *Node {
	n := &Node{
		Machine: Machine{Name: spec.Name, NS: spec.NS},
		spec:    spec,
		options: t.Options,
		dir:     filepath.Join(dir, spec.Name),
		api:     api,
		segment: t.Switches[spec.Segment-1].NS,
	}
	n.where = func() []string { return n.whereArgs(t.EtcdURLs()) }
	n.Process = Process{name: spec.Name, ns: spec.NS, dir: dir, env: t.Options.OverlaydEnv, argv: func() []string {
		return n.overlaydArgv(t.EtcdURLs(), filepath.Join(dir, networkFile))
	}}
	return n
}

func (n *Node) overlaydArgv(etcd []string, config string) []string {
	argv := append(n.inside(n.options.Overlayd), n.whereArgs(etcd)...)
	if n.options.Backend == WireGuard {
		argv = append(argv, "--wireguard-program", n.options.wireGuard())
	}
	argv = append(argv, "--healthz-port", strconv.Itoa(healthzPort))
	if n.api == nil {
		argv = append(argv, "--init-config", config)
	}
	return slices.Concat(argv, n.options.OverlaydArgs, n.more)
}

// inside is how a program begins that is to find the node's WireGuard devices. Programs in user space have a socket for
// each in /run/wireguard, under its name, which is the same on all nodes.
func (n *Node) inside(program string) []string {
	if n.options.Backend != WireGuard {
		return []string{program}
	}
	const script = `mkdir -p "$0" /run/wireguard && mount --bind "$0" /run/wireguard && exec "$@"`
	return []string{"unshare", "-m", "sh", "-ec", script, filepath.Join(n.dir, "wireguard"), program}
}

// With gives the daemon more arguments from its next start on, instead of those that were given before.
func (n *Node) With(args ...string) { n.more = args }

// whereArgs say where everything is of this node: the daemon and its commands are told the same.
func (n *Node) whereArgs(etcd []string) []string {
	return append(n.storeArgs(etcd),
		"--node-name", n.Name,
		"--node-id", n.spec.ID,
		"--state-dir", n.StateDir(),
		"--subnet-file", n.SubnetFile(),
		"--socket", n.Socket(),
	)
}

// Use makes another file the node's overlayd from its next start on, as an upgrade does.
func (n *Node) Use(overlayd string) { n.options.Overlayd = overlayd }

// Argv is the command line of the node's overlayd.
func (n *Node) Argv() []string { return n.argv() }

// StateDir is overlayd's --state-dir.
func (n *Node) StateDir() string { return filepath.Join(n.dir, "state") }

// SubnetFile is overlayd's --subnet-file.
func (n *Node) SubnetFile() string { return filepath.Join(n.dir, "subnet.env") }

// Socket is overlayd's --socket.
func (n *Node) Socket() string { return filepath.Join(n.dir, "overlayd.sock") }

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

// Overlayd runs a command of the node's overlayd, such as status, on the node, and returns what it printed. That it
// ends with an exit status other than 0 is no error: it may be what it has to say.
func (n *Node) Overlayd(ctx context.Context, command string, args ...string) (string, error) {
	argv := slices.Concat(n.inside(n.options.Overlayd), []string{command, "--socket", n.Socket()}, args)
	out, err := n.Run(ctx, argv[0], argv[1:]...)
	if errors.As(err, new(*exec.ExitError)) {
		err = nil
	}
	return out, err
}

// Doctor runs overlayd's checks on the node, and returns what they say.
func (n *Node) Doctor(ctx context.Context, more ...string) (string, error) {
	return n.Overlayd(ctx, "doctor", append(n.where(), more...)...)
}

// Readyz asks the daemon's /readyz: the HTTP status and the text.
func (n *Node) Readyz(ctx context.Context) (code int, text string, err error) {
	return n.Ask(ctx, fmt.Sprintf("http://127.0.0.1:%d/readyz", healthzPort))
}

// Ready says why the daemon is not ready.
func (n *Node) Ready(ctx context.Context) error {
	code, text, err := n.Readyz(ctx)
	if err != nil {
		return err
	}
	return unless(code == http.StatusOK, "%s: /readyz: %d: %s", n.Name, code, strings.TrimSpace(text))
}

// Metrics reads the daemon's metrics.
func (n *Node) Metrics(ctx context.Context) (string, error) {
	return n.Get(ctx, fmt.Sprintf("http://127.0.0.1:%d/metrics", healthzPort))
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
func (n *Node) Unplug() error { return script(n.segment, "ip link set "+n.Name+" down") }

// Plug puts the cable back.
func (n *Node) Plug() error { return script(n.segment, "ip link set "+n.Name+" up") }

// LinkDown takes the node's interface down; the kernel drops its routes, and its IPv6 addresses.
func (n *Node) LinkDown() error { return script(n.NS, "ip link set "+underlayLink+" down") }

// LinkUp brings the interface up again with its addresses and routes, as a host's network manager does.
func (n *Node) LinkUp() error { return configureHost(n.spec.Host) }

// RecreateLink deletes the node's interface, as a driver that is unloaded does; the returned function puts the same one
// (with its MAC, addresses and routes) in again.
func (n *Node) RecreateLink() (back func() error, err error) {
	var link *net.Interface
	err = n.Do(func() (err error) {
		link, err = net.InterfaceByName(underlayLink)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: find %s: %w", n.Name, underlayLink, err)
	}
	return func() error {
		cable := Cable{Port{n.NS, underlayLink}, Port{n.segment, n.Name}}
		if err := plug(cable, underlayMTU, link.HardwareAddr.String(), switchBridge); err != nil {
			return err
		}
		return configureHost(n.spec.Host)
	}, n.RemoveLink(underlayLink)
}

// AddLink gives the node one more interface, in another segment, with the addresses that the node's own number has
// there. It returns the gateways there. The node takes in what comes to it by the longer way.
func (n *Node) AddLink(t Topology, name string, segment int) (at, via addr.Per[netip.Prefix], err error) {
	if segment < 1 || segment > len(t.Switches) {
		return at, via, fmt.Errorf("%s: there is no segment %d", n.Name, segment)
	}
	i := Interface{Name: name}
	for _, f := range n.options.Stack.Families() {
		at.Set(f, hostAddr(segmentNet(segment)(f), n.spec.host))
		via.Set(f, hostAddr(segmentNet(segment)(f), 1))
		i.Addrs = append(i.Addrs, at.Get(f))
	}
	// the same each time: others remember it for some seconds
	mac := net.HardwareAddr{2, 0, 0, 0, byte(segment), byte(n.spec.host)}.String()
	cable := Cable{Port{n.NS, name}, Port{t.Switches[segment-1].NS, n.Name + "-" + name}}
	if err := plug(cable, underlayMTU, mac, switchBridge); err != nil {
		return at, via, err
	}
	return at, via, script(n.NS, i.script()+"echo 2 > /proc/sys/net/ipv4/conf/"+name+"/rp_filter")
}

// RemoveLink takes an interface of the node away. One that is not there is no error.
func (n *Node) RemoveLink(name string) error {
	return script(n.NS, fmt.Sprintf("ip link del %[1]s 2>/dev/null || ! ip link show %[1]s", name))
}

// makeDirs makes the directories that the daemon is given.
func (n *Node) makeDirs() error {
	if err := os.MkdirAll(n.StateDir(), 0o755); err != nil {
		return fmt.Errorf("make the directories of %s: %w", n.Name, err)
	}
	return nil
}
