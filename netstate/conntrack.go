package netstate

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// Forget ends the tracked connections into a network that have an address of this node, as their own or by source NAT.
// A connection has its address from its first packet on: one of UDP without a pause would keep it for ever. The kernel
// ends those that were masqueraded when their device changes, and no others.
func (*Kernel) Forget(network netip.Prefix, source netip.Addr) error {
	var filter netlink.ConntrackFilter
	into := &net.IPNet{
		IP: network.Addr().AsSlice(), Mask: net.CIDRMask(network.Bits(), network.Addr().BitLen()),
	}
	err := filter.AddIPNet(netlink.ConntrackReplySrcIP, into)
	if err == nil {
		err = filter.AddIP(netlink.ConntrackReplyDstIP, source.AsSlice())
	}
	if err == nil {
		family := netlink.InetFamily(unix.AF_INET)
		if addr.FamilyOf(source) == addr.IPv6 {
			family = unix.AF_INET6
		}
		_, err = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, &filter)
	}
	if err != nil {
		return fmt.Errorf("end the connections from %s into %s: %w", source, network, err)
	}
	return nil
}
