package etcd

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const (
	pingEvery   = 10 * time.Second // gRPC's least
	pingTimeout = 5 * time.Second

	// askFor is how long one of several endpoints may take to connect and to say that it is of use, before the next one
	// is asked. Of three endpoints two may be silent: a node that starts has the store all the same before the 3 s are
	// over after which it uses what it remembers.
	askFor = time.Second

	// window is how much of an answer the store may send before it is acknowledged. With gRPC's 64 kB, a table of
	// thousands of leases takes many round trips; all of it is kept in memory in any case, until its end is there.
	window = 4 << 20

	// maxAnswer bounds the size of one answer, and with it what another client can make every node keep in memory.
	// Listings and watches come in parts; what changed during a lost race does not, and has room for 40,000 leases.
	maxAnswer = 16 << 20
)

// conn holds the one client in use: made when first needed, and given up for one of the next endpoint when its endpoint
// fails. So reads, writes and the watch are always at the same member, and leave it together. clientv3's own client
// takes the endpoints in turn for each request, whatever they answered before; and it sends a login that has ended
// along with the request for a new one, which etcd 3.4 rejects for that reason, again and again.
type conn struct {
	opts   Options
	count  counter
	newest atomic.Int64           // revision, in the last answer
	token  atomic.Pointer[string] // what etcd gave for user name and password, good at all members; nil: nothing yet
	hosts  *hosts

	making chan struct{} // holds a token while a client is made
	cli    atomic.Pointer[client]
	mu     sync.Mutex
	order  []string // the endpoints, in the order in which they are tried next
}

func newConn(o Options) *conn {
	c := &conn{opts: o, making: make(chan struct{}, 1), hosts: newHosts(o.Endpoints), order: slices.Clone(o.Endpoints)}
	// Nodes with the same list of endpoints don't all take the same one, neither at first nor when that fails.
	rand.Shuffle(len(c.order), func(i, j int) { c.order[i], c.order[j] = c.order[j], c.order[i] })
	return c
}

// get returns the client, and makes one if there is none.
func (c *conn) get(ctx context.Context) (*client, error) {
	select {
	case c.making <- struct{}{}:
		defer func() { <-c.making }()
	case <-ctx.Done():
		return nil, explain(ctx.Err(), c.opts, strings.Join(c.opts.Endpoints, ", "))
	}
	if cli := c.cli.Load(); cli != nil {
		return cli, nil
	}
	cli, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	c.cli.Store(cli)
	return cli, nil
}

// connect makes a client of the first endpoint that is of use. With a single endpoint there is no choice, and the first
// request tells. If none is of use, they may all be slow: one more is given the time of a request, another one at each
// call. To give it to each would put off the news that none answers.
func (c *conn) connect(ctx context.Context) (*client, error) {
	n := len(c.opts.Endpoints)
	failed := map[string]error{}
	for i := range n + 1 {
		endpoint, o := c.first(), c.opts
		if i < n {
			o.RequestTimeout = min(askFor, o.RequestTimeout)
		}
		cli, err := c.dial(endpoint)
		if err == nil && n > 1 {
			err = cli.ask(ctx, o.RequestTimeout)
		}
		if err == nil {
			return cli, nil
		}
		said := explain(err, o, endpoint)
		if !faulty(err) || ctx.Err() != nil { // what the store itself says, all endpoints say
			return nil, said
		}
		if i < n { // the same at each call, whichever is asked twice
			failed[endpoint] = said
		}
		c.passOver(endpoint)
	}
	return nil, noneOf(c.opts.Endpoints, failed)
}

func (c *conn) first() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.order[0]
}

// passOver has the endpoint behind this one tried next.
func (c *conn) passOver(endpoint string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := slices.Index(c.order, endpoint) + 1
	c.order = slices.Concat(c.order[i:], c.order[:i])
}

// dial does not wait for the connection: the first request does.
func (c *conn) dial(endpoint string) (*client, error) {
	_, host, _ := strings.Cut(endpoint, "://")
	creds := insecure.NewCredentials()
	if c.opts.tls() {
		creds = newFreshTLS(c.opts)
	}
	cli := &client{conn: c, endpoint: endpoint}
	cc, err := grpc.NewClient("passthrough:///"+host,
		grpc.WithContextDialer(c.hosts.dial),
		grpc.WithNoProxy(), // whatever HTTPS_PROXY says: the nodes' network is where etcd is
		grpc.WithTransportCredentials(creds),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           grpcbackoff.Config{BaseDelay: backoffMin, Multiplier: 1.6, Jitter: 0.3, MaxDelay: backoffMax},
			MinConnectTimeout: pingTimeout,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingEvery, Timeout: pingTimeout}),
		grpc.WithInitialWindowSize(window),
		grpc.WithInitialConnWindowSize(window),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithUnaryInterceptor(cli.unary),
		grpc.WithStreamInterceptor(cli.stream),
	)
	if err != nil {
		return nil, err
	}
	cli.cc = cc
	cli.KV = clientv3.NewKVFromKVClient(pb.NewKVClient(cc), nil)
	cli.Lease = clientv3.NewLeaseFromLeaseClient(pb.NewLeaseClient(cc), nil, c.opts.RequestTimeout)
	return cli, nil
}

