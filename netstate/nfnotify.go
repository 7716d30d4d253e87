package netstate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// NFTablesChange is one object in the kernel's nf_tables that was made, changed or removed. The rules of iptables-nft are
// such objects too; those of iptables-legacy are not.
type NFTablesChange struct {
	Family addr.Family
	Table  string
	Chain  string // of a chain or a rule; empty for everything else in the table, and for the table itself
}

// NFTablesWatch hears of every change in nf_tables as soon as it is made. It only says that it is time to look again.
//
// What it says is exact: the kernel queues the news of a change before the program that made it goes on. So whoever
// asks for the epoch, looks, and later finds the same epoch, knows that nothing has changed since the look.
type NFTablesWatch struct {
	file     *os.File // for the runtime's poller, which wakes the reader and lets Close end it
	conn     syscall.RawConn
	relevant func(NFTablesChange) bool
	wakes    chan struct{}
	done     chan struct{}

	mu    sync.Mutex
	buf   []byte
	epoch uint64
	err   error // why nothing is heard any more
}

// WatchNFTables starts to watch, in the network namespace of the calling thread. Only changes that are relevant count;
// the function is called from another goroutine, and has to be quick.
func WatchNFTables(relevant func(NFTablesChange) bool) (*NFTablesWatch, error) {
	fd, err := nftSocket()
	if err != nil {
		return nil, fmt.Errorf("netlink socket for nf_tables: %w", err)
	}
	w := &NFTablesWatch{
		file: os.NewFile(uintptr(fd), "nf_tables"), relevant: relevant,
		wakes: make(chan struct{}, 1), done: make(chan struct{}), buf: make([]byte, 64<<10),
	}
	if w.conn, err = w.file.SyscallConn(); err != nil {
		_ = w.file.Close()
		return nil, fmt.Errorf("netlink socket for nf_tables: %w", err)
	}
	go w.run()
	return w, nil
}

func nftSocket() (int, error) {
	fd, err := netfilterSocket(unix.SOCK_NONBLOCK)
	if err != nil {
		return -1, err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, unix.NFNLGRP_NFTABLES); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// Wakes delivers after changes, however many there were, and once when nothing will be heard any more.
func (w *NFTablesWatch) Wakes() <-chan struct{} { return w.wakes }

// Epoch grows with every relevant change, those included that were complete before the call. It is false when nothing
// is heard any more, so that nobody takes silence for rest.
func (w *NFTablesWatch) Epoch() (uint64, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		if err := w.conn.Control(func(fd uintptr) { w.drain(int(fd)) }); err != nil {
			w.err = err
		}
	}
	return w.epoch, w.err == nil
}

// Settled takes back the wake for changes up to this epoch: they have been looked at, or were the caller's own.
func (w *NFTablesWatch) Settled(epoch uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if epoch != w.epoch || w.err != nil {
		return
	}
	select {
	case <-w.wakes:
	default:
	}
}

// Close ends the watch.
func (w *NFTablesWatch) Close() {
	_ = w.file.Close()
	<-w.done
}

// run reads until the socket is closed or broken.
func (w *NFTablesWatch) run() {
	defer close(w.done)
	err := w.conn.Read(func(fd uintptr) bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.drain(int(fd))
		return w.err != nil // false: wait for more
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = errors.Join(w.err, err, os.ErrClosed)
	w.changed()
}

// drain reads what has been queued, without waiting.
func (w *NFTablesWatch) drain(fd int) {
	for w.err == nil {
		n, _, err := unix.Recvfrom(fd, w.buf, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		switch {
		case err == nil:
			if n > len(w.buf) || w.concerns(w.buf[:n]) {
				w.changed()
			}
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ENOBUFS): // news were lost, and who knows which
			w.changed()
		case errors.Is(err, unix.EAGAIN):
			return
		default:
			w.err = err
		}
	}
}

func (w *NFTablesWatch) changed() {
	w.epoch++
	select {
	case w.wakes <- struct{}{}:
	default:
	}
}

func (w *NFTablesWatch) concerns(b []byte) bool {
	found := false
	eachMessage(b, func(typ uint16, body []byte) {
		c, ok := parseNFTables(typ, body)
		found = found || ok && w.relevant(c)
	})
	return found
}

// eachMessage walks netlink messages (struct nlmsghdr).
func eachMessage(b []byte, f func(typ uint16, body []byte)) {
	for len(b) >= unix.SizeofNlMsghdr {
		n := int(binary.NativeEndian.Uint32(b))
		if n < unix.SizeofNlMsghdr || n > len(b) {
			return
		}
		f(binary.NativeEndian.Uint16(b[4:]), b[unix.SizeofNlMsghdr:n])
		b = b[min((n+3)&^3, len(b)):]
	}
}

const (
	sizeofNfgenmsg = 4 // uapi/linux/netfilter/nfnetlink.h
	// In the messages about every kind of object the first attribute is its table.
	nftaTable = unix.NFTA_TABLE_NAME
)

// parseNFTables reads a message (struct nfgenmsg and attributes). False: not about an object of IPv4 or IPv6.
func parseNFTables(typ uint16, b []byte) (c NFTablesChange, ok bool) {
	if typ>>8 != unix.NFNL_SUBSYS_NFTABLES || len(b) < sizeofNfgenmsg {
		return c, false
	}
	switch b[0] {
	case unix.NFPROTO_IPV4:
		c.Family = addr.IPv4
	case unix.NFPROTO_IPV6:
		c.Family = addr.IPv6
	default:
		return c, false
	}
	chainAttr := chainAttrOf(typ & 0xff)
	eachAttr(b[sizeofNfgenmsg:], func(attr uint16, data []byte) {
		switch attr {
		case nftaTable:
			c.Table = cString(data)
		case chainAttr:
			c.Chain = cString(data)
		}
	})
	return c, c.Table != ""
}

// chainAttrOf is the attribute that names the chain in a message of this type; 0 for none.
func chainAttrOf(typ uint16) uint16 {
	switch typ {
	case unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN:
		return unix.NFTA_CHAIN_NAME
	case unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
		return unix.NFTA_RULE_CHAIN
	}
	return 0
}
