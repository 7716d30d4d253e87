package main_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/internal/ping"
	"github.com/overlayd/overlayd/test/lab"
	"github.com/overlayd/overlayd/test/labtest"
	"github.com/overlayd/overlayd/test/nstest"
)

func TestMain(m *testing.M) { os.Exit(labtest.Main(m)) }

// state is what the kernel of a node has, as the system's own tools say it.
func state(t *testing.T, n *lab.Node) string {
	t.Helper()
	var out strings.Builder
	for _, c := range []string{
		"ip -d link show type vxlan", "ip address show",
		"ip route show table all", "ip -6 route show table all", "ip rule", "ip -6 rule",
		"ip neigh show nud permanent", "ip -6 neigh show nud permanent", "iptables-save", "ip6tables-save",
	} {
		text, err := n.Run(t.Context(), "sh", "-c", c)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&out, "# %s\n%s", c, text)
	}
	// Only VXLAN has forwarding entries with a destination; those of the pods' bridge come and go.
	text, err := n.Run(t.Context(), "sh", "-c", "bridge fdb show | grep ' dst ' | sort")
	if err != nil && !strings.Contains(err.Error(), "exit status 1") {
		t.Fatal(err)
	}
	return stable(out.String() + text)
}

// stable leaves out what changes by itself: counters, times and dates.
func stable(s string) string {
	var out []string
	for line := range strings.Lines(s) {
		if strings.HasPrefix(line, "#") && !strings.HasPrefix(line, "# ip") {
			continue
		}
		if strings.Contains(line, "fe80:") { // comes a while after a device, when the kernel knows that it is unique
			continue
		}
		if i := strings.Index(line, "["); strings.HasPrefix(line, ":") && i > 0 {
			line = line[:i] + "\n"
		}
		out = append(out, line)
	}
	return strings.Join(out, "")
}

// revision is the store's, which grows with every write.
func revision(t *testing.T, l *lab.Lab) int64 {
	t.Helper()
	m, err := l.Machine("etcd")
	if err != nil {
		t.Fatal(err)
	}
	out, err := m.Run(t.Context(), "etcdctl", "--endpoints", l.Etcd().URLs()[0], "get", "no-such-key", "-w", "json")
	if err != nil {
		t.Fatal(err)
	}
	var doc struct{ Header struct{ Revision int64 } }
	if err := json.Unmarshal([]byte(out), &doc); err != nil || doc.Header.Revision == 0 {
		t.Fatalf("etcdctl printed %q: %v", out, err)
	}
	return doc.Header.Revision
}

// watchKernel writes down what changes in a node's kernel until stop is called. The neighbours of the pods' bridge are
// not ours.
func watchKernel(t *testing.T, n *lab.Node) (stop func() string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var out output
	cmd := exec.CommandContext(ctx, "sh", "-c", "exec ip -o monitor link address route rule neigh")
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &out, &out, time.Second
	if err := n.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	// It does not say when it is ready, nor that it has ended: it has to print a route in an unused table, before and
	// after.
	prints := func(route string) {
		t.Helper()
		for end := time.Now().Add(patience); !strings.Contains(out.String(), route); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("ip monitor does not print the route to %s:\n%s", route, out.String())
			}
			script := fmt.Sprintf("ip route add blackhole %[1]s table 77; ip route del blackhole %[1]s table 77", route)
			if text, err := n.Run(t.Context(), "sh", "-ec", script); err != nil {
				t.Fatal(err, text)
			}
		}
	}
	prints("203.0.113.1")
	return func() string {
		t.Helper()
		prints("203.0.113.2")
		cancel()
		_ = cmd.Wait()
		var ours []string
		for line := range strings.Lines(out.String()) {
			if strings.Contains(line, "overlay") || strings.Contains(line, "proto 118") || strings.Contains(line, "lookup 118") {
				ours = append(ours, line)
			}
		}
		return strings.Join(ours, "")
	}
}

