package ping

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/test/nstest"
)

func TestOnce(t *testing.T) {
	t.Parallel()
	node, middle, _ := nstest.Switched(t)
	const forLost = 3 * time.Second
	once := func(within time.Duration, size int, to ...netip.Addr) (out []Outcome) {
		var err error
		node.Do(func() { out, err = Once(t.Context(), to, size, 3, within, false) })
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for _, size := range []int{64, 1499, 1500} {
		for _, o := range once(patience, size, peer4, peer6) {
			if o.Sent != 3 || o.Lost != 0 || o.RTT <= 0 || o.Err != nil {
				t.Errorf("%d bytes: %+v", size, o)
			}
		}
	}
	for _, o := range once(forLost, 1501, peer4, peer6) {
		if o.Lost != 3 || !errors.Is(o.Err, unix.EMSGSIZE) {
			t.Errorf("more than the device takes: %+v", o)
		}
	}
	absent := netip.MustParseAddr("192.0.2.66")
	if o := once(forLost, 64, absent, peer4); o[0].Lost != 3 || o[1].Lost != 0 {
		t.Errorf("an absent target and a present one: %+v", o)
	}
	middle.Exec("ip", "link", "set", "dev", "p2", "mtu", "1400")
	for _, o := range once(forLost, 1500, peer4, peer6) {
		if o.Lost != 3 {
			t.Errorf("a smaller MTU on the path: %+v", o)
		}
	}
	for _, o := range once(patience, 1400, peer4, peer6) {
		if o.Lost != 0 {
			t.Errorf("small enough for the path: %+v", o)
		}
	}
}
