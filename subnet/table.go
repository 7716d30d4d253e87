package subnet

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/overlayd/overlayd/addr"
)

// Table is everything under the prefix in the store, as of one revision. It is a value: nobody changes one that was handed on.
type Table struct {
	Revision int64
	// Epoch counts how often the store was found to be another one than before: emptied, or restored from a backup. What is
	// missing in a new epoch was not removed by anybody.
	Epoch          int
	Config         Config
	ConfigJSON     string   // what Config was read from
	ConfigErr      error    // why there is no valid Config at this revision
	ConfigRevision int64    // of the config key's last change; 0 where there is none
	Entries        []*Entry // in the order of their keys; one that did not change is the same pointer as before
}

// Find gives the entry with a key; nil where there is none.
func (t Table) Find(key string) *Entry {
	i, ok := find(t.Entries, key)
	if !ok {
		return nil
	}
	return t.Entries[i]
}

func find(es []*Entry, key string) (int, bool) {
	return slices.BinarySearchFunc(es, key, func(e *Entry, k string) int { return strings.Compare(e.Key, k) })
}

// Reserving is the table with reservations for single addresses, as far as they are inside the network: no subnet that
// covers one of them is free.
func (t Table) Reserving(ips []netip.Addr) Table {
	for _, ip := range ips {
		if !t.Config.Contains(ip) {
			continue
		}
		e := &Entry{Key: fmt.Sprintf("%s-%d", ip, ip.BitLen())}
		e.Subnets.Set(addr.FamilyOf(ip), addr.Host(ip))
		if i, found := find(t.Entries, e.Key); !found {
			t.Entries = slices.Insert(slices.Clip(t.Entries), i, e)
		}
	}
	return t
}

// Refusal is a lease that is not believed, and why.
type Refusal struct {
	Key    string
	Node   string
	Cause  Cause
	Reason string
}

// Cause says in a word what a refusal is about.
type Cause string

// The causes.
const (
	CauseNonsense Cause = "invalid"   // the lease can't be read
	CauseBackend  Cause = "backend"   // it is for another backend
	CauseSubnet   Cause = "subnet"    // its subnet is none of this network's
	CauseOverlap  Cause = "overlap"   // its subnet is another's, or this node's own
	CausePublicIP Cause = "public-ip" // packets can't be sent to its public IP
	CauseVTEP     Cause = "vtep"      // its tunnel's end is not one of this network
)

// objection is what is said against a lease; the zero value: nothing.
type objection struct {
	cause  Cause
	reason string
}

func objectTo(c Cause, format string, args ...any) objection {
	return objection{c, fmt.Sprintf(format, args...)}
}

func (o objection) is() bool { return o != objection{} }

// Peers sorts out which leases of others to act on. What makes no sense, or would take what is mine or another's, is refused
// with its reason and holds nobody else back. Both lists are in the order of the subnets. A Roster does the same for one table after
// another, at the cost of what changed.
func (t Table) Peers(c Config, self Lease) (peers []*Lease, refused []Refusal) {
	v := t.judge(c, self, nil)
	return v.believed, v.refused
}

// verdict is what is made of a table. Each lease of another node is either believed or refused.
type verdict struct {
	believed []*Lease // in the order of their subnets
	refused  []Refusal
	beaten   []*Lease // of the refused, those that would be believed but for another one's claim
	withheld []*Entry // of those, the ones that are too young to take another one's address
}

// suspect is an entry whose lease may be believed, so far as it is looked at by itself.
type suspect struct {
	*Entry
	lease    *Lease // without what the network does not use
	disputed bool   // another one claims what it claims
	refused  bool
}

