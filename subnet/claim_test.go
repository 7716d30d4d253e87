package subnet

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/addr"
)

const (
	net4   = `{"Network":"10.244.0.0/16"}`
	netTwo = `{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48"}`
	net6   = `{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/48"}`
)

// attrs is what a node says of itself: node "a" has the id "a-id".
func attrs(name, ip string) Attrs {
	a := Attrs{PublicIP: ips(ip), PublicIPLocal: true, Backend: VXLAN, Identity: Identity{NodeName: name}}
	if name != "" {
		a.NodeID = name + "-id"
	}
	f := addr.FamilyOf(netip.MustParseAddr(ip))
	a.VTEP.Set(f, VTEP{1, addr.MAC{2, 0, 0, 0, 0, ips(ip).Get(f).AsSlice()[f.Bits()/8-1]}})
	return a
}

func with(a Attrs, change func(*Attrs)) Attrs {
	change(&a)
	return a
}

func TestDecide(t *testing.T) {
	me := attrs("me", "192.168.1.1")
	other := attrs("other", "192.168.1.2")
	flannel := with(me, func(a *Attrs) { a.Identity = Identity{}; a.PublicIPLocal = false })
	forMe := Attrs{Identity: Identity{NodeName: "me"}}
	dualMe := with(me, func(a *Attrs) { a.PublicIP.V6 = netip.MustParseAddr("2001:db8::1") })
	fresh := "?" // any new key

	for _, tt := range []struct {
		name       string
		config     string
		entries    []*Entry
		claim      Attrs
		remembered addr.Per[netip.Prefix]
		keep       bool

		key       string
		write     bool
		expect    int64
		lease     int64
		reserved  bool
		unchanged string
		drop      string
	}{
		{name: "an empty store", config: net4, claim: me, key: fresh, write: true, unchanged: fresh},
		{
			name: "remembered and free", config: net4, claim: me, remembered: per("10.244.9.0/24"),
			key: "10.244.9.0-24", write: true, unchanged: "10.244.9.0-24",
		},
		{
			name:   "remembered and free, outside SubnetMin to SubnetMax",
			config: `{"Network":"10.244.0.0/16","SubnetMin":"10.244.20.0"}`, claim: me, remembered: per("10.244.9.0/24"),
			key: "10.244.9.0-24", write: true, unchanged: "10.244.9.0-24",
		},
		{
			name: "remembered, taken by another", config: net4, claim: me, remembered: per("10.244.9.0/24"),
			entries: []*Entry{leaseAt("10.244.9.0-24", other, 5, 50)}, key: fresh, write: true, unchanged: fresh,
		},
		{
			name: "remembered, inside a reservation", config: net4, claim: me, remembered: per("10.244.9.0/24"),
			entries: []*Entry{leaseAt("10.244.8.0-22", Attrs{}, 5, 0)}, key: fresh, write: true, unchanged: fresh,
		},
		{
			name: "remembered, part of it reserved", config: net4, claim: me, remembered: per("10.244.9.0/24"),
			entries: []*Entry{leaseAt("10.244.9.77-32", Attrs{}, 5, 0)}, key: fresh, write: true, unchanged: fresh,
		},
		{
			name: "remembered, of another length", config: net4, claim: me, remembered: per("10.244.9.0/25"), key: fresh,
			write: true, unchanged: fresh,
		},
		{
			name: "remembered, of another network", config: net4, claim: me, remembered: per("10.245.9.0/24"), key: fresh,
			write: true, unchanged: fresh,
		},

		{
			name: "mine, unchanged", config: net4, claim: me, entries: []*Entry{leaseAt("10.244.5.0-24", me, 5, 50)},
			key: "10.244.5.0-24", expect: 5, lease: 50,
		},
		{
			name: "mine, whatever is remembered", config: net4, claim: me, remembered: per("10.244.9.0/24"),
			entries: []*Entry{leaseAt("10.244.5.0-24", me, 5, 50)}, key: "10.244.5.0-24", expect: 5, lease: 50,
		},
		{
			name: "mine, with a changed MAC", config: net4, claim: with(me, func(a *Attrs) { a.VTEP.V4.MAC[5] = 9 }),
			entries: []*Entry{leaseAt("10.244.5.0-24", me, 5, 50)}, key: "10.244.5.0-24", write: true, expect: 5, lease: 50,
		},
		{
			name: "mine, with a changed public IP", config: net4, claim: with(me,
				func(a *Attrs) { a.PublicIP = ips("192.168.7.7") }),
			entries: []*Entry{leaseAt("10.244.5.0-24", me, 5, 50)}, key: "10.244.5.0-24", write: true, expect: 5, lease: 50,
		},
		{
			name: "mine, renamed host", config: net4, claim: with(me, func(a *Attrs) { a.NodeName = "new" }),
			entries: []*Entry{leaseAt("10.244.5.0-24", me, 5, 50)}, key: "10.244.5.0-24", write: true, expect: 5, lease: 50,
		},
		{
			name: "mine, though another one came with my public IP", config: net4, claim: me,
			entries: []*Entry{leaseAt("10.244.5.0-24", me, 5, 50), leaseAt("10.244.6.0-24",
				with(other, func(a *Attrs) { a.PublicIP = me.PublicIP }), 6, 60)},
			key: "10.244.5.0-24", expect: 5, lease: 50,
		},
		{
			name: "a clone with my id, but another name and address", config: net4, claim: me,
			entries: []*Entry{leaseAt("10.244.5.0-24", with(other, func(a *Attrs) { a.NodeID = me.NodeID }), 5, 50)}, key: fresh,
			write: true, unchanged: fresh,
		},
		{
			name: "mine, a reservation now", config: net4, claim: me, entries: []*Entry{leaseAt("10.244.5.0-24", me, 5, 0)},
			key: "10.244.5.0-24", expect: 5, reserved: true,
		},
		{
			name: "two of mine, the remembered one is kept", config: net4, claim: me, remembered: per("10.244.6.0/24"),
			entries: []*Entry{leaseAt("10.244.5.0-24", me, 5, 50), leaseAt("10.244.6.0-24", me, 6, 60)},
			key:     "10.244.6.0-24", write: true, expect: 6, lease: 60, drop: "10.244.5.0-24",
		},
		{
			name: "two of mine, else the older one", config: net4, claim: me,
			entries: []*Entry{leaseAt("10.244.5.0-24", me, 6, 60), leaseAt("10.244.6.0-24", me, 5, 50)},
			key:     "10.244.6.0-24", write: true, expect: 5, lease: 50, drop: "10.244.5.0-24",
		},
		{
			name: "mine under a key with host bits is given up for the right one", config: net4, claim: me,
			entries: []*Entry{leaseAt("10.244.5.7-24", me, 5, 50)},
			key:     "10.244.5.0-24", write: true, unchanged: "10.244.5.0-24", drop: "10.244.5.7-24",
		},

		{
			name: "of my ID, with another name and address, where I remember it", config: net4, claim: me,
			remembered: per("10.244.5.0/24"),
			entries:    []*Entry{leaseAt("10.244.5.0-24", with(other, func(a *Attrs) { a.NodeID = me.NodeID }), 5, 50)},
			key:        "10.244.5.0-24", write: true, expect: 5, lease: 50,
		},
		{
			name: "of my ID, with another name and address, not remembered", config: net4, claim: me,
			remembered: per("10.244.6.0/24"),
			entries:    []*Entry{leaseAt("10.244.5.0-24", with(other, func(a *Attrs) { a.NodeID = me.NodeID }), 5, 50)},
			key:        "10.244.6.0-24", write: true, unchanged: "10.244.6.0-24",
		},
		{
			name: "of another ID, where I remember it", config: net4, claim: me, remembered: per("10.244.5.0/24"),
			entries: []*Entry{leaseAt("10.244.5.0-24", other, 5, 50)}, key: fresh, write: true, unchanged: fresh,
		},
		{
			name: "mine comes before one of my ID that I remember", config: net4, claim: me, remembered: per("10.244.5.0/24"),
			entries: []*Entry{
				leaseAt("10.244.5.0-24", with(other, func(a *Attrs) { a.NodeID = me.NodeID }), 5, 50),
				leaseAt("10.244.6.0-24", me, 6, 60),
			},
			key: "10.244.6.0-24", expect: 6, lease: 60,
		},
		{
			name: "mine, outside a changed network", config: `{"Network":"10.99.0.0/16"}`, claim: me,
			remembered: per("10.244.5.0/24"),
			entries:    []*Entry{leaseAt("10.244.5.0-24", me, 5, 50)}, key: fresh, write: true, unchanged: fresh,
			drop: "10.244.5.0-24",
		},
		{
			name: "mine, of another length", config: `{"Network":"10.244.0.0/16","SubnetLen":26}`, claim: me,
			entries: []*Entry{leaseAt("10.244.5.0-24", me, 5, 50)}, key: fresh, write: true, unchanged: fresh,
			drop: "10.244.5.0-24",
		},
		{
			name: "mine is kept within a network that grew", config: `{"Network":"10.240.0.0/12"}`, claim: me,
			entries: []*Entry{leaseAt("10.244.5.0-24", me, 5, 50)}, key: "10.244.5.0-24", expect: 5, lease: 50,
		},
		{
			name: "my reservation outside a changed network stays where it is", config: `{"Network":"10.99.0.0/16"}`, claim: me,
			entries: []*Entry{leaseAt("10.244.5.0-24", me, 5, 0)}, key: fresh, write: true, unchanged: fresh,
		},
		{
			name: "IPv4 alone becomes dual: the subnet stays, and the other has the same number", config: netTwo, claim: dualMe,
			entries: []*Entry{leaseAt("10.244.5.0-24", me, 5, 50)},
			key:     "10.244.5.0-24&fd00:10:244:5::-64", write: true, unchanged: "10.244.5.0-24", drop: "10.244.5.0-24",
		},
		{
			name: "IPv4 alone becomes dual: the number is taken in the other family", config: netTwo, claim: dualMe,
			entries: []*Entry{leaseAt("10.244.5.0-24", me, 5, 50), leaseAt("fd00:10:244:5::-64", Attrs{}, 4, 0)},
			key:     "10.244.5.0-24&fd00:10:244:6::-64", write: true, unchanged: "", drop: "10.244.5.0-24",
		},
		{
			name: "IPv4 alone becomes dual, only remembered", config: netTwo, claim: dualMe, remembered: per("10.244.5.0/24"),
			key: "10.244.5.0-24&fd00:10:244:5::-64", write: true, unchanged: "10.244.5.0-24",
		},
		{
			name: "dual becomes IPv6 alone: the subnet stays", config: net6,
			claim:   with(dualMe, func(a *Attrs) { a.PublicIP.V4 = netip.Addr{} }),
			entries: []*Entry{leaseAt("10.244.5.0-24&fd00:10:244:5::-64", dualMe, 5, 50)},
			key:     "fd00:10:244:5::-64", write: true, unchanged: "fd00:10:244:5::-64",
			drop: "10.244.5.0-24&fd00:10:244:5::-64",
		},
		{
			name: "remembered of both families, not a pair", config: netTwo, claim: dualMe,
			remembered: per("10.244.5.0/24", "fd00:10:244:7::/64"),
			key:        "10.244.5.0-24&fd00:10:244:7::-64", write: true, unchanged: "",
		},
		{
			name: "pods live there: kept while it fits", config: net4, claim: me, remembered: per("10.244.5.0/24"), keep: true,
			entries: []*Entry{leaseAt("10.244.5.0-24", me, 5, 50)}, key: "10.244.5.0-24", expect: 5, lease: 50,
		},

		{
			name: "flannel's, with its etcd lease", config: net4, claim: me,
			entries: []*Entry{leaseAt("10.244.5.0-24", flannel, 5, 50)},
			key:     "10.244.5.0-24", write: true, expect: 5, lease: 50,
		},
		{
			name: "flannel's, remembered as well", config: net4, claim: me, remembered: per("10.244.5.0/24"),
			entries: []*Entry{leaseAt("10.244.5.0-24", flannel, 5, 50)}, key: "10.244.5.0-24", write: true, expect: 5, lease: 50,
		},
		{
			name: "flannel's comes before what is remembered", config: net4, claim: me, remembered: per("10.244.9.0/24"),
			entries: []*Entry{leaseAt("10.244.5.0-24", flannel, 5, 50)}, key: "10.244.5.0-24", write: true, expect: 5, lease: 50,
		},
		{
			name: "flannel's, but pods live in another one", config: net4, claim: me, remembered: per("10.244.9.0/24"),
			keep:    true,
			entries: []*Entry{leaseAt("10.244.5.0-24", flannel, 5, 50)}, key: "10.244.9.0-24", write: true,
			unchanged: "10.244.9.0-24", drop: "10.244.5.0-24",
		},
		{
			name: "flannel's, written after mine", config: net4, claim: me, remembered: per("10.244.9.0/24"),
			entries: []*Entry{leaseAt("10.244.5.0-24", flannel, 5, 50), leaseAt("10.244.9.0-24", me, 4, 40)},
			key:     "10.244.5.0-24", write: true, expect: 5, lease: 50, drop: "10.244.9.0-24",
		},
		{
			name: "flannel's, written before mine", config: net4, claim: me,
			entries: []*Entry{leaseAt("10.244.5.0-24", flannel, 5, 50), leaseAt("10.244.9.0-24", me, 6, 60)},
			key:     "10.244.9.0-24", expect: 6, lease: 60,
		},
		{
			name: "flannel's, written after mine, and pods live in mine", config: net4, claim: me,
			remembered: per("10.244.9.0/24"), keep: true,
			entries: []*Entry{leaseAt("10.244.5.0-24", flannel, 5, 50), leaseAt("10.244.9.0-24", me, 4, 40)},
			key:     "10.244.9.0-24", expect: 4, lease: 40,
		},
		{
			name: "flannel's, written after my reservation", config: net4, claim: me,
			entries: []*Entry{leaseAt("10.244.5.0-24", flannel, 5, 50), leaseAt("10.244.9.0-24", me, 4, 0)},
			key:     "10.244.9.0-24", expect: 4, reserved: true,
		},
		{
			name: "the newest of flannel's", config: net4, claim: me,
			entries: []*Entry{leaseAt("10.244.5.0-24", flannel, 5, 50), leaseAt("10.244.6.0-24", flannel, 6, 60)},
			key:     "10.244.6.0-24", write: true, expect: 6, lease: 60, drop: "10.244.5.0-24",
		},
		{
			name: "a reservation for my address, but another one is remembered and free", config: net4, claim: me,
			remembered: per("10.244.9.0/24"),
			entries:    []*Entry{leaseAt("10.244.5.0-24", Attrs{PublicIP: me.PublicIP}, 5, 0)}, key: "10.244.9.0-24",
			write:     true,
			unchanged: "10.244.9.0-24",
		},
		{
			name: "flannel's, where the remembered one is taken", config: net4, claim: me, remembered: per("10.244.9.0/24"),
			entries: []*Entry{leaseAt("10.244.5.0-24", flannel, 5, 50), leaseAt("10.244.9.0-24", other, 6, 60)},
			key:     "10.244.5.0-24", write: true, expect: 5, lease: 50,
		},
		{
			name: "flannel's of another node", config: net4, claim: me,
			entries: []*Entry{leaseAt("10.244.5.0-24", with(flannel, func(a *Attrs) { a.PublicIP = other.PublicIP }), 5, 50)},
			key:     fresh, write: true, unchanged: fresh,
		},
		{
			name: "flannel's outside the network", config: net4, claim: me,
			entries: []*Entry{leaseAt("10.99.5.0-24", flannel, 5, 50)}, key: fresh, write: true, unchanged: fresh,
			drop: "10.99.5.0-24",
		},
		{
			name: "flannel's of another length", config: net4, claim: me,
			entries: []*Entry{leaseAt("10.244.5.0-25", flannel, 5, 50)}, key: fresh, write: true, unchanged: fresh,
			drop: "10.244.5.0-25",
		},
		{
			name: "my address reserved in another length", config: net4, claim: me,
			entries: []*Entry{leaseAt("10.244.5.0-25", Attrs{PublicIP: me.PublicIP}, 5, 0)}, key: fresh, write: true,
			unchanged: fresh,
		},
		{
			name: "flannel's under a key that is not canonical", config: net4, claim: me,
			entries: []*Entry{leaseAt("10.244.5.7-24", flannel, 5, 50)}, key: fresh, write: true, unchanged: fresh,
		},
		{
			name: "flannel's IPv6 lease", config: net6, claim: attrs("me", "2001:db8::1"),
			entries: []*Entry{leaseAt("fd00:10:244:5::-64", with(attrs("", "2001:db8::1"),
				func(a *Attrs) { a.PublicIPLocal = false }), 5, 50)},
			key: "fd00:10:244:5::-64", write: true, expect: 5, lease: 50,
		},

		{
			name: "a reservation for my name", config: net4, claim: me, entries: []*Entry{leaseAt("10.244.5.0-24", forMe, 5, 0)},
			key: "10.244.5.0-24", write: true, expect: 5, reserved: true,
		},
		{
			name: "a reservation for my address", config: net4, claim: me,
			entries: []*Entry{leaseAt("10.244.5.0-24", Attrs{PublicIP: me.PublicIP}, 5, 0)},
			key:     "10.244.5.0-24", write: true, expect: 5, reserved: true,
		},
		{
			name: "a reservation for another name", config: net4, claim: me,
			entries: []*Entry{leaseAt("10.244.5.0-24", Attrs{Identity: Identity{NodeName: "other"}}, 5, 0)},
			key:     fresh, write: true, unchanged: fresh,
		},
		{
			name: "a blank reservation", config: net4, claim: me, entries: []*Entry{ParseEntry("10.244.5.0-24", nil, 5, 5, 0)},
			remembered: per("10.244.5.0/24"),
			key:        fresh, write: true, unchanged: fresh,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			table := Table{Revision: 9, ConfigRevision: 1, Config: mustConfig(t, tt.config), Entries: tt.entries}
			claim := Claim{Attrs: tt.claim, Remembered: tt.remembered, Keep: tt.keep}
			d, err := Decide(table, claim, 0)
			if err != nil {
				t.Fatal(err)
			}
			if tt.key == fresh {
				tt.key, tt.unchanged = d.Key, d.Key
				if !table.Config.Fits(d.Lease.Subnets) || slices.ContainsFunc(without(tt.entries, d.Drop),
					func(e *Entry) bool { return e.overlaps(&d.Lease) }) {
					t.Errorf("%s does not fit, or is not free", d.Key)
				}
			}
			if d.Key != tt.key || d.Write != tt.write || d.Expect != tt.expect || d.LeaseID != tt.lease ||
				d.Reserved != tt.reserved ||
				d.Unchanged != tt.unchanged || keys(d.Drop) != tt.drop {
				t.Errorf("got %+v\nwant %+v", d, tt)
			}
			if d.Lease.Attrs != tt.claim || FormatKey(d.Lease.Subnets) != d.Key {
				t.Errorf("holds %+v then, want what was claimed: %+v", d.Lease, tt.claim)
			}
			checkSettled(t, table, claim, d)
		})
	}
}

