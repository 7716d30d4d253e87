package etcdtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/overlayd/overlayd/test/nstest"
)

// Certs are the files of a small CA: a server certificate for one address of the loopback, and a client's.
type Certs struct {
	Dir                   string
	CA                    string
	ServerCert, ServerKey string
	ClientCert, ClientKey string
	ip                    netip.Addr // the server's
	caCert                *x509.Certificate
	caKey                 *ecdsa.PrivateKey
}

// NewCerts writes the files into a directory of the test.
func NewCerts(t testing.TB) *Certs {
	t.Helper()
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	c := &Certs{
		Dir: dir, CA: at("ca.pem"), ip: nstest.Loopback(),
		ServerCert: at("server.pem"), ServerKey: at("server-key.pem"),
		ClientCert: at("client.pem"), ClientKey: at("client-key.pem"),
	}
	c.Renew(t)
	return c
}

// Renew replaces the CA and all that it signed, in the same files.
func (c *Certs) Renew(t testing.TB) {
	t.Helper()
	c.caKey = newKey(t)
	ca := c.template("overlayd test CA")
	ca.IsCA, ca.BasicConstraintsValid = true, true
	ca.KeyUsage |= x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, &c.caKey.PublicKey, c.caKey)
	must(t, err)
	c.caCert, err = x509.ParseCertificate(der)
	must(t, err)
	writePEM(t, c.CA, "CERTIFICATE", der)
	c.Issue(t, c.ServerCert, c.ServerKey, "server", time.Now().Add(time.Hour))
	c.Issue(t, c.ClientCert, c.ClientKey, "client", time.Now().Add(time.Hour))
}

// Issue writes a certificate of the CA that ends at a time.
func (c *Certs) Issue(t testing.TB, certFile, keyFile, name string, end time.Time) {
	t.Helper()
	key := newKey(t)
	leaf := c.template(name)
	leaf.NotAfter = end
	leaf.IPAddresses = []net.IP{c.ip.AsSlice()}
	der, err := x509.CreateCertificate(rand.Reader, leaf, c.caCert, &key.PublicKey, c.caKey)
	must(t, err)
	keyDER, err := x509.MarshalECPrivateKey(key)
	must(t, err)
	writePEM(t, keyFile, "EC PRIVATE KEY", keyDER)
	writePEM(t, certFile, "CERTIFICATE", der)
}

func (c *Certs) template(name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(mathrand.Int64()),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(2 * time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

func (c *Certs) pool(t testing.TB) *x509.CertPool {
	t.Helper()
	b, err := os.ReadFile(c.CA)
	must(t, err)
	p := x509.NewCertPool()
	p.AppendCertsFromPEM(b)
	return p
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	return k
}

func writePEM(t testing.TB, file, kind string, der []byte) {
	t.Helper()
	must(t, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
