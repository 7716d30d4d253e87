package doctor

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/agent/state"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/diag/doctor/packetfilter"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/internal/cniconf"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd"
	"github.com/overlayd/overlayd/subnet/examine"
	"github.com/overlayd/overlayd/subnet/kube"
)

func prefixOf(s string) netip.Prefix { return netip.MustParsePrefix(s) }
func addrOf(s string) netip.Addr     { return netip.MustParseAddr(s) }

func entry(key, node, id, ip string, created int64) *subnet.Entry {
	mac := addr.MAC{2, 0, 0, 0, byte(created >> 8), byte(created)}
	a := subnet.Attrs{PublicIPLocal: true, Backend: subnet.VXLAN, Identity: subnet.Identity{NodeName: node, NodeID: id}}
	a.PublicIP.V4, a.VTEP.V4 = addrOf(ip), subnet.VTEP{VNI: 1, MAC: mac}
	return subnet.ParseEntry(key, subnet.FormatValue(a), created, created, 7)
}

func table(t *testing.T, config string, es ...*subnet.Entry) subnet.Table {
	t.Helper()
	c, err := subnet.ParseConfig([]byte(config))
	tab := subnet.Table{Revision: 9, Config: c, ConfigJSON: config, ConfigErr: err, ConfigRevision: 2, Entries: es}
	slices.SortFunc(tab.Entries, func(a, b *subnet.Entry) int { return strings.Compare(a.Key, b.Key) })
	return tab
}

const plainConfig = `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}`

// healthy are the facts of a node on which all is well, with two peers.
func healthy(t *testing.T) Facts {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	self, n2, n3 := entry(
		"10.244.1.0-24",
		"n1",
		"id1",
		"192.0.2.1",
		3,
	), entry(
		"10.244.2.0-24",
		"n2",
		"id2",
		"192.0.2.2",
		4,
	), entry(
		"10.244.3.0-24",
		"n3",
		"id3",
		"198.51.100.3",
		5,
	)
	tab := table(t, plainConfig, self, n2, n3)
	f := Facts{
		Settings: Settings{
			Identity:   self.Identity,
			Store:      Store{Kind: status.Etcd, Etcd: etcd.Options{Endpoints: []string{"http://etcd:2379"}}},
			SubnetFile: "/run/overlayd/subnet.env",
			StateDir:   os.TempDir(),
			EnvFile:    "/etc/overlayd/overlayd.env",
			ForwardFW:  true,
		},
		Now: now, Errs: map[string]error{},
		Daemon: DaemonFacts{Running: true, Status: status.Node{
			Name:    "n1",
			ID:      "id1",
			Version: "v1",
			Ready:   true,
			Lease:   status.Lease{Subnets: []string{"10.244.1.0/24"}, Held: true},
			Store:   status.Store{Endpoints: []string{"http://etcd:2379"}, Prefix: "/overlayd/network"},
			Network: status.Network{Networks: []string{"10.244.0.0/16"}, Backend: "vxlan", MTU: 1450},
			Interface: status.Interface{
				Reason:    "IPv4: 192.0.2.1 on eth0 (it has the default route, metric 0)",
				ByDefault: true,
				PublicIPs: []string{"192.0.2.1"},
			},
			Started: now.Add(-time.Hour),
			Now:     now,
			Probe:   status.Probe{On: true},
			Devices: []status.Device{
				{
					Name:     "overlay.1",
					MAC:      self.VTEP.V4.MAC.String(),
					MTU:      1450,
					VNI:      1,
					Port:     8472,
					Local:    "192.0.2.1",
					Underlay: "eth0",
				},
			},
		}},
		Store: &examine.Store{
			Endpoints: []examine.Endpoint{{URL: "http://etcd:2379", Took: time.Millisecond, Version: "3.6.0"}}, Table: tab,
		},
	}
	f.Config, f.Self, f.PeersFrom = &tab.Config, self.Lease, "the daemon"
	for _, e := range tab.Entries[1:] {
		f.Peers = append(f.Peers, peer{
			name: e.NodeName, subnet: e.Subnets.V4, publicIP: e.PublicIP.V4, path: pathTunnel, target: e.Subnets.V4.Addr(),
		})
	}
	f.Underlay.ByDefault = true
	f.Underlay.By.V4, f.Underlay.PublicIP.V4 = backend.Underlay{
		Device: "eth0",
		Addr:   addrOf("192.0.2.1"),
		MTU:    1500,
	}, addrOf(
		"192.0.2.1",
	)
	offloads := []netstate.Offload{{Name: "tx", On: true}, {Name: "gso", On: true}, {Name: "gro", On: true}}
	link := func(i int, name, kind string, mtu int) netstate.SurveyLink {
		return netstate.SurveyLink{
			HostLink: netstate.HostLink{Index: i, Name: name, Kind: kind, MTU: mtu, Up: true},
			Carrier:  true, Offloads: offloads,
		}
	}
	tunnel := link(3, "overlay.1", "vxlan", 1450)
	tunnel.MAC, tunnel.VXLAN = self.VTEP.V4.MAC, netstate.VXLAN{
		VNI:      1,
		Port:     8472,
		Local:    addrOf("192.0.2.1"),
		Underlay: "eth0",
	}
	port := link(5, "veth1", "veth", 1450)
	port.Master = "cni0"
	f.Survey.Links = []netstate.SurveyLink{link(2, "eth0", "device", 1500), tunnel, link(4, "cni0", "bridge", 1450), port}
	f.Survey.Host = netstate.Host{
		Addresses: []netstate.HostAddress{
			{Link: "eth0", Prefix: prefixOf("192.0.2.1/24")},
			{Link: "overlay.1", Prefix: prefixOf("10.244.1.0/32"), Tunnel: true},
			{Link: "cni0", Prefix: prefixOf("10.244.1.1/24")},
		},
		Routes: []netstate.HostRoute{
			{Dst: prefixOf("0.0.0.0/0"), Via: addrOf("192.0.2.254"), Link: "eth0"},
			{Dst: prefixOf("192.0.2.0/24"), Link: "eth0"},
		},
	}.Indexed()
	for _, p := range f.Peers {
		f.Survey.Ours.Routes = append(
			f.Survey.Ours.Routes,
			netstate.Route{Table: netstate.MainTable, Dst: p.subnet, Metric: 100, Via: p.subnet.Addr(), Link: "overlay.1"},
		)
		f.Pings.Sample = append(
			f.Pings.Sample,
			pinged{
				peer:  p,
				sized: true,
				small: Pong{Addr: p.target, Sent: 2, RTT: time.Millisecond},
				full:  Pong{Addr: p.target, Sent: 2, RTT: time.Millisecond},
			},
		)
	}
	f.Pings.Of, f.Pings.Size = 2, 1450
	for i, p := range f.Peers {
		for _, x := range f.flowsTo(p) {
			x.Answer = netstate.Answer{Link: "overlay.1", Via: f.Survey.Ours.Routes[i].Via, Table: netstate.MainTable}
			f.Flows = append(f.Flows, x)
		}
	}
	f.ToStore = []flow{{
		Flow:   netstate.Flow{To: addrOf("192.0.2.100")},
		Answer: netstate.Answer{Link: "eth0", Table: netstate.MainTable},
	}}
	f.System = SystemFacts{
		Sysctls: map[string]string{
			"net/ipv4/ip_forward":                    "1",
			rpFilter("all"):                          "0",
			rpFilter("eth0"):                         "0",
			rpFilter("overlay.1"):                    "0",
			deviceForwarding("overlay.1"):            "1",
			deviceForwarding("cni0"):                 "1",
			netstate.BridgeNetfilter(addr.IPv4).Path: "1",
			threshold(addr.IPv4, 3):                  "1024",
			"net/netfilter/nf_conntrack_count":       "10",
			"net/netfilter/nf_conntrack_max":         "1000",
		},
		MachineID: "id1",
		SubnetEnv: map[string]string{
			"FLANNEL_NETWORK": "10.244.0.0/16",
			"FLANNEL_SUBNET":  "10.244.1.1/24",
			"FLANNEL_MTU":     "1450",
		},
	}
	return f
}

// bridgeWas persists a bridge with an address and ports, which are devices without a master now.
func (f *Facts) bridgeWas(name, address string, ports ...string) {
	b := netstate.PodBridge{Name: name, Addrs: addr.Per[netip.Prefix]{V4: prefixOf(address)}}
	h := &f.Survey.Host
	h.Links = append(slices.Clone(h.Links), netstate.HostLink{Index: 40, Name: name, Kind: "bridge", Up: true})
	for i, p := range ports {
		b.Ports = append(b.Ports, netstate.BridgePort{Index: 50 + i, Name: p})
		h.Links = append(h.Links, netstate.HostLink{Index: 50 + i, Name: p, Kind: "veth", Up: true})
	}
	f.Persisted = state.Persisted{Node: f.Identity, Bridges: []netstate.PodBridge{b}}
}

// dual makes the network one of both families.
func (f *Facts) dual(t *testing.T) {
	tab := table(t, `{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48"}`)
	f.Config = &tab.Config
	f.System.Sysctls["net/ipv6/conf/all/forwarding"], f.System.Sysctls[netstate.BridgeNetfilter(addr.IPv6).Path] = "1", "1"
}

// link changes a device in the facts.
func (f *Facts) link(name string, change func(*netstate.SurveyLink)) {
	f.Survey.Links = slices.Clone(f.Survey.Links)
	for i := range f.Survey.Links {
		if f.Survey.Links[i].Name == name {
			change(&f.Survey.Links[i])
		}
	}
}

func (f *Facts) address(link, p string) {
	h := f.Survey.Host
	h.Addresses = append(slices.Clone(h.Addresses), netstate.HostAddress{Link: link, Prefix: prefixOf(p)})
	f.Survey.Host = h.Indexed()
}

func (f *Facts) route(r netstate.HostRoute) {
	h := f.Survey.Host
	h.Routes = append(slices.Clone(h.Routes), r)
	f.Survey.Host = h.Indexed()
}

// learn switches Backend.Learning on.
func (f *Facts) learn() {
	c := *f.Config
	c.Backend.Learning = true
	f.Config = &c
	f.Store.Table.ConfigJSON = `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","Learning":true}}`
}

// natted is a lease whose public IP is on no device of the node.
func natted(e *subnet.Entry) *subnet.Entry {
	n := *e
	n.PublicIPLocal = false
	return &n
}

// vpn has the kernel give that answer to all that goes to peers, because of a rule.
func (f *Facts) vpn(a netstate.Answer) {
	r := netstate.HostRule{
		Rule:   netstate.Rule{From: prefixOf("0.0.0.0/0"), To: prefixOf("10.0.0.0/8"), Table: 52},
		Action: netstate.RuleToTable,
	}
	f.Survey.Host.Rules = append(f.Survey.Host.Rules, r)
	f.Flows = slices.Clone(f.Flows)
	for i := range f.Flows {
		f.Flows[i].Answer = a
	}
}

func (f *Facts) lease(e *subnet.Entry) {
	f.Store.Table.Entries = append(
		slices.DeleteFunc(slices.Clone(f.Store.Table.Entries), func(o *subnet.Entry) bool { return o.Key == e.Key }), e)
	slices.SortFunc(f.Store.Table.Entries, func(a, b *subnet.Entry) int { return strings.Compare(a.Key, b.Key) })
}

