package packetfilter

import (
	"testing"

	"golang.org/x/sys/unix"
)

// Rules are shown as nft writes them.
func TestRulesAreShown(t *testing.T) {
	t.Parallel()
	test := func(f Field, mask []byte, value ...byte) Test {
		return Test{Key: []Key{{Field: f, Mask: mask}}, Any: [][]Range{{{From: value, To: value}}}}
	}
	for want, tt := range map[string]struct {
		family string
		tests  []Test
	}{
		`"ip saddr 10.0.0.0/8 drop"`: {"inet", []Test{test(NFProto, nil, 2), test(Source, nil, 10)}},
		`"ip6 daddr 2001:db8::/32 drop"`: {"inet", []Test{
			test(NFProto, nil, 10),
			test(Destination, nil, 0x20, 1, 0xd, 0xb8),
		}},
		`"ip saddr 192.0.2.0/24 drop"`:   {"netdev", []Test{test(EtherType, nil, 8, 0), test(Source, nil, 192, 0, 2)}},
		`"ip6 saddr 2001:db8::/32 drop"`: {"ip6", []Test{test(Source, nil, 0x20, 1, 0xd, 0xb8)}},
		`"ip6 udp dport 8472 drop"`: {"inet", []Test{
			test(NFProto, nil, 10), test(Protocol, nil, unix.IPPROTO_UDP),
			test(Port, nil, port16(8472)...),
		}},
		`"ip saddr . dport 192.0.2.2 . 53 drop"`: {"ip", []Test{{
			Key: []Key{{Field: Source}, {Field: Port}}, Any: [][]Range{{
				{From: []byte{192, 0, 2, 2}, To: []byte{192, 0, 2, 2}},
				{From: port16(53), To: port16(53)},
			}},
		}}},
	} {
		c := Chain{Family: tt.family}
		if got := describeRule(c, Rule{Tests: tt.tests, Action: Action{Verdict: Drop}}); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}
