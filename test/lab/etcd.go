package lab

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// EtcdCommand is the hidden subcommand of overlay-lab that runs [EtcdMain].
const EtcdCommand = "etcd-serve"

// Etcd is one real member of the lab's etcd, in a process of its own. Its data stays while it is stopped.
type Etcd struct {
	Machine
	Process
	number int // from 1
	urls   []string
}

// newEtcd makes member number i, from 1. All members share a namespace and differ in their ports.
func newEtcd(t Topology, dir string, i int) *Etcd {
	name := t.Etcd.Name
	if i > 1 {
		name = fmt.Sprintf("%s-%d", name, i)
	}
	e := &Etcd{Machine: Machine{Name: t.Etcd.Name, NS: t.Etcd.NS}, number: i, urls: t.memberURLs(i)}
	listen := append(loopbackURLs(t.Options.Stack, clientPort(i)), e.urls...)
	e.Process = Process{name: name, ns: e.NS, dir: dir, argv: func() []string {
		return e.command(t.Options,
			strings.Join(listen, ","))
	}}
	return e
}

// command is the command line of a member. What it stores may get lost when the machine crashes: nothing in it outlives
// the lab.
func (e *Etcd) command(o Options, urls string) []string {
	argv := []string{o.Self, EtcdCommand, "--unsafe-no-fsync"}
	if o.EtcdVersion != "" {
		argv = []string{o.etcd()}
	}
	peer := peerURL(e.number)
	argv = append(argv, "--data-dir", e.DataDir(), "--name", memberName(e.number),
		"--listen-client-urls", urls, "--advertise-client-urls", urls,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", cluster(o.EtcdMembers),
		"--bcrypt-cost", strconv.Itoa(bcryptCost), "--auth-token-ttl", strconv.Itoa(tokenTTL),
		"--logger", "zap", "--log-level", "warn", "--log-outputs", "stderr")
	if o.EtcdMembers == 1 { // with short ticks it leads at once
		argv = append(argv, "--heartbeat-interval", "20", "--election-timeout", "200")
	}
	if o.Secure {
		s := secrets{e.dir}
		argv = append(argv, "--cert-file", s.serverCert(), "--key-file", s.serverKey(),
			"--trusted-ca-file", s.ca(), "--client-cert-auth")
	}
	return argv
}

const (
	bcryptCost = 4 // the least that there is: the race detector makes it slow, and there is nothing to protect
	tokenTTL   = 5 // seconds that a login lasts
)

func clientPort(member int) uint16 { return uint16(etcdPort + 10*(member-1)) }

func peerURL(member int) string { return fmt.Sprintf("http://127.0.0.1:%d", clientPort(member)+1) }

// loopbackURLs are for the lab itself: never with TLS.
func loopbackURLs(s Stack, port uint16) []string {
	urls := []string{fmt.Sprintf("http://127.0.0.1:%d", port)}
	if s != StackIPv4 {
		urls = append(urls, fmt.Sprintf("http://%s", netip.AddrPortFrom(netip.IPv6Loopback(), port)))
	}
	return urls
}

// URLs are the client URLs under which the nodes reach it.
func (e *Etcd) URLs() []string { return e.urls }

// LocalURL is the client URL, always without TLS, for use in etcd's own namespace.
func (e *Etcd) LocalURL() string { return fmt.Sprintf("http://127.0.0.1:%d", clientPort(e.number)) }

// DataDir holds its data. It may be copied, replaced or removed while etcd is stopped.
func (e *Etcd) DataDir() string { return filepath.Join(e.dir, e.name+".data") }

// WaitReady waits until it answers that it is healthy, which it does once it has a leader.
func (e *Etcd) WaitReady(ctx context.Context) error {
	return poll(ctx, pollInterval, func() error {
		if !e.Running() {
			return fatal{fmt.Errorf("etcd has ended; the end of %s:\n%s", e.Log(), e.tail(10))}
		}
		_, err := e.Get(ctx, e.LocalURL()+"/health")
		return err
	})
}

// dialTimeout bounds how long a client waits for an etcd that hangs.
const dialTimeout = 20 * time.Second

// EtcdClient is a client of the lab's etcd, of all its members that run, from etcd's own namespace.
func (l *Lab) EtcdClient() (*clientv3.Client, error) {
	c := clientv3.Config{DialTimeout: dialTimeout, Logger: zap.NewNop(), DialOptions: l.DialEtcd()}
	for _, e := range l.etcds {
		c.Endpoints = append(c.Endpoints, e.LocalURL())
	}
	if l.topology.Options.Secure {
		c.Username, c.Password = rootUser, rootPassword
	}
	cli, err := clientv3.New(c)
	if err != nil {
		return nil, fmt.Errorf("make a client of the lab's etcd: %w", err)
	}
	return cli, nil
}

// DialEtcd are the options of a client that connects from etcd's own namespace.
func (l *Lab) DialEtcd() []grpc.DialOption {
	return []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
		return l.Etcd().DialContext(ctx, "tcp", address)
	})}
}

// EtcdMain is what the hidden subcommand does with its arguments, which are those of etcd: it serves until it is ended
// by a signal.
func EtcdMain(args []string) { etcdmain.Main(append([]string{"etcd"}, args...)) }

func cluster(members int) string {
	var out []string
	for i := 1; i <= members; i++ {
		out = append(out, memberName(i)+"="+peerURL(i))
	}
	return strings.Join(out, ",")
}

func memberName(i int) string { return fmt.Sprintf("lab%d", i) }
