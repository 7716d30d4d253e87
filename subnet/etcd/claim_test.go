package etcd

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd/etcdtest"
)

func prefixes(v4, v6 string) (p addr.Per[netip.Prefix]) {
	if v4 != "" {
		p.V4 = netip.MustParsePrefix(v4)
	}
	if v6 != "" {
		p.V6 = netip.MustParsePrefix(v6)
	}
	return p
}

// putLease writes a key as another program would, on an etcd lease of its own.
func putLease(t *testing.T, s *etcdtest.Server, key, value string) clientv3.LeaseID {
	t.Helper()
	cli := s.Client()
	g := must[*clientv3.LeaseGrantResponse](t)(cli.Grant(ctxFor(t), 600))
	must[*clientv3.PutResponse](t)(cli.Put(ctxFor(t), prefix+"/subnets/"+key, value, clientv3.WithLease(g.ID)))
	return g.ID
}

func flannel(ip string) string {
	return fmt.Sprintf(`{"PublicIP":%q,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:11:22:33:44:55"}}`, ip)
}

func TestOrderOfAcquisition(t *testing.T) {
	t.Parallel()
	t.Run("remembered", func(t *testing.T) {
		t.Parallel()
		s := store(t)
		putLease(t, s, "10.244.9.0-24", flannel("192.168.0.2")) // of another node
		n := start(t, options(s))
		c := claim(1)
		c.Remembered = prefixes("10.244.77.0/24", "")
		n.m.Claim(c)
		if got := n.untilHeld().Lease.Subnets; got != c.Remembered {
			t.Errorf("got %v", got)
		}
	})
	t.Run("flannel's before what is remembered, and before mine", func(t *testing.T) {
		t.Parallel()
		s := store(t)
		putLease(t, s, "10.244.77.0-24", string(subnet.FormatValue(claim(1).Attrs)))
		putLease(t, s, "10.244.9.0-24", flannel("192.168.0.1"))
		n := start(t, options(s))
		c := claim(1)
		c.Remembered = prefixes("10.244.77.0/24", "")
		n.m.Claim(c)
		snap := n.untilHeld()
		if got := snap.Lease.Subnets; got != prefixes("10.244.9.0/24", "") {
			t.Errorf("got %v", got)
		}
		if value, _, _ := get(t, s.Client(), prefix+"/subnets/10.244.77.0-24"); value != "" {
			t.Errorf("the old one is there still: %s", value)
		}
		c.Remembered, c.Keep = snap.Lease.Subnets, true
		n.m.Claim(c)
		n.until("the claim with pods", func(s subnet.Snapshot) bool {
			return held(s) && s.Claimed == c && s.Lease == snap.Lease
		})
	})
	t.Run("flannel's", func(t *testing.T) {
		t.Parallel()
		s := store(t)
		id := putLease(t, s, "10.244.9.0-24", flannel("192.168.0.1"))
		n, snap := join(t, s, 1)
		if want := prefixes("10.244.9.0/24", ""); snap.Lease.Subnets != want {
			t.Errorf("got %v", snap.Lease.Subnets)
		}
		if _, lease, _ := get(t, s.Client(), subnetKey(snap)); lease != int64(id) {
			t.Errorf("the key hangs on %d now, it was %d", lease, id)
		}
		if r := n.m.Requests(); r["LeaseGrant"] != 0 {
			t.Errorf("requests: %v", r)
		}
	})
	t.Run("mine before all", func(t *testing.T) {
		t.Parallel()
		s := store(t)
		putLease(t, s, "10.244.9.0-24", string(subnet.FormatValue(claim(1).Attrs)))
		n := start(t, options(s))
		c := claim(1)
		c.Remembered = prefixes("10.244.77.0/24", "")
		n.m.Claim(c)
		if got := n.untilHeld().Lease.Subnets; got != prefixes("10.244.9.0/24", "") {
			t.Errorf("got %v", got)
		}
	})
}

