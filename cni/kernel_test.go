package cni_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
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

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/overlayd/overlayd/cni"
	"github.com/overlayd/overlayd/test/nstest"
)

// These tests run the real programs: overlay-cni, the reference plugins and cnitool, in network namespaces.

func TestMain(m *testing.M) {
	code := m.Run()
	if dir := builtIn; dir != "" {
		_ = os.RemoveAll(dir)
	}
	os.Exit(code)
}

var (
	buildOnce sync.Once
	builtIn   string
	errBuild  error
)

// programs builds all that is needed once for all tests, and gives the directory.
func programs(t testing.TB) string {
	t.Helper()
	nstest.NeedRoot(t)
	buildOnce.Do(func() {
		if builtIn, errBuild = os.MkdirTemp("", "overlay-cni-test-"); errBuild != nil {
			return
		}
		const plugins = "github.com/containernetworking/plugins/plugins/"
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", builtIn+"/",
			"github.com/overlayd/overlayd/cmd/overlay-cni",
			"github.com/containernetworking/cni/cnitool",
			plugins+"main/bridge", plugins+"main/ptp", plugins+"main/macvlan", plugins+"ipam/host-local", plugins+"meta/portmap",
			plugins+"meta/bandwidth")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			errBuild = fmt.Errorf("%w\n%s", err, out)
		}
	})
	if errBuild != nil {
		t.Fatalf("build the plugins: %v", errBuild)
	}
	return builtIn
}

// node is a machine: a namespace in which the plugins run, and its files.
type node struct {
	testing.TB
	*nstest.NS
	dir string
	// the network's name: the plugin finds what is kept of it in other directories, too, and tests run beside each other
	net string
	cni *libcni.CNIConfig
}

func newNode(t testing.TB) *node {
	t.Helper()
	n := &node{TB: t, NS: nstest.New(t), dir: t.TempDir(), net: fmt.Sprintf("pods%d", rand.Uint32())}
	for _, dir := range []string{"kept", "kept-now"} { // the plugin makes none here
		if err := os.Mkdir(filepath.Join(n.dir, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { // where the plugin notes which directories a list has named
		links, _ := filepath.Glob(filepath.Join(cni.DefaultDataDir, ".dirs", "*"))
		for _, l := range links {
			if to, err := os.Readlink(l); err == nil && strings.HasPrefix(to, n.dir) {
				_ = os.Remove(l)
			}
		}
	})
	// Given its exec, since it would make that one at its first use, which may be several at once.
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{programs(t)}, filepath.Join(n.dir, "cache"),
		&invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: os.Stderr}})
	return n
}

func (n *node) env(text string) {
	n.Helper()
	path := filepath.Join(n.dir, "subnet.env")
	var err error
	if text == "" {
		err = os.Remove(path)
	} else {
		err = os.WriteFile(path+".new", []byte(text), 0o644)
		err = errors.Join(err, os.Rename(path+".new", path))
	}
	if err != nil {
		n.Error(err)
	}
}

// list is a network of overlay-cni and what follows it.
func (n *node) list(version, delegate string, chained ...string) *libcni.NetworkConfigList {
	n.Helper()
	plugin := fmt.Sprintf(`{"type":"overlay-cni","subnetFile":%q,"dataDir":%q,"waitSeconds":60,"ipam":{"dataDir":%q},"delegate":%s}`,
		filepath.Join(n.dir, "subnet.env"), filepath.Join(n.dir, "kept"), filepath.Join(n.dir, "ips"), delegate)
	version = fmt.Sprintf("%q", version)
	l, err := libcni.ConfListFromBytes(fmt.Appendf(nil, `{"cniVersion":%s,"name":%q,"plugins":[%s]}`,
		version, n.net, strings.Join(append([]string{plugin}, chained...), ",")))
	if err != nil {
		n.Fatal(err)
	}
	return l
}

// pod is a container's namespace, and how the runtime calls it.
type pod struct {
	*nstest.NS
	rt  *libcni.RuntimeConf
	ips []netip.Prefix
}

func newPod(t testing.TB, id string) *pod {
	t.Helper()
	ns := nstest.New(t)
	return &pod{NS: ns, rt: &libcni.RuntimeConf{
		ContainerID: id, IfName: "eth0",
		NetNS: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.FD()),
	}}
}

