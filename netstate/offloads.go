package netstate

import "golang.org/x/sys/unix"

// Offloads tells which features of a device are on that make a difference to tunnels; nil where the device is not there or tells none.
func (k *Kernel) Offloads(device string) []Offload {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer func() { _ = unix.Close(fd) }()
	return offloads(fd, device)
}
