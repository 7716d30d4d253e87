package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// listenControl opens the socket for the operator's commands, which only root can connect to. It replaces one that a
// killed daemon left: this daemon has the lock.
func listenControl(path string) (net.Listener, error) {
	if path == "" {
		return nil, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("--socket: %w", err)
	}
	if st, err := os.Lstat(path); err == nil && st.Mode()&os.ModeSocket == 0 {
		return nil, usageError{fmt.Errorf("--socket: %s exists and is not a socket", path)}
	}
	if c, err := net.Dial("unix", path); err == nil {
		_ = c.Close()
		return nil, usageError{fmt.Errorf("--socket: another overlayd uses %s: set another path", path)}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("--socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("--socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("--socket: %w", err)
	}
	return l, nil
}

// askWithin bounds one question to the daemon.
const askWithin = 5 * time.Second

// errNotRunning says that no daemon answers at the socket.
var errNotRunning = errors.New("overlayd does not run on this node")

// client asks the daemon through its socket.
type client struct{ socket string }

// get asks for something, and puts the answer into out.
func (c client) get(ctx context.Context, path string, out any) error {
	return c.ask(ctx, http.MethodGet, path, nil, out)
}

// ask puts the answer into out.
func (c client) ask(ctx context.Context, method, path string, body []byte, out any) error {
	ctx, cancel := context.WithTimeout(ctx, askWithin)
	defer cancel()
	hc := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", c.socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, method, "http://overlayd"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := hc.Do(req)
	if err != nil {
		if op := (*net.OpError)(nil); errors.As(err, &op) && op.Op == "dial" && !errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("%w, or with another --socket than %s", errNotRunning, c.socket)
		}
		if errors.Is(err, context.DeadlineExceeded) {
			return fmt.Errorf("overlayd runs, but does not answer at %s within %v: is it stopped "+
				"(ps -o pid,stat -C overlayd), or the machine overloaded?", c.socket, askWithin)
		}
		if u := (*url.Error)(nil); errors.As(err, &u) {
			err = u.Err // the URL means nothing to an operator
		}
		return fmt.Errorf("query overlayd at %s: %w", c.socket, err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("query overlayd at %s: %w", c.socket, err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("overlayd: %s", strings.TrimSpace(string(raw)))
	}
	return json.Unmarshal(raw, out)
}
