package etcdtest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"

	"github.com/overlayd/overlayd/test/nstest"
)

// Cluster is an etcd of several members, which talk to each other through wires that can be cut.
type Cluster struct {
	Members []*Server

	mu       sync.Mutex
	existing bool // whoever starts now joins
	off      *Server
	offID    string // in etcd's notation
}

// StartCluster runs a cluster until the end of the test.
func StartCluster(t testing.TB, members int) *Cluster {
	t.Helper()
	c := &Cluster{}
	for range members {
		c.add(t)
	}
	var wg sync.WaitGroup
	errs := make([]error, members)
	for i, s := range c.Members { // none is ready before most of them are there
		wg.Go(func() { errs[i] = s.start() })
	}
	wg.Wait()
	for _, err := range errs {
		must(t, err)
	}
	c.existing = true
	return c
}

// AddLearner starts one more member, which does not vote.
func (c *Cluster) AddLearner(t testing.TB) *Server {
	t.Helper()
	cli := c.Members[0].Client()
	s := c.add(t)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	_, err := cli.MemberAddAsLearner(ctx, []string{s.wire.url()})
	must(t, err)
	s.Restart() // until all members know of it, etcd does not start
	return s
}

func (c *Cluster) add(t testing.TB) *Server {
	t.Helper()
	s := newServer(t)
	s.cluster, s.name = c, fmt.Sprintf("m%d", len(c.Members))
	s.wire = newWire(t, c, s)
	c.Members = append(c.Members, s)
	return s
}

func (c *Cluster) configure(e *embed.Config, s *Server) {
	parse := func(text string) []url.URL {
		u, err := url.Parse(text)
		must(s.t, err)
		return []url.URL{*u}
	}
	e.Name, e.TickMs, e.ElectionMs, e.StrictReconfigCheck = s.name, 100, 1000, false // a learner need not wait
	e.ListenPeerUrls, e.AdvertisePeerUrls = parse("http://"+s.wire.to), parse(s.wire.url())
	var all []string
	for _, m := range c.Members {
		all = append(all, m.name+"="+m.wire.url())
	}
	e.InitialCluster = strings.Join(all, ",")
	if c.existing {
		e.ClusterState = embed.ClusterStateFlagExisting
	}
}

// CutOff ends all that a member and the others tell each other, and waits until it has noticed. Its clients still reach
// it. With nil, all members reach each other again.
func (c *Cluster) CutOff(t testing.TB, s *Server) {
	t.Helper()
	c.mu.Lock()
	c.off, c.offID = s, ""
	if s != nil {
		c.offID = s.etcd.Server.MemberID().String()
	}
	c.mu.Unlock()
	for _, m := range c.Members {
		m.wire.sever()
	}
	for _, m := range c.Members {
		for end := time.Now().Add(patience); (m.etcd.Server.Leader() == 0) != (m == s); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s does not notice who reaches it", m.name)
			}
		}
	}
}

// severed reports whether nothing passes between a member and the one with this ID.
func (c *Cluster) severed(s *Server, from string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.off != nil && (c.off == s || c.offID == from)
}

// wire passes on the connections that other members make to one.
type wire struct {
	cluster *Cluster
	owner   *Server
	ln      net.Listener
	to      string

	mu    sync.Mutex
	conns map[net.Conn]string // those from other members, and the IDs of these
}

func newWire(t testing.TB, c *Cluster, s *Server) *wire {
	t.Helper()
	ln, err := net.Listen("tcp", net.JoinHostPort(nstest.Loopback().String(), "0"))
	must(t, err)
	w := &wire{cluster: c, owner: s, ln: ln, to: freePort(t, nstest.Loopback()), conns: map[net.Conn]string{}}
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go w.serve(conn)
		}
	}()
	return w
}

func (w *wire) url() string { return "http://" + w.ln.Addr().String() }

func (w *wire) serve(conn net.Conn) {
	defer conn.Close()
	var head strings.Builder // what was read to find out who it is, to be passed on
	req, err := http.ReadRequest(bufio.NewReader(io.TeeReader(conn, &head)))
	if err != nil {
		return
	}
	w.mu.Lock()
	w.conns[conn] = req.Header.Get("X-Server-From") // one connection serves one member
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.conns, conn)
	}()
	if w.cluster.severed(w.owner, req.Header.Get("X-Server-From")) {
		return
	}
	up, err := net.Dial("tcp", w.to)
	if err != nil {
		return
	}
	defer up.Close()
	go func() {
		defer conn.Close()
		_, _ = io.Copy(conn, up)
	}()
	_, _ = io.Copy(up, io.MultiReader(strings.NewReader(head.String()), conn))
}

// sever ends the connections that are not to be.
func (w *wire) sever() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for conn, from := range w.conns {
		if w.cluster.severed(w.owner, from) {
			_ = conn.Close()
		}
	}
}

// Endpoints are the URLs of all members, with the given one at a place of the list.
func (c *Cluster) Endpoints(s *Server, at int) []string {
	var out []string
	for _, m := range c.Members {
		if m != s {
			out = append(out, m.Endpoint())
		}
	}
	return slices.Insert(out, at, s.Endpoint())
}
