package main

import (
	"slices"
	"testing"
)

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
