package agent

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/test/nstest"
)

func TestLock(t *testing.T) {
	t.Parallel()
	name := fmt.Sprintf("overlayd-test-%d", os.Getpid())
	unlock, err := Lock(name, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(name, 50*time.Millisecond); !errors.Is(err, ErrRunning) ||
		!strings.Contains(err.Error(), strconv.Itoa(os.Getpid())) {
		t.Fatalf("a second lock: %v", err)
	}
	time.AfterFunc(100*time.Millisecond, unlock) // as one that is just ending
	unlock, err = Lock(name, 10*time.Second)
	if err != nil {
		t.Fatalf("after it was given back: %v", err)
	}
	unlock()
}

// Whatever a process without privileges does with the name: the daemon runs, and a second one does not.
func TestLockOfAStranger(t *testing.T) {
	t.Parallel()
	nstest.NeedRoot(t)
	for i, c := range []struct {
		name     string
		listen   int // how many may wait; less than 0: it does not listen
		visitors int // of his own
		calls    bool
	}{
		{"has the name only", -1, 0, false},
		{"listens", 4096, 0, false},
		{"has no room", 1, 3, false},
		{"calls another one", -1, 0, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			name := fmt.Sprintf("overlayd-test-%d-%d", os.Getpid(), i)
			var his []int
			asNobody(t, func() {
				his = append(his, socket(t))
				at := &unix.SockaddrUnix{Name: "@" + name}
				if err := unix.Bind(his[0], at); err != nil {
					t.Error(err)
				}
				if c.listen >= 0 {
					if err := unix.Listen(his[0], c.listen); err != nil {
						t.Error(err)
					}
				}
				for range c.visitors {
					his = append(his, socket(t))
					_ = unix.Connect(his[len(his)-1], at) // as many as there is room for
				}
				if c.calls {
					his = append(his, socket(t))
					other := &unix.SockaddrUnix{Name: at.Name + "-other"}
					if err := errors.Join(unix.Bind(his[1], other), unix.Listen(his[1], 1), unix.Connect(his[0], other)); err != nil {
						t.Error(err)
					}
				}
			})
			leave := func() {
				for _, fd := range his {
					_ = unix.Close(fd)
				}
				his = nil
			}
			defer leave()
			for range 2 {
				unlock, err := Lock(name, time.Second)
				if err != nil {
					t.Fatal(err)
				}
				defer unlock()
				refused(t, name)
				leave() // the name is free again
				refused(t, name)
				unlock()
			}
		})
	}
}

// However many connections wait at a daemon that runs, it is found, and its process can be asked for.
func TestLockThatIsCalled(t *testing.T) {
	t.Parallel()
	nstest.NeedRoot(t)
	name := fmt.Sprintf("overlayd-test-%d-called", os.Getpid())
	unlock, err := Lock(name, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	asNobody(t, func() {
		for range 5000 { // more than may wait, usually
			fd := socket(t)
			_ = unix.Connect(fd, &unix.SockaddrUnix{Name: "@" + name})
			_ = unix.Close(fd)
		}
	})
	if _, err := Lock(name, 0); !errors.Is(err, ErrRunning) {
		t.Errorf("a second lock: %v", err)
	}
	for end := time.Now().Add(time.Minute); listener(name) == 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	refused(t, name)
}

// Of many that start at once one runs at a time, also if another program has bound the name; other network namespaces
// do not matter.
func TestLockOfManyAtOnce(t *testing.T) {
	t.Parallel()
	nstest.NeedRoot(t)
	name := fmt.Sprintf("overlayd-test-%d-once", os.Getpid())
	var stranger int
	asNobody(t, func() {
		stranger = socket(t)
		if err := unix.Bind(stranger, &unix.SockaddrUnix{Name: "@" + name}); err != nil {
			t.Error(err)
		}
	})
	var running, ran atomic.Int32
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			unlock, err := Lock(name, time.Minute)
			if err != nil {
				t.Error(err)
				return
			}
			if running.Add(1) > 1 {
				t.Error("two run at once")
			}
			if ran.Add(1) == 2 {
				_ = unix.Close(stranger) // from now on the name can be had
			}
			time.Sleep(50 * time.Millisecond)
			running.Add(-1)
			unlock()
		})
	}
	wg.Wait()

	unlock, err := Lock(name, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	nstest.New(t).Do(func() {
		unlock, err := Lock(name, 0)
		if err != nil {
			t.Errorf("in another network namespace: %v", err)
			return
		}
		unlock()
	})
}

func refused(t *testing.T, name string) {
	t.Helper()
	if _, err := Lock(name, 0); !errors.Is(err, ErrRunning) || !strings.Contains(err.Error(),
		fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("a second lock: %v", err)
	}
}

// asNobody does something as a user without rights: whatever sockets it makes are his.
func asNobody(t *testing.T, do func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		const keep, nobody = ^uintptr(0), 65534
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, keep); errno != 0 { // of this thread alone
			t.Errorf("setresuid: %v", errno)
			return
		}
		do()
	}()
	<-done
}

func socket(t *testing.T) int {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Error(err)
	}
	return fd
}
