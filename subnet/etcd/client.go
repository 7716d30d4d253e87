package etcd

import (
	"context"
	"errors"
	"math/rand/v2"
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

	// hedge is how long an endpoint may take to connect and to answer before the next one is asked beside it.
	hedge = time.Second

	// window is how much of an answer the store may send before it hears from us. With gRPC's 64 kB, a table of thousands of leases
	// takes a good many times the way there and back; all of it is kept in memory in any case, until its end is there.
	window = 4 << 20

	// maxAnswer bounds what one answer of the store may take up: a table of 100,000 nodes fits, and a client that fills
	// the prefix with junk can't have every node read gigabytes.
	maxAnswer = 128 << 20
)

// client is a connection to one endpoint.
type client struct {
	endpoint string
	cc       *grpc.ClientConn
	clientv3.KV
	clientv3.Lease
}

func (c *client) close() {
	_ = c.Close() // of the embedded Lease
	_ = c.cc.Close()
}

// conn holds the one client in use: made when first needed, and given up for one of the next endpoint when its endpoint
// fails. So reads, writes and the watch are always at the same member, and leave it together. clientv3's own client
// takes the endpoints in turn for each request, whatever they answered before; and it sends a login that has ended
// along with the request for a new one, which etcd 3.4 refuses for that reason, again and again.
type conn struct {
	opts   Options
	count  counter
	newest atomic.Int64 // revision, in the last answer
	login  login
	hosts  *hosts

	making chan struct{} // holds a token while a client is made
	mu     sync.Mutex
	cli    *client
	order  []string // the endpoints, in the order in which they are tried next
}

func newConn(o Options) *conn {
	one := func() chan struct{} { return make(chan struct{}, 1) }
	c := &conn{
		opts: o, making: one(), login: login{busy: one()}, hosts: newHosts(o.Endpoints), order: slices.Clone(o.Endpoints),
	}
	// Nodes with the same list of endpoints don't all take the same one, neither at first nor when that fails.
	rand.Shuffle(len(c.order), func(i, j int) { c.order[i], c.order[j] = c.order[j], c.order[i] })
	return c
}

func (c *conn) current() *client {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cli
}

// get returns the client, and makes one if there is none.
func (c *conn) get(ctx context.Context) (*client, error) {
	select {
	case c.making <- struct{}{}:
		defer func() { <-c.making }()
	case <-ctx.Done():
		return nil, explain(ctx.Err(), c.opts, strings.Join(c.opts.Endpoints, ", "))
	}
	if cli := c.current(); cli != nil {
		return cli, nil
	}
	cli, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cli = cli
	return cli, nil
}

// connect makes a client of the first endpoint that is of use. With a single endpoint there is no choice, and the first
// request tells.
func (c *conn) connect(ctx context.Context) (*client, error) {
	c.mu.Lock()
	order := c.order
	c.mu.Unlock()
	if len(order) == 1 {
		cli, err := c.dial(order[0])
		return cli, explain(err, c.opts, order[0])
	}
	ctx, cancel := context.WithTimeout(ctx, c.opts.RequestTimeout)
	type answer struct {
		endpoint string
		cli      *client
		err      error
	}
	answers := make(chan answer, len(order))
	asked, waiting := 0, 0
	defer func() {
		cancel()
		for ; waiting > 0; waiting-- {
			if late := <-answers; late.cli != nil {
				late.cli.close()
			}
		}
	}()
	failed := map[string]error{}
	for {
		var next <-chan time.Time
		if asked < len(order) {
			endpoint := order[asked]
			go func() {
				cli, err := c.ask(ctx, endpoint)
				answers <- answer{endpoint, cli, explain(err, c.opts, endpoint)}
			}()
			asked, waiting, next = asked+1, waiting+1, time.After(hedge)
		}
		select {
		case a := <-answers:
			waiting--
			if a.err == nil || !faulty(a.err) { // what the store itself says, all endpoints say
				return a.cli, a.err
			}
			failed[a.endpoint] = a.err
			if waiting == 0 && asked == len(order) {
				c.mu.Lock()
				c.order = slices.Concat(order[1:], order[:1]) // what spoiled this try may be how the first one fails
				c.mu.Unlock()
				return nil, noneOf(c.opts.Endpoints, failed)
			}
		case <-next:
		}
	}
}

// ask connects to an endpoint, and has it say whether it is of use: a member that votes and sees a leader.
func (c *conn) ask(ctx context.Context, endpoint string) (*client, error) {
	cli, err := c.dial(endpoint)
	if err != nil {
		return nil, err
	}
	s, err := pb.NewMaintenanceClient(cli.cc).Status(ctx, &pb.StatusRequest{})
	switch code := status.Code(err); {
	case err == nil && s.IsLearner:
		err = rpctypes.ErrGRPCNotSupportedForLearner
	case code == codes.PermissionDenied || code == codes.Unimplemented: // it may be of use all the same
		err = nil
	}
	if err != nil {
		cli.close()
		return nil, err
	}
	return cli, nil
}

// dial does not wait for the connection: the first request does.
func (c *conn) dial(endpoint string) (*client, error) {
	_, host, _ := strings.Cut(endpoint, "://")
	creds := insecure.NewCredentials()
	if c.opts.tls() {
		creds = freshTLS{c.opts.tlsFiles()}
	}
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
		grpc.WithUnaryInterceptor(c.unary),
		grpc.WithStreamInterceptor(c.stream),
	)
	if err != nil {
		return nil, err
	}
	return &client{
		endpoint, cc, clientv3.NewKVFromKVClient(pb.NewKVClient(cc), nil),
		clientv3.NewLeaseFromLeaseClient(pb.NewLeaseClient(cc), nil, c.opts.RequestTimeout),
	}, nil
}

