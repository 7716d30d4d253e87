package netstate

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// A private key is nowhere in what is printed or encoded.
func TestPrivateKeyIsHidden(t *testing.T) {
	t.Parallel()
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	w := WireGuard{51820, PrivateKey(key)}
	l := Link{Name: "overlay-wg", WireGuard: w, MTU: 1420}
	text, err := w.Key.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	shown := fmt.Sprintf("%v %+v %#v %s %x %d %q %v %s %s", w, w, w, w.Key, w.Key, w.Key, w.Key, Change{Op: Add, Obj: l}, l, text)
	for _, secret := range []string{key.String(), fmt.Sprintf("%x", key[:4]), fmt.Sprintf("%d %d %d", key[0], key[1], key[2])} {
		if strings.Contains(shown, secret) {
			t.Errorf("%q is in %s", secret, shown)
		}
	}
	if !strings.Contains(l.String(), w.Key.Public().String()) {
		t.Errorf("%s does not say which key it is", l)
	}
}

// wgNode is a node with a WireGuard device: the kernel's, or that of wireguard-go.
type wgNode struct {
	*node
	want State
}

// The name is the process's own: wireguard-go's socket, in a directory for the whole machine, has it.
func newWGNode(t *testing.T) *wgNode {
	n := &wgNode{node: newNode(t)}
	name := fmt.Sprintf("overlay%d", os.Getpid())
	key := func(n byte) wgtypes.Key { return wgtypes.Key{0: 8 * n, 31: 64} }
	n.want = State{Links: []Link{{Name: name, WireGuard: WireGuard{51820, PrivateKey(key(1))}, MTU: 1420}}}
	for i := byte(2); i <= 4; i++ {
		n.want.TunnelPeers = append(n.want.TunnelPeers, TunnelPeer{
			Link: name, Key: key(i).PublicKey(), Endpoint: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, i}), 51820),
			Roams: i == 4, Keepalive: uint16(i),
			Allowed: Allow(netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, i}), 32),
				netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, i, 0}), 24)),
		})
	}
	n.want.Sort()
	n.k.WireGuardProgram = wireGuardGo(t)
	t.Cleanup(func() { // ends the program, too
		n.Do(func() { _ = exec.Command("ip", "link", "delete", n.want.Links[0].Name).Run() })
	})
	return n
}

func wireGuardGo(t *testing.T) string {
	program, err := filepath.Abs("../bin/wireguard-go")
	if err == nil {
		_, err = os.Stat(program)
	}
	if err != nil {
		t.Fatalf("%v (make bin/wireguard-go)", err)
	}
	return program
}

// peer finds a peer by the last byte of its address.
func (n *wgNode) peer(last byte) TunnelPeer {
	for _, p := range n.want.TunnelPeers {
		if p.Endpoint.Addr().As4()[3] == last {
			return p
		}
	}
	n.t.Fatalf("no peer %d", last)
	return TunnelPeer{}
}

// configure changes the device as another program does.
func (n *wgNode) configure(c wgtypes.Config) {
	n.t.Helper()
	var err error
	n.Do(func() {
		err = withWireGuard(func(client *wgctrl.Client) error { return client.ConfigureDevice(n.want.Links[0].Name, c) })
	})
	if err != nil {
		n.t.Fatal(err)
	}
}

// changes is what the next reconcile is to do.
func (n *wgNode) changes() (out []string) {
	n.t.Helper()
	n.Do(func() {
		all, err := n.k.Compare()
		if err != nil {
			n.t.Error(err)
		}
		for _, c := range all {
			out = append(out, c.Op.String()+" "+c.Kind())
		}
	})
	return out
}

