package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/agent/state"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/backend/hostgw"
	"github.com/overlayd/overlayd/backend/vxlan"
	"github.com/overlayd/overlayd/backend/wireguard"
	"github.com/overlayd/overlayd/masquerade"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// facts is what was read: from the store, the kernel and the state directory.
type facts struct {
	store        string // what to call it
	now, started time.Time
	snap         subnet.Snapshot
	persisted    state.Persisted // read at the start; its peers are dropped once the store has been read
	host         netstate.Host
	observed     bool                // no reason is known why host should be observed again
	key          netstate.PrivateKey // zero until WireGuard needs it
	moved        error               // the note for the operator that the subnet has changed
	basis
}

// basis is what the node goes by. Each part stays as it was while nothing better is known.
type basis struct {
	leases     leases
	config     *subnet.Config // the last valid one that the subnets fit; nil: none yet
	configJSON string
	subnets    addr.Per[netip.Prefix] // this node's own
	settings   subnet.NodeSettings    // the last valid ones
	choice     *Choice
	claimed    subnet.Claim // the claim that the store was given last
}

// leases is the lease table that the node goes by, and how far it can be relied on.
type leases struct {
	table subnet.Table
	is    freshness
	until time.Time // of a stale table: peers that are missing in it are kept until then

	losses int // how often the store has lost data since the start
	lostAt time.Time
}

type freshness uint8

const (
	unread    freshness = iota // there is no table
	persisted                  // the table is from the state directory: the store has not answered since the start
	stale                      // the store has lost data a while ago
	fresh
)

// online reports whether the store has been read since the start.
func (l leases) online() bool { return l.is >= stale }

// follow takes the table of a snapshot. A store that has lost data makes it stale for the time of grace: a table that
// vanished is not a thousand removed nodes. While the daemon was not running, only a revision lower than the persisted
// one shows that.
func (l leases) follow(t subnet.Table, persisted int64, now time.Time, grace time.Duration) (next leases, lost bool) {
	if t.Revision == 0 {
		return l, false
	}
	if l.online() {
		lost = t.Epoch != l.table.Epoch
	} else {
		lost = t.Revision < persisted
	}
	next = l
	next.table = t
	switch {
	case lost:
		next.is, next.until, next.losses, next.lostAt = stale, now.Add(grace), l.losses+1, now
	case l.is != stale:
		next.is = fresh
	}
	return next, lost
}

// desired is what follows from the facts.
type desired struct {
	basis
	claim      subnet.Claim
	conditions map[condition]error // those that can be judged; nil: it holds
	acquired   bool                // the node has another subnet than before
	before     addr.Per[netip.Prefix]
	expired    bool // peers that the store has lost are no longer kept
}

// desire derives what the node should be. It is pure.
func desire(o Options, f facts) desired {
	d := desired{basis: f.basis, claim: f.claimed, conditions: map[condition]error{condStore: f.snap.Err}}
	if d.leases.is == stale && !f.now.Before(d.leases.until) {
		d.leases.is, d.expired = fresh, true
	}
	if d.leases.online() {
		d.learn(o, f)
	} else {
		d.learnOffline(o, f)
	}
	if d.config != nil {
		d.conditions[condEndpoints] = inside(f.store, d.endpointsInside(f), *d.config, d.subnets)
		d.chooseUnderlay(o, f)
	}
	if d.config != nil && d.choice != nil && !d.lacksKey(f) {
		d.announce(o, f)
	}
	if d.leases.online() {
		d.conditions[condLease], d.conditions[condClaim] = leaseProblems(o, f, d)
	}
	return d
}

