// Package bubble runs a test on virtual time (testing/synctest), safely with the race detector too.
package bubble

import (
	"runtime"
	"testing"
	"testing/synctest"
)

// Test runs the test in a bubble of its own, on one processor.
//
// With the race detector, the timers of a bubble share one race context. Go 1.26 runs a timer that is due when it is
// set, such as NewTimer(0), on the goroutine that sets it. Two processors then use the context at the same time, and
// the race detector crashes. One processor runs one timer at a time.
//
// The number of processors belongs to the whole process: the test must not be parallel. Setenv panics if it is.
func Test(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	t.Setenv("GOMAXPROCS", "1")
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	synctest.Test(t, test)
}
