package subnet

import (
	"context"
	"net/netip"
	"time"

	"github.com/overlayd/overlayd/addr"
)

// Manager is a node's side of the store: it brings the table in, and this node's claim out.
type Manager interface {
	// Run does the work until ctx ends, and returns ctx's error. No fault of the store ends it.
	Run(ctx context.Context) error
	// Updates delivers the newest snapshot. A slow reader misses those in between, never the last one.
	Updates() <-chan Snapshot
	// Claim says what this node's lease is to be from now on. It does not wait; what came of it is in the snapshots.
	Claim(c Claim)
	// Name is what to call the store in a sentence: "etcd", "the Kubernetes API".
	Name() string
}

// Snapshot is what is known of the store at one moment. It is always whole.
type Snapshot struct {
	Table Table // the newest that was read; its Revision is 0 until there is one

	Claimed Claim     // the claim that Lease and ClaimErr are about
	Lease   Lease     // what this node holds; the zero Lease while it holds nothing
	Expires time.Time // when Lease ends if it can't be renewed; zero for a reservation
	// ClaimErr is why the store does not say what was claimed: a conflict, a full pool, no valid config.
	ClaimErr error

	// InitConfigErr says that the network config in the store means something else than the one that this node would put
	// there if there were none. The one in the store is in use.
	InitConfigErr error

	// ReadyErr is why the store can't be told whether this node is ready, though it can be reached.
	ReadyErr error

	// Losses counts how often, since the start, the lease that this node held was gone from the store; LostAt is the last
	// time.
	Losses int
	LostAt time.Time

	Settings *NodeSettings // of this node; nil: not known yet, or the store has no such

	Endpoints []netip.Addr // of the store, so far as they are known, in order

	// Err is why the store can't be reached at the moment; Table is then as old as Since.
	Err   error
	Since time.Time
}

// NodeSettings are what an operator has set in the store for one node, each as it stands there.
type NodeSettings struct {
	Interface Setting           // as --iface: devices or addresses, separated by commas
	PublicIP  addr.Per[Setting] // as --public-ip and --public-ipv6
}

// Setting is one of them. The zero value: it is not set.
type Setting struct {
	Name  string // what to call it in a sentence
	Value string
}

// Held reports whether this node holds a lease.
func (s Snapshot) Held() bool { return s.Lease != Lease{} }

// Replace puts a value into a channel of size 1, in place of the one that waits there.
func Replace[T any](c chan T, v T) {
	for {
		select {
		case c <- v:
			return
		default:
		}
		select {
		case <-c:
		default:
		}
	}
}
