package page

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/overlayd/overlayd/diag/status"
)

// fake is a Source whose answers a test sets.
type fake struct {
	mu    sync.Mutex
	node  status.Node
	peers []status.Peer
	err   error
	asked int
}

func (f *fake) Status(context.Context) (status.Node, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	return f.node, f.err
}

func (f *fake) Peers(context.Context) ([]status.Peer, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.peers), f.err
}

// change changes the answers, and as the real ones do, a revision with them.
func (f *fake) change(how func(f *fake)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	how(f)
	f.node.Store.Revision++
}

func (f *fake) questions() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.asked
}

// then is when the tests take place.
func then() time.Time { return time.Date(2026, 3, 4, 14, 5, 22, 0, time.UTC) }

// network makes a node with so many peers; most of them are well.
func network(n int) *fake {
	now := then()
	r := rand.New(rand.NewPCG(1, uint64(n)))
	f := &fake{node: healthyNode(now)}
	p := &f.node.Probe
	for i := range n {
		peer := status.Peer{
			Name: fmt.Sprintf(
				"worker-%04d.example.net",
				i+1,
			),
			ID:     fmt.Sprintf("%032x", 0xdc1cef41719e+i*0x10001),
			Subnet: fmt.Sprintf("10.%d.%d.0/24", 64+i/256, i%256),
			PublicIP: fmt.Sprintf(
				"192.0.%d.%d",
				2+i/250,
				1+i%250,
			),
			Path: "tunnel",
			MAC:  fmt.Sprintf("02:42:00:00:%02x:%02x", i/256, i%256),
		}
		if i%10 == 3 {
			peer.Path = "direct"
		}
		probe := &status.PeerProbe{
			Address: fmt.Sprintf("10.%d.%d.0", 64+i/256, i%256),
			Verdict: status.Answers,
			Last:    now.Add(-time.Duration(r.IntN(400)) * time.Second),
		}
		rtt := time.Duration((0.18 + 0.3*r.Float64()) * float64(time.Millisecond))
		if i/40%5 == 3 { // another zone
			rtt += time.Duration(1+r.IntN(3)) * time.Millisecond
		}
		if i/40%11 == 7 { // another country
			rtt += time.Duration(14+r.IntN(30)) * time.Millisecond
		}
		if n > 20 && i%97 == 60 {
			rtt += 150 * time.Millisecond
		}
		probe.Small, probe.Full = status.Pings{Sent: 8, RTT: rtt}, status.Pings{Sent: 8, RTT: rtt + rtt/8}
		peer.Probe = probe
		if n > 20 {
			trouble(&peer, i, r)
		}
		f.peers = append(f.peers, peer)
	}
	countStates(f)
	p.On, p.Targets, p.Size, p.Round, p.MedianRTT, p.Sent, p.Lost = true, n, 1450, 10*time.Minute, 310*time.Microsecond,
		n*40, n
	return f
}

func trouble(peer *status.Peer, i int, r *rand.Rand) {
	probe := peer.Probe
	switch {
	case i/12%31 == 5 && i%12 < 5: // a rack
		probe.Verdict, probe.Small.Lost, probe.Full.Lost = status.Silent, 8, 8
	case i == 20 || r.IntN(67) == 0:
		probe.Verdict, probe.Full.Lost, probe.Full.RTT = status.SmallOnly, 8, 0
	case i == 9 || r.IntN(41) == 0:
		probe.Verdict, probe.Small.Lost, probe.Full.Lost = status.Lossy, 1+r.IntN(3), r.IntN(3)
	case i == 30 || r.IntN(83) == 0:
		peer.Path, peer.Reason, peer.Probe = "unreachable",
			"behind the gateway 192.0.2.254, and host-gw needs a common network", nil
	case i == 44 || r.IntN(89) == 0:
		peer.Path, peer.Reason, peer.Cause, peer.Probe = "rejected", fmt.Sprintf(
			"its public IP %s is also that of node worker-0002",
			peer.PublicIP,
		), "duplicate-ip", nil
	case i == 55 || r.IntN(71) == 0:
		peer.Leaving = true
	case i == 17 || r.IntN(29) == 0:
		peer.Probe = &status.PeerProbe{Address: probe.Address}
	}
}

