package dist_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const dualStack = `{network: {EnableIPv6: true, IPv6Network: "fd00:10:244::/56", SubnetLen: 25, Backend: {Type: host-gw, MTU: 1400}}}`

// onKubernetes is what can be set for the Kubernetes API as the store.
const onKubernetes = `{kubeAnnotationPrefix: net.example.com, settings: {public-ip: 192.0.2.1}}`

// everything is a value for all that can be set, with etcd as the store.
const everything = `
image: {repository: registry.example.net/overlayd, digest: "sha256:0123456789012345678901234567890123456789012345678901234567890123", pullPolicy: Always}
imagePullSecrets: [{name: registry}]
etcd: {endpoints: ["https://a:2379", "https://b:2379"], prefix: /pods, tls: {secretName: tls}, user: {secretName: user}}
network: {Network: 10.0.0.0/8, SubnetLen: 24, SubnetMin: 10.1.0.0, SubnetMax: 10.9.0.0, EnableIPv4: true, EnableIPv6: true, IPv6Network: "fd00::/48",
  IPv6SubnetLen: 64, IPv6SubnetMin: "fd00:0:0:1::", IPv6SubnetMax: "fd00:0:0:9::",
  Backend: {Type: vxlan, VNI: 16777215, Port: 4789, MTU: 1400, DirectRouting: true, GBP: false, Learning: false}}
iface: [eth1, 192.0.2.1]
settings: {log-format: json, ip-masq: false, ip-masq-exclude: [192.168.0.0/16, 172.16.0.0/12], lease-ttl: 86400, stale-peer-grace: 5m,
  take-over: kube-system/overlayd}
cni: {binDir: /usr/lib/cni, confDir: /etc/cni/own, confName: 05-pods.conflist, conflist: '{"cniVersion": "1.1.0", "name": "pods", "plugins": [{"type": "overlay-cni"}]}'}
healthz: {port: 9471, onNodeAddress: true}
podMonitor: {enabled: true, labels: {team: net}, interval: 15s}
prometheusRule: {enabled: true, labels: {release: prometheus}}
grafanaDashboard: {enabled: true, annotations: {grafana_folder: Network}}
extraEnv: [{name: GOMEMLIMIT, value: 256MiB}]
livenessProbe: {initialDelaySeconds: 60, failureThreshold: 3}
readinessProbe: {periodSeconds: 5}
priorityClassName: network
affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: a, operator: Exists}]}]}}}
resources: {limits: {memory: 1Gi}}
maxUnavailable: 10%
nodeSelector: {pool: blue}
tolerations: [{key: a, operator: Exists, effect: NoSchedule}]
podAnnotations: {a: b}
podLabels: {c: d}
`

// etcdSettings are those of dist/kubernetes for an etcd, and etcdValue is the same for the chart.
const (
	etcdSettings = `configMapGenerator: [{name: overlayd-settings, namespace: overlayd, behavior: merge,
  literals: ["OVERLAYD_ETCD_ENDPOINTS=https://a:2379,https://b:2379"]}]`
	etcdValue = `endpoints: ["https://a:2379", "https://b:2379"]`
)

