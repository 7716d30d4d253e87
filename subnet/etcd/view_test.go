package etcd

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlayd/overlayd/subnet"
)

func header(revision int64) *pb.ResponseHeader {
	return &pb.ResponseHeader{ClusterId: 7, RaftTerm: 2, Revision: revision}
}

func keyValue(name, value string, mod int64) *mvccpb.KeyValue {
	return &mvccpb.KeyValue{
		Key: []byte(prefix + "/" + name), Value: []byte(value), ModRevision: mod, CreateRevision: mod,
		Lease: 1,
	}
}

func put(kv *mvccpb.KeyValue) *mvccpb.Event { return &mvccpb.Event{Type: mvccpb.Event_PUT, Kv: kv} }

func del(name string, mod int64) *mvccpb.Event {
	return &mvccpb.Event{Type: mvccpb.Event_DELETE, Kv: &mvccpb.KeyValue{
		Key:         []byte(prefix + "/" + name),
		ModRevision: mod,
	}}
}

func names(v *view) (out []string) {
	for _, e := range v.table().Entries {
		out = append(out, fmt.Sprintf("%s@%d", e.Key, e.Revision))
	}
	return out
}

func want(t *testing.T, v *view, entries ...string) {
	t.Helper()
	if d := cmp.Diff(entries, names(v)); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

func TestView(t *testing.T) {
	v := newView(prefix, subnet.ParseEntry)
	a, b, c := "subnets/10.1.1.0-24", "subnets/10.1.2.0-24", "subnets/10.1.3.0-24"
	v.reset([]*mvccpb.KeyValue{
		keyValue("config", config, 2), keyValue("other", "", 3), keyValue(a, "x", 4),
		keyValue(c, "x", 5),
	}, header(6))
	want(t, v, "10.1.1.0-24@4", "10.1.3.0-24@5")
	handed := v.table()

	// The answer to a transaction is ahead of the watch.
	if !v.merge([]*mvccpb.KeyValue{keyValue(b, "x", 9)}, 10) || v.watched != 6 || v.Revision != 10 {
		t.Errorf("watched %d, complete %d", v.watched, v.Revision)
	}
	want(t, v, "10.1.1.0-24@4", "10.1.2.0-24@9", "10.1.3.0-24@5")

	// The watch comes behind: of b it tells nothing new, a it deletes.
	if v.events([]*mvccpb.Event{put(keyValue(b, "old", 7)), del(b, 8), put(keyValue(b, "x", 9))}, false) {
		t.Error("old news are no change")
	}
	if !v.events([]*mvccpb.Event{del(a, 10)}, false) || v.watched != 10 {
		t.Error("the deletion is news")
	}
	want(t, v, "10.1.2.0-24@9", "10.1.3.0-24@5")

	// An answer that the watch has overtaken doesn't bring back what was deleted.
	if v.merge([]*mvccpb.KeyValue{keyValue(a, "x", 9)}, 9) {
		t.Error("the answer was overtaken")
	}
	want(t, v, "10.1.2.0-24@9", "10.1.3.0-24@5")

	// Its own write, and then the watch's word of it.
	v.wrote(keyValue(a, "x", 12), []*subnet.Entry{{Key: "10.1.3.0-24"}}, 12)
	if v.Revision != 10 {
		t.Errorf("complete is %d: a write tells nothing of what others wrote", v.Revision)
	}
	if v.events([]*mvccpb.Event{del(c, 12), put(keyValue(a, "x", 12))}, false) {
		t.Error("the echo of its own write is no news")
	}
	want(t, v, "10.1.1.0-24@12", "10.1.2.0-24@9")

	// The same when the table was handed out in between. Of what is deleted nothing is kept then: that one may pass for
	// news.
	v.wrote(keyValue(a, "x", 14), []*subnet.Entry{{Key: "10.1.2.0-24"}}, 14)
	want(t, v, "10.1.1.0-24@14")
	if v.events([]*mvccpb.Event{put(keyValue(a, "x", 14))}, false) {
		t.Error("the echo of its own write is no news")
	}
	v.events([]*mvccpb.Event{del(b, 14)}, false)
	want(t, v, "10.1.1.0-24@14")

	if handed.Revision != 6 || len(handed.Entries) != 2 || handed.Entries[0].Revision != 4 {
		t.Errorf("a table that was handed out has changed: %+v", handed)
	}
}

func TestViewConfig(t *testing.T) {
	v := newView(prefix, subnet.ParseEntry)
	v.reset(nil, header(1))
	if !errors.Is(v.table().ConfigErr, subnet.ErrNoConfig) {
		t.Errorf("got %v", v.table().ConfigErr)
	}
	v.events([]*mvccpb.Event{put(keyValue("config", config, 2))}, false)
	if tb := v.table(); tb.ConfigErr != nil || tb.ConfigRevision != 2 || tb.Config == (subnet.Config{}) {
		t.Errorf("got %+v", tb)
	}
	v.events([]*mvccpb.Event{put(keyValue("config", "{", 3))}, false)
	if tb := v.table(); tb.ConfigErr == nil || tb.ConfigRevision != 3 || tb.Config != (subnet.Config{}) {
		t.Errorf("got %+v", tb)
	}
	v.events([]*mvccpb.Event{del("config", 4)}, false)
	if tb := v.table(); !errors.Is(tb.ConfigErr, subnet.ErrNoConfig) || tb.ConfigRevision != 0 {
		t.Errorf("got %+v", tb)
	}
}

// In another store equal revisions mean nothing: everything is decoded anew.
func TestViewOfAnotherStore(t *testing.T) {
	for _, other := range []*pb.ResponseHeader{
		{ClusterId: 8, RaftTerm: 2, Revision: 20},
		{ClusterId: 7, RaftTerm: 1, Revision: 20},
		{ClusterId: 7, RaftTerm: 2, Revision: 9},
	} {
		v := newView(prefix, subnet.ParseEntry)
		v.reset([]*mvccpb.KeyValue{keyValue("config", config, 2), keyValue("subnets/10.1.1.0-24", `{"PublicIP":"1.1.1.1"}`,
			3)}, header(10))
		now := []*mvccpb.KeyValue{
			keyValue("config", `{"Network":"10.9.0.0/16"}`, 2), keyValue("subnets/10.1.1.0-24", `{"PublicIP":"2.2.2.2"}`, 3),
		}
		v.reset(now, other)
		tb := v.table()
		if tb.Config.Pools.V4.Network.String() != "10.9.0.0/16" || tb.Entries[0].PublicIP.V4.String() != "2.2.2.2" {
			t.Errorf("%v: got %+v", other, tb)
		}
	}
}

// However events, answers and own writes are mixed: in the end it is what the store has.
func TestViewAgainstHistory(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 0))
		var history []*mvccpb.Event
		store := []map[string]*mvccpb.KeyValue{{}, {}} // by revision
		for rev := int64(2); rev < 60; rev++ {
			name := fmt.Sprintf("subnets/10.1.%d.0-24", r.IntN(6))
			next := map[string]*mvccpb.KeyValue{}
			for k, kv := range store[rev-1] {
				next[k] = kv
			}
			if _, ok := next[name]; ok && r.IntN(2) == 0 {
				delete(next, name)
				history = append(history, del(name, rev))
			} else {
				next[name] = keyValue(name, "x", rev)
				history = append(history, put(next[name]))
			}
			store = append(store, next)
		}
		v := newView(prefix, subnet.ParseEntry)
		v.reset(nil, header(1))
		for at := 0; at < len(history); {
			now := int64(at + 1 + r.IntN(len(history)-at+1)) // a revision that exists by now
			switch r.IntN(3) {
			case 0:
				var kvs []*mvccpb.KeyValue
				for _, kv := range store[now] {
					if kv.ModRevision > v.Revision {
						kvs = append(kvs, kv)
					}
				}
				v.merge(kvs, now)
			case 1:
				v.table()
			default:
				n := min(1+r.IntN(4), len(history)-at)
				v.events(history[at:at+n], false)
				at += n
			}
		}
		end := store[len(store)-1]
		if len(names(v)) != len(end) {
			t.Fatalf("seed %d: got %v, want %v", seed, names(v), end)
		}
		for _, e := range v.table().Entries {
			if kv := end["subnets/"+e.Key]; kv == nil || kv.ModRevision != e.Revision {
				t.Fatalf("seed %d: got %v, want %v", seed, names(v), end)
			}
		}
	}
}

