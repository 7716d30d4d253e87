package subnet

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/overlayd/overlayd/addr"
)

// Claim is what a node wants its lease to say, and the subnets that it had before.
type Claim struct {
	Attrs
	Remembered addr.Per[netip.Prefix]
	// Keep says that pods live in the remembered subnets: they are not given up because the network config changed.
	Keep bool
}

// Decision is what a node has to do to the store so that its claim stands there: nothing, or one guarded write.
type Decision struct {
	Lease Lease  // what the node holds then
	Key   string // of the lease

	Write    bool  // false: the store says so already
	Expect   int64 // the revision that Key has to be at; 0: it is a new key, guarded by Unchanged
	LeaseID  int64 // the etcd lease that Key stays attached to; 0 for a new one or a reservation
	Reserved bool  // the key is a reservation, and stays one

	// Unchanged is a prefix of key names under which nothing may have come or changed since the table ("" is all of them).
	// It keeps two nodes from taking subnets that overlap under two different keys. A dual-stack lease that is guarded on
	// all keys must also make those fail that were decided before it and are guarded on their own key alone.
	Unchanged string

	Drop []*Entry // leases of this very node that it can't use any more: they go in the same write

	Rival     *Entry // the lease of another node that announces an address of this one; of several, the newest
	Announced int64  // the revision of the lease that stands in the store, if it announces the claimed addresses
}

// ConflictError says that another node holds what only this one should: nothing is taken from it, and a person has to
// decide.
type ConflictError struct {
	Holder  *Entry
	What    string // what both have
	Advice  string
	Refused bool // the peers go by the other one's lease
}

const adviceOnIP = "give one of the two another address or --public-ip; if that node is gone, delete its lease"

func (e *ConflictError) Error() string {
	effect := ""
	if e.Refused {
		effect = "; until then peers do not send to this node"
	}
	return fmt.Sprintf("%s is also that of node %q (id %q), which holds the lease %s: %s%s",
		e.What, e.Holder.NodeName, e.Holder.NodeID, e.Holder.Key, e.Advice, effect)
}

// ErrNoConfig says that there is no network config in the store (yet).
var ErrNoConfig = errors.New("there is no network config")

// ErrMoved says that the network config no longer has room for the subnet in use.
var ErrMoved = errors.New("does not fit the changed network config: " +
	"pods keep their addresses until overlayd restarts, then this node needs another subnet")

// Decide says how a claim is met, given the table. attempt counts the races that were lost so far. In this order:
// the lease that carries my identity, unless flannel wrote one for my public IP later; that one of flannel's; the
// subnets remembered, where they are free; a reservation for this node; a new one. Where pods live in the subnets
// remembered, those come before flannel's.
func Decide(t Table, c Claim, attempt int) (Decision, error) {
	if t.ConfigErr != nil {
		// What the store says of this node already needs no config to stay, and has to be renewed, after a restart too.
		if e := t.Find(FormatKey(c.Remembered)); e != nil && e.Err == nil && e.Attrs == c.Attrs {
			return update(e, c, nil), nil
		}
		return Decision{}, t.ConfigErr
	}
	if len(t.Config.Families()) == 0 {
		return Decision{}, ErrNoConfig
	}
	if c.Keep && !t.Config.Fits(c.Remembered) {
		return Decision{}, fmt.Errorf("%s %w", FormatKey(c.Remembered), ErrMoved)
	}
	like := t.like(&c)
	mine, drop := ownEntries(like, &c)
	// flannel may have run here since.
	if e := flannel(like, &c); e != nil && mine != nil && !mine.Reserved() && e.Revision > mine.Revision {
		mine, drop = nil, append(drop, mine)
	}
	// One that says so already stays mine, whatever others came to say since.
	if settled := mine != nil && mine.PublicIP == c.PublicIP && mine.NodeName == c.NodeName; !settled {
		if err := conflict(like, &c); err != nil {
			return Decision{}, err
		}
	}
	d, err := acquire(t, like, c, mine, drop, attempt)
	if err != nil {
		return Decision{}, err
	}
	if d.Rival = rival(like, &c, &d); mine != nil && mine.PublicIP == c.PublicIP && d.Key == mine.Key {
		d.Announced = mine.Revision
	}
	return d, nil
}

