package agent

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/overlayd/overlayd/diag/status"
)

// notifySystemd tells systemd by sd_notify(3) that the node is ready, once, and what is wrong with it, until ctx ends.
// A node that is not ready after readyWithin is declared started all the same: a restart would cure nothing. Within
// each period watchdog it reports that the loop runs; zero: systemd does not expect that.
func (h *health) notifySystemd(ctx context.Context, notify func(state string), watchdog time.Duration) error {
	var alive <-chan time.Time
	if watchdog > 0 {
		t := time.NewTicker(watchdog / 4) // so that a stall of half the time ends well before the deadline
		defer t.Stop()
		alive = t.C
	}
	patience := time.NewTimer(readyWithin)
	defer patience.Stop()
	ready, given, said := false, false, ""
	for {
		changed := h.change()
		nowReady, text := h.statusLine()
		if text != said {
			notify("STATUS=" + text)
			said = text
		}
		if (nowReady || given) && !ready {
			ready = true
			notify(daemon.SdNotifyReady)
		}
		select {
		case <-ctx.Done():
			notify(daemon.SdNotifyStopping + "\nSTATUS=stopping; the data plane stays as it is")
			return ctx.Err()
		case <-changed:
		case <-patience.C:
			given = true
		case <-alive:
			if h.stuck() < watchdog/2 {
				notify(daemon.SdNotifyWatchdog)
			}
		}
	}
}

const (
	// readyWithin is less than the unit's TimeoutStartSec, at which systemd ends the daemon.
	readyWithin = 150 * time.Second
	// statusLength bounds a status, in bytes: systemd drops a message of 4096 or more (NOTIFY_BUFFER_MAX of its
	// manager.c).
	statusLength = 1000
)

// statusLine says on one line whether the node is ready, and what is wrong.
func (h *health) statusLine() (ready bool, text string) {
	problems := h.list()
	if len(problems) == 0 {
		return true, "ready"
	}
	ready, text = true, "degraded"
	if slices.ContainsFunc(problems, func(p status.Problem) bool { return p.Fatal }) {
		ready, text = false, "not ready"
	}
	worst := problems[max(0, slices.IndexFunc(problems, func(p status.Problem) bool {
		return p.Fatal &&
			starting(p) == 0
	}))]
	// a second line would be another variable
	line := strings.Join(strings.Fields(text+": "+worst.Name+": "+worst.Reason), " ")
	return ready, strings.ToValidUTF8(line[:min(len(line), statusLength)], "?")
}
