package faults

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/overlayd/overlayd/addr"
)

// nonsense is a lease that makes none: each is refused by name and changes nothing.
type nonsense struct {
	what       string
	key, value func(*Site) string
	says       string // a regular expression for the reason that is given
	short      bool
}

// text is a part of a lease that is the same at all sites.
func text(s string) func(*Site) string { return func(*Site) string { return s } }

// fields is a lease like that of an honest peer, but for its public IP and MAC.
func fields(ip, mac string) string {
	return fmt.Sprintf(`{"PublicIP":%q,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":%q},"PublicIPLocal":true,"NodeName":"stranger"}`, ip, mac)
}

const (
	strangerIP  = "172.31.1.99"
	strangerMAC = "02:00:00:00:99:01"
	nonsenseKey = "10.244.3.0-24"
)

// nonsenses lists those that are refused as soon as they are read.
func nonsenses() []nonsense {
	honest := text(fields(strangerIP, strangerMAC))
	key := text(nonsenseKey)
	at := func(ip string) func(*Site) string { return text(fields(ip, strangerMAC)) }
	with := func(mac string) func(*Site) string { return text(fields(strangerIP, mac)) }
	return []nonsense{
		{"an address that is none", text("10.244.300.0-24"), honest, `300`, true},
		{"host bits set", text("10.244.200.7-24"), honest, `200`, false},
		{"the underlay's own subnet", text("172.31.1.0-24"), honest, `172.31.1.0`, false},
		{"a subnet around the underlay", text("172.16.0.0-12"), honest, `172.16.0.0`, false},
		{"0.0.0.0/0", text("0.0.0.0-0"), honest, `0.0.0.0`, false},
		{"etcd's network", text("172.31.100.0-24"), honest, `172.31.100.0`, false},
		{"the whole pod network", text("10.244.0.0-16"), honest, `10.244.0.0`, false},
		{"a part of a peer's subnet", func(s *Site) string { return inside(s, false) }, honest, `overlap`, false},
		{
			"a part of the node's own subnet", func(s *Site) string { return inside(s, true) }, honest,
			`overlaps this node's own`, true,
		},
		{"a subnet around several", text("10.244.0.0-17"), honest, `overlap|10.244.0.0`, false},
		{"a public IP inside the pod network", key, at("10.244.9.9"), `public IP .* inside the overlay network`, false},
		{"a multicast public IP", key, at("224.0.0.1"), `224.0.0.1`, false},
		{"the broadcast address", key, at("255.255.255.255"), `255.255.255.255`, false},
		{"a loopback public IP", key, at("127.0.0.1"), `127.0.0.1`, false},
		{"no public IP (0.0.0.0)", key, at("0.0.0.0"), `0.0.0.0|no public`, false},
		{"a zero MAC", key, with("00:00:00:00:00:00"), `no IPv4 VtepMAC`, false},
		{"the broadcast MAC", key, with("ff:ff:ff:ff:ff:ff"), `group address`, false},
		{"a MAC that is none", key, with("zz:00"), `zz:00`, false},
		{
			"another VNI", key, text(strings.Replace(fields(strangerIP, strangerMAC), `"VNI":1`, `"VNI":2`, 1)), `VNI is 2`,
			true,
		},
		{
			"another backend", key, text(strings.Replace(fields(strangerIP, strangerMAC), `"vxlan"`, `"host-gw"`, 1)), `host-gw`,
			false,
		},
		{"broken JSON", key, text(`{"PublicIP":`), `JSON`, true},
		{"no backend", key, text(`{"PublicIP":"172.31.1.99"}`), `backend`, false},
		{"not an object", key, text(`[1, 2]`), `expected a JSON object`, false},
		{"a value of 1 MB", key, text(`{"PublicIP":"` + strings.Repeat("1", 1<<20) + `"}`), ``, false},
		{"a key of 4 kB", text("10.244.3.0-24" + strings.Repeat("0", 4096)), honest, ``, false},
		{"a key with control characters", text("10.244.3.0-24\n\x1b[31m"), honest, ``, false},
	}
}