func (n *node) add(l *libcni.NetworkConfigList, p *pod) error {
	n.Helper()
	var result types.Result
	var err error
	n.Do(func() { result, err = n.cni.AddNetworkList(context.Background(), l, p.rt) })
	if err != nil {
		return err
	}
	r, err := current.NewResultFromResult(result)
	if err != nil {
		return err
	}
	p.ips = nil
	for _, ip := range r.IPs {
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		ones, _ := ip.Address.Mask.Size()
		p.ips = append(p.ips, netip.PrefixFrom(a.Unmap(), ones))
	}
	return nil
}

func (n *node) check(l *libcni.NetworkConfigList, p *pod) (err error) {
	n.Helper()
	n.Do(func() { err = n.cni.CheckNetworkList(context.Background(), l, p.rt) })
	return err
}

func (n *node) del(l *libcni.NetworkConfigList, p *pod) (err error) {
	n.Helper()
	n.Do(func() { err = n.cni.DelNetworkList(context.Background(), l, p.rt) })
	return err
}

func (n *node) must(err error) {
	n.Helper()
	if err != nil {
		n.Fatal(err)
	}
}

// left lists what the plugins still keep of attachments.
func (n *node) left() []string {
	n.Helper()
	var left []string
	for _, dir := range []string{"kept", "ips"} {
		err := filepath.WalkDir(filepath.Join(n.dir, dir), func(path string, d os.DirEntry, err error) error {
			name := filepath.Base(path)
			if err == nil && !d.IsDir() && name != "lock" && name != ".boot" && !strings.HasPrefix(name, "last_reserved_ip") {
				left = append(left, path)
			}
			return err
		})
		if err != nil && !os.IsNotExist(err) {
			n.Fatal(err)
		}
	}
	return left
}

// gone holds that nothing is left of a pod.
func (n *node) gone(p *pod) {
	n.Helper()
	if left := n.left(); len(left) > 0 {
		n.Errorf("left behind: %v", left)
	}
	if out, err := p.Run("ip", "link", "show", "eth0"); err == nil {
		n.Errorf("the pod still has %s", out)
	}
}

func (p *pod) mustPing(t testing.TB, to netip.Addr, size int) {
	t.Helper()
	overhead := 28 // IPv4 and ICMP headers
	if to.Is6() {
		overhead = 48
	}
	p.Exec("ping", "-c", "1", "-W", "5", "-M", "do", "-s", fmt.Sprint(size-overhead), to.String())
}

// device is what `ip -j` says of one.
type device struct {
	MTU       int    `json:"mtu"`
	Master    string `json:"master"`
	LinkIndex int    `json:"link_index"`
}

func link(t testing.TB, ns *nstest.NS, name string) device {
	t.Helper()
	var all []device
	if err := json.Unmarshal([]byte(ns.Exec("ip", "-j", "link", "show", name)), &all); err != nil || len(all) != 1 {
		t.Fatalf("%s: %v, %v", name, all, err)
	}
	return all[0]
}

func defaultRoutes(ns *nstest.NS) string {
	return ns.Exec("ip", "-4", "route", "show", "default") + ns.Exec("ip", "-6", "route", "show", "default")
}

