package subnet

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/overlayd/overlayd/addr"
)

func pool(network string, length int, first, last string) Pool {
	return Pool{netip.MustParsePrefix(network), length, netip.MustParseAddr(first), netip.MustParseAddr(last)}
}

func TestParseConfig(t *testing.T) {
	vxlan := Backend{Type: VXLAN, VNI: 1, Port: 8472, ListenPort: addr.Per[uint16]{V4: 51820, V6: 51821}}
	v4 := pool("10.3.0.0/16", 24, "10.3.1.0", "10.3.255.0")
	v6 := pool("fc00::/48", 64, "fc00:0:0:1::", "fc00:0:0:ffff::")
	with := func(change func(*Backend)) Backend {
		b := vxlan
		change(&b)
		return b
	}
	only4 := func(p Pool) Config { return Config{Pools: addr.Per[Pool]{V4: p}, Backend: vxlan} }
	only6 := func(p Pool) Config { return Config{Pools: addr.Per[Pool]{V6: p}, Backend: vxlan} }

	for _, tt := range []struct {
		name, json string
		want       Config
	}{
		{"defaults", `{"Network":"10.3.0.0/16"}`, only4(v4)},
		{"letter case of keys", `{"network":"10.3.0.0/16","BACKEND":{"type":"vxlan","vni":1}}`, only4(v4)},
		{"the later of two spellings", `{"Network":"10.9.0.0/16","network":"10.3.0.0/16"}`, only4(v4)},
		{"the later of two spellings, exact one first", `{"network":"10.9.0.0/16","Network":"10.3.0.0/16"}`, only4(v4)},
		{
			"null is absent", `{"Network":"10.3.0.0/16","SubnetLen":null,"SubnetMin":null,"EnableIPv4":null,"Backend":null}`,
			only4(v4),
		},
		{"null after a value changes nothing", `{"Network":"10.3.0.0/16","network":null}`, only4(v4)},
		{
			"zero and empty are not set",
			`{"Network":"10.3.0.0/16","SubnetLen":0,"SubnetMin":"","SubnetMax":"","Backend":{"Port":0,"MTU":0}}`, only4(v4),
		},
		{"unspecified is not set", `{"Network":"10.3.0.0/16","SubnetMin":"0.0.0.0","SubnetMax":"0.0.0.0"}`, only4(v4)},
		{
			"unspecified is not set, IPv6",
			`{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","IPv6SubnetMin":"::","IPv6SubnetMax":"::"}`,
			only6(v6),
		},
		{"unknown keys", `{"Network":"10.3.0.0/16","Foo":{"Bar":[1]},"Backend":{"PSK":"x"}}`, only4(v4)},
		{"white space around", " \n\t{\"Network\" : \"10.3.0.0/16\"}\r\n\n", only4(v4)},
		{"escaped key", `{"\u004eetwork":"10.3.0.0/16"}`, only4(v4)},
		{"host bits are dropped", `{"Network":"10.3.4.5/16"}`, only4(v4)},
		{
			"IPv6 settings of a family that is off", `{"Network":"10.3.0.0/16","IPv6Network":"nonsense","IPv6SubnetLen":999}`,
			only4(v4),
		},
		{
			"bounds", `{"Network":"10.3.0.0/16","SubnetLen":28,"SubnetMin":"10.3.5.0","SubnetMax":"10.3.8.0"}`,
			only4(pool("10.3.0.0/16", 28, "10.3.5.0", "10.3.8.0")),
		},
		{
			"the first subnet on demand", `{"Network":"10.3.0.0/16","SubnetMin":"10.3.0.0"}`,
			only4(pool("10.3.0.0/16", 24, "10.3.0.0", "10.3.255.0")),
		},
		{
			"a pool of one", `{"Network":"10.3.0.0/16","SubnetMin":"10.3.7.0","SubnetMax":"10.3.7.0"}`,
			only4(pool("10.3.0.0/16", 24, "10.3.7.0", "10.3.7.0")),
		},
		{"largest that has /24 subnets", `{"Network":"10.3.4.0/22"}`, only4(pool("10.3.4.0/22", 24, "10.3.5.0", "10.3.7.0"))},
		{
			"four parts of a small network", `{"Network":"10.3.4.0/23"}`,
			only4(pool("10.3.4.0/23", 25, "10.3.4.128", "10.3.5.128")),
		},
		{"smallest network", `{"Network":"10.3.0.0/28"}`, only4(pool("10.3.0.0/28", 30, "10.3.0.4", "10.3.0.12"))},
		{
			"longest SubnetLen", `{"Network":"10.3.0.0/16","SubnetLen":30}`,
			only4(pool("10.3.0.0/16", 30, "10.3.0.4", "10.3.255.252")),
		},
		{
			"shortest SubnetLen", `{"Network":"10.3.0.0/16","SubnetLen":18}`,
			only4(pool("10.3.0.0/16", 18, "10.3.64.0", "10.3.192.0")),
		},
		{"a large network", `{"Network":"10.0.0.0/8"}`, only4(pool("10.0.0.0/8", 24, "10.0.1.0", "10.255.255.0"))},

		{"IPv6 alone", `{"enableIPv6":true,"ipv6Network":"fc00::/48","enableIPv4":false}`, only6(v6)},
		{
			"IPv6 alone, IPv4 settings there but off",
			`{"EnableIPv6":true,"EnableIPv4":false,"IPv6Network":"fc00::/48","Network":""}`, only6(v6),
		},
		{
			"IPv6 bounds", `{"EnableIPv6":true,"EnableIPv4":false,"IPv6Network":"fc00::/48","IPv6SubnetMin":"fc00:0:0:1::","IPv6SubnetMax":"fc00:0:0:f::","IPv6SubnetLen":124}`,
			only6(pool("fc00::/48", 124, "fc00:0:0:1::", "fc00:0:0:f::")),
		},
		{
			"IPv6 largest that has /64 subnets", `{"EnableIPv6":true,"EnableIPv4":false,"IPv6Network":"fc00::/62"}`,
			only6(pool("fc00::/62", 64, "fc00:0:0:1::", "fc00:0:0:3::")),
		},
		{
			"IPv6 four parts of a small network", `{"EnableIPv6":true,"EnableIPv4":false,"IPv6Network":"fc00::/63"}`,
			only6(pool("fc00::/63", 65, "fc00::8000:0:0:0", "fc00:0:0:1:8000::")),
		},
		{
			"IPv6 smallest network", `{"EnableIPv6":true,"EnableIPv4":false,"IPv6Network":"fc00::/124"}`,
			only6(pool("fc00::/124", 126, "fc00::4", "fc00::c")),
		},
		{
			"dual", `{"Network":"10.3.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48"}`,
			Config{Pools: addr.Per[Pool]{V4: v4, V6: v6}, Backend: vxlan},
		},

		{
			"host-gw", `{"Network":"10.3.0.0/16","Backend":{"Type":"host-gw"}}`,
			Config{addr.Per[Pool]{V4: v4}, with(func(b *Backend) { b.Type = HostGW })},
		},
		{
			"every option of wireguard",
			`{"Network":"10.3.0.0/16","Backend":{"Type":"wireguard","ListenPort":51,"ListenPortV6":52,"PersistentKeepaliveInterval":25,"Mode":"separate"}}`,
			Config{addr.Per[Pool]{V4: v4}, with(func(b *Backend) {
				b.Type, b.ListenPort, b.Keepalive = WireGuard, addr.Per[uint16]{V4: 51, V6: 52}, 25
			})},
		},
		{"type in other letter case", `{"Network":"10.3.0.0/16","Backend":{"Type":"VXLAN"}}`, only4(v4)},
		{
			"every backend option",
			`{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","VNI":16777215,"Port":65535,"GBP":true,"Learning":true,"DirectRouting":true,"MTU":1400}}`,
			Config{addr.Per[Pool]{V4: v4}, with(func(b *Backend) {
				b.VNI, b.Port, b.GBP, b.Learning, b.DirectRouting, b.MTU = 16777215, 65535, true, true, true, 1400
			})},
		},
		{
			"smallest MTU", `{"Network":"10.3.0.0/16","Backend":{"MTU":576}}`,
			Config{addr.Per[Pool]{V4: v4}, with(func(b *Backend) { b.MTU = 576 })},
		},
		{
			"smallest MTU with IPv6",
			`{"Network":"10.3.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"MTU":1350}}`,
			Config{addr.Per[Pool]{V4: v4, V6: v6}, with(func(b *Backend) { b.MTU = 1350 })},
		},
		{
			"smallest MTU with IPv6 and without a tunnel",
			`{"Network":"10.3.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"host-gw","MTU":1280}}`,
			Config{addr.Per[Pool]{V4: v4, V6: v6}, with(func(b *Backend) { b.Type, b.MTU = HostGW, 1280 })},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseConfig([]byte(tt.json))
			if err != nil || got != tt.want {
				t.Errorf("ParseConfig(%s):\n got %+v, %v\nwant %+v", tt.json, got, err, tt.want)
			}
		})
	}
}

