package faults

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/lab"
)

// firewall is what others do to the rules. Each script works on whichever driver the setup has: NFT_TABLE is the
// daemon's own table where there is one, IPT the iptables of the family otherwise.
func firewall() []Fault {
	notified := []string{OnVXLAN, OnDual, OnNFTables} // nf_tables says when it changes
	every := []string{OnVXLAN, OnDual, OnNFTables, OnLegacy}
	rows := []Fault{
		{
			Name: "our chains flushed", On: every, Short: true, Soak: true,
			Inject: On(`if [ -n "$NFT_TABLE" ]; then nft flush table $NFT_TABLE; else $IPT -w -t nat -F OVERLAYD-POSTRTG; $IPT -w -F OVERLAYD-FWD; fi`), Seen: rewritten(),
		},
		{
			Name: "jumps removed", On: []string{OnVXLAN, OnDual, OnLegacy},
			Log:    `reverted external change.*"firewall: jump missing"`,
			Inject: On(`for t in nat filter; do $IPT -w -t $t -S | grep -e "-j OVERLAYD" | sed "s/^-A/-w -t $t -D/" | xargs -r -L1 $IPT; done`),
		},
		{
			Name: "jump no longer the first", On: []string{OnVXLAN, OnDual, OnLegacy},
			Inject: Steps(On(`$IPT -w -t nat -I POSTROUTING -d 192.0.2.1/32 -j RETURN 2>/dev/null || $IPT -w -t nat -I POSTROUTING -d 2001:db8::1/128 -j RETURN`),
				Afterwards(On(`$IPT -w -t nat -D POSTROUTING -d 192.0.2.1/32 -j RETURN 2>/dev/null || $IPT -w -t nat -D POSTROUTING -d 2001:db8::1/128 -j RETURN 2>/dev/null || true`))),
			Expect:  Sees(`$IPT -w -t nat -S POSTROUTING | grep -v -e '^-P' | head -n 1 | grep OVERLAYD`),
			Restore: Undo, Log: `reverted external change.*"firewall: jump misplaced"`,
		},
		{
			Name: "rules reordered", On: []string{OnVXLAN, OnDual, OnLegacy},
			Inject: On(`r=$($IPT -w -t nat -S OVERLAYD-POSTRTG | grep '^-A' | tail -n 1 | sed 's/^-A OVERLAYD-POSTRTG//')
				eval "$IPT -w -t nat -D OVERLAYD-POSTRTG $r"; eval "$IPT -w -t nat -I OVERLAYD-POSTRTG $r"`),
		},
		{
			Name: "foreign rule in our chain", On: every,
			Inject: On(`if [ -n "$NFT_TABLE" ]; then for c in $(nft -s list table $NFT_TABLE | sed -n 's/^\tchain \([^ ]*\).*/\1/p'); do nft insert rule $NFT_TABLE $c counter accept; done
				else $IPT -w -t nat -I OVERLAYD-POSTRTG -j ACCEPT; fi`),
		},
		{
			Name: "nft flush ruleset", On: notified, Short: true, Soak: true,
			Inject: Once(`nft flush ruleset`), Seen: rewritten(),
		},
		{
			Name: "iptables -F; iptables -t nat -F", On: []string{OnVXLAN, OnDual, OnLegacy}, Short: true, Soak: true,
			Inject: On(`$IPT -w -F; $IPT -w -t nat -F`), Seen: rewritten(),
		},
		{
			Name: "iptables -F; -t nat -F; -X (a firewall's reload)", On: []string{OnVXLAN, OnDual, OnLegacy},
			Inject: On(`$IPT -w -F; $IPT -w -t nat -F; $IPT -w -X || true; $IPT -w -t nat -X || true`),
		},
		{
			Name: "our table deleted", On: []string{OnNFTables},
			Inject: Once(`nft delete table $NFT_TABLE`),
		},
		{
			// The kernel tells nobody of changes to its address sets: it is found when the rules are looked at, every 10 s.
			Name: "set of node addresses emptied", On: []string{OnHostGW, OnDirect},
			Bound: Bound{Repair: 10*time.Second + withinASecond},
			Inject: Once(`if [ -n "$NFT_TABLE" ]; then for s in $(nft list table $NFT_TABLE | sed -n 's/^\tset \([^ ]*\).*/\1/p'); do nft flush set $NFT_TABLE $s; done
				else ipset flush; fi`), Log: `reverted external change.*"firewall: set changed"`,
		},
		{
			Name: "xtables lock held by another for 20 s, routes go meanwhile", On: []string{OnLegacy},
			Inject: Steps(
				Once(`setsid flock $LOCK sleep 20 >/dev/null 2>&1 & sleep 0.2`),
				On(`ip $F route del $PEER_SUBNET`)),
			Expect: RoutesWhole, Hold: 21 * time.Second, Restore: Wait(0),
			Bound: Bound{Lost: Any, Repair: resync*time.Second + withinASecond}, Log: `reverted external change.*"route"`,
		},
		{
			Name: "rules flushed while another holds the xtables lock for 5 s", On: []string{OnLegacy},
			Inject: Once(`$IPT -w -t nat -F OVERLAYD-POSTRTG; setsid flock $LOCK sleep 5 >/dev/null 2>&1 &`),
			Hold:   5 * time.Second, Restore: Wait(0),
		},
	}
	rows = in(Firewall, lossless(withinASecond), rows)
	for i := range rows {
		if rows[i].Log == "" {
			rows[i].Log = `reverted external change.*"firewall: `
		}
	}
	rows = append(rows, in(Firewall, lossless(withinASecond), forwarded())...)
	return append(rows, containerRules(), Fault{
		// flannel's nodes are such, and those behind a NAT. The peer's daemon must not be there to put its lease right.
		Area: Firewall, Name: "a peer that answers nodes without the tunnel, strict rp_filter",
		On: []string{OnVXLAN, OnDual, OnNFTDual, OnLegacy},
		Inject: Steps(kubeProxy, strictFilter, func(ctx context.Context, s *Site) error { return s.Peer.Stop(ctx) },
			bareAnswers),
		Expect: All(seenFrom(true, func(s *Site) *lab.Node { return s.Peer }), seenFrom(false, (*Site).otherThan),
			seenAs(tunnelsToPeer, ways()...)),
		Restore: Steps(Undo, func(_ context.Context, s *Site) error { return s.Peer.Start() }),
		Bound:   lossless(5 * time.Second),
	})
}

