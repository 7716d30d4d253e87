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
	"time"

	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/internal/ping"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd"
	"github.com/overlayd/overlayd/test/bubble"
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
		}{
			{"127.0.0.1:0", false, false},
			{"[::]:0", true, true},
			{"[::1]:0", true, false},
			{"[::ffff:127.0.0.1]:0", false, false},
		} {
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

// Programs that would configure our devices are found, and after --fix they leave them alone.
func TestManagers(t *testing.T) {
	t.Parallel()
	dir := files(t, map[string]string{
		"run/systemd/netif/state": "", "run/NetworkManager/devices/2": "", "run/udev/control": "",
		"proc/7/comm": "systemd-network\n", "proc/8/comm": "NetworkManager\n", "proc/self": "",
		"usr/lib/systemd/network/99-default.link": "[Match]\nOriginalName=*\n\n[Link]\nMACAddressPolicy=persistent\n",
		"usr/lib/systemd/network/80-wifi.network": "[Match]\nType=wlan\n[Network]\nDHCP=yes\n",
		"etc/systemd/networkd.conf":               "[Network]\n#ManageForeignRoutes=no\n",
		"etc/NetworkManager/NetworkManager.conf":  "[main]\nplugins=keyfile\n",
	})
	read := func(dir string, bridges ...netstate.PodBridge) (out []managerFacts) {
		for _, m := range managers() {
			out = append(out, m.read(root(dir), bridges))
		}
		return out
	}
	f := healthy(t)
	f.System.Managers = read(dir)
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
	f.System.Managers = read(dir, netstate.PodBridge{Name: "cni0"})
	for _, x := range judge(f) {
		if x.Mark == Warn || x.Mark == Fail {
			t.Errorf("%+v", x)
		}
	}
	if m := read(dir, netstate.PodBridge{Name: "br7"}); !reflect.DeepEqual(m[0].bridges, []string{"br7"}) {
		t.Errorf("%+v", m)
	}
	// No file is overwritten.
	for _, d := range Apply(report, dir, "/proc/sys") {
		if d.Err == "" {
			t.Errorf("%+v", d)
		}
	}
	// Of a program that has ended, files are left.
	ended := files(t, map[string]string{"run/systemd/netif/state": "", "proc/7/comm": "bash\n"})
	if m := read(ended); m[0].runs {
		t.Errorf("%+v", m)
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
	// A kernel that does not take the value is not taken to have it.
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
	got, err := parseEnv(
		"# comment\n; another\n\nA=1\n  B = two words  \nC=\"a # b\" \nD='x\\y'\nE=one\\\ntwo\nF=\nG=a\\ b\nA=2\nOVERLAYD_ETCD_PASSWORD=s3cret=\n",
	)
	want := map[string]string{
		"A":                      "2",
		"B":                      "two words",
		"C":                      "a # b",
		"D":                      `x\y`,
		"E":                      "onetwo",
		"F":                      "",
		"G":                      "a b",
		"OVERLAYD_ETCD_PASSWORD": "s3cret=",
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%q, %v", got, err)
	}
	// As systemd.exec(5) has it: in double quotes a backslash goes only before one of "\`$, in single ones never; quotes
	// count at the beginning.
	got, err = parseEnv(
		`A="C:\new \"x\" \\ \$y ` + "\\`" + `"` +
			"\nB=it's \"so\"  \nC='a\\b\\'\nD=\"one\ntwo\\\n three\"\nE=\"a\"'b' c \r\nF=x\\  \n# c \\\nG=1\nH=\"open\nI=1",
	)
	want = map[string]string{
		"A": `C:\new "x" \ $y ` + "`",
		"B": `it's "so"`,
		"C": `a\b\`,
		"D": "one\ntwo three",
		"E": "abc",
		"F": "x ",
		"G": "1",
		"H": "open\nI=1",
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%q, %v", got, err)
	}
	_, err = parseEnv("A=1\nexport B=2\nno sense s3cret\n")
	if err == nil || strings.Contains(err.Error(), "s3cret") || !strings.Contains(err.Error(), "line 2 ") ||
		!strings.Contains(err.Error(), "line 3 ") {
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
		{
			Check:   "forwarding",
			Mark:    Fail,
			Reason:  "net/ipv4/ip_forward is 0: this node passes no packets of pods on",
			Fix:     []string{"sysctl -w net/ipv4/ip_forward=1"},
			Fixable: true,
		},
		{Check: "clock", Mark: Skipped, Reason: "the store was not queried"},
		{Check: "offloads", Mark: Warn, Reason: "off"},
	}}
	var b strings.Builder
	if err := r.Print(&b, Style{}); err != nil {
		t.Fatal(err)
	}
	want := `ok    daemon      n1, ready
FAIL  forwarding  net/ipv4/ip_forward is 0: this node passes no packets of pods on
                  fix: sysctl -w net/ipv4/ip_forward=1
-     clock       not checked: the store was not queried
warn  offloads    off
1 fail, 1 warn, 1 ok, 1 not checked; overlayd doctor --fix fixes 1 of them
`
	if b.String() != want {
		t.Errorf("got\n%s", b.String())
	}
	b.Reset()
	if err := r.Print(&b, Style{Colour: true, Problems: true}); err != nil {
		t.Fatal(err)
	}
	want = "\x1b[31mFAIL\x1b[0m  forwarding  net/ipv4/ip_forward is 0: this node passes no packets of pods on\n" +
		"                  fix: sysctl -w net/ipv4/ip_forward=1\n" +
		"\x1b[33mwarn\x1b[0m  offloads    off\n1 fail, 1 warn, 1 ok, 1 not checked; overlayd doctor --fix fixes 1 of them\n"
	if b.String() != want {
		t.Errorf("got\n%q", b.String())
	}
}

var errAbsent = errors.New("no daemon")

// absent is a daemon that does not run.
func absent(context.Context, string, any) error { return errAbsent }

// What is tried is what this network needs, also where only its config says so.
func TestSupportOfHostGW(t *testing.T) {
	t.Parallel()
	state := files(
		t,
		map[string]string{
			"lease.json": `{"Node":{"NodeName":"n","NodeID":"i"},"Prefix":"/overlayd/network","Subnets":"10.244.1.0-24","Config":{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}}`,
		},
	)
	o := Options{
		Settings: Settings{
			Identity:   subnet.Identity{NodeName: "n", NodeID: "i"},
			Store:      Store{Etcd: etcd.Options{Endpoints: []string{"http://127.0.0.1:1"}}},
			StateDir:   state,
			SubnetFile: filepath.Join(state, "subnet.env"),
		},
		Ask:        absent,
		Owned:      func(string) bool { return false },
		NotRunning: func(err error) bool { return errors.Is(err, errAbsent) },
		Now:        time.Now,
	}
	var f Facts
	nstest.New(t).Do(func() { f = facts(t.Context(), o) })
	if s := f.System.Dirs; len(s) != 2 || s[0].dir != state || s[0].err != nil || s[0].bytes == 0 {
		t.Errorf("%+v", s)
	}
	tried := map[string]bool{}
	for _, s := range f.Support {
		tried[s.what] = s.err == nil
	}
	if !tried["address sets (ipset)"] || tried["VXLAN devices"] || !tried["firewall rules (nftables or iptables)"] {
		t.Errorf("%v", tried)
	}
}

// slowDaemon answers after a second, but for the list of its peers, which it does not give.
func slowDaemon(_ context.Context, path string, answer any) error {
	if path != "/status" {
		return errAbsent
	}
	time.Sleep(time.Second)
	*answer.(*status.Node) = status.Node{Name: "n", ID: "i", Ready: true, Network: status.Network{Backend: "vxlan"}}
	return nil
}

// A daemon that is busy for a second runs, and who the others are is asked elsewhere. Etcd is not asked later because
// of it.
func TestSlowDaemon(t *testing.T) {
	t.Parallel()
	state := files(
		t,
		map[string]string{
			"lease.json": `{"Node":{"NodeName":"n","NodeID":"i"},"Prefix":"/overlayd/network","Subnets":"10.244.1.0-24","Config":` + plainConfig +
				`,"Peers":[{"Key":"10.244.2.0-24","Value":{"PublicIP":"192.0.2.2","BackendType":"vxlan",` +
				`"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:02"},"NodeName":"n2"}}]}`,
		},
	)
	o := Options{
		Settings: Settings{
			Store:      Store{Etcd: etcd.Options{Endpoints: []string{"http://127.0.0.1:1"}}},
			StateDir:   state,
			SubnetFile: filepath.Join(state, "subnet.env"),
		},
		Ask:        slowDaemon,
		Owned:      func(string) bool { return false },
		NotRunning: func(err error) bool { return errors.Is(err, errAbsent) },
		Now:        time.Now,
	}
	var f Facts
	nstest.New(t).Do(func() { f = facts(t.Context(), o) })
	if !f.Daemon.Running || f.Daemon.Err != nil || f.Daemon.PeersErr == nil || f.Store == nil || f.Store.TableErr == nil ||
		f.PeersFrom != "the persisted state" ||
		len(f.Peers) != 1 {
		t.Errorf("%+v, peers %+v from %s", f.Daemon, f.Peers, f.PeersFrom)
	}
}

// mute is a daemon that does not answer.
func mute(ctx context.Context, _ string, _ any) error {
	<-ctx.Done()
	return errors.New("within 5s")
}

// An answer that is late is told by how long was waited for it.
func TestLateAnswer(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		d := askDaemon(t.Context(), Options{Ask: mute, NotRunning: func(error) bool { return false }})
		if d.Err == nil || !strings.Contains(d.Err.Error(), "no answer within 3s") || strings.Contains(d.Err.Error(), "5s") {
			t.Error(d.Err)
		}
	})
}

// Another store is asked where the daemon has another one than the settings.
func TestStoreOfTheDaemon(t *testing.T) {
	t.Parallel()
	asked := Store{Kind: status.Etcd, Etcd: etcd.Options{Endpoints: []string{"a"}, Prefix: "/p"}}
	for want, of := range map[bool][]func(*Store){
		true: {func(o *Store) { o.Etcd.Endpoints = []string{"a"} }},
		false: {
			func(o *Store) { o.Etcd.Endpoints = []string{"b"} }, func(o *Store) { o.Etcd.Prefix = "/q" },
			func(o *Store) { o.Kind = status.Kubernetes }, func(o *Store) { o.Kube.ConfigMap = "a/b" },
		},
	} {
		for _, change := range of {
			o := asked
			if change(&o); sameStore(asked, o) != want {
				t.Errorf("%+v: not %v", o, want)
			}
		}
	}
}

// A whole examination of a bare namespace, without daemon and etcd: what can be known is judged, the rest is not
// claimed.
func TestRunOnBareNode(t *testing.T) {
	t.Parallel()
	node := nstest.New(t)
	node.Exec("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
	node.Exec("ip", "link", "set", "eth1", "up")
	node.Addr("eth0", "192.0.2.1/24")
	node.Exec("ip", "route", "add", "default", "via", "192.0.2.254")
	state := files(
		t,
		map[string]string{
			"lease.json": `{"Node":{"NodeName":"n","NodeID":"i"},"Prefix":"/overlayd/network","Saved":"2026-01-01T00:00:00Z","Subnets":"10.244.1.0-24","Config":` + plainConfig +
				`,"Peers":[{"Key":"10.244.2.0-24","Value":{"PublicIP":"192.0.2.2","BackendType":"vxlan",` +
				`"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:02"},"NodeName":"n2"}}]}`,
		},
	)
	o := Options{
		Settings: Settings{
			Identity: subnet.Identity{
				NodeName: "n",
				NodeID:   "i",
			},
			Store:      Store{Etcd: etcd.Options{Endpoints: []string{"http://127.0.0.1:1"}}},
			StateDir:   state,
			SubnetFile: filepath.Join(state, "subnet.env"),
			ByDefault:  true,
		},
		Ask:        absent,
		Owned:      func(name string) bool { return name == "overlay.1" },
		NotRunning: func(err error) bool { return errors.Is(err, errAbsent) },
		Now:        time.Now,
		Ping: func(_ context.Context, to []netip.Addr, _, count int, _ time.Duration, _ bool) ([]ping.Outcome, error) {
			var out []ping.Outcome
			for _, a := range to {
				out = append(out, ping.Outcome{Addr: a, Sent: count, Lost: count})
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
		"daemon": {Fail, "does not run"}, "store": {Fail, "connection refused"}, "kernel": {OK, ""},
		"forwarding":    {Fail, "ip_forward is 0"},
		"tunnel device": {Fail, "overlay.1 does not exist"}, "routes": {Fail, "10.244.2.0/24 (n2)"},
		"subnet file": {Fail, "no pod can start"},
		"peers":       {OK, "1, as listed by the persisted state"}, "peers answer": {Fail, "1 of the 1 pinged does not answer"},
		"leases": {Skipped, "etcd does not answer"},
		"drift":  {Skipped, ""}, "privileges": {OK, ""},
	} {
		if f := got[check]; f.Mark != want.mark || !strings.Contains(f.Reason, want.text) {
			t.Errorf("%s: %+v", check, f)
		}
	}
	if left := node.Exec("ip", "-br", "link"); strings.Contains(left, netstate.DeviceForTrial) {
		t.Errorf("the trial is visible: %s", left)
	}
}
