package faults

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/overlayd/overlayd/test/lab"
)

// SoakOptions say how long and how wild.
type SoakOptions struct {
	Name     string
	Overlayd string
	For      time.Duration
	Seed     uint64
	Progress func(string)
}

const (
	soakNodes = 4
	// Daemons of the first soakKilled nodes are killed and restarted; those of the others live through it all, and what
	// they hold is measured.
	soakKilled = 2
	// longestPause is the most time between two faults of one node.
	longestPause = 3 * time.Second
	// longestHold is the most time that a fault lasts which has to be ended.
	longestHold = 4 * time.Second
	// soakSettle is how long the network has, after the last fault, to be as planned.
	soakSettle = 30 * time.Second
)

// SoakReport is what came of a soak.
type SoakReport struct {
	Seed     uint64         `json:"seed"`
	Seconds  float64        `json:"seconds"`
	Done     map[string]int `json:"done"`  // how often each fault was made
	Usage    []string       `json:"usage"` // of the daemons that live through it: before and after
	Problems []string       `json:"problems,omitempty"`
}

// Text renders the report for a terminal.
func (r SoakReport) Text() string {
	total := 0
	rows := [][]string{{"FAULT", "TIMES"}}
	for _, name := range slices.Sorted(maps.Keys(r.Done)) {
		rows = append(rows, []string{name, fmt.Sprint(r.Done[name])})
		total += r.Done[name]
	}
	lines := slices.Clone(r.Usage)
	for _, p := range r.Problems {
		lines = append(lines, "  - "+p)
	}
	verdict := "everything is as planned"
	if len(r.Problems) > 0 {
		verdict = "NOT as planned"
	}
	lines = append(lines, fmt.Sprintf("%d faults in %.0f s with the seed %d: %s\n", total, r.Seconds, r.Seed, verdict))
	return lab.Table(rows, 2) + strings.Join(lines, "\n")
}

// soak is a soak that runs.
type soak struct {
	opts  SoakOptions
	lab   *lab.Lab
	sites []*Site
	start time.Time

	mu   sync.Mutex
	done map[string]int
}

// Soak makes random faults for a while, on all nodes and in etcd at the same time, and looks whether the network ends
// up as it began.
func Soak(ctx context.Context, o SoakOptions) (report SoakReport, err error) {
	began := time.Now()
	defer func() {
		err = errors.Join(err, lab.Down(context.WithoutCancel(ctx), o.Name))
	}()
	s := &soak{opts: o, done: map[string]int{}}
	if err := s.up(ctx); err != nil {
		return report, err
	}
	before, err := s.usage()
	if err != nil {
		return report, err
	}
	s.start = time.Now()
	s.rage(ctx)
	if ctx.Err() != nil {
		return report, fmt.Errorf("soak: %w", context.Cause(ctx))
	}
	report.Seed, report.Done = o.Seed, s.done
	s.judge(ctx, before, &report)
	report.Seconds = time.Since(began).Seconds()
	return report, nil
}

func (s *soak) up(ctx context.Context) error {
	var err error
	s.lab, err = lab.Up(ctx, lab.Options{Name: s.opts.Name, Overlayd: s.opts.Overlayd, Nodes: soakNodes, Pods: 1})
	if err != nil {
		return err
	}
	for i := 1; i <= soakNodes; i++ {
		site, err := openSite(ctx, s.lab, OnVXLAN, i, i%soakNodes+1)
		if err != nil {
			return err
		}
		s.sites = append(s.sites, site)
	}
	return s.warmUp(ctx)
}

// warmUp makes some drift once, so that what a daemon keeps from then on does not count as growth.
func (s *soak) warmUp(ctx context.Context) error {
	for _, site := range s.sites {
		if err := On(`ip $F route flush proto 118; ip link set $DEV down`)(ctx, site); err != nil {
			return err
		}
	}
	if err := Steps(stopStore, Wait(time.Second), startStore)(ctx, s.sites[0]); err != nil {
		return err
	}
	_, err := s.sites[0].await(ctx, Whole, time.Now(), soakSettle)
	return err
}

