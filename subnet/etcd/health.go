package etcd

import (
	"context"
	"errors"
	"time"

	"go.uber.org/zap"
)

// part is one of the ways to the store that can fail by itself.
type part int

const (
	partTable    part = iota // the list and the watch
	partRequests             // renewals, probes, transactions
	parts
)

// health is whether the store can be reached.
type health struct {
	errs  [parts]error
	since time.Time
	said  map[string]bool // the reasons that were logged since then
}

func (h *health) state() (time.Time, error) {
	for _, err := range h.errs {
		if err != nil {
			return h.since, err
		}
	}
	return time.Time{}, nil
}

// set takes note of a failure (or, with nil, of a success), and reports whether the state is another one now.
func (h *health) set(p part, err error, now time.Time) bool {
	_, before := h.state()
	h.errs[p] = err
	_, after := h.state()
	if before == nil && after != nil {
		h.since, h.said = now, map[string]bool{}
	}
	return text(before) != text(after)
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// works says that a part of the store could be reached; it is cheap while all is well.
func (m *Manager) works(p part) { m.report(p, nil) }

// fails says that it couldn't.
func (m *Manager) fails(ctx context.Context, p part, err error) {
	if ctx.Err() == nil { // what fails because we are leaving is no fault
		m.report(p, err)
	}
}

func (m *Manager) report(p part, err error) {
	m.update(func() bool {
		since := m.health.since
		if !m.health.set(p, err, time.Now()) {
			return false
		}
		m.say(since)
		return true
	})
}

// say writes one line when the store goes away, another for each other reason that comes up meanwhile, and one when it is back.
// They are for looking closer: the snapshots say the same, and who reads them tells the operator.
func (m *Manager) say(since time.Time) {
	_, err := m.health.state()
	if err == nil {
		m.log.Debug("etcd reachable again", zap.Duration("after", time.Since(since).Round(time.Millisecond)))
		return
	}
	if s := (*storeError)(nil); errors.As(err, &s) && !m.health.said[s.reason] && len(m.health.said) < 10 {
		m.health.said[s.reason] = true
		m.log.Debug("etcd unreachable; the data plane stays unchanged", zap.String("reason", s.reason))
	}
}