// The table of the documentation has every check, in the order in which they are printed.
func TestDocumentation(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../Documentation/doctor.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, ok := bytes.Cut(text, []byte("| check | what is examined |\n|---|---|\n"))
	if !ok {
		t.Fatal("Documentation/doctor.md has no table of checks")
	}
	text, _, _ = bytes.Cut(text, []byte("\n\n"))
	var got, want []string
	for line := range strings.Lines(string(text)) {
		names, _, _ := strings.Cut(strings.TrimPrefix(line, "| "), " | ")
		got = append(got, strings.Split(strings.ReplaceAll(names, "`", ""), ", ")...)
	}
	for _, c := range checks() {
		want = append(want, c.name)
	}
	if !slices.Equal(got, want) {
		t.Errorf("Documentation/doctor.md has %q, doctor %q", got, want)
	}
}

func TestHealthy(t *testing.T) {
	t.Parallel()
	for _, x := range judge(healthy(t)) {
		if x.Mark == Warn || x.Mark == Fail {
			t.Errorf("%+v", x)
		}
	}
}

// base makes a chain of rules that a judge meets.
func base(family, table, name, hook, policy string, rules ...packetfilter.Rule) packetfilter.Chain {
	return packetfilter.Chain{Family: family, Table: table, Name: name, Hook: hook, Policy: policy, Rules: rules}
}

// tcpPort is a rule about a port of TCP.
func tcpPort(port uint16, v packetfilter.Verdict) packetfilter.Rule {
	return packetfilter.Rule{
		Tests: []packetfilter.Test{
			{
				Key: []packetfilter.Key{{Field: packetfilter.Protocol}},
				Any: [][]packetfilter.Range{{{From: []byte{unix.IPPROTO_TCP}, To: []byte{unix.IPPROTO_TCP}}}},
			},
			{
				Key: []packetfilter.Key{{Field: packetfilter.Port}},
				Any: [][]packetfilter.Range{
					{{From: binary.BigEndian.AppendUint16(nil, port), To: binary.BigEndian.AppendUint16(nil, port)}},
				},
			},
		}, Action: packetfilter.Action{Verdict: v},
	}
}

// A lease that carries this node's identity and is not known to be its own is nothing to act by.
func TestAnothersLease(t *testing.T) {
	t.Parallel()
	conflict := status.Problem{Name: "lease", Code: status.Conflict, Reason: "x", Fatal: true}
	for name, tt := range map[string]struct {
		spoil func(f *Facts)
		own   Mark
		text  string
	}{
		"daemon without a lease": {func(f *Facts) {
			f.Daemon.Status.Lease, f.Daemon.Status.Devices, f.Daemon.Status.Problems = status.Lease{}, nil,
				[]status.Problem{conflict}
		}, Skipped, "see problems"},
		"daemon with a conflict": {func(f *Facts) {
			f.Daemon.Status.Lease.Held, f.Daemon.Status.Devices, f.Daemon.Status.Problems = false, nil,
				[]status.Problem{conflict}
		}, Skipped, "see problems"},
		"no daemon": {func(f *Facts) {
			f.Daemon, f.Persisted = DaemonFacts{}, state.Persisted{Node: f.Identity, Subnets: "10.244.1.0-24"}
		}, Fail, "192.0.2.1, which no device of this node has: the node's address has changed, or another machine"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := healthy(t)
			// The machine is at another address, its device has another MAC, its bridge and its file another subnet.
			f.Survey.Host.Addresses = []netstate.HostAddress{
				{Link: "eth0", Prefix: prefixOf("192.0.2.9/24")},
				{Link: "cni0", Prefix: prefixOf("10.244.7.1/24")},
			}
			f.Survey.Host = f.Survey.Host.Indexed()
			f.link("overlay.1", func(l *netstate.SurveyLink) { l.MAC[5] = 9 })
			f.System.SubnetEnv = map[string]string{"FLANNEL_SUBNET": "10.244.7.1/24", "FLANNEL_MTU": "1450"}
			f.Daemon.Status.Interface.PublicIPs = []string{"192.0.2.9"}
			tt.spoil(&f)
			f.Self, f.Peers = subnet.Lease{}, nil
			f.Derived = derive(f)
			for _, x := range judge(f) {
				switch x.Check {
				case "own lease":
					if x.Mark != tt.own || !strings.Contains(x.Reason, tt.text) {
						t.Errorf("%+v", x)
					}
				case "tunnel device", "bridge", "subnet file":
					if x.Mark != Skipped && (x.Check != "tunnel device" || x.Mark != OK) {
						t.Errorf("%+v", x)
					}
				}
				for _, m := range x.Fix {
					for _, harm := range []string{"ip link set overlay.1 address", "ip link delete", "rm -rf", " del '"} {
						if strings.Contains(m, harm) || strings.HasPrefix(m, "systemctl start") && !strings.Contains(m, "#") {
							t.Errorf("%s: %s", x.Reason, m)
						}
					}
				}
			}
		})
	}
}

// In a pod, etcdctl is somewhere else, and has the secret's files by their names.
func TestEtcdctlOfAPod(t *testing.T) {
	t.Parallel()
	f := healthy(t)
	o := &f.Settings.Store.Etcd
	o.CAFile, o.CertFile, o.KeyFile = "/etc/tls/ca.crt", "/etc/tls/tls.crt", "/etc/tls/tls.key"
	f.Given = []string{"etcd-endpoints"}
	for _, tt := range []struct {
		service Service
		want    string
	}{
		{Service{}, "--cacert=/etc/tls/ca.crt --cert=/etc/tls/tls.crt --key=/etc/tls/tls.key get x"},
		{Service{Namespace: "net", Pod: "overlayd-x7"}, "--cacert=ca.crt --cert=tls.crt --key=tls.key get x"},
	} {
		f.Service = tt.service
		if got := f.etcdctl("get x"); !strings.HasSuffix(got, " "+tt.want) {
			t.Errorf("%+v: %s", tt.service, got)
		}
	}
}

// kubernetes makes it a node whose store is the Kubernetes API.
func (f *Facts) kubernetes() {
	f.Settings.Store = Store{Kind: status.Kubernetes, Kube: kube.Options{ConfigMap: "net/conf"}}
	f.Daemon.Status.Store = status.Store{Kind: status.Kubernetes, Endpoints: []string{"https://api:6443"}}
	f.Store.Endpoints = []examine.Endpoint{{URL: "https://api:6443", Took: time.Millisecond}}
	f.Store.Table.Entries = slices.Clone(f.Store.Table.Entries)
}

// Commands and daemon have the same store: the daemon's, but for what the command line gives.
func TestStoreOptions(t *testing.T) {
	t.Parallel()
	settings := Store{
		Kind: status.Etcd, Etcd: etcd.Options{Endpoints: []string{"a"}, Prefix: "/a"},
		Kube: kube.Options{ConfigMap: "a/a", Kubeconfig: "file"},
	}
	etcdB := status.Store{Kind: status.Etcd, Endpoints: []string{"b"}, Prefix: "/b"}
	kubeB := status.Store{Kind: status.Kubernetes, Endpoints: []string{"https://b"}, ConfigMap: "b/b"}
	for _, tt := range []struct {
		daemon status.Store
		given  []string
		want   string
	}{
		{status.Store{}, nil, "etcd [a] /a a/a"},
		{etcdB, nil, "etcd [b] /b a/a"},
		{etcdB, []string{"etcd-prefix"}, "etcd [b] /a a/a"},
		{kubeB, nil, "kubernetes [a] /a b/b"},
		{kubeB, []string{"kube-config-map"}, "kubernetes [a] /a a/a"},
		{kubeB, []string{"store", "etcd-endpoints"}, "etcd [a] /a a/a"},
	} {
		o := Settings{Store: settings, Given: tt.given}.StoreOptions(tt.daemon)
		got := fmt.Sprint(o.Kind, " ", o.Etcd.Endpoints, " ", o.Etcd.Prefix, " ", o.Kube.ConfigMap)
		if got != tt.want || o.Kube.Kubeconfig != "file" {
			t.Errorf("%+v, given %v: %s, want %s", tt.daemon, tt.given, got, tt.want)
		}
	}
	inKube, inEtcd := Store{Kind: status.Kubernetes}, Store{Kind: status.Etcd, Etcd: etcd.Options{Prefix: "kubernetes"}}
	if inKube.Network() == inEtcd.Network() {
		t.Errorf("etcd's %s is that of Kubernetes", inEtcd.Network())
	}
}

// destructive reports whether a command throws away what another program made, however it is printed; but for what
// flannel left.
func destructive(steps string) bool {
	steps = regexp.MustCompile(`delete table (ip flannel-ipv4|ip6 flannel-ipv6)$`).ReplaceAllString(steps, "")
	return regexp.MustCompile(
		`(^|\s)(-F|-X|flush|--flush)(\s|;|$)|-P (INPUT|FORWARD|OUTPUT)|rm -rf? .*\*|del .*--prefix|delete table`,
	).MatchString(
		steps,
	)
}

func TestDestructive(t *testing.T) {
	t.Parallel()
	for _, m := range []string{
		"iptables-legacy -F; x", "x; iptables -t nat -F", "nft flush ruleset",
		"rm -rf /var/lib/cni/networks/*   # y", "etcdctl del --prefix /", "iptables -P INPUT ACCEPT",
		"nft delete table ip nat",
	} {
		if !destructive(m) {
			t.Error(m)
		}
	}
}

