package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"github.com/overlayd/overlayd/subnet"
)

const (
	apiPort   = 6443
	nodesPath = "/api/v1/nodes"
	// heartbeatEvery is that of 5,000 kubelets, each of which writes its status every five minutes.
	heartbeatEvery = 5 * time.Minute / 5000
	// afterTheList is how much of what the API server sends at a start comes after the list of Nodes, at most: what is
	// read and written of the own Node, the ConfigMap, bookmarks.
	afterTheList = 128 << 10
)

// kube measures the daemon with a real kube-apiserver as its store, in which many nodes have their Nodes.
func kube(ctx context.Context, e *Env) error {
	program := filepath.Join(filepath.Dir(e.Overlayd), "kubernetes")
	if _, err := os.Stat(program); e.Quick && err != nil {
		e.Progress("  left out, bin/kubernetes is missing: make bin/kubernetes")
		return nil
	}
	s, err := newSite(ctx, e, true)
	if err != nil {
		return err
	}
	defer s.close(ctx)
	n := pick(e, 5000, 100)
	if err := s.fill(ctx, n); err != nil {
		return err
	}
	if err := s.kubeStarts(ctx, n); err != nil {
		return err
	}
	return s.kubeRunning(ctx, n)
}

func (s *site) kubeStarts(ctx context.Context, n int) error {
	var out startSamples
	var list, after, size []float64
	for i := range pick(s.env, 8, 1) {
		if err := s.clean(ctx, n); err != nil {
			return err
		}
		news, err := s.arrivals()
		if err != nil {
			return err
		}
		began := time.Now()
		err = s.timed(ctx, n, "", &out)
		news.close()
		if err != nil {
			return err
		}
		at, bytes := news.most(afterTheList)
		arrived := millis(at.Sub(began))
		list, size = append(list, arrived), append(size, float64(bytes)/1e6)
		after = append(after, out.wall[i]-arrived)
	}
	if !s.env.Quick { // for the first one, the API server encodes all Nodes
		out.wall, out.cpu, list, after = out.wall[1:], out.cpu[1:], list[1:], after[1:]
	}
	requests, err := s.kubeRequests(ctx, n, &out)
	if err != nil {
		return err
	}
	group := coldStart + s.leases.suffix()
	rows := []Row{
		row(group, "after the list has arrived, until all is programmed", Millis, after...).atMost(500),
		row(group, execToReady, Millis, out.wall...).beside("until the list has arrived", list),
		row(group, cpuOfAll, Millis, out.cpu...),
		row(group, "what the API server sends", MB, size...),
		row(group, "peak of memory (RSS)", MB, out.peak...).atMost(60),
		row(group, "requests to the API server", Count, requests).atMost(10),
	}
	for i := range rows {
		rows[i] = rows[i].at(n)
	}
	s.env.Add(rows...)
	return nil
}

// kubeRequests counts the requests of a start, and what memory it takes.
func (s *site) kubeRequests(ctx context.Context, n int, out *startSamples) (requests float64, err error) {
	if err := s.clean(ctx, n); err != nil {
		return 0, err
	}
	d, err := s.start(n, "")
	if err != nil {
		return 0, err
	}
	defer func() {
		_, endErr := d.end(syscall.SIGTERM)
		err = errors.Join(err, endErr)
	}()
	if err := d.ready(ctx); err != nil {
		return 0, err
	}
	time.Sleep(settled)
	peak, err := peakRSS(d.cmd.Process.Pid)
	if err != nil {
		return 0, err
	}
	out.peak = append(out.peak, peak)
	var is struct {
		Store struct {
			Requests map[string]float64 `json:"requests"`
		} `json:"store"`
	}
	text, err := d.get(sitePort, "/status")
	if err == nil {
		err = json.Unmarshal(text, &is)
	}
	for _, count := range is.Store.Requests {
		requests += count
	}
	return requests, err
}