// output is what a program has printed so far.
type output struct {
	mu   sync.Mutex
	text strings.Builder
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// Restarting a daemon loses no packet, writes nothing to etcd, and changes nothing in the kernel.
func TestRestartChangesNothing(t *testing.T) {
	t.Parallel()
	overlayd := labtest.BuildOverlayd(t)
	for _, o := range []lab.Options{
		{Backend: lab.VXLAN, Stack: lab.StackDual},
		{Backend: lab.VXLAN, Direct: true},
		{Backend: lab.HostGW},
	} {
		o.Overlayd = overlayd
		t.Run(fmt.Sprintf("%s direct=%v %s", o.Backend, o.Direct, o.Stack), func(t *testing.T) {
			t.Parallel()
			l := labtest.Up(t, o)
			labtest.Check(t, l)
			n2 := l.Node(2)
			for name, stopIt := range map[string]func(context.Context) error{"stopped": n2.Stop, "killed": n2.Kill} {
				streams := stream(t, l)
				before, at := state(t, n2), revision(t, l)
				stopMonitor := watchKernel(t, n2)
				if err := stopIt(t.Context()); err != nil {
					t.Fatal(err)
				}
				if err := n2.Start(); err != nil {
					t.Fatal(err)
				}
				if err := n2.WaitReady(t.Context()); err != nil {
					t.Fatal(err)
				}
				time.Sleep(500 * time.Millisecond) // for what might come late
				if events := stopMonitor(); events != "" {
					t.Errorf("%s: the kernel was changed:\n%s", name, events)
				}
				if after := state(t, n2); after != before {
					t.Errorf("%s: before:\n%s\nafter:\n%s", name, before, after)
				}
				if now := revision(t, l); now != at {
					t.Errorf("%s: etcd went from revision %d to %d", name, at, now)
				}
				for what, s := range streams {
					if st := s.Stop(lab.LateAnswer); st.Lost > 0 || st.Sent < 50 {
						t.Errorf("%s: %s: %d of %d pings lost, longest gap %v", name, what, st.Lost, st.Sent, st.Gap)
					}
				}
			}
		})
	}
}

// stream pings every 10 ms between pods on different nodes, to and from the second node.
func stream(t *testing.T, l *lab.Lab) map[string]*ping.Stream {
	t.Helper()
	out := map[string]*ping.Stream{}
	for _, pair := range [][2]int{{1, 2}, {2, 3}, {3, 1}} {
		from, err := l.PodEndpoint(pair[0], 1)
		if err != nil {
			t.Fatal(err)
		}
		to, err := l.PodEndpoint(pair[1], 1)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range addr.Families() {
			if !to.Addr.Get(f).IsValid() {
				continue
			}
			s, err := from.StreamPing(t.Context(), to.Addr.Get(f), 10*time.Millisecond)
			if err != nil {
				t.Fatal(err)
			}
			out[fmt.Sprintf("%s to %s %s", from.Name, to.Name, f)] = s
		}
	}
	return out
}

// A second daemon on a node does not start, `leases` shows what there is, and `cleanup` leaves the node as it was.
func TestOperatorCommands(t *testing.T) {
	t.Parallel()
	overlayd := labtest.BuildOverlayd(t)
	// Whatever the environment says of proxies (there is none at this address), etcd is asked directly. gRPC is silent,
	// however much the environment asks it to say.
	env := []string{
		"HTTPS_PROXY=http://192.0.2.1:3128", "HTTP_PROXY=http://192.0.2.1:3128", "ALL_PROXY=socks5://192.0.2.1:1080",
		"https_proxy=http://192.0.2.1:3128",
		"GRPC_GO_LOG_SEVERITY_LEVEL=info", "GRPC_GO_LOG_VERBOSITY_LEVEL=99",
		"OVERLAYD_IFACES=eth7", "OVERLAYD_SERVICE_HOST=10.96.0.9",
	}
	l := labtest.Up(t, lab.Options{
		Backend: lab.VXLAN, Direct: true, Stack: lab.StackDual, Overlayd: overlayd, Nodes: 3,
		OverlaydEnv: env, OverlaydArgs: []string{"--log-format", "json"},
	})
	n1 := l.Node(1)
	common := []string{
		"--etcd-endpoints", strings.Join(l.Etcd().URLs(), ","), "--node-name", n1.Name, "--node-id", n1.Spec().ID,
		"--state-dir", n1.StateDir(), "--subnet-file", n1.SubnetFile(),
	}
	run := func(args ...string) (string, error) {
		return n1.Run(t.Context(), "env", append(append(append(slices.Clone(env), overlayd), args...), common...)...)
	}

	log, err := os.ReadFile(n1.Log())
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(log)) {
		if !json.Valid([]byte(line)) {
			t.Errorf("another logger than overlayd's wrote %q", line)
		}
	}
	if !strings.Contains(string(log), `"msg":"unknown environment variables","variables":["OVERLAYD_IFACES"]`) {
		t.Errorf("it does not warn about the variable that it does not know:\n%s", log)
	}
	// Commands find the store without being told: by the daemon, and by its settings.
	file := filepath.Join(t.TempDir(), "overlayd.env")
	settings := fmt.Sprintf("OVERLAYD_ETCD_ENDPOINTS=%q\nOVERLAYD_NODE_NAME=%s\nOVERLAYD_NODE_ID=%s\nOVERLAYD_SOCKET=%s\n",
		strings.Join(l.Etcd().URLs(), ","), n1.Name, n1.Spec().ID, n1.Socket())
	if err := os.WriteFile(file, []byte(settings), 0o600); err != nil {
		t.Fatal(err)
	}
	finds := func(rc string, args ...string) string {
		t.Helper()
		out, err := n1.Run(t.Context(), overlayd, args...)
		if text := fmt.Sprint(err); (rc != "") != (err != nil) || !strings.Contains(text, rc) {
			t.Errorf("%s: %v\n%s", args, err, out)
		}
		return out
	}
	for _, args := range [][]string{
		{"--socket", n1.Socket(), "--env-file", "/none"}, {"--env-file", file, "--socket", "/none"}, {"--env-file", file},
	} {
		out := finds("", append([]string{"leases"}, args...)...)
		if strings.Count(out, "mine") != 1 || strings.Count(out, "other") != 2 {
			t.Errorf("leases %s:\n%s", args, out)
		}
	}
	if out := finds("", "status", "--env-file", file); !strings.Contains(out, n1.Name) {
		t.Errorf("status --env-file:\n%s", out)
	}
	finds("exit status 1", "leases", "--env-file", file, "--etcd-endpoints", "http://127.0.0.1:1") // the command line wins
	out, _ := run("doctor", "--env-file", "/none", "--socket", n1.Socket())
	if !strings.Contains(out, "2 of 2 endpoints answer") || strings.Contains(out, "[core]") {
		t.Errorf("doctor:\n%s", out)
	}
	if out, err := run("--healthz-port", "0"); err == nil || !strings.Contains(out, "another overlayd is running") {
		t.Errorf("a second daemon: %v\n%s", err, out)
	}
	if out, err := run("cleanup"); err == nil || !strings.Contains(out, "stop it first") {
		t.Errorf("cleanup beside the daemon: %v\n%s", err, out)
	}

	out, err = run("leases")
	if err != nil || strings.Count(out, "mine") != 1 || strings.Count(out, "other") != 2 ||
		strings.Contains(out, "[core]") {
		t.Errorf("leases: %v\n%s", err, out)
	}
	out, err = run("leases", "-o", "json")
	var rows []struct {
		Subnets   []netip.Prefix
		Node      string
		PublicIPs []netip.Addr
		Expires   time.Time
		Mine      bool
	}
	if err != nil || json.Unmarshal([]byte(out), &rows) != nil || len(rows) != 3 {
		t.Fatalf("leases -o json: %v\n%s", err, out)
	}
	for _, r := range rows {
		if len(r.Subnets) != 2 || len(r.PublicIPs) != 2 || r.Mine != (r.Node == n1.Name) ||
			time.Until(r.Expires) < 23*time.Hour {
			t.Errorf("row %+v", r)
		}
	}
	cli, err := l.EtcdClient()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cli.Close() }()
	for key, value := range map[string]string{
		"10.244.254.0-24": `{"PublicIP":"172.31.1.99","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,` +
			`"VtepMAC":"02:00:00:00:00:09"}}`,
		"10.99.0.0-24": "", "10.99.1.0-24": "{}",
	} {
		if _, err := cli.Put(t.Context(), "/overlayd/network/subnets/"+key, value); err != nil {
			t.Fatal(err)
		}
	}
	const harms = `warning: the value of "10.99.0.0-24" is not JSON, which makes the flannel nodes ` +
		`of this network drop all their peers: put '{}' instead`
	if out, err := run("leases"); err != nil || strings.Count(out, "warning") != 1 || !strings.Contains(out, harms) {
		t.Errorf("leases beside flannel: %v\n%s", err, out)
	}

	// Beside rules of another program, there are more of ours.
	if out, err := n1.Run(t.Context(), "sh", "-ec",
		"ip rule add pref 5270 lookup 52; ip -6 rule add pref 5270 lookup 52"); err != nil {
		t.Fatal(err, out)
	}
	for end := time.Now().Add(patience); strings.Count(state(t, n1), "5269:") < 4; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no rules of ours come before others:\n%s", state(t, n1))
		}
	}
	if err := n1.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out, err := run("cleanup"); err != nil {
		t.Fatalf("cleanup: %v\n%s", err, out)
	}
	left := state(t, n1)
	for _, mark := range []string{"overlay.", "overlay-v6", "proto 118", "lookup 118", "OVERLAYD", "overlayd-nodes"} {
		if strings.Contains(left, mark) {
			t.Errorf("cleanup left %q:\n%s", mark, left)
		}
	}
	for _, want := range []string{"default via", "cni0", "5270:"} {
		if !strings.Contains(left, want) {
			t.Errorf("cleanup took %q away:\n%s", want, left)
		}
	}
	if sets, err := n1.Run(t.Context(), "ipset", "list", "-n"); err != nil || sets != "" {
		t.Errorf("address sets left: %v %q", err, sets)
	}
	dir := n1.StateDir()
	for _, f := range []string{n1.SubnetFile(), filepath.Join(dir, "lease.json"), filepath.Join(dir, "peers.json")} {
		if _, err := os.Stat(f); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", f, err)
		}
	}
	if out, err := run("cleanup"); err != nil || strings.TrimSpace(out) != "" {
		t.Errorf("a second cleanup: %v\n%s", err, out)
	}
}

