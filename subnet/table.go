package subnet

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/overlayd/overlayd/addr"
)

// Table is everything under the prefix in the store, as of one revision. It is a value: nobody changes one that was handed on.
type Table struct {
	Revision int64
	// Epoch counts how often the store was found to be another one than before: emptied, or restored from a backup. What is
	// missing in a new epoch was not removed by anybody.
	Epoch          int
	Config         Config
	ConfigJSON     string // what Config was read from
	ConfigErr      error  // why there is no valid Config at this revision
	ConfigRevision int64  // of the config key's last change; 0 where there is none
	Entries        []*Entry // in the order of their keys; one that did not change is the same pointer as before
}

// Retain lists those of the leases believed before that are believed no longer, and that nothing contradicts: nobody else, this
// node included, has any part of their subnets or one of their addresses, and their node has no other lease.
func (c Config) Retain(before, now []Lease, self Lease) []Lease {
	present := make(map[addr.Per[netip.Prefix]]bool, len(now))
	for _, l := range now {
		present[l.Subnets] = true
	}
	missing := slices.DeleteFunc(slices.Clone(before), func(l Lease) bool { return present[l.Subnets] })
	if len(missing) == 0 {
		return nil
	}
	nodes, ips, macs := map[string]bool{}, map[netip.Addr]bool{}, map[addr.MAC]bool{}
	var held []netip.Prefix
	for _, l := range append(slices.Clone(now), self) {
		nodes[l.NodeID] = true
		for _, f := range addr.Families() {
			if p := l.Subnets.Get(f); p.IsValid() {
				held = append(held, p)
				ips[l.PublicIP.Get(f)], macs[l.VTEP.Get(f).MAC] = true, true
			}
		}
	}
	taken := newPrefixSet(held)
	return slices.DeleteFunc(missing, func(l Lease) bool {
		if l.NodeID != "" && nodes[l.NodeID] || (judge{config: c, self: self}).alone(&l, nil) != "" { // the config may be another one now
			return true
		}
		for _, f := range addr.Families() {
			sn, ip, mac := l.Subnets.Get(f), l.PublicIP.Get(f), l.VTEP.Get(f).MAC
			if sn.IsValid() && (taken.overlaps(sn) || ips[ip] || !mac.IsZero() && macs[mac]) {
				return true
			}
		}
		return false
	})
}

// prefixSet finds overlaps in the way of sorted, disjoint ranges of addresses.
type prefixSet struct{ ranges []addrRange }

type addrRange struct{ first, last netip.Addr }

func newPrefixSet(ps []netip.Prefix) prefixSet {
	ps = slices.Clone(ps)
	slices.SortFunc(ps, addr.ComparePrefix)
	var s prefixSet
	for _, p := range ps {
		// What overlaps the range before is inside it: prefixes are disjoint or nested, and the wider one sorts first.
		if n := len(s.ranges); n == 0 || s.ranges[n-1].last.Less(p.Addr()) || s.ranges[n-1].last.Is4() != p.Addr().Is4() {
			s.ranges = append(s.ranges, addrRange{p.Masked().Addr(), addr.Last(p)})
		}
	}
	return s
}

func (s prefixSet) overlaps(p netip.Prefix) bool {
	if !p.IsValid() {
		return false
	}
	last := addr.Last(p)
	i, _ := slices.BinarySearchFunc(s.ranges, p.Masked().Addr(), func(r addrRange, a netip.Addr) int { return r.last.Compare(a) })
	return i < len(s.ranges) && s.ranges[i].first.Compare(last) <= 0 && s.ranges[i].first.Is4() == last.Is4()
}

// Refusal is a lease that is not believed, and why.
type Refusal struct {
	Key    string
	Node   string
	Reason string
}