func TestFacts(t *testing.T) {
	f := facts{position{7, 2, 10}, map[string]int64{"a": 4, "config": 0}}
	for _, tt := range []struct {
		name  string
		h     *pb.ResponseHeader
		found map[string]int64
		ok    bool
	}{
		{"as known", header(10), map[string]int64{"a": 4}, true},
		{"changed since", header(12), map[string]int64{"a": 11, "config": 12}, true},
		{"gone", header(12), nil, false},
		{"an older state", header(12), map[string]int64{"a": 3}, false},
		{"there although it was not", header(12), map[string]int64{"a": 4, "config": 5}, false},
		{"a lower revision", header(9), map[string]int64{"a": 4}, false},
		{"another cluster", &pb.ResponseHeader{ClusterId: 8, RaftTerm: 2, Revision: 10}, map[string]int64{"a": 4}, false},
		{"a lower term", &pb.ResponseHeader{ClusterId: 7, RaftTerm: 1, Revision: 10}, map[string]int64{"a": 4}, false},
	} {
		if err := f.check(tt.h, tt.found); (err == nil) != tt.ok {
			t.Errorf("%s: got %v", tt.name, err)
		}
	}
}

func TestTimes(t *testing.T) {
	between := func(what string, f func(rnd float64) time.Duration, low, high time.Duration) {
		t.Helper()
		if a, b, c := f(0), f(0.5), f(0.999999); a != low || b <= a || c <= b || c > high ||
			c < high-time.Millisecond-high/1000 {
			t.Errorf("%s: from %s by %s to %s, want %s to %s", what, a, b, c, low, high)
		}
	}
	for attempt, high := range map[int]time.Duration{
		0: backoffMin, 1: 2 * backoffMin, 3: 8 * backoffMin, 20: backoffMax,
		1000: backoffMax,
	} {
		between("backoff", func(r float64) time.Duration { return backoff(attempt, r) }, high/2, high)
	}
	between("around", func(r float64) time.Duration { return around(time.Minute, r) }, 45*time.Second, 75*time.Second)
	between("the watch in a crowd", func(r float64) time.Duration { return watchDelay(crowd, time.Second, r) },
		2*time.Second, 8*time.Second)
	between("the watch in a slow crowd", func(r float64) time.Duration { return watchDelay(5*crowd, time.Hour, r) },
		watchPutOff/4, watchPutOff)
	if d := watchDelay(crowd-1, time.Hour, 0.5); d != 0 {
		t.Errorf("without a crowd, the watch waits %s", d)
	}
	between("renewal", func(r float64) time.Duration { return renewal(24*time.Hour, r) }, 6*time.Hour, 12*time.Hour)
	now := time.Unix(1000, 0)
	first := func(left, ttl time.Duration) func(float64) time.Duration {
		expires := time.Time{}
		if left != 0 {
			expires = now.Add(left)
		}
		return func(r float64) time.Duration { return firstRenewal(expires, ttl, now, r).Sub(now) }
	}
	between("a long unknown TTL", first(0, 24*time.Hour), 0, 30*time.Second)
	between("a short unknown TTL", first(0, 20*time.Second), 0, 5*time.Second)
	between("a fresh lease", first(time.Hour, 2*time.Hour), 15*time.Minute, 30*time.Minute)
	if d := first(-time.Hour, time.Hour)(0.5); d != 0 {
		t.Errorf("an expired lease is renewed in %s", d)
	}
	between("the first race", func(r float64) time.Duration { return raceDelay(1, r) }, 0, raceDelayUnit)
	between("many races", func(r float64) time.Duration { return raceDelay(100, r) }, 0, 64*raceDelayUnit)
}

