// Package status is what a node says of itself, as values: the document that /status serves, that `overlayd status` prints, and that
// tools read. It knows nothing of how a node works.
package status

import "time"

// Node is one node at one moment.
type Node struct {
	Name    string    `json:"name"`
	ID      string    `json:"id"`
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	Now     time.Time `json:"now"`

	// SubnetFile is what tells CNI plugins of the subnet, StateDir where the node remembers it.
	SubnetFile string `json:"subnetFile"`
	StateDir   string `json:"stateDir"`

	Ready    bool      `json:"ready"`
	Problems []Problem `json:"problems"` // the longest-standing first
	Restart  []string  `json:"restart"`  // what would be otherwise after a restart of the daemon

	Lease     Lease       `json:"lease"`
	Store     Store       `json:"etcd"`
	Network   Network     `json:"network"`
	Interface Interface   `json:"interface"`
	Devices   []Device    `json:"devices"`
	Peers     PeerCounts  `json:"peers"`
	Firewall  Firewall    `json:"firewall"`
	Reconcile Reconcile   `json:"reconcile"`
	Entries   []KindCount `json:"entries"` // that this node is to have in its kernel, by kind
	Probe     Probe       `json:"probe"`
	Changes   Changes     `json:"changes"`
	Drift     []DriftKind `json:"drift"` // repaired since the start, by kind
}

// Problem is something that is not as it should be.
type Problem struct {
	Name   string    `json:"name"`
	Code   Code      `json:"code,omitempty"` // "": the name says all that a program needs to know
	Reason string    `json:"reason"`
	Since  time.Time `json:"since"`
	Fatal  bool      `json:"fatal"` // the node is not ready because of it
}

// Code says in a word which of several causes a problem has. Reasons are for people: no program reads them.
type Code string

// The codes.
const (
	Starting Code = "starting" // not there yet: it follows from another problem
	Conflict Code = "conflict" // another node holds what only this one should
)

// Lease is this node's hold on its subnets; Subnets is empty where it has none.
type Lease struct {
	Subnets  []string  `json:"subnets"`
	Expires  time.Time `json:"expires,omitzero"` // zero: never, or not known
	Reserved bool      `json:"reserved"`
	Held     bool      `json:"held"` // etcd says so; otherwise it is remembered
	// Losses counts how often since the start it was gone from etcd, and had to be taken again.
	Losses int       `json:"losses"`
	LostAt time.Time `json:"lostAt,omitzero"` // the last time
}

// Store is the way to etcd.
type Store struct {
	Endpoints []string  `json:"endpoints"`
	Prefix    string    `json:"prefix"`
	Revision  int64     `json:"revision"` // of the table that the node works with; 0: none was read
	Newest    int64     `json:"newest"`   // the newest revision that etcd has told of, be it for a key of somebody else
	Entries   int       `json:"entries"`  // in that table, this node's among them
	Error     string    `json:"error,omitempty"`
	Since     time.Time `json:"since,omitzero"` // of the error
	// Losses counts how often since the start it was found to have lost data, or to have been restored from a backup.
	Losses int       `json:"losses"`
	LostAt time.Time `json:"lostAt,omitzero"` // the last time
	// Requests counts those since the start, by the name of the gRPC method; a stream counts once.
	Requests map[string]int64 `json:"requests"`
}

// Network is the cluster's.
type Network struct {
	Networks []string `json:"networks"`
	Backend  string   `json:"backend"`
	MTU      int      `json:"mtu"` // of pods
	Pools    []Pool   `json:"pools"`
}

// Pool is how much of a network's subnets is taken.
type Pool struct {
	Network string `json:"network"`
	Subnets int    `json:"subnets"` // that can be leased
	Leased  int    `json:"leased"`  // those of nodes that are refused among them
}

// Interface is the device that leads to the other nodes, and why it is that one.
type Interface struct {
	Reason        string   `json:"reason"`
	ByDefault     bool     `json:"byDefault"` // in some family it is the one with the default route, as nothing says which to take
	PublicIPs     []string `json:"publicIPs"`
	PublicIPLocal bool     `json:"publicIPLocal"`
}

// Device is a tunnel device as it is wished for.
type Device struct {
	// Offloads are the device's features that matter to tunnels, as ethtool names them, and whether they are on.
	Offloads map[string]bool `json:"offloads,omitempty"`

	Name     string `json:"name"`
	MAC      string `json:"mac"`
	MTU      int    `json:"mtu"`
	VNI      uint32 `json:"vni"`
	Port     uint16 `json:"port"`
	Local    string `json:"local"`
	Underlay string `json:"underlay"` // the device that it is bound to; "": none
}

// Over says which device it is bound to.
func (d Device) Over() string {
	if d.Underlay == "" {
		return "any device"
	}
	return d.Underlay
}

