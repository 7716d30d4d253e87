package lab

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// switchBridge is the bridge that makes a switch of its namespace.
const switchBridge = "br0"

// script runs a shell script in a namespace, up to the first command that fails.
func script(ns, text string) error {
	_, err := Machine{Name: ns, NS: ns}.Shell(context.Background(), text)
	return err
}

// buildUnderlay makes the namespaces of hosts and switches, plugs in the cables, and sets up addresses and routes.
func buildUnderlay(t Topology) error {
	hosts := underlayHosts(t)
	for _, h := range hosts {
		if err := prepareHost(h); err != nil {
			return err
		}
	}
	for _, s := range t.Switches {
		if err := prepareSwitch(s); err != nil {
			return err
		}
	}
	for _, c := range t.Cables {
		bridge := ""
		if slices.ContainsFunc(t.Switches, func(s Switch) bool { return s.NS == c.B.NS }) {
			bridge = switchBridge
		}
		if err := plug(c, underlayMTU, "", bridge); err != nil {
			return err
		}
	}
	for _, h := range hosts {
		if err := configureHost(h); err != nil {
			return err
		}
	}
	return nil
}

func underlayHosts(t Topology) []Host {
	hosts := []Host{t.Router, t.Internet, t.Etcd}
	for _, n := range t.Nodes {
		hosts = append(hosts, n.Host)
	}
	return hosts
}

// prepareHost makes the namespace with the sysctls that interfaces made later inherit.
func prepareHost(h Host) error {
	if err := createNS(h.NS); err != nil {
		return err
	}
	text := `ip link set lo up; cd /proc/sys/net
		echo 1 > ipv4/conf/all/rp_filter; echo 1 > ipv4/conf/default/rp_filter; echo 0 > ipv6/conf/default/accept_ra
		`
	if h.Forwards {
		text += `echo 1 > ipv4/ip_forward; echo 1 > ipv6/conf/all/forwarding`
	}
	return script(h.NS, text)
}

// prepareSwitch makes the segment's bridge, which has no address: it is a switch, not a host. It does no snooping,
// since neighbour discovery must not depend on a multicast querier.
func prepareSwitch(s Switch) error {
	if err := createNS(s.NS); err != nil {
		return err
	}
	return script(s.NS, fmt.Sprintf(`echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6
		ip link add %[1]s mtu %[2]d type bridge mcast_snooping 0; ip link set %[1]s up`, switchBridge, underlayMTU))
}

// plug makes a veth pair straight into its two namespaces; the first end may be given a MAC, the second end a bridge.
func plug(c Cable, mtu int, mac, bridge string) error {
	if mac != "" {
		mac = "address " + mac
	}
	err := script(c.A.NS, fmt.Sprintf("ip link add %s %s mtu %d type veth peer name %s mtu %d netns %s", c.A.Name, mac,
		mtu, c.B.Name, mtu, c.B.NS))
	if err != nil || bridge == "" {
		return err
	}
	return script(c.B.NS, fmt.Sprintf("ip link set %s master %s up", c.B.Name, bridge))
}

// configureHost brings the interfaces up with their addresses and adds the routes. It may be repeated, which puts back
// what the kernel took away when a link went down.
func configureHost(h Host) error {
	var text strings.Builder
	for _, i := range h.Interfaces {
		text.WriteString(i.script())
		if h.Forwards {
			text.WriteString(i.guard())
		}
	}
	for _, r := range h.Routes {
		fmt.Fprintf(&text, "ip route replace %s via %s\n", r.Dst, r.Via)
	}
	return script(h.NS, text.String())
}

// script brings an interface up with its addresses. Duplicate address detection would keep them unusable for a second.
func (i Interface) script() string {
	var text strings.Builder
	fmt.Fprintf(&text, "echo 0 > /proc/sys/net/ipv6/conf/%[1]s/accept_dad; ip link set %[1]s up\n", i.Name)
	for _, p := range i.Addrs {
		how := "brd +"
		if p.Addr().Is6() {
			how = "nodad"
		}
		fmt.Fprintf(&text, "ip address replace %s %s dev %s\n", p, how, i.Name)
	}
	return text.String()
}

// guard drops what comes in by an interface of the router with a source from elsewhere. rp_filter does so for IPv4;
// IPv6 has no such sysctl, so two routing rules before that of the main table do it.
func (i Interface) guard() string {
	var text strings.Builder
	for _, p := range i.Addrs {
		if p.Addr().Is6() {
			fmt.Fprintf(&text, "ip -6 rule add pref 1000 iif %[1]s from %[2]s lookup main; ip -6 rule add pref 2000 iif %[1]s blackhole\n",
				i.Name, p.Masked())
		}
	}
	return text.String()
}
