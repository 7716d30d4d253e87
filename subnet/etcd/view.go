package etcd

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/overlayd/overlayd/subnet"
)

// keys are the names of what we read and write in the store.
type keys struct {
	all     string // PREFIX/: what is listed and watched
	config  string
	subnets string // PREFIX/subnets/

	// unpaired is written along with a dual-stack lease whose two subnets have different indices in their pools. Such a
	// lease is not found by its IPv6 half (keys begin with the IPv4 one), so a claim of a pair is guarded on this key
	// instead.
	unpaired string
}

func newKeys(prefix string) keys {
	return keys{prefix + "/", prefix + "/config", prefix + "/subnets/", prefix + "/unpaired"}
}

// subnet is the name of a lease's key without the prefix.
func (k keys) subnet(key []byte) (name []byte, ok bool) {
	n := len(k.subnets)
	if len(key) <= n || string(key[:n]) != k.subnets {
		return nil, false
	}
	return key[n:], true
}

// trim forgets of a value what no lease has, so that it takes up no memory.
func (k keys) trim(kv *mvccpb.KeyValue) {
	_, ok := k.subnet(kv.Key)
	switch n := subnet.MaxValueSize + 1; {
	case ok && len(kv.Value) > n:
		kv.Value = bytes.Clone(kv.Value[:n])
	case !ok && string(kv.Key) != k.config:
		kv.Value = nil
	}
}

// view is what this node knows of the store. It does no I/O.
//
// What the watch tells is complete and in order. What the answer to a transaction tells is newer, but without the
// deletions: therefore two revisions, that of the table and the lower one up to which all is known. Every key carries
// its own, and the newer one wins, so that it does not matter which comes first.
type view struct {
	keys  keys
	parse parser
	position
	subnet.Table      // its entries are never changed, only replaced, since they are handed out
	shared       bool // the list of them as well
}

// position is the state of the store up to which all is known.
type position struct {
	cluster, term uint64
	watched       int64 // the revision
}

// parser is Options.Parse.
type parser func(key string, value []byte, revision, created, leaseID int64) *subnet.Entry

func newView(prefix string, parse parser) *view {
	return &view{keys: newKeys(prefix), parse: parse}
}

// table is what is known as a value.
func (v *view) table() subnet.Table {
	v.shared = true
	return v.Table
}

// reset takes a whole listing. Entries that didn't change since are not decoded again, unless the store is not the one
// from before: then equal revisions mean nothing.
func (v *view) reset(kvs []*mvccpb.KeyValue, h *pb.ResponseHeader) {
	known := v.table()
	if v.otherStore(h) != nil || v.otherHistory(kvs) {
		known.Entries, v.ConfigRevision = nil, 0
		v.Epoch++
	}
	v.Entries, v.shared = make([]*subnet.Entry, 0, len(kvs)), false
	var config *mvccpb.KeyValue
	for _, kv := range kvs {
		if string(kv.Key) == v.keys.config {
			config = kv
		}
		if name, ok := v.keys.subnet(kv.Key); ok {
			e := known.Find(string(name))
			if e == nil || e.Revision != kv.ModRevision || e.Created != kv.CreateRevision || e.LeaseID != kv.Lease {
				e = v.decode(string(name), kv)
			}
			v.Entries = append(v.Entries, e)
		}
	}
	switch {
	case config == nil:
		v.noConfig()
	case config.ModRevision != v.ConfigRevision:
		v.setConfig(config)
	}
	v.position = position{h.GetClusterId(), h.GetRaftTerm(), h.GetRevision()}
	v.Revision = v.watched
}

// otherStore says why an answer can't come from the store at this position: that was emptied, or restored.
func (p position) otherStore(h *pb.ResponseHeader) error {
	switch {
	case p.cluster == 0:
		return nil // it is the first answer
	case h.GetClusterId() != p.cluster:
		return fmt.Errorf("different etcd cluster (%x, was %x)", h.GetClusterId(), p.cluster)
	case h.GetRevision() < p.watched:
		return fmt.Errorf("its revision went back from %d to %d", p.watched, h.GetRevision())
	case h.GetRaftTerm() < p.term:
		return fmt.Errorf("its raft term went back from %d to %d", p.term, h.GetRaftTerm())
	}
	return nil
}

