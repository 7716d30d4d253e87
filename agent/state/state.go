// Package state keeps what a node has to know after a restart: enough to bring its network up again while the store is
// away.
package state

import (
	"bytes"
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

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/internal/atomicfile"
	"github.com/overlayd/overlayd/internal/owner"
	"github.com/overlayd/overlayd/internal/ownfile"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// Dir is where a node keeps what it has to know after a restart, of the network under this prefix: of etcd, or a text
// that is none, for another store.
type Dir struct {
	Path, Prefix string
	Node         subnet.Identity
}

// Kubernetes is the Prefix of the network in the Kubernetes API: none in etcd, which begins with a slash. There, the
// length of a node's subnets is not the config's to say.
const Kubernetes = "kubernetes"

// Persisted is what the files say. Revision and Peers are in peers.json, the rest is in lease.json; each says whose it
// is.
type Persisted struct {
	Node    subnet.Identity // an image of a disk may be another machine's now
	Saved   time.Time
	Prefix  string `json:",omitempty"` // of the network in the store
	Subnets string `json:",omitempty"` // this node's, in the form of a lease's key
	// Expires is when the lease ends unless it was renewed since; until then no other node can have the subnets. Zero:
	// never.
	Expires time.Time       `json:",omitzero"`
	Config  json.RawMessage `json:",omitempty"` // the one in use
	// Addresses are those that the node uses: of several on one device, the one that the peers know.
	Addresses addr.Per[netip.Addr] `json:",omitzero"`
	Bridges   []netstate.PodBridge `json:",omitempty"`
	Settings  subnet.NodeSettings  `json:",omitzero"` // of this node, in the store; valid ones
	// Revision is the store's. One that is at an earlier one later has lost data.
	Revision int64  `json:",omitempty"`
	Peers    []Peer `json:",omitempty"`
}

// maxSize bounds a file, in bytes: a peer takes 300.
const maxSize = 64 << 20

// Peer is a lease of another node.
type Peer struct {
	Key   string
	Value json.RawMessage
	// Of two that claim the same, these decide who has it.
	Created, Revision int64
}

// LeaseFile is what the node knows of itself.
func (d Dir) LeaseFile() string { return filepath.Join(d.Path, "lease.json") }

// PeersFile is what it knows of the others.
func (d Dir) PeersFile() string { return filepath.Join(d.Path, "peers.json") }

// keyFile has the node's private key of WireGuard, in base64 and a line of its own as wg(8) has it.
func (d Dir) keyFile() string { return filepath.Join(d.Path, "wireguard.key") }

// MovedFile is there once the subnet has changed.
func (d Dir) MovedFile() string { return filepath.Join(d.Path, "subnet-changed") }

// Files lists all that a daemon may leave in its state directory.
func Files(dir string) []string {
	d := Dir{Path: dir}
	return []string{d.LeaseFile(), d.PeersFile(), d.MovedFile(), d.keyFile(), owner.File(dir)}
}

// Load returns the persisted state of this node; that of a new node is zero. Of a network under another prefix, or of a
// node of another name with this one's ID (it was given a new name, or the directory came with a copy of the disk),
// only the own subnet counts. Peers that an earlier version had in lease.json move to peers.json, before lease.json is
// written without them.
func (d Dir) Load() (Persisted, error) { return d.load(read) }

// LoadOwn is Load without the peers in peers.json. To decode thousands of them is an eighth of the CPU of a restart, and
// a start that reaches the store does not need them.
func (d Dir) LoadOwn() (Persisted, error) { return d.load(readHead) }

func (d Dir) load(readPeers func(file string) (*Persisted, error)) (Persisted, error) {
	p, err := d.read(readPeers)
	if p == nil {
		return Persisted{}, err
	}
	if _, err := subnet.ParseKey(p.Subnets); err != nil {
		return Persisted{}, fmt.Errorf("%s: %w", d.LeaseFile(), err)
	}
	if p.Node.NodeID != d.Node.NodeID || p.Node.NodeID == "" && p.Node != d.Node {
		return Persisted{}, fmt.Errorf("%s is the persisted state of node %q (id %q), not of this one: ignored",
			d.LeaseFile(), p.Node.NodeName, p.Node.NodeID)
	}
	if p.Node != d.Node || p.Prefix != d.Prefix {
		p.Config, p.Peers, p.Revision, p.Expires, p.Settings = nil, nil, 0, p.Saved, subnet.NodeSettings{}
	}
	if _, missing := os.Stat(d.PeersFile()); missing != nil && len(p.Peers) > 0 {
		err = errors.Join(err, d.Save(d.PeersFile(), Persisted{Revision: p.Revision, Peers: p.Peers}))
	}
	return *p, err
}

// Read returns what the files say, of whatever node; nil: there are none. Peers that can't be read are an error, and
// the rest is returned.
func (d Dir) Read() (*Persisted, error) { return d.read(read) }

func (d Dir) read(readPeers func(file string) (*Persisted, error)) (*Persisted, error) {
	p, err := read(d.LeaseFile())
	if p == nil {
		return nil, err
	}
	peers, err := readPeers(d.PeersFile())
	// An earlier version has them in lease.json.
	if peers != nil && peers.Node == p.Node && peers.Prefix == p.Prefix {
		p.Peers, p.Revision = peers.Peers, peers.Revision
	}
	return p, err
}

func read(file string) (*Persisted, error) {
	return decode(file, func(raw []byte) []byte { return raw })
}

// readHead reads what a file says before the peers, which Save has written last.
func readHead(file string) (*Persisted, error) {
	return decode(file, func(raw []byte) []byte {
		head, _, found := bytes.Cut(raw, []byte(beforePeers))
		if !found {
			return raw
		}
		return append(slices.Clip(head), '}')
	})
}

func decode(file string, part func(raw []byte) []byte) (*Persisted, error) {
	raw, err := ownfile.Read(file, maxSize)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var p Persisted
	if err := json.Unmarshal(part(raw), &p); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return &p, nil
}

// beforePeers is what Save writes before the first peer. Nothing else in peers.json looks like it: there, a name's
// quotes are escaped.
const beforePeers = `,"Peers":[`

// Save writes one of the files, and of which node it is. Thousands of peers are put into it one by one: as one value,
// they would take several times their size in memory. Their values are JSON, which is not looked through once more.
func (d Dir) Save(file string, p Persisted) error {
	p.Node, p.Prefix, p.Saved = d.Node, d.Prefix, time.Now().UTC().Round(0)
	peers := p.Peers
	p.Peers = nil
	raw, err := json.Marshal(p)
	if err != nil {
		return err
	}
	for i, peer := range peers {
		key, err := json.Marshal(peer.Key)
		if err != nil {
			return err
		}
		if i == 0 {
			const others = len(`{"Key":,"Value":,"Created":123456789,"Revision":123456789},`)
			one := len(key) + len(peer.Value) + others
			raw = slices.Grow(raw, len(peers)*(one+one/8)) // they are about as long
			raw = append(raw[:len(raw)-1], beforePeers...)
		} else {
			raw = append(raw, ',')
		}
		raw = append(append(raw, `{"Key":`...), key...)
		raw = append(append(raw, `,"Value":`...), peer.Value...)
		raw = strconv.AppendInt(append(raw, `,"Created":`...), peer.Created, 10)
		raw = strconv.AppendInt(append(raw, `,"Revision":`...), peer.Revision, 10)
		raw = append(raw, '}')
	}
	if len(peers) > 0 {
		raw = append(raw, "]}"...)
	}
	return d.write(file, append(raw, '\n'))
}

func (d Dir) write(file string, content []byte) error {
	if err := os.MkdirAll(d.Path, 0o755); err != nil {
		return err
	}
	return atomicfile.Write(file, content, 0o644)
}

// WireGuardKey reads the node's private key, and makes one where there is none.
func (d Dir) WireGuardKey() (netstate.PrivateKey, error) {
	raw, err := ownfile.Read(d.keyFile(), 1<<10)
	if errors.Is(err, os.ErrNotExist) {
		return d.NewWireGuardKey()
	}
	if err != nil {
		return netstate.PrivateKey{}, err
	}
	key, err := wgtypes.ParseKey(strings.TrimSpace(string(raw)))
	if err != nil { // whose text may have a part of it
		return netstate.PrivateKey{}, fmt.Errorf("%s is not a private key of WireGuard: delete it, and a new one is made",
			d.keyFile())
	}
	return netstate.PrivateKey(key), nil
}

// NewWireGuardKey makes another private key, in the place of the one that there was.
func (d Dir) NewWireGuardKey() (netstate.PrivateKey, error) {
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return netstate.PrivateKey{}, err
	}
	if err := os.MkdirAll(d.Path, 0o755); err != nil {
		return netstate.PrivateKey{}, err
	}
	return netstate.PrivateKey(key), atomicfile.Write(d.keyFile(), []byte(key.String()+"\n"), 0o600)
}

