package etcd

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd/etcdtest"
	"github.com/overlayd/overlayd/subnet/examine"
)

// An examination reads all, writes nothing, and finds that the clocks agree.
func TestExamine(t *testing.T) {
	t.Parallel()
	s := store(t)
	s.Put(prefix+"/subnets/10.244.5.0-24",
		string(subnet.FormatValue(subnet.Attrs{Identity: subnet.Identity{NodeName: "n"}})))
	before := s.Revision()
	o := options(s)
	o.Endpoints = append(o.Endpoints, "http://127.0.0.1:1")
	began := time.Now()
	x := Examine(t.Context(), o)
	if x.OptionsErr != nil || x.TableErr != nil || x.WriteErr != nil || x.NoConfig || x.Table.ConfigErr != nil ||
		len(x.Table.Entries) != 1 {
		t.Fatalf("%+v", x)
	}
	took := time.Since(began)
	good, bad := x.Endpoints[0], x.Endpoints[1]
	if good.Err != nil || good.Took <= 0 || !strings.HasPrefix(good.Version, "3.") || len(good.Alarms) != 0 {
		t.Errorf("%+v", good)
	}
	if good.ClockErr != nil || good.Clock.Abs() > time.Second+took {
		t.Errorf("the clock is %s ahead, %v", good.Clock, good.ClockErr)
	}
	if bad.Err == nil || bad.Err.Error() != "etcd: connection refused by http://127.0.0.1:1" || bad.ClockErr == nil {
		t.Errorf("%+v", bad)
	}
	if now := s.Revision(); now != before {
		t.Errorf("the revision was %d, it is %d", before, now)
	}
	if y := Examine(t.Context(), Options{Endpoints: []string{"ftp://x"}}); y.OptionsErr == nil {
		t.Errorf("%+v", y)
	}
	o = options(s)
	o.Prefix = "/elsewhere"
	if y := Examine(t.Context(), o); !y.NoConfig || y.TableErr != nil || len(y.Table.Entries) != 0 {
		t.Errorf("%+v", y)
	}
}

// A store that does not answer is given up in time.
func TestExamineSilentStore(t *testing.T) {
	t.Parallel()
	// reserved for documentation (RFC 5737)
	o := Options{Endpoints: []string{"http://192.0.2.1:2379"}, RequestTimeout: 300 * time.Millisecond}
	began := time.Now()
	x := Examine(t.Context(), o)
	if x.TableErr == nil || x.Endpoints[0].Err == nil || x.Endpoints[0].ClockErr == nil {
		t.Errorf("%+v", x)
	}
	if took := time.Since(began); took > 15*time.Second { // the kernel tries for two minutes
		t.Errorf("it took %s", took)
	}
}

func TestExamineCertificates(t *testing.T) {
	t.Parallel()
	certs := etcdtest.NewCerts(t)
	end := time.Now().Add(20 * time.Minute).Truncate(time.Second)
	certs.Issue(t, certs.ClientCert, certs.ClientKey, "client", end)
	s := store(t, etcdtest.TLS(certs), etcdtest.ClientCert())
	o := options(s)
	o.CAFile, o.CertFile, o.KeyFile = certs.CA, certs.ClientCert, certs.ClientKey
	x := Examine(t.Context(), o)
	if x.TableErr != nil || x.Endpoints[0].Err != nil || x.Endpoints[0].ClockErr != nil {
		t.Errorf("%+v", x)
	}
	found := map[string]examine.Certificate{}
	for _, c := range x.Certificates {
		found[c.What] = c
	}
	if len(found) != 3 || !found["--etcd-certfile"].NotAfter.Equal(end) ||
		found["the server at "+s.Endpoint()].Subject != "CN=server" || found["--etcd-cafile"].File != certs.CA {
		t.Errorf("%+v", found)
	}

	// One that is not trusted is shown all the same.
	o.CAFile = etcdtest.NewCerts(t).CA
	x = Examine(t.Context(), o)
	if x.TableErr == nil || !strings.Contains(x.Endpoints[0].Err.Error(), "unknown authority") ||
		len(x.Certificates) != 3 {
		t.Errorf("%+v", x)
	}
}

// Who may not write, or where there is no room, is told so, and nothing is written.
func TestExamineWriting(t *testing.T) {
	t.Parallel()
	s := store(t)
	s.EnableAuth("overlayd", secret, prefix+"/")
	root := s.Client(etcdtest.As("root", "root"))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	_, err := root.RoleAdd(ctx, "reader")
	end := clientv3.GetPrefixRangeEnd(prefix + "/")
	for _, step := range []func() error{
		func() error { return err },
		func() error {
			_, err := root.RoleGrantPermission(ctx, "reader", prefix+"/", end, clientv3.PermissionType(clientv3.PermRead))
			return err
		},
		func() error { _, err := root.UserAdd(ctx, "reader", secret); return err },
		func() error { _, err := root.UserGrantRole(ctx, "reader", "reader"); return err },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	o := options(s)
	o.Username, o.PasswordFile = "reader", filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(o.PasswordFile, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	x := Examine(ctx, o)
	if x.TableErr != nil || x.WriteErr == nil || !strings.Contains(x.WriteErr.Error(), "permission denied") {
		t.Errorf("%+v", x)
	}
	o.Username = "overlayd"
	if x := Examine(ctx, o); x.TableErr != nil || x.WriteErr != nil {
		t.Errorf("%+v", x)
	}
	o.Username = "nobody"
	if x := Examine(ctx, o); x.TableErr == nil || strings.Contains(x.TableErr.Error(), secret) ||
		x.Endpoints[0].Err == nil {
		t.Errorf("%+v", x)
	}
}

// A store without room says so.
func TestExamineAlarm(t *testing.T) {
	t.Parallel()
	s := store(t)
	ctx := ctxFor(t)
	cli := s.Client()
	status, err := cli.Status(ctx, s.Endpoint())
	if err != nil {
		t.Fatal(err)
	}
	req := &pb.AlarmRequest{
		Action: pb.AlarmRequest_ACTIVATE, MemberID: status.Header.MemberId,
		Alarm: pb.AlarmType_NOSPACE,
	}
	if _, err := pb.NewMaintenanceClient(cli.ActiveConnection()).Alarm(ctx, req); err != nil {
		t.Fatal(err)
	}
	x := Examine(ctx, options(s))
	if x.TableErr != nil || x.WriteErr == nil || !strings.Contains(x.WriteErr.Error(), "space") ||
		len(x.Endpoints[0].Alarms) != 1 || !strings.Contains(x.Endpoints[0].Alarms[0], "NOSPACE") {
		t.Errorf("%+v", x)
	}
}