func TestReason(t *testing.T) {
	const unresolved = "cannot resolve the name in --etcd-endpoints: "
	dialing := func(text string) error {
		return status.Error(codes.Unavailable,
			`connection error: desc = "transport: Error while dialing: dial tcp: `+text+`"`)
	}
	o := Options{Endpoints: []string{"http://a:1"}, Username: "me", Prefix: "/p", RequestTimeout: time.Second}
	for in, want := range map[error]string{
		rpctypes.ErrGRPCAuthFailed:                           `wrong user name or password for user "me" (--etcd-username, --etcd-password, --etcd-password-file)`,
		rpctypes.ErrGRPCPermissionDenied:                     `permission denied for user "me": it needs to read and write /p/`,
		rpctypes.ErrGRPCNoLeader:                             "the etcd cluster has no leader",
		cancelled(rpctypes.ErrGRPCPermissionDenied.Error()):  `permission denied for user "me": it needs to read and write /p/`,
		errors.New("rpc error: code = Unavailable desc = x"): "x",
		// The DNS server refuses, or does not answer: the endpoint does neither.
		dialing("lookup a on 10.0.0.2:53: read udp 10.0.0.3:41414->10.0.0.2:53: read: connection refused"): unresolved +
			"a on 10.0.0.2:53: read udp 10.0.0.2:53: read: connection refused",
		dialing("lookup a on 10.0.0.2:53: read udp 10.0.0.3:41414->10.0.0.2:53: i/o timeout"): unresolved +
			"a on 10.0.0.2:53: read udp 10.0.0.2:53: i/o timeout",
		dialing("lookup a: no such host"):         unresolved + "a: no such host",
		dialing("10.0.0.2:1: connection refused"): "connection refused by http://a:1",
	} {
		if err := explain(in, o, "http://a:1"); err.Error() != "etcd: "+want {
			t.Errorf("got %q, want %q", err, want)
		}
	}
	if !loginEnded(cancelled(rpctypes.ErrGRPCInvalidAuthToken.Error())) {
		t.Error("a watch that ends for an invalid token needs a new login")
	}
}

