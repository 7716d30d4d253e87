package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/agent/state"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/masquerade"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/test/bubble"
)

// The fakes stand for parts whose faults the real ones can't be made to show at will. The real parts are tested in
// their own packages, and together with this loop in cmd/overlayd.

// fakeStore decides claims with the real rules, on a table that the test writes.
type fakeStore struct {
	updates mailbox[subnet.Snapshot]
	claims  []subnet.Claim
	snap    subnet.Snapshot
}

func (s *fakeStore) Run(ctx context.Context) error           { <-ctx.Done(); return ctx.Err() }
func (s *fakeStore) Updates() <-chan subnet.Snapshot         { return s.updates }
func (s *fakeStore) Name() string                            { return "etcd" }
func (s *fakeStore) deliver(change func(s *subnet.Snapshot)) { change(&s.snap); s.updates.put(s.snap) }

func (s *fakeStore) Claim(c subnet.Claim) {
	s.claims = append(s.claims, c)
	d, err := subnet.Decide(s.snap.Table, c, 0)
	s.snap.Claimed, s.snap.ClaimErr = c, err
	if err == nil {
		s.snap.Lease, s.snap.Expires = d.Lease, time.Now().Add(24*time.Hour)
	}
	s.updates.put(s.snap)
}

// fakeKernel is a kernel that takes everything, unless it is told not to.
type fakeKernel struct {
	mu       sync.Mutex
	host     netstate.Host
	state    netstate.State
	want     netstate.State // the last wish
	adjusted int            // calls of Reconcile for a few peers
	err      error          // of looking
	refuse   func(netstate.Change) error
	observed int
	unswept  int // calls of Reconcile without pruning
	forgot   []netip.Addr
	changed  chan struct{}
}

func (k *fakeKernel) Observe() (netstate.Host, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.observed++
	return k.host, k.err
}

func (k *fakeKernel) Offloads(string) []netstate.Offload {
	return []netstate.Offload{{Name: "tx", On: true}, {Name: "gro"}}
}

func (k *fakeKernel) Desired() map[string]int {
	return locked(k, func(k *fakeKernel) map[string]int { return k.want.Counts() })
}

func (k *fakeKernel) Watch(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
func (k *fakeKernel) Changed() <-chan struct{}        { return k.changed }

func (k *fakeKernel) Forget(_ netip.Prefix, source netip.Addr) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.forgot = append(k.forgot, source)
	return nil
}

func (k *fakeKernel) Uncover(ips []netip.Addr) (netstate.Result, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var res netstate.Result
	k.state.Routes = slices.DeleteFunc(slices.Clone(k.state.Routes), func(r netstate.Route) bool {
		covers := slices.ContainsFunc(ips, r.Dst.Contains)
		if covers {
			res.Done = append(res.Done, netstate.Change{Op: netstate.Delete, Obj: r})
		}
		return covers
	})
	return res, nil
}

// updated is the last wish after an update.
func (k *fakeKernel) updated(u netstate.Update) netstate.State {
	if u.All {
		return u.Come
	}
	gone, come := u.Gone, u.Come
	want := netstate.State{Links: k.want.Links, Sysctls: k.want.Sysctls, Addresses: k.want.Addresses, Rules: k.want.Rules}
	want.Neighbours = append(without(k.want.Neighbours, gone.Neighbours, come.Neighbours), come.Neighbours...)
	want.FDB = append(without(k.want.FDB, gone.FDB, come.FDB), come.FDB...)
	want.TunnelPeers = append(without(k.want.TunnelPeers, gone.TunnelPeers, come.TunnelPeers), come.TunnelPeers...)
	want.Routes = append(without(k.want.Routes, gone.Routes, come.Routes), come.Routes...)
	want.Sort()
	k.adjusted++
	return want
}

func (k *fakeKernel) Compare() ([]netstate.Change, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return netstate.Diff(k.state, k.want), k.err
}

// without takes from a list what is gone, and what something that comes has the place of.
func without[T interface{ Compare(T) int }](list, gone, come []T) []T {
	return slices.DeleteFunc(slices.Clone(list), func(x T) bool {
		return slices.ContainsFunc(append(slices.Clone(gone), come...), func(y T) bool { return x.Compare(y) == 0 })
	})
}

func (k *fakeKernel) Reconcile(u netstate.Update) (res netstate.Result, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	want := k.updated(u)
	if !u.Prune { // in these tests there is nothing to be swept
		k.unswept++
	}
	if k.err != nil {
		return res, k.err
	}
	res.Repaired = reflect.DeepEqual(want, k.want)
	k.want = want
	for _, c := range netstate.Diff(k.state, want) {
		if k.refuse != nil && k.refuse(c) != nil {
			res.Failed = append(res.Failed, netstate.Failure{Change: c, Err: k.refuse(c)})
			continue
		}
		res.Done = append(res.Done, c)
	}
	if len(res.Failed) == 0 {
		k.state = want
	}
	return res, nil
}

type fakeFirewall struct {
	mu   sync.Mutex
	err  error
	sets error // why it has no sets
	want rulesets
	runs int

	chosen int  // how often it was
	again  bool // it says once that another one would be
}

func (f *fakeFirewall) choose(context.Context) masquerade.Driver {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.chosen++
	return f
}

func (f *fakeFirewall) Ensure(_ context.Context, want rulesets) (masquerade.Result, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.runs++
	if f.err == nil {
		f.want = want
	}
	res := masquerade.Result{NoSets: f.sets, ChooseAgain: f.again}
	f.again = false
	return res, f.err
}

// rig is an agent that runs in a bubble of its own time.
type rig struct {
	t        *testing.T
	dir      string
	store    *fakeStore
	kernel   *fakeKernel
	firewall *fakeFirewall
	agent    *Agent
	saves    counter // of the state directory
	logs     *observer.ObservedLogs
	stop     func()
}

func inRig(t *testing.T, test func(r *rig)) {
	t.Helper()
	dir := t.TempDir()
	bubble.Test(t, func(t *testing.T) {
		r := newAgent(&rig{t: t, dir: dir, kernel: &fakeKernel{host: testHost(), changed: make(chan struct{}, 1)}})
		r.start()
		defer r.stop()
		test(r)
	})
}

// newAgent makes one more agent for the same node: the same kernel and state directory, another store.
func newAgent(of *rig) *rig {
	core, logs := observer.New(zap.InfoLevel)
	r := &rig{
		t: of.t, dir: of.dir, logs: logs, store: &fakeStore{updates: newMailbox[subnet.Snapshot]()},
		kernel: of.kernel, firewall: &fakeFirewall{},
	}
	r.agent = New(Options{
		Identity:   subnet.Identity{NodeName: "self", NodeID: "id-self"},
		SubnetFile: filepath.Join(r.dir, "subnet.env"), StateDir: filepath.Join(r.dir, "state"),
		IPMasq: true, ForwardRules: true, IPForward: true, IPTablesResync: 10 * time.Second, StalePeerGrace: 10 * time.Minute,
	}, Parts{
		Store: r.store, Kernel: r.kernel,
		Firewall: r.firewall.choose, Log: zap.New(core),
	})
	r.agent.writer.save = r.saves.count(r.agent.writer.save)
	return r
}

// start runs the agent; r.stop ends it.
func (r *rig) start() {
	t := r.t
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- r.agent.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
	})
}

// change changes what the fakes do.
func (r *rig) change(f func()) {
	for _, mu := range []*sync.Mutex{&r.kernel.mu, &r.firewall.mu} {
		mu.Lock()
		defer mu.Unlock()
	}
	f()
}

