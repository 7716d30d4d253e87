package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// A restart would change what has changed on the disk since the start, and a log level that was set since.
func TestRestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	binary, settings := filepath.Join(dir, "overlayd"), filepath.Join(dir, "overlayd.env")
	write := func(path string) os.FileInfo {
		t.Helper()
		if err := os.WriteFile(path+".new", []byte("x"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	level := zap.NewAtomicLevel()
	was := write(binary)
	write(settings)
	r := newRestart(level)
	r.binary, r.was, r.settings, r.started = binary, was, settings, time.Now().Add(time.Second)
	want := func(parts ...string) {
		t.Helper()
		got := r.changes()
		if len(got) != len(parts) {
			t.Fatalf("%q, want %q", got, parts)
		}
		for i, p := range parts {
			if !strings.Contains(got[i], p) {
				t.Errorf("%q, want %q", got[i], p)
			}
		}
	}
	want()
	level.SetLevel(zapcore.DebugLevel)
	want("log level: info instead of debug")
	level.SetLevel(zapcore.InfoLevel)
	r.started = time.Now().Add(-time.Hour)
	want("new settings: " + settings)
	r.settings = filepath.Join(dir, "nothing")
	old := binary + ".old" // keeps its inode from being used again
	if err := os.Rename(binary, old); err != nil {
		t.Fatal(err)
	}
	want("a restart would fail: " + binary + " is missing")
	write(binary)
	want("new binary: " + binary + " was replaced")
}
