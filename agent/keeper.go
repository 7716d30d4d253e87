package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

const (
	// rememberEvery is how often what is known of thousands of peers is written to the state directory at most, and
	// how long after a write that failed it is tried again. A small file may be written more often: it grows by some
	// 300 bytes for each peer.
	rememberEvery = 30 * time.Second
	rememberPeer  = 6 * time.Millisecond
	// rememberSelf is how often it is written at most because of what concerns this node itself.
	rememberSelf = time.Second
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

	last   keepsake  // what was handed over last
	at     time.Time // when it was
	number uint64    // of times that something was
	next   time.Time // when there may be something to write; zero: nothing waits

	written atomic.Uint64 // the number of what was written last
}

// keepsake is what is worth to be remembered.
type keepsake struct {
	self    selfMemory
	bridges []netstate.PodBridge
	expires time.Time
	table   subnet.Table
	// own says that what is remembered of the others stays.
	own    bool
	number uint64
}

// selfMemory is what a start without the store needs of this node itself.
type selfMemory struct {
	subnets addr.Per[netip.Prefix]
	config  string // the network config in use
	addrs   addr.Per[netip.Addr]
	bridges string // their names and addresses, and what they have lost
}

func newKeeper(dir stateDir, node subnet.Identity, h *health) *keeper {
	return &keeper{dir: dir, node: node, health: h, jobs: newMailbox[keepsake]()}
}

// begin tells what is remembered already.
func (k *keeper) begin(m memory) {
	self := selfMemory{subnets: m.subnets(), config: string(m.Config), addrs: m.Addresses}
	k.last = keepsake{self: self, bridges: m.Bridges, expires: m.Expires}
	k.at = time.Now()
}

// note has something written if it is time: at once after a quiet time, and then the sooner, the more it matters and
// the less there is to write.
func (k *keeper) note(s keepsake, last bool) {
	var gap time.Duration
	switch {
	case s.self != k.last.self:
		gap = rememberSelf
	case !s.own && (s.expires.Sub(k.last.expires).Abs() >= leaseProgress ||
		!slices.Equal(s.table.Entries, k.last.table.Entries)):
		gap = min(max(rememberSelf, time.Duration(len(s.table.Entries))*rememberPeer), rememberEvery)
	case k.written.Load() != k.number,
		last && fmt.Sprint(s.bridges) != fmt.Sprint(k.last.bridges): // the ports, which come and go
		gap = rememberEvery
	default:
		k.next = time.Time{}
		return
	}
	now := time.Now()
	if k.next = k.at.Add(gap); now.Before(k.next) && !last {
		return
	}
	k.number++
	s.number = k.number
	k.jobs.put(s)
	k.at, k.next = now, now.Add(rememberEvery) // by then it is written, or has to be again
	if k.last = s; s.own {                     // it may have taken the place of one that said more
		k.last.table.Entries, k.last.expires = nil, time.Time{}
	}
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
	m := remember(s.table, k.node, s.self, s.expires)
	m.Bridges = s.bridges
	if s.own {
		old, _ := k.dir.load(k.node) // what can't be read was said at the start, and is replaced now
		m.Peers, m.Revision = old.Peers, old.Revision
	}
	return k.dir.save(m)
}

// save writes down what a start without etcd needs.
func (a *Agent) save(last bool) {
	if !a.online() || !a.snap.Held() {
		a.keeper.next = time.Time{} // the store says when there is something again
		return
	}
	a.keeper.note(keepsake{
		self:    selfMemory{a.lease.Subnets, a.configJSON, a.current(), a.bridges.gist()},
		bridges: a.bridges.known,
		expires: a.expires(), table: a.snap.Table,
		// While peers are kept that the store has lost, memory keeps them too: a restart has to find out again that
		// they are lost.
		own: time.Now().Before(a.lostUntil),
	}, last)
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