func TestPublicIPChanges(t *testing.T) {
	t.Parallel()
	s := store(t)
	n, before := join(t, s, 1)
	cli := s.Client()
	_, lease, _ := get(t, cli, subnetKey(before))
	c := claim(1)
	c.PublicIP.V4 = netip.MustParseAddr("172.16.0.9")
	n.m.Claim(c)
	after := n.until("the new address", func(s subnet.Snapshot) bool { return held(s) && s.Lease.PublicIP == c.PublicIP })
	if after.Lease.Subnets != before.Lease.Subnets || after.Expires != before.Expires || after.Claimed != c {
		t.Errorf("before %+v, after %+v", before.Lease, after.Lease)
	}
	if value, now, _ := get(t, cli, subnetKey(after)); now != lease || !strings.Contains(value, "172.16.0.9") {
		t.Errorf("the store has %s on lease %d, it was %d", value, now, lease)
	}
}

func TestConflict(t *testing.T) {
	t.Parallel()
	s := store(t)
	_, first := join(t, s, 1)
	for what, change := range map[string]func(*subnet.Claim){
		"the public IP": func(c *subnet.Claim) { c.PublicIP, c.PublicIPLocal = claim(1).PublicIP, false },
		"the node name": func(c *subnet.Claim) { c.NodeName = claim(1).NodeName },
	} {
		t.Run(what, func(t *testing.T) {
			n := start(t, options(s))
			c := claim(2)
			change(&c)
			n.m.Claim(c)
			snap := n.until("a conflict", func(s subnet.Snapshot) bool { return s.ClaimErr != nil })
			var conflict *subnet.ConflictError
			if !errors.As(snap.ClaimErr, &conflict) || conflict.Holder.Lease != first.Lease || snap.Held() {
				t.Fatalf("got %v", snap.ClaimErr)
			}
			if !strings.HasPrefix(conflict.Error(), what) {
				t.Errorf("it says %q", conflict)
			}
			n.m.Claim(claim(2)) // the operator did as advised
			n.untilHeld()
			n.stop()
			must[[]*subnet.Entry](t)(n.m.Release(ctxFor(t), claim(2).Identity))
		})
	}
}

// What no node accepts keeps none from starting, whatever name and address it carries.
func TestNoConflictWithUnacceptableLease(t *testing.T) {
	t.Parallel()
	s := store(t)
	a := claim(1).Attrs
	a.NodeID = "another"
	s.Put(prefix+"/subnets/10.244.7.3-24", string(subnet.FormatValue(a))) // no subnet
	s.Put(prefix+"/subnets/10.99.7.0-24", string(subnet.FormatValue(a)))  // of another network
	a.VTEP = addr.Per[subnet.VTEP]{}
	s.Put(prefix+"/subnets/10.244.8.0-24", string(subnet.FormatValue(a))) // not to be reached
	a.NodeName, a.Backend = "other", subnet.HostGW
	s.Put(prefix+"/subnets/10.244.9.0-24", string(subnet.FormatValue(a)))
	c := claim(1)
	c.PublicIPLocal = false // weighs less than the others' address
	n := start(t, options(s))
	n.m.Claim(c)
	if snap := n.until("a lease or a conflict", func(s subnet.Snapshot) bool {
		return s.Held() || s.ClaimErr != nil
	}); snap.ClaimErr != nil {
		t.Error(snap.ClaimErr)
	}
}

// reportsConflict is a node that has its lease, and says of another one that it has the same address.
func reportsConflict(refused bool) func(subnet.Snapshot) bool {
	return func(s subnet.Snapshot) bool {
		var conflict *subnet.ConflictError
		return s.Held() && errors.As(s.ClaimErr, &conflict) && conflict.Refused == refused
	}
}

