package main

import (
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"
)

// restart knows what a restart of the daemon would change.
type restart struct {
	binary   string // "": not known
	was      os.FileInfo
	started  time.Time
	settings string
	logLevel string // at the start
	level    zap.AtomicLevel
}

func newRestart(level zap.AtomicLevel) *restart {
	r := &restart{started: time.Now(), settings: defaultEnvFile, logLevel: level.String(), level: level}
	if path, err := os.Executable(); err == nil {
		if st, err := os.Stat(path); err == nil {
			r.binary, r.was = path, st
		}
	}
	return r
}

// changes lists them: another binary, edited settings, a log level that was set since the start.
func (r *restart) changes() []string {
	var out []string
	if r.binary != "" {
		now, err := os.Stat(r.binary)
		switch {
		case err != nil:
			out = append(out, fmt.Sprintf("a restart would fail: %s is missing", r.binary))
		case !os.SameFile(now, r.was) || !now.ModTime().Equal(r.was.ModTime()):
			out = append(out, fmt.Sprintf("new binary: %s was replaced at %s", r.binary, now.ModTime().Format(time.RFC3339)))
		}
	}
	if st, err := os.Stat(r.settings); err == nil && st.ModTime().After(r.started) {
		out = append(out, fmt.Sprintf("new settings: %s was changed at %s", r.settings, st.ModTime().Format(time.RFC3339)))
	}
	if now := r.level.String(); now != r.logLevel {
		out = append(out, fmt.Sprintf("log level: %s instead of %s", r.logLevel, now))
	}
	return out
}
