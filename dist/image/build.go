package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// options say what to build.
type options struct {
	root      string // of the repository
	out       string // directory for overlayd-image-ARCH.tar and overlayd-image-ARCH.spdx.json
	cache     string // directory for Debian packages
	goCommand string
	arch      arch
	version   string    // of the programs
	names     []string  // of the image: repository:tag
	created   time.Time // of the commit; nothing else in the image has a time
}

// result is what was built.
type result struct {
	archive, sbom string // files
	size          int64  // of the archive, in bytes
	digest        string // of the manifest
	layers        []layerSize
}

// layerSize is what a layer takes: on a node, and to send it there; in bytes.
type layerSize struct {
	what          string
	plain, packed int64
}

// build makes the image of one architecture, and the list of what is in it.
func build(ctx context.Context, o options) (result, error) {
	for _, program := range []string{aptHelper, "dpkg-deb"} {
		if _, err := exec.LookPath(program); err != nil {
			return result{}, fmt.Errorf("building the image needs apt and dpkg, which Debian and Ubuntu have: %w", err)
		}
	}
	dir := filepath.Join(o.root, "dist/image")
	debs, err := readPackages(filepath.Join(dir, "packages.txt"))
	if err != nil {
		return result{}, err
	}
	l, err := readLock(filepath.Join(dir, "packages.lock"))
	if err != nil {
		return result{}, err
	}
	if err := matches(debs, l, o.arch); err != nil {
		return result{}, err
	}
	layers, mods, err := assemble(ctx, o, l)
	if err != nil {
		return result{}, err
	}
	s := spec{
		arch: o.arch, names: o.names, created: o.created.UTC(), layers: layers,
		config: v1.Config{
			User: "0:0", WorkingDir: "/", Entrypoint: []string{"/usr/local/bin/overlayd"},
			Env: []string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin", "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"},
			Labels: map[string]string{
				"org.opencontainers.image.title":    "overlayd",
				"org.opencontainers.image.version":  o.version,
				"org.opencontainers.image.licenses": "Apache-2.0",
				"org.opencontainers.image.source":   "https://github.com/overlayd/overlayd",
				"org.opencontainers.image.created":  o.created.UTC().Format(time.RFC3339),
			},
		},
	}
	base := filepath.Join(o.out, "overlayd-image-"+string(o.arch))
	r, err := s.write(base + ".tar")
	if err != nil {
		return r, err
	}
	r.sbom = base + ".spdx.json"
	list, err := sbom(o, r.digest, l, debs, mods)
	if err != nil {
		return r, err
	}
	return r, os.WriteFile(r.sbom, list, 0o644)
}

// program makes an image of one static program and nothing else, which is its entrypoint, in the root directory.
func program(a arch, file, archive string, names []string) (result, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return result{}, err
	}
	name, content := filepath.Base(file), tree{}
	put(content, name, 0o755, data)
	return whole(a, layer{name, content}, archive, names, []string{"/" + name})
}

// root makes an image of a tar with a root file system. The first word of the command is the entrypoint.
func root(a arch, file, archive string, names, command []string) (result, error) {
	if len(command) == 0 {
		return result{}, errors.New("-command is empty: expected what the image runs")
	}
	in, err := os.Open(file)
	if err != nil {
		return result{}, err
	}
	defer in.Close()
	content, err := unpack(in)
	if err != nil {
		return result{}, err
	}
	return whole(a, layer{filepath.Base(file), content}, archive, names, command)
}

// whole makes an image of one layer.
func whole(a arch, l layer, archive string, names, command []string) (result, error) {
	if err := a.check(); err != nil {
		return result{}, err
	}
	s := spec{
		arch: a, names: names, created: time.Unix(0, 0).UTC(), layers: []layer{l},
		config: v1.Config{User: "0:0", WorkingDir: "/", Entrypoint: command[:1], Cmd: command[1:]},
	}
	return s.write(archive)
}

// assemble makes the layers: what changes least often comes first, so that an upgrade of overlayd loads the last one
// only.
func assemble(ctx context.Context, o options, l lock) ([]layer, []goModule, error) {
	base, err := debian(ctx, o.arch, l, o.cache)
	if err != nil {
		return nil, nil, err
	}
	put(base, "etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/usr/sbin/nologin\n"))
	put(base, "etc/group", 0o644, []byte("root:x:0:\n"))
	put(base, "run", fs.ModeDir|0o755, nil)
	put(base, "root", fs.ModeDir|0o700, nil)
	put(base, "tmp", fs.ModeDir|fs.ModeSticky|0o777, nil)
	plugins, err := o.plugins(ctx)
	if err != nil {
		return nil, nil, err
	}
	own, err := o.own(ctx)
	if err != nil {
		return nil, nil, err
	}
	mods, err := o.modules(ctx, plugins, own)
	if err != nil {
		return nil, nil, err
	}
	for _, m := range mods {
		for name, text := range m.texts {
			put(own, path.Join("usr/share/doc/overlayd/go", m.Path, name), 0o644, text)
		}
	}
	licence, err := os.ReadFile(filepath.Join(o.root, "LICENSE"))
	if err != nil {
		return nil, nil, err
	}
	put(own, "usr/share/doc/overlayd/LICENSE", 0o644, licence)
	whole := tree{}
	for _, t := range []tree{base, plugins, own} {
		maps.Copy(whole, t)
	}
	if _, err := closure(whole, o.arch, slices.Sorted(maps.Keys(whole))); err != nil {
		return nil, nil, err
	}
	return []layer{
		{"iptables and CA certificates of Debian " + release, base},
		{"reference CNI plugins", plugins},
		{"overlayd " + o.version, own},
	}, mods, nil
}

// matches tells whether the lock is for exactly these packages.
func matches(debs []debianPackage, l lock, a arch) error {
	same := func(d debianPackage, p pinned) bool { return d.name == p.name }
	if !slices.EqualFunc(debs, l.of(a), same) {
		return fmt.Errorf("packages.lock is not for the packages in packages.txt: %s writes it", lockCommand)
	}
	return nil
}