// What was removed while nobody listened is no sign of another history; what changed before we stopped listening is.
func TestEpoch(t *testing.T) {
	a, b := "subnets/10.1.1.0-24", "subnets/10.1.2.0-24"
	for name, tt := range map[string]struct {
		now   []*mvccpb.KeyValue
		at    int64
		epoch int
	}{
		"nothing new": {[]*mvccpb.KeyValue{
			keyValue("config", config, 2), keyValue(a, "x", 4),
			keyValue(b, "x", 5),
		}, 9, 0},
		"a key was removed": {[]*mvccpb.KeyValue{keyValue("config", config, 2), keyValue(a, "x", 4)}, 10, 0},
		"all was removed":   {nil, 12, 0},
		"a key has changed": {[]*mvccpb.KeyValue{
			keyValue("config", config, 2), keyValue(a, "x", 11),
			keyValue(b, "x", 5),
		}, 11, 0},
		"emptied":                       {nil, 1, 1},
		"emptied, and has grown":        {[]*mvccpb.KeyValue{keyValue("config", config, 3), keyValue(a, "x", 40)}, 40, 1},
		"emptied, and another has come": {[]*mvccpb.KeyValue{keyValue("subnets/10.1.9.0-24", "x", 2)}, 40, 1},
		"restored from before a's change": {[]*mvccpb.KeyValue{
			keyValue("config", config, 2), keyValue(a, "x", 3),
			keyValue(b, "x", 5),
		}, 40, 1},
		"restored, and something has grown": {[]*mvccpb.KeyValue{
			keyValue("config", config, 2), keyValue(a, "x", 4),
			keyValue(b, "x", 8),
		}, 40, 1},
	} {
		t.Run(name, func(t *testing.T) {
			v := newView(prefix, subnet.ParseEntry)
			v.reset([]*mvccpb.KeyValue{keyValue("config", config, 2), keyValue(a, "x", 4), keyValue(b, "x", 5)}, header(9))
			v.reset(tt.now, header(tt.at))
			if got := v.table().Epoch; got != tt.epoch {
				t.Errorf("epoch %d, want %d", got, tt.epoch)
			}
		})
	}
}