func TestParseConfigErrors(t *testing.T) {
	const v6 = `"EnableIPv4":false,"EnableIPv6":true,`
	for _, tt := range []struct {
		json string
		want []string // the whole list of what is wrong, in any order; a part of the text each
	}{
		{``, []string{"expected a JSON object, found nothing"}},
		{" \n", []string{"expected a JSON object, found nothing"}},
		{`null`, []string{"expected a JSON object, found null"}},
		{`[]`, []string{"expected a JSON object, found []"}},
		{`"x"`, []string{`expected a JSON object, found "x"`}},
		{`{"Network":"10.3.0.0/16"`, []string{"expected a JSON object"}},
		{`{"Network":"10.3.0.0/16"}}`, []string{"expected one JSON object, found more text after it"}},
		{`{"Network":"10.3.0.0/16"}]`, []string{"expected one JSON object, found more text after it"}},
		{`{"Network":"10.3.0.0/16"} {}`, []string{"expected one JSON object, found more text after it"}},
		{`{"Network":"10.3.0.0/16"} x`, []string{"expected one JSON object, found more text after it"}},
		{`{"Network":"10.3.0.0/16"}` + "\x00", []string{"expected one JSON object, found more text after it"}},
		{`{"Network":"10.3.0.0/16",}`, []string{"expected a JSON object"}},
		{`{"Network":"10.3.0.0/16" /* why */}`, []string{"expected a JSON object"}},
		{strings.Repeat(" ", maxConfigSize) + `{}`, []string{"65538 bytes, expected at most 65536"}},

		{`{}`, []string{"Network: expected an IPv4 network such as 10.244.0.0/16, found nothing"}},
		{`{"Network":null}`, []string{"Network: expected an IPv4 network such as 10.244.0.0/16, found nothing"}},
		{`{"Network":""}`, []string{`Network: expected an IPv4 network such as 10.244.0.0/16, found ""`}},
		{`{"Network":10}`, []string{"Network: expected an IPv4 network such as 10.244.0.0/16, found 10"}},
		{`{"Network":"10.3.0.0"}`, []string{`Network: expected an IPv4 network such as 10.244.0.0/16, found "10.3.0.0"`}},
		{`{"Network":"10.3.0.0/33"}`, []string{"Network: expected an IPv4 network"}},
		{`{"Network":"10.3.0/16"}`, []string{"Network: expected an IPv4 network"}},
		{`{"Network":" 10.3.0.0/16"}`, []string{"Network: expected an IPv4 network"}},
		{`{"Network":"fc00::/48"}`, []string{"Network: expected an IPv4 network"}},
		{`{"Network":"::ffff:10.3.0.0/112"}`, []string{"Network: expected an IPv4 network"}},
		{`{"Network":"10.3.0.0/29"}`, []string{"Network: expected a prefix of at most /28"}},
		{`{"Network":"10.3.0.0/32"}`, []string{"Network: expected a prefix of at most /28"}},
		{`{"Network":"0.0.0.0/0"}`, []string{"Network: expected a unicast network"}},
		{`{"Network":"0.0.0.0/16"}`, []string{"Network: expected a unicast network"}},
		{`{"Network":"127.0.0.0/16"}`, []string{"Network: expected a unicast network"}},
		{`{"Network":"169.254.0.0/16"}`, []string{"Network: expected a unicast network"}},
		{`{"Network":"169.0.0.0/8"}`, []string{"Network: expected a unicast network"}},
		{`{"Network":"224.0.0.0/16"}`, []string{"Network: expected a unicast network"}},
		{`{"Network":"255.255.0.0/16"}`, []string{"Network: expected a unicast network"}},
		{`{"Network":"10.3.0.0/16","EnableIPv4":"yes"}`, []string{`EnableIPv4: expected true or false, found "yes"`}},
		{`{"EnableIPv4":false}`, []string{"EnableIPv4: expected one of EnableIPv4 and EnableIPv6 to be true, found false"}},
		{
			`{` + v6 + `"Network":"10.3.0.0/16"}`,
			[]string{"IPv6Network: expected an IPv6 network such as fd00:10:244::/48, found nothing"},
		},
		{`{` + v6 + `"IPv6Network":"10.3.0.0/16"}`, []string{"IPv6Network: expected an IPv6 network"}},
		{`{` + v6 + `"IPv6Network":"::ffff:10.3.0.0/112"}`, []string{"IPv6Network: expected an IPv6 network"}},
		{`{` + v6 + `"IPv6Network":"fc00::%eth0/48"}`, []string{"IPv6Network: expected an IPv6 network"}},
		{`{` + v6 + `"IPv6Network":"fc00::/125"}`, []string{"IPv6Network: expected a prefix of at most /124"}},
		{`{` + v6 + `"IPv6Network":"::/0"}`, []string{"IPv6Network: expected a unicast network"}},
		{`{` + v6 + `"IPv6Network":"::/96"}`, []string{"IPv6Network: expected a unicast network"}},
		{`{` + v6 + `"IPv6Network":"fe80::/64"}`, []string{"IPv6Network: expected a unicast network"}},
		{`{` + v6 + `"IPv6Network":"ff02::/64"}`, []string{"IPv6Network: expected a unicast network"}},
		{
			`{` + v6 + `"IPv6Network":"fc00::/48","IPv6SubnetLen":49}`,
			[]string{"IPv6SubnetLen: expected a number from 50 to 126, found 49"},
		},
		{
			`{` + v6 + `"IPv6Network":"fc00::/48","IPv6SubnetLen":127}`,
			[]string{"IPv6SubnetLen: expected a number from 50 to 126, found 127"},
		},
		{
			`{` + v6 + `"IPv6Network":"fc00::/48","IPv6SubnetMin":"10.3.0.0"}`,
			[]string{"IPv6SubnetMin: expected the first address of a /64 inside fc00::/48"},
		},
		{
			`{` + v6 + `"IPv6Network":"fc00::/48","IPv6SubnetMin":"fc00::1"}`,
			[]string{"IPv6SubnetMin: expected the first address of a /64 inside fc00::/48"},
		},
		{
			`{` + v6 + `"IPv6Network":"fc00::/48","IPv6SubnetMax":"fc00::%eth0"}`,
			[]string{"IPv6SubnetMax: expected the first address"},
		},

		{`{"Network":"10.3.0.0/16","SubnetLen":17}`, []string{"SubnetLen: expected a number from 18 to 30, found 17"}},
		{`{"Network":"10.3.0.0/16","SubnetLen":31}`, []string{"SubnetLen: expected a number from 18 to 30, found 31"}},
		{`{"Network":"10.3.0.0/16","SubnetLen":-1}`, []string{"SubnetLen: expected a number from 18 to 30, found -1"}},
		{`{"Network":"10.3.0.0/16","SubnetLen":24.5}`, []string{"SubnetLen: expected a number from 18 to 30, found 24.5"}},
		{`{"Network":"10.3.0.0/16","SubnetLen":"24"}`, []string{`SubnetLen: expected a number from 18 to 30, found "24"`}},
		{`{"Network":"10.3.0.0/16","SubnetLen":1e400}`, []string{"SubnetLen: expected a number from 18 to 30, found 1e400"}},
		{
			`{"Network":"10.3.0.0/16","SubnetLen":18446744073709551640}`,
			[]string{"SubnetLen: expected a number from 18 to 30, found 18446744073709551640"},
		},
		{
			`{"Network":"10.3.0.0/16","SubnetMin":"10.3.1.1"}`,
			[]string{`SubnetMin: expected the first address of a /24 inside 10.3.0.0/16, found "10.3.1.1"`},
		},
		{
			`{"Network":"10.3.0.0/16","SubnetMin":"10.4.0.0"}`,
			[]string{"SubnetMin: expected the first address of a /24 inside 10.3.0.0/16"},
		},
		{
			`{"Network":"10.3.0.0/16","SubnetMax":"10.2.255.0"}`,
			[]string{"SubnetMax: expected the first address of a /24 inside 10.3.0.0/16"},
		},
		{`{"Network":"10.3.0.0/16","SubnetMax":"10.3.255.255"}`, []string{"SubnetMax: expected the first address of a /24"}},
		{`{"Network":"10.3.0.0/16","SubnetMin":"10.3.1.0/24"}`, []string{"SubnetMin: expected the first address of a /24"}},
		{
			`{"Network":"10.3.0.0/16","SubnetMin":"::ffff:10.3.1.0"}`,
			[]string{"SubnetMin: expected the first address of a /24"},
		},
		{
			`{"Network":"10.3.0.0/16","SubnetMin":"10.3.9.0","SubnetMax":"10.3.2.0"}`,
			[]string{`SubnetMax: expected an address not below SubnetMin (10.3.9.0), found "10.3.2.0"`},
		},
		{
			`{"Network":"10.3.0.0/16","SubnetMax":"10.3.0.0"}`,
			[]string{`SubnetMax: expected an address not below SubnetMin (10.3.1.0), found "10.3.0.0"`},
		},

		{`{"Network":"10.3.0.0/16","Backend":"vxlan"}`, []string{`Backend: expected a JSON object, found "vxlan"`}},
		{`{"Network":"10.3.0.0/16","Backend":[]}`, []string{"Backend: expected a JSON object, found []"}},
		{
			`{"Network":"10.3.0.0/16","Backend":{"Type":"udp"}}`,
			[]string{`Backend.Type: expected "vxlan", "host-gw" or "wireguard", found "udp"`},
		},
		{
			`{"Network":"10.3.0.0/16","Backend":{"Type":""}}`,
			[]string{`Backend.Type: expected "vxlan", "host-gw" or "wireguard", found ""`},
		},
		{`{"Network":"10.3.0.0/16","Backend":{"Type":1}}`, []string{`Backend.Type: expected "vxlan", "host-gw" or "wireguard", found 1`}},
		{
			`{"Network":"10.3.0.0/16","Backend":{"Type":"wireguard","ListenPort":51821}}`,
			[]string{"Backend.ListenPortV6: expected another port than ListenPort"},
		},
		{
			`{"Network":"10.3.0.0/16","Backend":{"Type":"wireguard","PSK":"secret","Mode":"auto"}}`,
			[]string{`Backend.PSK: expected no key that all who read the store can read`, `Backend.Mode: expected "separate"`},
		},
		{
			`{"Network":"10.3.0.0/16","Backend":{"VNI":0}}`,
			[]string{"Backend.VNI: expected a number from 1 to 16777215, found 0"},
		},
		{
			`{"Network":"10.3.0.0/16","Backend":{"VNI":16777216}}`,
			[]string{"Backend.VNI: expected a number from 1 to 16777215, found 16777216"},
		},
		{
			`{"Network":"10.3.0.0/16","Backend":{"VNI":4294967297}}`,
			[]string{"Backend.VNI: expected a number from 1 to 16777215, found 4294967297"},
		},
		{
			`{"Network":"10.3.0.0/16","Backend":{"Port":65536}}`,
			[]string{"Backend.Port: expected a number from 1 to 65535, found 65536"},
		},
		{`{"Network":"10.3.0.0/16","Backend":{"GBP":1}}`, []string{"Backend.GBP: expected true or false, found 1"}},
		{
			`{"Network":"10.3.0.0/16","Backend":{"Learning":"on"}}`,
			[]string{`Backend.Learning: expected true or false, found "on"`},
		},
		{
			`{"Network":"10.3.0.0/16","Backend":{"DirectRouting":{}}}`,
			[]string{"Backend.DirectRouting: expected true or false, found {}"},
		},
		{
			`{"Network":"10.3.0.0/16","Backend":{"MTU":575}}`,
			[]string{"Backend.MTU: expected a number from 576 to 65535, found 575"},
		},
		{
			`{` + v6 + `"IPv6Network":"fc00::/48","Backend":{"MTU":1349}}`,
			[]string{"Backend.MTU: expected a number from 1350 to 65535, found 1349"},
		},
		{
			`{` + v6 + `"IPv6Network":"fc00::/48","Backend":{"Type":"host-gw","MTU":1279}}`,
			[]string{"Backend.MTU: expected a number from 1280 to 65535, found 1279"},
		},

		{
			`{"Network":"x","EnableIPv6":true,"IPv6Network":"y","Backend":{"Type":"z","VNI":-1}}`,
			[]string{
				`Network: expected an IPv4`, `IPv6Network: expected an IPv6`, `Backend.Type: expected`,
				`Backend.VNI: expected`,
			},
		},
		{"{\"Network\":\"\u009b2J\u2028x\"}", []string{`found "\"\u009b2J\u2028x\""`}},
		{`{"Network":"` + strings.Repeat("x", 5000) + `"}`, []string{"Network: expected an IPv4 network"}},
	} {
		c, err := ParseConfig([]byte(tt.json))
		if err == nil {
			t.Errorf("ParseConfig(%.200s) = %+v, want an error with %q", tt.json, c, tt.want)
			continue
		}
		if c != (Config{}) {
			t.Errorf("ParseConfig(%.200s) = %+v with an error, want the zero Config", tt.json, c)
		}
		text := err.Error()
		for _, want := range tt.want {
			if !strings.Contains(text, want) {
				t.Errorf("ParseConfig(%.200s):\n got %q\nwant %q in it", tt.json, text, want)
			}
		}
		if n := strings.Count(text, "expected "); n != len(tt.want) {
			t.Errorf("ParseConfig(%.200s): %d faults in %q, want %d", tt.json, n, text, len(tt.want))
		}
		checkOneLine(t, err)
	}
}

