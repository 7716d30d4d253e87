package faults

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/lab"
)

// flannelPrefix is flannel's default of --kube-annotation-prefix.
const flannelPrefix = "flannel.alpha.coreos.com"

// flanneld is a stand-in for flannel's daemon in its Kubernetes mode, with the vxlan backend: it makes the devices and
// rules that flannel documents, writes its annotations, and follows those of other Nodes. As with flannel, all that it
// has made stays when it ends.
type flanneld struct {
	site    *Site
	node    *lab.Node
	cancel  context.CancelFunc
	running sync.WaitGroup
	err     error
	peers   map[string]map[string]string // the annotations that were followed, by Node
}

// flannelDevice makes the device of one family. flannel lets the kernel choose the MAC.
const flannelDevice = `
	ip link add $DEV mtu $MTU type vxlan id 1 dstport 8472 local $IP dev eth0 nolearning
	ip address add $FIRST/$BITS dev $DEV
	ip link set $DEV up
	echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
	ip -o link show dev $DEV | sed -n 's/.* link.ether \([^ ]*\) .*/\1/p'`

// flannelRules are those of one family.
const flannelRules = `
	masq() { $IPT -w -t nat -A "$@"; }
	note='-m comment --comment'
	$IPT -w -t nat -N FLANNEL-POSTRTG
	masq POSTROUTING $note "flanneld masq" -j FLANNEL-POSTRTG
	masq FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 $note "flanneld masq" -j RETURN
	masq FLANNEL-POSTRTG -s $SUBNET -d $NETWORK $note "flanneld masq" -j RETURN
	masq FLANNEL-POSTRTG -s $NETWORK -d $SUBNET $note "flanneld masq" -j RETURN
	masq FLANNEL-POSTRTG ! -s $NETWORK -d $SUBNET $note "flanneld masq" -j RETURN
	masq FLANNEL-POSTRTG -s $NETWORK ! -d $MULTICAST $note "flanneld masq" -j MASQUERADE --random-fully
	masq FLANNEL-POSTRTG ! -s $NETWORK -d $NETWORK $note "flanneld masq" -j MASQUERADE --random-fully
	$IPT -w -N FLANNEL-FWD
	$IPT -w -A FORWARD $note "flanneld forward" -j FLANNEL-FWD
	$IPT -w -A FLANNEL-FWD -s $NETWORK $note "flanneld forward" -j ACCEPT
	$IPT -w -A FLANNEL-FWD -d $NETWORK $note "flanneld forward" -j ACCEPT`

// flannelPeer is what it does about a peer in one family.
const flannelPeer = `
	ip $F neigh replace $FIRST lladdr $MAC dev $DEV nud permanent
	bridge fdb replace $MAC dst $IP dev $DEV self permanent
	ip $F route replace $SUBNET via $FIRST dev $DEV onlink`

// startFlannel starts one on a node that has nothing of another.
func startFlannel(ctx context.Context, s *Site, n *lab.Node) (*flanneld, error) {
	d := &flanneld{site: s, node: n, peers: map[string]map[string]string{}}
	say := map[string]string{"kube-subnet-manager": "true", "backend-type": "vxlan"}
	err := s.everyFamily(func(f addr.Family) error {
		env, err := n.SubnetEnv()
		if err != nil {
			return err
		}
		vars := flannelVars(f, env.Gateway.Get(f).Masked(), n.Addr(f))
		mac, err := n.Shell(ctx, flannelDevice, vars...)
		if err != nil {
			return err
		}
		ip, data := "public-ip", "backend-data"
		if f == addr.IPv6 {
			ip, data = "public-ipv6", "backend-v6-data"
		}
		say[ip], say[data] = n.Addr(f).String(), fmt.Sprintf(`{"VNI":1,"VtepMAC":"%s"}`, strings.TrimSpace(mac))
		_, err = n.Shell(ctx, flannelRules, vars...)
		return err
	})
	annotations := map[string]string{}
	for key, value := range say {
		annotations[flannelPrefix+"/"+key] = value
	}
	err = errors.Join(err, s.Lab.APIServer().Do(ctx, http.MethodPatch, lab.NodePath(n)+"/status?fieldManager=flanneld",
		"strategic-merge", map[string]any{"metadata": map[string]any{"annotations": annotations}}))
	if err != nil {
		return nil, fmt.Errorf("flannel on %s: %w", n.Name, err)
	}
	ctx, d.cancel = context.WithCancel(context.WithoutCancel(ctx))
	d.running.Go(func() {
		for ctx.Err() == nil {
			err := s.Lab.APIServer().Watch(ctx, "/api/v1/nodes?watch=true", func(event json.RawMessage) {
				d.err = errors.Join(d.err, d.follow(ctx, event))
			})
			if ctx.Err() == nil {
				d.err = errors.Join(d.err, err)
				_ = sleep(ctx, time.Second)
			}
		}
	})
	return d, nil
}

