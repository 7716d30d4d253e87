package kube

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
)

func testState(claim subnet.Claim, nodes ...*corev1.Node) *state {
	o := DefaultOptions()
	o.Node = "node-a"
	s := newState(o, zap.NewNop())
	s.setConfig(&corev1.ConfigMap{Data: map[string]string{configKey: network}}, 1)
	s.setClaim(claim)
	s.listed(nodes, 100, time.Time{})
	return s
}

// nodeOf is a Node that announces what a machine would.
func nodeOf(name string, i int, podCIDRs ...string) *corev1.Node {
	a, _ := announce(claimOf(name, i).Attrs)
	n := bareNode(name, podCIDRs...)
	n.Annotations = a.annotations("overlayd.io")
	return n
}

func bareNode(name string, podCIDRs ...string) *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("uid-" + name), ResourceVersion: "7"},
		Spec:       corev1.NodeSpec{PodCIDRs: podCIDRs},
	}
}

// An object that can't be used is an entry that says why, and holds back no other.
func TestOddNodes(t *testing.T) {
	for _, tt := range []struct {
		key, value, cidrs, want string
	}{
		{"overlayd.io/public-ip", "192.0.2.300", "10.244.1.0/24", "PublicIP"},
		{"overlayd.io/backend-data", "{", "10.244.1.0/24", "the annotation backend-data is not JSON"},
		{"overlayd.io/backend-data", `[1]`, "10.244.1.0/24", "BackendData"},
		{"overlayd.io/backend-data", `{"VtepMAC": "x"}`, "10.244.1.0/24", "VtepMAC"},
		{"other", "x", "10.244.1.7/24", "its podCIDRs are"},
		{"other", "x", "10.244.1.0/24,10.244.2.0/24", "its podCIDRs are"},
		{"other", "x", "nonsense", "its podCIDRs are"},
	} {
		odd := nodeOf("node-odd", 9, strings.Split(tt.cidrs, ",")...)
		odd.Annotations[tt.key] = tt.value
		s := testState(claimOf("node-a", 1), nodeOf("node-a", 1, "10.244.0.0/24"), odd, nodeOf("node-b", 2, "10.244.7.0/24"))
		snap := s.snapshot()
		if !held(snap) {
			t.Errorf("%s=%s, %s: this node holds %+v, %v", tt.key, tt.value, tt.cidrs, snap.Lease, snap.ClaimErr)
		}
		if e := snap.Table.Find("10.244.7.0-24"); e == nil || e.Err != nil {
			t.Errorf("%s=%s, %s: the other peer is %+v", tt.key, tt.value, tt.cidrs, e)
		}
		var found *subnet.Entry
		for _, e := range snap.Table.Entries {
			if e.NodeName == "node-odd" {
				found = e
			}
		}
		if found == nil || found.Err == nil || !strings.Contains(found.Err.Error(), tt.want) {
			t.Errorf("%s=%s, %s: the entry is %+v, want %q", tt.key, tt.value, tt.cidrs, found, tt.want)
		}
		peers, rejected := snap.Table.Peers(snap.Table.Config, snap.Lease)
		if len(peers) != 1 || len(rejected) != 1 || rejected[0].Node != "node-odd" {
			t.Errorf("%s=%s, %s: peers %+v, rejected %+v", tt.key, tt.value, tt.cidrs, peers, rejected)
		}
	}
}

