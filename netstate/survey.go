package netstate

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// Survey is what is read from the node for a diagnosis. It holds more than what the daemon decides by.
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
	o, err := k.observe()
	if err != nil {
		return Survey{}, err
	}
	s := Survey{Host: o.host, Ours: *k.observed, Links: o.links}
	for i, l := range s.Links {
		if l.Kind != "veth" { // there may be hundreds, one for each pod
			s.Links[i].Offloads = k.Offloads(l.Name)
		}
	}
	s.Neighbours, err = k.found(o.host)
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
			l := h.linkAt(n.LinkIndex)
			ip, ok := netip.AddrFromSlice(n.IP)
			if ok && l.Name != "" && !l.Tunnel && n.State&(unix.NUD_FAILED|unix.NUD_INCOMPLETE|unix.NUD_NOARP) == 0 {
				out = append(out, Neighbour{Link: l.Name, IP: ip.Unmap(), MAC: macOf(n.HardwareAddr)})
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

// Offloads tells which features of a device are on that make a difference to tunnels; nil where the device is not there
// or its driver tells none. The old ioctls are answered by every kernel (uapi/linux/ethtool.h).
func (k *Kernel) Offloads(device string) []Offload {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer func() { _ = unix.Close(fd) }()
	var out []Offload
	for _, o := range []struct {
		cmd  uint32
		name string
	}{
		{unix.ETHTOOL_GTXCSUM, "tx"},
		{unix.ETHTOOL_GRXCSUM, "rx"},
		{unix.ETHTOOL_GTSO, "tso"},
		{unix.ETHTOOL_GGSO, "gso"},
		{unix.ETHTOOL_GGRO, "gro"},
	} {
		value := struct{ cmd, data uint32 }{cmd: o.cmd} // struct ethtool_value
		req := struct {                                 // struct ifreq
			name [unix.IFNAMSIZ]byte
			data unsafe.Pointer
			_    [16]byte
		}{data: unsafe.Pointer(&value)}
		copy(req.name[:unix.IFNAMSIZ-1], device)
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req)))
		if errno == 0 {
			out = append(out, Offload{o.name, value.data != 0})
		}
	}
	return out
}

// InTrial runs try in a new network namespace, on a thread of its own that ends with it: what is made there is gone
// afterwards, and is not visible from outside. Programs that try starts run there too. The error says that there can be
// no such namespace.
func InTrial(try func()) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			try()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		return fmt.Errorf("test network namespace: %w", err)
	}
	return nil
}

// TryVXLAN makes a VXLAN device in the network namespace of the calling thread, over IPv4 or IPv6.
func TryVXLAN(f addr.Family) error {
	k, err := Open(func(string) bool { return false })
	if err != nil {
		return err
	}
	defer k.Close()
	l := Link{Name: fmt.Sprint(DeviceForTrial, uint8(f)), MAC: addr.MAC{2}, MTU: 1400}
	l.VXLAN = VXLAN{VNI: 1, Port: 8472, Local: addr.Per[netip.Addr]{
		V4: netip.AddrFrom4([4]byte{127, 0, 0, 1}), V6: netip.IPv6Loopback(),
	}.Get(f)}
	k.index = map[string]int{}
	return k.addLink(l)
}

// DeviceForTrial is what the devices that TryVXLAN makes are called, with the number of the family behind.
const DeviceForTrial = "trial"
