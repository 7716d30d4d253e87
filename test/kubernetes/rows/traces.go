package rows

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/overlayd/overlayd/test/kubernetes/cluster"
)

// state prints what a network daemon and a CNI plugin may change on a node, in lines: devices, addresses, routes,
// rules, the firewall in all its forms, sets, settings of the kernel, files. What Kubernetes has there is left out, and
// the node's own addresses have one name on all.
const state = `
ip -o link | sed 's/^[0-9]*: \([^:@]*\).*/link \1/'
ip -o addr | awk '{print "addr", $2, $4}'
for f in -4 -6; do
	ip $f route show table all | sed 's/^/route /'
	ip $f rule | sed 's/^/rule /'
done
for save in iptables-nft-save ip6tables-nft-save iptables-legacy-save ip6tables-legacy-save; do
	$save 2>/dev/null | sed -n "s/ \[[0-9:]*\]//; s/^[-:*]/$save &/p"
done
nft list tables | sed 's/^/nft /'
ipset list -n | sed 's/^/ipset /'
sysctl net.ipv4.ip_forward net.ipv4.conf.all net.ipv4.conf.default net.ipv4.conf.eth0 net.ipv6.conf.all net.ipv6.conf.default net.ipv6.conf.eth0 net.bridge 2>/dev/null
find /etc/cni /opt/cni /run/overlayd /var/lib/overlayd /run/xtables.lock /var/lib/cni 2>/dev/null | sed 's/^/file /'
true`

// snapshot is the state of a node as a set.
func snapshot(ctx context.Context, n *cluster.Node) (map[string]bool, error) {
	out, err := n.Run(ctx, "sh", "-c", state)
	if err != nil {
		return nil, err
	}
	for _, kind := range []string{
		"link lo", "addr lo", "route ", "rule ", "iptables-nft-save ", "ip6tables-nft-save ",
		"nft ", "net.ipv4.", "net.ipv6.", "net.bridge.",
	} {
		if !strings.Contains("\n"+out, "\n"+kind) { // a tool that fails must not look like a node without anything
			return nil, fmt.Errorf("%s: no line begins with %q", n.Name, kind)
		}
	}
	return lines(out, n.IP.String(), n.IP6.String()), nil
}

// before is the state of the nodes before overlayd came.
type before struct{ any, all map[string]bool } // what any of them had, and what all had

func (b *before) add(state map[string]bool) {
	if b.any == nil {
		b.any, b.all = maps.Clone(state), maps.Clone(state)
		return
	}
	maps.Copy(b.any, state)
	maps.DeleteFunc(b.all, func(line string, _ bool) bool { return !state[line] })
}

// changed says what a node has that none had, and lacks what all had, but for what may be so.
func (b *before) changed(now map[string]bool) (out []string) {
	stay, leave := mayStay(), mayGo()
	for line := range now {
		if !b.any[line] && !stay.MatchString(line) {
			out = append(out, "left behind: "+line)
		}
	}
	for line := range b.all {
		if !now[line] && !leave.MatchString(line) {
			out = append(out, "taken away: "+line)
		}
	}
	slices.Sort(out)
	return out
}

func lines(state string, own ...string) map[string]bool {
	linkLocal := regexp.MustCompile(`fe80::[0-9a-f:]+`)
	out := map[string]bool{}
	for _, line := range strings.Split(state, "\n") {
		line = linkLocal.ReplaceAllString(strings.Join(strings.Fields(line), " "), "LINK-LOCAL")
		for _, ip := range own {
			line = regexp.MustCompile(regexp.QuoteMeta(ip)+`\b`).ReplaceAllString(line, "OWN")
		}
		kubeProxys := strings.Contains(line, "KUBE-") || strings.Contains(line, "kube-proxy") ||
			strings.HasPrefix(line, "net.ipv4.conf.all.route_localnet ")
		if line != "" && !kubeProxys {
			out[line] = true
		}
	}
	return out
}

// mayStay is what Documentation/kubernetes.md says that stays on a node. The plugin portmap leaves its chains when the
// last of its ports is gone. A kernel that begins to forward takes no redirects any more, and answers to the anycast
// addresses of routers (RFC 4291 section 2.6.1).
func mayStay() *regexp.Regexp {
	return regexp.MustCompile(`^(file (/run/overlayd|/var/lib/overlayd|/run/xtables\.lock|/opt/cni|/opt/cni/bin|/etc/cni|/etc/cni/net\.d|/var/lib/cni|/var/lib/cni/(networks|results))` +
		`|ip6?tables-nft-save .*CNI-HOSTPORT-(DNAT|MASQ|SETMARK).*` +
		`|route anycast \S+ dev eth0 table local .*|net\.ipv4\.conf\.all\.accept_redirects = 0` +
		`|net\.ipv4\.ip_forward = 1|net\.ipv4\.conf\.(all|default|eth0)\.forwarding = 1|net\.ipv6\.conf\.(all|default|eth0)\.forwarding = 1|net\.bridge\.bridge-nf-call-ip6?tables = 1)$`)
}

// mayGo is the other side of what may stay: settings as they were before.
func mayGo() *regexp.Regexp {
	return regexp.MustCompile(`^(net\.ipv4\.conf\.(all|eth0)\.accept_redirects = 1` +
		`|net\.ipv4\.ip_forward = 0|net\.ipv4\.conf\.\w+\.forwarding = 0|net\.ipv6\.conf\.\w+\.forwarding = 0|net\.bridge\.bridge-nf-call-ip6?tables = 0)$`)
}

// traces fails where a node is not as it was before overlayd came, unless the documentation says that it may be so.
func (s *Suite) traces(ctx context.Context) error {
	var errs []error
	for _, n := range s.K.Nodes {
		now, err := snapshot(ctx, n)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, change := range s.before.changed(now) {
			errs = append(errs, fmt.Errorf("%s: %s", n.Name, change))
		}
	}
	return errors.Join(errs...)
}
