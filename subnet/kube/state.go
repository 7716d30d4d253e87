package kube

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
)

const (
	// writeAgain is the least time between two writes of the same kind: another process may keep changing the Node, too.
	writeAgain = time.Second
	// firstRetry and lastRetry bound how long after a failed write the next one comes: twice as long each time.
	firstRetry, lastRetry = time.Second, 30 * time.Second
	// messageAgain is the least time after a write of the condition until one that only changes its message: a fault of all
	// nodes whose description changes would be as many writes, each of which all nodes are told of.
	messageAgain = time.Minute
)

// state is what a Manager knows. One goroutine owns it. It does no I/O, and takes the time as an argument.
type state struct {
	opts Options
	log  *zap.Logger

	nodes    map[string]node // by name
	entries  []*subnet.Entry // in the order of their keys, two of one key in that of their names
	shared   bool            // the list was handed out
	compared comparison      // for what no other Node was found to conflict with the own one; zero: for nothing
	fresh    []*subnet.Entry // made since then
	revision int64           // of the last change of a Node that is known
	epoch    int
	known    bool             // the Nodes were listed
	lists    map[string]error // why a list or watch fails at the moment, by what is listed

	config    configMap
	valid     subnet.Config         // the last config that this node can use: the entries have subnets in its families
	network   *corev1.NodeCondition // of the own Node
	settings  *subnet.NodeSettings  // in its annotations; nil: it was never there
	claim     *subnet.Claim
	desired   announcement // what the claim announces
	announced bool         // the own Node has said that it is this machine's
	ousted    bool         // another machine with this ID has written over what this one had announced
	readiness *readiness

	announcing, reporting write
	losses                int // how often the own Node was gone
	lostAt, since         time.Time
	changed               bool // since the last snapshot
	snap                  subnet.Snapshot
}

type node struct {
	record
	entry *subnet.Entry
}

// comparison is what it depends on whether another Node conflicts with the own one, but for that other Node.
type comparison struct {
	own    *subnet.Entry
	claim  subnet.Claim
	config subnet.Config
}

// configMap is what the ConfigMap says.
type configMap struct {
	listed, found bool
	revision      int64
	text          string
	parsed        subnet.Config
	err           error
}

// readiness is whether the node is ready for pods, and why not.
type readiness struct {
	ready  bool
	reason string
}

// write is one kind of request that changes the Node.
type write struct {
	busy       bool
	due        time.Time // not before this
	last       time.Time // when one last succeeded
	failures   int       // in a row
	unanswered int       // how many were sent since the Node changed in what they are about
	err        error     // of the last one
}

// patch is a change of the own Node.
type patch struct {
	kind        types.PatchType
	subresource string
	body        any
	again       time.Duration // not earlier than this after the last one that succeeded
}

func newState(o Options, log *zap.Logger) *state {
	return &state{opts: o, log: log, nodes: map[string]node{}, lists: map[string]error{}}
}

// put takes a Node as it is now.
func (s *state) put(n *corev1.Node) {
	if n.Name == s.opts.Node {
		s.putCondition(networkUnavailable(n))
		s.putSettings(s.opts.settings(n.Annotations))
	}
	s.revision = max(s.revision, revision(n.ResourceVersion))
	r, was := s.opts.read(n), s.nodes[n.Name]
	if was.record == r {
		return // a heartbeat
	}
	s.remove(was)
	s.nodes[n.Name], s.changed = s.add(n.Name, r), true
	s.noteAnnounced()
	if n.Name == s.opts.Node && r.podCIDRs != was.podCIDRs {
		s.adopt()
	}
	if n.Name == s.opts.Node && (r.announcement != was.announcement || r.prefix != was.prefix) {
		s.noteOusted(was.record, r)
		s.announcing.answered()
	}
}

// putCondition takes the own Node's condition as it is now.
func (s *state) putCondition(c *corev1.NodeCondition) {
	if (c == nil) != (s.network == nil) || c != nil && !says(s.network, *c) {
		s.reporting.answered()
	}
	s.network, s.changed = c, s.changed || s.reporting.err != nil
}

// putSettings takes what an operator has set for this node.
func (s *state) putSettings(is subnet.NodeSettings) {
	if s.settings == nil || *s.settings != is {
		s.settings, s.changed = &is, true
	}
}

// answered takes note that the Node has changed in what the writes are about.
func (w *write) answered() {
	w.unanswered = 0
	if w.failures == 0 {
		w.due = w.last.Add(writeAgain)
	}
}

// says reports whether a condition means the same as another one.
func says(n *corev1.NodeCondition, c corev1.NodeCondition) bool {
	return n != nil && n.Status == c.Status && n.Reason == c.Reason && n.Message == c.Message
}

