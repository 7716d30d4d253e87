package agent

import (
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/overlayd/overlayd/agent/state"
	"github.com/overlayd/overlayd/subnet"
)

// What the node should be follows from the facts alone; a part that can't be derived stays as it was.
func TestDesire(t *testing.T) {
	t.Parallel()
	o := Options{Identity: subnet.Identity{NodeName: "self", NodeID: "id-self"}, StateDir: "/state"}
	now := time.Unix(1e9, 0)
	own, other := peer(7).Subnets, peer(8).Subnets
	saved := state.Persisted{
		Node: o.Identity, Saved: now.Add(-time.Hour), Subnets: subnet.FormatKey(own),
		Expires: now.Add(time.Hour), Config: json.RawMessage(onlyV4),
	}
	read := func(f *facts, json string) {
		c, err := subnet.ParseConfig([]byte(json))
		f.snap.Table = subnet.Table{Revision: 9, Config: c, ConfigErr: err, ConfigJSON: json}
		f.leases, _ = f.leases.follow(f.snap.Table, 0, now, time.Minute)
	}
	for name, tt := range map[string]struct {
		change  func(f *facts)
		is      freshness
		subnets string
		claims  bool
		failed  map[condition]string // "": it holds
	}{
		"nothing is known yet": {
			change: func(f *facts) { f.persisted = saved; f.started = now },
			is:     unread,
		},
		"etcd is away, the persisted state is good": {
			change: func(f *facts) { f.persisted = saved; f.snap.Err = errors.New("no answer") },
			is:     persisted, subnets: "10.244.107.0-24", claims: true,
			failed: map[condition]string{condStore: "no answer", condOffline: "using persisted leases", condLease: ""},
		},
		"etcd is away, the clock is behind": {
			change: func(f *facts) { f.persisted = saved; f.persisted.Saved = now.Add(time.Hour) },
			is:     unread, failed: map[condition]string{condOffline: "the clock says"},
		},
		"no lease yet": {
			change: func(f *facts) { read(f, onlyV4) },
			is:     fresh, claims: true,
			failed: map[condition]string{condLease: "starting", condConfig: "", condUnderlay: ""},
		},
		"the lease is held": {
			change: func(f *facts) { read(f, onlyV4); f.snap.Lease = subnet.Lease{Subnets: own} },
			is:     fresh, subnets: "10.244.107.0-24", claims: true, failed: map[condition]string{condClaim: ""},
		},
		"the config is invalid": {
			change: func(f *facts) { read(f, `{`) },
			is:     fresh, failed: map[condition]string{condConfig: "JSON"},
		},
		"the config is invalid after a restart": {
			change: func(f *facts) {
				read(f, `{`)
				f.persisted = saved
				mine := peer(7)
				mine.Identity = o.Identity
				f.leases.table.Entries = []*subnet.Entry{mine}
				f.snap.Table = f.leases.table
			},
			is: fresh, subnets: "10.244.107.0-24", claims: true, failed: map[condition]string{condConfig: "JSON"},
		},
		"the config is invalid after a restart, of a Node with podCIDRs in two families": {
			change: func(f *facts) {
				read(f, `{`)
				f.persisted = saved
				mine := *peer(7)
				mine.Identity, mine.Subnets.V6 = o.Identity, netip.MustParsePrefix("fd00:10:244::/64")
				f.leases.table.Entries = []*subnet.Entry{&mine}
				f.snap.Table = f.leases.table
			},
			is: fresh, subnets: "10.244.107.0-24", claims: true, failed: map[condition]string{condConfig: "JSON"},
		},
		"the config is invalid, and the lease does not say which subnets are used": {
			change: func(f *facts) {
				read(f, `{`)
				f.subnets, f.snap.Lease = own, subnet.Lease{Attrs: peer(7).Attrs}
			},
			is: fresh, subnets: "10.244.107.0-24", failed: map[condition]string{condConfig: "JSON", condClaim: ""},
		},
		"the subnets don't fit the config": {
			change: func(f *facts) { read(f, `{"Network":"10.99.0.0/16"}`); f.subnets = own },
			is:     fresh, subnets: "10.244.107.0-24", failed: map[condition]string{condConfig: "10.244.107.0-24"},
		},
		"no device leads to the others": {
			change: func(f *facts) { read(f, onlyV4); f.host.Routes = nil },
			is:     fresh, failed: map[condition]string{condUnderlay: "no network interface for IPv4"},
		},
		"etcd is inside the network": {
			change: func(f *facts) {
				read(f, onlyV4)
				f.snap.Endpoints = []netip.Addr{netip.MustParseAddr("10.244.101.7")}
			},
			is: fresh, claims: true, failed: map[condition]string{condEndpoints: "10.244.101.7"},
		},
		"the store lost data": {
			change: func(f *facts) { read(f, onlyV4); f.leases.is, f.leases.until = stale, now.Add(time.Second) },
			is:     stale, claims: true,
		},
		"the store lost data long ago": {
			change: func(f *facts) { read(f, onlyV4); f.leases.is, f.leases.until = stale, now },
			is:     fresh, claims: true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := facts{now: now, started: now.Add(-time.Minute), host: testHost()}
			tt.change(&f)
			d := desire(o, f)
			if d.leases.is != tt.is || subnet.FormatKey(d.subnets) != tt.subnets || (d.claim != subnet.Claim{}) != tt.claims {
				t.Errorf("leases are %d, subnets %v, claim %+v", d.leases.is, d.subnets, d.claim)
			}
			for c, want := range tt.failed {
				err, judged := d.conditions[c]
				if !judged || (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
					t.Errorf("%s: %v, want %q", c, err, want)
				}
			}
		})
	}

	f := facts{now: now, host: testHost()}
	read(&f, onlyV4)
	f.snap.Lease, f.subnets = subnet.Lease{Subnets: other}, own
	if d := desire(o, f); !d.acquired || d.before != own || d.subnets != other {
		t.Errorf("another subnet: acquired %t, before %v, now %v", d.acquired, d.before, d.subnets)
	}
}

