package kube

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/test/apiserver"
)

const (
	patience = time.Minute
	bindings = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"
)

// It takes seconds to start a server, so all share one. Each leaves it without Nodes.
func TestOnServer(t *testing.T) {
	s := apiserver.New(t)
	for name, test := range map[string]func(*testing.T, *cluster){
		"from nothing to a peer":    fromNothingToAPeer,
		"writes and heartbeats":     writesAndHeartbeats,
		"dual stack":                dualStack,
		"flannel":                   flannel,
		"settings of a node":        settingsOfANode,
		"forbidden":                 forbidden,
		"two machines for one node": twoMachinesForOneNode,
		"a copy of a machine":       copyOfAMachine,
		"one address twice":         oneAddressTwice,
		"a token that is rotated":   rotatedToken,
		"an expired watch":          expiredWatch,
		"a half-open connection":    halfOpenConnection,
		"a server that is stuck":    stuckServer,
		"a server away":             serverAway,
		"a server restored":         serverRestored,
		"a list":                    list,
	} {
		t.Run(name, func(t *testing.T) { test(t, newCluster(t, s)) })
	}
}

// cluster is a real API server, with an administrator's client.
type cluster struct {
	*apiserver.Server
	t     *testing.T
	admin connection
}

func newCluster(t *testing.T, s *apiserver.Server) *cluster {
	t.Helper()
	s.Start() // a test that failed may have left it stopped
	c := &cluster{Server: s, t: t}
	var err error
	o := DefaultOptions()
	o.Kubeconfig = c.Kubeconfig(apiserver.Admin)
	if c.admin, err = o.connect(noCount, func(int64) {}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.clear)
	return c
}

// clear removes what the test has left.
func (c *cluster) clear() {
	for _, r := range []*rest.Request{
		c.admin.client.Delete().Resource("nodes"),
		c.admin.client.Delete().Namespace("kube-system").Resource("configmaps").Name("overlayd"),
		c.admin.client.Delete().AbsPath(bindings, "node"),
	} {
		if err := r.Do(context.Background()).Error(); err != nil && !apierrors.IsNotFound(err) {
			c.t.Error(err)
		}
	}
	c.permitted(context.Background(), false, "")
}

// permitted waits until the API server lets the user of the daemon patch Nodes, or does not: it learns of a changed role
// after the change was answered.
func (c *cluster) permitted(ctx context.Context, allowed bool, subresource string) {
	c.t.Helper()
	review := fmt.Appendf(nil, `{"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec":
		{"user": "node", "resourceAttributes": {"verb": "patch", "resource": "nodes", "subresource": %q}}}`, subresource)
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		answer := &authorizationv1.SubjectAccessReview{}
		err := c.admin.client.Post().AbsPath("/apis/authorization.k8s.io/v1/subjectaccessreviews").
			SetHeader("Content-Type", "application/json").Body(review).Do(ctx).Into(answer)
		if err != nil {
			c.t.Fatal(err)
		}
		if answer.Status.Allowed == allowed {
			return
		}
	}
	c.t.Fatalf("the user of the daemon may patch nodes/%s: still not %t", subresource, allowed)
}

func (c *cluster) ctx() context.Context { return c.t.Context() }

// do fails the test if the administrator's request fails.
func (c *cluster) do(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) create(resource, namespace string, o runtime.Object) {
	c.t.Helper()
	r := c.admin.client.Post().NamespaceIfScoped(namespace, namespace != "").Resource(resource)
	c.do(r.Body(o).Do(c.ctx()).Error())
}

func (c *cluster) remove(resource, namespace, name string) {
	c.t.Helper()
	r := c.admin.client.Delete().NamespaceIfScoped(namespace, namespace != "").Resource(resource)
	c.do(r.Name(name).Do(c.ctx()).Error())
}

func (c *cluster) patch(name, subresource, body string) {
	c.t.Helper()
	r := c.admin.client.Patch(types.StrategicMergePatchType).Resource("nodes").Name(name).SubResource(subresource)
	c.do(r.Param("fieldManager", "kubectl").Body([]byte(body)).Do(c.ctx()).Error())
}

func (c *cluster) addNode(name string, podCIDRs ...string) {
	c.t.Helper()
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDRs: podCIDRs}}
	if len(podCIDRs) > 0 {
		n.Spec.PodCIDR = podCIDRs[0]
	}
	c.create("nodes", "", n)
}

func (c *cluster) node(name string) *corev1.Node {
	c.t.Helper()
	n := &corev1.Node{}
	c.do(c.admin.client.Get().Resource("nodes").Name(name).Do(c.ctx()).Into(n))
	return n
}

