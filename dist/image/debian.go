package image

import (
	"bytes"
	"context"
	"fmt"
	"path"
	"slices"
	"strings"
)

// debianRoots are the programs that the image takes from Debian. What they need comes with them.
func debianRoots(t tree, a Arch) []string {
	roots := []string{"usr/sbin/xtables-nft-multi", "usr/sbin/xtables-legacy-multi", "etc/protocols", "etc/os-release"}
	for _, licence := range []string{"Artistic", "GPL-2", "GPL-3", "LGPL-2.1", "LGPL-3", "MPL-2.0"} { // the copyright files refer to them
		roots = append(roots, "usr/share/common-licenses/"+licence)
	}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, variant := range []string{"-nft", "-legacy"} {
			for _, does := range []string{"", "-save", "-restore"} {
				roots = append(roots, "usr/sbin/"+family+variant+does)
			}
		}
	}
	extensions := "usr/lib/" + a.triplet() + "/xtables/"
	for name := range t {
		if strings.HasPrefix(name, extensions) {
			roots = append(roots, name)
		}
	}
	slices.Sort(roots)
	return roots
}

// debian is the layer with what comes from Debian: programs with all that they need, the certificates, and for each package its copyright
// and its entry for programs that look for known vulnerabilities.
func debian(ctx context.Context, a Arch, l lock, cache string) (tree, error) {
	all, out := tree{}, tree{}
	from := map[string]string{} // the package of a file
	controls := map[string][]byte{}
	for _, p := range l.of(a) {
		deb, err := l.fetch(ctx, p, cache)
		if err != nil {
			return nil, err
		}
		raw, err := run(ctx, "", nil, "dpkg-deb", "--fsys-tarfile", deb)
		if err != nil {
			return nil, err
		}
		if controls[p.name], err = run(ctx, "", nil, "dpkg-deb", "--field", deb); err != nil {
			return nil, err
		}
		t, err := readTar(bytes.NewReader(raw))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p.name, err)
		}
		for name := range t {
			from[name] = p.name
		}
		all.merge(t)
	}
	for _, link := range []string{"bin", "sbin", "lib", "lib64"} { // base-files makes them when it is installed
		all.symlink(link, "usr/"+link)
		out.symlink(link, "usr/"+link)
	}
	names, err := all.closure(a, debianRoots(all, a))
	if err != nil {
		return nil, err
	}
	used := map[string]bool{"ca-certificates": true}
	for _, name := range names {
		out.put(name, all[name])
		used[from[name]] = true
	}
	for _, link := range []string{"bin", "sbin", "lib", "lib64"} {
		if _, ok := out["usr/"+link]; !ok {
			delete(out, link)
		}
	}
	for _, program := range []string{"iptables", "ip6tables"} { // what update-alternatives does
		for _, does := range []string{"", "-save", "-restore"} {
			out.symlink("usr/sbin/"+program+does, "xtables-nft-multi")
		}
	}
	out.add("etc/ssl/certs/ca-certificates.crt", 0o644, certificates(all))
	for _, p := range l.of(a) {
		if !used[p.name] {
			return nil, fmt.Errorf("packages.txt: nothing of %s is used", p.name)
		}
		licence := path.Join("usr/share/doc", p.name, "copyright")
		at, ok := all.resolve(licence)
		if !ok {
			return nil, fmt.Errorf("%s: expected %s in the package", p.name, licence)
		}
		out.add(licence, 0o644, all[at].data)
		out.add("var/lib/dpkg/status.d/"+p.name, 0o644, controls[p.name])
	}
	return out, nil
}

// certificates is what update-ca-certificates makes of Mozilla's list.
func certificates(t tree) []byte {
	var names []string
	for name := range t {
		if strings.HasPrefix(name, "usr/share/ca-certificates/mozilla/") && strings.HasSuffix(name, ".crt") {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	var out []byte
	for _, name := range names {
		out = append(append(out, bytes.TrimSpace(t[name].data)...), '\n')
	}
	return out
}