// checkSettled applies a decision: the next one finds nothing to do.
func checkSettled(t *testing.T, table Table, claim Claim, d Decision) {
	t.Helper()
	es := without(table.Entries, append(slices.Clone(d.Drop), &Entry{Key: d.Key}))
	e := leaseAt(d.Key, d.Lease.Attrs, 10, 77)
	if d.Reserved {
		e.LeaseID = 0
	}
	es = append(es, e)
	table.Revision, table.Entries = 10, es
	again, err := Decide(table, claim, 3)
	if err != nil || again.Write || again.Key != d.Key || again.Expect != 10 {
		t.Errorf("the decision after %+v is %+v, %v, want nothing to do", d, again, err)
	}
}

func TestDecideErrors(t *testing.T) {
	me, other := attrs("me", "192.168.1.1"), attrs("other", "192.168.1.2")
	me.PublicIPLocal = false // what has another form of contest: see TestContest*
	lease := func(a Attrs) []*Entry { return []*Entry{leaseAt("10.244.5.0-24", a, 5, 50)} }
	mineAnd := func(a Attrs) []*Entry { return append(lease(a), leaseAt("10.244.6.0-24", me, 6, 60)) }
	broken := errors.New("broken")
	for _, tt := range []struct {
		name  string
		table Table
		claim Claim
		want  string
		is    error
	}{
		{"no config", Table{ConfigErr: ErrNoConfig}, Claim{Attrs: me}, "no network config", ErrNoConfig},
		{"a table that was never filled", Table{}, Claim{Attrs: me}, "no network config", ErrNoConfig},
		{
			"a broken config",
			Table{ConfigErr: broken, Config: mustConfig(t, net4), Entries: mineAnd(other)},
			Claim{Attrs: me},
			"broken", broken,
		},
		{
			"a broken config, and a lease of mine that is out of date",
			Table{ConfigErr: broken, Entries: mineAnd(other)},
			Claim{Attrs: with(me, func(a *Attrs) { a.PublicIP = ips("192.168.7.7") }), Remembered: per("10.244.6.0/24")},
			"broken", broken,
		},
		{
			"a broken config, and a lease of another node where mine was",
			Table{ConfigErr: broken, Entries: mineAnd(other)},
			Claim{Attrs: me, Remembered: per("10.244.5.0/24")},
			"broken", broken,
		},
		{
			"my name, another id",
			Table{Entries: lease(with(other, func(a *Attrs) { a.NodeName = "me" }))},
			Claim{Attrs: me},
			`the node name "me" is also that of node "me" (id "other-id"), which holds the lease 10.244.5.0-24: give one of the two another --node-name`, nil,
		},
		{
			"my name, another id, and my address: a replaced machine",
			Table{Entries: lease(with(me, func(a *Attrs) { a.NodeID = "old-id" }))},
			Claim{Attrs: me},
			`(id "old-id"), which holds the lease 10.244.5.0-24: give one of the two another --node-name; if that machine was replaced by this one, delete its lease`, nil,
		},
		{
			"my address, another identity",
			Table{Entries: lease(with(other, func(a *Attrs) { a.PublicIP = me.PublicIP }))},
			Claim{Attrs: me},
			`the public IP 192.168.1.1 is also that of node "other" (id "other-id"), which holds the lease 10.244.5.0-24: give one of the two another address or --public-ip`, nil,
		},
		{"my address, another name without id", Table{Entries: lease(with(other,
			func(a *Attrs) { a.PublicIP, a.NodeID = me.PublicIP, "" }))}, Claim{Attrs: me}, "the public IP", nil},
		{"my address, another id without name", Table{Entries: lease(with(other,
			func(a *Attrs) { a.PublicIP, a.NodeName = me.PublicIP, "" }))}, Claim{Attrs: me}, "the public IP", nil},
		{
			"remembered does not help",
			Table{Entries: lease(with(other, func(a *Attrs) { a.PublicIP = me.PublicIP }))},
			Claim{Attrs: me, Remembered: per("10.244.9.0/24")},
			"the public IP", nil,
		},
		{
			"my new address is another's",
			Table{Entries: mineAnd(other)},
			Claim{Attrs: with(me, func(a *Attrs) { a.PublicIP = other.PublicIP })},
			"the public IP 192.168.1.2", nil,
		},
		{
			"my new IPv6 address is another's",
			Table{Entries: mineAnd(with(other, func(a *Attrs) { a.PublicIP.V6 = netip.MustParseAddr("2001:db8::2") }))},
			Claim{Attrs: with(me, func(a *Attrs) { a.PublicIP.V6 = netip.MustParseAddr("2001:db8::2") })},
			"the public IP 2001:db8::2", nil,
		},
		{
			"my new name is another's",
			Table{Entries: mineAnd(other)},
			Claim{Attrs: with(me, func(a *Attrs) { a.NodeName = "other" })},
			`the node name "other"`, nil,
		},
		{
			"pods live outside the network",
			Table{Config: mustConfig(t, `{"Network":"10.99.0.0/16"}`), Entries: mineAnd(other)},
			Claim{Attrs: me, Remembered: per("10.244.6.0/24"), Keep: true},
			"10.244.6.0-24 does not fit the changed network config", ErrMoved,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.table.Entries != nil && tt.table.Config == (Config{}) {
				tt.table.Config = mustConfig(t, net4)
			}
			d, err := Decide(tt.table, tt.claim, 0)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %+v, %v, want %q", d, err, tt.want)
			}
			var conflict *ConflictError
			if tt.is == nil && (!errors.As(err, &conflict) || conflict.Holder.Key != "10.244.5.0-24") || tt.is != nil &&
				!errors.Is(err, tt.is) {
				t.Errorf("got a %T: %v", err, err)
			}
			if d.Write || d.Key != "" || len(d.Drop) > 0 {
				t.Errorf("got %+v with an error", d)
			}
			checkOneLine(t, err)
		})
	}
}

