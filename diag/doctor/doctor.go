// Package doctor examines a node on which pods can't talk, and names the cause. gather reads the node, the daemon,
// the store and files into Facts; derive, which is pure, works out what several of them say together; probe tries out what
// can't be read. Checks are pure functions from Facts to findings, each with the command that fixes it. It works with
// and without a running daemon, and changes nothing but what Apply is asked to.
package doctor

import (
	"context"
	"net/netip"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/internal/ping"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// Report is all findings of one examination.
type Report struct {
	Node     string        `json:"node"`
	Findings []Finding     `json:"findings"`
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

// Ask puts into answer what the running daemon says at a path of its socket. It gives an error for which
// Options.NotRunning holds where there is none.
type Ask func(ctx context.Context, path string, answer any) error

// Ping pings every address with packets of a size (with the IP header; they may not be fragmented), and waits that long
// for answers after the last. Or it knocks: with datagrams to a closed port, which a node rejects that ignores pings.
type Ping func(ctx context.Context, to []netip.Addr, size, count int, wait time.Duration, knock bool) (
	[]ping.Outcome, error)

// Choose decides which device leads to the other nodes, as the daemon does. It is pure.
type Choose func(netstate.Host, subnet.Config, subnet.NodeSettings) (Underlay, error)

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
	Store       Store
	SubnetFile  string
	StateDir    string
	CNIConf     string // overlayd's CNI configuration; empty: where overlay-install puts it, if it is there
	ForwardFW   bool   // --iptables-forward-rules
	ByDefault   bool   // nothing says which interface to take: the one with the default route

	Service Service // how the daemon is restarted, and where its log is

	EnvFile     string
	EnvFileErr  error    // it exists and can't be read
	UnknownKeys []string // of the file, which are no setting
	Wrong       error    // what is wrong with the settings, one line each
	Given       []string // flags of the command line, by name: these come before the daemon's own settings
}

// Options are what an examination needs.
type Options struct {
	Settings
	Root   string // where files are read instead of below /; for tests
	Ask    Ask
	Ping   Ping
	Choose Choose
	Owned  func(device string) bool // whether a VXLAN device of this name is ours
	// NotRunning reports whether an error of Ask says that no daemon runs.
	NotRunning func(error) bool
	// Holder says which daemon runs on this node although none answers at the socket; nil: none does.
	Holder     func() error
	Privileges error // what this process lacks; nil: nothing
	Now        func() time.Time
}

// Run examines the node.
func Run(ctx context.Context, o Options) Report {
	began := time.Now()
	f := facts(ctx, o)
	return Report{Node: f.name(), Findings: judge(f), Took: time.Since(began)}
}

func facts(ctx context.Context, o Options) Facts {
	f := gather(ctx, o)
	f.Derived = derive(f)
	f.Probes = probe(ctx, o, f)
	return f
}

// check is one of the checks. needs say why it can't be done, or "".
type check struct {
	name  string
	judge func(Facts) findings
	needs []func(Facts) string
}

// judge has every check judge the facts.
func judge(f Facts) []Finding {
	var out []Finding
	for _, c := range checks() {
		for _, found := range c.run(f) {
			found.Check = c.name
			out = append(out, found)
		}
	}
	return out
}

func (c check) run(f Facts) findings {
	for _, need := range c.needs {
		if why := need(f); why != "" {
			return skipped("%s", why)
		}
	}
	return c.judge(f)
}

// checks are in the order of a search: which node this is, whether the daemon runs, what it knows, what is on the path
// of a packet.
func checks() []check {
	out := []check{
		to("daemon", judgeDaemon),
		to("problems", judgeProblems),
		to("drift", judgeDrift),
		to("settings", judgeSettings),
		to("identity", judgeIdentity),
		to("state directory", judgeStateDir),
		to("subnet file", judgeSubnetFile),
		to("CNI configuration", judgeCNI),
		to("store", judgeStore),
		to("certificates", judgeCertificates),
		to("credentials", judgeCredentials),
		to("clock", judgeClock),
		to("network config", judgeConfig, needsStore),
		to("leases", judgeLeases, needsStore),
		to("own lease", judgeOwnLease, needsStore),
		to("privileges", judgePrivileges),
		to("kernel", judgeSupport),
		to("forwarding", judgeForwarding),
		to("bridge netfilter", judgeBridgeFilter, needs(readNFTables)),
		to("IPv6", judgeIPv6),
		to("pings", judgeEcho),
		to("interface", judgeInterface, needs(readDevices)),
		to("rp_filter", judgeRPFilter),
		to("routes", judgeRoutes, needs(readDevices)),
		to("policy routing", judgePolicyRouting, needsRouting),
		to("tunnel device", judgeTunnel, needs(readDevices)),
		to("tunnel port", judgePort, needs(readDevices)),
		to("MTU", judgeMTU, needs(readDevices)),
		to("bridge", judgeBridge, needs(readDevices), needsOwnSubnet),
		to("offloads", judgeOffloads),
		to("learning", judgeLearning),
		to("other overlays", judgeLeftovers, needs(readDevices)),
		to("iptables variants", judgeVariants, needs(readNFTables), needs(readLegacy)),
		to("iptables-legacy", judgeLegacy, needs(readLegacy)),
		to("tunnel in the firewall", judgeTunnelFilter, needs(readNFTables)),
		to("forwarded packets", judgeForwardFilter, needs(readNFTables)),
		to("masqueraded packets", judgeMasquerade, needs(readNFTables)),
	}
	for i, m := range managers() {
		out = append(out, to(m.name, func(f Facts) findings { return f.judgeManager(m, i) }))
	}
	return append(out,
		to("neighbour table", judgeNeighbours),
		to("connection table", judgeConntrack),
		to("peers", judgePeers),
		to("peers answer", judgePings),
		to("full-size packets", judgeBlackHole),
	)
}

// to makes a check. Where one of needs says why not, it is skipped.
func to(name string, judge func(Facts) findings, needs ...func(Facts) string) check {
	return check{name, judge, needs}
}

// needs is what has to be read for a check.
func needs(what string) func(Facts) string {
	return func(f Facts) string {
		if f.Privileges != nil && what != readDevices {
			return "needs privileges to read"
		}
		return text(f.Errs[what])
	}
}

func needsRouting(f Facts) string { return text(f.RoutingErr) }

func needsStore(f Facts) string {
	switch {
	case f.Store == nil:
		return "the store was not queried"
	case f.Store.OptionsErr != nil:
		return "the settings of the store are invalid"
	case f.Store.TableErr != nil:
		return f.storeName() + " does not answer"
	}
	return ""
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
