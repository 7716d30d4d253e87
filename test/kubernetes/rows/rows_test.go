package rows

import (
	"context"
	"errors"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// A table that can't turn red proves nothing.
func TestWhatFailsARow(t *testing.T) {
	t.Parallel()
	broken := errors.New("one\ntwo\nthree\nfour\nfive\nsix\nseven\neight")
	for name, c := range map[string]struct {
		lost   int
		err    error
		failed bool
		says   string
	}{
		"nothing is counted":  {lost: none, says: " -  ok"},
		"no packet was lost":  {lost: 0, says: " 0  ok"},
		"a packet was lost":   {lost: 1, failed: true, says: " 1  FAILED: 1 packets were lost"},
		"an error":            {lost: none, err: errors.New("refused"), failed: true, says: " -  FAILED: refused"},
		"an error and a loss": {lost: 2, err: errors.New("refused"), failed: true, says: " 2  FAILED: refused"},
		"a long error":        {lost: none, err: broken, failed: true, says: "six\n        and 2 lines more"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var out strings.Builder
			s := &Suite{Out: &out}
			s.run(t.Context(), name, func(context.Context) (int, error) { return c.lost, c.err })
			if failed := slices.Equal(s.Failed(), []string{name}); failed != c.failed {
				t.Errorf("failed rows: %q", s.Failed())
			}
			if !strings.Contains(out.String(), c.says) {
				t.Errorf("printed %q, which lacks %q", out.String(), c.says)
			}
		})
	}
}

// A busy machine turns no row red.
func TestATimeIsRecorded(t *testing.T) {
	t.Parallel()
	for took, says := range map[time.Duration]string{
		14 * time.Second: "14.0     -  ok", 16 * time.Second: "16.0     -  slow: 15 s expected",
	} {
		var out strings.Builder
		s := &Suite{Out: &out}
		s.timed("to Ready", took, 15*time.Second)
		if !strings.Contains(out.String(), says) || len(s.Failed()) > 0 {
			t.Errorf("printed %q, which lacks %q; failed: %q", out.String(), says, s.Failed())
		}
	}
}

func TestRowsOfOneStore(t *testing.T) {
	t.Parallel()
	var ran []string
	s := &Suite{Out: &strings.Builder{}, Store: Kubernetes}
	for _, store := range []string{"", Etcd, Kubernetes} {
		s.change(t.Context(), change{name: "about " + store, store: store, quiet: true, do: func(context.Context) error {
			ran = append(ran, store)
			return nil
		}})
	}
	if want := []string{"", Kubernetes}; !slices.Equal(ran, want) {
		t.Errorf("ran those about %q, not %q", ran, want)
	}
}

func TestARowThatIsInterruptedProvesNothing(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	s := &Suite{Out: &out}
	ctx, cancel := context.WithCancel(t.Context())
	s.run(ctx, "a row", func(context.Context) (int, error) {
		cancel()
		return 0, nil
	})
	if err := s.must(ctx, "another", func(context.Context) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("must: %v", err)
	}
	if out.Len() > 0 || len(s.results) > 0 {
		t.Errorf("printed %q", out.String())
	}
}

func TestOnlySomeRows(t *testing.T) {
	t.Parallel()
	var ran []string
	s := &Suite{Out: &strings.Builder{}, Only: regexp.MustCompile("DNS")}
	row := func(name string) func(context.Context) (int, error) {
		return func(context.Context) (int, error) {
			ran = append(ran, name)
			return none, nil
		}
	}
	s.run(t.Context(), "egress", row("egress"))
	s.run(t.Context(), "DNS over UDP", row("DNS"))
	if err := s.must(t.Context(), "pods are there", func(context.Context) error {
		ran = append(ran, "pods")
		return nil
	}); err != nil {
		t.Error(err)
	}
	if want := []string{"DNS", "pods"}; !slices.Equal(ran, want) || !s.Asked() {
		t.Errorf("ran %q, not %q; %v", ran, want, s.Asked())
	}
	other := &Suite{Out: &strings.Builder{}, Only: regexp.MustCompile("misspelt")}
	other.run(t.Context(), "egress", row("egress"))
	if err := other.must(t.Context(), "pods are there", func(context.Context) error { return nil }); err != nil ||
		other.Asked() {
		t.Errorf("%v; a row was asked for: %v", err, other.Asked())
	}
	if err := s.must(t.Context(), "nodes are there",
		func(context.Context) error { return errors.New("no") }); err == nil || len(s.Failed()) != 1 {
		t.Errorf("must: %v, failed: %q", err, s.Failed())
	}
}

