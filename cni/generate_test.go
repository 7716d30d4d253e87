package cni_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/overlayd/overlayd/cni"
)

// As the daemon writes them.
const (
	envV4 = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.5.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n" +
		ownV4
	ownV4   = "OVERLAYD_NETWORK=10.244.0.0/16\nOVERLAYD_SUBNET=10.244.5.1/24\nOVERLAYD_MTU=1450\nOVERLAYD_IPMASQ=true\n"
	envV6   = "FLANNEL_IPV6_NETWORK=fd00:10:244::/48\nFLANNEL_IPV6_SUBNET=fd00:10:244:5::1/64\nFLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"
	envDual = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.5.1/24\n" + envV6

	// As flannel's plugin has it in its README.
	envFlannel = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"
)

const (
	ipamV4   = `{"type":"host-local","ranges":[[{"subnet":"10.244.5.0/24"}]],"routes":[{"dst":"10.244.0.0/16"}]}`
	ipamV6   = `{"type":"host-local","ranges":[[{"subnet":"fd00:10:244:5::/64"}]],"routes":[{"dst":"fd00:10:244::/48"}]}`
	ipamDual = `{"type":"host-local","ranges":[[{"subnet":"10.244.5.0/24"}],[{"subnet":"fd00:10:244:5::/64"}]],` +
		`"routes":[{"dst":"10.244.0.0/16"},{"dst":"fd00:10:244::/48"}]}`
	bridge = `"type":"bridge","name":"pods","isGateway":true,"isDefaultGateway":true,"hairpinMode":true`
)

