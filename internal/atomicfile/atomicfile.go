// Package atomicfile replaces files in one step, so that a reader finds the old content or the new one, also after a
// power failure.
package atomicfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/google/renameio/v2"
)

// Write replaces a file, whose directory must exist. It flushes the content to the disk, but not the directory's entry.
// The error names path and not the temporary file beside it, so that the same fault reads the same each time.
func Write(path string, content []byte, mode fs.FileMode) (err error) {
	defer func() {
		if errno := syscall.Errno(0); errors.As(err, &errno) {
			err = &fs.PathError{Op: "write", Path: path, Err: errno}
		}
	}()
	RemoveLeftovers(path)
	f, err := renameio.NewPendingFile(path, renameio.WithTempDir(filepath.Dir(path)), renameio.WithStaticPermissions(mode))
	if err != nil {
		return err
	}
	defer func() { _ = f.Cleanup() }()
	if _, err := f.Write(content); err != nil {
		return err
	}
	return f.CloseAtomicallyReplace()
}

// RemoveLeftovers removes the temporary files of writers of path that were killed. One that can't be removed does no
// harm.
func RemoveLeftovers(path string) {
	// renameio's name: a dot, the file's, a number
	left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"[0-9]*"))
	for _, l := range left {
		_ = os.Remove(l)
	}
}
