package faults

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const (
	// tickEvery is how often it is seen whether this machine lets a program run that wants to.
	tickEvery = 20 * time.Millisecond
	// everyday is how late a program may be because others run: not the machine stands still then, but the scheduler works.
	everyday = 200 * time.Millisecond
	// mostStill is how long a machine may stand still before a bound in time that is broken says nothing.
	mostStill = 300 * time.Millisecond
)

// stillness is how long the machine has stood still: nothing that ran on it got on, and the clock did.
type stillness struct{ late atomic.Int64 }

// run takes note of it until ctx ends.
func (s *stillness) run(ctx context.Context) {
	for ctx.Err() == nil {
		began := time.Now()
		_ = sleep(ctx, tickEvery)
		if late := time.Since(began) - tickEvery; late > everyday {
			s.late.Add(int64(late))
		}
	}
}

// total is that since run began, and what the hypervisor has given to others since the machine started.
func (s *stillness) total() time.Duration {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return time.Duration(s.late.Load())
	}
	return time.Duration(s.late.Load()) + stolen(string(b))
}

// stolen is the time that the hypervisor gave to others, of all processors together; see proc_stat(5).
func stolen(stat string) time.Duration {
	const steal = 8 // of the fields in the first line
	line, _, _ := strings.Cut(stat, "\n")
	fields := strings.Fields(line)
	if len(fields) <= steal || fields[0] != "cpu" {
		return 0
	}
	n, err := strconv.Atoi(fields[steal])
	if err != nil {
		return 0
	}
	return time.Duration(n) * time.Second / ticks
}

// inVain reports whether what came of a row says nothing of the daemon: it broke a bound in time while the machine stood still. Of packets
// that were lost that is no excuse.
func inVain(r Result, still time.Duration) bool {
	return len(r.Problems) > 0 && !r.suffered && still > mostStill
}

// repeated makes a row, and makes it once more where the first try was in vain. The second one counts, whatever comes of it, and its
// result tells of the first.
func repeated(try func() Result, total func() time.Duration, between func(first Result, why string)) Result {
	before := total()
	first := try()
	still := total() - before
	if !inVain(first, still) {
		return first
	}
	why := fmt.Sprintf("the machine stood still for %s s", seconds(still))
	between(first, why)
	r := try()
	r.Repeated, r.FirstTry = why, first.Problems
	return r
}
