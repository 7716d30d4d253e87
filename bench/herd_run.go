package bench

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd"
)

// HerdCommand is the hidden subcommand of overlay-bench that runs [HerdMain].
const HerdCommand = "herd-run"

// herdReport is what the process with the herd tells the one that started it.
type herdReport struct {
	Seconds  float64
	Requests map[string]int64
	RSS      int
}

// HerdMain is what the hidden subcommand does: many nodes' managers in one process.
func HerdMain(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet(HerdCommand, flag.ContinueOnError)
	endpoint := fs.String("endpoint", "", "etcd's URL")
	n := fs.Int("nodes", 0, "how many")
	if err := fs.Parse(args); err != nil {
		return err
	}
	h := &proto{n: *n, o: etcd.Options{Endpoints: []string{*endpoint}, Prefix: "/herd", RequestTimeout: time.Minute}}
	r, err := h.run(ctx)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

type proto struct {
	n  int
	o  etcd.Options
	ms []*etcd.Manager
}

func (h *proto) run(ctx context.Context) (herdReport, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var held atomic.Int64
	var wg, all sync.WaitGroup
	began := time.Now()
	for i := range h.n {
		m, err := etcd.New(h.o, zap.NewNop())
		if err != nil {
			return herdReport{}, err
		}
		h.ms = append(h.ms, m)
		m.Claim(subnet.Claim{Attrs: peerLease(i + 1).Attrs})
		all.Go(func() { _ = m.Run(ctx) })
		wg.Go(func() {
			for s := range m.Updates() {
				if s.Held() {
					held.Add(1)
					return
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for {
		select {
		case <-done:
			return h.report(began)
		case <-time.After(time.Second):
			fmt.Fprintln(os.Stderr, time.Since(began).Round(time.Second), "held", held.Load(), h.sum(), rss())
			if time.Since(began) > 100*time.Second {
				return herdReport{}, errors.New("too long")
			}
		}
	}
}

func (h *proto) sum() map[string]int64 {
	out := map[string]int64{}
	for _, m := range h.ms {
		for k, v := range m.Requests() {
			out[k] += v
		}
	}
	return out
}

func rss() int {
	b, _ := os.ReadFile("/proc/self/statm")
	var a, r int
	_, _ = fmt.Sscan(string(b), &a, &r)
	return r * 4096 / 1e6
}

func (h *proto) report(began time.Time) (herdReport, error) {
	fmt.Fprintln(os.Stderr, time.Since(began), "all held", h.sum(), rss())
	time.Sleep(10 * time.Second)
	fmt.Fprintln(os.Stderr, time.Since(began), "10 s after", h.sum(), rss())
	_ = slices.Sort[[]int]
	_ = netip.Addr{}
	_ = addr.IPv4
	return herdReport{Seconds: time.Since(began).Seconds(), Requests: h.sum(), RSS: rss()}, nil
}