// Peers sorts out which leases of others to act on. What makes no sense, or would take what is mine or another's, is refused
// with its reason and holds nobody else back. Both lists are in the order of the subnets.
func (t Table) Peers(c Config, self Lease) (peers []Lease, refused []Refusal) {
	j := judge{config: c, self: self, macs: map[addr.MAC]string{}, ips: map[netip.Addr]string{}}
	refuse := func(e *Entry, reason string) {
		refused = append(refused, Refusal{Key: e.Key, Node: e.NodeName, Reason: reason})
	}
	// Of two that claim the same, one that this network leases comes before a left-over of an older config, then the older one.
	byAge := make([]*Entry, 0, len(t.Entries))
	for _, e := range t.Entries {
		if e.Blank() || e.Err == nil && e.Subnets == self.Subnets {
			continue
		}
		l := e.Lease
		if reason := j.alone(&l, e.Err); reason != "" {
			refuse(e, reason)
			continue
		}
		if l != e.Lease { // of a family that the network does not use
			used := *e
			used.Lease, e = l, &used
		}
		byAge = append(byAge, e)
	}
	slices.SortFunc(byAge, func(a, b *Entry) int { // one transaction may have made several
		return cmp.Or(-cmp.Compare(b2i(c.Fits(a.Subnets)), b2i(c.Fits(b.Subnets))), cmp.Compare(a.Created, b.Created), cmp.Compare(a.Key, b.Key))
	})
	crossed := overlapping(byAge)
	held := newHolders(byAge, crossed) // of those that overlap another, the accepted ones
	for i, e := range byAge {
		if h := held.find(e.Lease); h != nil {
			refuse(e, fmt.Sprintf("its subnet overlaps %s of %s, which holds it", h.Key, h.Name()))
			continue
		}
		if reason := j.among(e.Lease); reason != "" {
			refuse(e, reason)
			continue
		}
		if crossed[i] {
			held.add(byAge[i])
		}
		peers = append(peers, e.Lease)
	}
	slices.SortFunc(peers, func(a, b Lease) int { return CompareSubnets(a.Subnets, b.Subnets) })
	slices.SortFunc(refused, func(a, b Refusal) int { return cmp.Compare(a.Key, b.Key) })
	return peers, refused
}

// overlap is false where one of the two is not in use.
func overlap(a, b netip.Prefix) bool { return a.IsValid() && b.IsValid() && a.Overlaps(b) }

// CompareSubnets is the order of leases: by IPv4 subnet, then by IPv6 subnet.
func CompareSubnets(a, b addr.Per[netip.Prefix]) int {
	return cmp.Or(addr.ComparePrefix(a.V4, b.V4), addr.ComparePrefix(a.V6, b.V6))
}

// overlapping marks the entries whose subnet overlaps that of another one, in either family.
func overlapping(es []*Entry) []bool {
	crossed := make([]bool, len(es))
	order := make([]int, 0, len(es))
	for _, f := range addr.Families() {
		order = order[:0]
		for i := range es {
			if es[i].Subnets.Get(f).IsValid() {
				order = append(order, i)
			}
		}
		slices.SortFunc(order, func(a, b int) int { return addr.ComparePrefix(es[a].Subnets.Get(f), es[b].Subnets.Get(f)) })
		// Prefixes are disjoint or nested, and a containing one sorts before what it contains: looking back at the widest
		// one that is still open is enough.
		open := -1
		for _, i := range order {
			if open >= 0 && es[open].Subnets.Get(f).Overlaps(es[i].Subnets.Get(f)) {
				crossed[open], crossed[i] = true, true
				continue
			}
			open = i
		}
	}
	return crossed
}

// holders are leases that do not overlap each other. One lease around thousands of others must not make each of them look at all.
type holders struct {
	lengths addr.Per[[]int]
	inside  map[netip.Prefix]*Entry // for prefixes of these lengths, the first lease that lies inside
}

func newHolders(es []*Entry, crossed []bool) holders {
	h := holders{inside: map[netip.Prefix]*Entry{}}
	for i := range es {
		for _, f := range addr.Families() {
			sn, known := es[i].Subnets.Get(f), h.lengths.Get(f)
			if crossed[i] && sn.IsValid() && !slices.Contains(known, sn.Bits()) {
				h.lengths.Set(f, append(known, sn.Bits()))
			}
		}
	}
	return h
}

// find tells the holder that overlaps l: one inside it, or the one around it.
func (h holders) find(l Lease) *Entry {
	for _, f := range addr.Families() {
		sn := l.Subnets.Get(f)
		if e := h.inside[sn]; e != nil {
			return e
		}
		for _, n := range h.lengths.Get(f) {
			if n >= sn.Bits() {
				continue
			}
			if e := h.inside[netip.PrefixFrom(sn.Addr(), n).Masked()]; e != nil && e.Subnets.Get(f).Bits() == n {
				return e
			}
		}
	}
	return nil
}

