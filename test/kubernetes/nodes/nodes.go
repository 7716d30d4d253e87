// Package nodes makes machines out of namespaces: each has a network, a process table, a host name and a file system of
// its own, starts with an init, and can be switched off. All of them stand in one network with a router, behind which
// "the internet" is.
//
//	internet 203.0.113.2 ── 203.0.113.1 router 172.30.0.1 ──┬── control 172.30.0.2
//	                                                        ├── n1 172.30.0.11
//	                                                        └── n2 172.30.0.12 ...
package nodes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// prefix marks the names of our network namespaces.
const prefix = "okt-"

// Addresses of the lab, beside those of the nodes.
const (
	ControlIP   = "172.30.0.2"
	ControlIP6  = "fd00:30::2"
	InternetIP  = "203.0.113.2"
	InternetIP6 = "2001:db8:113::2"
)

// Host is a network namespace in which processes can be run: that of the control plane, the internet, the router, or a
// node.
type Host struct {
	Name    string
	IP, IP6 netip.Addr
	dir     string   // for its files
	enter   []string // the command that leads into it
}

// Lab is the network and all that is in it.
type Lab struct {
	Dir               string // all files
	Logs              string // the logs among them
	Control, Internet *Host
	Router            *Host // its addresses are those on the internet's side
}

// New makes the network and the hosts that are not nodes. Nothing is left of an earlier lab: see [Remove].
func New(ctx context.Context, dir string) (*Lab, error) {
	l := &Lab{Dir: dir, Logs: filepath.Join(dir, "logs")}
	// Where they are modules; an error shows where what they bring is needed.
	_ = exec.CommandContext(ctx, "modprobe", "-a", "br_netfilter", "overlay").Run()
	if err := os.MkdirAll(l.Logs, 0o755); err != nil {
		return nil, err
	}
	if err := l.saveSettings(); err != nil {
		return nil, err
	}
	if err := makeCgroup("control"); err != nil {
		return nil, err
	}
	l.Control, l.Internet = l.host("control", ControlIP, ControlIP6), l.host("internet", InternetIP, InternetIP6)
	l.Router = l.host("router", "203.0.113.1", "2001:db8:113::1")
	return l, script(ctx, `
netns add okt-router
netns add okt-control
netns add okt-internet
-n okt-router link set lo up
-n okt-router link add br0 type bridge
-n okt-router addr add 172.30.0.1/24 dev br0
-n okt-router addr add fd00:30::1/64 dev br0 nodad
-n okt-router link set br0 up
-n okt-control link set lo up
-n okt-router link add control type veth peer name eth0 netns okt-control
-n okt-router link set control master br0 up
-n okt-control addr add 172.30.0.2/24 dev eth0
-n okt-control addr add fd00:30::2/64 dev eth0 nodad
-n okt-control link set eth0 up
-n okt-control route add default via 172.30.0.1
-n okt-control route add default via fd00:30::1
-n okt-internet link set lo up
-n okt-router link add internet type veth peer name eth0 netns okt-internet
-n okt-router addr add 203.0.113.1/24 dev internet
-n okt-router addr add 2001:db8:113::1/64 dev internet nodad
-n okt-router link set internet up
-n okt-internet addr add 203.0.113.2/24 dev eth0
-n okt-internet addr add 2001:db8:113::2/64 dev eth0 nodad
-n okt-internet link set eth0 up
-n okt-internet route add 172.30.0.0/24 via 203.0.113.1
-n okt-internet route add fd00:30::/64 via 2001:db8:113::1
-n okt-internet route add 198.51.100.0/24 via 203.0.113.1
-n okt-internet route add 2001:db8:51::/64 via 2001:db8:113::1
netns exec okt-router sysctl -qw net.ipv4.ip_forward=1
netns exec okt-router sysctl -qw net.ipv6.conf.all.forwarding=1
`)
}

