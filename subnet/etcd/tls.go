package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"

	"google.golang.org/grpc/credentials"
)

// tlsFiles are where the client's side of TLS stands on disk.
type tlsFiles struct{ cert, key, ca string }

func (o Options) tlsFiles() tlsFiles { return tlsFiles{o.CertFile, o.KeyFile, o.CAFile} }

// config reads the files.
func (f tlsFiles) config() (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if f.ca != "" {
		pem, err := os.ReadFile(f.ca)
		if err != nil {
			return nil, fmt.Errorf("--etcd-cafile: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("--etcd-cafile: %s has no PEM certificate in it", f.ca)
		}
	}
	if f.cert == "" || f.key == "" {
		return c, nil
	}
	pair, err := f.pair()
	if err != nil {
		return nil, err
	}
	c.Certificates = []tls.Certificate{pair}
	return c, nil
}

func (f tlsFiles) pair() (tls.Certificate, error) {
	cert, err := os.ReadFile(f.cert)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("--etcd-certfile: %w", err)
	}
	key, err := os.ReadFile(f.key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("--etcd-keyfile: %w", err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("--etcd-certfile and --etcd-keyfile: %s and %s don't make a pair: %w", f.cert, f.key, err)
	}
	return pair, nil
}

// freshTLS are transport credentials that read the files at every handshake: a certificate that was replaced on disk is in use
// from the next connection on, without a new client.
type freshTLS struct{ files tlsFiles }

// ClientHandshake leaves all but the reading to gRPC's own TLS credentials, which also take the server's name from authority
// (the endpoint's host).
func (c freshTLS) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	cfg, err := c.files.config()
	if err != nil {
		return nil, nil, err
	}
	return credentials.NewTLS(cfg).ClientHandshake(ctx, authority, conn)
}

func (freshTLS) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these are credentials of a client")
}

func (freshTLS) Info() credentials.ProtocolInfo { return credentials.NewTLS(nil).Info() }

func (c freshTLS) Clone() credentials.TransportCredentials { return c }

func (freshTLS) OverrideServerName(string) error {
	return errors.New("the server's name is that of the endpoint")
}
