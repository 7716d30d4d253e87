// Package ipset keeps named sets of addresses, or of networks, in the kernel (ipset), for the match "set" of iptables.
package ipset

import (
	"encoding/binary"
	"errors"
	"fmt"
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
	// ErrUnsupported means that the kernel has no ipset, or none of addresses.
	ErrUnsupported = errors.New(
		"the kernel has no ipset support (CONFIG_IP_SET, CONFIG_IP_SET_HASH_IP, CONFIG_IP_SET_HASH_NET)")
	// ErrType means that another process has made a set of this name that holds something else.
	ErrType = errors.New("a set of this name exists, but of another type")
)

const (
	// maxElements is only the bound up to which the kernel lets the hash grow; memory follows what is in it.
	maxElements = 1 << 20
	minHashSize = 1 << 10 // the kernel's default
	// batchSize is how many members one message changes. A member takes up to 36 bytes of the 64 kB of an attribute.
	batchSize = 1000
	// trustFor is how long it is enough that a set has as many members as it was left with.
	trustFor = 10 * time.Minute
	// spare is added to the name of a set for the one that takes its place.
	spare = "-new"
	// listHeader is IPSET_FLAG_LIST_HEADER: what a set is, without its members (uapi/linux/netfilter/ipset/ip_set.h).
	listHeader = 1 << 2
)

// Sets are the sets in the network namespace of the thread that calls. It belongs to one goroutine.
//
// The kernel notifies of no change in a set. So it is asked how many members there are, which costs little, while a
// list of 5,000 takes milliseconds. That another process put another member in a member's place is found within ten
// minutes: all are added once more, and then there are too many.
type Sets struct {
	left map[string]leftSet
}

// leftSet is how a set was left.
type leftSet struct {
	members []netip.Prefix // sorted
	checked time.Time      // that it holds these, and not only as many
}

// header is what a set is.
type header struct {
	typ      string
	family   addr.Family
	timeouts bool
	count    int // of members
}

func (h header) String() string {
	if h.timeouts {
		return fmt.Sprintf("%s for %s with timeout", h.typ, h.family)
	}
	return fmt.Sprintf("%s for %s without timeout", h.typ, h.family)
}

// New asks the kernel nothing: that it has no ipset is an error only for those who need a set.
func New() *Sets { return &Sets{map[string]leftSet{}} }

// Ensure makes the set of this name hold exactly these members, which are sorted, each once, and of the family f, and
// creates it if there is none. A set that is not one of networks holds single addresses. It returns how many changes it
// made: none, if all was in place. No member that stays is missing at any moment.
func (s *Sets) Ensure(name string, f addr.Family, networks bool, members []netip.Prefix) (changed int, err error) {
	desired := header{typ: "hash:ip", family: f}
	if networks {
		desired.typ = "hash:net"
	}
	if changed, err = s.ensure(name, desired, members); err != nil {
		delete(s.left, name)
		err = fmt.Errorf("ipset %s: %w", name, unsupported(err))
	}
	return changed, err
}

func (s *Sets) ensure(name string, desired header, members []netip.Prefix) (changed int, err error) {
	left := s.left[name]
	found, err := find(name)
	if errors.Is(err, unix.ENOENT) {
		found, changed, err = desired, 1, create(name, desired, len(members))
	}
	if err != nil {
		return 0, err
	}
	if desired.count = found.count; found != desired {
		return 0, fmt.Errorf("%w: %s, expected %s; remove it with `ipset destroy %s`", ErrType, found, desired, name)
	}
	if found.count != len(left.members) || time.Since(left.checked) > trustFor {
		n, err := fill(name, found, members)
		s.left[name] = leftSet{members, time.Now()}
		return changed + n, err
	}
	add, del := Diff(members, left.members)
	if err = change(nl.IPSET_CMD_ADD, name, add); err == nil {
		err = change(nl.IPSET_CMD_DEL, name, del)
	}
	s.left[name] = leftSet{members, left.checked}
	return changed + len(add) + len(del), err
}

// How long Remove waits for the kernel to free the rules that named the set.
const (
	busyTries = 20
	busyWait  = 10 * time.Millisecond
)

