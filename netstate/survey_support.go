package netstate

import (
	"errors"
	"fmt"
	"net"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// InTrial runs try in a new network namespace, on a thread of its own that ends with it: what is made there is gone afterwards, and
// nobody outside sees it. Programs that try starts run there too. The error says that there can be no such namespace.
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
	local := net.IPv4(127, 0, 0, 1)
	if f == addr.IPv6 {
		local = net.IPv6loopback
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = DeviceForTrial + fmt.Sprint(uint8(f))
	const someVNI, somePort = 1, 8472
	err = h.LinkAdd(&netlink.Vxlan{LinkAttrs: attrs, VxlanId: someVNI, Port: somePort, SrcAddr: local})
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%w: this kernel has no VXLAN", err)
	}
	return err
}

// DeviceForTrial is what the devices that TryVXLAN makes are called, with the number of the family behind.
const DeviceForTrial = "trial"
