package dist_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/admission"
	plugincel "k8s.io/apiserver/pkg/admission/plugin/cel"
	"k8s.io/apiserver/pkg/admission/plugin/policy/validating"
	"k8s.io/apiserver/pkg/admission/plugin/webhook/matchconditions"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/cel/environment"
)

// The objects of the Kubernetes store refer to each other by the names that they have, whatever these are.
func TestStoreReferences(t *testing.T) {
	named, _ := helm(t, "fullnameOverride: pods")
	plain, _ := helm(t, "")
	for name, objs := range map[string]objects{"kustomize": kustomize(t, kustomizeDir), "pods": named, "helm": plain} {
		if name != "pods" {
			name = "overlayd"
		}
		get[rbac.ClusterRole](t, objs, "ClusterRole "+name)
		subject := []rbac.Subject{{Kind: "ServiceAccount", Name: name, Namespace: "overlayd"}}
		all := get[rbac.ClusterRoleBinding](t, objs, "ClusterRoleBinding "+name)
		if !equal(all.Subjects, subject) || all.RoleRef.Name != name || all.RoleRef.Kind != "ClusterRole" {
			t.Errorf("%s: %+v", name, all)
		}
		own := get[rbac.RoleBinding](t, objs, "RoleBinding "+name)
		if !equal(own.Subjects, subject) || own.RoleRef.Name != name || own.RoleRef.Kind != "Role" ||
			own.Namespace != "overlayd" {
			t.Errorf("%s: %+v", name, own)
		}
		role := get[rbac.Role](t, objs, "Role "+name)
		config := role.Rules[0].ResourceNames[0]
		get[core.ConfigMap](t, objs, "ConfigMap "+config)
		if role.Namespace != "overlayd" {
			t.Errorf("%s: the role is in %s", name, role.Namespace)
		}
		spec := get[apps.DaemonSet](t, objs, "DaemonSet "+name).Spec.Template.Spec
		get[core.ServiceAccount](t, objs, "ServiceAccount "+spec.ServiceAccountName)
		if !slices.Contains(spec.Containers[0].Env,
			core.EnvVar{Name: "OVERLAYD_KUBE_CONFIG_MAP", Value: "$(POD_NAMESPACE)/" + config}) {
			t.Errorf("%s: the network config is not in %s", name, config)
		}
		binding := get[admissionv1.ValidatingAdmissionPolicyBinding](t, objs, "ValidatingAdmissionPolicyBinding "+name)
		get[admissionv1.ValidatingAdmissionPolicy](t, objs, "ValidatingAdmissionPolicy "+binding.Spec.PolicyName)
		if !equal(binding.Spec.ValidationActions, []admissionv1.ValidationAction{admissionv1.Deny}) {
			t.Errorf("%s: %v", name, binding.Spec.ValidationActions)
		}
	}
}

// The rights are those that the store needs, and none for what is kept in etcd.
func TestRights(t *testing.T) {
	for name, objs := range rendered(t) {
		rules := map[string][]string{}
		for key, obj := range objs {
			switch o := obj.(type) {
			case *rbac.ClusterRole:
				for _, r := range o.Rules {
					rules[strings.Join(r.Resources, ",")] = r.Verbs
				}
			case *rbac.Role:
				for _, r := range o.Rules {
					rules[fmt.Sprint(r.Resources, r.ResourceNames)] = r.Verbs
				}
			case *rbac.ClusterRoleBinding, *rbac.RoleBinding, *admissionv1.ValidatingAdmissionPolicy,
				*admissionv1.ValidatingAdmissionPolicyBinding:
				rules[key] = nil
			}
		}
		etcd := strings.Contains(name, "components") || strings.Contains(name, "everything") ||
			strings.Contains(name, "TLS") || strings.Contains(name, "uninstall")
		want := map[string][]string{
			"nodes": {"get", "list", "watch", "patch"}, "nodes/status": {"patch"},
			"[configmaps] [overlayd-network]": {"get", "list", "watch"},
			"ClusterRoleBinding overlayd":     nil, "RoleBinding overlayd": nil,
			"ValidatingAdmissionPolicy overlayd": nil, "ValidatingAdmissionPolicyBinding overlayd": nil,
		}
		if etcd {
			want = map[string][]string{}
		}
		if !equal(rules, want) {
			t.Errorf("%s: %v", name, rules)
		}
	}
}

// costLimit is that of the API server, for all expressions of a policy together.
const costLimit = 10_000_000

const daemonUser = "system:serviceaccount:overlayd:overlayd"

// change is a change of the Node n1, by whom, and what the policy must say of it; nothing: it is allowed.
type change struct {
	name   string
	by     user.Info
	change func(*core.Node)
	denied string
}

func by(name string, extra map[string][]string) user.Info {
	return &user.DefaultInfo{Name: name, Extra: extra}
}