// The 65th of 64, and a subnet that becomes free is found by whoever asks.
func TestDecideFullPool(t *testing.T) {
	table := Table{
		Revision: 100,
		Config:   mustConfig(t, `{"Network":"10.244.0.0/17","SubnetMin":"10.244.0.0","SubnetMax":"10.244.63.0"}`),
	}
	claim := func(i int) Claim { return Claim{Attrs: attrs(fmt.Sprint("n", i), fmt.Sprint("192.168.1.", i+1))} }
	for i := range 64 {
		d, err := Decide(table, claim(i), 0)
		if err != nil {
			t.Fatalf("node %d: %v", i, err)
		}
		table.Entries = append(table.Entries, leaseAt(d.Key, d.Lease.Attrs, int64(i+2), int64(i+2)))
	}
	_, err := Decide(table, claim(64), 0)
	var full *PoolFullError
	if !errors.As(err, &full) || full.Size != 64 || full.Leases != 64 || full.Reservations != 0 {
		t.Fatalf("the 65th: %v", err)
	}
	gone := table.Entries[17]
	table.Entries = without(table.Entries, []*Entry{gone})
	if d, err := Decide(table, claim(64), 0); err != nil || d.Key != gone.Key {
		t.Errorf("got %+v, %v, want the one that became free: %s", d, err, gone.Key)
	}
}

