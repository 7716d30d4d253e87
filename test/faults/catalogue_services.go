package faults

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/lab"
)

// way is how a connection gets to a pod of another node by way of the victim.
type way struct {
	name string
	from place
	// to is where it goes to: the pod number i of backends, or an address by which kube-proxy's rules lead there.
	to func(s *Site, f addr.Family, pod netip.AddrPort, i uint16) netip.AddrPort
}

// ways are those on which the victim decides from whom the pod has the connection: all but the first are masqueraded,
// since the answer has to come back here.
func ways() []way {
	nodePort := func(s *Site, f addr.Family, _ netip.AddrPort, i uint16) netip.AddrPort {
		return netip.AddrPortFrom(s.Victim.Addr(f), firstNodePort+i)
	}
	return []way{
		{"host to pod", victim, func(_ *Site, _ addr.Family, pod netip.AddrPort, _ uint16) netip.AddrPort { return pod }},
		{"host to ClusterIP", victim, func(_ *Site, f addr.Family, _ netip.AddrPort, i uint16) netip.AddrPort {
			return netip.AddrPortFrom(clusterIP().Get(f), firstPort+i)
		}},
		{"NodePort from outside, policy Cluster", internet, nodePort},
		{"pod to the NodePort of its node, policy Cluster", pod, nodePort},
		{"externalIP from outside", internet, func(s *Site, f addr.Family, _ netip.AddrPort, i uint16) netip.AddrPort {
			return netip.AddrPortFrom(externalIP(s.Victim.Addr(f)), firstPort+i)
		}},
	}
}

// Ports of the services: number i leads to backend i, whose port is backendPort.
const (
	firstPort, firstNodePort, backendPort = 80, 30080, 8080
)

func internet(s *Site) lab.Machine { return s.Lab.Internet() }

func clusterIP() addr.Per[netip.Addr] {
	return addr.Per[netip.Addr]{V4: netip.MustParseAddr("10.96.0.10"), V6: netip.MustParseAddr("fd00:10:96::10")}
}

// externalIP is an address that the router sends to a node, in the node's network: it takes no other source from there.
func externalIP(node netip.Addr) netip.Addr {
	b := node.AsSlice()
	b[len(b)-1] = 0x50
	out, _ := netip.AddrFromSlice(b)
	return out
}

// backends are the nodes with the services' pods.
func (s *Site) backends() []*lab.Node { return []*lab.Node{s.Peer, s.otherThan()} }

// sources are rows about the address from which pods have what comes by way of another node. Each of these answers
// through the tunnel, and every node checks reverse paths strictly.
func sources() []Fault {
	everyKind := []string{OnVXLAN, OnDual, OnLegacy, OnNFTDual, OnDirect, OnHostGW}
	var rows []Fault
	for _, w := range ways() {
		rows = append(rows, Fault{
			Name: "source: " + w.name, On: everyKind, Short: w.name != "host to pod",
			Inject: kubeProxy, Expect: seenAs(victimsAddress, w), Restore: Undo,
		})
	}
	// How fast rules are repaired is the subject of other rows.
	return in(Firewall, lossless(3*time.Second), append(rows,
		Fault{
			Name: "source: everywhere, loose rp_filter", On: []string{OnVXLAN},
			Inject: Steps(kubeProxy, looseFilters), Expect: seenAs(victimsAddress, ways()...), Restore: Undo,
		},
		Fault{
			Name:   "source: start on what an older daemon left, connections go on",
			On:     []string{OnVXLAN, OnDual, OnLegacy, OnNFTDual},
			Inject: Steps(kubeProxy, stopDaemon, olderState, connectAll, startDaemon),
			Expect: All(ready, stillAnswer, seenAs(victimsAddress, ways()...)), Restore: Undo,
			Bound: lossless(5 * time.Second),
		},
		Fault{ // the daemon sees it when it compares the rules, every 10 s
			Name: "source: kube-proxy starts after the daemon, in its mode nftables", On: []string{OnVXLAN, OnDual},
			Inject: Steps(restart("--firewall", "auto"), Until(ready, 5*time.Second), services(nftServices, noNFTServices)),
			Expect: seenAs(victimsAddress, ways()...), Restore: Undo,
			Bound: lossless(12 * time.Second), Log: `firewall chosen.*"kube-proxy uses nftables"`,
		}))
}

// kubeProxy puts rules for the services into the victim's firewall, as kube-proxy does with a clusterCIDR: in its mode
// nftables where the daemon has a table of its own, in its mode iptables otherwise.
func kubeProxy(ctx context.Context, s *Site) error {
	if nftables(s.Setup) {
		return services(nftServices, noNFTServices)(ctx, s)
	}
	return services(iptablesServices, noIPTablesServices)(ctx, s)
}