// like is the table of those entries that have the name, the ID or a public IP of a claim. The others only matter to it
// by the subnets that they take up.
func (t Table) like(c *Claim) Table {
	all := t.Entries
	t.Entries = nil
	for _, e := range all {
		if e.NodeID == c.NodeID || e.NodeName == c.NodeName || e.samePublicIP(&c.Attrs) {
			t.Entries = append(t.Entries, e)
		}
	}
	return t
}

// acquire finds the key for a claim that nothing speaks against.
func acquire(t, like Table, c Claim, mine *Entry, drop []*Entry, attempt int) (Decision, error) {
	if mine != nil {
		return update(mine, c, drop), nil
	}
	if e := spoiled(t, &c); e != nil {
		d := update(e, c, drop)
		d.Write, d.Reserved = true, e.Blank() // a reservation that was made of my key is mine to take up
		return d, nil
	}
	others := without(t.Entries, drop)
	before := c.Remembered
	if before == (addr.Per[netip.Prefix]{}) && len(drop) > 0 {
		before = drop[0].Subnets
	}
	if e := flannel(like, &c); e != nil {
		return update(e, c, append(drop, without(flannels(like, &c), []*Entry{e})...)), nil
	}
	if e := adoptable(like, &c); e != nil && !allFree(t.Config, before, others) {
		return update(e, c, drop), nil
	}
	drop = append(drop, flannels(like, &c)...)
	subnets, err := pick(t.Config, others, before, c.Identity, attempt)
	if err != nil {
		return Decision{}, err
	}
	d := Decision{Lease: Lease{subnets, c.Attrs}, Key: FormatKey(subnets), Write: true, Drop: drop}
	if paired(t.Config, subnets) {
		d.Unchanged, _, _ = strings.Cut(d.Key, "&") // the node with the first family's subnet has the other's
	}
	return d, nil
}

// update keeps a key as it is, with the etcd lease on it, and brings its value up to date.
func update(e *Entry, c Claim, drop []*Entry) Decision {
	return Decision{
		Lease: Lease{e.Subnets, c.Attrs}, Key: e.Key,
		Write: e.Attrs != c.Attrs || len(drop) > 0, Expect: e.Revision, LeaseID: e.LeaseID, Reserved: e.Reserved(),
		Drop: drop,
	}
}

// spoiled finds the key of the subnets that pods live in, if it was overwritten with what is no other node's claim.
func spoiled(t Table, c *Claim) *Entry {
	e := t.Find(FormatKey(c.Remembered))
	if !c.Keep || e == nil {
		return nil
	}
	unowned := e.Identity == (Identity{}) && (e.PublicIP == (addr.Per[netip.Addr]{}) || e.samePublicIP(&c.Attrs))
	if e.Err == nil && !unowned {
		return nil
	}
	return e
}

