package etcd

import (
	"cmp"
	"fmt"
	"maps"
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

	// unpaired is written along with a dual-stack lease whose two subnets have different indices in their pools. Such a lease is
	// not found by its IPv6 half (keys begin with the IPv4 one), so that those who claim a pair guard on this key instead.
	unpaired string
}

func newKeys(prefix string) keys {
	return keys{prefix + "/", prefix + "/config", prefix + "/subnets/", prefix + "/unpaired"}
}

// view is what this node knows of the store. It does no I/O and has no lock.
//
// What the watch tells is complete and in order. What the answer to a transaction tells is newer, but without the deletions:
// therefore two revisions. Every key carries its own, and the newer one wins, so that it does not matter which comes first.
type view struct {
	keys  keys
	parse parser

	cluster, term uint64
	watched       int64 // everything up to here is in it
	complete      int64 // every put up to here is in it; ≥ watched

	config         subnet.Config
	configJSON     string
	configErr      error
	configRevision int64

	epoch int // how often it was another store

	entries []*subnet.Entry   // by key; never changed, only replaced, since it was handed out
	pending map[string]change // not yet in entries
}

// change is a new entry, or the deletion of one.
type change struct {
	entry    *subnet.Entry
	revision int64
	deleted  bool
}

// parser is Options.Parse.
type parser func(key string, value []byte, revision, created, leaseID int64) *subnet.Entry

func newView(prefix string, parse parser) *view {
	return &view{keys: newKeys(prefix), parse: parse, pending: map[string]change{}}
}

// table is what is known as a value.
func (v *view) table() subnet.Table {
	v.fold()
	return subnet.Table{
		Revision: v.complete, Epoch: v.epoch, Entries: v.entries,
		Config: v.config, ConfigJSON: v.configJSON, ConfigErr: v.configErr, ConfigRevision: v.configRevision,
	}
}

// reset takes a whole listing. Entries that didn't change since are not decoded again, unless the store is not the one from
// before: then equal revisions mean nothing.
func (v *view) reset(kvs []*mvccpb.KeyValue, h *pb.ResponseHeader) {
	v.fold()
	known := cursor{v.entries}
	if v.otherStore(h) != nil || v.otherHistory(kvs) {
		known, v.configRevision = cursor{}, 0
		v.epoch++
	}
	v.pending = map[string]change{}
	entries := make([]*subnet.Entry, 0, len(kvs))
	var config *mvccpb.KeyValue
	for _, kv := range kvs {
		if string(kv.Key) == v.keys.config {
			config = kv
		}
		if key, ok := v.keys.subnet(kv.Key); ok {
			e := known.find(key)
			if e == nil || e.Revision != kv.ModRevision || e.Created != kv.CreateRevision || e.LeaseID != kv.Lease {
				e = v.decode(string(key), kv)
			}
			entries = append(entries, e)
		}
	}
	v.entries = entries
	switch {
	case config == nil:
		v.noConfig()
	case config.ModRevision != v.configRevision:
		v.setConfig(config)
	}
	v.cluster, v.term, v.watched, v.complete = h.GetClusterId(), h.GetRaftTerm(), h.GetRevision(), h.GetRevision()
}

// otherStore says why an answer can't come from the store that the view is of: that was emptied, or restored from a backup.
func (v *view) otherStore(h *pb.ResponseHeader) error {
	switch {
	case v.cluster == 0:
		return nil // it is the first answer
	case h.GetClusterId() != v.cluster:
		return fmt.Errorf("different etcd cluster (%x, was %x)", h.GetClusterId(), v.cluster)
	case h.GetRevision() < v.watched:
		return fmt.Errorf("its revision went back from %[2]d to %[1]d", h.GetRevision(), v.watched)
	case h.GetRaftTerm() < v.term:
		return fmt.Errorf("its raft term went back from %[2]d to %[1]d", h.GetRaftTerm(), v.term)
	}
	return nil
}

// otherHistory reports whether a listing holds a key that was last changed before we stopped hearing of changes, and not as we
// heard it: then the store has lost what we knew, and has grown anew. (That a key is gone proves nothing: it may have been removed
// since.)
func (v *view) otherHistory(kvs []*mvccpb.KeyValue) bool {
	known := cursor{v.entries}
	return v.cluster != 0 && slices.ContainsFunc(kvs, func(kv *mvccpb.KeyValue) bool {
		if kv.ModRevision > v.watched {
			return false
		}
		if string(kv.Key) == v.keys.config {
			return kv.ModRevision != v.configRevision
		}
		key, ok := v.keys.subnet(kv.Key)
		if !ok {
			return false
		}
		e := known.find(key)
		return e == nil || e.Revision != kv.ModRevision
	})
}

// cursor finds the entries of a listing, which comes in the order of its keys as they do, in one pass over both.
type cursor struct{ rest []*subnet.Entry }

// find is for keys in ascending order.
func (c *cursor) find(key []byte) *subnet.Entry {
	for len(c.rest) > 0 && c.rest[0].Key < string(key) {
		c.rest = c.rest[1:]
	}
	if len(c.rest) > 0 && c.rest[0].Key == string(key) {
		return c.rest[0]
	}
	return nil
}

