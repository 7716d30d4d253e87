package lab_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/test/lab"
)

// The stand-in does by hand, once, what overlayd does for a VXLAN network, so that the lab is tested by itself: a fault
// that the check reports is then one that the test has made. It is this test binary, told by the environment.
const standInEnv = "OVERLAY_LAB_STANDIN"

// standInPath writes a script that can be given to the lab as its overlayd.
func standInPath(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "overlayd")
	script := fmt.Sprintf("#!/bin/sh\n%s=1 exec %s \"$@\"\n", standInEnv, self)
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func standIn(args []string) int {
	fs := flag.NewFlagSet("stand-in", flag.ExitOnError)
	values := map[string]*string{}
	for _, name := range []string{
		"etcd-endpoints", "node-name", "node-id", "state-dir", "subnet-file", "socket", "healthz-port", "init-config",
	} {
		values[name] = fs.String(name, "", "")
	}
	_ = fs.Parse(args) // exits by itself
	if err := standInNetwork(*values["node-name"], *values["init-config"], *values["subnet-file"]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	ok := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	fmt.Fprintln(os.Stderr, http.ListenAndServe("127.0.0.1:"+*values["healthz-port"], ok))
	return 1
}

func standInNetwork(name, config, env string) error {
	b, err := os.ReadFile(filepath.Join(filepath.Dir(config), "lab.json"))
	if err != nil {
		return err
	}
	var o lab.Options
	if err := json.Unmarshal(b, &o); err != nil {
		return err
	}
	nodes := lab.NewTopology(o).Nodes
	self := 0
	for i, n := range nodes {
		if n.Name == name {
			self = i
		}
	}
	for key, value := range map[string]string{"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"} {
		if err := os.WriteFile("/proc/sys/net/"+key, []byte(value), 0); err != nil {
			return err
		}
	}
	for _, line := range append(standInFamily(4, nodes, self), standInFamily(6, nodes, self)...) {
		if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", line, err, out)
		}
	}
	text := fmt.Sprintf("FLANNEL_SUBNET=10.244.%d.1/24\nFLANNEL_IPV6_SUBNET=fd00:10:244:%d::1/64\nFLANNEL_MTU=1430\n",
		self, self)
	return os.WriteFile(env, []byte(text), 0o644)
}

// standInFamily gives the commands for one family, as a shell reads them.
func standInFamily(f int, nodes []lab.NodeSpec, self int) []string {
	dev, host, length, table, all, near := "overlay.1", 32, 24, "ip", "10.244.0.0/16", "172.31.0.0/16"
	first := func(i int) string { return fmt.Sprintf("10.244.%d.0", i) }
	at := func(i int) string { return nodes[i].Addr.V4.String() }
	if f == 6 {
		dev, host, length, table, all, near = "overlay-v6.1", 128, 64, "ip6", "fd00:10:244::/48", "fd31::/48"
		first = func(i int) string { return fmt.Sprintf("fd00:10:244:%d::", i) }
		at = func(i int) string { return nodes[i].Addr.V6.String() }
	}
	mac := func(i int) string { return fmt.Sprintf("02:00:00:00:0%d:%02x", f, i) }
	r := strings.NewReplacer("DEV", dev, "FIRST", first(self), "SELF", at(self), "MAC", mac(self), "FAMILY", fmt.Sprint(f),
		"HOST", fmt.Sprint(host), "LEN", fmt.Sprint(length), "TABLE", table, "ALL", all, "NEAR", near)
	lines := []string{r.Replace(`
		ip link add DEV address MAC mtu 1430 type vxlan id 1 dstport 8472 local SELF dev eth0 nolearning &&
		ip -FAMILY addr add FIRST/HOST dev DEV && ip link set DEV up &&
		ip -FAMILY rule add from FIRST/LEN lookup 77 pref 500 &&
		nft add table TABLE t && nft add chain TABLE t p '{ type nat hook postrouting priority 100; }' &&
		nft add rule TABLE t p TABLE saddr ALL TABLE daddr != '{ ALL, NEAR }' masquerade`)}
	for i := range nodes {
		if i == self {
			continue
		}
		peer := strings.NewReplacer("DEV", dev, "FIRST", first(i), "PEER", at(i), "MAC", mac(i), "FAMILY", fmt.Sprint(f),
			"HOST", fmt.Sprint(host), "LEN", fmt.Sprint(length))
		lines = append(lines, peer.Replace(`
		bridge fdb add MAC dev DEV dst PEER && ip -FAMILY neigh add FIRST lladdr MAC dev DEV nud permanent &&
		ip -FAMILY route add FIRST/LEN via FIRST dev DEV onlink proto 118 &&
		ip -FAMILY route add PEER/HOST via FIRST dev DEV onlink table 77`))
	}
	return lines
}
