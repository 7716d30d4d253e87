package subnet

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/addr"
)

func TestParseKey(t *testing.T) {
	long := strings.Repeat("1", 500)
	for _, tt := range []struct {
		key  string
		ok   bool
		want addr.Per[netip.Prefix] // with an error: what the key still takes up
	}{
		{"10.244.5.0-24", true, per("10.244.5.0/24")},
		{"10.244.5.4-30", true, per("10.244.5.4/30")},
		{"10.244.5.4-32", true, per("10.244.5.4/32")},
		{"0.0.0.0-0", true, per("0.0.0.0/0")},
		{"fd00:10:244:5::-64", true, per("fd00:10:244:5::/64")},
		{"10.244.5.0-24&fd00:10:244:5::-64", true, per("10.244.5.0/24", "fd00:10:244:5::/64")},
		{"::-0", true, per("::/0")},

		{"", false, per()},
		{"-", false, per()},
		{"&", false, per()},
		{"config", false, per()},
		{"10.244.5.0", false, per()},
		{"10.244.5.0-", false, per()},
		{"10.244.5.0-x", false, per()},
		{"10.244.5.0-33", false, per()},
		{"10.244.5.0--1", false, per()},
		{"10.244.5.0-+24", false, per()},
		{"10.244.5.0-024", false, per()},
		{"10.244.5-24", false, per()},
		{"010.244.5.0-24", false, per()},
		{"10.244.5.0/24", false, per()},
		{"10.244.5.0-24/", false, per()},
		{" 10.244.5.0-24", false, per()},
		{"10.244.5.0-24\n", false, per()},
		{"10.244.5.7-24", false, per("10.244.5.0/24")},
		{"::ffff:10.244.5.0-120", false, per()},
		{"fd00:10:244:5::%eth0-64", false, per()},
		{"fd00:10:244:5:0:0:0:0-64", false, per("fd00:10:244:5::/64")},
		{"FD00:10:244:5::-64", false, per("fd00:10:244:5::/64")},
		{"fd00:10:244:5::1-64", false, per("fd00:10:244:5::/64")},
		{"10.244.5.0-24&", false, per("10.244.5.0/24")},
		{"&fd00:10:244:5::-64", false, per()},
		{"fd00:10:244:5::-64&10.244.5.0-24", false, per("10.244.5.0/24", "fd00:10:244:5::/64")},
		{"10.244.5.0-24&10.244.6.0-24", false, per("10.244.6.0/24")},
		{"10.244.5.0-24&nonsense-64", false, per("10.244.5.0/24")},
		{"10.244.5.0-24&fd00:10:244:5::-64&fd00:10:244:6::-64", false, per("10.244.5.0/24", "fd00:10:244:5::/64")},
		{long, false, per()},
		{"10.244.5.0-24" + long, false, per()},
	} {
		got, err := ParseKey(tt.key)
		if (err == nil) != tt.ok || got != tt.want {
			t.Errorf("ParseKey(%.80q) = %v, %v, want %v and ok = %t", tt.key, got, err, tt.want, tt.ok)
		}
		if err != nil {
			checkOneLine(t, err)
		}
	}
}

func TestKeyRoundTrip(t *testing.T) {
	r := newRand(t, 1)
	for range 20_000 {
		s := randomSubnets(r)
		if got, err := ParseKey(FormatKey(s)); err != nil || got != s {
			t.Fatalf("ParseKey(%q) = %v, %v, want %v", FormatKey(s), got, err, s)
		}
	}
}

func randomSubnets(r *rand.Rand) addr.Per[netip.Prefix] {
	var s addr.Per[netip.Prefix]
	which := r.IntN(3)
	if which != 0 {
		s.V4 = randomPrefix(r, netip.MustParsePrefix("0.0.0.0/0"), 0, 32)
	}
	if which != 1 {
		s.V6 = randomPrefix(r, netip.MustParsePrefix("2000::/3"), 0, 128)
	}
	return s
}

