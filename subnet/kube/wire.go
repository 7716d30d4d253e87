package kube

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"io"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
)

// A kubelet keeps 10 to 20 kB in its Node, and all of it comes with each heartbeat: labels, images, who manages which
// field. What is of no use here is left out of a watch before client-go decodes it, and an event after which the Node
// says what it did before does not get there at all. With 5,000 nodes, that is most of what an idle daemon costs.

// leanly is client-go's serializer, which is given the lean form of what a watch brings.
type leanly struct {
	runtime.NegotiatedSerializer
	opts Options
	seen func(revision int64) // is told of Nodes that say what they did before
}

// SupportedMediaTypes has frames read here.
func (l leanly) SupportedMediaTypes() []runtime.SerializerInfo {
	all := slices.Clone(l.NegotiatedSerializer.SupportedMediaTypes())
	for i, t := range all {
		if t.MediaType == runtime.ContentTypeProtobuf {
			stream := *t.StreamSerializer
			stream.Framer = leanFramer{stream.Framer, l}
			all[i].StreamSerializer = &stream
		}
	}
	return all
}

type leanFramer struct {
	runtime.Framer
	leanly
}

// NewFrameReader reads the events of one watch.
func (f leanFramer) NewFrameReader(r io.ReadCloser) io.ReadCloser {
	return &leanReader{
		ReadCloser: r, seen: f.seen, own: f.opts.Node, said: map[uint64]uint64{}, seed: maphash.MakeSeed(),
		prefixes: prefixes(f.opts.AnnotationPrefix),
	}
}

// leanReader is a stream of frames, a length and an event each, of which those that say something new come through.
type leanReader struct {
	io.ReadCloser
	seen     func(revision int64)
	own      string   // name of the own Node
	prefixes []string // of annotations

	frame, lean, rest []byte
	said              map[uint64]uint64 // hash of what each Node has said last, by that of its UID
	seed              maphash.Seed
}

// maxFrame is the longest that client-go takes.
const maxFrame = 16 << 20

// Read returns a frame or, where it does not fit, a part of it and io.ErrShortBuffer.
func (r *leanReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		var header [4]byte
		if _, err := io.ReadFull(r.ReadCloser, header[:]); err != nil {
			return 0, err
		}
		size := int(binary.BigEndian.Uint32(header[:]))
		if size > maxFrame {
			return 0, fmt.Errorf("an event of %d bytes", size)
		}
		r.frame = slices.Grow(r.frame[:0], size)[:size]
		if _, err := io.ReadFull(r.ReadCloser, r.frame); err != nil {
			return 0, err
		}
		r.rest = r.event(r.frame)
	}
	n := copy(p, r.rest)
	if r.rest = r.rest[n:]; len(r.rest) > 0 {
		return n, io.ErrShortBuffer
	}
	return n, nil
}

// magic is what an object in protobuf begins with.
const magic = "k8s\x00"

// event is the lean form of one; empty: it says nothing new. One that is not of a Node is left as it is, and so is one
// that can't be read: the decoder says why.
func (r *leanReader) event(event []byte) []byte {
	kind := field(event, 1)
	object, ok := bytes.CutPrefix(field(field(event, 2), 1), []byte(magic))
	types, node := field(object, 1), field(object, 2)
	modified, deleted := string(kind) == string(watch.Modified), string(kind) == string(watch.Deleted)
	if !ok || string(field(types, 2)) != "Node" || !modified && !deleted && string(kind) != string(watch.Added) {
		return event
	}
	metadata := field(node, 1)
	if r.lean, ok = lean(r.lean[:0], node, r.partOfNode(string(field(metadata, 1)) == r.own)); !ok {
		return event
	}
	uid, says := maphash.Bytes(r.seed, field(metadata, 5)), maphash.Bytes(r.seed, r.lean)
	at := field(metadata, 6)
	if said, known := r.said[uid]; known && said == says && modified {
		r.seen(revision(string(at)))
		return nil
	}
	if r.said[uid] = says; deleted {
		delete(r.said, uid)
	}
	r.lean = append(r.lean, message(1, message(6, at))...) // fields of one message may come in two
	object = slices.Concat([]byte(magic), message(1, types), message(2, r.lean))
	return slices.Concat(message(1, kind), message(2, message(1, object)))
}