// A heartbeat is no change; what peers must know is. A Node that was made again under its name has other subnets.
func TestChanges(t *testing.T) {
	s := testState(claimOf("node-a", 1), nodeOf("node-a", 1, "10.244.0.0/24"), nodeOf("node-b", 2, "10.244.1.0/24"))
	s.snapshot()
	beat := nodeOf("node-b", 2, "10.244.1.0/24")
	beat.ResourceVersion, beat.Labels = "200", map[string]string{"a": "b"}
	beat.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionFalse}}
	beat.ManagedFields = []metav1.ManagedFieldsEntry{
		{Manager: "kubelet", Time: &metav1.Time{Time: time.Now()}},
		{Manager: fieldManager, Subresource: "status", Time: &metav1.Time{Time: time.Now()}}, // its condition
	}
	if s.put(beat); s.changed {
		t.Error("a heartbeat is a change")
	}
	first := s.snapshot()
	kept := first.Table.Find("10.244.0.0-24")
	if first.Table.Revision != 200 {
		t.Errorf("the revision is %d", first.Table.Revision)
	}
	again := nodeOf("node-b", 2, "10.244.5.0/24")
	again.UID = "uid-new"
	if s.put(again); !s.changed {
		t.Error("other podCIDRs are no change")
	}
	next := s.snapshot().Table
	if next.Find("10.244.1.0-24") != nil || next.Find("10.244.5.0-24") == nil || next.Find("10.244.0.0-24") != kept {
		t.Errorf("the table is %+v", next.Entries)
	}
	if first.Table.Find("10.244.1.0-24") == nil || len(first.Table.Entries) != 2 {
		t.Error("a table that was handed out has changed")
	}
	s.drop("node-b", time.Time{})
	s.drop("node-b", time.Time{}) // told twice
	if left := s.snapshot().Table.Entries; len(left) != 1 || left[0] != kept {
		t.Errorf("the table is %+v", left)
	}
}

// The config in use is that of the subnets that the Node has, whatever length the ConfigMap says.
func TestSubnetsOfAnyLength(t *testing.T) {
	for _, cidr := range []string{"10.244.2.0/23", "10.244.2.64/26", "10.244.0.0/16"} {
		s := testState(claimOf("node-a", 1), nodeOf("node-a", 1, cidr))
		if snap := s.snapshot(); !held(snap) || !snap.Table.Config.Fits(snap.Lease.Subnets) {
			t.Errorf("%s: %+v, %+v, %v", cidr, snap.Table.Config, snap.Lease, snap.ClaimErr)
		}
	}
}

// Entries have subnets in the families of the network, as leases have them, whenever the config arrives or changes. One
// that stays the same is the same pointer.
func TestFamilies(t *testing.T) {
	one := &corev1.ConfigMap{Data: map[string]string{configKey: network}}
	both := &corev1.ConfigMap{Data: map[string]string{configKey: `{"Network": "10.244.0.0/16", "EnableIPv6": true,
		"IPv6Network": "fd00:10:244::/48"}`}}
	nodes := []*corev1.Node{
		nodeOf("node-a", 1, "10.244.0.0/24", "fd00:10:244::/64"), nodeOf("node-b", 2, "10.244.1.0/24", "fd00:10:244:1::/64"),
		nodeOf("node-c", 3, "10.244.2.0/24"), nodeOf("node-d", 4, "fd00:10:244:3::/64"), nodeOf("node-e", 5, "nonsense"),
	}
	s := testState(claimOf("node-a", 1))
	s.config = configMap{}
	s.valid = subnet.Config{}
	s.listed(nodes, 100, time.Time{})
	look := func(keys string) subnet.Snapshot {
		t.Helper()
		snap := s.snapshot()
		var got []string
		for _, e := range snap.Table.Entries {
			got = append(got, e.Key)
		}
		if strings.Join(got, " ") != keys {
			t.Errorf("the entries are %q, want %q", got, keys)
		}
		return snap
	}
	const cut = " 10.244.0.0-24 10.244.1.0-24 10.244.2.0-24 fd00:10:244:3::-64"
	s.setConfig(one, 1)
	snap := look(cut)
	peers, rejected := snap.Table.Peers(snap.Table.Config, snap.Lease)
	if !held(snap) || len(peers) != 2 || len(rejected) != 2 { // node-d and node-e
		t.Errorf("the lease is %+v, %v; peers %+v; rejected %+v", snap.Lease, snap.ClaimErr, peers, rejected)
	}
	s.setConfig(&corev1.ConfigMap{Data: map[string]string{configKey: "{"}}, 2)
	look(cut)
	s.setConfig(both, 3)
	s.put(nodeOf("node-f", 6, "10.244.9.0/24", "fd00:10:244:9::/64"))
	snap2 := look(" 10.244.0.0-24&fd00:10:244::-64 10.244.1.0-24&fd00:10:244:1::-64 10.244.2.0-24" +
		" 10.244.9.0-24&fd00:10:244:9::-64 fd00:10:244:3::-64")
	if same := "10.244.2.0-24"; snap.Table.Find(same) != snap2.Table.Find(same) || len(snap.Table.Entries) != 5 {
		t.Error("an entry that stayed the same is another one, or a table that was handed out has changed")
	}
	s.drop("node-f", time.Time{})
	s.setConfig(one, 4)
	look(cut)
}

