package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
)

func TestStateDir(t *testing.T) {
	t.Parallel()
	const config = `{"Network":"10.244.0.0/16"}`
	peer := func(i int) *subnet.Entry {
		value := fmt.Sprintf(`{"PublicIP":"192.0.2.%d","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:%02x"},"NodeName":"n%d"}`, 100+i, i, i)
		return subnet.ParseEntry(fmt.Sprintf("10.244.%d.0-24", 100+i), []byte(value), int64(i), int64(i), 1)
	}
	self := subnet.Identity{NodeName: "self", NodeID: "id-self"}
	d := Dir{filepath.Join(t.TempDir(), "state"), "/a/network", self}
	if got, err := d.Load(); !reflect.DeepEqual(got, Persisted{}) || err != nil {
		t.Fatalf("a new node remembers %+v, %v", got, err)
	}
	sn := addr.Per[netip.Prefix]{V4: netip.MustParsePrefix("10.244.5.0/24")}
	bad := subnet.ParseEntry("10.244.9.0-24", []byte("{"), 1, 1, 1)
	lease := Persisted{
		Subnets: subnet.FormatKey(sn), Expires: time.Now().UTC().Round(0), Config: json.RawMessage(config),
		Addresses: addr.Per[netip.Addr]{V4: netip.MustParseAddr("192.0.2.10")},
	}
	peers := Persisted{Revision: 7, Peers: PeersOf(subnet.Table{Entries: []*subnet.Entry{peer(1), bad, peer(2)}}, sn)}
	if err := errors.Join(d.Save(d.LeaseFile(), lease), d.Save(d.PeersFile(), peers)); err != nil {
		t.Fatal(err)
	}
	got, err := d.Load()
	want := lease
	want.Node, want.Prefix, want.Saved, want.Revision, want.Peers = self, d.Prefix, got.Saved, peers.Revision, peers.Peers
	if err != nil || !reflect.DeepEqual(got, want) || got.Own() != sn || time.Since(got.Saved) > time.Minute {
		t.Fatalf("got %+v, %v, want %+v", got, err, want)
	}
	own, err := d.LoadOwn()
	if own.Peers = got.Peers; err != nil || !reflect.DeepEqual(own, want) || len(want.Peers) == 0 {
		t.Errorf("without peers: got %+v, %v, want %+v", own, err, want)
	}
	table, err := got.Table()
	if err != nil || table.ConfigJSON != config || len(table.Entries) != 2 || table.Entries[1].Attrs != peer(2).Attrs {
		t.Errorf("table %+v, %v", table, err)
	}
	// They settle who has an address.
	if e, was := table.Entries[1], peer(2); e.Created != was.Created || e.Revision != was.Revision {
		t.Errorf("created at %d and written at %d, it was %d and %d", e.Created, e.Revision, was.Created, was.Revision)
	}
	subnetAlone := func(what string, d Dir) {
		t.Helper()
		if got, err := d.Load(); err != nil || got.Own() != sn || got.Config != nil || got.Peers != nil ||
			got.Revision != 0 ||
			got.Expires.After(time.Now()) {
			t.Errorf("%s: %+v, %v", what, got, err)
		}
	}
	subnetAlone("of another network", Dir{d.Path, "/another/network", self})
	// The directory may be a copy.
	subnetAlone("of another name", Dir{d.Path, d.Prefix, subnet.Identity{NodeName: "renamed", NodeID: self.NodeID}})
	clone := Dir{d.Path, d.Prefix, subnet.Identity{NodeName: "clone", NodeID: "id-clone"}}
	if got, err := clone.Load(); !reflect.DeepEqual(got, Persisted{}) || err == nil ||
		!strings.Contains(err.Error(), "id-self") {
		t.Errorf("a clone remembers %+v, %v", got, err)
	}

	// Killed after the one file was written and before the other.
	other := Dir{d.Path, "/another/network", self}
	if err := other.Save(d.LeaseFile(), lease); err != nil {
		t.Fatal(err)
	}
	if got, err := other.Load(); err != nil || got.Config == nil || got.Peers != nil || got.Revision != 0 {
		t.Errorf("peers of another network: %+v, %v", got, err)
	}
	if err := os.WriteFile(d.PeersFile(), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := other.Load(); got.Own() != sn || got.Config == nil || err == nil ||
		!strings.Contains(err.Error(), d.PeersFile()) {
		t.Errorf("with broken peers: %+v, %v", got, err)
	}

	// Before there was peers.json, all was in lease.json.
	want.Saved = want.Saved.Round(0)
	all, err := json.Marshal(want)
	if err := errors.Join(err, os.Remove(d.PeersFile()), os.WriteFile(d.LeaseFile(), all, 0o600)); err != nil {
		t.Fatal(err)
	}
	if got, err := d.Load(); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("of the version before: %+v, %v, want %+v", got, err, want)
	}
	for _, garbage := range []string{"", "{", `{"Subnets":"10.244.5.7-24"}`, "\x00\xff", `{"Subnets":7}`} {
		if err := os.WriteFile(d.LeaseFile(), []byte(garbage), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := d.Load(); !reflect.DeepEqual(got, Persisted{}) || err == nil ||
			!strings.Contains(err.Error(), d.LeaseFile()) {
			t.Errorf("%q: got %v, %v, want an error that names the file", garbage, got, err)
		}
	}
}

// The peers of an earlier version's lease.json are in peers.json before lease.json is written without them.
func TestPeersOfAnEarlierVersion(t *testing.T) {
	d := Dir{Path: t.TempDir(), Prefix: "/net", Node: subnet.Identity{NodeName: "n", NodeID: "id"}}
	saved := Persisted{
		Subnets: "10.244.1.0-24", Revision: 7, Peers: []Peer{{
			Key: "10.244.2.0-24", Value: []byte("{}"), Created: 1,
			Revision: 2,
		}},
	}
	if err := d.Save(d.LeaseFile(), saved); err != nil {
		t.Fatal(err)
	}
	if p, err := d.Load(); err != nil || len(p.Peers) != 1 {
		t.Fatalf("loaded %+v, %v", p, err)
	}
	saved.Peers, saved.Revision = nil, 0
	if err := d.Save(d.LeaseFile(), saved); err != nil {
		t.Fatal(err)
	}
	if p, err := d.Load(); err != nil || len(p.Peers) != 1 || p.Revision != 7 {
		t.Errorf("loaded %+v, %v", p, err)
	}
}
