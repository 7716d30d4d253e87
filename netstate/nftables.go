package netstate

import (
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"math/bits"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// NFTables reads what is in nf_tables, where the rules of nft and those of iptables-nft are. It asks the kernel itself, which
// takes a fraction of a millisecond, where a program that lists rules takes several. It belongs to one goroutine.
//
// What is not there is an error that is os.ErrNotExist.
type NFTables struct {
	c    *conn
	seed maphash.Seed
}

// OpenNFTables opens the netlink socket, in the network namespace of the calling thread.
func OpenNFTables() (*NFTables, error) {
	c, err := dialNetfilter()
	if err != nil {
		return nil, fmt.Errorf("netlink socket for nf_tables: %w", err)
	}
	return &NFTables{c, maphash.MakeSeed()}, nil
}

// Close closes the socket.
func (n *NFTables) Close() { n.c.close() }

// dialNetfilter opens a socket for questions and changes.
func dialNetfilter() (*conn, error) {
	fd, err := netfilterSocket(0)
	if err != nil {
		return nil, err
	}
	for _, opt := range []int{unix.NETLINK_EXT_ACK, unix.NETLINK_CAP_ACK} { // helps, which the kernel may lack
		_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, opt, 1)
	}
	tv := unix.NsecToTimeval(int64(recvTimeout))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return &conn{fd: fd, buf: make([]byte, 64<<10), recv: unix.Recvfrom}, nil
}

// netfilterSocket is a bound socket with a large buffer.
func netfilterSocket(flags int) (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|flags, unix.NETLINK_NETFILTER)
	if err != nil {
		return -1, err
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, netfilterBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, netfilterBuffer)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// netfilterBuffer holds the news of a large change (kube-proxy's, say) until they are read, and the answers to a batch. It is
// forced where we may.
const netfilterBuffer = 1 << 20

// ask sends one request that is no dump, and hands over what comes before the acknowledgement.
func (c *conn) ask(req *nl.NetlinkRequest, each func(body []byte)) error {
	c.seq++
	req.Seq = c.seq
	req.Flags |= unix.NLM_F_ACK
	if err := c.send(req.Serialize()); err != nil {
		return err
	}
	return c.receive(func(h unix.NlMsghdr, body []byte) (bool, error) {
		switch {
		case h.Seq != req.Seq:
		case h.Type == unix.NLMSG_ERROR:
			return true, ackError(h, body)
		default:
			each(body)
		}
		return false, nil
	})
}

// nfFamily is how netfilter calls a family.
func nfFamily(f addr.Family) uint8 {
	if f == addr.IPv4 {
		return unix.NFPROTO_IPV4
	}
	return unix.NFPROTO_IPV6
}

func nfHeader(f addr.Family) *nl.Nfgenmsg { return &nl.Nfgenmsg{NfgenFamily: nfFamily(f)} }

// stringAttrs are attributes with the numbers 1, 2 and so on; in every request these are the table and what is in it.
func stringAttrs(values ...string) []*nl.RtAttr {
	attrs := make([]*nl.RtAttr, len(values))
	for i, v := range values {
		attrs[i] = nl.NewRtAttr(i+1, nl.ZeroTerminated(v))
	}
	return attrs
}

// get asks for one object; each gets its attributes.
func (n *NFTables) get(what uint16, f addr.Family, attrs []*nl.RtAttr, each func(typ uint16, data []byte)) error {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|int(what), 0)
	req.AddData(nfHeader(f))
	for _, a := range attrs {
		req.AddData(a)
	}
	return n.c.ask(req, func(body []byte) { eachAttr(body[min(sizeofNfgenmsg, len(body)):], each) })
}

// dump asks for all objects of a kind; each gets the attributes of one.
func (n *NFTables) dump(what uint16, f addr.Family, attrs []*nl.RtAttr, reset func(), each func(attrs []byte)) error {
	return n.c.dump(unix.NFNL_SUBSYS_NFTABLES<<8|what, nfHeader(f), attrs, reset, func(body []byte) {
		each(body[min(sizeofNfgenmsg, len(body)):])
	})
}