// add makes the entry of a Node that has podCIDRs.
func (s *state) add(name string, r record) node {
	if r.podCIDRs == "" {
		return node{record: r}
	}
	e := r.entry(name, s.valid)
	if s.compared != (comparison{}) {
		s.fresh = append(s.fresh, e)
	}
	i, _ := s.find(e)
	s.entries = slices.Insert(s.writable(), i, e)
	return node{r, e}
}

// noteAnnounced takes note if the own Node says what this machine announces.
func (s *state) noteAnnounced() {
	s.announced = s.announced || s.claim != nil && s.nodes[s.opts.Node].NodeID == s.claim.NodeID
}

// noteOusted takes note if the own Node said what this machine announces, and another overlayd with its ID has changed
// that. A write of this one that is still under way may have done it, and what was changed by hand is put right.
func (s *state) noteOusted(was, is record) {
	w := &s.announcing
	if was.announcement == s.desired && is.written > was.written && !w.busy && w.unanswered == 0 {
		s.ousted = true
	}
}

// drop takes note that there is no Node of this name any more.
func (s *state) drop(name string, now time.Time) {
	was, ok := s.nodes[name]
	if !ok {
		return
	}
	s.remove(was)
	delete(s.nodes, name)
	s.changed = true
	if name == s.opts.Node {
		s.log.Warn("Node disappeared from the Kubernetes API", zap.String("node", name))
		s.network = nil
		s.losses, s.lostAt = s.losses+1, now
	}
}

func (s *state) remove(was node) {
	if was.entry == nil {
		return
	}
	if i, found := s.find(was.entry); found {
		s.entries = slices.Delete(s.writable(), i, i+1)
	}
}

func (s *state) find(e *subnet.Entry) (int, bool) {
	return slices.BinarySearchFunc(s.entries, e, func(a, b *subnet.Entry) int {
		return cmp.Or(strings.Compare(a.Key, b.Key), strings.Compare(a.NodeName, b.NodeName))
	})
}

// writable is the list of entries, a copy if it was handed out.
func (s *state) writable() []*subnet.Entry {
	if s.shared {
		s.entries, s.shared = slices.Clone(s.entries), false
	}
	return s.entries
}

// listed takes all Nodes, as of one revision. One that is lower than a known one is that of a store that was restored
// from a backup: what is missing there was not removed by an operator or a node.
func (s *state) listed(all []*corev1.Node, revision int64, now time.Time) {
	restored := revision < s.revision
	if restored {
		s.log.Warn("the Kubernetes API lost changes; was it restored from a backup?",
			zap.Int64("revision", revision), zap.Int64("known", s.revision))
		s.epoch++
	}
	names := make(map[string]bool, len(all))
	for _, n := range all {
		names[n.Name] = true
		s.put(n)
	}
	for _, name := range slices.Sorted(maps.Keys(s.nodes)) {
		if !names[name] {
			s.drop(name, now)
		}
	}
	s.changed = s.changed || restored || !s.known
	s.revision, s.known = revision, true
	s.adopt()
}

// setConfig takes the ConfigMap as it is now; nil: there is none.
func (s *state) setConfig(m *corev1.ConfigMap, revision int64) {
	next := configMap{listed: true, revision: revision}
	if m == nil {
		next.err = fmt.Errorf("%w: the ConfigMap %s does not exist", subnet.ErrNoConfig, s.opts.ConfigMap)
	} else if next.text, next.found = m.Data[configKey]; !next.found {
		next.err = fmt.Errorf("%w: the ConfigMap %s has no key %s", subnet.ErrNoConfig, s.opts.ConfigMap, configKey)
	} else if next.parsed, next.err = subnet.ParseConfig([]byte(next.text)); next.err != nil {
		next.err = fmt.Errorf("ConfigMap %s, %s: %w", s.opts.ConfigMap, configKey, next.err)
	}
	s.changed = s.changed || !s.config.listed || s.config.text != next.text || text(s.config.err) != text(next.err)
	s.config = next
	s.adopt()
}

// adopt goes by the config from now on, unless this node can't use it: what it goes by stays whole then. Whether it can
// is known once the Nodes are.
func (s *state) adopt() {
	if !s.known || !s.config.listed {
		return
	}
	if _, err := s.networkConfig(s.nodes[s.opts.Node]); err == nil {
		s.use(s.config.parsed)
	}
}

// use makes those entries again that have other subnets with a config.
func (s *state) use(c subnet.Config) {
	s.valid = c
	for name, n := range s.nodes {
		if n.entry == nil {
			continue
		}
		if subnets, _ := n.subnetsIn(c); subnets != n.entry.Subnets {
			s.remove(n)
			s.nodes[name] = s.add(name, n.record)
		}
	}
}

