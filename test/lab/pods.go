package lab

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
)

const (
	bridgeName   = "cni0"
	underlayLink = "eth0"
)

// SetupPods makes the node's bridge and pods from its subnet.env, as the CNI plugins bridge and host-local do: the
// bridge has its addresses when the first pod is on it. Pods that are there already are made again, which is what a
// changed subnet needs. A bridge with a MAC of its own keeps it when ports come and go; the pods know it as their
// gateway's.
func (n *Node) SetupPods() error {
	env, err := n.SubnetEnv()
	if err != nil {
		return err
	}
	if err := n.removePods(); err != nil {
		return err
	}
	if err := script(n.NS, fmt.Sprintf("ip link add %s address %s mtu %d type bridge", bridgeName, randomMAC(),
		env.MTU)); err != nil {
		return err
	}
	for i, p := range n.spec.Pods {
		if err := n.addPod(env, i, p); err != nil {
			return fmt.Errorf("pod %s: %w", p.Name, err)
		}
	}
	bridge := Interface{Name: bridgeName}
	for _, f := range n.options.Stack.Families() {
		bridge.Addrs = append(bridge.Addrs, env.Gateway.Get(f))
	}
	return script(n.NS, bridge.script())
}

func (n *Node) removePods() error {
	errs := []error{n.RemoveLink(bridgeName)}
	for _, p := range n.spec.Pods {
		errs = append(errs, deleteNS(p.NS), n.RemoveLink(p.Port))
	}
	return errors.Join(errs...)
}

func randomMAC() net.HardwareAddr {
	mac := make(net.HardwareAddr, 6)
	_, _ = rand.Read(mac) // never fails
	mac[0] = mac[0]&^1 | 2
	return mac
}

func (n *Node) addPod(env SubnetEnv, i int, p PodSpec) error {
	if err := createNS(p.NS); err != nil {
		return err
	}
	return errors.Join(
		plug(Cable{Port{p.NS, "eth0"}, Port{n.NS, p.Port}}, env.MTU, "", bridgeName),
		script(n.NS, fmt.Sprintf("ip link set %s type bridge_slave hairpin on", p.Port)),
		script(p.NS, "ip link set lo up"),
		configureHost(n.podHost(env, i, p)))
}

// podHost is the pod as a host: one interface, the default route through the node.
func (n *Node) podHost(env SubnetEnv, i int, p PodSpec) Host {
	h := Host{Name: p.Name, NS: p.NS, Interfaces: []Interface{{Name: "eth0"}}}
	for _, f := range n.options.Stack.Families() {
		h.Interfaces[0].Addrs = append(h.Interfaces[0].Addrs, env.PodAddr(f, i))
		h.Routes = append(h.Routes, Route{Dst: defaultRoutes(f), Via: env.Gateway.Get(f).Addr()})
	}
	return h
}
