package agent

import (
	crand "crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ErrRunning says that another daemon works on this node.
var ErrRunning = errors.New("another overlayd is running on this node")

// Lock keeps a second daemon off this network namespace, whatever container it is in, until the returned function is
// called or the process ends. The lock is an abstract unix socket (unix(7)), of which each network namespace has its
// own.
//
// Any process can bind such a name, and need not answer there. So the daemon asks the kernel whose sockets there are
// (sock_diag(7)), and counts only those of root, and of this process's own user if that is another one. If another
// program has bound the name, the daemon binds one that cannot be guessed. It searches for others once its own socket
// is bound, so that of two that start at once one at least finds the other.
//
// A daemon that was killed holds it until the kernel, and a command that it was just starting, have let go: so it is
// tried for a while.
func Lock(name string, patience time.Duration) (unlock func(), err error) {
	// two that found each other: not in step
	for deadline := time.Now().Add(patience); ; time.Sleep(lockRetry/2 + rand.N(lockRetry)) {
		unlock, err = tryLock(name)
		if !errors.Is(err, ErrRunning) || time.Now().After(deadline) {
			return unlock, err
		}
	}
}

const lockRetry = 20 * time.Millisecond

func tryLock(name string) (unlock func(), err error) {
	own := name
	l, err := listenLock(own)
	if errors.Is(err, unix.EADDRINUSE) {
		if err = noOther(name, ""); err != nil {
			return nil, err
		}
		own = name + "/" + crand.Text()
		l, err = listenLock(own)
	}
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	if err := noOther(name, own); err != nil {
		_ = l.Close()
		return nil, err
	}
	// Who is refused asks for the process: there has to be room for the next one.
	go func() {
		for c, err := l.Accept(); err == nil; c, err = l.Accept() {
			_ = c.Close()
		}
	}()
	return func() { _ = l.Close() }, nil
}

func listenLock(name string) (net.Listener, error) {
	return net.ListenUnix("unix", &net.UnixAddr{Name: "@" + name, Net: "unix"})
}

// noOther returns ErrRunning if a daemon holds the lock, other than the one that goes by the name own.
func noOther(name, own string) error {
	sockets, err := abstractSockets()
	if err != nil && own == name { // a kernel without unix_diag: then the name is all there is
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w, or another program has the name @%s: the kernel does not tell which (module unix_diag): %w",
			ErrRunning, name, err)
	}
	found := false
	for _, s := range sockets {
		found = found || s.name == name
		if s.name == own || s.name != name && !strings.HasPrefix(s.name, name+"/") || s.uid != 0 &&
			s.uid != uint32(os.Geteuid()) {
			continue
		}
		if pid := listener(s.name); pid != 0 {
			return fmt.Errorf("%w: process %d", ErrRunning, pid)
		}
		return ErrRunning // in a container that can't be seen from here, or it is just ending
	}
	if !found { // sockets came or went during the dump, which may have left out others too
		return fmt.Errorf("%w, or another program keeps taking the name @%s and giving it back", ErrRunning, name)
	}
	return nil
}

// listener is the process that listens at an abstract name; 0: it can't be seen.
func listener(name string) int {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: "@" + name, Net: "unix"})
	if err != nil {
		return 0
	}
	defer func() { _ = c.Close() }()
	raw, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	pid := 0
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}

// abstractSocket is a stream socket that has an abstract name: its own, or that of the one that accepted it.
type abstractSocket struct {
	name string
	uid  uint32 // of who made it
}

// Of linux/unix_diag.h: the length of struct unix_diag_msg, and the attributes that are asked for.
const diagLen, diagName, diagUID = 16, 0, 7

// abstractSockets asks the kernel for those of this network namespace.
func abstractSockets() ([]abstractSocket, error) {
	c, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	// struct unix_diag_req: the family, all states, no single socket, what is to be told of each.
	request := binary.NativeEndian.AppendUint32([]byte{unix.AF_UNIX, 0, 0, 0}, math.MaxUint32)
	request = append(request, make([]byte, 4)...)
	request = binary.NativeEndian.AppendUint32(request, 1<<diagName|1<<(diagUID-1))
	request = append(request, make([]byte, 8)...)
	messages, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.SOCK_DIAG_BY_FAMILY, Flags: netlink.Request | netlink.Dump}, Data: request,
	})
	var out []abstractSocket
	for _, m := range messages {
		if len(m.Data) < diagLen || m.Data[1] != unix.SOCK_STREAM {
			continue
		}
		attrs, err := netlink.NewAttributeDecoder(m.Data[diagLen:])
		if err != nil {
			return nil, err
		}
		abstract, s := false, abstractSocket{uid: math.MaxUint32} // of no user, unless the kernel says whose
		for attrs.Next() {
			switch attrs.Type() {
			case diagName:
				s.name, abstract = strings.CutPrefix(string(attrs.Bytes()), "\x00")
			case diagUID:
				s.uid = attrs.Uint32()
			}
		}
		if abstract && attrs.Err() == nil {
			out = append(out, s)
		}
	}
	return out, err
}