func TestPods(t *testing.T) {
	t.Parallel()
	const v4, v6 = "10.244.5.1/24", "fd00:10:244:5::1/64"
	for _, c := range []struct {
		name, env, delegate string
		gateways            []string
		mtu                 int
	}{
		{"IPv4", envV4, `{}`, []string{v4}, 1450},
		{"IPv6", envV6, `{}`, []string{v6}, 1430},
		{"dual stack", envDual, `{"bridge":"br7"}`, []string{v4, v6}, 1430},
		{"ptp", envDual, `{"type":"ptp"}`, []string{v4, v6}, 1430},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			n.env(c.env)
			l := n.list("1.1.0", c.delegate)
			a, b := newPod(t, "pod-a"), newPod(t, "pod-b")
			for _, p := range []*pod{a, b} {
				n.must(n.add(l, p))
				if len(p.ips) != len(c.gateways) {
					t.Fatalf("addresses %v", p.ips)
				}
				if got := link(t, p.NS, "eth0").MTU; got != c.mtu {
					t.Errorf("MTU %d in the pod, want %d", got, c.mtu)
				}
			}
			routes := defaultRoutes(a.NS)
			for i, gateway := range c.gateways {
				gw := netip.MustParsePrefix(gateway)
				for _, p := range []*pod{a, b} {
					if !gw.Masked().Contains(p.ips[i].Addr()) || p.ips[i].Addr() == gw.Addr() || p.ips[i].Bits() != gw.Bits() {
						t.Errorf("address %v, subnet %v", p.ips[i], gw)
					}
				}
				if want := "default via " + gw.Addr().String() + " dev eth0"; !strings.Contains(routes, want) {
					t.Errorf("routes of the pod:\n%swant %s", routes, want)
				}
				a.mustPing(t, gw.Addr(), c.mtu)
				a.mustPing(t, b.ips[i].Addr(), c.mtu)
			}
			if strings.Count(routes, "default") != len(c.gateways) {
				t.Errorf("routes of the pod:\n%s", routes)
			}
			// The daemon masquerades.
			if rules := n.Exec("iptables-save", "-t", "nat") + n.Exec("nft", "list",
				"ruleset"); strings.Contains(strings.ToLower(rules), "masquerade") {
				t.Errorf("the delegate masquerades:\n%s", rules)
			}
			if !strings.Contains(c.delegate, "ptp") {
				if got := n.Exec("ip", "-d", "link", "show", "type", "veth"); strings.Count(got, "hairpin on") != 2 {
					t.Errorf("hairpin mode:\n%s", got)
				}
			}

			n.must(n.check(l, a))
			family := "-4"
			if a.ips[0].Addr().Is6() {
				family = "-6"
			}
			a.Exec("ip", family, "route", "del", "default")
			if err := n.check(l, a); err == nil {
				t.Error("CHECK finds nothing wrong without a default route")
			}
			n.must(n.check(l, b))

			n.must(n.del(l, a))
			n.must(n.del(l, b))
			n.gone(a)
			n.gone(b)
			n.must(n.del(l, b))
		})
	}
}

func TestMacvlan(t *testing.T) {
	t.Parallel()
	n, lan := newNode(t), nstest.New(t)
	nstest.Link(n.NS, "lan0", lan, "lan0")
	lan.Addr("lan0", "10.244.5.1/24")
	n.env(envV4)
	l := n.list("1.1.0", `{"type":"macvlan","master":"lan0"}`)
	a, b := newPod(t, "pod-a"), newPod(t, "pod-b")
	for _, p := range []*pod{a, b} {
		n.must(n.add(l, p))
	}
	a.mustPing(t, b.ips[0].Addr(), 1450)
	a.mustPing(t, netip.MustParseAddr("10.244.5.1"), 1450)
	if routes := a.Exec("ip", "route"); !strings.Contains(routes, "10.244.0.0/16 via 10.244.5.1") ||
		strings.Contains(routes, "default") {
		t.Errorf("routes of the pod:\n%s", routes)
	}
	n.must(n.check(l, a))
	n.must(n.del(l, a))
	n.must(n.del(l, b))
	n.gone(a)
}

// Where the daemon does not masquerade, the delegate does, and takes it back.
func TestDelegateMasquerades(t *testing.T) {
	t.Parallel()
	n, out := newNode(t), nstest.New(t)
	nstest.Link(n.NS, "eth0", out, "eth0")
	n.Addr("eth0", "192.0.2.1/24")
	out.Addr("eth0", "192.0.2.2/24")                                                // it has no route to the pods
	n.env(strings.Replace(envV4, "FLANNEL_IPMASQ=true", "FLANNEL_IPMASQ=false", 1)) // the other variables still say true
	l := n.list("1.1.0", `{}`)
	p := newPod(t, "pod-a")
	n.must(n.add(l, p))
	if out, err := p.Run("ping", "-c", "1", "-W", "1", "192.0.2.2"); err == nil {
		t.Errorf("OVERLAYD_IPMASQ=true does not win over FLANNEL_IPMASQ=false:\n%s", out)
	}
	n.must(n.del(l, p))

	n.env(strings.ReplaceAll(envV4, "IPMASQ=true", "IPMASQ=false"))
	n.must(n.add(l, p))
	p.mustPing(t, netip.MustParseAddr("192.0.2.2"), 1450)
	n.must(n.del(l, p))
	n.gone(p)
	if rules := n.Exec("iptables-save", "-t", "nat"); strings.Contains(rules, p.ips[0].Addr().String()) {
		t.Errorf("left behind:\n%s", rules)
	}
}