// What Decide says must not depend on the order in which the store lists its keys.
func TestDecideIsIndependentOfOrder(t *testing.T) {
	r := newRand(t, 6)
	c := mustConfig(t, dual)
	for i := range 500 {
		es := randomEntries(r, c, 12)
		seen := map[string]bool{} // a store has a key but once
		es = slices.DeleteFunc(es, func(e *Entry) bool { dup := seen[e.Key]; seen[e.Key] = true; return dup })
		table := Table{Revision: 99, Config: c, Entries: es}
		claim := Claim{Attrs: attrs("me", "192.168.1.1")}
		want, wantErr := Decide(table, claim, i)
		table.Entries = slices.Clone(es)
		r.Shuffle(len(es), func(a, b int) { table.Entries[a], table.Entries[b] = table.Entries[b], table.Entries[a] })
		got, gotErr := Decide(table, claim, i)
		if got.Key != want.Key || got.Unchanged != want.Unchanged || fmt.Sprint(gotErr) != fmt.Sprint(wantErr) {
			t.Fatalf("with %s:\n got %+v, %v\nwant %+v, %v", keys(es), got, gotErr, want, wantErr)
		}
	}
}

// A key in use that was overwritten with nonsense is taken back; one that another node claims is not.
func TestSpoiledKeyIsTakenBack(t *testing.T) {
	c := mustConfig(t, net4)
	mine := Claim{Attrs: peer(1), Remembered: per("10.244.7.0/24"), Keep: true}
	const key = "10.244.7.0-24"
	for _, tt := range []struct {
		value    string
		lease    int64
		keep     bool
		reserved bool
	}{
		{`{"PublicIP":`, 0, true, false},
		{`{"PublicIP":`, 9, true, false},
		{`{"PublicIP":"x"}`, 9, true, false},
		{`{}`, 0, true, true},
		{`{"BackendType":"vxlan"}`, 9, true, false},
		{string(FormatValue(peer(2))), 9, false, false},
		{`{"PublicIP":"192.0.2.99","BackendType":"vxlan"}`, 9, false, false},
		{`{"NodeName":"other"}`, 0, false, false},
	} {
		table := Table{Revision: 9, Config: c, ConfigRevision: 1, Entries: []*Entry{ParseEntry(key, []byte(tt.value), 8, 3,
			tt.lease)}}
		d, err := Decide(table, mine, 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := d.Key == key; got != tt.keep || tt.keep && (!d.Write || d.Expect != 8 || d.Reserved != tt.reserved ||
			d.LeaseID != tt.lease) {
			t.Errorf("%s, lease %d: %+v", tt.value, tt.lease, d)
		}
		mine.Keep = false
		if d, err := Decide(table, mine, 0); err != nil || d.Key == key && !tt.reserved && tt.lease == 0 {
			t.Errorf("%s, not in use: %+v, %v", tt.value, d, err)
		}
		mine.Keep = true
	}
}

// A subnet that covers an endpoint of the store is not free, remembered or not, in any family.
func TestDecideKeepsClearOfEndpoints(t *testing.T) {
	for _, tt := range []struct {
		config, want string
		remembered   addr.Per[netip.Prefix]
	}{
		{`{"Network":"10.1.0.0/22","SubnetLen":24}`, "10.1.3.0-24", per("10.1.2.0/24")},
		{`{"Network":"10.1.0.0/22","SubnetLen":24}`, "10.1.3.0-24", addr.Per[netip.Prefix]{}},
		{`{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd01::/62"}`, "fd01:0:0:3::-64", per("fd01:0:0:2::/64")},
		{
			`{"Network":"10.1.0.0/22","SubnetLen":24,"EnableIPv6":true,"IPv6Network":"fd01::/62"}`,
			"10.1.3.0-24&fd01:0:0:3::-64",
			per("10.1.2.0/24", "fd01:0:0:2::/64"),
		},
	} {
		table := Table{
			Revision: 9, Config: mustConfig(t, tt.config),
			Entries: []*Entry{leaseAt("10.1.1.0-24", attrs("other", "192.168.1.2"), 5, 50)},
		}
		if !table.Config.Pools.V4.On() {
			table.Entries[0] = leaseAt("fd01:0:0:1::-64", attrs("other", "2001:db8::2"), 5, 50)
		}
		if len(table.Config.Families()) == 2 {
			table.Entries[0] = leaseAt("10.1.1.0-24&fd01:0:0:1::-64", peer(2), 5, 50)
		}
		before := slices.Clone(table.Entries)
		var endpoints []netip.Addr
		for _, s := range []string{"10.1.2.5", "fd01:0:0:2::5", "192.0.2.9", "10.1.2.5"} {
			endpoints = append(endpoints, netip.MustParseAddr(s))
		}
		d, err := Decide(table.Reserving(endpoints), Claim{Attrs: peer(1), Remembered: tt.remembered}, 0)
		if err != nil || d.Key != tt.want {
			t.Errorf("%s: got %+v, %v, want %s", tt.config, d, err, tt.want)
		}
		if !slices.Equal(table.Entries, before) {
			t.Errorf("the table has changed: %s", keys(table.Entries))
		}
	}
}
