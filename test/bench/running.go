package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/netstate"
)

// running measures a daemon that has all its peers: one that joins, many at once, what is repaired, and what it costs to sit there.
func running(ctx context.Context, e *Env) error {
	s, err := newSite(ctx, e)
	if err != nil {
		return err
	}
	defer s.close(ctx)
	var joins []joinFigures
	for _, n := range pick(e, []int{1000, 5000, 20000}, []int{100, 1000}) {
		if err := s.fill(ctx, n); err != nil {
			return err
		}
		j, err := s.runningAt(ctx, n)
		if err != nil {
			return fmt.Errorf("%s: %w", peers(n), err)
		}
		joins = append(joins, j)
	}
	first, last := joins[0], joins[len(joins)-1]
	e.Add(Row{
		Group: "idle", Name: fmt.Sprintf("live heap for each peer, from %s to %s", peers(first.n), peers(last.n)), Unit: Bytes,
		Ours:  []float64{(last.heap - first.heap) / float64(last.n-first.n)},
		Bound: pick(e, AtMost(1024), AtMost(1500)), // with few peers, whatever else has grown is a large share
	}, Row{
		Group: "join", Name: fmt.Sprintf("CPU of one, %s beside %s", peers(last.n), peers(first.n)), Unit: Micros, Ours: last.cpu, Base: first.cpu,
		BaseName: peers(first.n),
	})
	return nil
}

// runningAt does all with one number of peers.
func (s *site) runningAt(ctx context.Context, n int) (joinFigures, error) {
	j := joinFigures{n: n}
	if err := s.clean(ctx, n); err != nil {
		return j, err
	}
	d, err := s.start(n, "", "--pprof", strconv.Itoa(pprofPort))
	if err != nil {
		return j, err
	}
	defer func() { _, _ = d.end(syscall.SIGKILL) }()
	if err := d.ready(ctx); err != nil {
		return j, err
	}
	main := n == 5000 || s.env.Quick && n == 1000
	time.Sleep(settled)
	if j.heap, err = d.heap(); err != nil {
		return j, err
	}
	if main { // before anything else happens to it
		if err := s.idle(ctx, d); err != nil {
			return j, err
		}
	}
	if err := s.joins(ctx, d, &j); err != nil {
		return j, err
	}
	s.joinRows(j, main)
	if !main {
		return j, nil
	}
	for _, step := range []func(context.Context, *daemon) error{s.answers, s.burst, s.drift} {
		if err := step(ctx, d); err != nil {
			return j, err
		}
	}
	return j, nil
}

type joinFigures struct {
	n            int
	heap         float64   // live, bytes
	above, watch []float64 // ms: of the route above etcd's watch, and of that above the put
	cpu          []float64 // µs
}

// newPeer is the lease of a node that joins: one with a number above all that are there.
const newPeer = 30000

// joins lets peers join one after another. Each leaves again, and lingers, while the next comes.
func (s *site) joins(ctx context.Context, d *daemon, j *joinFigures) error {
	m, err := s.routeMonitor()
	if err != nil {
		return err
	}
	defer m.close()
	prefix := prefixFor(d.n)
	lease, err := s.cli.Grant(ctx, 3600)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watch := s.cli.Watch(ctx, prefix+"/subnets/", clientv3.WithPrefix())
	rounds := pick(s.env, 300, 30)
	for i := range rounds + 10 { // the first are to warm up
		l := peerLease(newPeer + i)
		before, err := d.cpu()
		if err != nil {
			return err
		}
		put := time.Now()
		var heard, routed time.Time
		var g errgroup.Group
		g.Go(func() error {
			routed, err = m.await(l.Subnets.V4, put.Add(patience))
			return err
		})
		g.Go(func() error {
			for r := range watch {
				heard = time.Now()
				return r.Err()
			}
			return errors.New("the watch has ended")
		})
		if _, err := s.cli.Do(ctx, putLease(prefix, l, lease.ID)); err != nil {
			return err
		}
		if err := g.Wait(); err != nil {
			return fmt.Errorf("join %d: %w", i, err)
		}
		time.Sleep(10 * time.Millisecond)
		after, err := d.cpu()
		if err != nil {
			return err
		}
		if i >= 10 {
			j.above = append(j.above, max(0, millis(routed.Sub(heard))))
			j.watch = append(j.watch, millis(heard.Sub(put)))
			j.cpu = append(j.cpu, float64((after-before)/time.Microsecond))
		}
	}
	_, err = s.cli.Revoke(ctx, lease.ID)
	time.Sleep(6 * time.Second) // they linger
	return errors.Join(err, s.untilComplete(d.n))
}

