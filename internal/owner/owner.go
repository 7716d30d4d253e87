// Package owner keeps two installations of overlayd apart on one node, such as two DaemonSets. A file in the state
// directory names the installation whose daemon runs here; the time of its last change is when that was last seen.
package owner

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/overlayd/overlayd/internal/atomicfile"
	"github.com/overlayd/overlayd/internal/ownfile"
)

const (
	// lasts is how long an owner is one that is not seen any more: longer than an upgrade or a repair takes, and as long
	// as a lease by default. An installation that was removed holds up another one no longer.
	lasts = 24 * time.Hour
	// renewEvery is how often a running daemon says that it is there.
	renewEvery = time.Hour
)

// Error says that the node belongs to another installation.
type Error struct {
	Owner, File string
	Seen        time.Time
}

func (e *Error) Error() string {
	return fmt.Sprintf("this node belongs to the installation %s, whose daemon was last seen at %s: remove one of the two "+
		"installations. To hand the node over, set --take-over=%s, or remove %s on the node (at %s it no longer counts)",
		e.Owner, e.Seen.Format(time.RFC3339), e.Owner, e.File, e.Seen.Add(lasts).Format(time.RFC3339))
}

// File is where the owner is named.
func File(stateDir string) string { return filepath.Join(stateDir, "owner") }

// Read returns whose the node is, and when that was last seen; empty: no installation's.
func Read(stateDir string, now time.Time) (name string, seen time.Time, err error) {
	raw, err := ownfile.Read(File(stateDir), 4096) // NAMESPACE/NAME
	if errors.Is(err, os.ErrNotExist) {
		return "", time.Time{}, nil
	}
	info, statErr := os.Stat(File(stateDir))
	if err = errors.Join(err, statErr); err != nil {
		return "", time.Time{}, err
	}
	if now.Sub(info.ModTime()).Abs() >= lasts { // a clock that was wrong by years does not make it last for years
		return "", time.Time{}, nil
	}
	return strings.TrimSpace(string(raw)), info.ModTime(), nil
}

// Check returns whose the node is. It is an [Error] if that is neither this installation nor the one that it takes over.
func Check(stateDir, own, takeOver string, now time.Time) (before string, err error) {
	before, seen, err := Read(stateDir, now)
	if before != "" && before != own && before != takeOver {
		err = &Error{before, File(stateDir), seen}
	}
	return before, err
}

// Write makes the node an installation's. Only the daemon that has the node's lock may call it.
func Write(stateDir, own string) error {
	if err := os.MkdirAll(stateDir, 0o755); err != nil {
		return err
	}
	return atomicfile.Write(File(stateDir), []byte(own+"\n"), 0o644)
}

// Hold keeps the node an installation's until ctx ends. A directory that can't be written is noticed by what is written
// there more often.
func Hold(ctx context.Context, stateDir, own string) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(renewEvery):
			_ = Write(stateDir, own)
		}
	}
}
