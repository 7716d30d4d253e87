package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// The password of the environment is read, and is not inherited by the processes that overlayd starts.
func TestPasswordIsNotInherited(t *testing.T) {
	t.Setenv(envName("etcd-password"), "s3cret")
	t.Setenv(envName("etcd-username"), "u")
	var f flags
	cmd := &cobra.Command{Use: "overlayd"}
	f.addStore(cmd.Flags())
	if err := f.read(cmd); err != nil {
		t.Fatal(err)
	}
	if f.store.Etcd.Password != "s3cret" || f.store.Etcd.Username != "u" {
		t.Errorf("read %q and %q", f.store.Etcd.Password, f.store.Etcd.Username)
	}
	out, err := exec.CommandContext(t.Context(), "env").Output()
	if err != nil {
		t.Fatal(err)
	}
	if got := string(out); strings.Contains(got, "s3cret") || !strings.Contains(got, envName("etcd-username")+"=u") {
		t.Errorf("a process that is started has the environment\n%s", got)
	}
}

func TestUnknownSettings(t *testing.T) {
	t.Parallel()
	got := unknownSettings(root(), map[string]string{
		"OVERLAYD_IFACES": "eth1", "OVERLAYD_ETCD_ENDPOINT": "http://a:1", "OVERLAYD_HEALTH_PORT": "1", // slips
		"OVERLAYD_IFACE": "eth1", "OVERLAYD_ETCD_PREFIX": "/a", "OVERLAYD_HEALTHZ_PORT": "1",
		"OVERLAYD_ENV_FILE": "/a",                                              // settings
		"PATH":              "/bin", "OVERLAY": "1", "FLANNELD_IFACES": "eth1", // of other programs
		"OVERLAYD_SERVICE_HOST": "10.96.0.9", "OVERLAYD_SERVICE_PORT": "8471", // of Kubernetes
		"OVERLAYD_SERVICE_PORT_METRICS": "8471",
		"OVERLAYD_PORT":                 "tcp://10.96.0.9:8471", "OVERLAYD_PORT_8471_TCP": "tcp://10.96.0.9:8471",
		"OVERLAYD_METRICS_PORT_8471_TCP_PROTO": "tcp", "OVERLAYD_METRICS_PORT_8471_TCP_ADDR": "10.96.0.9",
	})
	if want := []string{"OVERLAYD_ETCD_ENDPOINT", "OVERLAYD_HEALTH_PORT", "OVERLAYD_IFACES"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