// A config that this node can't use changes neither its lease nor the peers' entries, whatever families it has.
func TestConfigThatCannotBeUsed(t *testing.T) {
	config := func(text string) *corev1.ConfigMap {
		return &corev1.ConfigMap{Data: map[string]string{configKey: text}}
	}
	const both = `{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48"}`
	const others = `{"Network": "10.250.0.0/16"}`
	own := nodeOf("node-a", 1, "10.244.0.0/24", "fd00:10:244::/64")
	peer := nodeOf("node-b", 2, "10.244.1.0/24", "fd00:10:244:1::/64")
	s := testState(claimOf("node-a", 1), own, peer)
	s.setConfig(config(both), 2)
	first := s.snapshot()
	if !held(first) || !first.Lease.Subnets.V6.IsValid() {
		t.Fatalf("this node holds %+v, %v", first.Lease, first.ClaimErr)
	}
	for _, c := range []*corev1.ConfigMap{
		config(`{`), config(others), config(`{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd01::/48"}`), nil,
	} {
		s.setConfig(c, 3)
		snap := s.snapshot()
		if snap.Table.ConfigErr == nil || snap.Lease != first.Lease || !slices.Equal(snap.Table.Entries, first.Table.Entries) {
			t.Errorf("%+v: %v; this node holds %+v; entries %+v", c, snap.Table.ConfigErr, snap.Lease, snap.Table.Entries)
		}
	}
	s.setConfig(config(others), 4)
	moved := bareNode("node-a", "10.250.0.0/24")
	moved.Annotations = own.Annotations
	s.put(moved) // a Node that was made again, with subnets that the config is for
	if snap := s.snapshot(); !held(snap) || snap.Lease.Subnets.V4.String() != "10.250.0.0/24" ||
		snap.Table.Find("10.244.1.0-24") == nil {
		t.Errorf("this node holds %+v, %v; entries %+v", snap.Lease, snap.ClaimErr, snap.Table.Entries)
	}

	s = newState(s.opts, zap.NewNop())
	s.setConfig(config(others), 1)
	s.setClaim(claimOf("node-a", 1))
	s.listed([]*corev1.Node{own, peer}, 101, time.Time{})
	if snap := s.snapshot(); snap.Lease.Subnets != (addr.Per[netip.Prefix]{}) || !snap.Held() ||
		snap.Table.Find("10.244.1.0-24&fd00:10:244:1::-64") == nil {
		t.Errorf("after a start: this node holds %+v; entries %+v", snap.Lease, snap.Table.Entries)
	}
}

// Two Nodes with one podCIDR are two entries: which counts is not decided here.
func TestOneSubnetTwice(t *testing.T) {
	s := testState(claimOf("node-a", 1), nodeOf("node-b", 2, "10.244.1.0/24"), nodeOf("node-c", 3, "10.244.1.0/24"))
	if es := s.snapshot().Table.Entries; len(es) != 2 || es[0].NodeName != "node-b" || es[1].NodeName != "node-c" {
		t.Errorf("the entries are %+v", es)
	}
	s.drop("node-b", time.Time{})
	if es := s.snapshot().Table.Entries; len(es) != 1 || es[0].NodeName != "node-c" {
		t.Errorf("the entries are %+v", es)
	}
}