// Table tells how many chains, sets and other objects are in a table, and whether it is as tables are: with flags (dormant, or
// owned by a program) it is not plain.
func (n *NFTables) Table(f addr.Family, table string) (objects int, plain bool, err error) {
	plain = true
	err = n.get(unix.NFT_MSG_GETTABLE, f, stringAttrs(table), func(typ uint16, data []byte) {
		switch typ {
		case unix.NFTA_TABLE_USE:
			objects = int(be32(data))
		case unix.NFTA_TABLE_FLAGS:
			plain = be32(data) == 0
		}
	})
	return objects, plain, err
}

// Chain says what makes a chain a base chain, "type nat hook postrouting priority 100 policy accept", and nothing of one that
// only other chains call.
func (n *NFTables) Chain(f addr.Family, table, chain string) (base string, err error) {
	var kind, hook string
	var policy uint32
	attrs := []*nl.RtAttr{nl.NewRtAttr(unix.NFTA_CHAIN_TABLE, nl.ZeroTerminated(table)), nl.NewRtAttr(unix.NFTA_CHAIN_NAME, nl.ZeroTerminated(chain))}
	err = n.get(unix.NFT_MSG_GETCHAIN, f, attrs, func(typ uint16, data []byte) {
		switch typ {
		case unix.NFTA_CHAIN_TYPE:
			kind = cString(data)
		case unix.NFTA_CHAIN_HOOK:
			hook = hookText(data)
		case unix.NFTA_CHAIN_POLICY:
			policy = be32(data)
		}
	})
	if err != nil || hook == "" {
		return "", err
	}
	return fmt.Sprintf("type %s %s policy %s", kind, hook, verdictName(int32(policy))), nil
}

func hookText(data []byte) string {
	var num uint32
	var priority int32
	eachAttr(data, func(typ uint16, data []byte) {
		switch typ {
		case unix.NFTA_HOOK_HOOKNUM:
			num = be32(data)
		case unix.NFTA_HOOK_PRIORITY:
			priority = int32(be32(data))
		}
	})
	names := []string{"prerouting", "input", "forward", "output", "postrouting"}
	if num >= uint32(len(names)) {
		return fmt.Sprintf("hook %d priority %d", num, priority)
	}
	return fmt.Sprintf("hook %s priority %d", names[num], priority)
}

// Rules returns the rules of a chain, or of all chains in a table if none is named, as the words that `iptables -S` prints. What is
// unknown here is a word that begins with a question mark.
func (n *NFTables) Rules(f addr.Family, table, chain string) ([][]string, error) {
	attrs := []*nl.RtAttr{nl.NewRtAttr(unix.NFTA_RULE_TABLE, nl.ZeroTerminated(table))}
	if chain != "" {
		// The list of a chain that is not there would be empty.
		if _, err := n.Chain(f, table, chain); err != nil {
			return nil, err
		}
		attrs = append(attrs, nl.NewRtAttr(unix.NFTA_RULE_CHAIN, nl.ZeroTerminated(chain)))
	}
	var rules []nfRule
	err := n.dump(unix.NFT_MSG_GETRULE, f, attrs, func() { rules = nil }, func(attrs []byte) { rules = append(rules, parseNFRule(f, attrs)) })
	if err != nil {
		return nil, err
	}
	lines := make([][]string, len(rules))
	for i, r := range rules {
		lines[i] = r.words(n.setName)
	}
	return lines, nil
}

// Set returns the members of a set, sorted, and its kind: the type of the addresses, with " interval" if it is one of
// networks, and with a question mark if there is more to it.
func (n *NFTables) Set(f addr.Family, table, set string) (kind string, members []netip.Prefix, err error) {
	odd, networks := false, false
	err = n.get(unix.NFT_MSG_GETSET, f, stringAttrs(table, set), func(typ uint16, data []byte) {
		switch typ {
		case unix.NFTA_SET_KEY_TYPE:
			kind = setType(be32(data))
		case unix.NFTA_SET_FLAGS:
			networks = be32(data)&unix.NFT_SET_INTERVAL != 0
			odd = odd || be32(data)&^unix.NFT_SET_INTERVAL != 0
		case unix.NFTA_SET_TIMEOUT, nftaSetExpr, nftaSetExpressions:
			odd = true
		case unix.NFTA_SET_DESC:
			eachAttr(data, func(typ uint16, _ []byte) { odd = odd || typ == unix.NFTA_SET_DESC_SIZE })
		}
	})
	if err != nil {
		return "", nil, err
	}
	var elems []setElem
	err = n.dump(unix.NFT_MSG_GETSETELEM, f, stringAttrs(table, set), func() { elems = nil }, func(attrs []byte) {
		eachAttr(attrs, func(typ uint16, list []byte) {
			if typ == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				eachAttr(list, func(_ uint16, elem []byte) {
					e, plain := setMember(elem)
					odd = odd || !plain
					elems = append(elems, e)
				})
			}
		})
	})
	members, plain := membersOf(elems, networks)
	if networks {
		kind += " interval"
	}
	if odd || !plain {
		kind += "?"
	}
	return kind, members, err
}

