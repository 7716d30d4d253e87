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

const (
	// answerWithin is how long a challenge may go unanswered: a node that runs, and that has the address too, writes its
	// lease again within milliseconds. After that the address is this node's.
	answerWithin = 10 * time.Second
	// answeredAtOnce is how soon the lease of a node that has had the address for a while is written over by one that
	// takes itself for the holder as well. A node that is started again needs longer.
	answeredAtOnce = 500 * time.Millisecond
	// challengeAgain is when a node that did not get its address tries again: the holder may have been switched off since.
	challengeAgain = 5 * time.Minute
)

// Contest is what a node remembers while the lease of another node announces its own address.
//
// A lease does not tell whether its node still runs, or still has the address. So a node that has the address writes
// its own lease with it, and of two leases that announce one address the peers use the one that was written last. If
// the other node runs and has the address too, it answers by writing its own lease once more, and stays the holder; the
// challenger leaves it at that. A lease that nothing stands behind any more is not answered for. Each node writes its
// own key only.
type Contest struct {
	about addr.Per[netip.Addr]
	held  bool      // this node had the address first, or its challenge was not answered
	lost  bool      // its challenge was answered
	wrote time.Time // the last write while another lease announced the address
	by    string    // the key of the lease that challenged this node's
}

// Judge says whether a decision is to be written for the sake of the address, and what there is to report of it.
func (k *Contest) Judge(d *Decision, now time.Time) *ConflictError {
	if ips := d.Lease.PublicIP; k.about != ips {
		*k = Contest{about: ips}
	}
	r := d.Rival
	switch {
	case r == nil:
		*k = Contest{about: k.about, held: true}
	case d.Announced == 0: // what is about to be written is the challenge
		k.held = false
	case d.Announced > r.Revision:
		k.held, k.lost = k.held || now.Sub(k.wrote) > answerWithin, false
		if k.by == r.Key { // it was written by a node that runs
			return d.conflict(false)
		}
	case r.PublicIPLocal && !d.Lease.PublicIPLocal:
		k.lost = false // no time makes the address this node's
		return d.conflict(true)
	case k.lost && now.Sub(k.wrote) < challengeAgain:
		return d.conflict(true)
	case !k.lost && k.answered(r, now):
		k.held, k.lost = false, true
		return d.conflict(true)
	default:
		k.held, k.lost, d.Write = !k.lost && (k.held || !k.wrote.IsZero()), false, true
		if k.held {
			k.by = r.Key
		}
	}
	return nil
}

// Wrote takes note that a decision was written.
func (k *Contest) Wrote(d Decision, now time.Time) {
	if d.Rival != nil {
		k.wrote = now
	}
}

// Next is how long to wait before judging again where nothing changes; negative: for ever.
func (k *Contest) Next(now time.Time) time.Duration {
	if !k.lost {
		return -1
	}
	return max(k.wrote.Add(challengeAgain).Sub(now), 0)
}

// answered reports whether a newer lease of another node is the answer to what this node wrote last.
func (k *Contest) answered(r *Entry, now time.Time) bool {
	if k.held {
		return k.by == r.Key && now.Sub(k.wrote) < answeredAtOnce
	}
	return now.Sub(k.wrote) < answerWithin
}

func (d *Decision) conflict(refused bool) *ConflictError {
	return &ConflictError{
		Holder: d.Rival, Refused: refused, Advice: adviceOnIP,
		What: fmt.Sprintf("the public IP %s", d.Lease.sharedIP(&d.Rival.Lease)),
	}
}

// rival finds the lease of another node that announces an address of a claim and that peers would act on; of several,
// the newest.
func rival(t Table, c *Claim, d *Decision) (newest *Entry) {
	pools := t.Config.Pools
	claimed := Lease{addr.Per[netip.Prefix]{V4: pools.V4.Network, V6: pools.V6.Network}, c.Attrs}
	for _, e := range t.Entries {
		mine := e.Key == d.Key || e.belongsTo(c) || slices.Contains(d.Drop, e)
		if mine || !claimed.sharedIP(&e.Lease).IsValid() || !t.acceptable(e) {
			continue
		}
		if e.newerThan(newest) {
			newest = e
		}
	}
	return newest
}

// newerThan reports whether an entry was written after another one; after none in any case.
func (e *Entry) newerThan(o *Entry) bool {
	return o == nil || e.Revision > o.Revision || e.Revision == o.Revision && e.Key < o.Key
}

// sharedIP is an address that both leases announce in a family that both use.
func (l *Lease) sharedIP(o *Lease) netip.Addr {
	for _, f := range addr.Families() {
		ip := l.PublicIP.Get(f)
		if l.Subnets.Get(f).IsValid() && o.Subnets.Get(f).IsValid() && ip.IsValid() && ip == o.PublicIP.Get(f) {
			return ip
		}
	}
	return netip.Addr{}
}

// Conflict says which other node's lease announces an address of a claim, of which own is the lease; nil: none does.
func (t Table) Conflict(c Claim, own *Entry) *ConflictError {
	d := Decision{Lease: Lease{own.Subnets, c.Attrs}, Key: own.Key}
	if d.Rival = rival(t, &c, &d); d.Rival == nil {
		return nil
	}
	return d.conflict(d.Rival.newerThan(own))
}

// Overlap says which other node's lease has a part of the subnets of this node's; nil: none has. In etcd this can't be.
// Peers go by the one that was made first.
func (t Table) Overlap(own *Entry) *ConflictError {
	var other *Entry
	for _, e := range t.Entries {
		if e == own || e.Err != nil || e.Blank() || e.Backend != own.Backend || !e.overlaps(&own.Lease) {
			continue
		}
		if other == nil || e.compareAge(other) < 0 {
			other = e
		}
	}
	if other == nil {
		return nil
	}
	return &ConflictError{
		Holder: other, What: fmt.Sprintf("the subnet %s", FormatKey(own.Subnets)), Refused: other.compareAge(own) < 0,
	}
}

// compareAge is the order in which leases whose subnets overlap are preferred: the one that was made first. One
// transaction may have made several, and Nodes may have one key, and have been made in one second.
func (e *Entry) compareAge(o *Entry) int {
	return cmp.Or(cmp.Compare(e.Created, o.Created), strings.Compare(e.Key, o.Key), strings.Compare(e.NodeName, o.NodeName))
}