// A node whose podCIDR another Node has, too, says so. Peers go by the Node that was made first, and by its name where
// both were made in one second.
func TestOwnSubnetTwice(t *testing.T) {
	for i, tt := range []struct {
		created, other int64
		name, podCIDR  string
		announces      bool
		conflict       bool
		refused        bool
	}{
		{2000, 1000, "node-b", "10.244.0.0/24", true, true, true},
		{1000, 2000, "node-b", "10.244.0.0/24", true, true, false},
		{1000, 1000, "node-b", "10.244.0.0/24", true, true, false},
		{1000, 1000, "node", "10.244.0.0/24", true, true, true},
		{2000, 1000, "node-b", "10.244.0.0/23", true, true, true},
		{2000, 1000, "node-b", "10.244.1.0/24", true, false, false},
		{2000, 1000, "node-b", "10.244.0.0/24", false, false, false}, // nothing is sent there
	} {
		own, other := nodeOf("node-a", 1, "10.244.0.0/24"), nodeOf(tt.name, 2, tt.podCIDR)
		own.CreationTimestamp.Time, other.CreationTimestamp.Time = time.Unix(tt.created, 0), time.Unix(tt.other, 0)
		if !tt.announces {
			other.Annotations = nil
		}
		snap := testState(claimOf("node-a", 1), own, other).snapshot()
		var conflict *subnet.ConflictError
		if is := errors.As(snap.ClaimErr, &conflict); is != tt.conflict || is && conflict.Refused != tt.refused || !snap.Held() {
			t.Errorf("%d: held %t, %v", i, snap.Held(), snap.ClaimErr)
		}
	}
}

// A Node that conflicts with the own one is found when it appears, and when this node claims what it has; it is forgotten
// once it is gone, or says something else.
func TestConflictsComeAndGo(t *testing.T) {
	s := testState(claimOf("node-a", 1), nodeOf("node-a", 1, "10.244.0.0/24"), nodeOf("node-b", 2, "10.244.1.0/24"))
	b, twin := nodeOf("node-b", 2, "10.244.1.0/24"), nodeOf("node-b", 2, "10.244.1.0/24")
	twin.Annotations["overlayd.io/public-ip"] = "192.0.2.1"
	moved := claimOf("node-a", 1)
	moved.PublicIP.V4 = netip.MustParseAddr("192.0.2.2")
	own := nodeOf("node-a", 1, "10.244.0.0/24")
	own.Annotations["overlayd.io/public-ip"] = "192.0.2.2"
	overlaps := nodeOf("node-b", 2, "10.244.0.0/25")
	for i, step := range []struct {
		change func()
		want   string
	}{
		{func() { s.put(twin) }, "192.0.2.1"},
		{func() { s.put(b) }, ""},
		{func() { s.put(overlaps) }, "10.244.0.0-24"},
		{func() { s.drop("node-b", time.Time{}) }, ""},
		{func() { s.put(twin); s.put(b) }, ""},
		{func() { s.put(nodeOf("node-c", 3, "10.244.3.0/24")) }, ""},
		{func() { s.put(overlaps); s.drop("node-b", time.Time{}) }, ""},
		{func() { s.put(b); s.setClaim(moved); s.put(own) }, "192.0.2.2"},
		{func() { s.setClaim(claimOf("node-a", 1)); s.put(nodeOf("node-a", 1, "10.244.0.0/24")) }, ""},
	} {
		step.change()
		snap := s.snapshot()
		if want := step.want; (snap.ClaimErr == nil) != (want == "") || !strings.Contains(text(snap.ClaimErr), want) {
			t.Errorf("step %d: %v, want %q", i, snap.ClaimErr, want)
		}
	}
	if len(s.fresh) > 1 {
		t.Errorf("%d entries are kept", len(s.fresh))
	}
}

