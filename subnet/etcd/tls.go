package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"

	"google.golang.org/grpc/credentials"
)

// tlsConfig reads the files.
func (o Options) tlsConfig() (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if o.CAFile != "" {
		pem, err := os.ReadFile(o.CAFile)
		if err != nil {
			return nil, fmt.Errorf("--etcd-cafile: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("--etcd-cafile: %s has no PEM certificate in it", o.CAFile)
		}
	}
	if o.CertFile == "" || o.KeyFile == "" {
		return c, nil
	}
	pair, err := tls.LoadX509KeyPair(o.CertFile, o.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("--etcd-certfile and --etcd-keyfile: %s and %s: %w", o.CertFile, o.KeyFile, err)
	}
	c.Certificates = []tls.Certificate{pair}
	return c, nil
}

// freshTLS are transport credentials that read the files at every handshake: a certificate that was replaced on disk is
// in use from the next connection on, without a new client. All but the reading is left to gRPC's own.
type freshTLS struct {
	credentials.TransportCredentials
	opts Options
}

func newFreshTLS(o Options) freshTLS { return freshTLS{credentials.NewTLS(nil), o} }

func (c freshTLS) ClientHandshake(
	ctx context.Context, authority string, conn net.Conn,
) (net.Conn, credentials.AuthInfo, error) {
	cfg, err := c.opts.tlsConfig()
	if err != nil {
		return nil, nil, err
	}
	return credentials.NewTLS(cfg).ClientHandshake(ctx, authority, conn)
}

func (c freshTLS) Clone() credentials.TransportCredentials { return newFreshTLS(c.opts) }