// Remove removes the set. That there is none is fine; one that a firewall rule still names is an error. A rule of
// nf_tables that was just removed names it a moment longer, since the kernel frees it in the background.
func (s *Sets) Remove(name string) error {
	delete(s.left, name)
	err := destroy(name)
	for range busyTries {
		if !errors.Is(err, nl.IPSetError(nl.IPSET_ERR_BUSY)) {
			break
		}
		time.Sleep(busyWait)
		err = destroy(name)
	}
	err = unsupported(errors.Join(err, destroy(name+spare)))
	if err == nil || errors.Is(err, ErrUnsupported) {
		return nil
	}
	return fmt.Errorf("remove ipset %s: %w", name, err)
}

// Diff returns what only a holds, and what only b; both are sorted.
func Diff(a, b []netip.Prefix) (onlyA, onlyB []netip.Prefix) {
	for len(a) > 0 && len(b) > 0 {
		switch c := addr.ComparePrefix(a[0], b[0]); {
		case c < 0:
			onlyA, a = append(onlyA, a[0]), a[1:]
		case c > 0:
			onlyB, b = append(onlyB, b[0]), b[1:]
		default:
			a, b = a[1:], b[1:]
		}
	}
	return append(onlyA, a...), append(onlyB, b...)
}

// fill is for a set of which only the number of members is known. With all desired ones added, it holds others too
// if there are more. Then, or if it has no room, another set takes its place.
func fill(name string, found header, members []netip.Prefix) (changed int, err error) {
	if change(nl.IPSET_CMD_ADD, name, members) == nil {
		full, err := find(name)
		if err != nil || full.count == len(members) {
			return full.count - found.count, err
		}
		changed = full.count - found.count + full.count - len(members)
	}
	return max(changed, 1), replace(name, found, members)
}

func replace(name string, like header, members []netip.Prefix) error {
	other := name + spare
	err := destroy(other) // left by a process that was killed
	if err == nil {
		err = create(other, like, len(members))
	}
	if err == nil {
		err = change(nl.IPSET_CMD_ADD, other, members)
	}
	if err == nil {
		_, err = do(nl.IPSET_CMD_SWAP, text(nl.IPSET_ATTR_SETNAME, other), text(nl.IPSET_ATTR_SETNAME2, name))
	}
	return errors.Join(err, destroy(other))
}

// create makes a set with room for size members: to let the hash grow meanwhile takes longer than to add them.
func create(name string, like header, size int) error {
	family := addr.Per[byte]{V4: unix.AF_INET, V6: unix.AF_INET6}
	data := nl.NewRtAttr(nl.IPSET_ATTR_DATA|unix.NLA_F_NESTED, nil)
	data.AddChild(number(nl.IPSET_ATTR_MAXELEM, maxElements))
	data.AddChild(number(nl.IPSET_ATTR_HASHSIZE, max(size, minHashSize)))
	_, err := do(nl.IPSET_CMD_CREATE, text(nl.IPSET_ATTR_SETNAME, name), text(nl.IPSET_ATTR_TYPENAME, like.typ),
		nl.NewRtAttr(nl.IPSET_ATTR_REVISION, []byte{0}),
		nl.NewRtAttr(nl.IPSET_ATTR_FAMILY, []byte{family.Get(like.family)}), data)
	return err
}

// change adds members, or deletes them. That one is already there, or already gone, is fine: no NLM_F_EXCL.
func change(cmd int, name string, members []netip.Prefix) error {
	typ := addr.Per[int]{V4: nl.IPSET_ATTR_IPADDR_IPV4, V6: nl.IPSET_ATTR_IPADDR_IPV6}
	for batch := range slices.Chunk(members, batchSize) {
		list := nl.NewRtAttr(nl.IPSET_ATTR_ADT|unix.NLA_F_NESTED, nil)
		for _, p := range batch {
			data := list.AddRtAttr(nl.IPSET_ATTR_DATA|unix.NLA_F_NESTED, nil)
			ip := data.AddRtAttr(nl.IPSET_ATTR_IP|unix.NLA_F_NESTED, nil)
			ip.AddRtAttr(typ.Get(addr.FamilyOf(p.Addr()))|unix.NLA_F_NET_BYTEORDER, p.Addr().AsSlice())
			if !p.IsSingleIP() {
				data.AddRtAttr(nl.IPSET_ATTR_CIDR, []byte{byte(p.Bits())})
			}
		}
		_, err := do(cmd, text(nl.IPSET_ATTR_SETNAME, name), number(nl.IPSET_ATTR_LINENO, 0), list)
		if err != nil {
			return fmt.Errorf("%d members from %s to %s: %w", len(batch), batch[0], batch[len(batch)-1], err)
		}
	}
	return nil
}

