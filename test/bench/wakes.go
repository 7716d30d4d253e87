package bench

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// eventBytes is how long the event of a kubelet's heartbeat is: what the API server sends at a start, for each Node.
const eventBytes = 11_000

// reader is a thread that waits for bytes and drops them: what a program pays for being woken by each heartbeat, whatever
// it does with it.
type reader struct {
	to    int          // a socket: what is written there is read
	used  atomic.Int64 // ns of the thread's CPU
	wakes atomic.Int64
}

func newReader() (*reader, error) {
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("a pair of sockets: %w", err)
	}
	r := &reader{to: ends[0]}
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		defer func() { _ = unix.Close(ends[1]) }()
		buf := make([]byte, eventBytes)
		for {
			n, err := unix.Read(ends[1], buf)
			if n <= 0 && !errors.Is(err, unix.EINTR) {
				return
			}
			var now unix.Timespec
			_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &now)
			r.used.Store(now.Nano())
		}
	}()
	return r, nil
}

// wake has the thread read an event.
func (r *reader) wake() error {
	r.wakes.Add(1)
	_, err := unix.Write(r.to, make([]byte, eventBytes))
	return err
}

// aMinute is what the thread uses in a minute in which it is woken by every heartbeat, in ms.
func (r *reader) aMinute() float64 {
	return millis(time.Duration(r.used.Load())) / float64(max(r.wakes.Load(), 1)) * float64(time.Minute/heartbeatEvery)
}

func (r *reader) close() error { return unix.Close(r.to) }
