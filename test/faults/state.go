package faults

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/overlayd/overlayd/test/lab"
)

// state is what a node has, as the system's own tools print it: sections of sorted lines.
type state map[string][]string

// secFirewall is the section in which the order of lines matters.
const secFirewall = "firewall"

// section marks the beginning of one in the output of dumpScript.
const section = "### "

// dumpScript prints everything in one go, in as few processes as there can be: it is run many times a second.
func dumpScript(subnetFile, iptables string) string {
	return fmt.Sprintf(`
echo '%[1]sdevices';    ip -o -d link show type vxlan
echo '%[1]sIPv4';       printf 'address show\nroute show table all\nrule show\nneigh show nud permanent\n' | ip -4 -o -batch -
echo '%[1]sIPv6';       printf 'address show\nroute show table all\nrule show\nneigh show nud permanent\n' | ip -6 -o -batch -
echo '%[1]sfdb';        bridge fdb show | grep ' dst '
echo '%[1]s%[4]s';      %[3]s-save; %[2]s-save; nft -s list tables | grep -i overlayd | while read -r t; do nft -s list $t; done
echo '%[1]ssets';       ipset save
echo '%[1]sforwarding'; cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding
echo '%[1]ssubnet.env'; cat '%[5]s'
exit 0`, section, iptables, strings.Replace(iptables, "ip", "ip6", 1), secFirewall, subnetFile)
}

// observe reads the state of a node.
func observe(ctx context.Context, n *lab.Node, iptables string) (state, error) {
	out, err := n.Run(ctx, "sh", "-c", dumpScript(n.SubnetFile(), iptables))
	if err != nil {
		return nil, fmt.Errorf("observe the kernel of %s: %w", n.Name, err)
	}
	return parseState(out), nil
}

// parseState puts the output of dumpScript in order.
func parseState(out string) state {
	s := state{}
	// Indices, and what follows from them, differ between two devices that are the same to their users.
	noise := regexp.MustCompile(`^\d+: |@\S+|link-netnsid \d+|\[\d+:\d+\]|\\`)
	name := ""
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		if rest, ok := strings.CutPrefix(line, section); ok {
			name = rest
			s[name] = []string{}
			continue
		}
		line = strings.Join(strings.Fields(noise.ReplaceAllString(line, "")), " ")
		if line != "" && !strings.Contains(line, podPort) && (name != secFirewall || firewallMatters(line)) {
			s[name] = append(s[name], line)
		}
	}
	for name := range s {
		if name != secFirewall { // there the order is part of it
			slices.Sort(s[name])
		}
	}
	return s
}

// podPort is how the names of the pods' ports begin, which the daemon does not touch.
const podPort = "veth-p"

// firewallMatters leaves out what iptables-save says of built-in chains: they exist where iptables has ever listed
// them.
func firewallMatters(line string) bool {
	return !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, "*") && line != "COMMIT" &&
		(!strings.HasPrefix(line, ":") || strings.Contains(line, "OVERLAYD"))
}

// settling says that an address is not in use yet.
func (s state) settling() bool {
	return slices.ContainsFunc(s["IPv6"], func(l string) bool { return strings.Contains(l, " tentative ") })
}

// without is a state without some sections.
func (s state) without(names ...string) state {
	out := state{}
	for name, lines := range s {
		if !slices.Contains(names, name) {
			out[name] = lines
		}
	}
	return out
}

// mostDifferences bounds how many lines a message names.
const mostDifferences = 4

// differs says in what a state is not the planned one; "" if in nothing.
func (s state) differs(plan state) string {
	var out []string
	for name, lines := range plan {
		before := len(out)
		for _, l := range lines {
			if !slices.Contains(s[name], l) {
				out = append(out, fmt.Sprintf("%s: missing %q", name, l))
			}
		}
		for _, l := range s[name] {
			if !slices.Contains(lines, l) {
				out = append(out, fmt.Sprintf("%s: unexpected %q", name, l))
			}
		}
		if len(out) == before && !slices.Equal(s[name], lines) {
			out = append(out, name+": in another order or number")
		}
	}
	slices.Sort(out)
	if rest := len(out) - mostDifferences; rest > 0 {
		out = append(out[:mostDifferences], fmt.Sprintf("and %d more", rest))
	}
	return strings.Join(out, "; ")
}
