// Package etcdtest runs a real etcd inside a test: one member at a loopback address of its own, with switches for what
// goes wrong with stores.
package etcdtest

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/auth"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"github.com/overlayd/overlayd/test/nstest"
)

const patience = 20 * time.Second

// Server is one etcd.
type Server struct {
	t    testing.TB
	dir  string
	url  url.URL
	etcd *embed.Etcd
	auth atomic.Pointer[auth.AuthStore]
	stop context.CancelFunc // ends the streams of clients

	cluster *Cluster // nil for a member alone
	name    string   // in the cluster
	wire    *wire

	certs      *Certs // nil: no TLS
	clientCert bool
	tokenTTL   uint
	strict     bool
}

// Option changes how a Server is started.
type Option func(*Server)

// TLS has the server speak TLS with the certificate of c.
func TLS(c *Certs) Option { return func(s *Server) { s.certs = c } }

// ClientCert has the server ask for a client certificate by the CA of TLS.
func ClientCert() Option { return func(s *Server) { s.clientCert = true } }

// TokenTTL is how many seconds a login lasts, where EnableAuth is used.
func TokenTTL(seconds uint) Option { return func(s *Server) { s.tokenTTL = seconds } }

// StrictLogin has the server reject a request for a login that an ended login comes along with, as etcd 3.4 does.
func StrictLogin() Option { return func(s *Server) { s.strict = true } }

// Start runs a server until the end of the test.
func Start(t testing.TB, opts ...Option) *Server {
	t.Helper()
	s := newServer(t, opts...)
	s.Restart()
	return s
}

func newServer(t testing.TB, opts ...Option) *Server {
	t.Helper()
	s := &Server{
		t: t, dir: filepath.Join(t.TempDir(), "etcd"),
		url: url.URL{Scheme: "http", Host: freePort(t, nstest.Loopback())},
	}
	for _, f := range opts {
		f(s)
	}
	if s.certs != nil {
		s.url = url.URL{Scheme: "https", Host: freePort(t, s.certs.ip)}
	}
	t.Cleanup(s.Stop)
	return s
}

// Endpoint is the server's URL. It stays the same over restarts.
func (s *Server) Endpoint() string { return s.url.String() }

// Addr is HOST:PORT of the endpoint.
func (s *Server) Addr() string { return s.url.Host }

// Restart starts the server, after stopping it if it runs.
func (s *Server) Restart() {
	s.t.Helper()
	s.Stop()
	deadline := time.Now().Add(patience)
	for {
		err := s.start()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("etcd on %s: %v", s.url.Host, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (s *Server) start() error {
	streams, stop := context.WithCancel(context.Background())
	etcd, err := embed.StartEtcd(s.config(streams))
	if err != nil {
		stop()
		return err
	}
	select {
	case <-etcd.Server.ReadyNotify():
		s.etcd, s.stop = etcd, stop
		s.auth.Store(new(etcd.Server.AuthStore()))
		return nil
	case err = <-etcd.Err():
	case <-time.After(patience):
		err = errors.New("it does not become ready")
	}
	stop()
	etcd.Close()
	return err
}

func (s *Server) config(streams context.Context) *embed.Config {
	peer := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	c := embed.NewConfig()
	c.Dir = s.dir
	c.UnsafeNoFsync = true
	c.TickMs, c.ElectionMs = 20, 200
	c.ListenClientUrls, c.AdvertiseClientUrls = []url.URL{s.url}, []url.URL{s.url}
	c.ListenPeerUrls, c.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	c.InitialCluster = c.InitialClusterFromName(c.Name)
	c.BcryptCost = 4
	c.GRPCAdditionalServerOptions = []grpc.ServerOption{grpc.ChainStreamInterceptor(endStreams(streams))}
	if s.strict {
		c.GRPCAdditionalServerOptions = append(c.GRPCAdditionalServerOptions, grpc.ChainUnaryInterceptor(s.strictLogin))
	}
	if s.cluster != nil {
		s.cluster.configure(c, s)
	}
	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	c.AuthTokenTTL = cmp.Or(s.tokenTTL, c.AuthTokenTTL)
	if k := s.certs; k != nil {
		c.ClientTLSInfo = transport.TLSInfo{CertFile: k.ServerCert, KeyFile: k.ServerKey}
		if s.clientCert { // a CA alone would already make etcd ask for one
			c.ClientTLSInfo.TrustedCAFile, c.ClientTLSInfo.ClientCertAuth = k.CA, true
		}
	}
	return c
}

func (s *Server) strictLogin(
	ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler,
) (any, error) {
	if store := s.auth.Load(); store != nil && info.FullMethod == pb.Auth_Authenticate_FullMethodName {
		if _, err := (*store).AuthInfoFromCtx(ctx); err != nil {
			return nil, rpctypes.ErrGRPCInvalidAuthToken
		}
	}
	return next(ctx, req)
}

// endStreams ends the streams of clients (watches, renewals) along with ctx: a server that stops waits for them for
// seconds.
func endStreams(ctx context.Context) grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
		own, cancel := context.WithCancel(ss.Context())
		defer cancel()
		defer context.AfterFunc(ctx, cancel)()
		return next(srv, stream{ss, own})
	}
}

type stream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s stream) Context() context.Context { return s.ctx }

