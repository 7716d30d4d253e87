package main

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
)

// Why a bridge is not removed.
var (
	errNoBridge = errors.New("no such bridge")
	errBusy     = errors.New("in use")
)

// removeBridge removes a bridge that nothing is attached to.
func removeBridge(name string) error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("devices of the node: %w", err)
	}
	i := slices.IndexFunc(links, func(l netlink.Link) bool { return l.Attrs().Name == name && l.Type() == "bridge" })
	if i < 0 {
		return errNoBridge
	}
	for _, port := range links {
		if port.Attrs().MasterIndex == links[i].Attrs().Index {
			return fmt.Errorf("%w by %s", errBusy, port.Attrs().Name)
		}
	}
	if err := netlink.LinkDel(links[i]); err != nil {
		return fmt.Errorf("bridge %s: %w", name, err)
	}
	return nil
}
