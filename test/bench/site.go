package bench

import (
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

// site is a node and an etcd that holds the leases of many nodes which do not exist: what the one real node does with
// them is measured. Each number of peers has a key prefix of its own in that etcd.
type site struct {
	env  *Env
	lab  *lab.Lab
	node *lab.Node
	cli  *clientv3.Client

	answerer *answerer
}

const (
	siteNetwork = `{"Network": "10.128.0.0/9", "SubnetLen": 24, "Backend": {"Type": "vxlan"}}`
	sitePort    = 8471
	pprofPort   = 8470
	// patience is how long to wait for what comes at once on most machines.
	patience = 30 * time.Second
	// batch is how many writes go into one transaction; etcd takes 128.
	batch = 100
)

// newSite makes a lab of one node, and ends the daemon there: the benchmark starts its own.
func newSite(ctx context.Context, e *Env) (*site, error) {
	l, err := lab.Up(ctx, lab.Options{Name: "bench", Nodes: 1, Pods: 1, Segments: 1, Overlayd: e.Overlayd})
	if err != nil {
		return nil, err
	}
	s := &site{env: e, lab: l, node: l.Node(1)}
	if s.cli, err = l.EtcdClient(); err == nil {
		err = s.node.Stop(ctx)
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

func putLease(prefix string, l subnet.Lease, id clientv3.LeaseID) clientv3.Op {
	return clientv3.OpPut(prefix+"/subnets/"+subnet.FormatKey(l.Subnets), string(subnet.FormatValue(l.Attrs)),
		clientv3.WithLease(id))
}

// fill puts a network with the leases of n nodes into etcd.
func (s *site) fill(ctx context.Context, n int) error {
	prefix := prefixFor(n)
	lease, err := s.cli.Grant(ctx, 86400)
	if err != nil {
		return err
	}
	ops := []clientv3.Op{clientv3.OpPut(prefix+"/config", siteNetwork)}
	for i := 1; i <= n; i++ {
		ops = append(ops, putLease(prefix, peerLease(i), lease.ID))
	}
	return s.write(ctx, ops)
}

// write writes in as few transactions as etcd allows.
func (s *site) write(ctx context.Context, ops []clientv3.Op) error {
	for at := 0; at < len(ops); at += batch {
		if _, err := s.cli.Txn(ctx).Then(ops[at:min(at+batch, len(ops))]...).Commit(); err != nil {
			return err
		}
	}
	return nil
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
	key := subnet.FormatKey(addr.Per[netip.Prefix]{V4: own.Subnets[0]})
	_, err = s.cli.Delete(ctx, prefixFor(n)+"/subnets/"+key)
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
	if etcd == "" {
		etcd = strings.Join(s.lab.Etcd().URLs(), ",")
	}
	log, err := os.Create(filepath.Join(s.dir(), "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	d := &daemon{n: n, log: log.Name(), http: &http.Client{
		Timeout: patience, Transport: &http.Transport{DialContext: s.node.DialContext, MaxIdleConns: 1},
	}}
	d.cmd = exec.Command(s.env.Overlayd, append([]string{
		"--etcd-endpoints", etcd, "--etcd-prefix", prefixFor(n), "--node-name", "bench", "--node-id", "bench",
		"--state-dir", s.node.StateDir(), "--subnet-file", s.node.SubnetFile(), "--socket", s.node.Socket(),
		"--healthz-port", strconv.Itoa(sitePort),
	}, more...)...)
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
func peakRSS(pid int) (float64, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	var kilobytes float64
	_, rest, _ := strings.Cut(string(raw), "VmHWM:")
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
