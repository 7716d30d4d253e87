package etcd

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd/etcdtest"
)

const secret = "pa55-w0rd"

// says waits for a fault with a text, and makes certain that no secret is in any of what was said.
func (n *node) says(text string) {
	n.t.Helper()
	n.until(text, func(s subnet.Snapshot) bool { return s.Err != nil && strings.Contains(s.Err.Error(), text) })
	for _, l := range n.logs.All() {
		if line := fmt.Sprint(l.Message, l.ContextMap()); strings.Contains(line, secret) ||
			strings.Contains(line, "wrong-one") {
			n.t.Errorf("a secret was logged: %s", line)
		}
	}
}

func TestCAAlone(t *testing.T) {
	t.Parallel()
	certs := etcdtest.NewCerts(t)
	s := store(t, etcdtest.TLS(certs))
	o := options(s)
	o.CAFile = certs.CA
	n := start(t, o)
	n.m.Claim(claim(1))
	n.untilHeld()

	for what, endpoint := range map[string]string{
		"signed by an unknown authority":   s.Endpoint(),
		"the server closed the connection": "http://" + s.Addr(),
	} {
		o := options(s)
		o.Endpoints = []string{endpoint}
		start(t, o).says(what)
	}
	plain := store(t)
	o.Endpoints = []string{"https://" + plain.Addr()}
	start(t, o).says("does not speak TLS")
}

func TestClientCertificate(t *testing.T) {
	t.Parallel()
	certs := etcdtest.NewCerts(t)
	s := store(t, etcdtest.TLS(certs), etcdtest.ClientCert())
	o := options(s)
	o.CAFile = certs.CA
	without := start(t, o)
	without.says("client certificate")
	o.CertFile, o.KeyFile = certs.ClientCert, certs.ClientKey
	n := start(t, o)
	n.m.Claim(claim(1))
	n.untilHeld()
}

func TestExpiredServerCertificate(t *testing.T) {
	t.Parallel()
	certs := etcdtest.NewCerts(t)
	certs.Issue(t, certs.ServerCert, certs.ServerKey, "server", time.Now().Add(-time.Minute))
	s := etcdtest.Start(t, etcdtest.TLS(certs))
	o := options(s)
	o.CAFile = certs.CA
	n := start(t, o)
	n.says("has expired")
	// etcd reads it at each handshake
	certs.Issue(t, certs.ServerCert, certs.ServerKey, "server", time.Now().Add(time.Hour))
	n.until("the store", reachable)
}

// All of the PKI is replaced while the store is down; the manager has the same file names as before.
func TestRotatedFiles(t *testing.T) {
	t.Parallel()
	certs := etcdtest.NewCerts(t)
	s := store(t, etcdtest.TLS(certs), etcdtest.ClientCert())
	o := options(s)
	o.CAFile, o.CertFile, o.KeyFile = certs.CA, certs.ClientCert, certs.ClientKey
	n := start(t, o)
	n.m.Claim(claim(1))
	first := n.untilHeld()
	s.Stop()
	n.until("a fault", away)
	certs.Renew(t)
	s.Restart()
	if again := n.untilHeld(); again.Lease != first.Lease {
		t.Errorf("it held %v, and holds %v", first.Lease, again.Lease)
	}
}

func TestUserAndPassword(t *testing.T) {
	t.Parallel()
	s := store(t, etcdtest.TokenTTL(1))
	s.EnableAuth("overlayd", secret, prefix+"/")

	start(t, options(s)).says("etcd requires a user name and password")

	wrong := options(s)
	wrong.Username, wrong.Password = "overlayd", "wrong-one"
	bad := start(t, wrong)
	bad.says(`wrong user name or password for user "overlayd"`)

	o := options(s)
	o.Username, o.Password = "overlayd", secret
	o.LeaseTTL = shortTTL
	n := start(t, o)
	n.m.Claim(claim(1))
	first := n.untilHeld()
	if got := n.sum() - n.m.Requests()["LeaseKeepAlive"]; got > 6 {
		t.Errorf("%d requests at a fresh start: %v", got, n.m.Requests())
	}
	t.Logf("requests at a fresh start: %v", n.m.Requests())
	if now := n.untilKept(first); now.Lease != first.Lease { // tokens and the etcd lease would have ended
		t.Errorf("it held %v, and holds %v", first.Lease, now.Lease)
	}
	if lost := n.lost(); len(lost) != 0 {
		t.Errorf("it lost the store: %v", lost)
	}

	other := o
	other.Prefix = "/elsewhere"
	start(t, other).says(`permission denied for user "overlayd": it needs to read and write /elsewhere/`)
	if lost := bad.lost(); len(lost) != 1 {
		t.Errorf("said %d times: %v", len(lost), lost)
	}
}