// What is written is what differs, once at a time, later after each failure, and not against another machine.
func TestWrites(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	s := testState(claimOf("node-a", 1), bareNode("node-a", "10.244.0.0/24"))
	out, _ := s.next(now)
	if len(out) != 1 || out[&s.announcing].kind != types.ApplyPatchType {
		t.Fatalf("writes: %+v", out)
	}
	if out, wake := s.next(now); len(out) > 0 || !wake.IsZero() {
		t.Fatalf("a second write before the first has ended: %+v, %s", out, wake)
	}
	refused := errors.New("refused")
	for i, most := range []time.Duration{1, 2, 4, 8, 16, 30, 30} {
		s.wrote(&s.announcing, refused, now)
		if snap := s.snapshot(); !errors.Is(snap.ClaimErr, refused) {
			t.Fatalf("the error is %v", snap.ClaimErr)
		}
		out, wake := s.next(now)
		if wait := wake.Sub(now); len(out) > 0 || wait > most*time.Second || wait < most*time.Second/2 {
			t.Fatalf("failure %d: %d writes, the next after %s", i, len(out), wait)
		}
		if now = wake; len(first(s.next(now))) != 1 {
			t.Fatal("no write when it is time")
		}
	}
	s.wrote(&s.announcing, nil, now)
	s.put(nodeOf("node-a", 1, "10.244.0.0/24"))
	if snap := s.snapshot(); !held(snap) {
		t.Fatalf("this node holds %+v, %v", snap.Lease, snap.ClaimErr)
	}
	if out := first(s.next(now.Add(time.Hour))); len(out) > 0 {
		t.Errorf("writes where all is said: %+v", out)
	}
	s.put(nodeOf("node-a", 2, "10.244.0.0/24")) // another machine
	if out := first(s.next(now.Add(time.Hour))); len(out) > 0 {
		t.Errorf("it writes against another machine: %+v", out)
	}
	var conflict *subnet.ConflictError
	if snap := s.snapshot(); !errors.As(snap.ClaimErr, &conflict) || snap.Held() {
		t.Errorf("this node holds %+v, %v", snap.Lease, snap.ClaimErr)
	}
}

func first[A, B any](a A, _ B) A { return a }

// A process that finds its own announcement was first, too: another machine that comes later is the one that writes.
func TestConcedesAfterRestart(t *testing.T) {
	s := testState(claimOf("node-a", 1), nodeOf("node-a", 1, "10.244.0.0/24"))
	if out := first(s.next(time.Now())); len(out) > 0 {
		t.Errorf("it writes what is said: %+v", out)
	}
	s.put(nodeOf("node-a", 2, "10.244.0.0/24"))
	if out := first(s.next(time.Now())); len(out) > 0 || !s.conceded(s.nodes["node-a"]) {
		t.Errorf("it writes against another machine: %+v", out)
	}
	s.drop("node-a", time.Time{})
	s.put(bareNode("node-a", "10.244.0.0/24"))
	if out := first(s.next(time.Now().Add(time.Hour))); len(out) != 1 {
		t.Errorf("a Node that was made again: %d writes", len(out))
	}
}

// patched is a Node after a write.
func patched(t *testing.T, n *corev1.Node, p patch) *corev1.Node {
	t.Helper()
	raw, err := json.Marshal(p.body)
	n = n.DeepCopy()
	if err := errors.Join(err, json.Unmarshal(raw, n)); err != nil {
		t.Fatal(err)
	}
	return n
}

// server shows one Node to several machines, and does what they write. It counts the writes of a minute.
func server(t *testing.T, n *corev1.Node, machines ...*state) (writes int) {
	show := func() {
		for _, s := range machines {
			s.put(n)
		}
	}
	show()
	for now := time.Unix(1_000_000, 0); now.Before(time.Unix(1_000_060, 0)); now = now.Add(100 * time.Millisecond) {
		for _, s := range machines {
			for w, p := range first(s.next(now)) {
				writes++
				n = patched(t, n, p)
				if w == &s.announcing {
					n.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: fieldManager, Time: &metav1.Time{Time: now}}}
				}
				s.wrote(w, nil, now)
				show()
			}
		}
	}
	return writes
}

