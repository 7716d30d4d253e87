package faults

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/test/lab"
)

// swept is what the log says when routes to a peer that is gone were taken away.
const swept = `kernel reconciled.*delete route|peers changed.*"removed": [1-9]|peer removed`

// comeBack is how long a daemon that starts may take until it is content.
const comeBack = 5 * time.Second

// boot are starts after which a node has to find back to what it was.
func boot() []Fault {
	rows := []Fault{
		{
			Name: "reboot with etcd away", On: []string{OnVXLAN, OnHostGW, OnDual, OnWireGuard}, Short: true,
			Inject: Steps(stopDaemon, wipe, stopStore, startDaemon), Expect: All(KernelWhole, reaches),
			Hold: 3 * time.Second, Keeps: KernelWhole, Restore: storeBack,
			Bound: Bound{Lost: Any, Repair: catchUp}, Log: `starting from persisted state`,
			Seen: degrades("offline", "no answer from etcd since the start", `overlayd_lease_held 0`).in(10 * time.Second),
		},
		{
			Name: "started with etcd away, and its key deleted meanwhile", On: []string{OnVXLAN, OnDual},
			Inject: Steps(stopDaemon, deleteOwnKey, stopStore, startDaemon, Until(offline, catchUp), startStore),
			Expect: registered, Restore: Wait(0),
			Bound: Bound{Lost: Any, Repair: catchUp}, Log: `the lease disappeared from etcd`,
		},
		{
			Name: "another port, then a start with etcd away", On: []string{OnVXLAN, OnDual}, Short: true,
			Inject: Steps(changePort, stopDaemon, stopStore, startDaemon, Until(offline, catchUp)),
			Expect: All(usesPort, reaches), Hold: time.Second, Keeps: usesPort, Restore: Steps(startStore, Undo),
			Bound: Bound{Lost: Any, Every: true, Repair: catchUp}, Log: `starting from persisted state`,
		},
		{
			Name: "another port, SIGKILL a second later, then a reboot with etcd away", On: []string{OnVXLAN, OnDual},
			Inject: Steps(changePort, Wait(time.Second), killDaemon, wipe, stopStore, startDaemon, Until(offline, catchUp)),
			Expect: All(usesPort, reaches), Hold: time.Second, Keeps: usesPort, Restore: Steps(startStore, Undo),
			Bound: Bound{Lost: Any, Every: true, Repair: catchUp}, Log: `starting from persisted state`,
		},
		{
			// As after flanneld was stopped and its device was left: the lease is flannel's, and so are the packets that peers
			// send.
			Name: "started with flannel's device in the way", On: []string{OnVXLAN, OnDual, OnDirect}, Short: true,
			Inject: Steps(stopDaemon, wipe,
				On(`ip link add flannel$F type vxlan id 1 dstport 8472 local $IP dev eth0
					ip link set flannel$F address 02:00:00:00:00:$(( 10 - F )) up`),
				Afterwards(On(`ip link del flannel$F 2>/dev/null || true`)), flannelsLease, startDaemon),
			Expect: unannounced, Hold: 3 * time.Second, Keeps: unannounced,
			Restore: Steps(On(`ip link del flannel$F`), Undo), Bound: Bound{Lost: Any, Repair: 4 * time.Second},
			Log: `condition failed.*"kernel".*flannel`, Seen: unreadies("kernel", "the VXLAN device flannel-"),
		},
		{
			Name:   "reboot",
			Inject: Steps(stopDaemon, wipe, startDaemon), Bound: Bound{Lost: Any, Repair: comeBack},
		},
		{
			Name: "start with etcd away, nothing else lost", On: []string{OnVXLAN, OnHostGW, OnDual},
			Inject: Steps(stopDaemon, stopStore, startDaemon), Hold: 6 * time.Second, Keeps: KernelWhole,
			Restore: storeBack, Bound: lossless(catchUp), Log: `(?i)condition failed.*"(store|offline)"`,
		},
		{
			Name: "peer removed while the daemon was down: swept after the start", On: []string{OnVXLAN, OnHostGW, OnDual},
			Short: true,
			Inject: Steps(ghostRemoved.appears, Until(ghostRemoved.routed, 3*time.Second), stopDaemon, ghostRemoved.goes,
				startDaemon),
			Bound: lossless(letGo), Log: swept,
		},
		{
			Name: "peer removed while the daemon was down: not swept before the first table",
			On:   []string{OnVXLAN, OnHostGW, OnDual},
			Inject: Steps(ghostRestart.appears, Until(ghostRestart.routed, 3*time.Second), stopDaemon, ghostRestart.goes,
				stopStore, startDaemon),
			Hold: 6 * time.Second, Keeps: ghostRestart.routedHere, Restore: startStore,
			Bound: lossless(catchUp), Log: swept,
		},
	}
	return in(Boot, lossless(comeBack), rows)
}