// rage runs one stream of faults for each node and one for etcd until the time is over.
func (s *soak) rage(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, s.opts.For)
	defer cancel()
	var wg sync.WaitGroup
	for i, site := range s.sites {
		rows := soakable(func(f Fault) bool { return f.Area != Etcd && (f.Area != Daemon || i < soakKilled) })
		wg.Go(func() { s.stream(ctx, site, rows, uint64(i)) })
	}
	storeSite := *s.sites[soakNodes-1] // what it defers is its own
	wg.Go(func() { s.stream(ctx, &storeSite, soakable(func(f Fault) bool { return f.Area == Etcd }), soakNodes) })
	wg.Wait()
}

// soakable are the rows that may happen at any time.
func soakable(in func(Fault) bool) []Fault {
	var out []Fault
	for _, f := range Catalogue(true) {
		if f.Soak && in(f) {
			out = append(out, f)
		}
	}
	return out
}

// stream makes one fault after the other. What it does follows from the seed; what it meets there does not.
func (s *soak) stream(ctx context.Context, site *Site, rows []Fault, number uint64) {
	random := rand.New(rand.NewPCG(s.opts.Seed, number))
	for ctx.Err() == nil {
		f := rows[random.IntN(len(rows))]
		hold, pause := time.Duration(random.Int64N(int64(longestHold))), time.Duration(random.Int64N(int64(longestPause)))
		s.once(ctx, site, f, hold)
		_ = sleep(ctx, pause)
	}
}

// once makes a fault and ends it. That it can't be made at this moment (what it would delete is gone already) is no
// failure.
func (s *soak) once(ctx context.Context, site *Site, f Fault, hold time.Duration) {
	s.say(site, f, "")
	// the end of the soak must not leave etcd or a daemon half stopped
	own := context.WithoutCancel(ctx)
	inject, cancel := context.WithTimeout(own, time.Minute)
	defer cancel()
	made := f.Inject(inject, site)
	var ended error
	if f.Restore != nil {
		if made == nil {
			_ = sleep(ctx, hold)
		}
		ended = f.Restore(own, site)
	}
	ended = errors.Join(ended, Undo(own, site))
	// A daemon that a fault stopped and could not start again must run in the end.
	if !site.Victim.Running() {
		ended = errors.Join(ended, site.Victim.Start())
	}
	switch {
	case ended != nil:
		s.say(site, f, ": ended badly: "+ended.Error())
	case made != nil:
		s.say(site, f, ": could not be made")
	default:
		s.mu.Lock()
		defer s.mu.Unlock()
		s.done[fmt.Sprintf("%s: %s", f.Area, f.Name)]++
	}
}

func (s *soak) say(site *Site, f Fault, what string) {
	took := time.Since(s.start).Seconds()
	s.opts.Progress(fmt.Sprintf("%7.1fs %s %s: %s%s", took, site.Victim.Name, f.Area, f.Name, what))
}

// judge looks at the end: is everything as planned, and has no daemon grown?
func (s *soak) judge(ctx context.Context, before []usage, report *SoakReport) {
	problem := func(err error) {
		if err != nil {
			report.Problems = append(report.Problems, err.Error())
		}
	}
	took, err := s.sites[0].await(ctx, Whole, time.Now(), soakSettle)
	if problem(err); err == nil {
		s.opts.Progress("as planned " + took.Round(10*time.Millisecond).String() + " after the last fault")
	}
	for _, site := range s.sites {
		_, err := site.await(ctx, reaches, time.Now(), 5*time.Second)
		problem(err)
	}
	after, err := s.usage()
	problem(err)
	for i, u := range after {
		name := s.sites[soakKilled+i].Victim.Name
		report.Usage = append(report.Usage, fmt.Sprintf("%s: %s -> %s", name, before[i], u))
		if err := u.grown(before[i]); err != nil {
			problem(fmt.Errorf("%s: %w", name, err))
		}
	}
}

// usage is that of the daemons that are left alive.
func (s *soak) usage() ([]usage, error) {
	var out []usage
	for _, n := range s.lab.Nodes()[soakKilled:] {
		u, err := usageOf(n.PID())
		if err != nil {
			return nil, fmt.Errorf("%s: %w", n.Name, err)
		}
		out = append(out, u)
	}
	return out, nil
}