// twins lists those that announce another node's address: they challenge its lease.
func twins() []nonsense {
	key := text(nonsenseKey)
	return []nonsense{
		{
			"the node's own public IP", key,
			func(s *Site) string { return fields(s.Victim.Addr(addr.IPv4).String(), strangerMAC) },
			`public IP .* is this node's own`, true,
		},
		{
			"a peer's public IP", key, func(s *Site) string { return fields(s.Peer.Addr(addr.IPv4).String(), strangerMAC) },
			`public IP .* is that of`, true,
		},
	}
}

// fault is the row for it. It has to change nothing for so long.
func (n nonsense) fault(hold time.Duration) Fault {
	key := func(s *Site) string { return subnets + n.key(s) }
	return Fault{
		Name: "lease: " + n.what, On: []string{OnVXLAN}, Short: n.short,
		Inject: Steps(
			Afterwards(Delete(key)),
			Put(key, n.value),
		),
		Expect: All(RoutesWhole, refused), Hold: hold, Keeps: KernelWhole,
		Restore: Undo, Log: `condition failed.*"rejected-lease"`,
		Seen: degrades("rejected-lease", n.says, `overlayd_leases_rejected 1`),
	}
}

// inside is a key in the second half of a node's subnet.
func inside(s *Site, own bool) string {
	n := s.Peer
	if own {
		n = s.Victim
	}
	env, err := n.SubnetEnv()
	if err != nil {
		return "10.244.3.0-25"
	}
	b := env.Gateway.V4.Masked().Addr().As4()
	b[3] = 128
	return netip.AddrFrom4(b).String() + "-25"
}

// peers is what may stand in etcd.
func peers() []Fault {
	var rows []Fault
	for _, n := range nonsenses() {
		rows = append(rows, n.fault(300*time.Millisecond))
	}
	for _, n := range twins() {
		// A challenge comes to age after a second: only then would a lease that is not answered take the address over.
		rows = append(rows, n.fault(2*time.Second))
	}
	rows = append(rows,
		Fault{
			Name: "a clone of this node: the same name and machine-id, another address", On: []string{OnVXLAN}, Short: true,
			Inject: clone, Hold: time.Second, Restore: deleteOwnKey,
			Log: `condition failed.*"lease".*clone of the other`, Seen: unreadies("lease", "clone of the other"),
			Bound: Bound{Lost: Any, Repair: 5 * time.Second},
		},
		Fault{
			Name: "another node with this one's machine-id", On: []string{OnVXLAN}, Short: true,
			Inject: Steps(
				Afterwards(ghostThief.goes),
				Put(ghostThief.key, func(s *Site) string {
					id := fmt.Sprintf("%032x", uint8(ghostThief))
					return strings.Replace(ghostThief.value(s), id, s.Victim.Spec().ID, 1)
				})),
			Restore: Undo, Bound: lossless(letGo), Seen: (&Seen{}).diagnosed(`^FAIL leases the nodes .* have the same ID`),
		},
		Fault{
			Name: "a node that is no more, whose lease still stands", On: []string{OnVXLAN},
			Inject: ghostSlow.appears, Restore: ghostSlow.goes, Bound: lossless(letGo),
			Log:  `condition failed.*"silent-peers"`,
			Seen: pinged("silent-peers", "ghost64: pings are not answered", `overlayd_probe_targets{verdict="silent"} `),
		},
		Fault{
			Name: "two leases for overlapping subnets: the older one holds", On: []string{OnVXLAN, OnHostGW},
			Inject: Steps(
				ghostKilled.appears, Until(ghostKilled.routed, 3*time.Second),
				Afterwards(Delete(overlapKey)),
				Put(overlapKey, ghostThief.value)),
			Expect: All(ghostKilled.routed, refused), Hold: time.Second, Keeps: All(ghostKilled.routed, notRouted(overlapKey)),
			Restore: Undo, Bound: lossless(letGo), Log: `condition failed.*"rejected-lease".*overlaps`,
		},
		Fault{
			Name: "10,000 junk keys", On: []string{OnVXLAN}, Short: true,
			Inject: Steps(
				Afterwards(deleteAll(subnets+"junk-")),
				manyKeys(10000, func(i int) string { return fmt.Sprintf("junk-%d", i) }, "junk")),
			Expect: All(RoutesWhole, refused), Hold: 2 * time.Second, Keeps: RoutesWhole,
			Restore: Undo, Log: `condition failed.*"rejected-lease"`, Bound: Bound{Repair: 5 * time.Second},
			Seen: degrades("rejected-lease", "junk", `overlayd_leases_rejected 10000`),
		},
		Fault{
			Name: "10,000 keys for no subnet of the network", On: []string{OnVXLAN},
			Inject: Steps(
				Afterwards(deleteAll(subnets+"11.")),
				manyKeys(10000, func(i int) string { return fmt.Sprintf("11.%d.%d.0-24", i/256, i%256) },
					fields(strangerIP, strangerMAC))),
			Expect: All(RoutesWhole, refused), Hold: 2 * time.Second, Keeps: RoutesWhole,
			Restore: Undo, Log: `condition failed.*"rejected-lease"`, Bound: Bound{Repair: 5 * time.Second},
		},
	)
	return in(Peers, lossless(2*time.Second), rows)
}

