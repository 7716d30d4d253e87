package doctor

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/dist"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd"
	"github.com/overlayd/overlayd/test/nstest"
)

// files makes a root directory with these in it.
func files(t *testing.T, content map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range content {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// Of sockets of IPv6 it is known which may have a port for IPv4 too.
func TestSocketsThatTakeIPv4(t *testing.T) {
	t.Parallel()
	nstest.New(t).Do(func() {
		want := map[uint16]udpSocket{}
		for _, x := range []struct {
			at      string
			v6, any bool
		}{{"127.0.0.1:0", false, false}, {"[::]:0", true, true}, {"[::1]:0", true, false}, {"[::ffff:127.0.0.1]:0", false, false}} {
			network := "udp"
			if x.v6 && !x.any {
				network = "udp6"
			}
			l, err := net.ListenPacket(network, x.at)
			if err != nil {
				t.Error(err)
				continue
			}
			defer l.Close()
			port := uint16(l.LocalAddr().(*net.UDPAddr).Port)
			want[port] = udpSocket{port: port, v6: x.v6, any: x.any}
		}
		found := 0
		for _, s := range readSockets("/") {
			if w, ours := want[s.port]; ours {
				found++
				if s.v6 != w.v6 || s.any != w.any || s.inode == "0" {
					t.Errorf("%+v, want %+v", s, w)
				}
			}
		}
		if found != len(want) || found != 4 {
			t.Errorf("%d of %d found", found, len(want))
		}
	})
}

// Who would configure our devices is found, and after --fix nobody does.
func TestManagers(t *testing.T) {
	t.Parallel()
	dir := files(t, map[string]string{
		"run/systemd/netif/state": "", "run/NetworkManager/devices/2": "", "run/udev/control": "",
		"proc/7/comm": "systemd-network\n", "proc/8/comm": "NetworkManager\n", "proc/self": "",
		"usr/lib/systemd/network/99-default.link": "[Match]\nOriginalName=*\n\n[Link]\nMACAddressPolicy=persistent\n",
		"usr/lib/systemd/network/80-wifi.network": "[Match]\nType=wlan\n[Network]\nDHCP=yes\n",
		"etc/systemd/network/50-all.network":      "# all\n[Match]\nName=!lo *\n[Network]\nDHCP=yes\n",
		"etc/systemd/networkd.conf":               "[Network]\n#ManageForeignRoutes=no\n",
		"etc/NetworkManager/NetworkManager.conf":  "[main]\nplugins=keyfile\n",
	})
	usual := managedLike(netstate.Survey{}, nil)
	want := Managers{
		Networkd: true, NetworkManager: true, Udev: true, NetworkFile: "/etc/systemd/network/50-all.network",
		Managed:  "overlay.1",
		LinkFile: "/usr/lib/systemd/network/99-default.link", MACPolicy: "persistent",
	}
	if m := lookAtManagers(root(dir), usual); m != want {
		t.Errorf("%+v", m)
	}
	f := healthy(t)
	f.System.Managers = lookAtManagers(root(dir), usual)
	report := Report{Findings: judge(f)}
	if n := report.Count(Warn); n != 4 {
		t.Errorf("%d warnings: %+v", n, report.Findings)
	}
	done := Apply(report, dir, "/proc/sys")
	if len(done) != 4 {
		t.Errorf("%+v", done)
	}
	for _, d := range done {
		if d.Err != "" {
			t.Errorf("%+v", d)
		}
	}
	f.System.Managers = lookAtManagers(root(dir), usual)
	for _, x := range judge(f) {
		if x.Mark == Warn || x.Mark == Fail {
			t.Errorf("%+v", x)
		}
	}
	// What is there is not overwritten.
	for _, d := range Apply(report, dir, "/proc/sys") {
		if d.Err == "" {
			t.Errorf("%+v", d)
		}
	}
	// Those that do not run are nobody.
	if m := lookAtManagers(root(files(t, map[string]string{"run/systemd/netif/state": "", "proc/7/comm": "bash\n"})),
		usual); m.Networkd {
		t.Errorf("%+v", m)
	}
}

// NetworkManager is asked what it does with the devices that are there: with the words of the real nmcli, which knows
// some of them.
func TestAskNetworkManager(t *testing.T) {
	bin := t.TempDir()
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	stub := func(script string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(bin, "nmcli"), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	link := func(i int, name, kind, master string) netstate.HostLink {
		return netstate.HostLink{Index: i, Name: name, Kind: kind, Master: master, Tunnel: kind == "vxlan"}
	}
	s := netstate.Survey{Host: netstate.Host{Links: []netstate.HostLink{
		link(2, "eth0", "device", ""), link(3, "overlay.1", "vxlan", ""), link(4, "br-pods", "bridge", ""),
		link(5, "veth1", "veth", "br-pods"), link(6, "veth2", "veth", "br-pods"),
	}}.Indexed()}
	devices := managedLike(s, []netstate.PodBridge{{Name: "br-pods"}, {Name: "cni0"}})
	if want := []device{
		{"overlay.1", "vxlan", true},
		{"br-pods", "bridge", true},
		{"veth1", "veth", true},
	}; !reflect.DeepEqual(devices, want) {
		t.Errorf("devices %v", devices)
	}
	is := func(what, manages string, known bool) {
		t.Helper()
		if m, k := askNetworkManager(devices); m != manages || k != known {
			t.Errorf("%s: manages %q, known %v", what, m, k)
		}
	}
	const answers = `[ "$*" = networking ] && echo enabled && exit
[ "$1 $2 $3 $4" = "-g GENERAL.NM-MANAGED device show" ] && [ $# = 5 ] && [ "$LC_ALL" = C ] || exit 2
case $5 in
overlay.1) echo no;;
br-pods) echo yes;;
*) echo "Error: Device '$5' not found." >&2; exit 10;;
esac`
	stub(answers)
	is("one", "br-pods", true)
	stub(strings.Replace(answers, "echo yes", "echo no", 1))
	is("none", "", true)
	stub(strings.Replace(strings.Replace(answers, "echo yes", "echo no", 1), "enabled", "disabled", 1))
	is("its networking is off", "", false)
	stub("echo 'Error: NetworkManager is not running.' >&2; exit 8")
	is("it does not answer", "", false)
	devices = managedLike(netstate.Survey{}, nil)
	stub("echo yes")
	is("no device is there", "", false)
}

// A bridge and its ports are judged as the tunnel is, by the file that comes first.
func TestNetworkdAndTheBridge(t *testing.T) {
	t.Parallel()
	all := map[string]string{
		"run/systemd/netif/state": "", "proc/7/comm": "systemd-network\n",
		"etc/systemd/network/50-all.network": "[Match]\nName=*\n",
	}
	of := func(dropIn string) string {
		files1 := map[string]string{"etc/systemd/network/10-overlayd.network": dropIn}
		for k, v := range all {
			files1[k] = v
		}
		m := lookAtManagers(root(files(t, files1)), managedLike(netstate.Survey{}, nil))
		return m.NetworkFile + " " + m.Managed
	}
	now, err := dist.DropIns.ReadFile("systemd/network/10-overlayd.network")
	if err != nil {
		t.Fatal(err)
	}
	for dropIn, want := range map[string]string{
		"[Match]\nName=overlay.*\n[Link]\nUnmanaged=yes\n":             "/etc/systemd/network/50-all.network cni0",
		"[Match]\nName=overlay.*\nKind=vxlan\n[Link]\nUnmanaged=yes\n": "/etc/systemd/network/50-all.network cni0",
		"[Match]\nName=overlay.* cni0\n[Link]\nUnmanaged=yes\n":        "/etc/systemd/network/50-all.network veth0",
		"[Match]\nType=bridge\n[Network]\nDHCP=yes\n":                  "/etc/systemd/network/50-all.network overlay.1",
		"[Match]\nName=overlay.*\nType=ether\n[Link]\nUnmanaged=yes\n": "/etc/systemd/network/50-all.network cni0",
		"[Match]\nKind=vxlan bridge veth\n[Link]\nUnmanaged=yes\n":     " ",
		string(now): " ",
	} {
		if got := of(dropIn); got != want {
			t.Errorf("%q: %q, want %q", dropIn, got, want)
		}
	}
}

func TestFixSysctl(t *testing.T) {
	t.Parallel()
	dir := files(t, map[string]string{"proc/sys/net/ipv4/ip_forward": "0\n"})
	f := healthy(t)
	f.System.Sysctls["net/ipv4/ip_forward"] = "0"
	done := Apply(Report{Findings: judge(f)}, dir, "/proc/sys")
	if want := []Done{{What: "net/ipv4/ip_forward = 1 (was 0)"}}; !reflect.DeepEqual(done, want) {
		t.Errorf("%+v", done)
	}
	// A kernel that does not take the value is not believed to have it.
	if done := Apply(Report{Findings: judge(f)}, files(t, nil), "/proc/sys"); len(done) != 1 || done[0].Err == "" {
		t.Errorf("%+v", done)
	}
}

// IPv6 forwarding takes the routes away that came with router advertisements, unless the device was told to keep them.
func TestFixKeepsAdvertisedRoutes(t *testing.T) {
	t.Parallel()
	f := healthy(t)
	tab := table(t, `{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/48"}`)
	f.Config, f.Self = &tab.Config, subnet.Lease{}
	f.route(netstate.HostRoute{Dst: netip.MustParsePrefix("::/0"), Via: addrOf("fe80::1"), Link: "eth0", Advertised: true})
	f.System.Sysctls["net/ipv6/conf/all/forwarding"] = "0"
	got := judgeForwarding(f)
	want := []string{"sysctl -w net/ipv6/conf/eth0/accept_ra=2", "sysctl -w net/ipv6/conf/all/forwarding=1"}
	if len(got) != 1 || !reflect.DeepEqual(got[0].Fix, want) {
		t.Errorf("%+v", got)
	}
}

func TestParseEnv(t *testing.T) {
	t.Parallel()
	got, err := parseEnv("# comment\n; another\n\nA=1\n  B = two words  \nC=\"a # b\" \nD='x\\y'\nE=one\\\ntwo\nF=\nG=a\\ b\nA=2\nOVERLAYD_ETCD_PASSWORD=s3cret=\n")
	want := map[string]string{"A": "2", "B": "two words", "C": "a # b", "D": `x\y`, "E": "onetwo", "F": "", "G": "a b", "OVERLAYD_ETCD_PASSWORD": "s3cret="}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%q, %v", got, err)
	}
	// As systemd.exec(5) has it: in double quotes a backslash goes only before one of "\`$, in single ones never; quotes count at the beginning.
	got, err = parseEnv(`A="C:\new \"x\" \\ \$y ` + "\\`" + `"` + "\nB=it's \"so\"  \nC='a\\b\\'\nD=\"one\ntwo\\\n three\"\nE=\"a\"'b' c \r\nF=x\\  \n# c \\\nG=1\nH=\"open\nI=1")
	want = map[string]string{"A": `C:\new "x" \ $y ` + "`", "B": `it's "so"`, "C": `a\b\`, "D": "one\ntwo three", "E": "abc", "F": "x ", "G": "1", "H": "open\nI=1"}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%q, %v", got, err)
	}
	_, err = parseEnv("A=1\nexport B=2\nno sense s3cret\n")
	if err == nil || strings.Contains(err.Error(), "s3cret") || !strings.Contains(err.Error(), "line 2 ") || !strings.Contains(err.Error(), "line 3 ") {
		t.Errorf("%v", err)
	}
	if m, err := ReadEnvFile(filepath.Join(t.TempDir(), "none")); m != nil || err != nil {
		t.Errorf("%v, %v", m, err)
	}
}

func FuzzParseEnv(f *testing.F) {
	f.Add("A=\"x\\\ny\"\n")
	f.Fuzz(func(_ *testing.T, text string) { _, _ = parseEnv(text) })
}

func TestPrint(t *testing.T) {
	t.Parallel()
	r := Report{Findings: []Finding{
		{Check: "daemon", Mark: OK, Reason: "n1, ready"},
		{Check: "forwarding", Mark: Fail, Reason: "net/ipv4/ip_forward is 0: this node passes no packets of pods on", Fix: []string{"sysctl -w net/ipv4/ip_forward=1"}, Fixable: true},
		{Check: "clock", Mark: Skipped, Reason: "etcd was not queried"},
		{Check: "offloads", Mark: Warn, Reason: "off"},
	}}
	var b strings.Builder
	if err := r.Print(&b, Style{}); err != nil {
		t.Fatal(err)
	}
	want := `ok    daemon      n1, ready
FAIL  forwarding  net/ipv4/ip_forward is 0: this node passes no packets of pods on
                  fix: sysctl -w net/ipv4/ip_forward=1
-     clock       not checked: etcd was not queried
warn  offloads    off
1 fail, 1 warn, 1 ok, 1 not checked; overlayd doctor --fix fixes 1 of them
`
	if b.String() != want {
		t.Errorf("got\n%s", b.String())
	}
	b.Reset()
	if err := r.Print(&b, Style{Colour: true, Problems: true, Width: 60}); err != nil {
		t.Fatal(err)
	}
	want = "\x1b[31mFAIL\x1b[0m  forwarding  net/ipv4/ip_forward is 0: this node passes\n" +
		"                  no packets of pods on\n                  fix: sysctl -w net/ipv4/ip_forward=1\n" +
		"\x1b[33mwarn\x1b[0m  offloads    off\n1 fail, 1 warn, 1 ok, 1 not checked; overlayd doctor --fix fixes 1 of them\n"
	if b.String() != want {
		t.Errorf("got\n%q", b.String())
	}
}

// nobody is a daemon that does not run.
type nobody struct{}

var errNobodyThere = errors.New("nobody there")

func (nobody) Status(context.Context) (status.Node, error)  { return status.Node{}, errNobodyThere }
func (nobody) Peers(context.Context) ([]status.Peer, error) { return nil, errNobodyThere }
func (nobody) Diff(context.Context) ([]string, error)       { return nil, errNobodyThere }

// What is tried is what this network needs, also where only its config says so.
func TestSupportOfHostGW(t *testing.T) {
	t.Parallel()
	state := files(t, map[string]string{"lease.json": `{"Node":{"NodeName":"n","NodeID":"i"},"Subnets":"10.244.1.0-24","Config":{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}}`})
	o := Options{
		Settings: Settings{Identity: subnet.Identity{NodeName: "n", NodeID: "i"}, Store: etcd.Options{Endpoints: []string{"http://127.0.0.1:1"}}, StateDir: state, SubnetFile: filepath.Join(state, "subnet.env")},
		Daemon:   nobody{}, Owned: func(string) bool { return false }, NotRunning: func(err error) bool { return errors.Is(err, errNobodyThere) }, Now: time.Now,
	}
	var f Facts
	nstest.New(t).Do(func() { f = gather(t.Context(), o) })
	tried := map[string]bool{}
	for _, s := range f.System.Support {
		tried[s.what] = s.err == nil
	}
	if !tried["address sets (ipset)"] || tried["VXLAN devices"] || !tried["firewall rules (nftables or iptables)"] {
		t.Errorf("%v", tried)
	}
}

// slowDaemon answers after a second, but for the list of its peers, which it does not give.
type slowDaemon struct{ nobody }

func (slowDaemon) Status(context.Context) (status.Node, error) {
	time.Sleep(time.Second)
	return status.Node{Name: "n", ID: "i", Ready: true, Network: status.Network{Backend: "vxlan"}}, nil
}

// A daemon that is busy for a second runs, and who the others are is asked elsewhere. Etcd is not asked later because of it.
func TestSlowDaemon(t *testing.T) {
	t.Parallel()
	state := files(t, map[string]string{"lease.json": `{"Node":{"NodeName":"n","NodeID":"i"},"Subnets":"10.244.1.0-24","Config":` + plainConfig +
		`,"Peers":[{"Key":"10.244.2.0-24","Value":{"PublicIP":"192.0.2.2","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:02"},"NodeName":"n2"}}]}`})
	o := Options{
		Settings: Settings{Store: etcd.Options{Endpoints: []string{"http://127.0.0.1:1"}}, StateDir: state, SubnetFile: filepath.Join(state, "subnet.env")},
		Daemon:   slowDaemon{}, Owned: func(string) bool { return false }, NotRunning: func(err error) bool { return errors.Is(err, errNobodyThere) }, Now: time.Now,
	}
	var f Facts
	nstest.New(t).Do(func() { f = gather(t.Context(), o) })
	if !f.Daemon.Running || f.Daemon.Err != nil || f.Daemon.PeersErr == nil || f.Store == nil || f.Store.TableErr == nil || f.PeersFrom != "the persisted state" || len(f.Peers) != 1 {
		t.Errorf("%+v, peers %+v from %s", f.Daemon, f.Peers, f.PeersFrom)
	}
}

// An answer that is late is told by how long was waited for it.
func TestLateAnswer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		asking, cancel := context.WithTimeout(t.Context(), askDaemonFor)
		defer cancel()
		a := <-later(asking, func(ctx context.Context) (int, error) {
			<-ctx.Done()
			return 0, errors.New("within 5s")
		})
		if a.err == nil || !strings.Contains(a.err.Error(), "no answer within 3s") || strings.Contains(a.err.Error(), "5s") {
			t.Error(a.err)
		}
	})
}

// The daemon is asked anew whether the store is the one that it means.
func TestStoreOfTheDaemon(t *testing.T) {
	t.Parallel()
	x := examination{of: etcd.Options{Endpoints: []string{"a"}, Prefix: "/p"}, came: make(chan etcd.Examination)}
	for want, of := range map[bool][]etcd.Options{true: {{Endpoints: []string{"a"}, Prefix: "/p"}}, false: {{Endpoints: []string{"b"}, Prefix: "/p"}, {Endpoints: []string{"a"}, Prefix: "/q"}}} {
		for _, o := range of {
			if x.serves(o) != want || (examination{}).serves(o) {
				t.Errorf("%+v: not %v", o, want)
			}
		}
	}
}

// A whole examination of a bare namespace, with nobody to ask: what can be known is judged, the rest is not claimed.
func TestRunOnBareNode(t *testing.T) {
	t.Parallel()
	node := nstest.New(t)
	node.Exec("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
	node.Exec("ip", "link", "set", "eth1", "up")
	node.Addr("eth0", "192.0.2.1/24")
	node.Exec("ip", "route", "add", "default", "via", "192.0.2.254")
	state := files(t, map[string]string{"lease.json": `{"Node":{"NodeName":"n","NodeID":"i"},"Saved":"2026-01-01T00:00:00Z","Subnets":"10.244.1.0-24","Config":` + plainConfig +
		`,"Peers":[{"Key":"10.244.2.0-24","Value":{"PublicIP":"192.0.2.2","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:02"},"NodeName":"n2"}}]}`})
	o := Options{
		Settings: Settings{
			Identity: subnet.Identity{NodeName: "n", NodeID: "i"}, Store: etcd.Options{Endpoints: []string{"http://127.0.0.1:1"}}, StateDir: state, SubnetFile: filepath.Join(state, "subnet.env"), ByDefault: true,
		},
		Daemon: nobody{}, Owned: func(name string) bool { return name == "overlay.1" }, NotRunning: func(err error) bool { return errors.Is(err, errNobodyThere) }, Now: time.Now,
		Ping: func(_ context.Context, to []netip.Addr, _, count int, _ time.Duration) ([]Pong, error) {
			var out []Pong
			for _, a := range to {
				out = append(out, Pong{Addr: a, Sent: count, Lost: count})
			}
			return out, nil
		},
	}
	var r Report
	node.Do(func() { r = Run(t.Context(), o) })
	got := map[string]Finding{}
	for _, f := range r.Findings {
		if _, ok := got[f.Check]; !ok {
			got[f.Check] = f
		}
	}
	for check, want := range map[string]struct {
		mark Mark
		text string
	}{
		"daemon": {Fail, "does not run"}, "etcd": {Fail, "connection refused"}, "kernel": {OK, ""}, "forwarding": {Fail, "ip_forward is 0"},
		"tunnel device": {Fail, "overlay.1 does not exist"}, "routes": {Fail, "10.244.2.0/24 (n2)"}, "subnet file": {Fail, "no pod can start"},
		"peers": {OK, "1, as listed by the persisted state"}, "peers answer": {Fail, "1 of the 1 pinged does not answer"}, "leases": {Skipped, "etcd does not answer"},
		"drift": {Skipped, ""}, "privileges": {OK, ""},
	} {
		if f := got[check]; f.Mark != want.mark || !strings.Contains(f.Reason, want.text) {
			t.Errorf("%s: %+v", check, f)
		}
	}
	if left := node.Exec("ip", "-br", "link"); strings.Contains(left, netstate.DeviceForTrial) {
		t.Errorf("the trial is visible: %s", left)
	}
}