// kubeRunning measures what all the kubelets' heartbeats cost, and peers that join.
func (s *site) kubeRunning(ctx context.Context, n int) error {
	if err := s.clean(ctx, n); err != nil {
		return err
	}
	d, err := s.start(n, "", "--pprof", fmt.Sprint(pprofPort))
	if err != nil {
		return err
	}
	defer func() { _, _ = d.end(syscall.SIGKILL) }()
	if err := d.ready(ctx); err != nil {
		return err
	}
	time.Sleep(pick(s.env, 11*time.Second, settled)) // it has given back what only the start took
	quiet, err := d.cpuDuring(func() error {
		time.Sleep(pick(s.env, time.Minute, time.Second))
		return nil
	})
	if err != nil {
		return err
	}
	s.env.Add(row("idle"+s.leases.suffix(), "CPU a minute, without heartbeats or a resync", Millis, quiet).at(n))
	floor, err := newReader()
	if err != nil {
		return err
	}
	beats := s.heartbeats(ctx, n, floor.wake)
	began := time.Now()
	err = s.idle(ctx, d, 60, func(r Row) Row {
		return r.beside("a thread that reads each heartbeat's bytes and drops them", []float64{floor.aMinute()}).ratioAtMost(4)
	})
	sent, errBeats := beats()
	errBeats = errors.Join(errBeats, floor.close())
	if expected := float64(time.Since(began) / heartbeatEvery); !s.env.Quick && errBeats == nil && float64(sent) < 0.9*expected {
		errBeats = fmt.Errorf("%d heartbeats of %.0f were sent", sent, expected)
	}
	if err := errors.Join(err, errBeats); err != nil {
		return err
	}
	return s.joins(ctx, d, &joinFigures{n: n}, 2)
}

// heartbeats has the nodes' kubelets write their status, one after the other, until the returned function is called, and
// calls written after each. It says how many were written.
func (s *site) heartbeats(ctx context.Context, n int, written func() error) (stop func() (int64, error)) {
	ctx, cancel := context.WithCancel(ctx)
	var sent atomic.Int64
	var g errgroup.Group
	g.Go(func() error {
		var writes errgroup.Group
		writes.SetLimit(8)
		tick := time.NewTicker(heartbeatEvery)
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return writes.Wait()
			}
			writes.Go(func() error {
				defer sent.Add(1)
				// One that has begun is not ended.
				return errors.Join(s.heartbeat(context.WithoutCancel(ctx), peerLease(i%n+1).NodeName), written())
			})
		}
	})
	return func() (int64, error) {
		cancel()
		return sent.Load(), g.Wait()
	}
}

func conditionTypes() []string {
	return []string{"MemoryPressure", "DiskPressure", "PIDPressure", "Ready"}
}

// heartbeat is a kubelet's: it says that nothing has changed.
func (s *site) heartbeat(ctx context.Context, node string) error {
	var conditions []map[string]any
	for _, t := range conditionTypes() {
		conditions = append(conditions, map[string]any{"type": t, "lastHeartbeatTime": time.Now().UTC().Format(time.RFC3339)})
	}
	return s.lab.APIServer().Do(ctx, http.MethodPatch, nodesPath+"/"+node+"/status?fieldManager=kubelet",
		"strategic-merge", map[string]any{"status": map[string]any{"conditions": conditions}})
}

// inKubernetes are leases that are Nodes. They are written into the API server's etcd, since thousands of requests take
// minutes.
type inKubernetes struct {
	site     *site
	template map[string]any // a Node that the API server has made
}

func (*inKubernetes) suffix() string { return ", Kubernetes" }

func (*inKubernetes) port() uint16 { return apiPort }

func (*inKubernetes) batch() int { return 1 } // the API server takes two Nodes of one revision for one change

func (k *inKubernetes) args(int, string) []string {
	return []string{"--store", "kubernetes", "--kubeconfig", k.site.lab.APIServer().Kubeconfig()}
}

// network makes the template with the API server, as a kubelet, kube-controller-manager and overlayd do it, so that it
// has what the API server keeps of each: some 10 kB.
func (k *inKubernetes) network(ctx context.Context, n int) error {
	const name = "template"
	own := nodesPath + "/" + name
	var errs []error
	do := func(method, path, kind string, body any) {
		errs = append(errs, k.site.lab.APIServer().Do(ctx, method, path, kind, body))
	}
	do(http.MethodPatch, "/api/v1/namespaces/kube-system/configmaps/overlayd", "merge",
		map[string]any{"data": map[string]string{"net-conf.json": siteNetwork}})
	do(http.MethodDelete, nodesPath+"/"+k.site.node.Name, "", nil) // the lab's own
	do(http.MethodPost, nodesPath+"?fieldManager=kubelet", "", kubeletNode(name))
	do(http.MethodPatch, own+"/status?fieldManager=kubelet", "strategic-merge", map[string]any{
		"status": map[string]any{"conditions": []any{map[string]any{"type": "Ready", "status": "True"}}},
	})
	do(http.MethodPatch, own+"?fieldManager=kube-controller-manager", "merge",
		map[string]any{"spec": map[string]any{"podCIDR": "10.255.0.0/24", "podCIDRs": []string{"10.255.0.0/24"}}})
	do(http.MethodPatch, own+"?fieldManager=overlayd", "merge",
		map[string]any{"metadata": map[string]any{"annotations": annotations(peerLease(newPeer - 1))}})
	once, cancel := context.WithCancel(ctx)
	defer cancel()
	err := k.site.lab.APIServer().Watch(once, nodesPath+"?watch=1&fieldSelector=metadata.name="+name,
		func(event json.RawMessage) {
			var first struct{ Object map[string]any }
			errs = append(errs, json.Unmarshal(event, &first))
			k.template = first.Object
			cancel()
		})
	if k.template == nil {
		errs = append(errs, err)
	}
	do(http.MethodDelete, own, "", nil)
	if err := errors.Join(errs...); err != nil {
		return err
	}
	_, err = k.site.cli.Do(ctx, k.forget(n, netip.MustParsePrefix("10.255.1.0/24")))
	return err
}