func (l *Lab) host(name, ip, ip6 string) *Host {
	return &Host{
		Name: name, IP: netip.MustParseAddr(ip), IP6: netip.MustParseAddr(ip6), dir: filepath.Join(l.Dir, name),
		enter: []string{"nsenter", "--net=/run/netns/" + prefix + name, "--"},
	}
}

// script runs `ip` for each line.
func script(ctx context.Context, lines string) error {
	for _, line := range strings.Split(strings.TrimSpace(lines), "\n") {
		if out, err := exec.CommandContext(ctx, "ip", strings.Fields(line)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", line, err, bytes.TrimSpace(out))
		}
	}
	return nil
}

// Remove ends every process of the lab in a directory, and removes its namespaces, cgroups and files. It needs nothing
// but the names, and so also removes what a killed run left.
func Remove(ctx context.Context, dir string) error {
	errs := []error{clearCgroup("")}
	out, err := exec.CommandContext(ctx, "ip", "netns", "list").Output()
	errs = append(errs, err)
	for _, line := range strings.Split(string(out), "\n") {
		if name, _, _ := strings.Cut(line, " "); strings.HasPrefix(name, prefix) {
			errs = append(errs, script(ctx, "netns delete "+name))
		}
	}
	return errors.Join(append(errs, restoreSettings(dir), os.RemoveAll(dir))...)
}

// Command prepares a command that runs on the host.
func (h *Host) Command(ctx context.Context, args ...string) *exec.Cmd {
	all := append(append([]string(nil), h.enter...), args...)
	return exec.CommandContext(ctx, all[0], all[1:]...)
}

// Run runs a command on the host and returns what it printed. What it wrote on stderr is part of the error.
func (h *Host) Run(ctx context.Context, args ...string) (string, error) {
	return Output(h.Command(ctx, args...))
}

// Output runs a command and returns what it printed. What it wrote on stderr is part of the error.
func Output(c *exec.Cmd) (string, error) {
	var out, problems bytes.Buffer
	c.Stdout, c.Stderr = &out, &problems
	if err := c.Run(); err != nil {
		command := c.Args
		if i := slices.Index(command, "--"); i >= 0 { // before it is how to enter the host
			command = command[i+1:]
		}
		command = append([]string{filepath.Base(command[0])}, command[1:]...)
		return out.String(), fmt.Errorf("%s: %w: %s", strings.Join(command, " "), err,
			strings.TrimSpace(problems.String()+" "+out.String()))
	}
	return out.String(), nil
}

// Process is a daemon on a host.
type Process struct {
	cmd  *exec.Cmd
	done chan struct{}
}

// Start starts a daemon on a host, in a cgroup of the lab; what it prints goes to a log file.
func (l *Lab) Start(h *Host, cgroup, name string, args ...string) (*Process, error) {
	log, err := os.OpenFile(filepath.Join(l.Logs, h.Name+"-"+name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	// The shell joins the cgroup before it becomes the daemon: whatever that starts is in there, too.
	join := `for f in ` + cgroupRoot + `/*/` + cgroupTop + "/" + cgroup + `/cgroup.procs ` + cgroupRoot + `/` + cgroupTop +
		"/" + cgroup +
		`/cgroup.procs; do [ ! -e "$f" ] || echo $$ >"$f" || exit 1; done; exec "$@"`
	p := &Process{
		h.Command(context.Background(), append([]string{"sh", "-c", join, "sh"}, args...)...),
		make(chan struct{}),
	}
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for the test, which then ends all in order
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// Ended tells whether the daemon has ended.
func (p *Process) Ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Stop ends the daemon: it is asked to, and killed after ten seconds.
func (p *Process) Stop() {
	p.signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		p.signal(syscall.SIGKILL)
		<-p.done
	}
}

// signal reaches the daemon: on a node that is the child of the process which entered there.
func (p *Process) signal(s syscall.Signal) {
	pid := p.cmd.Process.Pid
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err == nil &&
		strings.TrimSpace(string(name)) == "nsenter" {
		if child, err := strconv.Atoi(strings.TrimSpace(string(raw))); err == nil {
			pid = child
		}
	}
	_ = syscall.Kill(pid, s)
}
