package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// stateDir is where a node keeps what it has to know after a restart, of the network under this prefix of the store.
type stateDir struct {
	path, prefix string
}

// memory is the content of the state directory's lease.json: enough to bring the node's network up again while etcd is away.
type memory struct {
	Node    subnet.Identity // whose memory it is: an image of a disk may be another machine's now
	Saved   time.Time
	Prefix  string `json:",omitempty"` // of the store: which network it is about
	Subnets string // this node's, in the form of a lease's key
	// Expires is when the lease ends unless it was renewed since; until then nobody else can have the subnets. Zero: never.
	Expires time.Time
	// Revision is the store's. One that is at an earlier one later has lost data.
	Revision int64           `json:",omitempty"`
	Config   json.RawMessage `json:",omitempty"` // the one in use
	// Addresses are those that the node goes by: of several on one device it has to be the one that the others know.
	Addresses addr.Per[netip.Addr] `json:",omitzero"`
	Bridges   []netstate.PodBridge `json:",omitempty"`
	Peers     []memorizedPeer      `json:",omitempty"`
}

type memorizedPeer struct {
	Key   string
	Value json.RawMessage
	// Of two that claim the same, these decide who has it.
	Created, Revision int64
}

func (d stateDir) leaseFile() string { return filepath.Join(d.path, "lease.json") }
func (d stateDir) movedFile() string { return filepath.Join(d.path, "subnet-changed") }

// Files lists all that a daemon may leave in its state directory.
func Files(dir string) []string {
	d := stateDir{path: dir}
	return []string{d.leaseFile(), d.movedFile()}
}

// load returns what this node remembers; a new node remembers nothing. Of a network under another prefix, or of a node
// of another name with this one's ID (it was given a new name, or the directory came with a copy of the disk), only the
// own subnet counts.
func (d stateDir) load(id subnet.Identity) (memory, error) {
	raw, err := os.ReadFile(d.leaseFile())
	if errors.Is(err, os.ErrNotExist) {
		return memory{}, nil
	}
	var m memory
	if err == nil {
		err = json.Unmarshal(raw, &m)
	}
	if err == nil {
		_, err = subnet.ParseKey(m.Subnets)
	}
	if err != nil {
		return memory{}, fmt.Errorf("%s: %w", d.leaseFile(), err)
	}
	if m.Node.NodeID != id.NodeID || id.NodeID == "" && m.Node != id {
		return memory{}, fmt.Errorf("%s is the memory of node %q (id %q), not of this one: it is left aside", d.leaseFile(), m.Node.NodeName, m.Node.NodeID)
	}
	if m.Node != id || m.Prefix != "" && m.Prefix != d.prefix {
		m.Config, m.Peers, m.Revision, m.Expires = nil, nil, 0, m.Saved
	}
	return m, nil
}

func (d stateDir) save(m memory) error {
	m.Prefix = d.prefix
	raw, err := m.encode()
	if err != nil {
		return err
	}
	_, err = writeIfChanged(d.leaseFile(), raw)
	return err
}

// encode writes the peers by hand: thousands of values that are JSON already would be looked through once more, which is most of the
// work. Their keys are those of leases that make sense: there is nothing to escape.
func (m memory) encode() ([]byte, error) {
	peers, size := m.Peers, 0
	m.Peers = nil
	head, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	const around = len(`{"Key":"","Value":,"Created":9223372036854775807,"Revision":9223372036854775807},`)
	for _, p := range peers {
		size += len(p.Key) + len(p.Value) + around
	}
	out := make([]byte, 0, len(head)+size+len(`,"Peers":[]`)+1)
	out = append(out, head[:len(head)-1]...)
	for i, p := range peers {
		before := `,{"Key":"`
		if i == 0 {
			before = `,"Peers":[{"Key":"`
		}
		out = append(append(out, before...), p.Key...)
		out = append(append(out, `","Value":`...), p.Value...)
		out = strconv.AppendInt(append(out, `,"Created":`...), p.Created, 10)
		out = append(strconv.AppendInt(append(out, `,"Revision":`...), p.Revision, 10), '}')
	}
	if len(peers) > 0 {
		out = append(out, ']')
	}
	return append(out, "}\n"...), nil
}

// subnets are this node's own.
func (m memory) subnets() addr.Per[netip.Prefix] {
	sn, _ := subnet.ParseKey(m.Subnets) // load has looked at it
	return sn
}

// remember puts the essence of a table into a memory.
func remember(t subnet.Table, id subnet.Identity, self selfMemory, expires time.Time) memory {
	m := memory{
		Node: id, Saved: time.Now().UTC().Round(0), Subnets: subnet.FormatKey(self.subnets),
		Expires: expires.UTC(), Revision: t.Revision,
		Config: json.RawMessage(self.config), Addresses: self.addrs,
	}
	for _, e := range t.Entries {
		if e.Err == nil && !e.Blank() && e.Subnets != self.subnets {
			m.Peers = append(m.Peers, memorizedPeer{e.Key, subnet.FormatValue(e.Attrs), e.Created, e.Revision})
		}
	}
	return m
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
