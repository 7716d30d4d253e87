package image

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Options say what to build.
type Options struct {
	Root    string // of the repository
	Out     string // directory for overlayd-image-ARCH.tar and overlayd-image-ARCH.spdx.json
	Cache   string // directory for Debian packages
	Go      string // the go command
	Arch    Arch
	Version string    // of the programs
	Names   []string  // of the image: repository:tag
	Created time.Time // of the commit; nothing else in the image has a time
}

// Result is what was built.
type Result struct {
	Archive, SBOM string // files
	Size          int64  // of the archive, in bytes
	Sizes
}

// Sizes are those of an image, and its digest.
type Sizes struct {
	Digest string // of the manifest
	Layers []LayerSize
}

// LayerSize is what a layer takes: on a node, and to send it there; in bytes.
type LayerSize struct {
	What          string
	Plain, Packed int
}

// Build makes the image of one architecture, and the list of what is in it.
func Build(ctx context.Context, o Options) (Result, error) {
	for _, program := range []string{aptHelper, "dpkg-deb"} {
		if _, err := exec.LookPath(program); err != nil {
			return Result{}, fmt.Errorf("building the image needs apt and dpkg, which Debian and Ubuntu have: %w", err)
		}
	}
	debs, err := readWanted(filepath.Join(o.Root, "dist/image", "packages.txt"))
	if err != nil {
		return Result{}, err
	}
	l, err := readLock(filepath.Join(o.Root, "dist/image", "packages.lock"))
	if err != nil {
		return Result{}, err
	}
	if err := matches(debs, l, o.Arch); err != nil {
		return Result{}, err
	}
	layers, mods, err := assemble(ctx, o, l)
	if err != nil {
		return Result{}, err
	}
	created := o.Created.UTC()
	s := spec{
		arch: o.Arch, names: o.Names, version: o.Version, created: created, layers: layers,
		entrypoint: []string{"/usr/local/bin/overlayd"},
		env:        []string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin", "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"},
		labels: map[string]string{
			"org.opencontainers.image.title": "overlayd", "org.opencontainers.image.version": o.Version, "org.opencontainers.image.licenses": "Apache-2.0",
			"org.opencontainers.image.source": "https://github.com/overlayd/overlayd", "org.opencontainers.image.created": created.Format(time.RFC3339),
		},
	}
	packed, sizes, err := s.pack()
	if err != nil {
		return Result{}, err
	}
	list, err := sbom(s, sizes.Digest, l, debs, mods)
	if err != nil {
		return Result{}, err
	}
	base := filepath.Join(o.Out, "overlayd-image-"+string(o.Arch))
	r := Result{Archive: base + ".tar", SBOM: base + ".spdx.json", Sizes: sizes}
	if r.Size, err = save(r.Archive, packed); err != nil {
		return r, err
	}
	return r, os.WriteFile(r.SBOM, list, 0o644)
}

// Program writes an image of one static program and nothing else, as the tests on a cluster need it: under these names, with the program
// at /NAME as its entrypoint.
func Program(archive string, arch Arch, name, file string, names ...string) (Result, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return Result{}, err
	}
	content := tree{}
	content.add(name, 0o755, data)
	s := spec{arch: arch, names: names, created: time.Unix(0, 0).UTC(), layers: []layer{{name, content}}, entrypoint: []string{"/" + name}}
	packed, sizes, err := s.pack()
	if err != nil {
		return Result{}, err
	}
	r := Result{Archive: archive, Sizes: sizes}
	r.Size, err = save(archive, packed)
	return r, err
}

// assemble makes the layers: what changes most seldom comes first, so that an upgrade of overlayd loads the last one only.
func assemble(ctx context.Context, o Options, l lock) ([]layer, []goModule, error) {
	base, err := debian(ctx, o.Arch, l, o.Cache)
	if err != nil {
		return nil, nil, err
	}
	base.add("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/usr/sbin/nologin\n"))
	base.add("etc/group", 0o644, []byte("root:x:0:\n"))
	base.dir("run", 0o755)
	base.dir("root", 0o700)
	base.dir("tmp", os.ModeSticky|0o777)
	dir, err := os.MkdirTemp("", "overlay-image-")
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	c := compiler{o.Root, o.Go, o.Version, o.Arch, dir}
	plugins, err := c.plugins(ctx)
	if err != nil {
		return nil, nil, err
	}
	own, err := c.own(ctx)
	if err != nil {
		return nil, nil, err
	}
	all := tree{}
	for _, t := range []tree{plugins, own} {
		all.merge(t)
	}
	mods, err := c.modules(ctx, all)
	if err != nil {
		return nil, nil, err
	}
	licence, err := os.ReadFile(filepath.Join(o.Root, "LICENSE"))
	if err != nil {
		return nil, nil, err
	}
	own.add("usr/share/doc/overlayd/LICENSE", 0o644, licence)
	for name, f := range all { // the texts of the licences
		if strings.HasPrefix(name, "usr/share/doc/") && f.mode.IsRegular() {
			own.put(name, f)
		}
	}
	whole := tree{}
	for _, t := range []tree{base, plugins, own} {
		whole.merge(t)
	}
	missing, err := whole.missing(o.Arch)
	if err != nil {
		return nil, nil, err
	}
	if len(missing) > 0 {
		return nil, nil, fmt.Errorf("the image is not complete: %s", strings.Join(missing, ", "))
	}
	return []layer{
		{"iptables and CA certificates of Debian " + release, base},
		{"reference CNI plugins", plugins},
		{"overlayd " + o.Version, own},
	}, mods, nil
}

// matches tells whether the two lists of packages are about the same ones.
func matches(debs []wanted, l lock, a Arch) error {
	locked := l.of(a)
	for i := 0; i < max(len(debs), len(locked)); i++ {
		if i >= len(debs) || i >= len(locked) || debs[i].name != locked[i].name {
			return fmt.Errorf("packages.lock is not that of packages.txt: `go run ./cmd/overlay-image lock -root ../..` in dist/image/ writes it")
		}
	}
	return nil
}

// save writes the archive in one step.
func save(path string, a *archive) (int64, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return 0, err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".image-")
	if err != nil {
		return 0, err
	}
	defer func() { _ = os.Remove(f.Name()) }() // not there any more if all went well
	defer f.Close()
	if err := a.write(f); err != nil {
		return 0, err
	}
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if err := f.Chmod(0o644); err != nil {
		return 0, err
	}
	return info.Size(), os.Rename(f.Name(), path)
}