// put writes the Node of a node that announces its lease.
func (k *inKubernetes) put(_ int, l subnet.Lease, id clientv3.LeaseID) clientv3.Op {
	return k.node(l.NodeName, l.Subnets.V4, annotations(l), clientv3.WithLease(id))
}

// forget writes the Node of the real node, which announces nothing.
func (k *inKubernetes) forget(_ int, own netip.Prefix) clientv3.Op {
	return k.node(siteNode, own, nil)
}

func (k *inKubernetes) node(name string, cidr netip.Prefix, annotations map[string]string, opts ...clientv3.OpOption,
) clientv3.Op {
	n, metadata, spec := maps.Clone(k.template), clone(k.template, "metadata"), clone(k.template, "spec")
	delete(metadata, "resourceVersion")
	metadata["name"], metadata["annotations"] = name, annotations
	ip := cidr.Addr().As4()
	metadata["uid"] = fmt.Sprintf("00000000-0000-4000-8000-%012x", ip)
	spec["podCIDR"], spec["podCIDRs"] = cidr, []netip.Prefix{cidr}
	n["metadata"], n["spec"] = metadata, spec
	text, _ := json.Marshal(n) // it was read from such a text
	return clientv3.OpPut("/registry/minions/"+name, string(text), opts...)
}

func clone(m map[string]any, key string) map[string]any {
	inner, _ := m[key].(map[string]any)
	return maps.Clone(inner)
}

// annotations are those by which overlayd announces a lease.
func annotations(l subnet.Lease) map[string]string {
	out := map[string]string{}
	for key, value := range map[string]string{
		"backend-type": string(l.Backend), "public-ip": l.PublicIP.V4.String(), "kube-subnet-manager": "true",
		"backend-data":    fmt.Sprintf(`{"VNI":%d,"VtepMAC":%q}`, l.VTEP.V4.VNI, l.VTEP.V4.MAC),
		"public-ip-local": fmt.Sprint(l.PublicIPLocal), "node-id": l.NodeID,
	} {
		out["overlayd.io/"+key] = value
	}
	return out
}

// kubeletNode is the Node that a kubelet registers.
func kubeletNode(name string) map[string]any {
	labels := map[string]string{"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
	for i := range 15 {
		labels[fmt.Sprintf("topology.example.org/label-%d", i)] = "some-value"
	}
	var conditions, images []map[string]any
	now := time.Now().UTC().Format(time.RFC3339)
	for _, t := range conditionTypes() {
		conditions = append(conditions, map[string]any{
			"type": t, "status": "False", "reason": "KubeletHasSufficient" + t,
			"message":           "kubelet has sufficient resources available",
			"lastHeartbeatTime": now, "lastTransitionTime": now,
		})
	}
	for i := range 50 { // --node-status-max-images
		images = append(images, map[string]any{"sizeBytes": 1 << 26, "names": []string{
			fmt.Sprintf("registry.example.org/team/app-%d@sha256:%s", i, strings.Repeat("0123456789abcdef", 4)),
			fmt.Sprintf("registry.example.org/team/app-%d:1.2", i),
		}})
	}
	amounts := map[string]string{"cpu": "64", "memory": "263921668Ki", "pods": "110", "ephemeral-storage": "959786032Ki"}
	return map[string]any{
		"metadata": map[string]any{"name": name, "labels": labels},
		"status": map[string]any{
			"conditions": conditions, "images": images, "capacity": amounts, "allocatable": amounts,
			"addresses": []map[string]string{
				{"type": "InternalIP", "address": "192.0.2.1"}, {"type": "Hostname", "address": name},
			},
			"daemonEndpoints": map[string]any{"kubeletEndpoint": map[string]any{"Port": 10250}},
			"nodeInfo": map[string]string{
				"machineID": strings.Repeat("0", 32), "systemUUID": strings.Repeat("0", 32), "bootID": strings.Repeat("0", 32),
				"kernelVersion": "6.12.0", "osImage": "Debian GNU/Linux 13 (trixie)", "architecture": "amd64",
				"containerRuntimeVersion": "containerd://2.1.0", "kubeletVersion": "v1.37.0", "kubeProxyVersion": "",
				"operatingSystem": "linux",
			},
		},
	}
}
