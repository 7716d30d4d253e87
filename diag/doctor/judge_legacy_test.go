package doctor

import (
	"strings"
	"testing"

	"github.com/overlayd/overlayd/diag/doctor/packetfilter"
)

// Rules of iptables-legacy are named where they may concern pods or the tunnel, and not where programs have them that
// leave pods alone.
func TestLegacyRules(t *testing.T) {
	t.Parallel()
	chains := func(text string) (out []packetfilter.Legacy) {
		table := ""
		for line := range strings.Lines(text) {
			w := strings.Fields(line)
			if strings.HasPrefix(w[0], "*") {
				table = w[0][1:]
				continue
			}
			out = append(out, packetfilter.Legacy{Save: "iptables-legacy-save", Table: table, Chain: w[1], Policy: "ACCEPT"})
			if c := &out[len(out)-1]; w[0] == "-P" {
				c.Policy = w[2]
			} else {
				c.Rules = []string{strings.TrimSpace(line)}
			}
		}
		return out
	}
	docker := `*nat
		-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
		-A POSTROUTING -j OVERLAYD-POST
		-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
		-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
		-A OVERLAYD-POST -s 10.244.1.0/24 -j MASQUERADE --random-fully
		*raw
		-A PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP
		*filter
		-A DOCKER ! -i docker0 -o docker0 -j DROP
		-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
		-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
		-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -j DROP
		-A FORWARD -o docker0 -j DOCKER
		-A INPUT -p udp -m udp --dport 8472 -j ACCEPT
`
	for name, tt := range map[string]struct {
		rules string
		names string // "": nothing
	}{
		"none":                        {"", ""},
		"Docker, kube-proxy and ours": {docker + "-A FORWARD -j OVERLAYD-FWD\n-P FORWARD DROP", ""},
		"Docker's policy":             {docker + "-P FORWARD DROP", "-P FORWARD DROP (iptables-legacy-save -t filter)"},
		"policy":                      {"*filter\n-P INPUT DROP", "-P INPUT DROP"},
		"port": {
			"*filter\n-A INPUT -p udp --dport 8472 -j DROP",
			"-A INPUT -p udp --dport 8472 -j DROP",
		},
		"in a chain": {"*filter\n-A site -j REJECT --reject-with icmp-port-unreachable", "-A site"},
		"a pod":      {"*raw\n-A PREROUTING -d 10.244.1.7/32 ! -i cni0 -j DROP", "10.244.1.7/32"},
		"a peer":     {"*filter\n-A INPUT -s 198.51.100.0/24 -j DROP", "198.51.100.0/24"},
		"Docker's pods": {
			"*filter\n-A DOCKER ! -i cni0 -o cni0 -j DROP",
			"-A DOCKER ! -i cni0 -o cni0 -j DROP",
		},
		"another host":     {"*filter\n-A INPUT -s 203.0.113.0/24 -j DROP", ""},
		"translated":       {"*nat\n-A POSTROUTING -s 10.0.0.0/8 -j MASQUERADE", "MASQUERADE"},
		"but between pods": {"*nat\n-A POSTROUTING -s 10.0.0.0/8 ! -d 10.244.0.0/16 -j MASQUERADE", ""},
		"but in this node": {"*nat\n-A POSTROUTING ! -d 10.244.1.0/24 -j SNAT --to-source 192.0.2.1", "SNAT"},
	} {
		f := healthy(t)
		f.Legacy = chains(tt.rules)
		got := judgeLegacy(f)
		switch {
		case tt.names == "" && got[0].Mark != OK,
			tt.names != "" && (got[0].Mark != Warn || !strings.Contains(got[0].Reason, tt.names) ||
				got[0].Fix[0] != "iptables-legacy-save"):
			t.Errorf("%s: %+v", name, got)
		}
		if tunnel := judgeTunnelFilter(f); strings.Contains(tunnel[0].Reason, "see iptables-legacy") != (tt.names != "") {
			t.Errorf("%s: %+v", name, tunnel)
		}
	}
}
