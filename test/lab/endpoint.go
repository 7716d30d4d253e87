package lab

import (
	"fmt"
	"net/netip"

	"github.com/overlayd/overlayd/addr"
)

// Kind says what an endpoint of the matrix is.
type Kind string

// The kinds of endpoints.
const (
	KindNode     Kind = "node"
	KindPod      Kind = "pod"
	KindInternet Kind = "internet"
)

// Endpoint is a machine that takes part in the matrix, with the addresses by which the others reach it.
type Endpoint struct {
	Machine
	Kind Kind
	Node *Node // where it runs; none for the internet host
	Addr addr.Per[netip.Addr]
	MTU  int // the pod MTU of its node; 0 for the internet host
}

// Endpoints lists every node followed by its pods. The pods' addresses are those that the nodes' subnet.env gives them.
func (l *Lab) Endpoints() ([]Endpoint, error) {
	var out []Endpoint
	for _, n := range l.nodes {
		env, err := n.SubnetEnv()
		if err != nil {
			return nil, err
		}
		out = append(out, Endpoint{Machine: n.Machine, Kind: KindNode, Node: n, Addr: n.spec.Addr, MTU: env.MTU})
		for i, m := range n.Pods() {
			out = append(out, n.podEndpoint(env, i, m))
		}
	}
	return out, nil
}

func (n *Node) podEndpoint(env SubnetEnv, i int, m Machine) Endpoint {
	e := Endpoint{Machine: m, Kind: KindPod, Node: n, MTU: env.MTU}
	for _, f := range n.options.Stack.Families() {
		e.Addr.Set(f, env.PodAddr(f, i).Addr())
	}
	return e
}

// PodEndpoint is pod number j on node number i, both counted from 1.
func (l *Lab) PodEndpoint(i, j int) (Endpoint, error) {
	n := l.Node(i)
	env, err := n.SubnetEnv()
	if err != nil {
		return Endpoint{}, err
	}
	pods := n.Pods()
	if j < 1 || j > len(pods) {
		return Endpoint{}, fmt.Errorf("%s has no pod %d", n.Name, j)
	}
	return n.podEndpoint(env, j-1, pods[j-1]), nil
}

func (l *Lab) internetEndpoint() Endpoint {
	e := Endpoint{Machine: l.Internet(), Kind: KindInternet}
	for _, p := range l.topology.Internet.Interfaces[0].Addrs {
		e.Addr.Set(addr.FamilyOf(p.Addr()), p.Addr())
	}
	return e
}