// The daemon is one static file of at most 45 MB, and the etcd server is not in it.
func TestBinary(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "overlayd")
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	info, err := os.Stat(path)
	if err != nil || info.Size() > 45<<20 {
		t.Errorf("%d bytes, %v", info.Size(), err)
	}
	// ldd says so of a static file, with exit status 1.
	out, _ := exec.CommandContext(t.Context(), "ldd", path).CombinedOutput()
	if !strings.Contains(string(out), "not a dynamic executable") {
		t.Errorf("ldd: %s", out)
	}
	deps, err := exec.CommandContext(t.Context(), "go", "list", "-deps", ".").Output()
	if err != nil || !strings.Contains(string(deps), "go.etcd.io/etcd/client/v3") {
		t.Fatalf("go list: %v", err)
	}
	if strings.Contains(string(deps), "go.etcd.io/etcd/server") {
		t.Error("the etcd server is linked into the daemon")
	}
	for _, arg := range []string{"version", "--version", "-version"} {
		out, err := exec.CommandContext(t.Context(), path, arg).Output()
		if err != nil || !strings.HasPrefix(string(out), "overlayd ") || strings.Count(string(out), "\n") != 1 {
			t.Errorf("%s: %v %s", arg, err, out)
		}
	}
}

// What the operator gave wrong is one line that names it, and exit status 2.
func TestWrongOptions(t *testing.T) {
	t.Parallel()
	nstest.NeedRoot(t)
	overlayd := labtest.BuildOverlayd(t)
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience) // a daemon that accepts its options runs on
	defer cancel()
	for _, tt := range []struct {
		args []string
		env  string
		want string
	}{
		{[]string{"--no-such-flag"}, "", "--no-such-flag"},
		{[]string{"nonsense"}, "", `"nonsense"`},
		{[]string{"--etcd-endpoints", "ftp://x"}, "", "--etcd-endpoints"},
		{[]string{"--etcd-endpoints", "https://127.0.0.1:1", "--etcd-cafile", dir + "/none"}, "", "--etcd-cafile"},
		{[]string{"--lease-ttl=-1s"}, "", "--lease-ttl: expected a duration such as 10s, at least 1s"},
		{[]string{"--public-ip", "fd00::1"}, "", "--public-ip: expected an IPv4 address"},
		{[]string{"--iface-regex", "("}, "", "--iface-regex"},
		// a comma is part of the pattern, as in flannel
		{[]string{"--iface-regex", "eth[0-9]{1,2}", "-iface-regex=)"}, "", `found ")"`},
		{[]string{"-public-ip", "nix"}, "", "--public-ip: expected an IPv4 address"},
		{[]string{"-v=2"}, "", "-v"},
		{[]string{"--iface-can-reach", "moon"}, "", "--iface-can-reach"},
		{[]string{"--ip-masq-exclude", "10.0.0.0"}, "", "--ip-masq-exclude"},
		{[]string{"--iptables-resync", "0"}, "", "--iptables-resync"},
		{[]string{"--iptables-variant", "ebtables"}, "", "--iptables-variant"},
		{[]string{"--firewall", "ebtables"}, "", "--firewall"},
		{[]string{"--log-level", "loud"}, "", "--log-level"},
		{[]string{"--log-format", "xml"}, "", "--log-format"},
		{[]string{"--healthz-ip", "here"}, "", "--healthz-ip: expected an IP address"},
		{[]string{"cleanup", "--subnet-file", ""}, "", "--subnet-file: expected a value"},
		{[]string{"--healthz-port", "65536"}, "", `--healthz-port: expected 0 to 65535, found "65536"`},
		{[]string{"--pprof", "65536"}, "", "--pprof"},
		{[]string{"--etcd-endpoints", "http://127.0.0.1:70000"}, "", "--etcd-endpoints: expected a port from 1 to 65535"},
		{
			[]string{"leases", "--etcd-endpoints", "http://127.0.0.1:70000"},
			"",
			"--etcd-endpoints: expected a port from 1 to 65535",
		},
		{nil, "OVERLAYD_ETCD_ENDPOINTS=fd00::1", "--etcd-endpoints: an IPv6 address needs brackets"},
		{[]string{"--etcd-endpoints", "srv://example.net"}, "", "--etcd-endpoints: DNS SRV records are not looked up"},
		{[]string{"--init-config", dir + "/none"}, "", "--init-config"},
		{[]string{"--init-config", file("broken.json", `{"Network": "10.0.0.0/16"`)}, "", "expected a JSON object"},
		{
			[]string{"--init-config", file("type.json", `{"Network": "10.0.0.0/16", "Backend": {"Type": "ipip"}}`)},
			"",
			`Backend.Type: expected "vxlan", "host-gw" or "wireguard", found "ipip"`,
		},
		{nil, "OVERLAYD_IP_MASQ=perhaps", "OVERLAYD_IP_MASQ"},
		{[]string{"--log-level", "loud"}, "OVERLAYD_VERSION=v1", "--log-level"}, // no flag is set by it
		{[]string{"leases", "-o", "xml"}, "", "--output"},
	} {
		cmd := exec.CommandContext(ctx, overlayd, append(tt.args, "--state-dir", dir)...)
		cmd.Env = append(os.Environ(), tt.env)
		out, err := cmd.CombinedOutput()
		text := string(out)
		if cmd.ProcessState.ExitCode() != 2 || strings.Count(text, "\n") != 1 || !strings.Contains(text, tt.want) {
			t.Errorf("overlayd %s %s: %v\n%s", tt.env, strings.Join(tt.args, " "), err, text)
		}
	}
}

