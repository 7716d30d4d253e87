package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

var built = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func buildFor(t *testing.T, a arch) result {
	t.Helper()
	r, err := build(t.Context(), options{
		root: "../..", out: t.TempDir(), cache: "../../bin/debian-packages", goCommand: "go", arch: a, version: "v9.9.9-test",
		names: []string{"registry.example.net/overlayd:a", "registry.example.net/overlayd:b"}, created: built,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %d bytes", a, r.size)
	for _, l := range r.layers {
		t.Logf("%9d bytes, %9d packed: %s", l.plain, l.packed, l.what)
	}
	return r
}

// entries reads a tar by itself, and checks what makes it reproducible.
func entries(t *testing.T, raw []byte) map[string][]byte {
	t.Helper()
	data := map[string][]byte{}
	for in := tar.NewReader(bytes.NewReader(raw)); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return data
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.Gid != 0 || h.Uname != "" || h.ModTime.Unix() != 0 || len(h.PAXRecords) > 0 {
			t.Errorf("%s: owner %d:%d %q, time %v", h.Name, h.Uid, h.Gid, h.Uname, h.ModTime)
		}
		if h.Mode&0o6000 != 0 {
			t.Errorf("%s: mode %o", h.Name, h.Mode)
		}
		if _, ok := data[h.Name]; ok {
			t.Errorf("%s is there twice", h.Name)
		}
		if data[h.Name], err = io.ReadAll(in); err != nil {
			t.Fatal(err)
		}
	}
}

// opened is an archive that was read, with every digest checked.
type opened struct {
	config *v1.ConfigFile
	root   tree
}

// open reads an archive as ctr does, by index.json, and as docker does, by manifest.json: it is the same image.
func open(t *testing.T, r result) opened {
	t.Helper()
	raw := read(t, r.archive)
	if int64(len(raw)) != r.size {
		t.Errorf("size %d, said to be %d", len(raw), r.size)
	}
	used := map[string]bool{
		"blobs/": true, "blobs/sha256/": true, "oci-layout": true, "index.json": true, "manifest.json": true,
	}
	data := entries(t, raw)
	dir := t.TempDir()
	unpackInto(t, data, dir)
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	i, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(i.Manifests) != 2 || i.Manifests[0].Digest != i.Manifests[1].Digest ||
		i.Manifests[0].Digest.String() != r.digest {
		t.Fatalf("index %+v", i)
	}
	for n, tag := range []string{"a", "b"} {
		got := i.Manifests[n].Annotations
		if got["io.containerd.image.name"] != "registry.example.net/overlayd:"+tag ||
			got["org.opencontainers.image.ref.name"] != tag {
			t.Errorf("names %v", got)
		}
	}
	image, err := index.Image(i.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(image); err != nil { // every digest and size
		t.Fatal(err)
	}
	m, err := image.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	used[blobPath(i.Manifests[0].Digest)], used[blobPath(m.Config.Digest)] = true, true
	for _, l := range m.Layers {
		used[blobPath(l.Digest)] = true
	}
	for name := range data {
		if !used[name] {
			t.Errorf("nothing refers to %s", name)
		}
	}
	docker := openDocker(t, r)
	want, err := image.ConfigName()
	if got, err2 := docker.ConfigName(); err != nil || err2 != nil || got != want {
		t.Errorf("docker gets another config: %v %v %v %v", got, want, err, err2)
	}
	if err := validate.Image(docker); err != nil {
		t.Error(err)
	}
	return contents(t, image, i.Manifests[0])
}

// openDocker reads an archive by manifest.json.
func openDocker(t *testing.T, r result) v1.Image {
	t.Helper()
	var docker tarball.Manifest
	unmarshal(t, entries(t, read(t, r.archive))["manifest.json"], &docker)
	names := []string{"registry.example.net/overlayd:a", "registry.example.net/overlayd:b"}
	if len(docker) != 1 || !slices.Equal(docker[0].RepoTags, names) {
		t.Fatalf("manifest.json: %+v", docker)
	}
	image, err := tarball.ImageFromPath(r.archive, nil)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

func contents(t *testing.T, image v1.Image, d v1.Descriptor) opened {
	t.Helper()
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	if d.Platform.Architecture != config.Architecture || len(config.History) != len(layers) {
		t.Errorf("index and config don't agree: %+v %+v", d, config)
	}
	o := opened{config, tree{}}
	for _, l := range layers {
		in, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		plain, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		entries(t, plain)
		files, err := unpack(bytes.NewReader(plain))
		if err != nil {
			t.Fatal(err)
		}
		maps.Copy(o.root, files)
	}
	return o
}

func unpackInto(t *testing.T, data map[string][]byte, dir string) {
	t.Helper()
	for name, raw := range data {
		at := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, "/") {
			continue
		}
		if err := os.WriteFile(at, raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func hash(data []byte) string { return fmt.Sprintf("%x", sha256.Sum256(data)) }

func unmarshal(t *testing.T, raw []byte, to any) {
	t.Helper()
	if err := json.Unmarshal(raw, to); err != nil {
		t.Fatalf("%v\n%s", err, raw)
	}
}

// The image has what a node needs, for the right machine, and nothing that it needs is missing.
func TestImage(t *testing.T) {
	for arch, machine := range map[arch]elf.Machine{amd64: elf.EM_X86_64, arm64: elf.EM_AARCH64} {
		t.Run(string(arch), func(t *testing.T) {
			r := buildFor(t, arch)
			o := open(t, r)
			c := o.config
			if c.Architecture != string(arch) || c.OS != "linux" || !c.Created.Equal(built) ||
				!slices.Equal(c.Config.Entrypoint, []string{"/usr/local/bin/overlayd"}) {
				t.Errorf("config %+v", c)
			}
			checkFiles(t, o.root)
			checkPrograms(t, arch, machine, o.root)
			checkSBOM(t, r, o)
			if again := buildFor(t, arch); again.digest != r.digest {
				t.Errorf("a second build is another image: %s and %s", r.digest, again.digest)
			} else if a, b := read(t, r.archive), read(t, again.archive); hash(a) != hash(b) {
				t.Errorf("a second build is another archive: %s and %s", hash(a), hash(b))
			} else if !bytes.Equal(read(t, r.sbom), read(t, again.sbom)) {
				t.Error("a second build has another list of what is in it")
			}
			if string(arch) == goArch(t) {
				t.Run("runs", func(t *testing.T) { runs(t, o) })
			}
		})
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func goArch(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOHOSTARCH").Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

func checkFiles(t *testing.T, root tree) {
	t.Helper()
	programs := []string{"usr/local/bin/overlayd", "usr/local/bin/overlay-install"}
	for _, p := range []string{"overlay-cni", "bridge", "host-local", "portmap", "bandwidth", "loopback"} {
		programs = append(programs, "opt/cni/bin/"+p)
	}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, variant := range []string{"", "-nft", "-legacy"} {
			for _, does := range []string{"", "-save", "-restore"} {
				programs = append(programs, "usr/sbin/"+family+variant+does)
			}
		}
	}
	for _, p := range programs {
		info, err := fs.Stat(root, p)
		if err != nil || info.Mode() != 0o755 {
			t.Errorf("%s: expected a program, found %v %v", p, info, err)
			continue
		}
		if raw, err := fs.ReadFile(root, p); err != nil || !bytes.HasPrefix(raw, []byte(elf.ELFMAG)) {
			t.Errorf("%s: expected a program, found another file: %v", p, err)
		}
	}
	for p, want := range map[string]string{
		"etc/passwd": "root:x:0:0:", "etc/group": "root:x:0:", "etc/os-release": "VERSION_ID=\"13\"",
		"etc/protocols": "udp", "usr/share/doc/iptables/copyright": "GPL-2",
		"usr/share/common-licenses/GPL-2": "GNU GENERAL PUBLIC LICENSE", "usr/share/doc/overlayd/LICENSE": "Apache License",
		"usr/share/doc/overlayd/go/github.com/vishvananda/netlink/LICENSE": "Apache License",
		"var/lib/dpkg/status.d/libc6":                                      "Package: libc6",
	} {
		if raw, err := fs.ReadFile(root, p); err != nil || !strings.Contains(string(raw), want) {
			t.Errorf("%s: expected %q in it: %v", p, want, err)
		}
	}
	bundle := root["etc/ssl/certs/ca-certificates.crt"].Data
	n := bytes.Count(bundle, []byte("-----BEGIN CERTIFICATE-----\n"))
	if n < 100 || n != bytes.Count(bundle, []byte("-----END CERTIFICATE-----\n")) {
		t.Errorf("expected more than a hundred certificates, found %d", n)
	}
	if m := root["tmp"].Mode; m&fs.ModeSticky == 0 || m.Perm() != 0o777 {
		t.Errorf("/tmp: mode %v", m)
	}
	for p, f := range root {
		if _, err := fs.Stat(root, p); err != nil {
			t.Errorf("%s leads nowhere (%s)", p, f.Data)
		}
		if f.Mode.IsRegular() && f.Mode.Perm()&0o022 != 0 {
			t.Errorf("%s: others than root may write it: %v", p, f.Mode)
		}
	}
}

func checkPrograms(t *testing.T, arch arch, machine elf.Machine, root tree) {
	t.Helper()
	if _, err := closure(root, arch, slices.Sorted(maps.Keys(root))); err != nil {
		t.Error(err)
	}
	static := 0
	for p, f := range root {
		if !bytes.HasPrefix(f.Data, []byte(elf.ELFMAG)) {
			continue
		}
		e, err := elf.NewFile(bytes.NewReader(f.Data))
		if err != nil {
			t.Fatalf("%s: %v", p, err)
		}
		if e.Machine != machine {
			t.Errorf("%s is for %v", p, e.Machine)
		}
		info, err := buildinfo.Read(bytes.NewReader(f.Data))
		if err != nil {
			continue
		}
		static++
		if e.Section(".interp") != nil || e.Section(".symtab") != nil {
			t.Errorf("%s is not static and stripped", p)
		}
		for _, s := range info.Settings {
			if s.Key == "GOARCH" && s.Value != string(arch) || strings.HasPrefix(s.Key, "vcs") ||
				s.Key == "-trimpath" && s.Value != "true" {
				t.Errorf("%s: %s=%s", p, s.Key, s.Value)
			}
		}
	}
	if static < 9 {
		t.Errorf("expected our programs and the plugins, found %d", static)
	}
	broken := maps.Clone(root) // the check itself finds what is missing
	delete(broken, "usr/lib/"+arch.triplet()+"/libmnl.so.0")
	_, err := closure(broken, arch, slices.Sorted(maps.Keys(broken)))
	if err == nil || !strings.Contains(err.Error(), "libmnl.so.0, which is in none of the packages") {
		t.Errorf("without libmnl: %v", err)
	}
}

// checkSBOM holds the list against what is in the image.
func checkSBOM(t *testing.T, r result, o opened) {
	t.Helper()
	raw := read(t, r.sbom)
	var doc struct {
		SPDXVersion, DocumentNamespace string
		Packages                       []struct{ SPDXID, Name, VersionInfo, LicenseDeclared string }
		Relationships                  []struct{ SPDXElementID, RelatedSPDXElement string }
	}
	unmarshal(t, raw, &doc)
	ids, versions := map[string]bool{"SPDXRef-DOCUMENT": true}, map[string]string{}
	licence := regexp.MustCompile(`^[A-Za-z0-9.-]+( (AND|OR) [A-Za-z0-9.-]+)*$`)
	for _, p := range doc.Packages {
		if ids[p.SPDXID] {
			t.Errorf("%s is there twice", p.SPDXID)
		}
		ids[p.SPDXID], versions[p.Name] = true, p.VersionInfo
		if p.VersionInfo == "" || !licence.MatchString(p.LicenseDeclared) || p.LicenseDeclared == "NOASSERTION" {
			t.Errorf("%s: version %q, licence %q", p.Name, p.VersionInfo, p.LicenseDeclared)
		}
	}
	for _, rel := range doc.Relationships {
		if !ids[rel.SPDXElementID] || !ids[rel.RelatedSPDXElement] {
			t.Errorf("%+v: there is no such package", rel)
		}
	}
	if len(doc.Relationships) != len(doc.Packages) || doc.SPDXVersion != "SPDX-2.3" ||
		!strings.HasSuffix(doc.DocumentNamespace, strings.TrimPrefix(r.digest, "sha256:")) {
		t.Errorf("%d relationships, %d packages, %s", len(doc.Relationships), len(doc.Packages), doc.DocumentNamespace)
	}
	for p, f := range o.root {
		name, ok := strings.CutPrefix(p, "var/lib/dpkg/status.d/")
		if ok && !strings.Contains(string(f.Data), "Version: "+versions[name]+"\n") {
			t.Errorf("%s: version %q is not that of the package", name, versions[name])
		}
		info, err := buildinfo.Read(bytes.NewReader(f.Data))
		if err != nil {
			continue
		}
		for _, m := range info.Deps {
			if versions[m.Path] != m.Version {
				t.Errorf("%s has %s %s, the list %q", p, m.Path, m.Version, versions[m.Path])
			}
		}
	}
	t.Logf("%d packages and modules, %d bytes", len(doc.Packages)-1, len(raw))
}

// runs starts the programs with nothing but the image around them.
func runs(t *testing.T, o opened) {
	if os.Geteuid() != 0 {
		if os.Getenv("OVERLAYD_SKIP_ROOT_TESTS") == "1" {
			t.Skip("chroot needs root, and OVERLAYD_SKIP_ROOT_TESTS=1 is set: the programs of the image are not run")
		}
		t.Fatal("needs root, for chroot; OVERLAYD_SKIP_ROOT_TESTS=1 skips it")
	}
	dir := t.TempDir()
	if err := os.CopyFS(dir, o.root); err != nil {
		t.Fatal(err)
	}
	for command, want := range map[string]string{
		"/usr/sbin/iptables-nft --version": "(nf_tables)", "/usr/sbin/iptables-legacy --version": "(legacy)",
		"/usr/sbin/ip6tables-legacy --version": "(legacy)",
		"/usr/sbin/iptables --version":         "(nf_tables)", "/usr/sbin/iptables-nft-save --version": "(nf_tables)",
		"/usr/local/bin/overlayd version": "v9.9.9-test", "/usr/local/bin/overlay-install version": "v9.9.9-test",
		"/opt/cni/bin/bridge": "CNI bridge plugin v", "/opt/cni/bin/overlay-cni": "overlay-cni v9.9.9-test",
	} {
		out, err := inside(t, dir, "", strings.Fields(command)...)
		if err != nil || !strings.Contains(out, want) {
			t.Errorf("%s: expected %q, found %v %s", command, want, err, out)
		}
	}
	// The firewall rules that overlayd writes, in a network namespace of its own.
	for family, program := range map[string]string{"IPv4": "iptables", "IPv6": "ip6tables"} {
		rules := restorable(string(read(t, "../../masquerade/testdata/"+family+".rules")))
		for _, variant := range []string{"-nft", "-legacy"} {
			if out, err := inside(t, dir, rules, "/usr/sbin/"+program+variant+"-restore"); err != nil {
				t.Errorf("%s%s-restore: %v %s", program, variant, err, out)
			}
			out, err := inside(t, dir, "", "/usr/sbin/"+program+variant, "-m", "set", "--help")
			if err != nil || !strings.Contains(out, "set match options") {
				t.Errorf("%s%s: the extension set: %v %s", program, variant, err, out)
			}
		}
	}
}

// restorable makes of rules, under headings that name their table, what iptables-restore reads. Sets are left out: they
// would have to be in the kernel.
func restorable(rules string) string {
	var out strings.Builder
	known := map[string]bool{}
	for line := range strings.Lines(rules) {
		if heading, ok := strings.CutPrefix(line, "# "); ok {
			if out.Len() > 0 {
				out.WriteString("COMMIT\n")
			}
			table, _, _ := strings.Cut(heading, ",")
			out.WriteString("*" + table + "\n")
			continue
		}
		if f := strings.Fields(line); len(f) > 1 && !known[f[1]] {
			known[f[1]] = true
			out.WriteString(":" + f[1] + " - [0:0]\n")
		}
		if !strings.Contains(line, "--match-set") {
			out.WriteString(line)
		}
	}
	return out.String() + "COMMIT\n"
}

// inside starts a program of the image with the image as its root, in a network namespace of its own.
func inside(t *testing.T, root, stdin string, command ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Dir, cmd.Stdin = "/", strings.NewReader(stdin)
	cmd.Env = []string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// A package with another content than the pinned one is refused.
func TestHashIsChecked(t *testing.T) {
	l, err := readLock("packages.lock")
	if err != nil {
		t.Fatal(err)
	}
	p := l.of(amd64)[slices.IndexFunc(l.of(amd64), func(p pinned) bool { return p.name == "netbase" })]
	cache := t.TempDir()
	if _, err := l.fetch(t.Context(), p, cache); err != nil {
		t.Fatal(err)
	}
	at := filepath.Join(cache, filepath.Base(p.file))
	if err := os.WriteFile(at, []byte("forged"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := l.fetch(t.Context(), p, cache); err != nil || hash(read(t, at)) != p.sha256 {
		t.Errorf("what lies in the cache is taken as it is: %v", err)
	}
	p.sha256 = strings.Repeat("0", 64)
	if _, err := l.fetch(t.Context(), p, cache); err == nil {
		t.Error("expected an error for another hash")
	}
}

// The lock is for exactly the packages in packages.txt, for both architectures, and reads as it was written.
func TestLock(t *testing.T) {
	debs, err := readPackages("packages.txt")
	if err != nil {
		t.Fatal(err)
	}
	l, err := readLock("packages.lock")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []arch{amd64, arm64} {
		if err := matches(debs, l, a); err != nil {
			t.Errorf("%s: %v", a, err)
		}
	}
	if !bytes.Equal(l.bytes(), read(t, "packages.lock")) {
		t.Error("packages.lock is not as it is written")
	}
	if err := matches(debs[1:], l, amd64); err == nil {
		t.Error("expected an error where the lock has more")
	}
}

func TestLicences(t *testing.T) {
	for text, want := range map[string]string{
		"Apache License\n   Version 2.0, January 2004":                           "Apache-2.0",
		"Permission is hereby granted, free of charge, to any":                   "MIT",
		"Redistribution and use in source and binary forms\nNeither the name of": "BSD-3-Clause",
		"Redistribution and use in source and\n binary forms, with or without":   "BSD-2-Clause",
		"Permission to use, copy, modify, and/or distribute this software":       "ISC",
		"All rights reserved.": "",
	} {
		if got := licenceOf([]byte(text)); got != want {
			t.Errorf("%q: expected %q, found %q", text, want, got)
		}
	}
	if _, err := licences(map[string][]byte{"LICENSE": []byte("Mine!")}); err == nil {
		t.Error("an unknown licence passes")
	}
	if _, err := licences(map[string][]byte{"NOTICE": []byte("MIT")}); err == nil {
		t.Error("no licence passes")
	}
	if fmt.Sprint(purlEscape("2:6.3.0+dfsg-3")) != "2%3A6.3.0%2Bdfsg-3" {
		t.Error(purlEscape("2:6.3.0+dfsg-3"))
	}
}

// An image of one program, as the tests on a cluster use it.
func TestProgram(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "echo")
	if err := os.WriteFile(file, []byte("a program"), 0o600); err != nil {
		t.Fatal(err)
	}
	names := []string{"registry.example.net/overlayd:a", "registry.example.net/overlayd:b"}
	r, err := program(arm64, file, filepath.Join(dir, "echo.tar"), names)
	if err != nil {
		t.Fatal(err)
	}
	o := open(t, r)
	if o.config.Architecture != "arm64" || !slices.Equal(o.config.Config.Entrypoint, []string{"/echo"}) {
		t.Errorf("%+v", o.config)
	}
	if f := o.root["echo"]; len(o.root) != 1 || string(f.Data) != "a program" || f.Mode != 0o755 {
		t.Errorf("%+v", o.root)
	}
	if _, err := program("riscv64", file, filepath.Join(dir, "echo.tar"), names); err == nil {
		t.Error("an unknown architecture passes")
	}
}
