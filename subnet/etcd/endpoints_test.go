package etcd

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd/etcdtest"
)

// within is how long moving away from an endpoint may take: a request's time, and time for a busy machine.
const within = 15 * time.Second

// A login ends while etcd is out of reach, or because etcd forgets it; the server refuses to give a new one to a client
// that shows the old one. The node is back within seconds, and asks for few logins.
func TestLoginThatEnded(t *testing.T) {
	t.Parallel()
	for name, away := range map[string]func(*testing.T, *etcdtest.Server, *relay){
		"unreachable for longer than a login lasts": func(_ *testing.T, _ *etcdtest.Server, r *relay) {
			r.cut()
			time.Sleep(3 * time.Second)
			r.mend()
		},
		"hung for longer than a login lasts": func(_ *testing.T, _ *etcdtest.Server, r *relay) {
			r.frozen.Store(true)
			time.Sleep(4 * time.Second)
			r.frozen.Store(false)
		},
		"password set again, and etcd restarted": func(t *testing.T, s *etcdtest.Server, _ *relay) {
			root := s.Client(etcdtest.As("root", "root"))
			must[*clientv3.AuthUserChangePasswordResponse](t)(root.UserChangePassword(ctxFor(t), "overlayd", secret))
			s.Restart()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := store(t, etcdtest.TokenTTL(1), etcdtest.StrictLogin())
			s.EnableAuth("overlayd", secret, prefix+"/")
			relay := newRelay(t, s.Addr())
			o := options(s)
			o.Endpoints = []string{"http://" + relay.addr}
			o.Username, o.Password, o.RequestTimeout, o.LeaseTTL = "overlayd", secret, 2*time.Second, shortTTL
			n := start(t, o)
			n.m.Claim(claim(1))
			first := n.untilHeld()
			untilWatching(t, n.m)
			before := n.m.Requests()["Authenticate"]
			away(t, s, relay)
			began := time.Now()
			n.until("the lease, renewed", func(s subnet.Snapshot) bool {
				return held(s) && s.Lease == first.Lease && s.Expires.After(first.Expires)
			})
			root := s.Client(etcdtest.As("root", "root"))
			must[*clientv3.PutResponse](t)(root.Put(ctxFor(t), prefix+"/subnets/10.244.9.0-24", ""))
			n.until("what changes now", func(s subnet.Snapshot) bool { return held(s) && len(s.Table.Entries) == 2 })
			if took := time.Since(began); took > 20*time.Second {
				t.Errorf("it took %s", took)
			}
			if logins := n.m.Requests()["Authenticate"] - before; logins > 10 {
				t.Errorf("%d requests for a login", logins)
			}
		})
	}
}

// useless are the endpoints that answer and are of no use, each with what is said of it.
func useless(t *testing.T) (*etcdtest.Cluster, map[string]*etcdtest.Server) {
	t.Helper()
	c := etcdtest.StartCluster(t, 3)
	c.Members[0].Put(prefix+"/config", config)
	return c, map[string]*etcdtest.Server{"is a learner": c.AddLearner(t), "has no leader": c.Members[2]}
}

// A node has an endpoint that answers and is of no use, first and last in its list: it starts, writes, and is told of
// what changes.
func TestUselessEndpointAtStart(t *testing.T) {
	t.Parallel()
	c, bad := useless(t)
	c.CutOff(t, c.Members[2])
	i := 0
	for name, s := range bad {
		for _, at := range []int{0, 3} {
			i++
			o := options(s)
			o.Endpoints, o.RequestTimeout = c.Endpoints(s, at), 5*time.Second
			m := must[*Manager](t)(New(o, zap.NewNop()))
			m.conn.order = slices.Clone(o.Endpoints) // as if chance had left it
			began := time.Now()
			must[subnet.Table](t)(m.List(ctxFor(t)))
			if took := time.Since(began); took > within {
				t.Errorf("%s, at %d: a reading took %s", name, at, took)
			}
			m.Close()
			n := start(t, o)
			n.m.Claim(claim(i))
			n.untilHeld()
			if took := time.Since(began); took > 2*within {
				t.Errorf("%s, at %d: a lease took %s", name, at, took)
			}
			untilWatching(t, n.m)
			told(t, c, n, i)
			if lost := n.lost(); len(lost) != 0 {
				t.Errorf("%s, at %d: it was taken for a loss of etcd: %v", name, at, lost)
			}
		}
		o := options(s)
		o.Endpoints = []string{s.Endpoint()}
		_, err := must[*Manager](t)(New(o, zap.NewNop())).List(ctxFor(t))
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("alone it says %v, want %q", err, name)
		}
	}
	o := options(c.Members[0])
	o.Endpoints = []string{bad["is a learner"].Endpoint(), bad["has no leader"].Endpoint()}
	_, err := must[*Manager](t)(New(o, zap.NewNop())).List(ctxFor(t))
	want := fmt.Sprintf("etcd: %s is a learner and serves no requests until promoted (etcdctl member promote); "+
		"%s: the etcd cluster has no leader", o.Endpoints[0], o.Endpoints[1])
	if err == nil || err.Error() != want {
		t.Errorf("it says %v, want %s", err, want)
	}
}

