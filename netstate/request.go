package netstate

import (
	"fmt"
	"math"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// request is the netlink message for a change of an address, neighbour, FDB entry, route or rule.
func (k *Kernel) request(c Change) (*nl.NetlinkRequest, error) {
	switch obj := c.Obj.(type) {
	case Address:
		return k.addressRequest(c.Op, obj)
	case Neighbour:
		return k.neighbourRequest(c.Op, obj.Link, familyOf(obj.IP), 0, obj.MAC, obj.IP)
	case FDBEntry:
		return k.neighbourRequest(c.Op, obj.Link, unix.AF_BRIDGE, unix.NTF_SELF, obj.MAC, obj.Dst)
	case Route:
		return k.routeRequest(c.Op, obj)
	case Rule:
		return ruleRequest(c.Op, obj), nil
	}
	return nil, fmt.Errorf("no message is known for a %s", c.Kind())
}

// newRequest starts a message. An Add must not meet anything: what is there under our key but not in our observation is
// somebody else's, or came since.
func newRequest(op Op, add, del int) *nl.NetlinkRequest {
	switch op {
	case Add:
		return nl.NewNetlinkRequest(add, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	case Replace:
		return nl.NewNetlinkRequest(add, unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	default:
		return nl.NewNetlinkRequest(del, 0)
	}
}

func (k *Kernel) linkIndex(name string) (uint32, error) {
	if i, ok := k.index[name]; ok {
		return uint32(i), nil
	}
	return 0, fmt.Errorf("%w as %s", ErrNoLink, name)
}

func (k *Kernel) addressRequest(op Op, a Address) (*nl.NetlinkRequest, error) {
	ifindex, err := k.linkIndex(a.Link)
	if err != nil {
		return nil, err
	}
	req := newRequest(op, unix.RTM_NEWADDR, unix.RTM_DELADDR)
	msg := nl.NewIfAddrmsg(int(familyOf(a.Prefix.Addr())))
	msg.Index, msg.Prefixlen = ifindex, uint8(a.Prefix.Bits())
	msg.Flags = unix.IFA_F_NODAD | unix.IFA_F_PERMANENT
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFA_LOCAL, a.Prefix.Addr().AsSlice()))
	req.AddData(nl.NewRtAttr(unix.IFA_ADDRESS, a.Prefix.Addr().AsSlice()))
	return req, nil
}

func (k *Kernel) neighbourRequest(op Op, link string, family, flags uint8, mac addr.MAC, dst netip.Addr) (*nl.NetlinkRequest, error) {
	ifindex, err := k.linkIndex(link)
	if err != nil {
		return nil, err
	}
	if op == Add {
		// All entries on our device are ours, also one that the kernel made while nobody had told it better.
		op = Replace
	}
	req := newRequest(op, unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH)
	req.AddData(&netlink.Ndmsg{Family: family, Index: ifindex, State: unix.NUD_PERMANENT, Flags: flags})
	req.AddData(nl.NewRtAttr(unix.NDA_DST, dst.AsSlice()))
	req.AddData(nl.NewRtAttr(unix.NDA_LLADDR, mac[:]))
	return req, nil
}

func (k *Kernel) routeRequest(op Op, r Route) (*nl.NetlinkRequest, error) {
	ifindex, err := k.linkIndex(r.Link)
	if err != nil && op != Delete {
		return nil, err
	}
	req := newRequest(op, unix.RTM_NEWROUTE, unix.RTM_DELROUTE)
	msg := nl.NewRtMsg()
	msg.RtMsg = unix.RtMsg{
		Family: familyOf(r.Dst.Addr()), Dst_len: uint8(r.Dst.Bits()), Table: uint8(r.Table),
		Protocol: Protocol, Type: unix.RTN_UNICAST, Scope: unix.RT_SCOPE_UNIVERSE,
	}
	if !r.Via.IsValid() {
		msg.Scope = unix.RT_SCOPE_LINK
	}
	if op == Delete {
		msg.Scope = unix.RT_SCOPE_NOWHERE // any
	}
	if r.OnLink {
		msg.Flags = unix.RTNH_F_ONLINK
	}
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.RTA_DST, r.Dst.Addr().AsSlice()))
	req.AddData(nl.NewRtAttr(unix.RTA_PRIORITY, nl.Uint32Attr(r.Metric)))
	if r.Table > math.MaxUint8 { // only one to be deleted
		req.AddData(nl.NewRtAttr(unix.RTA_TABLE, nl.Uint32Attr(r.Table)))
	}
	if r.Via.IsValid() {
		req.AddData(nl.NewRtAttr(unix.RTA_GATEWAY, r.Via.AsSlice()))
	}
	if ifindex != 0 {
		req.AddData(nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(ifindex)))
	}
	return req, nil
}

func ruleRequest(op Op, r Rule) *nl.NetlinkRequest {
	const actionToTable = 1 // FR_ACT_TO_TBL
	req := newRequest(op, unix.RTM_NEWRULE, unix.RTM_DELRULE)
	msg := nl.NewRtMsg() // struct fib_rule_hdr has the layout of struct rtmsg
	msg.RtMsg = unix.RtMsg{
		Family: familyOf(r.From.Addr()), Src_len: uint8(r.From.Bits()), Table: uint8(r.Table), Type: actionToTable,
	}
	req.AddData(msg)
	if r.From.Bits() > 0 {
		req.AddData(nl.NewRtAttr(unix.FRA_SRC, r.From.Addr().AsSlice()))
	}
	if r.Table > math.MaxUint8 {
		req.AddData(nl.NewRtAttr(unix.FRA_TABLE, nl.Uint32Attr(r.Table)))
	}
	req.AddData(nl.NewRtAttr(unix.FRA_PRIORITY, nl.Uint32Attr(r.Priority)))
	req.AddData(nl.NewRtAttr(unix.FRA_PROTOCOL, []byte{Protocol}))
	return req
}

func familyOf(a netip.Addr) uint8 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
