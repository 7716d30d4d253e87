package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"time"
)

const (
	transferSize    = 1 << 20
	transferTimeout = 20 * time.Second
	checkPort       = 7007
)

// transfer is what both ends of a TCP connection saw of each other, and how much arrived.
type transfer struct {
	local, remote  netip.AddrPort // the client's view
	Bytes          int64
	Client, Server netip.AddrPort // the server's
}

// serveTCP takes in what clients send over HTTP, and answers with what it got, and between which addresses.
func serveTCP(ctx context.Context, m Machine, at netip.Addr) (*http.Server, error) {
	l, err := m.Listen(ctx, netip.AddrPortFrom(at, checkPort).String())
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", m.Name, err)
	}
	s := &http.Server{ReadTimeout: transferTimeout, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			return // it shows at the client's end
		}
		client, _ := netip.ParseAddrPort(r.RemoteAddr)
		_ = json.NewEncoder(w).Encode(transfer{
			Bytes: n, Client: client, Server: addrPort(r.Context().Value(http.LocalAddrContextKey).(net.Addr)),
		})
	})}
	go func() { _ = s.Serve(l) }()
	return s, nil
}

func addrPort(a net.Addr) netip.AddrPort {
	p := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}

// sendTCP sends 1 MiB from the machine, and says what is wrong with how it arrived.
func sendTCP(ctx context.Context, m Machine, to netip.Addr) (t transfer, err error) {
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) {
		t.local, t.remote = addrPort(i.Conn.LocalAddr()), addrPort(i.Conn.RemoteAddr())
	}})
	server := netip.AddrPortFrom(to, checkPort)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+server.String(),
		bytes.NewReader(make([]byte, transferSize)))
	if err != nil {
		return t, err
	}
	client := http.Client{Timeout: transferTimeout, Transport: &http.Transport{
		DisableKeepAlives: true, DialContext: m.DialContext,
	}}
	resp, err := client.Do(req)
	if err != nil {
		return t, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&t); err != nil {
		return t, fmt.Errorf("all %d bytes sent, no answer: %w", transferSize, err)
	}
	return t, errors.Join(
		unless(t.Bytes == transferSize, "the server got %d of %d bytes", t.Bytes, transferSize),
		unless(t.Server == server, "the server was reached as %s instead of %s", t.Server, server),
		unless(t.remote == server, "the client reached %s instead of %s", t.remote, server))
}
