package nstest

import (
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netns"
)

func TestNamespacesAreJoinedAndSeparate(t *testing.T) {
	t.Parallel()
	a, b, c := New(t), New(t), New(t)
	Link(a, "eth0", b, "eth0")
	Link(b, "eth1", c, "eth0")
	for _, address := range []string{"192.0.2.%/24", "2001:db8::%/64"} {
		a.Addr("eth0", strings.Replace(address, "%", "1", 1))
		b.Addr("eth0", strings.Replace(address, "%", "2", 1))
	}
	if out := c.Exec("ip", "-o", "link"); !strings.Contains(out, "eth0") || strings.Contains(out, "eth1") {
		t.Errorf("devices of c: %s", out)
	}
	for _, target := range []string{"192.0.2.2", "2001:db8::2"} {
		if got := ask(t, a, b, target); got != "hello" {
			t.Errorf("%s: got %q", target, got)
		}
	}
	if out, err := c.Run("ping", "-c1", "-W1", "192.0.2.1"); err == nil {
		t.Errorf("c reaches a: %s", out)
	}
}

// ask sends a datagram from one namespace to the other; the sockets are used outside of Do, where they keep working.
func ask(t *testing.T, from, to *NS, target string) string {
	var server net.PacketConn
	var client net.Conn
	var err error
	to.Do(func() { server, err = net.ListenPacket("udp", net.JoinHostPort(target, "0")) })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = server.Close() }()
	from.Do(func() { client, err = net.Dial("udp", server.LocalAddr().String()) })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	if _, err := client.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 16)
	_ = server.SetReadDeadline(time.Now().Add(5 * time.Second))
	n, _, err := server.ReadFrom(buf)
	if err != nil {
		t.Fatal(err)
	}
	return string(buf[:n])
}

func TestDoComesBack(t *testing.T) {
	t.Parallel()
	ns := New(t)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = before.Close() }()
	left := make(chan struct{})
	go func() { // as t.Fatal does
		defer close(left)
		ns.Do(runtime.Goexit)
	}()
	<-left
	ns.Do(func() {
		if inside, _ := netns.Get(); inside.Equal(before) {
			t.Error("still in the old namespace")
		}
	})
	after, err := netns.Get()
	if err != nil || !after.Equal(before) {
		t.Errorf("not back: %v, %v", after, err)
	}
}