func TestGenerate(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, conf, env, want string }{
		{
			"IPv4", `{"cniVersion":"1.1.0","name":"pods","type":"overlay-cni"}`, envV4,
			`{"cniVersion":"1.1.0",` + bridge + `,"mtu":1450,"ipMasq":false,"ipam":` + ipamV4 + `}`,
		},
		{
			"IPv6", `{"cniVersion":"1.1.0","name":"pods","type":"overlay-cni"}`, envV6,
			`{"cniVersion":"1.1.0",` + bridge + `,"mtu":1430,"ipMasq":false,"ipam":` + ipamV6 + `}`,
		},
		{
			"dual stack", `{"cniVersion":"1.1.0","name":"pods","type":"overlay-cni","delegate":null,"ipam":null,"args":null}`,
			envDual,
			`{"cniVersion":"1.1.0",` + bridge + `,"mtu":1430,"ipMasq":false,"ipam":` + ipamDual + `}`,
		},
		{
			"the daemon does not masquerade", `{"name":"pods","type":"overlay-cni"}`, strings.ReplaceAll(envV4, "IPMASQ=true",
				"IPMASQ=false"),
			`{` + bridge + `,"mtu":1450,"ipMasq":true,"ipam":` + ipamV4 + `}`,
		},
		{
			"the operator's word counts",
			`{"name":"pods","type":"overlay-cni","delegate":{"mtu":1400,"ipMasq":true,"isGateway":false,"hairpinMode":false,"bridge":"br7","cniVersion":"0.1.0"}}`, envV4,
			`{"type":"bridge","name":"pods","bridge":"br7","isGateway":false,"hairpinMode":false,"mtu":1400,"ipMasq":true,"cniVersion":"0.1.0","ipam":` + ipamV4 + `}`,
		},
		{
			"in any letter case",
			`{"Name":"pods","Type":"overlay-cni","Delegate":{"MTU":1400,"IsDefaultGateway":false,"TYPE":"bridge"},"Ipam":{"TYPE":"host-local"}}`, envV4,
			`{"type":"bridge","name":"pods","isGateway":true,"IsDefaultGateway":false,"hairpinMode":true,"MTU":1400,"ipMasq":false,"ipam":` + ipamV4 + `}`,
		},
		{
			"no hairpin in promiscuous mode", `{"name":"pods","type":"overlay-cni","delegate":{"promiscMode":true}}`, envV4,
			`{"type":"bridge","name":"pods","isGateway":true,"isDefaultGateway":true,"promiscMode":true,"mtu":1450,"ipMasq":false,"ipam":` + ipamV4 + `}`,
		},
		{
			"other keys pass, to the last digit",
			`{"name":"pods","type":"overlay-cni","delegate":{"vlan":100,"x":12345678901234567890,"y":{"Z":[1.50,null]}},
			  "ipam":{"dataDir":"/run/ips","resolvConf":"/etc/resolv.conf","n":0.10000000000000000001,"routes":[{"dst":"192.0.2.0/24","gw":"10.244.5.9","mtu":1300}]}}`, envV4,
			`{` + bridge + `,"mtu":1450,"ipMasq":false,"vlan":100,"x":12345678901234567890,"y":{"Z":[1.50,null]},
			  "ipam":{"type":"host-local","dataDir":"/run/ips","resolvConf":"/etc/resolv.conf","n":0.10000000000000000001,
			  "ranges":[[{"subnet":"10.244.5.0/24"}]],"routes":[{"dst":"192.0.2.0/24","gw":"10.244.5.9","mtu":1300},{"dst":"10.244.0.0/16"}]}}`,
		},
		{
			"what the runtime says of this container passes",
			`{"cniVersion":"0.4.0","name":"pods","type":"overlay-cni","capabilities":{"mac":true},"runtimeConfig":{"mac":"02:00:00:00:00:07"},
			  "args":{"cni":{"ips":["10.244.5.7"]}},"prevResult":{"cniVersion":"0.4.0"},"unknown":1}`, envV4,
			`{"cniVersion":"0.4.0",` + bridge + `,"mtu":1450,"ipMasq":false,"runtimeConfig":{"mac":"02:00:00:00:00:07"},
			  "args":{"cni":{"ips":["10.244.5.7"]}},"ipam":` + ipamV4 + `}`,
		},
		{
			"a default route in ipam takes the place of isDefaultGateway",
			`{"name":"pods","type":"overlay-cni","ipam":{"routes":[{"dst":"0.0.0.0/0"}]}}`, envDual,
			`{"type":"bridge","name":"pods","isGateway":true,"hairpinMode":true,"mtu":1430,"ipMasq":false,
			  "ipam":{"type":"host-local","ranges":[[{"subnet":"10.244.5.0/24"}],[{"subnet":"fd00:10:244:5::/64"}]],
			  "routes":[{"dst":"0.0.0.0/0"},{"dst":"10.244.0.0/16"},{"dst":"fd00:10:244::/48"},{"dst":"::/0"}]}}`,
		},
		{
			"one in another table does not",
			`{"name":"pods","type":"overlay-cni","ipam":{"routes":[{"dst":"0.0.0.0/0","table":7}]}}`, envV4,
			`{` + bridge + `,"mtu":1450,"ipMasq":false,
			  "ipam":{"type":"host-local","ranges":[[{"subnet":"10.244.5.0/24"}]],"routes":[{"dst":"0.0.0.0/0","table":7},{"dst":"10.244.0.0/16"}]}}`,
		},
		{
			"no route twice", `{"name":"pods","type":"overlay-cni","ipam":{"routes":[{"dst":"10.244.0.0/16","mtu":1300}]}}`,
			envV4,
			`{` + bridge + `,"mtu":1450,"ipMasq":false,
			  "ipam":{"type":"host-local","ranges":[[{"subnet":"10.244.5.0/24"}]],"routes":[{"dst":"10.244.0.0/16","mtu":1300}]}}`,
		},
		{
			"macvlan", `{"cniVersion":"1.0.0","name":"pods","type":"overlay-cni","delegate":{"type":"macvlan","master":"eth1"}}`,
			envV4,
			`{"cniVersion":"1.0.0","type":"macvlan","name":"pods","master":"eth1","mtu":1450,"ipMasq":false,"ipam":` + ipamV4 +
				`}`,
		},
		{
			"ptp", `{"cniVersion":"1.0.0","name":"pods","type":"overlay-cni","delegate":{"type":"ptp"}}`, envDual,
			`{"cniVersion":"1.0.0","type":"ptp","name":"pods","mtu":1430,"ipMasq":false,
			  "ipam":{"type":"host-local","ranges":[[{"subnet":"10.244.5.0/24"}],[{"subnet":"fd00:10:244:5::/64"}]],
			  "routes":[{"dst":"10.244.0.0/16"},{"dst":"fd00:10:244::/48"},{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}}`,
		},
		{
			"another ipam plugin", `{"name":"pods","type":"overlay-cni","ipam":{"type":"whereabouts"}}`, envV4,
			`{` + bridge + `,"mtu":1450,"ipMasq":false,"ipam":` + strings.Replace(ipamV4, "host-local", "whereabouts", 1) + `}`,
		},
		{
			"several networks, from flannel", `{"name":"pods","type":"overlay-cni"}`, strings.Replace(envFlannel, "10.1.0.0/16",
				"10.1.0.0/16,10.2.0.0/16", 1),
			`{` + bridge + `,"mtu":1472,"ipMasq":false,
			  "ipam":{"type":"host-local","ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"},{"dst":"10.2.0.0/16"}]}}`,
		},
		{
			"flannel's README: minimal", `{"name":"mynet","type":"overlay-cni"}`, envFlannel,
			`{"name":"mynet","type":"bridge","mtu":1472,"ipMasq":false,"isGateway":true,"isDefaultGateway":true,"hairpinMode":true,
			  "ipam":{"type":"host-local","ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"}]}}`,
		},
		{
			"flannel's README: a bridge with a name",
			`{"name":"mynet","type":"overlay-cni","delegate":{"bridge":"mynet0","mtu":1400}}`, envFlannel,
			`{"name":"mynet","type":"bridge","bridge":"mynet0","mtu":1400,"ipMasq":false,"isGateway":true,"isDefaultGateway":true,"hairpinMode":true,
			  "ipam":{"type":"host-local","ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"}]}}`,
		},
		{
			"flannel's README: ipvlan", `{"name":"mynet","type":"overlay-cni","delegate":{"type":"ipvlan","master":"eth0"}}`,
			envFlannel,
			`{"name":"mynet","type":"ipvlan","master":"eth0","mtu":1472,"ipMasq":false,
			  "ipam":{"type":"host-local","ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"}]}}`,
		},
		{
			"as Kubernetes has it with flannel",
			`{"name":"cbr0","cniVersion":"0.3.1","type":"overlay-cni","delegate":{"hairpinMode":true,"isDefaultGateway":true}}`,
			envFlannel,
			`{"name":"cbr0","cniVersion":"0.3.1","type":"bridge","mtu":1472,"ipMasq":false,"isGateway":true,"isDefaultGateway":true,"hairpinMode":true,
			  "ipam":{"type":"host-local","ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"}]}}`,
		},
		{
			"no default route, and one to the services",
			`{"name":"cbr0","type":"overlay-cni","delegate":{"isDefaultGateway":false},"ipam":{"routes":[{"dst":"10.96.0.0/12"}]}}`, envFlannel,
			`{"name":"cbr0","type":"bridge","mtu":1472,"ipMasq":false,"isGateway":true,"isDefaultGateway":false,"hairpinMode":true,
			  "ipam":{"type":"host-local","ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.96.0.0/12"},{"dst":"10.1.0.0/16"}]}}`,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			d, err := generate(c.conf, c.env)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := canonical(t, string(d.Conf)), canonical(t, c.want); got != want {
				t.Errorf("generated\n%s\nwant\n%s", got, want)
			}
			if !strings.Contains(string(d.Conf), `"type":"`+d.Type+`"`) {
				t.Errorf("delegate %q, but %s", d.Type, d.Conf)
			}
		})
	}
}

