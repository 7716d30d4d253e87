package netstate

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience bounds the wait for what has to be heard of.
const patience = 20 * time.Second

// heard reports whether the monitor asks for a look within a moment.
func heard(k *Kernel, within time.Duration) bool {
	select {
	case <-k.Changed():
		return true
	case <-time.After(within):
		return false
	}
}

// watch hears of changes until the test ends.
func (n *node) watch() {
	ctx, cancel := context.WithCancel(n.t.Context())
	done := make(chan error)
	go func() { done <- n.k.Watch(ctx) }()
	n.t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			n.t.Errorf("Watch returned %v", err)
		}
	})
}

// TestOwnDoingIsNoNews: not even new devices, and settings that had other values.
func TestOwnDoingIsNoNews(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.watch()
	full := fullState()
	n.observe()
	for heard(n.k, 300*time.Millisecond) { // before anything was wished for, all is news
	}
	for i, want := range []State{full, only(full, dev4), full, {}, manyPeers(300)} {
		n.Sysctl("net.ipv4.ip_forward", "0")
		n.Sysctl("net.ipv6.conf.all.forwarding", "0")
		n.observe()
		heard(n.k, 300*time.Millisecond)
		n.converge(want)
		if heard(n.k, 300*time.Millisecond) {
			t.Errorf("step %d was taken for somebody else's doing", i)
		}
	}
	n.sh("ip link set overlay.1 mtu 1300")
	if !heard(n.k, patience) {
		t.Error("what somebody else did was not heard of")
	}
}

// TestOwnRequestsAreNotHeard: the kernel does not even send the news of what our requests do, but for those of FDB
// entries.
func TestOwnRequestsAreNotHeard(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.converge(manyPeers(10))
	heard := map[string]int{}
	listen := func() {
		buf := make([]byte, 64<<10)
		for {
			size, err := unix.Read(n.k.monitor.fd, buf)
			if err != nil {
				return
			}
			heard[fmt.Sprint(binary.NativeEndian.Uint16(buf[4:size]), " ", buf[unix.NLMSG_HDRLEN])]++
		}
	}
	news := func(typ, family int) int { return heard[fmt.Sprint(typ, " ", family)] }
	listen()
	if got := news(unix.RTM_NEWNEIGH, unix.AF_BRIDGE); got != 10 {
		t.Errorf("%d FDB entries were heard of", got)
	}
	if got := news(unix.RTM_NEWROUTE, unix.AF_INET) + news(unix.RTM_NEWNEIGH, unix.AF_INET); got != 0 {
		t.Errorf("%d routes and neighbours of our own making were heard of", got)
	}
	n.sh("ip route flush table 118")
	if listen(); news(unix.RTM_DELROUTE, unix.AF_INET) != 10 {
		t.Errorf("%d deletions by somebody else were heard of", news(unix.RTM_DELROUTE, unix.AF_INET))
	}
}

// expecting is an expectation with some devices of ours.
func expecting(desired *State, names map[uint32]string) expectation {
	devices := map[uint32]device{}
	for i, name := range names {
		devices[i] = device{name: name}
	}
	return expectation{desired: desired, observed: &observation{devices: devices, ours: State{Links: desired.Links}}}
}

// FuzzMonitor: whatever comes, it is judged.
func FuzzMonitor(f *testing.F) {
	want := fullState()
	e := expecting(&want, map[uint32]string{3: dev6, 4: dev4})
	kinds := map[string]uint16{
		"route": unix.RTM_NEWROUTE, "neighbour": unix.RTM_NEWNEIGH, "fdb": unix.RTM_DELNEIGH,
		"rule": unix.RTM_DELRULE,
	}
	for _, m := range readMessages(f) {
		if typ, ok := kinds[m.kind]; ok {
			f.Add(typ, m.body)
		}
	}
	for _, typ := range []uint16{
		unix.RTM_NEWADDR, unix.RTM_DELADDR, unix.RTM_NEWLINK, unix.RTM_DELLINK,
		unix.RTM_NEWNETCONF,
	} {
		f.Add(typ, make([]byte, 64))
	}
	f.Fuzz(func(_ *testing.T, typ uint16, body []byte) {
		var out messages
		out.begin(typ, 0)
		out.buf = append(out.buf, body...)
		out.end()
		e.contradicted(out.buf)
		e.contradicted(body)
	})
}

