package dist_test

import (
	"fmt"
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
	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/fake"
	"sigs.k8s.io/yaml"
)

// namespaces is a cluster that has nothing but namespaces.
type namespaces struct{ dynamic.Interface }

func (n namespaces) GetClientFor(_, kind string) (dynamic.NamespaceableResourceInterface, bool, error) {
	if kind != "Namespace" {
		return nil, false, fmt.Errorf("unexpected lookup of %s", kind)
	}
	return n.Resource(core.SchemeGroupVersion.WithResource("namespaces")), false, nil
}

// Helm reports success where the API server refuses every pod, so the notes say what to do, unless the namespace has
// the label.
func TestNotesOnPodSecurity(t *testing.T) {
	const label = "pod-security.kubernetes.io/enforce"
	for level, want := range map[string]string{
		"":           "fewer pods than nodes",
		"restricted": `"restricted", so they don't start`,
		"privileged": "",
	} {
		ns := &core.Namespace{
			TypeMeta:   meta.TypeMeta{APIVersion: "v1", Kind: "Namespace"},
			ObjectMeta: meta.ObjectMeta{Name: "overlayd", Labels: map[string]string{}},
		}
		if level != "" {
			ns.Labels[label] = level
		}
		scheme := runtime.NewScheme()
		if err := core.AddToScheme(scheme); err != nil {
			t.Fatal(err)
		}
		cluster := namespaces{fake.NewSimpleDynamicClient(scheme, ns)}
		_, notes, err := renderHelm("", func(c *chart.Chart, v chartutil.Values) (map[string]string, error) {
			return engine.RenderWithClientProvider(c, v, cluster)
		})
		if err != nil {
			t.Fatal(err)
		}
		command := "kubectl label --overwrite namespace overlayd " + label + "=privileged"
		if warns := strings.Contains(notes, command); warns != (want != "") || !strings.Contains(notes, want) {
			t.Errorf("enforce is %q: expected %q and the command, or neither, found\n%s", level, want, notes)
		}
	}
	if _, notes := helm(t, ""); !strings.Contains(notes, label) { // helm template: there is no cluster to ask
		t.Errorf("nothing on Pod Security in\n%s", notes)
	}
}

// What the chart sets and the user sets too is there once: decode refuses a key that is there twice.
func TestUsersKeys(t *testing.T) {
	objs, _ := helm(t, `
podLabels: {app.kubernetes.io/part-of: platform, team: net}
podAnnotations: {checksum/config: mine, kubectl.kubernetes.io/default-container: install-cni, a: b}
podMonitor: {enabled: true, labels: {app.kubernetes.io/part-of: platform}}
prometheusRule: {enabled: true, labels: {app.kubernetes.io/part-of: platform}}
grafanaDashboard: {enabled: true, labels: {app.kubernetes.io/part-of: platform}}
`)
	pod := get[apps.DaemonSet](t, objs, "DaemonSet overlayd").Spec.Template
	if d := cmp.Diff(map[string]string{
		"app.kubernetes.io/name": "overlayd", "app.kubernetes.io/instance": "overlayd",
		"app.kubernetes.io/part-of": "platform", "team": "net",
	}, pod.Labels); d != "" {
		t.Error(d)
	}
	if a := pod.Annotations; a["a"] != "b" || a["kubectl.kubernetes.io/default-container"] != "install-cni" ||
		len(a["checksum/config"]) != 64 {
		t.Errorf("annotations %v", a)
	}
	for _, key := range []string{"PodMonitor overlayd", "PrometheusRule overlayd", "ConfigMap overlayd-dashboard"} {
		obj, ok := objs[key].(meta.Object)
		if !ok || obj.GetLabels()["app.kubernetes.io/part-of"] != "platform" {
			t.Errorf("%s: %v", key, objs[key])
		}
	}
}