func generate(conf, env string) (cni.Delegate, error) {
	c, err := cni.ParseConfig([]byte(conf))
	if err != nil {
		return cni.Delegate{}, err
	}
	if err := c.CheckForAdd(); err != nil {
		return cni.Delegate{}, err
	}
	e, err := cni.ParseSubnetEnv(env)
	if err != nil {
		return cni.Delegate{}, err
	}
	return c.Generate(e)
}

// canonical is JSON with its keys in order, and numbers as they were written.
func canonical(t *testing.T, text string) string {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(text))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestConfigErrors(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		conf string
		code uint
		want string
	}{
		{`nonsense`, types.ErrDecodingFailure, "network configuration: not JSON: invalid character"},
		{`[]`, types.ErrInvalidNetworkConfig, "network configuration: expected an object, found []"},
		{`{}`, types.ErrInvalidNetworkConfig, "name: expected letters"},
		{
			`{"name":"../x"}`, types.ErrInvalidNetworkConfig,
			`name: expected letters, digits, dots, dashes and underscores, found "../x"`,
		},
		{`{"name":7}`, types.ErrInvalidNetworkConfig, "name: expected a string, found 7"},
		{`{"name":"n","subnetFile":true}`, types.ErrInvalidNetworkConfig, "subnetFile: expected a string, found true"},
		{
			`{"name":"n","subnetFile":"subnet.env"}`, types.ErrInvalidNetworkConfig,
			`subnetFile: expected a full path, found "subnet.env"`,
		},
		{`{"name":"n","dataDir":"../data"}`, types.ErrInvalidNetworkConfig, `dataDir: expected a full path, found "../data"`},
		{
			`{"name":"n","waitSeconds":-1}`, types.ErrInvalidNetworkConfig,
			"waitSeconds: expected a number from 0 to 90, found -1",
		},
		{
			`{"name":"n","waitSeconds":1e300}`, types.ErrInvalidNetworkConfig,
			"waitSeconds: expected a number from 0 to 90, found 1e300",
		},
		{
			`{"name":"n","waitSeconds":"10s"}`, types.ErrInvalidNetworkConfig,
			`waitSeconds: expected a number from 0 to 90, found "10s"`,
		},
		{`{"name":"n","delegate":[]}`, types.ErrInvalidNetworkConfig, "delegate: expected an object, found []"},
		{
			`{"name":"n","delegate":{"type":7}}`, types.ErrInvalidNetworkConfig,
			"delegate.type: expected the name of a plugin, found 7",
		},
		{
			`{"name":"n","delegate":{"type":null}}`, types.ErrInvalidNetworkConfig,
			"delegate.type: expected the name of a plugin, found null",
		},
		{
			`{"name":"n","delegate":{"type":"../sh"}}`, types.ErrInvalidNetworkConfig,
			`delegate.type: expected the name of a plugin, found "../sh"`,
		},
		{
			`{"name":"n","type":"overlay-cni","delegate":{"type":"overlay-cni"}}`, types.ErrInvalidNetworkConfig,
			"delegate.type: expected another plugin",
		},
		{
			`{"name":"n","delegate":{"name":"m"}}`, types.ErrInvalidNetworkConfig,
			`delegate.name: expected nothing here (it is taken from "name" beside delegate), found "m"`,
		},
		{`{"name":"n","delegate":{"ipam":{}}}`, types.ErrInvalidNetworkConfig, "delegate.ipam: expected nothing here"},
		{
			`{"name":"n","delegate":{"isGateway":"yes"}}`, types.ErrInvalidNetworkConfig,
			`delegate.isGateway: expected true or false, found "yes"`,
		},
		{
			`{"name":"n","delegate":{"promiscMode":1}}`, types.ErrInvalidNetworkConfig,
			`delegate.promiscMode: expected true or false, found 1`,
		},
		{`{"name":"n","ipam":"host-local"}`, types.ErrInvalidNetworkConfig, `ipam: expected an object, found "host-local"`},
		{
			`{"name":"n","ipam":{"type":{}}}`, types.ErrInvalidNetworkConfig,
			"ipam.type: expected the name of a plugin, found {}",
		},
		{`{"name":"n","ipam":{"routes":{}}}`, types.ErrInvalidNetworkConfig, "ipam.routes: expected a list, found {}"},
		{
			`{"name":"n","ipam":{"routes":[{"dst":"10.0.0.0/8"},{"dst":"10.0.0.0"}]}}`, types.ErrInvalidNetworkConfig,
			`ipam.routes[1]: expected a route such as {"dst": "10.96.0.0/12"}, found {"dst":"10.0.0.0"}`,
		},
		{`{"name":"n","ipam":{"routes":[null]}}`, types.ErrInvalidNetworkConfig, "ipam.routes[0]: expected a route"},
		{
			`{"name":"n","cni.dev/valid-attachments":{}}`, types.ErrInvalidNetworkConfig,
			"cni.dev/valid-attachments: expected a list of attachments, found {}",
		},
		{
			`{"name":"n","cni.dev/valid-attachments":[{"ifname":1}]}`, types.ErrInvalidNetworkConfig,
			`cni.dev/valid-attachments: expected a list of attachments, found [{"ifname":1}]`,
		},
	} {
		_, err := generate(c.conf, envV4)
		said := new(types.Error)
		if !errors.As(err, &said) || !strings.HasPrefix(said.Msg, c.want) || said.Code != c.code ||
			strings.Contains(said.Msg, "\n") {
			t.Errorf("%s\n got %v (%+v)\nwant %s (code %d)", c.conf, err, said, c.want, c.code)
		}
	}
}

