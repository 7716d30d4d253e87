package doctor

import (
	"slices"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/diag/doctor/packetfilter"
	"github.com/overlayd/overlayd/netstate"
)

// second gives the node of healthy another device.
func (f *Facts) second(name string, mtu int) {
	l, _ := f.Survey.Link("eth0")
	l.Name, l.Index, l.MTU = name, len(f.Survey.Links)+10, mtu
	f.Survey.Links = append(slices.Clone(f.Survey.Links), l)
	f.System.Sysctls[rpFilter(name)] = "0"
}

// sendsFrom makes an address the one that the tunnel sends from, bound to a device or to none.
func (f *Facts) sendsFrom(ip, device string) {
	f.Underlay.By.V4, f.Underlay.PublicIP.V4 = backend.Underlay{Device: device, Addr: addrOf(ip), MTU: 1500}, addrOf(ip)
	f.Underlay.ByDefault = true
	f.Daemon.Status.Interface.PublicIPs = []string{ip}
	f.Daemon.Status.Devices[0].Local, f.Daemon.Status.Devices[0].Underlay = ip, device
	f.link("overlay.1", func(l *netstate.SurveyLink) { l.VXLAN.Local, l.VXLAN.Underlay = addrOf(ip), device })
	f.Self.PublicIP.V4 = addrOf(ip)
	for _, e := range f.Store.Table.Entries {
		if e.NodeName == "n1" {
			e.PublicIP.V4 = addrOf(ip)
		}
	}
}

// publicOnSecond is a node whose packets leave by eth0, and arrive on eth1, which has the public IP.
func publicOnSecond(f *Facts) {
	f.second("eth1", 1500)
	f.address("eth1", "203.0.113.1/24")
	f.sendsFrom("203.0.113.1", "eth1")
	f.Underlay.ByDefault = false
}

// multipath is a node with a default route by two devices, whose address is on the first.
func multipath(f *Facts) {
	f.second("eth1", 1500)
	f.address("eth1", "203.0.113.1/24")
	h := f.Survey.Host
	h.Routes = []netstate.HostRoute{
		{Dst: prefixOf("0.0.0.0/0"), Via: addrOf("192.0.2.254"), Link: "eth0", Multipath: true},
		{Dst: prefixOf("0.0.0.0/0"), Via: addrOf("203.0.113.254"), Link: "eth1", Multipath: true},
		{Dst: prefixOf("192.0.2.0/24"), Link: "eth0"},
	}
	f.Survey.Host = h.Indexed()
	f.sendsFrom("192.0.2.1", "")
}

// routed is a node whose address is on lo, with two uplinks that have none.
func routed(f *Facts) {
	multipath(f)
	h := f.Survey.Host
	h.Addresses = append(slices.DeleteFunc(slices.Clone(h.Addresses),
		func(a netstate.HostAddress) bool { return strings.HasPrefix(a.Link, "eth") }),
		netstate.HostAddress{Link: "lo", Prefix: prefixOf("10.255.0.1/32")})
	h.Routes = slices.Clone(h.Routes[:2])
	f.Survey.Host = h.Indexed()
	f.Survey.Links = append(f.Survey.Links,
		netstate.SurveyLink{HostLink: netstate.HostLink{
			Name: "lo", Index: 1, Kind: "device", MTU: 65536, Up: true,
			Loopback: true,
		}, Carrier: true})
	f.sendsFrom("10.255.0.1", "")
}

