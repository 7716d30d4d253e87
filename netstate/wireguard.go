package netstate

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/internal/sorted"
)

// WireGuard is what a device needs to be an end of WireGuard's tunnels. The zero value is that of another device.
type WireGuard struct {
	Port uint16 // UDP, on the underlay
	Key  PrivateKey
}

// PrivateKey is a private key of WireGuard. However it is printed or encoded, its content stays hidden.
type PrivateKey wgtypes.Key

// Format writes no part of the key.
func (PrivateKey) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("(hidden)")) }

// MarshalText gives no part of the key.
func (PrivateKey) MarshalText() ([]byte, error) { return []byte("(hidden)"), nil }

// Public is the public key that belongs to it.
func (k PrivateKey) Public() wgtypes.Key { return wgtypes.Key(k).PublicKey() }

// TunnelPeer is a peer of a WireGuard device: packets to the allowed networks go to it, and what it sends is accepted
// from these networks only. Keyed by link and public key.
type TunnelPeer struct {
	Link      string
	Key       wgtypes.Key
	Endpoint  netip.AddrPort
	Roams     bool            // its packets come from a NAT: where the last one came from is where it is
	Allowed   [2]netip.Prefix // in order; the zero Prefix: none
	Keepalive uint16          // seconds; 0: never
}

// Compare orders peers by key.
func (p TunnelPeer) Compare(o TunnelPeer) int {
	return cmp.Or(cmp.Compare(p.Link, o.Link), slices.Compare(p.Key[:], o.Key[:]))
}

func (p TunnelPeer) String() string {
	s := fmt.Sprintf("wireguard peer %s endpoint %s allowed", p.Key, p.Endpoint)
	for _, n := range p.Allowed {
		if n.IsValid() {
			s += " " + n.String()
		}
	}
	if p.Keepalive != 0 {
		s += fmt.Sprintf(" keepalive %d", p.Keepalive)
	}
	return s + " dev " + p.Link
}

// Allow gives the allowed networks of a peer in their order.
func Allow(networks ...netip.Prefix) (out [2]netip.Prefix) {
	slices.SortFunc(networks, addr.ComparePrefix)
	copy(out[:], networks)
	return out
}

// settle takes peers behind a NAT for where they should be, wherever they are: the endpoint of a lease is only where they
// begin. Both lists are in order.
func settle(actual, desired []TunnelPeer) {
	for i, p := range actual {
		if d, ok := sorted.Find(desired, p); ok && d.Roams {
			if actual[i].Roams = true; p.Endpoint.IsValid() {
				actual[i].Endpoint = d.Endpoint
			}
		}
	}
}

// withWireGuard calls do with a client for the devices of the kernel and of programs in user space. It is opened each
// time, since the kernel knows the family of messages only once its module is loaded.
func withWireGuard(do func(*wgctrl.Client) error) error {
	c, err := wgctrl.New()
	if err != nil {
		return fmt.Errorf("wireguard: %w", err)
	}
	return errors.Join(do(c), c.Close())
}

// readWireGuard reads the keys, the ports and the peers of our WireGuard devices. A device that does not answer, as one
// whose program in user space hangs or is another one, has none.
func (o *observation) readWireGuard() error {
	if !slices.ContainsFunc(o.ours.Links, Link.wireGuard) {
		return nil
	}
	return withWireGuard(func(c *wgctrl.Client) error {
		for i, l := range o.ours.Links {
			if !l.wireGuard() {
				continue
			}
			d, err := c.Device(l.Name)
			if err != nil {
				continue
			}
			o.ours.Links[i].WireGuard = WireGuard{uint16(d.ListenPort), PrivateKey(d.PrivateKey)}
			for _, p := range d.Peers {
				o.ours.TunnelPeers = append(o.ours.TunnelPeers, peerOf(l.Name, p))
			}
		}
		return nil
	})
}