// The chart without values is what kustomize makes of dist/kubernetes, and with values what it makes with components,
// but for the namespace, which helm makes itself, and for what either of the two adds to tell that its configuration
// changed.
func TestSame(t *testing.T) {
	for _, c := range []struct {
		components   []string
		more, values string
	}{
		{nil, "", ""},
		{[]string{"etcd"}, etcdSettings, "etcd: {" + etcdValue + "}"},
		{[]string{"etcd", "etcd-tls"}, etcdSettings, "etcd: {" + etcdValue + ", tls: {secretName: overlayd-etcd-tls}}"},
		{[]string{"etcd", "etcd-user"}, etcdSettings, "etcd: {" + etcdValue + ", user: {secretName: overlayd-etcd-user}}"},
		{[]string{"pod-monitor"}, "", "podMonitor: {enabled: true}"},
	} {
		t.Run(strings.Join(c.components, " "), func(t *testing.T) {
			ours := kustomizeWith(t, kustomizeDir, c.more, c.components...)
			delete(ours, "Namespace overlayd")
			unhash(t, ours)
			inline(t, ours)
			theirs, _ := helm(t, c.values)
			delete(theirs, "Pod overlayd-test") // of `helm test`
			same(t, ours, theirs)
		})
	}
	ours := kustomize(t, kustomizeDir+"/uninstall")
	delete(ours, "Namespace overlayd-uninstall")
	get[apps.DaemonSet](t, ours, "DaemonSet overlayd-uninstall").Namespace = "overlayd" // helm has one for all
	theirs, _ := helm(t, "uninstall: true")
	get[core.ServiceAccount](t, theirs, "ServiceAccount overlayd")
	delete(theirs, "ServiceAccount overlayd")
	same(t, ours, theirs)
}

// unhash takes the hashes from the names of ConfigMaps. Each must have one, so that a change restarts the daemons, but
// the network config, which they follow by its name.
func unhash(t *testing.T, objs objects) {
	t.Helper()
	hashed := regexp.MustCompile(`-[a-z0-9]{10}$`)
	for _, key := range slices.Sorted(maps.Keys(objs)) {
		cm, ok := objs[key].(*core.ConfigMap)
		if !ok {
			continue
		}
		if hashed.MatchString(key) == (cm.Name == "overlayd-network") {
			t.Errorf("%s: a hash in its name is for what the daemons do not follow", key)
		}
		delete(objs, key)
		cm.Name = hashed.ReplaceAllString(cm.Name, "")
		objs["ConfigMap "+cm.Name] = cm
	}
	spec := &get[apps.DaemonSet](t, objs, "DaemonSet overlayd").Spec.Template.Spec
	refs := 0
	plain := func(name *string) {
		*name = hashed.ReplaceAllString(*name, "")
		get[core.ConfigMap](t, objs, "ConfigMap "+*name)
		refs++
	}
	for _, v := range spec.Volumes {
		if v.ConfigMap != nil {
			plain(&v.ConfigMap.Name)
		}
	}
	for _, from := range spec.Containers[0].EnvFrom {
		plain(&from.ConfigMapRef.Name)
	}
	if refs < 2 {
		t.Errorf("expected two references to ConfigMaps, found %d", refs)
	}
}

// All components together set each variable once.
func TestComponents(t *testing.T) {
	all := kustomize(t, kustomizeDir, "etcd", "etcd-tls", "etcd-user", "pod-monitor")
	env := get[apps.DaemonSet](t, all, "DaemonSet overlayd").Spec.Template.Spec.Containers[0].Env
	for _, name := range []string{
		"OVERLAYD_NODE_NAME", "OVERLAYD_STORE", "OVERLAYD_ETCD_CAFILE", "OVERLAYD_ETCD_PASSWORD_FILE",
		"OVERLAYD_HEALTHZ_IP",
	} {
		if n := count(env, func(e core.EnvVar) bool { return e.Name == name }); n != 1 {
			t.Errorf("%s is there %d times", name, n)
		}
	}
}

