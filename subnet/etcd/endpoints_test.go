package etcd

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

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
			if n.said("etcd unreachable; the data plane stays unchanged") != 0 {
				t.Errorf("%s, at %d: it was taken for a loss of etcd: %v", name, at, n.logs.All())
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
	if got := m.conn.current().endpoint; got != s.Endpoint() {
		t.Errorf("it is at %s", got)
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
		if got := m.conn.current().endpoint; got != bad.Endpoint() {
			t.Fatalf("it is at %s", got)
		}
		c.CutOff(t, bad)
		began := time.Now()
		told(t, c, n, i+1)
		if took := time.Since(began); took > within {
			t.Errorf("at %d: it took %s until the watch was elsewhere", at, took)
		}
		n.until("a renewal", func(s subnet.Snapshot) bool { return held(s) && s.Expires.After(first.Expires) })
		changed := claim(i + 1)
		changed.PublicIPLocal = false
		n.m.Claim(changed)
		began = time.Now()
		n.until("a write", func(s subnet.Snapshot) bool { return held(s) && s.Claimed == changed })
		if took := time.Since(began); took > within {
			t.Errorf("at %d: it took %s to write", at, took)
		}
		n.stop()
		c.CutOff(t, nil)
	}
}

// told writes by another member, and waits until the node has been told.
func told(t *testing.T, c *etcdtest.Cluster, n *node, i int) {
	t.Helper()
	key := fmt.Sprintf("10.244.%d.0-24", 200+i)
	cli := c.Members[0].Client()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	must[*clientv3.PutResponse](t)(cli.Put(ctx, prefix+"/subnets/"+key, ""))
	n.until("what changes", func(s subnet.Snapshot) bool {
		return slices.ContainsFunc(s.Table.Entries, func(e *subnet.Entry) bool { return e.Key == key })
	})
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
