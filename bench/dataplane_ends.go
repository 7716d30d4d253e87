package bench

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
	"net/netip"
	"strconv"
)

const EndCommand = "dataplane-end"

func EndMain(ctx context.Context, args []string) error {
	runtime.LockOSThread()
	var set unix.CPUSet
	core, _ := strconv.Atoi(args[2])
	set.Set(core)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return err
	}
	if os.Getenv("FIFO") != "" {
		if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: 1, Priority: 1}, 0); err != nil {
			return err
		}
	}
	ap := netip.MustParseAddrPort(args[1])
	sa := &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	if args[0] == "server" {
		return serve(sa)
	}
	pid, _ := strconv.Atoi(args[3])
	return client(sa, pid)
}

func serve(sa unix.Sockaddr) error {
	l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	unix.SetsockoptInt(l, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err := unix.Bind(l, sa); err != nil {
		return err
	}
	if err := unix.Listen(l, 16); err != nil {
		return err
	}
	fmt.Println(unix.Gettid())
	buf := make([]byte, 16)
	for {
		fd, _, err := unix.Accept(l)
		if err != nil {
			if err == unix.EINTR {
				continue
			}
			return err
		}
		for {
			n, err := unix.Read(fd, buf)
			if n <= 0 || err != nil {
				break
			}
			unix.Write(fd, buf[:n])
		}
		unix.Close(fd)
	}
}

func dial(sa unix.Sockaddr) int {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		panic(err)
	}
	if err := unix.Connect(fd, sa); err != nil {
		panic(err)
	}
	return fd
}

func cpu(pid int) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/schedstat", pid))
	if err != nil {
		panic(err)
	}
	var n int64
	fmt.Sscan(string(b), &n)
	return n
}

func client(sa unix.Sockaddr, pid int) error {
	in := bufio.NewScanner(os.Stdin)
	buf := make([]byte, 16)
	for in.Scan() {
		var kind string
		var n int
		fmt.Sscan(in.Text(), &kind, &n)
		fd := -1
		if kind == "rr" {
			fd = dial(sa)
		}
		c0, w0 := cpu(unix.Gettid())+cpu(pid), time.Now()
		for range n {
			if kind == "crr" {
				fd = dial(sa)
			}
			unix.Write(fd, buf[:1])
			if m, err := unix.Read(fd, buf); m != 1 || err != nil {
				return err
			}
			if kind == "crr" {
				unix.Close(fd)
			}
		}
		w := time.Since(w0).Nanoseconds()
		c := cpu(unix.Gettid()) + cpu(pid) - c0
		if kind == "rr" {
			unix.Close(fd)
		}
		fmt.Printf("%.3f %.3f\n", float64(c)/float64(n)/1000, float64(w)/float64(n)/1000)
	}
	return nil
}
