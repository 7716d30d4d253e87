package netstate

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "ask the kernel for new messages, and write down what is made of them")

// messagesFile has messages as a little-endian kernel sent them, one in a line: kind, body in hexadecimal, what is read
// from it.
const messagesFile = "testdata/messages.txt"

// reading is what the parsers make of a message, as a text.
func reading(kind string, body []byte) string {
	var v any
	var ok bool
	switch kind {
	case "route":
		var r rawRoute
		r, ok = parseRoute(body)
		r.Link = fmt.Sprint(r.oif)
		v = fmt.Sprintf("%s protocol %d type %d", r.Route, r.protocol, r.kind)
	case "neighbour":
		var n Neighbour
		var at uint32
		n, at, ok = parseNeighbour(body)
		v = fmt.Sprintf("%s%d", n, at)
	case "fdb":
		var e FDBEntry
		var at uint32
		e, at, ok = parseFDB(body)
		v = fmt.Sprintf("%s%d", e, at)
	case "rule":
		var r HostRule
		var ours bool
		r, ours, ok = parseRule(body)
		v = fmt.Sprintf("%s ours %v", r, ours)
	case "ack":
		v, ok = ackError(unix.NlMsghdr{Flags: unix.NLM_F_ACK_TLVS | unix.NLM_F_CAPPED}, body), true
	}
	if !ok {
		return "nothing of ours"
	}
	return fmt.Sprint(v)
}

type message struct {
	kind string
	body []byte
	want string
}

func readMessages(t testing.TB) []message {
	t.Helper()
	text, err := os.ReadFile(messagesFile)
	if err != nil {
		t.Fatal(err)
	}
	var out []message
	for line := range strings.Lines(string(text)) {
		part := strings.SplitN(strings.TrimSuffix(line, "\n"), "\t", 3)
		body, err := hex.DecodeString(part[1])
		if err != nil || len(part) != 3 {
			t.Fatalf("%q: %v", line, err)
		}
		out = append(out, message{part[0], body, part[2]})
	}
	return out
}

func TestMessages(t *testing.T) {
	if *update {
		captureMessages(t)
	}
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Fatal("the messages are from a little-endian kernel: capture this one's with -update")
	}
	for _, m := range readMessages(t) {
		if got := reading(m.kind, m.body); got != m.want {
			t.Errorf("%s %x\n got %s\nwant %s", m.kind, m.body, got, m.want)
		}
	}
}

func captureMessages(t *testing.T) {
	n := newNode(t)
	n.converge(fullState())
	n.sh(foreigners)
	n.sh(`ip route add 198.51.100.0/24 via inet6 2001:db8::7 dev eth0; ip route add 203.0.113.0/24 nexthop via 192.0.2.7 nexthop via 192.0.2.8
		bridge fdb add 02:00:00:00:00:99 dev overlay.1 dst 192.0.2.99 port 99 vni 7; ip rule add lookup 1000 priority 11801 protocol 118
		ip route add 10.244.77.0/24 dev eth0 proto 118 table 1000`)
	var lines []string
	note := func(kind string, body []byte) {
		lines = append(lines, fmt.Sprintf("%s\t%x\t%s\n", kind, body, reading(kind, body)))
	}
	dump := func(kind string, typ uint16, header nl.NetlinkRequestData) {
		if err := n.k.conn.dump(typ, header, nil, func() {}, func(b []byte) { note(kind, b) }); err != nil {
			t.Fatal(err)
		}
	}
	dump("route", unix.RTM_GETROUTE, &nl.RtMsg{})
	dump("rule", unix.RTM_GETRULE, &nl.RtMsg{})
	dump("neighbour", unix.RTM_GETNEIGH, &netlink.Ndmsg{})
	dump("fdb", unix.RTM_GETNEIGH, &netlink.Ndmsg{Family: unix.AF_BRIDGE})
	c := n.k.conn
	c.out.reset()
	unreachable := Route{Table: MainTable, Dst: fullState().Routes[0].Dst, Via: parseAddr(t, "203.0.113.1"), Link: "eth0"}
	if err := n.k.put(&c.out, Change{Op: Add, Obj: unreachable}); err != nil {
		t.Fatal(err)
	}
	if err := c.send(c.out.buf); err != nil {
		t.Fatal(err)
	}
	if err := c.receive(func(_ unix.NlMsghdr, body []byte) (bool, error) { note("ack", body); return true, nil }); err != nil {
		t.Fatal(err)
	}
	slices.Sort(lines)
	if err := os.MkdirAll("testdata", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(messagesFile, []byte(strings.Join(slices.Compact(lines), "")), 0o644); err != nil {
		t.Fatal(err)
	}
}

// fuzz feeds a parser with whatever; that it comes back is the test, and check looks at what it says.
func fuzz(f *testing.F, kinds []string, check func(t *testing.T, body []byte)) {
	f.Add([]byte{})
	for _, m := range readMessages(f) {
		if slices.Contains(kinds, m.kind) {
			f.Add(m.body)
			f.Add(m.body[:len(m.body)-1])
		}
	}
	f.Fuzz(check)
}

func FuzzParseRoute(f *testing.F) {
	fuzz(f, []string{"route"}, func(t *testing.T, b []byte) {
		if r, ok := parseRoute(b); ok && !r.Dst.IsValid() {
			t.Errorf("took %v", r)
		}
	})
}

func FuzzParseNeighbour(f *testing.F) {
	fuzz(f, []string{"neighbour", "fdb"}, func(t *testing.T, b []byte) {
		if n, _, ok := parseNeighbour(b); ok && !n.IP.IsValid() {
			t.Errorf("took %v", n)
		}
	})
}

func FuzzParseFDB(f *testing.F) {
	fuzz(f, []string{"neighbour", "fdb"}, func(_ *testing.T, b []byte) { parseFDB(b) })
}

func FuzzParseRule(f *testing.F) {
	fuzz(f, []string{"rule", "route"}, func(t *testing.T, b []byte) {
		if r, _, ok := parseRule(b); ok && !r.From.IsValid() {
			t.Errorf("took %v", r)
		}
	})
}

func FuzzEachAttr(f *testing.F) {
	f.Add([]byte{4, 0, 1, 0, 3, 0, 1, 0})
	fuzz(f, []string{"route", "fdb", "ack"}, func(t *testing.T, b []byte) {
		total := 0
		eachAttr(b, func(_ uint16, data []byte) { total += unix.SizeofRtAttr + len(data) })
		if total > len(b) {
			t.Errorf("%d bytes of %d", total, len(b))
		}
	})
}

func FuzzAckError(f *testing.F) {
	fuzz(f, []string{"ack"}, func(t *testing.T, b []byte) {
		for _, flags := range []uint16{0, unix.NLM_F_ACK_TLVS, unix.NLM_F_ACK_TLVS | unix.NLM_F_CAPPED} {
			if err := ackError(unix.NlMsghdr{Flags: flags}, b); err != nil {
				_ = err.Error()
			}
		}
		if err := doneError(b); err != nil {
			_ = err.Error()
		}
	})
}

func TestAckErrorKeepsTheErrno(t *testing.T) {
	for _, m := range readMessages(t) {
		if m.kind == "ack" && !errors.Is(ackError(unix.NlMsghdr{}, m.body), unix.ENETUNREACH) {
			t.Errorf("%x: %v", m.body, ackError(unix.NlMsghdr{}, m.body))
		}
	}
}
