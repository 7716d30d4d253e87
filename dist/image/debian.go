package main

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"maps"
	"testing/fstest"
)

// debianRoots are the files that the image takes from Debian. What they need comes with them.
func debianRoots(t tree, a arch) ([]string, error) {
	roots := []string{
		"usr/sbin/xtables-nft-multi", "usr/sbin/xtables-legacy-multi", "etc/protocols", "etc/os-release", "lib", "sbin",
	}
	// The copyright files refer to them.
	for _, licence := range []string{"Artistic", "GPL-2", "GPL-3", "LGPL-2.1", "LGPL-3", "MPL-2.0"} {
		roots = append(roots, "usr/share/common-licenses/"+licence)
	}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, variant := range []string{"-nft", "-legacy"} {
			for _, does := range []string{"", "-save", "-restore"} {
				roots = append(roots, "usr/sbin/"+family+variant+does)
			}
		}
	}
	extensions, err := fs.Glob(t, "usr/lib/"+a.triplet()+"/xtables/*")
	return append(roots, extensions...), err
}

// debian is the layer with what comes from Debian: programs with all that they need, the certificates, and for each
// package its copyright and its entry for programs that look for known vulnerabilities.
func debian(ctx context.Context, a arch, l lock, cache string) (tree, error) {
	all, out := tree{}, tree{}
	origin := map[*fstest.MapFile]string{} // the package of a file
	for _, p := range l.of(a) {
		deb, err := l.fetch(ctx, p, cache)
		if err != nil {
			return nil, err
		}
		control, err := output(ctx, "", nil, "dpkg-deb", "--field", deb)
		if err != nil {
			return nil, err
		}
		raw, err := output(ctx, "", nil, "dpkg-deb", "--fsys-tarfile", deb)
		if err != nil {
			return nil, err
		}
		t, err := unpack(bytes.NewReader(raw))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p.name, err)
		}
		for _, f := range t {
			origin[f] = p.name
		}
		maps.Copy(all, t)
		put(out, "var/lib/dpkg/status.d/"+p.name, 0o644, control)
	}
	for _, link := range []string{"sbin", "lib", "lib64"} { // base-files makes them when it is installed
		put(all, link, fs.ModeSymlink|0o777, []byte("usr/"+link))
	}
	roots, err := debianRoots(all, a)
	if err != nil {
		return nil, err
	}
	names, err := closure(all, a, roots)
	if err != nil {
		return nil, err
	}
	used := map[string]bool{"ca-certificates": true}
	for _, name := range names {
		put(out, name, all[name].Mode, all[name].Data)
		used[origin[all[name]]] = true
	}
	for _, program := range []string{"iptables", "ip6tables"} { // what update-alternatives does
		for _, does := range []string{"", "-save", "-restore"} {
			put(out, "usr/sbin/"+program+does, fs.ModeSymlink|0o777, []byte("xtables-nft-multi"))
		}
	}
	for _, p := range l.of(a) {
		if !used[p.name] {
			return nil, fmt.Errorf("packages.txt: nothing of %s is used", p.name)
		}
		name := "usr/share/doc/" + p.name + "/copyright"
		text, err := fs.ReadFile(all, name)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p.name, err)
		}
		put(out, name, 0o644, text)
	}
	bundle, err := certificates(all)
	put(out, "etc/ssl/certs/ca-certificates.crt", 0o644, bundle)
	return out, err
}

// certificates is what update-ca-certificates makes of Mozilla's list.
func certificates(t tree) ([]byte, error) {
	names, err := fs.Glob(t, "usr/share/ca-certificates/mozilla/*.crt")
	var out []byte
	for _, name := range names {
		out = append(append(out, bytes.TrimSpace(t[name].Data)...), '\n')
	}
	return out, err
}
