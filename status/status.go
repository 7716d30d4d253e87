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

	Ready    bool      `json:"ready"`
	Problems []Problem `json:"problems"` // the longest-standing first

	Lease     Lease       `json:"lease"`
	Store     Store       `json:"etcd"`
	Network   Network     `json:"network"`
	Interface Interface   `json:"interface"`
	Devices   []Device    `json:"devices"`
	Peers     PeerCounts  `json:"peers"`
	Firewall  Firewall    `json:"firewall"`
	Reconcile Reconcile   `json:"reconcile"`
	Drift     []DriftKind `json:"drift"` // repaired since the start, by kind
}

// Problem is something that is not as it should be.
type Problem struct {
	Name   string    `json:"name"`
	Reason string    `json:"reason"`
	Since  time.Time `json:"since"`
	Fatal  bool      `json:"fatal"` // the node is not ready because of it
}

// Lease is this node's hold on its subnets; Subnets is empty where it has none.
type Lease struct {
	Subnets  []string  `json:"subnets"`
	Expires  time.Time `json:"expires,omitzero"` // zero: never, or not known
	Reserved bool      `json:"reserved"`
	Held     bool      `json:"held"` // etcd says so; otherwise it is remembered
}

// Store is the way to etcd.
type Store struct {
	Endpoints []string  `json:"endpoints"`
	Prefix    string    `json:"prefix"`
	Revision  int64     `json:"revision"` // of the table that the node works with; 0: none was read
	Entries   int       `json:"entries"`  // in that table, this node's among them
	Error     string    `json:"error,omitempty"`
	Since     time.Time `json:"since,omitzero"` // of the error
}

// Network is the cluster's.
type Network struct {
	Networks []string `json:"networks"`
	Backend  string   `json:"backend"`
	MTU      int      `json:"mtu"` // of pods
}

// Interface is the device that leads to the other nodes, and why it is that one.
type Interface struct {
	Reason        string   `json:"reason"`
	PublicIPs     []string `json:"publicIPs"`
	PublicIPLocal bool     `json:"publicIPLocal"`
}

// Device is a tunnel device as it is wished for.
type Device struct {
	Name     string `json:"name"`
	MAC      string `json:"mac"`
	MTU      int    `json:"mtu"`
	VNI      uint32 `json:"vni"`
	Port     uint16 `json:"port"`
	Local    string `json:"local"`
	Underlay string `json:"underlay"`
}

// PeerCounts counts the other nodes.
type PeerCounts struct {
	Total       int `json:"total"`
	Tunnel      int `json:"tunnel"`
	Direct      int `json:"direct"`
	Unreachable int `json:"unreachable"`
	Refused     int `json:"refused"`   // leases that are not believed
	Lingering   int `json:"lingering"` // their leases are gone; they are kept for a moment
}

// Firewall is what holds the rules.
type Firewall struct {
	Kind    string    `json:"kind"`
	Reason  string    `json:"reason"` // why that kind
	Checked time.Time `json:"checked,omitzero"`
	Runs    int       `json:"runs"`
}

// Reconcile is the loop's work.
type Reconcile struct {
	Last     time.Time     `json:"last,omitzero"`
	Took     time.Duration `json:"took"` // nanoseconds
	Rounds   int           `json:"rounds"`
	Looked   time.Time     `json:"looked,omitzero"` // when the whole kernel was last looked at
	Failures int           `json:"failures"`        // objects that the kernel refused in the last round
}

// DriftKind counts what somebody else changed and was put right.
type DriftKind struct {
	Kind  string `json:"kind"`
	Count int    `json:"count"`
	Last  string `json:"last"` // an example
}

// Peer is another node, in one family.
type Peer struct {
	Name     string `json:"name"`
	ID       string `json:"id,omitempty"`
	Subnet   string `json:"subnet"`
	PublicIP string `json:"publicIP"`
	Way      string `json:"way"` // tunnel, direct, unreachable, refused
	Reason   string `json:"reason,omitempty"`
	MAC      string `json:"mac,omitempty"` // of its tunnel device
	Leaving  bool   `json:"leaving,omitempty"`
	// Entries are the kernel entries that are for it.
	Entries []string `json:"entries,omitempty"`
}