// Each thing that is wrong is named by its check, and by no other that fails, but for what follows from it.
func TestJudges(t *testing.T) {
	t.Parallel()
	also := map[string][]string{ // by the name of the case, the checks that rightly fail too
		"a silent peer, and no route by the device": {"peers answer"},
		"address changed":                          {"interface"},
		"address inside the network, and no lease": {"own lease"},
		"nothing under the prefix":                 {"own lease"},
		"port of an IPv6 address":                  {"tunnel device"},
		"port taken while the device is down":      {"tunnel device"},
		"device down and its port taken":           {"tunnel port"},
		"port taken":                               {"tunnel device"},
		"silent to all sizes":                      {"peers answer"},
		"strict tunnel":                            {"peers answer"},
		"no default route":                         {"problems"},
		"forward policy, no daemon":                {"daemon"},
		"forward rule, no daemon":                  {"daemon"},
		"a VPN, and no daemon":                     {"daemon"},
	}
	dropPort := packetfilter.Rule{
		Tests: []packetfilter.Test{
			{
				Key: []packetfilter.Key{{Field: packetfilter.Protocol}},
				Any: [][]packetfilter.Range{{{From: []byte{unix.IPPROTO_UDP}, To: []byte{unix.IPPROTO_UDP}}}},
			},
			{
				Key: []packetfilter.Key{{Field: packetfilter.Port}},
				Any: [][]packetfilter.Range{
					{{From: binary.BigEndian.AppendUint16(nil, 8472), To: binary.BigEndian.AppendUint16(nil, 8472)}},
				},
			},
		}, Action: packetfilter.Action{Verdict: packetfilter.Drop},
	}
	rate := packetfilter.Rule{
		Tests:  []packetfilter.Test{{What: "limit"}},
		Action: packetfilter.Action{Verdict: packetfilter.Drop},
	}
	late := fmt.Errorf("etcd: no answer within 1.5s: %w", context.DeadlineExceeded)
	for _, tt := range []struct {
		name  string
		check string
		mark  Mark
		text  string
		steps string // part of the first command
		spoil func(f *Facts)
	}{
		{
			"daemon away", "daemon", Fail, "does not run", "systemctl start overlayd",
			func(f *Facts) { f.Daemon = DaemonFacts{} },
		},
		{
			"peers late", "daemon", Warn, "running, but does not list its peers: nothing came", "overlayd status --peers",
			func(f *Facts) {
				f.Daemon.PeersErr = errors.New("nothing came")
			},
		},
		{
			"daemon silent", "daemon", Fail, "does not answer: late", "systemctl restart",
			func(f *Facts) { f.Daemon = DaemonFacts{Err: errors.New("late")} },
		},
		{"not ready", "daemon", Fail, "not ready", "overlayd status", func(f *Facts) { f.Daemon.Status.Ready = false }},
		{"fatal problem", "problems", Fail, "kernel: it says no, for 1m0s", "overlayd status", func(f *Facts) {
			f.Daemon.Status.Problems = []status.Problem{{
				Name: "kernel", Reason: "it says no", Since: f.Now.Add(-time.Minute), Fatal: true,
			}}
		}},
		{"problem", "problems", Warn, "state-dir: full", "overlayd status", func(f *Facts) {
			f.Daemon.Status.Problems = []status.Problem{{Name: "state-dir", Reason: "full", Since: f.Now}}
		}},
		{"still starting", "problems", Fail, "overlayd is starting: underlay, lease", "overlayd status", func(f *Facts) {
			for _, name := range []string{"underlay", "lease"} {
				f.Daemon.Status.Problems = append(f.Daemon.Status.Problems,
					status.Problem{Name: name, Code: status.Starting, Reason: "not there yet", Since: f.Now, Fatal: true})
			}
		}},
		{
			"repaired just now", "drift", Warn, "route 1 times since the daemon started, the last 10s ago (add route x)",
			"journalctl",
			func(f *Facts) {
				f.Daemon.Status.Drift = []status.DriftKind{{
					Kind: "route", Count: 1, Last: "add route x", At: f.Now.Add(-10 * time.Second),
				}}
			},
		},
		{"repaired long ago", "drift", OK, "in sync", "", func(f *Facts) {
			f.Daemon.Status.Drift = []status.DriftKind{{
				Kind: "route", Count: 1, Last: "add route x", At: f.Now.Add(-10 * time.Minute),
			}}
		}},
		{"repaired often", "drift", Warn, "route 50 times", "journalctl", func(f *Facts) {
			f.Daemon.Status.Drift = []status.DriftKind{{
				Kind: "route", Count: 50, Last: "add route x", At: f.Now.Add(-10 * time.Minute),
			}}
		}},
		{"no masquerading", "settings", OK, "--ip-masq is off", "", func(f *Facts) {
			f.System.SubnetEnv = map[string]string{
				"FLANNEL_SUBNET": "10.244.1.1/24", "FLANNEL_MTU": "1450",
				"FLANNEL_IPMASQ": "false",
			}
		}},
		{"no pings", "settings", OK, "--mesh-probe is off", "", func(f *Facts) { f.Daemon.Status.Probe.On = false }},
		{
			"drift", "drift", Warn, "add route x", "overlayd diff",
			func(f *Facts) { f.Daemon.Diff = []string{"add route x"} },
		},
		{"wrong setting", "settings", Fail, "--ip-masq: no", "", func(f *Facts) { f.Wrong = errors.New("--ip-masq: no") }},
		{
			"unknown setting", "settings", Warn, "OVERLAYD_IFACES", "",
			func(f *Facts) { f.UnknownKeys = []string{"OVERLAYD_IFACES"} },
		},
		{"no machine-id", "identity", Fail, "none in /etc/machine-id", "systemd-machine-id-setup", func(f *Facts) {
			f.IdentityErr, f.System.MachineID = errors.New("this machine has none in /etc/machine-id"), "uninitialized"
		}},
		{
			"disk full", "state directory", Fail, "/run/overlayd is on a file system with 1 MB and 9 files left", "df -h",
			func(f *Facts) { f.System.Dirs = []dirFacts{{dir: "/run/overlayd", bytes: 1 << 20, files: 9}} },
		},
		{
			"disk read-only", "state directory", Fail, "/run/overlayd is not writable: read-only file system", "findmnt",
			func(f *Facts) { f.System.Dirs = []dirFacts{{dir: "/run/overlayd", err: unix.EROFS}} },
		},
		{
			"persisted state broken", "state directory", Warn, "lease.json: bad", "",
			func(f *Facts) { f.PersistedErr = errors.New("lease.json: bad") },
		},
		{
			"another CNI configuration", "CNI configuration", Fail, "05-x.conf (plugins: bridge) comes before 10-overlayd",
			"mv /etc/cni/net.d/05-x.conf /etc/cni/net.d/05-x.conf.disabled",
			func(f *Facts) {
				const dir = "/host/etc/cni/net.d/" // as in a pod
				f.CNIConf = dir + "10-overlayd.conflist"
				f.CNIErr = &cniconf.Foreign{File: dir + "05-x.conf", Plugins: []string{"bridge"}, Own: "10-overlayd.conflist"}
			},
		},
		{
			"no CNI configuration", "CNI configuration", Fail, "is missing", "",
			func(f *Facts) { f.CNIConf, f.CNIErr = "x", errors.New("x is missing") },
		},
		{
			"no subnet file", "subnet file", Fail, "no pod can start", "systemctl restart overlayd",
			func(f *Facts) { f.System.SubnetEnvErr = os.ErrNotExist },
		},
		{
			"other subnet file", "subnet file", Fail, "FLANNEL_SUBNET=10.244.7.1/24, but the lease is 10.244.1.0/24",
			"systemctl restart",
			func(f *Facts) {
				f.System.SubnetEnv = map[string]string{"FLANNEL_SUBNET": "10.244.7.1/24", "FLANNEL_MTU": "1450"}
			},
		},
		{
			"subnet file's MTU", "subnet file", Fail, "FLANNEL_MTU=1500, but the pod MTU is 1450", "systemctl restart",
			func(f *Facts) {
				f.System.SubnetEnv = map[string]string{"FLANNEL_SUBNET": "10.244.1.1/24", "FLANNEL_MTU": "1500"}
			},
		},
		{
			"etcd refused", "store", Fail, "connection refused", "etcdctl --endpoints=http://etcd:2379 endpoint health",
			func(f *Facts) {
				f.Store.Endpoints[0].Err, f.Store.TableErr = errors.New("etcd: connection refused"),
					errors.New("etcd: connection refused")
			},
		},
		{"one of etcd away", "store", Warn, "others answer", "endpoint health", func(f *Facts) {
			f.Store.Endpoints = append(f.Store.Endpoints, examine.Endpoint{
				URL: "http://etcd2:2379",
				Err: errors.New("etcd: no answer"),
			})
		}},
		{
			"etcd slow", "store", Warn, "takes 900ms", "endpoint status",
			func(f *Facts) { f.Store.Endpoints[0].Took = 900 * time.Millisecond },
		},
		{
			"etcd full", "store", Fail, "alarm: NOSPACE", "alarm list",
			func(f *Facts) { f.Store.Endpoints[0].Alarms = []string{"NOSPACE"} },
		},
		{
			"etcd read-only", "store", Fail, "cannot be written: permission denied", "endpoint status",
			func(f *Facts) { f.Store.WriteErr = errors.New("etcd: permission denied") },
		},
		{
			"etcd options", "store", Fail, "expected http", "",
			func(f *Facts) { f.Store = &examine.Store{OptionsErr: errors.New("expected http")} },
		},
		{
			"API server refused", "store", Fail, "connection refused; traffic continues", "kubectl get --raw",
			func(f *Facts) {
				f.kubernetes()
				f.Store.Endpoints[0].Err = errors.New("the Kubernetes API: connection refused")
				f.Store.TableErr = f.Store.Endpoints[0].Err
			},
		},
		{
			"Nodes may not be listed", "store", Fail, `leases cannot be read: nodes is forbidden: User "x" cannot list`,
			"kubectl get nodes", func(f *Facts) {
				f.kubernetes()
				f.Store.TableErr = errors.New(`the Kubernetes API: nodes is forbidden: User "x" cannot list resource "nodes"`)
			},
		},
		{
			"Nodes may not be patched", "store", Fail, `cannot be written: nodes "n1" is forbidden`, "kubectl describe clusterrole",
			func(f *Facts) {
				f.kubernetes()
				f.Store.WriteErr = errors.New(`the Kubernetes API: nodes "n1" is forbidden`)
			},
		},
		{
			"no ConfigMap", "network config", Fail, "the ConfigMap net/conf is missing",
			"kubectl -n net create configmap conf --from-literal=net-conf.json='" + plainConfig + "'", func(f *Facts) {
				f.kubernetes()
				f.Store.NoConfig, f.Persisted.Config = true, []byte(plainConfig)
			},
		},
		{
			"invalid ConfigMap", "network config", Fail, "expected a JSON object",
			`kubectl -n net patch configmap conf --type=merge -p '{"data":{"net-conf.json":`, func(f *Facts) {
				f.kubernetes()
				f.Store.Table.ConfigErr, f.Persisted.Config = errors.New("expected a JSON object"), []byte(plainConfig)
			},
		},
		{
			"no Node", "own lease", Fail, "there is no Node n1", "kubectl get nodes",
			func(f *Facts) {
				f.kubernetes()
				f.Store.Table.Entries, f.Store.OwnErr = f.Store.Table.Entries[1:], errors.New("there is no Node n1")
			},
		},
		{
			"Node with bad annotations", "own lease", Fail, "the Node n1: no JSON", "kubectl get node n1", func(f *Facts) {
				f.kubernetes()
				bad := &subnet.Entry{Key: "10.244.1.0-24", Err: errors.New("no JSON")}
				bad.NodeName = "n1"
				f.Store.Table.Entries[0] = bad
			},
		},
		{
			"Node without annotations", "own lease", Fail, "the daemon announces nothing of it", "overlayd status",
			func(f *Facts) {
				f.kubernetes()
				e := subnet.ParseEntry("10.244.1.0-24", nil, 3, 3, 0)
				e.NodeName = "n1"
				f.Store.Table.Entries[0] = e
			},
		},
		{
			"certificate ended", "certificates", Fail, "--etcd-certfile /c.pem (CN=x) expired", "openssl x509 -in /c.pem",
			func(f *Facts) {
				f.Store.Certificates = []examine.Certificate{{
					What: "--etcd-certfile", File: "/c.pem", Subject: "CN=x", NotAfter: f.Now.Add(-time.Hour),
				}}
			},
		},
		{"certificate ends", "certificates", Warn, "expires in 3 days", "", func(f *Facts) {
			f.Store.Certificates = []examine.Certificate{{What: "the server at x", NotAfter: f.Now.Add(80 * time.Hour)}}
		}},
		{"certificate of tomorrow", "certificates", Fail, "is the clock right", "", func(f *Facts) {
			f.Store.Certificates = []examine.Certificate{{
				What: "x", NotBefore: f.Now.Add(time.Hour), NotAfter: f.Now.Add(8000 * time.Hour),
			}}
		}},
		{
			"key open to others", "credentials", Warn, "--etcd-keyfile /k.pem is open", "chmod go= /k.pem",
			func(f *Facts) { f.Exposed = []Exposure{{"--etcd-keyfile /k.pem is open to other users", "/k.pem"}} },
		},
		{
			"password in plain text", "credentials", Warn, "plain text", "",
			func(f *Facts) { f.Exposed = []Exposure{{Text: "http://x:2379 gets the password in plain text"}} },
		},
		{
			"clock ahead", "clock", Warn, "it is 30s ahead of", "timedatectl set-ntp",
			func(f *Facts) { f.Store.Endpoints[0].Clock = 30 * time.Second },
		},
		{
			"clock behind", "clock", Fail, "it is 1h0m0s behind", "timedatectl set-ntp",
			func(f *Facts) { f.Store.Endpoints[0].Clock = -time.Hour },
		},
		{
			"clock went back", "clock", Fail, "is wrong or was set back", "timedatectl",
			func(f *Facts) { f.Persisted = state.Persisted{Node: f.Identity, Saved: f.Now.Add(time.Hour)} },
		},
		{
			"nothing under the prefix", "network config", Fail, "the prefix is wrong", "get --prefix --keys-only",
			func(f *Facts) { f.Store.Table, f.Store.NoConfig = subnet.Table{}, true },
		},
		{
			"config broken", "network config", Fail, "no good", `put /overlayd/network/config '{"Network":"10.244.0.0/16"`,
			func(f *Facts) {
				f.Store.Table.ConfigErr, f.Persisted = errors.New("no good"),
					state.Persisted{Node: f.Identity, Config: json.RawMessage(plainConfig)}
			},
		},
		{
			"another initial config", "network config", Warn,
			"Network is 10.244.0.0/16 in etcd, 10.245.0.0/16 in --init-config; etcd's is in use",
			`etcdctl --endpoints=http://etcd:2379 put /overlayd/network/config '{"Network":"10.245.0.0/16"}'   # all nodes`,
			func(f *Facts) { f.Settings.Store.Etcd.InitConfig = []byte("{ \"Network\": \"10.245.0.0/16\"\n}") },
		},
		{
			"unknown key", "network config", Warn, "Bakend", "get /overlayd",
			func(f *Facts) { f.Store.Table.ConfigJSON = `{"Network":"10.244.0.0/16","Bakend":{}}` },
		},
		{
			"address inside the network", "network config", Fail, "10.244.9.9/24 of eth0 is inside", "",
			func(f *Facts) { f.address("eth0", "10.244.9.9/24") },
		},
		{
			"address inside the network, and no lease", "network config", Fail, "10.244.9.9/24 of veth1 is inside",
			"get /overlayd/network/config",
			func(f *Facts) {
				f.address("veth1", "10.244.9.9/24")
				f.Self.Subnets = addr.Per[netip.Prefix]{}
			},
		},
		{
			"needed address inside the network", "network config", Fail, "10.244.9.9/24 of eth0 is inside",
			"get /overlayd/network/config   # change Network",
			func(f *Facts) { f.address("eth0", "10.244.9.9/24") },
		},
		{
			"other address inside the network", "network config", Fail, "10.244.9.9/24 of veth1 is inside",
			"ip address del 10.244.9.9/24 dev veth1",
			func(f *Facts) { f.address("veth1", "10.244.9.9/24") },
		},
		{"etcd away, and no lease", "store", Fail, "this node has no lease yet", "endpoint health", func(f *Facts) {
			f.Store.Endpoints[0].Err, f.Store.TableErr = errors.New("etcd: connection refused"),
				errors.New("etcd: connection refused")
			f.Self.Subnets = addr.Per[netip.Prefix]{}
		}},
		{"etcd away, and a lease", "store", Fail, "traffic continues", "endpoint health", func(f *Facts) {
			f.Store.Endpoints[0].Err, f.Store.TableErr = errors.New("etcd: connection refused"),
				errors.New("etcd: connection refused")
		}},
		{
			"etcd away, and the daemon still connected", "store", Fail, "the daemon is still connected", "endpoint health",
			func(f *Facts) {
				f.Store.Endpoints[0].Err, f.Store.TableErr = errors.New("etcd: connection refused"),
					errors.New("etcd: connection refused")
				f.Daemon.Status.Store.Revision = 9
			},
		},
		{
			"etcd only slow", "store", Warn,
			"within 1.5s: context deadline exceeded; the daemon is connected and sees the changes of other nodes",
			"endpoint health", func(f *Facts) {
				f.Store.Endpoints[0].Err, f.Daemon.Status.Store.Revision = late, 9
				f.Store.TableErr = f.Store.Endpoints[0].Err
			},
		},
		{
			"etcd slow with a large table", "store", Warn,
			"leases cannot be read: no answer within 1.5s: context deadline exceeded; the daemon is connected",
			"get --prefix", func(f *Facts) {
				f.Store.TableErr, f.Daemon.Status.Store.Revision = late, 9
			},
		},
		{
			"etcd too slow to try a write", "store", Warn,
			"leases cannot be written: no answer within 1.5s: context deadline exceeded; the daemon is connected",
			"endpoint status", func(f *Facts) {
				f.Store.WriteErr, f.Daemon.Status.Store.Revision = late, 9
			},
		},
		{
			"etcd hangs", "store", Fail,
			"deadline exceeded; traffic continues with the last known peers, changes of other nodes are not seen",
			"endpoint health",
			func(f *Facts) {
				f.Store.Endpoints[0].Err, f.Store.TableErr = late, late
				f.Daemon.Status.Store.Revision, f.Daemon.Status.Store.Error = 9, "no answer from http://etcd:2379"
			},
		},
		{
			"etcd hangs since the start", "store", Fail, "changes of other nodes are not seen", "endpoint health",
			func(f *Facts) {
				f.Store.Endpoints[0].Err, f.Store.TableErr = late, late
			},
		},
		{
			"no lease yet, but the one of the last run", "leases", OK, "none in conflict", "",
			func(f *Facts) { f.Self, f.NoLease = subnet.Lease{}, "the daemon holds no lease" },
		},
		{
			"one address twice", "leases", Fail,
			"rejected: 10.244.2.0-24 of n2: its public IP 192.0.2.2 is that of n9, whose lease 10.244.9.0-24 was written later",
			"del '/overlayd/network/subnets/10.244.2.0-24'",
			func(f *Facts) { f.lease(entry("10.244.9.0-24", "n9", "id9", "192.0.2.2", 9)) },
		},
		{
			"this node's address in another lease that counts", "leases", Fail,
			"rejected: 10.244.9.0-24 of n9: its public IP 192.0.2.1 is this node's own",
			"del '/overlayd/network/subnets/10.244.9.0-24'",
			func(f *Facts) {
				f.lease(entry("10.244.9.0-24", "n9", "id9", "192.0.2.1", 9))
			},
		},
		{
			"one address twice, and the older lease written again", "leases", Fail,
			"10.244.9.0-24 of n9: its public IP 192.0.2.2 is that of n2, whose lease 10.244.2.0-24 was written later",
			"del '/overlayd/network/subnets/10.244.9.0-24'",
			func(f *Facts) {
				f.lease(entry("10.244.9.0-24", "n9", "id9", "192.0.2.2", 9))
				e := f.Store.Table.Find("10.244.2.0-24")
				*e = *subnet.ParseEntry(e.Key, subnet.FormatValue(e.Attrs), 10, e.Created, e.LeaseID)
			},
		},
		{
			"overlap", "leases", Fail, "10.244.2.128-25 of n9: its subnet overlaps 10.244.2.0-24 of n2, which holds it",
			"del '/overlayd/network/subnets/10.244.2.128-25'",
			func(f *Facts) {
				f.lease(entry("10.244.2.128-25", "n9", "id9", "192.0.2.9", 9))
			},
		},
		{
			"clone", "leases", Fail, "n2 and n9 have the same ID id2",
			"rm /etc/machine-id && systemd-machine-id-setup && systemctl restart overlayd   # on one of the two: n9",
			func(f *Facts) {
				f.lease(entry("10.244.9.0-24", "n9", "id2", "192.0.2.9", 9))
			},
		},
		{
			"namesake", "leases", Fail, "two machines are called n2", "10.244.2.0-24",
			func(f *Facts) { f.lease(entry("10.244.9.0-24", "n2", "id9", "192.0.2.9", 9)) },
		},
		{
			"empty reservation beside flannel", "leases", Warn, `the value of "10.244.64.0-18" is not JSON: flannel nodes`,
			"put '/overlayd/network/subnets/10.244.64.0-18' '{}'", func(f *Facts) {
				f.lease(subnet.ParseEntry("10.244.64.0-18", nil, 1, 1, 0))
				f.lease(subnet.ParseEntry("10.244.9.0-24",
					[]byte(`{"PublicIP":"192.0.2.9","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,`+
						`"VtepMAC":"02:00:00:00:00:09"}}`), 2, 2, 7))
			},
		},
		{
			"unreadable lease", "leases", Warn, "1 unreadable leases", "get --prefix",
			func(f *Facts) { f.lease(subnet.ParseEntry("10.244.9.0-24", []byte("{"), 1, 1, 1)) },
		},
		{
			"rejected lease", "leases", Warn, "outside the network", "overlayd leases",
			func(f *Facts) { f.lease(entry("10.9.9.0-24", "n9", "id9", "192.0.2.9", 9)) },
		},
		{
			"address inside the overlay network in another lease", "leases", Warn,
			"1 leases are rejected: 10.244.9.0-24 of n9: its public IP 10.244.3.1 is inside the overlay network",
			"overlayd leases",
			func(f *Facts) { f.lease(entry("10.244.9.0-24", "n9", "id9", "10.244.3.1", 9)) },
		},
		{
			"address in another lease that is not unicast", "leases", Warn, "224.0.0.9 is not a usable unicast address",
			"overlayd leases",
			func(f *Facts) { f.lease(entry("10.244.9.0-24", "n9", "id9", "224.0.0.9", 9)) },
		},
		{
			"lease gone", "own lease", Fail, "the daemon holds 10.244.1.0/24, and etcd has no lease", "overlayd status",
			func(f *Facts) {
				f.Store.Table.Entries = slices.Clone(f.Store.Table.Entries[1:])
			},
		},
		{"address changed", "own lease", Fail, "peers send to 192.0.2.1", "systemctl restart", func(f *Facts) {
			h := f.Survey.Host
			h.Addresses = slices.Clone(h.Addresses)
			h.Addresses[0].Prefix = prefixOf("192.0.2.9/24")
			f.Survey.Host = h.Indexed()
		}},
		{
			"taken over by a clone", "own lease", Fail,
			"another machine with this node's name and ID (a clone of it, with /etc/machine-id and host name) has taken the lease over, and is at 192.0.2.77",
			"ping -c 3 192.0.2.77",
			func(f *Facts) {
				f.Store.Table.Entries = append([]*subnet.Entry{entry("10.244.1.0-24", "n1", "id1", "192.0.2.77", 3)},
					f.Store.Table.Entries[1:]...)
			},
		},
		{
			"address about to change", "own lease", OK, "10.244.1.0-24", "",
			func(f *Facts) { // the daemon is about to write the one that it has
				f.address("eth0", "192.0.2.77/24")
				f.Store.Table.Entries = append([]*subnet.Entry{entry("10.244.1.0-24", "n1", "id1", "192.0.2.77", 3)},
					f.Store.Table.Entries[1:]...)
			},
		},
		{
			"no privileges", "privileges", Fail, "CAP_NET_ADMIN is missing", "sudo overlayd doctor",
			func(f *Facts) { f.Privileges = errors.New("CAP_NET_ADMIN is missing") },
		},
		{"no vxlan", "kernel", Fail, "VXLAN devices: no", "modprobe vxlan", func(f *Facts) {
			f.Support = []support{{"VXLAN devices", errors.New("no"), "modprobe vxlan"}}
		}},
		{
			"no forwarding", "forwarding", Fail, "net/ipv4/ip_forward is 0", "sysctl -w net/ipv4/ip_forward=1",
			func(f *Facts) { f.System.Sysctls["net/ipv4/ip_forward"] = "0" },
		},
		{
			"no forwarding on a device", "forwarding", Fail, "cni0/forwarding is 0", "sysctl -w net/ipv4/conf/cni0/forwarding=1",
			func(f *Facts) { f.System.Sysctls[deviceForwarding("cni0")] = "0" },
		},
		{
			"no br_netfilter", "bridge netfilter", Fail,
			"the module br_netfilter is not loaded: pods lose replies of services",
			"modprobe br_netfilter && echo br_netfilter",
			func(f *Facts) {
				f.Filter = packetfilter.Filter{base("ip", "filter", "KUBE-SERVICES", "", "")}
				delete(f.System.Sysctls, netstate.BridgeNetfilter(addr.IPv4).Path)
			},
		},
		{
			"no br_netfilter, kube-proxy of nftables", "bridge netfilter", Fail, "the module br_netfilter is not loaded",
			"modprobe br_netfilter",
			func(f *Facts) {
				f.Filter = packetfilter.Filter{base("ip", "kube-proxy", "filter-forward", "forward", "accept")}
				delete(f.System.Sysctls, netstate.BridgeNetfilter(addr.IPv4).Path)
			},
		},
		{
			"bridge netfilter off", "bridge netfilter", Fail, "net/bridge/bridge-nf-call-iptables is 0: pods lose replies",
			"sysctl -w net/bridge/bridge-nf-call-iptables=1",
			func(f *Facts) {
				f.Filter = packetfilter.Filter{base("ip", "filter", "KUBE-FORWARD", "", "")}
				f.System.Sysctls[netstate.BridgeNetfilter(addr.IPv4).Path] = "0"
			},
		},
		{
			"bridge netfilter off for IPv6", "bridge netfilter", Fail, "bridge-nf-call-ip6tables is 0",
			"bridge-nf-call-ip6tables=1",
			func(f *Facts) {
				f.Filter = packetfilter.Filter{base("ip6", "filter", "KUBE-FORWARD", "", "")}
				f.dual(t)
				f.System.Sysctls[netstate.BridgeNetfilter(addr.IPv6).Path] = "0"
			},
		},
		{"bridge netfilter on", "bridge netfilter", OK, "see bridged packets", "", func(f *Facts) {
			f.Filter = packetfilter.Filter{base("ip", "filter", "KUBE-SERVICES", "", "")}
		}},
		{
			"no kube-proxy", "bridge netfilter", Skipped, "no kube-proxy rules", "",
			func(f *Facts) { f.System.Sysctls[netstate.BridgeNetfilter(addr.IPv4).Path] = "0" },
		},
		{"kube-proxy and no bridge", "bridge netfilter", Skipped, "no pod bridge", "", func(f *Facts) {
			f.Filter = packetfilter.Filter{base("ip", "filter", "KUBE-SERVICES", "", "")}
			f.Survey.Host.Addresses = slices.Clone(f.Survey.Host.Addresses[:2])
			f.Survey.Host = f.Survey.Host.Indexed()
			f.Survey.Links = f.Survey.Links[:2]
		}},
		{
			"interface down", "interface", Fail, "eth0, which leads to the other nodes, is down", "ip link set eth0 up",
			func(f *Facts) { f.link("eth0", func(l *netstate.SurveyLink) { l.Up = false }) },
		},
		{
			"cable", "interface", Fail, "no carrier", "ip -br link show eth0",
			func(f *Facts) { f.link("eth0", func(l *netstate.SurveyLink) { l.Carrier = false }) },
		},
		{
			"two default routes", "interface", Warn, "default routes by eth0 and eth1", "echo OVERLAYD_IFACE=eth0",
			func(f *Facts) {
				f.route(netstate.HostRoute{Dst: prefixOf("0.0.0.0/0"), Via: addrOf("203.0.113.1"), Link: "eth1", Metric: 9})
			},
		},
		{
			"no interface", "interface", Fail, "none fits", "ip -br address",
			func(f *Facts) { f.ChooseErr = errors.New("none fits") },
		},
		{
			"no default route", "interface", Fail, "eth0, used so far", "ip route add default via GATEWAY dev eth0",
			func(f *Facts) {
				f.Survey.Host.Routes = slices.Clone(f.Survey.Host.Routes[1:])
				f.Survey.Host = f.Survey.Host.Indexed()
				f.Daemon.Status.Problems = []status.Problem{{
					Name: "underlay", Reason: "no network interface for IPv4 yet (x); eth0, used so far, is unchanged, but no route uses it", Since: f.Now, Fatal: true,
				}}
			},
		},
		{
			"strict tunnel", "rp_filter", Warn, "strict on overlay.1", "sysctl -w net/ipv4/conf/overlay.1/rp_filter=2",
			func(f *Facts) {
				f.System.Sysctls[rpFilter("all")], f.Pings.Sample[0].path, f.Pings.Sample[0].small.Lost = "1", "direct", 2
			},
		},
		{
			"strict underlay", "rp_filter", Fail, "n3 (198.51.100.3, by eth1)", "sysctl -w net/ipv4/conf/eth0/rp_filter=2",
			func(f *Facts) {
				f.System.Sysctls[rpFilter("eth0")] = "1"
				f.route(netstate.HostRoute{Dst: prefixOf("198.51.100.0/24"), Link: "eth1"})
			},
		},
		{
			"foreign route", "routes", Fail, "10.244.2.128/25 by eth0, metric 0, belongs to another program",
			"ip route del 10.244.2.128/25 dev eth0 metric 0",
			func(f *Facts) {
				f.route(netstate.HostRoute{Dst: prefixOf("10.244.2.128/25"), Via: addrOf("192.0.2.7"), Link: "eth0"})
			},
		},
		{"learning", "learning", OK, "it is on; as far as leases tell, peers send from", "", func(f *Facts) { f.learn() }},
		{
			"learning, and a peer behind NAT", "learning", Fail,
			"no device of these nodes has the address that they announce (NAT): n3 (10.244.3.0-24)",
			`put /overlayd/network/config '{"Backend":{"Learning":false,"Type":"vxlan"},"Network":"10.244.0.0/16"}'`,
			func(f *Facts) {
				f.learn()
				f.lease(natted(entry("10.244.3.0-24", "n3", "id3", "198.51.100.3", 6)))
			},
		},
		{
			"learning, and a peer of flannel", "learning", OK, "it is on; as far as leases tell, peers send from", "",
			func(f *Facts) {
				f.learn()
				f.lease(natted(entry("10.244.3.0-24", "", "", "198.51.100.3", 6)))
			},
		},
		{"no learning, and a peer behind NAT", "learning", OK, "does not learn", "", func(f *Facts) {
			f.lease(natted(entry("10.244.3.0-24", "n3", "id3", "198.51.100.3", 6)))
		}},
		{
			"learning, and this node behind NAT", "learning", Fail, "peers drop what it sends", `"Learning":false`,
			func(f *Facts) {
				f.learn()
				f.lease(natted(entry("10.244.1.0-24", "n1", "id1", "192.0.2.1", 6)))
			},
		},
		{
			"no IPv6 on the bridge", "IPv6", Fail, "disabled on cni0", "sysctl -w net/ipv6/conf/cni0/disable_ipv6=0",
			func(f *Facts) {
				f.dual(t)
				f.System.Sysctls["net/ipv6/conf/cni0/disable_ipv6"] = "1"
			},
		},
		{
			"no IPv6 on the uplink", "IPv6", Fail, "disabled on eth0, which leads to the other nodes",
			"sysctl -w net/ipv6/conf/eth0/disable_ipv6=0", func(f *Facts) {
				f.dual(t)
				f.Underlay.By.V6.Device = "eth0"
				f.System.Sysctls["net/ipv6/conf/eth0/disable_ipv6"] = "1"
			},
		},
		{
			"no IPv6 on new devices", "IPv6", Warn, "disabled on new devices", "sysctl -w net/ipv6/conf/default/disable_ipv6=0",
			func(f *Facts) {
				f.dual(t)
				f.System.Sysctls["net/ipv6/conf/default/disable_ipv6"] = "1"
			},
		},
		{
			"no answer to pings", "pings", Warn, "net/ipv4/icmp_echo_ignore_all is 1: this node answers no pings",
			"sysctl -w net/ipv4/icmp_echo_ignore_all=0", func(f *Facts) {
				f.System.Sysctls["net/ipv4/icmp_echo_ignore_all"] = "1"
			},
		},
		{
			"a peer ignores pings", "peers answer", OK,
			"n2 (10.244.2.0) ignores pings (is net/ipv4/icmp_echo_ignore_all 1 there?)", "", func(f *Facts) {
				f.Pings.Sample[0].mute = true
			},
		},
		{
			"a VPN", "policy routing", Fail,
			`packets from this node to pods of n2 leave by vpn0 (table 52), not by overlay.1: ` +
				`the rule "0 from all to 10.0.0.0/8 lookup 52"`,
			"ip rule   # give that rule a higher number, or exclude 10.244.0.0/16 in its program",
			func(f *Facts) { f.vpn(netstate.Answer{Link: "vpn0", Table: 52}) },
		},
		{
			"a VPN, and no daemon", "policy routing", Fail, "the rule \"0 from all to 10.0.0.0/8 lookup 52\"",
			"systemctl start overlayd", func(f *Facts) {
				f.vpn(netstate.Answer{Link: "vpn0", Table: 52})
				f.Daemon = DaemonFacts{}
			},
		},
		{
			"prohibited", "policy routing", Fail,
			"are not sent (permission denied): the rule \"0 from all to 10.0.0.0/8 lookup 52\"", "ip rule", func(f *Facts) {
				f.vpn(netstate.Answer{Err: unix.EACCES})
			},
		},
		{
			"our rule missing", "policy routing", Fail, "leave by eth0 (table 254), not by overlay.1",
			"overlayd diff; ip rule; ip route get 192.0.2.2", func(f *Facts) {
				f.Flows[0].To, f.Flows[0].desired.Table, f.Flows[0].Answer = addrOf("192.0.2.2"),
					netstate.OwnTable, netstate.Answer{Link: "eth0", Table: netstate.MainTable}
			},
		},
		{
			"the store elsewhere", "interface", Warn,
			"eth0 is used to reach the other nodes, but etcd (192.0.2.100) is reached by eth1", "OVERLAYD_IFACE=eth1",
			func(f *Facts) {
				f.ToStore[0].Link = "eth1"
			},
		},
		{"the store inside the network", "interface", OK, "192.0.2.1 on eth0", "", func(f *Facts) {
			f.ToStore[0].To, f.ToStore[0].Link = addrOf("10.244.1.9"), "br-pods"
		}},
		{"the store by the tunnel", "interface", OK, "192.0.2.1 on eth0", "", func(f *Facts) {
			f.ToStore[0].Link = "overlay.1"
			f.link("overlay.1", func(l *netstate.SurveyLink) { l.Tunnel = true })
		}},
		{"the store elsewhere, as was chosen", "interface", OK, "192.0.2.1 on eth0", "", func(f *Facts) {
			f.ToStore[0].Link, f.Underlay.ByDefault = "eth1", false
		}},
		{
			"the store elsewhere, as was chosen, and no peer answers", "interface", Warn, "is reached by eth1",
			"OVERLAYD_IFACE=eth1", func(f *Facts) {
				f.ToStore[0].Link, f.Underlay.ByDefault, f.Pings.Sample = "eth1", false, nil
			},
		},
		{"the store on this node", "interface", OK, "192.0.2.1 on eth0", "", func(f *Facts) {
			f.ToStore[0].Link, f.ToStore[0].Table = "lo", unix.RT_TABLE_LOCAL
		}},
		{
			"a silent peer, and no route by the device", "interface", Fail,
			"no route over eth0, to which the tunnel is bound, leads to n3 (198.51.100.3)", "ip route get 198.51.100.3",
			func(f *Facts) {
				f.Survey.Host.Routes[0].Link = "eth1"
				for i := range f.Pings.Sample {
					f.Pings.Sample[i].small = Pong{Sent: 2, Lost: 2}
				}
			},
		},
		{
			"an answering peer, and no route by the device", "interface", OK, "192.0.2.1 on eth0", "",
			func(f *Facts) { f.Survey.Host.Routes[0].Link = "eth1" },
		},
		{"a dummy", "interface", Warn, "eth0 is a dummy device", "OVERLAYD_IFACE=DEVICE", func(f *Facts) {
			f.link("eth0", func(l *netstate.SurveyLink) { l.Kind = "dummy" })
		}},
		{
			"flannel's route to a peer", "routes", Fail, "10.244.2.0/24 by eth0, metric 0, belongs to another program",
			"ip route del 10.244.2.0/24 dev eth0 metric 0", func(f *Facts) {
				f.route(netstate.HostRoute{Dst: prefixOf("10.244.2.0/24"), Via: addrOf("192.0.2.2"), Link: "eth0"})
			},
		},
		{
			"flannel's route behind ours", "routes", Warn, "10.244.2.0/24 via 192.0.2.2 by eth0 belongs to another program",
			"dev eth0 metric 1024", func(f *Facts) {
				f.route(netstate.HostRoute{Dst: prefixOf("10.244.2.0/24"), Via: addrOf("192.0.2.2"), Link: "eth0", Metric: 1024})
			},
		},
		{
			"flannel's route to no peer", "routes", Warn, "10.244.9.0/24 via 192.0.2.9 by eth0 belongs to another program",
			"ip route del 10.244.9.0/24 via 192.0.2.9 dev eth0 metric 0", func(f *Facts) {
				f.route(netstate.HostRoute{Dst: prefixOf("10.244.9.0/24"), Via: addrOf("192.0.2.9"), Link: "eth0"})
			},
		},
		{
			"routes missing", "routes", Fail, "10.244.2.0/24 (n2)", "overlayd diff",
			func(f *Facts) { f.Survey.Ours.Routes = f.Survey.Ours.Routes[1:] },
		},
		{
			"no device", "tunnel device", Fail, "overlay.1 does not exist", "overlayd status",
			func(f *Facts) { f.Survey.Links = append(slices.Clone(f.Survey.Links[:1]), f.Survey.Links[2:]...) },
		},
		{
			"device down", "tunnel device", Fail, "overlay.1 is down", "ip link set overlay.1 up",
			func(f *Facts) { f.link("overlay.1", func(l *netstate.SurveyLink) { l.Up = false }) },
		},
		{
			"other VNI", "tunnel device", Fail, "has VNI 7 and UDP port 8472", "",
			func(f *Facts) { f.link("overlay.1", func(l *netstate.SurveyLink) { l.VXLAN.VNI = 7 }) },
		},
		{
			"other MAC", "tunnel device", Fail, "the lease announces 02:00:00:00:00:03",
			"ip link set overlay.1 address 02:00:00:00:00:03",
			func(f *Facts) {
				f.link("overlay.1", func(l *netstate.SurveyLink) { l.MAC[5] = 9 })
			},
		},
		{
			"VNI taken", "tunnel port", Fail, "flannel.x has VNI 1 on UDP port 8472, so that the kernel refuses overlay.1",
			"ip link delete flannel.x",
			func(f *Facts) {
				f.Survey.Links = append(f.Survey.Links,
					netstate.SurveyLink{HostLink: netstate.HostLink{
						Name: "flannel.x", VXLAN: netstate.VXLAN{VNI: 1, Port: 8472},
						Kind: "vxlan",
					}})
			},
		},
		{"port taken", "tunnel port", Fail, "taken by another program", "ss -ulnp", func(f *Facts) {
			f.Survey.Links = append(slices.Clone(f.Survey.Links[:1]), f.Survey.Links[2:]...)
			f.System.Sockets = []udpSocket{{port: 8472, inode: "12"}}
		}},
		{"port taken while the device is down", "tunnel port", Fail, "taken by another program", "ss -ulnp", func(f *Facts) {
			f.link("overlay.1", func(l *netstate.SurveyLink) { l.Up = false })
			f.System.Sockets = []udpSocket{{port: 8472, inode: "12", v6: true, any: true}}
		}},
		{
			"device down and its port taken", "tunnel device", Fail,
			"cannot be set up while another program has its UDP port",
			"ss -ulnp",
			func(f *Facts) {
				f.link("overlay.1", func(l *netstate.SurveyLink) { l.Up = false })
				f.System.Sockets = []udpSocket{{port: 8472, inode: "12"}}
			},
		},
		{"port of an IPv6 address", "tunnel port", OK, "no other program uses", "", func(f *Facts) {
			f.link("overlay.1", func(l *netstate.SurveyLink) { l.Up = false })
			f.System.Sockets = []udpSocket{{port: 8472, inode: "12", v6: true}}
		}},
		{
			"device's MTU", "MTU", Fail, "eth0 with 1500 carries only 1450", "ip link set overlay.1 mtu 1450",
			func(f *Facts) { f.link("overlay.1", func(l *netstate.SurveyLink) { l.MTU = 1500 }) },
		},
		{
			"device's MTU too small", "MTU", Fail, "expected 1450", "ip link set overlay.1 mtu 1450",
			func(f *Facts) { f.link("overlay.1", func(l *netstate.SurveyLink) { l.MTU = 1300 }) },
		},
		{
			"bridge's MTU", "MTU", Warn, "cni0 has an MTU of 1500", "ip link set cni0 mtu 1450",
			func(f *Facts) { f.link("cni0", func(l *netstate.SurveyLink) { l.MTU = 1500 }) },
		},
		{
			"pod's MTU", "MTU", Warn, "veth1 1500", "ip link set veth1 mtu 1450",
			func(f *Facts) { f.link("veth1", func(l *netstate.SurveyLink) { l.MTU = 1500 }) },
		},
		{
			"bridge's address", "bridge", Fail,
			"docker0 has the address 10.244.77.1/24, but this node's subnet is 10.244.1.0/24: its containers",
			"ip -br link show master docker0",
			func(f *Facts) {
				f.Survey.Links = append(f.Survey.Links,
					netstate.SurveyLink{HostLink: netstate.HostLink{Name: "docker0", Kind: "bridge", Up: true}})
				f.address("docker0", "10.244.77.1/24")
			},
		},
		{"Docker's bridge before the first pod", "bridge", OK, "none yet", "", func(f *Facts) {
			f.Survey.Host.Addresses = slices.Clone(f.Survey.Host.Addresses[:2])
			f.address("cni0", "172.17.0.1/16")
		}},
		{
			"the bridge lost its address and ports", "bridge", Fail,
			"cni0 has lost its address 10.244.1.1/24, the gateway of this node's pods; " +
				"cni0 has lost 1 of its ports (veth1): pods there are cut off", "ip address replace 10.244.1.1/24 dev cni0",
			func(f *Facts) {
				f.bridgeWas("cni0", "10.244.1.1/24", "veth1")
				f.Survey.Host.Addresses = f.Survey.Host.Addresses[:2]
			},
		},
		{
			"the bridge has all that it had", "bridge", OK, "cni0 has an address", "",
			func(f *Facts) { f.bridgeWas("cni0", "10.244.1.1/24") },
		},
		{"the bridge was removed with its pods", "bridge", OK, "none yet", "", func(f *Facts) {
			f.Persisted = state.Persisted{
				Node: f.Identity,
				Bridges: []netstate.PodBridge{{
					Name: "br-pods", Addrs: addr.Per[netip.Prefix]{V4: prefixOf("10.244.1.1/24")},
					Ports: []netstate.BridgePort{{Index: 99, Name: "veth9"}},
				}},
			}
			f.Survey.Links, f.Survey.Host.Addresses = f.Survey.Links[:2], f.Survey.Host.Addresses[:2]
		}},
		{"no bridge yet", "bridge", OK, "none yet", "", func(f *Facts) {
			f.Survey.Host.Addresses = slices.Clone(f.Survey.Host.Addresses[:2])
			f.Survey.Host = f.Survey.Host.Indexed()
			f.Survey.Links = f.Survey.Links[:2]
		}},
		{
			"bridge down", "bridge", Fail, "cni0 is down", "ip link set cni0 up",
			func(f *Facts) { f.link("cni0", func(l *netstate.SurveyLink) { l.Up = false }) },
		},
		{"no checksums", "offloads", Warn, "overlay.1 has tx disabled", "ethtool -K overlay.1 tx on", func(f *Facts) {
			f.link("overlay.1", func(l *netstate.SurveyLink) { l.Offloads = []netstate.Offload{{Name: "tx"}} })
		}},
		{"flannel", "other overlays", Warn, "flannel.2", "ip link delete flannel.2", func(f *Facts) {
			f.Survey.Links = append(f.Survey.Links,
				netstate.SurveyLink{HostLink: netstate.HostLink{Name: "flannel.2", Kind: "vxlan"}})
		}},
		{"flannel for IPv6", "other overlays", Warn, "flannel-v6.1", "ip link delete flannel-v6.1", func(f *Facts) {
			f.Survey.Links = append(f.Survey.Links,
				netstate.SurveyLink{HostLink: netstate.HostLink{Name: "flannel-v6.1", Kind: "vxlan"}})
		}},
		{
			"flannel's chain", "other overlays", Warn, "table ip nat, chain FLANNEL-POSTRTG",
			"iptables-save -t nat | sed -n '/FLANNEL-POSTRTG/s/^-A/-D/p'", func(f *Facts) {
				f.Filter = packetfilter.Filter{packetfilter.Chain{Family: "ip", Table: "nat", Name: "FLANNEL-POSTRTG"}}
			},
		},
		{
			"flannel's chain for IPv6, legacy", "other overlays", Warn, "ip6tables-legacy-save -t filter, chain FLANNEL-FWD",
			"| ip6tables-legacy-restore --noflush", func(f *Facts) {
				f.Legacy = []packetfilter.Legacy{{
					Save: "ip6tables-legacy-save", Table: "filter", Chain: "FLANNEL-FWD", Policy: "-",
				}}
			},
		},
		{
			"flannel's table", "other overlays", Warn, "table ip6 flannel-ipv6", "nft delete table ip6 flannel-ipv6",
			func(f *Facts) {
				f.Filter = packetfilter.Filter{base("ip6", "flannel-ipv6", "postrtg", "postrouting", "accept")}
			},
		},
		{
			"mixed iptables", "iptables variants", Warn, "legacy has 3 rules and iptables-nft 4", "iptables-legacy-save",
			func(f *Facts) {
				f.Legacy = []packetfilter.Legacy{{
					Save: "iptables-legacy-save", Table: "filter", Chain: "INPUT", Policy: "ACCEPT", Rules: []string{"a", "b", "c"},
				}}
				f.Filter = packetfilter.Filter{base("ip", "filter", "x", "", "", make([]packetfilter.Rule, 4)...)}
			},
		},
		{
			"firewalld", "tunnel in the firewall", Fail, "dropped by table inet firewalld, chain filter_INPUT",
			"firewall-cmd --zone=",
			func(f *Facts) {
				f.Filter = packetfilter.Filter{base("inet", "firewalld", "filter_INPUT", "input", "accept", dropPort)}
			},
		},
		{
			"ufw", "tunnel in the firewall", Fail, "its policy", "ufw allow in on eth0 to any port 8472 proto udp",
			func(f *Facts) {
				f.Filter, f.System.UFW = packetfilter.Filter{base("ip", "filter", "INPUT", "input", "drop")}, true
			},
		},
		{
			"iptables", "tunnel in the firewall", Fail, `"udp dport 8472 drop"`,
			"iptables -I INPUT -i eth0 -p udp --dport 8472 -j ACCEPT",
			func(f *Facts) {
				f.Filter = packetfilter.Filter{base("ip", "filter", "INPUT", "input", "accept", dropPort)}
			},
		},
		{
			"nft", "tunnel in the firewall", Fail, "table inet site, chain in",
			"nft insert rule inet site in iifname eth0 udp dport 8472 accept",
			func(f *Facts) {
				f.Filter = packetfilter.Filter{base("inet", "site", "in", "input", "accept", dropPort)}
			},
		},
		{
			"nft, out", "tunnel in the firewall", Fail, "that leave by eth0 are dropped",
			"nft insert rule inet site out oifname eth0",
			func(f *Facts) {
				f.Filter = packetfilter.Filter{base("inet", "site", "out", "output", "accept", dropPort)}
			},
		},
		{
			"rate", "tunnel in the firewall", Warn, "not sure whether", "nft insert",
			func(f *Facts) { f.Filter = packetfilter.Filter{base("inet", "site", "in", "input", "accept", rate)} },
		},
		{
			"forward policy", "forwarded packets", Fail,
			"from pods of other nodes are dropped by table ip filter, chain FORWARD: its policy",
			"iptables -I FORWARD -s 10.244.0.0/16 -j ACCEPT",
			func(f *Facts) {
				f.Filter = packetfilter.Filter{base("ip", "filter", "FORWARD", "forward", "drop")}
			},
		},
		{
			"forward policy, no daemon", "forwarded packets", Fail, "chain FORWARD: its policy", "it accepts them by itself",
			func(f *Facts) {
				f.Filter, f.Daemon.Running, f.ForwardFW = packetfilter.Filter{base("ip", "filter", "FORWARD", "forward", "drop")},
					false, true
			},
		},
		{
			"forward rule, no daemon", "forwarded packets", Fail, "chain FORWARD: \"ip daddr 10.244.0.0/16 drop\"",
			"iptables -I FORWARD", func(f *Facts) {
				toPods := packetfilter.Test{
					Key: []packetfilter.Key{{Field: packetfilter.Destination}},
					Any: [][]packetfilter.Range{{{From: []byte{10, 244}, To: []byte{10, 244}}}},
				}
				drop := packetfilter.Rule{
					Tests:  []packetfilter.Test{toPods},
					Action: packetfilter.Action{Verdict: packetfilter.Drop},
				}
				f.Filter, f.Daemon.Running, f.ForwardFW = packetfilter.Filter{base("ip", "filter", "FORWARD", "forward", "accept",
					drop)},
					false, true
			},
		},
		{
			"forward policy but for one port", "forwarded packets", Fail,
			"packets (except those that an earlier rule accepts) from pods of other nodes are dropped by table ip filter, chain FORWARD: its policy",
			"iptables -I FORWARD",
			func(f *Facts) {
				f.Filter = packetfilter.Filter{base("ip", "filter", "FORWARD", "forward", "drop", tcpPort(22, packetfilter.Accept))}
			},
		},
		{
			"one port of pods closed", "forwarded packets", Warn, "not sure whether packets from pods", "iptables -I FORWARD",
			func(f *Facts) {
				f.Filter = packetfilter.Filter{base("ip", "filter", "FORWARD", "forward", "accept", tcpPort(25, packetfilter.Drop))}
			},
		},
		{
			"translated", "masqueraded packets", Warn,
			"masqueraded by table ip foreign, chain c: \"ip saddr 10.0.0.0/8 masquerade\"; exclude 10.244.0.0/16",
			"nft -a list chain ip foreign c",
			func(f *Facts) {
				c := base("ip", "foreign", "c", "postrouting", "accept", packetfilter.Rule{
					Tests: []packetfilter.Test{{
						Key: []packetfilter.Key{{Field: packetfilter.Source}},
						Any: [][]packetfilter.Range{{{From: []byte{10}, To: []byte{10}}}},
					}},
					Action: packetfilter.Action{Verdict: packetfilter.Translate},
				})
				c.NAT = true
				f.Filter = packetfilter.Filter{c}
			},
		},
		{
			"networkd", "systemd-networkd", Warn, "may change addresses, routes and ports of devices",
			"overlayd doctor --fix   # writes /etc/systemd/network/10-overlayd.network",
			func(f *Facts) { f.System.Managers = managed(managerFacts{runs: true, told: []bool{false, true}}) },
		},
		{
			"networkd's routes", "systemd-networkd", Warn, "removes foreign routes and rules",
			"/etc/systemd/networkd.conf.d/overlayd.conf",
			func(f *Facts) { f.System.Managers = managed(managerFacts{runs: true, told: []bool{true, false}}) },
		},
		{
			"networkd, and a bridge that no file names", "systemd-networkd", Warn, "leave the pod bridge br7 alone",
			"${EDITOR:-vi} /etc/systemd/network/10-overlayd.network   # add that name", func(f *Facts) {
				f.System.Managers = managed(managerFacts{runs: true, told: []bool{true, true}, bridges: []string{"br7"}})
			},
		},
		{
			"networkd does not run", "systemd-networkd", OK, "not running", "",
			func(f *Facts) { f.System.Managers = managed(managerFacts{told: []bool{false, false}}) },
		},
		{
			"neighbours", "neighbour table", Warn, "gc_thresh3 is 128", "sysctl -w net/ipv4/neigh/default/gc_thresh3=2048",
			func(f *Facts) { f.System.Sysctls[threshold(addr.IPv4, 3)] = "128" },
		},
		{
			"connections", "connection table", Fail, "990 of 1000 connections (99 %)", "nf_conntrack_max=2000",
			func(f *Facts) { f.System.Sysctls["net/netfilter/nf_conntrack_count"] = "990" },
		},
		{
			"unreachable", "peers", Fail, "n2 (10.244.2.0/24): no route", "overlayd status --peers",
			func(f *Facts) { f.Peers[0].path, f.Peers[0].reason = "unreachable", "no route" },
		},
		{"silent", "peers answer", Fail, "none of the 2 pinged", "tcpdump -ni any -c 20 udp port 8472", func(f *Facts) {
			for i := range f.Pings.Sample {
				f.Pings.Sample[i].small.Lost = 2
			}
		}},
		{
			"one silent", "peers answer", Fail, "1 of the 2 pinged does not answer through the pod network: n2 (10.244.2.0)",
			"overlayd status --peers",
			func(f *Facts) { f.Pings.Sample[0].small.Lost = 2 },
		},
		{
			"kernel refuses", "peers answer", Fail, "the kernel refuses to send to 1 of 2: n3 (10.244.3.0)",
			"ip route get 10.244.3.0",
			func(f *Facts) {
				f.Pings.Sample[1].small = Pong{Sent: 2, Lost: 2, Err: unix.EPERM}
			},
		},
		{
			"lossy", "peers answer", Warn, "some packets to 1 of 2 are lost", "",
			func(f *Facts) { f.Pings.Sample[0].small.Lost = 1 },
		},
		{
			"black hole", "full-size packets", Fail, "the path MTU is 1400",
			`put /overlayd/network/config '{"Backend":{"MTU":1400,"Type":"vxlan"},"Network":"10.244.0.0/16"}'`, func(f *Facts) {
				f.Pings.Sample[0].full.Lost = 2
				f.Pings.Largest.Peer, f.Pings.Largest.Size, f.Pings.Largest.Exact = f.Peers[0], 1350, true
			},
		},
		{
			"black hole, not measured to the end", "full-size packets", Fail,
			"at least 1350 get through to n2; the search did not finish",
			"tcpdump",
			func(f *Facts) {
				f.Pings.Sample[0].full.Lost = 2
				f.Pings.Largest.Peer, f.Pings.Largest.Size = f.Peers[0], 1350
			},
		},
		{
			"black hole, keys in another letter case", "full-size packets", Fail, "the path MTU is 1420",
			`put /overlayd/network/config '{"Backend":{"MTU":1420},"network":"10.244.0.0/16"}'`, func(f *Facts) {
				f.Store.Table.ConfigJSON = `{"network":"10.244.0.0/16","backend":{"mtu":1500}}`
				f.Pings.Sample[0].full.Lost = 2
				f.Pings.Largest.Peer, f.Pings.Largest.Size, f.Pings.Largest.Exact = f.Peers[0], 1370, true
			},
		},
		{
			"black hole too small for IPv6", "full-size packets", Fail, "is 1349: less than the overlay needs (1350)", "tcpdump",
			func(f *Facts) {
				f.dual(t)
				f.Pings.Sample[0].full.Lost = 2
				f.Pings.Largest.Peer, f.Pings.Largest.Size, f.Pings.Largest.Exact = f.Peers[0], 1299, true
			},
		},
		{
			"black hole without a tunnel", "full-size packets", Fail,
			"the largest packet that reaches n2 is 1400, so the path MTU is 1400",
			`'{"Backend":{"MTU":1400,"Type":"host-gw"},"Network":"10.244.0.0/16"}'`, func(f *Facts) {
				f.Daemon.Status.Network.Backend = "host-gw"
				f.Store.Table.ConfigJSON = `{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}`
				f.Pings.Sample[0].full.Lost = 2
				f.Pings.Largest.Peer, f.Pings.Largest.Size, f.Pings.Largest.Exact = f.Peers[0], 1400, true
				f.Pings.Largest.Peer.path = "direct"
			},
		},
		{
			"full packets lossy", "full-size packets", Warn,
			"some packets of 1450 bytes to 1 of 2 are lost: n2 (10.244.2.0): 2 of 5",
			"",
			func(f *Facts) {
				f.Pings.Sample[0].full.Sent, f.Pings.Sample[0].full.Lost = 5, 2
			},
		},
		{"silent to all sizes", "full-size packets", Skipped, "no peer answers small packets", "", func(f *Facts) {
			for i := range f.Pings.Sample {
				f.Pings.Sample[i].small.Lost, f.Pings.Sample[i].full.Lost = 2, 2
			}
		}},
		{"full packets not sent", "full-size packets", Skipped, "took longer", "", func(f *Facts) {
			f.Pings.FullErr = errors.New("it took longer")
			for i := range f.Pings.Sample {
				f.Pings.Sample[i].sized = false
			}
		}},
		{
			"too large to send", "full-size packets", Fail, "this node cannot send such packets", "ip -d link",
			func(f *Facts) {
				f.Pings.Sample[0].full = Pong{Sent: 2, Lost: 2, Err: unix.EMSGSIZE}
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := healthy(t)
			tt.spoil(&f)
			found := false
			for _, x := range judge(f) {
				if x.Mark == Fail && x.Check != tt.check && !slices.Contains(also[tt.name], x.Check) {
					t.Errorf("it fails too: %s: %s", x.Check, x.Reason)
				}
				if slices.ContainsFunc(x.Fix, destructive) {
					t.Errorf("%s: steps: %q", x.Reason, x.Fix)
				}
				if x.Check == tt.check && x.Mark == tt.mark && strings.Contains(x.Reason, tt.text) {
					found = true
					if len(x.Fix) == 0 && tt.steps != "" || len(x.Fix) > 0 && !strings.Contains(x.Fix[0], tt.steps) {
						t.Errorf("steps: %q, want %q in the first", x.Fix, tt.steps)
					}
				}
			}
			if !found {
				for _, x := range judge(f) {
					if x.Mark != OK {
						t.Logf("%+v", x)
					}
				}
				t.Errorf("no %s of %s with %q", tt.mark, tt.check, tt.text)
			}
			f.Service = Service{Namespace: "net", Pod: "overlayd-x7"} // there is no systemd for whom runs it as a pod
			for _, x := range judge(f) {
				for _, m := range x.Fix {
					if destructive(m) || strings.Contains(m, "systemctl") || strings.Contains(m, "journalctl") ||
						strings.Contains(m, "overlayd.env &&") {
						t.Errorf("of a pod: %s: steps: %s", x.Reason, m)
					}
				}
			}
		})
	}
}

