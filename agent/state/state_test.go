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

	"golang.org/x/sys/unix"

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

// A file that others can have written, or that a reader would wait at for ever, is refused at once, and named; the next
// write puts a file of our own in its place.
func TestForeignFiles(t *testing.T) {
	t.Parallel()
	for what, put := range map[string]func(file string) error{
		"found a named pipe":                      func(file string) error { return unix.Mkfifo(file, 0o600) },
		"found a symbolic link":                   func(file string) error { return os.Symlink("/dev/zero", file) },
		"belongs to user 65534":                   func(file string) error { return os.Chown(file, 65534, -1) },
		"others than its owner may write it":      func(file string) error { return os.Chmod(file, 0o666) },
		fmt.Sprintf("more than %d bytes", 64<<20): func(file string) error { return os.Truncate(file, 64<<20+1) },
	} {
		d := Dir{Path: t.TempDir(), Prefix: "/net", Node: subnet.Identity{NodeName: "n", NodeID: "id"}}
		lease := Persisted{Subnets: "10.244.1.0-24", Config: json.RawMessage("{}")}
		for _, file := range []string{d.LeaseFile(), d.PeersFile(), d.MovedFile()} {
			if err := errors.Join(d.Save(d.LeaseFile(), lease), d.Save(d.PeersFile(), Persisted{}), d.NoteMove("a", "b")); err != nil {
				t.Fatal(err)
			}
			if strings.Contains(what, "found") {
				_ = os.Remove(file)
			}
			if err := put(file); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			_, err := d.Load()
			if file == d.MovedFile() {
				err = d.MovedProblem()
			}
			if err == nil || !strings.HasPrefix(err.Error(), file+": ") || !strings.Contains(err.Error(), what) ||
				time.Since(start) > time.Second {
				t.Errorf("%s: %v after %v, want %q", file, err, time.Since(start), what)
			}
		}
		if err := errors.Join(d.Save(d.LeaseFile(), lease), d.Save(d.PeersFile(), Persisted{})); err != nil {
			t.Fatal(err)
		}
		if p, err := d.Load(); err != nil || p.Subnets != lease.Subnets {
			t.Errorf("after a write: %+v, %v", p, err)
		}
	}
}

// FuzzLoad: whatever the files hold, there is an error, or what a start can work with and the next one reads again.
func FuzzLoad(f *testing.F) {
	const node = `"Node":{"NodeName":"n","NodeID":"id"},"Prefix":"/net",`
	f.Add([]byte(`{`+node+`"Subnets":"10.244.1.0-24","Config":{"Network":"10.244.0.0/16"},"Addresses":{"V4":"192.0.2.1"},"Bridges":[{}]}`),
		[]byte(`{`+node+`"Revision":7,"Peers":[{"Key":"10.244.2.0-24","Value":{"PublicIP":"192.0.2.2"},"Created":1}]}`))
	f.Add([]byte(`{`+node+`"Subnets":"10.244.1.0-24&fd00::-64","Config":7,"Peers":[{"Key":"","Value":null}]}`), []byte(`{"Peers":[`))
	f.Add([]byte(`null`), []byte(`[]`))
	dir, err := os.MkdirTemp("/dev/shm", "fuzz") // each write is flushed, to the disk elsewhere
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = os.RemoveAll(dir) })
	d := Dir{Path: dir, Prefix: "/net", Node: subnet.Identity{NodeName: "n", NodeID: "id"}}
	f.Fuzz(func(t *testing.T, lease, peers []byte) {
		for file, raw := range map[string][]byte{d.LeaseFile(): lease, d.PeersFile(): peers} {
			if err := os.WriteFile(file, raw, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		_, _ = d.LoadOwn()
		p, err := d.Load()
		if err != nil {
			return
		}
		_, _ = p.Table()
		if err := errors.Join(d.Save(d.LeaseFile(), p), d.Save(d.PeersFile(), p)); err != nil {
			t.Fatal(err)
		}
		if again, err := d.Load(); err != nil || again.Own() != p.Own() || len(again.Peers) != len(p.Peers) {
			t.Fatalf("%+v was read again as %+v, %v", p, again, err)
		}
	})
}
