package faults

import (
	"context"
	"fmt"
	"os/exec"
	"strings"

	"github.com/overlayd/overlayd/lab"
)

// The kinds of labs that faults are made in.
const (
	OnVXLAN    = "vxlan"
	OnHostGW   = "host-gw"
	OnDual     = "dual"
	OnDirect   = "direct"     // VXLAN with DirectRouting
	OnLegacy   = "legacy"     // iptables of the legacy variant
	OnNFTables = "nftables"   // the daemon's own table instead of iptables
	OnThree    = "three-etcd" // three members of etcd
	OnSecure   = "secure"     // etcd with TLS and passwords
	OnEtcd34   = "etcd-3.4"   // the same with a server of another version
	OnEtcd35   = "etcd-3.5"
	OnEtcd36   = "etcd-3.6"
)

// everywhere is where the kernel state differs.
func everywhere() []string { return []string{OnVXLAN, OnHostGW, OnDual, OnDirect} }

// tunnelled is where there is a device.
func tunnelled() []string { return []string{OnVXLAN, OnDual} }

// Setup is a kind of lab.
type Setup struct {
	Name string
	Lab  lab.Options
	// Unavailable says why the daemon at hand can't be run so.
	Unavailable string
}

// resync is --iptables-resync where the kernel does not notify, in seconds. Elsewhere it is left as long as it is, so that what is
// repaired in time is repaired because of an event.
const resync = 2

func setups(ctx context.Context, overlayd string) []Setup {
	base := lab.Options{Nodes: 3, Pods: 1, Backend: lab.VXLAN, Overlayd: overlayd}
	drivers := hasFlag(ctx, overlayd, "--firewall")
	with := func(name string, change func(*lab.Options), args ...string) Setup {
		o := base
		if name != OnNFTables && drivers {
			o.OverlaydArgs = []string{"--firewall", "iptables"}
		}
		o.OverlaydArgs = append(o.OverlaydArgs, args...)
		change(&o)
		return Setup{Name: name, Lab: o}
	}
	nft := with(OnNFTables, func(*lab.Options) {}, "--firewall", "nftables")
	if !drivers {
		nft.Unavailable = "this overlayd has no --firewall: there is no native nftables driver"
	}
	etcd := func(name, version string) Setup {
		return with(name, func(o *lab.Options) { o.Secure, o.EtcdVersion = true, version })
	}
	return []Setup{
		with(OnVXLAN, func(*lab.Options) {}),
		with(OnHostGW, func(o *lab.Options) { o.Backend = lab.HostGW }),
		with(OnDual, func(o *lab.Options) { o.Stack = lab.StackDual }),
		with(OnDirect, func(o *lab.Options) { o.Direct = true }),
		with(OnLegacy, func(*lab.Options) {}, "--iptables-variant", "legacy", "--iptables-resync", fmt.Sprintf("%ds", resync)),
		nft,
		with(OnThree, func(o *lab.Options) { o.EtcdMembers = 3 }),
		with(OnSecure, func(o *lab.Options) { o.Secure = true }),
		etcd(OnEtcd34, "3.4"), etcd(OnEtcd35, "3.5"), etcd(OnEtcd36, "3.6"),
	}
}

func hasFlag(ctx context.Context, overlayd, flag string) bool {
	out, err := exec.CommandContext(ctx, overlayd, "--help").CombinedOutput()
	return err == nil && strings.Contains(string(out), flag+" ")
}
