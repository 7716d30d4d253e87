package netstate

import (
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// messages are netlink requests, one behind the other in the bytes that are sent. They are written by hand: at the
// start there are four for each peer.
type messages struct {
	buf  []byte
	seq  uint32 // of the next one
	last int    // where the last whole one begins
	open int    // where one begins that is being written
}

// begin starts a message (struct nlmsghdr, uapi/linux/netlink.h), in the place of one that was not ended. Its length is
// set by end.
func (m *messages) begin(typ, flags uint16) {
	var h [unix.NLMSG_HDRLEN]byte
	binary.NativeEndian.PutUint16(h[4:], typ)
	binary.NativeEndian.PutUint16(h[6:], unix.NLM_F_REQUEST|flags)
	binary.NativeEndian.PutUint32(h[8:], m.seq)
	m.buf = append(m.buf[:m.open], h[:]...)
}

func (m *messages) end() {
	binary.NativeEndian.PutUint32(m.buf[m.open:], uint32(len(m.buf)-m.open))
	m.last, m.open = m.open, len(m.buf)
}

func (m *messages) reset() { m.buf, m.last, m.open = m.buf[:0], 0, 0 }

// askForAck makes the last message one that is answered also if all is well, and returns its number.
func (m *messages) askForAck() uint32 {
	h := m.buf[m.last:]
	binary.NativeEndian.PutUint16(h[6:], binary.NativeEndian.Uint16(h[6:])|unix.NLM_F_ACK)
	return binary.NativeEndian.Uint32(h[8:])
}

// attr appends an attribute: struct rtattr, and the next one begins at a multiple of four.
func (m *messages) attr(typ uint16, data []byte) {
	b := binary.NativeEndian.AppendUint16(m.buf, uint16(unix.SizeofRtAttr+len(data)))
	b = append(binary.NativeEndian.AppendUint16(b, typ), data...)
	for len(b)%unix.RTA_ALIGNTO != 0 {
		b = append(b, 0)
	}
	m.buf = b
}

func (m *messages) number(typ uint16, v uint32) {
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], v)
	m.attr(typ, b[:])
}

func (m *messages) address(typ uint16, a netip.Addr) {
	if a.Is4() {
		b := a.As4()
		m.attr(typ, b[:])
		return
	}
	b := a.As16()
	m.attr(typ, b[:])
}

// header appends what a message has before its attributes.
func (m *messages) header(h interface{ Serialize() []byte }) { m.buf = append(m.buf, h.Serialize()...) }