// learn goes by the newest snapshot of the store.
func (d *desired) learn(o Options, f facts) {
	d.conditions[condOffline] = nil
	d.conditions[condMoved] = f.moved
	d.conditions[condInitConfig], d.conditions[condReported] = f.snap.InitConfigErr, f.snap.ReadyErr
	// A lease without subnets is of a network whose config can't be read: which of them are used is not known.
	if s := f.snap.Lease.Subnets; s != (addr.Per[netip.Prefix]{}) && s != d.subnets {
		d.acquired, d.before = true, d.subnets
		// It may have been lost while the daemon was not running.
		if own := f.persisted.Own(); d.subnets == (addr.Per[netip.Prefix]{}) && own != s && inUse(f.host, own) &&
			!inUse(f.host, s) {
			d.before = own
		}
		d.subnets = s
	}
	if s := f.snap.Settings; s != nil {
		_, err := o.Interface.With(*s)
		if d.conditions[condNode] = err; err == nil {
			d.settings = *s
		}
	}
	t := d.leases.table
	switch {
	case t.ConfigErr != nil:
		d.conditions[condConfig] = t.ConfigErr
		if d.config == nil {
			d.usePersistedConfig(o, f)
		}
	case d.subnets != (addr.Per[netip.Prefix]{}) && !t.Config.Fits(d.subnets):
		d.conditions[condConfig] = fmt.Errorf("%s %w", subnet.FormatKey(d.subnets), subnet.ErrMoved)
	default:
		d.conditions[condConfig] = nil
		d.useConfig(t)
	}
}

func (d *desired) useConfig(t subnet.Table) {
	if t.ConfigJSON != d.configJSON {
		d.configJSON = t.ConfigJSON
		d.conditions[condConfigKeys] = unknownKeys(t.ConfigJSON)
	}
	d.config = &t.Config
}

// usePersistedConfig goes on, after a restart, with the config that the node had before the one in the store became
// invalid, and with the lease that is still in the store.
func (d *desired) usePersistedConfig(o Options, f facts) {
	t, err := f.persisted.Table()
	own := f.persisted.Own()
	mine := func(e *subnet.Entry) bool { return e.Identity == o.Identity && t.Config.Used(e.Subnets) == own }
	if err == nil && t.Config.Fits(own) && slices.ContainsFunc(d.leases.table.Entries, mine) {
		d.useConfig(t)
		d.subnets = own
	}
}

// learnOffline goes by the persisted state once the store has been away for a moment, if the subnet is sure to be this
// node's still.
func (d *desired) learnOffline(o Options, f facts) {
	p := f.persisted
	if d.leases.is == persisted || p.Subnets == "" || f.now.Sub(f.started) < offlineAfter {
		return
	}
	t, err := offlineTable(o, f)
	if err != nil {
		d.conditions[condOffline] = fmt.Errorf("waiting for %s: %w", f.store, err)
		return
	}
	d.conditions[condOffline] = fmt.Errorf("no answer from %s since the start: using persisted leases", f.store)
	d.conditions[condLease] = nil
	d.useConfig(t)
	d.leases, d.subnets = leases{table: t, is: persisted}, p.Own()
}

// offlineTable is the persisted table, or why it can't be used.
func offlineTable(o Options, f facts) (subnet.Table, error) {
	p, dir := f.persisted, o.dir()
	file := dir.LeaseFile()
	switch {
	case f.now.Before(p.Saved):
		return subnet.Table{}, fmt.Errorf("the clock says %s, earlier than when %s was written", f.now.Format(time.RFC3339),
			file)
	case p.Node != o.Identity:
		return subnet.Table{}, fmt.Errorf("%s is of node %q: this node was renamed, or its disk is a copy of that node's",
			file, p.Node.NodeName)
	case p.Prefix != dir.Prefix:
		return subnet.Table{}, fmt.Errorf("%s is of another network, %q", file, p.Prefix)
	case !p.Expires.IsZero() && f.now.After(p.Expires):
		return subnet.Table{}, fmt.Errorf("the persisted lease of %s expired at %s, another node may hold it",
			p.Subnets, p.Expires.Format(time.RFC3339))
	}
	t, err := p.Table()
	if err == nil && !t.Config.Fits(p.Own()) {
		err = errors.New("the persisted subnet does not fit the persisted network config")
	}
	if err != nil {
		return subnet.Table{}, fmt.Errorf("%s: %w", file, err)
	}
	return t, nil
}