// Somebody who refers to the directory can set what is in its files, as its kustomization.yaml says.
func TestOverlay(t *testing.T) {
	raw, err := os.ReadFile(kustomizeDir + "/kustomization.yaml")
	if err != nil {
		t.Fatal(err)
	}
	_, example, ok := strings.Cut(string(raw), "#   configMapGenerator:\n")
	example, _, found := strings.Cut(example, "\napiVersion:")
	if !ok || !found {
		t.Fatal("the example is not in kustomization.yaml")
	}
	objs := kustomizeWith(t, kustomizeDir, "configMapGenerator:\n"+strings.ReplaceAll(example, "#   ",
		"")+"\nimages: [{name: ghcr.io/overlayd/overlayd, newName: registry.example.net/o, newTag: v7}]\n")
	ds := get[apps.DaemonSet](t, objs, "DaemonSet overlayd").Spec.Template.Spec
	settings := get[core.ConfigMap](t, objs, "ConfigMap "+ds.Containers[0].EnvFrom[0].ConfigMapRef.Name).Data
	if settings["OVERLAYD_LOG_FORMAT"] != "json" || settings["OVERLAYD_BRIDGE_NETFILTER"] != "true" {
		t.Errorf("settings %v", settings)
	}
	if cm := get[core.ConfigMap](t, objs, "ConfigMap overlayd-network"); cm.Data["net-conf.json"] != network {
		t.Errorf("network config %v", cm.Data)
	}
	for _, c := range append(ds.InitContainers, ds.Containers...) {
		if c.Image != "registry.example.net/o:v7" {
			t.Errorf("%s: image %s", c.Name, c.Image)
		}
	}
}

func count[T any](all []T, is func(T) bool) (n int) {
	for _, x := range all {
		if is(x) {
			n++
		}
	}
	return n
}

// inline puts the settings into the environment of the container, where the chart has them.
func inline(t *testing.T, objs objects) {
	t.Helper()
	pod := &get[apps.DaemonSet](t, objs, "DaemonSet overlayd").Spec.Template.Spec
	for i := range pod.InitContainers { // a setting that is not set
		c := &pod.InitContainers[i]
		c.Env = slices.DeleteFunc(c.Env, func(e core.EnvVar) bool {
			return e.ValueFrom != nil && e.ValueFrom.ConfigMapKeyRef != nil
		})
	}
	c := &pod.Containers[0]
	for _, from := range c.EnvFrom {
		key := "ConfigMap " + from.ConfigMapRef.Name
		for name, value := range get[core.ConfigMap](t, objs, key).Data {
			c.Env = append(c.Env, core.EnvVar{Name: name, Value: value})
		}
		delete(objs, key)
	}
	c.EnvFrom = nil
}

// sortSpec brings lists into an order in which the order means nothing.
func sortSpec(s *core.PodSpec) {
	slices.SortFunc(s.Volumes, func(a, b core.Volume) int { return strings.Compare(a.Name, b.Name) })
	for i := range s.Containers {
		c := &s.Containers[i]
		slices.SortFunc(c.Env, func(a, b core.EnvVar) int { return strings.Compare(a.Name, b.Name) })
		slices.SortFunc(c.VolumeMounts, func(a, b core.VolumeMount) int { return strings.Compare(a.MountPath, b.MountPath) })
	}
}

// same compares without what only helm adds: its labels, and the hash of the configuration.
func same(t *testing.T, ours, theirs objects) {
	t.Helper()
	for _, obj := range theirs {
		m := obj.(meta.Object)
		labels := m.GetLabels()
		if labels["app.kubernetes.io/managed-by"] != "Helm" || !strings.HasPrefix(labels["helm.sh/chart"], "overlayd-") {
			t.Errorf("%s: expected helm's labels, found %v", m.GetName(), labels)
		}
		for _, label := range []string{"app.kubernetes.io/managed-by", "app.kubernetes.io/version", "helm.sh/chart"} {
			delete(labels, label)
		}
		if ds, ok := obj.(*apps.DaemonSet); ok {
			if labels["app.kubernetes.io/name"] == "overlayd" && ds.Name == "overlayd-uninstall" {
				labels["app.kubernetes.io/name"] = ds.Name
			}
			if ds.Name == "overlayd" && len(ds.Spec.Template.Annotations["checksum/config"]) != 64 {
				t.Error("a changed configuration would restart no daemon")
			}
			delete(ds.Spec.Template.Annotations, "checksum/config")
		}
	}
	for _, o := range []objects{ours, theirs} {
		for _, obj := range o {
			if ds, ok := obj.(*apps.DaemonSet); ok {
				sortSpec(&ds.Spec.Template.Spec)
			}
			if cm, ok := obj.(*core.ConfigMap); ok {
				for name, text := range cm.Data {
					if strings.HasPrefix(text, "{") { // JSON, in whatever form
						cm.Data[name] = compact(t, text)
					}
				}
			}
		}
	}
	if d := cmp.Diff(ours, theirs); d != "" {
		t.Errorf("kustomize - + helm:\n%s", d)
	}
}