func TestParseValue(t *testing.T) {
	vtep := func(s string) VTEP { return VTEP{1, mac(t, s)} }
	for _, tt := range []struct {
		name, value string
		want        Attrs
	}{
		{
			"flannel",
			`{"PublicIP":"192.168.1.10","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"5e:fd:0c:11:22:33"}}`,
			Attrs{PublicIP: ips("192.168.1.10"), Backend: VXLAN, VTEP: addr.Per[VTEP]{V4: vtep("5e:fd:0c:11:22:33")}},
		},
		{
			"flannel, dual stack",
			`{"PublicIP":"192.168.1.10","PublicIPv6":"2001:db8::a","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"5e:fd:0c:11:22:33"},"BackendV6Data":{"VNI":1,"VtepMAC":"5e:fd:0c:11:22:34"}}`,
			Attrs{
				PublicIP: ips("192.168.1.10", "2001:db8::a"), Backend: VXLAN,
				VTEP: addr.Per[VTEP]{V4: vtep("5e:fd:0c:11:22:33"), V6: vtep("5e:fd:0c:11:22:34")},
			},
		},
		{
			"flannel, IPv6 alone",
			`{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::a","BackendType":"vxlan","BackendData":null,"BackendV6Data":{"VNI":1,"VtepMAC":"5e:fd:0c:11:22:34"}}`,
			Attrs{PublicIP: ips("2001:db8::a"), Backend: VXLAN, VTEP: addr.Per[VTEP]{V6: vtep("5e:fd:0c:11:22:34")}},
		},
		{
			"flannel, host-gw", `{"PublicIP":"192.168.1.10","PublicIPv6":null,"BackendType":"host-gw"}`,
			Attrs{PublicIP: ips("192.168.1.10"), Backend: HostGW},
		},
		{
			"another backend's data are not read",
			`{"PublicIP":"192.168.1.10","BackendType":"ipsec","BackendData":{"PublicKey":"x","VtepMAC":7}}`,
			Attrs{PublicIP: ips("192.168.1.10"), Backend: "ipsec"},
		},
		{
			"wireguard, as flannel writes it",
			`{"PublicIP":"192.168.1.10","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"PublicKey":"4VBpFM0bu/DhD0cAjrVYdZhjAvImJtKA4rgVSx6rcGE="}}`,
			Attrs{
				PublicIP: ips("192.168.1.10"), Backend: WireGuard,
				PublicKey: "4VBpFM0bu/DhD0cAjrVYdZhjAvImJtKA4rgVSx6rcGE=",
			},
		},
		{
			"ours",
			`{"PublicIP":"192.168.1.10","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"5e:fd:0c:11:22:33"},"NodeName":"a","NodeID":"0123","PublicIPLocal":true}`,
			Attrs{ips("192.168.1.10"), true, VXLAN, addr.Per[VTEP]{V4: vtep("5e:fd:0c:11:22:33")}, "", Identity{"a", "0123"}},
		},
		{"a reservation for a node", `{"NodeName":"a"}`, Attrs{Identity: Identity{NodeName: "a"}}},
		{"a reservation for an address", `{"PublicIP":"192.168.1.10"}`, Attrs{PublicIP: ips("192.168.1.10")}},
		{"unknown keys", `{"Comment":["the","router"]}`, Attrs{}},
		{
			"unspecified is none", `{"PublicIP":"0.0.0.0","PublicIPv6":"::","NodeName":"a"}`,
			Attrs{Identity: Identity{NodeName: "a"}},
		},
		{
			"empty strings are none",
			`{"PublicIP":"","PublicIPv6":"","BackendType":"vxlan","BackendData":{"VNI":0,"VtepMAC":""}}`,
			Attrs{Backend: VXLAN},
		},
		{
			"other notations of a MAC", `{"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"5E-FD-0C-11-22-33"}}`,
			Attrs{Backend: VXLAN, VTEP: addr.Per[VTEP]{V4: vtep("5e:fd:0c:11:22:33")}},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseValue([]byte(tt.value))
			if err != nil || got != tt.want {
				t.Errorf("ParseValue(%s)\n = %+v, %v\nwant %+v", tt.value, got, err, tt.want)
			}
		})
	}
}