func (s *site) joinRows(j joinFigures, judged bool) {
	p50 := Row{Group: "join", Name: peers(j.n) + ": route after etcd's watch, p50", Unit: Millis, Ours: j.above}
	p99 := Row{Group: "join", Name: peers(j.n) + ": route after etcd's watch, p99", Unit: Millis, Ours: []float64{Quantile(j.above, 0.99)}}
	if judged {
		p50.Bound, p99.Bound = AtMost(1), AtMost(5)
	}
	s.env.Add(p50, p99, Row{Group: "join", Name: peers(j.n) + ": CPU of one", Unit: Micros, Ours: j.cpu})
}

// burst lets a thousand peers join at once.
func (s *site) burst(ctx context.Context, d *daemon) error {
	const many = 1000
	var took []float64
	for range pick(s.env, 5, 1) {
		lease, err := s.cli.Grant(ctx, 3600)
		if err != nil {
			return err
		}
		m, err := s.routeMonitor()
		if err != nil {
			return err
		}
		var ops []clientv3.Op
		for i := range many {
			ops = append(ops, putLease(prefixFor(d.n), peerLease(newPeer+i), lease.ID))
		}
		began := time.Now()
		var written time.Time
		var g errgroup.Group
		g.Go(func() error {
			err := s.write(ctx, ops)
			written = time.Now()
			return err
		})
		var routed time.Time
		g.Go(func() error {
			routed, err = m.awaitMany(many, began.Add(patience))
			return err
		})
		err = g.Wait()
		m.close()
		if err != nil {
			return err
		}
		took = append(took, max(0, millis(routed.Sub(written))))
		if _, err := s.cli.Revoke(ctx, lease.ID); err != nil {
			return err
		}
		time.Sleep(6 * time.Second)
		if err := s.untilComplete(d.n); err != nil {
			return err
		}
	}
	s.env.Add(Row{
		Group: "burst", Name: peers(d.n) + ": 1,000 more, after the last is written", Unit: Millis, Ours: took, Bound: AtMost(100),
	})
	return nil
}

// drift deletes what the daemon has made.
func (s *site) drift(ctx context.Context, d *daemon) error {
	victim := peerLease(d.n / 2).Subnets.V4
	var one, all []float64
	for range pick(s.env, 9, 1) {
		time.Sleep(2500 * time.Millisecond) // after a quiet time it looks at once
		m, err := s.routeMonitor()
		if err != nil {
			return err
		}
		err = s.node.Do(func() error { return deleteRoute(victim) })
		began := time.Now()
		var back time.Time
		if err == nil {
			back, err = m.await(victim, began.Add(patience))
		}
		m.close()
		if err != nil {
			return err
		}
		one = append(one, millis(back.Sub(began)))
	}
	for range pick(s.env, 5, 1) {
		time.Sleep(2500 * time.Millisecond)
		began := time.Now()
		if _, err := s.node.Run(ctx, "ip", "link", "del", "overlay.1"); err != nil {
			return err
		}
		for deadline := began.Add(patience); ; time.Sleep(5 * time.Millisecond) {
			took := time.Since(began)
			if err := s.complete(d.n); err == nil {
				all = append(all, millis(took))
				break
			} else if time.Now().After(deadline) {
				return err
			}
		}
	}
	s.env.Add(
		Row{Group: "drift", Name: peers(d.n) + ": a route deleted, until it is back", Unit: Millis, Ours: one, Bound: AtMost(20)},
		Row{Group: "drift", Name: peers(d.n) + ": the device deleted, until all is back", Unit: Millis, Ours: all, Bound: AtMost(300)})
	return nil
}

var heapAlloc = regexp.MustCompile(`(?m)^# HeapAlloc = (\d+)$`)

