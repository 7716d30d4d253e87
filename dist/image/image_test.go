package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
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
)

var built = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func build(t *testing.T, a Arch) Result {
	t.Helper()
	r, err := Build(t.Context(), Options{
		Root: "../..", Out: t.TempDir(), Cache: "../../bin/debian-packages", Go: "go", Arch: a, Version: "v9.9.9-test",
		Names: []string{"registry.example.net/overlayd:a", "registry.example.net/overlayd:b"}, Created: built,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %d bytes", a, r.Size)
	for _, l := range r.Layers {
		t.Logf("%9d bytes, %9d packed: %s", l.Plain, l.Packed, l.What)
	}
	return r
}

// entries reads a tar by itself, and checks what makes it reproducible.
func entries(t *testing.T, raw []byte) (names []string, data map[string][]byte) {
	t.Helper()
	data = map[string][]byte{}
	for in := tar.NewReader(bytes.NewReader(raw)); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return names, data
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
		names = append(names, h.Name)
		if data[h.Name], err = io.ReadAll(in); err != nil {
			t.Fatal(err)
		}
	}
}

// opened is an archive that was read, with every digest checked.
type opened struct {
	config imageConfig
	root   tree
	layers []tree
}

// open reads an archive as ctr does, by index.json, and as docker does, by manifest.json: it is the same image.
func open(t *testing.T, r Result) opened {
	t.Helper()
	raw, err := os.ReadFile(r.Archive)
	if err != nil {
		t.Fatal(err)
	}
	if int64(len(raw)) != r.Size {
		t.Errorf("size %d, said to be %d", len(raw), r.Size)
	}
	names, data := entries(t, raw)
	if slices.Sort(names); len(slices.Compact(slices.Clone(names))) != len(names) {
		t.Errorf("entries are there twice: %q", names)
	}
	used := map[string]bool{"oci-layout": true, "index.json": true, "manifest.json": true}
	blob := func(d descriptor) []byte {
		name := blobPath(d.Digest)
		used[name] = true
		b, ok := data[name]
		if !ok || int64(len(b)) != d.Size || "sha256:"+hash(b) != d.Digest {
			t.Fatalf("%+v: found %d bytes with hash %s", d, len(b), hash(b))
		}
		return b
	}
	var i index
	unmarshal(t, data["index.json"], &i)
	if len(i.Manifests) != 2 || i.Manifests[0].Digest != i.Manifests[1].Digest || i.Manifests[0].Digest != r.Digest {
		t.Fatalf("index %+v", i)
	}
	for n, tag := range []string{"a", "b"} {
		if got := i.Manifests[n].Annotations; got["io.containerd.image.name"] != "registry.example.net/overlayd:"+tag || got["org.opencontainers.image.ref.name"] != tag {
			t.Errorf("names %v", got)
		}
	}
	var m manifest
	unmarshal(t, blob(i.Manifests[0]), &m)
	var o opened
	unmarshal(t, blob(m.Config), &o.config)
	if i.Manifests[0].Platform.Architecture != o.config.Architecture || len(m.Layers) != len(o.config.RootFS.DiffIDs) || len(o.config.History) != len(m.Layers) {
		t.Errorf("index, manifest and config don't agree: %+v %+v %+v", i, m, o.config)
	}
	o.root = tree{}
	for n, d := range m.Layers {
		z, err := gzip.NewReader(bytes.NewReader(blob(d)))
		if err != nil {
			t.Fatal(err)
		}
		plain, err := io.ReadAll(z)
		if err != nil {
			t.Fatal(err)
		}
		if "sha256:"+hash(plain) != o.config.RootFS.DiffIDs[n] {
			t.Errorf("layer %d: expected %s, found %s", n, o.config.RootFS.DiffIDs[n], hash(plain))
		}
		if names, _ := entries(t, plain); !slices.IsSortedFunc(names, func(a, b string) int { return strings.Compare(strings.TrimSuffix(a, "/"), strings.TrimSuffix(b, "/")) }) {
			t.Errorf("layer %d is not sorted", n)
		}
		l, err := readTar(bytes.NewReader(plain))
		if err != nil {
			t.Fatal(err)
		}
		o.layers = append(o.layers, l)
		o.root.merge(l)
	}
	var docker []dockerManifest
	unmarshal(t, data["manifest.json"], &docker)
	if len(docker) != 1 || docker[0].Config != blobPath(m.Config.Digest) || len(docker[0].Layers) != len(m.Layers) ||
		!slices.Equal(docker[0].RepoTags, []string{"registry.example.net/overlayd:a", "registry.example.net/overlayd:b"}) {
		t.Fatalf("manifest.json: %+v", docker)
	}
	for n, l := range m.Layers {
		if docker[0].Layers[n] != blobPath(l.Digest) {
			t.Errorf("manifest.json: layer %d is %s", n, docker[0].Layers[n])
		}
	}
	for name := range data {
		if !used[name] {
			t.Errorf("nobody refers to %s", name)
		}
	}
	return o
}

func unmarshal(t *testing.T, raw []byte, to any) {
	t.Helper()
	if err := json.Unmarshal(raw, to); err != nil {
		t.Fatalf("%v\n%s", err, raw)
	}
}

// The image has what a node needs, for the right machine, and nothing that it needs is missing.
func TestImage(t *testing.T) {
	for arch, machine := range map[Arch]elf.Machine{AMD64: elf.EM_X86_64, ARM64: elf.EM_AARCH64} {
		t.Run(string(arch), func(t *testing.T) {
			r := build(t, arch)
			o := open(t, r)
			c := o.config
			if c.Architecture != string(arch) || c.OS != "linux" || !c.Created.Equal(built) || !slices.Equal(c.Config.Entrypoint, []string{"/usr/local/bin/overlayd"}) {
				t.Errorf("config %+v", c)
			}
			checkFiles(t, o.root)
			checkPrograms(t, arch, machine, o.root)
			checkSBOM(t, r, o)
			if again := build(t, arch); again.Digest != r.Digest {
				t.Errorf("a second build is another image: %s and %s", r.Digest, again.Digest)
			} else if a, b := read(t, r.Archive), read(t, again.Archive); hash(a) != hash(b) {
				t.Errorf("a second build is another archive: %s and %s", hash(a), hash(b))
			} else if !bytes.Equal(read(t, r.SBOM), read(t, again.SBOM)) {
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
		at, ok := root.resolve(p)
		if f := root[at]; !ok || f.mode.Perm() != 0o755 || !bytes.HasPrefix(f.data, []byte(elf.ELFMAG)) {
			t.Errorf("%s (%s): expected a program, found %v with mode %v", p, at, ok, f.mode)
		}
	}
	for p, want := range map[string]string{
		"etc/passwd": "root:x:0:0:", "etc/group": "root:x:0:", "etc/os-release": "VERSION_ID=\"13\"", "etc/protocols": "udp", "usr/share/doc/iptables/copyright": "GPL-2",
		"usr/share/common-licenses/GPL-2": "GNU GENERAL PUBLIC LICENSE", "usr/share/doc/overlayd/LICENSE": "Apache License",
		"usr/share/doc/overlayd/go/github.com/vishvananda/netlink/LICENSE": "Apache License", "var/lib/dpkg/status.d/libc6": "Package: libc6",
	} {
		at, ok := root.resolve(p)
		if !ok || !strings.Contains(string(root[at].data), want) {
			t.Errorf("%s: expected %q in it", p, want)
		}
	}
	at, _ := root.resolve("etc/ssl/certs/ca-certificates.crt")
	if n := bytes.Count(root[at].data, []byte("-----BEGIN CERTIFICATE-----\n")); n < 100 || n != bytes.Count(root[at].data, []byte("-----END CERTIFICATE-----\n")) {
		t.Errorf("expected more than a hundred certificates, found %d", n)
	}
	if m := root["tmp"].mode; m&fs.ModeSticky == 0 || m.Perm() != 0o777 {
		t.Errorf("/tmp: mode %v", m)
	}
	for p, f := range root {
		if _, ok := root.resolve(p); !ok {
			t.Errorf("%s leads nowhere (%s)", p, f.link)
		}
		if f.mode.IsRegular() && f.mode.Perm()&0o022 != 0 {
			t.Errorf("%s: everybody may write it: %v", p, f.mode)
		}
	}
}

func checkPrograms(t *testing.T, arch Arch, machine elf.Machine, root tree) {
	t.Helper()
	missing, err := root.missing(arch)
	if err != nil || len(missing) > 0 {
		t.Errorf("missing: %q %v", missing, err)
	}
	static := 0
	for p, f := range root {
		if !bytes.HasPrefix(f.data, []byte(elf.ELFMAG)) {
			continue
		}
		e, err := elf.NewFile(bytes.NewReader(f.data))
		if err != nil {
			t.Fatalf("%s: %v", p, err)
		}
		if e.Machine != machine {
			t.Errorf("%s is for %v", p, e.Machine)
		}
		info, err := buildinfo.Read(bytes.NewReader(f.data))
		if err != nil {
			continue
		}
		static++
		if e.Section(".interp") != nil || e.Section(".symtab") != nil {
			t.Errorf("%s is not static and stripped", p)
		}
		for _, s := range info.Settings {
			if s.Key == "GOARCH" && s.Value != string(arch) || strings.HasPrefix(s.Key, "vcs") || s.Key == "-trimpath" && s.Value != "true" {
				t.Errorf("%s: %s=%s", p, s.Key, s.Value)
			}
		}
	}
	if static < 9 {
		t.Errorf("expected our programs and the plugins, found %d", static)
	}
	broken := maps.Clone(root) // the check itself finds what is missing
	delete(broken, "usr/lib/"+arch.triplet()+"/libmnl.so.0")
	if missing, err := broken.missing(arch); err != nil || len(missing) < 2 {
		t.Errorf("without libmnl nothing seems to be missing: %q %v", missing, err)
	}
}

// checkSBOM holds the list against what is in the image.
func checkSBOM(t *testing.T, r Result, o opened) {
	t.Helper()
	raw := read(t, r.SBOM)
	var doc spdxDocument
	unmarshal(t, raw, &doc)
	ids, versions := map[string]bool{"SPDXRef-DOCUMENT": true}, map[string]string{}
	licence := regexp.MustCompile(`^[A-Za-z0-9.-]+( (AND|OR) [A-Za-z0-9.-]+)*$`)
	for _, p := range doc.Packages {
		if ids[p.SPDXID] {
			t.Errorf("%s is there twice", p.SPDXID)
		}
		ids[p.SPDXID], versions[p.Name] = true, p.VersionInfo
		if p.VersionInfo == "" || !licence.MatchString(p.LicenseDeclared) || p.LicenseDeclared == noAssertion {
			t.Errorf("%s: version %q, licence %q", p.Name, p.VersionInfo, p.LicenseDeclared)
		}
	}
	for _, rel := range doc.Relationships {
		if !ids[rel.Element] || !ids[rel.Related] {
			t.Errorf("%+v: there is no such package", rel)
		}
	}
	if len(doc.Relationships) != len(doc.Packages) || doc.SPDXVersion != "SPDX-2.3" || !strings.HasSuffix(doc.DocumentNamespace, strings.TrimPrefix(r.Digest, "sha256:")) {
		t.Errorf("%d relationships, %d packages, %s", len(doc.Relationships), len(doc.Packages), doc.DocumentNamespace)
	}
	for p, f := range o.root {
		if name, ok := strings.CutPrefix(p, "var/lib/dpkg/status.d/"); ok && !strings.Contains(string(f.data), "Version: "+versions[name]+"\n") {
			t.Errorf("%s: version %q is not that of the package", name, versions[name])
		}
		info, err := buildinfo.Read(bytes.NewReader(f.data))
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
	unpack(t, o, dir)
	for command, want := range map[string]string{
		"/usr/sbin/iptables-nft --version": "(nf_tables)", "/usr/sbin/iptables-legacy --version": "(legacy)", "/usr/sbin/ip6tables-legacy --version": "(legacy)",
		"/usr/sbin/iptables --version": "(nf_tables)", "/usr/sbin/iptables-nft-save --version": "(nf_tables)",
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
			if out, err := inside(t, dir, "", "/usr/sbin/"+program+variant, "-m", "set", "--help"); err != nil || !strings.Contains(out, "set match options") {
				t.Errorf("%s%s: the extension set: %v %s", program, variant, err, out)
			}
		}
	}
}

// restorable makes of rules, under headings that name their table, what iptables-restore reads. Sets are left out: they would have to be
// in the kernel.
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

func unpack(t *testing.T, o opened, dir string) {
	t.Helper()
	for _, p := range slices.Sorted(maps.Keys(o.root)) {
		f, at := o.root[p], filepath.Join(dir, p)
		var err error
		switch {
		case f.mode.IsDir():
			err = os.Mkdir(at, 0o755)
		case f.mode&fs.ModeSymlink != 0:
			err = os.Symlink(f.link, at)
		default:
			err = os.WriteFile(at, f.data, f.mode.Perm())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
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
	p := l.of(AMD64)[slices.IndexFunc(l.of(AMD64), func(p pinned) bool { return p.name == "netbase" })]
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

// The lock is for exactly the packages that are wanted, for both architectures, and reads as it was written.
func TestLock(t *testing.T) {
	debs, err := readWanted("packages.txt")
	if err != nil {
		t.Fatal(err)
	}
	l, err := readLock("packages.lock")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []Arch{AMD64, ARM64} {
		if err := matches(debs, l, a); err != nil {
			t.Errorf("%s: %v", a, err)
		}
	}
	if !bytes.Equal(l.bytes(), read(t, "packages.lock")) {
		t.Error("packages.lock is not as it is written")
	}
	if err := matches(debs[1:], l, AMD64); err == nil {
		t.Error("expected an error where the lock has more")
	}
}

func TestResolve(t *testing.T) {
	r := tree{}
	r.symlink("lib64", "usr/lib64")
	r.symlink("usr/lib64/ld.so", "../lib/x/ld-2.so")
	r.add("usr/lib/x/ld-2.so", 0o755, []byte("x"))
	r.symlink("a", "b")
	r.symlink("b", "/a")
	r.symlink("gone", "nowhere")
	for from, want := range map[string]string{"/lib64/ld.so": "usr/lib/x/ld-2.so", "usr": "usr", "a": "", "gone": "", "usr/none": ""} {
		got, ok := r.resolve(from)
		if ok != (want != "") || ok && got != want {
			t.Errorf("%s: expected %q, found %q %v", from, want, got, ok)
		}
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
	if _, err := judgeLicences(map[string][]byte{"LICENSE": []byte("Mine!")}); err == nil {
		t.Error("an unknown licence passes")
	}
	if _, err := judgeLicences(map[string][]byte{"NOTICE": []byte("MIT")}); err == nil {
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
	r, err := Program(filepath.Join(dir, "echo.tar"), ARM64, "echo", file, "registry.example.net/overlayd:a", "registry.example.net/overlayd:b")
	if err != nil {
		t.Fatal(err)
	}
	o := open(t, r)
	if o.config.Architecture != "arm64" || !slices.Equal(o.config.Config.Entrypoint, []string{"/echo"}) {
		t.Errorf("%+v", o.config)
	}
	if f := o.root["echo"]; len(o.root) != 1 || string(f.data) != "a program" || f.mode != 0o755 {
		t.Errorf("%+v", o.root)
	}
}
