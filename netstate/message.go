package netstate

import (
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// messages are netlink requests, one behind the other in the bytes that are sent. They are written by hand: at the start there are
// four for each peer.
type messages struct {
	buf  []byte
	seq  uint32 // of the next one
	last int    // where the last whole one begins
	open int    // where one begins that is being written
}

// begin starts a message (struct nlmsghdr, uapi/linux/netlink.h), in the place of one that was not ended. Its length is set by end.
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

// What a message says before its attributes. A rule's struct fib_rule_hdr has the layout of struct rtmsg, with the action as the type.

func (m *messages) rtmsg(h unix.RtMsg) {
	m.buf = append(m.buf, h.Family, h.Dst_len, h.Src_len, h.Tos, h.Table, h.Protocol, h.Scope, h.Type)
	m.buf = binary.NativeEndian.AppendUint32(m.buf, h.Flags)
}

func (m *messages) ndmsg(h unix.NdMsg) {
	m.buf = binary.NativeEndian.AppendUint32(append(m.buf, h.Family, 0, 0, 0), uint32(h.Ifindex))
	m.buf = append(binary.NativeEndian.AppendUint16(m.buf, h.State), h.Flags, h.Type)
}

func (m *messages) ifaddrmsg(h unix.IfAddrmsg) {
	m.buf = binary.NativeEndian.AppendUint32(append(m.buf, h.Family, h.Prefixlen, h.Flags, h.Scope), h.Index)
}

// change starts a message that adds or deletes something. An Add must not meet anything: what is there under our key but not in our
// observation is somebody else's, or came since.
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
	switch obj := c.Obj.(type) {
	case Address:
		return k.putAddress(m, c.Op, obj)
	case Neighbour:
		return k.putNeighbour(m, c.Op, obj.Link, unix.NdMsg{Family: familyOf(obj.IP)}, obj.MAC, obj.IP)
	case FDBEntry:
		return k.putNeighbour(m, c.Op, obj.Link, unix.NdMsg{Family: unix.AF_BRIDGE, Flags: unix.NTF_SELF}, obj.MAC, obj.Dst)
	case Route:
		return k.putRoute(m, c.Op, obj)
	case Rule:
		putRule(m, c.Op, obj)
		return nil
	}
	return fmt.Errorf("no message is known for a %s", c.Kind())
}

func (k *Kernel) linkIndex(name string) (uint32, error) {
	if i, ok := k.index[name]; ok {
		return uint32(i), nil
	}
	return 0, fmt.Errorf("%w: %s", ErrNoLink, name)
}

func (k *Kernel) putAddress(m *messages, op Op, a Address) error {
	ifindex, err := k.linkIndex(a.Link)
	if err != nil {
		return err
	}
	m.change(op, unix.RTM_NEWADDR, unix.RTM_DELADDR)
	m.ifaddrmsg(unix.IfAddrmsg{
		Family: familyOf(a.Prefix.Addr()), Prefixlen: uint8(a.Prefix.Bits()), Flags: unix.IFA_F_NODAD | unix.IFA_F_PERMANENT, Index: ifindex,
	})
	m.address(unix.IFA_LOCAL, a.Prefix.Addr())
	m.address(unix.IFA_ADDRESS, a.Prefix.Addr())
	m.end()
	return nil
}

func (k *Kernel) putNeighbour(m *messages, op Op, link string, h unix.NdMsg, mac addr.MAC, dst netip.Addr) error {
	ifindex, err := k.linkIndex(link)
	if err != nil {
		return err
	}
	if op == Add {
		// All entries on our device are ours, also one that the kernel made while nobody had told it better.
		op = Replace
	}
	h.Ifindex, h.State = int32(ifindex), unix.NUD_PERMANENT
	m.change(op, unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH)
	m.ndmsg(h)
	m.address(unix.NDA_DST, dst)
	m.attr(unix.NDA_LLADDR, mac[:])
	m.end()
	return nil
}

func (k *Kernel) putRoute(m *messages, op Op, r Route) error {
	ifindex, err := k.linkIndex(r.Link)
	if err != nil && op != Delete {
		return err
	}
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
	m.rtmsg(h)
	m.address(unix.RTA_DST, r.Dst.Addr())
	m.number(unix.RTA_PRIORITY, r.Metric)
	if r.Table > math.MaxUint8 { // only one to be deleted
		m.number(unix.RTA_TABLE, r.Table)
	}
	if r.Via.IsValid() {
		m.address(unix.RTA_GATEWAY, r.Via)
	}
	if ifindex != 0 {
		m.number(unix.RTA_OIF, ifindex)
	}
	m.end()
	return nil
}

func putRule(m *messages, op Op, r Rule) {
	m.change(op, unix.RTM_NEWRULE, unix.RTM_DELRULE)
	m.rtmsg(unix.RtMsg{
		Family: familyOf(r.From.Addr()), Src_len: uint8(r.From.Bits()), Dst_len: uint8(r.To.Bits()),
		Table: uint8(r.Table), Type: uint8(RuleToTable),
	})
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