// heap is what is alive on the daemon's heap.
func (d *daemon) heap() (float64, error) {
	for range 2 { // what has a finalizer needs two
		if _, err := d.get(pprofPort, "/debug/pprof/heap?gc=1"); err != nil {
			return 0, err
		}
	}
	text, err := d.get(pprofPort, "/debug/pprof/heap?gc=1&debug=1")
	if err != nil {
		return 0, err
	}
	found := heapAlloc.FindSubmatch(text)
	if found == nil {
		return 0, errors.New("the heap profile does not say HeapAlloc")
	}
	return strconv.ParseFloat(string(found[1]), 64)
}

// idle looks at a daemon that has nothing to do, for its first two minutes: that it writes down once what it knows is in them.
func (s *site) idle(_ context.Context, d *daemon) error {
	const minute = time.Minute
	span := pick(s.env, minute, 5*time.Second)
	faults, err := d.childFaults()
	if err != nil {
		return err
	}
	var used []float64
	for range 3 {
		before, err := d.cpu()
		if err != nil {
			return err
		}
		time.Sleep(span)
		after, err := d.cpu()
		if err != nil {
			return err
		}
		used = append(used, millis(after-before)*float64(minute)/float64(span))
	}
	// The next look at the whole kernel comes later than that; it takes its share.
	audit, err := d.audit()
	if err != nil {
		return err
	}
	for i := range used[1:] {
		used[i+1] += audit / auditMinutes
	}
	now, err := d.childFaults()
	if err != nil {
		return err
	}
	peak, err := d.peakRSS()
	if err != nil {
		return err
	}
	started := 0.0
	if now != faults {
		started = 1
	}
	s.env.Add(
		Row{Group: "idle", Name: peers(d.n) + ": CPU a minute, with a minute's share of looking at the kernel", Unit: Millis, Ours: used[1:], Bound: AtMost(20)},
		Row{Group: "idle", Name: peers(d.n) + ": CPU of the first minute, in which the state file is written", Unit: Millis, Ours: used[:1]},
		Row{Group: "idle", Name: peers(d.n) + ": CPU of a look at the whole kernel, every five minutes", Unit: Millis, Ours: []float64{audit}},
		Row{Group: "idle", Name: peers(d.n) + ": whether processes were started", Unit: Count, Ours: []float64{started}, Bound: AtMost(0)},
		Row{Group: "idle", Name: peers(d.n) + ": peak of memory by then (RSS)", Unit: MB, Ours: []float64{peak / 1e6}, Bound: AtMost(40)})
	return nil
}

// auditMinutes is how often a daemon looks at the whole kernel without any reason to.
const auditMinutes = 5

// audit has the daemon look at the whole kernel, as it does by itself now and then, and says how much CPU that took, in ms.
func (d *daemon) audit() (float64, error) {
	before, err := d.cpu()
	if err != nil {
		return 0, err
	}
	resp, err := d.control().Get("http://overlayd/diff")
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if text, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusOK || strings.TrimSpace(string(text)) != "null" {
		return 0, fmt.Errorf("a look at the kernel: %s: %.200q, %w", resp.Status, text, err)
	}
	after, err := d.cpu()
	return millis(after - before), err
}

// routeMonitor hears of routes only.
func (s *site) routeMonitor() (*monitor, error) { return s.monitorOf(unix.RTNLGRP_IPV4_ROUTE) }

// await waits for the route to pods of a subnet.
func (m *monitor) await(subnet netip.Prefix, deadline time.Time) (time.Time, error) {
	for {
		es, err := m.next(deadline)
		if err != nil {
			return time.Time{}, fmt.Errorf("waiting for the route to %s: %w", subnet, err)
		}
		for _, e := range es {
			if e.isRouteTo(subnet) {
				return e.at, nil
			}
		}
	}
}

// awaitMany waits until so many routes to pods were added.
func (m *monitor) awaitMany(n int, deadline time.Time) (time.Time, error) {
	for {
		es, err := m.next(deadline)
		if err != nil {
			return time.Time{}, fmt.Errorf("waiting for %d more routes: %w", n, err)
		}
		for _, e := range es {
			if e.typ == unix.RTM_NEWROUTE && e.body[4] == netstate.MainTable && e.body[5] == netstate.Protocol {
				n--
			}
		}
		if n <= 0 {
			return es[len(es)-1].at, nil
		}
	}
}