// host changes what the rest of the node looks like, and lets the kernel tell of it.
func (r *rig) host(h netstate.Host) {
	synctest.Wait()
	r.change(func() { r.kernel.host = h.Indexed() })
	r.kernel.changed <- struct{}{}
	r.sleep(observeMin)
}

// tell says that something changed in the kernel.
func (r *rig) tell() {
	select {
	case r.kernel.changed <- struct{}{}:
	default:
	}
}

// sleep lets time pass, and everything come to rest.
func (r *rig) sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// table delivers a whole table.
func (r *rig) table(config string, entries ...*subnet.Entry) {
	r.t.Helper()
	c, err := subnet.ParseConfig([]byte(config))
	slices.SortFunc(entries, func(a, b *subnet.Entry) int { return strings.Compare(a.Key, b.Key) })
	r.store.deliver(func(s *subnet.Snapshot) {
		s.Table = subnet.Table{
			Revision: s.Table.Revision + 1, Epoch: s.Table.Epoch, ConfigJSON: config, ConfigRevision: 1,
			Config: c, ConfigErr: err, Entries: entries,
		}
	})
	synctest.Wait()
}

// peer is a good lease of another node.
func peer(i int) *subnet.Entry {
	value := fmt.Sprintf(`{"PublicIP":"192.0.2.%d","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:%02x"},"NodeName":"n%d","NodeID":"id%d","PublicIPLocal":true}`, 100+i, i, i, i)
	return subnet.ParseEntry(fmt.Sprintf("10.244.%d.0-24", 100+i), []byte(value), int64(i), int64(i), 1)
}

func (r *rig) problem(c condition) string {
	for _, p := range r.agent.health.list() {
		if p.Name == string(c) {
			return p.Reason
		}
	}
	return ""
}

// subnets are those that the agent holds.
func (r *rig) subnets() (own addr.Per[netip.Prefix]) {
	if err := r.agent.ask(r.t.Context(), func() { own = r.agent.facts.subnets }); err != nil {
		r.t.Error(err)
	}
	return own
}

func (r *rig) routes() int { return len(r.state().Routes) }

// routed reports whether a route leads to an address.
func (r *rig) routed(ip string) bool {
	return slices.ContainsFunc(r.state().Routes,
		func(x netstate.Route) bool { return x.Dst.Contains(netip.MustParseAddr(ip)) })
}

func (r *rig) state() netstate.State {
	return locked(r.kernel, func(k *fakeKernel) netstate.State { return k.state })
}

func (r *rig) looks() int { return locked(r.kernel, func(k *fakeKernel) int { return k.observed }) }

func (r *rig) unswept() int { return locked(r.kernel, func(k *fakeKernel) int { return k.unswept }) }

func locked[T any](k *fakeKernel, get func(k *fakeKernel) T) T {
	k.mu.Lock()
	defer k.mu.Unlock()
	return get(k)
}

func (r *rig) logged(text string) int {
	n := 0
	for _, e := range r.logs.All() {
		if strings.Contains(e.Message+" "+fmt.Sprint(e.ContextMap()), text) {
			n++
		}
	}
	return n
}

func TestFromTableToKernel(t *testing.T) {
	inRig(t, func(r *rig) {
		synctest.Wait()
		if r.problem(condLease) == "" || len(r.agent.health.list()) != len(needed()) {
			t.Errorf("before anything is known: %v", r.agent.health.list())
		}
		r.table(onlyV4, peer(1), peer(2))
		if got := r.agent.health.list(); len(got) > 0 {
			t.Fatalf("problems: %v", got)
		}
		if len(r.state().Links) != 1 || r.routes() != 4 || len(r.state().FDB) != 2 { // two ways to each of two peers
			t.Errorf("state %+v", r.state())
		}
		env, err := os.ReadFile(filepath.Join(r.dir, "subnet.env"))
		if err != nil || !strings.Contains(string(env), "FLANNEL_MTU=1450\n") {
			t.Errorf("subnet.env: %v\n%s", err, env)
		}
		if len(r.firewall.want.V6.Chains) != 0 || len(r.firewall.want.V4.Chains) != 2 {
			t.Errorf("firewall %+v", r.firewall.want)
		}
		c := r.store.claims[len(r.store.claims)-1]
		if c.PublicIP.V4.String() != "192.0.2.10" || !c.PublicIPLocal || c.VTEP.V4.MAC.IsZero() ||
			c.Backend != subnet.VXLAN || !c.Keep {
			t.Errorf("claim %+v", c)
		}
		if mac := r.state().Links[0].MAC; mac != c.VTEP.V4.MAC {
			t.Errorf("the device has %s, the lease says %s", mac, c.VTEP.V4.MAC)
		}
	})
}

func TestBadLeaseHoldsNobodyBack(t *testing.T) {
	inRig(t, func(r *rig) {
		bad := subnet.ParseEntry("10.244.77.0-24", []byte(`{"PublicIP":`), 9, 9, 1)
		r.table(onlyV4, peer(1), bad, peer(2))
		r.table(onlyV4, peer(1), bad, peer(2), peer(3))
		if r.routes() != 6 || !strings.Contains(r.problem(condPeers), "10.244.77.0-24") {
			t.Errorf("%d routes, %q", r.routes(), r.problem(condPeers))
		}
		if n := r.logged("10.244.77.0-24"); n != 1 {
			t.Errorf("the bad lease was named %d times", n)
		}
		r.table(onlyV4, peer(1), peer(2), peer(3))
		if r.problem(condPeers) != "" {
			t.Error("the problem stays after the lease went")
		}
	})
}

func TestRefusedChangeIsTriedAgain(t *testing.T) {
	inRig(t, func(r *rig) {
		broken := true
		refuse := func(c netstate.Change) error {
			if rt, ok := c.Obj.(netstate.Route); ok && broken && rt.Dst == netip.MustParsePrefix("10.244.101.0/24") {
				return errors.New("no buffer space")
			}
			return nil
		}
		r.change(func() { r.kernel.refuse = refuse })
		r.table(onlyV4, peer(1), peer(2))
		if p := r.problem(condKernel); !strings.Contains(p, "10.244.101.0/24") || !strings.Contains(p, "no buffer space") {
			t.Errorf("problem %q", p)
		}
		r.sleep(3 * time.Minute)
		if n := r.logged("no buffer space"); n != 1 {
			t.Errorf("the same failure was logged %d times", n)
		}
		if r.looks() < 5 || r.looks() > 20 {
			t.Errorf("looked %d times in 3 minutes", r.looks())
		}
		r.change(func() { broken = false })
		r.sleep(lastRetry)
		if r.problem(condKernel) != "" || r.routes() != 4 {
			t.Errorf("still %q with %d routes", r.problem(condKernel), r.routes())
		}
	})
}

func TestConfigThatCannotBeUsedChangesNothing(t *testing.T) {
	inRig(t, func(r *rig) {
		r.table(onlyV4, peer(1))
		before := r.state()
		for _, c := range []string{
			`{`, `{"Network":"10.244.0.0/16","Backend":{"Type":"ipip"}}`, `{"Network":"10.99.0.0/16"}`,
			dual,
		} {
			r.table(c, peer(1))
			if r.problem(condConfig) == "" {
				t.Errorf("%s: no problem is named", c)
			}
			if d := netstate.Diff(before, r.state()); len(d) > 0 {
				t.Errorf("%s: changes %v", c, d)
			}
		}
		r.table(onlyV4, peer(1))
		if p := r.problem(condConfig); p != "" {
			t.Errorf("still %q", p)
		}
	})
}