// Two nodes that run and have the same address: the first one keeps it, both say so, and that is two writes.
func TestTwoNodesWithOneAddress(t *testing.T) {
	t.Parallel()
	s := store(t)
	first, _ := join(t, s, 1)
	second, before := join(t, s, 2)
	at := s.Revision()
	c := claim(2)
	c.PublicIP = claim(1).PublicIP
	second.m.Claim(c)
	first.until("a conflict", reportsConflict(false))
	lost := second.until("a conflict", reportsConflict(true))
	if lost.Lease.Subnets != before.Lease.Subnets {
		t.Errorf("the second one has %v, it had %v", lost.Lease.Subnets, before.Lease.Subnets)
	}
	time.Sleep(time.Second)
	if n := s.Revision() - at; n != 2 {
		t.Errorf("%d writes, want a challenge and an answer", n)
	}
	peers, refused := lost.Table.Peers(lost.Table.Config, subnet.Lease{})
	if len(peers) != 1 || peers[0].NodeName != "node-1" || len(refused) != 1 {
		t.Errorf("the others go by %v, and refuse %v", peers, refused)
	}
	second.m.Claim(claim(2))
	first.untilHeld()
	second.untilHeld()
}

// Addresses that go round among nodes that run: all are where they should be within a moment, none waits for another.
func TestAddressesGoRound(t *testing.T) {
	t.Parallel()
	s := store(t)
	const n = 5
	var nodes []*node
	for i := range n {
		one, _ := join(t, s, i+1)
		nodes = append(nodes, one)
	}
	began := time.Now()
	for i, one := range nodes {
		c := claim(i + 1)
		c.PublicIP = claim((i+1)%n + 1).PublicIP
		one.m.Claim(c)
	}
	for i, one := range nodes {
		one.until("the new address", func(s subnet.Snapshot) bool {
			return held(s) && s.Lease.PublicIP == claim((i+1)%n+1).PublicIP
		})
	}
	for _, one := range nodes {
		one.until("five peers", func(s subnet.Snapshot) bool {
			peers, _ := s.Table.Peers(s.Table.Config, subnet.Lease{})
			return held(s) && len(peers) == n
		})
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %s", took)
	}
}

func TestReservations(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	s.Put(prefix+"/config", `{"Network":"10.244.0.0/22","SubnetLen":24,"SubnetMin":"10.244.0.0"}`)
	s.Put(prefix+"/subnets/10.244.0.0-23", "")                                         // for nobody
	s.Put(prefix+"/subnets/10.244.2.0-24", string(subnet.FormatValue(claim(1).Attrs))) // for node 1
	n, snap := join(t, s, 1)
	if snap.Lease.Subnets != prefixes("10.244.2.0/24", "") || !snap.Expires.IsZero() {
		t.Errorf("node 1 got %v until %s", snap.Lease.Subnets, snap.Expires)
	}
	c := claim(1)
	c.PublicIP.V4 = netip.MustParseAddr("172.16.0.9")
	n.m.Claim(c)
	n.until("the new address", func(s subnet.Snapshot) bool { return s.Lease.PublicIP == c.PublicIP })
	if _, lease, _ := get(t, s.Client(), subnetKey(snap)); lease != 0 {
		t.Error("the reservation hangs on an etcd lease now")
	}
	if _, snap := join(t, s, 2); snap.Lease.Subnets != prefixes("10.244.3.0/24", "") {
		t.Errorf("node 2 got %v", snap.Lease.Subnets)
	}
	last := start(t, options(s))
	last.m.Claim(claim(3))
	full := last.until("a full pool", func(s subnet.Snapshot) bool { return s.ClaimErr != nil })
	var e *subnet.PoolFullError
	if !errors.As(full.ClaimErr, &e) {
		t.Errorf("node 3 got %v", full.ClaimErr)
	}
	n.stop()
	if released := must[[]*subnet.Entry](t)(n.m.Release(ctxFor(t), c.Identity)); len(released) != 0 {
		t.Errorf("released %v", released)
	}
}