// PeerCounts counts the other nodes.
type PeerCounts struct {
	Total       int `json:"total"`
	Tunnel      int `json:"tunnel"`
	Direct      int `json:"direct"`
	Unreachable int `json:"unreachable"`
	Refused     int `json:"rejected"`  // leases
	Lingering   int `json:"lingering"` // their leases are gone; they are kept for a moment
	// RefusedBy counts the refused ones by why: see Peer.Cause.
	RefusedBy map[string]int `json:"rejectedBy,omitempty"`
}

// Firewall is what holds the rules.
type Firewall struct {
	Kind    string    `json:"kind"`
	Reason  string    `json:"reason"` // why that kind
	Checked time.Time `json:"checked,omitzero"`
	Runs    int       `json:"runs"`
	Failed  int       `json:"failed"` // of the runs
}

// Reconcile is the loop's work.
type Reconcile struct {
	Last     time.Time     `json:"last,omitzero"`
	Took     time.Duration `json:"took"` // nanoseconds
	Rounds   int           `json:"rounds"`
	Looked   time.Time     `json:"lastResync,omitzero"` // when the whole kernel was last looked at
	Failures int           `json:"failures"`            // objects that the kernel refused in the last round
}

// KindCount counts objects of one kind.
type KindCount struct {
	Kind  string `json:"kind"`
	Count int    `json:"count"`
}

// Changes counts what happened to the node since the start.
type Changes struct {
	Interface int `json:"interface"` // another device or address leads to the other nodes
	MTU       int `json:"mtu"`       // the pod MTU is another one
}

// Probe is what came of pinging the other nodes, the way that pods' packets go.
type Probe struct {
	On      bool          `json:"on"`
	Error   string        `json:"error,omitempty"` // why nobody can be pinged
	Targets int           `json:"targets"`
	Size    int           `json:"size"`  // bytes of a full-size packet, with its IP header: the pod MTU
	Round   time.Duration `json:"round"` // how long it takes until every peer has been pinged once
	// Targets by their Verdict.
	Answer     int `json:"answer"`
	Lossy      int `json:"lossy"`
	SmallOnly  int `json:"smallOnly"`
	Silent     int `json:"silent"`
	NotPinged  int `json:"notPinged"`
	Sent       int `json:"sent"`       // packets since the start
	Lost       int `json:"lost"`       // of those
	NotAllowed int `json:"notAllowed"` // that the kernel refused to send
	// MedianRTT is that of the targets that answer.
	MedianRTT time.Duration `json:"medianRTT"`
	Worst     []Peer        `json:"worst"` // at most WorstPeers, the worst first; of more peers only those that don't answer as they should
}

// WorstPeers bounds Probe.Worst.
const WorstPeers = 20

// Verdict says in a word what came of pinging a peer.
type Verdict string

// The verdicts.
const (
	NotPinged Verdict = ""           // not yet
	Answers   Verdict = "answers"    // the last packets of both sizes
	Lossy     Verdict = "lossy"      // some of the last packets were lost
	SmallOnly Verdict = "small-only" // full-size packets are lost, small ones arrive: the underlay's MTU is smaller than this node thinks
	Silent    Verdict = "silent"     // the last packets of both sizes were lost
)

// Pings is what came of the last pings of one size, at most eight.
type Pings struct {
	Sent int           `json:"sent"`
	Lost int           `json:"lost"`
	RTT  time.Duration `json:"rtt"` // of the last that was answered; 0: none was
}

// PeerProbe is what came of pinging one peer.
type PeerProbe struct {
	Address string    `json:"address"`
	Verdict Verdict   `json:"verdict"`
	Small   Pings     `json:"small"`
	Full    Pings     `json:"full"`
	Heard   time.Time `json:"heard,omitzero"` // when it answered last
}

// DriftKind counts what somebody else changed and was put right.
type DriftKind struct {
	Kind  string    `json:"kind"`
	Count int       `json:"count"`
	Last  string    `json:"last"` // an example
	At    time.Time `json:"at"`   // of the last one
}

// Peer is another node, in one family.
type Peer struct {
	Name     string `json:"name"`
	ID       string `json:"id,omitempty"`
	Subnet   string `json:"subnet"`
	PublicIP string `json:"publicIP"`
	Way      string `json:"path"` // tunnel, direct, unreachable, rejected
	Reason   string `json:"reason,omitempty"`
	Cause    string `json:"cause,omitempty"` // of a refusal, in a word
	MAC      string `json:"mac,omitempty"`   // of its tunnel device
	Leaving  bool   `json:"leaving,omitempty"`
	// Probe is nil where the peer is not pinged.
	Probe *PeerProbe `json:"probe,omitempty"`
	// Entries are the kernel entries that are for it.
	Entries []string `json:"entries,omitempty"`
}
