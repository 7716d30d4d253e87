package main

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
)

const pluginsModule = "github.com/containernetworking/plugins"

// goRun runs the go command for the machine that the image is for.
func (o options) goRun(ctx context.Context, args ...string) ([]byte, error) {
	env := []string{ // an empty variable would let that of `go env -w` through
		"CGO_ENABLED=0", "GOOS=linux", "GOARCH=" + string(o.arch), "GOAMD64=v1", "GOARM64=v8.0",
		"GOFLAGS=-mod=readonly", "GOFIPS140=off", "GOEXPERIMENT=", "GOWORK=off",
	}
	return output(ctx, o.root, env, o.goCommand, args...)
}

// compile makes programs that are the same wherever and whenever they are built.
func (o options) compile(ctx context.Context, flags string, packages ...string) (map[string][]byte, error) {
	dir, err := os.MkdirTemp("", "overlay-image-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	ldflags := "-s -w -buildid= " + flags
	args := append([]string{"build", "-trimpath", "-buildvcs=false", "-ldflags", ldflags, "-o", dir + "/"}, packages...)
	if _, err := o.goRun(ctx, args...); err != nil {
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
func (o options) own(ctx context.Context) (tree, error) {
	built, err := o.compile(ctx, "-X main.version="+o.version,
		"./cmd/overlayd", "./cmd/overlay-install", "./cmd/overlay-cni")
	t := tree{}
	for name, data := range built {
		dir := "usr/local/bin/"
		if name == "overlay-cni" {
			dir = "opt/cni/bin/"
		}
		put(t, dir+name, 0o755, data)
	}
	return t, err
}

// plugins is the layer with the reference CNI plugins: those that go.mod names as tools.
func (o options) plugins(ctx context.Context) (tree, error) {
	raw, err := o.goRun(ctx, "list", "-f", "{{.ImportPath}} {{.Module.Version}}", "tool")
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
	built, err := o.compile(ctx, "-X "+pluginsModule+"/pkg/utils/buildversion.BuildVersion="+version, packages...)
	t := tree{}
	for name, data := range built {
		put(t, "opt/cni/bin/"+name, 0o755, data)
	}
	return t, err
}

// goModule is one that programs were linked from.
type goModule struct {
	debug.Module
	texts   map[string][]byte // its licence and notices, by file
	licence string            // SPDX
}

// modules lists what the programs were linked from, with the standard library.
func (o options) modules(ctx context.Context, programs ...tree) ([]goModule, error) {
	found := map[string]debug.Module{}
	for _, t := range programs {
		for name, f := range t {
			if !f.Mode.IsRegular() {
				continue
			}
			info, err := buildinfo.Read(bytes.NewReader(f.Data))
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			found["stdlib"] = debug.Module{Path: "stdlib", Version: strings.TrimPrefix(info.GoVersion, "go")}
			for _, m := range info.Deps {
				for m.Replace != nil {
					m = m.Replace
				}
				found[m.Path] = *m
			}
		}
	}
	dirs, err := o.directories(ctx)
	if err != nil {
		return nil, err
	}
	var out []goModule
	for _, name := range slices.Sorted(maps.Keys(found)) {
		m := goModule{Module: found[name]}
		if m.texts, err = licenceTexts(dirs[name]); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if m.licence, err = licences(m.texts); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		out = append(out, m)
	}
	return out, nil
}

// directories says where the sources of modules are.
func (o options) directories(ctx context.Context) (map[string]string, error) {
	raw, err := o.goRun(ctx, "list", "-m", "-f", "{{.Path}}\t{{.Dir}}", "all")
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for line := range strings.Lines(string(raw)) {
		p, dir, _ := strings.Cut(strings.TrimSpace(line), "\t")
		out[p] = dir
	}
	root, err := o.goRun(ctx, "env", "GOROOT")
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

// licences names the licences of a module (SPDX). An unknown one is an error: a person has to read it.
func licences(texts map[string][]byte) (string, error) {
	var out []string
	for name, raw := range texts {
		if strings.HasPrefix(strings.ToUpper(name), "NOTICE") {
			continue
		}
		id := licenceOf(raw)
		if id == "" {
			return "", fmt.Errorf("the licence in %s is none of those known here", name)
		}
		out = append(out, id)
	}
	if len(out) == 0 {
		return "", fmt.Errorf("it has no licence file")
	}
	slices.Sort(out)
	return strings.Join(slices.Compact(out), " AND "), nil
}

func licenceOf(raw []byte) string {
	text := strings.ToLower(strings.Join(strings.Fields(string(raw)), " "))
	has := func(s string) bool { return strings.Contains(text, s) }
	var out []string
	if has("apache license") && has("version 2.0") {
		out = append(out, "Apache-2.0")
	}
	if has("redistribution and use in source and binary forms") {
		if has("neither the name") || has("names of its contributors") || has("may not be used to endorse") {
			out = append(out, "BSD-3-Clause")
		} else {
			out = append(out, "BSD-2-Clause")
		}
	}
	if has("permission is hereby granted, free of charge") {
		out = append(out, "MIT")
	}
	if has("permission to use, copy, modify, and/or distribute this software") ||
		has("permission to use, copy, modify, and distribute this software") {
		out = append(out, "ISC")
	}
	if has("mozilla public license") && has("2.0") {
		out = append(out, "MPL-2.0")
	}
	return strings.Join(out, " AND ")
}
