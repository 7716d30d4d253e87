package agent

import (
	"net/netip"
	"slices"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
)

// lingerFor is how long a peer stays whose lease is gone or can't be believed any more. A lease that was deleted or overwritten by
// mistake is back within that time, and no packet is lost; and nothing is gained by taking the routes of a node that is gone at once.
const lingerFor = 5 * time.Second

// lingering keeps peers for a while after their leases are gone.
type lingering struct {
	believed []subnet.Lease // the peers of the last round, those that linger among them
	until    map[addr.Per[netip.Prefix]]time.Time
}

// merge adds those that linger to the peers, in their order. A peer that is newly missing lingers for the time given.
func (l *lingering) merge(c subnet.Config, peers []subnet.Lease, self subnet.Lease, now time.Time, lost time.Duration) (all, given []subnet.Lease) {
	missing := c.Retain(l.believed, peers, self)
	until := make(map[addr.Per[netip.Prefix]]time.Time, len(missing))
	all = peers
	for _, p := range missing {
		end, known := l.until[p.Subnets]
		if !known {
			end = now.Add(lost)
		}
		if !now.Before(end) {
			given = append(given, p)
			continue
		}
		until[p.Subnets] = end
		all = append(all, p)
	}
	if len(until) > 0 {
		all = slices.Clone(all)
		slices.SortFunc(all, func(a, b subnet.Lease) int { return subnet.CompareSubnets(a.Subnets, b.Subnets) })
	}
	l.believed, l.until = all, until
	return all, given
}

// next is when the first of them has to go; the zero time: none lingers.
func (l *lingering) next() time.Time {
	var first time.Time
	for _, t := range l.until {
		if first.IsZero() || t.Before(first) {
			first = t
		}
	}
	return first
}
