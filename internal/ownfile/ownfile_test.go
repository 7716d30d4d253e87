package ownfile_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/internal/ownfile"
)

// What is not ours is refused at once, with its path and the cause.
func TestRefused(t *testing.T) {
	t.Parallel()
	const limit = 8
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string, content string, mode fs.FileMode, uid int) {
		t.Helper()
		err := os.WriteFile(at(name), []byte(content), 0o600)
		if err := errors.Join(err, os.Chown(at(name), uid, -1), os.Chmod(at(name), mode)); err != nil {
			t.Fatal(err)
		}
	}
	write("fine", "12345678", 0o644, 0)
	write("large", "123456789", 0o644, 0)
	write("of another user", "", 0o600, 65534)
	write("open to its group", "", 0o664, 0)
	write("open to all", "", 0o602, 0)
	if err := errors.Join(unix.Mkfifo(at("pipe"), 0o600), os.Symlink("fine", at("link")), os.Symlink("pipe", at("leads to a pipe")),
		os.Mkdir(at("directory"), 0o700), unix.Mknod(at("device"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3)))); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"large":             "more than 8 bytes",
		"of another user":   "belongs to user 65534, expected root",
		"open to its group": "others than its owner may write it (mode 0664), expected 0644",
		"open to all":       "others than its owner may write it (mode 0602), expected 0600",
		"pipe":              "expected a regular file, found a named pipe",
		"link":              "expected a regular file, found a symbolic link",
		"directory":         "expected a regular file, found a directory",
		"device":            "expected a regular file, found a device",
	} {
		start := time.Now()
		_, err := ownfile.Read(at(name), limit)
		if err == nil || !strings.HasPrefix(err.Error(), at(name)+": "+want) || time.Since(start) > time.Second {
			t.Errorf("%s: %v after %v, want %q", name, err, time.Since(start), want)
		}
	}
	if _, err := ownfile.ReadLinked(at("leads to a pipe"), limit); err == nil || !strings.Contains(err.Error(), "a named pipe") {
		t.Errorf("a link to a pipe: %v", err)
	}
	if _, err := ownfile.Read(at("none"), limit); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
	// Its size is said to be 0.
	if _, err := ownfile.Read("/proc/self/status", limit); err == nil || !strings.Contains(err.Error(), "more than 8 bytes") {
		t.Errorf("/proc: %v", err)
	}
}

func TestRead(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file, link := filepath.Join(dir, "file"), filepath.Join(dir, "link")
	if err := errors.Join(os.WriteFile(file, []byte("content"), 0o644), os.Symlink(file, link)); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for name, read := range map[string]func() ([]byte, error){
		"path": func() ([]byte, error) { return ownfile.Read(file, 7) },
		"link": func() ([]byte, error) { return ownfile.ReadLinked(link, 7) },
		"root": func() ([]byte, error) { return ownfile.ReadIn(root, "file", 7) },
	} {
		if got, err := read(); string(got) != "content" || err != nil {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if _, err := ownfile.ReadIn(root, "link", 7); err == nil || !strings.Contains(err.Error(), "a symbolic link") {
		t.Errorf("a link in a directory: %v", err)
	}
}

func TestExposed(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for mode, want := range map[fs.FileMode]bool{
		0o600: false, 0o400: false, 0o640: false, 0o644: true, 0o660: true, 0o602: true, 0o711: false,
	} {
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
		if got, exposed := ownfile.Exposed(file); got != mode || exposed != want {
			t.Errorf("%#o: %#o, %v", mode, got, exposed)
		}
	}
	if _, exposed := ownfile.Exposed(file + ".none"); exposed {
		t.Error("a file that is not there is exposed")
	}
}
