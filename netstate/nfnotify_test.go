package netstate

import (
	"encoding/binary"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/internal/nstest"
)

func watchTables(t *testing.T, ns *nstest.NS, relevant func(NFTablesChange) bool) *NFTablesWatch {
	t.Helper()
	var w *NFTablesWatch
	var err error
	ns.Do(func() { w, err = WatchNFTables(relevant) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Close)
	return w
}

func woken(w *NFTablesWatch, within time.Duration) bool {
	select {
	case <-w.Wakes():
		return true
	case <-time.After(within):
		return false
	}
}

func epochOf(t *testing.T, w *NFTablesWatch) uint64 {
	t.Helper()
	e, ok := w.Epoch()
	if !ok {
		t.Fatal("nothing is heard")
	}
	return e
}

func TestNFTablesWatch(t *testing.T) {
	t.Parallel()
	ns, elsewhere := nstest.New(t), nstest.New(t)
	w := watchTables(t, ns, func(c NFTablesChange) bool {
		return c.Table == "nat" && (c.Chain == "" || c.Chain == "POSTROUTING") || c.Table == "ours"
	})
	for _, step := range []struct {
		command string
		want    bool
	}{
		{"nft add table ip ours", true},
		{"nft add chain ip ours c { type filter hook forward priority 0 ; }", true},
		{"nft add rule ip ours c accept", true},
		{"nft add set ip ours s { type ipv4_addr ; }", true},
		{"nft add element ip ours s { 192.0.2.1 }", true},
		{"nft delete element ip ours s { 192.0.2.1 }", true},
		{"nft flush chain ip ours c", true},
		{"nft list ruleset", false},
		{"nft add table ip theirs", false},
		{"nft add chain ip theirs POSTROUTING", false},
		{"nft add table inet ours", false},
		{"iptables-nft -t nat -N KUBE-X", true}, // makes the table
		{"iptables-nft -t nat -A KUBE-X -p tcp -j RETURN", false},
		{"iptables-nft -t nat -A POSTROUTING -p tcp -j RETURN", true},
		{"iptables-nft -t nat -S", false},
		{"iptables-nft -t nat -F POSTROUTING", true},
		{"iptables-nft -t filter -F", false},
		{"iptables-legacy -w 20 -t nat -A POSTROUTING -p tcp -j RETURN", false}, // nobody tells of these
		{"nft flush ruleset", true},
		{"nft flush ruleset", false},
	} {
		before := epochOf(t, w)
		ns.Exec(strings.Fields(step.command)...)
		if after := epochOf(t, w); (after != before) != step.want { // at once: what is complete is counted
			t.Errorf("%s: epoch %d, then %d", step.command, before, after)
		}
		if got := woken(w, map[bool]time.Duration{true: patience, false: 30 * time.Millisecond}[step.want]); got != step.want {
			t.Errorf("%s: woken %v", step.command, got)
		}
	}
	elsewhere.Exec("nft", "add", "table", "ip", "ours")
	if woken(w, 30*time.Millisecond) {
		t.Error("woken by another namespace")
	}
}

func TestNFTablesWatchCoalescesAndSettles(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	w := watchTables(t, ns, func(NFTablesChange) bool { return true })
	for range 5 {
		ns.Exec("nft", "add table ip t ; delete table ip t")
	}
	epochOf(t, w) // all of them have been heard
	if !woken(w, patience) || woken(w, 30*time.Millisecond) {
		t.Error("not exactly one wake for many changes")
	}
	ns.Exec("nft", "add table ip t")
	old := epochOf(t, w)
	ns.Exec("nft", "delete table ip t")
	w.Settled(old) // one change more has come since
	if !woken(w, patience) {
		t.Error("a wake got lost")
	}
	ns.Exec("nft", "add table ip t")
	w.Settled(epochOf(t, w))
	if woken(w, 30*time.Millisecond) {
		t.Error("woken by what is settled")
	}
}

// More news than the socket holds: some are lost, and that is said.
func TestNFTablesWatchOverrun(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	release := make(chan struct{})
	w := watchTables(t, ns, func(NFTablesChange) bool { <-release; return false })
	if err := w.conn.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 4096)
	}); err != nil {
		t.Fatal(err)
	}
	ns.Exec("nft", "add table ip t")
	for range 20 {
		ns.Exec("nft", "add chain ip t a ; add chain ip t b ; delete chain ip t a ; delete chain ip t b")
	}
	close(release)
	if !woken(w, patience) {
		t.Error("lost news do not wake")
	}
	if epochOf(t, w) == 0 {
		t.Error("lost news do not count")
	}
}

func TestNFTablesWatchClosed(t *testing.T) {
	t.Parallel()
	w := watchTables(t, nstest.New(t), func(NFTablesChange) bool { return true })
	w.Close()
	if _, ok := w.Epoch(); ok {
		t.Error("a closed watch hears")
	}
	if !woken(w, patience) {
		t.Error("the end does not wake")
	}
}

func FuzzParseNFTables(f *testing.F) {
	msg := func(family byte, attrs ...byte) []byte { return append([]byte{family, 0, 0, 0}, attrs...) }
	f.Add(uint16(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWRULE), msg(2, 8, 0, 1, 0, 'n', 'a', 't', 0, 6, 0, 2, 0, 'c', 0, 0, 0))
	f.Add(uint16(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_DELCHAIN), msg(10, 6, 0, 1, 0, 't', 0, 0, 0, 6, 0, 3, 0, 'c', 0))
	f.Add(uint16(0), []byte(nil))
	f.Fuzz(func(t *testing.T, typ uint16, body []byte) {
		c, ok := parseNFTables(typ, body)
		if ok && (c.Table == "" || c.Family != addr.IPv4 && c.Family != addr.IPv6) {
			t.Errorf("%+v", c)
		}
		raw := binary.NativeEndian.AppendUint32(nil, uint32(16+len(body)))
		raw = binary.NativeEndian.AppendUint16(raw, typ)
		raw = append(append(raw, make([]byte, 10)...), body...)
		eachMessage(raw, func(got uint16, b []byte) {
			if got != typ || string(b) != string(body) {
				t.Errorf("%d %q", got, b)
			}
		})
	})
}
