package etcd

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/test/bubble"
)

func ips(texts ...string) (out []netip.Addr) {
	for _, s := range texts {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// What an endpoint says itself is known before anything is asked, and this node leases no subnet that covers it.
func TestEndpointsAreKnown(t *testing.T) {
	t.Parallel()
	s := store(t)
	o := options(s)
	u := must[*url.URL](t)(url.Parse(o.Endpoints[0]))
	written := ips("10.244.9.5", u.Hostname(), "fd00::9")
	o.Endpoints = append(o.Endpoints, "http://10.244.9.5:2379", "http://[fd00::9]:2379")
	n := start(t, o)
	if got := n.m.conn.hosts.addresses(); !slices.Equal(got, written) {
		t.Errorf("before anything is asked: %v", got)
	}
	snap := n.until("the table", func(s subnet.Snapshot) bool { return s.Table.Revision > 0 })
	if !slices.Equal(snap.Endpoints, written) {
		t.Errorf("known with the first table are %v, want %v", snap.Endpoints, written)
	}
	c := claim(1)
	c.Remembered = prefixes("10.244.9.0/24", "")
	n.m.Claim(c)
	if got := n.untilHeld().Lease.Subnets.V4; got.Contains(written[0]) {
		t.Errorf("it has leased %s", got)
	}
}

// Every address that a name stands for is known before it is tried, whether it answers or not.
func TestAddressesAreKnownBeforeTheyAreTried(t *testing.T) {
	t.Parallel()
	l := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	_, port, _ := net.SplitHostPort(l.Addr().String())
	h := newHosts([]string{"http://localhost:" + port})
	if len(h.addresses()) > 0 {
		t.Errorf("known are %v", h.addresses())
	}
	for _, open := range []bool{true, false} {
		if !open {
			_ = l.Close()
		}
		c, err := h.dial(ctxFor(t), "localhost:"+port)
		if (err == nil) != open {
			t.Fatal(err)
		}
		if err == nil {
			_ = c.Close()
		}
		if !slices.Contains(h.addresses(), netip.MustParseAddr("127.0.0.1")) {
			t.Errorf("the port is open: %t: known are %v", open, h.addresses())
		}
	}
}

// Names are looked up again and again; one that can't be keeps what it stood for.
func TestNamesAreLookedUpAgain(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		var answer atomic.Pointer[[]netip.Addr]
		lookup := func(_ context.Context, _, host string) ([]netip.Addr, error) {
			if a := answer.Load(); a != nil && host == "etcd.example" {
				return slices.Clone(*a), nil
			}
			return nil, errors.New("no such host")
		}
		h := newHosts([]string{"http://etcd.example:2379", "http://192.0.2.1:2379"})
		changes := 0
		h.changed = func() { changes++ }
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { h.resolve(ctx, lookup); close(done) }()
		for _, step := range []struct {
			answer *[]netip.Addr
			want   []netip.Addr
		}{
			{nil, ips("192.0.2.1")},
			{new(ips("10.18.0.5", "::ffff:10.18.0.6")), ips("10.18.0.5", "10.18.0.6", "192.0.2.1")},
			{nil, ips("10.18.0.5", "10.18.0.6", "192.0.2.1")},
			{new(ips("192.0.2.1")), ips("192.0.2.1")},
		} {
			answer.Store(step.answer)
			time.Sleep(2 * resolveEvery)
			synctest.Wait()
			if got := h.addresses(); !slices.Equal(got, step.want) {
				t.Errorf("known are %v, want %v", got, step.want)
			}
		}
		cancel()
		<-done
		if changes != 2 {
			t.Errorf("told of %d changes", changes)
		}
	})
}