func (t Table) judge(c Config, self Lease, young map[*Entry]time.Time) verdict {
	var v verdict
	j := judge{config: c, self: self}
	suspects := make([]suspect, 0, len(t.Entries))
	for _, e := range t.Entries {
		if e.passedOver(self) {
			continue
		}
		l, o := j.alone(e)
		if o.is() {
			v.refused = append(v.refused, e.refusal(o))
			continue
		}
		suspects = append(suspects, suspect{Entry: e, lease: l})
	}
	slices.SortFunc(suspects, func(a, b suspect) int { return CompareSubnets(a.lease.Subnets, b.lease.Subnets) })
	markOverlaps(suspects)
	markShared(suspects, c.Backend.Type)
	refused, withheld := settle(c, suspects, young)
	v.refused, v.withheld = append(v.refused, refused...), withheld
	v.believed = make([]*Lease, 0, len(suspects))
	for _, s := range suspects {
		if s.refused {
			v.beaten = append(v.beaten, s.lease)
		} else {
			v.believed = append(v.believed, s.lease)
		}
	}
	slices.SortFunc(v.refused, func(a, b Refusal) int { return cmp.Compare(a.Key, b.Key) })
	return v
}

// passedOver: a reservation that nobody has taken up, or this node's own lease.
func (e *Entry) passedOver(self Lease) bool {
	return e.Blank() || e.Err == nil && e.Subnets == self.Subnets
}

func (e *Entry) refusal(o objection) Refusal {
	return Refusal{Key: e.Key, Node: e.NodeName, Cause: o.cause, Reason: o.reason}
}

// settle decides between those that claim the same. For a subnet or a MAC, one that this network leases comes before a
// left-over of an older config, then the older one: whoever has it keeps it. An address may have moved to another node,
// and what was written last is closer to the truth; but those that are young come behind the others.
func settle(c Config, suspects []suspect, young map[*Entry]time.Time) (refused []Refusal, withheld []*Entry) {
	var left []*suspect
	for i := range suspects {
		if suspects[i].disputed {
			left = append(left, &suspects[i])
		}
	}
	byAge := func(a, b *suspect) int { // one transaction may have made several
		return cmp.Or(cmp.Compare(a.Created, b.Created), cmp.Compare(a.Key, b.Key))
	}
	fits := func(a, b *suspect) int {
		return -cmp.Compare(b2i(c.Fits(a.lease.Subnets)), b2i(c.Fits(b.lease.Subnets)))
	}
	sift := func(object func(*suspect) objection) {
		left = slices.DeleteFunc(left, func(s *suspect) bool {
			o := object(s)
			if s.refused = o.is(); s.refused {
				refused = append(refused, s.refusal(o))
			}
			return s.refused
		})
	}
	slices.SortFunc(left, func(a, b *suspect) int { return cmp.Or(fits(a, b), byAge(a, b)) })
	held, macs := newHolders(left), claims[addr.MAC]{}
	sift(func(s *suspect) objection {
		if h := held.find(s.lease); h != nil {
			return objectTo(CauseOverlap, "its subnet overlaps %s of %s, which holds it", h.Key, h.Name())
		}
		if c.Backend.Type == VXLAN {
			if mac, by := macs.add(s.lease, func(f addr.Family) addr.MAC { return s.lease.VTEP.Get(f).MAC }); by != nil {
				return objectTo(CauseVTEP, "its VtepMAC %s is that of %s, which holds it", mac, by.Name())
			}
		}
		held.add(s)
		return objection{}
	})
	isYoung := func(s *suspect) int {
		_, is := young[s.Entry]
		return b2i(is)
	}
	slices.SortFunc(left, func(a, b *suspect) int {
		return cmp.Or(fits(a, b), isYoung(a)-isYoung(b), -cmp.Compare(a.Revision, b.Revision), byAge(a, b))
	})
	ips := claims[netip.Addr]{}
	sift(func(s *suspect) objection {
		ip, by := ips.add(s.lease, s.lease.PublicIP.Get)
		switch {
		case by == nil:
			return objection{}
		case isYoung(s) > 0:
			withheld = append(withheld, s.Entry)
			return objectTo(CausePublicIP, "its public IP %s is that of %s, which may still have it", ip, by.Name())
		}
		return objectTo(CausePublicIP, "its public IP %s is that of %s, whose lease %s was written later",
			ip, by.Name(), FormatKey(by.Subnets))
	})
	return refused, withheld
}

