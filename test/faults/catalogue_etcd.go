package faults

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/overlayd/overlayd/test/lab"
)

// Ghosts of the catalogue; each row has one of its own.
const (
	ghostCompaction ghost = 60 + iota
	ghostThief
	ghostRemoved
	ghostRestart
	ghostSlow
	ghostKilled
	ghostAddress
	ghostEndpoint
)

// catchUp is how long a node may take to be content again after etcd is back: its attempts, and those of gRPC to
// connect, are up to 18 s apart.
const catchUp = 30 * time.Second

// leaseGone is what the log says of a lease that the node had.
const leaseGone = `subnet lease disappeared from etcd|etcd lease expired or was revoked`

// etcdFaults are what happens to the store. In none of them a packet is lost.
func etcdFaults(long bool) []Fault {
	away := 20 * time.Second
	if long {
		away = 2 * time.Minute
	}
	rows := []Fault{
		{
			Name: "stopped for " + away.String(), Short: true,
			Inject: stopStore, Hold: away, Keeps: KernelWhole, Restore: startStore,
			Log:  `condition failed.*"store"`,
			Seen: storeAway("connection refused by http").diagnosed(`^FAIL store .*(refused|answer)`),
		},
		{
			Name: "stopped for 5s", On: []string{OnHostGW, OnDual, OnEtcd34, OnEtcd35, OnEtcd36}, Soak: true,
			Inject: stopStore, Hold: 5 * time.Second, Keeps: KernelWhole, Restore: startStore, Log: `condition failed.*"store"`,
		},
		{
			Name: "hangs (SIGSTOP) for 20s", Soak: true,
			Inject: pauseStore, Hold: 20 * time.Second, Keeps: KernelWhole, Restore: resumeStore,
			Log:  `condition failed.*"store"`,
			Seen: storeAway("no answer from http").in(20 * time.Second),
		},
		{
			Name:   "slow: 300 ms in each direction, a peer comes meanwhile",
			Inject: Steps(slowStore, Until(KernelWhole, 2*time.Second), ghostSlow.appears),
			Expect: ghostSlow.routed, Hold: 2 * time.Second, Restore: Undo,
			Seen: &Seen{Doctor: `^warn store .*the daemon is connected and sees the changes of other nodes`},
		},
		{
			Name: "one of three members lost", On: []string{OnThree}, Short: true,
			Inject: Steps(killMember(0), Until(storeWorks, 10*time.Second), ghostSlow.appears),
			Expect: ghostSlow.routed, Hold: 5 * time.Second,
			Restore: Steps(ghostSlow.goes, startStore),
		},
		{
			Name: "the member that leads is lost", On: []string{OnThree},
			Inject: Steps(onLeader(killLeader), Until(storeWorks, 10*time.Second), ghostSlow.appears),
			Expect: ghostSlow.routed, Hold: 3 * time.Second,
			Restore: Steps(ghostSlow.goes, startStore),
		},
		{
			Name: "another leader", On: []string{OnThree},
			Inject: onLeader(moveLeader), Hold: 3 * time.Second, Keeps: KernelWhole, Restore: Wait(0),
		},
		{
			Name: "two of three members lost for 10s", On: []string{OnThree},
			Inject: Steps(killMember(1), killMember(2)),
			Hold:   10 * time.Second, Keeps: KernelWhole, Restore: startStore, Log: `condition failed.*"store"`,
		},
		{
			Name:   "compaction while the node is cut off",
			Inject: Steps(cutOff, Wait(2*time.Second), ghostCompaction.appears, compact),
			Hold:   18 * time.Second, Keeps: RoutesWholeOnVictim,
			Restore: Steps(rejoin, Until(ghostCompaction.routedHere, catchUp+2*time.Second), ghostCompaction.goes),
			Log:     `condition failed.*"store"`,
		},
		{
			Name:   "a connection that leads nowhere (packets dropped) for 20s",
			Inject: blackHole, Hold: 20 * time.Second, Keeps: KernelWhole, Restore: Undo, Log: `condition failed.*"store"`,
		},
		{
			// The connection ends after 15 s, the login before that: a token of the lab lasts 5 s.
			Name: "out of reach for longer than a login lasts", Short: true,
			On:     []string{OnEtcd34, OnEtcd35, OnEtcd36, OnSecure},
			Inject: blackHole, Hold: 20 * time.Second, Keeps: KernelWhole,
			Restore: fewLogins(Steps(Undo, Until(Whole, catchUp))), Log: `condition failed.*"store"`,
		},
		{
			Name: "credentials refused and restored", On: []string{OnSecure, OnEtcd34, OnEtcd35, OnEtcd36}, Short: true,
			// etcd forgets the tokens that it has given out when it starts anew.
			Inject: Steps(setPassword("changed"), stopStore, startStore), Hold: 12 * time.Second, Keeps: KernelWhole,
			Restore: setPassword(lab.EtcdPassword),
			Log:     `condition failed.*"store".*(?i)(password|authenti|credential|user)`,
			Seen:    storeAway(`wrong user name or password`).diagnosed(`^FAIL store .*wrong user name or password`),
		},
		{
			Name: "password replaced in etcd and then on disk", On: []string{OnSecure, OnEtcd34, OnEtcd35, OnEtcd36},
			Inject:  Steps(setPassword("new"), Wait(3*time.Second), writePassword("new"), stopStore, startStore),
			Hold:    2 * time.Second,
			Restore: Steps(Until(Whole, catchUp), setPassword(lab.EtcdPassword), writePassword(lab.EtcdPassword)),
		},
		{
			Name: "certificates replaced, those of the CA too", On: []string{OnSecure},
			Inject: Steps(func(_ context.Context, s *Site) error { return s.Lab.ReplaceCertificates() }, stopStore, startStore),
			Hold:   2 * time.Second, Keeps: KernelWhole, Restore: Wait(0),
		},
		{
			Name: "data lost: an empty store", On: []string{OnVXLAN, OnHostGW, OnDual}, Short: true, Soak: true,
			Inject: emptyStore, Expect: registered, Hold: 3 * time.Second, Keeps: KernelWhole, Restore: Wait(0),
			Log: `store lost data`, Seen: follows(`^etcd .*lost data`, `overlayd_store_data_losses_total +`),
		},
		{
			Name: "data lost while a node is away: its peers keep it", On: []string{OnVXLAN},
			Inject: Steps(func(ctx context.Context, s *Site) error { return s.Peer.Stop(ctx) }, emptyStore),
			Hold:   5 * time.Second, Keeps: KernelWhole,
			Restore: func(_ context.Context, s *Site) error { return s.Peer.Start() },
			Log:     `store lost data`,
		},
		{
			Name: "restored from a snapshot that is older than the victim's lease", On: []string{OnVXLAN, OnDual},
			Inject: Steps(olderStore,
				// Every node has to be watching again: that is sure when it has heard of a peer that came.
				ghostRestart.appears, Until(ghostRestart.routed, catchUp), ghostRestart.goes, Until(Whole, catchUp),
				advance(20), Wait(time.Second), rollBack),
			Expect: registered, Hold: 2 * time.Second, Keeps: KernelWhole, Restore: Wait(0),
			Log: `store lost data`,
		},
		{
			Name: "restored from a snapshot with a node that is gone",
			Inject: Steps(ghostRestart.appears, Until(ghostRestart.routed, 3*time.Second), copyStore, ghostRestart.goes,
				Until(Whole, catchUp), rollBack),
			Expect: registered, Hold: 2 * time.Second,
			Restore: Steps(ghostRestart.goes),
		},
		{
			Name: "own key deleted", On: []string{OnVXLAN, OnHostGW, OnDual}, Short: true, Soak: true,
			Inject: deleteOwnKey, Expect: registered, Restore: Wait(0),
			Log: leaseGone, Seen: follows(`^Lease .*disappeared from etcd`, `overlayd_lease_losses_total +`),
		},
		{
			Name: "etcd lease revoked", On: []string{OnVXLAN, OnHostGW, OnDual}, Soak: true,
			Inject: revoke, Expect: registered, Restore: Wait(0),
			Log: leaseGone,
		},
		{
			Name: "own key overwritten with invalid data", On: []string{OnVXLAN},
			Inject: overwriteOwnKey(func(*Site) string { return "{" }), Expect: registered, Restore: Wait(0),
			Log: leaseGone,
		},
		{
			Name: "own key overwritten by another node: a new subnet", On: []string{OnVXLAN, OnDual}, Short: true,
			Inject: overwriteOwnKey(ghostThief.value),
			Expect: All(movedAway, LogSays(`\terror\t.*subnet`)), Hold: time.Second,
			Restore: operatorAgrees, Ruins: true,
			Bound: Bound{Lost: Any, Repair: catchUp}, Log: `subnet lease lost to another node`,
			Seen: degrades("subnet-moved",
				"10.244.*recreate the pods").diagnosed(`^FAIL bridge .* recreate the bridge and the pods`),
		},
		{
			Name: "network config is no JSON", On: []string{OnDual, OnVXLAN}, Short: true,
			Inject: changeConfig(func(string) string { return "{" }), Hold: time.Second, Keeps: KernelWhole, Restore: Undo,
			Bound: lossless(2 * time.Second), Log: `condition failed.*"config"`,
			Seen: degrades("config", "/overlayd/network/config: "),
		},
		{
			Name: "network config for another network", On: []string{OnDual, OnVXLAN}, Short: true,
			Inject: changeConfig(func(old string) string { return strings.ReplaceAll(old, "10.244.", "10.99.") }),
			Hold:   time.Second, Keeps: KernelWhole, Restore: Undo,
			Bound: lossless(2 * time.Second), Log: `condition failed.*"config"`, Seen: degrades("config", "10.244.*"),
		},
		{
			Name: "network config that is not the initial one", On: []string{OnDual, OnVXLAN},
			Inject: changeConfig(func(old string) string { return strings.Replace(old, "{", `{"SubnetMax":"10.244.254.0",`, 1) }),
			Hold:   time.Second, Keeps: KernelWhole, Restore: Undo,
			Bound: lossless(2 * time.Second), Log: `condition failed.*"init-config"`,
			Seen: degrades("init-config", `SubnetMax is 10.244.254.0 in etcd, 10.244.255.0 in --init-config`),
		},
		{
			Name: "network config with a misspelt key", On: []string{OnDual, OnVXLAN}, Short: true,
			Inject: changeConfig(func(old string) string { return strings.Replace(old, "{", `{"DirectRoutin":true,`, 1) }),
			Hold:   time.Second, Keeps: KernelWhole, Restore: Undo,
			Bound: lossless(2 * time.Second), Log: `condition failed.*"config-keys"`,
			Seen: degrades("config-keys", "DirectRoutin"),
		},
	}
	return in(Etcd, lossless(catchUp), rows)
}