func TestInitConfig(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	var nodes []*node
	for i := range 10 {
		o := options(s)
		o.InitConfig = fmt.Appendf(nil, `{"Network":"10.%d.0.0/16"}`, 100+i)
		n := start(t, o)
		n.m.Claim(claim(i))
		nodes = append(nodes, n)
	}
	first := nodes[0].untilHeld().Table.Config
	for _, n := range nodes[1:] {
		if got := n.untilHeld().Table.Config; got != first {
			t.Errorf("one has %v, another %v", first, got)
		}
	}
	resp := must[*clientv3.GetResponse](t)(s.Client().Get(ctxFor(t), prefix+"/config"))
	if resp.Kvs[0].Version != 1 {
		t.Errorf("the config was written %d times", resp.Kvs[0].Version)
	}
	o := options(s)
	o.InitConfig = []byte(`{"Network":"10.9.0.0/16"}`)
	late := start(t, o)
	late.m.Claim(claim(99))
	snap := late.untilHeld()
	if snap.Table.Config != first {
		t.Errorf("it was written over: %v", snap.Table.Config)
	}
	is := fmt.Sprintf("Network is %s in etcd, 10.9.0.0/16 in --init-config; etcd's is in use: put the other one at %s/config",
		first.Pools.V4.Network, prefix)
	if err := snap.InitConfigErr; err == nil || !strings.HasPrefix(err.Error(), is) {
		t.Errorf("the difference is reported as: %v", err)
	}
	must[*clientv3.PutResponse](t)(s.Client().Put(ctxFor(t), prefix+"/config",
		`{"backend": {"TYPE": "vxlan", "Port": 8472}, "SubnetLen": 24, "Network": "10.9.0.7/16"}`))
	late.until("the same in other words", func(s subnet.Snapshot) bool { return s.InitConfigErr == nil })
}

// race starts n managers at once, and returns them when each has a lease.
func race(t *testing.T, s *etcdtest.Server, n int, makeClaim func(int) subnet.Claim) []*node {
	t.Helper()
	nodes := make([]*node, n)
	for i := range nodes {
		nodes[i] = start(t, options(s))
		nodes[i].m.Claim(makeClaim(i))
	}
	var wg sync.WaitGroup
	for _, n := range nodes {
		wg.Go(func() { n.wait(held) })
	}
	wg.Wait()
	var requests int64
	for _, n := range nodes {
		n.untilHeld()
		requests += n.sum()
	}
	t.Logf("%.1f requests each", float64(requests)/float64(n))
	return nodes
}

// wait is until without a complaint, for goroutines.
func (n *node) wait(fits func(subnet.Snapshot) bool) {
	deadline := time.After(patience)
	for s, next := n.state(); !fits(s); s, next = n.state() {
		select {
		case <-next:
		case <-deadline:
			return
		}
	}
}

// neverOverlapping replays the whole history of the store, and fails if there was a moment with two leases that
// overlap.
func neverOverlapping(t *testing.T, s *etcdtest.Server) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	now := map[string]addr.Per[netip.Prefix]{}
	end := s.Revision()
	for resp := range s.Client().Watch(ctx, prefix+"/", clientv3.WithPrefix(), clientv3.WithRev(1),
		clientv3.WithProgressNotify()) {
		if resp.Err() != nil {
			t.Fatal(resp.Err())
		}
		for _, ev := range resp.Events {
			apply(t, now, ev)
		}
		if n := len(resp.Events); n > 0 && resp.Events[n-1].Kv.ModRevision >= end {
			return
		}
	}
	t.Fatal("the history did not come to its end")
}