// A write that has no effect is done again later each time: the watch is behind, or something takes the change away.
// What is about something else, and one that has its effect, does not wait for that.
func TestWritesWithoutEffect(t *testing.T) {
	n := bareNode("node-a", "10.244.0.0/24")
	s := testState(claimOf("node-a", 1), n)
	s.readiness = &readiness{true, "ready for pods"}
	writes := map[*write]int{}
	now := time.Unix(1_000_000, 0)
	minute := func() {
		for end := now.Add(time.Minute); now.Before(end); now = now.Add(100 * time.Millisecond) {
			for w := range first(s.next(now)) {
				writes[w]++
				s.wrote(w, nil, now)
				s.put(n)
			}
		}
	}
	minute() // after 0, 1, 3, 7, 15, 31 s
	if a, r := writes[&s.announcing], writes[&s.reporting]; a != 6 || r != 6 {
		t.Errorf("%d and %d writes in a minute", a, r)
	}
	n = nodeOf("node-a", 1, "10.244.0.0/24")
	s.put(n)
	n = n.DeepCopy()
	n.Annotations["overlayd.io/backend-type"] = "other"
	s.put(n)
	if minute(); writes[&s.announcing] < 11 {
		t.Errorf("%d writes after the Node has changed", writes[&s.announcing])
	}
}

// The message alone changes the condition once a minute, its status at once. It may hold any bytes.
func TestMessages(t *testing.T) {
	n := nodeOf("node-a", 1, "10.244.0.0/24")
	s := testState(claimOf("node-a", 1), n)
	now, writes := time.Unix(1_000_000, 0), 0
	for tenth := range 1500 {
		s.readiness = &readiness{tenth >= 1300, fmt.Sprintf("firewall: \xff%d", tenth/10)}
		for w, p := range first(s.next(now)) {
			writes++
			n = patched(t, n, p)
			s.wrote(w, nil, now)
			s.put(n)
		}
		if ready := s.network.Status == corev1.ConditionFalse; ready != s.readiness.ready {
			t.Fatalf("ready %t is said after %d s", ready, tenth/10)
		}
		now = now.Add(100 * time.Millisecond)
	}
	if writes != 4 { // after 0, 60, 120 and 130 s
		t.Errorf("%d writes", writes)
	}
	s.readiness.reason = "firewall: \xff130"
	if out := first(s.next(now.Add(time.Hour))); len(out) > 0 || s.network.Message != "firewall: \uFFFD130" {
		t.Errorf("the message %q is written again", s.network.Message)
	}
}

// Of two machines for one Node, one stops writing, its condition as well.
func TestTwoMachines(t *testing.T) {
	a, b := testState(claimOf("node-a", 1)), testState(claimOf("node-a", 2))
	a.readiness, b.readiness = &readiness{false, "lease: conflict"}, &readiness{true, "ready for pods"}
	n := server(t, nodeOf("node-a", 1, "10.244.0.0/24"), a, b)
	if n > 3 || held(a.snapshot()) || !held(b.snapshot()) || b.network.Status != corev1.ConditionFalse {
		t.Errorf("%d writes, the first one has %v, the second one has %v", n, a.snapshot().ClaimErr, b.snapshot().ClaimErr)
	}
}

