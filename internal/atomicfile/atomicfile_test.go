package atomicfile

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// Whoever reads a file while it is replaced reads the old or the new one, whole.
func TestWriteIsAtomic(t *testing.T) {
	t.Parallel()
	at := filepath.Join(t.TempDir(), "file")
	a, b := bytes.Repeat([]byte("a"), 1<<20), bytes.Repeat([]byte("b"), 1<<20)
	if err := Write(at, a, 0o755); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		for i := range 30 {
			if err := Write(at, [][]byte{b, a}[i%2], 0o755); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	for {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			return
		default:
		}
		raw, err := os.ReadFile(at)
		if err != nil || !bytes.Equal(raw, a) && !bytes.Equal(raw, b) {
			t.Fatalf("read %d bytes: %v", len(raw), err)
		}
	}
}

// The mode is the one asked for, whatever the file had and whatever the umask is; what a killed writer left goes.
func TestModeAndLeftovers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	at := filepath.Join(dir, "file")
	for name, mode := range map[string]fs.FileMode{"file": 0o600, ".file123": 0o600, ".filelist": 0o600} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, mode := range []fs.FileMode{0o666, 0o755} {
		if err := Write(at, []byte("content"), mode); err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(at); err != nil || info.Mode() != mode {
			t.Errorf("got %v, %v, want %v", info.Mode(), err, mode)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) != 1 || filepath.Base(left[0]) != ".filelist" {
		t.Errorf("left %q", left)
	}
}

// A write that fails leaves the old file, and nothing beside it, and names the file alone.
func TestWriteFails(t *testing.T) {
	t.Parallel()
	err := Write("/proc/file", nil, 0o644) // where no file can be made
	if err == nil || err.Error() != "write /proc/file: no such file or directory" {
		t.Errorf("got %v", err)
	}
	at := filepath.Join(t.TempDir(), "directory")
	if err := os.MkdirAll(filepath.Join(at, "full"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := Write(at, nil, 0o644); !errors.Is(err, syscall.EEXIST) || err.Error() != "write "+at+": file exists" {
		t.Errorf("got %v", err)
	}
	if entries, err := os.ReadDir(filepath.Dir(at)); err != nil || len(entries) != 1 {
		t.Errorf("left %v, %v", entries, err)
	}
}