func TestWireGuard(t *testing.T) {
	t.Parallel()
	n := newWGNode(t)
	n.converge(n.want)
	if got := n.changes(); len(got) > 0 {
		t.Fatalf("after the first time: %v", got)
	}
	n.open() // as after a restart
	n.k.WireGuardProgram = wireGuardGo(t)
	if done := n.converge(n.want); len(done) > 0 {
		t.Errorf("after a restart: %v", done)
	}
	elsewhere := net.UDPAddrFromAddrPort(netip.MustParseAddrPort("203.0.113.9:1"))
	port, never := 5, time.Duration(0)
	other := wgtypes.Key{31: 64}
	for _, tt := range []struct {
		name   string
		change wgtypes.Config
		want   string
	}{
		{"peer gone", wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: n.peer(2).Key, Remove: true}}}, "add peer"},
		{"all peers gone", wgtypes.Config{ReplacePeers: true}, "add peer add peer add peer"},
		{
			"foreign peer", wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: other.PublicKey()}}}, "delete peer",
		},
		{
			"endpoint", wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: n.peer(2).Key, Endpoint: elsewhere}}}, "replace peer",
		},
		{"endpoint of one that roams", wgtypes.Config{
			Peers: []wgtypes.PeerConfig{{PublicKey: n.peer(4).Key, Endpoint: elsewhere}},
		}, ""},
		{
			"keepalive", wgtypes.Config{Peers: []wgtypes.PeerConfig{{
				PublicKey: n.peer(3).Key, PersistentKeepaliveInterval: &never,
			}}}, "replace peer",
		},
		{"allowed networks gone", wgtypes.Config{Peers: []wgtypes.PeerConfig{{
			PublicKey: n.peer(3).Key, ReplaceAllowedIPs: true,
		}}}, "replace peer"},
		{"another allowed network", wgtypes.Config{Peers: []wgtypes.PeerConfig{{
			PublicKey:  n.peer(3).Key,
			AllowedIPs: []net.IPNet{{IP: net.IPv4(10, 9, 0, 0).To4(), Mask: net.CIDRMask(16, 32)}},
		}}}, "replace peer"},
		{"key", wgtypes.Config{PrivateKey: &other}, "replace device"},
		{"port", wgtypes.Config{ListenPort: &port}, "replace device"},
	} {
		n.configure(tt.change)
		if got := strings.Join(n.changes(), " "); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
		n.converge(n.want)
		if got := n.changes(); len(got) > 0 {
			t.Errorf("%s: afterwards %v", tt.name, got)
		}
	}
	n.sh("ip link set " + n.want.Links[0].Name + " down")
	if got := strings.Join(n.changes(), " "); got != "replace device" {
		t.Errorf("down: %s", got)
	}
	n.converge(n.want)
	n.sh("ip link delete " + n.want.Links[0].Name)
	n.forget()
	n.converge(n.want)
	if got := n.changes(); len(got) > 0 {
		t.Errorf("after the device was deleted: %v", got)
	}
	// One peer has another key now, for the same networks.
	renewed := n.peer(2)
	renewed.Key = wgtypes.Key{0: 200, 31: 64}.PublicKey()
	was := n.peer(2)
	n.Do(func() {
		res, err := n.k.Reconcile(Update{
			Gone: State{TunnelPeers: []TunnelPeer{was}}, Come: State{TunnelPeers: []TunnelPeer{renewed}}, Prune: true,
		})
		if err != nil || len(res.Failed) > 0 || len(res.Done) != 2 {
			t.Errorf("another key: %v, %v", res, err)
		}
	})
	if got := n.changes(); len(got) > 0 {
		t.Errorf("with another key: %v", got)
	}
	n.converge(State{})
	n.wantState(State{})
}

// A device of a program that does not answer is named, and holds back nothing else.
func TestWireGuardRefused(t *testing.T) {
	t.Parallel()
	n := newWGNode(t)
	n.want.Links[0].Name = "overlay-tun" // which has no socket anywhere
	for i := range n.want.TunnelPeers {
		n.want.TunnelPeers[i].Link = "overlay-tun"
	}
	n.want.Addresses = []Address{{"overlay-tun", netip.MustParsePrefix("10.244.1.0/32")}}
	n.sh("ip tuntap add dev overlay-tun mode tun")
	res := n.reconcile(n.want)
	text := fmt.Sprint(res.Failed)
	if len(res.Failed) == 0 || !errors.Is(res.Failed[0], os.ErrNotExist) || !strings.Contains(text, "ip link delete overlay-tun") {
		t.Errorf("failed: %v", res.Failed)
	}
	if out := n.Exec("ip", "-br", "addr", "show", "dev", "overlay-tun"); !strings.Contains(out, "10.244.1.0") {
		t.Errorf("no address: %s", out)
	}
	n.sh("ip link delete overlay-tun")
	n.k.WireGuardProgram = ""
	if err := errors.Join(asErrors(n.reconcile(n.want).Failed)...); errors.Is(err, unix.EOPNOTSUPP) &&
		!strings.Contains(err.Error(), "--wireguard-program") {
		t.Errorf("without a program: %v", err)
	}
	n.k.WireGuardProgram = "/bin/false"
	if err := errors.Join(asErrors(n.reconcile(n.want).Failed)...); err != nil && !strings.Contains(err.Error(), "/bin/false") {
		t.Errorf("with a program that fails: %v", err)
	}
}

func asErrors(failed []Failure) (out []error) {
	for _, f := range failed {
		out = append(out, f)
	}
	return out
}