// refused holds when the victim says that it leaves a lease out, and goes on.
func refused(ctx context.Context, s *Site) error {
	return isNamed("rejected-lease")(ctx, s)
}

// overlapKey is a part of a ghost's subnet.
func overlapKey(s *Site) string {
	b := ghostKilled.subnets(s).V4.Addr().As4()
	b[3] = 128
	return subnets + netip.AddrFrom4(b).String() + "-25"
}

func notRouted(key func(*Site) string) Check {
	return func(ctx context.Context, s *Site) error {
		sn := strings.Replace(strings.TrimPrefix(key(s), subnets), "-", "/", 1)
		out, err := s.Victim.Run(ctx, "ip", "route", "show", sn)
		if err != nil {
			return err
		}
		return unless(out == "", "there is a route to %s: %s", sn, out)
	}
}

// batch is how many keys one transaction may put.
const batch = 100

func manyKeys(n int, key func(int) string, value string) Action {
	return Store(func(ctx context.Context, _ *Site, cli *clientv3.Client) error {
		for i := 0; i < n; i += batch {
			var ops []clientv3.Op
			for j := i; j < min(i+batch, n); j++ {
				ops = append(ops, clientv3.OpPut(subnets+key(j), value))
			}
			if _, err := cli.Txn(ctx).Then(ops...).Commit(); err != nil {
				return fmt.Errorf("put %d keys: %w", len(ops), err)
			}
		}
		return nil
	})
}

// deleteAll deletes the keys that begin so.
func deleteAll(prefix string) Action { return Delete(text(prefix), clientv3.WithPrefix()) }

// clone writes over the victim's lease as a clone of it does, and again when the victim has put it right.
func clone(ctx context.Context, s *Site) error {
	own, err := s.leaseOf(ctx, s.Victim)
	if err != nil {
		return err
	}
	ip := s.Victim.Addr(addr.IPv4).String()
	other := strings.Replace(own.value, fmt.Sprintf("%q", ip), fmt.Sprintf("%q", strangerIP), 1)
	rewritten := func(ctx context.Context, s *Site) error {
		l, err := s.leaseOf(ctx, s.Victim)
		if err != nil {
			return err
		}
		return unless(strings.Contains(l.value, ip), "the lease still says %s", strangerIP)
	}
	put := func(ctx context.Context, s *Site) error {
		_, err := s.put(ctx, own.key, other, clientv3.WithLease(own.etcdLease))
		return err
	}
	return Steps(put, Until(rewritten, 5*time.Second), put)(ctx, s)
}