// request runs f with the client in use, for at most as long as a request may take. If the endpoint fails, the next one
// is tried, each of them once. Once more it is tried if the login has ended, or if the client was given up meanwhile for
// another reason. Every request can be repeated: writes are guarded.
func (c *conn) request(ctx context.Context, f func(context.Context, *client) error) error {
	again := true
	for left := len(c.opts.Endpoints); ; {
		cli, err := c.get(ctx)
		if err != nil {
			return err
		}
		limited, cancel := context.WithTimeout(ctx, c.opts.RequestTimeout)
		err = f(limited, cli)
		cancel() // ends a stream as well
		givenUp := c.cli.Load() != cli
		err = c.failed(cli, err)
		switch {
		case err == nil || ctx.Err() != nil:
			return err
		case again && (faulty(err) && givenUp || loginEnded(err) && c.opts.Username != ""):
			again = false
		case faulty(err) && left > 1:
			left--
		default:
			return err
		}
	}
}

// failed explains the error of a request, and gives up what it shows to be of no use: the login, or the endpoint.
func (c *conn) failed(cli *client, err error) error {
	if err == nil {
		return nil
	}
	if loginEnded(err) {
		c.token.Store(nil)
	}
	if faulty(err) && c.drop(cli) {
		c.passOver(cli.endpoint)
	}
	return explain(err, c.opts, cli.endpoint)
}

// drop reports whether the client was the one in use.
func (c *conn) drop(cli *client) bool {
	mine := cli != nil && c.cli.CompareAndSwap(cli, nil)
	if mine {
		cli.close()
	}
	return mine
}

func (c *conn) close() { c.drop(c.cli.Load()) }

// client is a connection to one endpoint.
type client struct {
	conn     *conn
	endpoint string
	cc       *grpc.ClientConn
	clientv3.KV
	clientv3.Lease

	loggingIn sync.Mutex
}

func (c *client) close() {
	_ = c.Close() // of the embedded Lease
	_ = c.cc.Close()
}

// ask has an endpoint say whether it is of use: a member that votes and sees a leader.
func (c *client) ask(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	s, err := pb.NewMaintenanceClient(c.cc).Status(ctx, &pb.StatusRequest{})
	switch code := status.Code(err); {
	case err == nil && s.IsLearner:
		err = rpctypes.ErrGRPCNotSupportedForLearner
	// It may be of use all the same; and the request that comes next logs in again if that is due.
	case code == codes.PermissionDenied || code == codes.Unimplemented || loginEnded(err):
		err = nil
	}
	if err != nil {
		c.close()
	}
	return err
}

// unary counts the request, and adds what goes along with each.
func (c *client) unary(
	ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker,
	opts ...grpc.CallOption,
) error {
	ctx, err := c.prepare(ctx, method)
	if err == nil {
		err = next(ctx, method, req, reply, cc, opts...)
	}
	if r, ok := reply.(interface{ GetHeader() *pb.ResponseHeader }); ok && err == nil && r.GetHeader().GetRevision() > 0 {
		c.conn.newest.Store(r.GetHeader().GetRevision())
	}
	return err
}

func (c *client) stream(
	ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, next grpc.Streamer,
	opts ...grpc.CallOption,
) (grpc.ClientStream, error) {
	ctx, err := c.prepare(ctx, method)
	if err != nil {
		return nil, err
	}
	return next(ctx, desc, cc, method, opts...)
}

// prepare counts a request, and adds who asks, and that a member without a leader is to say so at once: it would let a
// request wait until its time is up, and a watch for ever.
func (c *client) prepare(ctx context.Context, method string) (context.Context, error) {
	c.conn.count.add(method)
	ctx = clientv3.WithRequireLeader(ctx)
	// A login that has ended must not go along with the request for a new one.
	if c.conn.opts.Username == "" || method == pb.Auth_Authenticate_FullMethodName {
		return ctx, nil
	}
	token, err := c.login(ctx)
	if err != nil || token == "" {
		return ctx, err
	}
	return metadata.AppendToOutgoingContext(ctx, rpctypes.TokenFieldNameGRPC, token), nil
}

// login logs in if there is no login yet. It outlives the endpoint: a new one costs etcd much, and all nodes move at
// once.
func (c *client) login(ctx context.Context) (token string, err error) {
	c.loggingIn.Lock()
	defer c.loggingIn.Unlock()
	if t := c.conn.token.Load(); t != nil {
		return *t, nil
	}
	password, err := c.conn.opts.password()
	if err != nil {
		return "", err
	}
	req := &pb.AuthenticateRequest{Name: c.conn.opts.Username, Password: password}
	resp, err := pb.NewAuthClient(c.cc).Authenticate(ctx, req)
	if err != nil && !errors.Is(rpctypes.Error(err), rpctypes.ErrAuthNotEnabled) {
		return "", err
	}
	token = resp.GetToken()
	c.conn.token.Store(&token)
	return token, nil
}

// counter counts requests by the name of the method.
type counter struct {
	mu sync.Mutex
	n  map[string]int64
}

func (c *counter) add(method string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n == nil {
		c.n = map[string]int64{}
	}
	c.n[path.Base(method)]++
}

func (c *counter) snapshot() map[string]int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.n)
}