// peerOf has no allowed networks where there are more than ours ever have.
func peerOf(link string, p wgtypes.Peer) TunnelPeer {
	out := TunnelPeer{Link: link, Key: p.PublicKey, Keepalive: uint16(p.PersistentKeepaliveInterval / time.Second)}
	if p.Endpoint != nil {
		ep := p.Endpoint.AddrPort()
		out.Endpoint = netip.AddrPortFrom(ep.Addr().Unmap(), ep.Port())
	}
	var allowed []netip.Prefix
	for _, n := range p.AllowedIPs {
		ip, _ := netip.AddrFromSlice(n.IP)
		ones, _ := n.Mask.Size()
		allowed = append(allowed, netip.PrefixFrom(ip.Unmap(), ones))
	}
	if len(allowed) <= len(out.Allowed) {
		out.Allowed = Allow(allowed...)
	}
	return out
}

// wireGuard reports whether a device is an end of WireGuard's tunnels.
func (l Link) wireGuard() bool { return l.VXLAN == VXLAN{} }

// addWireGuard makes a device: the kernel's, or where that has none, that of a program in user space.
func (k *Kernel) addWireGuard(l Link) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = l.Name, l.MTU
	err := k.links.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs})
	if errors.Is(err, unix.EOPNOTSUPP) {
		if k.WireGuardProgram == "" {
			return fmt.Errorf("%w: this kernel has no WireGuard (is the module wireguard available? "+
				"--wireguard-program=wireguard-go runs it in user space)", err)
		}
		err = startWireGuard(k.WireGuardProgram, l.Name)
	}
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%w: another program's device has the name %[2]s; rename or delete it (ip link delete %[2]s)",
			err, l.Name)
	}
	if err != nil {
		return err
	}
	made, err := k.links.LinkByName(l.Name)
	if err != nil {
		return err
	}
	k.index[l.Name] = made.Attrs().Index
	if err := k.quiet(made); err != nil {
		return err
	}
	if made.Attrs().MTU != l.MTU {
		err = k.links.LinkSetMTU(made, l.MTU)
	}
	return errors.Join(err, k.configureWireGuard(l, made))
}

// startWireGuard starts the program, which makes the device and goes on in the background.
func startWireGuard(program, device string) error {
	out, err := exec.Command(program, device).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %.300s", program, device, err, out)
	}
	return nil
}

// configureWireGuard sets port and key, and brings the device up.
func (k *Kernel) configureWireGuard(l Link, dev netlink.Link) error {
	err := withWireGuard(func(c *wgctrl.Client) error {
		port, key := int(l.WireGuard.Port), wgtypes.Key(l.WireGuard.Key)
		return c.ConfigureDevice(l.Name, wgtypes.Config{PrivateKey: &key, ListenPort: &port})
	})
	if err == nil {
		err = k.links.LinkSetUp(dev)
	}
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("%w: UDP port %d is taken by another program; set another Backend.ListenPort", err, l.WireGuard.Port)
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w: the device %s is not of WireGuard, or its program does not answer; delete it (ip link delete %[2]s)",
			err, l.Name)
	}
	return err
}

// putPeers carries out changes of peers of one device in one request.
func (k *Kernel) putPeers(changes []Change) error {
	var peers []wgtypes.PeerConfig
	for _, c := range changes {
		p := c.Obj.(TunnelPeer)
		keepalive := time.Duration(p.Keepalive) * time.Second
		config := wgtypes.PeerConfig{PublicKey: p.Key, Remove: c.Op == Delete}
		if c.Op != Delete {
			config.Endpoint = net.UDPAddrFromAddrPort(p.Endpoint)
			config.PersistentKeepaliveInterval, config.ReplaceAllowedIPs = &keepalive, true
			for _, n := range p.Allowed {
				if n.IsValid() {
					config.AllowedIPs = append(config.AllowedIPs, net.IPNet{
						IP: n.Addr().AsSlice(), Mask: net.CIDRMask(n.Bits(), n.Addr().BitLen()),
					})
				}
			}
		}
		peers = append(peers, config)
	}
	link := changes[0].Obj.(TunnelPeer).Link
	return withWireGuard(func(c *wgctrl.Client) error {
		return c.ConfigureDevice(link, wgtypes.Config{Peers: peers})
	})
}