// With hardly any facts, nothing is claimed and nothing breaks.
func TestNoFacts(t *testing.T) {
	t.Parallel()
	f := Facts{
		Errs:     map[string]error{"devices": errors.New("no"), "nftables": errors.New("no")},
		Settings: Settings{StateDir: "/", SubnetFile: "/x/y"},
	}
	f.System.SubnetEnvErr = os.ErrNotExist
	f.Pings.Err = errNoPeer
	for _, x := range judge(f) {
		if x.Mark == Fail && !slices.Contains([]string{"daemon", "subnet file", "forwarding"}, x.Check) || x.Reason == "" {
			t.Errorf("%+v", x)
		}
	}
}

// managed are the facts of a node on which systemd-networkd runs, or not, and no other.
func managed(networkd managerFacts) []managerFacts { return []managerFacts{networkd, {}, {}} }

// A bridge with the address of another subnet goes only where it must be that of pods; what is remembered of addresses
// is shown, not removed.
func TestBridgeOfAnotherSubnet(t *testing.T) {
	t.Parallel()
	f := healthy(t)
	f.Survey.Host.Addresses = slices.Clone(f.Survey.Host.Addresses[:2])
	f.address("cni0", "10.244.77.1/24")
	for _, x := range judgeBridge(f) {
		if strings.Contains(x.Reason, "cni0 has the address 10.244.77.1/24") && x.Mark == Fail && len(x.Fix) == 2 &&
			x.Fix[0] == "ip link delete cni0   # if pods are on it" && strings.HasPrefix(x.Fix[1], "ls /var/lib/cni/networks ") {
			return
		}
	}
	t.Errorf("%+v", judgeBridge(f))
}