func (c *cluster) setNetwork(config string) {
	c.t.Helper()
	m := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "overlayd", Namespace: "kube-system"}, Data: map[string]string{configKey: config},
	}
	r := c.admin.client.Put().Namespace("kube-system").Resource("configmaps").Name("overlayd").Body(m)
	if r.Do(c.ctx()).Error() != nil {
		c.create("configmaps", "kube-system", m)
	}
}

// allow gives the user of the daemon what the manifests give it.
func (c *cluster) allow(allowed bool) {
	c.t.Helper()
	ctx, path := c.ctx(), bindings
	defer c.permitted(ctx, allowed, "")
	if !allowed {
		c.do(c.admin.client.Delete().AbsPath(path, "node").Do(ctx).Error())
		return
	}
	body := func(kind, more string) []byte {
		return fmt.Appendf(nil, `{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": %q,
			"metadata": {"name": "node"}, %s}`, kind, more)
	}
	post := func(path string, b []byte) error {
		return c.admin.client.Post().AbsPath(path).SetHeader("Content-Type", "application/json").Body(b).Do(ctx).Error()
	}
	role := post("/apis/rbac.authorization.k8s.io/v1/clusterroles", body("ClusterRole", `"rules": [
		{"apiGroups": [""], "resources": ["nodes"], "verbs": ["list", "watch", "patch"]},
		{"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]},
		{"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["overlayd"], "verbs": ["get", "list", "watch"]}]`))
	if role != nil && !strings.Contains(role.Error(), "already exists") {
		c.t.Fatal(role)
	}
	c.do(post(path, body("ClusterRoleBinding", `"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
		"name": "node"}, "subjects": [{"kind": "User", "name": "node"}]`)))
}

func noCount(*http.Request) {}

// member is a running Manager.
type member struct {
	*Manager
	t    *testing.T
	last subnet.Snapshot
	stop func()
}

func (c *cluster) start(name string, more ...func(*Options)) *member {
	c.t.Helper()
	m := c.new(name, more...)
	m.run()
	return m
}

func (c *cluster) new(name string, more ...func(*Options)) *member {
	c.t.Helper()
	o := DefaultOptions()
	o.Kubeconfig, o.Node = c.Kubeconfig(apiserver.Node), name
	for _, f := range more {
		f(&o)
	}
	m, err := New(o, zap.NewNop())
	if err != nil {
		c.t.Fatal(err)
	}
	return &member{Manager: m, t: c.t}
}

func (m *member) run() {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = m.Run(ctx)
	}()
	m.stop = func() { cancel(); <-ended }
	m.t.Cleanup(m.stop)
}

// await waits for a snapshot.
func (m *member) await(what string, fits func(subnet.Snapshot) bool) subnet.Snapshot {
	m.t.Helper()
	for timeout := time.After(patience); !fits(m.last); {
		select {
		case m.last = <-m.Updates():
		case <-timeout:
			m.t.Fatalf("no snapshot with %s; the last one is %+v", what, m.last)
		}
	}
	return m.last
}

func (m *member) awaitError(text string) {
	m.t.Helper()
	m.await(text, func(s subnet.Snapshot) bool {
		return s.ClaimErr != nil && strings.Contains(s.ClaimErr.Error(), text)
	})
}

// quiet fails the test if there is a snapshot within a time.
func (m *member) quiet(d time.Duration) {
	m.t.Helper()
	select {
	case s := <-m.Updates():
		m.t.Errorf("there is a snapshot: %+v", s)
	case <-time.After(d):
	}
}

func peer(name, subnets string) func(subnet.Snapshot) bool {
	return func(s subnet.Snapshot) bool {
		e := s.Table.Find(subnets)
		return e != nil && e.NodeName == name && e.PublicIP.V4.IsValid()
	}
}

