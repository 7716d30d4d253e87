package image

import (
	"bytes"
	"cmp"
	"context"
	"debug/buildinfo"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// ownPrograms are built from this repository: where they are in the image.
func ownPrograms() map[string]string {
	return map[string]string{
		"overlayd": "usr/local/bin/overlayd", "overlay-install": "usr/local/bin/overlay-install", "overlay-cni": "opt/cni/bin/overlay-cni",
	}
}

const pluginsModule = "github.com/containernetworking/plugins"

// compiler builds the Go programs of one image.
type compiler struct {
	root, goCommand, version string
	arch                     Arch
	dir                      string // of what it makes
}

func (c compiler) run(ctx context.Context, args ...string) ([]byte, error) {
	env := []string{ // an empty variable would let that of `go env -w` through
		"CGO_ENABLED=0", "GOOS=linux", "GOARCH=" + string(c.arch), "GOAMD64=v1", "GOARM64=v8.0", "GOFLAGS=-mod=readonly", "GOFIPS140=off", "GOEXPERIMENT=", "GOWORK=off",
	}
	return run(ctx, c.root, env, c.goCommand, args...)
}

// build makes programs that are the same wherever and whenever they are built.
func (c compiler) build(ctx context.Context, flags string, packages ...string) (map[string][]byte, error) {
	dir, err := os.MkdirTemp(c.dir, "")
	if err != nil {
		return nil, err
	}
	args := append([]string{"build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -buildid= " + flags, "-o", dir + "/"}, packages...)
	if _, err := c.run(ctx, args...); err != nil {
		return nil, err
	}
	out := map[string][]byte{}
	for _, p := range packages {
		name := path.Base(p)
		if out[name], err = os.ReadFile(filepath.Join(dir, name)); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// own is the layer with our programs.
func (c compiler) own(ctx context.Context) (tree, error) {
	var packages []string
	for name := range ownPrograms() {
		packages = append(packages, "./cmd/"+name)
	}
	slices.Sort(packages)
	built, err := c.build(ctx, "-X main.version="+c.version, packages...)
	if err != nil {
		return nil, err
	}
	t := tree{}
	for name, data := range built {
		t.add(ownPrograms()[name], 0o755, data)
	}
	return t, nil
}

// plugins is the layer with the reference CNI plugins: those that go.mod names as tools.
func (c compiler) plugins(ctx context.Context) (tree, error) {
	raw, err := c.run(ctx, "list", "-f", "{{.ImportPath}} {{.Module.Version}}", "tool")
	if err != nil {
		return nil, err
	}
	var packages []string
	var version string
	for line := range strings.Lines(string(raw)) {
		pkg, v, _ := strings.Cut(strings.TrimSpace(line), " ")
		if strings.HasPrefix(pkg, pluginsModule+"/plugins/") {
			packages, version = append(packages, pkg), v
		}
	}
	if len(packages) == 0 {
		return nil, fmt.Errorf("go.mod names no CNI plugins as tools")
	}
	built, err := c.build(ctx, "-X "+pluginsModule+"/pkg/utils/buildversion.BuildVersion="+version, packages...)
	t := tree{}
	for name, data := range built {
		t.add("opt/cni/bin/"+name, 0o755, data)
	}
	return t, err
}

// goModule is one that programs were linked from.
type goModule struct{ path, version, sum, licence string }

// modules lists what the programs in a tree were linked from, the standard library among it, and adds the texts of their licences to the tree.
func (c compiler) modules(ctx context.Context, t tree) ([]goModule, error) {
	found := map[string]goModule{}
	for name, f := range t {
		if !f.mode.IsRegular() || f.mode&0o111 == 0 {
			continue
		}
		info, err := buildinfo.Read(bytes.NewReader(f.data))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		found["stdlib"] = goModule{path: "stdlib", version: strings.TrimPrefix(info.GoVersion, "go")}
		for _, m := range info.Deps {
			for m.Replace != nil {
				m = m.Replace
			}
			found[m.Path] = goModule{path: m.Path, version: m.Version, sum: m.Sum}
		}
	}
	dirs, err := c.directories(ctx)
	if err != nil {
		return nil, err
	}
	var out []goModule
	for _, m := range found {
		texts, err := licenceTexts(dirs[m.path])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", m.path, err)
		}
		for name, text := range texts {
			t.add(path.Join("usr/share/doc/overlayd/go", m.path, name), 0o644, text)
		}
		if m.licence, err = judgeLicences(texts); err != nil {
			return nil, fmt.Errorf("%s: %w", m.path, err)
		}
		out = append(out, m)
	}
	slices.SortFunc(out, func(a, b goModule) int { return cmp.Compare(a.path, b.path) })
	return out, nil
}

// directories says where the sources of modules are.
func (c compiler) directories(ctx context.Context) (map[string]string, error) {
	raw, err := c.run(ctx, "list", "-m", "-f", "{{.Path}}\t{{.Dir}}", "all")
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for line := range strings.Lines(string(raw)) {
		p, dir, _ := strings.Cut(strings.TrimSpace(line), "\t")
		out[p] = dir
	}
	root, err := c.run(ctx, "env", "GOROOT")
	out["stdlib"] = strings.TrimSpace(string(root))
	return out, err
}

// licenceTexts reads the licence and the notices of a module; they have to go with what is made of it.
func licenceTexts(dir string) (map[string][]byte, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	out := map[string][]byte{}
	for _, e := range entries {
		upper := strings.ToUpper(e.Name())
		is := func(word string) bool { return strings.HasPrefix(upper, word) }
		if e.Type()&fs.ModeType != 0 || !is("LICENSE") && !is("LICENCE") && !is("COPYING") && !is("NOTICE") {
			continue
		}
		if out[e.Name()], err = os.ReadFile(filepath.Join(dir, e.Name())); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// judgeLicences names the licences (SPDX). One that it does not know is an error: somebody has to look at it.
func judgeLicences(texts map[string][]byte) (string, error) {
	var out []string
	for name, raw := range texts {
		if strings.HasPrefix(strings.ToUpper(name), "NOTICE") {
			continue
		}
		id := licenceOf(raw)
		if id == "" {
			return "", fmt.Errorf("the licence in %s is none of those known here", name)
		}
		if !slices.Contains(out, id) {
			out = append(out, id)
		}
	}
	if len(out) == 0 {
		return "", fmt.Errorf("it has no licence file")
	}
	slices.Sort(out)
	return strings.Join(out, " AND "), nil
}

func licenceOf(raw []byte) string {
	text := strings.ToLower(strings.Join(strings.Fields(string(raw)), " "))
	has := func(s string) bool { return strings.Contains(text, s) }
	var out []string
	if has("apache license") && has("version 2.0") {
		out = append(out, "Apache-2.0")
	}
	switch redistribution := has("redistribution and use in source and binary forms"); {
	case redistribution && (has("neither the name") || has("names of its contributors") || has("may not be used to endorse")):
		out = append(out, "BSD-3-Clause")
	case redistribution:
		out = append(out, "BSD-2-Clause")
	}
	if has("permission is hereby granted, free of charge") {
		out = append(out, "MIT")
	}
	if has("permission to use, copy, modify, and/or distribute this software") || has("permission to use, copy, modify, and distribute this software") {
		out = append(out, "ISC")
	}
	if has("mozilla public license") && has("2.0") {
		out = append(out, "MPL-2.0")
	}
	return strings.Join(out, " AND ")
}
