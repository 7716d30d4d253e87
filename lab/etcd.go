package lab

import (
	"context"
	"flag"
	"fmt"
	"net/netip"
	"net/url"
	"path/filepath"
	"strings"

	"go.etcd.io/etcd/server/v3/embed"
)

// EtcdCommand is the hidden subcommand of overlay-lab that runs [EtcdMain].
const EtcdCommand = "etcd-serve"

// Etcd is the lab's etcd: one real member, in a process and a namespace of its own. Its data stays while it is stopped.
type Etcd struct {
	Machine
	Process
	urls []string
}

func newEtcd(t Topology, dir string) *Etcd {
	e := &Etcd{Machine: Machine{Name: t.Etcd.Name, NS: t.Etcd.NS}, urls: t.EtcdURLs()}
	listen := append(loopbackURLs(t.Options.Stack), e.urls...)
	e.Process = Process{name: e.Name, ns: e.NS, dir: dir, argv: func() []string {
		return []string{t.Options.Self, EtcdCommand, "--data-dir", e.DataDir(), "--listen", strings.Join(listen, ",")}
	}}
	return e
}

func loopbackURLs(s Stack) []string {
	urls := []string{fmt.Sprintf("http://127.0.0.1:%d", etcdPort)}
	if s != StackIPv4 {
		urls = append(urls, fmt.Sprintf("http://%s", netip.AddrPortFrom(netip.IPv6Loopback(), etcdPort)))
	}
	return urls
}

// URLs are the client URLs under which the nodes reach it.
func (e *Etcd) URLs() []string { return e.urls }

// DataDir holds its data. It may be copied, replaced or removed while etcd is stopped.
func (e *Etcd) DataDir() string { return filepath.Join(e.dir, "etcd.data") }

// WaitReady waits until it answers that it is healthy, which it does once it has a leader.
func (e *Etcd) WaitReady(ctx context.Context) error {
	return poll(ctx, pollInterval, func() error {
		if !e.Running() {
			return fatal{fmt.Errorf("etcd has ended; the end of %s:\n%s", e.Log(), e.tail(10))}
		}
		_, err := e.Get(ctx, e.urls[0]+"/health")
		return err
	})
}

// EtcdMain is what the hidden subcommand does with its arguments: it serves etcd until the context ends.
func EtcdMain(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet(EtcdCommand, flag.ContinueOnError)
	dataDir := fs.String("data-dir", "", "where the data lies")
	listen := fs.String("listen", "", "client URLs, separated by commas")
	if err := fs.Parse(args); err != nil {
		return err
	}
	return ServeEtcd(ctx, *dataDir, strings.Split(*listen, ","))
}

// ServeEtcd runs one etcd member until the context ends. The lab's etcd may lose data when the machine crashes: nothing
// in it outlives the lab.
func ServeEtcd(ctx context.Context, dataDir string, clientURLs []string) error {
	c := embed.NewConfig()
	c.Name, c.Dir, c.UnsafeNoFsync = "lab", dataDir, true
	c.LogLevel, c.LogOutputs = "warn", []string{"stderr"}
	// A member alone has nobody to hear from: with short ticks it leads at once.
	c.TickMs, c.ElectionMs = 20, 200
	client, err := parseURLs(clientURLs)
	if err != nil {
		return err
	}
	peer, err := parseURLs([]string{"http://127.0.0.1:2380"})
	if err != nil {
		return err
	}
	c.ListenClientUrls, c.AdvertiseClientUrls = client, client
	c.ListenPeerUrls, c.AdvertisePeerUrls = peer, peer
	c.InitialCluster = c.InitialClusterFromName(c.Name)
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