// What is missing is named until it is there. Then two nodes know each other, as long as both are there.
func fromNothingToAPeer(t *testing.T, c *cluster) {
	c.allow(true)
	a, b := c.start("node-a"), c.start("node-b")
	a.Claim(claimOf("node-a", 1))
	b.Claim(claimOf("node-b", 2))
	a.awaitError("there is no Node node-a")
	c.addNode("node-a")
	a.awaitError("the Node node-a has no podCIDRs yet")
	c.patch("node-a", "", `{"spec": {"podCIDR": "10.244.0.0/24", "podCIDRs": ["10.244.0.0/24"]}}`)
	a.awaitError("the ConfigMap kube-system/overlayd does not exist")
	c.setNetwork(`{"Network": "10.9.0.0/16"}`)
	a.awaitError("outside the network 10.9.0.0/16 of the ConfigMap kube-system/overlayd")
	c.setNetwork(`{"Network": "nonsense"}`)
	a.awaitError("Network: expected")
	c.setNetwork(network)
	s := a.await("a lease", held)
	want := netip.MustParsePrefix("10.244.0.0/24")
	if s.Lease.Subnets.V4 != want || !s.Table.Config.Fits(s.Lease.Subnets) {
		t.Errorf("the lease is of %v", s.Lease.Subnets)
	}
	c.addNode("node-b", "10.244.1.0/25") // another length
	b.await("a lease", held)
	b.await("node-a", peer("node-a", "10.244.0.0-24"))
	s = a.await("node-b", peer("node-b", "10.244.1.0-25"))
	if e := s.Table.Find("10.244.1.0-25"); e.Attrs != claimOf("node-b", 2).Attrs {
		t.Errorf("node-b announces %+v", e.Attrs)
	}
	c.patch("node-b", "status", `{"status": {"conditions": [{"type": "Ready", "status": "False", "reason": "Off"}]}}`)
	a.quiet(time.Second) // a node that is not ready is a peer
	c.remove("nodes", "", "node-b")
	a.await("no node-b", func(s subnet.Snapshot) bool { return s.Table.Find("10.244.1.0-25") == nil })
	b.await("the loss of its lease", func(s subnet.Snapshot) bool { return !s.Held() && s.Losses == 1 })
	c.addNode("node-b", "10.244.3.0/24")
	if s := b.await("a lease again", held); s.Lease.Subnets.V4 != netip.MustParsePrefix("10.244.3.0/24") {
		t.Errorf("the lease is of %v", s.Lease.Subnets)
	}
}

// A heartbeat of a kubelet changes nothing, and the Node is written only where it says something else.
func writesAndHeartbeats(t *testing.T, c *cluster) {
	c.allow(true)
	c.setNetwork(network)
	c.addNode("node-a", "10.244.0.0/24")
	c.patch("node-a", "", `{"metadata": {"annotations": {"other": "x", "overlayd.io/backend-data": "y"}}}`)
	a := c.start("node-a")
	a.Claim(claimOf("node-a", 1))
	a.await("a lease", held)
	a.SetReady(false, "starting")
	c.condition("node-a", corev1.ConditionTrue, "OverlaydIsNotReady")
	a.SetReady(true, "pods have a network")
	c.condition("node-a", corev1.ConditionFalse, "OverlaydIsReady")
	n := c.node("node-a")
	const data = `{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}`
	if n.Annotations["other"] != "x" || n.Annotations["overlayd.io/backend-data"] != data {
		t.Errorf("the annotations are %q", n.Annotations)
	}
	patches := a.Requests()["patch"]
	for i := range 5 {
		c.patch("node-a", "status", fmt.Sprintf(`{"status": {"conditions": [{"type": "Ready", "status": "True",
			"lastHeartbeatTime": "2026-01-01T00:0%d:00Z"}]}}`, i))
	}
	a.Claim(claimOf("node-a", 1))
	a.SetReady(true, "pods have a network")
	time.Sleep(2 * writeAgain)
	if now := a.Requests()["patch"]; now != patches {
		t.Errorf("%d writes of what the Node says already", now-patches)
	}
	c.patch("node-a", "", `{"metadata": {"annotations": {"overlayd.io/public-ip": "192.0.2.99"}}}`)
	a.await("the foreign change", func(s subnet.Snapshot) bool { return !held(s) })
	a.await("its end", held)
	a.stop()
	again := c.start("node-a")
	again.Claim(claimOf("node-a", 1))
	again.await("a lease", held)
	if n := again.Requests()["patch"]; n != 0 {
		t.Errorf("a restart writes %d times", n)
	}
	moved := claimOf("node-a", 1)
	moved.PublicIP.V4 = netip.MustParseAddr("192.0.2.7")
	again.Claim(moved)
	again.await("another address", func(s subnet.Snapshot) bool { return held(s) && s.Lease.PublicIP == moved.PublicIP })
}

func (c *cluster) condition(name string, status corev1.ConditionStatus, reason string) {
	c.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		got := networkUnavailable(c.node(name))
		if got != nil && got.Status == status && got.Reason == reason {
			return
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("NetworkUnavailable is %+v, want %s, %s", got, status, reason)
		}
	}
}