func apply(t *testing.T, now map[string]addr.Per[netip.Prefix], ev *clientv3.Event) {
	t.Helper()
	key, ok := strings.CutPrefix(string(ev.Kv.Key), prefix+"/subnets/")
	if !ok {
		return
	}
	if ev.Type == mvccpb.Event_DELETE {
		delete(now, key)
		return
	}
	mine := must[addr.Per[netip.Prefix]](t)(subnet.ParseKey(key))
	for other, sn := range now {
		if other != key && (sn.V4.IsValid() && sn.V4.Overlaps(mine.V4) || sn.V6.IsValid() && sn.V6.Overlaps(mine.V6)) {
			t.Errorf("revision %d: %s overlaps %s", ev.Kv.ModRevision, key, other)
		}
	}
	if !ev.IsCreate() {
		t.Errorf("revision %d: %s was written over", ev.Kv.ModRevision, key)
	}
	now[key] = mine
}

func TestSixtyFourAtOnce(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	s.Put(prefix+"/config", `{"Network":"10.244.0.0/18","SubnetLen":24,"SubnetMin":"10.244.0.0"}`)
	race(t, s, 64, claim)
	late := start(t, options(s))
	late.m.Claim(claim(64))
	snap := late.until("a full pool", func(s subnet.Snapshot) bool { return s.ClaimErr != nil })
	var full *subnet.PoolFullError
	if !errors.As(snap.ClaimErr, &full) || full.Size != 64 || full.Leases != 64 {
		t.Errorf("the 65th got %v", snap.ClaimErr)
	}
	neverOverlapping(t, s)
}

// The IPv6 pool has more subnets than the IPv4 one, and some of them are reserved for IPv6 alone, so that there are
// leases whose two subnets have different indices.
func TestDualStackRace(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	s.Put(prefix+"/config", `{"Network":"10.244.0.0/19","SubnetLen":24,"SubnetMin":"10.244.0.0","EnableIPv6":true,
		"IPv6Network":"fd00:10::/57","IPv6SubnetLen":64,"IPv6SubnetMin":"fd00:10::"}`)
	for i := range 8 {
		s.Put(fmt.Sprintf("%s/subnets/fd00:10:0:%x::-64", prefix, 4*i+1), "")
	}
	race(t, s, 32, func(i int) subnet.Claim {
		c := dual(claim(i), i)
		if i%4 == 1 { // these have had an IPv4 subnet whose IPv6 counterpart is not to be had
			c.Remembered = prefixes(fmt.Sprintf("10.244.%d.0/24", i), fmt.Sprintf("fd00:10:0:%x::/64", i))
		}
		return c
	})
	neverOverlapping(t, s)
}

func TestConfigChangesDuringRace(t *testing.T) {
	t.Parallel()
	s := store(t)
	var nodes []*node
	for i := range 24 {
		n := start(t, options(s))
		n.m.Claim(claim(i))
		nodes = append(nodes, n)
		if i == 12 {
			s.Put(prefix+"/config", `{"Network":"10.99.0.0/16"}`)
		}
	}
	seen := map[netip.Prefix]bool{}
	for _, n := range nodes {
		snap := n.until("a lease in the new network", func(s subnet.Snapshot) bool {
			return held(s) && s.Table.Config.Contains(s.Lease.Subnets.V4.Addr()) &&
				s.Table.Config.Contains(netip.MustParseAddr("10.99.0.1"))
		})
		if seen[snap.Lease.Subnets.V4] {
			t.Errorf("%s was leased twice", snap.Lease.Subnets.V4)
		}
		seen[snap.Lease.Subnets.V4] = true
	}
	nodes[0].until("the old leases to be gone", func(s subnet.Snapshot) bool { return len(s.Table.Entries) == 24 })
	neverOverlapping(t, s)
}