func TestStoreAwayChangesNothing(t *testing.T) {
	inRig(t, func(r *rig) {
		r.table(onlyV4, peer(1))
		before := r.state()
		r.store.deliver(func(s *subnet.Snapshot) { s.Err, s.Since = errors.New("connection refused"), time.Now() })
		r.sleep(time.Hour)
		if !strings.Contains(r.problem(condStore), "connection refused") || len(netstate.Diff(before, r.state())) > 0 {
			t.Errorf("problem %q, changes %v", r.problem(condStore), netstate.Diff(before, r.state()))
		}
		for _, p := range r.agent.health.list() {
			if p.Fatal {
				t.Errorf("not ready because of %s: %s", p.Name, p.Reason)
			}
		}
	})
}

// Of a family that still has its underlay, nothing is said.
func TestOneFamilyLosesItsUnderlay(t *testing.T) {
	inRig(t, func(r *rig) {
		r.table(dual)
		h := testHost()
		h.Addresses = slices.DeleteFunc(slices.Clone(h.Addresses),
			func(a netstate.HostAddress) bool { return a.Prefix.Addr().Is6() })
		h.Routes = slices.DeleteFunc(slices.Clone(h.Routes), func(x netstate.HostRoute) bool { return x.Dst.Addr().Is6() })
		r.host(h)
		r.sleep(time.Minute)
		if p := r.problem(condUnderlay); !strings.Contains(p, "for IPv6") || strings.Count(p, "so far,") != 1 ||
			!strings.Contains(p, "lost its address 2001:") {
			t.Errorf("it says %q", p)
		}
	})
}

func TestWaitsForAnInterface(t *testing.T) {
	inRig(t, func(r *rig) {
		good := testHost()
		r.host(netstate.Host{})
		r.table(onlyV4, peer(1))
		if r.problem(condUnderlay) == "" || len(r.store.claims) > 0 {
			t.Errorf("problem %q, claims %v", r.problem(condUnderlay), r.store.claims)
		}
		r.change(func() { r.kernel.host = good }) // found by polling
		r.sleep(waitForInterface + time.Millisecond)
		if got := r.agent.health.list(); len(got) > 0 || r.routes() != 2 {
			t.Errorf("problems %v, %d routes", got, r.routes())
		}
		// It is gone again: what is there stays, and the others' leases are followed all the same.
		r.host(netstate.Host{})
		r.sleep(2 * resyncEvery)
		if r.problem(condUnderlay) == "" || r.routes() != 2 {
			t.Errorf("problem %q, %d routes", r.problem(condUnderlay), r.routes())
		}
		r.table(onlyV4, peer(1), peer(2))
		if r.routes() != 4 {
			t.Errorf("%d routes after a peer came", r.routes())
		}
	})
}

func TestKernelThatCannotBeRead(t *testing.T) {
	inRig(t, func(r *rig) {
		r.table(onlyV4, peer(1))
		r.change(func() { r.kernel.err = errors.New("interrupted") })
		r.sleep(2 * resyncEvery)
		if !strings.Contains(r.problem(condKernel), "interrupted") {
			t.Errorf("problem %q", r.problem(condKernel))
		}
		r.change(func() { r.kernel.err = nil })
		r.sleep(lastRetry)
		if p := r.problem(condKernel); p != "" {
			t.Errorf("still %q", p)
		}
	})
}

// The firewall learns which peers answer a node without the tunnel, as they come, change and go.
func TestFirewallKnowsBarePeers(t *testing.T) {
	inRig(t, func(r *rig) {
		bare := func(i int) *subnet.Entry {
			p := peer(i)
			value := fmt.Sprintf(
				`{"PublicIP":"192.0.2.%d","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:%02x"}}`, 100+i, i)
			return subnet.ParseEntry(p.Key, []byte(value), int64(10+i), int64(i), 1)
		}
		for _, tt := range []struct {
			peers []*subnet.Entry
			want  string
		}{
			{[]*subnet.Entry{peer(1), peer(2)}, "[]"},
			{[]*subnet.Entry{peer(1), peer(2), bare(3)}, "[10.244.103.0/24]"},
			{[]*subnet.Entry{peer(1), bare(2), bare(3)}, "[10.244.102.0/24 10.244.103.0/24]"},
			{[]*subnet.Entry{peer(1), bare(2), peer(3)}, "[10.244.102.0/24]"},
			{[]*subnet.Entry{peer(1)}, "[]"},
		} {
			r.table(onlyV4, tt.peers...)
			r.sleep(2 * lingerFor)
			got := []netip.Prefix{}
			for _, set := range r.firewall.want.V4.Sets {
				got = append(got, set.Members...)
			}
			if fmt.Sprint(got) != tt.want {
				t.Errorf("got %v, want %s", got, tt.want)
			}
		}
	})
}

func TestFirewall(t *testing.T) {
	inRig(t, func(r *rig) {
		r.change(func() { r.firewall.err = errors.New("another app is currently holding the xtables lock") })
		r.change(func() { r.firewall.sets = errors.New("no ipset here") })
		unsure := peer(2) // its public IP may be another host's
		unsure.PublicIPLocal = false
		r.table(`{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}`, peer(1), unsure)
		if !strings.Contains(r.problem(condFirewall), "xtables lock") || r.routes() == 0 {
			t.Errorf("problem %q, %d routes", r.problem(condFirewall), r.routes())
		}
		r.change(func() { r.firewall.err = nil })
		r.sleep(11 * time.Second)
		if r.problem(condFirewall) != "" || !strings.Contains(r.problem(condNodeSet), "no ipset here") {
			t.Errorf("problems %v", r.agent.health.list())
		}
		if sets := r.firewall.want.V4.Sets; len(sets) != 1 || len(sets[0].Members) != 1 {
			t.Errorf("sets %v", sets)
		}
		r.change(func() { r.firewall.sets = nil })
		r.sleep(11 * time.Second)
		if p := r.agent.health.list(); len(p) > 0 {
			t.Errorf("problems %v", p)
		}
	})
}

func TestFirewallIsChosenAgain(t *testing.T) {
	inRig(t, func(r *rig) {
		r.table(onlyV4, peer(1))
		r.change(func() { r.firewall.again = true })
		r.sleep(time.Minute)
		r.change(func() {
			if r.firewall.chosen != 2 {
				t.Errorf("chosen %d times, want twice", r.firewall.chosen)
			}
		})
	})
}

func TestPoolFullAndConflictAreNamed(t *testing.T) {
	inRig(t, func(r *rig) {
		mine := peer(1)
		mine.NodeName = "self" // this node's name, held by another machine
		r.table(onlyV4, mine)
		if p := r.problem(condLease); !strings.Contains(p, `"self"`) || !strings.Contains(p, mine.Key) {
			t.Errorf("problem %q", p)
		}
		if r.routes() > 0 || len(r.state().Addresses) > 0 {
			t.Error("a node without a lease has programmed something")
		}
	})
}