// Nodes of flannel are peers, and with its prefix this node is one of theirs.
func flannel(t *testing.T, c *cluster) {
	c.allow(true)
	c.setNetwork(network)
	c.addNode("node-a", "10.244.0.0/24")
	c.addNode("node-f", "10.244.5.0/24")
	c.patch("node-f", "", `{"metadata": {"annotations": {"flannel.alpha.coreos.com/kube-subnet-manager": "true",
		"flannel.alpha.coreos.com/backend-type": "vxlan", "flannel.alpha.coreos.com/public-ip": "192.0.2.5",
		"flannel.alpha.coreos.com/backend-data": "{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:00:05\"}"}}}`)
	a := c.start("node-a", func(o *Options) { o.AnnotationPrefix = flannelPrefix })
	a.Claim(claimOf("node-a", 1))
	a.await("a lease", held)
	s := a.await("flannel's node", peer("node-f", "10.244.5.0-24"))
	e := s.Table.Find("10.244.5.0-24")
	if e.Err != nil || e.VTEP.V4.MAC != (addr.MAC{2, 0, 0, 0, 0, 5}) || e.PublicIPLocal {
		t.Errorf("flannel's node is %+v", e)
	}
	got := c.node("node-a").Annotations
	for key, want := range map[string]string{
		"kube-subnet-manager": "true", "backend-type": "vxlan", "public-ip": "192.0.2.1",
		"backend-data": `{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}`,
	} {
		if got[flannelPrefix+"/"+key] != want {
			t.Errorf("the annotation %s is %q, want %q", key, got[flannelPrefix+"/"+key], want)
		}
	}
	a.stop()
	d := c.start("node-a") // with its own prefix: what stood under flannel's goes with the same write
	d.Claim(claimOf("node-a", 1))
	for deadline := time.Now().Add(patience); c.node("node-a").Annotations["overlayd.io/public-ip"] == ""; {
		if time.Now().After(deadline) {
			t.Fatalf("the annotations are %q", c.node("node-a").Annotations)
		}
		time.Sleep(50 * time.Millisecond)
	}
	d.await("a lease", held)
	if left := c.node("node-a").Annotations[flannelPrefix+"/public-ip"]; left != "" {
		t.Errorf("flannel's annotation is left: %q", left)
	}
}

// What an operator has set for this node is read, under the own prefix first, and followed; what is set for others is
// not. This node's writes leave it alone.
func settingsOfANode(t *testing.T, c *cluster) {
	c.allow(true)
	c.setNetwork(network)
	c.addNode("node-a", "10.244.0.0/24")
	c.addNode("node-b", "10.244.1.0/24")
	c.patch("node-b", "", `{"metadata": {"annotations": {"overlayd.io/interface": "eth9"}}}`)
	a := c.start("node-a")
	a.Claim(claimOf("node-a", 1))
	if s := a.await("a lease", held); *s.Settings != (subnet.NodeSettings{}) {
		t.Errorf("the settings are %+v", *s.Settings)
	}
	set := func(annotations string, want subnet.NodeSettings) {
		t.Helper()
		c.patch("node-a", "", `{"metadata": {"annotations": {`+annotations+`}}}`)
		a.await("the settings", func(s subnet.Snapshot) bool { return *s.Settings == want && held(s) })
	}
	var want subnet.NodeSettings
	want.PublicIP.V4 = subnet.Setting{Name: "annotation flannel.alpha.coreos.com/public-ip-overwrite", Value: "192.0.2.7"}
	set(`"flannel.alpha.coreos.com/public-ip-overwrite": "192.0.2.7"`, want)
	want.Interface = subnet.Setting{Name: "annotation overlayd.io/interface", Value: "eth1"}
	want.PublicIP.V4 = subnet.Setting{Name: "annotation overlayd.io/public-ip-overwrite", Value: "nonsense"}
	want.PublicIP.V6 = subnet.Setting{Name: "annotation overlayd.io/public-ipv6-overwrite", Value: "2001:db8::7"}
	set(`"overlayd.io/interface": "eth1", "overlayd.io/public-ip-overwrite": "nonsense",
		"overlayd.io/public-ipv6-overwrite": "2001:db8::7"`, want)
	moved := claimOf("node-a", 1)
	moved.PublicIP.V4 = netip.MustParseAddr("192.0.2.7")
	a.Claim(moved)
	a.await("another address", func(s subnet.Snapshot) bool {
		return held(s) && s.Lease.PublicIP == moved.PublicIP && *s.Settings == want
	})
	c.remove("nodes", "", "node-a")
	s := a.await("the loss of the Node", func(s subnet.Snapshot) bool { return !s.Held() })
	if *s.Settings != want {
		t.Errorf("without a Node, the settings are %+v", *s.Settings)
	}
	c.addNode("node-a", "10.244.0.0/24")
	a.await("no settings", func(s subnet.Snapshot) bool { return held(s) && *s.Settings == (subnet.NodeSettings{}) })
}