// inUse reports whether something on the node, the pods' bridge most likely, has an address of these subnets.
func inUse(h netstate.Host, sn addr.Per[netip.Prefix]) bool {
	return slices.ContainsFunc(h.Addresses, func(a netstate.HostAddress) bool {
		p := sn.Get(addr.FamilyOf(a.Prefix.Addr()))
		return p.IsValid() && p.Contains(a.Prefix.Addr())
	})
}

// endpointsInside are the addresses of the store that a peer's subnet, or this node's own, may cover.
func (d *desired) endpointsInside(f facts) (inside []netip.Addr) {
	for _, ip := range f.snap.Endpoints {
		if d.config.Contains(ip) {
			inside = append(inside, ip)
		}
	}
	return inside
}

// chooseUnderlay chooses the device and the address. While none fits, the node goes on with the last ones.
func (d *desired) chooseUnderlay(o Options, f facts) {
	options, _ := o.Interface.With(d.settings) // they are valid
	choice, err := Choose(f.host, options, *d.config, f.addresses(o.Identity))
	if none := (noUnderlay{}); errors.As(err, &none) && d.choice != nil {
		if was := d.choice.Underlay.Get(none.family); was.Addr.IsValid() {
			err = fmt.Errorf("%w; %s", err, whatBecame(f.host, was))
		}
	}
	if d.conditions[condUnderlay] = err; err == nil {
		d.choice = &choice
	}
}

// addresses are those that the node goes by, so far as they are known: after a start from its lease, or from the
// persisted state.
func (f facts) addresses(id subnet.Identity) addr.Per[netip.Addr] {
	if f.choice != nil {
		return addr.Per[netip.Addr]{V4: f.choice.Underlay.V4.Addr, V6: f.choice.Underlay.V6.Addr}
	}
	known := []addr.Per[netip.Addr]{f.persisted.Addresses}
	for _, e := range f.snap.Table.Entries {
		if e.Identity == id {
			known = append(known, e.PublicIP)
		}
	}
	var out addr.Per[netip.Addr]
	for _, ips := range known {
		for _, family := range addr.Families() {
			if ip := ips.Get(family); f.host.Has(ip) { // so far as the node has them still
				out.Set(family, ip)
			}
		}
	}
	return out
}

// lacksKey reports whether the node can't announce its lease before its key of WireGuard has been read.
func (d *desired) lacksKey(f facts) bool {
	return d.config != nil && d.config.Backend.Type == subnet.WireGuard && f.key == (netstate.PrivateKey{})
}

// announce derives the claim: the lease that says what the peers need to know.
func (d *desired) announce(o Options, f facts) {
	d.claim = subnet.Claim{
		Attrs: subnet.Attrs{
			PublicIP: d.choice.PublicIP, PublicIPLocal: d.choice.PublicIPLocal, Backend: d.config.Backend.Type,
			VTEP: d.backend().VTEPs(*d.config, o.Identity), Identity: o.Identity,
		},
		Remembered: d.claimed.Remembered,
	}
	if d.config.Backend.Type == subnet.WireGuard {
		d.claim.PublicKey = subnet.PublicKey(f.key.Public().String())
	}
	if d.subnets != (addr.Per[netip.Prefix]{}) {
		d.claim.Remembered, d.claim.Keep = d.subnets, true
	}
}

// OwnsDevice reports whether a tunnel device of this name is one of ours, of whatever backend.
func OwnsDevice(name string) bool { return vxlan.Owns(name) || wireguard.Owns(name) }

func (b basis) backend() backend.Backend { return backendOf(b.config.Backend.Type) }

func backendOf(t subnet.BackendType) backend.Backend {
	switch t {
	case subnet.HostGW:
		return hostgw.Backend{}
	case subnet.WireGuard:
		return wireguard.Backend{}
	}
	return vxlan.Backend{}
}

