package lab

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"path/filepath"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/overlayd/overlayd/internal/atomicfile"
)

// The users of a secure lab's etcd.
const (
	rootUser     = "root"
	rootPassword = "lab-root"
	// EtcdUser is the one that the daemons are, with the password EtcdPassword at first.
	EtcdUser     = "overlayd"
	EtcdPassword = "lab-secret"
)

// secrets are the files of a secure lab, in its directory.
type secrets struct{ dir string }

func (s secrets) file(name string) string { return filepath.Join(s.dir, name) }
func (s secrets) ca() string              { return s.file("ca.pem") }
func (s secrets) serverCert() string      { return s.file("server.pem") }
func (s secrets) serverKey() string       { return s.file("server-key.pem") }
func (s secrets) clientCert() string      { return s.file("client.pem") }
func (s secrets) clientKey() string       { return s.file("client-key.pem") }
func (s secrets) password() string        { return s.file("password") }

func (s secrets) overlaydArgs() []string {
	return []string{
		"--etcd-cafile", s.ca(), "--etcd-certfile", s.clientCert(), "--etcd-keyfile", s.clientKey(),
		"--etcd-username", EtcdUser, "--etcd-password-file", s.password(),
	}
}

// make writes a new CA, with certificates of it for etcd and for the daemons, and the daemons' password.
func (s secrets) make(at []netip.Addr) error {
	ca := &x509.Certificate{
		Subject: pkix.Name{CommonName: "lab CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	caKey, err := s.issue(s.ca(), "", ca, ca, nil)
	if err != nil {
		return err
	}
	server := &x509.Certificate{
		Subject: pkix.Name{CommonName: "etcd"}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, a := range at {
		server.IPAddresses = append(server.IPAddresses, net.IP(a.AsSlice()))
	}
	client := &x509.Certificate{
		// No common name: etcd would take it for a user's, beside the one with the password.
		Subject: pkix.Name{Organization: []string{"overlayd"}}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	_, errServer := s.issue(s.serverCert(), s.serverKey(), server, ca, caKey)
	_, errClient := s.issue(s.clientCert(), s.clientKey(), client, ca, caKey)
	return errors.Join(errServer, errClient, atomicfile.Write(s.password(), []byte(EtcdPassword+"\n"), 0o600))
}

// issue writes a certificate and its key, signed by the CA's key, or by its own where there is none.
func (s secrets) issue(certFile, keyFile string, cert, ca *x509.Certificate,
	caKey *ecdsa.PrivateKey,
) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make the key for %s: %w", certFile, err)
	}
	cert.SerialNumber = big.NewInt(time.Now().UnixNano())
	cert.NotBefore, cert.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	if caKey == nil {
		caKey = key
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, ca, &key.PublicKey, caKey)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", certFile, err)
	}
	err = atomicfile.Write(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600)
	if keyFile == "" || err != nil {
		return key, err
	}
	raw, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode the key for %s: %w", certFile, err)
	}
	return key, atomicfile.Write(keyFile, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: raw}), 0o600)
}

// ReplaceCertificates gives a secure lab a new CA and new certificates on all sides, on disk. Nobody is told.
func (l *Lab) ReplaceCertificates() error {
	return secrets{l.dir}.make(l.topology.Etcd.addrs())
}

// SetEtcdPassword changes the password of the daemons' user in etcd; onDisk, in the file that the daemons read.
func (l *Lab) SetEtcdPassword(ctx context.Context, password string) error {
	return l.withEtcd(func(cli *clientv3.Client) error {
		if _, err := cli.UserChangePassword(ctx, EtcdUser, password); err != nil {
			return fmt.Errorf("change the password of %s: %w", EtcdUser, err)
		}
		return nil
	})
}

// WritePassword writes the password into the file that the daemons of a secure lab read.
func (l *Lab) WritePassword(password string) error {
	return atomicfile.Write(secrets{l.dir}.password(), []byte(password+"\n"), 0o600)
}

func (l *Lab) withEtcd(f func(*clientv3.Client) error) error {
	cli, err := l.EtcdClient()
	if err != nil {
		return err
	}
	defer cli.Close()
	return f(cli)
}

// enableAuth makes the users and switches on that they are asked for.
func (l *Lab) enableAuth(ctx context.Context) error {
	open := *l
	open.topology.Options.Secure = false // there are no users yet
	return open.withEtcd(func(cli *clientv3.Client) error {
		const role, first, last = EtcdUser, "/overlayd/", "/overlayd0"
		steps := []func() error{
			func() error { _, err := cli.UserAdd(ctx, rootUser, rootPassword); return err },
			func() error { _, err := cli.RoleAdd(ctx, "root"); return err },
			func() error { _, err := cli.UserGrantRole(ctx, rootUser, "root"); return err },
			func() error { _, err := cli.UserAdd(ctx, EtcdUser, EtcdPassword); return err },
			func() error { _, err := cli.RoleAdd(ctx, role); return err },
			func() error {
				_, err := cli.RoleGrantPermission(ctx, role, first, last, clientv3.PermissionType(clientv3.PermReadWrite))
				return err
			},
			func() error { _, err := cli.UserGrantRole(ctx, EtcdUser, role); return err },
			func() error { _, err := cli.AuthEnable(ctx); return err },
		}
		for _, step := range steps {
			if err := step(); err != nil {
				return fmt.Errorf("set up etcd's users: %w", err)
			}
		}
		return nil
	})
}
