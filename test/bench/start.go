package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
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

// The names of rows that the plot has as well.
const (
	coldStart   = "cold start"
	warmRestart = "warm restart"
	execToReady = "exec to ready, all programmed"
	cpuOfAll    = "CPU of all processes"
)

// startSamples are what several starts have given.
type startSamples struct {
	wall, cpu      []float64 // ms
	requests, peak []float64 // to etcd; MB
	log            []float64 // bytes
	writes         []float64 // to etcd
	changes        []float64 // to the kernel
}

// start measures starts: of a new node, of one behind a slow etcd, and again of one that has all its state.
func start(ctx context.Context, e *Env) error {
	s, err := newSite(ctx, e, false)
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
	cold, slow, warm := map[int]*startSamples{}, map[int]*startSamples{}, map[int]*startSamples{}
	for _, n := range sizes {
		if err := s.fill(ctx, n); err != nil {
			return err
		}
		cold[n], slow[n], warm[n] = &startSamples{}, &startSamples{}, &startSamples{}
	}
	// Round by round, so that what the machine does meanwhile hits all sizes.
	for range pick(e, 7, 1) {
		for _, n := range sizes {
			for _, step := range []func() error{
				func() error { return s.clean(ctx, n) },
				func() error { return s.timed(ctx, n, "", cold[n]) },
				func() error { return s.clean(ctx, n) },
				func() error { return s.timed(ctx, n, slowURL, slow[n]) },
				func() error { return s.clean(ctx, n) },
				func() error { return s.counted(ctx, n, cold[n]) },
				func() error { return s.timed(ctx, n, "", warm[n]) },
				func() error { return s.counted(ctx, n, warm[n]) },
			} {
				if err := step(); err != nil {
					return fmt.Errorf("%s: %w", peers(n), err)
				}
			}
		}
	}
	for _, n := range sizes {
		s.startRows(n, cold[n], slow[n], warm[n], cold[5000])
	}
	return nil
}

// timed runs the daemon until it is ready, and not a moment longer.
func (s *site) timed(ctx context.Context, n int, etcd string, out *startSamples) error {
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
	out.wall, out.cpu = append(out.wall, millis(wall)), append(out.cpu, millis(cpu))
	return errors.Join(err, s.complete(n))
}

// counted runs the daemon until a moment after it is ready, and counts what it does to etcd and the kernel, and what it
// needs. It ends as systemd would end it.
func (s *site) counted(ctx context.Context, n int, out *startSamples) (err error) {
	revision, errRevision := s.revision(ctx)
	requests, errRequests := s.requests(ctx)
	changes, errChanges := s.kernelChanges()
	d, errStart := s.start(n, "")
	if err := errors.Join(errRevision, errRequests, errChanges, errStart); err != nil {
		return err
	}
	defer func() {
		_, endErr := d.end(syscall.SIGTERM)
		err = errors.Join(err, endErr)
	}()
	if err := d.ready(ctx); err != nil {
		return err
	}
	time.Sleep(settled)
	requestsAfter, errRequests := s.requests(ctx)
	revisionAfter, errRevision := s.revision(ctx)
	changed, errChanges := changes()
	peak, errPeak := peakRSS(d.cmd.Process.Pid)
	log, errLog := os.Stat(d.log)
	if err := errors.Join(errRequests, errRevision, errChanges, errPeak, errLog); err != nil {
		return err
	}
	out.requests = append(out.requests, requestsAfter-requests)
	out.writes = append(out.writes, float64(revisionAfter-revision))
	out.changes = append(out.changes, changed)
	out.peak, out.log = append(out.peak, peak), append(out.log, float64(log.Size()))
	return s.complete(n)
}

func (s *site) startRows(n int, cold, slow, warm, at5000 *startSamples) {
	rows := []Row{
		row(coldStart, execToReady, Millis, cold.wall...),
		row(coldStart, cpuOfAll, Millis, cold.cpu...),
		row(coldStart, "etcd 2.4 ms away", Millis, slow.wall...).beside("etcd near", cold.wall),
		row(coldStart, "peak of memory (RSS)", MB, cold.peak...),
		row(coldStart, "requests to etcd", Count, cold.requests...).atMost(10),
		row(coldStart, "log", Bytes, cold.log...).atMost(10000),
		row(warmRestart, execToReady, Millis, warm.wall...).beside(coldStart, cold.wall),
		row(warmRestart, cpuOfAll, Millis, warm.cpu...).beside(coldStart, cold.cpu),
		row(warmRestart, "requests to etcd", Count, warm.requests...).atMost(10),
		row(warmRestart, "writes to etcd", Count, warm.writes...).atMost(0),
		row(warmRestart, "changes to the kernel", Count, warm.changes...).atMost(0),
	}
	switch n {
	case 5000:
		rows[0], rows[1] = rows[0].atMost(150), rows[1].atMost(180)
		rows[2], rows[3] = rows[2].atMost(Median(cold.wall)+30), rows[3].atMost(40)
		rows[7] = rows[7].ratioAtMost(0.6)
	case 20000:
		rows[0] = rows[0].beside(peers(5000), at5000.wall).ratioAtMost(4.5)
	}
	for i := range rows {
		rows[i] = rows[i].at(n)
	}
	s.env.Add(rows...)
}
