package kube

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/runtime/serializer/streaming"
	"k8s.io/apimachinery/pkg/watch"
	restwatch "k8s.io/client-go/rest/watch"
)

// What a watch brings is decoded to the same, whole or lean, and what says nothing new is left out.
func TestLean(t *testing.T) {
	o := DefaultOptions()
	o.Node = "node-9"
	node := func(i, beat int, change func(*corev1.Node)) *corev1.Node {
		n := kubeletNode(i, beat)
		n.Spec.PodCIDR = n.Spec.PodCIDRs[0]
		change(n)
		return n
	}
	same := func(*corev1.Node) {}
	condition := func(n *corev1.Node) {
		n.Status.Conditions = append(n.Status.Conditions, corev1.NodeCondition{
			Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionTrue,
		})
	}
	bookmark := &corev1.Node{ObjectMeta: metav1.ObjectMeta{
		ResourceVersion: "1010", Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"},
	}}
	type event struct {
		kind   watch.EventType
		node   *corev1.Node
		passes bool
	}
	events := []event{
		{watch.Added, node(7, 1, same), true},
		{watch.Added, node(9, 1, same), true},
		{watch.Bookmark, bookmark, true},
		{watch.Modified, node(7, 2, same), false},
		{watch.Modified, node(9, 2, same), false},
		{watch.Modified, node(7, 3, func(n *corev1.Node) { n.Labels["example.org/new"] = "x" }), false},
		{watch.Modified, node(7, 4, func(n *corev1.Node) { n.Annotations["overlayd.io/public-ip"] = "192.0.2.99" }), true},
		{watch.Modified, node(7, 5, same), true},
		{watch.Modified, node(7, 6, condition), false},
		{watch.Modified, node(9, 6, condition), true},
		{watch.Modified, node(7, 7, func(n *corev1.Node) { n.Spec.PodCIDRs = []string{"10.1.2.0/24"} }), true},
		{watch.Modified, node(7, 8, func(n *corev1.Node) { n.UID = "another" }), true},
		{watch.Deleted, node(7, 9, same), true},
		{watch.Added, node(7, 10, same), true},
		{watch.Modified, node(7, 11, same), false},
	}
	var stream []byte
	for _, e := range events {
		stream = append(stream, frame(t, e.kind, e.node)...)
	}
	var left []int64
	d := decoder(o, bytes.NewReader(stream), func(revision int64) { left = append(left, revision) })
	for i, e := range events {
		if !e.passes {
			continue
		}
		kind, object, err := d.Decode()
		got, ok := object.(*corev1.Node)
		if err != nil || !ok || kind != e.kind || got.Name != e.node.Name || got.ResourceVersion != e.node.ResourceVersion {
			t.Fatalf("event %d: %s %+v, %v", i, kind, object, err)
		}
		if e.kind == watch.Bookmark && got.Annotations[metav1.InitialEventsAnnotationKey] != "true" {
			t.Error("the bookmark does not end the list")
		}
		if o.read(got) != o.read(e.node) {
			t.Errorf("event %d, lean: %+v\nwhole: %+v", i, o.read(got), o.read(e.node))
		}
		if got.Name == o.Node && (networkUnavailable(got) == nil) != (networkUnavailable(e.node) == nil) {
			t.Errorf("event %d: the condition is %+v", i, networkUnavailable(got))
		}
		if len(got.Status.Images)+len(got.Labels) > 0 {
			t.Errorf("event %d: images or labels are left", i)
		}
	}
	if _, _, err := d.Decode(); !errors.Is(err, io.EOF) {
		t.Errorf("after the last event: %v", err)
	}
	if want := []int64{1002, 1002, 1003, 1006, 1011}; !slices.Equal(left, want) {
		t.Errorf("left out: %v, want %v", left, want)
	}
}

// An event that is cut off or damaged is for the decoder to judge.
func TestLeanOfDamaged(t *testing.T) {
	event := frame(t, watch.Added, kubeletNode(7, 1))[4:]
	for i := range event {
		cut, flipped := slices.Clone(event[:i]), slices.Clone(event)
		flipped[i] ^= 0xff
		for _, e := range [][]byte{cut, flipped} {
			framed := append(binary.BigEndian.AppendUint32(nil, uint32(len(e))), e...)
			_, _, _ = decoder(DefaultOptions(), bytes.NewReader(framed), func(int64) {}).Decode() // does not panic
		}
	}
}

// frame is an event as it comes.
func frame(t testing.TB, kind watch.EventType, n *corev1.Node) []byte {
	t.Helper()
	raw, err := n.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	types := slices.Concat(message(1, []byte("v1")), message(2, []byte("Node")))
	object := slices.Concat([]byte(magic), message(1, types), message(2, raw))
	event := slices.Concat(message(1, []byte(kind)), message(2, message(1, object)))
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(event))), event...)
}

// decoder reads events as client-go does.
func decoder(o Options, r io.Reader, seen func(int64)) *restwatch.Decoder {
	codec := leanly{serializer.NewCodecFactory(newScheme()).WithoutConversion(), o, seen}
	info, _ := runtime.SerializerInfoForMediaType(codec.SupportedMediaTypes(), runtime.ContentTypeProtobuf)
	stream := info.StreamSerializer
	return restwatch.NewDecoder(streaming.NewDecoder(stream.NewFrameReader(io.NopCloser(r)), stream.Serializer),
		codec.DecoderToVersion(info.Serializer, corev1.SchemeGroupVersion))
}

// leanNode is what a watch makes of a Node.
func leanNode(t testing.TB, o Options, n *corev1.Node) *corev1.Node {
	t.Helper()
	_, object, err := decoder(o, bytes.NewReader(frame(t, watch.Added, n)), func(int64) {}).Decode()
	if err != nil {
		t.Fatal(err)
	}
	return object.(*corev1.Node)
}
