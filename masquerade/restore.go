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

// ErrSet is in the error when iptables rejected a rule that matches on a set: the set is not there, or the kernel
// cannot match on sets.
var ErrSet = errors.New("no ipset match")

// execTimeout bounds one run of iptables. Its wait for the xtables lock is bounded by itself, and much tighter.
const execTimeout = time.Minute

// runner runs a command to its end and returns its standard output.
type runner func(ctx context.Context, stdin, name string, args ...string) (string, error)

// execRun starts the command from the calling thread, so that it runs in that thread's network namespace. The error is
// the first line that the command writes to stderr.
func execRun(ctx context.Context, stdin, name string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	ctx, cancel := context.WithTimeoutCause(ctx, execTimeout, fmt.Errorf("timed out after %v", execTimeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C"} // ours may hold a password
	cmd.WaitDelay = 10 * time.Second                            // for a killed command whose child keeps the pipes open
	err := cmd.Run()
	if err == nil {
		return stdout.String(), nil
	}
	command := strings.Join(append([]string{filepath.Base(name)}, args...), " ")
	if ctx.Err() != nil { // "signal: killed" would hide the reason
		return "", fmt.Errorf("%s: %w", command, context.Cause(ctx))
	}
	if line := firstLine(stderr.String()); line != "" {
		err = errors.New(line)
	}
	return "", commandError{fmt.Errorf("%s: %w", command, err), cmd.ProcessState.ExitCode(), stderr.String()}
}

// commandError is a command that ended badly, in one line, with its exit status and all that it said.
type commandError struct {
	error
	status int
	stderr string
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

// restore gives iptables-restore its input. go-iptables cannot replace the rules of a chain so that no packet meets
// half of them. What the input does not name stays.
func (t *tables) restore(ctx context.Context, input string) error {
	if input == "" {
		return nil
	}
	_, err := t.run(ctx, input, t.name+"-restore", "--noflush", "-w", t.wait)
	if err == nil {
		return nil
	}
	var said commandError
	if !errors.As(err, &said) {
		return err
	}
	m := lineNumber.FindStringSubmatch(said.stderr)
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

var lineNumber = regexp.MustCompile(`line:? (\d+)`)
