package agent

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
)

func TestSubnetEnv(t *testing.T) {
	t.Parallel()
	l := subnet.Lease{Subnets: addr.Per[netip.Prefix]{
		V4: netip.MustParsePrefix("10.244.5.0/24"),
		V6: netip.MustParsePrefix("fd00:10:244:5::/64"),
	}}
	const want = `FLANNEL_NETWORK=10.244.0.0/16
FLANNEL_SUBNET=10.244.5.1/24
FLANNEL_IPV6_NETWORK=fd00:10:244::/48
FLANNEL_IPV6_SUBNET=fd00:10:244:5::1/64
FLANNEL_MTU=1430
FLANNEL_IPMASQ=true
`
	want2 := want + strings.ReplaceAll(want, "FLANNEL_", "OVERLAYD_")
	if got := string(subnetEnv(config(t, dual), l.Subnets, 1430, true)); got != want2 {
		t.Errorf("got:\n%swant:\n%s", got, want2)
	}
	if got := string(subnetEnv(config(t, onlyV4), l.Subnets, 1450, false)); strings.Contains(got, "IPV6") ||
		!strings.Contains(got, "FLANNEL_IPMASQ=false\n") {
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

// Whoever deletes or changes the file is told of at once, also if the directory was made after the watch began or went
// in between.
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
	events := newMailbox[struct{}]()
	go func() { ended <- w.run(ctx, func() { events.put(struct{}{}) }) }()
	defer func() { cancel(); <-ended }()
	write := func() {
		t.Helper()
		if _, err := writeIfChanged(path, []byte("one")); err != nil {
			t.Fatal(err)
		}
		w.again()
		for { // our own write may be told of, too
			select {
			case <-events:
				continue
			case <-time.After(3 * fileGap):
			}
			return
		}
	}
	told := func(what string) {
		t.Helper()
		select {
		case <-events:
		case <-time.After(time.Minute):
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