// ownEntries finds the lease to go on with among those that carry my identity, and the ones to give up: a network
// config that changed leaves the old subnet behind.
//
// A lease of another name at another address is this machine's as well, if it has the ID and the subnets that the
// machine remembers. The memory may be a copy, as the ID may: whoever holds such a lease takes it back.
func ownEntries(t Table, c *Claim) (keep *Entry, drop []*Entry) {
	var own []*Entry
	for _, e := range t.Entries {
		if e.belongsTo(c) {
			own = append(own, e)
		}
	}
	if len(own) == 0 && c.NodeID != "" {
		if e := t.Find(FormatKey(c.Remembered)); e != nil && e.NodeID == c.NodeID {
			own = append(own, e)
		}
	}
	slices.SortFunc(own, func(a, b *Entry) int { // the one in use first, then the oldest
		return cmp.Or(b2i(b.Subnets == c.Remembered)-b2i(a.Subnets == c.Remembered), cmp.Compare(a.Created, b.Created))
	})
	for i := range own {
		switch {
		case keep == nil && own[i].Err == nil && t.Config.Fits(own[i].Subnets):
			keep = own[i]
		case !own[i].Reserved(): // what an operator reserved is the operator's to remove
			drop = append(drop, own[i])
		}
	}
	return keep, drop
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// belongsTo: the same machine, unless both its name and its address are others (then it is a clone with a copied
// machine-id).
func (e *Entry) belongsTo(c *Claim) bool {
	return e.NodeID != "" && e.NodeID == c.NodeID && (e.NodeName == c.NodeName || e.samePublicIP(&c.Attrs))
}

// flannels lists the living leases without identity that have my public IP: flannel wrote them, for this node.
func flannels(t Table, c *Claim) (out []*Entry) {
	for _, e := range t.Entries {
		if e.Err == nil && e.Identity == (Identity{}) && !e.Reserved() && e.samePublicIP(&c.Attrs) {
			out = append(out, e)
		}
	}
	return out
}

// flannel finds the newest of them that fits, unless pods live in other subnets. The pods have addresses of it: this
// node's own, from before flannel ran here again, is out of date.
func flannel(t Table, c *Claim) (newest *Entry) {
	for _, e := range flannels(t, c) {
		if !c.Keep && t.Config.Fits(e.Subnets) && e.newerThan(newest) {
			newest = e
		}
	}
	return newest
}

// adoptable finds a lease or reservation that was made for this node without its identity.
func adoptable(t Table, c *Claim) *Entry {
	for _, e := range t.Entries {
		named := e.NodeName == c.NodeName && c.NodeName != ""
		forMe := e.NodeID == "" && (named || e.NodeName == "" && e.samePublicIP(&c.Attrs))
		if forMe && e.Err == nil && t.Config.Fits(e.Subnets) {
			return e
		}
	}
	return nil
}

// conflict passes over what no node accepts: it takes nothing from this one.
func conflict(t Table, c *Claim) error {
	for _, e := range t.Entries {
		if e.belongsTo(c) || e.Identity == (Identity{}) || !t.acceptable(e) {
			continue
		}
		if e.NodeName == c.NodeName && e.NodeID != "" {
			return &ConflictError{
				Holder: e, What: fmt.Sprintf("the node name %q", c.NodeName),
				Advice: "give one of the two another --node-name; if that machine was replaced by this one, delete its lease",
			}
		}
		// An address that the other node has on a device weighs more than one that is only said to be this node's. Else: see
		// Contest.
		if e.NodeName != c.NodeName && e.samePublicIP(&c.Attrs) && e.PublicIPLocal && !c.PublicIPLocal {
			return &ConflictError{Holder: e, What: fmt.Sprintf("the public IP %s", e.commonIP(&c.Attrs)), Advice: adviceOnIP}
		}
	}
	return nil
}

// commonIP is the public IP that both have; invalid: none.
func (a *Attrs) commonIP(b *Attrs) netip.Addr {
	for _, f := range addr.Families() {
		if x := a.PublicIP.Get(f); x.IsValid() && x == b.PublicIP.Get(f) {
			return x
		}
	}
	return netip.Addr{}
}

func (a *Attrs) samePublicIP(b *Attrs) bool {
	x, y := &a.PublicIP, &b.PublicIP
	return x.V4 == y.V4 && x.V4.IsValid() || x.V6 == y.V6 && x.V6.IsValid()
}

// Fits reports whether subnets are such as this network leases: one of each family in use, of the right length.
func (c Config) Fits(s addr.Per[netip.Prefix]) bool {
	for _, f := range addr.Families() {
		p, sn := c.Pools.Get(f), s.Get(f)
		if p.On() != sn.IsValid() || p.On() && !p.fits(sn) {
			return false
		}
	}
	return s.V4.IsValid() || s.V6.IsValid()
}

// allFree reports whether a node can have all of these subnets.
func allFree(c Config, s addr.Per[netip.Prefix], taken []*Entry) bool {
	if !c.Fits(s) {
		return false
	}
	for _, f := range c.Families() {
		if !free(s.Get(f), taken) {
			return false
		}
	}
	return true
}

func without(all, drop []*Entry) []*Entry {
	if len(drop) == 0 {
		return all
	}
	return slices.DeleteFunc(slices.Clone(all), func(e *Entry) bool {
		return slices.ContainsFunc(drop, func(d *Entry) bool { return d.Key == e.Key })
	})
}
