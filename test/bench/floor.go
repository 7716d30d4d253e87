package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/backend/vxlan"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// program measures how long it takes to make a node's device and all entries of its peers, beside a program that only sends bytes
// which were made before.
func program(ctx context.Context, e *Env) error {
	for _, n := range pick(e, []int{5000, 20000}, []int{500}) {
		plan, err := planFor(n)
		if err != nil {
			return err
		}
		var ours, floor []float64
		err = inNewNetns(func() error { return programBoth(ctx, pick(e, 11, 1), plan, &ours, &floor) })
		if err != nil {
			return fmt.Errorf("%s: %w", peers(n), err)
		}
		e.Add(Row{
			Group: "program", Name: peers(n), Peers: n, Unit: Millis, Ours: ours, Base: floor, BaseName: "floor", Bound: RatioAtMost(1.5),
			Note: "a device, and for each peer an FDB entry, a neighbour and two routes. The floor sends prepared bytes: it looks at nothing, hears of nothing and knows of no errors but that there was one",
		})
	}
	return nil
}

// planFor is what a node must have that has n peers.
func planFor(n int) (netstate.State, error) {
	in, err := inputFor(n)
	return vxlan.Backend{}.Plan(in).State, err
}

// inputFor is what the plan of a node with n peers is made from.
func inputFor(n int) (backend.Input, error) {
	config, err := subnet.ParseConfig([]byte(siteNetwork))
	if err != nil {
		return backend.Input{}, err
	}
	in := backend.Input{
		Config: config, Self: peerLease(n + 1), Host: netstate.Host{IPv6: true}.Indexed(),
		Underlay: addr.Per[backend.Underlay]{V4: backend.Underlay{Device: "lo", Addr: netip.AddrFrom4([4]byte{127, 0, 0, 1}), MTU: 1500}},
	}
	for i := range n {
		peer := peerLease(i + 1)
		in.Peers = append(in.Peers, &peer)
	}
	return in, nil
}

