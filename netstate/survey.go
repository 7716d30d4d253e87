package netstate

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// Survey is one look at the node for a diagnosis. It holds more than what the daemon decides by.
type Survey struct {
	Host  Host
	Ours  State // what is in the kernel with our marks; without settings
	Links []SurveyLink
	// Neighbours are the addresses that the node has found on its devices, ours excepted.
	Neighbours []Neighbour
}

// SurveyLink is a device of the node with what a diagnosis asks about it.
type SurveyLink struct {
	HostLink
	MAC      addr.MAC
	Carrier  bool
	Offloads []Offload // nil where the driver tells none
}

// Offload is a feature that ethtool knows, by the name that `ethtool -K` takes.
type Offload struct {
	Name string
	On   bool
}

// Look surveys the network namespace of the calling thread. owned tells by its name whether a VXLAN device is ours.
func Look(owned func(name string) bool) (Survey, error) {
	k, err := Open(owned)
	if err != nil {
		return Survey{}, err
	}
	defer k.Close()
	h, err := k.look()
	if err != nil {
		return Survey{}, err
	}
	s := Survey{Host: h, Ours: *k.observed}
	all, err := k.linkList()
	if err != nil {
		return Survey{}, err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return Survey{}, os.NewSyscallError("socket", err)
	}
	defer func() { _ = unix.Close(fd) }()
	for _, l := range all {
		a := l.Attrs()
		i := slices.IndexFunc(h.Links, func(hl HostLink) bool { return hl.Index == a.Index })
		if i < 0 { // it came since
			continue
		}
		sl := SurveyLink{HostLink: h.Links[i], MAC: macOf(a.HardwareAddr), Carrier: a.RawFlags&unix.IFF_LOWER_UP != 0}
		if sl.Kind != "veth" { // there may be hundreds, one for each pod
			sl.Offloads = offloads(fd, a.Name)
		}
		s.Links = append(s.Links, sl)
	}
	s.Neighbours, err = k.found(h)
	return s, err
}

// found reads what ARP and NDP have found.
func (k *Kernel) found(h Host) ([]Neighbour, error) {
	var out []Neighbour
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := k.links.NeighList(0, family)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) { // a part of them is better than nothing
			return nil, fmt.Errorf("reading the neighbours: %w", err)
		}
		for _, n := range list {
			i := slices.IndexFunc(h.Links, func(l HostLink) bool { return l.Index == n.LinkIndex && !l.Tunnel })
			ip, ok := netip.AddrFromSlice(n.IP)
			if i >= 0 && ok && n.State&(unix.NUD_FAILED|unix.NUD_INCOMPLETE|unix.NUD_NOARP) == 0 {
				out = append(out, Neighbour{Link: h.Links[i].Name, IP: ip.Unmap(), MAC: macOf(n.HardwareAddr)})
			}
		}
	}
	return out, nil
}

// Link finds a device by name.
func (s Survey) Link(name string) (SurveyLink, bool) {
	i := slices.IndexFunc(s.Links, func(l SurveyLink) bool { return l.Name == name })
	if i < 0 {
		return SurveyLink{}, false
	}
	return s.Links[i], true
}

// offloads asks the driver by the old ioctls, which every kernel answers (uapi/linux/ethtool.h).
func offloads(fd int, device string) []Offload {
	var out []Offload
	for _, o := range []struct {
		cmd  uint32
		name string
	}{{unix.ETHTOOL_GTXCSUM, "tx"}, {unix.ETHTOOL_GRXCSUM, "rx"}, {unix.ETHTOOL_GTSO, "tso"}, {unix.ETHTOOL_GGSO, "gso"}, {unix.ETHTOOL_GGRO, "gro"}} {
		value := struct{ cmd, data uint32 }{cmd: o.cmd} // struct ethtool_value
		req, err := unix.NewIfreq(device)
		if err != nil {
			return nil
		}
		if err := ethtool(fd, req, unsafe.Pointer(&value)); err != nil {
			continue
		}
		out = append(out, Offload{o.name, value.data != 0})
	}
	return out
}

// ethtool is SIOCETHTOOL: struct ifreq is the device's name, then a pointer to the request.
func ethtool(fd int, req *unix.Ifreq, data unsafe.Pointer) error {
	var raw struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(raw.name[:], req.Name())
	raw.data = data
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&raw))); errno != 0 {
		return errno
	}
	return nil
}