func TestParseValueErrors(t *testing.T) {
	for _, tt := range []struct{ value, want string }{
		{``, "empty"},
		{" \n", "empty"},
		{`{}`, "empty"},
		{"null\n", "empty"},
		{`x`, "not a lease"},
		{`[]`, "not a lease"},
		{`"x"`, "not a lease"},
		{`{"PublicIP":"1.2.3.4"`, "not a lease"},
		{`{"PublicIP":"1.2.3.4"} x`, "not a lease"},
		{"\x00\xff", "not a lease"},
		{`{"PublicIP":1}`, "not a lease"},
		{`{"NodeName":["a"]}`, "not a lease"},
		{`{"PublicIPLocal":"yes"}`, "not a lease"},
		{`{"PublicIP":"1.2.3"}`, `PublicIP: "1.2.3" is not an IPv4 address`},
		{`{"PublicIP":"2001:db8::1"}`, "PublicIP: "},
		{`{"PublicIP":"::ffff:1.2.3.4"}`, "PublicIP: "},
		{`{"PublicIP":"1.2.3.4/24"}`, "PublicIP: "},
		{`{"PublicIPv6":"1.2.3.4"}`, "PublicIPv6: "},
		{`{"PublicIPv6":"::ffff:1.2.3.4"}`, `PublicIPv6: "::ffff:1.2.3.4" is not an IPv6 address`},
		{`{"PublicIPv6":"fe80::1%eth0"}`, "PublicIPv6: "},
		{`{"BackendType":"vxlan","BackendData":7}`, "BackendData: "},
		{`{"BackendType":"vxlan","BackendData":"x"}`, "BackendData: "},
		{`{"BackendType":"vxlan","BackendData":{"VNI":-1,"VtepMAC":"5e:fd:0c:11:22:33"}}`, "BackendData: "},
		{`{"BackendType":"vxlan","BackendData":{"VNI":4294967296,"VtepMAC":"5e:fd:0c:11:22:33"}}`, "BackendData: "},
		{`{"BackendType":"vxlan","BackendData":{"VNI":1}}`, "BackendData.VtepMAC: "},
		{`{"BackendType":"wireguard","BackendData":{"PublicKey":"x"}}`, "BackendData.PublicKey: "},
		{`{"BackendType":"wireguard","BackendV6Data":{"PublicKey":"4VBpFM0bu/DhD0cAjrVYdZhjAvImJtKA4rgVSx6rcGE=\n"}}`, "BackendV6Data.PublicKey: "},
		{`{"BackendType":"wireguard","BackendData":{"PublicKey":"4VBpFM0bu/DhD0cAjrVYdZhjAvImJtKA4rgVSx6rcGF="}}`, "BackendData.PublicKey: "},
		{`{"BackendType":"wireguard","BackendData":{"PublicKey":7}}`, "BackendData: "},
		{`{"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"5e:fd:0c:11:22"}}`, "BackendData.VtepMAC: "},
		{
			`{"BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"00:00:00:00:fe:80:00:00:00:00:00:00"}}`,
			"BackendV6Data.VtepMAC: ",
		},
		{`{"NodeName":"a\nb"}`, "NodeName: "},
		{`{"NodeName":"\u001b[2J"}`, "NodeName: "},
		{"{\"NodeName\":\"\xff\"}", "NodeName: "},
		{`{"NodeID":"\u202e"}`, "NodeID: "},
		{`{"BackendType":"\u0007"}`, "BackendType: "},
		{`{"NodeName":"` + strings.Repeat("a", 254) + `"}`, "NodeName: "},
		{`{"NodeName":"` + strings.Repeat("a", 1<<20) + `"}`, "more than 16384"},
		{"{\"PublicIP\":\"\x00\",\"PublicIPv6\":\"\\n\\n\",\"NodeName\":\"\\t\"}", "PublicIP: "},
		{"{\"PublicIP\":\"\\n\",\"PublicIPv6\":\"\\n\",\"NodeName\":\"\\t\"}", "NodeName: "},
	} {
		_, err := ParseValue([]byte(tt.value))
		if err == nil || !strings.Contains(err.Error(), tt.want) && !strings.Contains(err.Error(), "not a lease") {
			t.Errorf("ParseValue(%.80q): %v, want %q", tt.value, err, tt.want)
			continue
		}
		if blank := tt.want == "empty"; errors.Is(err, ErrBlank) != blank {
			t.Errorf("ParseValue(%.80q): %v, want ErrBlank: %t", tt.value, err, blank)
		}
		checkOneLine(t, err)
	}
}

func randomAttrs(r *rand.Rand) Attrs {
	word := func() string {
		const letters = `abz019-._<>&"\'/é世 `
		var b strings.Builder
		for range r.IntN(12) {
			rs := []rune(letters)
			b.WriteRune(rs[r.IntN(len(rs))])
		}
		return b.String()
	}
	a := Attrs{PublicIPLocal: r.IntN(2) == 0, Identity: Identity{word(), word()}}
	a.Backend = []BackendType{VXLAN, HostGW, "", WireGuard}[r.IntN(4)]
	nets := addr.Per[netip.Prefix]{V4: netip.MustParsePrefix("10.0.0.0/8"), V6: netip.MustParsePrefix("2001:db8::/32")}
	for _, f := range addr.Families() {
		if r.IntN(2) == 0 {
			a.PublicIP.Set(f, randomAddr(r, nets.Get(f)))
		}
		if a.Backend == WireGuard && a.PublicIP.Get(f).IsValid() {
			var key [publicKeySize]byte
			for i := range key {
				key[i] = byte(r.UintN(256))
			}
			a.PublicKey = PublicKey(base64.StdEncoding.EncodeToString(key[:]))
		}
		if a.Backend == VXLAN && r.IntN(2) == 0 {
			v := VTEP{VNI: r.Uint32()}
			for i := range v.MAC {
				v.MAC[i] = byte(r.UintN(256))
			}
			a.VTEP.Set(f, v)
		}
	}
	return a
}