// inNewNetns runs f on a thread of its own in a network namespace of its own. Both end with it.
func inNewNetns(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("a new network namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

// programBoth programs the node in turns, and takes the device away after each.
func programBoth(ctx context.Context, samples int, want netstate.State, ours, floor *[]float64) error {
	c, err := dialFloor()
	if err != nil {
		return err
	}
	defer c.close()
	if err := c.send(loUp()); err != nil {
		return err
	}
	for i := range 2 * samples {
		run, out := programOurs, ours
		if i%2 == i/2%2 {
			run, out = c.floorProgram, floor
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		took, err := run(want)
		if err != nil {
			return err
		}
		*out = append(*out, millis(took))
		if i == 0 {
			if err := nothingMissing(want); err != nil {
				return err
			}
		}
		if err := c.send(noDevice(want.Links[0].Name)); err != nil {
			return err
		}
		runtime.GC()
		time.Sleep(200 * time.Millisecond) // the kernel frees what it has taken away, which would take the next one's time
	}
	return nil
}

// nothingMissing reports an error unless the floor has made the very entries that there should be: it was the first.
func nothingMissing(want netstate.State) error {
	k, err := netstate.Open(vxlan.Owns)
	if err != nil {
		return err
	}
	defer k.Close()
	res, err := k.Reconcile(want)
	if err != nil {
		return err
	}
	for _, c := range res.Done {
		switch c.Obj.(type) {
		case netstate.FDBEntry, netstate.Neighbour, netstate.Route:
			return fmt.Errorf("the floor is not what ours makes: %d changes were left, one is %s", len(res.Done), c)
		}
	}
	return nil
}

// programOurs does it as the daemon does: it looks first, and hears of changes meanwhile.
func programOurs(want netstate.State) (time.Duration, error) {
	k, err := netstate.Open(vxlan.Owns)
	if err != nil {
		return 0, err
	}
	defer k.Close()
	ctx, cancel := context.WithCancel(context.Background())
	var watch sync.WaitGroup
	watch.Go(func() { _ = k.Watch(ctx) })
	defer watch.Wait()
	defer cancel()
	begin := time.Now()
	res, err := k.Reconcile(want)
	took := time.Since(begin)
	if err == nil && len(res.Failed) > 0 {
		err = res.Failed[0]
	}
	return took, err
}

// floorProgram does it as quickly as can be: it makes the device and sends the entries, all as bytes that were made before.
func (c *floorConn) floorProgram(want netstate.State) (time.Duration, error) {
	const ifindex = 1000
	sends := append([][]byte{vxlanMessage(want.Links[0], ifindex)}, entryMessages(want, ifindex)...)
	begin := time.Now()
	for _, s := range sends {
		if err := c.send(s); err != nil {
			return 0, fmt.Errorf("the floor: %w", err)
		}
	}
	return time.Since(begin), nil
}

// floorConn is an rtnetlink socket that asks for no answers.
type floorConn struct {
	fd  int
	buf []byte
}

func dialFloor() (*floorConn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	return &floorConn{fd, make([]byte, 64<<10)}, nil
}

func (c *floorConn) close() { _ = unix.Close(c.fd) }

// send returns when the kernel has worked through the messages. It answers where there was an error, and only there.
func (c *floorConn) send(messages []byte) error {
	if err := unix.Sendto(c.fd, messages, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	n, err := unix.Read(c.fd, c.buf)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return nil
	case err != nil:
		return err
	case n < unix.NLMSG_HDRLEN+4:
		return errors.New("a netlink message is cut off")
	}
	return unix.Errno(-int32(binary.NativeEndian.Uint32(c.buf[unix.NLMSG_HDRLEN:])))
}

// floorSend is how much is sent at once. With four times as much, the hash table of the FDB entries grows too late (it can't during a
// send), and 20,000 peers take half as long again; with a quarter, the system calls begin to show.
const floorSend = 16 << 10

// entryMessages are the requests for all entries on one device, in as much as is sent at once.
func entryMessages(want netstate.State, ifindex uint32) [][]byte {
	var all [][]byte
	add := func(m []byte) {
		if last := len(all) - 1; last >= 0 && len(all[last])+len(m) <= floorSend {
			all[last] = append(all[last], m...)
			return
		}
		all = append(all, append(make([]byte, 0, floorSend), m...))
	}
	for _, f := range want.FDB {
		add(neighbourMessage(unix.NdMsg{Family: unix.AF_BRIDGE, Ifindex: int32(ifindex), Flags: unix.NTF_SELF}, f.Dst, f.MAC))
	}
	for _, n := range want.Neighbours {
		add(neighbourMessage(unix.NdMsg{Family: unix.AF_INET, Ifindex: int32(ifindex)}, n.IP, n.MAC))
	}
	for _, r := range want.Routes {
		add(routeMessage(r, ifindex))
	}
	return all
}

func neighbourMessage(h unix.NdMsg, dst netip.Addr, mac addr.MAC) []byte {
	h.State = unix.NUD_PERMANENT
	body := binary.NativeEndian.AppendUint32([]byte{h.Family, 0, 0, 0}, uint32(h.Ifindex))
	body = append(binary.NativeEndian.AppendUint16(body, h.State), h.Flags, 0)
	body = attr(body, unix.NDA_DST, dst.AsSlice())
	return create(unix.RTM_NEWNEIGH, attr(body, unix.NDA_LLADDR, mac[:]))
}

func routeMessage(r netstate.Route, ifindex uint32) []byte {
	const source, tos = 0, 0
	body := []byte{unix.AF_INET, uint8(r.Dst.Bits()), source, tos, uint8(r.Table), netstate.Protocol, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST}
	body = binary.NativeEndian.AppendUint32(body, unix.RTNH_F_ONLINK)
	body = attr(body, unix.RTA_DST, r.Dst.Addr().AsSlice())
	body = attr(body, unix.RTA_GATEWAY, r.Via.AsSlice())
	body = attr(body, unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, ifindex))
	return create(unix.RTM_NEWROUTE, attr(body, unix.RTA_PRIORITY, binary.NativeEndian.AppendUint32(nil, r.Metric)))
}

// vxlanMessage makes a device that is up and sends by lo.
func vxlanMessage(l netstate.Link, ifindex uint32) []byte {
	data := attr(nil, unix.IFLA_VXLAN_ID, binary.NativeEndian.AppendUint32(nil, l.VXLAN.VNI))
	data = attr(data, unix.IFLA_VXLAN_LINK, binary.NativeEndian.AppendUint32(nil, loIndex))
	data = attr(data, unix.IFLA_VXLAN_LOCAL, l.VXLAN.Local.AsSlice())
	data = attr(data, unix.IFLA_VXLAN_PORT, binary.BigEndian.AppendUint16(nil, l.VXLAN.Port))
	data = attr(data, unix.IFLA_VXLAN_LEARNING, []byte{0})
	info := attr(nil, unix.IFLA_INFO_KIND, []byte("vxlan"))
	info = attr(info, unix.IFLA_INFO_DATA|unix.NLA_F_NESTED, data)
	body := linkBody(ifindex, unix.IFF_UP)
	body = attr(body, unix.IFLA_IFNAME, []byte(l.Name))
	body = attr(body, unix.IFLA_ADDRESS, l.MAC[:])
	body = attr(body, unix.IFLA_MTU, binary.NativeEndian.AppendUint32(nil, uint32(l.MTU)))
	return create(unix.RTM_NEWLINK, attr(body, unix.IFLA_LINKINFO|unix.NLA_F_NESTED, info))
}

const loIndex = 1 // of lo, in every namespace

// loUp is a request that brings lo up, and noDevice one that takes a device away.
func loUp() []byte { return message(unix.RTM_NEWLINK, 0, linkBody(loIndex, unix.IFF_UP)) }

func noDevice(name string) []byte {
	return message(unix.RTM_DELLINK, 0, attr(linkBody(0, 0), unix.IFLA_IFNAME, []byte(name)))
}

// linkBody is a struct ifinfomsg.
func linkBody(ifindex, flags uint32) []byte {
	body := binary.NativeEndian.AppendUint32(make([]byte, 4, 128), ifindex)
	body = binary.NativeEndian.AppendUint32(body, flags)
	return binary.NativeEndian.AppendUint32(body, unix.IFF_UP)
}

func create(typ uint16, body []byte) []byte {
	return message(typ, unix.NLM_F_CREATE|unix.NLM_F_EXCL, body)
}

// message is a whole request that asks for no answer: struct nlmsghdr, and what follows.
func message(typ, flags uint16, body []byte) []byte {
	m := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(body)))
	m = binary.NativeEndian.AppendUint16(m, typ)
	m = binary.NativeEndian.AppendUint16(m, unix.NLM_F_REQUEST|flags)
	return append(append(m, make([]byte, 8)...), body...)
}

// attr appends a struct rtattr.
func attr(b []byte, typ uint16, data []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofRtAttr+len(data)))
	b = append(binary.NativeEndian.AppendUint16(b, typ), data...)
	return append(b, make([]byte, -len(data)&3)...)
}
