package kube

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
)

const benchNodes = 5000

// kubeletNode is a Node as a kubelet and its neighbours keep it: some 12 kB.
func kubeletNode(i, beat int) *corev1.Node {
	at := metav1.NewTime(time.Unix(1_700_000_000+int64(beat), 0))
	c := claimOf(fmt.Sprintf("node-%d", i), i)
	c.PublicIP.V4 = netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)})
	a, _ := announce(c.Attrs)
	n := &corev1.Node{
		TypeMeta: metav1.TypeMeta{Kind: "Node", APIVersion: "v1"},
		ObjectMeta: metav1.ObjectMeta{
			Name: c.NodeName, UID: types.UID(fmt.Sprintf("00000000-0000-0000-0000-%012d", i)),
			ResourceVersion: fmt.Sprint(1000 + beat), Annotations: a.annotations("overlayd.io"),
			Labels: map[string]string{}, CreationTimestamp: metav1.NewTime(time.Unix(1_700_000_000, 0)),
		},
		Spec: corev1.NodeSpec{PodCIDRs: []string{fmt.Sprintf("10.%d.%d.0/24", i>>8, i&255)}},
	}
	n.Annotations["csi.volume.kubernetes.io/nodeid"] = strings.Repeat("x", 200)
	for k := range 20 {
		n.Labels[fmt.Sprintf("topology.example.org/label-%d", k)] = "some-value"
	}
	for _, f := range []struct {
		manager, subresource string
		size                 int
	}{{"kubelet", "", 800}, {"kubelet", "status", 2500}, {"kube-controller-manager", "", 300}, {fieldManager, "", 500}} {
		n.ManagedFields = append(n.ManagedFields, metav1.ManagedFieldsEntry{
			Manager: f.manager, Subresource: f.subresource, Operation: metav1.ManagedFieldsOperationUpdate, APIVersion: "v1",
			Time: &n.CreationTimestamp, FieldsType: "FieldsV1",
			FieldsV1: metav1.NewFieldsV1(strings.Repeat("f", f.size)),
		})
	}
	for _, t := range []corev1.NodeConditionType{"MemoryPressure", "DiskPressure", "PIDPressure", "Ready"} {
		n.Status.Conditions = append(n.Status.Conditions, corev1.NodeCondition{
			Type: t, Status: corev1.ConditionFalse, LastHeartbeatTime: at, LastTransitionTime: n.CreationTimestamp,
			Reason: "KubeletHasSufficientMemory", Message: "kubelet has sufficient memory available",
		})
	}
	for k := range 50 { // --node-status-max-images
		n.Status.Images = append(n.Status.Images, corev1.ContainerImage{SizeBytes: 1 << 26, Names: []string{
			fmt.Sprintf("registry.example.org/team/app-%d@sha256:%064d", k, i),
			fmt.Sprintf("registry.example.org/team/app-%d:1.2", k),
		}})
	}
	return n
}

func benchState(b *testing.B) *state {
	b.Helper()
	o := DefaultOptions()
	o.Node = "node-0"
	s := newState(o, zap.NewNop())
	all := make([]*corev1.Node, benchNodes)
	for i := range all {
		all[i] = leanNode(b, o, kubeletNode(i, 0))
	}
	s.listed(all, 1000, time.Time{})
	s.setConfig(&corev1.ConfigMap{Data: map[string]string{configKey: `{"Network": "10.0.0.0/8"}`}}, 1)
	s.snapshot()
	return s
}

// What a kubelet's heartbeat costs once it is decoded.
func BenchmarkHeartbeat(b *testing.B) {
	s := benchState(b)
	beats := [2]*corev1.Node{kubeletNode(7, 1), kubeletNode(7, 2)}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		s.put(beats[i%2])
	}
	if s.changed {
		b.Fatal("a heartbeat is a change")
	}
}

// What a Node costs that announces something else, with the snapshot.
func BenchmarkChange(b *testing.B) {
	s := benchState(b)
	beats := [2]*corev1.Node{kubeletNode(7, 1), kubeletNode(7, 2)}
	beats[1].Annotations["overlayd.io/public-ip"] = "192.0.2.77"
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		s.put(beats[i%2])
		s.snapshot()
	}
}

// What the first list costs once it is decoded, and how much memory each Node takes from then on.
func BenchmarkList(b *testing.B) {
	o := DefaultOptions()
	all := make([]*corev1.Node, benchNodes)
	for i := range all {
		all[i] = leanNode(b, o, kubeletNode(i, 0))
	}
	var keep *state
	before := heap()
	for b.Loop() {
		keep = newState(o, zap.NewNop())
		keep.listed(all, 1000, time.Time{})
	}
	b.ReportMetric(float64(heap()-before)/benchNodes, "B/node")
	runtime.KeepAlive(keep)
	runtime.KeepAlive(all)
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// What a watch costs for each event, from its bytes on.
func BenchmarkWatch(b *testing.B) {
	for name, id := range map[string]string{"heartbeat": "", "change": "another"} {
		b.Run(name, func(b *testing.B) {
			beats := []*corev1.Node{kubeletNode(7, 1), kubeletNode(7, 2)}
			if id != "" {
				beats[1].Annotations["overlayd.io/node-id"] = id
			}
			frames := append(frame(b, watch.Modified, beats[0]), frame(b, watch.Modified, beats[1])...)
			b.SetBytes(int64(len(frames)))
			b.ReportAllocs()
			var all int
			body := io.LimitReader(readerFunc(func(p []byte) (int, error) {
				n := copy(p, frames[all%len(frames):])
				all += n
				return n, nil
			}), int64(len(frames))*int64(b.N))
			for d := decoder(DefaultOptions(), body, func(int64) {}); ; {
				if _, _, err := d.Decode(); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