// RoutesWholeOnVictim is RoutesWhole for the victim alone.
func RoutesWholeOnVictim(ctx context.Context, s *Site) error {
	now, err := observe(ctx, s.Victim, s.iptables)
	if err != nil {
		return err
	}
	d := now.differs(s.plan[s.Victim.Name])
	return unless(d == "", "%s: %s", s.Victim.Name, d)
}

// Ports of the relay that slows etcd down.
const (
	storePort = 2379
	slowPort  = 2378
)

// slowStore leads the nodes' connections through a relay.
func slowStore(ctx context.Context, s *Site) error {
	r, err := s.Lab.Etcd().StartRelay(ctx, slowPort, storePort, 300*time.Millisecond)
	if err != nil {
		return err
	}
	s.Defer(func(context.Context, *Site) error { return r.Close() })
	return Steps(Afterwards(once(store, `iptables -t nat -F PREROUTING; iptables -F INPUT`)),
		once(store, fmt.Sprintf(`iptables -t nat -I PREROUTING -i eth0 -p tcp --dport %d -j REDIRECT --to-ports %d
		iptables -I INPUT -i eth0 -p tcp --dport %d -j REJECT --reject-with tcp-reset`, storePort, slowPort, storePort)))(ctx, s)
}

// blackHole drops what the nodes send to etcd.
func blackHole(ctx context.Context, s *Site) error {
	return Steps(Afterwards(rejoin), once(store, `iptables -I INPUT -i eth0 -p tcp --dport 2379 -j DROP`))(ctx, s)
}