// decode makes an entry that shares no memory with the store's message, which would stay as long as the entry.
func (v *view) decode(key string, kv *mvccpb.KeyValue) *subnet.Entry {
	return v.parse(key, kv.Value, kv.ModRevision, kv.CreateRevision, kv.Lease)
}

// events takes what the watch tells, and reports whether anything is new in it.
func (v *view) events(evs []*mvccpb.Event) (changed bool) {
	for _, ev := range evs {
		if ev.Type == mvccpb.Event_DELETE {
			changed = v.delete(ev.Kv) || changed
		} else {
			changed = v.put(ev.Kv) || changed
		}
		v.watched = max(v.watched, ev.Kv.ModRevision)
	}
	v.complete = max(v.complete, v.watched)
	return changed
}

// progress takes the store's word that there was nothing up to a revision.
func (v *view) progress(revision int64) {
	v.watched = max(v.watched, revision)
	v.complete = max(v.complete, v.watched)
}

// merge takes all puts since v.complete, read at a later revision. An answer that the watch has overtaken is old news, and might
// bring back what was deleted since.
func (v *view) merge(kvs []*mvccpb.KeyValue, revision int64) (changed bool) {
	if revision <= v.watched {
		return false
	}
	for _, kv := range kvs {
		changed = v.put(kv) || changed
	}
	v.complete = max(v.complete, revision)
	return changed
}

// wrote takes what this node has just written itself, which tells nothing of what others wrote meanwhile.
func (v *view) wrote(put *mvccpb.KeyValue, deleted []string, revision int64) {
	if revision <= v.watched {
		return
	}
	v.put(put)
	for _, key := range deleted {
		v.pending[key] = change{revision: revision, deleted: true}
	}
}

func (v *view) put(kv *mvccpb.KeyValue) bool {
	if string(kv.Key) == v.keys.config {
		if kv.ModRevision <= v.configRevision {
			return false
		}
		v.setConfig(kv)
		return true
	}
	name, ok := v.keys.subnet(kv.Key)
	key := string(name)
	if !ok || kv.ModRevision <= v.revisionOf(key) {
		return false
	}
	v.pending[key] = change{entry: v.decode(key, kv), revision: kv.ModRevision}
	return true
}

func (v *view) delete(kv *mvccpb.KeyValue) bool {
	if string(kv.Key) == v.keys.config {
		if kv.ModRevision <= v.configRevision {
			return false
		}
		v.noConfig()
		return true
	}
	name, ok := v.keys.subnet(kv.Key)
	key := string(name)
	if !ok || kv.ModRevision <= v.revisionOf(key) {
		return false
	}
	v.pending[key] = change{revision: kv.ModRevision, deleted: true}
	return true
}

// revisionOf is the revision of the last change to an entry that the view has; 0 where it has none.
func (v *view) revisionOf(key string) int64 {
	if c, ok := v.pending[key]; ok {
		return c.revision
	}
	if i, ok := find(v.entries, key); ok {
		return v.entries[i].Revision
	}
	return 0
}

func (v *view) setConfig(kv *mvccpb.KeyValue) {
	v.configRevision, v.configJSON = kv.ModRevision, string(kv.Value)
	v.config, v.configErr = subnet.ParseConfig(kv.Value)
	if v.configErr != nil {
		v.config, v.configErr = subnet.Config{}, fmt.Errorf("%s: %w", v.keys.config, v.configErr)
	}
}

func (v *view) noConfig() {
	v.config, v.configJSON, v.configRevision = subnet.Config{}, "", 0
	v.configErr = fmt.Errorf("%w: the key %s does not exist", subnet.ErrNoConfig, v.keys.config)
}

// fold brings the pending changes into the entries, all of them in one pass.
func (v *view) fold() {
	if len(v.pending) == 0 {
		return
	}
	names := slices.Sorted(maps.Keys(v.pending))
	out := make([]*subnet.Entry, 0, len(v.entries)+len(names))
	at := 0
	for _, name := range names {
		i, found := find(v.entries[at:], name)
		out = append(out, v.entries[at:at+i]...)
		at += i
		if found {
			at++
		}
		if c := v.pending[name]; !c.deleted {
			out = append(out, c.entry)
		}
	}
	v.entries = append(out, v.entries[at:]...)
	clear(v.pending)
}

// entry finds an entry by its key.
func (v *view) entry(key string) (*subnet.Entry, bool) {
	v.fold()
	if i, ok := find(v.entries, key); ok {
		return v.entries[i], true
	}
	return nil, false
}

// newest is the key that changed last.
func (v *view) newest() string {
	v.fold()
	if len(v.entries) == 0 {
		return ""
	}
	return slices.MaxFunc(v.entries, func(a, b *subnet.Entry) int { return cmp.Compare(a.Revision, b.Revision) }).Key
}

func find(es []*subnet.Entry, key string) (int, bool) {
	return slices.BinarySearchFunc(es, key, func(e *subnet.Entry, k string) int { return strings.Compare(e.Key, k) })
}

// subnet is the name of a lease's key without the prefix.
func (k keys) subnet(key []byte) ([]byte, bool) {
	n := len(k.subnets)
	if len(key) <= n || string(key[:n]) != k.subnets {
		return nil, false
	}
	return key[n:], true
}