// stop ends it, and says what it could not do.
func (d *flanneld) stop() error {
	d.cancel()
	d.running.Wait()
	if d.err != nil {
		return fmt.Errorf("flannel on %s: %w", d.node.Name, d.err)
	}
	return nil
}

// follow takes what a Node says now. Like flannel, it does something when one of these annotations has changed.
func (d *flanneld) follow(ctx context.Context, raw json.RawMessage) error {
	var event struct {
		Object struct {
			Metadata struct {
				Name        string
				Annotations map[string]string
			}
			Spec struct{ PodCIDRs []netip.Prefix }
		}
	}
	if err := json.Unmarshal(raw, &event); err != nil {
		return err
	}
	node := event.Object.Metadata.Name
	says := func(key string) string { return event.Object.Metadata.Annotations[flannelPrefix+"/"+key] }
	changed := false
	was := d.peers[node]
	d.peers[node] = map[string]string{}
	for _, key := range []string{"backend-type", "backend-data", "backend-v6-data", "public-ip", "public-ipv6"} {
		d.peers[node][key] = says(key)
		changed = changed || was[key] != says(key)
	}
	if node == d.node.Name || says("kube-subnet-manager") != "true" || says("backend-type") != "vxlan" || !changed {
		return nil
	}
	for _, subnet := range event.Object.Spec.PodCIDRs {
		f := addr.FamilyOf(subnet.Addr())
		ip, data := says("public-ip"), says("backend-data")
		if f == addr.IPv6 {
			ip, data = says("public-ipv6"), says("backend-v6-data")
		}
		var vtep struct{ VtepMAC string }
		public, errIP := netip.ParseAddr(ip)
		if err := errors.Join(errIP, json.Unmarshal([]byte(data), &vtep)); err != nil {
			return fmt.Errorf("the Node %s: %w", node, err)
		}
		vars := append(flannelVars(f, subnet, public), "MAC="+vtep.VtepMAC)
		if _, err := d.node.Shell(ctx, flannelPeer, vars...); err != nil && ctx.Err() == nil {
			return err
		}
	}
	return nil
}

// flannelVars are what the scripts name of a node.
func flannelVars(f addr.Family, subnet netip.Prefix, ip netip.Addr) []string {
	v := []string{
		fmt.Sprintf("F=-%d", f), "SUBNET=" + subnet.String(), "FIRST=" + subnet.Addr().String(), "IP=" + ip.String(),
		fmt.Sprintf("BITS=%d", ip.BitLen()),
	}
	if f == addr.IPv4 {
		return append(v, "IPT=iptables", "DEV=flannel.1", "MTU=1450", "NETWORK=10.244.0.0/16", "MULTICAST=224.0.0.0/4")
	}
	return append(v, "IPT=ip6tables", "DEV=flannel-v6.1", "MTU=1430", "NETWORK=fd00:10:244::/48", "MULTICAST=ff00::/8")
}
