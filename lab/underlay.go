package lab

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// buildUnderlay makes the namespaces of hosts and switches, plugs in the cables, and sets up addresses and routes.
func buildUnderlay(t Topology) error {
	hosts := underlayHosts(t)
	for _, h := range hosts {
		if err := prepareHost(h); err != nil {
			return fmt.Errorf("host %s: %w", h.Name, err)
		}
	}
	for _, s := range t.Switches {
		if err := prepareSwitch(s); err != nil {
			return fmt.Errorf("switch %s: %w", s.Name, err)
		}
	}
	for _, c := range t.Cables {
		if err := plugCable(c); err != nil {
			return fmt.Errorf("cable %s/%s to %s/%s: %w", c.A.NS, c.A.Name, c.B.NS, c.B.Name, err)
		}
	}
	for _, s := range t.Switches {
		if err := bridgeAll(s); err != nil {
			return fmt.Errorf("switch %s: %w", s.Name, err)
		}
	}
	for _, h := range hosts {
		if err := configureHost(h); err != nil {
			return fmt.Errorf("host %s: %w", h.Name, err)
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
	values := [][2]string{
		{"ipv4/conf/all/rp_filter", "1"},
		{"ipv4/conf/default/rp_filter", "1"},
		{"ipv6/conf/default/accept_ra", "0"},
	}
	if h.Forwards {
		values = append(values, [2]string{"ipv4/ip_forward", "1"}, [2]string{"ipv6/conf/all/forwarding", "1"})
	}
	if err := inNS(h.NS, func() error { return sysctls(values...) }); err != nil {
		return err
	}
	return withLinks(h.NS, func(nl *netlink.Handle) error { return setUp(nl, "lo") })
}

// prepareSwitch makes the segment's bridge, which has no address: it is a switch, not a host.
func prepareSwitch(s Switch) error {
	if err := createNS(s.NS); err != nil {
		return err
	}
	values := [][2]string{{"ipv6/conf/default/disable_ipv6", "1"}}
	if err := inNS(s.NS, func() error { return sysctls(values...) }); err != nil {
		return err
	}
	return withLinks(s.NS, func(nl *netlink.Handle) error {
		flood := false // no snooping: neighbour discovery must not depend on a multicast querier
		br := &netlink.Bridge{LinkAttrs: attrs("br0", underlayMTU), MulticastSnooping: &flood}
		if err := nl.LinkAdd(br); err != nil {
			return fmt.Errorf("create bridge: %w", err)
		}
		return setUp(nl, "br0")
	})
}

// attrs are the attributes of a new link with the library's defaults.
func attrs(name string, mtu int) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name, a.MTU = name, mtu
	return a
}

// plugCable makes a veth pair straight into its two namespaces.
func plugCable(c Cable) error { return addVeth(c, underlayMTU) }

func addVeth(c Cable, mtu int) error {
	peer, err := netns.GetFromName(c.B.NS)
	if err != nil {
		return fmt.Errorf("open namespace %s: %w", c.B.NS, err)
	}
	defer peer.Close()
	return withLinks(c.A.NS, func(nl *netlink.Handle) error {
		return nl.LinkAdd(&netlink.Veth{
			LinkAttrs: attrs(c.A.Name, mtu), PeerName: c.B.Name, PeerMTU: uint32(mtu), PeerNamespace: netlink.NsFd(peer),
		})
	})
}

// bridgeAll puts every port of the switch into its bridge.
func bridgeAll(s Switch) error {
	return withLinks(s.NS, func(nl *netlink.Handle) error {
		br, err := nl.LinkByName("br0")
		if err != nil {
			return fmt.Errorf("find br0: %w", err)
		}
		links, err := nl.LinkList()
		if err != nil {
			return fmt.Errorf("list ports: %w", err)
		}
		for _, l := range links {
			if l.Type() != "veth" {
				continue
			}
			if err := plugIn(nl, l, br); err != nil {
				return err
			}
		}
		return nil
	})
}

func plugIn(nl *netlink.Handle, port, bridge netlink.Link) error {
	if err := nl.LinkSetMaster(port, bridge); err != nil {
		return fmt.Errorf("plug %s into %s: %w", port.Attrs().Name, bridge.Attrs().Name, err)
	}
	return setUp(nl, port.Attrs().Name)
}

// configureHost brings the interfaces up with their addresses and adds the routes. It may be repeated, which puts back
// what the kernel took away when a link went down.
func configureHost(h Host) error {
	for _, i := range h.Interfaces {
		if err := configureInterface(h.NS, i); err != nil {
			return err
		}
	}
	if h.Forwards {
		if err := guardSources(h); err != nil {
			return err
		}
	}
	return withLinks(h.NS, func(nl *netlink.Handle) error {
		for _, r := range h.Routes {
			if err := nl.RouteReplace(&netlink.Route{Dst: ipNet(r.Dst), Gw: r.Via.AsSlice()}); err != nil {
				return fmt.Errorf("add route to %s via %s: %w", r.Dst, r.Via, err)
			}
		}
		return nil
	})
}

func configureInterface(ns string, i Interface) error {
	// Duplicate address detection would keep the link-local address unusable for a second.
	if err := inNS(ns, func() error { return sysctl("ipv6/conf/"+i.Name+"/accept_dad", "0") }); err != nil {
		return err
	}
	return withLinks(ns, func(nl *netlink.Handle) error {
		if err := setUp(nl, i.Name); err != nil {
			return err
		}
		return setAddrs(nl, i.Name, i.Addrs)
	})
}

func setAddrs(nl *netlink.Handle, name string, addrs []netip.Prefix) error {
	link, err := nl.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	for _, p := range addrs {
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := nl.AddrReplace(link, a); err != nil {
			return fmt.Errorf("add address %s to %s: %w", p, name, err)
		}
	}
	return nil
}

// Priorities of the router's rules, before the main table's 32766.
const (
	prioGenuine = 1000
	prioSpoofed = 2000
)

// guardSources drops what comes in by an interface with a source from elsewhere. rp_filter does so for IPv4; IPv6 has no
// such sysctl, so two routing rules per interface do it.
func guardSources(h Host) error {
	return withLinks(h.NS, func(nl *netlink.Handle) error {
		for _, i := range h.Interfaces {
			for _, p := range i.Addrs {
				if p.Addr().Is4() {
					continue
				}
				if err := guardInterface(nl, i.Name, p.Masked()); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

func guardInterface(nl *netlink.Handle, iface string, from netip.Prefix) error {
	genuine := netlink.NewRule()
	genuine.Family, genuine.Priority, genuine.IifName = unix.AF_INET6, prioGenuine, iface
	genuine.Src, genuine.Table = ipNet(from), unix.RT_TABLE_MAIN
	spoofed := netlink.NewRule()
	spoofed.Family, spoofed.Priority, spoofed.IifName, spoofed.Type = unix.AF_INET6, prioSpoofed, iface, unix.RTN_BLACKHOLE
	for _, r := range []*netlink.Rule{genuine, spoofed} {
		if err := nl.RuleAdd(r); err != nil {
			return fmt.Errorf("guard the sources on %s: %w", iface, err)
		}
	}
	return nil
}

// withLinks runs f with a netlink handle into the namespace.
func withLinks(ns string, f func(*netlink.Handle) error) error {
	var nl *netlink.Handle
	err := inNS(ns, func() (err error) {
		nl, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return fmt.Errorf("open netlink in %s: %w", ns, err)
	}
	defer nl.Close()
	return f(nl)
}

func setUp(nl *netlink.Handle, name string) error {
	link, err := nl.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := nl.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", name, err)
	}
	return nil
}

func setDown(nl *netlink.Handle, name string) error {
	link, err := nl.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := nl.LinkSetDown(link); err != nil {
		return fmt.Errorf("bring down %s: %w", name, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
