package etcd

import (
	"context"
	"maps"
	"math/rand/v2"
	"path"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
)

const (
	pingEvery   = 10 * time.Second // gRPC's least
	pingTimeout = 5 * time.Second

	// window is how much of an answer the store may send before it hears from us. With gRPC's 64 kB, a table of thousands of leases
	// takes a good many times the way there and back; all of it is kept in memory in any case, until its end is there.
	window = 4 << 20

	// readySpread spreads the nodes out that all see the store come back at the same moment.
	readySpread = 200 * time.Millisecond
)

// conn holds the one client in use: made when first needed, replaced when the store refuses its credentials.
type conn struct {
	opts   Options
	count  counter
	newest atomic.Int64 // revision, in the last answer

	making chan struct{} // holds a token while somebody makes a client
	mu     sync.Mutex
	cli    *clientv3.Client
}

// maxAnswer bounds what one answer of the store may take up: a table of 100,000 nodes fits, and somebody who fills the prefix with
// junk can't have every node read gigabytes.
const maxAnswer = 128 << 20

func newConn(o Options) *conn { return &conn{opts: o, making: make(chan struct{}, 1)} }

func (c *conn) current() *clientv3.Client {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cli
}

// get returns the client, and makes one if there is none. Only then, and only with a user name, it waits for the store.
func (c *conn) get(ctx context.Context) (*clientv3.Client, error) {
	select {
	case c.making <- struct{}{}:
		defer func() { <-c.making }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if cli := c.current(); cli != nil {
		return cli, nil
	}
	cli, err := c.make(ctx)
	if err != nil {
		return nil, explain(err, c.opts)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cli = cli
	return cli, nil
}

func (c *conn) make(ctx context.Context) (*clientv3.Client, error) {
	password, err := c.opts.password()
	if err != nil {
		return nil, err
	}
	// The client outlives this call, but making it ends with ctx.
	own, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, cancel)
	cli, err := clientv3.New(clientv3.Config{
		Endpoints:            c.opts.Endpoints,
		Username:             c.opts.Username,
		Password:             password,
		DialTimeout:          c.opts.RequestTimeout,
		DialKeepAliveTime:    pingEvery,
		DialKeepAliveTimeout: pingTimeout,
		MaxCallRecvMsgSize:   maxAnswer,
		MaxUnaryRetries:      2, // one more try, on another endpoint or with a new token; beyond that the loops here decide
		DialOptions:          c.dialOptions(),
		Context:              own,
		Logger:               zap.NewNop(), // what matters reaches the caller as an error
	})
	if !stop() || err != nil {
		cancel()
		if err == nil {
			_ = cli.Close()
		}
		if ctx.Err() != nil { // the client only knows that its own context was cancelled for that
			err = ctx.Err()
		}
		return nil, err
	}
	return cli, nil
}

// dialOptions come behind those that clientv3 sets, and win over them.
func (c *conn) dialOptions() []grpc.DialOption {
	opts := []grpc.DialOption{
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           grpcbackoff.Config{BaseDelay: backoffMin, Multiplier: 1.6, Jitter: 0.3, MaxDelay: backoffMax},
			MinConnectTimeout: pingTimeout,
		}),
		grpc.WithInitialWindowSize(window),
		grpc.WithInitialConnWindowSize(window),
		grpc.WithChainUnaryInterceptor(c.unary),
		grpc.WithChainStreamInterceptor(c.stream),
	}
	if c.opts.tls() {
		opts = append(opts, grpc.WithTransportCredentials(freshTLS{c.opts.tlsFiles()}))
	}
	return opts
}

// unary counts the request, and lets it fail at once where there is no connection (clientv3 would wait for one until the timeout,
// and the reason would be lost).
func (c *conn) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	c.count.add(method)
	err := next(ctx, method, req, reply, cc, append(opts, grpc.WaitForReady(false))...)
	if r, ok := reply.(interface{ GetHeader() *pb.ResponseHeader }); ok && err == nil && r.GetHeader().GetRevision() > 0 {
		c.newest.Store(r.GetHeader().GetRevision())
	}
	return err
}

func (c *conn) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, next grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	c.count.add(method)
	return next(ctx, desc, cc, method, append(opts, grpc.WaitForReady(false), grpc.MaxCallRecvMsgSize(maxAnswer))...)
}

// failed turns the error of a request into plain words, and has a new client made next time where this one's credentials are refused.
func (c *conn) failed(cli *clientv3.Client, err error) error {
	if refused(err) {
		c.drop(cli)
	}
	return explain(err, c.opts)
}

func (c *conn) drop(cli *clientv3.Client) {
	c.mu.Lock()
	mine := c.cli == cli && cli != nil
	if mine {
		c.cli = nil
	}
	c.mu.Unlock()
	if mine {
		_ = cli.Close()
	}
}

func (c *conn) close() { c.drop(c.current()) }

// wait waits for d, or until the connection is there again.
func (c *conn) wait(ctx context.Context, d time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	if cli := c.current(); cli != nil && becomesReady(ctx, cli.ActiveConnection()) {
		sleep(ctx, scale(readySpread, rand.Float64()), nil)
		return
	}
	<-ctx.Done()
}

// becomesReady reports false where the connection already was.
func becomesReady(ctx context.Context, cc *grpc.ClientConn) bool {
	s := cc.GetState()
	if s == connectivity.Ready {
		return false
	}
	for s != connectivity.Ready {
		if s == connectivity.Idle {
			cc.Connect()
		}
		if !cc.WaitForStateChange(ctx, s) {
			return false
		}
		s = cc.GetState()
	}
	return true
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