func TestSubnetEnvErrors(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"":         "neither FLANNEL_SUBNET nor FLANNEL_IPV6_SUBNET is set",
		"nonsense": `line 1: expected NAME=VALUE`,
		strings.Replace(envFlannel, "10.1.17.1/24", "10.1.17.1",
			1): `line 2: FLANNEL_SUBNET: expected an IPv4 network`,
		strings.Replace(envFlannel, "10.1.17.1/24", "fd00::1/64",
			1): `line 2: FLANNEL_SUBNET: expected an IPv4 network`,
		strings.Replace(envFlannel, "10.1.0.0/16", "10.1.0.0/16,",
			1): `line 1: FLANNEL_NETWORK: expected an IPv4 network`,
		strings.Replace(envFlannel, "FLANNEL_NETWORK=10.1.0.0/16", "# a comment",
			1): "line 2: FLANNEL_SUBNET without FLANNEL_NETWORK",
		strings.Replace(envFlannel, "1472", "0",
			1): `line 3: FLANNEL_MTU: expected a number from 68 to 65535`,
		strings.Replace(envFlannel, "FLANNEL_MTU=1472\n", "\n", 1): "FLANNEL_MTU is not set",
		strings.Replace(envFlannel, "FLANNEL_IPMASQ=true", "", 1):  "FLANNEL_IPMASQ is not set",
		strings.Replace(envFlannel, "=true", "=yes",
			1): `line 4: FLANNEL_IPMASQ: expected true or false`,
		envFlannel + strings.Replace(ownV4, "OVERLAYD_MTU=1450", "OVERLAYD_MTU=x",
			1): `line 7: OVERLAYD_MTU: expected a number from 68 to 65535`,
		strings.Replace(envV6, "fd00:10:244:5::1/64", "::ffff:10.0.0.1/120",
			1): `line 2: FLANNEL_IPV6_SUBNET: expected an IPv6 network`,
	} {
		if _, err := cni.ParseSubnetEnv(text); err == nil || err.Error() != want {
			t.Errorf("%q\n got %v\nwant %s", text, err, want)
		}
	}
}

// The document shows what is really generated.
func TestDocumentation(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile(filepath.Join("..", "Documentation", "cni.md"))
	if err != nil {
		t.Fatal(err)
	}
	const conf = `{"cniVersion": "1.0.0", "name": "cbr0", "type": "overlay-cni"}`
	d, err := generate(conf, envDual)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := json.Indent(&b, d.Conf, "    ", "  "); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{conf, b.String(), strings.ReplaceAll(strings.TrimSpace(envDual), "\n", "\n    ")} {
		if !strings.Contains(string(doc), want) {
			t.Errorf("Documentation/cni.md does not have\n    %s", want)
		}
	}
}