func TestDelWithoutDaemon(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	l := n.list("1.1.0", `{}`)
	n.env(envV4)
	a, b := newPod(t, "pod-a"), newPod(t, "pod-b")
	n.must(n.add(l, a))
	n.must(n.add(l, b))
	n.env(strings.ReplaceAll(envV4, "10.244.5.", "10.244.77.")) // another subnet
	n.must(n.check(l, a))
	n.must(n.del(l, a))
	n.env("")
	n.must(n.check(l, b))
	n.must(n.del(l, b))
	n.gone(a)
	n.gone(b)
}

// A pod that failed for a mistake in the list can be deleted once that is corrected.
func TestCorrectedList(t *testing.T) {
	t.Parallel()
	for _, mistake := range []string{`{"type":"brigde"}`, `{"vlan":5000}`} {
		t.Run(mistake, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			n.env(envV4)
			p, q := newPod(t, "pod-a"), newPod(t, "pod-b")
			for _, p := range []*pod{p, q} {
				if err := n.add(n.list("1.1.0", mistake), p); err == nil {
					t.Fatal("ADD succeeds")
				}
			}
			path := filepath.Join(n.dir, "kept", n.net, "pod-a:eth0")
			if err := n.del(n.list("1.1.0", mistake), p); err == nil || !strings.Contains(err.Error(), path) {
				t.Errorf("DEL with the mistake: %v", err)
			}
			n.must(n.del(n.list("1.1.0", `{}`), p))
			n.Do(func() { n.must(n.cni.GCNetworkList(context.Background(), n.list("1.1.0", `{}`), &libcni.GCArgs{})) })
			n.gone(p)
			n.gone(q)
		})
	}
}

func TestSubnetFileComesLater(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	l := n.list("1.1.0", `{}`)
	p := newPod(t, "pod-a")
	written := make(chan time.Time, 1)
	timer := time.AfterFunc(time.Second, func() {
		written <- time.Now()
		n.env(envV4)
	})
	defer timer.Stop()
	n.must(n.add(l, p))
	select {
	case at := <-written:
		if time.Now().Before(at) {
			t.Error("ADD ended before the file was there")
		}
	default:
		t.Error("ADD ended before the file was there")
	}
	n.must(n.del(l, p))
	n.gone(p)
}

func TestVersions(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"", "0.2.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		t.Run("version "+version, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			n.env(envDual)
			l := n.list(version, `{}`)
			p := newPod(t, "pod-a")
			n.must(n.add(l, p))
			if len(p.ips) != 2 {
				t.Errorf("addresses %v", p.ips)
			}
			if slices.Contains([]string{"0.4.0", "1.0.0", "1.1.0"}, version) {
				n.must(n.check(l, p))
			}
			n.must(n.del(l, p))
			n.gone(p)
		})
	}
	// A pod that was made before the list was given another version.
	n := newNode(t)
	n.env(envV4)
	p := newPod(t, "pod-a")
	n.must(n.add(n.list("0.3.1", `{}`), p))
	n.must(n.check(n.list("1.1.0", `{}`), p))
	n.must(n.del(n.list("1.1.0", `{}`), p))
	n.gone(p)
}

// Another dataDir in the list while pods run, also host-local's, and another delegate: DEL and GC use what ADD kept.
func TestOtherDataDir(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.env(envDual)
	old := n.list("1.1.0", `{}`)
	a, b, c := newPod(t, "pod-a"), newPod(t, "pod-b"), newPod(t, "pod-c")
	for _, p := range []*pod{a, b} {
		n.must(n.add(old, p))
	}
	text := strings.NewReplacer("/kept", "/kept-now", "/ips", "/ips-now", `"delegate":{}`, `"delegate":{"type":"ptp"}`).
		Replace(string(old.Bytes))
	now, err := libcni.ConfListFromBytes([]byte(text))
	n.must(err)
	n.env(strings.ReplaceAll(envDual, "244.5.", "244.6."))
	n.must(n.add(now, c))
	n.must(n.del(now, a))
	if out, err := a.Run("ip", "link", "show", "eth0"); err == nil {
		t.Errorf("the pod still has %s", out)
	}
	if left := n.left(); len(left) != 3 { // of b, in both families
		t.Errorf("after DEL there is %v", left)
	}
	n.must(os.RemoveAll(filepath.Join(n.dir, "cache")))
	n.Do(func() {
		n.must(n.cni.GCNetworkList(context.Background(), now,
			&libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: "pod-c", IfName: "eth0"}}}))
	})
	n.gone(a)
	n.must(n.del(now, c))
	n.must(n.del(old, b))
}

