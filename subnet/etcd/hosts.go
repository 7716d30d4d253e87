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

// resolveEvery is how often the endpoints' host names are resolved, beside each time that one is connected to;
// resolveAgain, after a failure.
const resolveEvery, resolveAgain = time.Minute, 5 * time.Second

// hosts are the addresses of the endpoints: in their URLs, of their names, and those that were connected to. They are
// known before anything is read from the store, so that no route that follows from that can cut this node off from it.
type hosts struct {
	changed func() // called after a change; set before use

	mu       sync.Mutex
	names    []string
	resolved map[string][]netip.Addr // of a name, when it was resolved last; or what an endpoint says itself
	tried    map[string][]netip.Addr // in the last attempt to connect
}

func newHosts(endpoints []string) *hosts {
	h := &hosts{changed: func() {}, resolved: map[string][]netip.Addr{}, tried: map[string][]netip.Addr{}}
	for _, e := range endpoints {
		u, err := url.Parse(e)
		if err != nil {
			continue // Options.check has rejected it
		}
		host := u.Hostname()
		if a, err := netip.ParseAddr(host); err == nil {
			h.resolved[host] = []netip.Addr{plain(a)}
		} else if !slices.Contains(h.names, host) {
			h.names = append(h.names, host)
		}
	}
	return h
}

// plain is an address as routes have it.
func plain(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

// addresses lists them all, in order.
func (h *hosts) addresses() []netip.Addr {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.list()
}

func (h *hosts) list() (out []netip.Addr) {
	for _, m := range []map[string][]netip.Addr{h.resolved, h.tried} {
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
		h.changed()
	}
}

// dial connects as gRPC would, and takes note of each address before it is tried.
func (h *hosts) dial(ctx context.Context, address string) (net.Conn, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	var tried []netip.Addr
	d := net.Dialer{ControlContext: func(_ context.Context, _, at string, _ syscall.RawConn) error {
		if to, err := netip.ParseAddrPort(at); err == nil {
			h.change(func() { // IPv4 and IPv6 may be tried at the same time
				tried = append(tried, plain(to.Addr()))
				h.tried[host] = slices.Clone(tried)
			})
		}
		return nil
	}}
	return d.DialContext(ctx, "tcp", address)
}

// resolve resolves the names until ctx ends, also those of endpoints that are not in use yet.
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
			h.change(func() { h.resolved[host] = found })
		}
		select {
		case <-time.After(around(wait, chance())):
		case <-ctx.Done():
		}
	}
}