func changes() []change {
	own := by(daemonUser, map[string][]string{"authentication.kubernetes.io/node-name": {"n1"}})
	annotate := func(key string) func(*core.Node) {
		return func(n *core.Node) { n.Annotations[key] = "x" }
	}
	status := "only the condition NetworkUnavailable"
	return []change{
		{"own annotation", own, annotate("overlayd.io/backend-data"), ""},
		{"flannel's annotation", own, annotate("flannel.alpha.coreos.com/public-ip"), ""},
		{"own annotation removed", own, func(n *core.Node) { delete(n.Annotations, "overlayd.io/public-ip") }, ""},
		{"managed fields", own, func(n *core.Node) {
			n.ManagedFields, n.ResourceVersion = []meta.ManagedFieldsEntry{{Manager: "overlayd"}}, "2"
		}, ""},
		{"condition", own, func(n *core.Node) {
			n.Status.Conditions = append(n.Status.Conditions, core.NodeCondition{Type: "NetworkUnavailable", Status: "False"})
		}, ""},
		{"condition changed", own, func(n *core.Node) { n.Status.Conditions[0].Status = "False" }, ""},
		{"condition removed", own, func(n *core.Node) {
			n.Status.Conditions = slices.Delete(n.Status.Conditions, 0, 1)
		}, ""},
		{"another annotation", own, annotate("example.com/a"), "begin with overlayd.io/ or flannel.alpha.coreos.com/"},
		{"a prefix without its slash", own, annotate("overlayd.iox/a"), "begin with"},
		{"another annotation changed", own, annotate("node.alpha.kubernetes.io/ttl"), "begin with"},
		{"another annotation removed", own, func(n *core.Node) {
			delete(n.Annotations, "node.alpha.kubernetes.io/ttl")
		}, "begin with"},
		{"all annotations removed", own, func(n *core.Node) { n.Annotations = nil }, "begin with"},
		{"label", own, func(n *core.Node) { n.Labels["node-role.kubernetes.io/control-plane"] = "" }, "only annotations"},
		{"all labels removed", own, func(n *core.Node) { n.Labels = nil }, "only annotations"},
		{"finalizer", own, func(n *core.Node) { n.Finalizers = []string{"a/b"} }, "only annotations"},
		{"owner", own, func(n *core.Node) { n.OwnerReferences = []meta.OwnerReference{{Name: "a"}} }, "only annotations"},
		{"taint", own, func(n *core.Node) { n.Spec.Taints = nil }, "only annotations"},
		{"unschedulable", own, func(n *core.Node) { n.Spec.Unschedulable = true }, "only annotations"},
		{"podCIDRs", own, func(n *core.Node) { n.Spec.PodCIDRs = []string{"10.9.0.0/24"} }, "only annotations"},
		{"another condition", own, func(n *core.Node) { n.Status.Conditions[1].Status = "False" }, status},
		{"another condition removed", own, func(n *core.Node) { n.Status.Conditions = n.Status.Conditions[:1] }, status},
		{"all conditions removed", own, func(n *core.Node) { n.Status.Conditions = nil }, status},
		{"addresses", own, func(n *core.Node) { n.Status.Addresses[0].Address = "192.0.2.9" }, status},
		{"addresses removed", own, func(n *core.Node) { n.Status.Addresses = nil }, status},
		{"capacity", own, func(n *core.Node) {
			n.Status.Capacity = core.ResourceList{"cpu": resource.MustParse("64")}
		}, status},
		{
			"another node", by(daemonUser, map[string][]string{"authentication.kubernetes.io/node-name": {"n2"}}),
			annotate("overlayd.io/public-ip"), `on the node "n2" may not change the Node n1`,
		},
		{
			"two nodes", by(daemonUser, map[string][]string{"authentication.kubernetes.io/node-name": {"n2", "n1"}}),
			annotate("overlayd.io/public-ip"), `may not change the Node n1`,
		},
		{
			"a token of no pod", by(daemonUser, map[string][]string{"a": {"n1"}}),
			annotate("overlayd.io/public-ip"), "may not change",
		},
		{"a user without anything", by(daemonUser, nil), annotate("overlayd.io/public-ip"), "may not change"},
		{"another account", by("system:serviceaccount:overlayd:default", nil), annotate("a/b"), ""},
		{"the kubelet", by("system:node:n1", nil), func(n *core.Node) { n.Status.Addresses = nil }, ""},
	}
}

// node is a Node as the kubelet and its controllers leave it, with as many images as it reports.
func node() *core.Node {
	n := &core.Node{
		ObjectMeta: meta.ObjectMeta{
			Name: "n1", UID: "1", ResourceVersion: "1", Labels: map[string]string{"kubernetes.io/hostname": "n1"},
			Annotations: map[string]string{"node.alpha.kubernetes.io/ttl": "0", "overlayd.io/public-ip": "192.0.2.1"},
		},
		Spec: core.NodeSpec{
			PodCIDR: "10.244.1.0/24", PodCIDRs: []string{"10.244.1.0/24"}, Taints: []core.Taint{{Key: "a", Effect: "NoExecute"}},
		},
		Status: core.NodeStatus{
			Conditions: []core.NodeCondition{{Type: "NetworkUnavailable", Status: "True"}, {Type: "Ready", Status: "True"}},
			Addresses:  []core.NodeAddress{{Type: "InternalIP", Address: "192.0.2.1"}},
			Capacity:   core.ResourceList{"cpu": resource.MustParse("2"), "memory": resource.MustParse("8Gi")},
		},
	}
	for i := range 50 {
		n.Status.Images = append(n.Status.Images, core.ContainerImage{
			Names:     []string{fmt.Sprintf("registry.example.net/image-%d@sha256:%064d", i, i)},
			SizeBytes: int64(i),
		})
	}
	return n
}