func TestParse(t *testing.T) {
	t.Parallel()
	want := []answer{{"web-1", "10.244.1.2", "10.244.1.2"}, {"web-2", "10.244.1.2", "10.244.1.2"}}
	if got, err := parse("web-1 10.244.1.2 10.244.1.2\nweb-2 10.244.1.2 10.244.1.2", 2); err != nil ||
		!slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	for _, text := range []string{"", "web-1", "a b c d", "a b c\nd e f"} {
		if a, err := parse(text, 1); err == nil {
			t.Errorf("%q: %v", text, a)
		}
	}
	if sent, lost, err := parsePing("sent 20 lost 3"); err != nil || sent != 20 || lost != 3 {
		t.Errorf("%d, %d, %v", sent, lost, err)
	}
	if _, _, err := parsePing("no route to host"); err == nil {
		t.Error("expected an error")
	}
}

// What stays on a node is what the documentation names, and nothing that looks like it.
func TestMayStay(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]bool{
		"file /run/overlayd": true, "file /run/overlayd/subnet.env": false, "file /opt/cni/bin": true,
		"file /opt/cni/bin/bridge":               false,
		"iptables-nft-save :CNI-HOSTPORT-DNAT -": true, "iptables-nft-save -A CNI-DN-0123 -p tcp": false,
		"iptables-legacy-save :CNI-HOSTPORT-DNAT -": false,
		"net.ipv4.ip_forward = 1":                   true, "net.ipv4.conf.all.rp_filter = 0": false, "link cni0": false,
		"nft table inet overlayd":    false,
		"file /var/lib/cni/networks": true, "file /var/lib/cni/networks/overlayd": false,
	} {
		if got := mayStay().MatchString(line); got != want {
			t.Errorf("%q: %v", line, got)
		}
	}
	got := lines("route local 172.30.0.11 dev eth0  \nroute local 172.30.0.110 dev eth0\n\nrule from fe80::1:2 x\niptables-nft-save -A FORWARD -j KUBE-FORWARD\n", "172.30.0.11")
	want := map[string]bool{
		"route local OWN dev eth0": true, "route local 172.30.0.110 dev eth0": true,
		"rule from LINK-LOCAL x": true,
	}
	if !maps.Equal(got, want) {
		t.Errorf("%v", got)
	}
}

// A node may differ from its state before in nothing but what the documentation names: neither by what it has, nor by
// what it lacks.
func TestChanged(t *testing.T) {
	t.Parallel()
	const n1, n2 = "link lo\nroute default\nlink n1only\nnet.ipv4.ip_forward = 0",
		"link lo\nroute default\nnet.ipv4.ip_forward = 0"
	var b before
	b.add(lines(n1))
	b.add(lines(n2))
	for state, want := range map[string][]string{
		n1: nil,
		n2: nil,
		"link lo\nroute default\nnet.ipv4.ip_forward = 1": nil,
		n2 + "\nlink cni0":                 {"left behind: link cni0"},
		"link lo\nnet.ipv4.ip_forward = 0": {"taken away: route default"},
	} {
		if got := b.changed(lines(state)); !slices.Equal(got, want) {
			t.Errorf("%q: %q, not %q", state, got, want)
		}
	}
}

// Who answers matters as much as that somebody does.
func TestFrom(t *testing.T) {
	t.Parallel()
	if err := (answer{"web-1", "10.244.1.2", "10.244.1.2"}).from("web-1"); err != nil {
		t.Error(err)
	}
	for _, a := range []answer{{"web-2", "10.244.1.2", "10.244.1.2"}, {"web-1", "172.30.0.11", "10.244.1.2"}} {
		if err := a.from("web-1"); err == nil {
			t.Errorf("%v: expected an error", a)
		}
	}
}