// Own are this node's subnets.
func (p Persisted) Own() addr.Per[netip.Prefix] {
	sn, _ := subnet.ParseKey(p.Subnets) // Load has parsed it
	return sn
}

// PeersOf are the leases of a table that a start without the store can use.
func PeersOf(t subnet.Table, own addr.Per[netip.Prefix]) []Peer {
	out := make([]Peer, 0, len(t.Entries))
	for _, e := range t.Entries {
		if e.Err == nil && !e.Blank() && e.Subnets != own {
			out = append(out, Peer{e.Key, subnet.FormatValue(e.Attrs), e.Created, e.Revision})
		}
	}
	return out
}

// Table is the table that the store would have. It is parsed as critically as that of the store.
func (p Persisted) Table() (subnet.Table, error) {
	if len(p.Config) == 0 {
		return subnet.Table{}, errors.New("the network config is not persisted")
	}
	c, err := subnet.ParseConfig(p.Config)
	if err != nil {
		return subnet.Table{}, err
	}
	if p.Prefix == Kubernetes {
		c = c.FittedTo(p.Own())
	}
	t := subnet.Table{Config: c, ConfigJSON: string(p.Config)}
	for _, e := range p.Peers {
		const someLease = 1 // not a reservation
		t.Entries = append(t.Entries, subnet.ParseEntry(e.Key, e.Value, e.Revision, e.Created, someLease))
	}
	slices.SortFunc(t.Entries, func(a, b *subnet.Entry) int { return strings.Compare(a.Key, b.Key) })
	return t, nil
}

// NoteMove leaves a note that the subnet changed under running pods. It stays until an operator has recreated them and
// removes it.
func (d Dir) NoteMove(before, now string) error {
	text := fmt.Sprintf("This node's subnet was %s and is %s\n"+
		"Another node holds the old one; pods created before are unreachable.\n"+
		"Recreate them (and the pod bridge), then remove this file.\n", before, now)
	return d.write(d.MovedFile(), []byte(text))
}

// MovedProblem is that note as a problem.
func (d Dir) MovedProblem() error {
	raw, err := ownfile.Read(d.MovedFile(), maxSize)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	first, _, _ := strings.Cut(string(raw), "\n")
	return fmt.Errorf("%s: recreate the pods created before, then remove %s", first, d.MovedFile())
}
