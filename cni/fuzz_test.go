package cni_test

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/cni"
)

// FuzzStdin: whatever a runtime writes, there is an error or a configuration that a delegate can read, with the
// network's name, the node's subnet, and no way back to this plugin.
func FuzzStdin(f *testing.F) {
	for _, seed := range []string{
		``, `null`, `{}`, `{"name":"pods","type":"overlay-cni"}`,
		`{"name":"n","delegate":null,"ipam":null,"runtimeConfig":null}`,
		`{"cniVersion":"1.1.0","name":"n","type":"t","delegate":{"type":"ptp","mtu":9,"Name":"x"},"ipam":{"routes":[{"dst":"::/0"}]}}`,
		`{"name":"n","delegate":{"TYPE":"bridge","type":"x","isGateway":null},"ipam":{"Ranges":1,"ranges":2,"Type":"dhcp"},"waitSeconds":1.5}`,
		`{"name":"n","cni.dev/valid-attachments":[{"containerID":"a","ifname":"b"}],"args":{"cni":{}},"prevResult":{}}`,
		`{"name":"n","subnetFile":7,"waitSeconds":"10s","delegate":[],"ipam":""}`,
	} {
		f.Add([]byte(seed), envDual)
	}
	f.Add([]byte(`{"name":"n"}`),
		"FLANNEL_SUBNET=0.0.0.0/0\nFLANNEL_NETWORK=0.0.0.0/0\nFLANNEL_MTU=68\nFLANNEL_IPMASQ=false")
	f.Fuzz(func(t *testing.T, stdin []byte, text string) {
		c, err := cni.ParseConfig(stdin)
		if err != nil {
			oneLine(t, err)
			return
		}
		if !filepath.IsAbs(c.DataDir) || !filepath.IsLocal(c.Name) || strings.Contains(c.Name, "/") {
			t.Fatalf("accepted: %+v", c)
		}
		if err := c.CheckForAdd(); err != nil {
			oneLine(t, err)
		} else if !filepath.IsAbs(c.SubnetFile) || c.Wait < 0 {
			t.Fatalf("accepted for ADD: %+v", c)
		}
		env, err := cni.ParseSubnetEnv(text)
		if err != nil {
			return
		}
		d, err := c.Generate(env)
		if err != nil {
			oneLine(t, err)
			return
		}
		var got struct {
			Name, Type string
			IPAM       struct {
				Type   string
				Ranges [][]struct{ Subnet string }
			}
		}
		if err := json.Unmarshal(d.Conf, &got); err != nil {
			t.Fatalf("%v in %s", err, d.Conf)
		}
		if got.Name != c.Name || got.Type != d.Type || d.Type == c.Type || d.Type == "" ||
			strings.ContainsAny(d.Type, `/\`) ||
			got.IPAM.Type == "" || len(got.IPAM.Ranges) != len(env.Families()) {
			t.Fatalf("generated %s", d.Conf)
		}
		for i, fam := range env.Families() {
			if got.IPAM.Ranges[i][0].Subnet != env.Subnet.Get(fam).String() {
				t.Fatalf("generated %s", d.Conf)
			}
		}
	})
}

// FuzzSubnetEnv: whatever the file holds, there is an error of one line or values that make sense.
func FuzzSubnetEnv(f *testing.F) {
	for _, seed := range []string{
		"", "=", "FLANNEL_SUBNET=", envV4, envDual, envFlannel, "\x00=\n\n#",
		"FLANNEL_MTU=1\r\n",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		env, err := cni.ParseSubnetEnv(text)
		if err != nil {
			oneLine(t, err)
			return
		}
		if len(env.Families()) == 0 || env.MTU < 68 || env.MTU > 65535 {
			t.Fatalf("accepted: %+v", env)
		}
		for _, fam := range env.Families() {
			networks := env.Networks.Get(fam)
			if len(networks) == 0 || env.Subnet.Get(fam) != env.Subnet.Get(fam).Masked() {
				t.Fatalf("accepted: %+v", env)
			}
			for _, n := range networks {
				if !n.IsValid() || addr.FamilyOf(n.Addr()) != fam {
					t.Fatalf("accepted: %+v", env)
				}
			}
		}
	})
}

func oneLine(t *testing.T, err error) {
	t.Helper()
	if msg := err.Error(); msg == "" || strings.ContainsAny(msg, "\n\r") {
		t.Fatalf("not one line: %q", msg)
	}
}