// An API server that is away is a loss of contact, not of peers; what is claimed meanwhile is written later. One that
// is not there yet is waited for.
func serverAway(t *testing.T, c *cluster) {
	c.allow(true)
	c.setNetwork(network)
	c.addNode("node-a", "10.244.0.0/24")
	c.addNode("node-b", "10.244.1.0/24")
	a, b := c.start("node-a"), c.start("node-b")
	a.Claim(claimOf("node-a", 1))
	b.Claim(claimOf("node-b", 2))
	a.await("a lease", held)
	a.await("node-b", peer("node-b", "10.244.1.0-24"))
	b.await("a lease", held)
	c.Stop()
	s := a.await("the loss", func(s subnet.Snapshot) bool { return s.Err != nil })
	if !held(s) || !peer("node-b", "10.244.1.0-24")(s) || s.Since.IsZero() || !strings.Contains(s.Err.Error(), c.URL) {
		t.Errorf("while the server is away: %+v", s)
	}
	b.await("the loss", func(s subnet.Snapshot) bool { return s.Err != nil })
	moved := claimOf("node-b", 2)
	moved.PublicIP.V4 = netip.MustParseAddr("192.0.2.3")
	b.Claim(moved)
	b.awaitError("cannot connect to " + c.URL)
	late := c.start("node-a")
	late.Claim(claimOf("node-a", 1))
	if s := late.await("a reason", func(s subnet.Snapshot) bool { return s.Err != nil }); s.Table.Revision != 0 {
		t.Errorf("a table comes from nowhere: %+v", s)
	}
	began := time.Now()
	late.stop()
	if took := time.Since(began); took > time.Second {
		t.Errorf("it ends after %s", took)
	}
	late = c.start("node-a")
	late.Claim(claimOf("node-a", 1))
	c.Start()
	a.await("the server", func(s subnet.Snapshot) bool { return s.Err == nil })
	s = a.await("the new claim", func(s subnet.Snapshot) bool {
		e := s.Table.Find("10.244.1.0-24")
		return e != nil && e.PublicIP == moved.PublicIP
	})
	if s.Table.Epoch != 0 || s.Losses != 0 {
		t.Errorf("a restart of the server counts as a loss: %+v", s)
	}
	late.await("a lease", held)
}

// A store that was restored from a backup begins another epoch, also for those whose watch would wait until it is as
// far as the one before.
func serverRestored(t *testing.T, c *cluster) {
	c.allow(true)
	c.setNetwork(network)
	c.addNode("node-a", "10.244.0.0/24")
	c.Stop()
	restore := c.Etcd.Backup()
	c.Start()
	a := c.start("node-a")
	a.Claim(claimOf("node-a", 1))
	a.await("a lease", held)
	for i := range 50 { // so that the backup is older by some revisions
		c.patch("node-a", "", fmt.Sprintf(`{"metadata": {"labels": {"x": "%d"}}}`, i))
	}
	c.setNetwork(`{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan", "VNI": 7}}`)
	c.addNode("node-b", "10.244.1.0/24") // the last, so that who knows it knows the revisions of all the others
	before := a.await("node-b and the config", func(s subnet.Snapshot) bool {
		return s.Table.Find("10.244.1.0-24") != nil && s.Table.Config.Backend.VNI == 7
	})
	c.Stop()
	restore()
	c.Start()
	s := a.await("another epoch", func(s subnet.Snapshot) bool { return s.Table.Epoch > before.Table.Epoch })
	if s.Table.Find("10.244.1.0-24") != nil || s.Table.Revision >= before.Table.Revision {
		t.Errorf("after the restore: %+v, before: %+v", s.Table, before.Table)
	}
	a.await("a lease and the config", func(s subnet.Snapshot) bool { return held(s) && s.Table.Config.Backend.VNI == 1 })
	for _, r := range []*reflected{a.nodes(nil), a.configMaps(nil)} {
		_, err := r.watch(t.Context(), metav1.ListOptions{ResourceVersion: "99999999"})
		if !apierrors.IsResourceExpired(err) { // the server itself accepts it, and tells nothing
			t.Errorf("a watch of %s beyond the newest revision: %v", r.name, err)
		}
	}
}

// A watch that can't go on where it was, since the server does not remember what has happened since, begins again: what
// has gone meanwhile is gone.
func expiredWatch(t *testing.T, c *cluster) {
	c.allow(true)
	c.setNetwork(network)
	c.addNode("node-a", "10.244.0.0/24")
	c.addNode("node-b", "10.244.1.0/24")
	wire := c.NewRelay(t)
	a := c.start("node-a", func(o *Options) {
		o.Kubeconfig = c.KubeconfigWith(fmt.Sprintf("server: %q", wire.URL), "token: "+apiserver.Node)
	})
	a.await("both", func(s subnet.Snapshot) bool { return len(s.Table.Entries) == 2 })
	wire.Cut()
	a.await("the loss", func(s subnet.Snapshot) bool { return s.Err != nil })
	c.remove("nodes", "", "node-b")
	for i := range 20 {
		c.patch("node-a", "", fmt.Sprintf(`{"metadata": {"labels": {"x": "%d"}}}`, i))
	}
	c.Stop() // its memory of changes goes with it
	c.Start()
	c.addNode("node-c", "10.244.2.0/24")
	wire.Pass()
	s := a.await("node-c", func(s subnet.Snapshot) bool { return s.Table.Find("10.244.2.0-24") != nil && s.Err == nil })
	if s.Table.Find("10.244.1.0-24") != nil || s.Table.Epoch != 0 {
		t.Errorf("after an expired watch: %+v", s.Table)
	}
}

