// Package ownfile reads files that overlayd and its plugin wrote, or an operator did: regular ones of bounded size that
// only root, or the user of this process, can have written. What is no such file is refused at once, before it is opened:
// a pipe would hold up the reader for ever, and to open some devices has effects (/dev/watchdog).
package ownfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Error says why a file is refused.
type Error struct{ Path, Cause string }

func (e *Error) Error() string { return e.Path + ": " + e.Cause }

// Read returns the content of a file of at most limit bytes. A symbolic link is refused.
func Read(path string, limit int64) ([]byte, error) {
	return read(path, limit, os.Lstat, func(path string, flags int) (*os.File, error) {
		return os.OpenFile(path, flags|unix.O_NOFOLLOW, 0)
	})
}

// ReadLinked is Read for a path that an operator chooses: what a symbolic link leads to is judged.
func ReadLinked(path string, limit int64) ([]byte, error) {
	return read(path, limit, os.Stat, func(path string, flags int) (*os.File, error) {
		return os.OpenFile(path, flags, 0)
	})
}

// ReadIn is Read for a file in a directory.
func ReadIn(dir *os.Root, name string, limit int64) ([]byte, error) {
	return read(name, limit, dir.Lstat, func(name string, flags int) (*os.File, error) {
		return dir.OpenFile(name, flags|unix.O_NOFOLLOW, 0)
	})
}

func read(
	path string, limit int64, stat func(string) (fs.FileInfo, error), open func(string, int) (*os.File, error),
) ([]byte, error) {
	info, err := stat(path)
	if failed := (*fs.PathError)(nil); errors.As(err, &failed) {
		failed.Op = "open" // what the reader asked for
	}
	if err != nil {
		return nil, err
	}
	if err := check(path, info, limit); err != nil {
		return nil, err
	}
	f, err := open(path, os.O_RDONLY|unix.O_NONBLOCK)
	if errors.Is(err, unix.ELOOP) { // replaced meanwhile
		return nil, &Error{path, kind(fs.ModeSymlink)}
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	if info, err = f.Stat(); err != nil {
		return nil, err
	}
	if err := check(path, info, limit); err != nil {
		return nil, err
	}
	content, err := io.ReadAll(io.LimitReader(f, limit+1)) // of /proc and /sys, the size says nothing
	if err == nil && int64(len(content)) > limit {
		return nil, tooLarge(path, limit)
	}
	return content, err
}

// Owner says which other user than root, and that of this process, a file belongs to.
func Owner(info fs.FileInfo) (uid uint32, foreign bool) {
	st, ok := info.Sys().(*syscall.Stat_t)
	return st.Uid, !ok || st.Uid != 0 && int(st.Uid) != os.Geteuid()
}

// Exposed reports whether others than the owner and its group can read a file of secrets, or others than the owner write
// it, and its mode.
func Exposed(path string) (mode fs.FileMode, exposed bool) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, false
	}
	mode = info.Mode().Perm()
	return mode, mode&0o026 != 0
}

const writableByOthers = 0o022

func check(path string, info fs.FileInfo, limit int64) error {
	if !info.Mode().IsRegular() {
		return &Error{path, kind(info.Mode())}
	}
	if uid, foreign := Owner(info); foreign {
		return &Error{path, fmt.Sprintf("belongs to user %d, expected root, or user %d as which this program runs",
			uid, os.Geteuid())}
	}
	if mode := info.Mode().Perm(); mode&writableByOthers != 0 {
		return &Error{path, fmt.Sprintf("others than its owner may write it (mode %#o), expected %#o",
			mode, mode&^writableByOthers)}
	}
	if info.Size() > limit {
		return tooLarge(path, limit)
	}
	return nil
}

func tooLarge(path string, limit int64) error {
	return &Error{path, fmt.Sprintf("more than %d bytes", limit)}
}

func kind(mode fs.FileMode) string {
	what := "something else"
	switch mode.Type() &^ fs.ModeCharDevice {
	case fs.ModeDir:
		what = "a directory"
	case fs.ModeSymlink:
		what = "a symbolic link"
	case fs.ModeNamedPipe:
		what = "a named pipe"
	case fs.ModeSocket:
		what = "a socket"
	case fs.ModeDevice:
		what = "a device"
	}
	return "expected a regular file, found " + what
}