// A node whose lease leads its peers elsewhere is not ready, whichever family it is about.
func TestLeaseThatLeadsElsewhere(t *testing.T) {
	inRig(t, func(r *rig) {
		const dual = `{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48"}`
		host := testHost()
		host.Addresses = append(host.Addresses, netstate.HostAddress{
			Link: "eth0", Prefix: netip.MustParsePrefix("2001:db8::10/64"),
		})
		host.Routes = append(host.Routes, netstate.HostRoute{Dst: netip.MustParsePrefix("::/0"), Link: "eth0"})
		r.host(host)
		r.table(dual, peer(1))
		if p := r.agent.health.list(); len(p) > 0 {
			t.Fatalf("problems %v", p)
		}
		lease := r.store.snap.Lease
		for _, old := range []string{"192.0.2.77", "2001:db8::77"} {
			ip := netip.MustParseAddr(old)
			r.store.deliver(func(s *subnet.Snapshot) { s.Lease.PublicIP.Set(addr.FamilyOf(ip), ip) })
			synctest.Wait()
			is := lease.PublicIP.Get(addr.FamilyOf(ip))
			if p := r.problem(condLease); p != fmt.Sprintf("the lease announces %s, but this node's address is %s", old, is) {
				t.Errorf("problem %q", p)
			}
			r.store.deliver(func(s *subnet.Snapshot) { s.Lease = lease })
			synctest.Wait()
		}
		for refused, where := range map[bool]condition{true: condLease, false: condClaim} {
			r.store.deliver(func(s *subnet.Snapshot) {
				s.ClaimErr = &subnet.ConflictError{
					Holder: peer(1), What: "the public IP 192.0.2.10", Advice: "change it", Refused: refused,
				}
			})
			synctest.Wait()
			if p := r.agent.health.list(); len(p) != 1 || p[0].Code != status.Conflict ||
				!strings.Contains(r.problem(where), "192.0.2.10") {
				t.Errorf("problems %v, want one of %s", p, where)
			}
		}
	})
}

// Nothing is claimed while the tunnel's device can't be had, in any family; and the node goes on by itself when it can.
func TestNoLeaseWithoutADevice(t *testing.T) {
	inRig(t, func(r *rig) {
		refusing := true
		r.change(func() {
			r.kernel.refuse = func(c netstate.Change) error {
				if refusing && c.Kind() == "device" {
					return errors.New("the VXLAN device flannel.1 has VNI 1 on UDP port 8472 already")
				}
				return nil
			}
		})
		r.table(onlyV4, peer(1))
		r.sleep(time.Minute)
		if len(r.store.claims) > 0 || r.routes() > 0 {
			t.Errorf("claimed %v, %d routes", r.store.claims, r.routes())
		}
		if p := r.problem(condKernel); !strings.Contains(p, "flannel.1") || r.logged("flannel.1") != 1 {
			t.Errorf("problem %q, logged %d times", p, r.logged("flannel.1"))
		}
		r.change(func() { refusing = false })
		r.sleep(waitForInterface)
		if p := r.agent.health.list(); len(p) > 0 || len(r.store.claims) == 0 || r.routes() == 0 {
			t.Errorf("problems %v, claimed %v, %d routes", p, r.store.claims, r.routes())
		}

		// A new VNI is another device, and another lease.
		claims, lease := len(r.store.claims), r.store.snap.Lease
		r.change(func() { refusing = true })
		other := `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":9}}`
		r.table(other, peer(1))
		r.sleep(time.Minute)
		if len(r.store.claims) != claims || r.problem(condKernel) == "" || r.routes() == 0 {
			t.Errorf("claimed %v, problem %q, %d routes", r.store.claims[claims:], r.problem(condKernel), r.routes())
		}
		r.change(func() { refusing = false })
		r.sleep(waitForInterface)
		if l := r.store.snap.Lease; l.VTEP.V4.VNI != 9 || l.Subnets != lease.Subnets {
			t.Errorf("the lease says %+v", l)
		}

		// A device that can't be had, and the config as it was before: so is the rest.
		r.change(func() { refusing = true })
		r.table(strings.Replace(other, "9", "10", 1), peer(1))
		r.sleep(time.Minute)
		r.table(other, peer(1))
		r.sleep(waitForInterface)
		want := r.kernel.want
		if p := r.problem(condKernel); p != "" || len(want.Links) != 1 || want.Links[0].VXLAN.VNI != 9 ||
			len(want.Addresses) != 1 {
			t.Errorf("problem %q; the kernel is asked for %v", p, want)
		}

		// A lease that announces the device already is kept, and the rest of the node is not held back; but not one that
		// flannel wrote since.
		r.stop()
		own, since := r.store.snap.Lease, r.store.snap.Lease.Attrs
		since.Identity, since.PublicIPLocal, since.VTEP.V4.MAC[5] = subnet.Identity{}, false, 0
		entries := []*subnet.Entry{
			peer(1), subnet.ParseEntry(subnet.FormatKey(own.Subnets), subnet.FormatValue(own.Attrs), 5, 5, 1),
			subnet.ParseEntry("10.244.9.0-24", subnet.FormatValue(since), 6, 6, 1),
		}
		r.change(func() { refusing, r.kernel.state, r.kernel.want = true, netstate.State{}, netstate.State{} })
		for n, held := range map[int]bool{2: true, 3: false} {
			again := newAgent(r)
			again.start()
			again.table(other, slices.Clone(entries[:n])...)
			again.sleep(time.Second)
			planned := locked(r.kernel, func(k *fakeKernel) int { return len(k.want.Routes) + len(k.want.Addresses) })
			if (len(again.store.claims) > 0) != held || again.problem(condKernel) == "" || (planned > 0) != held {
				t.Errorf("%d leases: claimed %v, problem %q, %d objects", n, again.store.claims, again.problem(condKernel), planned)
			}
			again.stop()
			r.change(func() { r.kernel.want = netstate.State{} })
		}
	})
}

// An endpoint of etcd inside the network is named from the start, and no route covers it; what became of it meanwhile
// is followed.
func TestEndpointInsideTheNetwork(t *testing.T) {
	inRig(t, func(r *rig) {
		at := func(ips ...string) {
			r.store.deliver(func(s *subnet.Snapshot) {
				s.Endpoints = nil
				for _, ip := range ips {
					s.Endpoints = append(s.Endpoints, netip.MustParseAddr(ip))
				}
			})
			synctest.Wait()
		}
		covered := func() bool {
			return r.routed("10.244.101.7")
		}
		at("10.244.101.7")
		r.table(onlyV4)
		if p := r.problem(condEndpoints); !strings.Contains(p, "10.244.101.7") || !strings.Contains(p, "10.244.0.0/16") {
			t.Errorf("problem %q", p)
		}
		r.table(onlyV4, peer(1), peer(2)) // peer 1 has 10.244.101.0/24
		if covered() || r.routes() == 0 || !strings.Contains(r.problem(condUnreachable), "10.244.101.7") {
			t.Errorf("routes %v, problem %q", r.state().Routes, r.problem(condUnreachable))
		}
		at("192.0.2.1")
		if p := r.agent.health.list(); len(p) > 0 || !covered() {
			t.Errorf("problems %v, routes %v", p, r.state().Routes)
		}
		at("10.244.101.7", "192.0.2.1")
		if r.problem(condEndpoints) == "" || covered() {
			t.Errorf("problem %q, routes %v", r.problem(condEndpoints), r.state().Routes)
		}
	})
}

// A route of an earlier run that covers an endpoint, so that etcd can't be reached, is taken away; when etcd answers,
// there is nothing to do.
func TestRouteOfAnEarlierRunCoversAnEndpoint(t *testing.T) {
	inRig(t, func(r *rig) {
		r.table(onlyV4, peer(1), peer(2))
		r.stop()
		for _, away := range []bool{false, true} {
			again := newAgent(r)
			again.start()
			again.store.deliver(func(s *subnet.Snapshot) {
				// Peer 1 has 10.244.101.0/24.
				s.Endpoints = []netip.Addr{netip.MustParseAddr("10.244.101.7"), netip.MustParseAddr("192.0.2.1")}
				if away {
					s.Err = errors.New("no answer")
				}
			})
			again.sleep(offlineAfter / 2) // before it starts without etcd
			if r.routed("10.244.101.7") == away || r.routes() == 0 || (again.logged("10.244.101.0/24") > 0) != away {
				t.Errorf("etcd is away: %t: routes %v", away, r.state().Routes)
			}
			again.stop()
		}
	})
}