// Without privileges the daemon says so in one line.
func TestNoPrivileges(t *testing.T) {
	t.Parallel()
	nstest.NeedRoot(t)
	overlayd := labtest.BuildOverlayd(t)
	cmd := exec.CommandContext(t.Context(), "setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin",
		overlayd, "--state-dir", t.TempDir(), "--healthz-port", "0")
	out, err := cmd.CombinedOutput()
	if err == nil || strings.Count(string(out), "\n") != 1 || !strings.Contains(string(out), "CAP_NET_ADMIN is missing") {
		t.Errorf("%v\n%s", err, out)
	}
}

// The daemon waits for what can heal by itself: etcd that is not there yet, a config that is missing or wrong, an
// interface that is missing.
func TestWaitsForWhatCanHeal(t *testing.T) {
	t.Parallel()
	l := labtest.Up(t, lab.Options{Backend: lab.VXLAN, Overlayd: labtest.BuildOverlayd(t), Nodes: 2, Pods: 1})
	n1 := l.Node(1)
	etcd, err := l.Machine("etcd")
	if err != nil {
		t.Fatal(err)
	}
	put := func(config string) {
		t.Helper()
		args := []string{"--endpoints", l.Etcd().URLs()[0], "put", "/overlayd/network/config", config}
		if _, err := etcd.Run(t.Context(), "etcdctl", args...); err != nil {
			t.Fatal(err)
		}
	}
	good := `{"Network":"10.244.0.0/16"}`

	put(`{"Network":"10.244.0.0/16","Backend":{"Type":"carrier-pigeon"}}`)
	waitLog(t, n1, `Backend.Type: expected \"vxlan\", \"host-gw\" or \"wireguard\", found \"carrier-pigeon\"`)
	labtest.Check(t, l) // a config that can't be used changes nothing
	put(`{"Network":`)
	waitLog(t, n1, "expected a JSON object")
	put(good)
	waitLog(t, n1, `condition recovered	{"condition": "config"`)

	stop(t, n1)
	if err := n1.LinkDown(); err != nil {
		t.Fatal(err)
	}
	if err := n1.Start(); err != nil {
		t.Fatal(err)
	}
	waitLog(t, n1, "refused|unreachable|no route|cannot be reached|not answer")
	if err := n1.LinkUp(); err != nil {
		t.Fatal(err)
	}
	if err := n1.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	labtest.Check(t, l)
}

