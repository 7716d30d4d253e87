package faults

import (
	"fmt"

	"github.com/overlayd/overlayd/test/lab"
)

// The kinds of labs that faults are made in.
const (
	OnVXLAN     = "vxlan"
	OnHostGW    = "host-gw"
	OnDual      = "dual"
	OnWireGuard = "wireguard"
	OnDirect    = "direct"   // VXLAN with DirectRouting
	OnLegacy    = "legacy"   // iptables of the legacy variant
	OnNFTables  = "nftables" // the daemon's own table instead of iptables
	OnNFTDual   = "nftables-dual"
	OnThree     = "three-etcd" // three members of etcd
	OnSecure    = "secure"     // etcd with TLS and passwords
	OnEtcd34    = "etcd-3.4"   // the same with a server of another version
	OnEtcd35    = "etcd-3.5"
	OnEtcd36    = "etcd-3.6"
	OnKube      = "kubernetes"         // the Kubernetes API is the store
	OnFlannel   = "kubernetes-flannel" // the same, beside flannel; four nodes, dual stack
)

// everywhere is where the kernel state differs.
func everywhere() []string { return append(withGateways(), OnWireGuard) }

// withGateways is where routes to peers have a gateway.
func withGateways() []string { return []string{OnVXLAN, OnHostGW, OnDual, OnDirect} }

// tunnelled is where there is a device.
func tunnelled() []string { return []string{OnVXLAN, OnDual} }

// Setup is a kind of lab.
type Setup struct {
	Name string
	Lab  lab.Options
}

// resync is --iptables-resync where the kernel does not notify, in seconds. Elsewhere it is left as long as it is, so
// that what is repaired in time is repaired because of an event.
const resync = 2

// nftables reports whether the daemon has a table of its own in a setup.
func nftables(setup string) bool { return setup == OnNFTables || setup == OnNFTDual }

func setups(overlayd string) []Setup {
	out := []Setup{
		{OnVXLAN, lab.Options{}},
		{OnHostGW, lab.Options{Backend: lab.HostGW}},
		{OnDual, lab.Options{Stack: lab.StackDual}},
		{OnWireGuard, lab.Options{Backend: lab.WireGuard, Stack: lab.StackDual}},
		{OnDirect, lab.Options{Direct: true}},
		{OnLegacy, lab.Options{OverlaydArgs: []string{
			"--iptables-variant", "legacy", "--iptables-resync",
			fmt.Sprintf("%ds", resync),
		}}},
		{OnNFTables, lab.Options{OverlaydArgs: []string{"--firewall", "nftables"}}},
		{OnNFTDual, lab.Options{Stack: lab.StackDual, OverlaydArgs: []string{"--firewall", "nftables"}}},
		{OnThree, lab.Options{EtcdMembers: 3}},
		{OnSecure, lab.Options{Secure: true}},
		{OnEtcd34, lab.Options{Secure: true, EtcdVersion: "3.4"}},
		{OnEtcd35, lab.Options{Secure: true, EtcdVersion: "3.5"}},
		{OnEtcd36, lab.Options{Secure: true, EtcdVersion: "3.6"}},
		{OnKube, lab.Options{Kubernetes: true}},
		{OnFlannel, lab.Options{
			Kubernetes: true, Nodes: 4, Stack: lab.StackDual,
			OverlaydArgs: []string{"--kube-annotation-prefix", flannelPrefix},
		}},
	}
	for i := range out {
		o := &out[i].Lab
		o.Nodes, o.Pods, o.Overlayd = max(3, o.Nodes), 1, overlayd
		if !nftables(out[i].Name) {
			o.OverlaydArgs = append(o.OverlaydArgs, "--firewall", "iptables")
		}
	}
	return out
}
