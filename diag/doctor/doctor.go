// Package doctor examines a node on which pods cannot talk, and names the cause: facts are gathered (from the kernel, the daemon, etcd
// and files), judged by pure functions, and printed as findings, each with the command that fixes it. It works with and without a
// running daemon, and changes nothing but what Fix is asked to.
package doctor

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd"
)

// Mark says how a check went.
type Mark string

// The marks.
const (
	OK      Mark = "ok"
	Warn    Mark = "warn"    // worth a look, pods can talk all the same
	Fail    Mark = "fail"    // pods can't talk, some of them, or won't after the next restart
	Skipped Mark = "skipped" // not checked; the reason says why
)

// Finding is the outcome of one check.
type Finding struct {
	Check  string `json:"check"`
	Mark   Mark   `json:"mark"`
	Reason string `json:"reason"`
	// Fix is what to do about it, as lines for a shell; empty where nothing is to be done or a person has to decide.
	Fix []string `json:"fix,omitempty"`
	// Fixable says that --fix does it.
	Fixable bool `json:"fixable,omitempty"`

	fixes  []fix
	leases []string // the keys of those that it is about
}

// Report is all findings of one examination.
type Report struct {
	Node     string        `json:"node"`
	Findings []Finding     `json:"findings"`
	Local    time.Duration `json:"localNanoseconds"` // what looking at this node and judging took, without waiting for etcd and for pings
	Took     time.Duration `json:"tookNanoseconds"`
}

// Count tells how many findings have a mark.
func (r Report) Count(m Mark) int {
	n := 0
	for _, f := range r.Findings {
		if f.Mark == m {
			n++
		}
	}
	return n
}

// Daemon is the running daemon as one can ask it. An error that wraps ErrNotRunning says that there is none.
type Daemon interface {
	Status(ctx context.Context) (status.Node, error)
	Peers(ctx context.Context) ([]status.Peer, error)
	Diff(ctx context.Context) ([]string, error)
}

// Ping pings every address with packets of a size (with the IP header; they may not be fragmented), and waits that long for answers
// after the last.
type Ping func(ctx context.Context, to []netip.Addr, size, count int, wait time.Duration) ([]Pong, error)

// Pong is what came back from one address.
type Pong struct {
	Addr       netip.Addr
	Sent, Lost int
	RTT        time.Duration
	Err        error // the kernel refused to send
}

// Choose decides which device leads to the other nodes, as the daemon does.
type Choose func(netstate.Host, subnet.Config) (Underlay, error)

// Underlay is the device and address by which the others reach this node, in each family that the network uses.
type Underlay struct {
	By       addr.Per[backend.Underlay]
	PublicIP addr.Per[netip.Addr]
	// ByDefault says that in some family it is the one with the default route, as nothing says which to take.
	ByDefault bool
}

// Settings are what the operator says, by flags, environment and file.
type Settings struct {
	Identity    subnet.Identity
	IdentityErr error
	Store       etcd.Options
	SubnetFile  string
	StateDir    string
	Forwards    bool // --ip-forward: the daemon switches forwarding on by itself
	ForwardFW   bool // --iptables-forward-rules
	ByDefault   bool // nothing says which interface to take: the one with the default route

	Service Service // how the daemon is restarted, and where its log is

	EnvFile     string
	EnvFileErr  error    // it is there and can't be read
	UnknownKeys []string // of the file, which are no setting
	Wrong       error    // what is wrong with the settings, one line each
	// Given says which settings of the store the command line gives; these come before the daemon's own.
	GivenEndpoints, GivenPrefix bool
	// GivenIdentity says that the settings are those of the daemon so far as they say who this node is: a name or an ID is given, or
	// there is a file in which neither is.
	GivenIdentity bool
}

// StoreOptions are the options of the store: those of the daemon where one runs, but for what the command line gives.
// Every command that needs the store finds it so.
func (s Settings) StoreOptions(daemon *status.Node) etcd.Options {
	o := s.Store
	if daemon != nil && !s.GivenEndpoints && len(daemon.Store.Endpoints) > 0 {
		o.Endpoints = daemon.Store.Endpoints
	}
	if daemon != nil && !s.GivenPrefix && daemon.Store.Prefix != "" {
		o.Prefix = daemon.Store.Prefix
	}
	o.InitConfig = nil
	return o
}

// Options are what an examination needs.
type Options struct {
	Settings
	Root   string // where files are looked for instead of /; for tests
	Daemon Daemon
	Ping   Ping
	Knock  Ping // with datagrams to a closed port, which a node refuses that ignores pings
	Choose Choose
	Owned  func(device string) bool // whether a VXLAN device of this name is ours
	// NotRunning reports whether an error of Daemon says that no daemon runs.
	NotRunning func(error) bool
	// Holder says who works on this node although nobody answers at the socket; nil: nobody does.
	Holder     func() error
	Privileges error // what this process lacks; nil: nothing
	Now        func() time.Time
}

// Run examines the node.
func Run(ctx context.Context, o Options) Report {
	began := time.Now()
	f := gather(ctx, o)
	judging := time.Now()
	r := Report{Node: f.name(), Findings: judge(f)}
	r.Local, r.Took = f.Took+time.Since(judging), time.Since(began)
	return r
}

// judge has every check look at the facts.
func judge(f Facts) []Finding {
	var out []Finding
	for _, check := range checks() {
		for _, found := range check.judge(f) {
			found.Check = check.name
			found.Fixable = len(found.fixes) > 0
			out = append(out, found)
		}
	}
	return out
}

type check struct {
	name  string
	judge func(Facts) []Finding
}

// checks are in the order of a search: who is this, is it alive, what does it know, what is on the way of a packet.
func checks() []check {
	return slices.Concat(daemonChecks(), storeChecks(), hostChecks(), deviceChecks(), firewallChecks(), managerChecks(), limitChecks(), peerChecks())
}

// What judges say.

func ok(reason string) []Finding      { return []Finding{{Mark: OK, Reason: reason}} }
func skipped(reason string) []Finding { return []Finding{{Mark: Skipped, Reason: reason}} }
func warn(reason string, steps ...string) []Finding {
	return []Finding{{Mark: Warn, Reason: reason, Fix: steps}}
}

func fail(reason string, steps ...string) []Finding {
	return []Finding{{Mark: Fail, Reason: reason, Fix: steps}}
}

// atMost keeps a screen readable where one thing is wrong a thousand times.
func atMost(found []Finding) []Finding {
	const most = 8
	if len(found) <= most {
		return found
	}
	rest := found[most]
	rest.Reason = fmt.Sprintf("and %d more like these", len(found)-most)
	rest.Fix, rest.fixes, rest.leases = nil, nil, nil
	return append(found[:most:most], rest)
}

// orOK is what was found, or that all is well.
func orOK(found []Finding, reason string) []Finding {
	if len(found) == 0 {
		return ok(reason)
	}
	return found
}
