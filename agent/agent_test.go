package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/masquerade"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// The fakes stand for parts whose faults the real ones can't be made to show at will. The real parts are tested in their own
// packages, and together with this loop in cmd/overlayd.

// fakeStore decides claims with the real rules, on a table that the test writes.
type fakeStore struct {
	updates mailbox[subnet.Snapshot]
	claims  []subnet.Claim
	snap    subnet.Snapshot
}

func (s *fakeStore) Run(ctx context.Context) error           { <-ctx.Done(); return ctx.Err() }
func (s *fakeStore) Updates() <-chan subnet.Snapshot         { return s.updates }
func (s *fakeStore) deliver(change func(s *subnet.Snapshot)) { change(&s.snap); s.updates.put(s.snap) }

func (s *fakeStore) Claim(c subnet.Claim) {
	s.claims = append(s.claims, c)
	d, err := subnet.Decide(s.snap.Table, c, 0)
	s.snap.Claimed, s.snap.ClaimErr = c, err
	if err == nil {
		s.snap.Lease = d.Lease
	}
	s.updates.put(s.snap)
}

// fakeKernel is a kernel that takes everything, unless it is told not to.
type fakeKernel struct {
	mu       sync.Mutex
	host     netstate.Host
	state    netstate.State
	err      error // of looking
	refuse   func(netstate.Change) error
	observed int
}

func (k *fakeKernel) Observe() (netstate.Host, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.observed++
	return k.host, k.err
}

func (k *fakeKernel) Reconcile(want netstate.State) (res netstate.Result, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.err != nil {
		return res, k.err
	}
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
	want []masquerade.Ruleset
	runs int
}

func (f *fakeFirewall) Remove(context.Context) error { return nil }

func (f *fakeFirewall) Ensure(_ context.Context, want []masquerade.Ruleset) ([]masquerade.Drift, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.runs++
	if f.err == nil {
		f.want = want
	}
	return nil, f.err
}

type fakeSets struct {
	mu  sync.Mutex
	err error
}

func (*fakeSets) Remove(string) error { return nil }

func (s *fakeSets) Ensure(string, addr.Family, []netip.Addr) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return 0, s.err
}

// rig is an agent that runs in a bubble of its own time.
type rig struct {
	t        *testing.T
	dir      string
	store    *fakeStore
	kernel   *fakeKernel
	firewall *fakeFirewall
	sets     *fakeSets
	agent    *Agent
	logs     *observer.ObservedLogs
}

func inRig(t *testing.T, test func(r *rig)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.InfoLevel)
		r := &rig{
			t: t, dir: dir, logs: logs, store: &fakeStore{updates: newMailbox[subnet.Snapshot]()},
			kernel: &fakeKernel{host: testHost()}, firewall: &fakeFirewall{}, sets: &fakeSets{},
		}
		r.agent = New(Options{
			Identity:   subnet.Identity{NodeName: "self", NodeID: "id-self"},
			SubnetFile: filepath.Join(dir, "subnet.env"), StateDir: filepath.Join(dir, "state"),
			IPMasq: true, ForwardRules: true, IPForward: true, IPTablesResync: 10 * time.Second,
		}, Parts{Store: r.store, Kernel: r.kernel, Firewall: r.firewall, Sets: r.sets, Log: zap.New(core)})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- r.agent.Run(ctx) }()
		test(r)
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
	})
}

// change changes what the fakes do.
func (r *rig) change(f func()) {
	for _, mu := range []*sync.Mutex{&r.kernel.mu, &r.firewall.mu, &r.sets.mu} {
		mu.Lock()
		defer mu.Unlock()
	}
	f()
}

// sleep lets time pass, and everything come to rest.
func (r *rig) sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// table delivers a whole table.
func (r *rig) table(config string, entries ...subnet.Entry) {
	r.t.Helper()
	c, err := subnet.ParseConfig([]byte(config))
	r.store.deliver(func(s *subnet.Snapshot) {
		s.Table = subnet.Table{Revision: s.Table.Revision + 1, ConfigRevision: 1, Config: c, ConfigErr: err, Entries: entries}
	})
	synctest.Wait()
}