// field is the value of a field of a message; nil: it has none, or can't be read.
func field(data []byte, wanted protowire.Number) []byte {
	for len(data) > 0 {
		number, kind, tag := protowire.ConsumeTag(data)
		if tag < 0 {
			return nil
		}
		n := protowire.ConsumeFieldValue(number, kind, data[tag:])
		if n < 0 {
			return nil
		}
		if number == wanted && kind == protowire.BytesType {
			value, _ := protowire.ConsumeBytes(data[tag:])
			return value
		}
		data = data[tag+n:]
	}
	return nil
}

// message is a field whose value is a message, or other bytes.
func message(number protowire.Number, value []byte) []byte {
	out := make([]byte, 0, len(value)+2*binary.MaxVarintLen32)
	return protowire.AppendBytes(protowire.AppendTag(out, number, protowire.BytesType), value)
}

// part says which fields of a message are kept, by their numbers in generated.proto of k8s.io/api/core/v1 and of
// k8s.io/apimachinery/pkg/apis/meta/v1, and what of one that is a message itself; nil: all of it.
type part func(number protowire.Number, value []byte) (of part, kept bool)

func (r *leanReader) partOfNode(own bool) part {
	return func(number protowire.Number, _ []byte) (part, bool) {
		switch number {
		case 1:
			return r.partOfMetadata, true
		case 2:
			return partOfSpec, true
		}
		return partOfStatus, own && number == 3
	}
}

func (r *leanReader) partOfMetadata(number protowire.Number, value []byte) (part, bool) {
	switch number {
	case 1, 5, 8: // name, uid, creationTimestamp
		return nil, true
	case 12:
		prefix, _, _ := bytes.Cut(field(value, 1), []byte("/"))
		return nil, slices.Contains(r.prefixes, string(prefix))
	case 17:
		return partOfManager, isSubnetManager(string(field(value, 1)))
	}
	return nil, false
}

func partOfManager(number protowire.Number, _ []byte) (part, bool) {
	return nil, number == 1 || number == 4 || number == 8 // manager, time, subresource
}

func partOfSpec(number protowire.Number, _ []byte) (part, bool) {
	return nil, number == 1 || number == 7 // podCIDR, podCIDRs
}

func partOfStatus(number protowire.Number, value []byte) (part, bool) { // conditions
	return nil, number == 4 && string(field(value, 1)) == string(corev1.NodeNetworkUnavailable)
}

// lean appends a message without what is not kept; false: it can't be read.
func lean(out, data []byte, keep part) ([]byte, bool) {
	for len(data) > 0 {
		number, kind, tag := protowire.ConsumeTag(data)
		if tag < 0 {
			return out, false
		}
		n := protowire.ConsumeFieldValue(number, kind, data[tag:])
		if n < 0 {
			return out, false
		}
		var value []byte
		if kind == protowire.BytesType {
			value, _ = protowire.ConsumeBytes(data[tag:])
		}
		of, kept := keep(number, value)
		switch {
		case kept && of != nil && kind == protowire.BytesType:
			out = append(out, data[:tag]...)
			at, ok := len(out), false
			if out, ok = lean(out, value, of); !ok {
				return out, false
			}
			var size [binary.MaxVarintLen64]byte
			out = slices.Insert(out, at, protowire.AppendVarint(size[:0], uint64(len(out)-at))...)
		case kept:
			out = append(out, data[:tag+n]...)
		}
		data = data[tag+n:]
	}
	return out, true
}
