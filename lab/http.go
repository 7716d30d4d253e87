package lab

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// getTimeout bounds one request to a server that may hang.
const getTimeout = 2 * time.Second

// Get fetches a URL from the machine, so that 127.0.0.1 is the machine itself; any status but 200 is an error that
// carries the answer.
func (m Machine) Get(ctx context.Context, url string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, getTimeout)
	defer cancel()
	transport := &http.Transport{DialContext: m.DialContext, DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return "", fmt.Errorf("%s: GET %s: %w", m.Name, url, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return "", fmt.Errorf("%s: GET %s: %w", m.Name, url, err)
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: GET %s: %s: %s", m.Name, url, resp.Status, strings.TrimSpace(string(body)))
	}
	return string(body), nil
}
