package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"
)

// running measures a daemon that has all its peers: one that joins, many at once, what is repaired, and what it costs
// to sit there.
func running(ctx context.Context, e *Env) error {
	s, err := newSite(ctx, e, false)
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
	heap := row("idle", fmt.Sprintf("live heap for each peer, from %s to %s", peers(first.n), peers(last.n)), Bytes,
		(last.heap-first.heap)/float64(last.n-first.n))
	e.Add(heap.atMost(pick(e, 1024.0, 1800.0)), // with few peers, whatever else has grown is a large share
		row("join", fmt.Sprintf("CPU of one, %s beside %s", peers(last.n), peers(first.n)), Micros, last.cpu...).
			beside(peers(first.n), first.cpu))
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
		if err := s.idle(ctx, d, 40, func(r Row) Row { return r.atMost(20) }); err != nil {
			return j, err
		}
	}
	if err := s.joins(ctx, d, &j, 1); err != nil {
		return j, err
	}
	if err := s.leave(ctx, d, j.joined...); err != nil || !main {
		return j, err
	}
	for _, step := range []func(context.Context, *daemon) error{s.answers, s.burst, s.drift} {
		if err := step(ctx, d); err != nil {
			return j, err
		}
	}
	return j, nil
}

type joinFigures struct {
	n     int
	heap  float64   // live, bytes
	above []float64 // ms: of the route, after the lease has arrived
	cpu   []float64 // µs

	joined []clientv3.LeaseID // those of etcd that the new leases are attached to
}

const (
	// newPeer is the lease of a node that joins: one with a number above all that are there.
	newPeer = 30000
	// apart is how long after a peer the next one joins: subnet/kube gathers those that come within 20 ms.
	apart = 25 * time.Millisecond
)

// joins lets peers join one after another; most bounds the median, in ms.
func (s *site) joins(ctx context.Context, d *daemon, j *joinFigures, most float64) error {
	m, err := s.monitor()
	if err != nil {
		return err
	}
	defer m.close()
	news, err := s.arrivals()
	if err != nil {
		return err
	}
	defer news.close()
	rounds := pick(s.env, 300, 30)
	for i := range rounds + 10 { // the first are to warm up
		time.Sleep(apart)
		var routed time.Time
		began := time.Now()
		used, err := d.cpuDuring(func() error {
			var g errgroup.Group
			g.Go(func() (err error) {
				routed, err = m.await(1, peerLease(newPeer+i).Subnets.V4)
				return err
			})
			lease, err := s.join(ctx, d.n, newPeer+i, 1)
			j.joined = append(j.joined, lease)
			err = errors.Join(err, g.Wait())
			time.Sleep(10 * time.Millisecond)
			return err
		})
		arrived, errArrived := news.first(began)
		if err = errors.Join(err, errArrived); err != nil {
			return fmt.Errorf("join %d: %w", i, err)
		}
		if i >= 10 {
			j.above = append(j.above, millis(routed.Sub(arrived)))
			j.cpu = append(j.cpu, 1000*used)
		}
	}
	group := "join" + s.leases.suffix()
	p50 := row(group, "route after the lease's arrival, p50", Millis, j.above...).at(d.n)
	p99 := row(group, "route after the lease's arrival, p99", Millis, Quantile(j.above, 0.99)).at(d.n)
	if d.n == 5000 {
		p50, p99 = p50.atMost(most), p99.atMost(5)
	}
	s.env.Add(p50, p99, row(group, "CPU of one", Micros, j.cpu...).at(d.n))
	return nil
}

// leave takes the leases of those that have joined away, and waits until nothing is left of them: they linger.
func (s *site) leave(ctx context.Context, d *daemon, leases ...clientv3.LeaseID) error {
	var errs []error
	for _, id := range leases {
		_, err := s.cli.Revoke(ctx, id)
		errs = append(errs, err)
	}
	time.Sleep(6 * time.Second)
	return errors.Join(append(errs, s.untilComplete(d.n))...)
}