// A change by another process to our state, or to what decisions depend on, is notified at once; our own changes, and
// those of no concern, are not.
func TestMonitor(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.watch()
	// It carries no address. Whether ours can be made may depend on it, as where both want one VNI.
	n.sh("ip link add vxother type vxlan id 7 dstport 4789 local 192.0.2.1 dev eth0; ip link set vxother up")
	want := fullState()
	route := want.Routes[slices.IndexFunc(want.Routes, func(r Route) bool {
		return r.Table == MainTable &&
			r.Link == "overlay.1"
	})].Dst.String()
	mac := want.FDB[slices.IndexFunc(want.FDB, func(e FDBEntry) bool { return e.Link == "overlay.1" })].MAC.String()
	own := want.Addresses[slices.IndexFunc(want.Addresses,
		func(a Address) bool { return a.Link == "overlay.1" })].Prefix.String()
	neigh := want.Neighbours[slices.IndexFunc(want.Neighbours,
		func(n Neighbour) bool { return n.Link == "overlay.1" })].IP.String()
	settle := func() {
		t.Helper()
		for range 5 { // the device's own coming is heard of, too: once more and it is quiet
			n.forget()
			n.converge(want)
			if !heard(n.k, 200*time.Millisecond) {
				return
			}
		}
		t.Fatal("it never gets quiet")
	}
	settle()
	for _, c := range []struct {
		does    string
		matters bool
	}{
		{"true", false},
		{"ip route del " + route + " proto 118", true},
		{"ip route flush proto 118", true},
		{fmt.Sprintf("ip route replace %s via 192.0.2.2 dev eth0 proto 118 metric %d", route,
			Metric(netip.MustParsePrefix(route))), true},
		{"ip neigh flush dev overlay.1 nud permanent", true},
		{"ip neigh replace " + neigh + " lladdr 02:ff:00:00:00:01 dev overlay.1", true},
		{"ip neigh add 10.244.77.7 lladdr 02:ff:00:00:00:01 dev overlay.1", true},
		{"bridge fdb del " + mac + " dev overlay.1 self", true},
		{"bridge fdb replace " + mac + " dev overlay.1 dst 192.0.2.77 self permanent", true},
		{"ip addr del " + own + " dev overlay.1", true},
		{"ip addr add 198.51.100.1/32 dev overlay.1", true},
		{"ip link set overlay.1 mtu 1300", true},
		{"ip link set overlay.1 down", true},
		{"ip link set overlay.1 address 02:aa:00:00:00:01", true},
		{"ip link set overlay.1 type vxlan id 1 local 192.0.2.77 dev eth0", true},
		{"ip link del overlay.1", true},
		{"ip link set overlay.1 promisc on; ip link set overlay.1 promisc off; ip link set overlay.1 txqueuelen 500", false},
		{"ip link set vxother mtu 1300", true},
		{"ip link set vxother down", true},
		{"ip link del vxother", true},
		{"ip rule flush proto 118; ip rule del priority 11800", true},
		{"sysctl -qw net.ipv4.ip_forward=0", true},
		{"ip addr add 192.0.2.99/24 dev eth0", true},
		{"ip route add 203.0.113.0/24 via 192.0.2.2", true},
		{"ip link set eth0 mtu 1480", true},
		{"ip route add 203.0.113.0/24 via 192.0.2.3 table 77", false},
		{"ip neigh replace 192.0.2.33 lladdr 02:00:00:00:33:33 dev eth0", false},
		{"ip link add pod0 type veth peer name pod1; ip link set pod0 up; ip link set pod1 up", false},
		{"ip rule add from 192.0.2.0/24 lookup 77", true},
	} {
		if c.does != "true" {
			_, _ = n.Run("sh", "-c", c.does) // some say that there was nothing to flush
		}
		within := 300 * time.Millisecond
		if c.matters {
			within = patience
		}
		if got := heard(n.k, within); got != c.matters {
			t.Errorf("%s: heard %v, want %v", c.does, got, c.matters)
		}
		if c.matters {
			settle()
		}
	}
}
