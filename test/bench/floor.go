package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/backend/vxlan"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// programAll names the row, for the plot as well.
const programAll = "a device; for each an FDB entry, a neighbour, two routes"

// program measures how long it takes to make a node's device and all entries of its peers, beside a program that only
// sends bytes which were made before: it observes nothing, gets no notifications, and only counts errors.
func program(ctx context.Context, e *Env) error {
	for _, n := range pick(e, []int{5000, 20000}, []int{500}) {
		in, err := inputFor(n)
		if err != nil {
			return err
		}
		var ours, floor []float64
		err = inNewNetns(func() error {
			return programBoth(ctx, pick(e, 11, 1), vxlan.Backend{}.Plan(in).State, &ours, &floor)
		})
		if err != nil {
			return fmt.Errorf("%s: %w", peers(n), err)
		}
		e.Add(row("program", programAll, Millis, ours...).at(n).beside("floor", floor).ratioAtMost(1.5))
	}
	return nil
}

// inputFor is what the plan of a node with n peers is made from.
func inputFor(n int) (backend.Input, error) {
	config, err := subnet.ParseConfig([]byte(siteNetwork))
	if err != nil {
		return backend.Input{}, err
	}
	in := backend.Input{
		Config: config, Self: peerLease(n + 1), Host: netstate.Host{IPv6: true}.Indexed(),
		Underlay: addr.Per[backend.Underlay]{V4: backend.Underlay{
			Device: "lo", Addr: netip.AddrFrom4([4]byte{127, 0, 0, 1}),
			MTU: 1500,
		}},
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
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	for i := range 2 * samples {
		run, out := programOurs, ours
		if i%2 == i/2%2 {
			run, out = programFloor, floor
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
		if err := netlink.LinkDel(&netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: want.Links[0].Name}}); err != nil {
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
	res, err := k.Reconcile(netstate.Update{Come: want, All: true, Prune: true})
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

// programOurs does it as the daemon does: it observes first, and is notified of changes meanwhile.
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
	res, err := k.Reconcile(netstate.Update{Come: want, All: true, Prune: true})
	took := time.Since(begin)
	if err == nil && len(res.Failed) > 0 {
		err = res.Failed[0]
	}
	return took, err
}

// programFloor does it as quickly as can be: it makes the device and sends the entries, as bytes that were made before.
func programFloor(want netstate.State) (time.Duration, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	const ifindex = 1000
	sends := entryMessages(want, ifindex)
	begin := time.Now()
	if err := makeDevice(want.Links[0], ifindex); err != nil {
		return 0, fmt.Errorf("the floor: %w", err)
	}
	for _, s := range sends {
		if err := sendAll(fd, s); err != nil {
			return 0, fmt.Errorf("the floor: %w", err)
		}
	}
	return time.Since(begin), nil
}

// makeDevice makes a VXLAN device that is up and sends by lo.
func makeDevice(l netstate.Link, ifindex int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.Index, attrs.MTU, attrs.HardwareAddr = l.Name, ifindex, l.MTU, l.MAC[:]
	attrs.Flags |= net.FlagUp
	return netlink.LinkAdd(&netlink.Vxlan{
		LinkAttrs: attrs, VxlanId: int(l.VXLAN.VNI), SrcAddr: l.VXLAN.Local.AsSlice(), Port: int(l.VXLAN.Port),
		VtepDevIndex: 1, // lo
	})
}

// sendAll returns when the kernel has worked through the messages. It answers where there was an error, and only there.
func sendAll(fd int, messages []byte) error {
	if err := unix.Sendto(fd, messages, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	buf := make([]byte, 4096)
	n, err := unix.Read(fd, buf)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return nil
	case err != nil:
		return err
	case n < unix.NLMSG_HDRLEN+4:
		return errors.New("a netlink message is cut off")
	}
	return unix.Errno(-int32(binary.NativeEndian.Uint32(buf[unix.NLMSG_HDRLEN:])))
}

// floorSend is how much is sent at once. With four times as much, the hash table of the FDB entries grows too late (it
// can't during a send), and 20,000 peers take half as long again; with a quarter, the system calls begin to show.
const floorSend = 16 << 10

// entryMessages are the requests for all entries on one device, in as much as is sent at once.
func entryMessages(want netstate.State, ifindex uint32) [][]byte {
	var all [][]byte
	add := func(typ int, data ...nl.NetlinkRequestData) {
		req := nl.NewNetlinkRequest(typ, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
		req.Data = data
		m := req.Serialize()
		if last := len(all) - 1; last >= 0 && len(all[last])+len(m) <= floorSend {
			all[last] = append(all[last], m...)
			return
		}
		all = append(all, append(make([]byte, 0, floorSend), m...))
	}
	number := func(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }
	neighbour := func(family, flags uint8, dst netip.Addr, mac addr.MAC) {
		add(unix.RTM_NEWNEIGH, &netlink.Ndmsg{Family: family, Index: ifindex, State: unix.NUD_PERMANENT, Flags: flags},
			nl.NewRtAttr(unix.NDA_DST, dst.AsSlice()), nl.NewRtAttr(unix.NDA_LLADDR, mac[:]))
	}
	for _, f := range want.FDB {
		neighbour(unix.AF_BRIDGE, unix.NTF_SELF, f.Dst, f.MAC)
	}
	for _, n := range want.Neighbours {
		neighbour(unix.AF_INET, 0, n.IP, n.MAC)
	}
	for _, r := range want.Routes {
		add(unix.RTM_NEWROUTE,
			&nl.RtMsg{RtMsg: unix.RtMsg{
				Family: unix.AF_INET, Dst_len: uint8(r.Dst.Bits()), Table: uint8(r.Table), Protocol: netstate.Protocol,
				Type: unix.RTN_UNICAST, Flags: unix.RTNH_F_ONLINK,
			}},
			nl.NewRtAttr(unix.RTA_DST, r.Dst.Addr().AsSlice()), nl.NewRtAttr(unix.RTA_GATEWAY, r.Via.AsSlice()),
			nl.NewRtAttr(unix.RTA_OIF, number(ifindex)), nl.NewRtAttr(unix.RTA_PRIORITY, number(r.Metric)))
	}
	return all
}