// What is judged of the underlay is judged of the devices by which packets leave, or of those on which they arrive.
func TestUplinks(t *testing.T) {
	t.Parallel()
	strict := func(device string) func(*Facts) {
		return func(f *Facts) { f.System.Sysctls[rpFilter(device)] = "1" }
	}
	drops := func(hook string) func(*Facts) {
		return func(f *Facts) { f.Filter = packetfilter.Filter{base("inet", "host", "x", hook, "drop")} }
	}
	down := func(devices ...string) func(*Facts) {
		return func(f *Facts) {
			for _, d := range devices {
				f.link(d, func(l *netstate.SurveyLink) { l.Up = false })
			}
		}
	}
	for name, tt := range map[string]struct {
		node, spoil   func(*Facts)
		check         string
		mark          Mark
		reason, steps string
	}{
		"public IP of a second device, strict there": {
			publicOnSecond, strict("eth1"), "rp_filter", Fail,
			"their packets to 203.0.113.1 are dropped: n2 (192.0.2.2, by eth0)", "sysctl -w net/ipv4/conf/eth1/rp_filter=2",
		},
		"public IP of a second device, strict where packets leave": {publicOnSecond, strict("eth0"), "rp_filter", OK, "", ""},
		"public IP of a second device beside --iface": {func(f *Facts) {
			publicOnSecond(f)
			f.sendsFrom("192.0.2.1", "eth0")
			f.Underlay.PublicIP.V4 = addrOf("203.0.113.1")
		}, strict("eth1"), "rp_filter", Fail, "strict on eth1", "sysctl -w net/ipv4/conf/eth1/rp_filter=2"},
		"public IP of a second device, firewall": {
			publicOnSecond, drops("input"), "tunnel in the firewall", Fail,
			"that arrive by eth1 are dropped", "iifname eth1",
		},
		"public IP of a second device, firewall out": {
			publicOnSecond, drops("output"), "tunnel in the firewall", Fail,
			"that leave by eth0 are dropped", "oifname eth0",
		},
		"public IP of a second device, MTU": {
			publicOnSecond,
			func(f *Facts) {
				f.link("eth0", func(l *netstate.SurveyLink) { l.MTU = 1400 })
			}, "MTU", Fail, "eth0 with 1400 carries only 1350", "ip link set overlay.1 mtu 1350",
		},
		"two uplinks, strict": {
			multipath, func(f *Facts) { f.System.Sysctls[rpFilter("all")] = "1" },
			"rp_filter", OK, "", "",
		},
		"two uplinks, firewall": {
			multipath, drops("input"), "tunnel in the firewall", Fail,
			"that arrive by eth0 are dropped", "",
		},
		"two uplinks, firewall out": {
			multipath, drops("output"), "tunnel in the firewall", Fail,
			"that leave by eth1 are dropped", "",
		},
		"two uplinks, the tunnel is bound": {
			multipath,
			func(f *Facts) {
				f.link("overlay.1", func(l *netstate.SurveyLink) { l.VXLAN.Underlay = "eth1" })
			}, "tunnel device", Fail, "from 192.0.2.1 over eth1, expected from 192.0.2.1 over no device alone", "",
		},
		"two uplinks, one is down": {
			multipath, down("eth1"), "interface", Warn,
			"eth1, which leads to the other nodes, is down", "ip link set eth1 up",
		},
		"two uplinks, MTU": {
			multipath,
			func(f *Facts) {
				f.link("eth1", func(l *netstate.SurveyLink) { l.MTU = 1400 })
			}, "MTU", Fail, "eth1 with 1400 carries only 1350", "",
		},
		"address on lo, both are down": {
			routed, down("eth0", "eth1"), "interface", Fail,
			"eth0, which leads to the other nodes, is down", "ip link set eth0 up",
		},
		"address on lo, it is gone": {
			routed,
			func(f *Facts) {
				f.Survey.Host.Addresses = nil
				f.Survey.Host = f.Survey.Host.Indexed()
			}, "interface", Fail, "this node no longer has the address 10.255.0.1", "",
		},
		"address on lo, it is gone and one device is down": {
			routed,
			func(f *Facts) {
				down("eth1")(f)
				f.Survey.Host.Addresses = nil
				f.Survey.Host = f.Survey.Host.Indexed()
			}, "interface", Fail, "this node no longer has the address 10.255.0.1", "systemctl restart overlayd",
		},
		"address on lo, no route": {
			routed,
			func(f *Facts) {
				f.Survey.Host.Routes = nil
				f.Survey.Host = f.Survey.Host.Indexed()
			}, "interface", Fail, "no route leads from 10.255.0.1", "ip route add default",
		},
		"address on lo, strict": {
			routed, func(f *Facts) { f.System.Sysctls[rpFilter("all")] = "1" },
			"rp_filter", OK, "", "",
		},
		"address on lo, strict, a peer by one of them": {
			routed, func(f *Facts) {
				f.System.Sysctls[rpFilter("all")] = "1"
				f.route(netstate.HostRoute{Dst: prefixOf("198.51.100.0/24"), Via: addrOf("192.0.2.254"), Link: "eth0"})
			}, "rp_filter", Warn, "strict on eth1, and the return path to 1 nodes leaves by another device",
			"sysctl -w net/ipv4/conf/eth1/rp_filter=2",
		},
		"address on lo, firewall": {
			routed, drops("input"), "tunnel in the firewall", Fail, "that arrive by eth1 are dropped",
			"",
		},
		"default route by the tunnel": {
			func(*Facts) {}, func(f *Facts) {
				f.Survey.Host.Links = []netstate.HostLink{{Name: "overlay.1", Tunnel: true}}
				f.Survey.Host.Routes = []netstate.HostRoute{{Dst: prefixOf("0.0.0.0/0"), Link: "overlay.1"}}
				f.Survey.Host = f.Survey.Host.Indexed()
			}, "routes", Fail, "the route to 0.0.0.0/0 by overlay.1, metric 0, belongs to another program and leads the tunnel's own packets into",
			"ip route del 0.0.0.0/0 dev overlay.1 metric 0",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := healthy(t)
			tt.node(&f)
			for _, x := range judge(f) {
				if (x.Mark == Warn || x.Mark == Fail) && name != "public IP of a second device beside --iface" {
					t.Errorf("nothing is wrong yet, but %+v", x)
				}
			}
			tt.spoil(&f)
			found := slices.ContainsFunc(judge(f), func(x Finding) bool {
				return x.Check == tt.check && x.Mark == tt.mark && strings.Contains(x.Reason, tt.reason) &&
					strings.Contains(strings.Join(x.Fix, "\n"), tt.steps)
			})
			if !found {
				for _, x := range judge(f) {
					if x.Check == tt.check {
						t.Errorf("%+v", x)
					}
				}
				t.Errorf("want %s: %s (%s), arrivals %v, uplinks %v", tt.check, tt.reason, tt.steps, namesOf(f.arrivals(addr.IPv4)),
					namesOf(f.uplinks(addr.IPv4)))
			}
		})
	}
}