// A machine and a copy of it, with its name and ID but another address, do not write for ever. What was changed by hand
// is put right, and so is what this machine said at its address of before.
func TestCopyOfTheMachine(t *testing.T) {
	copied := claimOf("node-a", 2)
	copied.NodeID = "id-1"
	a, b := testState(claimOf("node-a", 1)), testState(copied)
	if n := server(t, nodeOf("node-a", 1, "10.244.0.0/24"), a, b); n > 3 {
		t.Errorf("%d writes", n)
	}
	var conflict *subnet.ConflictError
	if err := a.snapshot().ClaimErr; !errors.As(err, &conflict) || !held(b.snapshot()) {
		t.Errorf("the machine has %v, its copy %v", err, b.snapshot().ClaimErr)
	}
	if a.setClaim(claimOf("node-a", 1)); !a.conceded(a.nodes["node-a"]) {
		t.Error("a claim that says the same makes it write again")
	}
	if n := server(t, nodeOf("node-a", 1, "10.244.0.0/24"), b); n != 1 {
		t.Errorf("changed by hand: %d writes", n)
	}
	moved := copied
	moved.PublicIP.V4 = netip.MustParseAddr("192.0.2.7")
	a.setClaim(moved)
	if n := server(t, nodeOf("node-a", 1, "10.244.0.0/24"), a); n != 1 || !held(a.snapshot()) {
		t.Errorf("another address: %d writes, %v", n, a.snapshot().ClaimErr)
	}
}

// The annotations are those that flannel has for the same, with what it leaves out left out.
func TestAnnotations(t *testing.T) {
	both := claimOf("a", 1).Attrs
	both.PublicIP.V6, both.VTEP.V6 = netip.MustParseAddr("2001:db8::1"), subnet.VTEP{VNI: 1, MAC: addr.MAC{2, 6}}
	v6 := both
	v6.PublicIP.V4, v6.VTEP.V4 = netip.Addr{}, subnet.VTEP{}
	direct := claimOf("a", 1).Attrs
	direct.Backend, direct.VTEP = subnet.HostGW, addr.Per[subnet.VTEP]{}
	const v4Data, v6Data = `{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}`, `{"VNI":1,"VtepMAC":"02:06:00:00:00:00"}`
	for _, tt := range []struct {
		attrs              subnet.Attrs
		ip, ip6, data, dat string
	}{
		{claimOf("a", 1).Attrs, "192.0.2.1", "", v4Data, ""},
		{both, "192.0.2.1", "2001:db8::1", v4Data, v6Data},
		{v6, "", "2001:db8::1", "", v6Data},
		{direct, "192.0.2.1", "", "null", ""},
	} {
		a, err := announce(tt.attrs)
		if err != nil {
			t.Fatal(err)
		}
		got := a.annotations("p")
		for key, want := range map[string]string{
			"p/public-ip": tt.ip, "p/public-ipv6": tt.ip6, "p/backend-data": tt.data, "p/backend-v6-data": tt.dat,
			"p/backend-type": string(tt.attrs.Backend), "p/kube-subnet-manager": "true",
		} {
			if v, is := got[key]; v != want || is != (want != "") {
				t.Errorf("%s is %q, want %q", key, v, want)
			}
		}
		back, under := announced(got, "p")
		n := bareNode(tt.attrs.NodeName, "10.244.0.0/24")
		n.Annotations = got
		e := Options{AnnotationPrefix: "p"}.read(n).entry(n.Name, subnet.Config{})
		if back != a || under != "p" || e.Err != nil || e.Attrs != tt.attrs {
			t.Errorf("read again: %+v, want %+v", e, tt.attrs)
		}
	}
}

