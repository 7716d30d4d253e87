package netstate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// Errors that a caller can act on.
var (
	// ErrIPSetUnsupported means that the kernel has no ipset, or none of addresses.
	ErrIPSetUnsupported = errors.New(
		"the kernel has no ipset support (CONFIG_IP_SET, CONFIG_IP_SET_HASH_IP, CONFIG_IP_SET_HASH_NET)")
	// ErrIPSetType means that somebody has made a set of this name that holds something else.
	ErrIPSetType = errors.New("a set of this name exists, but of another type")
)

const (
	ipsetAddresses, ipsetNetworks = "hash:ip", "hash:net"
	// ipsetMaxElements is only the bound up to which the kernel lets the hash grow; memory follows what is in it.
	ipsetMaxElements = 1 << 20
	ipsetHashSize    = 1 << 10 // at least: the kernel's own default
	// ipsetTrust is how long it is enough that a set has as many members as it was left with.
	ipsetTrust = 10 * time.Minute
)

// IPSets keeps named sets of addresses, or of networks, in the kernel. It belongs to one goroutine.
//
// Nothing tells of changes in a set, and to list one of thousands takes a millisecond and more. So a set that is wanted as it was
// left is only asked for its type and its number of members, and listed if these are others or it was listed last ten minutes ago.
// What is found late by that, after up to ten minutes: that somebody put another member in a member's place.
type IPSets struct {
	c     *conn
	left  map[string]leftSet
	trust time.Duration
}

// leftSet is how a set was left.
type leftSet struct {
	kind    string
	members []netip.Prefix // as they were asked for
	count   uint32
	listed  time.Time
}

// NewIPSets opens the netlink socket, in the network namespace of the calling thread.
func NewIPSets() (*IPSets, error) {
	c, err := dialNetfilter()
	if err != nil {
		return nil, unsupported(fmt.Errorf("netlink socket for ipset: %w", err))
	}
	if err := c.ask(ipsetRequest(nl.IPSET_CMD_PROTOCOL), func([]byte) {}); err != nil {
		c.close()
		return nil, unsupported(fmt.Errorf("ask for the ipset protocol: %w", err))
	}
	return &IPSets{c, map[string]leftSet{}, ipsetTrust}, nil
}

// Close closes the socket. The sets stay.
func (s *IPSets) Close() { s.c.close() }

// Ensure makes the set of this name hold exactly these members, each of the family f, and creates it if there is none.
// A set that is not one of networks holds single addresses.
// It returns how many changes it made: none, if all was in place. New members are added before old ones go. The list of the
// members must not change afterwards.
func (s *IPSets) Ensure(name string, f addr.Family, networks bool, members []netip.Prefix) (changed int, err error) {
	kind := ipsetAddresses
	if networks {
		kind = ipsetNetworks
	}
	if s.asLeft(name, f, kind, members) {
		return 0, nil
	}
	delete(s.left, name)
	want, err := memberSet(name, f, kind, members)
	if err != nil {
		return 0, err
	}
	have, created, err := s.open(name, f, kind, len(want))
	if err != nil {
		return 0, err
	}
	if created {
		changed++
	}
	n, err := s.apply(name, want, have)
	if err == nil {
		s.left[name] = leftSet{kind, members, uint32(len(want)), time.Now()}
	}
	return changed + n, err
}

// asLeft tells whether the set is wanted as it was left, and looks so.
func (s *IPSets) asLeft(name string, f addr.Family, kind string, members []netip.Prefix) bool {
	l, ok := s.left[name]
	if !ok || l.kind != kind || time.Since(l.listed) > s.trust || !slices.Equal(l.members, members) {
		return false
	}
	set, err := s.list(name, ipsetListHeader)
	return err == nil && set.plain(f, kind) && set.counted && set.count == l.count
}

func memberSet(name string, f addr.Family, kind string, members []netip.Prefix) (map[netip.Prefix]bool, error) {
	set := make(map[netip.Prefix]bool, len(members))
	for _, p := range members {
		if !p.IsValid() || addr.FamilyOf(p.Addr()) != f || p.Addr().Is4In6() || p != p.Masked() ||
			kind == ipsetAddresses && !p.IsSingleIP() {
			return nil, fmt.Errorf("ipset %s: %q is not a plain %s member of a set %s", name, p, f, kind)
		}
		set[p] = true
	}
	return set, nil
}

// open returns what is in the set, after making it for so many members if there is none.
func (s *IPSets) open(
	name string, f addr.Family, kind string, size int,
) (have map[netip.Prefix]bool, created bool, err error) {
	set, err := s.list(name, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, true, s.create(name, f, kind, size)
	}
	if err != nil {
		return nil, false, unsupported(fmt.Errorf("list ipset %s: %w", name, err))
	}
	if !set.plain(f, kind) {
		return nil, false, fmt.Errorf("ipset %s: %w: %s, wanted %s for %s without timeout; remove it with `ipset destroy %s`",
			name, ErrIPSetType, set.describe(), kind, f, name)
	}
	have = make(map[netip.Prefix]bool, len(set.members))
	for _, p := range set.members {
		have[p] = true
	}
	return have, false, nil
}

