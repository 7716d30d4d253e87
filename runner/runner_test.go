package runner

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/overlayd/overlayd/test/bubble"
)

const ms = time.Millisecond

// trace is a Runner under test in virtual time, and when its function began to run.
type trace struct {
	*Runner
	began time.Time
	stop  func()
	done  chan error
	fails atomic.Bool

	mu   sync.Mutex
	runs []time.Duration
}

// start runs a Runner; during is what its function does before it returns, with an error while tr.fails.
func start(t *testing.T, o Options, during func(ctx context.Context, tr *trace)) *trace {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	tr := &trace{began: time.Now(), stop: stop, done: make(chan error, 1)}
	tr.Runner = New(o, func(ctx context.Context) error {
		tr.mu.Lock()
		tr.runs = append(tr.runs, time.Since(tr.began))
		tr.mu.Unlock()
		if during != nil {
			during(ctx, tr)
		}
		if tr.fails.Load() {
			return errors.New("the lock is held")
		}
		return nil
	})
	t.Cleanup(stop)
	go func() { tr.done <- tr.Run(ctx) }()
	synctest.Wait()
	return tr
}

// at lets the time of the test go on until so long after the start.
func (tr *trace) at(d time.Duration) {
	time.Sleep(d - time.Since(tr.began))
	synctest.Wait()
}

func (tr *trace) want(t *testing.T, runs ...time.Duration) {
	t.Helper()
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if !slices.Equal(tr.runs, runs) {
		t.Errorf("ran at %v; want %v", tr.runs, runs)
	}
}

func virtual(t *testing.T, name string, test func(t *testing.T)) {
	t.Run(name, func(t *testing.T) { bubble.Test(t, test) })
}

func TestWake(t *testing.T) {
	virtual(t, "at once after a rest", func(t *testing.T) {
		tr := start(t, Options{Min: 100 * ms}, nil)
		tr.at(0)
		tr.want(t)
		tr.at(50 * ms)
		tr.Wake()
		synctest.Wait()
		tr.want(t, 50*ms)
		tr.at(time.Hour)
		tr.want(t, 50*ms)
		tr.Wake()
		synctest.Wait()
		tr.want(t, 50*ms, time.Hour)
	})
	virtual(t, "before Run", func(t *testing.T) {
		ran := 0
		r := New(Options{}, func(context.Context) error { ran++; return nil })
		r.Wake()
		r.Wake()
		ctx, stop := context.WithTimeout(t.Context(), time.Second)
		defer stop()
		if err := r.Run(ctx); !errors.Is(err, context.DeadlineExceeded) || ran != 1 {
			t.Errorf("%d runs, %v", ran, err)
		}
	})
	virtual(t, "those within the delay are one", func(t *testing.T) {
		tr := start(t, Options{Delay: 10 * ms, Min: 100 * ms}, nil)
		for i := range 10 {
			tr.at(time.Duration(i) * ms)
			tr.Wake()
		}
		tr.at(time.Minute)
		tr.want(t, 10*ms)
	})
	virtual(t, "a flood", func(t *testing.T) {
		tr := start(t, Options{Delay: 10 * ms, Min: 100 * ms}, nil)
		for i := range 350 {
			tr.at(time.Duration(i) * ms)
			tr.Wake()
		}
		tr.at(time.Minute)
		tr.want(t, 10*ms, 110*ms, 210*ms, 310*ms, 410*ms)
	})
	virtual(t, "a flood with a burst, a rest, and one more", func(t *testing.T) {
		tr := start(t, Options{Min: 100 * ms, Burst: 3}, nil)
		for i := range 250 {
			tr.at(time.Duration(i) * ms)
			tr.Wake()
		}
		tr.want(t, 0, 1*ms, 2*ms, 100*ms, 200*ms)
		tr.at(450 * ms) // ran at 300 for the last wake: the budget has room for one run now
		tr.Wake()
		tr.at(451 * ms)
		tr.Wake()
		tr.at(time.Minute)
		tr.want(t, 0, 1*ms, 2*ms, 100*ms, 200*ms, 300*ms, 450*ms, 500*ms)
	})
	virtual(t, "during a run", func(t *testing.T) {
		tr := start(t, Options{Min: 10 * ms}, func(_ context.Context, tr *trace) {
			if len(tr.runs) == 1 {
				time.Sleep(20 * ms)
				tr.Wake()
				tr.Wake()
				time.Sleep(20 * ms)
			}
		})
		tr.Wake()
		tr.at(time.Minute)
		tr.want(t, 0, 40*ms)
	})
}

func TestWakeAfter(t *testing.T) {
	virtual(t, "the earliest counts, and a run answers all", func(t *testing.T) {
		tr := start(t, Options{}, nil)
		tr.WakeAfter(50 * ms)
		tr.WakeAfter(20 * ms)
		tr.WakeAfter(30 * ms)
		tr.at(time.Minute)
		tr.want(t, 20*ms)
		tr.WakeAfter(time.Second)
		tr.Wake()
		tr.at(2 * time.Minute)
		tr.want(t, 20*ms, time.Minute)
	})
	virtual(t, "by the function, sooner than Max", func(t *testing.T) {
		tr := start(t, Options{Max: 10 * time.Second}, func(_ context.Context, tr *trace) {
			if len(tr.runs) <= 2 {
				tr.WakeAfter(5 * time.Second)
			}
		})
		tr.at(31 * time.Second)
		tr.want(t, 10*time.Second, 15*time.Second, 20*time.Second, 30*time.Second)
	})
	virtual(t, "not before Min", func(t *testing.T) {
		tr := start(t, Options{Min: 100 * ms}, func(_ context.Context, tr *trace) {
			if len(tr.runs) == 1 {
				tr.WakeAfter(-time.Second)
			}
		})
		tr.Wake()
		tr.at(time.Minute)
		tr.want(t, 0, 100*ms)
	})
}

