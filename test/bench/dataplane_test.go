package bench

import (
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/test/nstest"
)

// Requests go through a real server, over one connection and over many, and a client that finds none says so.
func TestExchange(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	at := &unix.SockaddrInet4{Port: echoPort, Addr: [4]byte{127, 0, 0, 1}}
	ns.Do(func() {
		if exchange(at, 1) == nil {
			t.Fatal("the port is in use already")
		}
		listener, err := listen(at)
		if err != nil {
			t.Fatal(err)
		}
		var server sync.WaitGroup
		server.Go(func() { _ = onCore(0, func() error { return echoAll(listener) }) })
		defer server.Wait()
		defer func() { _ = unix.Shutdown(listener, unix.SHUT_RDWR) }()
		if err := exchange(at, 10); err != nil {
			t.Error(err)
		}
		if err := signalled(t, func() error { return exchange(at, 200) }); err != nil {
			t.Errorf("an end whose goroutine the runtime asks to pause: %v", err)
		}
		fd, err := connect(at)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		for range 10 {
			if err := ask(fd); err != nil {
				t.Error(err)
			}
		}
	})
}

// signalled is what f returns at an end to which the runtime's signal is sent all the time.
func signalled(t *testing.T, f func() error) error {
	t.Helper()
	thread, done := make(chan int, 1), make(chan error, 1)
	ns, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	go func() {
		done <- onCore(0, func() error {
			thread <- unix.Gettid()
			return errors.Join(netns.Set(ns), f())
		})
	}()
	for id := <-thread; ; time.Sleep(50 * time.Microsecond) {
		select {
		case err := <-done:
			return err
		default:
			_ = unix.Tgkill(unix.Getpid(), id, unix.SIGURG)
		}
	}
}

func TestParseIperf(t *testing.T) {
	t.Parallel()
	for report, want := range map[string]float64{
		`{"end": {"sum_sent": {"bits_per_second": 9e9}, "sum_received": {"bits_per_second": 8.5e9}}}`: 8.5,
		`{"start": {}, "end": {}, "error": "unable to connect to server: Connection refused"}`:        0,
		`iperf3: error`: 0,
	} {
		got, err := parseIperf(report)
		if got != want || (err == nil) != (want > 0) {
			t.Errorf("%s: %v, %v", report, got, err)
		}
	}
}

// Every lab can be made, under a name of its own, and every row has samples from a path that one of them is.
func TestPathRows(t *testing.T) {
	t.Parallel()
	paths, names := []string{rawUnderlay}, map[string]bool{}
	for _, l := range pathLabs(&Env{}) {
		o, err := l.options.Defaults()
		if err == nil {
			err = o.Validate()
		}
		if err != nil || names[o.Name] {
			t.Errorf("%s: %v", o.Name, err)
		}
		names[o.Name] = true
		paths = append(paths, l.name)
	}
	samples, judged := pathSamples{}, 0
	for _, tr := range traffics() {
		for _, p := range paths {
			samples[[2]string{tr.name, p}] = []float64{1, 2, 3}
		}
	}
	for _, r := range samples.rows() {
		if len(r.Ours) != 3 || len(r.Base) != 3 {
			t.Errorf("%s beside %s has no samples", r.Name, r.BaseName)
		}
		if r.Bound != (Bound{}) {
			judged++
			if !r.OK() {
				t.Errorf("%s is not ok", r.Name)
			}
		}
	}
	if want := 3 * len(traffics()); judged != want {
		t.Errorf("%d rows are judged, want %d", judged, want)
	}
}
