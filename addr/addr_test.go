package addr

import (
	"net/netip"
	"testing"
)

func TestLast(t *testing.T) {
	for in, want := range map[string]string{
		"10.244.0.0/16": "10.244.255.255", "10.1.2.3/32": "10.1.2.3", "10.1.2.0/23": "10.1.3.255",
		"fd00::/62": "fd00::3:ffff:ffff:ffff:ffff", "0.0.0.0/0": "255.255.255.255",
	} {
		if got := Last(netip.MustParsePrefix(in)); got.String() != want {
			t.Errorf("Last(%s) = %s, want %s", in, got, want)
		}
	}
}

func TestParseMAC(t *testing.T) {
	m, err := ParseMAC("52:54:00:12:34:56")
	if err != nil || m.String() != "52:54:00:12:34:56" || m.IsGroup() || m.IsZero() {
		t.Errorf("ParseMAC: %v, %v", m, err)
	}
	for _, bad := range []string{"", "1:2:3:4:5:6", "00:00:00:00:fe:80:00:00", "zz:00:00:00:00:00"} {
		if m, err := ParseMAC(bad); err == nil {
			t.Errorf("ParseMAC(%q) = %v, want an error", bad, m)
		}
	}
	if !(MAC{1}).IsGroup() || (MAC{2}).IsGroup() || (MAC{0, 1}).Compare(MAC{0, 2}) >= 0 {
		t.Error("group bit or order is wrong")
	}
}

func TestPer(t *testing.T) {
	var p Per[int]
	for i, f := range Families() {
		p.Set(f, i+1)
	}
	if p != (Per[int]{V4: 1, V6: 2}) || p.Get(IPv6) != 2 || FamilyOf(netip.MustParseAddr("::ffff:1.2.3.4")) != IPv6 {
		t.Errorf("got %v", p)
	}
}