// checkOneLine checks that an error can go to a terminal or a log as it is.
func checkOneLine(t *testing.T, err error) {
	t.Helper()
	if text := err.Error(); len(text) > 2000 || strings.ContainsFunc(text,
		func(r rune) bool { return !unicode.IsPrint(r) }) {
		t.Errorf("not one short printable line: %.300q", text)
	}
}

// The same bytes have to mean the same on every node, whatever the order of a map is.
func TestParseConfigIsStable(t *testing.T) {
	data := []byte(`{"network":"10.1.0.0/16","NETWORK":"10.2.0.0/16","netWork":"10.3.0.0/16","SUBNETLEN":25,"subnetlen":26}`)
	for range 200 {
		c, err := ParseConfig(data)
		if p := c.Pools.V4; err != nil || p.Network.String() != "10.3.0.0/16" || p.SubnetLen != 26 {
			t.Fatalf("got %v/%d, %v, want the last of each", p.Network, p.SubnetLen, err)
		}
	}
}

func TestParseConfigSaysAllThatIsWrong(t *testing.T) {
	_, err := ParseConfig([]byte(`{"Network":"10.3.0.0/16","SubnetLen":99,"Backend":{"Port":-1}}`))
	const want = "network config: SubnetLen: expected a number from 18 to 30, found 99; " +
		"Backend.Port: expected a number from 1 to 65535, found -1"
	if err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}

