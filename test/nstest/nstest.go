// Package nstest gives a test fresh network namespaces on the real kernel, joined by veth pairs:
//
//	node, peer := nstest.New(t), nstest.New(t)
//	nstest.Link(node, "eth0", peer, "eth0")
//	node.Addr("eth0", "192.0.2.1/24")
//	node.Exec("ip", "route", "add", "10.0.0.0/8", "via", "192.0.2.2")
//	node.Do(func() { conn, err = net.Dial("udp", "192.0.2.2:9") })
//
// Namespaces have no name and no file: they end with the test, also when it fails or the process is killed. Tests that
// use them may run in parallel. Not separated from the host are the mount namespace (so /sys shows the host's devices)
// and lock files such as /run/xtables.lock.
package nstest

import (
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Loopback is an address of this machine that no other test is likely to have, for a server whose port has to be free
// once more when it comes back. It is of the host's own namespace.
func Loopback() netip.Addr {
	return netip.AddrFrom4([4]byte{127, byte(1 + rand.IntN(254)), byte(rand.IntN(256)), byte(1 + rand.IntN(254))})
}

// SkipEnv set to 1 lets a developer without root skip what needs it. Without it such a test fails: a skipped test
// looks like a passed one, and nobody notices that the kernel was never asked.
const SkipEnv = "OVERLAYD_SKIP_ROOT_TESTS"

// NeedRoot fails the test when it does not run as root, or skips it if SkipEnv says so.
func NeedRoot(t testing.TB) {
	t.Helper()
	switch {
	case os.Geteuid() == 0:
	case os.Getenv(SkipEnv) == "1":
		t.Skip("needs root, and " + SkipEnv + "=1 is set")
	default:
		t.Fatal("this test works on the real kernel and needs root; " + SkipEnv + "=1 skips it")
	}
}

// NS is one network namespace.
type NS struct {
	t      testing.TB
	handle netns.NsHandle
}

// New makes an empty network namespace for this test: loopback is up, and IPv6 addresses may be used at once (no
// duplicate address detection on the devices made in it).
func New(t testing.TB) *NS {
	t.Helper()
	NeedRoot(t)
	handle, err := unshare()
	if err != nil {
		t.Fatalf("a new network namespace: %v", err)
	}
	t.Cleanup(func() { _ = handle.Close() })
	ns := &NS{t: t, handle: handle}
	ns.Sysctl("net.ipv6.conf.default.accept_dad", "0")
	ns.Exec("ip", "link", "set", "lo", "up")
	return ns
}

// unshare takes a thread of its own, which ends together with the goroutine because it is never unlocked: no other
// goroutine can ever find itself in the new namespace. The handle keeps the namespace alive.
func unshare() (netns.NsHandle, error) {
	type result struct {
		handle netns.NsHandle
		err    error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread()
		handle, err := netns.New()
		done <- result{handle, err}
	}()
	r := <-done
	return r.handle, r.err
}

// Do runs fn with the calling goroutine inside the namespace. What fn opens (sockets, netlink handles) stays in the
// namespace for good, and the commands it starts run in it; a goroutine that fn starts does not. fn may use t.Fatal.
func (ns *NS) Do(fn func()) {
	ns.t.Helper()
	runtime.LockOSThread()
	back, err := netns.Get()
	if err != nil {
		ns.t.Fatalf("the current network namespace: %v", err)
	}
	defer func() { _ = back.Close() }()
	if err := netns.Set(ns.handle); err != nil {
		ns.t.Fatalf("enter the network namespace: %v", err)
	}
	defer func() {
		// A thread that could not leave stays locked, and the runtime ends it together with the goroutine.
		if err := netns.Set(back); err != nil {
			ns.t.Errorf("leave the network namespace: %v", err)
			return
		}
		runtime.UnlockOSThread()
	}()
	fn()
}

// Run runs a command inside the namespace and returns what it printed, on both channels.
func (ns *NS) Run(command ...string) (string, error) {
	ns.t.Helper()
	return ns.Feed("", command...)
}

// Feed is Run with a text on standard input.
func (ns *NS) Feed(stdin string, command ...string) (string, error) {
	ns.t.Helper()
	var out []byte
	var err error
	ns.Do(func() {
		cmd := exec.Command(command[0], command[1:]...)
		cmd.Stdin = strings.NewReader(stdin)
		out, err = cmd.CombinedOutput()
	})
	return string(out), err
}

// Exec is Run for a command that must succeed.
func (ns *NS) Exec(command ...string) string {
	ns.t.Helper()
	out, err := ns.Run(command...)
	if err != nil {
		ns.t.Fatalf("%s: %v\n%s", strings.Join(command, " "), err, out)
	}
	return out
}

// Sysctl sets a kernel parameter by its dotted name, "net.ipv4.ip_forward". For a device with a dot in its name write
// slashes: "net/ipv4/conf/overlay.1/rp_filter".
func (ns *NS) Sysctl(name, value string) {
	ns.t.Helper()
	if !strings.Contains(name, "/") {
		name = strings.ReplaceAll(name, ".", "/")
	}
	ns.Do(func() {
		if err := os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0o644); err != nil {
			ns.t.Fatalf("sysctl: %v", err)
		}
	})
}

// Addr gives a device an address with its prefix, "192.0.2.1/24", and sets the device up.
func (ns *NS) Addr(device, address string) {
	ns.t.Helper()
	p := netip.MustParsePrefix(address)
	args := []string{"ip", "address", "add", p.String(), "dev", device}
	if p.Addr().Is6() {
		args = append(args, "nodad")
	}
	ns.Exec(args...)
	ns.Exec("ip", "link", "set", device, "up")
}

// FD is the namespace as a file descriptor, for netlink.NsFd and the like. It is valid until the end of the test.
func (ns *NS) FD() int { return int(ns.handle) }

// Link joins two namespaces by a veth pair, with one device in each, both up.
func Link(a *NS, deviceA string, b *NS, deviceB string) {
	a.t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.Namespace, attrs.Flags = deviceA, netlink.NsFd(a.FD()), unix.IFF_UP
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: deviceB, PeerNamespace: netlink.NsFd(b.FD())}
	// Made from inside one of the two, so that the host never sees either device.
	a.Do(func() {
		if err := netlink.LinkAdd(veth); err != nil {
			a.t.Fatalf("link %s to %s: %v", deviceA, deviceB, err)
		}
	})
	a.Exec("ip", "link", "set", deviceA, "up")
	b.Exec("ip", "link", "set", deviceB, "up")
}

// Switched is a node and a peer, 192.0.2.1 and .2, 2001:db8::1 and ::2, with a switch (p1, p2 on br0) between them.
func Switched(t testing.TB) (node, middle, peer *NS) {
	node, middle, peer = New(t), New(t), New(t)
	Link(node, "eth0", middle, "p1")
	Link(peer, "eth0", middle, "p2")
	middle.Exec("ip", "link", "add", "br0", "type", "bridge")
	for _, l := range []string{"p1", "p2"} {
		middle.Exec("ip", "link", "set", "dev", l, "master", "br0")
		middle.Exec("ip", "link", "set", "dev", l, "up")
	}
	middle.Exec("ip", "link", "set", "br0", "up")
	node.Addr("eth0", "192.0.2.1/24")
	node.Addr("eth0", "2001:db8::1/64")
	peer.Addr("eth0", "192.0.2.2/24")
	peer.Addr("eth0", "2001:db8::2/64")
	return node, middle, peer
}