func TestConfigErrors(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	n := start(t, options(s))
	n.m.Claim(claim(1))
	n.until("no config", func(s subnet.Snapshot) bool {
		return errors.Is(s.ClaimErr, subnet.ErrNoConfig) && errors.Is(s.Table.ConfigErr, subnet.ErrNoConfig)
	})
	s.Put(prefix+"/config", config)
	first := n.untilHeld()
	s.Put(prefix+"/config", `{"Network":"nonsense"}`)
	n.until("a broken config", func(s subnet.Snapshot) bool {
		return s.Table.ConfigErr != nil && s.Table.Config == subnet.Config{} && s.Lease == first.Lease
	})
	restarted, again := start(t, options(s)), claim(1)
	again.Remembered = first.Lease.Subnets
	restarted.m.Claim(again)
	if held := restarted.untilHeld(); held.Lease != first.Lease || held.Table.ConfigErr == nil {
		t.Errorf("a start with a broken config holds %v, want %v", held.Lease, first.Lease)
	}
	must[*clientv3.DeleteResponse](t)(s.Client().Delete(ctxFor(t), prefix+"/config"))
	n.until("no config", func(s subnet.Snapshot) bool {
		return errors.Is(s.Table.ConfigErr, subnet.ErrNoConfig) && s.Lease == first.Lease
	})
	s.Put(prefix+"/config", config)
	if again := n.untilHeld(); again.Lease != first.Lease {
		t.Errorf("it had %v and has %v", first.Lease, again.Lease)
	}
}

func TestListExpiriesRelease(t *testing.T) {
	t.Parallel()
	s := store(t)
	s.Put(prefix+"/subnets/10.244.8.0-24", "")
	s.Put(prefix+"/something/else", "ignored")
	n, snap := join(t, s, 1)
	join(t, s, 2)
	o := must[*Manager](t)(New(options(s), n.m.log))
	defer o.Close()
	table := must[subnet.Table](t)(o.List(ctxFor(t)))
	if len(table.Entries) != 3 || table.ConfigErr != nil {
		t.Fatalf("got %+v", table)
	}
	left := must[map[int64]time.Duration](t)(o.Expiries(ctxFor(t), table))
	if len(left) != 2 {
		t.Errorf("got %v", left)
	}
	for id, d := range left {
		if d < 50*time.Second || d > time.Minute {
			t.Errorf("lease %d has %s left", id, d)
		}
	}
	n.stop()
	released := must[[]*subnet.Entry](t)(o.Release(ctxFor(t), claim(1).Identity))
	if len(released) != 1 || released[0].Subnets != snap.Lease.Subnets {
		t.Errorf("released %v", released)
	}
	if table := must[subnet.Table](t)(o.List(ctxFor(t))); len(table.Entries) != 2 {
		t.Errorf("left over: %v", table.Entries)
	}
}

// Two leases may share an IPv6 subnet under keys that have nothing in common: here an unpaired one is decided along
// with a pair.
func TestPairAgainstUnpaired(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	s.Put(prefix+"/config", `{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10::/48"}`)
	o := must[*Manager](t)(New(options(s), nil))
	defer o.Close()
	table := must[subnet.Table](t)(o.List(ctxFor(t)))
	decide := func(i int, v4, v6 string) subnet.Decision {
		c := dual(claim(i), i)
		c.Remembered = prefixes(v4, v6)
		return must[subnet.Decision](t)(subnet.Decide(table, c, 0))
	}
	odd, pair := decide(1, "10.244.9.0/24", "fd00:10:0:5::/64"), decide(2, "10.244.5.0/24", "fd00:10:0:5::/64")
	if odd.Unchanged != "" || pair.Unchanged == "" {
		t.Fatalf("got %+v and %+v", odd, pair)
	}
	for _, order := range [][2]subnet.Decision{{odd, pair}, {pair, odd}} {
		cli := s.Client()
		commit := func(d subnet.Decision) bool {
			return must[*clientv3.TxnResponse](t)(cli.Txn(ctxFor(t)).If(o.keys.guards(table, d)...).Then(o.keys.writes(d,
				[]byte("x"))...).Commit()).Succeeded
		}
		if first, second := commit(order[0]), commit(order[1]); !first || second {
			t.Errorf("the first came through: %t, the second: %t", first, second)
		}
		must[*clientv3.DeleteResponse](t)(cli.Delete(ctxFor(t), prefix+"/subnets/", clientv3.WithPrefix()))
		table = must[subnet.Table](t)(o.List(ctxFor(t)))
	}
}