func services(rules, none string) Action {
	return Steps(Afterwards(On(wide+none)), Afterwards(each(router, `ip $F route del $EXTERNAL_IP`)),
		On(wide+rules), each(router, `ip $F route add $EXTERNAL_IP via $IP`), Until(jumpFirst, 3*time.Second))
}

// jumpFirst holds when the daemon's jump stands before kube-proxy's again, which inserts its own at the top.
func jumpFirst(ctx context.Context, s *Site) error {
	const first = `$IPT -w -t nat -S POSTROUTING | grep -v -e '^-P' | head -n 1`
	return Sees(`[ -n "$NFT_TABLE" ] || `+first+` | grep OVERLAYD`)(ctx, s)
}

const (
	iptablesServices = `{ echo '*nat'
		for c in SERVICES MARK-MASQ POSTROUTING SVC EXT; do echo ":KUBE-$c - [0:0]"; done
		echo "-I PREROUTING -j KUBE-SERVICES
			-I OUTPUT -j KUBE-SERVICES
			-I POSTROUTING -j KUBE-POSTROUTING
			-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
			-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
			-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
			-A KUBE-POSTROUTING -j MASQUERADE --random-fully
			-A KUBE-SERVICES -p tcp -d $CLUSTER_IP -j KUBE-SVC
			-A KUBE-SERVICES -p tcp -d $EXTERNAL_IP -j KUBE-EXT
			-A KUBE-SERVICES -p tcp --dport 30080:30081 -m addrtype --dst-type LOCAL -j KUBE-EXT
			-A KUBE-EXT -j KUBE-MARK-MASQ
			-A KUBE-EXT -j KUBE-SVC
			-A KUBE-SVC ! -s $POOL -d $CLUSTER_IP -j KUBE-MARK-MASQ
			-A KUBE-SVC -p tcp -m multiport --dports 80,30080 -j DNAT --to-destination $PEER_BACKEND
			-A KUBE-SVC -p tcp -m multiport --dports 81,30081 -j DNAT --to-destination $THIRD_BACKEND
			COMMIT"; } | sed 's/^\t*//' | $IPT-restore -w --noflush`

	noIPTablesServices = `$IPT -w -t nat -D PREROUTING -j KUBE-SERVICES; $IPT -w -t nat -D OUTPUT -j KUBE-SERVICES
		$IPT -w -t nat -D POSTROUTING -j KUBE-POSTROUTING
		for c in SERVICES EXT SVC POSTROUTING MARK-MASQ; do $IPT -w -t nat -F KUBE-$c; done
		for c in SERVICES EXT SVC POSTROUTING MARK-MASQ; do $IPT -w -t nat -X KUBE-$c; done`

	noNFTServices = `nft delete table $NFT_FAMILY kube-proxy`

	nftServices = `IP_=ip; [ $F = -4 ] || IP_=ip6
		nft -f - <<END
			table $NFT_FAMILY kube-proxy {
				chain mark-for-masquerade { mark set mark or 0x4000; }
				chain masquerading {
					mark and 0x4000 == 0 return
					mark set mark xor 0x4000
					masquerade fully-random
				}
				chain service {
					$IP_ daddr $CLUSTER_IP $IP_ saddr != $POOL jump mark-for-masquerade
					tcp dport { 80, 30080 } dnat to $PEER_BACKEND
					tcp dport { 81, 30081 } dnat to $THIRD_BACKEND
				}
				chain external { jump mark-for-masquerade; goto service; }
				chain services {
					$IP_ daddr $CLUSTER_IP meta l4proto tcp goto service
					$IP_ daddr $EXTERNAL_IP meta l4proto tcp goto external
					fib daddr type local tcp dport 30080-30081 goto external
				}
				chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
				chain nat-output { type nat hook output priority -100; jump services; }
				chain nat-postrouting { type nat hook postrouting priority srcnat; jump masquerading; }
			}
END`

	// olderState takes from the victim what daemons did not write at first: the sources of routes, and the rules that give
	// a certain address.
	olderScript = `ip $F route show proto 118 dev $DEV | sed -n 's/ src [^ ]*//p' |
			while read -r r; do ip $F route replace $r dev $DEV proto 118; done
		if [ -n "$NFT_TABLE" ]; then
			for h in $(nft -a list table $NFT_TABLE | sed -n '/snat to\|mark set/s/.*# handle //p'); do
				nft delete rule $NFT_TABLE postrouting handle $h; done
		else
			$IPT -w -t nat -S OVERLAYD-POSTRTG | grep -e '-j SNAT' -e '-j MARK' | sed 's/^-A/-w -t nat -D/' | xargs -r -L1 $IPT
		fi`
)

