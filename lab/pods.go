package lab

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	bridgeName   = "cni0"
	underlayLink = "eth0"
)

// SetupPods makes the node's bridge and pods from its subnet.env, as the CNI plugins bridge and host-local would. Pods
// that are there already are made anew, which is what a changed subnet needs.
func (n *Node) SetupPods() error {
	env, err := n.SubnetEnv()
	if err != nil {
		return err
	}
	if err := n.removePods(); err != nil {
		return err
	}
	if err := n.addBridge(env); err != nil {
		return fmt.Errorf("%s: %s: %w", n.Name, bridgeName, err)
	}
	for i, p := range n.spec.Pods {
		if err := n.addPod(env, i, p); err != nil {
			return fmt.Errorf("pod %s: %w", p.Name, err)
		}
	}
	return nil
}

func (n *Node) removePods() error {
	var errs []error
	for _, p := range n.spec.Pods {
		errs = append(errs, deleteNS(p.NS))
	}
	errs = append(errs, withLinks(n.NS, func(nl *netlink.Handle) error {
		for _, name := range append(n.podPorts(), bridgeName) {
			if err := deleteLink(nl, name); err != nil {
				return fmt.Errorf("%s: %w", n.Name, err)
			}
		}
		return nil
	}))
	return errors.Join(errs...)
}

func (n *Node) podPorts() []string {
	var out []string
	for _, p := range n.spec.Pods {
		out = append(out, p.Port)
	}
	return out
}

func deleteLink(nl *netlink.Handle, name string) error {
	link, err := nl.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := nl.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) { // it went meanwhile, as the other end of a veth does
		return fmt.Errorf("delete %s: %w", name, err)
	}
	return nil
}

func (n *Node) addBridge(env SubnetEnv) error {
	a := attrs(bridgeName, env.MTU)
	// A bridge with a MAC of its own keeps it when ports come and go; the pods know it as their gateway's.
	a.HardwareAddr = randomMAC()
	err := withLinks(n.NS, func(nl *netlink.Handle) error {
		if err := nl.LinkAdd(&netlink.Bridge{LinkAttrs: a}); err != nil {
			return fmt.Errorf("create it: %w", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return configureInterface(n.NS, Interface{Name: bridgeName, Addrs: n.gateways(env)})
}

func randomMAC() net.HardwareAddr {
	mac := make(net.HardwareAddr, 6)
	_, _ = rand.Read(mac) // never fails
	mac[0] = mac[0]&^1 | 2
	return mac
}

func (n *Node) gateways(env SubnetEnv) []netip.Prefix {
	var out []netip.Prefix
	for _, f := range n.options.Stack.Families() {
		out = append(out, env.Gateway.Get(f))
	}
	return out
}

func (n *Node) addPod(env SubnetEnv, i int, p PodSpec) error {
	if err := createNS(p.NS); err != nil {
		return err
	}
	if err := addVeth(Cable{Port{p.NS, "eth0"}, Port{n.NS, p.Port}}, env.MTU); err != nil {
		return fmt.Errorf("create its veth: %w", err)
	}
	if err := withLinks(n.NS, func(nl *netlink.Handle) error { return plugPod(nl, p.Port) }); err != nil {
		return err
	}
	if err := withLinks(p.NS, func(nl *netlink.Handle) error { return setUp(nl, "lo") }); err != nil {
		return err
	}
	return configureHost(n.podHost(env, i, p))
}

func plugPod(nl *netlink.Handle, name string) error {
	bridge, err := nl.LinkByName(bridgeName)
	if err != nil {
		return fmt.Errorf("find %s: %w", bridgeName, err)
	}
	port, err := nl.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := plugIn(nl, port, bridge); err != nil {
		return err
	}
	if err := nl.LinkSetHairpin(port, true); err != nil {
		return fmt.Errorf("set hairpin mode of %s: %w", name, err)
	}
	return nil
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
