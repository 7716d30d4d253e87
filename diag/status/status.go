// Package status holds what a node reports, as values: the document that /status serves, that `overlayd status` prints,
// and that tools read. It depends on no other part of a node.
package status

import "time"

// Node is one node at one moment.
type Node struct {
	Name    string    `json:"name"`
	ID      string    `json:"id"`
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	Now     time.Time `json:"now"`

	// CNI plugins read the subnet from SubnetFile; it is persisted in StateDir.
	SubnetFile string `json:"subnetFile"`
	StateDir   string `json:"stateDir"`

	Ready    bool      `json:"ready"`
	Problems []Problem `json:"problems"` // the longest-standing first
	Restart  []string  `json:"restart"`  // changes that take effect only after a restart of the daemon

	Lease     Lease       `json:"lease"`
	Store     Store       `json:"store"`
	Network   Network     `json:"network"`
	Interface Interface   `json:"interface"`
	Devices   []Device    `json:"devices"`
	Peers     PeerCounts  `json:"peers"`
	Firewall  Firewall    `json:"firewall"`
	Reconcile Reconcile   `json:"reconcile"`
	Entries   []KindCount `json:"entries"` // desired kernel objects, by kind
	Probe     Probe       `json:"probe"`
	Changes   Changes     `json:"changes"`
	Drift     []DriftKind `json:"drift"` // reverted since the start, by kind
}

// Problem is a failed condition.
type Problem struct {
	Name   string    `json:"name"`
	Code   Code      `json:"code,omitempty"` // "": the name is enough for a program
	Reason string    `json:"reason"`
	Since  time.Time `json:"since"`
	Fatal  bool      `json:"fatal"` // the node is not ready because of it
}

// Code identifies one of several causes of a problem. Reasons are for people; no program parses them.
type Code string

// The codes.
const (
	Starting Code = "starting" // a consequence of another problem
	Conflict Code = "conflict" // another node holds what belongs to this one
)

// Lease is this node's lease; Subnets is empty if it has none.
type Lease struct {
	Subnets  []string  `json:"subnets"`
	Expires  time.Time `json:"expires,omitzero"` // zero: never, or unknown
	Reserved bool      `json:"reserved"`
	Held     bool      `json:"held"` // confirmed by the store; false: persisted only
	// Losses counts how often since the start it disappeared from the store and was acquired again.
	Losses int       `json:"losses"`
	LostAt time.Time `json:"lostAt,omitzero"` // the last time
}

// StoreKind identifies a store, as --store does.
type StoreKind string

// The stores.
const (
	Etcd       StoreKind = "etcd"
	Kubernetes StoreKind = "kubernetes"
)

// Store is the connection to the store and the table read from it.
type Store struct {
	Kind      StoreKind `json:"kind"`
	Name      string    `json:"name"` // in a sentence: "etcd", "the Kubernetes API"
	Endpoints []string  `json:"endpoints"`
	Prefix    string    `json:"prefix,omitempty"`    // of the keys in etcd
	ConfigMap string    `json:"configMap,omitempty"` // of Kubernetes, with the network config: NAMESPACE/NAME
	Revision  int64     `json:"revision"`            // of the table in use; 0: none was read
	Newest    int64     `json:"newest"`              // the newest revision that the store has reported, for any key
	Entries   int       `json:"entries"`             // in that table, including this node's
	Error     string    `json:"error,omitempty"`
	Since     time.Time `json:"since,omitzero"` // of the error
	// Losses counts how often since the start the store lost data or was restored from a backup.
	Losses int       `json:"losses"`
	LostAt time.Time `json:"lostAt,omitzero"` // the last time
	// Requests counts requests since the start by method (of etcd: of gRPC); a stream counts once.
	Requests map[string]int64 `json:"requests"`
}

// Network is the cluster's network.
type Network struct {
	Networks []string `json:"networks"`
	Backend  string   `json:"backend"`
	MTU      int      `json:"mtu"` // of pods
	Pools    []Pool   `json:"pools"`
}

// Pool counts a network's subnets.
type Pool struct {
	Network string `json:"network"`
	Subnets int    `json:"subnets"` // that nodes can lease
	Leased  int    `json:"leased"`  // including those of rejected leases
}

// Interface is the external interface.
type Interface struct {
	Reason        string   `json:"reason"`    // why this one was chosen
	ByDefault     bool     `json:"byDefault"` // chosen by the default route, in some family
	PublicIPs     []string `json:"publicIPs"`
	PublicIPLocal bool     `json:"publicIPLocal"`
}

// Device is a desired tunnel device.
type Device struct {
	// Offloads are the device's features that affect tunnels, by ethtool name, and whether they are on.
	Offloads map[string]bool `json:"offloads,omitempty"`

	Name      string `json:"name"`
	MAC       string `json:"mac"`
	PublicKey string `json:"publicKey,omitempty"` // of WireGuard, which has no MAC and no VNI
	MTU       int    `json:"mtu"`
	VNI       uint32 `json:"vni"`
	Port      uint16 `json:"port"`
	Local     string `json:"local"`
	Underlay  string `json:"underlay"` // the device it is bound to; "": none
}