func (h holders) add(e *Entry) {
	for _, f := range addr.Families() {
		sn := e.Subnets.Get(f)
		for _, n := range h.lengths.Get(f) {
			if p := netip.PrefixFrom(sn.Addr(), n).Masked(); n <= sn.Bits() && h.inside[p] == nil {
				h.inside[p] = e
			}
		}
	}
}

// judge finds what is wrong with a lease.
type judge struct {
	config Config
	self   Lease
	macs   map[addr.MAC]string // of the peers accepted so far, with their names
	ips    map[netip.Addr]string
}

// alone looks at a lease by itself and against my own. Subnets of families that the network does not use are dropped from it.
func (j judge) alone(l *Lease, err error) string {
	if err != nil {
		return err.Error()
	}
	if l.Backend != j.config.Backend.Type {
		return fmt.Sprintf("its backend is %q, this network's is %q", l.Backend, j.config.Backend.Type)
	}
	used := 0
	for _, f := range addr.Families() {
		p := j.config.Pools.Get(f)
		if !p.On() || !l.Subnets.Get(f).IsValid() {
			l.Subnets.Set(f, netip.Prefix{})
			continue
		}
		used++
		if reason := j.family(*l, f, p); reason != "" {
			return reason
		}
	}
	if used == 0 {
		return "it has no subnet in a family that this network uses"
	}
	return ""
}

func (j judge) family(l Lease, f addr.Family, p Pool) string {
	sn, ip, mine := l.Subnets.Get(f), l.PublicIP.Get(f), j.self.PublicIP.Get(f)
	switch {
	case sn.Bits() < p.Network.Bits() || !p.Network.Contains(sn.Addr()):
		return fmt.Sprintf("its subnet %s is outside the network %s", sn, p.Network)
	case overlap(sn, j.self.Subnets.Get(f)):
		return fmt.Sprintf("its subnet %s overlaps this node's own %s", sn, j.self.Subnets.Get(f))
	case !ip.IsValid():
		return fmt.Sprintf("it has no public %s address", f)
	case ip == mine:
		return fmt.Sprintf("its public IP %s is this node's own: two nodes with one address, or a lease that this node left behind", ip)
	case p.Network.Contains(ip):
		return fmt.Sprintf("its public IP %s is inside the overlay network %s", ip, p.Network)
	case !ip.IsGlobalUnicast() || reserved4(ip):
		return fmt.Sprintf("its public IP %s is not a unicast address that a packet could be sent to", ip)
	}
	if j.config.Backend.Type != VXLAN {
		return ""
	}
	switch v := l.VTEP.Get(f); {
	case v.MAC.IsZero():
		return fmt.Sprintf("it has no %s VtepMAC", f)
	case v.MAC.IsGroup():
		return fmt.Sprintf("its VtepMAC %s is a group address", v.MAC)
	case v.MAC == j.self.VTEP.Get(f).MAC:
		return fmt.Sprintf("its VtepMAC %s is this node's own", v.MAC)
	case v.VNI != j.config.Backend.VNI && v.VNI != 0: // early versions of flannel did not say it
		return fmt.Sprintf("its VNI is %d, this network's is %d", v.VNI, j.config.Backend.VNI)
	}
	return ""
}

// reserved4: 0.0.0.0/8 and 240.0.0.0/4 (RFC 1122 §3.2.1.3, RFC 1112 §4), the broadcast address among them.
func reserved4(ip netip.Addr) bool {
	first := ip.As16()[12]
	return ip.Is4() && (first == 0 || first >= 240)
}

// among takes note of a peer's addresses, unless another peer has one of them: one MAC or address can't lead to two nodes.
func (j judge) among(l Lease) string {
	for _, f := range addr.Families() {
		if !l.Subnets.Get(f).IsValid() {
			continue
		}
		if by, taken := j.ips[l.PublicIP.Get(f)]; taken {
			return fmt.Sprintf("its public IP %s is that of %s, which holds it", l.PublicIP.Get(f), by)
		}
		if by, taken := j.macs[l.VTEP.Get(f).MAC]; taken && j.config.Backend.Type == VXLAN {
			return fmt.Sprintf("its VtepMAC %s is that of %s, which holds it", l.VTEP.Get(f).MAC, by)
		}
	}
	for _, f := range addr.Families() {
		if l.Subnets.Get(f).IsValid() {
			j.ips[l.PublicIP.Get(f)] = l.Name()
			j.macs[l.VTEP.Get(f).MAC] = l.Name()
		}
	}
	return ""
}
