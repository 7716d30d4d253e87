package bench

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/test/lab"
)

// site is a node and a store that holds the leases of many nodes which do not exist: what the one real node does with
// them is measured.
type site struct {
	env    *Env
	lab    *lab.Lab
	node   *lab.Node
	cli    *clientv3.Client
	leases leases

	answerer *answerer
}

// leases say how the leases of nodes that do not exist are kept in one of the stores. Either has all in the lab's etcd.
type leases interface {
	// suffix is what the groups of rows end with.
	suffix() string
	// args tell the daemon where the leases are; etcd: the URL, if it is another one.
	args(n int, etcd string) []string
	// network makes a network for n nodes, without any.
	network(ctx context.Context, n int) error
	// batch is how many leases may be written in one transaction.
	batch() int
	// put writes a lease, attached to one of etcd.
	put(n int, l subnet.Lease, id clientv3.LeaseID) clientv3.Op
	// forget takes the lease of the real node away.
	forget(n int, own netip.Prefix) clientv3.Op
	// port is from where they come.
	port() uint16
}

const (
	siteNetwork = `{"Network": "10.128.0.0/9", "SubnetLen": 24, "Backend": {"Type": "vxlan"}}`
	siteNode    = "bench" // the real one
	sitePort    = 8471
	pprofPort   = 8470
	// patience is how long to wait for what comes at once on most machines.
	patience = 30 * time.Second
)

// newSite makes a lab of one node, and ends the daemon there: the benchmark starts its own.
func newSite(ctx context.Context, e *Env, kubernetes bool) (*site, error) {
	l, err := lab.Up(ctx, lab.Options{
		Name: "bench", Nodes: 1, Pods: 1, Segments: 1, Overlayd: e.Overlayd, Kubernetes: kubernetes,
	})
	if err != nil {
		return nil, err
	}
	s := &site{env: e, lab: l, node: l.Node(1)}
	if s.cli, err = l.EtcdClient(); err == nil {
		err = s.node.Stop(ctx)
	}
	if s.leases = (inEtcd{s}); kubernetes {
		s.leases = &inKubernetes{site: s}
	}
	if err == nil {
		// On a node both are in memory; a disk that is slow to sync would be all that is measured.
		err = unix.Mount("tmpfs", s.dir(), "tmpfs", 0, "size=64m")
	}
	if err == nil {
		s.answerer, err = newAnswerer(ctx, s)
	}
	if err != nil {
		s.close(ctx)
		return nil, err
	}
	return s, nil
}

func (s *site) close(ctx context.Context) {
	if s.cli != nil {
		_ = s.cli.Close()
	}
	if s.answerer != nil {
		s.answerer.close()
	}
	if err := s.lab.Down(context.WithoutCancel(ctx)); err != nil {
		s.env.Progress(err.Error())
	}
}

// dir holds the daemon's files.
func (s *site) dir() string { return filepath.Dir(s.node.SubnetFile()) }

func prefixFor(n int) string { return fmt.Sprintf("/bench/%d", n) }

// peerLease is the lease of node i of many, from 1.
func peerLease(i int) subnet.Lease {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], uint32(i))
	l := subnet.Lease{Attrs: subnet.Attrs{
		Backend: subnet.VXLAN, PublicIPLocal: true,
		Identity: subnet.Identity{NodeName: fmt.Sprintf("node-%d.example.org", i), NodeID: fmt.Sprintf("%032x", i)},
	}}
	l.Subnets.V4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 128 + b[2], b[3], 0}), 24)
	l.PublicIP.V4 = netip.AddrFrom4([4]byte{100, 64 + b[1], b[2], b[3]})
	l.VTEP.V4 = subnet.VTEP{VNI: 1, MAC: addr.MAC{0x02, 0x42, b[0], b[1], b[2], b[3]}}
	return l
}

// inEtcd are leases in etcd itself. Each number of peers has a key prefix of its own.
type inEtcd struct{ site *site }

func (inEtcd) suffix() string { return "" }

func (inEtcd) port() uint16 { return etcdPort }

func (inEtcd) batch() int { return 100 } // etcd takes 128

func (k inEtcd) args(n int, etcd string) []string {
	return []string{
		"--etcd-endpoints", cmp.Or(etcd, strings.Join(k.site.lab.Etcd().URLs(), ",")), "--etcd-prefix", prefixFor(n),
	}
}

func (k inEtcd) network(ctx context.Context, n int) error {
	_, err := k.site.cli.Put(ctx, prefixFor(n)+"/config", siteNetwork)
	return err
}

func (inEtcd) put(n int, l subnet.Lease, id clientv3.LeaseID) clientv3.Op {
	return clientv3.OpPut(prefixFor(n)+"/subnets/"+subnet.FormatKey(l.Subnets), string(subnet.FormatValue(l.Attrs)),
		clientv3.WithLease(id))
}