// The password is changed in the store and in the file while the manager runs: it notices when its login ends.
func TestPasswordFile(t *testing.T) {
	t.Parallel()
	s := store(t, etcdtest.TokenTTL(1))
	s.EnableAuth("overlayd", secret, prefix+"/")
	file := filepath.Join(t.TempDir(), "password")
	o := options(s)
	o.Username, o.PasswordFile, o.LeaseTTL = "overlayd", file, shortTTL
	write := func(p string) {
		if err := os.WriteFile(file, []byte(p+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(secret)
	n := start(t, o)
	n.m.Claim(claim(1))
	n.untilHeld()
	root := s.Client(etcdtest.As("root", "root"))
	must[*clientv3.AuthUserChangePasswordResponse](t)(root.UserChangePassword(ctxFor(t), "overlayd", "another"))
	n.says("wrong user name or password")
	write("another")
	n.untilHeld()
}

// A login that was refused for a while, beside a watch that goes on: the alarm ends soon after the reason for it.
func TestLoginRefusedForAWhile(t *testing.T) {
	t.Parallel()
	s := store(t)
	s.EnableAuth("overlayd", secret, prefix+"/")
	o := options(s)
	o.Username, o.Password = "overlayd", secret
	n := start(t, o)
	n.m.Claim(claim(1))
	n.untilHeld()
	root := s.Client(etcdtest.As("root", "root"))
	change := must[*clientv3.AuthUserChangePasswordResponse](t)
	change(root.UserChangePassword(ctxFor(t), "overlayd", "another")) // ends all logins
	n.m.answers <- func(s *state, now time.Time) { s.verify(now) }
	n.says("wrong user name or password")
	change(root.UserChangePassword(ctxFor(t), "overlayd", secret))
	began := time.Now()
	n.until("the end of the alarm", func(s subnet.Snapshot) bool { return s.Err == nil })
	if after := time.Since(began); after > 20*time.Second {
		t.Errorf("the alarm ended only after %s", after)
	}
}

// Reading is allowed, writing is not: the store can be reached, and it's the claim that fails.
func TestReadOnlyUser(t *testing.T) {
	t.Parallel()
	s := store(t)
	s.EnableAuth("overlayd", secret, "/nothing/")
	root := s.Client(etcdtest.As("root", "root"))
	must[*clientv3.AuthRoleGrantPermissionResponse](t)(root.RoleGrantPermission(ctxFor(t), "overlayd", prefix+"/",
		clientv3.GetPrefixRangeEnd(prefix+"/"), clientv3.PermissionType(clientv3.PermRead)))
	o := options(s)
	o.Username, o.Password = "overlayd", secret
	n := start(t, o)
	n.m.Claim(claim(1))
	n.until("a refusal", func(s subnet.Snapshot) bool {
		return s.Err == nil && s.ClaimErr != nil && strings.Contains(s.ClaimErr.Error(), "permission denied")
	})
	must[*clientv3.AuthRoleGrantPermissionResponse](t)(root.RoleGrantPermission(ctxFor(t), "overlayd", prefix+"/",
		clientv3.GetPrefixRangeEnd(prefix+"/"), clientv3.PermissionType(clientv3.PermReadWrite)))
	n.untilHeld()
}

// The least role, as Documentation/security.md has it: with a reserved key of its own, a node needs no other, and can
// change neither the network config nor the leases of others.
func TestLeastRole(t *testing.T) {
	t.Parallel()
	s := store(t)
	own, other := prefix+"/subnets/10.244.9.0-24", prefix+"/subnets/10.244.10.0-24"
	s.Put(own, `{"NodeName":"node-1"}`)
	s.EnableAuth("overlayd", secret, own)
	root := s.Client(etcdtest.As("root", "root"))
	must[*clientv3.AuthRoleRevokePermissionResponse](t)(root.RoleRevokePermission(ctxFor(t), "overlayd", own,
		clientv3.GetPrefixRangeEnd(own)))
	must[*clientv3.AuthRoleGrantPermissionResponse](t)(root.RoleGrantPermission(ctxFor(t), "overlayd", own, "",
		clientv3.PermissionType(clientv3.PermReadWrite)))
	must[*clientv3.AuthRoleGrantPermissionResponse](t)(root.RoleGrantPermission(ctxFor(t), "overlayd", prefix+"/",
		clientv3.GetPrefixRangeEnd(prefix+"/"), clientv3.PermissionType(clientv3.PermRead)))
	o := options(s)
	o.Username, o.Password = "overlayd", secret
	n := start(t, o)
	n.m.Claim(claim(1))
	if got := n.untilHeld().Lease.Subnets; got != prefixes("10.244.9.0/24", "") {
		t.Errorf("got %v", got)
	}
	c := claim(1)
	c.PublicIP.V4 = netip.MustParseAddr("172.16.0.9")
	n.m.Claim(c)
	n.until("the new address", func(s subnet.Snapshot) bool { return s.Lease.PublicIP == c.PublicIP })
	cli := s.Client(etcdtest.As("overlayd", secret))
	for _, key := range []string{prefix + "/config", prefix + "/unpaired", other, own + "&fd00::-64"} {
		if _, err := cli.Put(ctxFor(t), key, "{}"); err == nil || !strings.Contains(err.Error(), "permission denied") {
			t.Errorf("put %s: %v", key, err)
		}
		if _, err := cli.Delete(ctxFor(t), key); err == nil || !strings.Contains(err.Error(), "permission denied") {
			t.Errorf("delete %s: %v", key, err)
		}
	}
}

// The role that all nodes may share: they take and drop leases, and none can change the network config.
func TestSharedRole(t *testing.T) {
	t.Parallel()
	s := store(t)
	s.EnableAuth("overlayd", secret, prefix+"/subnets/")
	root := s.Client(etcdtest.As("root", "root"))
	must[*clientv3.AuthRoleGrantPermissionResponse](t)(root.RoleGrantPermission(ctxFor(t), "overlayd", prefix+"/",
		clientv3.GetPrefixRangeEnd(prefix+"/"), clientv3.PermissionType(clientv3.PermRead)))
	o := options(s)
	o.Username, o.Password = "overlayd", secret
	n := start(t, o)
	n.m.Claim(claim(1))
	n.untilHeld()
	if x := Examine(ctxFor(t), o); x.TableErr != nil || x.WriteErr != nil {
		t.Errorf("doctor is told %v, %v", x.TableErr, x.WriteErr)
	}
	cli := s.Client(etcdtest.As("overlayd", secret))
	if _, err := cli.Put(ctxFor(t), prefix+"/config", config); err == nil || !strings.Contains(err.Error(), "permission denied") {
		t.Errorf("put config: %v", err)
	}
}

func TestOptions(t *testing.T) {
	t.Parallel()
	certs, others := etcdtest.NewCerts(t), etcdtest.NewCerts(t)
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		change func(*Options)
		want   string
	}{
		{func(o *Options) { o.Endpoints = nil }, "--etcd-endpoints: expected at least one URL"},
		{
			func(o *Options) { o.Endpoints = []string{"ftp://x"} },
			`--etcd-endpoints: expected http://HOST:PORT or https://HOST:PORT, found "ftp://x"`,
		},
		{
			func(o *Options) { o.Endpoints = []string{"http://a:65536"} },
			`--etcd-endpoints: expected a port from 1 to 65535, found "http://a:65536"`,
		},
		{
			func(o *Options) { o.Endpoints = []string{"http://a:1", "b:0"} },
			`--etcd-endpoints: expected a port from 1 to 65535, found "b:0"`,
		},
		{
			func(o *Options) { o.Endpoints = []string{"[fd00::1]:99999999999999999999"} },
			"--etcd-endpoints: expected a port from 1 to 65535",
		},
		{func(o *Options) { o.Endpoints = []string{"http://a:-1"} }, "--etcd-endpoints: expected http"},
		{
			func(o *Options) { o.Endpoints = []string{"fd00::1"} },
			`--etcd-endpoints: an IPv6 address needs brackets, as in http://[fd00::1]:2379; found "fd00::1"`,
		},
		{
			func(o *Options) { o.Endpoints = []string{"https://2001:db8::1:2379"} },
			"--etcd-endpoints: an IPv6 address needs brackets",
		},
		{func(o *Options) { o.Endpoints = []string{"::1:2379"} }, "--etcd-endpoints: an IPv6 address needs brackets"},
		{func(o *Options) { o.Endpoints = []string{"http://fd00::1/"} }, "--etcd-endpoints: an IPv6 address needs brackets"},
		{func(o *Options) { o.Endpoints = []string{"http://a:1 http://b:1"} }, "--etcd-endpoints: expected http"},
		{func(o *Options) { o.Endpoints = []string{"http://a:1;http://b:1"} }, "--etcd-endpoints: expected http"},
		{func(o *Options) { o.Endpoints = []string{"http://http://a:1"} }, "--etcd-endpoints: expected "},
		{
			func(o *Options) { o.Endpoints = []string{"etcd+srv://example.net"} },
			"--etcd-endpoints: DNS SRV records are not looked up, list the endpoints",
		},
		{
			func(o *Options) { o.Endpoints = []string{"_etcd-client._tcp.example.net"} },
			"--etcd-endpoints: DNS SRV records are not looked up",
		},
		{func(o *Options) { o.Endpoints = []string{"http://a:1/b"} }, "--etcd-endpoints: expected nothing after the port"},
		{
			func(o *Options) { o.Endpoints = []string{"http://me:" + secret + "@a:1"} },
			"--etcd-endpoints: a user and password don't belong there",
		},
		{func(o *Options) { o.Endpoints = []string{"http://me:" + secret + "@a:x"} }, "--etcd-endpoints: expected http"},
		{
			func(o *Options) { o.Endpoints = []string{"http://a:1", "https://b:1"} },
			"--etcd-endpoints: expected all http:// or all https://",
		},
		{func(o *Options) { o.CAFile = certs.CA }, "--etcd-endpoints: http:// means no TLS"},
		{func(o *Options) { o.Endpoints, o.CAFile = []string{"a:1"}, "/nowhere" }, "--etcd-cafile: open /nowhere"},
		{func(o *Options) { o.Endpoints, o.CAFile = []string{"a:1"}, certs.ClientKey }, "has no PEM certificate in it"},
		{
			func(o *Options) { o.Endpoints, o.CertFile = []string{"a:1"}, certs.ClientCert },
			"--etcd-certfile and --etcd-keyfile: expected both",
		},
		{func(o *Options) {
			o.Endpoints, o.CertFile, o.KeyFile = []string{"a:1"}, certs.ClientCert, others.ClientKey
		}, "--etcd-certfile and --etcd-keyfile: " + certs.ClientCert},
		{
			func(o *Options) { o.Endpoints, o.CertFile, o.KeyFile = []string{"a:1"}, "/nowhere", "/nowhere" },
			"--etcd-certfile and --etcd-keyfile: /nowhere and /nowhere: open /nowhere",
		},
		{func(o *Options) { o.Password = secret }, "--etcd-username: expected a name"},
		{func(o *Options) { o.Username = "x" }, "--etcd-password or --etcd-password-file: expected one"},
		{
			func(o *Options) { o.Username, o.Password, o.PasswordFile = "x", secret, empty },
			"--etcd-password and --etcd-password-file: expected one",
		},
		{func(o *Options) { o.Username, o.PasswordFile = "x", "/nowhere" }, "--etcd-password-file: open /nowhere"},
		{func(o *Options) { o.Username, o.PasswordFile = "x", empty }, "is empty"},
		{func(o *Options) { o.LeaseTTL = time.Millisecond }, "--lease-ttl: expected at least 1s"},
		{func(o *Options) { o.Prefix = "//" }, "--etcd-prefix: expected a path"},
		{func(o *Options) { o.InitConfig = []byte("{}") }, "--init-config: network config: Network: expected"},
	} {
		o := Options{Endpoints: []string{"http://127.0.0.1:2379"}}
		tt.change(&o)
		_, err := New(o, nil)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("got %v, want %q", err, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), secret) {
			t.Errorf("the password is in %q", err)
		}
	}
	for in, want := range map[string]string{
		"a": "http://a:2379", "http://a:1/": "http://a:1",
		"https://[::1]": "https://[::1]:2379",
	} {
		m, err := New(Options{Endpoints: []string{in}}, nil)
		if err != nil || m.opts.Endpoints[0] != want {
			t.Errorf("%s: got %v, %v", in, m, err)
		}
	}
	m, err := New(Options{Endpoints: []string{"a:1"}, CAFile: certs.CA, Prefix: "coreos.com/network/"}, nil)
	if err != nil || m.opts.Endpoints[0] != "https://a:1" || m.keys.config != "/coreos.com/network/config" {
		t.Errorf("got %+v, %v", m, err)
	}
}
