package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
)

// The files in a lab's directory.
const (
	stateFile   = "lab.json"
	networkFile = "network.json"
)

// readyTimeout bounds each wait for etcd and for the nodes to become ready.
const readyTimeout = 45 * time.Second

// Lab is a lab that is up, made by [Up] or found by [Open].
type Lab struct {
	topology Topology
	dir      string
	nodes    []*Node
	etcd     *Etcd   // the first member
	etcds    []*Etcd // all of them
	api      *APIServer
}

func newLab(t Topology) *Lab {
	l := &Lab{topology: t, dir: labDir(t.Options.Name)}
	for i := 1; i <= max(1, t.Options.EtcdMembers); i++ {
		l.etcds = append(l.etcds, newEtcd(t, l.dir, i))
	}
	l.etcd = l.etcds[0]
	if t.Options.Kubernetes {
		l.api = newAPIServer(t, l.dir)
	}
	for _, spec := range t.Nodes {
		l.nodes = append(l.nodes, newNode(t, spec, l.dir, l.api))
	}
	return l
}

// Up brings a lab up and returns once all nodes are ready and all pods are made. What an earlier lab of this name left
// behind is removed first. Where Up fails, or its context ends, the logs stay for a look at them, and [Down] removes
// the rest.
func Up(ctx context.Context, o Options) (*Lab, error) {
	o, err := o.Defaults()
	if err != nil {
		return nil, err
	}
	if err := errors.Join(o.Validate(), o.checkBinaries()); err != nil {
		return nil, err
	}
	if inside := os.Getenv(insideEnv); inside != "" {
		// A test binary that does not know the subcommand for etcd would run its tests again, and they the next one.
		return nil, fmt.Errorf("this process was started as %q of a lab and makes no lab itself", inside)
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("the lab makes network namespaces: run it as root")
	}
	if err := removeLeftovers(ctx, o); err != nil {
		return nil, err
	}
	l := newLab(NewTopology(o))
	return l, l.bringUp(ctx)
}

func removeLeftovers(ctx context.Context, o Options) error {
	left, err := Leftovers(o.Name)
	if err != nil || len(left) == 0 {
		return err
	}
	o.Progress(fmt.Sprintf("removing the lab %q that is there already", o.Name))
	return Down(ctx, o.Name)
}