// What a pod can't see of its host is not judged, and not fixed inside of the pod.
func TestInAPod(t *testing.T) {
	t.Parallel()
	f := healthy(t)
	f.Service = Service{Namespace: "net", Pod: "overlayd-x7"}
	for _, m := range [][]managerFacts{nil, managed(managerFacts{runs: true, told: []bool{false, false}})} {
		f.System.Managers = m
		n := 0
		for _, x := range judge(f) {
			if slices.Contains([]string{"systemd-networkd", "NetworkManager", "udev"}, x.Check) {
				n++
				if x.Mark != Skipped || !strings.Contains(x.Reason, "not visible from a pod") || x.Fixable {
					t.Errorf("%+v", x)
				}
			}
		}
		if n != 3 {
			t.Errorf("%d findings", n)
		}
	}
	// Nor are the files of firewalld and ufw there.
	drops := base("ip", "filter", "INPUT", "input", "drop")
	f.System.Firewalld, f.System.UFW = false, false
	for chain, want := range map[string]string{"x": "iptables", "ufw-user-input": "ufw"} {
		f.Filter = packetfilter.Filter{drops, base("ip", "filter", chain, "", "")}
		if got := f.manager(drops); got != want {
			t.Errorf("%s: %s, want %s", chain, got, want)
		}
	}
	zone := base("ip", "filter", "IN_public", "", "")
	f.Filter = packetfilter.Filter{drops, zone, base("ip", "filter", "INPUT_ZONES", "", "")}
	if got := f.manager(zone); got != "firewalld" {
		t.Error(got)
	}
	// kube-proxy is there before the first pod with a bridge.
	f.Survey.Links, f.Filter = f.Survey.Links[:2], packetfilter.Filter{base("ip", "filter", "KUBE-SERVICES", "", "")}
	f.Survey.Host.Addresses = f.Survey.Host.Addresses[:2]
	f.Survey.Host = f.Survey.Host.Indexed()
	delete(f.System.Sysctls, netstate.BridgeNetfilter(addr.IPv4).Path)
	if x := judgeBridgeFilter(f); x[0].Mark != Fail {
		t.Errorf("%+v", x)
	}
}

