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
	code, body, err := m.Ask(ctx, url)
	if err == nil && code != http.StatusOK {
		err = fmt.Errorf("%s: GET %s: %d %s: %s", m.Name, url, code, http.StatusText(code), strings.TrimSpace(body))
	}
	if err != nil {
		return "", err
	}
	return body, nil
}

// Ask is Get, but takes any HTTP status as an answer. An error means that there was none within two seconds.
func (m Machine) Ask(ctx context.Context, url string) (code int, body string, err error) {
	ctx, cancel := context.WithTimeout(ctx, getTimeout)
	defer cancel()
	transport := &http.Transport{DialContext: m.DialContext, DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return 0, "", fmt.Errorf("%s: GET %s: %w", m.Name, url, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return 0, "", fmt.Errorf("%s: GET %s: %w", m.Name, url, err)
	}
	return resp.StatusCode, string(text), nil
}
