package cni

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// FuzzAttachment: what a runtime gives as container and interface is rejected, or is a file of its own.
func FuzzAttachment(f *testing.F) {
	for _, seed := range [][2]string{
		{"a", "eth0"},
		{"..", "eth0"},
		{"../../etc/passwd", "eth0"},
		{"a", ".."},
		{"a", "../x"},
		{"a:b", "c"},
		{"a/b", "c"},
		{".a", "c"},
		{"a", "\x00"},
		{strings.Repeat("a", 300), "eth0"},
	} {
		f.Add(seed[0], seed[1])
	}
	f.Fuzz(func(t *testing.T, container, ifname string) {
		at, err := newAttachment(container, ifname)
		if err != nil {
			if strings.ContainsAny(err.Error(), "\n\r") {
				t.Fatalf("not one line: %q", err)
			}
			return
		}
		name := at.file()
		if !filepath.IsLocal(name) || strings.ContainsAny(name, "/\x00") || len(name) > 255 || strings.HasPrefix(name, ".") {
			t.Fatalf("%q", name)
		}
		if c, i, ok := strings.Cut(name, ":"); !ok || c != container || i != ifname {
			t.Fatalf("%q does not tell %q from %q", name, container, ifname)
		}
	})
}

func TestStore(t *testing.T) {
	t.Parallel()
	home := t.TempDir()
	s := store{dir: filepath.Join(home, "not", "there"), network: "pods"}
	at, other := attachment{"c1", "eth0"}, attachment{"c1", "eth1"}
	if _, err := s.read(at.file()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("load from nowhere: %v", err)
	}
	if err := s.remove(at.file()); err != nil {
		t.Errorf("remove from nowhere: %v", err)
	}
	if all, err := s.list(); err != nil || len(all) != 0 {
		t.Errorf("list of nowhere: %v, %v", all, err)
	}
	another := store{dir: s.dir, network: "net2"}
	if err := errors.Join(s.makeDir(home), another.makeDir(home)); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"first, and long", "second"} {
		if err := s.save(at.file(), []byte(text)); err != nil {
			t.Fatal(err)
		}
		if got, err := s.read(at.file()); err != nil || string(got) != text {
			t.Errorf("load: %q, %v", got, err)
		}
	}
	if err := s.save(other.file(), []byte("other")); err != nil {
		t.Fatal(err)
	}
	if err := another.save(at.file(), []byte("another network's")); err != nil {
		t.Fatal(err)
	}
	if all, err := s.list(); err != nil || len(all) != 2 || all[0] != at || all[1] != other {
		t.Errorf("list: %v, %v", all, err)
	}
	for _, path := range []string{s.path(at.file()), filepath.Dir(s.path(at.file())), s.dir} {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	for range 2 {
		if err := s.remove(at.file()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.read(at.file()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after remove: %v", err)
	}
	if got, err := s.read(other.file()); err != nil || string(got) != "other" {
		t.Errorf("the other: %q, %v", got, err)
	}
	if entries, err := os.ReadDir(filepath.Dir(s.path(at.file()))); err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// A symbolic link in the directory, as another user might put into /tmp, leads nowhere.
func TestStoreFollowsNoLinkOut(t *testing.T) {
	t.Parallel()
	dir, outside := t.TempDir(), t.TempDir()
	if err := os.Symlink(outside, filepath.Join(dir, "pods")); err != nil {
		t.Fatal(err)
	}
	at := attachment{"c1", "eth0"}
	if err := os.WriteFile(filepath.Join(outside, at.file()), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := store{dir: dir, network: "pods"}
	if err := s.save(at.file(), []byte("x")); err == nil {
		t.Error("wrote through a link")
	}
	if _, err := s.read(at.file()); err == nil {
		t.Error("read through a link")
	}
	if err := s.remove(at.file()); err == nil {
		t.Error("removed through a link")
	}
	if _, err := os.Stat(filepath.Join(outside, at.file())); err != nil {
		t.Error(err)
	}
}

// No directory is made but below home, and in one that is root's alone and has nothing else in it.
func TestMakesNoOtherDirectories(t *testing.T) {
	t.Parallel()
	home, elsewhere := t.TempDir(), t.TempDir()
	at := func(name string) string { return filepath.Join(elsewhere, name) }
	for name, mode := range map[string]os.FileMode{"own": 0o700, "open": 0o755, "in use": 0o700, "foreign": 0o700} {
		if err := errors.Join(os.Mkdir(at(name), mode), os.Chmod(at(name), mode)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.WriteFile(at("in use/file"), nil, 0o600), os.WriteFile(at("file"), nil, 0o600),
		os.Symlink("own", at("link")), os.Chown(at("foreign"), 65534, -1)); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]string{
		at("none"): "does not exist", at("open"): "open to others (mode 0755)", at("in use"): "holds other files",
		at("file"): "not a directory", at("link"): "not a directory", at("foreign"): "belongs to user 65534",
		home + "/../none": "does not exist", home: "open to others",
	} {
		err := store{dir, "pods"}.makeDir(home)
		if err == nil || !strings.Contains(err.Error(), dir+": "+want) {
			t.Errorf("%s: %v, want %q", dir, err, want)
		}
		if _, err := os.Lstat(filepath.Join(dir, "pods")); err == nil {
			t.Errorf("%s: made", dir)
		}
	}
	for _, network := range []string{"pods", "pods", "others"} {
		if err := (store{at("own"), network}).makeDir(home); err != nil {
			t.Error(err)
		}
	}
}

// What was kept is read only where none but root can have written it.
func TestKeptFileIsJudged(t *testing.T) {
	t.Parallel()
	home := t.TempDir()
	s := store{filepath.Join(home, "overlay"), "pods"}
	at := attachment{"c1", "eth0"}
	if err := errors.Join(s.makeDir(home), s.save(at.file(), []byte("{}")), os.Chown(s.path(at.file()), 65534, -1)); err != nil {
		t.Fatal(err)
	}
	want := s.path(at.file()) + ": belongs to user 65534"
	if _, err := s.read(at.file()); err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("%v, want %q", err, want)
	}
}

// FuzzKept: whatever a power failure or another program left of a kept configuration, there is an error of one line
// that shows none of it, or a configuration for a delegate.
func FuzzKept(f *testing.F) {
	f.Add([]byte(`{"type":"bridge","name":"pods","overlayd.io/boot-id":"b"}`), []byte(`{"cniVersion":"1.1.0"}`))
	f.Add([]byte(`{"type":"s3cret/x"}`), []byte("null"))
	f.Add([]byte("\x00\x00"), []byte("{}"))
	f.Fuzz(func(t *testing.T, kept, result []byte) {
		c := Config{Name: "pods", CNIVersion: "1.1.0"}
		if json.Valid(result) {
			c.prevResult = result
		}
		d, err := c.withKept(kept)
		if err != nil {
			if msg := err.Error(); msg != "not a JSON object" && msg != "type is not the name of a plugin" {
				t.Fatal(msg)
			}
			return
		}
		var o map[string]json.RawMessage
		if err := json.Unmarshal(d.Conf, &o); err != nil || d.Type == "" || strings.ContainsAny(d.Type, `/\`) || o[bootKey] != nil {
			t.Fatalf("%q becomes %q of %s, %v", kept, d.Type, d.Conf, err)
		}
	})
}
