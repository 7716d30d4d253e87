package doctor

import (
	"errors"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/diag/doctor/packetfilter"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/test/nstest"
)

// What keeps single pods from being reached is found with the pods' own addresses, and named with what to do about it.
func TestPodsThatAreNotReached(t *testing.T) {
	t.Parallel()
	nstest.NeedRoot(t)
	docker := func(unpublished string) string {
		return `for c in DOCKER-USER DOCKER-FORWARD DOCKER OVERLAYD-FWD; do iptables-nft -N $c; done
			iptables-nft -P FORWARD DROP
			for c in DOCKER-USER DOCKER-FORWARD OVERLAYD-FWD; do iptables-nft -A FORWARD -j $c; done
			iptables-nft -A DOCKER-FORWARD -o cni0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
			iptables-nft -A DOCKER-FORWARD -o cni0 -j DOCKER
			iptables-nft -A DOCKER-FORWARD -i cni0 -j ACCEPT; iptables-nft -A DOCKER ! -i cni0 -o cni0 -j ` + unpublished + `
			iptables-nft -A OVERLAYD-FWD -d 10.244.0.0/16 -j ACCEPT; iptables-nft -A OVERLAYD-FWD -s 10.244.0.0/16 -j ACCEPT; `
	}
	const raw = "-t raw -A PREROUTING -d 10.244.1.7 ! -i cni0 -j DROP; "
	for name, tt := range map[string]struct {
		script, pods  string
		mark          Mark
		text, command string
	}{
		"nothing": {"true", "10.244.1.7", OK, "", ""},
		"Docker 28": {
			docker("ACCEPT") + "iptables-nft " + raw, "10.244.1.7 10.244.1.8", Fail,
			"from pods of other nodes to 10.244.1.7 are dropped by table ip raw, chain PREROUTING",
			`"allow-direct-routing": true`,
		},
		"Docker 28, idle container": {
			"iptables-nft " + raw, "", Fail, "to 10.244.1.7 are dropped",
			`"allow-direct-routing": true`,
		},
		"Docker 29 with nftables": {
			`nft 'table ip docker-bridges { chain raw-PREROUTING { type filter hook prerouting priority raw; ` +
				`ip daddr 10.244.1.7 iifname != "cni0" counter drop; }; }'`,
			"10.244.1.7", Fail, "table ip docker-bridges, chain raw-PREROUTING", `"allow-direct-routing": true`,
		},
		"Docker 28, three containers": {
			"for i in 7 8 9; do iptables-nft -t raw -A PREROUTING -d 10.244.1.$i ! -i cni0 -j DROP; done", "10.244.1.9", Fail,
			"to 10.244.1.7 (and to 2 more of 3 pods) are dropped", `"allow-direct-routing": true`,
		},
		"a trusted interface": {
			"iptables-nft -t raw -A PREROUTING -d 10.244.1.7 -i overlay.1 -j ACCEPT; iptables-nft " + raw,
			"10.244.1.7", OK, "", "",
		},
		"a container of another": {
			"iptables-nft -t raw -A PREROUTING -d 172.17.0.2 ! -i docker0 -j DROP", "10.244.1.7",
			OK, "", "",
		},
		"Docker, unpublished ports": {
			docker("DROP"), "10.244.1.7", Fail, "are dropped by table ip filter, chain DOCKER",
			"iptables -I DOCKER-USER -s 10.244.0.0/16 -d 10.244.1.0/24 -j ACCEPT",
		},
		"Docker, nat-unprotected": {docker("ACCEPT"), "10.244.1.7", OK, "", ""},
		"Docker, opened": {docker("DROP") +
			"iptables-nft -I DOCKER-USER -s 10.244.0.0/16 -d 10.244.1.0/24 -j ACCEPT", "10.244.1.7", OK, "", ""},
		"a policy for one pod": {
			"iptables-nft -I FORWARD -d 10.244.1.7 -j DROP", "10.244.1.7 10.244.1.8 10.244.1.9",
			Warn, "from pods of other nodes to 10.244.1.7 are dropped by table ip filter, chain FORWARD", "iptables -I FORWARD",
		},
		"a policy for what it says": {
			"iptables-nft -I FORWARD -s 10.244.1.8 -j DROP", "10.244.1.7 10.244.1.8", Warn,
			"to pods of other nodes from 10.244.1.8 are dropped", "iptables -I FORWARD",
		},
		"all pods": {
			"iptables-nft -P FORWARD DROP", "10.244.1.7 10.244.1.8", Fail,
			"packets from pods of other nodes are dropped by table ip filter, chain FORWARD: its policy", "iptables -I FORWARD",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			node := nstest.New(t)
			node.Exec("sh", "-ec",
				"ip link add cni0 address 02:00:00:00:01:01 type bridge; ip address add 10.244.1.1/24 dev cni0; "+
					"ip link set cni0 up\n"+tt.script)
			for _, pod := range strings.Fields(tt.pods) {
				node.Exec("ip", "neigh", "add", pod, "lladdr", "02:00:00:00:01:02", "dev", "cni0", "nud", "stale")
			}
			f := healthy(t)
			var errFilter, errSurvey error
			node.Do(func() {
				f.Filter, errFilter = packetfilter.Read()
				var s netstate.Survey
				s, errSurvey = netstate.Look(func(string) bool { return false })
				f.Survey.Neighbours = s.Neighbours
			})
			if err := errors.Join(errFilter, errSurvey); err != nil {
				t.Fatal(err)
			}
			got := judgeForwardFilter(f)
			if len(got) == 0 || got[0].Mark != tt.mark || !strings.Contains(got[0].Reason, tt.text) ||
				tt.command != "" && !strings.Contains(strings.Join(got[0].Fix, "\n"), tt.command) {
				t.Errorf("%+v", got)
			}
		})
	}
}
