package main

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"testing/fstest"
)

// closure returns the given files of a tree and all that they need at run time.
func closure(t tree, a arch, roots []string) ([]string, error) {
	found := map[string]bool{}
	var add func(by string, names []string) error
	add = func(by string, names []string) error {
		for _, name := range names {
			if found[name] {
				continue
			}
			f, ok := t[name]
			if !ok {
				return fmt.Errorf("%s needs %s, which is in none of the packages", by, name)
			}
			found[name] = true
			more, err := needs(a, name, f)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			if err := add(name, more); err != nil {
				return err
			}
		}
		return nil
	}
	err := add("the image", roots)
	return slices.Sorted(maps.Keys(found)), err
}

// needs lists what a file needs: a link its target, a program its loader and libraries, a library its libraries.
func needs(a arch, name string, f *fstest.MapFile) ([]string, error) {
	if f.Mode.Type() == fs.ModeSymlink {
		return []string{path.Join(path.Dir(name), string(f.Data))}, nil
	}
	if !bytes.HasPrefix(f.Data, []byte(elf.ELFMAG)) {
		return nil, nil
	}
	e, err := elf.NewFile(bytes.NewReader(f.Data))
	if err != nil {
		return nil, err
	}
	var out []string
	if s := e.Section(".interp"); s != nil {
		raw, err := s.Data()
		if err != nil {
			return nil, err
		}
		loader := strings.Trim(string(raw), "/\x00")
		link, _, _ := strings.Cut(loader, "/")
		out = append(out, link, "usr/"+loader) // /lib and /lib64 are links into /usr
	}
	libs, err := e.ImportedLibraries()
	for _, lib := range libs {
		out = append(out, path.Join("usr/lib", a.triplet(), lib))
	}
	return out, err
}
