package image

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"time"
)

// file is one entry of a tree.
type file struct {
	mode fs.FileMode // with fs.ModeDir or fs.ModeSymlink
	data []byte
	link string // what a symlink says
}

// tree is a file system as a value: its entries by their full path without the slash in front.
type tree map[string]file

// add puts a regular file there, and the directories above it.
func (t tree) add(name string, mode fs.FileMode, data []byte) {
	t.put(name, file{mode: mode, data: data})
}

func (t tree) symlink(name, to string) { t.put(name, file{mode: fs.ModeSymlink | 0o777, link: to}) }

func (t tree) dir(name string, mode fs.FileMode) { t.put(name, file{mode: fs.ModeDir | mode}) }

func (t tree) put(name string, f file) {
	name = strings.Trim(name, "/")
	for d := path.Dir(name); d != "."; d = path.Dir(d) {
		if _, ok := t[d]; !ok {
			t[d] = file{mode: fs.ModeDir | 0o755}
		}
	}
	t[name] = f
}

// merge adds all entries of another tree.
func (t tree) merge(other tree) { maps.Copy(t, other) }

// resolve follows symlinks, also those of directories, and returns the path of what is really there.
func (t tree) resolve(name string) (string, bool) {
	name = strings.Trim(path.Clean("/"+name), "/")
	for range 40 {
		next, done := t.step(name)
		if done {
			_, ok := t[name]
			return name, ok
		}
		name = next
	}
	return name, false
}

// step replaces the first symlink on the way.
func (t tree) step(name string) (next string, done bool) {
	parts := strings.Split(name, "/")
	for i := range parts {
		f, ok := t[path.Join(parts[:i+1]...)]
		if !ok || f.mode&fs.ModeSymlink == 0 {
			continue
		}
		to := f.link
		if !path.IsAbs(to) {
			to = path.Join("/", path.Join(parts[:i]...), to)
		}
		return strings.Trim(path.Join(append([]string{to}, parts[i+1:]...)...), "/"), false
	}
	return name, true
}

// tar writes the tree in the order of its paths. Everything is of root and from 1970: a layer changes only when its content does, and
// a node that has it need not load it again.
func (t tree) tar() ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, name := range slices.Sorted(maps.Keys(t)) {
		f := t[name]
		h := &tar.Header{Name: name, Mode: int64(f.mode.Perm()), ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR}
		switch {
		case f.mode.IsDir():
			h.Typeflag, h.Name = tar.TypeDir, name+"/"
			if f.mode&fs.ModeSticky != 0 {
				h.Mode |= 0o1000
			}
		case f.mode&fs.ModeSymlink != 0:
			h.Typeflag, h.Linkname = tar.TypeSymlink, f.link
		default:
			h.Typeflag, h.Size = tar.TypeReg, int64(len(f.data))
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if _, err := w.Write(f.data); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	err := w.Close()
	return out.Bytes(), err
}

// readTar is the way back. Hard links become files of their own.
func readTar(r io.Reader) (tree, error) {
	t := tree{}
	for in := tar.NewReader(r); ; {
		h, err := in.Next()
		if err == io.EOF {
			return t, nil
		}
		if err != nil {
			return nil, err
		}
		name := strings.Trim(path.Clean("/"+h.Name), "/")
		if name == "" {
			continue
		}
		switch h.Typeflag {
		case tar.TypeDir:
			t.dir(name, h.FileInfo().Mode()&^fs.ModeType)
		case tar.TypeSymlink:
			t.symlink(name, h.Linkname)
		case tar.TypeLink:
			t.put(name, t[strings.Trim(path.Clean("/"+h.Linkname), "/")])
		case tar.TypeReg:
			data, err := io.ReadAll(in)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			t.add(name, h.FileInfo().Mode().Perm(), data)
		default:
			return nil, fmt.Errorf("%s: expected a file, a directory or a link, found type %q", name, h.Typeflag)
		}
	}
}
