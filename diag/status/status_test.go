package status

import (
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the texts down as they are now")

func node() Node {
	at := func(s string) time.Time {
		t, err := time.Parse(time.RFC3339, s)
		if err != nil {
			panic(err)
		}
		return t
	}
	return Node{
		Name:    "n1",
		ID:      "dc1cef41719e",
		Version: "v1.0.0",
		Started: at("2026-01-01T00:00:00Z"),
		Now:     at("2026-01-01T01:02:03Z"),
		Ready:   true,
		Lease: Lease{
			Subnets: []string{"10.244.5.0/24", "fd00:10:244:5::/64"},
			Expires: at("2026-01-02T00:00:00Z"),
			Held:    true,
		},
		Store: Store{
			Kind: Etcd, Name: "etcd", Endpoints: []string{"http://192.0.2.9:2379"}, Prefix: "/overlayd/network",
			Revision: 42, Entries: 4,
		},
		Network: Network{
			Networks: []string{"10.244.0.0/16", "fd00:10:244::/48"},
			Backend:  "vxlan",
			MTU:      1430,
			Pools:    []Pool{{"10.244.0.0/16", 256, 4}, {"fd00:10:244::/48", 65536, 4}},
		},
		Interface: Interface{
			Reason:        "IPv4: 192.0.2.1 on eth0 (it has the default route, metric 0)",
			PublicIPs:     []string{"192.0.2.1"},
			PublicIPLocal: true,
		},
		Devices: []Device{
			{
				Name:     "overlay.1",
				MAC:      "02:00:00:00:00:01",
				MTU:      1450,
				VNI:      1,
				Port:     8472,
				Local:    "192.0.2.1",
				Underlay: "eth0",
				Offloads: map[string]bool{"gro": true, "tx": true},
			},
		},
		Peers:    PeerCounts{Total: 3, Tunnel: 2, Direct: 1},
		Firewall: Firewall{Kind: "iptables-nft", Reason: "kube-proxy uses it", Checked: at("2026-01-01T01:02:00Z"), Runs: 3},
		Entries:  []KindCount{{"address", 2}, {"device", 2}, {"fdb", 2}, {"neighbour", 2}, {"route", 5}, {"rule", 0}},
		Probe: Probe{
			On:        true,
			Targets:   3,
			Answer:    3,
			Size:      1430,
			Round:     10 * time.Second,
			MedianRTT: 123456 * time.Nanosecond,
		},
		Reconcile: Reconcile{
			Last:     at("2026-01-01T01:02:02.5Z"),
			Took:     1234567 * time.Nanosecond,
			Rounds:   9,
			Resynced: at("2026-01-01T01:01:33Z"),
		},
	}
}

func TestTexts(t *testing.T) {
	t.Parallel()
	bad := node()
	bad.Ready = false
	bad.Problems = []Problem{
		{Name: "kernel", Reason: "add route 10.244.9.0/24: no such device", Since: bad.Started, Fatal: true},
		{Name: "store", Reason: "etcd: connection refused", Since: bad.Now.Add(-90 * time.Second)},
	}
	bad.Store.Error, bad.Store.Since, bad.Lease.Held = "connection refused", bad.Now.Add(-90*time.Second), false
	bad.Peers = PeerCounts{Total: 3, Tunnel: 1, Unreachable: 2, Rejected: 1, Lingering: 1}
	bad.Drift = []DriftKind{
		{"fdb", 1, "add fdb", bad.Now.Add(-time.Hour)},
		{"route", 12, "add route 10.244.7.0/24", bad.Now.Add(-time.Second)},
	}
	bad.Probe = Probe{
		On:        true,
		Targets:   4,
		Answer:    1,
		Lossy:     1,
		SmallOnly: 1,
		Silent:    1,
		Size:      1430,
		Round:     10 * time.Second,
		MedianRTT: 12 * time.Millisecond,
	}
	bad.Devices = slices.Clone(bad.Devices)
	bad.Devices[0].Offloads = map[string]bool{"gro": true, "tx": false}
	bad.Store.Losses, bad.Store.LostAt = 1, bad.Now.Add(-time.Hour)
	bad.Lease.Losses, bad.Lease.LostAt = 2, bad.Now.Add(-time.Minute)
	bad.Restart = []string{"new binary: /usr/local/bin/overlayd was replaced"}
	bad.Interface.PublicIPLocal, bad.Reconcile.Failures = false, 1
	peers := []Peer{
		{
			Name:     "n2",
			ID:       "id2",
			Subnet:   "10.244.7.0/24",
			PublicIP: "192.0.2.2",
			Path:     "tunnel",
			MAC:      "02:00:00:00:00:02",
			Entries:  []string{"fdb a", "route b"},
			Probe: &PeerProbe{
				Address: "10.244.7.0",
				Verdict: SmallOnly,
				Small:   Pings{8, 0, 250 * time.Microsecond},
				Full:    Pings{8, 2, 0},
				Last:    bad.Now,
			},
		},
		{
			Subnet:   "10.244.8.0/24",
			PublicIP: "192.0.2.3",
			Path:     "unreachable",
			Reason:   "its public IP is configured on this node",
		},
		{
			Name:     "n4",
			Subnet:   "10.244.9.0/24",
			PublicIP: "192.0.2.4",
			Path:     "direct",
			Leaving:  true,
			Probe:    &PeerProbe{Verdict: Answers, Small: Pings{Sent: 1, RTT: time.Millisecond}},
		},
	}
	for name, print := range map[string]func(b *strings.Builder) error{
		"ready":  func(b *strings.Builder) error { return node().Print(b, Style{}) },
		"bad":    func(b *strings.Builder) error { return bad.Print(b, Style{}) },
		"colour": func(b *strings.Builder) error { return bad.Print(b, Style{Colour: true}) },
		"kubernetes": func(b *strings.Builder) error {
			n := node()
			n.Store = Store{
				Kind: Kubernetes, Name: "the Kubernetes API", Endpoints: []string{"https://10.96.0.1:443"},
				ConfigMap: "kube-system/overlayd", Revision: 42, Entries: 4,
			}
			n.Lease = Lease{Subnets: n.Lease.Subnets, Reserved: true, Losses: 1, LostAt: n.Now.Add(-time.Minute)}
			return n.Print(b, Style{})
		},
		"starting": func(b *strings.Builder) error { return Node{Name: "n1", ID: "x", Now: node().Now}.Print(b, Style{}) },
		"peers":    func(b *strings.Builder) error { return PrintPeers(b, peers, Style{}) },
		"peer":     func(b *strings.Builder) error { return PrintPeer(b, peers[0], Style{}) },
	} {
		t.Run(name, func(t *testing.T) {
			var b strings.Builder
			if err := print(&b); err != nil {
				t.Fatal(err)
			}
			file := filepath.Join("testdata", name+".txt")
			if *update {
				if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil || string(want) != b.String() {
				t.Errorf("%v; got\n%s\nwant\n%s", err, b.String(), want)
			}
		})
	}
	if node().ExitCode() != 0 || bad.ExitCode() != 1 {
		t.Error("exit codes")
	}
}

func TestShort(t *testing.T) {
	t.Parallel()
	for d, want := range map[time.Duration]string{
		0: "", 310123 * time.Nanosecond: "310µs", 12345 * time.Microsecond: "12.3ms", 2 * time.Second: "2s",
	} {
		if got := Short(d); got != want {
			t.Errorf("%v: %s", d, got)
		}
	}
	for in, want := range map[string]string{"abc": "abc", "abcde": "abcd…", "abcö": "abc…", "\xff\xff\xff\xff\xff": "…"} {
		if got := Shorten(in, 4); got != want {
			t.Errorf("%q: %q", in, got)
		}
	}
	now := time.Unix(1e9, 0)
	for d, want := range map[time.Duration]string{
		1234567 * time.Nanosecond: "1ms", 17812 * time.Millisecond: "17.8s", 25 * time.Hour: "25h0m0s",
		74 * time.Hour: "3 days",
	} {
		if got := Ago(now, now.Add(-d)); got != want {
			t.Errorf("%v: %s", d, got)
		}
	}
}