// unary counts the request, adds what goes along with each, and repeats it once with a new login where the old one has
// ended.
func (c *conn) unary(
	ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker,
	opts ...grpc.CallOption,
) error {
	c.count.add(method)
	if method == pb.Auth_Authenticate_FullMethodName { // a login that has ended must not go along
		return next(clientv3.WithRequireLeader(ctx), method, req, reply, cc, opts...)
	}
	t, err := c.loggedIn(ctx, cc, nil)
	if err != nil {
		return err
	}
	err = next(t.on(ctx), method, req, reply, cc, opts...)
	if loginEnded(err) && c.opts.Username != "" {
		if t, err = c.loggedIn(ctx, cc, t); err != nil {
			return err
		}
		c.count.add(method)
		err = next(t.on(ctx), method, req, reply, cc, opts...)
	}
	if r, ok := reply.(interface{ GetHeader() *pb.ResponseHeader }); ok && err == nil && r.GetHeader().GetRevision() > 0 {
		c.newest.Store(r.GetHeader().GetRevision())
	}
	return err
}

func (c *conn) stream(
	ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, next grpc.Streamer,
	opts ...grpc.CallOption,
) (grpc.ClientStream, error) {
	c.count.add(method)
	t, err := c.loggedIn(ctx, cc, nil)
	if err != nil {
		return nil, err
	}
	return next(t.on(ctx), desc, cc, method, opts...)
}

// login is what etcd gave for the user name and the password. All members accept it.
type login struct {
	busy  chan struct{} // holds a token while etcd is asked
	token atomic.Pointer[token]
}

type token struct{ text string }

// on puts on a request what goes along with all: who asks, and that a member that sees no leader is to say so at once.
// Such a member would let a request wait until its time is up, and a watch for ever.
func (t *token) on(ctx context.Context) context.Context {
	ctx = clientv3.WithRequireLeader(ctx)
	if t == nil || t.text == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, rpctypes.TokenFieldNameGRPC, t.text)
}

// loggedIn returns a login other than ended. The password is read again for each.
func (c *conn) loggedIn(ctx context.Context, cc *grpc.ClientConn, ended *token) (*token, error) {
	usable := func() *token {
		if t := c.login.token.Load(); t != ended {
			return t
		}
		return nil
	}
	if t := usable(); t != nil || c.opts.Username == "" {
		return t, nil
	}
	ctx, cancel := context.WithTimeout(ctx, c.opts.RequestTimeout)
	defer cancel()
	var elsewhere <-chan time.Time
	if len(c.opts.Endpoints) > 1 { // the one that logs in may be at an endpoint that does not answer
		elsewhere = time.After(hedge)
	}
	select {
	case c.login.busy <- struct{}{}:
		defer func() { <-c.login.busy }()
	case <-elsewhere:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if t := usable(); t != nil {
		return t, nil
	}
	password, err := c.opts.password()
	if err != nil {
		return nil, err
	}
	resp, err := pb.NewAuthClient(cc).Authenticate(ctx, &pb.AuthenticateRequest{Name: c.opts.Username, Password: password})
	if err != nil && !errors.Is(rpctypes.Error(err), rpctypes.ErrAuthNotEnabled) {
		return nil, err
	}
	t := &token{resp.GetToken()}
	c.login.token.Store(t)
	return t, nil
}

// request runs f with the client in use, for at most as long as a request may take. Every request can be repeated:
// writes are guarded.
func (c *conn) request(ctx context.Context, f func(context.Context, *client) error) error {
	return c.try(ctx, func(cli *client) error {
		ctx, cancel := context.WithTimeout(ctx, c.opts.RequestTimeout)
		defer cancel() // ends a stream as well
		return f(ctx, cli)
	})
}

// try runs f with the client in use. Where it is the endpoint that fails, the next one is tried, each of them once.
// Once more it is tried where the login has ended, or where the client was given up meanwhile for another reason.
func (c *conn) try(ctx context.Context, f func(*client) error) error {
	again := true
	for left := len(c.opts.Endpoints); ; {
		cli, err := c.get(ctx)
		if err != nil {
			return err
		}
		err = f(cli)
		givenUp := c.current() != cli
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

// failed turns the error of a request into plain words, and gives up what it shows to be of no use: the login, or the
// endpoint.
func (c *conn) failed(cli *client, err error) error {
	if err == nil {
		return nil
	}
	if loginEnded(err) {
		c.login.token.Store(nil)
	}
	if faulty(err) && c.drop(cli) {
		c.mu.Lock()
		i := slices.Index(c.order, cli.endpoint)
		c.order = slices.Concat(c.order[i+1:], c.order[:i+1])
		c.mu.Unlock()
	}
	return explain(err, c.opts, cli.endpoint)
}

// drop reports whether the client was the one in use.
func (c *conn) drop(cli *client) bool {
	c.mu.Lock()
	mine := c.cli == cli && cli != nil
	if mine {
		c.cli = nil
	}
	c.mu.Unlock()
	if mine {
		cli.close()
	}
	return mine
}

func (c *conn) close() { c.drop(c.current()) }
