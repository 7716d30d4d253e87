package netstate

import (
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// xtables is what the tables of iptables-legacy look like to programs: struct ipt_entry and its like for IPv6
// (uapi/linux/netfilter_ipv4/ip_tables.h), of a kernel with 64 bits.
type xtables struct {
	domain, level  int
	next, counters int // where in an entry its length stands, and its counters begin
}

func xtablesOf(f addr.Family) xtables {
	if f == addr.IPv4 {
		return xtables{unix.AF_INET, unix.SOL_IP, 90, 96}
	}
	return xtables{unix.AF_INET6, unix.SOL_IPV6, 142, 152}
}

const (
	xtGetInfo, xtGetEntries = 64, 65 // IPT_SO_GET_INFO, IPT_SO_GET_ENTRIES, and the same for IPv6
	xtNameLen               = 32
	xtInfoLen               = 84 // struct ipt_getinfo, which ends with the size of all entries
	xtEntriesAt             = 40 // in struct ipt_get_entries, behind the name and the size
	xtCountersLen           = 16
)

// LegacyTable returns a number that changes with every change of a table of iptables-legacy, its counters excepted, in the network
// namespace of the calling thread. To ask for a table that does not exist may make it. Numbers of different processes cannot be
// compared.
func (n *NFTables) LegacyTable(f addr.Family, table string) (uint64, error) {
	if strconv.IntSize != 64 {
		return 0, fmt.Errorf("table %s of iptables-legacy: %w", table, unix.ENOTSUP)
	}
	_, entries, err := xtablesOf(f).read(table)
	if err != nil {
		return 0, fmt.Errorf("table %s of iptables-legacy: %w", table, err)
	}
	xtablesOf(f).clearCounters(entries)
	return maphash.Bytes(n.seed, entries), nil
}

// read returns what the kernel says of a table (struct ipt_getinfo), and its entries.
func (x xtables) read(table string) (info, entries []byte, err error) {
	fd, err := unix.Socket(x.domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = unix.Close(fd) }()
	info = make([]byte, xtInfoLen)
	copy(info[:xtNameLen-1], table)
	if err := x.get(fd, xtGetInfo, info); err != nil {
		return nil, nil, err
	}
	size := info[xtInfoLen-4:]
	b := make([]byte, xtEntriesAt+int(binary.NativeEndian.Uint32(size)))
	copy(b[:xtNameLen-1], table)
	copy(b[xtNameLen:], size)
	return info, b[xtEntriesAt:], x.get(fd, xtGetEntries, b) // EAGAIN if the size has changed
}

func (x xtables) get(fd, opt int, b []byte) error {
	length := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(x.level), uintptr(opt),
		uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func (x xtables) clearCounters(entries []byte) {
	for len(entries) >= x.counters+xtCountersLen {
		clear(entries[x.counters : x.counters+xtCountersLen])
		n := int(binary.NativeEndian.Uint16(entries[x.next:]))
		if n < x.counters+xtCountersLen || n > len(entries) {
			return
		}
		entries = entries[n:]
	}
}