// find asks what a set is.
func find(name string) (h header, err error) {
	answers, err := do(nl.IPSET_CMD_LIST, text(nl.IPSET_ATTR_SETNAME, name), number(nl.IPSET_ATTR_FLAGS, listHeader))
	for _, answer := range answers {
		set, errSet := nl.ParseRouteAttrAsMap(answer[nl.SizeofNfgenmsg:])
		data, errData := nl.ParseRouteAttrAsMap(set[nl.IPSET_ATTR_DATA|unix.NLA_F_NESTED].Value)
		count := data[nl.IPSET_ATTR_ELEMENTS|unix.NLA_F_NET_BYTEORDER].Value
		family := set[nl.IPSET_ATTR_FAMILY].Value
		if errSet != nil || errData != nil || len(count) != 4 || len(family) != 1 {
			return h, fmt.Errorf("list: not understood: % x", answer)
		}
		h.typ, h.count = unix.ByteSliceToString(set[nl.IPSET_ATTR_TYPENAME].Value), int(binary.BigEndian.Uint32(count))
		h.family = map[byte]addr.Family{unix.AF_INET: addr.IPv4, unix.AF_INET6: addr.IPv6}[family[0]]
		_, h.timeouts = data[nl.IPSET_ATTR_TIMEOUT|unix.NLA_F_NET_BYTEORDER]
	}
	return h, err
}

func destroy(name string) error {
	_, err := do(nl.IPSET_CMD_DESTROY, text(nl.IPSET_ATTR_SETNAME, name))
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// do sends one command and returns the answers. The library's own Ipset functions add members one by one, which takes
// ten times as long, list without the choice of the header alone, and panic when the kernel does not answer in time.
func do(cmd int, attrs ...nl.NetlinkRequestData) ([][]byte, error) {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_IPSET<<8|cmd, nl.GetIpsetFlags(cmd))
	req.AddData(&nl.Nfgenmsg{})
	req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_PROTOCOL, []byte{nl.IPSET_PROTOCOL}))
	for _, a := range attrs {
		req.AddData(a)
	}
	answers, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	var errno syscall.Errno
	if errors.As(err, &errno) && errno >= nl.IPSET_ERR_PRIVATE { // behind those of the system
		err = nl.IPSetError(errno)
	}
	if err != nil {
		verb := map[int]string{
			nl.IPSET_CMD_CREATE: "create", nl.IPSET_CMD_DESTROY: "destroy", nl.IPSET_CMD_SWAP: "swap",
			nl.IPSET_CMD_LIST: "list", nl.IPSET_CMD_ADD: "add", nl.IPSET_CMD_DEL: "delete",
		}[cmd]
		err = fmt.Errorf("%s: %w", verb, err)
	}
	return answers, err
}

func text(typ int, s string) *nl.RtAttr { return nl.NewRtAttr(typ, nl.ZeroTerminated(s)) }

func number(typ uint16, n int) *nl.Uint32Attribute {
	return &nl.Uint32Attribute{Type: typ | unix.NLA_F_NET_BYTEORDER, Value: uint32(n)}
}

// unsupported adds ErrUnsupported to the errors by which a kernel says that it has no ipset.
func unsupported(err error) error {
	for _, e := range []error{
		nl.IPSetError(nl.IPSET_ERR_FIND_TYPE), unix.EINVAL, unix.EPROTONOSUPPORT, unix.EOPNOTSUPP, unix.EAFNOSUPPORT,
	} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", ErrUnsupported, err)
		}
	}
	return err
}
