package netstate

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/nstest"
)

// On real devices: what is taken from a bridge is named, with commands that give it back, and what is gone for a
// reason is not.
func TestFollowBridges(t *testing.T) {
	ns := nstest.New(t)
	own := addr.Per[netip.Prefix]{
		V4: netip.MustParsePrefix("10.244.5.0/24"),
		V6: netip.MustParsePrefix("fd00:10:244:5::/64"),
	}
	var known []PodBridge
	var said []string
	var commands string
	follow := func() string {
		t.Helper()
		var s Survey
		var err error
		ns.Do(func() { s, err = Look(func(string) bool { return false }) })
		if err != nil {
			t.Fatal(err)
		}
		var lost []BridgeLoss
		known, lost = FollowBridges(known, s.Host, own)
		said, commands = nil, ""
		for _, l := range lost {
			said = append(said, l.String())
			commands += strings.Join(l.Commands(), "\n") + "\n"
		}
		return strings.Join(said, " | ")
	}
	is := func(what, want string) {
		t.Helper()
		if got := follow(); got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	give := func() { t.Helper(); ns.Exec("sh", "-ec", commands) }
	port := func(name string) {
		ns.Exec("ip", "link", "add", name, "type", "veth", "peer", "name", name+"p")
		ns.Exec("ip", "link", "set", name, "master", "br-pods", "up")
	}
	is("nothing is there", "")
	ns.Exec("ip", "link", "add", "br-pods", "type", "bridge")
	is("a bridge without an address", "")
	ns.Exec("ip", "link", "set", "br-pods", "up")
	ns.Addr("br-pods", "10.244.5.1/24")
	ns.Addr("br-pods", "fd00:10:244:5::1/64")
	port("veth1")
	port("veth2")
	is("all is there", "")

	ns.Exec("ip", "-4", "address", "flush", "dev", "br-pods")
	is("one family lost", "br-pods has lost its address 10.244.5.1/24, the gateway of this node's pods")
	is("still", "br-pods has lost its address 10.244.5.1/24, the gateway of this node's pods")
	give()
	is("given back", "")
	ns.Exec("ip", "link", "set", "veth1", "nomaster")
	ns.Exec("ip", "link", "set", "br-pods", "down") // takes the IPv6 address as well
	ns.Exec("ip", "address", "flush", "dev", "br-pods")
	ns.Exec("ip", "link", "set", "veth2", "nomaster")
	is("stripped",
		"br-pods is down: pods cannot send; br-pods has lost its address 10.244.5.1/24, the gateway of this node's pods; "+
			"br-pods has lost its address fd00:10:244:5::1/64, the gateway of this node's pods; br-pods has lost 2 of its "+
			"ports (veth1, veth2): pods there are cut off")
	give()
	is("given back", "")
	if out := ns.Exec("ip", "-br", "link", "show", "master", "br-pods"); !strings.Contains(out, "veth1") ||
		!strings.Contains(out, "veth2") {
		t.Errorf("the commands did not give back the ports: %s", out)
	}

	// A pod that ends, one that gets its name, and a port that another bridge has.
	ns.Exec("ip", "link", "del", "veth1")
	ns.Exec("ip", "link", "add", "veth1", "type", "veth", "peer", "name", "veth1p")
	ns.Exec("ip", "link", "add", "br-else", "type", "bridge")
	ns.Exec("ip", "link", "set", "veth2", "master", "br-else")
	is("ports that went for a reason", "")
	ns.Exec("ip", "link", "set", "veth2", "master", "br-pods")
	is("all is there", "")
	ns.Exec("ip", "link", "del", "br-pods")
	is("the bridge removed under a pod",
		"br-pods is gone, but 1 of its ports still exist (veth2): pods there are cut off")
	ns.Exec("ip", "link", "del", "veth2")
	is("and the pod", "")

	// Another bridge in its place, and another subnet.
	for _, b := range []string{"br-pods", "br-new"} {
		ns.Exec("ip", "link", "add", b, "type", "bridge")
		ns.Exec("ip", "link", "set", b, "up")
	}
	ns.Addr("br-pods", "10.244.5.1/24")
	is("again", "")
	ns.Exec("ip", "address", "flush", "dev", "br-pods")
	ns.Addr("br-new", "10.244.5.1/24")
	is("another bridge", "")
	ns.Exec("ip", "address", "flush", "dev", "br-new")
	own.V4 = netip.MustParsePrefix("10.244.6.0/24")
	is("another subnet", "")
}