func TestPeerLog(t *testing.T) {
	inRig(t, func(r *rig) {
		r.table(onlyV4, peer(1))
		moved := peer(1)
		moved.PublicIP.V4 = netip.MustParseAddr("192.0.2.201")
		r.table(onlyV4, moved, peer(2))
		r.table(onlyV4, peer(2))
		r.sleep(lingerFor + time.Second)
		for _, want := range []string{
			"peer added map[path:tunnel peer:n1 subnet:10.244.101.0/24 via:192.0.2.101]",
			"peer changed map[before:tunnel via 192.0.2.101 path:tunnel peer:n1 subnet:10.244.101.0/24 via:192.0.2.201]",
			"peer added map[path:tunnel peer:n2 subnet:10.244.102.0/24 via:192.0.2.102]",
			"peer removed map[peer:n1 subnet:10.244.101.0/24]",
		} {
			if r.logged(want) != 1 {
				t.Errorf("%q was logged %d times", want, r.logged(want))
			}
		}
		many := []*subnet.Entry{}
		for i := range 100 {
			many = append(many, peer(i))
		}
		before := r.logs.Len()
		r.table(onlyV4, many...)
		if n := r.logs.Len() - before; n > 3 {
			t.Errorf("100 peers make %d lines", n)
		}
	})
}

func TestDriftIsRepairedAtOnceAndCounted(t *testing.T) {
	inRig(t, func(r *rig) {
		r.table(onlyV4, peer(1), peer(2))
		whole := r.state()
		flush := func() {
			r.change(func() { r.kernel.state.Routes = nil })
			r.kernel.changed <- struct{}{}
		}
		flush()
		synctest.Wait()
		if d := netstate.Diff(r.state(), whole); len(d) > 0 {
			t.Fatalf("not repaired at once: %v", d)
		}
		looks := r.looks()
		for range 100 { // somebody keeps at it for 10 s
			flush()
			r.sleep(100 * time.Millisecond)
		}
		if n := r.looks() - looks; n < 15 || n > 40 {
			t.Errorf("looked %d times in 10 s", n)
		}
		r.sleep(observeMin)
		if d := netstate.Diff(r.state(), whole); len(d) > 0 {
			t.Errorf("not repaired in the end: %v", d)
		}
		if n := r.logged("kind:route"); n != 1 {
			t.Errorf("%d lines", n)
		}
		r.sleep(3 * time.Minute)
		if n := r.logged("kind:route"); n != 2 {
			t.Errorf("%d lines after a while, want the count of the rest", n)
		}
	})
}

func TestAuditIsNotPostponedBySnapshots(t *testing.T) {
	inRig(t, func(r *rig) {
		r.table(onlyV4, peer(1))
		looks := r.looks()
		for range 360 { // renewals and other nodes' changes come more often than the audit
			r.sleep(10 * time.Second)
			r.table(onlyV4, peer(1))
		}
		if n := r.looks() - looks; n < 10 || n > 14 {
			t.Errorf("looked %d times in an hour", n)
		}
	})
}

func TestStoreThatLostItsDataIsNotAThousandRemovedNodes(t *testing.T) {
	inRig(t, func(r *rig) {
		r.table(onlyV4, peer(1), peer(2), peer(3))
		r.store.deliver(func(s *subnet.Snapshot) { s.Table.Epoch++; s.Table.Entries = nil })
		synctest.Wait()
		if r.routes() != 6 {
			t.Fatalf("%d routes right after", r.routes())
		}
		other := peer(9)
		other.Subnets, other.Key = peer(2).Subnets, peer(2).Key // n9 has taken the subnet of n2
		r.table(onlyV4, peer(1), other)
		if got := r.state().FDB; len(got) != 3 || slices.ContainsFunc(got,
			func(e netstate.FDBEntry) bool { return e.Dst == peer(2).PublicIP.V4 }) {
			t.Errorf("FDB %v", got)
		}
		r.table(onlyV4, peer(1), other, peer(4))
		r.table(onlyV4, peer(1), other) // this one was removed
		r.sleep(lingerFor + time.Second)
		if r.routes() != 6 {
			t.Errorf("%d routes after one was removed", r.routes())
		}
		r.sleep(9 * time.Minute)
		if r.routes() != 6 {
			t.Errorf("%d routes within the grace time", r.routes())
		}
		r.sleep(3 * time.Minute)
		if r.routes() != 4 || r.logged("leases did not return") != 1 {
			t.Errorf("%d routes after the grace time, said %d times", r.routes(), r.logged("leases did not return"))
		}
	})
}

// A lease that was deleted or spoiled by mistake is back in a moment: until then nothing is taken down. One that was
// removed for good goes soon after.
func TestRemovedPeersLingerAMoment(t *testing.T) {
	inRig(t, func(r *rig) {
		r.table(onlyV4, peer(1), peer(2))
		whole := r.state()
		spoiled := subnet.ParseEntry(peer(1).Key, []byte("{"), 9, 1, 1)
		for _, now := range [][]*subnet.Entry{{peer(2)}, {spoiled, peer(2)}, {peer(1), peer(2)}} {
			r.table(onlyV4, now...)
			if d := netstate.Diff(whole, r.state()); len(d) > 0 {
				t.Fatalf("changes %v", d)
			}
			r.sleep(lingerFor / 4)
		}
		r.table(onlyV4, peer(2))
		r.sleep(lingerFor + time.Second)
		if r.routes() != 2 {
			t.Errorf("%d routes", r.routes())
		}
	})
}

// What another node's lease says now leaves nothing to linger.
func TestContradictedPeersGoAtOnce(t *testing.T) {
	for name, change := range map[string]func(e *subnet.Entry){
		"another node has the subnet":     func(e *subnet.Entry) { e.Subnets, e.Key = peer(1).Subnets, peer(1).Key },
		"another node has the address":    func(e *subnet.Entry) { e.PublicIP = peer(1).PublicIP },
		"another node has the MAC":        func(e *subnet.Entry) { e.VTEP = peer(1).VTEP },
		"the node has another subnet now": func(e *subnet.Entry) { e.Identity = peer(1).Identity },
	} {
		t.Run(name, func(t *testing.T) {
			inRig(t, func(r *rig) {
				r.table(onlyV4, peer(1), peer(2))
				now := peer(3)
				change(now)
				r.table(onlyV4, peer(2), now)
				if r.routes() != 4 || len(r.state().FDB) != 2 {
					t.Errorf("%d routes, FDB %v", r.routes(), r.state().FDB)
				}
			})
		})
	}
}

func TestStartWithoutStore(t *testing.T) {
	inRig(t, func(r *rig) {
		r.table(onlyV4, peer(1), peer(2))
		lease := r.subnets()
		r.sleep(2 * resyncEvery)
		m, err := r.agent.opts.dir().Load()
		if err != nil || len(m.Peers) != 2 || m.Own() != lease {
			t.Fatalf("remembered %+v, %v", m, err)
		}
		// The node comes up again: an empty kernel, and a store that does not answer.
		r.stop()
		again := newAgent(r)
		r.change(func() { r.kernel.state = netstate.State{} })
		again.start()
		defer again.stop()
		again.store.deliver(func(s *subnet.Snapshot) { s.Err, s.Since = errors.New("connection refused"), time.Now() })
		r.sleep(offlineAfter / 2)
		if again.routes() != 0 {
			t.Error("started from memory before the store had a chance")
		}
		r.sleep(offlineAfter)
		if again.routes() != 4 || again.subnets() != lease || again.problem(condOffline) == "" || again.unswept() == 0 {
			t.Errorf("%d routes, lease %v, offline %q, %d rounds without sweeping", again.routes(), again.subnets(),
				again.problem(condOffline), again.unswept())
		}
		for _, p := range again.agent.health.list() {
			if p.Fatal {
				t.Errorf("not ready: %+v", p)
			}
		}
		again.store.deliver(func(s *subnet.Snapshot) { s.Err = nil })
		again.table(onlyV4, peer(2), peer(3))
		r.sleep(lingerFor + time.Second)
		if again.problem(condOffline) != "" || again.routes() != 4 || again.subnets() != lease {
			t.Errorf("back online: %q, %d routes, lease %v", again.problem(condOffline), again.routes(), again.subnets())
		}
	})
}