// peer is a good lease of another node.
func peer(i int) subnet.Entry {
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

func (r *rig) routes() int { return len(r.kernel.state.Routes) }

func (r *rig) logged(text string) int {
	n := 0
	for _, e := range r.logs.All() {
		if strings.Contains(e.Message+fmt.Sprint(e.ContextMap()), text) {
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
		if len(r.kernel.state.Links) != 1 || r.routes() != 4 || len(r.kernel.state.FDB) != 2 { // two ways to each of two peers
			t.Errorf("state %+v", r.kernel.state)
		}
		env, err := os.ReadFile(filepath.Join(r.dir, "subnet.env"))
		if err != nil || !strings.Contains(string(env), "FLANNEL_MTU=1450\n") {
			t.Errorf("subnet.env: %v\n%s", err, env)
		}
		if len(r.firewall.want) != 1 || len(r.firewall.want[0].Chains) != 2 {
			t.Errorf("firewall %+v", r.firewall.want)
		}
		c := r.store.claims[len(r.store.claims)-1]
		if c.PublicIP.V4.String() != "192.0.2.10" || !c.PublicIPLocal || c.VTEP.V4.MAC.IsZero() || c.Backend != subnet.VXLAN || !c.Keep {
			t.Errorf("claim %+v", c)
		}
		if mac := r.kernel.state.Links[0].MAC; mac != c.VTEP.V4.MAC {
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
		if r.kernel.observed < 5 || r.kernel.observed > 20 {
			t.Errorf("looked %d times in 3 minutes", r.kernel.observed)
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
		before := r.kernel.state
		for _, c := range []string{`{`, `{"Network":"10.244.0.0/16","Backend":{"Type":"ipip"}}`, `{"Network":"10.99.0.0/16"}`, dual} {
			r.table(c, peer(1))
			if r.problem(condConfig) == "" {
				t.Errorf("%s: no problem is named", c)
			}
			if d := netstate.Diff(before, r.kernel.state); len(d) > 0 {
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
		before := r.kernel.state
		r.store.deliver(func(s *subnet.Snapshot) { s.Err, s.Since = errors.New("connection refused"), time.Now() })
		r.sleep(time.Hour)
		if !strings.Contains(r.problem(condStore), "connection refused") || len(netstate.Diff(before, r.kernel.state)) > 0 {
			t.Errorf("problem %q, changes %v", r.problem(condStore), netstate.Diff(before, r.kernel.state))
		}
		for _, p := range r.agent.health.list() {
			if p.Fatal {
				t.Errorf("not ready because of %s: %s", p.Name, p.Reason)
			}
		}
	})
}

func TestWaitsForAnInterface(t *testing.T) {
	inRig(t, func(r *rig) {
		good := r.kernel.host
		r.change(func() { r.kernel.host = netstate.Host{}.Indexed() })
		r.table(onlyV4, peer(1))
		if r.problem(condUnderlay) == "" || len(r.store.claims) > 0 {
			t.Errorf("problem %q, claims %v", r.problem(condUnderlay), r.store.claims)
		}
		r.change(func() { r.kernel.host = good })
		r.sleep(waitForInterface + time.Millisecond)
		if got := r.agent.health.list(); len(got) > 0 || r.routes() != 2 {
			t.Errorf("problems %v, %d routes", got, r.routes())
		}
		// It is gone again: what is there stays.
		r.change(func() { r.kernel.host = netstate.Host{}.Indexed() })
		r.sleep(2 * auditEvery)
		if r.problem(condUnderlay) == "" || r.routes() != 2 {
			t.Errorf("problem %q, %d routes", r.problem(condUnderlay), r.routes())
		}
	})
}

func TestKernelThatCannotBeRead(t *testing.T) {
	inRig(t, func(r *rig) {
		r.table(onlyV4, peer(1))
		r.change(func() { r.kernel.err = errors.New("interrupted") })
		r.sleep(2 * auditEvery)
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

func TestFirewall(t *testing.T) {
	inRig(t, func(r *rig) {
		r.change(func() { r.firewall.err = errors.New("another app is currently holding the xtables lock") })
		r.change(func() { r.sets.err = errors.New("no ipset here") })
		r.table(`{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}`, peer(1))
		if !strings.Contains(r.problem(condFirewall), "xtables lock") || r.routes() == 0 {
			t.Errorf("problem %q, %d routes", r.problem(condFirewall), r.routes())
		}
		r.change(func() { r.firewall.err = nil })
		r.sleep(11 * time.Second)
		if r.problem(condFirewall) != "" || !strings.Contains(r.problem(condNodeSet), "no ipset here") {
			t.Errorf("problems %v", r.agent.health.list())
		}
		for _, rs := range r.firewall.want {
			for _, c := range rs.Chains {
				if slices.ContainsFunc(c.Rules, func(x masquerade.Rule) bool { return x.DstSet != "" }) {
					t.Error("a rule names a set that is not there")
				}
			}
		}
		r.change(func() { r.sets.err = nil })
		r.sleep(11 * time.Second)
		if p := r.agent.health.list(); len(p) > 0 {
			t.Errorf("problems %v", p)
		}
	})
}

func TestPoolFullAndConflictAreNamed(t *testing.T) {
	inRig(t, func(r *rig) {
		mine := peer(1)
		mine.PublicIP.V4 = netip.MustParseAddr("192.0.2.10") // this node's own, held by n1 of another machine
		mine.NodeName = "other"
		r.table(onlyV4, mine)
		if p := r.problem(condLease); !strings.Contains(p, `"other"`) || !strings.Contains(p, "192.0.2.10") {
			t.Errorf("problem %q", p)
		}
		if len(r.kernel.state.Links) > 0 {
			t.Error("a node without a lease has programmed something")
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
		for _, want := range []string{
			"peer new: n1 10.244.101.0/24, tunnel to 192.0.2.101",
			"peer changed: n1 10.244.101.0/24, tunnel to 192.0.2.201 (was tunnel to 192.0.2.101)",
			"peer new: n2 10.244.102.0/24, tunnel to 192.0.2.102",
			"peer gone: n1 10.244.101.0/24",
		} {
			if r.logged(want) != 1 {
				t.Errorf("%q was logged %d times", want, r.logged(want))
			}
		}
		many := []subnet.Entry{}
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