// create makes a set with room for size members: to let the hash grow while they are added takes as long as to add them.
func (s *IPSets) create(name string, f addr.Family, kind string, size int) error {
	data := nl.NewRtAttr(nl.IPSET_ATTR_DATA|unix.NLA_F_NESTED, nil)
	data.AddRtAttr(nl.IPSET_ATTR_MAXELEM|unix.NLA_F_NET_BYTEORDER, binary.BigEndian.AppendUint32(nil, ipsetMaxElements))
	data.AddRtAttr(nl.IPSET_ATTR_HASHSIZE|unix.NLA_F_NET_BYTEORDER, binary.BigEndian.AppendUint32(nil, uint32(max(size, ipsetHashSize))))
	req := ipsetRequest(nl.IPSET_CMD_CREATE, nl.NewRtAttr(nl.IPSET_ATTR_SETNAME, nl.ZeroTerminated(name)),
		nl.NewRtAttr(nl.IPSET_ATTR_TYPENAME, nl.ZeroTerminated(kind)), nl.NewRtAttr(nl.IPSET_ATTR_REVISION, []byte{0}),
		nl.NewRtAttr(nl.IPSET_ATTR_FAMILY, []byte{nfFamily(f)}), data)
	req.Flags |= unix.NLM_F_CREATE | unix.NLM_F_EXCL
	if err := s.c.ask(req, func([]byte) {}); err != nil {
		return unsupported(fmt.Errorf("create ipset %s: %w", name, ipsetError(err)))
	}
	return nil
}

// apply adds what is missing, then deletes what is too much. It goes on after an error, and reports the first.
func (s *IPSets) apply(name string, want, have map[netip.Prefix]bool) (changed int, err error) {
	failed := 0
	step := func(verb string, cmd uint16, list []netip.Prefix) {
		refused := s.c.each(len(list), func(i int, out *messages) error {
			out.member(cmd, name, list[i])
			return nil
		})
		changed, failed = changed+len(list)-len(refused), failed+len(refused)
		for i, a := range list {
			if e := refused[i]; e != nil && err == nil {
				err = fmt.Errorf("ipset %s: %s %s: %w", name, verb, a, ipsetError(e))
			}
		}
	}
	step("add", nl.IPSET_CMD_ADD, missing(want, have))
	step("delete", nl.IPSET_CMD_DEL, missing(have, want))
	if failed > 1 {
		err = fmt.Errorf("%w (and %d more)", err, failed-1)
	}
	return changed, err
}

// missing returns the members of a that are not in b, in order.
func missing(a, b map[netip.Prefix]bool) []netip.Prefix {
	var list []netip.Prefix
	for m := range maps.Keys(a) {
		if !b[m] {
			list = append(list, m)
		}
	}
	slices.SortFunc(list, addr.ComparePrefix)
	return list
}

// Remove removes the set. That there is none is fine; one that a firewall rule still names is an error.
func (s *IPSets) Remove(name string) error {
	delete(s.left, name)
	err := s.c.ask(ipsetRequest(nl.IPSET_CMD_DESTROY, nl.NewRtAttr(nl.IPSET_ATTR_SETNAME, nl.ZeroTerminated(name))), func([]byte) {})
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return fmt.Errorf("remove ipset %s: %w", name, ipsetError(err))
}

// ipsetRequest begins a message (uapi/linux/netfilter/ipset/ip_set.h).
func ipsetRequest(cmd int, attrs ...*nl.RtAttr) *nl.NetlinkRequest {
	protocol := byte(nl.IPSET_PROTOCOL)
	if cmd == ipsetCmdGetByIndex {
		protocol++ // came with it
	}
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_IPSET<<8|cmd, 0)
	req.AddData(&nl.Nfgenmsg{})
	req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_PROTOCOL, []byte{protocol}))
	for _, a := range attrs {
		req.AddData(a)
	}
	return req
}

// member writes a message that adds or deletes one member. That it is already there, or already gone, is fine: it does not ask
// for NLM_F_EXCL.
func (m *messages) member(cmd uint16, set string, p netip.Prefix) {
	typ := uint16(nl.IPSET_ATTR_IPADDR_IPV4)
	if p.Addr().Is6() {
		typ = nl.IPSET_ATTR_IPADDR_IPV6
	}
	m.begin(unix.NFNL_SUBSYS_IPSET<<8|cmd, 0)
	m.buf = append(m.buf, make([]byte, sizeofNfgenmsg)...)
	m.attr(nl.IPSET_ATTR_PROTOCOL, []byte{nl.IPSET_PROTOCOL})
	m.attr(nl.IPSET_ATTR_SETNAME, append([]byte(set), 0))
	data := m.nest(nl.IPSET_ATTR_DATA)
	ip := m.nest(nl.IPSET_ATTR_IP)
	m.address(typ|unix.NLA_F_NET_BYTEORDER, p.Addr())
	m.endNest(ip)
	if !p.IsSingleIP() {
		m.attr(nl.IPSET_ATTR_CIDR, []byte{byte(p.Bits())})
	}
	m.endNest(data)
	m.end()
}

