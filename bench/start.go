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

// startOnce starts the daemon cold, behind the slow etcd, cold again, and warm.
func (s *site) startOnce(ctx context.Context, n int, slowURL string, out *startSamples) error {
	if err := s.coldStart(ctx, n, slowURL, &out.slow, nil); err != nil {
		return err
	}
	if err := s.coldStart(ctx, n, "", &out.cold, out); err != nil {
		return err
	}
	return s.warmStart(ctx, n, out)
}

// coldStart starts a node that has nothing, and leaves what it made.
func (s *site) coldStart(ctx context.Context, n int, etcd string, f *startFigures, more *startSamples) error {
	if err := s.clean(ctx, n); err != nil {
		return err
	}
	before, err := s.requests(ctx)
	if err != nil {
		return err
	}
	d, err := s.start(n, etcd)
	if err != nil {
		return err
	}
	defer d.end(syscall.SIGKILL)
	if err := d.ready(ctx); err != nil {
		return err
	}
	wall := time.Since(d.began)
	if more != nil { // the peak and the log include what follows at once
		time.Sleep(settled)
	}
	if err := s.complete(n); err != nil {
		return err
	}
	if more != nil {
		after, errRequests := s.requests(ctx)
		peak, errPeak := d.peakRSS()
		log, errLog := d.logSize()
		if err := errors.Join(errRequests, errPeak, errLog); err != nil {
			return err
		}
		more.requests, more.peak, more.coldLog = append(more.requests, after-before), append(more.peak, peak/1e6), append(more.coldLog, log)
	}
	cpu, err := d.end(syscall.SIGTERM)
	f.wall, f.cpu = append(f.wall, millis(wall)), append(f.cpu, millis(cpu))
	return err
}

// warmStart starts a node that has everything: what is in the kernel, in etcd, and on its disk.
func (s *site) warmStart(ctx context.Context, n int, out *startSamples) error {
	revision, err := s.revision(ctx)
	if err != nil {
		return err
	}
	before, err := s.requests(ctx)
	if err != nil {
		return err
	}
	m, err := s.monitor()
	if err != nil {
		return err
	}
	defer m.close()
	d, err := s.start(n, "")
	if err != nil {
		return err
	}
	defer d.end(syscall.SIGKILL)
	if err := d.ready(ctx); err != nil {
		return err
	}
	wall := time.Since(d.began)
	time.Sleep(settled)
	after, err := s.requests(ctx)
	if err != nil {
		return err
	}
	changes, err := m.count()
	if err != nil {
		return err
	}
	cpu, err := d.end(syscall.SIGTERM)
	if err != nil {
		return err
	}
	now, err := s.revision(ctx)
	out.warm.wall, out.warm.cpu = append(out.warm.wall, millis(wall)), append(out.warm.cpu, millis(cpu))
	out.writes, out.changes = append(out.writes, float64(now-revision)), append(out.changes, float64(changes))
	out.warmRequest = append(out.warmRequest, after-before)
	return errors.Join(err, s.complete(n))
}

func (s *site) startRows(all map[int]*startSamples, sizes []int) {
	for _, n := range sizes {
		x := all[n]
		wall := Row{Group: "cold start", Name: peers(n) + ": exec to ready, all programmed", Unit: Millis, Ours: x.cold.wall}
		cpu := Row{Group: "cold start", Name: peers(n) + ": CPU of all processes", Unit: Millis, Ours: x.cold.cpu}
		slow := Row{
			Group: "cold start", Name: peers(n) + ": etcd 2.4 ms away", Unit: Millis, Ours: x.slow.wall, Base: x.cold.wall, BaseName: "etcd near",
		}
		peak := Row{Group: "cold start", Name: peers(n) + ": peak of memory (RSS)", Unit: MB, Ours: x.peak}
		warm := Row{Group: "warm restart", Name: peers(n) + ": CPU of all processes", Unit: Millis, Ours: x.warm.cpu, Base: x.cold.cpu, BaseName: "cold start"}
		if n == 5000 {
			wall.Bound, cpu.Bound, slow.Bound, peak.Bound, warm.Bound = AtMost(150), AtMost(180), AtMost(Median(x.cold.wall)+30), AtMost(40), RatioAtMost(0.6)
		}
		if n == 20000 {
			wall.Base, wall.BaseName, wall.Bound = all[5000].cold.wall, "5,000 peers", RatioAtMost(4.5)
		}
		s.env.Add(wall, cpu, slow, peak,
			Row{Group: "cold start", Name: peers(n) + ": requests to etcd", Unit: Count, Ours: x.requests, Bound: AtMost(10)},
			Row{Group: "cold start", Name: peers(n) + ": log", Unit: Bytes, Ours: x.coldLog, Bound: AtMost(10000)},
			Row{Group: "warm restart", Name: peers(n) + ": exec to ready", Unit: Millis, Ours: x.warm.wall, Base: x.cold.wall, BaseName: "cold start"},
			warm,
			Row{Group: "warm restart", Name: peers(n) + ": requests to etcd", Unit: Count, Ours: x.warmRequest, Bound: AtMost(10)},
			Row{Group: "warm restart", Name: peers(n) + ": writes to etcd", Unit: Count, Ours: x.writes, Bound: AtMost(0)},
			Row{Group: "warm restart", Name: peers(n) + ": changes to the kernel", Unit: Count, Ours: x.changes, Bound: AtMost(0)})
	}
}