// An endpoint that never answers a login does not keep the login from another one.
func TestLoginBesideSilentEndpoint(t *testing.T) {
	t.Parallel()
	s := store(t)
	s.EnableAuth("overlayd", secret, prefix+"/")
	silent := newRelay(t, s.Addr())
	silent.frozen.Store(true)
	o := options(s)
	o.Endpoints = []string{"http://" + silent.addr, s.Endpoint()}
	o.Username, o.Password, o.RequestTimeout = "overlayd", secret, 5*time.Second
	m := must[*Manager](t)(New(o, zap.NewNop()))
	m.conn.order = slices.Clone(o.Endpoints) // as if chance had left it
	n := run(t, m)
	n.m.Claim(claim(1))
	n.untilHeld()
	if got := m.conn.cli.Load().endpoint; got != s.Endpoint() {
		t.Errorf("it is at %s", got)
	}
}

// loggedIn has logged in at the first of two endpoints.
func loggedIn(t *testing.T, s *etcdtest.Server) (m *Manager, first *relay) {
	t.Helper()
	first, second := newRelay(t, s.Addr()), newRelay(t, s.Addr())
	o := options(s)
	o.Endpoints = []string{"http://" + first.addr, "http://" + second.addr}
	o.Username, o.Password = "overlayd", secret
	m = must[*Manager](t)(New(o, zap.NewNop()))
	m.conn.order = slices.Clone(o.Endpoints) // as if chance had left it
	t.Cleanup(m.Close)
	must[subnet.Table](t)(m.List(ctxFor(t)))
	return m, first
}

// A login is good at all endpoints: one that fails does not make all nodes log in again at once.
func TestLoginOutlivesTheEndpoint(t *testing.T) {
	t.Parallel()
	s := store(t)
	s.EnableAuth("overlayd", secret, prefix+"/")
	m, first := loggedIn(t, s)
	before := m.Requests()["Authenticate"]
	first.cut()
	must[subnet.Table](t)(m.List(ctxFor(t)))
	if got := m.Requests()["Authenticate"] - before; got != 0 {
		t.Errorf("%d more logins", got)
	}
}

// A login has ended by the time that its endpoint fails: the next endpoint rejects it, and gives a new one.
func TestLoginEndedAtTheNextEndpoint(t *testing.T) {
	t.Parallel()
	s := store(t)
	s.EnableAuth("overlayd", secret, prefix+"/")
	root := s.Client(etcdtest.As("root", "root"))
	m, first := loggedIn(t, s)
	// Ends all logins, as their time would.
	must[*clientv3.AuthUserChangePasswordResponse](t)(root.UserChangePassword(ctxFor(t), "overlayd", secret))
	first.cut()
	must[subnet.Table](t)(m.List(ctxFor(t)))
	if got := m.Requests()["Authenticate"]; got != 2 {
		t.Errorf("%d logins, want 2", got)
	}
}