// otherHistory reports whether a listing holds a key that was last changed before the watch ended, and not as the watch
// told: then the store has lost what we knew, and has grown again. (That a key is gone proves nothing: it may have been
// removed since.)
func (v *view) otherHistory(kvs []*mvccpb.KeyValue) bool {
	return v.cluster != 0 && slices.ContainsFunc(kvs, func(kv *mvccpb.KeyValue) bool {
		if kv.ModRevision > v.watched {
			return false
		}
		if string(kv.Key) == v.keys.config {
			return kv.ModRevision != v.ConfigRevision
		}
		name, ok := v.keys.subnet(kv.Key)
		return ok && kv.ModRevision != v.revisionOf(string(name))
	})
}

// decode makes an entry that shares no memory with the store's message, which would stay as long as the entry.
func (v *view) decode(name string, kv *mvccpb.KeyValue) *subnet.Entry {
	return v.parse(name, kv.Value, kv.ModRevision, kv.CreateRevision, kv.Lease)
}

// events takes what the watch tells, and reports whether anything is new in it. Where more is to come in another
// message, that may still be of the last revision.
func (v *view) events(evs []*mvccpb.Event, more bool) (changed bool) {
	for _, ev := range evs {
		changed = v.set(ev.Kv, ev.Type == mvccpb.Event_DELETE) || changed
		v.progress(ev.Kv.ModRevision - 1)
	}
	if n := len(evs); n > 0 && !more {
		v.progress(evs[n-1].Kv.ModRevision)
	}
	return changed
}

// progress takes the store's confirmation that there was nothing else up to a revision.
func (v *view) progress(revision int64) {
	v.watched = max(v.watched, revision)
	v.Revision = max(v.Revision, v.watched)
}

// merge takes all puts since v.Revision, read at a later revision. An answer that the watch has overtaken is out of
// date, and might bring back what was deleted since.
func (v *view) merge(kvs []*mvccpb.KeyValue, revision int64) (changed bool) {
	if revision <= v.watched {
		return false
	}
	for _, kv := range kvs {
		changed = v.set(kv, false) || changed
	}
	v.Revision = max(v.Revision, revision)
	return changed
}

// wrote takes what this node has just written itself, which tells nothing of what others wrote meanwhile.
func (v *view) wrote(put *mvccpb.KeyValue, deleted []*subnet.Entry, revision int64) {
	if revision <= v.watched {
		return
	}
	v.set(put, false)
	for _, e := range deleted {
		v.set(&mvccpb.KeyValue{Key: []byte(v.keys.subnets + e.Key), ModRevision: revision}, true)
	}
}

// set takes one change, and reports whether it was not known.
func (v *view) set(kv *mvccpb.KeyValue, deleted bool) bool {
	if string(kv.Key) == v.keys.config {
		switch {
		case kv.ModRevision <= v.ConfigRevision:
			return false
		case deleted:
			v.noConfig()
		default:
			v.setConfig(kv)
		}
		return true
	}
	key, ok := v.keys.subnet(kv.Key)
	name := string(key)
	if !ok || kv.ModRevision <= v.revisionOf(name) {
		return false
	}
	if v.shared {
		room := make([]*subnet.Entry, 0, len(v.Entries)+16) // for those to come
		v.Entries, v.shared = append(room, v.Entries...), false
	}
	i, found := slices.BinarySearchFunc(v.Entries, name, func(e *subnet.Entry, k string) int {
		return strings.Compare(e.Key, k)
	})
	switch {
	case found && deleted:
		v.Entries = slices.Delete(v.Entries, i, i+1)
	case found:
		v.Entries[i] = v.decode(name, kv)
	case !deleted:
		v.Entries = slices.Insert(v.Entries, i, v.decode(name, kv))
	}
	return found || !deleted
}

// revisionOf is the revision of the last change to an entry that the view has; 0 if there is none.
func (v *view) revisionOf(name string) int64 {
	if e := v.Find(name); e != nil {
		return e.Revision
	}
	return 0
}

func (v *view) setConfig(kv *mvccpb.KeyValue) {
	v.ConfigRevision, v.ConfigJSON = kv.ModRevision, string(kv.Value)
	v.Config, v.ConfigErr = subnet.ParseConfig(kv.Value)
	if v.ConfigErr != nil {
		v.Config, v.ConfigErr = subnet.Config{}, fmt.Errorf("%s: %w", v.keys.config, v.ConfigErr)
	}
}

func (v *view) noConfig() {
	v.Config, v.ConfigJSON, v.ConfigRevision = subnet.Config{}, "", 0
	v.ConfigErr = fmt.Errorf("%w: the key %s does not exist", subnet.ErrNoConfig, v.keys.config)
}