// A connection of which the other side has vanished without a word is given up by HTTP/2's pings: after 45 s as
// client-go has it, here sooner.
func halfOpenConnection(t *testing.T, c *cluster) {
	t.Setenv("HTTP2_READ_IDLE_TIMEOUT_SECONDS", "2")
	t.Setenv("HTTP2_PING_TIMEOUT_SECONDS", "1")
	c.allow(true)
	c.setNetwork(network)
	c.addNode("node-a", "10.244.0.0/24")
	wire := c.NewRelay(t)
	a := c.start("node-a", func(o *Options) {
		// tls-server-name keeps client-go from sharing the transport of the other tests, which has its own timeouts
		server := fmt.Sprintf("server: %q, tls-server-name: kubernetes", wire.URL)
		o.Kubeconfig = c.KubeconfigWith(server, "token: "+apiserver.Node)
	})
	a.await("a table", func(s subnet.Snapshot) bool { return s.Table.Revision != 0 })
	wire.Hold()
	c.addNode("node-b", "10.244.1.0/24")
	a.await("node-b", func(s subnet.Snapshot) bool { return s.Table.Find("10.244.1.0-24") != nil && s.Err == nil })
}

// A server that is there and does not answer is given up after a while, and asked again: whether it holds all requests,
// or a watch that has begun goes on without a word for longer than it should.
func stuckServer(t *testing.T, c *cluster) {
	c.allow(true)
	c.setNetwork(network)
	c.addNode("node-a", "10.244.0.0/24")
	var mu sync.Mutex
	held := func(*http.Request) bool { return false }
	hold := func(f func(*http.Request) bool) { mu.Lock(); defer mu.Unlock(); held = f }
	server, _ := url.Parse(c.URL)
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(server)
			r.Out.Header.Set("Authorization", "Bearer "+apiserver.Node) // client-go keeps it to itself without TLS
		},
		FlushInterval: -1, ErrorLog: zap.NewStdLog(zap.NewNop()),
		Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, //nolint:gosec // a test's
	}
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		stop := held(r)
		mu.Unlock()
		if stop {
			<-r.Context().Done()
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	defer front.Close()
	watches := func(r *http.Request) bool { return r.URL.Query().Has("watch") }
	for what, f := range map[string]func(*http.Request) bool{
		"all": func(*http.Request) bool { return true }, "watches": watches,
	} {
		hold(f)
		a := c.new("node-a", func(o *Options) {
			o.Kubeconfig = c.KubeconfigWith(fmt.Sprintf("server: %q", front.URL), "token: "+apiserver.Node)
		})
		a.conn.within = time.Second
		a.run()
		s := a.await("an error", func(s subnet.Snapshot) bool { return s.Err != nil })
		if want := "no answer from " + front.URL; !strings.Contains(s.Err.Error(), want) {
			t.Errorf("%s held: %v, want %q", what, s.Err, want)
		}
		hold(func(*http.Request) bool { return false })
		a.await("a table", func(s subnet.Snapshot) bool { return s.Err == nil && len(s.Table.Entries) == 1 })
		a.stop()
	}
	r := c.new("node-a").nodes(nil)
	r.conn.within = 3 * time.Second
	w, err := r.watch(t.Context(), metav1.ListOptions{TimeoutSeconds: new(int64(0))}) // for the server: for long
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	for open, timeout := true, time.After(patience); open; {
		select {
		case _, open = <-w.ResultChan():
		case <-timeout:
			t.Fatal("a watch goes on for ever")
		}
	}
}