// A start without etcd, which has the lease, and is back before it is asked: nothing is gone.
func TestTheLeaseIsThereWhenEtcdIsBack(t *testing.T) {
	inRig(t, func(r *rig) {
		r.table(onlyV4, peer(1))
		r.sleep(time.Minute)
		claim := r.store.claims[len(r.store.claims)-1]
		r.stop()
		again := newAgent(r)
		again.start()
		defer again.stop()
		again.store.deliver(func(s *subnet.Snapshot) { s.Err, s.Since = errors.New("connection refused"), time.Now() })
		r.sleep(2 * offlineAfter)
		// its claims wait
		again.store.deliver(func(s *subnet.Snapshot) { s.Err, s.ClaimErr, s.Lease = nil, nil, subnet.Lease{} })
		own := subnet.FormatKey(claim.Remembered)
		again.table(onlyV4, peer(1), subnet.ParseEntry(own, subnet.FormatValue(claim.Attrs), 5, 5, 1))
		for _, p := range again.agent.health.list() {
			t.Errorf("problem %+v", p)
		}
		if n := again.logged("disappeared from etcd"); n != 0 {
			t.Errorf("that the lease is gone was said %d times", n)
		}
		again.table(onlyV4, peer(1))
		if !strings.Contains(again.problem(condLease), "disappeared from etcd") {
			t.Errorf("when it is gone: %q", again.problem(condLease))
		}
	})
}

func TestStoreThatLostItsDataWhileTheDaemonWasDown(t *testing.T) {
	inRig(t, func(r *rig) {
		for range 5 {
			r.table(onlyV4, peer(1), peer(2))
		}
		r.sleep(2 * resyncEvery)
		r.stop()
		again := newAgent(r)
		again.start()
		defer again.stop()
		again.table(onlyV4, peer(2)) // at revision 1
		if again.routes() != 4 || again.logged("store lost data") != 1 {
			t.Errorf("%d routes, said %d times", again.routes(), again.logged("store lost data"))
		}
		again.sleep(20 * time.Minute)
		if again.routes() != 2 {
			t.Errorf("%d routes in the end", again.routes())
		}
	})
}

// The same, where the daemon has started from the persisted state, but has not programmed its peers yet: there is no
// interface until etcd is back.
func TestStoreThatLostItsDataBeforeThereIsAnInterface(t *testing.T) {
	inRig(t, func(r *rig) {
		for range 5 {
			r.table(onlyV4, peer(1), peer(2))
		}
		r.sleep(2 * peersEvery)
		r.stop()
		again := newAgent(r)
		r.change(func() { r.kernel.host = netstate.Host{} })
		again.start()
		defer again.stop()
		again.store.deliver(func(s *subnet.Snapshot) { s.Err, s.Since = errors.New("connection refused"), time.Now() })
		again.sleep(2 * offlineAfter)
		again.store.deliver(func(s *subnet.Snapshot) { s.Err = nil })
		again.table(onlyV4, peer(2)) // at revision 1
		again.host(testHost())
		again.sleep(time.Minute)
		if again.routes() != 4 || again.logged("store lost data") != 1 {
			t.Errorf("%d routes, said %d times", again.routes(), again.logged("store lost data"))
		}
	})
}

func TestNoStartFromMemoryThatMayBeWrong(t *testing.T) {
	for what, change := range map[string]func(*state.Persisted){
		"the persisted lease of 192.0.2.0-24 expired": func(m *state.Persisted) { m.Expires = time.Now().Add(-time.Minute) },
		`is of node "another"`:                        func(m *state.Persisted) { m.Node.NodeName = "another" },
		`another network, "/another/network"`:         func(m *state.Persisted) { m.Prefix = "/another/network" },
	} {
		inRig(t, func(r *rig) {
			r.stop()
			again := newAgent(r)
			m := state.Persisted{
				Node: again.agent.opts.Identity, Saved: time.Now(), Prefix: again.agent.opts.dir().Prefix, Subnets: peer(7).Key,
				Expires: time.Now().Add(time.Hour), Config: json.RawMessage(onlyV4),
			}
			change(&m)
			raw, err := json.Marshal(m)
			if err := errors.Join(err, os.MkdirAll(again.agent.opts.dir().Path, 0o755),
				os.WriteFile(again.agent.opts.dir().LeaseFile(), raw, 0o600)); err != nil {
				t.Fatal(err)
			}
			again.start()
			defer again.stop()
			r.sleep(time.Minute)
			if again.routes() != 0 ||
				!strings.Contains(again.problem(condOffline), strings.Replace(what, "192.0.2.0-24", m.Subnets, 1)) {
				t.Errorf("%d routes, %q", again.routes(), again.problem(condOffline))
			}
		})
	}
}

func TestSubnetLostToAnotherNode(t *testing.T) {
	inRig(t, func(r *rig) {
		r.table(onlyV4, peer(1))
		before := r.subnets()
		thief := peer(8)
		thief.Subnets, thief.Key = before, subnet.FormatKey(before)
		r.store.deliver(func(s *subnet.Snapshot) {
			s.Table.Entries = []*subnet.Entry{peer(1), thief}
			d, err := subnet.Decide(s.Table, s.Claimed, 0)
			if err != nil {
				t.Fatal(err)
			}
			s.Lease = d.Lease
		})
		synctest.Wait()
		if r.subnets() == before || r.logged("lost to another node") != 1 {
			t.Errorf("lease %v, said %d times", r.subnets(), r.logged("lost to another node"))
		}
		if env, _ := os.ReadFile(filepath.Join(r.dir, "subnet.env")); !strings.Contains(string(env),
			r.subnets().V4.Addr().Next().String()) {
			t.Errorf("subnet.env still says %s", env)
		}
		r.sleep(time.Hour)
		if r.problem(condMoved) == "" {
			t.Error("nothing reminds of it")
		}
		if err := os.Remove(r.agent.opts.dir().MovedFile()); err != nil {
			t.Fatal(err)
		}
		r.sleep(2 * resyncEvery)
		if p := r.problem(condMoved); p != "" {
			t.Errorf("after the operator agreed: %q", p)
		}
	})
}

func TestForeignRouteIsNamed(t *testing.T) {
	inRig(t, func(r *rig) {
		h := testHost()
		h.Routes = append(h.Routes,
			netstate.HostRoute{Dst: netip.MustParsePrefix("10.244.101.0/24"), Link: "docker0"},
			netstate.HostRoute{Dst: netip.MustParsePrefix("10.244.102.128/25"), Link: "docker0", Metric: 5000},
			netstate.HostRoute{Dst: netip.MustParsePrefix("10.244.103.0/24"), Link: "docker0", Metric: 5000})
		r.host(h)
		r.table(onlyV4, peer(1), peer(2), peer(3))
		p := r.problem(condRoutes)
		if !strings.Contains(p, "10.244.101.0/24") || !strings.Contains(p, "10.244.102.128/25") ||
			strings.Contains(p, "10.244.103.0/24") {
			t.Errorf("problem %q", p)
		}
	})
}

