package bench

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// EndCommand is the hidden subcommand of overlay-bench that runs [EndMain].
const EndCommand = "dataplane-end"

// The two ends of a connection, as EndMain's first argument.
const (
	endServer = "server"
	endClient = "client"
)

// exchange is what the client does once per operation.
type exchange string

const (
	oneConnection exchange = "one-connection" // a byte there and one back, over a connection that stays
	newConnection exchange = "new-connection" // the same over a connection of its own
)

// EndMain is what the hidden subcommand does with its arguments: which end to be, the server's address, and the core to stay on. The
// server answers every byte with a byte, for one connection after the other. The client reads lines from its input, an exchange and
// how often to do it, and answers each with a line: the nanoseconds that it took, or what went wrong. It ends with its input.
//
// What is wanted is CPU time per operation, and it is taken by the clock: both ends are on one core, each waits while the other works,
// and so the core is busy with them all the time. Every other way misses something. The CPU time of the two threads has the soft
// interrupts, in which packets travel, on some kernels and not on others (CONFIG_IRQ_TIME_ACCOUNTING); /proc/stat has them always,
// but in ticks, and with whatever else ran on the core. For the clock to be right, nothing else may run there: so the ends are in a
// real-time class. That takes most of the noise away, too, since it leaves the scheduler no choice: an end runs until it waits. The
// 50 ms a second that the kernel still gives to others, if they starve, fall on few samples, and a median passes over them. The core
// can't be locked up: an end that waits leaves it to the others.
func EndMain(_ context.Context, args []string) error {
	if len(args) != 3 {
		return fmt.Errorf("%s: want an end, an address and a core, found %q", EndCommand, args)
	}
	at, err := netip.ParseAddrPort(args[1])
	if err != nil {
		return err
	}
	core, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	if err := stayOn(core); err != nil {
		return err
	}
	switch args[0] {
	case endServer:
		return serveEnd(at)
	case endClient:
		return runClient(at)
	}
	return fmt.Errorf("%s: there is no end %q", EndCommand, args[0])
}

const realTime = 1 // SCHED_FIFO, uapi/linux/sched.h

// stayOn keeps the calling thread on a core, before all others there.
func stayOn(core int) error {
	var set unix.CPUSet
	set.Set(core)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("stay on core %d: %w", core, err)
	}
	// Where it is refused, as in some containers, the figures are noisier.
	_ = unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: realTime, Priority: 1}, 0)
	return nil
}

// lastCore is the last one that this process may use: the first ones tend to have the devices' interrupts.
func lastCore() (int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return 0, fmt.Errorf("ask for the cores: %w", err)
	}
	core := 0
	for i := range len(set) * 64 {
		if set.IsSet(i) {
			core = i
		}
	}
	return core, nil
}

// The sockets block, as in a program of the plainest kind: the runtime's poller would add system calls and threads of its own.
func endSocket(at netip.AddrPort) (fd int, sa unix.Sockaddr, err error) {
	family := unix.AF_INET6
	sa = &unix.SockaddrInet6{Port: int(at.Port()), Addr: at.Addr().As16()}
	if at.Addr().Is4() {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}
	}
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	return fd, sa, os.NewSyscallError("socket", err)
}

func serveEnd(at netip.AddrPort) error {
	l, sa, err := endSocket(at)
	if err != nil {
		return err
	}
	if err := unix.Bind(l, sa); err != nil {
		return os.NewSyscallError("bind", err)
	}
	if err := unix.Listen(l, 16); err != nil {
		return os.NewSyscallError("listen", err)
	}
	for {
		fd, _, err := unix.Accept(l)
		if err != nil {
			return os.NewSyscallError("accept", err)
		}
		answerAll(fd)
	}
}

// answerAll serves one client until it goes. What fails here fails at the client's end, too.
func answerAll(fd int) {
	defer func() { _ = unix.Close(fd) }()
	var b [1]byte
	for {
		if n, err := unix.Read(fd, b[:]); n != 1 || err != nil {
			return
		}
		if _, err := unix.Write(fd, b[:]); err != nil {
			return
		}
	}
}

func runClient(at netip.AddrPort) error {
	orders := bufio.NewScanner(os.Stdin)
	for orders.Scan() {
		var kind exchange
		var times int
		if _, err := fmt.Sscan(orders.Text(), &kind, &times); err != nil {
			return fmt.Errorf("order %q: %w", orders.Text(), err)
		}
		if took, err := kind.run(at, times); err != nil {
			fmt.Println(err)
		} else {
			fmt.Println(took.Nanoseconds())
		}
	}
	return orders.Err()
}

// run does an exchange some times over and says how long that took, without the opening of a connection that stays.
func (e exchange) run(at netip.AddrPort, times int) (time.Duration, error) {
	if e == newConnection {
		began := time.Now()
		for range times {
			if err := overConnection(at, ask); err != nil {
				return 0, err
			}
		}
		return time.Since(began), nil
	}
	var took time.Duration
	err := overConnection(at, func(fd int) error {
		began := time.Now()
		for range times {
			if err := ask(fd); err != nil {
				return err
			}
		}
		took = time.Since(began)
		return nil
	})
	return took, err
}

func overConnection(at netip.AddrPort, f func(fd int) error) error {
	fd, sa, err := endSocket(at)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Connect(fd, sa); err != nil {
		return os.NewSyscallError("connect", err)
	}
	return f(fd)
}

func ask(fd int) error {
	var b [1]byte
	if _, err := unix.Write(fd, b[:]); err != nil {
		return os.NewSyscallError("write", err)
	}
	n, err := unix.Read(fd, b[:])
	if err == nil && n != 1 {
		return io.ErrUnexpectedEOF
	}
	return os.NewSyscallError("read", err)
}
