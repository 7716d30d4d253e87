// Command kubernetes-test proves overlayd on a real Kubernetes of three nodes, which it makes of namespaces on this
// machine. It prints a table, removes all that it made, and ends with 1 if a row failed.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/overlayd/overlayd/test/kubernetes/build"
	"github.com/overlayd/overlayd/test/kubernetes/cluster"
	"github.com/overlayd/overlayd/test/kubernetes/conformance"
	"github.com/overlayd/overlayd/test/kubernetes/deploy"
	"github.com/overlayd/overlayd/test/kubernetes/nodes"
	"github.com/overlayd/overlayd/test/kubernetes/rows"
)

func main() { os.Exit(run()) }

type options struct {
	root, cache, goCommand, proxy, store, backend string
	only                                          *regexp.Regexp
	keep, ingress, conformance                    bool
	focus, skip                                   string
	parallel                                      int
	start                                         time.Time
}

func run() int {
	if len(os.Args) == 4 && os.Args[1] == nodes.InitCommand {
		fmt.Fprintln(os.Stderr, nodes.Init(os.Args[2], os.Args[3]))
		return 1
	}
	o := options{start: time.Now()}
	flag.StringVar(&o.root, "root", ".", "the repository's `directory`")
	flag.StringVar(&o.goCommand, "go", "go", "the go `command`")
	flag.StringVar(&o.proxy, "proxy", "iptables",
		"`mode` of kube-proxy to begin with: iptables or nftables; the other one follows")
	flag.StringVar(&o.store, "store", rows.Kubernetes, "`store` of overlayd: "+rows.Kubernetes+" or "+rows.Etcd)
	flag.StringVar(&o.backend, "backend", "vxlan", "`type` of overlayd's backend: vxlan or host-gw")
	flag.BoolVar(&o.keep, "keep", false, "leave the cluster running at the end; the next run removes it")
	down := flag.Bool("down", false, "only remove the cluster that an earlier run left")
	flag.BoolVar(&o.ingress, "ingress", false, "also run the rows on an ingress controller; compiling it takes minutes")
	flag.BoolVar(&o.conformance, "conformance", false, "instead of the rows, run Kubernetes' own tests of the network")
	flag.StringVar(&o.focus, "focus", conformance.Focus, "`pattern` of Kubernetes' tests")
	flag.StringVar(&o.skip, "skip", conformance.Skip, "`pattern` of Kubernetes' tests to leave out")
	flag.IntVar(&o.parallel, "parallel", 4, "how many of Kubernetes' tests to run at a time")
	only := flag.String("only", "", "`pattern` of rows; what they need is done in any case")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	err := o.defaults(*only)
	switch {
	case err != nil:
	case *down:
		err = o.locked(ctx, func(ctx context.Context) error { return nodes.Remove(ctx, o.dir()) })
	default:
		err = o.locked(ctx, o.test)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kubernetes-test:", err)
		return 1
	}
	return 0
}

func (o *options) defaults(only string) error {
	if os.Geteuid() != 0 {
		return errors.New("it makes namespaces and cgroups, and needs root")
	}
	if o.store != rows.Etcd && o.store != rows.Kubernetes {
		return fmt.Errorf("-store: expected %s or %s, found %q", rows.Kubernetes, rows.Etcd, o.store)
	}
	var err error
	if o.root, err = filepath.Abs(o.root); err != nil {
		return err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return err
	}
	o.cache = filepath.Join(cache, "overlayd-kubernetes")
	if only != "" {
		o.only, err = regexp.Compile(only)
	}
	return err
}

func (o *options) note(format string, args ...any) {
	fmt.Printf("%6.1f s  %s\n", time.Since(o.start).Seconds(), fmt.Sprintf(format, args...))
}

// dir is where the files of the cluster are.
func (o *options) dir() string { return filepath.Join(o.cache, "run") }

