package lab

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"
)

// Machine is anything in the lab with a namespace of its own: a node, a pod, the router, the internet host, etcd.
type Machine struct {
	Name string // "n1", "n1-p1", "router"
	NS   string // "lab-n1"
}

// outputWait is how long a command that has ended is waited for whose output somebody else still holds open.
const outputWait = 10 * time.Second

// Do runs f on a thread inside the machine's namespace: sockets that f opens belong to the machine and can be used from
// anywhere afterwards. Goroutines started by f do not run there.
func (m Machine) Do(f func() error) error { return inNS(m.NS, f) }

// Run runs a command on the machine and returns what it printed; an error carries it, too.
func (m Machine) Run(ctx context.Context, name string, args ...string) (string, error) {
	return m.run(exec.CommandContext(ctx, name, args...))
}

// Shell runs a script on the machine up to the first command that fails, with more variables ("NAME=value") in its
// environment. It returns what Run does.
func (m Machine) Shell(ctx context.Context, script string, env ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "sh", "-ec", script)
	cmd.Env = append(os.Environ(), env...)
	return m.run(cmd)
}

func (m Machine) run(cmd *exec.Cmd) (string, error) {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &out, &out, outputWait
	if err := m.Do(cmd.Start); err != nil {
		return "", fmt.Errorf("on %s: start %s: %w", m.Name, cmd.Path, err)
	}
	if err := cmd.Wait(); err != nil {
		return out.String(), fmt.Errorf("on %s: %s: %w: %s", m.Name, strings.Join(cmd.Args, " "), err,
			strings.TrimSpace(out.String()))
	}
	return out.String(), nil
}

// DialContext connects from the machine. The address must be a literal one: names would be looked up elsewhere.
func (m Machine) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	var conn net.Conn
	err := m.Do(func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen opens a TCP listener on the machine.
func (m Machine) Listen(ctx context.Context, address string) (net.Listener, error) {
	var l net.Listener
	err := m.Do(func() (err error) {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		l, err = lc.Listen(ctx, "tcp", address)
		return err
	})
	return l, err
}