// reboot does to a node what one does, but for its disk: no pod is left, and the bridge is gone. To the plugin, what is
// there is of another boot.
func (n *node) reboot(pods ...*pod) {
	n.Helper()
	for _, p := range pods {
		p.Exec("ip", "link", "del", "eth0")
	}
	n.Exec("ip", "link", "del", "cni0")
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	n.must(err)
	boot, before := strings.TrimSpace(string(raw)), time.Now().Add(-10*365*24*time.Hour)
	for _, dir := range []string{"kept", "ips"} {
		files, err := filepath.Glob(filepath.Join(n.dir, dir, n.net, "*")) // hidden ones as well
		n.must(err)
		for _, f := range files {
			raw, err := os.ReadFile(f)
			n.must(err)
			n.must(os.WriteFile(f, []byte(strings.ReplaceAll(string(raw), boot, "6f1c4d0e-an-earlier-boot")), 0o600))
			n.must(os.Chtimes(f, before, before))
		}
	}
}

// After a reboot nothing of before it takes room, whatever the runtime does about it: nothing, a DEL, or an ADD of
// the same container.
func TestReboot(t *testing.T) {
	t.Parallel()
	small := strings.ReplaceAll(envV4, "/24", "/29") // five addresses for pods
	n := newNode(t)
	n.env(small)
	l := n.list("1.1.0", `{}`)
	var old []*pod
	for i := range 5 {
		old = append(old, newPod(t, fmt.Sprintf("old-%d", i)))
		n.must(n.add(l, old[i]))
	}
	full := func(who string) {
		t.Helper()
		if err := n.add(l, newPod(t, who)); err == nil || !strings.Contains(err.Error(), "no IP addresses available") {
			t.Errorf("ADD where all addresses are taken: %v", err)
		}
	}
	full("one-more")
	n.reboot(old...)
	n.must(os.Remove(filepath.Join(n.dir, "kept", n.net, "old-4:eth0"))) // the disk has lost it, or it was not on one

	var now []*pod
	for _, id := range []string{"old-0", "old-1", "new-2", "new-3", "new-4"} {
		now = append(now, newPod(t, id))
	}
	var wg sync.WaitGroup
	for _, p := range now {
		wg.Go(func() {
			if err := n.add(l, p); err != nil {
				t.Errorf("ADD %s: %v", p.rt.ContainerID, err)
			}
		})
	}
	wg.Go(func() { // the runtime takes down a sandbox of before
		if err := n.del(l, old[2]); err != nil {
			t.Errorf("DEL: %v", err)
		}
	})
	wg.Wait()
	seen := map[netip.Prefix]string{}
	for _, p := range now {
		if len(p.ips) != 1 {
			t.Fatalf("%s has the addresses %v", p.rt.ContainerID, p.ips)
		}
		if other := seen[p.ips[0]]; other != "" {
			t.Errorf("%s has %v, as %s", p.rt.ContainerID, p.ips, other)
		}
		seen[p.ips[0]] = p.rt.ContainerID
		p.mustPing(t, netip.MustParseAddr("10.244.5.1"), 1450)
		raw, err := os.ReadFile(filepath.Join(n.dir, "ips", n.net, p.ips[0].Addr().String()))
		if err != nil || !strings.HasPrefix(string(raw), p.rt.ContainerID) {
			t.Errorf("host-local has %s for %q, %v", p.ips[0], raw, err)
		}
	}
	if left := n.left(); len(left) != 2*len(now) {
		t.Errorf("there is %v", left)
	}
	// In the same boot nothing is freed, however old its file is, and whether it is kept or not.
	before := time.Now().Add(-24 * time.Hour * 3650)
	for _, p := range now {
		n.must(os.Chtimes(filepath.Join(n.dir, "ips", n.net, p.ips[0].Addr().String()), before, before))
	}
	n.must(os.RemoveAll(filepath.Join(n.dir, "kept", n.net)))
	full("yet-another")
	for _, p := range now {
		p.mustPing(t, netip.MustParseAddr("10.244.5.1"), 1450)
	}
}

