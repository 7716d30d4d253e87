package faults

import (
	"fmt"
	"time"

	"github.com/prometheus/procfs"
)

// usage is what a process holds, and has used so far.
type usage struct {
	PID, Threads, Files int
	RSS                 int // KB
	CPU                 time.Duration
}

func (u usage) String() string {
	return fmt.Sprintf("%d threads, %d open files, %d KB of memory", u.Threads, u.Files, u.RSS)
}

func usageOf(pid int) (usage, error) {
	p, err := procfs.NewProc(pid)
	if err != nil {
		return usage{}, err
	}
	files, err := p.FileDescriptorsLen()
	if err != nil {
		return usage{}, err
	}
	st, err := p.Stat()
	cpu := time.Duration(st.CPUTime() * float64(time.Second))
	return usage{PID: pid, Threads: st.NumThreads, Files: files, RSS: st.ResidentMemory() >> 10, CPU: cpu}, err
}

// Growth that counts as none.
const (
	growThreads = 6
	growFiles   = 6
	growRSS     = 20 << 10 // KB
)

// grown says what has grown beyond what comes and goes.
func (u usage) grown(since usage) error {
	switch {
	case u.PID != since.PID:
		return fmt.Errorf("process %d became %d", since.PID, u.PID)
	case u.Threads > since.Threads+growThreads || u.Files > since.Files+growFiles || u.RSS > since.RSS+growRSS:
		return fmt.Errorf("it has grown: %s became %s", since, u)
	}
	return nil
}