// A node that forwards forgets what it learned from router advertisements, unless it was told otherwise before.
func TestForwardingKeepsAdvertisedRoutes(t *testing.T) {
	inRig(t, func(r *rig) {
		h := testHost()
		h.Routes = append(h.Routes, netstate.HostRoute{
			Dst: netip.MustParsePrefix("::/0"), Link: "eth0", Metric: 1024,
			Advertised: true,
		})
		r.host(h)
		r.table(dual)
		at := func(path string) int {
			return slices.IndexFunc(r.state().Sysctls, func(s netstate.Sysctl) bool { return s.Path == path })
		}
		if a, f := at("net/ipv6/conf/eth0/accept_ra"), at("net/ipv6/conf/all/forwarding"); a < 0 || a > f {
			t.Errorf("settings %v", r.state().Sysctls)
		}
		r.table(onlyV4)
	})
}

// Without the module br_netfilter the node is degraded and says what to load; without the option nobody asks.
func TestBridgeNetfilter(t *testing.T) {
	inRig(t, func(r *rig) {
		r.table(dual)
		asked := func() (n int) {
			for _, s := range locked(r.kernel, func(k *fakeKernel) netstate.State { return k.want }).Sysctls {
				if strings.HasPrefix(s.Path, "net/bridge/") {
					n++
				}
			}
			return n
		}
		if asked() != 0 {
			t.Errorf("settings %v", r.state().Sysctls)
		}
		r.stop()
		r = newAgent(r)
		r.agent.opts.BridgeNetfilter = true
		r.start()
		defer r.stop()
		r.change(func() {
			r.kernel.refuse = func(c netstate.Change) error {
				if s, ok := c.Obj.(netstate.Sysctl); ok && s.Path == "net/bridge/bridge-nf-call-iptables" {
					return &fs.PathError{Op: "open", Path: s.Path, Err: fs.ErrNotExist}
				}
				return nil
			}
		})
		r.table(dual, peer(1))
		if asked() != 2 {
			t.Errorf("settings %v", r.state().Sysctls)
		}
		if p := r.problem(condSettings); !strings.Contains(p, "modprobe br_netfilter") ||
			!strings.Contains(p, "--bridge-netfilter=false") || strings.Contains(p, "ip6tables") {
			t.Errorf("problem %q", p)
		}
		if p := r.problem(condKernel); p != "" {
			t.Errorf("problem %q", p)
		}
	})
}

// A second address on the underlay does not move the tunnel, not even over a restart; only when the one in use goes, it
// does.
func TestAddressInUseIsKept(t *testing.T) {
	second := netstate.HostAddress{Link: "eth0", Prefix: netip.MustParsePrefix("192.0.2.5/32")}
	inRig(t, func(r *rig) {
		r.table(onlyV4, peer(1))
		h := testHost()
		h.Addresses = append([]netstate.HostAddress{second}, h.Addresses...)
		r.host(h)
		r.sleep(2 * resyncEvery)
		local := func() string { return r.state().Links[0].VXLAN.Local.String() }
		if local() != "192.0.2.10" {
			t.Errorf("the tunnel moved to %s", local())
		}
		r.stop()
		own := &subnet.Entry{
			Lease: r.store.snap.Lease, Key: subnet.FormatKey(r.store.snap.Lease.Subnets), Revision: 3,
			LeaseID: 1,
		}
		again := newAgent(r)
		again.start()
		defer again.stop()
		again.table(onlyV4, peer(1), own)
		if local() != "192.0.2.10" {
			t.Errorf("the tunnel moved to %s over a restart", local())
		}
		h.Addresses = slices.DeleteFunc(slices.Clone(h.Addresses),
			func(a netstate.HostAddress) bool { return a.Prefix.Addr().String() == "192.0.2.10" })
		again.change(func() { again.kernel.host = h.Indexed() })
		again.sleep(2 * resyncEvery)
		if local() == "192.0.2.10" {
			t.Error("the tunnel stays on an address that is gone")
		}
		if was := netip.MustParseAddr("192.0.2.10"); !slices.Equal(again.kernel.forgot, []netip.Addr{was}) {
			t.Errorf("connections with the addresses %v are ended, want %s", again.kernel.forgot, was)
		}
	})
}

// What the store has for this node comes before the flags, and is followed while the daemon runs. What can't be used is
// named and changes nothing, not even over a restart without the store.
func TestNodeSettings(t *testing.T) {
	set := func(by, value string) subnet.Setting { return subnet.Setting{Name: "annotation x/" + by, Value: value} }
	inRig(t, func(r *rig) {
		settings := func(s *subnet.NodeSettings) {
			r.t.Helper()
			r.store.deliver(func(snap *subnet.Snapshot) { snap.Settings = s })
			r.sleep(time.Second)
		}
		look := func(r *rig, local, public string) {
			r.t.Helper()
			if got := r.state().Links[0].VXLAN.Local.String(); got != local {
				r.t.Errorf("the tunnel's address is %s, want %s", got, local)
			}
			if c := r.store.claims; len(c) == 0 || c[len(c)-1].PublicIP.V4.String() != public {
				r.t.Errorf("claims %+v, want the public IP %s", c, public)
			}
		}
		r.table(onlyV4, peer(1))
		look(r, "192.0.2.10", "192.0.2.10")
		good := subnet.NodeSettings{Interface: set("interface", "eth7, eth1")}
		good.PublicIP.V4 = set("public-ip-overwrite", "203.0.113.9")
		settings(&good)
		look(r, "198.51.100.10", "203.0.113.9")
		bad := good
		bad.Interface, bad.PublicIP.V4.Value = subnet.Setting{}, "2001:db8::1"
		settings(&bad)
		look(r, "198.51.100.10", "203.0.113.9")
		want := `annotation x/public-ip-overwrite: expected an IPv4 address, found "2001:db8::1"`
		if got := r.problem(condNode); got != want || r.logged(want) != 1 || len(r.agent.health.list()) != 1 {
			t.Errorf("problem %q, want %q", got, want)
		}
		settings(nil) // the Node is gone
		look(r, "198.51.100.10", "203.0.113.9")
		r.stop()
		again := newAgent(r)
		again.start()
		defer again.stop()
		again.sleep(offlineAfter + time.Second)
		look(again, "198.51.100.10", "203.0.113.9")
		r = again
		r.store.snap.Settings = &bad
		r.table(onlyV4, peer(1))
		look(r, "198.51.100.10", "203.0.113.9")
		missing := good
		missing.Interface.Value = "eth9"
		settings(&missing)
		look(r, "198.51.100.10", "203.0.113.9")
		want = "no network interface for IPv4 yet (annotation x/interface eth9): device eth9 does not exist"
		if got := r.problem(condUnderlay); !strings.HasPrefix(got, want) || r.problem(condNode) != "" {
			t.Errorf("problem %q, want %q", got, want)
		}
		settings(&subnet.NodeSettings{})
		look(r, "192.0.2.10", "192.0.2.10")
		if got := r.agent.health.list(); len(got) > 0 {
			t.Errorf("problems %v", got)
		}
	})
}

// Who restarts the daemon while peers are kept that the store has lost does not lose them.
func TestRestartWithinTheGrace(t *testing.T) {
	inRig(t, func(r *rig) {
		for range 3 {
			r.table(onlyV4, peer(1), peer(2))
		}
		r.sleep(2 * time.Minute)
		r.store.deliver(func(s *subnet.Snapshot) { s.Table.Epoch++; s.Table.Revision = 1; s.Table.Entries = nil })
		r.sleep(2 * time.Minute)
		r.stop()
		again := newAgent(r)
		again.start()
		defer again.stop()
		again.table(onlyV4)
		if again.routes() != 4 {
			t.Errorf("%d routes", again.routes())
		}
	})
}