// The list that Kubernetes gets: ports of the host and bandwidth, by plugins behind this one.
func TestChain(t *testing.T) {
	t.Parallel()
	n, client := newNode(t), nstest.New(t)
	nstest.Link(n.NS, "eth0", client, "eth0")
	n.Addr("eth0", "192.0.2.1/24")
	client.Addr("eth0", "192.0.2.2/24")
	client.Exec("ip", "route", "add", "default", "via", "192.0.2.1")
	n.env(envV4)
	l := n.list("1.0.0", `{}`, `{"type":"portmap","capabilities":{"portMappings":true},"snat":true}`,
		`{"type":"bandwidth","capabilities":{"bandwidth":true}}`)
	p := newPod(t, "pod-a")
	p.rt.CapabilityArgs = map[string]any{
		"portMappings": []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}},
		"bandwidth": map[string]any{
			"ingressRate": 100_000_000, "ingressBurst": 80_000_000, "egressRate": 100_000_000,
			"egressBurst": 80_000_000,
		},
	}
	n.must(n.add(l, p))
	serve(t, p.NS, ":80")
	// The pod itself is a client like others.
	for name, from := range map[string]*nstest.NS{"outside": client, "the node": n.NS, "the pod itself": p.NS} {
		if got, err := fetch(from, "192.0.2.1:8080"); err != nil || got != "hello" {
			t.Errorf("from %s: %q, %v", name, got, err)
		}
	}
	if got := n.Exec("tc", "qdisc", "show"); strings.Count(got, "qdisc tbf") != 2 {
		t.Errorf("bandwidth:\n%s", got)
	}
	n.must(n.check(l, p))
	n.must(n.del(l, p))
	n.gone(p)
	if got := n.Exec("tc", "qdisc", "show"); strings.Contains(got, "tbf") {
		t.Errorf("left behind:\n%s", got)
	}
	if got := n.Exec("ip", "link", "show", "type", "ifb"); got != "" {
		t.Errorf("left behind:\n%s", got)
	}
	if got := n.Exec("iptables-save", "-t", "nat") + n.Exec("nft", "list", "ruleset"); strings.Contains(got, "8080") {
		t.Errorf("left behind:\n%s", got)
	}
}

// serve says hello to whoever connects, until the test ends.
func serve(t testing.TB, ns *nstest.NS, address string) {
	t.Helper()
	var l net.Listener
	var err error
	ns.Do(func() { l, err = (&net.ListenConfig{}).Listen(context.Background(), "tcp", address) })
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("hello"))
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
}

func fetch(ns *nstest.NS, address string) (got string, err error) {
	ns.Do(func() {
		var conn net.Conn
		if conn, err = net.DialTimeout("tcp", address, 20*time.Second); err != nil {
			return
		}
		defer func() { _ = conn.Close() }()
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		b := make([]byte, 16)
		var k int
		k, err = conn.Read(b)
		got = string(b[:k])
	})
	return got, err
}