func TestValueRoundTrip(t *testing.T) {
	r := newRand(t, 2)
	for range 20_000 {
		a := randomAttrs(r)
		v := FormatValue(a)
		got, err := ParseValue(v)
		if a == (Attrs{}) && errors.Is(err, ErrBlank) {
			continue
		}
		if err != nil || got != a {
			t.Fatalf("ParseValue(%s)\n = %+v, %v\nwant %+v", v, got, err, a)
		}
	}
}

// What goes into the store is flannel's layout, byte for byte the same for the same lease.
func TestFormatValue(t *testing.T) {
	a := Attrs{
		ips("192.168.1.10", "2001:db8::a"), true, VXLAN,
		addr.Per[VTEP]{V4: VTEP{1, mac(t, "5e:fd:0c:11:22:33")}, V6: VTEP{1, mac(t, "5e:fd:0c:11:22:34")}},
		"",
		Identity{"a", "0123"},
	}
	want := `{"PublicIP":"192.168.1.10","PublicIPv6":"2001:db8::a","BackendType":"vxlan",` +
		`"BackendData":{"VNI":1,"VtepMAC":"5e:fd:0c:11:22:33"},"BackendV6Data":{"VNI":1,"VtepMAC":"5e:fd:0c:11:22:34"},` +
		`"NodeName":"a","NodeID":"0123","PublicIPLocal":true}`
	if got := string(FormatValue(a)); got != want {
		t.Errorf("FormatValue:\n got %s\nwant %s", got, want)
	}
	if got := string(FormatValue(Attrs{})); got != "{}" {
		t.Errorf("FormatValue of nothing = %s, want {}", got)
	}
}

func TestParseEntry(t *testing.T) {
	const good = `{"PublicIP":"192.168.1.10","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"5e:fd:0c:11:22:33"}}`
	for _, tt := range []struct {
		name, key, value  string
		lease             int64
		ok, reserved, blk bool
	}{
		{"a lease", "10.244.5.0-24", good, 7, true, false, false},
		{"a reservation with a value", "10.244.5.0-24", good, 0, true, true, false},
		{"a reservation for a name", "10.244.5.0-24", `{"NodeName":"a"}`, 0, true, true, true},
		{"blank reservations", "10.244.5.0-24", "", 0, true, true, true},
		{"blank reservations", "10.244.5.0-24", "{}", 0, true, true, true},
		{"blank reservations", "10.244.5.0-24", "null", 0, true, true, true},
		{"blank reservations", "10.244.5.0-24", `{ }`, 0, true, true, true},
		{"a reservation with a comment", "10.244.5.0-24", `{"Comment":"router"}`, 0, true, true, true},
		{"an empty lease", "10.244.5.0-24", "", 7, false, false, false},
		{"a broken lease", "10.244.5.0-24", "{", 7, false, false, false},
		{"a broken reservation", "10.244.5.0-24", "router", 0, false, true, false},
		{"host bits", "10.244.5.9-24", good, 7, false, false, false},
		{"host bits, reserved, blank", "10.244.5.9-24", "", 0, false, true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := ParseEntry(tt.key, []byte(tt.value), 12, 11, tt.lease)
			if (e.Err == nil) != tt.ok || e.Reserved() != tt.reserved || e.Blank() != tt.blk {
				t.Errorf("got %+v", e)
			}
			if e.Key != tt.key || e.Revision != 12 || e.Created != 11 || e.LeaseID != tt.lease {
				t.Errorf("key, revisions or lease: %+v", e)
			}
			if e.Subnets != per("10.244.5.0/24") {
				t.Errorf("takes up %v, want it to block 10.244.5.0/24 whatever its value", e.Subnets)
			}
		})
	}
}