// change starts a message that adds or deletes something. An Add must not meet anything: what is there under our key
// but not in our observation is another program's, or came since.
func (m *messages) change(op Op, add, del uint16) {
	switch op {
	case Add:
		m.begin(add, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	case Replace:
		m.begin(add, unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	default:
		m.begin(del, 0)
	}
}

// put writes the message for a change of an address, neighbour, FDB entry, route or rule.
func (k *Kernel) put(m *messages, c Change) error {
	var ifindex uint32
	var err error
	switch o := c.Obj.(type) {
	case Address:
		if ifindex, err = k.linkIndex(o.Link); err == nil {
			putAddress(m, c.Op, o, ifindex)
		}
	case Neighbour:
		if ifindex, err = k.linkIndex(o.Link); err == nil {
			putNeighbour(m, c.Op, netlink.Ndmsg{Family: familyOf(o.IP), Index: ifindex}, o.MAC, o.IP)
		}
	case FDBEntry:
		if ifindex, err = k.linkIndex(o.Link); err == nil {
			putNeighbour(m, c.Op, netlink.Ndmsg{Family: unix.AF_BRIDGE, Index: ifindex, Flags: unix.NTF_SELF}, o.MAC, o.Dst)
		}
	case Route:
		if ifindex, err = k.linkIndex(o.Link); err == nil || c.Op == Delete {
			putRoute(m, c.Op, o, ifindex)
			return nil
		}
	case Rule:
		putRule(m, c.Op, o)
	default:
		err = fmt.Errorf("no message is known for a %s", c.Kind())
	}
	return err
}

func (k *Kernel) linkIndex(name string) (uint32, error) {
	if i, ok := k.index[name]; ok {
		return uint32(i), nil
	}
	return 0, fmt.Errorf("%w: %s", ErrNoLink, name)
}

func putAddress(m *messages, op Op, a Address, ifindex uint32) {
	m.change(op, unix.RTM_NEWADDR, unix.RTM_DELADDR)
	m.header(&nl.IfAddrmsg{IfAddrmsg: unix.IfAddrmsg{
		Family: familyOf(a.Prefix.Addr()), Prefixlen: uint8(a.Prefix.Bits()), Index: ifindex,
		Flags: unix.IFA_F_NODAD | unix.IFA_F_PERMANENT,
	}})
	m.address(unix.IFA_LOCAL, a.Prefix.Addr())
	m.address(unix.IFA_ADDRESS, a.Prefix.Addr())
	m.end()
}

func putNeighbour(m *messages, op Op, h netlink.Ndmsg, mac addr.MAC, dst netip.Addr) {
	if op == Add {
		// All entries on our device are ours, also one that the kernel has learned while none was configured.
		op = Replace
	}
	h.State = unix.NUD_PERMANENT
	m.change(op, unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH)
	m.header(&h)
	m.address(unix.NDA_DST, dst)
	m.attr(unix.NDA_LLADDR, mac[:])
	m.end()
}

// putRoute writes the message for a route. One without a device is deleted whatever its device is.
func putRoute(m *messages, op Op, r Route, ifindex uint32) {
	h := unix.RtMsg{
		Family: familyOf(r.Dst.Addr()), Dst_len: uint8(r.Dst.Bits()), Table: uint8(r.Table),
		Protocol: Protocol, Type: unix.RTN_UNICAST, Scope: unix.RT_SCOPE_UNIVERSE,
	}
	if !r.Via.IsValid() {
		h.Scope = unix.RT_SCOPE_LINK
	}
	if op == Delete {
		h.Scope = unix.RT_SCOPE_NOWHERE // any
	}
	if r.OnLink {
		h.Flags = unix.RTNH_F_ONLINK
	}
	m.change(op, unix.RTM_NEWROUTE, unix.RTM_DELROUTE)
	m.header(&nl.RtMsg{RtMsg: h})
	m.address(unix.RTA_DST, r.Dst.Addr())
	m.number(unix.RTA_PRIORITY, r.Metric)
	if r.Table > math.MaxUint8 { // only one to be deleted
		m.number(unix.RTA_TABLE, r.Table)
	}
	if r.Via.IsValid() {
		m.address(unix.RTA_GATEWAY, r.Via)
	}
	if r.Src.IsValid() {
		m.address(unix.RTA_PREFSRC, r.Src)
	}
	if ifindex != 0 {
		m.number(unix.RTA_OIF, ifindex)
	}
	m.end()
}

func putRule(m *messages, op Op, r Rule) {
	m.change(op, unix.RTM_NEWRULE, unix.RTM_DELRULE)
	m.header(&nl.RtMsg{RtMsg: unix.RtMsg{ // as struct fib_rule_hdr, in which the action has the place of the type
		Family: familyOf(r.From.Addr()), Src_len: uint8(r.From.Bits()), Dst_len: uint8(r.To.Bits()),
		Table: uint8(r.Table), Type: uint8(RuleToTable),
	}})
	if r.From.Bits() > 0 {
		m.address(unix.FRA_SRC, r.From.Addr())
	}
	if r.To.Bits() > 0 {
		m.address(unix.FRA_DST, r.To.Addr())
	}
	if r.Table > math.MaxUint8 {
		m.number(unix.FRA_TABLE, r.Table)
	}
	if r.Unmarked != 0 {
		m.number(unix.FRA_FWMASK, r.Unmarked)
	}
	if r.AtLeast > 0 {
		m.number(unix.FRA_SUPPRESS_PREFIXLEN, uint32(r.AtLeast)-1)
	}
	m.number(unix.FRA_PRIORITY, r.Priority)
	m.attr(unix.FRA_PROTOCOL, []byte{Protocol})
	m.end()
}

func familyOf(a netip.Addr) uint8 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
