package rows

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/overlayd/overlayd/test/kubernetes/cluster"
)

// state prints what a network daemon and a CNI plugin may change on a node, in lines: devices, addresses, routes, rules, the firewall in all
// its forms, sets, settings of the kernel, files. What Kubernetes has there is left out, and the node's own addresses have one name on all.
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
sysctl net.ipv4.ip_forward net.ipv4.conf.all net.ipv4.conf.default net.ipv6.conf.all net.ipv6.conf.default net.bridge 2>/dev/null
find /etc/cni /opt/cni /run/overlayd /var/lib/overlayd /run/xtables.lock /var/lib/cni 2>/dev/null | sed 's/^/file /'
true`

// snapshot is the state of a node as a set.
func snapshot(ctx context.Context, n *cluster.Node) (map[string]bool, error) {
	out, err := n.Run(ctx, "sh", "-c", state)
	return lines(out, n.IP.String(), n.IP6.String()), err
}

func lines(state string, own ...string) map[string]bool {
	linkLocal := regexp.MustCompile(`fe80::[0-9a-f:]+`)
	out := map[string]bool{}
	for _, line := range strings.Split(state, "\n") {
		line = linkLocal.ReplaceAllString(strings.Join(strings.Fields(line), " "), "LINK-LOCAL")
		for _, ip := range own {
			line = regexp.MustCompile(regexp.QuoteMeta(ip)+`\b`).ReplaceAllString(line, "OWN")
		}
		if line != "" && !strings.Contains(line, "KUBE-") && !strings.Contains(line, "kube-proxy") {
			out[line] = true
		}
	}
	return out
}

// mayStay is what Documentation/kubernetes.md says that stays on a node. The plugin portmap leaves its chains when the last of its ports is
// gone. A kernel that begins to forward takes no redirects any more, and answers to the anycast addresses of routers (RFC 4291 section 2.6.1).
func mayStay() *regexp.Regexp {
	return regexp.MustCompile(`^(file (/run/overlayd|/var/lib/overlayd|/run/xtables\.lock|/opt/cni|/opt/cni/bin|/etc/cni|/etc/cni/net\.d|/var/lib/cni|/var/lib/cni/(networks|results))` +
		`|ip6?tables-nft-save .*CNI-HOSTPORT-(DNAT|MASQ|SETMARK).*` +
		`|route anycast \S+ dev eth0 table local .*|net\.ipv4\.conf\.all\.accept_redirects = 0` +
		`|net\.ipv4\.ip_forward = 1|net\.ipv4\.conf\.(all|default)\.forwarding = 1|net\.ipv6\.conf\.(all|default)\.forwarding = 1|net\.bridge\.bridge-nf-call-ip6?tables = 1)$`)
}

// traces fails where a node has something that no node had before overlayd came, unless the documentation says that it stays.
func (s *Suite) traces(ctx context.Context) error {
	allowed := mayStay()
	var errs []error
	for _, n := range s.K.Nodes {
		now, err := snapshot(ctx, n)
		errs = append(errs, wrap(err, "%s", n.Name))
		for line := range now {
			if !s.before[line] && !allowed.MatchString(line) {
				errs = append(errs, fmt.Errorf("%s: left behind: %s", n.Name, line))
			}
		}
	}
	return errors.Join(errs...)
}