// No limit of the neighbour table is made smaller than it is.
func TestNeighboursOnlyGrow(t *testing.T) {
	t.Parallel()
	f := healthy(t)
	f.System.Sysctls[threshold(addr.IPv4, 3)], f.System.Sysctls[threshold(addr.IPv4, 2)],
		f.System.Sysctls[threshold(addr.IPv4, 1)] = "128", "64", "1000"
	want := []string{
		"sysctl -w net/ipv4/neigh/default/gc_thresh3=2048",
		"sysctl -w net/ipv4/neigh/default/gc_thresh2=1024",
	}
	if x := judgeNeighbours(f); !slices.Equal(x[0].Fix, want) {
		t.Errorf("%+v", x)
	}
}

// Where the daemon does not list its peers, the store does, and their routes are missed.
func TestPeersOfTheStore(t *testing.T) {
	t.Parallel()
	f := healthy(t)
	f.Daemon.PeersErr, f.Peers, f.PeersFrom, f.Survey.Ours.Routes = errors.New("late"), nil, "", nil
	f.Derived = derive(f)
	if f.PeersFrom != "etcd" || len(f.Peers) != 2 {
		t.Errorf("%s: %+v", f.PeersFrom, f.Peers)
	}
	if x := judgeRoutes(f); x[0].Mark != Fail || !strings.Contains(x[0].Reason, "the routes to 2 peers are missing") {
		t.Errorf("%+v", x)
	}
	f.Store, f.Peers, f.PeersFrom = nil, nil, ""
	f.Derived = derive(f)
	if p, r := judgePeers(f), judgeRoutes(f); p[0].Mark != Skipped || r[0].Mark != Skipped {
		t.Errorf("%+v %+v", p, r)
	}
}