func stop(t *testing.T, n *lab.Node) {
	t.Helper()
	if err := n.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// waitLog waits for one of several texts in the log that a node wrote since its last start.
func waitLog(t *testing.T, n *lab.Node, texts string) {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		b, err := os.ReadFile(n.Log())
		if err != nil {
			t.Fatal(err)
		}
		at := max(strings.LastIndex(string(b), "overlayd starting"), 0)
		for text := range strings.SplitSeq(texts, "|") {
			if strings.Contains(string(b[at:]), text) {
				return
			}
		}
	}
	t.Errorf("%s never logged %q", n.Name, texts)
}

// An unreachable etcd is one clear line, and the daemon goes on trying.
func TestUnreachableEtcd(t *testing.T) {
	t.Parallel()
	nstest.NeedRoot(t)
	overlayd := labtest.BuildOverlayd(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	endpoint := "http://" + l.Addr().String()
	_ = l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, overlayd, "--etcd-endpoints", endpoint, "--state-dir", t.TempDir(),
		"--subnet-file", t.TempDir()+"/subnet.env", "--socket", "", "--healthz-port", "0")
	var out output
	cmd.Stdout, cmd.Stderr = &out, &out
	nstest.New(t).Do(func() { err = cmd.Start() })
	if err != nil {
		t.Fatal(err)
	}
	for ctx.Err() == nil && !strings.Contains(out.String(), "connection refused") {
		time.Sleep(50 * time.Millisecond)
	}
	time.Sleep(4 * time.Second) // it goes on trying, and says no more of it
	if err := errors.Join(cmd.Process.Signal(os.Interrupt), cmd.Wait()); err != nil {
		t.Errorf("after SIGINT: %v\n%s", err, out.String())
	}
	if n := strings.Count(out.String(), "connection refused"); n == 0 || n > 3 {
		t.Errorf("the connection error was named %d times:\n%s", n, out.String())
	}
}

