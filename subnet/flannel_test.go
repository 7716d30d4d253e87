package subnet

import (
	"slices"
	"testing"
)

func TestHarmsFlannel(t *testing.T) {
	t.Parallel()
	flannel := `{"PublicIP":"192.0.2.9","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,` +
		`"VtepMAC":"02:00:00:00:00:09"}}`
	ours := `{"PublicIP":"192.0.2.8","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:08"},` +
		`"NodeName":"n8","NodeID":"id8"}`
	for name, tt := range map[string]struct {
		values []string
		want   []string
	}{
		"empty":                  {[]string{"", flannel}, []string{"0"}},
		"blanks and nonsense":    {[]string{" ", "{", "x", flannel}, []string{"0", "1", "2"}},
		"JSON":                   {[]string{"{}", "null", `{"NodeName":"beta"}`, `{"PublicIP":"192.0.2.7"}`, flannel}, nil},
		"flannel with host-gw":   {[]string{"", `{"PublicIP":"192.0.2.9","BackendType":"host-gw"}`}, []string{"0"}},
		"no flannel":             {[]string{"", "{", ours}, nil},
		"a reservation by IP":    {[]string{"", `{"PublicIP":"192.0.2.7"}`}, nil},
		"no entries":             {nil, nil},
		"flannel's, and nothing": {[]string{flannel, ours}, nil},
	} {
		var tab Table
		for i, v := range tt.values {
			e := ParseEntry("10.244."+string(rune('0'+i))+".0-24", []byte(v), 1, 1, 0)
			tab.Entries = append(tab.Entries, e)
		}
		var got []string
		for _, e := range tab.HarmsFlannel() {
			got = append(got, e.Key[len("10.244."):len("10.244.0")])
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}
