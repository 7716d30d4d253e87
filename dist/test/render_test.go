package dist_test

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	admission "k8s.io/api/admissionregistration/v1"
	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

const (
	kustomizeDir = "../kubernetes"
	chartDir     = "../helm/overlayd"
)

// kinds are those that we render, with the types of the real API.
var kinds = map[string]func() any{
	"v1 Namespace":                        func() any { return new(core.Namespace) },
	"v1 ServiceAccount":                   func() any { return new(core.ServiceAccount) },
	"v1 ConfigMap":                        func() any { return new(core.ConfigMap) },
	"v1 Pod":                              func() any { return new(core.Pod) },
	"apps/v1 DaemonSet":                   func() any { return new(apps.DaemonSet) },
	"monitoring.coreos.com/v1 PodMonitor": func() any { return new(monitoring.PodMonitor) },
	"rbac.authorization.k8s.io/v1 ClusterRole":        func() any { return new(rbac.ClusterRole) },
	"rbac.authorization.k8s.io/v1 ClusterRoleBinding": func() any { return new(rbac.ClusterRoleBinding) },
	"rbac.authorization.k8s.io/v1 Role":               func() any { return new(rbac.Role) },
	"rbac.authorization.k8s.io/v1 RoleBinding":        func() any { return new(rbac.RoleBinding) },
	"admissionregistration.k8s.io/v1 ValidatingAdmissionPolicy": func() any {
		return new(admission.ValidatingAdmissionPolicy)
	},
	"admissionregistration.k8s.io/v1 ValidatingAdmissionPolicyBinding": func() any {
		return new(admission.ValidatingAdmissionPolicyBinding)
	},
	"monitoring.coreos.com/v1 PrometheusRule": func() any { return new(monitoring.PrometheusRule) },
}

// objects are what was rendered, by kind and name.
type objects map[string]any

// decode takes every document strictly: no unknown field, none twice, every name in the right letter case.
func decode(t *testing.T, documents string) objects {
	t.Helper()
	out := objects{}
	for doc := range strings.SplitSeq("\n"+documents, "\n---") {
		raw, err := yaml.YAMLToJSONStrict([]byte(doc))
		if err != nil {
			t.Fatalf("%v\n%s", err, doc)
		}
		if string(raw) == "null" {
			continue
		}
		var meta struct {
			APIVersion, Kind string
			Metadata         struct{ Name string }
		}
		if err := yaml.Unmarshal(raw, &meta); err != nil {
			t.Fatal(err)
		}
		make, ok := kinds[meta.APIVersion+" "+meta.Kind]
		if !ok {
			t.Fatalf("unexpected object %s %s", meta.APIVersion, meta.Kind)
		}
		obj := make()
		strict, err := kjson.UnmarshalStrict(raw, obj)
		if err != nil || len(strict) > 0 {
			t.Fatalf("%s %s: %v %v", meta.Kind, meta.Metadata.Name, err, strict)
		}
		key := meta.Kind + " " + meta.Metadata.Name
		if _, ok := out[key]; ok {
			t.Errorf("%s is there twice", key)
		}
		out[key] = obj
	}
	return out
}

func get[T any](t *testing.T, o objects, key string) *T {
	t.Helper()
	obj, ok := o[key].(*T)
	if !ok {
		t.Fatalf("there is no %s, only %q", key, slices.Sorted(maps.Keys(o)))
	}
	return obj
}

// kustomize renders a directory. With components it is what somebody would write who refers to both.
func kustomize(t *testing.T, dir string, components ...string) objects {
	t.Helper()
	return kustomizeWith(t, dir, "", components...)
}

// network is a network config beside a kustomization that refers to dist/kubernetes.
const network = `{"Network": "10.0.0.0/8"}`

// kustomizeWith adds a text to the kustomization that an operator writes beside net-conf.json.
func kustomizeWith(t *testing.T, dir, more string, components ...string) objects {
	t.Helper()
	if len(components) > 0 || more != "" {
		own := t.TempDir()
		rel := func(to string) string {
			abs, err := filepath.Abs(to)
			if err != nil {
				t.Fatal(err)
			}
			r, err := filepath.Rel(own, abs)
			if err != nil {
				t.Fatal(err)
			}
			return r
		}
		var parts []string
		for _, c := range components {
			parts = append(parts, rel(filepath.Join(kustomizeDir, "components", c)))
		}
		text := fmt.Sprintf("resources: [%s]\ncomponents: [%s]\n%s", rel(dir), strings.Join(parts, ", "), more)
		for name, content := range map[string]string{"kustomization.yaml": text, "net-conf.json": network} {
			if err := os.WriteFile(filepath.Join(own, name), []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		dir = own
	}
	rendered, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := rendered.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	return decode(t, string(raw))
}

// helm renders the chart with values as they are in a file.
func helm(t *testing.T, values string) (objects, string) {
	t.Helper()
	out, notes, err := tryHelm(values)
	if err != nil {
		t.Fatal(err)
	}
	return decode(t, out), notes
}

func tryHelm(values string) (documents, notes string, err error) {
	return renderHelm(values, engine.Engine{Strict: true}.Render)
}

// renderHelm checks the values against the schema, and renders.
func renderHelm(values string, render func(*chart.Chart, chartutil.Values) (map[string]string, error)) (
	documents, notes string, err error,
) {
	c, err := loader.Load(chartDir)
	if err != nil {
		return "", "", err
	}
	v, err := chartutil.ReadValues([]byte(values))
	if err != nil {
		return "", "", err
	}
	release := chartutil.ReleaseOptions{Name: "overlayd", Namespace: "overlayd", Revision: 1, IsInstall: true}
	all, err := chartutil.ToRenderValues(c, v, release, nil) // checks the values against the schema
	if err != nil {
		return "", "", err
	}
	files, err := render(c, all)
	if err != nil {
		return "", "", err
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if strings.HasSuffix(name, "NOTES.txt") {
			notes = files[name]
			continue
		}
		documents += "\n---\n" + files[name]
	}
	return documents, notes, nil
}

func equal(a, b any) bool { return reflect.DeepEqual(a, b) }
