package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/test/nstest"
)

func TestSubnetEnv(t *testing.T) {
	t.Parallel()
	l := subnet.Lease{Subnets: addr.Per[netip.Prefix]{V4: netip.MustParsePrefix("10.244.5.0/24"), V6: netip.MustParsePrefix("fd00:10:244:5::/64")}}
	const want = `FLANNEL_NETWORK=10.244.0.0/16
FLANNEL_SUBNET=10.244.5.1/24
FLANNEL_IPV6_NETWORK=fd00:10:244::/48
FLANNEL_IPV6_SUBNET=fd00:10:244:5::1/64
FLANNEL_MTU=1430
FLANNEL_IPMASQ=true
`
	want2 := want + strings.ReplaceAll(want, "FLANNEL_", "OVERLAYD_")
	if got := string(subnetEnv(config(t, dual), l, 1430, true)); got != want2 {
		t.Errorf("got:\n%swant:\n%s", got, want2)
	}
	if got := string(subnetEnv(config(t, onlyV4), l, 1450, false)); strings.Contains(got, "IPV6") || !strings.Contains(got, "FLANNEL_IPMASQ=false\n") {
		t.Errorf("IPv4 alone:\n%s", got)
	}
}

func TestWriteIfChanged(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "new", "file")
	for _, content := range []string{"one", "one", "two"} {
		if _, err := writeIfChanged(path, []byte(content)); err != nil {
			t.Fatal(err)
		}
		if got, _ := os.ReadFile(path); string(got) != content {
			t.Fatalf("got %q, want %q", got, content)
		}
	}
	before, _ := os.Stat(path)
	if _, err := writeIfChanged(path, []byte("two")); err != nil {
		t.Fatal(err)
	}
	if after, _ := os.Stat(path); !os.SameFile(before, after) {
		t.Error("an unchanged file was written anew")
	}
	left, _ := os.ReadDir(filepath.Dir(path))
	if len(left) != 1 || before.Mode().Perm() != 0o644 {
		t.Errorf("%d files in the directory, mode %v", len(left), before.Mode())
	}
}

func TestLock(t *testing.T) {
	t.Parallel()
	name := fmt.Sprintf("overlayd-test-%d", os.Getpid())
	unlock, err := Lock(name, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(name, 50*time.Millisecond); !errors.Is(err, ErrRunning) || !strings.Contains(err.Error(), strconv.Itoa(os.Getpid())) {
		t.Fatalf("a second lock: %v", err)
	}
	time.AfterFunc(100*time.Millisecond, unlock) // as one that is just ending
	unlock, err = Lock(name, 10*time.Second)
	if err != nil {
		t.Fatalf("after it was given back: %v", err)
	}
	unlock()
}

// Whatever somebody does with the name who could not run the daemon: it runs, and a second one does not.
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

// However often somebody calls a daemon that runs, it is found, and there is room to ask for its process.
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

// Of many that start at once one runs at a time, also if somebody else has the name; and those of other network namespaces don't matter.
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
	if _, err := Lock(name, 0); !errors.Is(err, ErrRunning) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
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

func TestMailboxKeepsTheNewest(t *testing.T) {
	t.Parallel()
	m := newMailbox[int]()
	for i := range 5 {
		m.put(i)
	}
	if got := <-m; got != 4 {
		t.Errorf("got %d", got)
	}
	select {
	case v := <-m:
		t.Errorf("%d was queued", v)
	default:
	}
}

// Whoever deletes or changes the file is told of at once, also if the directory was made after the watch began or went in between.
func TestWatchFile(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "run")
	path := filepath.Join(dir, "subnet.env")
	w, err := WatchFile(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- w.run(ctx) }()
	defer func() { cancel(); <-ended }()
	write := func() {
		t.Helper()
		if _, err := writeIfChanged(path, []byte("one")); err != nil {
			t.Fatal(err)
		}
		w.again()
		for { // our own write may be told of, too
			select {
			case <-w.news():
				continue
			case <-time.After(3 * fileGap):
			}
			return
		}
	}
	told := func(what string) {
		t.Helper()
		select {
		case <-w.news():
		case <-time.After(time.Minute):
			t.Fatalf("%s: nobody was told", what)
		}
	}
	write()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	told("deleted")
	write()
	if err := os.WriteFile(path, []byte("two"), 0o644); err != nil {
		t.Fatal(err)
	}
	told("overwritten")
	write()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	told("directory removed")
	write()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	told("deleted in the new directory")
}