// overlap is false where one of the two is not in use.
func overlap(a, b netip.Prefix) bool { return a.IsValid() && b.IsValid() && a.Overlaps(b) }

// CompareSubnets is the order of leases: by IPv4 subnet, then by IPv6 subnet.
func CompareSubnets(a, b addr.Per[netip.Prefix]) int {
	return cmp.Or(addr.ComparePrefix(a.V4, b.V4), addr.ComparePrefix(a.V6, b.V6))
}

// markOverlaps marks those whose subnet overlaps that of another one, in either family. They are in the order of their subnets.
func markOverlaps(ss []suspect) {
	order := make([]*suspect, 0, len(ss))
	for _, f := range addr.Families() {
		order = order[:0]
		for i := range ss {
			if ss[i].lease.Subnets.Get(f).IsValid() {
				order = append(order, &ss[i])
			}
		}
		byPrefix := func(a, b *suspect) int { return addr.ComparePrefix(a.lease.Subnets.Get(f), b.lease.Subnets.Get(f)) }
		if !slices.IsSortedFunc(order, byPrefix) {
			slices.SortFunc(order, byPrefix)
		}
		// Prefixes are disjoint or nested, and a containing one sorts before what it contains: looking back at the widest
		// one that is still open is enough.
		var open *suspect
		for _, s := range order {
			if open != nil && open.lease.Subnets.Get(f).Overlaps(s.lease.Subnets.Get(f)) {
				open.disputed, s.disputed = true, true
				continue
			}
			open = s
		}
	}
}

// markShared marks those that have an address or a MAC in common.
func markShared(ss []suspect, backend BackendType) {
	ips, macs := make(map[netip.Addr]*suspect, len(ss)), make(map[addr.MAC]*suspect, len(ss))
	for i := range ss {
		s := &ss[i]
		for _, f := range addr.Families() {
			if !s.lease.Subnets.Get(f).IsValid() {
				continue
			}
			mark(ips, s.lease.PublicIP.Get(f), s)
			if backend == VXLAN {
				mark(macs, s.lease.VTEP.Get(f).MAC, s)
			}
		}
	}
}

func mark[K comparable](first map[K]*suspect, key K, s *suspect) {
	if other := first[key]; other == nil {
		first[key] = s
	} else if other != s {
		other.disputed, s.disputed = true, true
	}
}

// holders are leases that do not overlap each other. One lease around thousands of others must not make each of them look at all.
type holders struct {
	lengths addr.Per[[]int]
	inside  map[netip.Prefix]*suspect // for prefixes of these lengths, the first lease that lies inside
}

func newHolders(ss []*suspect) holders {
	h := holders{inside: map[netip.Prefix]*suspect{}}
	for _, s := range ss {
		for _, f := range addr.Families() {
			sn, known := s.lease.Subnets.Get(f), h.lengths.Get(f)
			if sn.IsValid() && !slices.Contains(known, sn.Bits()) {
				h.lengths.Set(f, append(known, sn.Bits()))
			}
		}
	}
	return h
}

// find tells the holder that overlaps l: one inside it, or the one around it.
func (h holders) find(l *Lease) *suspect {
	for _, f := range addr.Families() {
		sn := l.Subnets.Get(f)
		if s := h.inside[sn]; s != nil {
			return s
		}
		for _, n := range h.lengths.Get(f) {
			if n >= sn.Bits() {
				continue
			}
			if s := h.inside[netip.PrefixFrom(sn.Addr(), n).Masked()]; s != nil && s.lease.Subnets.Get(f).Bits() == n {
				return s
			}
		}
	}
	return nil
}

func (h holders) add(s *suspect) {
	for _, f := range addr.Families() {
		sn := s.lease.Subnets.Get(f)
		for _, n := range h.lengths.Get(f) {
			if p := netip.PrefixFrom(sn.Addr(), n).Masked(); n <= sn.Bits() && h.inside[p] == nil {
				h.inside[p] = s
			}
		}
	}
}

// judge finds what is wrong with a lease.
type judge struct {
	config Config
	self   Lease
}