// forwarded is what others put into FORWARD, whose policy is DROP: what they say of a packet holds, and all that they
// don't speak of goes through. $DENIED is an address of a pod that gets nothing.
func forwarded() []Fault {
	const engine = `$IPT -w -N ENGINE; $IPT -w -N ENGINE-POD
		$IPT -w -A ENGINE -d $DENIED -j ENGINE-POD; $IPT -w -A ENGINE-POD -j DROP; `
	row := func(name, rules string, behind int) Fault {
		at := fmt.Sprintf(`[ "$($IPT -w -S FORWARD | tail -n %d | head -n 1)" = "-A FORWARD -j OVERLAYD-FWD" ]`,
			behind+1)
		return Fault{
			Name: "FORWARD: " + name, On: []string{OnVXLAN, OnDual, OnNFTables, OnLegacy},
			Inject: Steps(
				secondAddress, Until(passes, 3*time.Second), Afterwards(On(unforward)),
				On(`$IPT -w -P FORWARD ACCEPT`), Until(Sees(`$IPT -w -S FORWARD | grep OVERLAYD-FWD`), 3*time.Second),
				On(`$IPT -w -P FORWARD DROP`),
				On(rules)),
			Expect: All(dropped, Sees(at)), Hold: 1500 * time.Millisecond, Keeps: dropped, Restore: Undo,
		}
	}
	return []Fault{
		row("a policy engine inserts its chains at the top", engine+`$IPT -w -I FORWARD 1 -j ENGINE`, 0),
		row("a policy engine appends its chains", engine+`$IPT -w -A FORWARD -j ENGINE`, 0),
		row("an operator inserts a REJECT", `$IPT -w -I FORWARD 1 -d $DENIED -j REJECT`, 0),
		row("an operator appends a DROP", `$IPT -w -A FORWARD -d $DENIED -j DROP`, 0),
		row("it ends with a REJECT of everything",
			engine+`$IPT -w -I FORWARD 1 -j ENGINE; $IPT -w -A FORWARD -j REJECT`, 1),
		{
			Name: "FORWARD: another program wants to be the last", On: []string{OnVXLAN},
			Inject: Steps(Afterwards(On(unforward)), On(`$IPT -w -P FORWARD DROP; for i in $(seq 40); do
				$IPT -w -D FORWARD -i eth9 -j DROP 2>/dev/null || true; $IPT -w -A FORWARD -i eth9 -j DROP
				sleep 0.3; done`)),
			Expect:  Sees(`$IPT -w -S FORWARD | tail -n 1 | grep OVERLAYD-FWD`),
			Restore: Undo, Log: `another process keeps moving the jump`, Bound: lossless(6 * time.Second),
		},
	}
}

// strictFilter has the victim drop what does not come by the device to which it would answer.
func strictFilter(ctx context.Context, s *Site) error {
	const files = "/proc/sys/net/ipv4/conf/all/rp_filter /proc/sys/net/ipv4/conf/eth0/rp_filter"
	before, err := s.Victim.Shell(ctx, "cat "+files+"; for f in "+files+"; do echo 1 > $f; done")
	if err != nil {
		return err
	}
	s.Defer(Once(fmt.Sprintf("set -- %s; for v in %s; do echo $v > $1; shift; done", files,
		strings.Join(strings.Fields(before), " "))))
	return nil
}