// PeerCounts counts the other nodes.
type PeerCounts struct {
	Total       int `json:"total"`
	Tunnel      int `json:"tunnel"`
	Direct      int `json:"direct"`
	Unreachable int `json:"unreachable"`
	Rejected    int `json:"rejected"`  // leases
	Lingering   int `json:"lingering"` // their leases are gone; they are kept briefly
	// RejectedBy counts the rejected leases by cause, see Peer.Cause.
	RejectedBy map[string]int `json:"rejectedBy,omitempty"`
}

// Firewall is the driver of the firewall rules, and its runs.
type Firewall struct {
	Kind    string    `json:"kind"`
	Reason  string    `json:"reason"` // why this kind was chosen
	Checked time.Time `json:"checked,omitzero"`
	Runs    int       `json:"runs"`
	Failed  int       `json:"failed"` // of the runs
}

// Reconcile describes the reconciliations of the main loop.
type Reconcile struct {
	Last     time.Time     `json:"last,omitzero"`
	Took     time.Duration `json:"took"` // nanoseconds
	Rounds   int           `json:"rounds"`
	Resynced time.Time     `json:"lastResync,omitzero"` // the last full resync
	Failures int           `json:"failures"`            // objects that the kernel rejected in the last round
}

// KindCount counts objects of one kind.
type KindCount struct {
	Kind  string `json:"kind"`
	Count int    `json:"count"`
}

// Changes counts changes of the node since the start.
type Changes struct {
	Interface int `json:"interface"` // of the external interface or its address
	MTU       int `json:"mtu"`       // of the pod MTU
}

// Probe is the result of pinging the peers on the path that pods' packets take.
type Probe struct {
	On      bool          `json:"on"`
	Error   string        `json:"error,omitempty"` // why no peer can be pinged
	Targets int           `json:"targets"`
	Size    int           `json:"size"`  // bytes of a full-size packet with its IP header: the pod MTU
	Round   time.Duration `json:"round"` // time in which every peer is pinged once
	// Targets by their Verdict.
	Answer     int `json:"answer"`
	Lossy      int `json:"lossy"`
	SmallOnly  int `json:"smallOnly"`
	Silent     int `json:"silent"`
	NotPinged  int `json:"notPinged"`
	Sent       int `json:"sent"`       // packets since the start
	Lost       int `json:"lost"`       // of Sent
	NotAllowed int `json:"notAllowed"` // not sent: this node's firewall dropped them
	// MedianRTT is the median of the targets that answer.
	MedianRTT time.Duration `json:"medianRTT"`
	// Worst holds at most WorstPeers, the worst first; if there are more peers, only those that do not answer properly.
	Worst []Peer `json:"worst"`
}

// WorstPeers bounds Probe.Worst.
const WorstPeers = 20

// Verdict is the result of pinging a peer, in one word.
type Verdict string

// The verdicts.
const (
	NotPinged Verdict = ""           // not yet
	Answers   Verdict = "answers"    // the last packets of both sizes were answered
	Lossy     Verdict = "lossy"      // some of the last packets were lost
	SmallOnly Verdict = "small-only" // full-size packets are lost: the underlay's MTU is smaller than assumed
	Silent    Verdict = "silent"     // the last packets of both sizes were lost
)

// Pings is the result of the last pings of one size, at most eight.
type Pings struct {
	Sent int           `json:"sent"`
	Lost int           `json:"lost"`
	RTT  time.Duration `json:"rtt"` // of the last answer; 0: none
}

// PeerProbe is the result of pinging one peer.
type PeerProbe struct {
	Address string    `json:"address"`
	Verdict Verdict   `json:"verdict"`
	Small   Pings     `json:"small"`
	Full    Pings     `json:"full"`
	Last    time.Time `json:"lastAnswer,omitzero"` // answer
}

// DriftKind counts reverted external changes of one kind of object.
type DriftKind struct {
	Kind  string    `json:"kind"`
	Count int       `json:"count"`
	Last  string    `json:"last"` // an example
	At    time.Time `json:"at"`   // the last time
}

// Peer is another node, in one family.
type Peer struct {
	Name      string `json:"name"`
	ID        string `json:"id,omitempty"`
	Subnet    string `json:"subnet"`
	PublicIP  string `json:"publicIP"`
	Path      string `json:"path"` // tunnel, direct, unreachable, rejected
	Reason    string `json:"reason,omitempty"`
	Cause     string `json:"cause,omitempty"`     // of a rejection, in one word
	MAC       string `json:"mac,omitempty"`       // of its VXLAN device
	PublicKey string `json:"publicKey,omitempty"` // of WireGuard
	Leaving   bool   `json:"leaving,omitempty"`
	// Probe is nil if the peer is not pinged.
	Probe *PeerProbe `json:"probe,omitempty"`
	// Entries are the kernel objects for this peer.
	Entries []string `json:"entries,omitempty"`
}