func TestStatusAndGC(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	l := n.list("1.1.0", `{}`)
	status := func() (err error) {
		n.Do(func() { err = n.cni.GetStatusNetworkList(context.Background(), l) })
		return err
	}
	said := new(types.Error)
	if err := status(); !errors.As(err, &said) || said.Code != types.ErrPluginNotAvailable ||
		!strings.Contains(said.Msg, "is overlayd running on this node?") {
		t.Errorf("STATUS without the daemon: %v", err)
	}
	n.env(envV4)
	n.must(status())

	a, b, c := newPod(t, "pod-a"), newPod(t, "pod-b"), newPod(t, "pod-c")
	for _, p := range []*pod{a, b, c} {
		n.must(n.add(l, p))
	}
	// The runtime has lost its memory of b and c; b's container is still there.
	n.must(os.RemoveAll(filepath.Join(n.dir, "cache")))
	valid := []types.GCAttachment{{ContainerID: "pod-a", IfName: "eth0"}, {ContainerID: "pod-b", IfName: "eth0"}}
	n.Do(func() { n.must(n.cni.GCNetworkList(context.Background(), l, &libcni.GCArgs{ValidAttachments: valid})) })
	left := n.left()
	want := []string{
		filepath.Join(n.dir, "kept", n.net, "pod-a:eth0"), filepath.Join(n.dir, "kept", n.net, "pod-b:eth0"),
		filepath.Join(n.dir, "ips", n.net, a.ips[0].Addr().String()),
		filepath.Join(n.dir, "ips", n.net, b.ips[0].Addr().String()),
	}
	if !slices.Equal(left, want) {
		t.Errorf("after GC there is %v\nwant %v", left, want)
	}
	n.must(n.del(l, b))
	n.Do(func() { n.must(n.cni.GCNetworkList(context.Background(), l, &libcni.GCArgs{})) })
	if left := n.left(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	l := n.list("1.1.0", `{}`)
	pods := make([]*pod, 8)
	for i := range pods {
		pods[i] = newPod(t, fmt.Sprintf("pod-%d", i))
	}
	all := func(what string, command func(*libcni.NetworkConfigList, *pod) error) {
		var wg sync.WaitGroup
		for _, p := range pods {
			wg.Go(func() {
				if err := command(l, p); err != nil {
					t.Errorf("%s %s: %v", what, p.rt.ContainerID, err)
				}
			})
		}
		wg.Wait()
	}
	// The first pod alone: the bridge has another MAC address until it has its IP address, and the reference plugin's
	// CHECK of those who saw it before fails.
	n.env(envV4)
	first := newPod(t, "first")
	n.must(n.add(l, first))
	n.env("")
	timer := time.AfterFunc(100*time.Millisecond, func() { n.env(envV4) }) // all wait for it
	defer timer.Stop()
	all("ADD", n.add)
	seen := map[netip.Prefix]bool{}
	for _, p := range pods {
		for _, ip := range p.ips {
			seen[ip] = true
		}
	}
	if len(seen) != len(pods) {
		t.Errorf("addresses %v", seen)
	}
	all("CHECK", n.check)
	all("DEL", n.del)
	n.must(n.del(l, first))
	if left := n.left(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// As an operator tries it out: with cnitool, the list from the documentation, and everything in its default place.
func TestCnitool(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	p := newPod(t, "named by cnitool")
	lib, run := filepath.Join(n.dir, "lib"), filepath.Join(n.dir, "run")
	for _, dir := range []string{lib, filepath.Join(run, "overlayd"), filepath.Join(n.dir, "net.d")} {
		n.must(os.MkdirAll(dir, 0o755))
	}
	n.must(os.WriteFile(filepath.Join(n.dir, "net.d", "10-overlayd.conflist"), documentedList(t), 0o644))
	// In a mount namespace of its own, so that the machine's own /run and /var/lib are not touched.
	cnitool := func(command string, more ...string) (string, error) {
		const script = `mount --make-rprivate / && mount --bind "$1" /var/lib && mount --bind "$2" /run && shift 2 && exec "$@"`
		args := append([]string{
			"unshare", "--mount", "sh", "-c", script, "sh", lib, run,
			"env", "CNI_PATH=" + programs(t), "NETCONFPATH=" + filepath.Join(n.dir, "net.d"), filepath.Join(programs(t),
				"cnitool"), command, "cbr0",
		}, more...)
		return n.Run(args...)
	}
	if out, err := cnitool("status", p.rt.NetNS); err == nil || !strings.Contains(out,
		"/run/overlayd/subnet.env: no such file or directory: is overlayd running") {
		t.Errorf("status without the daemon: %v\n%s", err, out)
	}
	n.must(os.WriteFile(filepath.Join(run, "overlayd", "subnet.env"), []byte(envV4), 0o644))
	for _, command := range []string{"add", "check", "status", "del", "del"} {
		out, err := cnitool(command, p.rt.NetNS)
		if err != nil {
			t.Errorf("%s: %v\n%s", command, err, out)
		}
		if command == "add" {
			r := current.Result{}
			if err := json.Unmarshal([]byte(out), &r); err != nil || len(r.IPs) != 1 {
				t.Errorf("add: %v\n%s", err, out)
			}
			kept, err := filepath.Glob(filepath.Join(lib, "cni/overlay/cbr0/*:eth0"))
			if err != nil || len(kept) != 1 {
				t.Errorf("kept: %v, %v", kept, err)
			}
		}
	}
	if out, err := cnitool("gc", p.rt.NetNS); err != nil {
		t.Errorf("gc: %v\n%s", err, out)
	}
	left, err := filepath.Glob(filepath.Join(lib, "cni/*/cbr0/*"))
	n.must(err)
	left = slices.DeleteFunc(left, func(path string) bool {
		return slices.Contains([]string{"lock", ".boot"}, filepath.Base(path)) ||
			strings.HasPrefix(filepath.Base(path), "last_reserved")
	})
	if len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// documentedList is the list that Documentation/cni.md tells to install, with the plugin that it says may follow.
func documentedList(t *testing.T) []byte {
	t.Helper()
	doc, err := os.ReadFile(filepath.Join("..", "Documentation", "cni.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(doc), "10-overlayd.conflist`:\n")
	list, after, ok := strings.Cut(text, "\n    }\n")
	_, after, ok2 := strings.Cut(after, "`")
	more, _, ok3 := strings.Cut(after, "` may follow")
	last := `"capabilities": {"portMappings": true}}`
	if !ok || !ok2 || !ok3 || !strings.Contains(list, last) {
		t.Fatalf("Documentation/cni.md has no list:\n%s", text)
	}
	return []byte(strings.Replace(list, last, last+",\n"+more, 1) + "}")
}

// Whatever comes in, only CNI's JSON goes out.
func TestProgramPrintsOnlyJSON(t *testing.T) {
	t.Parallel()
	bin := programs(t)
	for _, c := range []struct {
		stdin, container, command string
		code                      uint
	}{
		{"", "c1", "ADD", types.ErrDecodingFailure},
		{"\x00\xff", "c1", "ADD", types.ErrDecodingFailure},
		{`{"name":"n","cniVersion":"9.9.9"}`, "c1", "ADD", types.ErrIncompatibleCNIVersion},
		{`{"name":"../n","cniVersion":"1.1.0"}`, "c1", "ADD", types.ErrInvalidNetworkConfig},
		{
			`{"name":"n","cniVersion":"1.1.0","subnetFile":"/nowhere/subnet.env","waitSeconds":0}`, "c1", "ADD",
			types.ErrTryAgainLater,
		},
		{
			`{"name":"n","cniVersion":"1.1.0","subnetFile":"/nowhere/subnet.env","waitSeconds":0}`, "../../c1", "ADD",
			types.ErrInvalidEnvironmentVariables,
		},
		{`{"name":"n","cniVersion":"1.1.0","subnetFile":"/nowhere/subnet.env"}`, "", "STATUS", types.ErrPluginNotAvailable},
		{`{"name":"n","cniVersion":"1.0.0"}`, "", "STATUS", types.ErrIncompatibleCNIVersion},
		{`{"name":"n","cniVersion":"1.1.0","dataDir":7}`, "c1", "DEL", types.ErrInvalidNetworkConfig},
		{`{"name":"n","cniVersion":"1.1.0"}`, "c1", "NONSENSE", types.ErrInvalidEnvironmentVariables},
	} {
		var out strings.Builder
		cmd := exec.Command(filepath.Join(bin, "overlay-cni"))
		cmd.Env = []string{
			"CNI_PATH=" + bin, "CNI_COMMAND=" + c.command, "CNI_CONTAINERID=" + c.container, "CNI_IFNAME=eth0",
			"CNI_NETNS=/proc/1/ns/net",
		}
		cmd.Stdin, cmd.Stdout = strings.NewReader(c.stdin), &out
		err := cmd.Run()
		var said types.Error
		if jsonErr := json.Unmarshal([]byte(out.String()), &said); jsonErr != nil || said.Code != c.code || said.Msg == "" ||
			err == nil || cmd.ProcessState.ExitCode() != 1 {
			t.Errorf("%+v\n got %v, %v: %s", c, err, jsonErr, out.String())
		}
	}
}

// A process for each pod must be small: it links of the daemon only how addresses, JSON and files are read, and no netlink,
// etcd or zap.
func TestWhatIsLinked(t *testing.T) {
	t.Parallel()
	out, err := exec.Command("go", "list", "-deps", "github.com/overlayd/overlayd/cmd/overlay-cni").Output()
	if err != nil {
		t.Fatal(err)
	}
	const own = "github.com/overlayd/overlayd/"
	for pkg := range strings.FieldsSeq(string(out)) {
		if strings.HasPrefix(pkg, own) && !slices.Contains([]string{
			own + "addr", own + "cni", own + "cmd/overlay-cni",
			own + "internal/jsonobject", own + "internal/ownfile",
		}, pkg) {
			t.Errorf("overlay-cni links %s", pkg)
		}
		for _, heavy := range []string{
			"go.etcd.io/", "go.uber.org/zap", "github.com/vishvananda/netlink",
			"google.golang.org/", "github.com/spf13/cobra",
		} {
			if strings.HasPrefix(pkg, heavy) {
				t.Errorf("overlay-cni links %s", pkg)
			}
		}
	}
}