// burst lets a thousand peers join at once.
func (s *site) burst(ctx context.Context, d *daemon) error {
	const many = 1000
	var took []float64
	for range pick(s.env, 5, 1) {
		m, err := s.monitor()
		if err != nil {
			return err
		}
		var lease clientv3.LeaseID
		var written, routed time.Time
		var g errgroup.Group
		g.Go(func() (err error) {
			lease, err = s.join(ctx, d.n, newPeer, many)
			written = time.Now()
			return err
		})
		g.Go(func() (err error) {
			routed, err = m.await(many, netip.Prefix{})
			return err
		})
		err = g.Wait()
		m.close()
		if err = errors.Join(err, s.leave(ctx, d, lease)); err != nil {
			return err
		}
		took = append(took, max(0, millis(routed.Sub(written))))
	}
	s.env.Add(row("burst", "1,000 more, after the last is written", Millis, took...).at(d.n).atMost(100))
	return nil
}

// drift deletes what the daemon has made.
func (s *site) drift(ctx context.Context, d *daemon) error {
	victim := peerLease(d.n / 2).Subnets.V4
	var one, all []float64
	for range pick(s.env, 9, 1) {
		time.Sleep(2500 * time.Millisecond) // after a quiet time it observes at once
		m, err := s.monitor()
		if err != nil {
			return err
		}
		err = s.node.Do(func() error { return deleteRoute(victim) })
		began := time.Now()
		back, awaitErr := m.await(1, victim)
		m.close()
		if err := errors.Join(err, awaitErr); err != nil {
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
	s.env.Add(row("drift", "a route deleted, until it is back", Millis, one...).at(d.n).atMost(20),
		row("drift", "the device deleted, until all is back", Millis, all...).at(d.n).atMost(300))
	return nil
}

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
	found := regexp.MustCompile(`(?m)^# HeapAlloc = (\d+)$`).FindSubmatch(text)
	if found == nil {
		return 0, errors.New("the heap profile does not say HeapAlloc")
	}
	return strconv.ParseFloat(string(found[1]), 64)
}

// idle measures a daemon that has nothing to do, for its first three minutes. It persists its state once in the first.
// The next resync comes later than that; a minute's share of it is added. most bounds its memory, in MB,
// and judge its CPU.
func (s *site) idle(ctx context.Context, d *daemon, most float64, judge func(cpu Row) Row) error {
	const minute, resyncMinutes = time.Minute, 5
	span := pick(s.env, minute, 2*time.Second)
	faults, err := d.childFaults()
	if err != nil {
		return err
	}
	var used []float64
	for range 3 {
		took, err := d.cpuDuring(func() error {
			time.Sleep(span)
			return nil
		})
		if err != nil {
			return err
		}
		used = append(used, took*float64(minute)/float64(span))
	}
	resync, err := d.cpuDuring(func() error {
		return s.overlayd(ctx, "diff") // compares the whole kernel, as a resync does
	})
	faultsAfter, errFaults := d.childFaults()
	peak, errPeak := peakRSS(d.cmd.Process.Pid)
	now, errNow := memory(d.cmd.Process.Pid, "VmRSS")
	if err := errors.Join(err, errFaults, errPeak, errNow); err != nil {
		return err
	}
	group := "idle" + s.leases.suffix()
	s.env.Add(
		judge(row(group, "CPU a minute, including a fifth of a resync", Millis, used[1]+resync/resyncMinutes,
			used[2]+resync/resyncMinutes).at(d.n)),
		row(group, "CPU of the first minute, in which the state file is written", Millis, used[0]).at(d.n),
		row(group, "CPU of a resync, every five minutes", Millis, resync).at(d.n),
		row(group, "page faults of processes that it started", Count, float64(faultsAfter-faults)).at(d.n).atMost(0),
		row(group, "peak of memory by then (RSS)", MB, peak).at(d.n).atMost(most),
		row(group, "memory at the end (RSS)", MB, now).at(d.n))
	return nil
}

// cpuDuring is what the daemon uses while f runs, in ms.
func (d *daemon) cpuDuring(f func() error) (float64, error) {
	before, err := d.cpu()
	if err != nil {
		return 0, err
	}
	err = f()
	after, errAfter := d.cpu()
	return millis(after - before), errors.Join(err, errAfter)
}
