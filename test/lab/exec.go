package lab

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// Exec turns this process into a command on the machine; it returns only where that fails.
func (m Machine) Exec(argv []string) error {
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return fmt.Errorf("exec on %s: %w", m.Name, err)
	}
	runtime.LockOSThread() // the thread that calls execve becomes the whole process, in the namespace it is in
	if err := enterNS(m.NS); err != nil {
		return err
	}
	return fmt.Errorf("exec on %s: %s: %w", m.Name, path, unix.Exec(path, argv, os.Environ()))
}
