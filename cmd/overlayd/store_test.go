package main

import (
	"bytes"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/subnet"
)

// Flags of the store that is not in use are refused, unless they say what is so by default.
func TestFlagsOfAnotherStore(t *testing.T) {
	for _, tt := range []struct {
		args []string
		env  string // NAME=value
		want string // of the error; "": none
	}{
		{nil, "", ""},
		{[]string{"--store=kubernetes"}, "", ""},
		{[]string{"--store=kubernetes", "--kubeconfig=x", "--kube-config-map=a/b"}, "", ""},
		{[]string{"--store=kubernetes", "--etcd-prefix=/overlayd/network"}, "OVERLAYD_ETCD_CAFILE=", ""},
		{[]string{"--etcd-prefix=/a", "--lease-ttl=1h"}, "", ""},
		{
			[]string{"--store=kubernetes", "--etcd-prefix=/a", "--lease-ttl=1h"},
			"", "--store is kubernetes, and these are for --store=etcd: --etcd-prefix, --lease-ttl",
		},
		{
			[]string{"--store=kubernetes"},
			"OVERLAYD_ETCD_ENDPOINTS=http://a:1", "--store is kubernetes, and these are for --store=etcd: --etcd-endpoints",
		},
		{nil, "OVERLAYD_KUBECONFIG=x", "--store is etcd, and these are for --store=kubernetes: --kubeconfig"},
		{[]string{"--etcd-prefix=/a"}, "OVERLAYD_STORE=kubernetes", "--store is kubernetes, and these are for --store=etcd"},
	} {
		t.Run(strings.Join(append(tt.args, tt.env), " "), func(t *testing.T) {
			if name, value, ok := strings.Cut(tt.env, "="); ok {
				t.Setenv(name, value)
			}
			var f flags
			cmd := &cobra.Command{Use: "overlayd"}
			f.addStore(cmd.Flags())
			f.addDaemon(cmd.Flags())
			if err := cmd.ParseFlags(tt.args); err != nil {
				t.Fatal(err)
			}
			if err := f.read(cmd); err != nil {
				t.Fatal(err)
			}
			err := f.checkStore(f.store.Kind)
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

// With the store kubernetes, a node is named as the pod's manifest says.
func TestNodeNameOfAPod(t *testing.T) {
	t.Setenv("NODE_NAME", "worker-1")
	var f flags
	f.agent.Identity.NodeID = "id"
	for kind, want := range map[status.StoreKind]bool{status.Etcd: false, status.Kubernetes: true} {
		f.store.Kind = kind
		if id, err := f.identity(); err != nil || (id.NodeName == "worker-1") != want {
			t.Errorf("%s: %+v, %v", kind, id, err)
		}
	}
	f.agent.Identity.NodeName = "given"
	if id, err := f.identity(); err != nil || id.NodeName != "given" {
		t.Errorf("%+v, %v", id, err)
	}
}

// In Kubernetes, a lease is neither a reservation nor does it expire.
func TestLeasesOfNodes(t *testing.T) {
	t.Parallel()
	value := []byte(`{"PublicIP":"192.0.2.1","BackendType":"host-gw","NodeName":"n1","NodeID":"id"}`)
	bare := subnet.ParseEntry("10.244.2.0-24", nil, 1, 1, 0)
	bare.NodeName = "n2"
	rows := []leaseRow{rowOf(subnet.ParseEntry("10.244.1.0-24", value, 1, 1, 0), true), rowOf(bare, true)}
	if rows[0].Reservation || rows[1].Reservation {
		t.Errorf("%+v", rows)
	}
	var out bytes.Buffer
	if err := printLeases(&out, rows, time.Now()); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`10\.244\.1\.0/24 +n1 +192\.0\.2\.1 +host-gw +- +with its Node +other`,
		`10\.244\.2\.0/24 +n2 +- +- +- +with its Node +not announced`,
	} {
		if !regexp.MustCompile(want).Match(out.Bytes()) {
			t.Errorf("no %s in\n%s", want, out.String())
		}
	}
}

// --help says which flags belong to which store.
func TestHelpOfStores(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	cmd := root()
	cmd.SetOut(&out)
	if err := cmd.Help(); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"--store store ", "--etcd-cafile file ", "--lease-ttl duration ", "--init-config file ", "--kube-config-map NAMESPACE/NAME ",
		"--kubeconfig file ", "--kube-annotation-prefix prefix ",
	} {
		_, text, ok := strings.Cut(out.String(), line)
		text, _, _ = strings.Cut(text, "\n")
		want := map[bool]string{true: "[kubernetes] ", false: "[etcd] "}[strings.Contains(line, "kube")]
		if strings.Contains(line, "--store") {
			want = "Lease store: etcd, or kubernetes"
		}
		if !ok || !strings.HasPrefix(strings.TrimSpace(text), want) {
			t.Errorf("%q: %q, want %q", line, text, want)
		}
	}
}