// bareAnswers makes the peer one whose lease does not say that its address is its own, and which has no route back
// through the tunnel for what its pods answer to nodes.
func bareAnswers(ctx context.Context, s *Site) error {
	if err := each(peer, `ip $F rule del priority 11800`)(ctx, s); err != nil {
		return err
	}
	own, err := s.leaseOf(ctx, s.Peer)
	if err != nil {
		return err
	}
	value := strings.Replace(own.value, `,"PublicIPLocal":true`, "", 1)
	_, err = s.put(ctx, own.key, value, clientv3.WithLease(own.etcdLease))
	return errors.Join(err, unless(value != own.value, "the lease of %s: %s", s.Peer.Name, own.value))
}

// tunnelsToPeer is the victim's address in the tunnel for the peer's pods, and its own for others.
func tunnelsToPeer(s *Site, f addr.Family, to *lab.Node) netip.Addr {
	if to == s.Peer {
		return s.own.Gateway.Get(f).Masked().Addr()
	}
	return s.Victim.Addr(f)
}

// seenFrom holds when a pod of a node answers what the victim sends from its own address, and has it from there, or
// from its address in the tunnel.
func seenFrom(tunnel bool, node func(*Site) *lab.Node) Check {
	return func(ctx context.Context, s *Site) error {
		env, err := node(s).SubnetEnv()
		if err != nil {
			return err
		}
		for _, f := range s.families {
			want := s.Victim.Addr(f)
			if tunnel {
				want = s.own.Gateway.Get(f).Masked().Addr()
			}
			to := netip.AddrPortFrom(env.PodAddr(f, 0).Addr(), backendPort)
			c, err := connect(ctx, s.Victim.Machine, s.Victim.Addr(f), node(s).Pods()[0], to, to)
			if err != nil {
				return err
			}
			defer c.close()
			if err := unless(c.seen() == want, "a pod of %s sees %s as %s, want %s", node(s).Name, s.Victim.Name, c.seen(),
				want); err != nil {
				return err
			}
		}
		return nil
	}
}

// containerRules is what Docker Engine 28 and later put into the table raw for each container: its bridge alone may
// reach it.
func containerRules() Fault {
	const rule = `PREROUTING -d $POD_IP ! -i cni0 -j DROP`
	return Fault{
		Area: Firewall, Name: "Docker keeps its containers from being reached", On: []string{OnVXLAN, OnDual, OnLegacy},
		Inject: Steps(On(`$IPT -w -t raw -A `+rule), Afterwards(On(`$IPT -w -t raw -D `+rule))), Restore: Undo,
		Bound: drift(),
		Seen: (&Seen{}).diagnosed(
			`^FAIL forwarded packets packets from pods of other nodes to [^ ]+ are dropped by .*raw.* chain PREROUTING` +
				`|^warn iptables-legacy .*-A PREROUTING -d [^ ]+ ! -i cni0 -j DROP`),
	}
}

// unforward takes away what rows have put into FORWARD.
const unforward = `$IPT -w -P FORWARD ACCEPT; $IPT -w -F FORWARD
	for c in ENGINE ENGINE-POD; do $IPT -w -F $c; $IPT -w -X $c; done 2>/dev/null || true
	[ -z "$NFT_TABLE" ] || nft delete table $NFT_FAMILY filter`

// secondary is a second address of the victim's pod.
func secondary(own lab.SubnetEnv, f addr.Family) netip.Addr { return own.PodAddr(f, 198).Addr() }

// pod is the victim's first one, and secondAddress gives it that address. It must not become the source of what the pod
// sends: of several IPv6 addresses, the kernel takes the newest that is not deprecated.
func pod(s *Site) lab.Machine { return s.Victim.Pods()[0] }

func secondAddress(ctx context.Context, s *Site) error {
	return Steps(Afterwards(each(pod, `ip address del $DENIED/$BITS dev eth0`)),
		each(pod, `ip address replace $DENIED/$BITS dev eth0 $([ $F = -4 ] || echo nodad preferred_lft 0)`))(ctx, s)
}

// passes holds when a peer's pod reaches the second address in every family, dropped when it does in none.
func passes(ctx context.Context, s *Site) error {
	_, err := reached(ctx, s)
	return err
}

func dropped(ctx context.Context, s *Site) error {
	n, _ := reached(ctx, s)
	return unless(n == 0, "the pod that must get nothing is reached from %s in %d families", s.Peer.Name, n)
}

func reached(ctx context.Context, s *Site) (families int, err error) {
	for _, f := range s.families {
		_, e := s.Peer.Pods()[0].Ping(ctx, lab.Ping{To: secondary(s.own, f), Wait: 200 * time.Millisecond})
		if err = errors.Join(err, e); e == nil {
			families++
		}
	}
	return families, err
}

// rewritten is what is seen of rules that were put right.
func rewritten() *Seen {
	return &Seen{Status: `firewall: .*: \d+, last`, Metrics: []string{
		`overlayd_firewall_runs_total +`,
		`overlayd_drift_reverted_total +`,
	}}
}
