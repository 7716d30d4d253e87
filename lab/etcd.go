package lab

import (
	"context"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
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
		if t.Options.EtcdVersion != "" {
			return e.otherVersion(t.Options, listen)
		}
		argv := []string{
			t.Options.Self, EtcdCommand, "--data-dir", e.DataDir(), "--listen", strings.Join(listen, ","),
			"--member", strconv.Itoa(i), "--members", strconv.Itoa(t.Options.EtcdMembers),
		}
		if t.Options.Secure {
			s := secrets{dir}
			argv = append(argv, "--cert", s.serverCert(), "--key", s.serverKey(), "--ca", s.ca())
		}
		return argv
	}}
	return e
}

// otherVersion is the command line of a server that is not linked. It is set up as [EtcdOptions.config] does.
func (e *Etcd) otherVersion(o Options, listen []string) []string {
	urls, peer := strings.Join(listen, ","), peerURL(e.number)
	argv := []string{
		o.etcd(), "--data-dir", e.DataDir(), "--name", memberName(e.number),
		"--listen-client-urls", urls, "--advertise-client-urls", urls,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", cluster(o.EtcdMembers),
		"--bcrypt-cost", strconv.Itoa(bcryptCost), "--auth-token-ttl", strconv.Itoa(tokenTTL),
		"--logger", "zap", "--log-level", "warn", "--log-outputs", "stderr",
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

// EtcdMain is what the hidden subcommand does with its arguments: it serves etcd until the context ends.
func EtcdMain(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet(EtcdCommand, flag.ContinueOnError)
	o := EtcdOptions{}
	fs.StringVar(&o.DataDir, "data-dir", "", "where the data lies")
	listen := fs.String("listen", "", "client URLs, separated by commas")
	fs.IntVar(&o.Member, "member", 1, "the number of this member")
	fs.IntVar(&o.Members, "members", 1, "how many members there are")
	fs.StringVar(&o.CertFile, "cert", "", "certificate for https client URLs")
	fs.StringVar(&o.KeyFile, "key", "", "its key")
	fs.StringVar(&o.CAFile, "ca", "", "who vouches for clients")
	if err := fs.Parse(args); err != nil {
		return err
	}
	o.ClientURLs = strings.Split(*listen, ",")
	return ServeEtcd(ctx, o)
}

// EtcdOptions are what a member of the lab's etcd is told.
type EtcdOptions struct {
	DataDir                   string
	ClientURLs                []string
	Member, Members           int
	CertFile, KeyFile, CAFile string // for https client URLs
}

// ServeEtcd runs one etcd member until the context ends. The lab's etcd may lose data when the machine crashes: nothing
// in it outlives the lab.
func ServeEtcd(ctx context.Context, o EtcdOptions) error {
	c, err := o.config()
	if err != nil {
		return err
	}
	e, err := embed.StartEtcd(c)
	if err != nil {
		return fmt.Errorf("start etcd: %w", err)
	}
	defer e.Close()
	select {
	case <-ctx.Done():
		return nil
	case err := <-e.Err():
		return fmt.Errorf("serve etcd: %w", err)
	}
}

func (o EtcdOptions) config() (*embed.Config, error) {
	c := embed.NewConfig()
	c.BcryptCost, c.AuthTokenTTL = bcryptCost, tokenTTL
	c.Name, c.Dir, c.UnsafeNoFsync = memberName(o.Member), o.DataDir, true
	c.LogLevel, c.LogOutputs = "warn", []string{"stderr"}
	// A member alone has nobody to hear from: with short ticks it leads at once.
	c.TickMs, c.ElectionMs = 20, 200
	if o.Members > 1 {
		c.TickMs, c.ElectionMs = 100, 1000
	}
	client, err := parseURLs(o.ClientURLs)
	if err != nil {
		return nil, err
	}
	peer, err := parseURLs([]string{peerURL(o.Member)})
	if err != nil {
		return nil, err
	}
	c.ListenClientUrls, c.AdvertiseClientUrls = client, client
	c.ListenPeerUrls, c.AdvertisePeerUrls = peer, peer
	c.InitialCluster = cluster(o.Members)
	if o.CertFile != "" {
		c.ClientTLSInfo = transport.TLSInfo{CertFile: o.CertFile, KeyFile: o.KeyFile, TrustedCAFile: o.CAFile, ClientCertAuth: true}
	}
	return c, nil
}

func cluster(members int) string {
	var out []string
	for i := 1; i <= members; i++ {
		out = append(out, memberName(i)+"="+peerURL(i))
	}
	return strings.Join(out, ",")
}

func memberName(i int) string { return fmt.Sprintf("lab%d", i) }

func parseURLs(in []string) ([]url.URL, error) {
	var out []url.URL
	for _, s := range in {
		u, err := url.Parse(s)
		if err != nil {
			return nil, fmt.Errorf("etcd's URL: %w", err)
		}
		out = append(out, *u)
	}
	return out, nil
}