// Every object has the recommended labels; no selector has what may change with an upgrade.
func TestLabels(t *testing.T) {
	for name, objs := range rendered(t) {
		want := []string{"app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/part-of"}
		if strings.HasPrefix(name, "helm") {
			want = append(want, "app.kubernetes.io/version", "app.kubernetes.io/managed-by", "helm.sh/chart")
		}
		for key, obj := range objs {
			labels := obj.(meta.Object).GetLabels()
			for _, label := range want {
				if labels[label] == "" {
					t.Errorf("%s: %s lacks %s", name, key, label)
				}
			}
			ds, ok := obj.(*apps.DaemonSet)
			if !ok {
				continue
			}
			if keys := slices.Collect(maps.Keys(ds.Spec.Selector.MatchLabels)); !slices.Equal(keys, want[:1]) {
				t.Errorf("%s: %s selects by %v", name, key, keys)
			}
			if changing := ds.Spec.Template.Labels["helm.sh/chart"]; changing != "" {
				t.Errorf("%s: %s restarts with every version of the chart", name, key)
			}
		}
	}
	objs, _ := helm(t, "image: {tag: "+strings.Repeat("v", 62)+"-"+strings.Repeat("1", 60)+"}")
	v := get[apps.DaemonSet](t, objs, "DaemonSet overlayd").Labels["app.kubernetes.io/version"]
	if v != strings.Repeat("v", 62) {
		t.Errorf("%q is no label", v)
	}
}

// The names of secrets for the registry may be given in each of the usual forms, here and for all charts.
func TestImagePullSecrets(t *testing.T) {
	for values, want := range map[string][]string{
		"imagePullSecrets: [a, b]":                                                  {"a", "b"},
		"imagePullSecrets: [{name: a}, b]":                                          {"a", "b"},
		"global: {imagePullSecrets: [{name: g}], registry: r}":                      {"g"},
		"global: {imagePullSecrets: [g]}\nimagePullSecrets: [a]":                    {"a", "g"},
		"global: {imagePullSecrets: [a]}\nimagePullSecrets: [{name: a}, {name: b}]": {"a", "b"},
	} {
		for _, uninstall := range []string{"", "\nuninstall: true"} {
			objs, _ := helm(t, values+uninstall)
			for key, spec := range pods(objs) {
				var names []string
				for _, s := range spec.ImagePullSecrets {
					names = append(names, s.Name)
				}
				if !slices.Equal(names, want) {
					t.Errorf("%s%s: %s: expected %v, found %v", values, uninstall, key, want, names)
				}
			}
		}
	}
}

// pods are all that are there or will be made, by the object.
func pods(objs objects) map[string]*core.PodSpec {
	out := map[string]*core.PodSpec{}
	for key, obj := range objs {
		switch o := obj.(type) {
		case *apps.DaemonSet:
			out[key] = &o.Spec.Template.Spec
		case *core.Pod:
			out[key] = &o.Spec
		}
	}
	return out
}

// Any value may be null, which removes the chart's default: then it is refused by name, or has no part in what is
// rendered.
func TestNull(t *testing.T) {
	c, err := loader.Load(chartDir)
	if err != nil {
		t.Fatal(err)
	}
	tried := 0
	var walk func(path []string, values map[string]any)
	walk = func(path []string, values map[string]any) {
		for key, value := range values {
			at := append(slices.Clone(path), key)
			var null any
			for _, k := range slices.Backward(at) {
				null = map[string]any{k: null}
			}
			for _, uninstall := range []bool{false, true} {
				with := map[string]any{"uninstall": uninstall}
				maps.Copy(with, null.(map[string]any))
				raw, err := yaml.Marshal(with)
				if err != nil {
					t.Fatal(err)
				}
				tried++
				documents, _, err := renderHelm(string(raw), engine.Render) // as helm does
				switch {
				case err == nil:
					decode(t, documents)
				case !strings.Contains(err.Error(), "don't meet the specifications of the schema") ||
					!strings.Contains(err.Error(), key):
					t.Errorf("%s: expected an error of the schema with its name, found %v", raw, err)
				}
			}
			if sub, ok := value.(map[string]any); ok {
				walk(at, sub)
			}
		}
	}
	walk(nil, c.Values)
	if tried < 80 {
		t.Errorf("only %d values were tried", tried)
	}
}