func compact(t *testing.T, text string) string {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

// rendered is all that is rendered anywhere in these tests.
func rendered(t *testing.T) map[string]objects {
	t.Helper()
	out := map[string]objects{
		"kustomize": kustomize(t, kustomizeDir), "kustomize uninstall": kustomize(t, kustomizeDir+"/uninstall"),
		"kustomize with components": kustomize(t, kustomizeDir, "etcd", "etcd-tls", "etcd-user", "pod-monitor"),
	}
	for name, values := range map[string]string{
		"helm": "", "helm dual stack": dualStack, "helm kubernetes": onKubernetes, "helm everything": everything, "helm uninstall": everything +
			"\nuninstall: true\n",
		"helm TLS without a client certificate": "etcd: {" + etcdValue + ", tls: {secretName: a, clientCertificate: false}}",
	} {
		out[name], _ = helm(t, values)
	}
	return out
}

// What every pod must and must not have, whatever was set.
func TestPods(t *testing.T) {
	dirs := []string{
		"/run/overlayd", "/var/lib/overlayd", "/run/xtables.lock", "/etc/machine-id", "/proc/sys/net", "/opt/cni/bin",
		"/etc/cni/net.d",
		"/usr/lib/cni", "/etc/cni/own", "/var/lib/cni",
	}
	for name, objs := range rendered(t) {
		t.Run(name, func(t *testing.T) {
			sets := 0
			for key, obj := range objs {
				ds, ok := obj.(*apps.DaemonSet)
				if !ok {
					continue
				}
				sets++
				pod := ds.Spec.Template.Spec
				if !pod.HostNetwork || pod.HostPID || pod.HostIPC || pod.PriorityClassName == "" ||
					pod.DNSPolicy != core.DNSDefault {
					t.Errorf("%s: %+v", key, pod)
				}
				uses := slices.ContainsFunc(pod.Containers[0].Env, func(e core.EnvVar) bool {
					return e.Name == "OVERLAYD_STORE" && e.Value == "kubernetes"
				})
				if token := pod.AutomountServiceAccountToken; token == nil || *token != uses {
					t.Errorf("%s: it uses the Kubernetes API: %v, but its token is there: %v", key, uses, token)
				}
				if u := ds.Spec.UpdateStrategy.RollingUpdate; u == nil || u.MaxSurge == nil || u.MaxSurge.String() != "0" ||
					u.MaxUnavailable == nil || u.MaxUnavailable.String() == "0" {
					t.Errorf("%s: two daemons on a node would refuse each other: %v", key, ds.Spec.UpdateStrategy)
				}
				for label, value := range ds.Spec.Selector.MatchLabels {
					if ds.Spec.Template.Labels[label] != value {
						t.Errorf("%s: it does not select its own pods", key)
					}
				}
				mounts := map[string]bool{}
				for _, c := range append(pod.InitContainers, pod.Containers...) {
					checkContainer(t, c)
					for _, m := range c.VolumeMounts {
						mounts[m.Name] = true
					}
				}
				for _, v := range pod.Volumes {
					if !mounts[v.Name] {
						t.Errorf("the volume %s is not used", v.Name)
					}
					delete(mounts, v.Name)
					if v.Secret != nil && (v.Secret.DefaultMode == nil || *v.Secret.DefaultMode != 0o400) {
						t.Errorf("the secret %s is for others too", v.Secret.SecretName)
					}
					if v.HostPath != nil && (!slices.Contains(dirs, v.HostPath.Path) || v.HostPath.Type == nil ||
						*v.HostPath.Type == "") {
						t.Errorf("unexpected path of the host: %+v", v.HostPath)
					}
				}
				if len(mounts) > 0 {
					t.Errorf("there are no volumes %v", mounts)
				}
			}
			if sets != 1 {
				t.Errorf("%d DaemonSets", sets)
			}
		})
	}
}

func checkContainer(t *testing.T, c core.Container) {
	t.Helper()
	if len(c.Resources.Requests)+len(c.Resources.Limits) == 0 { // a quota would refuse the pod
		t.Errorf("%s: no resources", c.Name)
	}
	s := c.SecurityContext
	if s == nil || s.Privileged != nil || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation ||
		s.ReadOnlyRootFilesystem == nil ||
		!*s.ReadOnlyRootFilesystem || s.Capabilities == nil || !equal(s.Capabilities.Drop, []core.Capability{"ALL"}) {
		t.Errorf("%s: %+v", c.Name, s)
		return
	}
	may := map[string][]core.Capability{
		"overlayd": {"NET_ADMIN", "NET_RAW"}, "cleanup": {"NET_ADMIN", "NET_RAW"}, "uninstall-cni": {"NET_ADMIN"},
		"install-cni": nil, "done": nil,
	}
	if want, ok := may[c.Name]; !ok || !equal(s.Capabilities.Add, want) {
		t.Errorf("%s: capabilities %v", c.Name, s.Capabilities.Add)
	}
	for _, m := range c.VolumeMounts {
		if (m.Name == "config" || m.Name == "machine-id" || strings.HasPrefix(m.Name, "etcd-")) && !m.ReadOnly {
			t.Errorf("%s: %s can be written", c.Name, m.MountPath)
		}
	}
	if c.Name != "overlayd" {
		return
	}
	port := c.Ports[0]
	for _, p := range []*core.Probe{c.LivenessProbe, c.ReadinessProbe} {
		if p == nil || p.HTTPGet == nil || p.HTTPGet.Port.String() != port.Name || p.HTTPGet.Host != port.HostIP {
			t.Errorf("probe %+v for port %+v", p, port)
		}
	}
	if port.ContainerPort != port.HostPort {
		t.Errorf("port %+v", port)
	}
}

// Everything that is set reaches the place where it belongs.
func TestValues(t *testing.T) {
	objs, _ := helm(t, everything)
	settings := map[string]string{}
	for _, e := range get[apps.DaemonSet](t, objs, "DaemonSet overlayd").Spec.Template.Spec.Containers[0].Env {
		if e.ValueFrom == nil && !strings.HasPrefix(e.Value, "/etc/overlayd") && !strings.HasPrefix(e.Value, "/host/") &&
			e.Name != "OVERLAYD_OWNER" {
			settings[e.Name] = e.Value
		}
	}
	if d := cmp.Diff(map[string]string{
		"OVERLAYD_BRIDGE_NETFILTER": "true", "GOMEMLIMIT": "256MiB", "OVERLAYD_STORE": "etcd",
		"OVERLAYD_ETCD_ENDPOINTS": "https://a:2379,https://b:2379", "OVERLAYD_ETCD_PREFIX": "/pods",
		"OVERLAYD_IFACE":        "eth1,192.0.2.1",
		"OVERLAYD_HEALTHZ_PORT": "9471", "OVERLAYD_LOG_FORMAT": "json", "OVERLAYD_IP_MASQ": "false",
		"OVERLAYD_IP_MASQ_EXCLUDE": "192.168.0.0/16,172.16.0.0/12", "OVERLAYD_LEASE_TTL": "86400",
		"OVERLAYD_STALE_PEER_GRACE": "5m", "OVERLAYD_TAKE_OVER": "kube-system/overlayd",
	}, settings); d != "" {
		t.Error(d)
	}
	ds := get[apps.DaemonSet](t, objs, "DaemonSet overlayd")
	pod := ds.Spec.Template.Spec
	c := pod.Containers[0]
	for what, ok := range map[string]bool{
		"image": strings.HasPrefix(c.Image, "registry.example.net/overlayd@sha256:01") &&
			c.ImagePullPolicy == core.PullAlways,
		"secret":        pod.ImagePullSecrets[0].Name == "registry",
		"port":          c.Ports[0].ContainerPort == 9471,
		"node address":  c.ReadinessProbe.HTTPGet.Host == "" && c.Ports[0].HostIP == "",
		"resources":     c.Resources.Limits.Memory().String() == "1Gi",
		"update":        ds.Spec.UpdateStrategy.RollingUpdate.MaxUnavailable.String() == "10%",
		"node selector": pod.NodeSelector["pool"] == "blue",
		"affinity":      pod.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution != nil,
		"priority":      pod.PriorityClassName == "network",
		"variables":     slices.Contains(c.Env, core.EnvVar{Name: "GOMEMLIMIT", Value: "256MiB"}),
		"CNI file": slices.Contains(c.Env,
			core.EnvVar{Name: "OVERLAYD_CNI_CONF", Value: "/host/etc/cni/net.d/05-pods.conflist"}),
		"taking over": slices.Contains(pod.InitContainers[0].Env,
			core.EnvVar{Name: "OVERLAYD_TAKE_OVER", Value: "kube-system/overlayd"}),
		"liveness":    c.LivenessProbe.InitialDelaySeconds == 60 && c.LivenessProbe.FailureThreshold == 3,
		"readiness":   c.ReadinessProbe.PeriodSeconds == 5,
		"tolerations": len(pod.Tolerations) == 1 && pod.Tolerations[0].Key == "a",
		"labels":      ds.Spec.Template.Labels["c"] == "d" && ds.Spec.Template.Annotations["a"] == "b",
		"conflist":    slices.Contains(pod.InitContainers[0].Command, "05-pods.conflist"),
		"CNI": strings.TrimSpace(get[core.ConfigMap](t, objs,
			"ConfigMap overlayd").Data["cni.conflist"]) == `{"cniVersion": "1.1.0", "name": "pods", "plugins": [{"type": "overlay-cni"}]}`,
		"pod monitor": get[monitoring.PodMonitor](t, objs, "PodMonitor overlayd").Labels["team"] == "net",
		"interval": get[monitoring.PodMonitor](t, objs,
			"PodMonitor overlayd").Spec.PodMetricsEndpoints[0].Interval == "15s",
		"bin directory": count(pod.Volumes, func(v core.Volume) bool {
			return v.HostPath != nil &&
				v.HostPath.Path == "/usr/lib/cni"
		}) == 1,
		"conf directory": count(pod.Volumes, func(v core.Volume) bool {
			return v.HostPath != nil &&
				v.HostPath.Path == "/etc/cni/own"
		}) == 1,
	} {
		if !ok {
			t.Errorf("%s is not what was set", what)
		}
	}
	sum := func(values string) string {
		o, _ := helm(t, values)
		return get[apps.DaemonSet](t, o, "DaemonSet overlayd").Spec.Template.Annotations["checksum/config"]
	}
	const etcd = "etcd: {" + etcdValue + "}\n"
	for _, c := range []struct {
		a, b string
		same bool
	}{
		{"", "iface: [eth1]", true}, // a setting changes the pods by itself
		{"", dualStack, true},       // the daemons follow the network config
		{etcd, etcd + "network: {Network: 10.0.0.0/8}", false},
		{"", `cni: {conflist: "{}"}`, false},
	} {
		if (sum(c.a) == sum(c.b)) != c.same {
			t.Errorf("%q and %q: the daemons would restart when nothing changed, or not when something did", c.a, c.b)
		}
	}
}

// What is wrong is refused, with its path.
func TestSchema(t *testing.T) {
	for values, path := range map[string]string{
		`etcd: {endpoints: "https://a:2379"}`:                        "endpoints",
		`etcd: {endpoint: ["https://a:2379"]}`:                       "endpoint",
		`network: {network: 10.0.0.0/8}`:                             "network",
		`network: null`:                                              "network",
		`network: {Network: null}`:                                   "Network",
		`network: {Network: 10.244.0.0}`:                             "Network",
		`network: {Network: 10.244.0/16}`:                            "Network",
		`network: {Network: 10.244.0.256/16}`:                        "Network",
		`network: {Network: 10.244.0.0/29}`:                          "Network",
		`network: {Network: 10.244.0.0/33}`:                          "Network",
		`network: {Network: "fd00::/48"}`:                            "Network",
		`network: {SubnetMin: 10.244.1.0/24}`:                        "SubnetMin",
		`network: {EnableIPv4: false}`:                               "EnableIPv6",
		`network: {EnableIPv6: true, IPv6Network: "fd00:::/48"}`:     "IPv6Network",
		`network: {EnableIPv6: true, IPv6Network: "fd00::1::/48"}`:   "IPv6Network",
		`network: {EnableIPv6: true, IPv6Network: "fd00::12345/48"}`: "IPv6Network",
		`network: {EnableIPv6: true, IPv6Network: "fd00::/129"}`:     "IPv6Network",
		`network: {EnableIPv6: true, IPv6Network: 10.0.0.0/8}`:       "IPv6Network",
		`cni: null`:                                      "cni",
		`settings: {log-fromat: json}`:                   "log-fromat",
		`extraEnv: [{name: OVERLAYD_LOG_LEVEL}]`:         "extraEnv",
		`extraEnv: {a: b}`:                               "extraEnv",
		`resources: {limit: {memory: 1Gi}}`:              "limit",
		`podLabels: {app.kubernetes.io/name: a}`:         "app.kubernetes.io/name",
		`imagePullSecrets: [{nam: a}]`:                   "imagePullSecrets",
		`fullnameOverride: Blue`:                         "fullnameOverride",
		`livenessProbe: {period: 1}`:                     "livenessProbe",
		`affinity: {nodeSelector: {}}`:                   "affinity",
		`network: {EnableIPv6: true}`:                    "IPv6Network",
		`network: {Backend: {Type: udp}}`:                "Type",
		`network: {Backend: {VNI: 0}}`:                   "VNI",
		`network: {Backend: {Mtu: 1400}}`:                "Mtu",
		`iface: eth1`:                                    "iface",
		`settings: {etcd-password: secret}`:              "etcd-password",
		`settings: {LOG_FORMAT: json}`:                   "LOG_FORMAT",
		`healthz: {port: 0}`:                             "port",
		`cni: {confName: 10-overlayd.yaml}`:              "confName",
		`cni: {confName: ../10-overlayd.conflist}`:       "confName",
		`maxUnavailable: 0`:                              "maxUnavailable",
		`image: {tag: "a b"}`:                            "tag",
		`nodeSelektor: {a: b}`:                           "nodeSelektor",
		`updateStrategy: {rollingUpdate: {maxSurge: 1}}`: "updateStrategy",
	} {
		_, _, err := tryHelm(values)
		if err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: expected an error with %q, found %v", values, path, err)
		}
	}
}

