package faults

import "time"

// firewall is what others do to the rules. Each script works on whichever driver the setup has: NFT_TABLE is the daemon's own table
// where there is one, IPT the iptables of the family otherwise.
func firewall() []Fault {
	notified := []string{OnVXLAN, OnDual, OnNFTables} // nf_tables says when it changes
	every := []string{OnVXLAN, OnDual, OnNFTables, OnLegacy}
	rows := []Fault{
		{
			Name: "our chains flushed", On: every, Short: true, Soak: true,
			Inject: On(`if [ -n "$NFT_TABLE" ]; then nft flush table $NFT_TABLE; else $IPT -w -t nat -F OVERLAYD-POSTRTG; $IPT -w -F OVERLAYD-FWD; fi`), Seen: rewritten(),
		},
		{
			Name: "jumps removed", On: []string{OnVXLAN, OnDual, OnLegacy}, Log: `repaired.*: firewall: jump missing`,
			Inject: On(`for t in nat filter; do $IPT -w -t $t -S | grep -e "-j OVERLAYD" | sed "s/^-A/-w -t $t -D/" | xargs -r -L1 $IPT; done`),
		},
		{
			Name: "jump no longer the first", On: []string{OnVXLAN, OnDual, OnLegacy},
			Inject: Steps(On(`$IPT -w -t nat -I POSTROUTING -d 192.0.2.1/32 -j RETURN 2>/dev/null || $IPT -w -t nat -I POSTROUTING -d 2001:db8::1/128 -j RETURN`),
				Afterwards(On(`$IPT -w -t nat -D POSTROUTING -d 192.0.2.1/32 -j RETURN 2>/dev/null || $IPT -w -t nat -D POSTROUTING -d 2001:db8::1/128 -j RETURN 2>/dev/null || true`))),
			Expect:  Sees(`$IPT -w -t nat -S POSTROUTING | grep -v -e '^-P' | head -n 1 | grep OVERLAYD`),
			Restore: Undo, Log: `repaired.*: firewall: jump not first`,
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
			Name: "set of node addresses emptied", On: []string{OnHostGW, OnDirect}, Bound: Bound{Repair: 10*time.Second + withinASecond},
			Inject: Once(`if [ -n "$NFT_TABLE" ]; then for s in $(nft list table $NFT_TABLE | sed -n 's/^\tset \([^ ]*\).*/\1/p'); do nft flush set $NFT_TABLE $s; done
				else ipset flush; fi`), Log: `repaired.*: firewall: set changed`,
		},
		{
			Name: "xtables lock held by another for 20 s, routes go meanwhile", On: []string{OnLegacy},
			Inject: Steps(
				Once(`setsid flock $LOCK sleep 20 >/dev/null 2>&1 & sleep 0.2`),
				On(`ip $F route del $PEER_SUBNET`)),
			Expect: RoutesWhole, Hold: 21 * time.Second, Restore: Wait(0),
			Bound: Bound{Lost: Any, Repair: resync*time.Second + withinASecond}, Log: `repaired.*: route`,
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
			rows[i].Log = `repaired.*: firewall: `
		}
	}
	return rows
}

// rewritten is what is seen of rules that were put right.
func rewritten() *Seen {
	return &Seen{Status: `firewall: .*: \d+, last`, Metrics: []string{`overlayd_firewall_runs_total +`, `overlayd_drift_repaired_total +`}}
}