// renamed is the first node's claim with another name and address, and what it remembers.
func renamed(first subnet.Snapshot) subnet.Claim {
	c := claim(1)
	c.NodeName, c.PublicIP, c.VTEP, c.Remembered = "renamed", claim(99).PublicIP, claim(99).VTEP, first.Lease.Subnets
	return c
}

// A node that comes back with another name and another address keeps the subnet that it remembers.
func TestNameAndAddressChangeInOneRestart(t *testing.T) {
	t.Parallel()
	s := store(t)
	before, first := join(t, s, 1)
	before.stop()
	_, etcdLease, _ := get(t, s.Client(), subnetKey(first))
	after := start(t, options(s))
	c := renamed(first)
	after.m.Claim(c)
	snap := after.untilHeld()
	if snap.Lease.Subnets != first.Lease.Subnets || snap.Lease.Attrs != c.Attrs || len(snap.Table.Entries) != 1 {
		t.Errorf("it holds %+v, of %d leases", snap.Lease, len(snap.Table.Entries))
	}
	if _, now, _ := get(t, s.Client(), subnetKey(snap)); now != etcdLease {
		t.Errorf("the key is attached to %d now, it was %d", now, etcdLease)
	}
}

// A copy of a machine, its ID and state directory included, that was given another name and address: the one that runs
// keeps its lease, the copy gets one of its own. It is as well if the copy is started again with the same memory.
func TestCloneLeavesTheLeaseToTheOriginal(t *testing.T) {
	t.Parallel()
	s := store(t)
	first, held1 := join(t, s, 1)
	for range 2 {
		at := s.Revision()
		clone := start(t, options(s))
		c := renamed(held1)
		clone.m.Claim(c)
		other := func(s subnet.Snapshot) bool { return held(s) && s.Lease.Subnets != held1.Lease.Subnets }
		clone.until("a lease of its own", other)
		first.until("its lease again", func(s subnet.Snapshot) bool { return held(s) && s.Lease == held1.Lease })
		c.Remembered, c.Keep = held1.Lease.Subnets, true // so does the agent, which held it for a moment
		clone.m.Claim(c)
		time.Sleep(500 * time.Millisecond)
		clone.until("still the lease of its own", other)
		if value, _, _ := get(t, s.Client(), subnetKey(held1)); value != string(subnet.FormatValue(held1.Lease.Attrs)) {
			t.Errorf("the original's lease says %s", value)
		}
		if n := s.Revision() - at; n > 4 {
			t.Errorf("%d writes", n)
		}
		clone.stop()
		must[[]*subnet.Entry](t)(first.m.Release(ctxFor(t), c.Identity))
	}
}

// Two machines with one identity (a clone, its machine-id and name copied too) don't write over each other for ever,
// and are told.
func TestClonesDoNotFight(t *testing.T) {
	t.Parallel()
	s := store(t)
	first, _ := join(t, s, 1)
	clone := start(t, options(s))
	c := claim(1)
	c.PublicIP.V4 = netip.MustParseAddr("192.168.77.77")
	clone.m.Claim(c)
	at := s.Revision()
	told := func(s subnet.Snapshot) bool {
		var conflict *subnet.ConflictError
		return errors.As(s.ClaimErr, &conflict) && strings.Contains(s.ClaimErr.Error(), "clone")
	}
	deadline := time.Now().Add(patience)
	for time.Now().Before(deadline) {
		a, _ := first.state()
		b, _ := clone.state()
		if told(a) || told(b) {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	a, _ := first.state()
	b, _ := clone.state()
	if !told(a) && !told(b) {
		t.Errorf("neither is told: %v, %v", a.ClaimErr, b.ClaimErr)
	}
	time.Sleep(time.Second)
	if n := s.Revision() - at; n > 8 {
		t.Errorf("%d writes", n)
	}
}
