// Package faults is the catalogue of what can happen to an overlay network, and the runner that makes each of it happen
// in a lab: while traffic flows, with a bound on what may be lost and on how long the repair may take.
//
// The catalogue is data ([Catalogue]): a row says what is done, what is expected, and what the daemon has to say about
// it: in its log ([Fault].Log), and to an operator who asks it ([Seen]). A row that breaks its bound is a bug of the
// daemon, or of the row.
package faults

import (
	"context"
	"time"
)

// Area says what a fault is done to.
type Area string

// The areas, in the order of the table.
const (
	Kernel   Area = "kernel"
	Firewall Area = "firewall"
	Underlay Area = "underlay"
	Etcd     Area = "etcd"
	Boot     Area = "boot"
	Daemon   Area = "daemon"
	Peers    Area = "peers"

	Kubernetes Area = "kubernetes"
)

// Action does something to a site.
type Action = func(context.Context, *Site) error

// Check says what is not (yet) as it should be at a site.
type Check = Action

// Fault is one row of the catalogue.
type Fault struct {
	Area  Area
	Name  string
	On    []string // the setups that it applies to; none: VXLAN over IPv4
	Short bool     // it belongs to the short form
	Soak  bool     // it may happen at any time in a soak

	// Inject makes the fault. Expect must hold within Bound.Repair after that; without it, and without Restore, it is
	// Whole.
	Inject Action
	Expect Check
	// Hold is how long the fault then lasts. Keeps must hold all that time.
	Hold  time.Duration
	Keeps Check
	// Restore ends the fault. Then the site must be Whole within Bound.Repair.
	Restore Action
	// Peer says that it is done to the peer as well as to the victim.
	Peer bool
	// Ruins says that the site is not the same afterwards, and is thrown away.
	Ruins bool

	Bound Bound
	// Log is a regular expression that a line of the daemon's log must match.
	Log string
	// Seen is what an operator gets to see, without the log; nil: that is not checked.
	Seen *Seen
}

// Bound is what a fault may cost.
type Bound struct {
	Lost   int           // pings; Any: as many as the repair takes
	Every  bool          // the fault is every node's: packets may be lost between others, too
	Repair time.Duration // from the fault, or from its end, to the planned state
	Lines  int           // of the log; 0: mostLines
}

// Any stands for no bound on the number of lost packets. Between nodes that have nothing to do with the fault none is
// lost.
const Any = -1

// mostLines is how many lines a daemon may log about one fault.
const mostLines = 60

// letGo is when a removed peer is gone from the others: it stays for five seconds, in case it was a mistake.
const letGo = 9 * time.Second

// withinASecond is the bound where a second is promised.
const withinASecond = time.Second

func drift() Bound    { return Bound{Lost: Any, Repair: withinASecond} }
func underlay() Bound { return Bound{Lost: Any, Repair: 2 * time.Second} }

// lossless is the bound where no packet may be lost; catching up may take a while, since nodes that return must not all
// do so at once.
func lossless(repair time.Duration) Bound { return Bound{Repair: repair} }

func (b Bound) lines() int {
	if b.Lines == 0 {
		return mostLines
	}
	return b.Lines
}

func (f Fault) setups() []string {
	if len(f.On) == 0 {
		return []string{OnVXLAN}
	}
	return f.On
}

// in is the fault as it is judged in a setup: the kernel does not notify of changes to legacy iptables, which are found
// by the next resync.
func (f Fault) in(setup string) Fault {
	if setup == OnLegacy && f.Area == Firewall {
		f.Bound.Repair = max(f.Bound.Repair, resync*time.Second+withinASecond)
	}
	return f
}
