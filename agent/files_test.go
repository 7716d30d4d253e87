package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
)

func TestSubnetEnv(t *testing.T) {
	t.Parallel()
	l := subnet.Lease{Subnets: addr.Per[netip.Prefix]{V4: netip.MustParsePrefix("10.244.5.0/24"), V6: netip.MustParsePrefix("fd00:10:244:5::/64")}}
	const want = `FLANNEL_NETWORK=10.244.0.0/16
FLANNEL_SUBNET=10.244.5.1/24
FLANNEL_IPV6_NETWORK=fd00:10:244::/48
FLANNEL_IPV6_SUBNET=fd00:10:244:5::1/64
FLANNEL_MTU=1430
FLANNEL_IPMASQ=true
`
	want2 := want + strings.ReplaceAll(want, "FLANNEL_", "OVERLAYD_")
	if got := string(subnetEnv(config(t, dual), l, 1430, true)); got != want2 {
		t.Errorf("got:\n%swant:\n%s", got, want2)
	}
	if got := string(subnetEnv(config(t, onlyV4), l, 1450, false)); strings.Contains(got, "IPV6") || !strings.Contains(got, "FLANNEL_IPMASQ=false\n") {
		t.Errorf("IPv4 alone:\n%s", got)
	}
}

func TestWriteIfChanged(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "new", "file")
	for _, content := range []string{"one", "one", "two"} {
		if _, err := writeIfChanged(path, []byte(content)); err != nil {
			t.Fatal(err)
		}
		if got, _ := os.ReadFile(path); string(got) != content {
			t.Fatalf("got %q, want %q", got, content)
		}
	}
	before, _ := os.Stat(path)
	if _, err := writeIfChanged(path, []byte("two")); err != nil {
		t.Fatal(err)
	}
	if after, _ := os.Stat(path); !os.SameFile(before, after) {
		t.Error("an unchanged file was written anew")
	}
	left, _ := os.ReadDir(filepath.Dir(path))
	if len(left) != 1 || before.Mode().Perm() != 0o644 {
		t.Errorf("%d files in the directory, mode %v", len(left), before.Mode())
	}
}

func TestStateDir(t *testing.T) {
	t.Parallel()
	d, self := stateDir{filepath.Join(t.TempDir(), "state"), "/a/network"}, subnet.Identity{NodeName: "self", NodeID: "id-self"}
	if got, err := d.load(self); !reflect.DeepEqual(got, memory{}) || err != nil {
		t.Fatalf("a new node remembers %+v, %v", got, err)
	}
	sn := addr.Per[netip.Prefix]{V4: netip.MustParsePrefix("10.244.5.0/24")}
	bad := subnet.ParseEntry("10.244.9.0-24", []byte("{"), 1, 1, 1)
	want := remember(subnet.Table{Config: config(t, onlyV4), ConfigJSON: onlyV4, Entries: []*subnet.Entry{peer(1), bad, peer(2)}}, self, sn, time.Now().UTC().Round(0))
	if err := d.save(want); err != nil {
		t.Fatal(err)
	}
	want.Prefix = d.prefix
	got, err := d.load(self)
	if err != nil || !reflect.DeepEqual(got, want) || got.subnets() != sn {
		t.Fatalf("got %+v, %v, want %+v", got, err, want)
	}
	table, err := got.table()
	if err != nil || table.Config != config(t, onlyV4) || len(table.Entries) != 2 || table.Entries[1].Attrs != peer(2).Attrs {
		t.Errorf("table %+v, %v", table, err)
	}
	other := stateDir{d.path, "/another/network"}
	if got, err := other.load(self); err != nil || got.subnets() != sn || got.Config != nil || got.Peers != nil || got.Expires.After(time.Now()) {
		t.Errorf("of another network: %+v, %v", got, err)
	}
	if got, err := d.load(subnet.Identity{NodeName: "clone", NodeID: "id-clone"}); !reflect.DeepEqual(got, memory{}) || err == nil || !strings.Contains(err.Error(), "id-self") {
		t.Errorf("a clone remembers %+v, %v", got, err)
	}
	for _, garbage := range []string{"", "{", `{"Subnets":"10.244.5.7-24"}`, "\x00\xff", `{"Subnets":7}`} {
		if err := os.WriteFile(d.leaseFile(), []byte(garbage), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := d.load(self); !reflect.DeepEqual(got, memory{}) || err == nil || !strings.Contains(err.Error(), d.leaseFile()) {
			t.Errorf("%q: got %v, %v, want an error that names the file", garbage, got, err)
		}
	}
}

func TestLock(t *testing.T) {
	t.Parallel()
	name := fmt.Sprintf("overlayd-test-%d", os.Getpid())
	unlock, err := Lock(name, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(name, 50*time.Millisecond); !errors.Is(err, ErrRunning) || !strings.Contains(err.Error(), strconv.Itoa(os.Getpid())) {
		t.Fatalf("a second lock: %v", err)
	}
	time.AfterFunc(100*time.Millisecond, unlock) // as one that is just ending
	unlock, err = Lock(name, 10*time.Second)
	if err != nil {
		t.Fatalf("after it was given back: %v", err)
	}
	unlock()
}

func TestMailboxKeepsTheNewest(t *testing.T) {
	t.Parallel()
	m := newMailbox[int]()
	for i := range 5 {
		m.put(i)
	}
	if got := <-m; got != 4 {
		t.Errorf("got %d", got)
	}
	select {
	case v := <-m:
		t.Errorf("%d was queued", v)
	default:
	}
}

// Whoever deletes or changes the file is told of at once, also if the directory was made after the watch began or went in between.
func TestWatchFile(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "run")
	path := filepath.Join(dir, "subnet.env")
	w, err := WatchFile(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- w.run(ctx) }()
	defer func() { cancel(); <-ended }()
	write := func() {
		t.Helper()
		if _, err := writeIfChanged(path, []byte("one")); err != nil {
			t.Fatal(err)
		}
		w.again()
		for { // our own write may be told of, too
			select {
			case <-w.news():
				continue
			case <-time.After(3 * fileGap):
			}
			return
		}
	}
	told := func(what string) {
		t.Helper()
		select {
		case <-w.news():
		case <-time.After(5 * time.Second):
			t.Fatalf("%s: nobody was told", what)
		}
	}
	write()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	told("deleted")
	write()
	if err := os.WriteFile(path, []byte("two"), 0o644); err != nil {
		t.Fatal(err)
	}
	told("overwritten")
	write()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	told("directory removed")
	write()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	told("deleted in the new directory")
}
