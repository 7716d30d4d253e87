package doctor

import (
	"fmt"
	"strings"
)

// Mark says how a check went.
type Mark string

// The marks.
const (
	OK      Mark = "ok"
	Warn    Mark = "warn"    // pods can talk all the same
	Fail    Mark = "fail"    // pods can't talk, some of them, or won't after the next restart
	Skipped Mark = "skipped" // not checked; the reason says why
)

// Finding is the outcome of one check.
type Finding struct {
	Check  string `json:"check"`
	Mark   Mark   `json:"mark"`
	Reason string `json:"reason"`
	// Fix is what to do about it, as lines for a shell; empty where nothing is to be done or a person has to decide.
	Fix []string `json:"fix,omitempty"`
	// Fixable says that --fix does it.
	Fixable bool `json:"fixable,omitempty"`

	changes []change
}

// findings are the outcomes of one check.
type findings []Finding

func finding(m Mark, format string, args ...any) findings {
	return findings{{Mark: m, Reason: fmt.Sprintf(format, args...)}}
}

func ok(format string, args ...any) findings      { return finding(OK, format, args...) }
func warn(format string, args ...any) findings    { return finding(Warn, format, args...) }
func fail(format string, args ...any) findings    { return finding(Fail, format, args...) }
func skipped(format string, args ...any) findings { return finding(Skipped, format, args...) }

// fix adds a command to the last finding.
func (fs findings) fix(format string, args ...any) findings {
	return fs.steps(fmt.Sprintf(format, args...))
}

// steps adds commands to the last finding.
func (fs findings) steps(commands ...string) findings {
	last := &fs[len(fs)-1]
	last.Fix = append(last.Fix, commands...)
	return fs
}

// safely adds changes to the last finding that --fix makes.
func (fs findings) safely(changes ...change) findings {
	last := &fs[len(fs)-1]
	last.changes, last.Fixable = append(last.changes, changes...), true
	return fs.steps(commands(changes)...)
}

func (fs *findings) add(more findings) { *fs = append(*fs, more...) }

// orOK is what was found, or that all is well.
func (fs findings) orOK(format string, args ...any) findings {
	if len(fs) == 0 {
		return ok(format, args...)
	}
	return fs
}

// atMost keeps a screen readable where one thing is wrong a thousand times.
func (fs findings) atMost() findings {
	const most = 8
	if len(fs) <= most {
		return fs
	}
	rest := Finding{Mark: fs[most].Mark, Reason: fmt.Sprintf("and %d more like these", len(fs)-most)}
	return append(fs[:most:most], rest)
}

// few shortens a list for a line.
func few(names []string) string {
	const most = 5
	if rest := len(names) - most; rest > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), rest)
	}
	return strings.Join(names, ", ")
}