// A watch that gets no answer is begun again where the one before has ended, and the Nodes are not listed for that.
func TestNoListAfterNoAnswer(t *testing.T) {
	var lists, mute atomic.Int64
	encoded := func(kind string, raw []byte, err error) []byte {
		if err != nil {
			t.Error(err)
		}
		types := slices.Concat(message(1, []byte("v1")), message(2, []byte(kind)))
		return slices.Concat([]byte(magic), message(1, types), message(2, raw))
	}
	all := &corev1.NodeList{ListMeta: metav1.ListMeta{ResourceVersion: "5"}}
	mute.Store(1)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		w.Header().Set("Content-Type", runtime.ContentTypeProtobuf)
		switch raw, err := all.Marshal(); {
		case q.Has("sendInitialEvents"):
			w.WriteHeader(http.StatusBadRequest)
		case !q.Has("watch"):
			if q.Get("limit") != "1" {
				lists.Add(1)
			}
			_, _ = w.Write(encoded("NodeList", raw, err))
		case mute.Add(-1) >= 0:
			<-r.Context().Done()
		default:
			w.Header().Set("Content-Type", runtime.ContentTypeProtobuf+";stream=watch")
			_, _ = w.Write(frame(t, watch.Added, bareNode("node-b", "10.244.1.0/24")))
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}
	}))
	defer server.Close()
	file := filepath.Join(t.TempDir(), "kubeconfig")
	config := fmt.Sprintf("{clusters: [{name: a, cluster: {server: %q}}], contexts: [{name: a, context: {cluster: a}}], "+
		"current-context: a}", server.URL)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	o := DefaultOptions()
	o.Kubeconfig, o.Node = file, "node-a"
	m, err := New(o, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	m.conn.within = 100 * time.Millisecond
	events := make(chan event)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	r := m.nodes(func(e event) {
		select {
		case events <- e:
		case <-ctx.Done():
		}
	})
	ended := make(chan struct{})
	go func() { defer close(ended); r.run(ctx) }()
	defer func() { cancel(); <-ended }()
	s, failed := newState(o, zap.NewNop()), false
	for len(s.nodes) == 0 {
		select {
		case e := <-events:
			e(s, time.Now())
			failed = failed || s.unreachable() != nil && strings.Contains(s.unreachable().Error(), "no answer")
		case <-ctx.Done():
			t.Fatal("no Node")
		}
	}
	if n := lists.Load(); n != 1 || !failed {
		t.Errorf("%d lists, failed %t", n, failed)
	}
}

// Credentials that the server does not accept are named, and the file is read again.
func rotatedToken(t *testing.T, c *cluster) {
	c.allow(true)
	c.setNetwork(network)
	c.addNode("node-a", "10.244.0.0/24")
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("expired"), 0o600); err != nil {
		t.Fatal(err)
	}
	a := c.start("node-a", func(o *Options) {
		o.Kubeconfig = c.KubeconfigWith(fmt.Sprintf("server: %q", c.URL), fmt.Sprintf("tokenFile: %q", token))
	})
	a.Claim(claimOf("node-a", 1))
	s := a.await("a refusal", func(s subnet.Snapshot) bool { return s.Err != nil })
	if !strings.Contains(s.Err.Error(), "does not accept the credentials") {
		t.Errorf("the error is %q", s.Err)
	}
	if err := os.WriteFile(token, []byte(apiserver.Node), 0o600); err != nil {
		t.Fatal(err)
	}
	a.await("a lease", held)
}

// Both families go the same way.
func dualStack(t *testing.T, c *cluster) {
	c.allow(true)
	c.setNetwork(`{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/56"}`)
	c.addNode("node-a", "10.244.0.0/24", "fd00:10:244::/64")
	c.addNode("node-b", "10.244.1.0/24")
	claim := claimOf("node-a", 1)
	claim.PublicIP.V6 = netip.MustParseAddr("2001:db8::1")
	claim.VTEP.V6 = subnet.VTEP{VNI: 1, MAC: addr.MAC{2, 6, 0, 0, 0, 1}}
	a, b := c.start("node-a"), c.start("node-b")
	a.Claim(claim)
	b.Claim(claimOf("node-b", 2))
	s := a.await("a lease", held)
	if want := netip.MustParsePrefix("fd00:10:244::/64"); s.Lease.Subnets.V6 != want || s.Lease.Attrs != claim.Attrs {
		t.Errorf("the lease is %+v", s.Lease)
	}
	b.awaitError("and none of IPv6")
	const data = `{"VNI":1,"VtepMAC":"02:06:00:00:00:01"}`
	if got := c.node("node-a").Annotations["overlayd.io/backend-v6-data"]; got != data {
		t.Errorf("backend-v6-data is %q", got)
	}
}