// A table is stale for the time of grace after the store has lost data, whether the daemon was running or not.
func TestFreshness(t *testing.T) {
	t.Parallel()
	now := time.Unix(1e9, 0)
	var l leases
	for i, tt := range []struct {
		table     subnet.Table
		persisted int64
		is        freshness
		lost      bool
		losses    int
	}{
		{subnet.Table{}, 5, unread, false, 0},
		{subnet.Table{Revision: 7}, 5, fresh, false, 0},
		{subnet.Table{Revision: 6}, 5, fresh, false, 0},
		{subnet.Table{Revision: 2, Epoch: 1}, 5, stale, true, 1},
		{subnet.Table{Revision: 3, Epoch: 1}, 5, stale, false, 1},
		{subnet.Table{Revision: 3, Epoch: 2}, 5, stale, true, 2},
	} {
		var lost bool
		if l, lost = l.follow(tt.table, tt.persisted, now, time.Minute); l.is != tt.is || lost != tt.lost ||
			l.losses != tt.losses {
			t.Errorf("%d: is %d, lost %t, %d losses", i, l.is, lost, l.losses)
		}
	}
	if l, lost := (leases{}).follow(subnet.Table{Revision: 4}, 5, now, time.Minute); !lost || l.is != stale ||
		!l.until.Equal(now.Add(time.Minute)) {
		t.Errorf("while the daemon was not running: is %d until %v, lost %t", l.is, l.until, lost)
	}
}

// Subnets that Kubernetes assigned have a length of their own. A start without the API goes by them all the same, and
// so does one while the ConfigMap is invalid; in etcd, they are those of another config.
func TestPersistedSubnetsOfAnyLength(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for _, own := range []string{"10.244.2.0-23", "10.244.2.0-26&fd00:10:244:10::-60", "10.244.0.0-16"} {
		for prefix, fits := range map[string]bool{state.Kubernetes: true, "/a/network": false} {
			o := Options{
				Identity: subnet.Identity{NodeName: "self", NodeID: "id-self"}, StateDir: t.TempDir(), Prefix: prefix,
			}
			config := onlyV4
			if strings.Contains(own, "&") {
				config = dual
			}
			err := o.dir().Save(o.dir().LeaseFile(), state.Persisted{Subnets: own, Config: json.RawMessage(config)})
			if err != nil {
				t.Fatal(err)
			}
			f := facts{now: now.Add(time.Minute), host: testHost()}
			if f.persisted, err = o.dir().Load(); err != nil {
				t.Fatal(err)
			}
			table, err := offlineTable(o, f)
			if (err == nil) != fits || fits && !table.Config.Fits(f.persisted.Own()) {
				t.Errorf("%s of %s: %+v, %v", own, prefix, table.Config, err)
			}
			mine := subnet.ParseEntry(own, nil, 1, 1, 0)
			mine.Identity = o.Identity
			f.leases = leases{is: fresh, table: subnet.Table{
				Revision: 1, Entries: []*subnet.Entry{mine}, ConfigErr: errors.New("not JSON"),
			}}
			if d := desire(o, f); (d.subnets == mine.Subnets) != fits {
				t.Errorf("%s of %s, with an invalid config: subnets are %v", own, prefix, d.subnets)
			}
		}
	}
}