// cutOff ends the victim's connections to etcd and refuses new ones.
func cutOff(ctx context.Context, s *Site) error {
	return Steps(Afterwards(rejoin), once(store, `iptables -I INPUT -p tcp -s $IP -j REJECT --reject-with tcp-reset
		iptables -I OUTPUT -p tcp -d $IP -j REJECT --reject-with tcp-reset`))(ctx, s)
}

func rejoin(ctx context.Context, s *Site) error {
	return once(store, `iptables -F INPUT; iptables -F OUTPUT`)(ctx, s)
}

func compact(ctx context.Context, s *Site) error {
	revision, err := s.put(ctx, "/elsewhere", "")
	if err != nil {
		return err
	}
	return s.withStore(ctx, func(ctx context.Context, cli *clientv3.Client) error {
		_, err := cli.Compact(ctx, revision, clientv3.WithCompactPhysical())
		return err
	})
}

// advance writes what concerns no node but reaches every node's watch, so that the revision that they know grows.
func advance(n int) Action {
	return func(ctx context.Context, s *Site) error {
		for range n {
			if _, err := s.put(ctx, prefix+"noise", ""); err != nil {
				return err
			}
		}
		return nil
	}
}

func storeWorks(ctx context.Context, s *Site) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, err := s.put(ctx, "/elsewhere", "")
	return err
}

// onLeader does something in etcd with the number of the member that leads, from 0, and the IDs of all.
func onLeader(f func(ctx context.Context, s *Site, at int, ids []uint64) error) Action {
	return Store(func(ctx context.Context, s *Site, cli *clientv3.Client) error {
		at := -1
		var ids []uint64
		for i, e := range s.Lab.EtcdMembers() {
			st, err := cli.Status(ctx, e.LocalURL())
			if err != nil {
				return fmt.Errorf("ask %s who leads: %w", e.LocalURL(), err)
			}
			ids = append(ids, st.Header.MemberId)
			if st.Leader == st.Header.MemberId {
				at = i
			}
		}
		if at < 0 {
			return errors.New("no member of etcd leads")
		}
		return f(ctx, s, at, ids)
	})
}

