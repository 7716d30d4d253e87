package masquerade

import (
	"strings"
	"testing"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/nstest"
)

// A change whose notification has not come yet is found all the same.
func TestChangeBeforeItsNotification(t *testing.T) {
	for _, native := range []bool{true, false} {
		r := newRig(t, nstest.New(t), VariantNFT)
		r.native = native
		r.restart()
		want := bothWithNodes()
		r.ensure(want...)
		r.ensure(want...)
		intact := r.ruleset()
		if native {
			r.ns.Exec("nft", "flush", "chain", "ip", "overlayd", "postrouting")
		} else {
			r.ns.Exec("nft", "flush", "chain", "ip", "nat", "POSTROUTING")
		}
		r.ensure(want...)
		if r.ruleset() != intact {
			t.Errorf("native %v: what another program flushed stays so", native)
		}
	}
}

// The accepts in iptables' FORWARD stay while the program that wrote them is missing.
func TestAcceptsOutliveTheProgram(t *testing.T) {
	r := newNFTRig(t, nstest.New(t), VariantNFT)
	r.ns.Exec("iptables-nft", "-P", "FORWARD", "ACCEPT")
	want := Rules(fullDesired(addr.IPv4))
	r.ensure(want)
	intact := r.ruleset()
	if !strings.Contains(intact, "OVERLAYD-FWD") {
		t.Fatalf("no accepts:\n%s", intact)
	}
	t.Setenv("PATH", "/nonexistent")
	r.restart()
	r.ns.Do(func() {
		if _, err := r.driver.Ensure(t.Context(), per([]Ruleset{want})); err != nil {
			t.Error(err)
		}
	})
	t.Setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
	if now := r.ruleset(); now != intact {
		t.Errorf("before:\n%s\nafter:\n%s", intact, now)
	}
}