// failed takes note of how a list or a watch goes; nil: well.
func (s *state) failed(what string, err error, now time.Time) {
	if text(s.lists[what]) == text(err) {
		return
	}
	was := s.unreachable()
	s.lists[what], s.changed = err, true
	if is := s.unreachable(); (was == nil) != (is == nil) {
		s.since = now
	}
}

// unreachable is why what is known may be out of date.
func (s *state) unreachable() error {
	return cmp.Or(s.lists[nodesResource], s.lists[configMapsResource])
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// own is the Node that this process works for, and the error is why it has no subnets yet.
func (s *state) own() (node, error) {
	own, there := s.nodes[s.opts.Node]
	switch {
	case !there:
		return own, fmt.Errorf("there is no Node %s: is the kubelet registered, and is that its name (--node-name)?",
			s.opts.Node)
	case own.podCIDRs == "":
		return own, fmt.Errorf("the Node %s has no podCIDRs yet: kube-controller-manager assigns them if it runs with "+
			"--allocate-node-cidrs and --cluster-cidr", s.opts.Node)
	}
	return own, nil
}

// networkConfig is the config with the subnets that this node has: their length is kube-controller-manager's to decide.
func (s *state) networkConfig(own node) (subnet.Config, error) {
	c, err := s.config.parsed, s.config.err
	if err != nil || own.entry == nil {
		return c, err
	}
	all, _ := own.subnets() // those that make no sense are the entry's to name
	for _, f := range addr.Families() {
		p, sn := c.Pools.Get(f), all.Get(f)
		switch {
		case !p.On():
			continue
		case !sn.IsValid():
			return c, fmt.Errorf("the Node %s has the podCIDRs %s, and none of %s, which the ConfigMap %s enables",
				s.opts.Node, own.podCIDRs, f, s.opts.ConfigMap)
		case sn.Bits() < p.Network.Bits() || !p.Network.Contains(sn.Addr()):
			return c, fmt.Errorf("the Node %s has the podCIDRs %s outside the network %s of the ConfigMap %s: "+
				"it has to be the --cluster-cidr of kube-controller-manager",
				s.opts.Node, own.podCIDRs, p.Network, s.opts.ConfigMap)
		}
	}
	return c.FittedTo(all), nil
}

// snapshot is what has become known.
func (s *state) snapshot() subnet.Snapshot {
	own, ownErr := s.own()
	c, configErr := s.networkConfig(own)
	s.changed = false
	s.snap = subnet.Snapshot{
		Losses: s.losses, LostAt: s.lostAt, Err: s.unreachable(), Endpoints: s.snap.Endpoints,
		Settings: s.settings,
	}
	if s.snap.Err != nil {
		s.snap.Since = s.since
	} else if s.reporting.err != nil && s.condition(time.Time{}) != nil {
		s.snap.ReadyErr = s.reporting.err
	}
	if !s.known || !s.config.listed {
		return s.snap
	}
	s.shared = true
	s.snap.Table = subnet.Table{
		Revision: s.revision, Epoch: s.epoch, Config: c, ConfigJSON: s.config.text, ConfigErr: configErr,
		ConfigRevision: s.config.revision, Entries: s.entries,
	}
	if s.claim != nil {
		s.snap.Claimed = *s.claim
		s.snap.Lease, s.snap.ClaimErr = s.lease(own)
		s.snap.ClaimErr = cmp.Or(ownErr, configErr, s.snap.ClaimErr)
	}
	return s.snap
}

// lease is what the own Node says, so far as it says it of this machine. It has no subnets before there is a config that
// says which are used.
func (s *state) lease(own node) (subnet.Lease, error) {
	e := own.entry
	if e == nil {
		return subnet.Lease{}, nil
	}
	conflict := s.conflict(e)
	switch {
	case s.conceded(own):
		return subnet.Lease{}, &subnet.ConflictError{
			Holder: e, What: "the Node " + s.opts.Node, Refused: true,
			Advice: "two machines run overlayd for one Node: give one of them another --node-name " +
				"(and machine ID, if it is a copy), then restart both",
		}
	case own.announcement == (announcement{}) || own.NodeID != s.claim.NodeID:
		return subnet.Lease{}, s.announcing.err
	}
	held := subnet.Lease{Subnets: s.valid.Used(e.Subnets), Attrs: e.Attrs}
	if conflict != nil {
		return held, conflict
	}
	return held, s.announcing.err
}

// conflict says which other node has a part of this one's subnets, or its address; nil: none has. While none had before,
// only what was made since then is looked at first.
func (s *state) conflict(own *subnet.Entry) (found *subnet.ConflictError) {
	all := s.snap.Table
	c, fresh := comparison{own, *s.claim, all.Config}, all
	fresh.Entries, s.fresh = s.fresh, nil
	if s.compared != c || conflictIn(fresh, c) != nil { // what is fresh may be gone again
		found = conflictIn(all, c)
	}
	if s.compared = c; found != nil {
		s.compared = comparison{}
	}
	return found
}

func conflictIn(t subnet.Table, c comparison) *subnet.ConflictError {
	found, advice := t.Overlap(c.own), "delete the Node that is not to have it, restart its kubelet, and recreate its pods"
	if found == nil {
		found = t.Conflict(c.claim, c.own)
		advice = "give one of the two another address or --public-ip; if that machine is gone, delete its Node"
	}
	if found != nil {
		found.Advice = advice
	}
	return found
}

// conceded reports whether another machine has announced itself on the own Node since this one did. It is left to the
// other one: the two would write for ever. One with the same ID, of which this one may be a copy, has another address.
func (s *state) conceded(own node) bool {
	if s.claim == nil || own.NodeID == "" {
		return false
	}
	elsewhere := own.PublicIP != s.desired.PublicIP || own.PublicIPv6 != s.desired.PublicIPv6
	return s.announced && own.NodeID != s.claim.NodeID || s.ousted && own.NodeID == s.claim.NodeID && elsewhere
}

// setClaim takes what the own Node is to announce.
func (s *state) setClaim(c subnet.Claim) {
	was := s.desired
	s.claim, s.changed = &c, true
	s.desired, _ = announce(c.Attrs) // it reads what FormatValue has written
	s.ousted = s.ousted && s.desired == was
	s.noteAnnounced()
	s.announcing.due = time.Time{}
}

// next lists what is to be written, and says when to ask again; zero: when something has happened.
func (s *state) next(now time.Time) (out map[*write]patch, wake time.Time) {
	out = map[*write]patch{}
	for w, p := range map[*write]*patch{&s.announcing: s.announcement(), &s.reporting: s.condition(now)} {
		if p == nil || w.busy {
			continue
		}
		due := w.due
		if at := w.last.Add(p.again); at.After(due) {
			due = at
		}
		if now.Before(due) {
			if wake.IsZero() || due.Before(wake) {
				wake = due
			}
			continue
		}
		w.busy = true
		w.unanswered++
		out[w] = *p
	}
	return out, wake
}

// announcement is the write after which the own Node announces what is claimed; nil: it does.
func (s *state) announcement() *patch {
	own, err := s.own()
	if err != nil || s.claim == nil || s.conceded(own) {
		return nil
	}
	if s.desired == (announcement{}) || s.desired == own.announcement && own.prefix == s.opts.AnnotationPrefix {
		return nil
	}
	// The UID keeps the API server from making a Node that was just deleted.
	return &patch{kind: types.ApplyPatchType, body: map[string]any{
		"apiVersion": "v1", "kind": "Node", "metadata": map[string]any{
			"name": s.opts.Node, "uid": own.uid, "annotations": s.desired.annotations(s.opts.AnnotationPrefix),
		},
	}}
}

// condition is the write after which the own Node says whether pods have a network; nil: it does, or it is for another
// machine to say.
func (s *state) condition(now time.Time) *patch {
	if own, there := s.nodes[s.opts.Node]; !there || s.readiness == nil || s.conceded(own) {
		return nil
	}
	c := corev1.NodeCondition{
		Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionFalse, Reason: "OverlaydIsReady",
		Message: strings.ToValidUTF8(s.readiness.reason, "\uFFFD"), // as JSON would have it
	}
	if !s.readiness.ready {
		c.Status, c.Reason = corev1.ConditionTrue, "OverlaydIsNotReady"
	}
	if says(s.network, c) {
		return nil
	}
	p := &patch{kind: types.StrategicMergePatchType, subresource: "status"}
	if n := s.network; n != nil && n.Status == c.Status && n.Reason == c.Reason {
		p.again = messageAgain
	}
	c.LastHeartbeatTime.Time, c.LastTransitionTime.Time = now, now
	p.body = map[string]any{"status": map[string]any{"conditions": []corev1.NodeCondition{c}}}
	return p
}

// wrote takes note of what came of a write. If it succeeded, the watch says what the Node is now. While it does not, the
// watch is behind, or something takes the change away again: the next write waits twice as long each time.
func (s *state) wrote(w *write, err error, now time.Time) {
	w.busy = false
	if text(w.err) != text(err) {
		w.err, s.changed = err, true
	}
	if err == nil {
		if w == &s.announcing {
			s.log.Info("lease written", zap.String("node", s.opts.Node))
		}
		w.failures, w.last = 0, now
		w.due = now.Add(min(lastRetry, writeAgain<<min(max(w.unanswered-1, 0), 8)))
		return
	}
	w.unanswered = 1 // it may have been done all the same
	wait := min(lastRetry, firstRetry<<min(w.failures, 8))
	w.failures++
	w.due = now.Add(wait/2 + rand.N(wait/2)) // nodes that fail together do not try together
}
