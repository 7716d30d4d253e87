package masquerade

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// The exit statuses of iptables that mean something to us.
const (
	exitNoChain = 1 // no such chain, or one that iptables cannot read
	exitKernel  = 3 // the legacy variant: the kernel has no such table
	exitSystem  = 4 // no permission, the lock not had in time, or (nft) a kernel without nf_tables
)

// runner runs a command to its end and returns its standard output.
type runner func(ctx context.Context, stdin, name string, args ...string) (string, error)

// commandError is a command that ended badly, in one line.
type commandError struct {
	command string
	status  int
	stderr  string
	err     error
}

func (e *commandError) Error() string {
	if line := firstLine(e.stderr); line != "" {
		return e.command + ": " + line
	}
	return fmt.Sprintf("%s: %v", e.command, e.err)
}

func (e *commandError) Unwrap() error { return e.err }

// execTimeout bounds one command. Waiting for the xtables lock is bounded by itself, and much tighter.
const execTimeout = time.Minute

// execRun starts the command from the calling thread, so that it runs in that thread's network namespace.
func execRun(ctx context.Context, stdin, name string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	ctx, cancel := context.WithTimeoutCause(ctx, execTimeout, fmt.Errorf("no end after %v", execTimeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C"} // ours may hold a password
	// For a killed command whose child keeps the pipes open. The time also runs for the reading of what an ended one has printed.
	cmd.WaitDelay = 10 * time.Second
	err := cmd.Run()
	if err == nil {
		return stdout.String(), nil
	}
	e := &commandError{command: strings.Join(append([]string{filepath.Base(name)}, args...), " "), status: -1, err: err}
	if ctx.Err() != nil { // "signal: killed" would hide the reason
		e.err = context.Cause(ctx)
		return "", e
	}
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		e.status, e.stderr = exit.ExitCode(), stderr.String()
	}
	return "", e
}

// exitStatus is the exit status that err speaks of, or -1.
func exitStatus(err error) int {
	if e := (*commandError)(nil); errors.As(err, &e) {
		return e.status
	}
	return -1
}

// nothingThere tells whether a listing failed because there is no such chain, no such table, or no kernel support for
// this kind of firewall at all; a missing permission or a busy lock is none of these.
func nothingThere(err error) bool {
	if errors.Is(err, errNoChain) {
		return true
	}
	e := (*commandError)(nil)
	if !errors.As(err, &e) {
		return false
	}
	switch e.status {
	case exitNoChain:
		return true
	case exitKernel, exitSystem:
		return !strings.Contains(e.stderr, "Permission denied") && !strings.Contains(e.stderr, "xtables lock")
	}
	return false
}

// programPrefix is what iptables puts before its messages: "iptables v1.8.9 (nf_tables): ", "iptables-restore: ".
var programPrefix = regexp.MustCompile(`^ip6?tables[^:]*:\s*`)

// firstLine is the first line of stderr that says something. (After "Can't lock" comes a line that says it plainly.)
func firstLine(stderr string) string {
	for line := range strings.Lines(stderr) {
		line = strings.TrimSpace(programPrefix.ReplaceAllString(strings.TrimSpace(line), ""))
		if line != "" && !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, "Can't lock ") {
			return line
		}
	}
	return ""
}

var lineNumber = regexp.MustCompile(`line:? (\d+)`)

// explainRestore adds to the error of a restore the line of its input that was refused.
func explainRestore(err error, input string) error {
	e := (*commandError)(nil)
	if !errors.As(err, &e) {
		return err
	}
	m := lineNumber.FindStringSubmatch(e.stderr)
	if m == nil {
		return err
	}
	lines := strings.Split(input, "\n")
	n, _ := strconv.Atoi(m[1])
	if n < 1 || n > len(lines) {
		return err
	}
	err = fmt.Errorf("%w, in the line %q", err, lines[n-1])
	if strings.Contains(lines[n-1], "--match-set ") {
		err = fmt.Errorf("%w: %w", ErrSet, err)
	}
	return err
}
