package nodes

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Node is a machine that can be switched on and off.
type Node struct {
	*Host
	mac  string // of its network card: the others remember it while it is off
	lab  *Lab
	init *exec.Cmd
}

// Node makes the node with this number, from 1 to 9, and switches it on.
func (l *Lab) Node(ctx context.Context, number int) (*Node, error) {
	name := "n" + strconv.Itoa(number)
	n := &Node{
		Host: l.host(name, fmt.Sprintf("172.30.0.1%d", number), fmt.Sprintf("fd00:30::1%d", number)), lab: l,
		mac: fmt.Sprintf("02:00:00:00:30:1%d", number),
	}
	return n, n.On(ctx)
}

// Cgroup is the cgroup of the node's pods, as the kubelet is to be told.
func (n *Node) Cgroup() string { return "/" + cgroupTop + "/" + n.Name + "/pods" }

// On switches the node on: its disk is as it was, all else is new. It forwards nothing that no rule accepts, like a
// machine with Docker on it, and iptables does not see what crosses a bridge, as on one with a sysctl.d file of
// libvirt's.
func (n *Node) On(ctx context.Context) error {
	ns := prefix + n.Name
	err := script(ctx, strings.NewReplacer("NS", ns, "NAME", n.Name, "MAC", n.mac, "IP4", n.IP.String(), "IP6",
		n.IP6.String()).Replace(`
netns add NS
-n NS link set lo up
-n okt-router link add NAME type veth peer name eth0 address MAC netns NS
-n okt-router link set NAME master br0 up
-n NS addr add IP4/24 dev eth0
-n NS addr add IP6/64 dev eth0 nodad
-n NS link set eth0 up
-n NS route add default via 172.30.0.1
-n NS route add default via fd00:30::1
netns exec NS sysctl -qw net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0
netns exec NS iptables -P FORWARD DROP
netns exec NS ip6tables -P FORWARD DROP
`))
	if err != nil {
		return err
	}
	for _, cgroup := range []string{"daemons", "pods"} {
		if err := makeCgroup(filepath.Join(n.Name, cgroup)); err != nil {
			return err
		}
	}
	return n.boot()
}

func (n *Node) boot() error {
	if err := os.MkdirAll(n.dir, 0o755); err != nil {
		return err
	}
	ready := filepath.Join(n.dir, "ready")
	_ = os.Remove(ready)
	self, err := os.Executable()
	if err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(n.lab.Logs, n.Name+"-init.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	n.init = exec.Command("nsenter", "--net=/run/netns/"+prefix+n.Name, "--",
		"unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", self, InitCommand, n.Name, n.dir)
	n.init.Stdout, n.init.Stderr = log, log
	n.init.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := n.init.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() {
		_ = n.init.Wait()
		close(ended)
	}()
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(ready); err == nil {
			break
		}
		select {
		case <-ended:
			return fmt.Errorf("the init of %s ended: see %s", n.Name, log.Name())
		default:
		}
		if time.Now().After(end) {
			return fmt.Errorf("the init of %s is not ready: see %s", n.Name, log.Name())
		}
	}
	pid, err := n.initPid()
	if err != nil {
		return err
	}
	n.enter = []string{"nsenter", "--target", strconv.Itoa(pid), "--mount", "--uts", "--net", "--pid", "--"}
	return joinCgroup(filepath.Join(n.Name, "daemons"), pid)
}

// initPid is the node's process 1, as seen from outside.
func (n *Node) initPid() (int, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", n.init.Process.Pid, n.init.Process.Pid))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(raw)))
}

// Off switches the node off, as a power failure does: everything on it is gone at once, but for its disk.
func (n *Node) Off(ctx context.Context) error {
	if err := clearCgroup(n.Name); err != nil {
		return err
	}
	return script(ctx, "netns delete "+prefix+n.Name)
}

// Start starts a daemon on the node.
func (n *Node) Start(name string, args ...string) (*Process, error) {
	return n.lab.Start(n.Host, n.Name+"/daemons", name, args...)
}

// InPod prepares a command that runs in a pod of this node, in the pod's own namespaces. It needs no API server.
func (n *Node) InPod(ctx context.Context, uid string, args ...string) (*exec.Cmd, error) {
	pids, err := pidsIn(n.Name+"/pods", uid)
	if err != nil {
		return nil, err
	}
	for _, pid := range pids {
		if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err != nil ||
			!strings.HasPrefix(string(comm), args[0]+"\x00serve") {
			continue // the pause container, which has another file system
		}
		enter := []string{"--target", strconv.Itoa(pid), "--all", "--"}
		return exec.CommandContext(ctx, "nsenter", append(enter, args...)...), nil
	}
	return nil, fmt.Errorf("on %s: no process of pod %s is there", n.Name, uid)
}
