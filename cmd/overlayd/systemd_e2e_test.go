package main_test

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/overlayd/overlayd/test/lab"
	"github.com/overlayd/overlayd/test/labtest"
)

// systemd is told that a node is ready when its subnet file is written, and what it waits for until then.
func TestSystemdIsNotified(t *testing.T) {
	t.Parallel()
	at := filepath.Join(t.TempDir(), "notify")
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: at, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	env := []string{"NOTIFY_SOCKET=" + at, "WATCHDOG_USEC=400000"}
	l := labtest.Up(t, lab.Options{Nodes: 1, Pods: 1, OverlaydEnv: env})
	n := l.Node(1)
	// until reads what systemd is told up to a text. The subnet file has to be there from READY=1 on.
	until := func(text string) (before []string) {
		t.Helper()
		if err := socket.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		for buf := make([]byte, 64<<10); ; {
			size, err := socket.Read(buf)
			if err != nil {
				t.Fatalf("never told %q but %q: %v", text, before, err)
			}
			said := string(buf[:size])
			if _, err := os.Stat(n.SubnetFile()); strings.Contains(said, "READY=1") && err != nil {
				t.Errorf("told %q: %v", said, err)
			}
			if strings.Contains(said, text) {
				return before
			}
			before = append(before, said)
		}
	}
	until("READY=1")
	until("WATCHDOG=1")
	stop(t, n)
	until("STOPPING=1")

	// Without etcd, and with nothing remembered.
	if err := l.Etcd().Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{n.SubnetFile(), filepath.Join(n.StateDir(), "lease.json")} {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	until("STATUS=not ready: store: etcd: ")
	time.Sleep(5 * time.Second)
	if err := l.Etcd().Start(); err != nil {
		t.Fatal(err)
	}
	before := strings.Join(until("READY=1"), "|")
	if strings.Count(before, "WATCHDOG=1") < 10 {
		t.Errorf("told before READY=1: %q", before)
	}
}