func olderState(ctx context.Context, s *Site) error { return On(olderScript)(ctx, s) }

// looseFilters has every node take packets by any device.
func looseFilters(ctx context.Context, s *Site) error {
	set := func(v string) Action {
		script := `for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo ` + v + ` > $f; done`
		return func(ctx context.Context, s *Site) error {
			return s.everyNode(func(n *lab.Node) error {
				_, err := n.Shell(ctx, script)
				return err
			})
		}
	}
	return Steps(Afterwards(set("1")), set("2"))(ctx, s)
}

func victimsAddress(s *Site, f addr.Family, _ *lab.Node) netip.Addr { return s.Victim.Addr(f) }

// seenAs holds when the pods have these connections from the address that is wanted for their node.
func seenAs(want func(*Site, addr.Family, *lab.Node) netip.Addr, on ...way) Check {
	return func(ctx context.Context, s *Site) error {
		return s.everyConnection(on, func(w way, f addr.Family, node *lab.Node, pod, to netip.AddrPort) error {
			c, err := connect(ctx, w.from(s), netip.Addr{}, node.Pods()[0], pod, to)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", w.name, node.Name, err)
			}
			defer c.close()
			should := want(s, f, node)
			return unless(c.seen() == should, "%s: a pod of %s sees %s, want %s", w.name, node.Name, c.seen(), should)
		})
	}
}

// everyConnection calls a function for each way to each of the services' pods, up to the first error.
func (s *Site) everyConnection(
	on []way, do func(w way, f addr.Family, node *lab.Node, pod, to netip.AddrPort) error,
) error {
	return s.everyFamily(func(f addr.Family) error {
		for i, node := range s.backends() {
			env, err := node.SubnetEnv()
			if err != nil {
				return err
			}
			pod := netip.AddrPortFrom(env.PodAddr(f, 0).Addr(), backendPort)
			for _, w := range on {
				if err := do(w, f, node, pod, w.to(s, f, pod, uint16(i))); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// connection is a TCP connection, as both of its ends have it.
type connection struct{ client, server net.Conn }

// connect makes a connection to an address that leads to one of a machine; from a certain source, if that is valid.
func connect(
	ctx context.Context, from lab.Machine, source netip.Addr, to lab.Machine, listen, target netip.AddrPort,
) (c connection, err error) {
	l, err := to.Listen(ctx, listen.String())
	if err != nil {
		return c, err
	}
	defer func() { _ = l.Close() }()
	dialer := net.Dialer{Timeout: 500 * time.Millisecond}
	if source.IsValid() {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0))
	}
	if err := from.Do(func() (err error) {
		c.client, err = dialer.DialContext(ctx, "tcp", target.String())
		return err
	}); err != nil {
		return c, err
	}
	if c.server, err = l.Accept(); err != nil {
		_ = c.client.Close()
	}
	return c, err
}

// seen is whom the server sees.
func (c connection) seen() netip.Addr {
	return netip.MustParseAddrPort(c.server.RemoteAddr().String()).Addr().Unmap()
}

func (c connection) close() { _ = errors.Join(c.client.Close(), c.server.Close()) }

// answers holds when the server gets what the client sends, and the client the answer.
func (c connection) answers() error {
	b := []byte("x")
	for _, dir := range [][2]net.Conn{{c.client, c.server}, {c.server, c.client}} {
		if _, err := dir[0].Write(b); err != nil {
			return err
		}
		_ = dir[1].SetReadDeadline(time.Now().Add(time.Second))
		if _, err := dir[1].Read(b); err != nil {
			return err
		}
	}
	return nil
}

// connectAll makes connections of all kinds that stay.
func connectAll(ctx context.Context, s *Site) error {
	return s.everyConnection(ways(), func(w way, _ addr.Family, node *lab.Node, pod, to netip.AddrPort) error {
		c, err := connect(ctx, w.from(s), netip.Addr{}, node.Pods()[0], pod, to)
		if err != nil {
			return fmt.Errorf("%s, %s: %w", w.name, node.Name, err)
		}
		s.open = append(s.open, c)
		s.Defer(func(context.Context, *Site) error { s.open = nil; c.close(); return nil })
		return unless(c.seen() != s.Victim.Addr(addr.FamilyOf(c.seen())), "%s: seen as %s already", w.name, c.seen())
	})
}

// stillAnswer holds when the connections that were made before are as they were.
func stillAnswer(_ context.Context, s *Site) error {
	for _, c := range s.open {
		if err := c.answers(); err != nil {
			return fmt.Errorf("a connection that is seen as from %s: %w", c.seen(), err)
		}
	}
	return nil
}
