package lab

import (
	"fmt"
	"strings"

	"github.com/overlayd/overlayd/addr"
)

// Hints are commands that show a newcomer around in this lab; command is how overlay-lab was called.
func (l *Lab) Hints(command string) string {
	o := l.topology.Options
	name := ""
	if o.Name != "lab" {
		name = " --name " + o.Name
	}
	lab := func(rest string) string { return command + name + " " + rest }
	first := l.nodes[0]
	rows := []string{
		"# the leases, as they stand in etcd",
		lab("exec etcd -- etcdctl get --prefix /overlayd/network/subnets"),
		"# the first node's routes to the other nodes' subnets",
	}
	for _, f := range o.Stack.Families() {
		rows = append(rows, fmt.Sprintf("ip -n %s -%d route show proto %d", first.NS, uint8(f), routeProtocol))
	}
	if o.Backend == VXLAN {
		for _, f := range o.Stack.Families() {
			rows = append(rows, vxlanHints(first.NS, f)...)
		}
	}
	rows = append(rows,
		"# a shell in a pod, the daemon's log, how all are doing, and the end",
		lab(fmt.Sprintf("exec %s -- bash", first.spec.Pods[0].Name)),
		"less "+first.Log(), lab("status"), lab("check"), lab("down"))
	var b strings.Builder
	fmt.Fprintf(&b, "The lab %q is up. Look around:\n\n", o.Name)
	for _, r := range rows {
		b.WriteString("  " + r + "\n")
	}
	return b.String()
}

// routeProtocol marks overlayd's routes.
const routeProtocol = 118

func vxlanHints(ns string, f addr.Family) []string {
	device := fmt.Sprintf("overlay.%d", vni)
	if f == addr.IPv6 {
		device = fmt.Sprintf("overlay-v6.%d", vni)
	}
	return []string{
		fmt.Sprintf("# the other nodes' VTEPs over %s: the MAC of each, and the node behind each MAC", f),
		fmt.Sprintf("ip -n %s neigh show dev %s", ns, device),
		fmt.Sprintf("bridge -n %s fdb show dev %s", ns, device),
	}
}