// The names of settings are those of the daemon's flags, without those that have a value of their own.
func TestSettingsAreFlags(t *testing.T) {
	help, err := exec.Command(daemon(t), "--help").Output()
	if err != nil {
		t.Fatal(err)
	}
	var flags, settings []string
	elsewhere := []string{
		"help", "version", "store", "kubeconfig", "kube-annotation-prefix", "kube-config-map", "owner", "cni-conf",
		"etcd-endpoints", "etcd-prefix", "etcd-cafile", "etcd-certfile", "etcd-keyfile",
		"etcd-username", "etcd-password", "etcd-password-file", "init-config", "node-name", "node-id", "state-dir",
		"socket", "subnet-file", "sysctl-dir", "wireguard-program", "iface", "healthz-ip", "healthz-port",
	}
	for _, m := range regexp.MustCompile(`(?m)^ +(?:-\w, )?--([a-z0-9-]+)`).FindAllStringSubmatch(string(help), -1) {
		if !slices.Contains(elsewhere, m[1]) {
			flags = append(flags, m[1])
		}
	}
	var schema struct {
		Properties struct {
			Settings struct{ PropertyNames struct{ Enum []string } }
		}
	}
	raw, err := os.ReadFile(filepath.Join(chartDir, "values.schema.json"))
	if err == nil {
		err = yaml.Unmarshal(raw, &schema)
	}
	if err != nil {
		t.Fatal(err)
	}
	settings = schema.Properties.Settings.PropertyNames.Enum
	slices.Sort(flags)
	if d := cmp.Diff(flags, settings); d != "" {
		t.Errorf("overlayd --help - + values.schema.json:\n%s", d)
	}
}

// Two releases, each for some of the nodes, have nothing in common.
func TestNames(t *testing.T) {
	const more = `, podMonitor: {enabled: true}, prometheusRule: {enabled: true}, grafanaDashboard: {enabled: true}`
	for values, want := range map[string]struct{ name, selector string }{
		"nameOverride: blue":                          {"blue", "blue"},
		"fullnameOverride: blue":                      {"blue", "overlayd"},
		"fullnameOverride: green, nameOverride: blue": {"green", "blue"},
	} {
		objs, notes := helm(t, "{"+values+more+"}")
		for key := range objs {
			if _, name, _ := strings.Cut(key, " "); name != want.name && !strings.HasPrefix(name, want.name+"-") {
				t.Errorf("%s: there is a %s", values, key)
			}
		}
		ds := get[apps.DaemonSet](t, objs, "DaemonSet "+want.name)
		m := get[monitoring.PodMonitor](t, objs, "PodMonitor "+want.name)
		for _, labels := range []map[string]string{
			ds.Spec.Selector.MatchLabels, m.Spec.Selector.MatchLabels, ds.Spec.Template.Labels,
		} {
			if labels["app.kubernetes.io/name"] != want.selector {
				t.Errorf("%s: labels %v", values, labels)
			}
		}
		if ds.Spec.Template.Spec.ServiceAccountName != want.name || !strings.Contains(notes, "daemonset/"+want.name+" ") {
			t.Errorf("%s: account %s, notes\n%s", values, ds.Spec.Template.Spec.ServiceAccountName, notes)
		}
		objs, _ = helm(t, "{uninstall: true, "+values+"}")
		ds = get[apps.DaemonSet](t, objs, "DaemonSet "+want.name+"-uninstall")
		if got := ds.Spec.Selector.MatchLabels["app.kubernetes.io/name"]; got != want.selector+"-uninstall" {
			t.Errorf("%s: the uninstallation selects %s", values, got)
		}
	}
}

// The plugins are installed without the configuration: overlay-install writes it into a directory of the pod's.
func TestSkipCNIConfig(t *testing.T) {
	for _, uninstall := range []bool{false, true} {
		objs, _ := helm(t, fmt.Sprintf("{skipCNIConfigInstallation: true, uninstall: %v}", uninstall))
		for key, spec := range pods(objs) {
			for _, c := range spec.Containers {
				if slices.ContainsFunc(c.Env, func(e core.EnvVar) bool { return e.Name == "OVERLAYD_CNI_CONF" }) {
					t.Errorf("%s: %s expects a configuration that is not installed", key, c.Name)
				}
			}
			volumes := map[string]core.Volume{}
			for _, v := range spec.Volumes {
				volumes[v.Name] = v
				if v.HostPath != nil && v.HostPath.Path == "/etc/cni/net.d" {
					t.Errorf("%s: %s could write the node's configurations", key, v.Name)
				}
			}
			if key != "Pod overlayd-test" && (volumes["cni-conf"].EmptyDir == nil || volumes["cni-bin"].HostPath == nil) {
				t.Errorf("%s: %v", key, volumes)
			}
		}
	}
}

