package etcd

import (
	"context"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"sync"
	"syscall"
	"time"
)

// resolveEvery is how often the endpoints' host names are looked up, beside each time that one is connected to;
// resolveAgain, after a failure.
const resolveEvery, resolveAgain = time.Minute, 5 * time.Second

// hosts are the addresses of the endpoints: what is written there, what their names stand for, and what was connected
// to. They are known before anything is read from the store, so that no route which follows from that can cut this node
// off from it.
type hosts struct {
	learned func() // called after a change; set before use

	mu     sync.Mutex
	names  []string
	looked map[string][]netip.Addr // what a name stood for the last time, or what an endpoint says itself
	tried  map[string][]netip.Addr // what was tried in the last attempt to connect
}

func newHosts(endpoints []string) *hosts {
	h := &hosts{learned: func() {}, looked: map[string][]netip.Addr{}, tried: map[string][]netip.Addr{}}
	for _, e := range endpoints {
		u, err := url.Parse(e)
		if err != nil {
			continue // Options.check has refused it
		}
		host := u.Hostname()
		if a, err := netip.ParseAddr(host); err == nil {
			h.looked[host] = []netip.Addr{plain(a)}
		} else if !slices.Contains(h.names, host) {
			h.names = append(h.names, host)
		}
	}
	return h
}

// plain is an address as it stands in routes.
func plain(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

// addresses lists them all, in order.
func (h *hosts) addresses() []netip.Addr {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.list()
}

func (h *hosts) list() (out []netip.Addr) {
	for _, m := range []map[string][]netip.Addr{h.looked, h.tried} {
		for _, as := range m {
			out = append(out, as...)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

func (h *hosts) change(f func()) {
	h.mu.Lock()
	before := h.list()
	f()
	now := h.list()
	h.mu.Unlock()
	if !slices.Equal(before, now) {
		h.learned()
	}
}

// dial connects as gRPC would, and takes note of each address before it is tried.
func (h *hosts) dial(ctx context.Context, address string) (net.Conn, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex // IPv4 and IPv6 may be tried at the same time
	var tried []netip.Addr
	d := net.Dialer{ControlContext: func(_ context.Context, _, at string, _ syscall.RawConn) error {
		if to, err := netip.ParseAddrPort(at); err == nil {
			mu.Lock()
			defer mu.Unlock()
			tried = append(tried, plain(to.Addr()))
			h.change(func() { h.tried[host] = append(slices.Clone(h.tried[host]), plain(to.Addr())) })
		}
		return nil
	}}
	c, err := d.DialContext(ctx, "tcp", address)
	mu.Lock()
	defer mu.Unlock()
	if len(tried) > 0 {
		h.change(func() { h.tried[host] = slices.Clone(tried) })
	}
	return c, err
}

// resolve looks the names up until ctx ends, also those of endpoints that are not in use yet.
func (h *hosts) resolve(
	ctx context.Context, lookup func(ctx context.Context, network, host string) ([]netip.Addr, error),
) {
	for len(h.names) > 0 && ctx.Err() == nil {
		wait := resolveEvery
		for _, host := range h.names {
			found, err := lookup(ctx, "ip", host)
			if err != nil || len(found) == 0 { // what was known stays
				wait = resolveAgain
				continue
			}
			for i, a := range found {
				found[i] = plain(a)
			}
			h.change(func() { h.looked[host] = found })
		}
		sleep(ctx, around(wait, chance()), nil)
	}
}
