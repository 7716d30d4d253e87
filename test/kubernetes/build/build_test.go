package build

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestTooLittleDisk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := space(dir, 1); err != nil {
		t.Error(err)
	}
	err := space(dir, 1e18)
	if err == nil || !strings.HasPrefix(err.Error(), dir+": ") ||
		!strings.HasSuffix(err.Error(), "GB are free, and Kubernetes takes 1000000000 GB to compile and run") {
		t.Errorf("%v", err)
	}
}

// What is kept is made anew when what it is made from changes.
func TestKept(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("go.mod", "module example.net/hello\n\ngo 1.26.0\n")
	write("go.sum", "")
	write("main.go", "package main\n\nfunc main() {}\n")
	var notes int
	b := Builder{Root: root, Cache: t.TempDir(), Go: "go", Note: func(string, ...any) { notes++ }}
	build := func(flags string) string {
		path, err := b.program(t.Context(), "hello", ".", ".", flags)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(path); err != nil {
			t.Fatal(err)
		}
		return path
	}
	first := build("-s")
	if again := build("-s"); again != first || notes != 2 {
		t.Errorf("%s was made again: %s, %d notes", first, again, notes)
	}
	write("main.go", "package main\n\nfunc main() { println() }\n")
	second := build("-s")
	if second == first {
		t.Error("the program is as before, though what it is made from has changed")
	}
	if third := build("-s -w"); third == second {
		t.Error("the program is as before, though its flags have changed")
	}
	if left, _ := filepath.Glob(filepath.Join(b.Cache, "hello-*")); len(left) != 1 {
		t.Errorf("kept are %q", left)
	}
	write("main.go", "package main\n")
	if _, err := b.program(t.Context(), "hello", ".", ".", ""); err == nil ||
		!strings.Contains(err.Error(), "function main is undeclared") {
		t.Errorf("what does not compile: %v", err)
	}
}
