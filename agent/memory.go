package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// stateDir is where a node keeps what it has to know after a restart, of the network under this prefix of the store.
type stateDir struct {
	path, prefix string
	node         subnet.Identity
}

// memory is enough to bring the node's network up again while etcd is away. Revision and Peers are in peers.json, the rest is in
// lease.json; each says whose it is.
type memory struct {
	Node    subnet.Identity // an image of a disk may be another machine's now
	Saved   time.Time
	Prefix  string `json:",omitempty"` // of the store: which network it is about
	Subnets string `json:",omitempty"` // this node's, in the form of a lease's key
	// Expires is when the lease ends unless it was renewed since; until then nobody else can have the subnets. Zero: never.
	Expires time.Time       `json:",omitzero"`
	Config  json.RawMessage `json:",omitempty"` // the one in use
	// Addresses are those that the node goes by: of several on one device it has to be the one that the others know.
	Addresses addr.Per[netip.Addr] `json:",omitzero"`
	Bridges   []netstate.PodBridge `json:",omitempty"`
	// Revision is the store's. One that is at an earlier one later has lost data.
	Revision int64           `json:",omitempty"`
	Peers    []memorizedPeer `json:",omitempty"`
}

type memorizedPeer struct {
	Key   string
	Value json.RawMessage
	// Of two that claim the same, these decide who has it.
	Created, Revision int64
}

func (d stateDir) leaseFile() string { return filepath.Join(d.path, "lease.json") }
func (d stateDir) peersFile() string { return filepath.Join(d.path, "peers.json") }
func (d stateDir) movedFile() string { return filepath.Join(d.path, "subnet-changed") }

// Files lists all that a daemon may leave in its state directory.
func Files(dir string) []string {
	d := stateDir{path: dir}
	return []string{d.leaseFile(), d.peersFile(), d.movedFile()}
}

// load returns what this node remembers; a new node remembers nothing. Of a network under another prefix, or of a node
// of another name with this one's ID (it was given a new name, or the directory came with a copy of the disk), only the
// own subnet counts.
func (d stateDir) load() (memory, error) {
	m, err := readMemory(d.leaseFile())
	if m == nil {
		return memory{}, err
	}
	if _, err := subnet.ParseKey(m.Subnets); err != nil {
		return memory{}, fmt.Errorf("%s: %w", d.leaseFile(), err)
	}
	if m.Node.NodeID != d.node.NodeID || m.Node.NodeID == "" && m.Node != d.node {
		return memory{}, fmt.Errorf("%s is the memory of node %q (id %q), not of this one: it is left aside", d.leaseFile(), m.Node.NodeName, m.Node.NodeID)
	}
	if m.Node != d.node || m.Prefix != "" && m.Prefix != d.prefix {
		m.Config, m.Peers, m.Revision, m.Expires = nil, nil, 0, m.Saved
	}
	// Before there was peers.json, the peers were in lease.json.
	peers, err := readMemory(d.peersFile())
	if peers != nil && peers.Node == d.node && peers.Prefix == d.prefix {
		m.Peers, m.Revision = peers.Peers, peers.Revision
	}
	return *m, err
}

// readMemory reads one of the files; nil: it is not there.
func readMemory(file string) (*memory, error) {
	raw, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var m memory
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return &m, nil
}

func (d stateDir) save(file string, m memory) error {
	m.Node, m.Prefix, m.Saved = d.node, d.prefix, time.Now().UTC().Round(0)
	raw, err := json.Marshal(m)
	if err == nil {
		_, err = writeIfChanged(file, append(raw, '\n'))
	}
	return err
}

// subnets are this node's own.
func (m memory) subnets() addr.Per[netip.Prefix] {
	sn, _ := subnet.ParseKey(m.Subnets) // load has looked at it
	return sn
}

// peersOf are the leases of a table that a start without the store can use.
func peersOf(t subnet.Table, own addr.Per[netip.Prefix]) []memorizedPeer {
	var out []memorizedPeer
	for _, e := range t.Entries {
		if e.Err == nil && !e.Blank() && e.Subnets != own {
			out = append(out, memorizedPeer{e.Key, subnet.FormatValue(e.Attrs), e.Created, e.Revision})
		}
	}
	return out
}

// table makes of a memory what the store would say. It believes no more of it than of the store.
func (m memory) table() (subnet.Table, error) {
	if len(m.Config) == 0 {
		return subnet.Table{}, errors.New("the network config is not remembered")
	}
	c, err := subnet.ParseConfig(m.Config)
	if err != nil {
		return subnet.Table{}, err
	}
	t := subnet.Table{Config: c, ConfigJSON: string(m.Config)}
	for _, p := range m.Peers {
		const someLease = 1 // not a reservation
		t.Entries = append(t.Entries, subnet.ParseEntry(p.Key, p.Value, p.Revision, p.Created, someLease))
	}
	slices.SortFunc(t.Entries, func(a, b *subnet.Entry) int { return strings.Compare(a.Key, b.Key) })
	return t, nil
}

// noteMove leaves a note that the subnet changed under running pods. It stays until an operator has seen to them and removes it.
func (d stateDir) noteMove(before, now string) error {
	text := fmt.Sprintf("This node's subnet was %s and is %s\n"+
		"Another node holds the old one. Pods made before have addresses that no longer lead here.\n"+
		"Recreate them (and the pod bridge), then remove this file.\n", before, now)
	_, err := writeIfChanged(d.movedFile(), []byte(text))
	return err
}

// movedProblem is that note as a problem.
func (d stateDir) movedProblem() error {
	raw, err := os.ReadFile(d.movedFile())
	if err != nil {
		return nil //nolint:nilerr // no note, no problem
	}
	first, _, _ := strings.Cut(string(raw), "\n")
	return fmt.Errorf("%s: recreate the pods made before, then remove %s", first, d.movedFile())
}