func TestUnknownKeys(t *testing.T) {
	for _, tt := range []struct {
		json string
		want []string
	}{
		{`{"Network":"10.3.0.0/16","subnetlen":24,"backend":{"type":"vxlan","Vni":1}}`, nil},
		{
			`{"NetwerkX":"10.3.0.0/16","Backend":{"VIN":1,"Type":"vxlan"},"EnableIPv6":true}`,
			[]string{"Backend.VIN", "NetwerkX"},
		},
		{`{"Backend":"vxlan","x":1}`, []string{"x"}},
		{
			`{"Network":"10.3.0.0/16","EnableNFTables":true,"Backend":{"Type":"vxlan","MacPrefix":"0E-2A","Name":"flannel.1"}}`,
			nil,
		},
		{`{"Backend":{"EnableNFTables":true},"MacPrefix":"0E-2A"}`, []string{"Backend.EnableNFTables", "MacPrefix"}},
		{`nonsense`, nil},
	} {
		got := UnknownKeys([]byte(tt.json))
		if slices.Sort(got); !slices.Equal(got, tt.want) {
			t.Errorf("UnknownKeys(%s) = %q, want %q", tt.json, got, tt.want)
		}
	}
}

// Only what means something else is a difference, each of them once.
func TestDifferences(t *testing.T) {
	const plain = `{"Network": "10.3.0.0/16"}`
	for _, x := range []struct {
		name, is, other string
		want            []Difference
	}{
		{"order, case, white space, defaults, host bits", plain, ` {"backend":{"port":8472,"TYPE":"VXLAN"},
			"SubnetMin":"10.3.1.0","subnetlen":24,"NETWORK":"10.3.9.9/16","EnableIPv6":false,"IPv6Network":"fc00::/48"}`, nil},
		{"unknown keys", plain, `{"Network":"10.3.0.0/16","EnableNFTables":true,"Comment":"x"}`, nil},
		{
			"the bounds follow from the network", plain, `{"Network":"10.4.0.0/16"}`,
			[]Difference{{"Network", "10.3.0.0/16", "10.4.0.0/16"}},
		},
		{
			"bounds of their own", plain, `{"Network":"10.3.0.0/16","SubnetMax":"10.3.9.0"}`,
			[]Difference{{"SubnetMax", "10.3.255.0", "10.3.9.0"}},
		},
		{
			"a family more", plain, `{"Network":"10.3.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48"}`,
			[]Difference{{"EnableIPv6", "false", "true"}},
		},
		{
			"several", plain, `{"Network":"10.3.0.0/16","SubnetLen":25,"Backend":{"VNI":7,"MTU":1400}}`,
			[]Difference{{"SubnetLen", "24", "25"}, {"Backend.MTU", "0", "1400"}, {"Backend.VNI", "1", "7"}},
		},
		{
			"another backend, whose keys mean nothing", plain, `{"Network":"10.3.0.0/16","Backend":{"Type":"host-gw","VNI":7}}`,
			[]Difference{{"Backend.Type", "vxlan", "host-gw"}},
		},
	} {
		is, err1 := ParseConfig([]byte(x.is))
		other, err2 := ParseConfig([]byte(x.other))
		if err1 != nil || err2 != nil {
			t.Fatal(x.name, err1, err2)
		}
		if got := is.Differences(other); !slices.Equal(got, x.want) {
			t.Errorf("%s: found %v, expected %v", x.name, got, x.want)
		}
	}
}