// nest begins an attribute that holds attributes; endNest ends it.
func (m *messages) nest(typ uint16) (at int) {
	at = len(m.buf)
	m.attr(typ|unix.NLA_F_NESTED, nil)
	return at
}

func (m *messages) endNest(at int) { binary.NativeEndian.PutUint16(m.buf[at:], uint16(len(m.buf)-at)) }

// ipset is a set as the kernel tells it.
type ipset struct {
	kind     string
	family   uint8
	timeouts bool
	counted  bool // the kernel says how many members there are
	count    uint32
	members  []netip.Prefix
}

// plain tells whether it is a set as we make them.
func (set ipset) plain(f addr.Family, kind string) bool {
	return set.kind == kind && set.family == nfFamily(f) && !set.timeouts
}

func (set ipset) describe() string {
	text := set.kind
	switch set.family {
	case unix.AF_INET:
		text += " for IPv4"
	case unix.AF_INET6:
		text += " for IPv6"
	}
	if set.timeouts {
		text += " with timeout"
	}
	return text
}

// What the library has no names for.
const (
	ipsetListHeader    = 1 << 2 // IPSET_FLAG_LIST_HEADER: what the set is, without its members
	ipsetCmdGetByIndex = 15
	ipsetAttrIndex     = 11
)

// list reads a set, under flags.
func (s *IPSets) list(name string, flags uint32) (ipset, error) {
	var set ipset
	attrs := []*nl.RtAttr{
		nl.NewRtAttr(nl.IPSET_ATTR_PROTOCOL, []byte{nl.IPSET_PROTOCOL}), nl.NewRtAttr(nl.IPSET_ATTR_SETNAME, nl.ZeroTerminated(name)),
		nl.NewRtAttr(nl.IPSET_ATTR_FLAGS|unix.NLA_F_NET_BYTEORDER, binary.BigEndian.AppendUint32(nil, flags)),
	}
	err := s.c.dump(unix.NFNL_SUBSYS_IPSET<<8|nl.IPSET_CMD_LIST, &nl.Nfgenmsg{}, attrs, func() { set = ipset{} }, func(body []byte) {
		set.take(body[min(sizeofNfgenmsg, len(body)):])
	})
	return set, err
}

// take reads one message of a list: the first says what the set is, each has some members.
func (set *ipset) take(attrs []byte) {
	eachAttr(attrs, func(typ uint16, data []byte) {
		switch typ {
		case nl.IPSET_ATTR_TYPENAME:
			set.kind = cString(data)
		case nl.IPSET_ATTR_FAMILY:
			set.family = append(data, 0)[0]
		case nl.IPSET_ATTR_DATA:
			count := attrOf(data, nl.IPSET_ATTR_ELEMENTS)
			set.counted, set.count = count != nil, be32(count)
			set.timeouts = attrOf(data, nl.IPSET_ATTR_TIMEOUT) != nil
		case nl.IPSET_ATTR_ADT:
			eachAttr(data, func(_ uint16, member []byte) {
				eachAttr(attrOf(member, nl.IPSET_ATTR_IP), func(_ uint16, ip []byte) {
					if a, ok := netip.AddrFromSlice(ip); ok {
						length := a.BitLen()
						if cidr := attrOf(member, nl.IPSET_ATTR_CIDR); len(cidr) > 0 {
							length = int(cidr[0])
						}
						set.members = append(set.members, netip.PrefixFrom(a, length))
					}
				})
			})
		}
	})
}

// setName is the name of the set that a rule of iptables knows by its number.
func (n *NFTables) setName(index uint16) string {
	name := fmt.Sprintf("?%d", index)
	req := ipsetRequest(ipsetCmdGetByIndex, nl.NewRtAttr(ipsetAttrIndex|unix.NLA_F_NET_BYTEORDER, binary.BigEndian.AppendUint16(nil, index)))
	_ = n.c.ask(req, func(body []byte) { // what could not be found out remains unknown
		name = cString(attrOf(body[min(sizeofNfgenmsg, len(body)):], nl.IPSET_ATTR_SETNAME))
	})
	return name
}

// ipsetError gives the errors of ipset their names; its numbers begin behind those that everybody knows.
func ipsetError(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) && errno >= nl.IPSET_ERR_PRIVATE {
		return nl.IPSetError(errno)
	}
	return err
}

// unsupported adds ErrIPSetUnsupported to the errors by which a kernel says that it has no ipset.
func unsupported(err error) error {
	var private nl.IPSetError
	var errno syscall.Errno
	switch {
	case errors.As(err, &private) && private == nl.IPSET_ERR_FIND_TYPE:
	case errors.As(err, &errno) && slices.Contains([]syscall.Errno{unix.EINVAL, unix.EPROTONOSUPPORT, unix.EOPNOTSUPP, unix.EAFNOSUPPORT}, errno):
	default:
		return err
	}
	return fmt.Errorf("%w: %w", ErrIPSetUnsupported, err)
}
