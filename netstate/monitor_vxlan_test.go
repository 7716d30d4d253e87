package netstate

import (
	"testing"
	"time"
)

// Another VXLAN device may be what keeps one of ours from being made: what becomes of it is heard of, although it carries no address.
func TestMonitorHearsOfOtherVXLANDevices(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.watch()
	want := fullState()
	n.sh(`ip link add other type vxlan id 7 dstport 4789 local 192.0.2.1 dev eth0
ip link set other up
ip link add plain type bridge
ip link set plain up`)
	settle := func() {
		t.Helper()
		for range 10 {
			n.k.Forget()
			n.converge(want)
			if !heard(n.k, 300*time.Millisecond) {
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
		{"ip link set plain mtu 1300", false},
		{"ip link del plain", false},
		{"ip link set other mtu 1300", true},
		{"ip link set other down", true},
		{"ip link del other", true},
	} {
		n.sh(c.does)
		within := 300 * time.Millisecond
		if c.matters {
			within = 5 * time.Second
		}
		if got := heard(n.k, within); got != c.matters {
			t.Errorf("%s: heard %v, want %v", c.does, got, c.matters)
		}
		settle()
	}
}
