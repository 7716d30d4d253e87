package packetfilter

import (
	"strings"
	"testing"

	"github.com/overlayd/overlayd/test/nstest"
)

func TestTryMasquerade(t *testing.T) {
	t.Parallel()
	node := nstest.New(t)
	var err error
	node.Do(func() { err = TryMasquerade() })
	if rules := node.Exec("nft", "list", "ruleset"); err != nil || !strings.Contains(rules, "masquerade") {
		t.Errorf("%v, and the rules are %q", err, rules)
	}
}