func TestGatewayAndName(t *testing.T) {
	l := Lease{Subnets: per("10.244.5.0/24", "fd00::/64")}
	if l.Gateway(addr.IPv4).String() != "10.244.5.0" || l.Gateway(addr.IPv6).String() != "fd00::" ||
		l.Name() != "10.244.5.0-24&fd00::-64" {
		t.Errorf("got %v, %v, %q", l.Gateway(addr.IPv4), l.Gateway(addr.IPv6), l.Name())
	}
	if l.NodeName = "a"; l.Name() != "a" {
		t.Errorf("Name() = %q", l.Name())
	}
}

var (
	keySeeds = []string{
		"10.244.5.0-24", "10.244.5.0-24&fd00:10:244:5::-64", "fd00:10:244:5::-64", "10.244.5.1-24", "::ffff:1.2.3.0-120",
		"a&b&c-1", "-", "",
		"10.244.5.0-24&10.244.6.0-24", "FD00::-64", "fd00::%1-64",
	}
	valueSeeds = []string{
		`{"PublicIP":"192.168.1.10","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"5e:fd:0c:11:22:33"}}`,
		`{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::a","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"5e:fd:0c:11:22:34"}}`,
		`{"PublicIP":"192.168.1.10","BackendType":"host-gw","NodeName":"a","NodeID":"0123","PublicIPLocal":true}`,
		`{"NodeName":"a"}`, `{}`, `null`, ``, `[]`, `{"PublicIPv6":"fe80::1%eth0"}`,
		`{"BackendType":"vxlan","BackendData":{"VNI":4294967295,"VtepMAC":"0000.5e00.5301"}}`,
	}
)

func FuzzParseKey(f *testing.F) {
	for _, k := range keySeeds {
		f.Add(k)
	}
	f.Fuzz(func(t *testing.T, key string) {
		s, err := ParseKey(key)
		for _, fam := range addr.Families() {
			if p := s.Get(fam); p.IsValid() && (addr.FamilyOf(p.Addr()) != fam || p != p.Masked()) {
				t.Fatalf("ParseKey(%q) = %v", key, s)
			}
		}
		if err != nil {
			checkOneLine(t, err)
			return
		}
		if got := FormatKey(s); got != key {
			t.Fatalf("FormatKey(ParseKey(%q)) = %q", key, got)
		}
	})
}

func FuzzParseValue(f *testing.F) {
	for _, v := range valueSeeds {
		f.Add([]byte(v))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		a, err := ParseValue(value)
		if err != nil {
			checkOneLine(t, err)
			return
		}
		out := FormatValue(a)
		if !json.Valid(out) {
			t.Fatalf("FormatValue(%+v) = %s", a, out)
		}
		again, err := ParseValue(out)
		if again != a || err != nil && (a != (Attrs{}) || !errors.Is(err, ErrBlank)) {
			t.Fatalf("ParseValue(%s)\n = %+v, %v\nwant %+v", out, again, err, a)
		}
	})
}

// FuzzParseEntry: whatever is in the store, a node that is not concerned reads it and leases a subnet beside it.
func FuzzParseEntry(f *testing.F) {
	for i, k := range keySeeds {
		f.Add(k, []byte(valueSeeds[i%len(valueSeeds)]), int64(i%2))
	}
	c := mustConfig(f, `{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48"}`)
	claim := Claim{Attrs: Attrs{PublicIP: ips("192.168.99.1", "2001:db8::99"), Identity: Identity{"me", "my-id"}}}
	f.Fuzz(func(t *testing.T, key string, value []byte, leaseID int64) {
		e := ParseEntry(key, value, 3, 2, leaseID)
		if e.Blank() && (e.Err != nil || leaseID != 0) {
			t.Fatalf("blank: %+v", e)
		}
		if e.Err == nil && FormatKey(e.Subnets) != key {
			t.Fatalf("accepted the key %q", key)
		}
		table := Table{Revision: 3, ConfigRevision: 1, Config: c, Entries: []*Entry{e}}
		self := Lease{Subnets: per("10.244.9.0/24", "fd00:10:244:9::/64"), Attrs: claim.Attrs}
		peers, rejected := table.Peers(c, self)
		if len(peers)+len(rejected) > 1 {
			t.Fatalf("one entry became %v and %v", peers, rejected)
		}
		for _, r := range rejected {
			checkOneLine(t, errors.New(r.Reason))
		}
		d, err := Decide(table, claim, 0)
		var full *PoolFullError
		var conflict *ConflictError
		switch {
		case errors.As(err, &full), errors.As(err, &conflict):
			checkOneLine(t, err)
		case err != nil:
			t.Fatal(err)
		case d.Expect == 0 && d.Lease.overlaps(&e.Lease):
			t.Fatalf("chose %s beside %q", d.Key, key)
		}
	})
}
