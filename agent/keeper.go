package agent

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
)

const (
	// rememberEvery is how often what is known of the others is written to the state directory at most, and how long after a write that
	// failed it is tried again.
	rememberEvery = 30 * time.Second
	// leaseProgress is how much longer a lease must have become to be worth a write.
	leaseProgress = 10 * time.Minute
)

// keeper writes to the state directory what has to be remembered, in a goroutine of its own: the disk may be slow, and no peer waits
// for it.
type keeper struct {
	dir    stateDir
	node   subnet.Identity
	health *health
	jobs   mailbox[keepsake]

	// What was handed over last.
	subnets addr.Per[netip.Prefix]
	entries []*subnet.Entry
	expires time.Time
	at      time.Time
	number  uint64 // of times that something was
	late    bool   // something is worth a write, or may have to be written again, and it was too early for it

	written atomic.Uint64 // the number of what was written last
}

// keepsake is what is worth to be remembered.
type keepsake struct {
	subnets addr.Per[netip.Prefix] // this node's
	expires time.Time
	table   subnet.Table
	// own says that only this node's own lease is to be written, and what is remembered of the others stays.
	own    bool
	number uint64
}

func newKeeper(dir stateDir, node subnet.Identity, h *health) *keeper {
	return &keeper{dir: dir, node: node, health: h, jobs: newMailbox[keepsake]()}
}

// begin tells what is remembered already.
func (k *keeper) begin(m memory) {
	k.subnets, k.expires, k.at = m.subnets(), m.Expires, time.Now()
}

// note has something written if it is time: the own subnet at once, the rest now and then, and again what has not been written by then.
// others says that what is known of the others may replace what is remembered of them.
func (k *keeper) note(s keepsake, others, last bool) {
	written := k.written.Load() == k.number
	early := !last && time.Since(k.at) < rememberEvery
	again := !written && !early
	news := others && (again || s.expires.Sub(k.expires).Abs() >= leaseProgress || !slices.Equal(s.table.Entries, k.entries))
	full := news && !early
	if s.own = !full; s.own && !again && s.subnets == k.subnets {
		k.late = early && (news || !written)
		return
	}
	switch {
	case full:
		k.entries, k.expires = s.table.Entries, s.expires
	case !written: // this takes the place of something that may have said more
		k.entries, k.expires = nil, time.Time{}
	}
	if !early {
		k.at = time.Now()
	}
	k.subnets, k.late = s.subnets, true
	k.number++
	s.number = k.number
	k.jobs.put(s)
}

// due is when there may be something to write; the zero time: nothing waits.
func (k *keeper) due() time.Time {
	if !k.late {
		return time.Time{}
	}
	return k.at.Add(rememberEvery)
}

// end lets run end once everything is written.
func (k *keeper) end() { close(k.jobs) }

func (k *keeper) run() {
	for s := range k.jobs {
		err := k.write(s)
		k.health.set(condStateDir, err)
		if err == nil {
			k.written.Store(s.number)
		}
	}
}

func (k *keeper) write(s keepsake) error {
	m := remember(s.table, k.node, s.subnets, s.expires)
	if s.own || m.Config == nil {
		old, _ := k.dir.load(k.node) // what can't be read was said at the start, and is replaced now
		if m.Config == nil {
			m.Config = old.Config
		}
		if s.own {
			m.Peers, m.Revision = old.Peers, old.Revision
		}
	}
	return k.dir.save(m)
}

// save writes down what a start without etcd needs.
func (a *Agent) save(last bool) {
	if !a.online() || !a.snap.Held() {
		a.keeper.late = false // the store says when there is something again
		return
	}
	// While peers are kept that the store has lost, memory keeps them too: a restart has to find out again that they are lost.
	others := !time.Now().Before(a.lostUntil)
	a.keeper.note(keepsake{subnets: a.lease.Subnets, expires: a.expires(), table: a.snap.Table}, others, last)
}

// expires is when this node's lease ends; zero for a reservation. What the store has not said yet, memory knows better.
func (a *Agent) expires() time.Time {
	own := a.snap.Table.Find(subnet.FormatKey(a.lease.Subnets))
	switch {
	case own != nil && own.Reserved() || !a.snap.Expires.IsZero():
		return a.snap.Expires
	case a.remembered.subnets() == a.lease.Subnets && !a.remembered.Expires.IsZero():
		return a.remembered.Expires
	}
	return time.Now()
}
