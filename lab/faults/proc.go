package faults

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// ticks is how many the kernel counts in a second of CPU time (USER_HZ).
const ticks = 100

// cpuTime is what a process has used so far.
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("CPU time: %w", err)
	}
	_, rest, _ := strings.Cut(string(b), ") ") // the name may have blanks
	fields := strings.Fields(rest)
	if len(fields) < 13 {
		return 0, fmt.Errorf("CPU time of %d: %q", pid, b)
	}
	user, errUser := strconv.Atoi(fields[11])
	system, errSystem := strconv.Atoi(fields[12])
	if errUser != nil || errSystem != nil {
		return 0, fmt.Errorf("CPU time of %d: %q", pid, b)
	}
	return time.Duration(user+system) * time.Second / ticks, nil
}

// usage is what a process holds.
type usage struct {
	PID     int `json:"pid"`
	Threads int `json:"threads"`
	Files   int `json:"files"`
	RSS     int `json:"rssKB"`
}

func usageOf(pid int) (usage, error) {
	u := usage{PID: pid}
	files, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(pid), "fd"))
	if err != nil {
		return u, fmt.Errorf("open files: %w", err)
	}
	u.Files = len(files)
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return u, fmt.Errorf("memory: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		fields := strings.Fields(value)
		if len(fields) == 0 {
			continue
		}
		switch name {
		case "Threads":
			u.Threads, _ = strconv.Atoi(fields[0])
		case "VmRSS":
			u.RSS, _ = strconv.Atoi(fields[0])
		}
	}
	return u, nil
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
	case u.Threads > since.Threads+growThreads:
		return fmt.Errorf("from %d to %d threads", since.Threads, u.Threads)
	case u.Files > since.Files+growFiles:
		return fmt.Errorf("from %d to %d open files", since.Files, u.Files)
	case u.RSS > since.RSS+growRSS:
		return fmt.Errorf("from %d to %d KB of memory", since.RSS, u.RSS)
	}
	return nil
}