// daemon is what happens to the daemon itself. In none of it a packet is lost.
func daemon() []Fault {
	rows := []Fault{
		{
			Name: "SIGKILL 20 times at random moments while peers change", On: []string{OnVXLAN, OnHostGW, OnDual},
			Inject: killOften(20), Bound: Bound{Repair: letGo, Lines: 20 * mostLines}, Log: `overlayd starting`,
		},
		{
			Name: "SIGKILL", Short: true, Soak: true, On: []string{OnVXLAN, OnHostGW, OnDual, OnDirect, OnNFTables, OnLegacy, OnWireGuard},
			Inject: killDaemon, Hold: 2 * time.Second, Restore: startDaemon, Log: `overlayd starting`,
			Seen: &Seen{Status: `does not run on this node`, Ready: NoAnswer},
		},
		{
			Name: "crash with a stack trace, as a panic ends it", On: []string{OnVXLAN, OnHostGW, OnDual},
			Inject: Steps(crashDaemon, Until(daemonEnded, 20*time.Second), startDaemon), Log: `overlayd starting`,
			Bound: Bound{Repair: comeBack, Lines: 20 * mostLines}, // the trace has a line for each frame
		},
		{
			Name: "restart", Soak: true, On: []string{OnVXLAN, OnHostGW, OnDual, OnDirect, OnNFTables, OnLegacy, OnWireGuard},
			Inject: Steps(stopDaemon, startDaemon), Log: `overlayd stopping`,
		},
		{
			Name: "upgrade to another binary", Short: true, Inject: upgrade, Log: `overlayd starting`,
		},
		{
			Name: "stopped in its tracks (SIGSTOP) for 5s", On: []string{OnHostGW, OnVXLAN}, Short: true, Soak: true,
			Inject: pauseDaemon, Hold: 5 * time.Second, Keeps: KernelWhole, Restore: resumeDaemon,
			Seen: (&Seen{
				Status: `does not answer`, Doctor: `^FAIL daemon the daemon does not answer`, Ready: NoAnswer,
			}).in(20 * time.Second),
		},
		{
			Name: "a second daemon on the node", Short: true, Inject: secondDaemon, Log: ``,
		},
		{
			Name: "killed after drift: repaired by the next one", On: []string{OnVXLAN, OnDual},
			Inject: Steps(killDaemon, On(`ip $F neigh flush dev $DEV nud permanent; ip $F route flush proto 118`), startDaemon),
			Bound:  Bound{Lost: Any, Repair: comeBack}, Log: `kernel reconciled|reverted`,
		},
		{
			Name: "state directory read-only", Short: true,
			Inject: Steps(stopDaemon, Afterwards(freeState),
				Once(`mount -t tmpfs -o size=64k none "$STATE_DIR"; mount -o remount,ro "$STATE_DIR"`), startDaemon),
			Expect: All(KernelWhole, LogSays(`condition failed.*"state-dir"`)), Hold: 2 * time.Second, Restore: Undo,
			Log:  `condition failed.*"state-dir"`,
			Seen: degrades("state-dir", "read-only"),
		},
		{
			Name: "state directory full",
			Inject: Steps(stopDaemon, Afterwards(freeState),
				Once(`mount -t tmpfs -o size=8k none "$STATE_DIR"; head -c 100000 /dev/zero > "$STATE_DIR/full" 2>/dev/null || true`), startDaemon),
			Expect: All(KernelWhole, LogSays(`condition failed.*"state-dir"`)), Hold: 2 * time.Second, Restore: Undo,
			Log: `condition failed.*"state-dir"`,
		},
		{
			Name:   "lease.json is nonsense",
			Inject: Steps(stopDaemon, Once(`head -c 4096 /dev/urandom > "$STATE_DIR/lease.json"`), startDaemon),
			Log:    `condition failed.*"state-dir"`,
		},
		{
			Name: "subnet.env deleted", Soak: true,
			Inject: Once(`rm "$SUBNET_FILE"`), Short: true,
			Bound: lossless(withinASecond), Log: `reverted external change.*"subnet-file"`,
			Seen: repairs("subnet-file", "subnet.env"),
		},
		{
			Name: "subnet.env emptied", Soak: true,
			Inject: Once(`cp /dev/null "$SUBNET_FILE"`),
			Bound:  lossless(withinASecond), Log: `reverted external change.*"subnet-file"`,
			Seen: repairs("subnet-file", "subnet.env"),
		},
	}
	return in(Daemon, lossless(comeBack), rows)
}

