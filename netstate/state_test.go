package netstate

import (
	"fmt"
	"net/netip"
	"reflect"
	"testing"
)

// TestMetricsAreSpread: the routes of a network share no metric much oftener than chance has it.
func TestMetricsAreSpread(t *testing.T) {
	t.Parallel()
	for name, prefix := range map[string]func(i int) string{
		"/24 after /24":      func(i int) string { return fmt.Sprintf("10.%d.%d.0/24", i>>8, i&255) },
		"/16 after /16":      func(i int) string { return fmt.Sprintf("%d.%d.0.0/16", 1+i>>8, i&255) },
		"host after host":    func(i int) string { return fmt.Sprintf("172.16.%d.%d/32", i>>8, i&255) },
		"/64 after /64":      func(i int) string { return fmt.Sprintf("fd00:10:244:%x::/64", i) },
		"v6 host after host": func(i int) string { return fmt.Sprintf("2001:db8::%x/128", i) },
	} {
		const n = 5000
		count := map[uint32]int{}
		most := 0
		for i := range n {
			m := Metric(netip.MustParsePrefix(prefix(i)))
			if m < 1 || m > 1023 {
				t.Fatalf("%s: metric %d", prefix(i), m)
			}
			count[m]++
			most = max(most, count[m])
		}
		if most > 5*n/1023 || len(count) < 900 {
			t.Errorf("%s: %d metrics in use, one of them %d times", name, len(count), most)
		}
	}
	a := netip.MustParsePrefix("10.244.2.0/24")
	if Metric(a) != 954 { // another one would make every route of a running node anew
		t.Errorf("the metric of %s has changed to %d", a, Metric(a))
	}
}

func TestMergeIsInOrder(t *testing.T) {
	t.Parallel()
	want := fullState()
	var parts []State
	for _, o := range objects(want) {
		parts = append([]State{stateOf([]Object{o})}, parts...)
	}
	if got := merge(parts...); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