func TestMax(t *testing.T) {
	virtual(t, "from the start of the last run", func(t *testing.T) {
		tr := start(t, Options{Max: 10 * time.Second}, func(context.Context, *trace) { time.Sleep(time.Second) })
		tr.at(12 * time.Second)
		tr.Wake()
		tr.at(33 * time.Second)
		tr.want(t, 10*time.Second, 12*time.Second, 22*time.Second, 32*time.Second)
	})
}

func TestRetry(t *testing.T) {
	o := Options{Min: 100 * ms, RetryMin: 1000 * ms, RetryMax: 5000 * ms}
	virtual(t, "with growing backoff, which a success resets", func(t *testing.T) {
		tr := start(t, o, nil)
		tr.fails.Store(true)
		tr.Wake()
		tr.at(14 * time.Second)
		want := []time.Duration{0, 1000 * ms, 3000 * ms, 7000 * ms, 12000 * ms}
		tr.want(t, want...)
		tr.fails.Store(false)
		tr.at(time.Minute)
		want = append(want, 17000*ms)
		tr.want(t, want...)
		tr.fails.Store(true)
		tr.Wake()
		tr.at(time.Minute + 3*time.Second)
		tr.want(t, append(want, time.Minute, time.Minute+1000*ms, time.Minute+3000*ms)...)
	})
	virtual(t, "a wake does not wait for it", func(t *testing.T) {
		tr := start(t, o, nil)
		tr.fails.Store(true)
		tr.Wake()
		tr.at(3500 * ms)
		tr.Wake()
		tr.Wake()
		synctest.Wait()
		tr.want(t, 0, 1000*ms, 3000*ms, 3500*ms)
		tr.Wake()
		tr.fails.Store(false)
		tr.at(time.Minute)
		tr.want(t, 0, 1000*ms, 3000*ms, 3500*ms, 3600*ms)
	})
	virtual(t, "from the end of the run, and Max goes on", func(t *testing.T) {
		o := Options{Max: 4 * time.Second, RetryMin: 3 * time.Second}
		tr := start(t, o, func(context.Context, *trace) { time.Sleep(500 * ms) })
		tr.fails.Store(true)
		tr.Wake()
		tr.at(8 * time.Second)
		tr.want(t, 0, 3500*ms, 7000*ms)
	})
	virtual(t, "none", func(t *testing.T) {
		tr := start(t, Options{}, nil)
		tr.fails.Store(true)
		tr.Wake()
		tr.at(time.Hour)
		tr.want(t, 0)
	})
}

func TestContextEnds(t *testing.T) {
	for name, o := range map[string]Options{"idle": {}, "waiting": {Max: time.Minute}} {
		virtual(t, name, func(t *testing.T) {
			tr := start(t, o, nil)
			tr.stop()
			synctest.Wait()
			select {
			case err := <-tr.done:
				if !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			default:
				t.Error("still running")
			}
			tr.Wake() // after the end it is in vain, and does not block
			tr.Wake()
			tr.at(time.Hour)
			tr.want(t)
		})
	}
	virtual(t, "during a run", func(t *testing.T) {
		tr := start(t, Options{}, func(ctx context.Context, tr *trace) {
			<-ctx.Done()
			tr.fails.Store(true)
			tr.Wake()
		})
		tr.Wake()
		tr.at(time.Second)
		tr.stop()
		if err := <-tr.done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		tr.want(t, 0)
	})
}

// Wakes from many goroutines never run the function twice at the same time, and none is lost.
func TestOneAtATime(t *testing.T) {
	virtual(t, "many goroutines", func(t *testing.T) {
		var asked atomic.Int64
		var answered int64
		running := false
		tr := start(t, Options{}, func(context.Context, *trace) {
			if running {
				t.Error("twice at the same time")
			}
			running = true
			answered = asked.Load()
			time.Sleep(3 * ms)
			running = false
		})
		tr.at(0)
		for i := range 100 {
			time.AfterFunc(time.Duration(i)*ms, func() { asked.Add(1); tr.Wake() })
		}
		tr.at(time.Second)
		if answered != 100 {
			t.Errorf("%d of 100 wakes were answered", answered)
		}
	})
}

// What Do runs shares the function's goroutine: they never overlap, and neither waits without end for the other.
func TestDo(t *testing.T) {
	virtual(t, "between runs", func(t *testing.T) {
		shared := 0 // the race detector watches it
		tr := start(t, Options{}, func(context.Context, *trace) { shared++; time.Sleep(10 * ms); shared++ })
		for range 5 {
			tr.Wake()
			synctest.Wait()
			odd := false
			if err := tr.Do(t.Context(), func() { odd = shared%2 != 0 }); err != nil || odd {
				t.Errorf("error %v, called during a run: %t", err, odd)
			}
		}
		tr.want(t, 0, 10*ms, 20*ms, 30*ms, 40*ms)
	})
	virtual(t, "not without Run", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := New(Options{}, nil).Do(ctx, func() { t.Error("called") })
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
	})
}