func TestConfigFamilies(t *testing.T) {
	dual := mustConfig(t, `{"Network":"10.3.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48"}`)
	if got := dual.Families(); !reflect.DeepEqual(got, []addr.Family{addr.IPv4, addr.IPv6}) {
		t.Errorf("Families() = %v", got)
	}
	for a, want := range map[string]bool{
		"10.3.9.9": true, "10.4.0.0": false, "fc00::1": true, "fc00:0:1::": false,
		"::ffff:10.3.9.9": false,
	} {
		if got := dual.Contains(netip.MustParseAddr(a)); got != want {
			t.Errorf("Contains(%s) = %t, want %t", a, got, want)
		}
	}
	if (Config{}).Contains(netip.MustParseAddr("10.3.9.9")) || len((Config{}).Families()) != 0 {
		t.Error("the zero config holds something")
	}
}

// FuzzParseConfig: nothing panics, an error is one printable line, and what is accepted is a pool that can be used.
func FuzzParseConfig(f *testing.F) {
	for _, s := range []string{
		`{"Network":"10.244.0.0/16"}`,
		`{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"host-gw"}}`,
		`{"Network":"10.0.0.0/8","SubnetLen":20,"SubnetMin":"10.10.0.0","SubnetMax":"10.99.0.0","Backend":{"Type":"udp","Port":7890}}`,
		`{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"4000::/2","IPv6SubnetLen":126}`,
		`{"network":null,"NETWORK":""}`, `{} {}`, `[`, "",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		_ = UnknownKeys(data)
		c, err := ParseConfig(data)
		if err != nil {
			checkOneLine(t, err)
			return
		}
		if again, err := ParseConfig(data); err != nil || again != c {
			t.Fatalf("read twice: %+v, then %+v, %v", c, again, err)
		}
		for _, fam := range c.Families() {
			p := c.Pools.Get(fam)
			first, last := p.Subnet(0), p.Subnet(p.Size()-1)
			if !p.fits(first) || !p.fits(last) || first.Addr() != p.Min || p.Size() < maxSubnets && last.Addr() != p.Max {
				t.Fatalf("%+v: from %s to %s", p, first, last)
			}
		}
		if b := c.Backend; len(c.Families()) == 0 || b.VNI == 0 || b.VNI > maxVNI || b.Port == 0 || b.Type != VXLAN &&
			b.Type != HostGW {
			t.Fatalf("accepted %+v", c)
		}
		if s := fmt.Sprintf(`{"Network":%q}`, c.Pools.V4.Network); c.Pools.V4.On() {
			if again, err := ParseConfig([]byte(s)); err != nil || again.Pools.V4.Network != c.Pools.V4.Network {
				t.Fatalf("%s: %v", s, err)
			}
		}
	})
}
