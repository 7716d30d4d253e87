package etcd

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
)

const (
	// takenBackWithin: a machine whose lease was written over writes it again within this time, if it runs.
	takenBackWithin = 10 * time.Second
	// answeredAtOnce: a daemon that runs all the while reacts within this time. One that is started again, or another
	// copy of the machine, takes longer.
	answeredAtOnce = 500 * time.Millisecond
	// disputeFor is how long a node leaves the lease alone once both have written over it. Then it tries again: the
	// other machine may be gone.
	disputeFor = time.Minute
)

// dispute is what a node remembers while another machine with its ID writes over its lease: one of the two is a clone
// of the other.
type dispute struct {
	since time.Time // of this node's last answer to that
	by    string    // the name of the other machine then
	until time.Time // when to write again, once that did not help

	took time.Time              // when this node wrote over a lease of its ID that had another name
	left addr.Per[netip.Prefix] // the subnets that it left to that machine, which had them first
}

// judge says whether a decision would be one more turn in a fight that neither can win (conflict), or take the lease of
// a machine that runs and had it first (leave). A lease with another name is taken once: this node may be renamed.
func (d *dispute) judge(t subnet.Table, desired subnet.Claim, dec subnet.Decision, c *claimState, now time.Time) (
	conflict *subnet.ConflictError, leave bool,
) {
	e := t.Find(dec.Key)
	if e == nil || e.NodeID != desired.NodeID || e.Identity == desired.Identity && e.PublicIP == desired.PublicIP {
		return nil, false
	}
	renamed, held := e.NodeName != desired.NodeName, c.before == dec.Lease.Subnets
	switch {
	case renamed && !held:
		d.took = now
		return nil, false
	case renamed && now.Sub(d.took) < takenBackWithin:
		return nil, true
	case !renamed && (c.wrote == 0 || dec.Expect <= c.wrote): // the address is one that this node had before
		return nil, false
	case now.Before(d.until):
	case renamed && (e.NodeName != d.by || now.Sub(d.since) > answeredAtOnce), now.Sub(d.since) > disputeFor:
		d.since, d.by = now, e.NodeName
		return nil, false
	default:
		d.until = now.Add(disputeFor)
	}
	what := "this node's name and id"
	if renamed {
		what = "this node's id"
	}
	return &subnet.ConflictError{
		Holder: e, What: what,
		Advice: fmt.Sprintf("it says that it is at %s; one of the two machines is a clone of the other and needs an "+
			"/etc/machine-id (or --node-id) of its own", addresses(e)),
	}, false
}

func addresses(e *subnet.Entry) string {
	var out []string
	for _, f := range addr.Families() {
		if ip := e.PublicIP.Get(f); ip.IsValid() {
			out = append(out, ip.String())
		}
	}
	return strings.Join(out, " and ")
}
