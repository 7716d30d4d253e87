package bench

import (
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/overlayd/overlayd/test/lab"
	"github.com/overlayd/overlayd/test/nstest"
)

// Both kinds of exchange go through a real server, in both families, and a client that finds none says so.
func TestExchange(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	for _, host := range []string{"127.0.0.1", "::1"} {
		at := netip.AddrPortFrom(netip.MustParseAddr(host), endPort)
		run := func(x exchange, times int) (took time.Duration, err error) {
			ns.Do(func() { took, err = x.run(at, times) })
			return took, err
		}
		if _, err := run(newConnection, 1); err == nil {
			t.Fatalf("somebody is at %s already", at)
		}
		go ns.Do(func() { _ = serveEnd(at) })
		for _, x := range []exchange{newConnection, oneConnection} {
			err := patiently(t.Context(), func() error {
				took, err := run(x, 10)
				if err == nil && took <= 0 {
					t.Errorf("%s: 10 times at %s took %v", x, at, took)
				}
				return err
			})
			if err != nil {
				t.Errorf("%s at %s: %v", x, at, err)
			}
		}
	}
}

func TestEndArguments(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{nil, {endServer, "127.0.0.1:1"}, {endServer, "here", "0"}, {endServer, "127.0.0.1:1", "one"}} {
		if EndMain(t.Context(), args) == nil {
			t.Errorf("%q is taken for an end", args)
		}
	}
}

func TestParseIperf(t *testing.T) {
	t.Parallel()
	for report, want := range map[string]float64{
		`{"end": {"sum_sent": {"bits_per_second": 9e9}, "sum_received": {"bits_per_second": 8.5e9}}}`: 8.5,
		`{"start": {}, "end": {}, "error": "unable to connect to server: Connection refused"}`:        0,
		`iperf3: error`: 0,
	} {
		got, err := parseIperf(report)
		if got != want || (err == nil) != (want > 0) {
			t.Errorf("%s: %v, %v", report, got, err)
		}
	}
}

// What is typed by hand has no word left that nobody replaced, and is the mirror image on the other node.
func TestHandWork(t *testing.T) {
	t.Parallel()
	one := lab.Lease{Subnets: []netip.Prefix{netip.MustParsePrefix("10.244.5.0/24")}, Underlay: []netip.Addr{netip.MustParseAddr("172.31.1.11")}}
	two := lab.Lease{Subnets: []netip.Prefix{netip.MustParsePrefix("10.244.9.0/24")}, Underlay: []netip.Addr{netip.MustParseAddr("172.31.1.12")}}
	text := func(own, peer lab.Lease) string {
		return handVars(own, peer, 1450).Replace(strings.Join(handWork(), "\n"))
	}
	for _, want := range []string{
		"address 02:00:ac:1f:01:0b mtu 1450 type vxlan id 1 local 172.31.1.11 dev eth0", "add 10.244.5.0/32 dev",
		"route add 10.244.9.0/24 via 10.244.9.0 ", "neigh add 10.244.9.0 lladdr 02:00:ac:1f:01:0c ", "fdb add 02:00:ac:1f:01:0c dst 172.31.1.12 ",
	} {
		if !strings.Contains(text(one, two), want) {
			t.Errorf("no %q in\n%s", want, text(one, two))
		}
	}
	if left := regexp.MustCompile(`[A-Z]{3,}`).FindString(text(two, one)); left != "" {
		t.Errorf("%s is left in\n%s", left, text(two, one))
	}
}

// Every lab can be made, under a name of its own, and every row has samples from a path that one of them is.
func TestPathRows(t *testing.T) {
	t.Parallel()
	paths, names := []string{rawUnderlay}, map[string]bool{}
	for _, l := range pathLabs(&Env{}) {
		o, err := l.options.Defaults()
		if err == nil {
			err = o.Validate()
		}
		if err != nil || names[o.Name] {
			t.Errorf("%s: %v", o.Name, err)
		}
		names[o.Name] = true
		paths = append(paths, l.name)
	}
	samples, judged := pathSamples{}, 0
	for _, tr := range traffics() {
		for _, p := range paths {
			samples[onPath{tr.name, p}] = []float64{1, 2, 3}
		}
	}
	for _, r := range samples.rows() {
		if len(r.Ours) != 3 || len(r.Base) != 3 {
			t.Errorf("%s beside %s has no samples", r.Name, r.BaseName)
		}
		if r.Bound != (Bound{}) {
			judged++
			if !r.OK() || !strings.Contains(r.Note, "3 samples each; half of them within ±50 %") {
				t.Errorf("%s: ok %v, %s", r.Name, r.OK(), r.Note)
			}
		}
	}
	if want := 3 * len(traffics()); judged != want {
		t.Errorf("%d rows are judged, want %d", judged, want)
	}
}
