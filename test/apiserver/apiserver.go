// Package apiserver gives a test a real kube-apiserver on the loopback device, in front of a real etcd:
//
//	api := apiserver.New(t)
//	config := api.Kubeconfig(apiserver.Admin)
//
// It ends with the test, also when that fails.
package apiserver

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/overlayd/overlayd/subnet/etcd/etcdtest"
	"github.com/overlayd/overlayd/test/apiserver/command"
)

// The users: those of [command.Server].
const (
	Admin = command.Admin
	Node  = command.Node
)

// startWithin is how long the server may take to be ready: some seconds on a machine that is not busy.
const startWithin = 2 * time.Minute

// Server is a kube-apiserver that can be stopped and started again.
type Server struct {
	Etcd *etcdtest.Server
	URL  string

	t       testing.TB
	files   int
	dir     string
	port    string
	command command.Server
	cmd     *exec.Cmd
	log     bytes.Buffer
}

// New starts one. Its program is bin/kubernetes of the repository, which `make bin/kubernetes` builds.
func New(t testing.TB) *Server {
	t.Helper()
	s := &Server{t: t, dir: t.TempDir(), Etcd: etcdtest.Start(t)}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, s.port, _ = net.SplitHostPort(l.Addr().String())
	s.URL = "https://127.0.0.1:" + s.port
	_ = l.Close()
	s.command = command.Server{Dir: s.dir, Address: "127.0.0.1", Port: s.port, Etcd: s.Etcd.Endpoint()}
	if err := s.command.WriteFiles(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	s.Start()
	return s
}

func (s *Server) path(name string) string { return filepath.Join(s.dir, name) }

func (s *Server) write(name, content string) {
	s.t.Helper()
	if err := os.WriteFile(s.path(name), []byte(content), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// program is bin/kubernetes, in one of the directories above the test's.
func (s *Server) program() string {
	s.t.Helper()
	dir, err := os.Getwd()
	for ; err == nil; dir = filepath.Dir(dir) {
		name := filepath.Join(dir, "bin", "kubernetes")
		if _, missing := os.Stat(name); missing == nil {
			return name
		}
		if dir == filepath.Dir(dir) {
			break
		}
	}
	s.t.Fatal("bin/kubernetes is missing: make bin/kubernetes")
	return ""
}

// Start starts the server unless it runs, and waits until it is ready.
func (s *Server) Start() {
	s.t.Helper()
	if s.cmd != nil {
		return
	}
	s.log.Reset()
	argv := s.command.Argv(s.program())
	s.cmd = exec.Command(argv[0], argv[1:]...)
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	for deadline := time.Now().Add(startWithin); ; time.Sleep(100 * time.Millisecond) {
		err := s.ready()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			s.Stop()
			s.t.Fatalf("kube-apiserver is not ready after %s: %v\n%s", startWithin, err, s.log.Bytes())
		}
	}
}

// Stop kills the server.
func (s *Server) Stop() {
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait() // killed
	s.cmd = nil
}

func (s *Server) ready() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL+"/readyz", nil)
	if err != nil {
		return err
	}
	r.Header.Set("Authorization", "Bearer "+Admin)
	client := http.Client{Transport: &http.Transport{
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // the certificate is made at the start
		DisableKeepAlives: true,
	}}
	resp, err := client.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("/readyz: %s", resp.Status)
	}
	return nil
}

// Kubeconfig is a file by which a user reaches the server.
func (s *Server) Kubeconfig(user string) string {
	s.t.Helper()
	return s.KubeconfigWith(fmt.Sprintf("server: %q", s.URL), "token: "+user)
}

// KubeconfigWith is a file with the server and the credentials as they stand in such a file.
func (s *Server) KubeconfigWith(server, credentials string) string {
	s.t.Helper()
	s.files++
	name := fmt.Sprintf("kubeconfig-%d", s.files)
	s.write(name, s.command.Kubeconfig(server, credentials))
	return s.path(name)
}