// alone looks at a lease by itself and against my own. What it returns is without the subnets of families that the network does
// not use.
func (j *judge) alone(e *Entry) (*Lease, objection) {
	if e.Err != nil {
		return nil, objectTo(CauseNonsense, "%s", e.Err)
	}
	if e.Backend != j.config.Backend.Type {
		return nil, objectTo(CauseBackend, "its backend is %q, but this network uses %q", e.Backend, j.config.Backend.Type)
	}
	used := addr.Per[netip.Prefix]{}
	for _, f := range addr.Families() {
		p, sn := j.config.Pools.Get(f), e.Subnets.Get(f)
		if !p.On() || !sn.IsValid() {
			continue
		}
		used.Set(f, sn)
		if o := j.family(&e.Lease, f, p); o.is() {
			return nil, o
		}
	}
	switch used {
	case addr.Per[netip.Prefix]{}:
		return nil, objectTo(CauseSubnet, "it has no subnet in a family that this network uses")
	case e.Subnets:
		return &e.Lease, objection{}
	}
	return &Lease{used, e.Attrs}, objection{}
}

func (j *judge) family(l *Lease, f addr.Family, p Pool) objection {
	sn, ip, mine := l.Subnets.Get(f), l.PublicIP.Get(f), j.self.PublicIP.Get(f)
	switch {
	case sn.Bits() < p.Network.Bits() || !p.Network.Contains(sn.Addr()):
		return objectTo(CauseSubnet, "its subnet %s is outside the network %s", sn, p.Network)
	case overlap(sn, j.self.Subnets.Get(f)):
		return objectTo(CauseOverlap, "its subnet %s overlaps this node's own %s", sn, j.self.Subnets.Get(f))
	case !ip.IsValid():
		return objectTo(CausePublicIP, "it has no public %s address", f)
	case ip == mine:
		return objectTo(CausePublicIP, "its public IP %s is this node's own: two nodes with one address, or an old lease of this node", ip)
	case p.Network.Contains(ip):
		return objectTo(CausePublicIP, "its public IP %s is inside the overlay network %s", ip, p.Network)
	case !ip.IsGlobalUnicast() || reserved4(ip):
		return objectTo(CausePublicIP, "its public IP %s is not a usable unicast address", ip)
	}
	if j.config.Backend.Type != VXLAN {
		return objection{}
	}
	switch v := l.VTEP.Get(f); {
	case v.MAC.IsZero():
		return objectTo(CauseVTEP, "it has no %s VtepMAC", f)
	case v.MAC.IsGroup():
		return objectTo(CauseVTEP, "its VtepMAC %s is a group address", v.MAC)
	case v.MAC == j.self.VTEP.Get(f).MAC:
		return objectTo(CauseVTEP, "its VtepMAC %s is this node's own", v.MAC)
	case v.VNI != j.config.Backend.VNI && v.VNI != 0: // early versions of flannel did not say it
		return objectTo(CauseVTEP, "its VNI is %d, but this network uses %d", v.VNI, j.config.Backend.VNI)
	}
	return objection{}
}

// reserved4: 0.0.0.0/8 and 240.0.0.0/4 (RFC 1122 §3.2.1.3, RFC 1112 §4), the broadcast address among them.
func reserved4(ip netip.Addr) bool {
	first := ip.As16()[12]
	return ip.Is4() && (first == 0 || first >= 240)
}

// claims tells which lease has an address or a MAC.
type claims[K comparable] map[K]*Lease

// add takes note of what a lease has in each family, unless another one has it: one MAC or address can't lead to two
// nodes.
func (c claims[K]) add(l *Lease, of func(addr.Family) K) (taken K, by *Lease) {
	for _, f := range addr.Families() {
		if other := c[of(f)]; other != nil && l.Subnets.Get(f).IsValid() {
			return of(f), other
		}
	}
	for _, f := range addr.Families() {
		if l.Subnets.Get(f).IsValid() {
			c[of(f)] = l
		}
	}
	return taken, nil
}
