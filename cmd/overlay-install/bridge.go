package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// Why a bridge is not removed.
var (
	errNoBridge = errors.New("no such bridge")
	errBusy     = errors.New("in use")
)

// removeBridge removes a bridge that nothing is attached to.
func removeBridge(name string) error {
	links, err := links()
	if err != nil {
		return fmt.Errorf("devices of the node: %w", err)
	}
	bridge, ok := links[name]
	if !ok || bridge.kind != "bridge" {
		return errNoBridge
	}
	for port, l := range links {
		if l.master == bridge.index {
			return fmt.Errorf("%w by %s", errBusy, port)
		}
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(name)
	if err != nil {
		return fmt.Errorf("bridge %q: %w", name, err)
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, req); err != nil {
		return fmt.Errorf("bridge %s: %w", name, err)
	}
	req.SetUint16(req.Uint16() &^ unix.IFF_UP) // one that is up can't be removed
	for _, request := range []uint{unix.SIOCSIFFLAGS, unix.SIOCBRDELBR} {
		if err := unix.IoctlIfreq(fd, request, req); err != nil {
			return fmt.Errorf("bridge %s: %w", name, err)
		}
	}
	return nil
}

// link is as much of a network device as is looked at here.
type link struct {
	index  uint32
	master uint32 // the index of the bridge that it is at; 0: none
	kind   string
}

// links are the devices of this network namespace, by name.
func links() (map[string]link, error) {
	raw, err := syscall.NetlinkRIB(unix.RTM_GETLINK, unix.AF_UNSPEC)
	if err != nil {
		return nil, err
	}
	messages, err := syscall.ParseNetlinkMessage(raw)
	if err != nil {
		return nil, err
	}
	out := map[string]link{}
	for i := range messages {
		if messages[i].Header.Type != unix.RTM_NEWLINK || len(messages[i].Data) < unix.SizeofIfInfomsg {
			continue
		}
		attrs, err := syscall.ParseNetlinkRouteAttr(&messages[i])
		if err != nil {
			return nil, err
		}
		l, name := link{index: binary.NativeEndian.Uint32(messages[i].Data[4:])}, ""
		for _, a := range attrs {
			switch {
			case a.Attr.Type == unix.IFLA_IFNAME:
				name = text(a.Value)
			case a.Attr.Type == unix.IFLA_MASTER && len(a.Value) == 4:
				l.master = binary.NativeEndian.Uint32(a.Value)
			case a.Attr.Type&^unix.NLA_F_NESTED == unix.IFLA_LINKINFO:
				l.kind = kind(a.Value)
			}
		}
		out[name] = l
	}
	return out, nil
}

// kind finds the kind of a device among the attributes of IFLA_LINKINFO; the kernel writes it first.
func kind(info []byte) string {
	const header = unix.SizeofRtAttr
	if len(info) < header || binary.NativeEndian.Uint16(info[2:]) != unix.IFLA_INFO_KIND {
		return ""
	}
	end := int(binary.NativeEndian.Uint16(info))
	if end < header || end > len(info) {
		return ""
	}
	return text(info[header:end])
}

func text(raw []byte) string {
	raw, _, _ = bytes.Cut(raw, []byte{0})
	return string(raw)
}
