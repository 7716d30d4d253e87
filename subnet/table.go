package subnet

import (
	"fmt"
	"net/netip"
	"slices"
	"sort"
	"time"

	"github.com/overlayd/overlayd/addr"
)

// Table is everything under the prefix in the store, as of one revision. It is a value, and never changed once handed
// on.
type Table struct {
	Revision int64
	// Epoch counts how often the store was found to be another one than before: emptied, or restored from a backup. What
	// is missing in a new epoch was not removed by an operator or a node.
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
	i := sort.Search(len(es), func(i int) bool { return es[i].Key >= key })
	return i, i < len(es) && es[i].Key == key
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

// Rejection is a lease that is not accepted, and why.
type Rejection struct {
	Key    string
	Node   string
	Cause  Cause
	Reason string
}

// Cause says in a word what a rejection is about.
type Cause string

// The causes.
const (
	CauseInvalid  Cause = "invalid"   // the lease can't be read
	CauseBackend  Cause = "backend"   // it is for another backend
	CauseSubnet   Cause = "subnet"    // its subnet is none of this network's
	CauseOverlap  Cause = "overlap"   // its subnet is another's, or this node's own
	CausePublicIP Cause = "public-ip" // packets can't be sent to its public IP
	CauseSharedIP Cause = "shared-ip" // its public IP is another's, or this node's own
	CauseVTEP     Cause = "vtep"      // its tunnel's end is not one of this network
)

// objection is what speaks against a lease; the zero value: nothing.
type objection struct {
	cause  Cause
	reason string
	young  bool // the lease is too young to take another one's address: judged again when it no longer is
}

func objectTo(c Cause, format string, args ...any) objection {
	return objection{cause: c, reason: fmt.Sprintf(format, args...)}
}

// Peers decides which leases of other nodes to accept. What makes no sense, or would take what is this node's or
// another's, is rejected with its reason, and holds back no other. Both lists are in the order of the subnets. A Roster
// does the same for one table after another.
func (t Table) Peers(c Config, self Lease) (peers []*Lease, rejected []Rejection) {
	var r Roster
	r.Update(t, c, self, time.Time{}, 0)
	return r.Peers(), r.Rejected()
}

// passedOver: a reservation that no node has taken up, or this node's own lease.
func (e *Entry) passedOver(self Lease) bool {
	return e.Blank() || e.Err == nil && e.Subnets == self.Subnets
}

// overlap is false where one of the two is not in use.
func overlap(a, b netip.Prefix) bool { return a.IsValid() && b.IsValid() && a.Overlaps(b) }

// CompareSubnets is the order of leases: by IPv4 subnet, then by IPv6 subnet.
func CompareSubnets(a, b addr.Per[netip.Prefix]) int {
	if c := addr.ComparePrefix(a.V4, b.V4); c != 0 {
		return c
	}
	return addr.ComparePrefix(a.V6, b.V6)
}

// judge finds what is wrong with a lease.
type judge struct {
	config Config
	self   Lease
}

// alone judges a lease by itself and against this node's own. What it returns is without the subnets of families that
// the network does not use.
func (j *judge) alone(e *Entry) (*Lease, objection) {
	if e.Err != nil {
		return nil, objectTo(CauseInvalid, "%s", e.Err)
	}
	return j.fits(&e.Lease)
}

// acceptable reports whether nothing speaks against an entry by itself: nodes accept it if no other lease does.
func (t Table) acceptable(e *Entry) bool {
	l, _ := (&judge{config: t.Config}).alone(e)
	return l != nil
}

func (j *judge) fits(l *Lease) (*Lease, objection) {
	if l.Backend != j.config.Backend.Type {
		return nil, objectTo(CauseBackend, "its backend is %q, but this network uses %q", l.Backend, j.config.Backend.Type)
	}
	used := addr.Per[netip.Prefix]{}
	for _, f := range addr.Families() {
		p, sn := j.config.Pools.Get(f), l.Subnets.Get(f)
		if !p.On() || !sn.IsValid() {
			continue
		}
		used.Set(f, sn)
		if o := j.family(l, f, p); o != (objection{}) {
			return nil, o
		}
	}
	switch used {
	case addr.Per[netip.Prefix]{}:
		return nil, objectTo(CauseSubnet, "it has no subnet in a family that this network uses")
	case l.Subnets:
		return l, objection{}
	}
	return &Lease{used, l.Attrs}, objection{}
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
		return objectTo(CauseSharedIP, "its public IP %s is this node's own: "+
			"two nodes with one address, or an old lease of this node", ip)
	case p.Network.Contains(ip):
		return objectTo(CausePublicIP, "its public IP %s is inside the overlay network %s", ip, p.Network)
	case !ip.IsGlobalUnicast() || reserved4(ip):
		return objectTo(CausePublicIP, "its public IP %s is not a usable unicast address", ip)
	}
	switch j.config.Backend.Type {
	case WireGuard:
		return j.key(l)
	case VXLAN:
		return j.vtep(l, f)
	}
	return objection{}
}

func (j *judge) key(l *Lease) objection {
	switch l.PublicKey {
	case "":
		return objectTo(CauseVTEP, "it has no PublicKey")
	case j.self.PublicKey:
		return objectTo(CauseVTEP, "its PublicKey %s is this node's own", l.PublicKey)
	}
	return objection{}
}

func (j *judge) vtep(l *Lease, f addr.Family) objection {
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

// HarmsFlannel lists the entries whose value is no JSON, where nodes of flannel lease subnets beside them. A running
// flanneld takes the event of such a key for the end of all leases: it drops its routes to every peer, and has each
// back only when that peer renews its lease.
func (t Table) HarmsFlannel() (bad []*Entry) {
	beside := false
	for _, e := range t.Entries {
		if e.NotJSON {
			bad = append(bad, e)
		}
		beside = beside || e.Err == nil && e.Backend != "" && e.Identity == (Identity{}) // flannel names no node
	}
	if !beside {
		return nil
	}
	return bad
}