func stopDaemon(ctx context.Context, s *Site) error { return s.Victim.Stop(ctx) }
func pauseDaemon(_ context.Context, s *Site) error  { return s.Victim.Pause() }
func resumeDaemon(_ context.Context, s *Site) error { return s.Victim.Resume() }
func killDaemon(ctx context.Context, s *Site) error { return s.Victim.Kill(ctx) }

// crashDaemon has the Go runtime end the daemon as it does after a panic: with a trace of all goroutines and exit
// status 2.
func crashDaemon(_ context.Context, s *Site) error { return s.Victim.Signal(unix.SIGQUIT) }

// daemonEnded holds when the daemon does not run.
func daemonEnded(_ context.Context, s *Site) error {
	return unless(!s.Victim.Running(), "overlayd on %s still runs", s.Victim.Name)
}

func startDaemon(_ context.Context, s *Site) error { return s.Victim.Start() }

// wipe takes away what a reboot takes away, the pods aside: the state directory stays.
func wipe(ctx context.Context, s *Site) error {
	return Steps(
		On(`[ $F = -6 ] || echo 0 > /proc/sys/net/ipv4/ip_forward; [ $F = -4 ] || echo 0 > /proc/sys/net/ipv6/conf/all/forwarding
			ip link del $DEV 2>/dev/null || true
			ip $F route flush proto 118 table all; while ip $F rule del lookup 118 2>/dev/null; do :; done`),
		Once(`nft flush ruleset; $IPT -w -F; $IPT -w -t nat -F; $IPT -w -X; $IPT -w -t nat -X; ipset destroy; rm -f "$SUBNET_FILE"`),
	)(ctx, s)
}

// storeBack ends the absence of etcd: it has the node's lease, and the node does not say otherwise.
func storeBack(ctx context.Context, s *Site) error {
	return Steps(startStore, Until(Whole, catchUp), Until(not(LogSays(`disappeared from etcd`)), 0))(ctx, s)
}

// changePort has all nodes use another port, once the victim has written down its own.
func changePort(ctx context.Context, s *Site) error {
	return Steps(Until(remembersPort, 40*time.Second), changeConfig(otherPort), Until(usesPort, catchUp))(ctx, s)
}

// otherPort is a network config with another UDP port, and usesPort holds when the devices of all nodes have it.
func otherPort(old string) string { return strings.ReplaceAll(old, "8472", "8473") }

func usesPort(ctx context.Context, s *Site) error {
	return s.everyNode(func(n *lab.Node) error {
		out, err := n.Run(ctx, "ip", "-d", "link", "show", "type", "vxlan")
		return errors.Join(err, unless(strings.Count(out, "dstport 8473") == len(s.families),
			"%s: not every device has port 8473: %s", n.Name, out))
	})
}