func killLeader(ctx context.Context, s *Site, at int, _ []uint64) error {
	return killMember(at)(ctx, s)
}

// killMember kills a member of etcd, counted from 0.
func killMember(i int) Action {
	return func(ctx context.Context, s *Site) error { return s.Lab.EtcdMembers()[i].Kill(ctx) }
}

func moveLeader(ctx context.Context, s *Site, at int, ids []uint64) error {
	direct, err := clientv3.New(clientv3.Config{
		Endpoints: []string{s.Lab.EtcdMembers()[at].LocalURL()}, DialOptions: s.Lab.DialEtcd(), DialTimeout: storeWait,
	})
	if err != nil {
		return fmt.Errorf("reach the leader: %w", err)
	}
	defer direct.Close()
	_, err = direct.MoveLeader(ctx, ids[(at+1)%len(ids)])
	return err
}

// fewLogins fails where a node asks for logins again and again meanwhile.
func fewLogins(a Action) Action {
	const most = 10
	count := func(ctx context.Context, n *lab.Node) (int, error) {
		text, err := n.Metrics(ctx)
		if err != nil {
			return 0, err
		}
		_, text, _ = strings.Cut(text, `overlayd_store_requests_total{method="Authenticate"} `)
		text, _, _ = strings.Cut(text, "\n")
		return strconv.Atoi(text)
	}
	return func(ctx context.Context, s *Site) error {
		before, errBefore := count(ctx, s.Victim)
		if err := a(ctx, s); err != nil {
			return err
		}
		after, errAfter := count(ctx, s.Victim)
		return errors.Join(errBefore, errAfter,
			unless(after-before <= most, "%s asked for %d logins", s.Victim.Name, after-before))
	}
}

func setPassword(p string) Action {
	return func(ctx context.Context, s *Site) error { return s.Lab.SetEtcdPassword(ctx, p) }
}

func writePassword(p string) Action {
	return func(_ context.Context, s *Site) error { return s.Lab.WritePassword(p) }
}

func deleteOwnKey(ctx context.Context, s *Site) error {
	l, err := s.leaseOf(ctx, s.Victim)
	if err != nil {
		return err
	}
	return Delete(text(l.key))(ctx, s)
}

func revoke(ctx context.Context, s *Site) error {
	l, err := s.leaseOf(ctx, s.Victim)
	if err != nil {
		return err
	}
	return Store(func(ctx context.Context, _ *Site, cli *clientv3.Client) error {
		_, err := cli.Revoke(ctx, l.etcdLease)
		return err
	})(ctx, s)
}

func overwriteOwnKey(with func(*Site) string) Action {
	return func(ctx context.Context, s *Site) error {
		l, err := s.leaseOf(ctx, s.Victim)
		if err != nil {
			return err
		}
		_, err = s.put(ctx, l.key, with(s))
		return err
	}
}

// movedAway holds when the victim has another subnet, in subnet.env and for its peers, is ready, and says that it is
// degraded.
func movedAway(ctx context.Context, s *Site) error {
	if subnetKept(ctx, s) == nil {
		return fmt.Errorf("%s still has the subnet %v", s.Victim.Name, s.own.Gateway)
	}
	if err := registered(ctx, s); err != nil {
		return err
	}
	return isNamed("degraded")(ctx, s)
}

// operatorAgrees does what the daemon asks for: the file goes, and it is no longer degraded.
func operatorAgrees(ctx context.Context, s *Site) error {
	if err := Once(`rm -v "$STATE_DIR/subnet-changed"`)(ctx, s); err != nil {
		return fmt.Errorf("agree: %w", err)
	}
	if err := s.Victim.SetupPods(); err != nil {
		return err
	}
	_, err := s.await(ctx, All(func(ctx context.Context, s *Site) error { return contentOne(ctx, s.Victim) }, reaches),
		time.Now(), 90*time.Second)
	return err
}

// storeAway is what is seen while etcd does not do what it should: the node goes on with what it has.
func storeAway(reason string) *Seen {
	return degrades("store", reason, `overlayd_store_reachable 0`).in(10 * time.Second)
}

// changeConfig writes another network config; Undo writes the one that was there.
func changeConfig(to func(old string) string) Action {
	const key = prefix + "config"
	return Store(func(ctx context.Context, s *Site, cli *clientv3.Client) error {
		resp, err := cli.Get(ctx, key)
		if err != nil || len(resp.Kvs) != 1 {
			return fmt.Errorf("read the network config: %w", err)
		}
		old := string(resp.Kvs[0].Value)
		s.Defer(Put(text(key), text(old)))
		return Put(text(key), text(to(old)))(ctx, s)
	})
}
