package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/overlayd/overlayd/subnet"
)

// Options are what an operator decides about a node.
type Options struct {
	Identity   subnet.Identity
	Interface  InterfaceOptions
	SubnetFile string
	StateDir   string

	IPMasq       bool
	MasqExclude  []netip.Prefix // destinations that see the pods' own addresses
	ForwardRules bool
	IPForward    bool
	// BridgeNetfilter has the kernel show to iptables what crosses a bridge: kube-proxy needs it where a service's pod and its client are on
	// one node.
	BridgeNetfilter bool
	IPTablesResync  time.Duration
	MeshProbe       bool // ping the other nodes

	// StalePeerGrace is how long peers are kept whose leases vanished because etcd lost its data.
	StalePeerGrace time.Duration
}

// Validate reports everything that is wrong with the options, by the names of their flags.
func (o Options) Validate() error {
	var errs []error
	for flag, v := range map[string]string{
		"--node-name": o.Identity.NodeName, "--node-id": o.Identity.NodeID, "--subnet-file": o.SubnetFile, "--state-dir": o.StateDir,
	} {
		if v == "" {
			errs = append(errs, fmt.Errorf("%s: expected a value, found nothing", flag))
		}
	}
	if o.IPTablesResync < time.Second {
		errs = append(errs, fmt.Errorf("--iptables-resync: expected at least 1s, found %v", o.IPTablesResync))
	}
	return errors.Join(errs...)
}
