package etcd

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"os"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/examine"
)

// Examine asks the store, each endpoint by itself, for at most as long as o.RequestTimeout. It changes nothing there.
func Examine(ctx context.Context, o Options) examine.Store {
	m, err := New(o, zap.NewNop())
	if err != nil {
		return examine.Store{OptionsErr: err}
	}
	defer m.Close()
	o = m.opts
	ctx, cancel := context.WithTimeout(ctx, o.RequestTimeout)
	defer cancel()
	x := examine.Store{Certificates: o.certificates(), Endpoints: make([]examine.Endpoint, len(o.Endpoints))}
	shown := make([]*x509.Certificate, len(o.Endpoints))
	var wg sync.WaitGroup
	for i, e := range o.Endpoints {
		x.Endpoints[i].URL = e
		wg.Go(func() { o.examine(ctx, &x.Endpoints[i]) })
		wg.Go(func() { shown[i] = o.compareClocks(ctx, &x.Endpoints[i]) })
	}
	wg.Go(func() { x.Table, x.NoConfig, x.WriteErr, x.TableErr = m.examine(ctx) })
	wg.Wait()
	for i, c := range shown {
		if c != nil {
			x.Certificates = append(x.Certificates, examine.CertificateOf("the server at "+o.Endpoints[i], "", c))
		}
	}
	return x
}

// examine reads all there is, and tries whether this client might write.
func (m *Manager) examine(ctx context.Context) (t subnet.Table, noConfig bool, writeErr, err error) {
	if t, err = m.List(ctx); err != nil {
		return t, false, nil, err
	}
	// The condition never holds: what it guards is checked (permissions, room), and not done.
	never := []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(m.keys.config), "<", 0)}
	_, writeErr = m.txn(ctx, never, []clientv3.Op{clientv3.OpPut(m.keys.subnets+"examined", "")})
	return t, t.ConfigRevision == 0, writeErr, nil
}

// examine asks one endpoint.
func (o Options) examine(ctx context.Context, e *examine.Endpoint) {
	o.Endpoints = []string{e.URL}
	c := newConn(o)
	defer c.close()
	var began time.Time
	for range 2 { // the first request makes the connection
		began = time.Now()
		e.Err = c.request(ctx, func(ctx context.Context, cli *client) error {
			_, err := cli.Get(ctx, newKeys(o.Prefix).config, clientv3.WithKeysOnly())
			return err
		})
		if e.Err != nil {
			return
		}
	}
	e.Took = time.Since(began)
	_ = c.request(ctx, func(ctx context.Context, cli *client) error {
		s, err := pb.NewMaintenanceClient(cli.cc).Status(ctx, &pb.StatusRequest{})
		e.Version, e.Alarms = s.GetVersion(), s.GetErrors()
		return err
	})
}

// compareClocks also returns the certificate that the server shows.
func (o Options) compareClocks(ctx context.Context, e *examine.Endpoint) (shown *x509.Certificate) {
	cfg, err := o.tlsConfig()
	if err != nil {
		e.ClockErr = err
		return nil
	}
	return e.CompareClocks(ctx, cfg)
}

// certificates are those in the files.
func (o Options) certificates() []examine.Certificate {
	var out []examine.Certificate
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
				out = append(out, examine.CertificateOf(f.what, f.file, c))
			}
		}
	}
	return out
}