// A subnet that was lost while the daemon was down is as bad as one that is lost under it, if something still uses it.
func TestSubnetLostWhileTheDaemonWasDown(t *testing.T) {
	inRig(t, func(r *rig) {
		r.stop()
		again := newAgent(r)
		m := state.Persisted{Subnets: peer(7).Key, Config: json.RawMessage(onlyV4), Expires: time.Now().Add(time.Hour)}
		if err := again.agent.opts.dir().Save(again.agent.opts.dir().LeaseFile(), m); err != nil {
			t.Fatal(err)
		}
		h := testHost()
		h.Addresses = append(h.Addresses, netstate.HostAddress{
			Link:   "cni0",
			Prefix: netip.MustParsePrefix("10.244.107.1/24"),
		})
		again.change(func() { again.kernel.host = h.Indexed() })
		again.start()
		defer again.stop()
		thief := peer(8)
		thief.Subnets, thief.Key = peer(7).Subnets, peer(7).Key
		again.table(onlyV4, thief)
		if again.problem(condMoved) == "" || again.logged("lost to another node") != 1 {
			t.Errorf("problem %q, said %d times", again.problem(condMoved), again.logged("lost to another node"))
		}
	})
}

// Whatever happens in whatever order, the end is what the last table asks for, and looking again changes nothing.
func TestAnyOrderEndsInTheSameState(t *testing.T) {
	want := func(last []*subnet.Entry) (state netstate.State) {
		inRig(t, func(r *rig) {
			r.table(onlyV4, last...)
			state = r.state()
		})
		return state
	}
	for seed := range uint64(30) {
		rnd := rand.New(rand.NewPCG(seed, 7))
		some := func() []*subnet.Entry {
			var out []*subnet.Entry
			for i := 1; i <= 6; i++ {
				if rnd.IntN(3) > 0 {
					out = append(out, peer(i))
				}
			}
			return out
		}
		last := some()
		wanted := want(last)
		inRig(t, func(r *rig) {
			// The address that the node is leased must not depend on what came before.
			r.table(onlyV4)
			for range 60 {
				switch rnd.IntN(8) {
				case 0, 1:
					r.table(onlyV4, some()...)
				case 2:
					r.change(func() { r.kernel.state.Routes = nil })
					r.tell()
				case 3:
					r.change(func() { r.kernel.state = netstate.State{} })
					r.tell()
				case 4:
					odd := rnd.IntN(2) == 0
					r.change(func() {
						r.kernel.refuse = func(c netstate.Change) error {
							if _, route := c.Obj.(netstate.Route); route == odd {
								return errors.New("not now")
							}
							return nil
						}
					})
				case 5:
					r.change(func() { r.kernel.err = errors.New("interrupted") })
				case 6:
					r.store.deliver(func(s *subnet.Snapshot) { s.Err = errors.New("connection refused") })
				case 7:
					r.table(`{"Network":`, some()...)
				}
				r.sleep(time.Duration(rnd.IntN(4000)) * time.Millisecond)
				r.change(func() { r.kernel.err = nil })
			}
			r.change(func() { r.kernel.refuse = nil })
			r.store.deliver(func(s *subnet.Snapshot) { s.Err = nil })
			r.table(onlyV4, last...)
			r.sleep(2*resyncEvery + lastRetry)
			if d := netstate.Diff(r.state(), wanted); len(d) > 0 {
				t.Errorf("seed %d: %v", seed, d)
			}
			before := r.logs.Len()
			r.sleep(10 * resyncEvery)
			if n := r.logs.Len() - before; n > 0 || len(r.agent.health.list()) > 0 {
				t.Errorf("seed %d: not at rest: %d lines, problems %v", seed, n, r.agent.health.list())
			}
		})
	}
}

// What the kernel takes at last, after it was refused, is nothing that somebody else changed.
func TestWhatWasRefusedIsNoDrift(t *testing.T) {
	inRig(t, func(r *rig) {
		r.change(func() {
			r.kernel.refuse = func(c netstate.Change) error {
				if c.Kind() == "route" {
					return errors.New("no")
				}
				return nil
			}
		})
		r.table(onlyV4, peer(1))
		if r.problem(condKernel) == "" {
			t.Fatal("nothing was refused")
		}
		r.change(func() { r.kernel.refuse = nil })
		r.sleep(time.Minute)
		if r.problem(condKernel) != "" || r.routes() == 0 {
			t.Fatalf("still %q", r.problem(condKernel))
		}
		if n := r.logged("kind:route"); n != 0 {
			t.Errorf("counted as drift: %d lines", n)
		}
	})
}

// What another program takes from the pods' bridge is named once it has lasted, and remembered; a bridge that is
// being made is none.
func TestPodBridge(t *testing.T) {
	inRig(t, func(r *rig) {
		r.table(onlyV4, peer(1))
		gateway := netip.PrefixFrom(r.subnets().V4.Addr().Next(), 24)
		with := func(address bool, master string) {
			t.Helper()
			h := testHost()
			h.Links = append(h.Links, netstate.HostLink{Index: 70, Name: "br-pods", Kind: "bridge", Up: true},
				netstate.HostLink{Index: 71, Name: "veth1", Kind: "veth", Up: true, Master: master})
			if address {
				h.Addresses = append(h.Addresses, netstate.HostAddress{Link: "br-pods", Prefix: gateway})
			}
			r.host(h)
		}
		with(false, "br-pods")
		r.sleep(time.Minute)
		with(true, "br-pods")
		with(false, "")
		r.sleep(bridgePatience / 2)
		with(true, "br-pods")
		r.sleep(time.Minute)
		if n := r.logged("condition:pod-bridge"); n != 0 {
			t.Errorf("said %d times of a bridge that lacks nothing", n)
		}
		with(false, "")
		r.sleep(bridgePatience)
		lost := "br-pods has lost its address " + gateway.String()
		if p := r.problem(condBridge); !strings.Contains(p, lost) || !strings.Contains(p, "(veth1)") ||
			!strings.Contains(p, "ip address replace") {
			t.Errorf("problem %q", p)
		}
		// A restart, and then the bridge is looked at without an event, since one for a port that comes back is
		// passed over.
		r.stop()
		again := newAgent(r)
		again.start()
		defer again.stop()
		again.table(onlyV4, peer(1))
		again.sleep(2 * bridgePatience)
		if p := again.problem(condBridge); !strings.Contains(p, lost) || !strings.Contains(p, "(veth1)") {
			t.Errorf("after a restart: problem %q", p)
		}
		h := testHost()
		h.Links = append(h.Links, netstate.HostLink{Index: 70, Name: "br-pods", Kind: "bridge", Up: true},
			netstate.HostLink{Index: 71, Name: "veth1", Kind: "veth", Up: true, Master: "br-pods"})
		h.Addresses = append(h.Addresses, netstate.HostAddress{Link: "br-pods", Prefix: gateway})
		again.change(func() { again.kernel.host = h.Indexed() })
		again.sleep(bridgeEvery)
		if p := again.problem(condBridge); p != "" {
			t.Errorf("given back: problem %q", p)
		}
	})
}

// An address that the node had before it was started says nothing if the node has it no more.
func TestAddressOfBefore(t *testing.T) {
	has, had := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	f := facts{host: netstate.Host{Addresses: []netstate.HostAddress{{Link: "eth0", Prefix: addr.Host(has)}}}.Indexed()}
	f.persisted.Addresses = addr.Per[netip.Addr]{V4: has, V6: had}
	if got, want := f.addresses(subnet.Identity{}), (addr.Per[netip.Addr]{V4: has}); got != want {
		t.Errorf("it goes by %v, want %v", got, want)
	}
}
