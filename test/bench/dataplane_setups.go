package bench

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/lab"
)

// The set-ups, as the rows call them. Each is a lab of its own: two nodes at one switch, a pod on each. Only the
// underlay has none: it is the way between the nodes of the one made by hand, which have no rules.
const (
	rawUnderlay  = "raw underlay"
	handMade     = "hand-made vxlan"
	handMadeMasq = "hand-made vxlan with a masquerade rule"
	oursVXLAN    = "vxlan"
	oursNoRules  = "vxlan without firewall rules"
	oursDirect   = "vxlan, DirectRouting"
	oursHostGW   = "host-gw"
)

// pathLab is the lab of one set-up.
type pathLab struct {
	name    string
	options lab.Options
	byHand  string // the script that does overlayd's work on each node in its place, if one does; see handWork
}

// pathLabs lists the labs. The hand-made ones are nodes that overlayd has left again, so that all else is alike. It ran
// there as host-gw, which makes no routing rule: once there was one in a network namespace, the kernel looks up every
// route there in a slower way, and goes on to do so when the rule is gone.
func pathLabs(e *Env) []pathLab {
	noRules := []string{"--ip-masq=false", "--iptables-forward-rules=false"}
	untouched := lab.Options{Backend: lab.HostGW, OverlaydArgs: noRules}
	masquerade := "iptables -t nat -A POSTROUTING -s $SUBNET -o eth0 -j MASQUERADE"
	labs := []pathLab{
		{name: handMade, options: untouched, byHand: handWork},
		{name: handMadeMasq, options: untouched, byHand: handWork + masquerade},
		{name: oursVXLAN, options: lab.Options{Backend: lab.VXLAN}},
		{name: oursNoRules, options: lab.Options{Backend: lab.VXLAN, OverlaydArgs: noRules}},
		{name: oursDirect, options: lab.Options{Backend: lab.VXLAN, Direct: true}},
		{name: oursHostGW, options: lab.Options{Backend: lab.HostGW}},
	}
	for i := range labs {
		o := &labs[i].options
		o.Name, o.Overlayd = fmt.Sprintf("bench-path%d", i+1), e.Overlayd
		o.Nodes, o.Pods, o.Segments = 2, 1, 1
	}
	return labs
}

// handWork is what a person types on a node to join it to another one. Its variables are those of handVars.
const handWork = `
	ip link add vxlan1 address $MAC mtu $MTU type vxlan id 1 local $NODE dev eth0 dstport 8472 nolearning
	ip address add $FIRST/32 dev vxlan1
	ip link set vxlan1 up
	ip route add $PEER_SUBNET via $PEER_FIRST dev vxlan1 onlink
	ip neigh add $PEER_FIRST lladdr $PEER_MAC dev vxlan1 nud permanent
	bridge fdb add $PEER_MAC dst $PEER_NODE dev vxlan1 self permanent
	ip link set veth-p1 mtu $MTU
	ip link set cni0 mtu $MTU
`

// tunnelMTU is what overlayd tells the pods behind its VXLAN device in the lab; it is the same in the hand-made set-ups.
const tunnelMTU = 1450

// raisePaths brings all labs up and makes the ways through them ready. What is there when it fails, lowerPaths removes.
func raisePaths(ctx context.Context, labs []pathLab) ([]path, error) {
	ups := make([]*lab.Lab, len(labs))
	g, upCtx := errgroup.WithContext(ctx)
	for i, l := range labs {
		g.Go(func() (err error) {
			ups[i], err = lab.Up(upCtx, l.options)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	core, err := lastCore()
	if err != nil {
		return nil, err
	}
	var paths []path
	for i, l := range labs {
		p, err := l.path(ups[i], core)
		if err == nil && l.byHand != "" {
			err = replaceByHand(ctx, l, ups[i])
		}
		if err == nil {
			err = quiet(ctx, p, ups[i])
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", l.name, err)
		}
		paths = append(paths, p)
		if l.name == handMade {
			n1, n2 := ups[i].Node(1), ups[i].Node(2)
			paths = append(paths, path{rawUnderlay, n1.Machine, n2.Machine, n2.Addr(addr.IPv4), core})
		}
	}
	return paths, nil
}

// lowerPaths takes all labs down, also when the benchmark is interrupted.
func lowerPaths(ctx context.Context, labs []pathLab) error {
	var errs []error
	for _, l := range labs {
		errs = append(errs, lab.Down(context.WithoutCancel(ctx), l.options.Name))
	}
	return errors.Join(errs...)
}

// path leads from the pod of the first node to that of the second.
func (l pathLab) path(up *lab.Lab, core int) (path, error) {
	from, err := up.PodEndpoint(1, 1)
	if err != nil {
		return path{}, err
	}
	to, err := up.PodEndpoint(2, 1)
	return path{l.name, from.Machine, to.Machine, to.Addr.Get(addr.IPv4), core}, err
}

// quiet waits until packets come through, and then halts the daemons and etcd: packets pass none of them, and what a
// dozen of daemons do now and then on a few cores would be measured.
func quiet(ctx context.Context, p path, up *lab.Lab) error {
	err := patiently(ctx, func() error {
		_, err := p.from.Ping(ctx, lab.Ping{To: p.at, Wait: time.Second})
		return err
	})
	for _, n := range up.Nodes() {
		if n.Running() {
			err = errors.Join(err, n.Pause())
		}
	}
	return errors.Join(err, up.Etcd().Pause())
}

// patiently tries something until it works.
func patiently(ctx context.Context, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		err := f()
		if err == nil || ctx.Err() != nil {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// replaceByHand removes all that overlayd made on the nodes, and has a person do it instead.
func replaceByHand(ctx context.Context, l pathLab, up *lab.Lab) error {
	leases, err := up.Leases() // cleanup removes them, too
	if err != nil {
		return err
	}
	for i, n := range up.Nodes() {
		if err := n.Stop(ctx); err != nil {
			return err
		}
		_, err := n.Run(ctx, l.options.Overlayd, "cleanup", "--state-dir", n.StateDir(), "--subnet-file", n.SubnetFile())
		if err != nil {
			return err
		}
		if rules, err := n.Run(ctx, "nft", "list", "ruleset"); err != nil || rules != "" {
			return fmt.Errorf("%s should have no firewall rules: %w %s", n.Name, err, rules)
		}
		if _, err := n.Shell(ctx, l.byHand, handVars(leases[i], leases[1-i])...); err != nil {
			return err
		}
		if _, err := n.Pods()[0].Run(ctx, "ip", "link", "set", "eth0", "mtu", strconv.Itoa(tunnelMTU)); err != nil {
			return err
		}
	}
	return nil
}

// handVars are the variables of handWork for a node with one peer.
func handVars(own, peer lab.Lease) []string {
	vars := []string{fmt.Sprintf("MTU=%d", tunnelMTU)}
	for prefix, l := range map[string]lab.Lease{"PEER_": peer, "": own} {
		node := l.Underlay[0].As4()
		vars = append(vars,
			prefix+"SUBNET="+l.Subnets[0].String(), prefix+"FIRST="+l.Subnets[0].Addr().String(),
			prefix+"NODE="+l.Underlay[0].String(),
			prefix+fmt.Sprintf("MAC=02:00:%02x:%02x:%02x:%02x", node[0], node[1], node[2], node[3]))
	}
	return vars
}