// Open finds a lab that is up by its name.
func Open(name string) (*Lab, error) {
	b, err := os.ReadFile(filepath.Join(labDir(name), stateFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("there is no lab %q: overlay-lab up makes one", name)
	}
	if err != nil {
		return nil, fmt.Errorf("open lab %q: %w", name, err)
	}
	var o Options
	if err := json.Unmarshal(b, &o); err != nil {
		return nil, fmt.Errorf("open lab %q: %s: %w", name, stateFile, err)
	}
	if o, err = o.Defaults(); err != nil {
		return nil, err
	}
	if err := o.Validate(); err != nil {
		return nil, fmt.Errorf("open lab %q: %s: %w", name, stateFile, err)
	}
	return newLab(NewTopology(o)), nil
}

// Down takes the lab down; see [Down].
func (l *Lab) Down(ctx context.Context) error { return Down(ctx, l.topology.Options.Name) }

// Topology is the plan that the lab was made from.
func (l *Lab) Topology() Topology { return l.topology }

// Dir holds the lab's state, logs and pid files.
func (l *Lab) Dir() string { return l.dir }

// XtablesLock is the lock file of legacy iptables that the lab's daemons use.
func (l *Lab) XtablesLock() string { return xtablesLock(l.dir) }

// Node is node number i, counted from 1 as in the names; a number that no node has panics, like an index.
func (l *Lab) Node(i int) *Node { return l.nodes[i-1] }

// Nodes are all nodes in order.
func (l *Lab) Nodes() []*Node { return l.nodes }

// Etcd is the lab's etcd, or its first member.
func (l *Lab) Etcd() *Etcd { return l.etcd }

// EtcdMembers are all members of the lab's etcd.
func (l *Lab) EtcdMembers() []*Etcd { return l.etcds }

// APIServer is the lab's kube-apiserver; nil without Options.Kubernetes.
func (l *Lab) APIServer() *APIServer { return l.api }

// Router is the machine between the segments.
func (l *Lab) Router() Machine { return Machine{l.topology.Router.Name, l.topology.Router.NS} }

// Internet is the host beyond the router.
func (l *Lab) Internet() Machine { return Machine{l.topology.Internet.Name, l.topology.Internet.NS} }

// Machine finds a machine by the name that the user gives it: "n1", "n1-p2", "router", "internet", "etcd", "seg1".
func (l *Lab) Machine(name string) (Machine, error) {
	ns, ok := l.topology.Find(name)
	if !ok {
		return Machine{}, fmt.Errorf("there is no %q in lab %q: want a node (n1), a pod (n1-p1), router, internet, etcd or a segment (seg1)",
			name, l.topology.Options.Name)
	}
	return Machine{Name: name, NS: ns}, nil
}

func (l *Lab) bringUp(ctx context.Context) error {
	for _, step := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"", func(context.Context) error { return l.writeFiles() }},
		{"building the underlay", func(context.Context) error { return buildUnderlay(l.topology) }},
		{"starting etcd", l.startEtcd},
		{"", l.startAPIServer},
		{"starting overlayd on every node", l.startNodes},
		{"", l.waitReady},
		{"making the pods", l.setupPods},
	} {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("bring the lab up: %w", context.Cause(ctx))
		}
		if step.what != "" {
			l.progress("%s", step.what)
		}
		if err := step.do(ctx); err != nil {
			return fmt.Errorf("bring the lab up: %w", err)
		}
	}
	return nil
}

func (l *Lab) progress(format string, args ...any) {
	l.topology.Options.Progress(fmt.Sprintf(format, args...))
}

// writeFiles makes the lab's directory, first of all the state, so that whatever follows can be found and removed.
func (l *Lab) writeFiles() error {
	for _, n := range l.nodes {
		if err := n.makeDirs(); err != nil {
			return err
		}
	}
	state, err := json.MarshalIndent(l.topology.Options, "", "  ")
	if err != nil {
		return fmt.Errorf("encode the lab's state: %w", err)
	}
	network, err := l.topology.NetworkConfig()
	if err != nil {
		return fmt.Errorf("encode the network config: %w", err)
	}
	return errors.Join(
		os.WriteFile(filepath.Join(l.dir, stateFile), state, 0o644),
		os.WriteFile(filepath.Join(l.dir, networkFile), network, 0o644))
}

func (l *Lab) startEtcd(ctx context.Context) error {
	if l.topology.Options.Secure {
		if err := (secrets{l.dir}).make(l.topology.Etcd.addrs()); err != nil {
			return err
		}
	}
	for _, e := range l.etcds {
		if err := e.Start(); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for _, e := range l.etcds {
		if err := e.WaitReady(ctx); err != nil {
			return err
		}
	}
	if l.topology.Options.Secure {
		return l.enableAuth(ctx)
	}
	return nil
}

func (l *Lab) startNodes(context.Context) error {
	for _, n := range l.nodes {
		if err := n.Start(); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lab) waitReady(ctx context.Context) error {
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	for _, n := range l.nodes {
		g.Go(func() error {
			if err := n.WaitReady(ctx); err != nil {
				return fmt.Errorf("%s did not get ready: %w\nthe end of %s:\n%s", n.Name, err, n.Log(), n.tail(10))
			}
			l.progress("%s is ready after %s", n.Name, time.Since(start).Round(10*time.Millisecond))
			return nil
		})
	}
	return g.Wait()
}

func (l *Lab) setupPods(context.Context) error {
	for _, n := range l.nodes {
		if err := n.SetupPods(); err != nil {
			return err
		}
	}
	return nil
}