func (inEtcd) forget(n int, own netip.Prefix) clientv3.Op {
	return clientv3.OpDelete(prefixFor(n) + "/subnets/" + subnet.FormatKey(addr.Per[netip.Prefix]{V4: own}))
}

// fill makes a network with the leases of n nodes.
func (s *site) fill(ctx context.Context, n int) error {
	if err := s.leases.network(ctx, n); err != nil {
		return err
	}
	_, err := s.join(ctx, n, 1, n)
	return err
}

// join writes the leases of nodes of a network, from the given number on. They leave with the etcd lease.
func (s *site) join(ctx context.Context, n, first, count int) (clientv3.LeaseID, error) {
	lease, err := s.cli.Grant(ctx, 86400)
	if err != nil {
		return 0, err
	}
	var ops []clientv3.Op
	for i := range count {
		ops = append(ops, s.leases.put(n, peerLease(first+i), lease.ID))
	}
	for part := range slices.Chunk(ops, s.leases.batch()) {
		if _, err = s.cli.Txn(ctx).Then(part...).Commit(); err != nil {
			break
		}
	}
	return lease.ID, err
}

// clean makes the node one that has never been in the network of n.
func (s *site) clean(ctx context.Context, n int) error {
	_, err := s.node.Run(ctx, s.env.Overlayd, "cleanup")
	if err = errors.Join(err, os.RemoveAll(s.node.StateDir())); err != nil {
		return err
	}
	own, err := s.node.Lease()
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = s.cli.Do(ctx, s.leases.forget(n, own.Subnets[0]))
	return errors.Join(err, os.Remove(s.node.SubnetFile()))
}

// daemon is one run of overlayd.
type daemon struct {
	n     int
	cmd   *exec.Cmd
	began time.Time
	http  *http.Client
	log   string
}

// start runs overlayd in the network of n. Where etcd is "", it is the lab's own.
func (s *site) start(n int, etcd string, more ...string) (*daemon, error) {
	log, err := os.Create(filepath.Join(s.dir(), "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	d := &daemon{n: n, log: log.Name(), http: &http.Client{
		Timeout: patience, Transport: &http.Transport{DialContext: s.node.DialContext, MaxIdleConns: 1},
	}}
	d.cmd = exec.Command(s.env.Overlayd, slices.Concat(s.leases.args(n, etcd), []string{
		"--node-name", siteNode, "--node-id", siteNode,
		"--state-dir", s.node.StateDir(), "--subnet-file", s.node.SubnetFile(), "--socket", s.node.Socket(),
		"--healthz-port", strconv.Itoa(sitePort),
	}, more)...)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.began = time.Now()
	return d, s.node.Do(d.cmd.Start)
}

// ready waits for /readyz.
func (d *daemon) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		if _, err := d.get(sitePort, "/readyz"); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			log, _ := os.ReadFile(d.log)
			return fmt.Errorf("overlayd did not get ready: %w; its log:\n%s", context.Cause(ctx), log)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// get asks the daemon; any status but 200 is an error.
func (d *daemon) get(port int, path string) ([]byte, error) {
	resp, err := d.http.Get(fmt.Sprintf("http://127.0.0.1:%d%s", port, path))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	return body, err
}

// cpu is what the process has used so far, without its children.
func (d *daemon) cpu() (time.Duration, error) {
	// The CPU clock of a process: MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED), linux/posix-timers.h.
	const sched = 2
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^d.cmd.Process.Pid)<<3|sched, &ts); err != nil {
		return 0, err
	}
	return time.Duration(ts.Nano()), nil
}

// peakRSS is the most memory that a process ever had, in MB.
func peakRSS(pid int) (float64, error) { return memory(pid, "VmHWM") }

// memory is one of the figures in /proc/PID/status, in MB.
func memory(pid int, name string) (float64, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	var kilobytes float64
	_, rest, _ := strings.Cut(string(raw), name+":")
	_, err = fmt.Sscan(rest, &kilobytes)
	return kilobytes * 1024 / 1e6, err
}

// childFaults counts the page faults of all ended children, proc_pid_stat(5): any process that was started makes some.
func (d *daemon) childFaults() (int, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", d.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(raw), ") ")
	f := strings.Fields(rest)
	if len(f) < 9 {
		return 0, errors.New("/proc/PID/stat is too short")
	}
	return strconv.Atoi(f[8]) // field 11, cminflt
}

// end ends the process and tells what it used in all, its children among it.
func (d *daemon) end(sig syscall.Signal) (time.Duration, error) {
	d.http.CloseIdleConnections()
	if err := d.cmd.Process.Signal(sig); err != nil {
		return 0, err
	}
	_ = d.cmd.Wait() // it was told to end
	return d.cmd.ProcessState.UserTime() + d.cmd.ProcessState.SystemTime(), nil
}