// A daemon changes its own Node only, and of that only what is overlayd's. The expressions are compiled and evaluated
// by the API server's own code.
func TestPolicy(t *testing.T) {
	for name, objs := range map[string]objects{"kustomize": kustomize(t, kustomizeDir), "helm": rendered(t)["helm"]} {
		policy := get[admissionv1.ValidatingAdmissionPolicy](t, objs, "ValidatingAdmissionPolicy overlayd")
		v := compile(t, policy)
		for _, c := range changes() {
			for _, typed := range []bool{false, true} {
				if got := evaluate(t, v, c, typed); (got != "") != (c.denied != "") || !strings.Contains(got, c.denied) {
					t.Errorf("%s: %s: expected %q, found %q", name, c.name, c.denied, got)
				}
			}
		}
	}
	objs, _ := helm(t, onKubernetes)
	v := compile(t, get[admissionv1.ValidatingAdmissionPolicy](t, objs, "ValidatingAdmissionPolicy overlayd"))
	own := by(daemonUser, map[string][]string{"authentication.kubernetes.io/node-name": {"n1"}})
	for key, denied := range map[string]bool{
		"net.example.com/a": false, "overlayd.io/a": false, "example.com/a": true, // those of before are removed
	} {
		c := change{key, own, func(n *core.Node) { n.Annotations[key] = "x" }, ""}
		if got := evaluate(t, v, c, false); (got != "") != denied {
			t.Errorf("with a prefix of its own, %s: %q", key, got)
		}
	}
}

func compile(t *testing.T, policy *admissionv1.ValidatingAdmissionPolicy) validating.Validator {
	t.Helper()
	c, err := plugincel.NewCompositedCompiler(environment.MustBaseEnvSet(environment.DefaultCompatibilityVersion()))
	if err != nil {
		t.Fatal(err)
	}
	options := plugincel.OptionalVariableDeclarations{HasAuthorizer: true}
	var variables []plugincel.NamedExpressionAccessor
	for _, v := range policy.Spec.Variables {
		variables = append(variables, &validating.Variable{Name: v.Name, Expression: v.Expression})
	}
	c.CompileAndStoreVariables(variables, options, environment.StoredExpressions)
	var conditions, validations, messages []plugincel.ExpressionAccessor
	for _, m := range policy.Spec.MatchConditions {
		conditions = append(conditions, (*matchconditions.MatchCondition)(&m))
	}
	for _, v := range policy.Spec.Validations {
		validations = append(validations, &validating.ValidationCondition{Expression: v.Expression, Message: v.Message})
		var message plugincel.ExpressionAccessor
		if v.MessageExpression != "" {
			message = &validating.MessageExpressionCondition{MessageExpression: v.MessageExpression}
		}
		messages = append(messages, message)
	}
	expressions := func(a []plugincel.ExpressionAccessor) plugincel.ConditionEvaluator {
		return c.CompileCondition(a, options, environment.StoredExpressions)
	}
	matcher := matchconditions.NewMatcher(expressions(conditions),
		policy.Spec.FailurePolicy, "policy", "validate", policy.Name)
	return validating.NewValidator(expressions(validations), matcher, expressions(nil), expressions(messages),
		policy.Spec.FailurePolicy, nil)
}

// evaluate returns what the API server would answer; nothing: it would make the change. Typed is how later versions
// show objects to the expressions.
func evaluate(t *testing.T, v validating.Validator, c change, typed bool) string {
	t.Helper()
	before, after := node(), node()
	c.change(after)
	gvk, gvr := core.SchemeGroupVersion.WithKind("Node"), core.SchemeGroupVersion.WithResource("nodes")
	attributes := &admission.VersionedAttributes{
		Attributes: admission.NewAttributesRecord(after, before, gvk, "", "n1", gvr, "", admission.Update,
			&meta.UpdateOptions{}, false, c.by),
		VersionedKind: gvk, VersionedObject: admission.NewLazyObject(after),
		VersionedOldObject: admission.NewLazyObject(before),
	}
	for _, o := range []*admission.LazyObject{&attributes.VersionedObject, &attributes.VersionedOldObject} {
		o.UseSchemalessTypeRef = typed //nolint:staticcheck // deprecated since it becomes the default
	}
	result := v.Validate(t.Context(), gvr, attributes, nil, nil, costLimit, nil)
	var out []string
	for _, d := range result.Decisions {
		if d.Action != validating.ActionAdmit {
			out = append(out, d.Message)
		}
	}
	return strings.Join(out, "; ")
}
