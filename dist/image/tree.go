package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"testing/fstest"
)

// tree is a file system in memory. The data of a symlink is its target.
type tree = fstest.MapFS

// put adds a file, directory or symlink, as the mode says, and the directories above it.
func put(t tree, name string, mode fs.FileMode, data []byte) {
	for d := path.Dir(name); d != "."; d = path.Dir(d) {
		if _, ok := t[d]; !ok {
			t[d] = &fstest.MapFile{Mode: fs.ModeDir | 0o755}
		}
	}
	t[name] = &fstest.MapFile{Mode: mode, Data: data}
}

// pack makes a tar. Every entry belongs to root and is from 1970: a layer changes only when its content does, and a
// node that has it need not load it again.
func pack(t tree) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	err := errors.Join(w.AddFS(t), w.Close())
	return out.Bytes(), err
}

// unpack reads a tar. Hard links become files of their own.
func unpack(in io.Reader) (tree, error) {
	t := tree{}
	for in := tar.NewReader(in); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return t, nil
		}
		if err != nil {
			return nil, err
		}
		name := path.Clean(h.Name)
		data, err := io.ReadAll(in)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		switch h.Typeflag {
		case tar.TypeDir, tar.TypeReg:
			put(t, name, h.FileInfo().Mode()&(fs.ModeDir|fs.ModeSticky|fs.ModePerm), data)
		case tar.TypeSymlink:
			put(t, name, fs.ModeSymlink|0o777, []byte(h.Linkname))
		case tar.TypeLink:
			target, ok := t[path.Clean(h.Linkname)]
			if !ok {
				return nil, fmt.Errorf("%s: expected %s before this hard link to it", name, h.Linkname)
			}
			t[name] = target
		default:
			return nil, fmt.Errorf("%s: expected a file, a directory or a link, found type %q", name, h.Typeflag)
		}
	}
}