// setElem is an element of a set: an address, or in a set of networks where one begins, or the first address behind it.
type setElem struct {
	a   netip.Addr
	end bool
}

// membersOf makes members of elements. It is plain only if each is an address, or a network that is a prefix.
func membersOf(elems []setElem, networks bool) (members []netip.Prefix, plain bool) {
	slices.SortFunc(elems, func(x, y setElem) int {
		if c := x.a.Compare(y.a); c != 0 || x.end == y.end {
			return c
		}
		return map[bool]int{true: -1, false: 1}[x.end] // one network ends where the next begins
	})
	plain = true
	for i, e := range elems {
		last := e.a
		switch {
		case e.end && networks:
			continue
		case networks && i+1 < len(elems):
			last = elems[i+1].a.Prev()
		case networks || e.end: // without an end, or an end without a beginning
			plain = false
		}
		p := commonPrefix(e.a, last)
		plain = plain && p.Addr() == e.a && addr.Last(p) == last
		members = append(members, p)
	}
	return members, plain
}

// commonPrefix is the longest prefix with both addresses in it.
func commonPrefix(a, b netip.Addr) netip.Prefix {
	x, y := a.AsSlice(), b.AsSlice()
	length := 0
	for i := 0; i < len(x) && i < len(y); i++ {
		same := bits.LeadingZeros8(x[i] ^ y[i])
		if length += same; same < 8 {
			break
		}
	}
	return netip.PrefixFrom(a, length).Masked()
}

// What golang.org/x/sys/unix has no names for (uapi/linux/netfilter/nf_tables.h).
const (
	nftaSetExpr        = 17
	nftaSetExpressions = 18
)

// setType names the types that sets of ours have; these numbers are nft's.
func setType(t uint32) string {
	switch t {
	case 7:
		return "ipv4_addr"
	case 8:
		return "ipv6_addr"
	}
	return "?"
}

// setMember reads an element. One that carries anything beside its address is not plain.
func setMember(elem []byte) (e setElem, plain bool) {
	plain = true
	eachAttr(elem, func(typ uint16, data []byte) {
		switch typ {
		case unix.NFTA_SET_ELEM_KEY:
			e.a = ipOf(attrOf(data, unix.NFTA_DATA_VALUE))
		case unix.NFTA_SET_ELEM_FLAGS:
			e.end = be32(data) == unix.NFT_SET_ELEM_INTERVAL_END
			plain = plain && e.end
		default:
			plain = plain && typ == unix.NFTA_SET_ELEM_PAD
		}
	})
	return e, plain && e.a.IsValid()
}

// attrOf is the first attribute of a type.
func attrOf(b []byte, want uint16) (found []byte) {
	eachAttr(b, func(typ uint16, data []byte) {
		if typ == want && found == nil {
			found = data
		}
	})
	return found
}

func be32(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

// setName is the name of the set that a rule of iptables knows by its number (IPSET_CMD_GET_BYINDEX and IPSET_ATTR_INDEX, which
// came with protocol 7, uapi/linux/netfilter/ipset/ip_set.h).
func (n *NFTables) setName(index uint16) string {
	name := fmt.Sprintf("?%d", index)
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_IPSET<<8|15, 0)
	req.AddData(&nl.Nfgenmsg{})
	req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_PROTOCOL, []byte{nl.IPSET_PROTOCOL + 1}))
	req.AddData(nl.NewRtAttr(11|unix.NLA_F_NET_BYTEORDER, binary.BigEndian.AppendUint16(nil, index)))
	_ = n.c.ask(req, func(body []byte) { // what could not be found out remains unknown
		name = cString(attrOf(body[min(sizeofNfgenmsg, len(body)):], nl.IPSET_ATTR_SETNAME))
	})
	return name
}
