package netstate

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// Errors that a caller can act on.
var (
	// ErrIPSetUnsupported means that the kernel has no ipset, or none of addresses.
	ErrIPSetUnsupported = errors.New("the kernel has no ipset support (CONFIG_IP_SET, CONFIG_IP_SET_HASH_IP)")
	// ErrIPSetType means that somebody has made a set of this name that holds something else.
	ErrIPSetType = errors.New("a set of this name exists, but of another type")
)

const (
	ipsetType = "hash:ip"
	// ipsetMaxElements is only the bound up to which the kernel lets the hash grow; memory follows what is in it.
	ipsetMaxElements = 1 << 20
)

// IPSets keeps named sets of addresses in the kernel. It belongs to one goroutine.
type IPSets struct{ handle *netlink.Handle }

// NewIPSets opens the netlink socket, in the network namespace of the calling thread.
func NewIPSets() (*IPSets, error) {
	h, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, unsupported(fmt.Errorf("netlink socket for ipset: %w", err))
	}
	s := &IPSets{h}
	if err := guard(func() error { _, _, err := h.IpsetProtocol(); return err }); err != nil {
		s.Close()
		return nil, unsupported(fmt.Errorf("ask for the ipset protocol: %w", err))
	}
	return s, nil
}

// Close closes the socket. The sets stay.
func (s *IPSets) Close() { s.handle.Close() }

// Ensure makes the set of this name hold exactly these members, each of the family f, and creates it if there is none.
// It returns how many changes it made: none, if all was in place. New members are added before old ones go.
func (s *IPSets) Ensure(name string, f addr.Family, members []netip.Addr) (changed int, err error) {
	want, err := memberSet(name, f, members)
	if err != nil {
		return 0, err
	}
	have, created, err := s.open(name, f)
	if err != nil {
		return 0, err
	}
	if created {
		changed++
	}
	n, err := s.apply(name, want, have)
	return changed + n, err
}

func memberSet(name string, f addr.Family, members []netip.Addr) (map[netip.Addr]bool, error) {
	set := make(map[netip.Addr]bool, len(members))
	for _, a := range members {
		if !a.IsValid() || addr.FamilyOf(a) != f || a.Is4In6() || a.Zone() != "" {
			return nil, fmt.Errorf("ipset %s: %q is not a plain %s address", name, a, f)
		}
		set[a] = true
	}
	return set, nil
}

// open returns what is in the set, after making it if there is none.
func (s *IPSets) open(name string, f addr.Family) (have map[netip.Addr]bool, created bool, err error) {
	list, err := s.list(name)
	if errors.Is(err, unix.ENOENT) {
		return nil, true, s.create(name, f)
	}
	if err != nil {
		return nil, false, unsupported(fmt.Errorf("list ipset %s: %w", name, err))
	}
	if list.TypeName != ipsetType || list.Family != ipsetFamily(f) || list.Timeout != nil {
		return nil, false, fmt.Errorf("ipset %s: %w: %s, wanted %s for %s without timeout; remove it with `ipset destroy %s`",
			name, ErrIPSetType, describeSet(list), ipsetType, f, name)
	}
	have = make(map[netip.Addr]bool, len(list.Entries))
	for _, e := range list.Entries {
		if a, ok := netip.AddrFromSlice(e.IP); ok {
			have[a] = true
		}
	}
	return have, false, nil
}

func (s *IPSets) list(name string) (list *netlink.IPSetResult, err error) {
	err = guard(func() error {
		list, err = s.handle.IpsetList(name)
		return err
	})
	return list, err
}

func (s *IPSets) create(name string, f addr.Family) error {
	err := guard(func() error {
		return s.handle.IpsetCreate(name, ipsetType, netlink.IpsetCreateOptions{Family: ipsetFamily(f), MaxElements: ipsetMaxElements})
	})
	if err != nil {
		return unsupported(fmt.Errorf("create ipset %s: %w", name, err))
	}
	return nil
}

// apply adds what is missing, then deletes what is too much. It goes on after an error, and reports the first.
func (s *IPSets) apply(name string, want, have map[netip.Addr]bool) (changed int, err error) {
	failed := 0
	step := func(verb string, a netip.Addr, do func(string, *netlink.IPSetEntry) error) {
		// Replace: that it is already there, or already gone, is fine.
		e := guard(func() error { return do(name, &netlink.IPSetEntry{IP: a.AsSlice(), Replace: true}) })
		if e == nil {
			changed++
			return
		}
		if failed++; err == nil {
			err = fmt.Errorf("ipset %s: %s %s: %w", name, verb, a, e)
		}
	}
	for _, a := range missing(want, have) {
		step("add", a, s.handle.IpsetAdd)
	}
	for _, a := range missing(have, want) {
		step("delete", a, s.handle.IpsetDel)
	}
	if failed > 1 {
		err = fmt.Errorf("%w (and %d more)", err, failed-1)
	}
	return changed, err
}

// missing returns the members of a that are not in b, in order.
func missing(a, b map[netip.Addr]bool) []netip.Addr {
	var list []netip.Addr
	for m := range maps.Keys(a) {
		if !b[m] {
			list = append(list, m)
		}
	}
	slices.SortFunc(list, netip.Addr.Compare)
	return list
}

// Remove removes the set. That there is none is fine; one that a firewall rule still names is an error.
func (s *IPSets) Remove(name string) error {
	err := guard(func() error { return s.handle.IpsetDestroy(name) })
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return fmt.Errorf("remove ipset %s: %w", name, err)
}

func ipsetFamily(f addr.Family) uint8 {
	if f == addr.IPv4 {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func describeSet(list *netlink.IPSetResult) string {
	text := list.TypeName
	switch list.Family {
	case unix.AF_INET:
		text += " for IPv4"
	case unix.AF_INET6:
		text += " for IPv6"
	}
	if list.Timeout != nil {
		text += " with timeout"
	}
	return text
}

// guard turns the library's panic into an error: its ipset functions take every error for an errno, also those of the
// netlink layer that are none (a message out of sequence, an interrupted dump).
func guard(call func() error) (err error) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case *runtime.TypeAssertionError:
			err = fmt.Errorf("netlink: %w", r)
		default:
			panic(r) //nolint:forbidigo // not the one that was meant
		}
	}()
	return call()
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
