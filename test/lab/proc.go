package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// stopTimeout bounds how long a process may take to end after a signal that ends it.
const stopTimeout = 15 * time.Second

// Process is a background process of the lab: a daemon on a node, or etcd. It is known by its pid file, so that it can
// be started by one command and stopped by another, and by its namespace, so that a pid which now belongs to
// another process is never signalled. Its methods are not for several goroutines at once.
type Process struct {
	name string // "n1", "etcd"
	ns   string
	dir  string // of log and pid file
	argv func() []string
	env  []string // beside the lab's own environment
}

// Log is the path of the file that holds all the process has ever printed.
func (p *Process) Log() string { return filepath.Join(p.dir, p.name+".log") }

func (p *Process) pidFile() string { return filepath.Join(p.dir, p.name+".pid") }

// Start starts the process in its namespace, in a session of its own, so that it outlives the one who started it. One
// that runs already is an error.
func (p *Process) Start() error {
	if p.Running() {
		return fmt.Errorf("start %s: it runs already, with pid %d", p.name, p.PID())
	}
	log, err := os.OpenFile(p.Log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("start %s: open its log: %w", p.name, err)
	}
	defer log.Close()
	argv := p.argv()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, "/"
	cmd.Env = append(append(os.Environ(), p.env...), insideEnv+"="+p.name, "XTABLES_LOCKFILE="+xtablesLock(p.dir))
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := inNS(p.ns, cmd.Start); err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	if err := os.WriteFile(p.pidFile(), []byte(strconv.Itoa(cmd.Process.Pid)+"\n"), 0o644); err != nil {
		return fmt.Errorf("start %s: write its pid file: %w", p.name, err)
	}
	return cmd.Process.Release() // reap takes the place of Wait
}

// xtablesLock is the lab's own lock of legacy iptables, so that holding it blocks nothing else on this machine.
func xtablesLock(dir string) string { return filepath.Join(dir, "xtables.lock") }

// insideEnv is set for every process of a lab.
const insideEnv = "OVERLAY_LAB_PROCESS"

// PID reads the pid file; 0 where there is none.
func (p *Process) PID() int {
	b, err := os.ReadFile(p.pidFile())
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0
	}
	return pid
}

// Running reports whether the process lives. A stopped (paused) one does.
func (p *Process) Running() bool {
	pid := p.PID()
	if pid == 0 {
		return false
	}
	reap(pid)
	return livesIn(pid, p.ns)
}

// reap collects the exit status of a child that ended. What is not our child (started by an earlier command) is left to
// init.
func reap(pid int) { _, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil) }

// livesIn reports whether a pid is of a process in the named namespace; one that has ended has no namespace any more,
// even while it is a zombie.
func livesIn(pid int, ns string) bool {
	want, err := idOf(nsPath(ns))
	if err != nil {
		return false
	}
	got, err := idOf(fmt.Sprintf("/proc/%d/ns/net", pid))
	return err == nil && got == want
}

// Signal sends a signal to the process, provided that it still is the process that the lab started.
func (p *Process) Signal(sig unix.Signal) error {
	pid := p.PID()
	err := signalIf(pid, sig, func() bool { return livesIn(pid, p.ns) }, goOn)
	if err != nil {
		return fmt.Errorf("send %s to %s: %w", unix.SignalName(sig), p.name, err)
	}
	return nil
}

// errNotOurs says that a pid is not, or no longer, of a process of the lab.
var errNotOurs = errors.New("no such process in the lab")

// signalIf sends a signal to a process that the check says is ours, and does something with its pidfd then. The pidfd
// is opened before the check, so that the process which was checked is the one that gets the signal.
func signalIf(pid int, sig unix.Signal, ours func() bool, then func(pidfd int) error) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return errNotOurs
	}
	if err != nil {
		return fmt.Errorf("open pid %d: %w", pid, err)
	}
	defer unix.Close(fd)
	if !ours() {
		return errNotOurs
	}
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal pid %d: %w", pid, err)
	}
	return then(fd)
}

// goOn is what signalIf does after a signal that need not end the process.
func goOn(int) error { return nil }

// Stop ends the process with SIGTERM, as systemd or an operator would, and waits. One that does not run is no error.
func (p *Process) Stop(ctx context.Context) error { return p.end(ctx, unix.SIGTERM) }

// Kill ends the process with SIGKILL and waits. One that does not run is no error.
func (p *Process) Kill(ctx context.Context) error { return p.end(ctx, unix.SIGKILL) }

func (p *Process) end(ctx context.Context, sig unix.Signal) error {
	pid := p.PID()
	if pid == 0 {
		return nil
	}
	err := signalIf(pid, sig, func() bool { return livesIn(pid, p.ns) }, func(fd int) error { return ended(ctx, fd) })
	reap(pid)
	if err != nil && !errors.Is(err, errNotOurs) {
		return fmt.Errorf("end %s: %w", p.name, err)
	}
	if err := os.Remove(p.pidFile()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the pid file of %s: %w", p.name, err)
	}
	return nil
}

// ended waits until all threads of a process have ended: those that outlive the first one hold its sockets still.
func ended(ctx context.Context, pidfd int) error {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	return poll(ctx, 5*time.Millisecond, func() error {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 0)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fatal{fmt.Errorf("wait for it: %w", err)}
		}
		return unless(n == 1, "it still runs")
	})
}

// Pause stops the process in its tracks (SIGSTOP): its sockets stay open and nobody answers.
func (p *Process) Pause() error { return p.Signal(unix.SIGSTOP) }

// Resume lets a paused process go on.
func (p *Process) Resume() error { return p.Signal(unix.SIGCONT) }

// tail is the end of the log, for a message.
func (p *Process) tail(lines int) string {
	b, err := os.ReadFile(p.Log())
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// poll calls f until it returns nil, and gives its last error when the context ends first.
func poll(ctx context.Context, every time.Duration, f func() error) error {
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		err := f()
		if err == nil || errors.As(err, new(fatal)) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (%w)", err, context.Cause(ctx))
		case <-ticker.C:
		}
	}
}

// fatal is an error that waiting does not mend.
type fatal struct{ error }

func (f fatal) Unwrap() error { return f.error }
