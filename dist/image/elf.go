package image

import (
	"bytes"
	"debug/elf"
	"fmt"
	"path"
	"slices"
	"strings"
)

// libDirs are where Debian's loader looks for libraries, and in what order.
func libDirs(a Arch) []string { return []string{"usr/lib/" + a.triplet(), "usr/lib"} }

// needs says what a program or library wants at run time: its loader, and its libraries by name. Whatever is no ELF file wants nothing.
func needs(data []byte) (loader string, libs []string, err error) {
	if !bytes.HasPrefix(data, []byte(elf.ELFMAG)) {
		return "", nil, nil
	}
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return "", nil, err
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		raw := make([]byte, p.Filesz)
		if _, err := p.ReadAt(raw, 0); err != nil {
			return "", nil, err
		}
		loader = strings.TrimRight(string(raw), "\x00")
	}
	libs, err = f.ImportedLibraries()
	return loader, libs, err
}

// find is where the loader would find a library.
func (t tree) find(a Arch, lib string) (string, bool) {
	for _, d := range libDirs(a) {
		if _, ok := t[path.Join(d, lib)]; ok {
			return path.Join(d, lib), true
		}
	}
	return "", false
}

// closure returns the given files of a tree and all that they need at run time: libraries, the loader, and every link on the way.
func (t tree) closure(a Arch, roots []string) ([]string, error) {
	var out []string
	for queue := slices.Clone(roots); len(queue) > 0; queue = queue[1:] {
		name := queue[0]
		if slices.Contains(out, name) {
			continue
		}
		out = append(out, name)
		f, ok := t[name]
		if !ok {
			return nil, fmt.Errorf("%s is in none of the packages", name)
		}
		if next, done := t.step(name); !done {
			queue = append(queue, next)
			continue
		}
		loader, libs, err := needs(f.data)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if loader != "" {
			queue = append(queue, "usr/"+strings.TrimPrefix(loader, "/")) // /lib and /lib64 are links into /usr
		}
		for _, lib := range libs {
			at, ok := t.find(a, lib)
			if !ok {
				return nil, fmt.Errorf("%s needs %s, which is in none of the packages", name, lib)
			}
			queue = append(queue, at)
		}
	}
	slices.Sort(out)
	return out, nil
}

// missing lists what programs and libraries in a tree need and is not there, as "FILE needs WHAT".
func (t tree) missing(a Arch) ([]string, error) {
	var out []string
	for name, f := range t {
		loader, libs, err := needs(f.data)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if _, ok := t.resolve(loader); loader != "" && !ok {
			out = append(out, name+" needs "+loader)
		}
		for _, lib := range libs {
			at, ok := t.find(a, lib)
			if ok {
				_, ok = t.resolve(at)
			}
			if !ok {
				out = append(out, name+" needs "+lib)
			}
		}
	}
	slices.Sort(out)
	return out, nil
}