// remembersPort holds when the victim has written down its peers and the lab's own port: what is written later is
// because of a change.
func remembersPort(ctx context.Context, s *Site) error {
	return Sees(`grep -q '"Port":8472' "$STATE_DIR/lease.json" && grep -q '"Peers":' "$STATE_DIR/peers.json"`)(ctx, s)
}

// offline holds when the victim works with what it remembers.
func offline(ctx context.Context, s *Site) error {
	return isNamed("degraded: offline")(ctx, s)
}

// flannelsLease makes of the victim's lease the one that flannel would have.
func flannelsLease(ctx context.Context, s *Site) error {
	own, err := s.leaseOf(ctx, s.Victim)
	if err != nil {
		return err
	}
	var lease map[string]any
	if err := json.Unmarshal([]byte(own.value), &lease); err != nil {
		return err
	}
	for _, key := range []string{"NodeName", "NodeID", "PublicIPLocal"} {
		delete(lease, key)
	}
	value, err := json.Marshal(lease)
	if err != nil {
		return err
	}
	revision, err := s.put(ctx, own.key, string(value), clientv3.WithLease(own.etcdLease))
	s.facts[own.key] = fmt.Sprint(revision)
	return err
}

// unannounced holds while nothing was written since, and the victim says why.
func unannounced(ctx context.Context, s *Site) error {
	_, text, err := s.Victim.Readyz(ctx)
	if err != nil {
		return err
	}
	return s.withStore(ctx, func(ctx context.Context, cli *clientv3.Client) error {
		newest := clientv3.WithSort(clientv3.SortByModRevision, clientv3.SortDescend)
		resp, err := cli.Get(ctx, subnets, clientv3.WithPrefix(), newest, clientv3.WithLimit(1))
		if err != nil || len(resp.Kvs) == 0 {
			return fmt.Errorf("read the leases: %w", err)
		}
		kv := resp.Kvs[0]
		return errors.Join(
			unless(s.facts[string(kv.Key)] == fmt.Sprint(kv.ModRevision), "%s was written: %s", kv.Key, kv.Value),
			unless(strings.Contains(text, "not ready: kernel: ") && strings.Contains(text, "flannel-"),
				"/readyz does not name the device: %s", text))
	})
}

// killOften kills the daemon at random moments; between two kills a peer comes or goes, so that there is something to
// be done.
func killOften(times int) Action {
	return func(ctx context.Context, s *Site) error {
		if err := ghostKilled.appears(ctx, s); err != nil {
			return err
		}
		for i := range times {
			change := ghostKilled.goes
			if i%2 == 1 {
				change = ghostKilled.returns
			}
			if err := change(ctx, s); err != nil {
				return err
			}
			if err := sleep(ctx, rand.N(300*time.Millisecond)); err != nil {
				return err
			}
			if err := errors.Join(s.Victim.Kill(ctx), s.Victim.Start()); err != nil {
				return err
			}
		}
		return Undo(ctx, s)
	}
}

// upgrade restarts the daemon from a copy of the binary.
func upgrade(ctx context.Context, s *Site) error {
	path := filepath.Join(s.Lab.Dir(), "overlayd-next")
	if _, err := s.Victim.Run(ctx, "cp", "--remove-destination", s.Victim.Argv()[0], path); err != nil {
		return err
	}
	if err := s.Victim.Stop(ctx); err != nil {
		return err
	}
	s.Victim.Use(path)
	return s.Victim.Start()
}

// secondDaemon starts the node's daemon once more, which must be refused in so many words.
func secondDaemon(ctx context.Context, s *Site) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	argv := s.Victim.Argv()
	out, err := s.Victim.Run(ctx, argv[0], append(argv[1:], "--healthz-port", "0")...)
	if err == nil || !strings.Contains(out, "another overlayd is running") {
		return fmt.Errorf("a second daemon was not refused: %w: %s", err, out)
	}
	return nil
}

// freeState takes the file system off the state directory and restarts the daemon.
func freeState(ctx context.Context, s *Site) error {
	if err := s.Victim.Stop(ctx); err != nil {
		return err
	}
	err := unix.Unmount(s.Victim.StateDir(), unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmount %s: %w", s.Victim.StateDir(), err)
	}
	return s.Victim.Start()
}
