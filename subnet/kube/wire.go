package kube

import (
	"google.golang.org/protobuf/encoding/protowire"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// wireNode is a Node as it is decoded. A kubelet keeps 10 to 20 kB there and sends all of it with each heartbeat:
// labels, images, who manages which field. What is of no use here is left out before it is decoded, which saves nine
// tenths of the time.
type wireNode struct{ corev1.Node }

// Unmarshal decodes the protobuf form.
func (n *wireNode) Unmarshal(data []byte) error { return n.Node.Unmarshal(lean(data, partOfNode)) }

// DeepCopyObject is that of runtime.Object.
func (n *wireNode) DeepCopyObject() runtime.Object { return &wireNode{*n.DeepCopy()} }

// part says which fields of a message are kept, by their numbers in generated.proto of k8s.io/api/core/v1 and of
// k8s.io/apimachinery/pkg/apis/meta/v1, and what of one that is a message itself; nil: all of it.
type part func(protowire.Number) (of part, kept bool)

func partOfNode(field protowire.Number) (part, bool) {
	switch field {
	case 1:
		return partOfMetadata, true
	case 2:
		return partOfSpec, true
	case 3:
		return partOfStatus, true
	}
	return nil, false
}

func partOfMetadata(field protowire.Number) (part, bool) {
	switch field {
	case 1, 5, 6, 8, 12: // name, uid, resourceVersion, creationTimestamp, annotations
		return nil, true
	case 17: // managedFields: manager, time, subresource
		return func(field protowire.Number) (part, bool) { return nil, field == 1 || field == 4 || field == 8 }, true
	}
	return nil, false
}

func partOfSpec(field protowire.Number) (part, bool)   { return nil, field == 1 || field == 7 } // podCIDR, podCIDRs
func partOfStatus(field protowire.Number) (part, bool) { return nil, field == 4 }               // conditions

// lean is a message without what is not kept. One that can't be read is left to the decoder, which says why.
func lean(data []byte, keep part) []byte {
	out := make([]byte, 0, len(data)/4)
	for rest := data; len(rest) > 0; {
		number, kind, n := protowire.ConsumeField(rest)
		if n < 0 {
			return data
		}
		of, kept := keep(number)
		switch {
		case kept && of != nil && kind == protowire.BytesType:
			_, _, tag := protowire.ConsumeTag(rest)
			value, _ := protowire.ConsumeBytes(rest[tag:n])
			out = protowire.AppendBytes(append(out, rest[:tag]...), lean(value, of))
		case kept:
			out = append(out, rest[:n]...)
		}
		rest = rest[n:]
	}
	return out
}