// List reads the table without a claim, and without watching.
func list(t *testing.T, c *cluster) {
	c.allow(true)
	c.setNetwork(network)
	c.addNode("node-a", "10.244.0.0/24")
	c.addNode("node-b")
	c.patch("node-a", "", `{"metadata": {"annotations": {"overlayd.io/kube-subnet-manager": "true",
		"overlayd.io/backend-type": "vxlan", "overlayd.io/public-ip": "192.0.2.300"}}}`)
	o := DefaultOptions()
	o.Kubeconfig, o.Node = c.Kubeconfig(apiserver.Node), "node-a"
	m, err := New(o, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	table, err := m.List(t.Context())
	if err != nil || table.ConfigErr != nil || len(table.Entries) != 1 || table.Entries[0].Err == nil {
		t.Errorf("the table is %+v, %v", table, err)
	}
	if n := m.Requests(); n["list"] != 2 || n["watch"]+n["patch"] != 0 {
		t.Errorf("requests: %v", n)
	}
	m.Close()
	c.allow(false)
	if _, err := m.List(t.Context()); err == nil || !strings.Contains(err.Error(), "permission denied") {
		t.Errorf("without permission: %v", err)
	}
}

// What is not permitted is named, and goes on once it is.
func forbidden(_ *testing.T, c *cluster) {
	c.setNetwork(network)
	c.addNode("node-a", "10.244.0.0/24")
	a := c.start("node-a")
	a.Claim(claimOf("node-a", 1))
	a.await("a refusal", func(s subnet.Snapshot) bool {
		return s.Err != nil && strings.Contains(s.Err.Error(), `permission denied: nodes is forbidden`)
	})
	c.allow(true)
	a.await("a lease", held)
	role := func(resource string) {
		c.do(c.admin.client.Patch(types.JSONPatchType).AbsPath("/apis/rbac.authorization.k8s.io/v1/clusterroles/node").
			Body(fmt.Appendf(nil, `[{"op": "replace", "path": "/rules/1/resources/0", "value": %q}]`, resource)).Do(c.ctx()).Error())
		c.permitted(c.ctx(), resource == "nodes/status", "status")
	}
	role("nodes/other")
	defer role("nodes/status")
	a.SetReady(true, "ready for pods")
	a.await("a refused condition", func(s subnet.Snapshot) bool {
		return s.ReadyErr != nil && strings.Contains(s.ReadyErr.Error(), "permission denied") &&
			strings.Contains(s.ReadyErr.Error(), "nodes/status") && s.Err == nil
	})
	role("nodes/status")
	a.await("an accepted condition", func(s subnet.Snapshot) bool { return s.ReadyErr == nil })
}

// Of two machines that run for one Node, the one that started last announces itself, and both say what is wrong.
func twoMachinesForOneNode(_ *testing.T, c *cluster) {
	c.allow(true)
	c.setNetwork(network)
	c.addNode("node-a", "10.244.0.0/24")
	a := c.start("node-a")
	a.Claim(claimOf("node-a", 1))
	a.await("a lease", held)
	b := c.start("node-a")
	b.Claim(claimOf("node-a", 2))
	b.await("a lease", held)
	a.awaitError("the Node node-a is also that of")
	a.SetReady(false, "lease: conflict")
	b.SetReady(true, "ready for pods")
	c.condition("node-a", corev1.ConditionFalse, "OverlaydIsReady")
	c.unwritten("node-a")
}

// unwritten checks that no machine goes on writing a Node.
func (c *cluster) unwritten(name string) {
	c.t.Helper()
	written := c.node(name).ResourceVersion
	time.Sleep(2 * writeAgain)
	if now := c.node(name).ResourceVersion; now != written {
		c.t.Errorf("they go on writing: revision %s, was %s", now, written)
	}
}

// A copy that has the machine's name and ID takes the Node, and neither goes on writing.
func copyOfAMachine(_ *testing.T, c *cluster) {
	c.allow(true)
	c.setNetwork(network)
	c.addNode("node-a", "10.244.0.0/24")
	a := c.start("node-a")
	a.Claim(claimOf("node-a", 1))
	a.await("a lease", held)
	time.Sleep(writeAgain + 100*time.Millisecond) // the server says in seconds when something was written
	b, copied := c.start("node-a"), claimOf("node-a", 2)
	copied.NodeID = claimOf("node-a", 1).NodeID
	b.Claim(copied)
	b.await("a lease", held)
	a.awaitError("the Node node-a is also that of")
	c.unwritten("node-a")
}

// Two nodes with one address know of each other.
func oneAddressTwice(_ *testing.T, c *cluster) {
	c.allow(true)
	c.setNetwork(network)
	c.addNode("node-a", "10.244.0.0/24")
	c.addNode("node-b", "10.244.1.0/24")
	a, b := c.start("node-a"), c.start("node-b")
	a.Claim(claimOf("node-a", 1))
	a.await("a lease", held)
	twin := claimOf("node-b", 2)
	twin.PublicIP = claimOf("", 1).PublicIP
	b.Claim(twin)
	a.awaitError("the public IP 192.0.2.1 is also that of node \"node-b\"")
	b.awaitError("the public IP 192.0.2.1 is also that of node \"node-a\"")
}
