package netstate

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// vxlanOf reads the part of a VXLAN device that can't be changed.
func vxlanOf(v *netlink.Vxlan, underlay string) VXLAN {
	local, _ := netip.AddrFromSlice(v.SrcAddr)
	return VXLAN{
		VNI: uint32(v.VxlanId), Port: uint16(v.Port), Local: local.Unmap(), Underlay: underlay,
		Learning: v.Learning, GBP: v.GBP,
	}
}

func (k *Kernel) applyLink(c Change, l Link) error {
	switch c.Op {
	case Add:
		return k.addLink(l)
	case Replace:
		return k.changeLink(l, c.Old.(Link))
	default:
		return k.deleteLink(l.Name)
	}
}

const addrGenModeNone = 1 // IN6_ADDR_GEN_MODE_NONE, uapi/linux/if_link.h

// addLink makes a device and brings it up. It goes up last, so that nothing is sent from it before it is what it should
// be.
func (k *Kernel) addLink(l Link) error {
	if l.wireGuard() {
		return k.addWireGuard(l)
	}
	underlay := uint32(0) // bound to no device
	if l.VXLAN.Underlay != "" {
		var err error
		if underlay, err = k.linkIndex(l.VXLAN.Underlay); err != nil {
			return err
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = l.Name, l.MTU, net.HardwareAddr(l.MAC[:])
	v := &netlink.Vxlan{
		LinkAttrs: attrs, VxlanId: int(l.VXLAN.VNI), VtepDevIndex: int(underlay), SrcAddr: l.VXLAN.Local.AsSlice(),
		Port: int(l.VXLAN.Port), Learning: l.VXLAN.Learning, GBP: l.VXLAN.GBP,
	}
	if err := k.links.LinkAdd(v); err != nil {
		return k.explainAdd(err, l)
	}
	k.index[l.Name] = v.Index
	if v.Index == 0 {
		made, err := k.links.LinkByName(l.Name)
		if err != nil {
			return err
		}
		v.Index, k.index[l.Name] = made.Attrs().Index, made.Attrs().Index
	}
	if err := k.quiet(v); err != nil {
		return err
	}
	if l.VXLAN.Local.Is6() {
		_ = k.writeSysctl(IPv6On(l.Name))
	}
	return k.setUp(v, l)
}

// quiet sees to it that neither a router advertisement nor an address of its own making changes how a device routes.
func (k *Kernel) quiet(dev netlink.Link) error {
	err := k.links.LinkSetIP6AddrGenMode(dev, addrGenModeNone)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EAFNOSUPPORT) {
		return fmt.Errorf("addrgenmode none: %w", err)
	}
	_ = k.writeSysctl(AcceptRA(dev.Attrs().Name)) // as early as can be; where it is desired, a failure is reported
	return nil
}

func (k *Kernel) setUp(dev netlink.Link, l Link) error {
	err := k.links.LinkSetUp(dev)
	if errors.Is(err, unix.EADDRINUSE) { // the kernel opens the UDP port only now
		return k.explainAdd(err, l)
	}
	return err
}

// AcceptRA is the setting by which a device takes no router advertisements.
func AcceptRA(link string) Sysctl { return Sysctl{"net/ipv6/conf/" + link + "/accept_ra", "0"} }

// IPv6On is the setting by which a device has IPv6 also where new devices are to have none
// (net.ipv6.conf.default.disable_ipv6=1).
func IPv6On(link string) Sysctl { return Sysctl{"net/ipv6/conf/" + link + "/disable_ipv6", "0"} }

// changeLink puts right what can be changed on a device that exists.
func (k *Kernel) changeLink(want, have Link) error {
	index, err := k.linkIndex(want.Name)
	if err != nil {
		return err
	}
	dev := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: int(index)}}
	if want.MAC != have.MAC {
		err = errors.Join(err, k.links.LinkSetHardwareAddr(dev, net.HardwareAddr(want.MAC[:])))
	}
	if want.MTU != have.MTU {
		err = errors.Join(err, k.links.LinkSetMTU(dev, want.MTU))
	}
	switch {
	case want.WireGuard != have.WireGuard || want.wireGuard() && have.Down:
		err = errors.Join(err, k.configureWireGuard(want, dev))
	case have.Down:
		err = errors.Join(err, k.setUp(dev, want))
	}
	return err
}

func (k *Kernel) deleteLink(name string) error {
	index, err := k.linkIndex(name)
	if err != nil {
		return err
	}
	err = k.links.LinkDel(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: int(index)}})
	if err == nil || errors.Is(err, unix.ENODEV) {
		delete(k.index, name)
		return nil
	}
	return err
}

// explainAdd says what stands in the way of a new device: the kernel only says "exists".
func (k *Kernel) explainAdd(err error, l Link) error {
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%w: this kernel has no VXLAN (is the module vxlan available?)", err)
	}
	if !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.EADDRINUSE) {
		return err
	}
	all, _ := k.links.LinkList() // as far as they can be read
	for _, other := range all {  // first, because a name stands in the way of any device
		if other.Attrs().Name == l.Name && errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("%w: another program's %s device has this name; rename or delete it (ip link delete %s)",
				err, other.Type(), l.Name)
		}
	}
	for _, other := range all {
		v, ok := other.(*netlink.Vxlan)
		if !ok || v.Name == l.Name || v.Port != int(l.VXLAN.Port) || overIPv6(v) != l.VXLAN.Local.Is6() {
			continue
		}
		if v.VxlanId == int(l.VXLAN.VNI) {
			return fmt.Errorf("%w: the VXLAN device %s has VNI %d on UDP port %d already; "+
				"delete it (ip link delete %s), or set another Backend.VNI or Backend.Port",
				err, v.Name, v.VxlanId, v.Port, v.Name)
		}
		// With the same settings, they would share the port.
		if errors.Is(err, unix.EADDRINUSE) && v.RawFlags&unix.IFF_UP != 0 {
			return fmt.Errorf("%w: the VXLAN device %s is on UDP port %d with other settings; "+
				"delete it (ip link delete %s), or set another Backend.Port",
				err, v.Name, v.Port, v.Name)
		}
	}
	return fmt.Errorf("%w: UDP port %d is taken by another program", err, l.VXLAN.Port)
}

// overIPv6 tells the family of a device's underlay; one does not interfere with the other.
func overIPv6(v *netlink.Vxlan) bool {
	six := func(ip net.IP) bool { return len(ip) > 0 && ip.To4() == nil }
	return six(v.SrcAddr) || six(v.Group)
}