// input is what the kernel state is planned from, without the peers. What the device must be follows from the claim,
// which may be newer than the lease in the store.
func (d *desired) input(f facts) backend.Input {
	return backend.Input{
		Config: *d.config, Self: subnet.Lease{Subnets: d.subnets, Attrs: d.claim.Attrs}, Underlay: d.choice.Underlay,
		Host: f.host, Endpoints: d.endpointsInside(f), Key: f.key,
	}
}

// leaseProblems are why no lease is held that leads here, and why the one that is held does not say what it should.
func leaseProblems(o Options, f facts, d desired) (lease, claim error) {
	s := f.snap
	held, elsewhere := s.Held(), leadsElsewhere(s, d.claim)
	own := s.Table.Find(subnet.FormatKey(d.subnets))
	switch {
	case held && elsewhere != nil:
		return elsewhere, nil
	case held && (s.Table.ConfigErr != nil || errors.Is(s.ClaimErr, subnet.ErrMoved)): // a condition of its own
		return nil, nil
	case held:
		return nil, s.ClaimErr
	case s.ClaimErr != nil:
		return s.ClaimErr, nil
	case d.subnets == (addr.Per[netip.Prefix]{}):
		return errStarting, nil // if it is the store that is away, that is a condition of its own
	case own != nil && own.Identity == o.Identity:
		return nil, nil // started without the store, which has the lease, and has not been asked for it yet
	}
	return fmt.Errorf("the lease disappeared from %s and is being acquired again", f.store), nil
}

// leadsElsewhere is why peers that go by this node's lease do not reach it, or do not go by it.
func leadsElsewhere(s subnet.Snapshot, claim subnet.Claim) error {
	var conflict *subnet.ConflictError
	if errors.As(s.ClaimErr, &conflict) && conflict.Refused {
		return conflict
	}
	for _, f := range addr.Families() {
		announced, is := s.Lease.PublicIP.Get(f), claim.PublicIP.Get(f)
		if s.Lease.Subnets.Get(f).IsValid() && is.IsValid() && announced != is {
			err := fmt.Errorf("the lease announces %s, but this node's address is %s", announced, is)
			if s.ClaimErr != nil {
				err = fmt.Errorf("%w: %w", err, s.ClaimErr)
			}
			return err
		}
	}
	return nil
}

// withoutName is an error of the store without the store's name, for where that is said already.
func withoutName(err error) error {
	if e := (interface{ Reason() string })(nil); errors.As(err, &e) {
		return errors.New(e.Reason())
	}
	return err
}

// sysctls are those of the node, not of a device.
func sysctls(o Options, c subnet.Config, h netstate.Host) []netstate.Sysctl {
	var out []netstate.Sysctl
	for _, f := range c.Families() {
		if o.BridgeNetfilter {
			out = append(out, netstate.BridgeNetfilter(f))
		}
		if o.IPForward {
			out = append(out, netstate.Forwarding(f))
		}
	}
	if o.IPForward && c.Pools.V6.On() {
		// A node that forwards ignores router advertisements unless it is told otherwise: it would lose its default route.
		for _, link := range h.AdvertisedBy() {
			out = append(out, netstate.Sysctl{Path: "net/ipv6/conf/" + link + "/accept_ra", Value: "2"})
		}
	}
	return out
}

// firewallInputs are what the rules of each family are made from.
func firewallInputs(o Options, p *planned, nodes func(addr.Family) ([]netip.Addr, []netip.Prefix)) []masquerade.Input {
	var inputs []masquerade.Input
	c, self := p.input.Config, p.input.Self
	for _, f := range c.Families() {
		in := masquerade.Input{
			Network: c.Pools.Get(f).Network, Subnet: self.Subnets.Get(f), Tunnel: p.node.Tunnel.Get(f),
			DirectNodes: o.IPMasq && (c.Backend.Type == subnet.HostGW || c.Backend.DirectRouting),
			Exclude:     o.MasqExclude, Masquerade: o.IPMasq, Forward: o.ForwardRules,
		}
		in.Nodes, in.Bare = nodes(f)
		if self.PublicIPLocal {
			in.Node = self.PublicIP.Get(f)
		}
		inputs = append(inputs, in)
	}
	return inputs
}