// Stop ends the server; its data stay.
func (s *Server) Stop() {
	if s.etcd != nil {
		s.stop()
		s.etcd.Close()
		s.etcd = nil
	}
}

// Wipe stops the server and removes its data, as if the disk were lost. Restart brings up an empty one.
func (s *Server) Wipe() {
	s.t.Helper()
	s.Stop()
	must(s.t, os.RemoveAll(s.dir))
}

// Backup stops the server, copies its data and starts it again. The function returned puts them back, with a stop and a
// start.
func (s *Server) Backup() (restore func()) {
	s.t.Helper()
	s.Stop()
	copied := filepath.Join(s.t.TempDir(), "backup")
	must(s.t, os.CopyFS(copied, os.DirFS(s.dir)))
	s.Restart()
	return func() {
		s.t.Helper()
		s.Wipe()
		must(s.t, os.CopyFS(s.dir, os.DirFS(copied)))
		s.Restart()
	}
}

// Client makes a client of the server, closed at the end of the test. opts change its configuration.
func (s *Server) Client(opts ...func(*clientv3.Config)) *clientv3.Client {
	s.t.Helper()
	c := clientv3.Config{Endpoints: []string{s.Endpoint()}, Logger: zap.NewNop(), DialTimeout: patience}
	if k := s.certs; k != nil {
		pair, err := tls.LoadX509KeyPair(k.ClientCert, k.ClientKey)
		must(s.t, err)
		c.TLS = &tls.Config{RootCAs: k.pool(s.t), Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
	}
	for _, f := range opts {
		f(&c)
	}
	cli, err := clientv3.New(c)
	must(s.t, err)
	s.t.Cleanup(func() { _ = cli.Close() })
	return cli
}

// As makes a client log in.
func As(user, password string) func(*clientv3.Config) {
	return func(c *clientv3.Config) { c.Username, c.Password = user, password }
}

// EnableAuth turns authentication on, with the user root (password "root") and the given one, who may do all below
// prefix.
func (s *Server) EnableAuth(user, password, prefix string) {
	s.t.Helper()
	cli := s.Client()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	ok := func(_ any, err error) { s.t.Helper(); must(s.t, err) }
	for name, password := range map[string]string{"root": "root", user: password} {
		if _, err := cli.RoleAdd(ctx, name); err != nil && !strings.Contains(err.Error(), "already exists") {
			s.t.Fatal(err)
		}
		ok(cli.UserAdd(ctx, name, password))
		ok(cli.UserGrantRole(ctx, name, name))
	}
	end, readWrite := clientv3.GetPrefixRangeEnd(prefix), clientv3.PermissionType(clientv3.PermReadWrite)
	ok(cli.RoleGrantPermission(ctx, user, prefix, end, readWrite))
	ok(cli.AuthEnable(ctx))
}

// Put writes a key without an etcd lease, and returns the revision.
func (s *Server) Put(key, value string) int64 {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cli := s.Client()
	defer cli.Close()
	resp, err := cli.Put(ctx, key, value)
	must(s.t, err)
	return resp.Header.Revision
}

// Revision is the store's revision.
func (s *Server) Revision() int64 { return s.etcd.Server.KV().Rev() }

// freePort finds a port below those that the kernel gives out by itself: another process may have one of these at all
// addresses.
func freePort(t testing.TB, ip netip.Addr) string {
	t.Helper()
	for range 100 {
		addr := fmt.Sprintf("%s:%d", ip, 20000+rand.IntN(12000))
		l, err := net.Listen("tcp", addr)
		if err == nil {
			_ = l.Close()
			return addr
		}
	}
	t.Fatal("no free port")
	return ""
}