// Which of a Node's annotations count: complete ones, first those under the own prefix.
func TestAnnounced(t *testing.T) {
	a, err := announce(claimOf("a", 1).Attrs)
	if err != nil {
		t.Fatal(err)
	}
	older := a
	older.BackendData, older.NodeID = `{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}`, ""
	left := older // of flannel's, where they were said by both
	left.BackendData = ""
	for name, tt := range map[string]struct {
		flannels, ours *announcement
		prefix         string
		want           announcement
		under          string
	}{
		"none":                             {nil, nil, ownPrefix, announcement{}, ""},
		"flannel's":                        {&older, nil, ownPrefix, older, flannelPrefix},
		"the own prefix":                   {&older, &a, ownPrefix, a, ownPrefix},
		"flannel's prefix as the own":      {&a, &older, flannelPrefix, a, flannelPrefix},
		"a peer with the default prefix":   {nil, &a, flannelPrefix, a, ownPrefix},
		"that, and what flannel had there": {&left, &a, flannelPrefix, a, ownPrefix},
		"a third prefix as the own":        {&older, &a, "example.org", older, flannelPrefix},
		"incomplete ones alone":            {&left, nil, ownPrefix, left, flannelPrefix},
	} {
		all := map[string]string{}
		for prefix, a := range map[string]*announcement{flannelPrefix: tt.flannels, ownPrefix: tt.ours} {
			if a != nil {
				maps.Copy(all, a.annotations(prefix))
			}
		}
		if got, under := announced(all, tt.prefix); got != tt.want || under != tt.under {
			t.Errorf("%s: %+v under %q, want %+v under %q", name, got, under, tt.want, tt.under)
		}
	}
}

// The condition is written when it says something else, and only then.
func TestCondition(t *testing.T) {
	s := testState(subnet.Claim{}, bareNode("node-a", "10.244.0.0/24"))
	s.claim = nil
	now := time.Unix(1_000_000, 0)
	if out := first(s.next(now)); len(out) > 0 {
		t.Fatalf("writes before there is anything to say: %+v", out)
	}
	n := bareNode("node-a", "10.244.0.0/24")
	for i, r := range []readiness{{false, "starting"}, {false, "no lease"}, {true, "ready"}} {
		s.readiness = &r
		out := first(s.next(now))
		p := out[&s.reporting]
		if len(out) != 1 || p.subresource != "status" {
			t.Fatalf("%+v: writes %+v", r, out)
		}
		c := p.body.(map[string]any)["status"].(map[string]any)["conditions"].([]corev1.NodeCondition)[0]
		if unavailable := c.Status == corev1.ConditionTrue; unavailable == r.ready || c.Message != r.reason {
			t.Errorf("%+v: the condition is %+v", r, c)
		}
		n.Status.Conditions = []corev1.NodeCondition{c}
		n.ResourceVersion = fmt.Sprint(20 + i)
		s.wrote(&s.reporting, nil, now)
		s.put(n)
		now = now.Add(messageAgain)
		if out := first(s.next(now)); len(out) > 0 {
			t.Errorf("%+v is written again", r)
		}
	}
}

// Revisions that go back are those of a store that was restored: what is missing then, neither an operator nor a node
// has removed.
func TestEpoch(t *testing.T) {
	s := testState(claimOf("node-a", 1), nodeOf("node-a", 1, "10.244.0.0/24"))
	s.listed([]*corev1.Node{nodeOf("node-a", 1, "10.244.0.0/24")}, 200, time.Time{})
	if s.snapshot().Table.Epoch != 0 {
		t.Error("another list is another epoch")
	}
	s.listed(nil, 50, time.Unix(9, 0))
	snap := s.snapshot()
	if snap.Table.Epoch != 1 || snap.Table.Revision != 50 || snap.Losses != 1 || len(snap.Table.Entries) != 0 {
		t.Errorf("after a restore: %+v", snap)
	}
}

func claimOf(name string, i int) subnet.Claim {
	return subnet.Claim{Attrs: subnet.Attrs{
		PublicIP: addr.Per[netip.Addr]{V4: netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})}, PublicIPLocal: true,
		Backend: subnet.VXLAN, VTEP: addr.Per[subnet.VTEP]{V4: subnet.VTEP{VNI: 1, MAC: addr.MAC{2, 0, 0, 0, 0, byte(i)}}},
		Identity: subnet.Identity{NodeName: name, NodeID: fmt.Sprintf("id-%d", i)},
	}}
}

const network = `{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}`

func held(s subnet.Snapshot) bool {
	return s.Held() && s.ClaimErr == nil && s.Lease.PublicIP == s.Claimed.PublicIP
}
