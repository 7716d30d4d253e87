package agent

import (
	"net/netip"
	"time"

	"github.com/overlayd/overlayd/agent/state"
	"github.com/overlayd/overlayd/subnet"
)

// Options are what an operator decides about a node.
type Options struct {
	Identity   subnet.Identity
	Interface  InterfaceOptions
	SubnetFile string
	CNIConf    string // overlayd's CNI configuration, in the container runtime's directory; empty: there is none
	StateDir   string
	Owner      string // the installation that this daemon belongs to; empty: it is not told from others
	Prefix     string // of the network in the store: persisted state of another one is not used

	IPMasq       bool
	MasqExclude  []netip.Prefix // destinations that see the pods' own addresses
	ForwardRules bool
	IPForward    bool
	// BridgeNetfilter has the kernel show to iptables what crosses a bridge: kube-proxy needs it where a service's pod and
	// its client are on one node.
	BridgeNetfilter bool
	IPTablesResync  time.Duration
	MeshProbe       bool // ping the other nodes

	// StalePeerGrace is how long peers are kept whose leases vanished because the store lost its data.
	StalePeerGrace time.Duration
}

func (o Options) dir() state.Dir {
	return state.Dir{Path: o.StateDir, Prefix: o.Prefix, Node: o.Identity}
}