// helm's own linter finds nothing.
func TestLint(t *testing.T) {
	for _, m := range lint.AllWithKubeVersion(chartDir, map[string]any{}, "overlayd", nil).Messages {
		if m.Severity > support.InfoSev {
			t.Errorf("%s: %v", m.Path, m.Err)
		}
	}
}

// daemon builds overlayd.
func daemon(t *testing.T) string {
	t.Helper()
	overlayd := filepath.Join(t.TempDir(), "overlayd")
	build := exec.Command("go", "build", "-o", overlayd, "./cmd/overlayd")
	build.Dir, build.Env = "../..", append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build overlayd: %v\n%s", err, out)
	}
	return overlayd
}

// The daemon takes all settings and network configs that are rendered. It is given a wrong port as well, so that it
// checks everything, says what is wrong, and does nothing: the port must be all.
func TestDaemonTakesThem(t *testing.T) {
	overlayd := daemon(t)
	help, err := exec.Command(overlayd, "--help").Output()
	if err != nil {
		t.Fatal(err)
	}
	for name, objs := range rendered(t) {
		ds, ok := objs["DaemonSet overlayd"].(*apps.DaemonSet)
		if !ok {
			continue
		}
		t.Run(name, func(t *testing.T) {
			env := map[string]string{}
			config := filepath.Join(t.TempDir(), "net-conf.json")
			for _, obj := range objs {
				if cm, ok := obj.(*core.ConfigMap); ok {
					for k, v := range cm.Data {
						switch {
						case strings.HasPrefix(k, "OVERLAYD_"):
							env[k] = v
						case k == "net-conf.json":
							if err := os.WriteFile(config, []byte(v), 0o644); err != nil {
								t.Fatal(err)
							}
						}
					}
				}
			}
			for _, e := range ds.Spec.Template.Spec.Containers[0].Env {
				env[e.Name] = strings.ReplaceAll(e.Value, "$(POD_NAMESPACE)", "overlayd")
			}
			delete(env, "GOMEMLIMIT")
			for _, name := range []string{"POD_NAMESPACE", "POD_NAME"} { // no settings of the daemon: doctor reads them
				if _, ok := env[name]; !ok {
					t.Errorf("%s is not set", name)
				}
				delete(env, name)
			}
			for name := range env {
				flag := "--" + strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(name, "OVERLAYD_")), "_", "-")
				if !bytes.Contains(help, []byte(flag+" ")) {
					t.Errorf("%s: overlayd has no flag %s", name, flag)
				}
			}
			env["OVERLAYD_NODE_NAME"], env["OVERLAYD_NODE_ID"] = "node", "0123456789abcdef"
			env["OVERLAYD_HEALTHZ_IP"] = "127.0.0.1"
			if _, ok := env["OVERLAYD_ETCD_USERNAME"]; ok {
				env["OVERLAYD_ETCD_USERNAME"] = "user"
			}
			if _, ok := env["OVERLAYD_INIT_CONFIG"]; ok {
				env["OVERLAYD_INIT_CONFIG"] = config
			}
			takes(t, overlayd, env)
			takes(t, overlayd, map[string]string{"OVERLAYD_INIT_CONFIG": config}) // as it reads that of a ConfigMap
		})
	}
}

// takes runs the daemon with a wrong port as well: that must be all that it refuses.
func takes(t *testing.T, overlayd string, env map[string]string) {
	t.Helper()
	cmd := exec.Command(overlayd)
	cmd.Env = []string{}
	for k, v := range env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	cmd.Env = append(cmd.Env, "OVERLAYD_HEALTHZ_PORT=99999")
	var exit *exec.ExitError
	out, err := cmd.CombinedOutput()
	if !errors.As(err, &exit) || exit.ExitCode() != 2 {
		t.Fatalf("%v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if !strings.Contains(line, "99999") {
			t.Errorf("overlayd refuses what is set: %s", line)
		}
	}
}

// The image is one version in all places.
func TestVersion(t *testing.T) {
	images := map[string]bool{}
	for name, objs := range rendered(t) {
		if strings.Contains(name, "everything") || name == "helm uninstall" {
			continue
		}
		for _, obj := range objs {
			if ds, ok := obj.(*apps.DaemonSet); ok {
				for _, c := range append(ds.Spec.Template.Spec.InitContainers, ds.Spec.Template.Spec.Containers...) {
					images[c.Image] = true
				}
			}
		}
	}
	if len(images) != 1 {
		t.Errorf("expected one image, found %v", images)
	}
}
