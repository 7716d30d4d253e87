package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/overlayd/overlayd/subnet"
)

// Examination is the store as a diagnosis sees it.
type Examination struct {
	OptionsErr   error // the options make no sense: nothing was asked
	Endpoints    []Endpoint
	Certificates []Certificate // of the files, and of each server

	Table    subnet.Table // what is there; its ConfigErr says what is wrong with the config
	TableErr error        // why it could not be read
	// WriteErr is why this client may not write leases, or the store takes no writes. Nothing is written to find out.
	WriteErr error
	// NoConfig says that there is no config at all.
	NoConfig bool
}

// Endpoint is one of --etcd-endpoints.
type Endpoint struct {
	URL     string
	Err     error         // why it can't be used
	Took    time.Duration // of one request that the whole cluster has to agree on, when the connection was there
	Version string
	Alarms  []string // "NOSPACE" and the like
	// Clock is how far this node's clock is ahead of the server's; ClockErr why that is not known. It is good to a second.
	Clock    time.Duration
	ClockErr error
}

// Certificate is one that has to be valid.
type Certificate struct {
	What      string // the flag that names its file, or the endpoint that shows it
	File      string // empty for a server's
	Subject   string
	NotBefore time.Time
	NotAfter  time.Time
}

// Examine looks at the store, each endpoint by itself, for at most as long as o.RequestTimeout. It changes nothing there.
func Examine(ctx context.Context, o Options) Examination {
	checked, err := o.check()
	if err != nil {
		return Examination{OptionsErr: err}
	}
	o = checked
	ctx, cancel := context.WithTimeout(ctx, o.RequestTimeout)
	defer cancel()
	x := Examination{Certificates: o.certificates(), Endpoints: make([]Endpoint, len(o.Endpoints))}
	var wg sync.WaitGroup
	var mu sync.Mutex
	for i, e := range o.Endpoints {
		wg.Go(func() { x.Endpoints[i] = o.examine(ctx, e) })
		wg.Go(func() {
			if c, ok := o.serverCertificate(ctx, e); ok {
				mu.Lock()
				defer mu.Unlock()
				x.Certificates = append(x.Certificates, c)
			}
		})
	}
	wg.Go(func() { x.Table, x.NoConfig, x.WriteErr, x.TableErr = o.examineContent(ctx) })
	wg.Wait()
	return x
}

// examineContent reads all there is, and tries whether this client might write.
func (o Options) examineContent(ctx context.Context) (t subnet.Table, noConfig bool, writeErr, err error) {
	m, err := New(o, zap.NewNop())
	if err != nil {
		return t, false, nil, err
	}
	defer m.Close()
	if t, err = m.List(ctx); err != nil {
		return t, false, nil, err
	}
	// The condition never holds: what stands behind it is checked (permissions, room), and not done.
	never := clientv3.Compare(clientv3.CreateRevision(m.keys.config), "<", 0)
	writeErr = m.conn.request(ctx, func(ctx context.Context, cli *client) error {
		_, err := cli.Txn(ctx).If(never).Then(clientv3.OpPut(m.keys.subnets+"examined", "")).Commit()
		return err
	})
	return t, t.ConfigRevision == 0, writeErr, nil
}

// examine looks at one endpoint.
func (o Options) examine(ctx context.Context, endpoint string) (e Endpoint) {
	e.URL = endpoint
	o.Endpoints = []string{endpoint}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { e.Clock, e.ClockErr = o.clock(ctx, endpoint) })
	c := newConn(o)
	defer c.close()
	read := func(ctx context.Context, cli *client) error {
		_, err := cli.Get(ctx, newKeys(o.Prefix).config, clientv3.WithKeysOnly())
		return err
	}
	if e.Err = c.request(ctx, read); e.Err != nil { // makes the connection
		return e
	}
	began := time.Now()
	if e.Err = c.request(ctx, read); e.Err != nil {
		return e
	}
	e.Took = time.Since(began)
	_ = c.request(ctx, func(ctx context.Context, cli *client) error {
		s, err := pb.NewMaintenanceClient(cli.cc).Status(ctx, &pb.StatusRequest{})
		e.Version, e.Alarms = s.GetVersion(), s.GetErrors()
		return err
	})
	return e
}

// clock compares the clocks by the Date of an HTTP answer, which etcd gives at the same port.
func (o Options) clock(ctx context.Context, endpoint string) (time.Duration, error) {
	cfg, err := o.tlsFiles().config()
	if err != nil {
		return 0, err
	}
	hc := http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: cfg}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, endpoint+"/version", nil)
	if err != nil {
		return 0, err
	}
	began := time.Now()
	resp, err := hc.Do(req)
	if err != nil {
		if u := (*url.Error)(nil); errors.As(err, &u) {
			err = u.Err
		}
		return 0, err
	}
	defer resp.Body.Close()
	theirs, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		return 0, errors.New("it gives no date")
	}
	middle := began.Add(time.Since(began) / 2)
	return middle.Sub(theirs.Add(time.Second / 2)), nil // a date is cut off to the second
}

// certificates are those in the files.
func (o Options) certificates() []Certificate {
	var out []Certificate
	for _, f := range []struct{ what, file string }{{"--etcd-certfile", o.CertFile}, {"--etcd-cafile", o.CAFile}} {
		if f.file == "" {
			continue
		}
		raw, err := os.ReadFile(f.file)
		for err == nil {
			var block *pem.Block
			if block, raw = pem.Decode(raw); block == nil {
				break
			}
			if c, err := x509.ParseCertificate(block.Bytes); err == nil {
				out = append(out, Certificate{f.what, f.file, c.Subject.String(), c.NotBefore, c.NotAfter})
			}
		}
	}
	return out
}

// serverCertificate is what an endpoint shows, whether it can be trusted or not: that is said by the requests.
func (o Options) serverCertificate(ctx context.Context, endpoint string) (Certificate, bool) {
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "https" {
		return Certificate{}, false
	}
	cfg, err := o.tlsFiles().config()
	if err != nil {
		return Certificate{}, false
	}
	var leaf *x509.Certificate
	cfg.InsecureSkipVerify = true // nothing is asked or told on this connection
	cfg.VerifyConnection = func(s tls.ConnectionState) error {
		leaf = s.PeerCertificates[0]
		return nil
	}
	d := tls.Dialer{NetDialer: new(net.Dialer), Config: cfg}
	if c, err := d.DialContext(ctx, "tcp", u.Host); err == nil {
		_ = c.Close()
	}
	if leaf == nil {
		return Certificate{}, false
	}
	return Certificate{fmt.Sprintf("the server at %s", endpoint), "", leaf.Subject.String(), leaf.NotBefore, leaf.NotAfter}, true
}
