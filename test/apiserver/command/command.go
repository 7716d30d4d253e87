// Package command says how a kube-apiserver is run for tests: its files, its command line, and what a client needs. Its
// program is bin/kubernetes, which `make bin/kubernetes` builds.
package command

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// The users; the name of each is its token, too. Admin may do everything, Node nothing until a role says so.
const (
	Admin = "admin"
	Node  = "node"
)

// Server is one that runs, or is to run.
type Server struct {
	Dir     string // of its files; the certificate is made at the first start
	Address string // that it listens at, an IP address
	Port    string
	Etcd    string // URL
}

// WriteFiles makes what the server reads.
func (s Server) WriteFiles() error {
	key, err := rsa.GenerateKey(rand.Reader, 2048) // signs the tokens of service accounts
	if err != nil {
		return fmt.Errorf("make the key of the service accounts: %w", err)
	}
	block := &pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}
	if err := os.WriteFile(s.path("sa.key"), pem.EncodeToMemory(block), 0o600); err != nil {
		return err
	}
	tokens := fmt.Sprintf("%s,%[1]s,%[1]s,system:masters\n%s,%[2]s,%[2]s\n", Admin, Node)
	return os.WriteFile(s.path("tokens.csv"), []byte(tokens), 0o600)
}

// Argv is the command line.
func (s Server) Argv(program string) []string {
	return []string{
		program, "kube-apiserver", "--etcd-servers=" + s.Etcd,
		"--bind-address=" + s.Address, "--advertise-address=" + s.Address, "--secure-port=" + s.Port, "--cert-dir=" + s.Dir,
		"--service-cluster-ip-range=" + s.services(), "--authorization-mode=RBAC",
		"--token-auth-file=" + s.path("tokens.csv"), "--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=" + s.path("sa.key"), "--service-account-signing-key-file=" + s.path("sa.key"),
		"--endpoint-reconciler-type=none",
	}
}

// services is in the family of the server's own address.
func (s Server) services() string {
	if strings.Contains(s.Address, ":") {
		return "fd00:10:96::/112"
	}
	return "10.96.0.0/16"
}

// Kubeconfig is the content of a file with the server and the credentials as they stand in such a file.
func (s Server) Kubeconfig(server, credentials string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: test
contexts: [{name: test, context: {cluster: test, user: test}}]
clusters: [{name: test, cluster: {%s, certificate-authority: %q}}]
users: [{name: test, user: {%s}}]
`, server, s.path("apiserver.crt"), credentials)
}

func (s Server) path(name string) string { return filepath.Join(s.Dir, name) }
