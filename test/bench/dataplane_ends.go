package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/test/lab"
)

const (
	iperfPort = 5201
	echoPort  = 5202
)

// path is a set-up that is ready to carry packets.
type path struct {
	name     string
	from, to lab.Machine
	at       netip.Addr // of to
	core     int        // on which both ends are
}

// serve starts the servers at the path's end, and has sent a little over it when it returns.
func (p path) serve(ctx context.Context) (stop func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	iperf := p.iperf(ctx, "-s", "-B", p.at.String())
	var listener int
	err = p.to.Do(func() (err error) {
		listener, err = listen(p.echo())
		return errors.Join(err, iperf.Start())
	})
	if err != nil {
		cancel()
		return func() {}, err
	}
	var server sync.WaitGroup
	server.Go(func() { _ = onCore(p.core, func() error { return echoAll(listener) }) })
	stop = func() {
		cancel() // kills iperf3
		_ = iperf.Wait()
		_ = unix.Shutdown(listener, unix.SHUT_RDWR)
		server.Wait()
	}
	return stop, errors.Join(
		patiently(ctx, func() error { return p.fromCore(func() error { return exchange(p.echo(), 1) }) }),
		patiently(ctx, func() error { _, err := p.stream(ctx, 1); return err }))
}

func (p path) echo() *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Port: echoPort, Addr: p.at.As4()}
}

// iperf is iperf3 on the core, before most others there. A real-time class, as the other ends have, can lock the core
// up: iperf3 goes on while there is something to send, and the kernel's threads that carry it on are of the ordinary
// class.
func (p path) iperf(ctx context.Context, args ...string) *exec.Cmd {
	argv := []string{"-c", strconv.Itoa(p.core), "nice", "-n", "-20", "iperf3", "-p", strconv.Itoa(iperfPort)}
	return exec.CommandContext(ctx, "taskset", append(argv, args...)...)
}

// stream is the throughput of iperf3 with some connections at once, in Gbit/s.
func (p path) stream(ctx context.Context, connections int) (float64, error) {
	cmd := p.iperf(ctx, "-J", "-c", p.at.String(), "-P", strconv.Itoa(connections), "-n", streamBytes, "-w", streamBuffer)
	out, err := p.from.Run(ctx, cmd.Path, cmd.Args[1:]...)
	if err != nil {
		return 0, err
	}
	return parseIperf(out)
}

// parseIperf reads what arrived, in Gbit/s.
func parseIperf(report string) (float64, error) {
	var r struct {
		End struct {
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		}
		Error string
	}
	if err := json.Unmarshal([]byte(report), &r); err != nil {
		return 0, fmt.Errorf("read the report of iperf3: %w", err)
	}
	if r.Error != "" || r.End.Received.BitsPerSecond <= 0 {
		return 0, fmt.Errorf("iperf3 measured nothing: %s", r.Error)
	}
	return r.End.Received.BitsPerSecond / 1e9, nil
}

// requests is what a byte there and one back takes over a connection that stays, in µs.
func (p path) requests() (float64, error) {
	var took time.Duration
	err := p.fromCore(func() error {
		fd, err := connect(p.echo())
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		began := time.Now()
		for range requestTimes {
			if err := ask(fd); err != nil {
				return err
			}
		}
		took = time.Since(began)
		return nil
	})
	return float64(took) / requestTimes / float64(time.Microsecond), err
}

// connections is what the same takes over a connection of its own, in µs.
func (p path) connections() (float64, error) {
	var took time.Duration
	err := p.fromCore(func() error {
		began := time.Now()
		defer func() { took = time.Since(began) }()
		return exchange(p.echo(), connectTimes)
	})
	return float64(took) / connectTimes / float64(time.Microsecond), err
}

func (p path) fromCore(f func() error) error {
	return p.from.Do(func() error { return onCore(p.core, f) })
}

// onCore runs f on a core, before all other threads there. The calling thread stays there, and ends with its goroutine.
//
// CPU time per operation is measured by the clock: both ends are on one core, each waits while the other works, and so
// the core is busy with them all the time. Every other way misses something. The CPU time of the two threads has the
// soft interrupts, in which packets travel, on some kernels and not on others (CONFIG_IRQ_TIME_ACCOUNTING); /proc/stat
// has them always, but in ticks, and with whatever else ran on the core. For the clock to be right, nothing else may
// run there: so the ends are in a real-time class. That takes most of the noise away, too, since it leaves the
// scheduler no choice: an end runs until it waits. The 50 ms a second that the kernel still gives to others, if they
// starve, fall on few samples, and a median passes over them. The core can't be locked up: an end that waits leaves it
// to the others.
func onCore(core int, f func() error) error {
	runtime.LockOSThread()
	var set unix.CPUSet
	set.Set(core)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("stay on core %d: %w", core, err)
	}
	// With a time limit on its socket, each call ends with EINTR at a signal (signal(7)), and the runtime sends SIGURG to
	// a thread whenever its goroutine is to pause.
	var urgent unix.Sigset_t
	urgent.Val[0] = 1 << (unix.SIGURG - 1)
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &urgent, nil); err != nil {
		return fmt.Errorf("block SIGURG: %w", err)
	}
	// Where it is refused, as in some containers, the figures are noisier.
	const realTime = 1 // SCHED_FIFO, uapi/linux/sched.h
	_ = unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: realTime, Priority: 1}, 0)
	return f()
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

// The sockets block, as in a program of the plainest kind: the runtime's poller would add system calls and threads of
// its own.

func listen(at unix.Sockaddr) (fd int, err error) {
	if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return fd, os.NewSyscallError("socket", err)
	}
	return fd, os.NewSyscallError("listen", errors.Join(unix.Bind(fd, at), unix.Listen(fd, 16)))
}

func connect(to unix.Sockaddr) (fd int, err error) {
	if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return fd, os.NewSyscallError("socket", err)
	}
	if err := errors.Join(bounded(fd), unix.Connect(fd, to)); err != nil {
		_ = unix.Close(fd)
		return fd, os.NewSyscallError("connect", err)
	}
	return fd, nil
}

// bounded ends each call on a socket after ten seconds. No context reaches a call that blocks, and on a path that breaks
// it would wait for ever.
func bounded(fd int) error {
	limit := unix.Timeval{Sec: 10}
	return errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit),
	)
}

// echoAll answers every byte with a byte, for one connection after the other, until the listener is shut down. What
// fails with one client fails at its end, too.
func echoAll(listener int) error {
	defer unix.Close(listener)
	for {
		fd, _, err := unix.Accept(listener)
		if err != nil {
			return os.NewSyscallError("accept", err)
		}
		_ = bounded(fd)
		var b [1]byte
		for {
			if n, err := unix.Read(fd, b[:]); n != 1 || err != nil {
				break
			}
			if _, err := unix.Write(fd, b[:]); err != nil {
				break
			}
		}
		_ = unix.Close(fd)
	}
}

// exchange sends a byte and gets one back, some times, each over a connection of its own.
func exchange(to unix.Sockaddr, times int) error {
	for range times {
		fd, err := connect(to)
		if err != nil {
			return err
		}
		err = ask(fd)
		_ = unix.Close(fd)
		if err != nil {
			return err
		}
	}
	return nil
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