// Leases that make no sense are left out by name, and do not affect other peers.
func TestNonsenseLeases(t *testing.T) {
	t.Parallel()
	l := labtest.Up(t, lab.Options{Backend: lab.VXLAN, Overlayd: labtest.BuildOverlayd(t), Nodes: 3, Pods: 1})
	etcd, err := l.Machine("etcd")
	if err != nil {
		t.Fatal(err)
	}
	put := func(key, value string, more ...string) {
		t.Helper()
		args := []string{"--endpoints", l.Etcd().URLs()[0], "put", "/overlayd/network/subnets/" + key, "--", value}
		args = append(args, more...)
		if _, err := etcd.Run(t.Context(), "etcdctl", args...); err != nil {
			t.Fatal(err)
		}
	}
	labtest.Check(t, l) // ready is a node by itself; all know each other a moment later
	n1, n2 := l.Node(1), l.Node(2)
	lease2, err := n2.Lease()
	if err != nil {
		t.Fatal(err)
	}
	good := func(ip, mac string) string {
		const lease = `{"PublicIP":%q,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":%q},"PublicIPLocal":true}`
		return fmt.Sprintf(lease, ip, mac)
	}
	// free gives a key that no node holds: the nodes' own are chosen by hash.
	next := 2
	free := func() string {
		for {
			next++
			key := fmt.Sprintf("10.244.%d.0-24", next)
			if !slices.ContainsFunc(l.Nodes(), func(n *lab.Node) bool {
				lease, err := n.Lease()
				return err != nil || strings.HasPrefix(key, lease.Subnets[0].Addr().String()+"-")
			}) {
				return key
			}
		}
	}
	before := state(t, n1)
	for _, kv := range [][2]string{
		{"10.244.300.0-24", good("172.31.1.99", "02:00:00:00:00:01")},
		{strings.Replace(free(), ".0-24", ".7-24", 1), good("172.31.1.99", "02:00:00:00:00:01")},
		{"172.31.1.0-24", good("172.31.1.99", "02:00:00:00:00:02")}, // the underlay itself
		{"0.0.0.0-0", good("172.31.1.99", "02:00:00:00:00:03")},
		{"172.31.100.0-24", good("172.31.1.99", "02:00:00:00:00:04")}, // etcd's network
		{"10.244.0.0-16", good("172.31.1.99", "02:00:00:00:00:05")},
		{lease2.Subnets[0].Addr().String() + "-25", good("172.31.1.99", "02:00:00:00:00:06")}, // in the subnet of n2
		{free(), good(n1.Addr(addr.IPv4).String(), "02:00:00:00:00:07")},
		{free(), good("10.244.9.9", "02:00:00:00:00:08")},
		{free(), good("224.0.0.1", "02:00:00:00:00:09")},
		{free(), good("255.255.255.255", "02:00:00:00:00:0a")},
		{free(), good("127.0.0.1", "02:00:00:00:00:0b")},
		{free(), good("0.0.0.0", "02:00:00:00:00:0c")},
		{free(), good("172.31.1.99", "00:00:00:00:00:00")},
		{free(), good("172.31.1.99", "ff:ff:ff:ff:ff:ff")},
		{free(), strings.Replace(good("172.31.1.99", "02:00:00:00:00:0d"), `"VNI":1`, `"VNI":2`, 1)},
		{free(), `{"PublicIP":`},
		{free(), `{"PublicIP":"172.31.1.99"}`},
	} {
		put(kv[0], kv[1])
	}
	waitLog(t, n1, "and 8 more") // of 18, ten are named
	labtest.Check(t, l)
	if after := state(t, n1); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// What the commands print on a node that is ready, while something is wrong, and where no daemon runs.
func TestStatusCommands(t *testing.T) {
	t.Parallel()
	overlayd := labtest.BuildOverlayd(t)
	l := labtest.Up(t, lab.Options{Overlayd: overlayd, Pods: 1})
	n := l.Node(1)
	try := func(args ...string) (out string, code int) {
		t.Helper()
		out, err := n.Run(t.Context(), overlayd, append(args, "--socket", n.Socket())...)
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			return out + err.Error(), exit.ExitCode()
		} else if err != nil {
			t.Fatal(err)
		}
		return out, 0
	}
	run := func(want int, args ...string) string {
		t.Helper()
		out, code := try(args...)
		if code != want {
			t.Errorf("overlayd %s ends with %d, want %d:\n%s", args, code, want, out)
		}
		return out
	}
	// says waits until `overlayd status` says a text.
	says := func(want int, text string) string {
		t.Helper()
		out, code := try("status")
		for end := time.Now().Add(patience); !strings.Contains(out, text) && time.Now().Before(end); {
			time.Sleep(50 * time.Millisecond)
			out, code = try("status")
		}
		if code != want {
			t.Errorf("overlayd status ends with %d, want %d:\n%s", code, want, out)
		}
		return out
	}
	expect := func(out string, parts ...string) {
		t.Helper()
		for _, p := range parts {
			if !strings.Contains(out, p) {
				t.Errorf("no %q in\n%s", p, out)
			}
		}
	}
	// A node that is ready learns of those that come after it a moment later.
	expect(says(0, "2: 2 tunnel"), "n1 (id ", "ready", "http://172.31.100.2:2379", "172.31.1.11 on eth0",
		"overlay.1, VNI 1", "2: 2 tunnel", "iptables", "none since start")
	expect(run(0, "status", "--peers"), "n2", "n3", "tunnel")
	expect(run(0, "status", "--peer", "n2"), "172.31.2.12", "fdb ", "neighbour ", "route ")
	expect(run(0, "status", "--peer", "172.31.2.12", "-o", "json"), `"name": "n2"`, `"path": "tunnel"`)
	expect(run(1, "status", "--peer", "nobody"), `no peer has the name, ID, subnet or address "nobody"`)
	expect(run(0, "status", "--explain"), "it has the default route")
	var doc struct {
		Ready bool
		Peers struct{ Total int }
	}
	err := json.Unmarshal([]byte(run(0, "status", "-o", "json")), &doc)
	if err != nil || !doc.Ready || doc.Peers.Total != 2 {
		t.Errorf("%+v, %v", doc, err)
	}
	text, err := n.Get(t.Context(), "http://127.0.0.1:8471/status")
	if err != nil || !strings.Contains(text, `"ready":true`) {
		t.Errorf("/status: %s, %v", text, err)
	}
	if out := run(0, "diff"); out != "" {
		t.Errorf("diff on a node that is well:\n%s", out)
	}
	expect(run(0, "log-level"), "info")
	expect(run(0, "log-level", "debug"), "debug")
	expect(run(1, "log-level", "loud"), "loud")

	// A route that another process deletes is put back, and counted.
	script := "ip route del $(ip route show proto 118 | head -1 | cut -d' ' -f1)"
	if _, err := n.Run(t.Context(), "sh", "-c", script); err != nil {
		t.Fatal(err)
	}
	expect(says(0, "route: 1, last add route 10.244."), "Drift", "route: 1, last add route 10.244.")

	// An address that is gone is a problem with a name and a reason.
	if err := n.LinkDown(); err != nil {
		t.Fatal(err)
	}
	expect(says(1, "underlay: no network interface"), "NOT READY", "underlay: no network interface")
	if err := n.LinkUp(); err != nil {
		t.Fatal(err)
	}
	if err := n.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(n.Socket()); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", st, err)
	}
	if err := n.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"status", "diff", "log-level"} {
		expect(run(2, command), "overlayd does not run on this node")
	}
}