// Without a tunnel, a peer is pinged at its own address: the bridge of its pods may not be there.
func TestTargetWithoutTunnel(t *testing.T) {
	t.Parallel()
	f := healthy(t)
	f.Daemon.Status.Network.Backend = "host-gw"
	if p := f.Peers[0]; f.target(p) != p.publicIP {
		t.Errorf("%v", f.target(p))
	}
}

// A thousand faults of one kind are some lines.
func TestManyFaults(t *testing.T) {
	t.Parallel()
	f := healthy(t)
	for i := range 4000 {
		e := entry(
			fmt.Sprintf("10.244.%d.%d-32", 10+i/200, i%200),
			fmt.Sprintf("m%d", i),
			fmt.Sprintf("i%d", i),
			"192.0.2.2",
			int64(100+i),
		)
		f.Store.Table.Entries = append(f.Store.Table.Entries, e)
	}
	slices.SortFunc(f.Store.Table.Entries, func(a, b *subnet.Entry) int { return strings.Compare(a.Key, b.Key) })
	n, more := 0, false
	for _, x := range judge(f) {
		if x.Check == "leases" {
			n++
			more = more || strings.Contains(x.Reason, "and 3992 more like these")
		}
	}
	if n > 20 || !more {
		t.Errorf("%d findings, more: %v", n, more)
	}
}

// What is persisted of another network says nothing of this one.
func TestPersistedOfAnotherNetwork(t *testing.T) {
	t.Parallel()
	for prefix, want := range map[string]bool{"": false, "/overlayd/network": true, "/another/network": false} {
		dir := t.TempDir()
		content := fmt.Sprintf(
			`{"Node":{"NodeName":"n1","NodeID":"id1"},"Prefix":%q,"Subnets":"10.244.1.0-24","Config":{},"Peers":[{"Key":"k","Value":{}}]}`,
			prefix,
		)
		if err := os.WriteFile(filepath.Join(dir, "lease.json"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		read, err := state.Dir{Path: dir}.Read()
		if err != nil || read == nil {
			t.Fatal(err)
		}
		if p := ofNetwork(*read, "/overlayd/network"); (p.Config != nil) != want || (p.Peers != nil) != want || p.Subnets == "" {
			t.Errorf("%q: %+v", prefix, p)
		}
	}
}