// The endpoint in use becomes useless while the node runs.
func TestMemberCutOff(t *testing.T) {
	t.Parallel()
	c, _ := useless(t)
	for i, at := range []int{0, 3} {
		bad := c.Members[2]
		o := options(bad)
		o.Endpoints, o.RequestTimeout, o.LeaseTTL = c.Endpoints(bad, at), 5*time.Second, shortTTL
		m := must[*Manager](t)(New(o, zap.NewNop()))
		m.conn.order = slices.Concat(o.Endpoints[at:], o.Endpoints[:at])
		n := run(t, m)
		n.m.Claim(claim(i + 1))
		first := n.untilHeld()
		untilWatching(t, n.m)
		if got := m.conn.cli.Load().endpoint; got != bad.Endpoint() {
			t.Fatalf("it is at %s", got)
		}
		c.CutOff(t, bad)
		if took := told(t, c, n, i+1); took > within {
			t.Errorf("at %d: it took %s until the watch was elsewhere", at, took)
		}
		n.until("a renewal", func(s subnet.Snapshot) bool { return held(s) && s.Expires.After(first.Expires) })
		changed := claim(i + 1)
		changed.PublicIPLocal = false
		n.m.Claim(changed)
		began := time.Now()
		n.until("a write", func(s subnet.Snapshot) bool { return held(s) && s.Claimed == changed })
		if took := time.Since(began); took > within {
			t.Errorf("at %d: it took %s to write", at, took)
		}
		n.stop()
		c.CutOff(t, nil)
	}
}

// told writes by another member, and waits until the node has been told: so long after the write.
func told(t *testing.T, c *etcdtest.Cluster, n *node, i int) time.Duration {
	t.Helper()
	key := fmt.Sprintf("10.244.%d.0-24", 200+i)
	cli := c.Members[0].Client()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	_, err := cli.Put(ctx, prefix+"/subnets/"+key, "")
	for err != nil && ctx.Err() == nil { // the member that was cut off may have been the leader
		_, err = cli.Put(ctx, prefix+"/subnets/"+key, "")
	}
	must[struct{}](t)(struct{}{}, err)
	written := time.Now()
	n.until("what changes", func(s subnet.Snapshot) bool {
		return slices.ContainsFunc(s.Table.Entries, func(e *subnet.Entry) bool { return e.Key == key })
	})
	return time.Since(written)
}

// A client that is given up while a request is on its way is no fault of etcd: the request goes on with the next
// client.
func TestClientGivenUp(t *testing.T) {
	t.Parallel()
	s := store(t)
	c := newConn(must[Options](t)(options(s).check()))
	defer c.close()
	tries := 0
	err := c.request(ctxFor(t), func(ctx context.Context, cli *client) error {
		if tries++; tries == 1 {
			c.drop(cli)
		}
		_, err := cli.Get(ctx, prefix+"/config")
		return err
	})
	if err != nil || tries != 2 {
		t.Errorf("%d tries, %v", tries, err)
	}
}

// slow is an endpoint that takes its time to say that it is of use.
type slow struct {
	pb.UnimplementedMaintenanceServer
	wait time.Duration
}

func (s slow) Status(ctx context.Context, _ *pb.StatusRequest) (*pb.StatusResponse, error) {
	select {
	case <-time.After(s.wait):
	case <-ctx.Done():
	}
	return &pb.StatusResponse{}, ctx.Err()
}

// startSlow returns the endpoint.
func startSlow(t *testing.T, wait time.Duration) string {
	t.Helper()
	ln := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	srv := grpc.NewServer()
	pb.RegisterMaintenanceServer(srv, slow{wait: wait})
	go func() { _ = srv.Serve(ln) }()
	t.Cleanup(srv.Stop)
	return "http://" + ln.Addr().String()
}

// All endpoints need longer than the time after which the next one is asked, and less than a request may take.
func TestSlowEndpoints(t *testing.T) {
	t.Parallel()
	o := Options{Endpoints: []string{startSlow(t, 2*askFor), startSlow(t, 2*askFor)}, RequestTimeout: within}
	c := newConn(must[Options](t)(o.check()))
	defer c.close()
	must[*client](t)(c.get(ctxFor(t)))
}

// No endpoint answers: each call takes a bounded time, says the same, and gives another one more time.
func TestSilentEndpoints(t *testing.T) {
	t.Parallel()
	o := Options{Endpoints: []string{startSlow(t, patience), startSlow(t, patience)}, RequestTimeout: 2 * askFor}
	c := newConn(must[Options](t)(o.check()))
	defer c.close()
	want := fmt.Sprintf("etcd: no answer from %s within 1s; no answer from %s within 1s", o.Endpoints[0], o.Endpoints[1])
	for range o.Endpoints {
		first, began := c.first(), time.Now()
		_, err := c.get(ctxFor(t))
		if err == nil || err.Error() != want {
			t.Errorf("it says %v, want %s", err, want)
		}
		if took := time.Since(began); took < 4*askFor || took > within {
			t.Errorf("it took %s", took)
		}
		if c.first() == first {
			t.Errorf("%s is the first again", first)
		}
	}
}
