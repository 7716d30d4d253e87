package bench

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"
)

const (
	// slowEtcd is what an etcd across a data centre adds to each request; half of it in each direction.
	slowEtcd  = 2400 * time.Microsecond
	relayPort = 12379
	// settled is how long after it is ready a daemon may still do things that belong to the start.
	settled = 500 * time.Millisecond
)

// startSamples are what several starts have given.
type startSamples struct {
	cold, warm, slow             startFigures
	coldLog, requests, peak      []float64
	writes, changes, warmRequest []float64
}

type startFigures struct{ wall, cpu []float64 }

// start measures starts: of a new node, of one behind a slow etcd, and again of one that has all its state.
func start(ctx context.Context, e *Env) error {
	s, err := newSite(ctx, e)
	if err != nil {
		return err
	}
	defer s.close(ctx)
	relay, err := s.lab.Etcd().StartRelay(ctx, relayPort, etcdPort, slowEtcd/2)
	if err != nil {
		return err
	}
	defer relay.Close()
	slowURL := fmt.Sprintf("http://%s:%d", s.lab.Topology().Etcd.Interfaces[0].Addrs[0].Addr(), relayPort)

	sizes := pick(e, []int{100, 1000, 5000, 20000}, []int{100, 1000})
	all := map[int]*startSamples{}
	for _, n := range sizes {
		if err := s.fill(ctx, n); err != nil {
			return err
		}
		all[n] = &startSamples{}
	}
	// Round by round, so that what the machine does meanwhile hits all sizes.
	for range pick(e, 7, 1) {
		for _, n := range sizes {
			if err := s.startOnce(ctx, n, slowURL, all[n]); err != nil {
				return fmt.Errorf("%s: %w", peers(n), err)
			}
		}
	}
	s.startRows(all, sizes)
	return nil
}

// startOnce starts the daemon on a new node: to be timed, to be timed behind the slow etcd, and to see what it does; and then again
// with all that it has made there.
func (s *site) startOnce(ctx context.Context, n int, slowURL string, out *startSamples) error {
	for _, cold := range []func() error{
		func() error { return s.timed(ctx, n, "", &out.cold) },
		func() error { return s.timed(ctx, n, slowURL, &out.slow) },
		func() error { return s.coldCounts(ctx, n, out) },
	} {
		if err := errors.Join(s.clean(ctx, n), cold()); err != nil {
			return err
		}
	}
	return errors.Join(s.timed(ctx, n, "", &out.warm), s.warmCounts(ctx, n, out))
}

// timed runs the daemon until it is ready, and not a moment longer.
func (s *site) timed(ctx context.Context, n int, etcd string, f *startFigures) error {
	d, err := s.start(n, etcd)
	if err != nil {
		return err
	}
	if err := d.ready(ctx); err != nil {
		_, _ = d.end(syscall.SIGKILL)
		return err
	}
	wall := time.Since(d.began)
	cpu, err := d.end(syscall.SIGKILL)
	f.wall, f.cpu = append(f.wall, millis(wall)), append(f.cpu, millis(cpu))
	return errors.Join(err, s.complete(n))
}

// coldCounts looks at what a new node's start asks of others, and of memory.
func (s *site) coldCounts(ctx context.Context, n int, out *startSamples) error {
	requests, err := s.started(ctx, n, func(d *daemon) error {
		peak, errPeak := d.peakRSS()
		log, errLog := d.logSize()
		out.peak, out.coldLog = append(out.peak, peak/1e6), append(out.coldLog, log)
		return errors.Join(errPeak, errLog)
	})
	out.requests = append(out.requests, requests)
	return err
}

// warmCounts looks at what is changed by a restart: of what is in the kernel and in etcd, nothing should be.
func (s *site) warmCounts(ctx context.Context, n int, out *startSamples) error {
	before, err := s.revision(ctx)
	if err != nil {
		return err
	}
	m, err := s.monitor()
	if err != nil {
		return err
	}
	defer m.close()
	requests, err := s.started(ctx, n, func(*daemon) error {
		changes, err := m.count()
		out.changes = append(out.changes, float64(changes))
		return err
	})
	if err != nil {
		return err
	}
	after, err := s.revision(ctx)
	out.writes, out.warmRequest = append(out.writes, float64(after-before)), append(out.warmRequest, requests)
	return err
}

// started runs the daemon until a moment after it is ready, and counts its requests to etcd. It ends as systemd would end it.
func (s *site) started(ctx context.Context, n int, look func(d *daemon) error) (requests float64, err error) {
	before, err := s.requests(ctx)
	if err != nil {
		return 0, err
	}
	d, err := s.start(n, "")
	if err != nil {
		return 0, err
	}
	defer func() {
		_, endErr := d.end(syscall.SIGTERM)
		err = errors.Join(err, endErr)
	}()
	if err := d.ready(ctx); err != nil {
		return 0, err
	}
	time.Sleep(settled)
	after, err := s.requests(ctx)
	return after - before, errors.Join(err, look(d), s.complete(n))
}

func (s *site) startRows(all map[int]*startSamples, sizes []int) {
	for _, n := range sizes {
		x := all[n]
		row := func(group, what string, u Unit, ours []float64, b Bound) Row {
			return Row{Group: group, Name: peers(n) + ": " + what, Peers: n, Unit: u, Ours: ours, Bound: b}
		}
		beside := func(r Row, name string, base []float64) Row {
			r.BaseName, r.Base = name, base
			return r
		}
		var wall, cpu, slow, peak, warm Bound
		if n == 5000 {
			wall, cpu, peak, slow, warm = AtMost(150), AtMost(180), AtMost(40), AtMost(Median(x.cold.wall)+30), RatioAtMost(0.6)
		}
		first := row(coldStart, execToReady, Millis, x.cold.wall, wall)
		if n == 20000 {
			first = beside(first, peers(5000), all[5000].cold.wall)
			first.Bound = RatioAtMost(4.5)
		}
		s.env.Add(first,
			row(coldStart, cpuOfAll, Millis, x.cold.cpu, cpu),
			beside(row(coldStart, "etcd 2.4 ms away", Millis, x.slow.wall, slow), "etcd near", x.cold.wall),
			row(coldStart, "peak of memory (RSS)", MB, x.peak, peak),
			row(coldStart, "requests to etcd", Count, x.requests, AtMost(10)),
			row(coldStart, "log", Bytes, x.coldLog, AtMost(10000)),
			beside(row(warmRestart, execToReady, Millis, x.warm.wall, Bound{}), "cold start", x.cold.wall),
			beside(row(warmRestart, cpuOfAll, Millis, x.warm.cpu, warm), "cold start", x.cold.cpu),
			row(warmRestart, "requests to etcd", Count, x.warmRequest, AtMost(10)),
			row(warmRestart, "writes to etcd", Count, x.writes, AtMost(0)),
			row(warmRestart, "changes to the kernel", Count, x.changes, AtMost(0)))
	}
}

// The names of rows that the plot has as well.
const (
	coldStart   = "cold start"
	warmRestart = "warm restart"
	execToReady = "exec to ready, all programmed"
	cpuOfAll    = "CPU of all processes"
)