// countStates makes the node's counts fit its peers.
func countStates(f *fake) {
	c, p := status.PeerCounts{}, &f.node.Probe
	for _, x := range f.peers {
		c.Total++
		switch stateOf(x) {
		case answers:
			p.Answer++
		case lossy:
			p.Lossy++
		case smallOnly:
			p.SmallOnly++
		case silent:
			p.Silent++
		case notPinged:
			p.NotPinged++
		case unreachable:
			c.Unreachable++
		case rejected:
			c.Rejected++
		case leaving:
			c.Lingering++
		}
		switch x.Path {
		case "tunnel":
			c.Tunnel++
		case "direct":
			c.Direct++
		}
	}
	f.node.Peers, f.node.Store.Entries, f.node.Network.Pools[0].Leased = c, c.Total+1, c.Total+1
	f.node.Entries = []status.KindCount{
		{Kind: "fdb", Count: c.Tunnel},
		{Kind: "neighbour", Count: c.Tunnel},
		{Kind: "route", Count: c.Tunnel + c.Direct},
	}
}

func healthyNode(now time.Time) status.Node {
	return status.Node{
		Name:    "worker-0000.example.net",
		ID:      "dc1cef41719ee19760624dd5b5000489",
		Version: "v0.5.0",
		Started: now.Add(-26*time.Hour - 13*time.Minute),
		Now:     now,
		Ready:   true,
		Lease: status.Lease{
			Subnets: []string{"10.63.5.0/24"},
			Expires: now.Add(22*time.Hour + 58*time.Minute),
			Held:    true,
		},
		Store: status.Store{
			Kind:      status.Etcd,
			Name:      "etcd",
			Endpoints: []string{"https://192.0.2.251:2379", "https://192.0.2.252:2379"},
			Prefix:    "/overlayd/network",
			Revision:  48211,
			Newest:    48211,
			Requests:  map[string]int64{"Range": 40, "Txn": 1573},
		},
		Network: status.Network{
			Networks: []string{"10.64.0.0/11"},
			Backend:  "vxlan",
			MTU:      1450,
			Pools:    []status.Pool{{Network: "10.64.0.0/11", Subnets: 8190, Leased: 101}},
		},
		Interface: status.Interface{
			Reason:        "IPv4: 192.0.2.1 on eth0 (it has the default route, metric 0)",
			PublicIPs:     []string{"192.0.2.1"},
			PublicIPLocal: true,
		},
		Devices: []status.Device{{
			Name: "overlay.1", MAC: "02:42:7f:10:a3:05", MTU: 1450, VNI: 1, Port: 8472, Local: "192.0.2.1", Underlay: "eth0",
			Offloads: map[string]bool{"tx-udp_tnl-segmentation": true, "rx-gro": true, "tx-udp_tnl-csum-segmentation": false},
		}},
		Firewall: status.Firewall{
			Kind:    "iptables-nft",
			Reason:  "kube-proxy uses it",
			Checked: now.Add(-3 * time.Second),
			Runs:    3,
		},
		Reconcile: status.Reconcile{
			Last:     now.Add(-92 * time.Second),
			Took:     1234567 * time.Nanosecond,
			Rounds:   9,
			Resynced: now.Add(-31 * time.Second),
		},
	}
}

// fail makes a node that is not ready.
func fail(n *status.Node) {
	n.Ready = false
	n.Problems = []status.Problem{
		{Name: "store", Reason: "etcd: connection refused by https://192.0.2.251:2379", Since: n.Now.Add(-94 * time.Minute)},
		{
			Name:   "kernel",
			Reason: "add device overlay.1: file exists: the VXLAN device flannel.1 has VNI 1 on UDP port 8472 already; delete it (ip link del flannel.1)",
			Since:  n.Now.Add(-73 * time.Minute),
			Fatal:  true,
		},
	}
	n.Store.Error, n.Store.Since, n.Lease.Held = "connection refused by https://192.0.2.251:2379", n.Now.Add(
		-94*time.Second,
	), false
	n.Drift = []status.DriftKind{
		{
			Kind: "fdb", Count: 1, Last: "add fdb 02:42:00:00:00:07 dev overlay.1 dst 192.0.2.8",
			At: n.Now.Add(-20 * time.Minute),
		},
		{Kind: "route", Count: 12, Last: "add route 10.64.7.0/24 dev overlay.1", At: n.Now.Add(-40 * time.Second)},
	}
	n.Reconcile.Failures = 1
	n.Restart = []string{"--lease-ttl: 24h0m0s now, 12h0m0s in the configuration"}
}

func TestNetwork(t *testing.T) {
	t.Parallel()
	seen := map[state]bool{}
	for _, p := range network(5000).peers {
		seen[stateOf(p)] = true
	}
	if len(seen) != len(states()) {
		t.Errorf("the network for the tests has only %v", seen)
	}
}