func (o *options) test(ctx context.Context) (err error) {
	if err := nodes.Remove(ctx, o.dir()); err != nil { // it may take the space that is needed
		return fmt.Errorf("remove what an earlier run left: %w", err)
	}
	b := build.Builder{Root: o.root, Cache: o.cache, Go: o.goCommand, Note: o.note}
	built, err := b.All(ctx)
	if err != nil {
		return err
	}
	var programs build.Conformance
	if o.conformance {
		if programs, err = b.Conformance(ctx, built); err != nil {
			return err
		}
	}
	images := built.Images
	for version, name := range deploy.Versions() {
		image, err := b.Overlayd(ctx, version, name)
		if err != nil {
			return err
		}
		images = append(images, image)
	}
	if o.ingress {
		image, err := b.Ingress(ctx)
		if err != nil {
			return err
		}
		images = append(images, image)
	}
	o.note("programs and images are there")
	lab, err := nodes.New(ctx, o.dir())
	if lab != nil && !o.keep {
		defer func() { err = errors.Join(err, o.end(lab, err != nil)) }()
	}
	if err != nil {
		return err
	}
	k, err := cluster.Up(ctx, lab, cluster.Config{
		Kubernetes: built.Kubernetes, Helm: built.Helm, Containerd: built.Containerd, Netcheck: built.Netcheck,
		Images: images, ProxyMode: o.proxy, Etcd: o.store == rows.Etcd,
	})
	if err != nil {
		return err
	}
	o.note("the control plane is there")
	if err := k.Add(ctx, 1, 2, 3); err != nil {
		return err
	}
	if err := k.WaitReady(ctx, false, "n1", "n2", "n3"); err != nil {
		return err
	}
	runtimes, err := k.Runtimes(ctx)
	if err != nil {
		return err
	}
	o.note("three nodes are there, not Ready: they have no network. %s", runtimes)
	network := deploy.Network(o.backend)
	kustomize, err := deploy.NewKustomize(k, o.root, network)
	if err != nil {
		return err
	}
	helm, err := deploy.NewHelm(k, o.root, network)
	if err != nil {
		return err
	}
	s := &rows.Suite{
		K: k, Store: o.store, Network: network, Only: o.only, Ingress: o.ingress, Out: os.Stdout,
		Overlay: kustomize, Chart: helm,
	}
	o.note("rows are over IPv4 and IPv6; the cluster's DNS and the API server's service are IPv4's alone")
	s.Head()
	if o.conformance {
		err = o.conform(ctx, s, programs)
	} else if err = s.Run(ctx); err == nil && !s.Asked() {
		err = fmt.Errorf("-only %s: no row has such a name", o.only)
	}
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	if failed := s.Failed(); len(failed) > 0 {
		err = errors.Join(err, fmt.Errorf("%d rows failed:\n  %s", len(failed), strings.Join(failed, "\n  ")))
	}
	o.note("done")
	return err
}

// conform runs Kubernetes' own tests.
func (o *options) conform(ctx context.Context, s *rows.Suite, programs build.Conformance) error {
	if err := s.Begin(ctx); err != nil {
		return err
	}
	if err := s.K.RoutePods(ctx); err != nil {
		return err
	}
	for i, n := range s.K.Nodes { // some tests need three zones
		if _, err := s.K.Kubectl(ctx, "label", "node", n.Name, fmt.Sprintf("topology.kubernetes.io/zone=zone-%d", i+1)); err != nil {
			return err
		}
		if o.proxy == "nftables" { // else kube-proxy accepts what it forwards from one host to another
			if _, err := n.Run(ctx, "sh", "-c", "iptables -P FORWARD ACCEPT && ip6tables -P FORWARD ACCEPT"); err != nil {
				return err
			}
		}
	}
	o.note("Kubernetes' own tests begin: %s shows them", filepath.Join(s.K.Lab.Logs, "control-ginkgo.log"))
	r := conformance.Run{
		K: s.K, Programs: programs, Focus: o.focus, Skip: o.skip, Parallel: o.parallel, Out: os.Stdout,
		Report: filepath.Join(o.cache, fmt.Sprintf("conformance-%s-%s-%s.xml", o.store, o.backend, o.proxy)),
	}
	o.note("store %s, backend %s, kube-proxy %s: the report goes to %s", o.store, o.backend, o.proxy, r.Report)
	return r.Do(ctx)
}

// locked runs what may not be run twice at a time.
func (o *options) locked(ctx context.Context, f func(ctx context.Context) error) error {
	unlock, err := o.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return f(ctx)
}

// lock keeps a second run on this machine waiting: there is one lab, and one cache.
func (o *options) lock(ctx context.Context) (unlock func(), err error) {
	if err := os.MkdirAll(o.cache, 0o755); err != nil {
		return nil, err
	}
	f, err := os.Create(filepath.Join(o.cache, "lock"))
	if err != nil {
		return nil, err
	}
	for said := false; ; said = true {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch {
		case err == nil:
			return func() { _ = f.Close() }, nil
		case !errors.Is(err, syscall.EWOULDBLOCK) || ctx.Err() != nil:
			return nil, errors.Join(fmt.Errorf("lock %s: %w", f.Name(), err), f.Close())
		case !said:
			o.note("another run is under way: waiting for its end")
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// end removes the lab. After a failure its logs are kept.
func (o *options) end(lab *nodes.Lab, failed bool) error {
	var errs []error
	if failed {
		kept := filepath.Join(o.cache, "logs-"+o.start.Format("20060102-150405"))
		if err := os.Rename(lab.Logs, kept); err != nil {
			errs = append(errs, err)
		} else {
			fmt.Println("logs:", kept)
		}
	}
	return errors.Join(append(errs, nodes.Remove(context.Background(), lab.Dir))...)
}