// `helm test` runs a pod on the pod network, which asks the daemon on its node.
func TestHelmTest(t *testing.T) {
	objs, _ := helm(t, everything)
	pod := get[core.Pod](t, objs, "Pod overlayd-test")
	if pod.Annotations["helm.sh/hook"] != "test" || pod.Spec.HostNetwork ||
		pod.Spec.RestartPolicy != core.RestartPolicyNever {
		t.Errorf("%+v", pod)
	}
	c := pod.Spec.Containers[0]
	if c.SecurityContext.Capabilities.Add != nil || !*c.SecurityContext.ReadOnlyRootFilesystem ||
		!slices.Equal(c.Command, []string{"/usr/local/bin/overlayd", "status"}) ||
		!equal(c.Resources, get[apps.DaemonSet](t, objs, "DaemonSet overlayd").Spec.Template.Spec.Containers[0].Resources) {
		t.Errorf("%+v", c)
	}
	objs, _ = helm(t, "uninstall: true")
	if _, ok := objs["Pod overlayd-test"]; ok {
		t.Error("there is nothing to test when overlayd is removed")
	}
}

// Alerts and dashboard are the files of the chart, with nothing of them taken for a template.
func TestMonitoring(t *testing.T) {
	objs, _ := helm(t, everything)
	rules := get[monitoring.PrometheusRule](t, objs, "PrometheusRule overlayd")
	raw, err := os.ReadFile("../helm/overlayd/files/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var want monitoring.PrometheusRuleSpec
	if err := yaml.UnmarshalStrict(raw, &want); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, rules.Spec); d != "" || len(want.Groups) == 0 {
		t.Errorf("file - + chart:\n%s", d)
	}
	dashboard := get[core.ConfigMap](t, objs, "ConfigMap overlayd-dashboard")
	if raw, err = os.ReadFile("../helm/overlayd/files/dashboard.json"); err != nil {
		t.Fatal(err)
	}
	if compact(t, dashboard.Data["overlayd.json"]) != compact(t, string(raw)) {
		t.Error("the dashboard is not that of the file")
	}
	if rules.Labels["release"] != "prometheus" || dashboard.Labels["grafana_dashboard"] != "1" ||
		dashboard.Annotations["grafana_folder"] != "Network" {
		t.Errorf("labels %v, %v, annotations %v", rules.Labels, dashboard.Labels, dashboard.Annotations)
	}
}

// What Artifact Hub shows is true.
func TestArtifactHub(t *testing.T) {
	c, err := loader.Load(chartDir)
	if err != nil {
		t.Fatal(err)
	}
	a := c.Metadata.Annotations
	var images []struct {
		Name, Image string
		Platforms   []string
	}
	if err := yaml.UnmarshalStrict([]byte(a["artifacthub.io/images"]), &images); err != nil {
		t.Fatal(err)
	}
	objs, _ := helm(t, "")
	image := get[apps.DaemonSet](t, objs, "DaemonSet overlayd").Spec.Template.Spec.Containers[0].Image
	if len(images) != 1 || images[0].Image != image {
		t.Errorf("images %v, but the daemon's is %s", images, image)
	}
	var links []struct{ Name, URL string }
	if err := yaml.UnmarshalStrict([]byte(a["artifacthub.io/links"]), &links); err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		file, ok := strings.CutPrefix(l.URL, c.Metadata.Home+"/blob/main/")
		if _, err := os.Stat("../../" + file); !ok || err != nil {
			t.Errorf("link %v: %v", l, err)
		}
	}
	license, err := os.ReadFile("../../LICENSE")
	if err != nil {
		t.Fatal(err)
	}
	if a["artifacthub.io/category"] != "networking" || a["artifacthub.io/license"] != "Apache-2.0" ||
		!strings.Contains(string(license), "Apache License") {
		t.Errorf("annotations %v", a)
	}
}
