// Command overlay-lab brings up a whole overlayd cluster on one machine, checks it, and takes it down again.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// Exit statuses.
const (
	exitFailed = 1 // something did not work: a check, or the lab itself
	exitUsage  = 2 // it was called in a way that cannot work
)

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	// The first signal ends the work and cleans up; a second one ends the process as if nobody listened.
	context.AfterFunc(ctx, stop)
	err := newRoot().ExecuteContext(ctx)
	var usage usageError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errFailed):
		return exitFailed
	case errors.As(err, &usage):
		fmt.Fprintln(os.Stderr, "overlay-lab:", err)
		return exitUsage
	}
	fmt.Fprintln(os.Stderr, "overlay-lab:", err)
	return exitFailed
}

// errFailed says that a check, a bound of a fault, or the soak has failed; the report that was printed says how.
var errFailed = errors.New("failed")

// usageError is an error in how the command was called.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }
