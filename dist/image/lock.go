package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// suite is the Debian release that the packages are of, and release its number.
const (
	suite   = "trixie"
	release = "13"
)

// aptHelper is the part of apt that gets a file and checks its hash.
const aptHelper = "/usr/lib/apt/apt-helper"

const lockCommand = "`go run . lock` in dist/image/"

// debianPackage is a line of packages.txt.
type debianPackage struct{ name, licence string }

func readPackages(file string) ([]debianPackage, error) {
	var out []debianPackage
	err := eachLine(file, func(line string) error {
		name, rest, _ := strings.Cut(line, " ")
		licence, _, ok := strings.Cut(strings.TrimSpace(rest), "  ")
		if !ok {
			return fmt.Errorf("expected a name, a licence and a reason, with two spaces before the reason, found %q", line)
		}
		out = append(out, debianPackage{name, licence})
		return nil
	})
	slices.SortFunc(out, func(a, b debianPackage) int { return strings.Compare(a.name, b.name) })
	return out, err
}

// pinned is a line of packages.lock: one package in the one version that is used.
type pinned struct {
	arch                        arch
	name, version, file, sha256 string
}

// archive is the part of Debian's archive that the file lies in.
func (p pinned) archive() string {
	if strings.HasPrefix(p.file, "pool/updates/") {
		return "debian-security"
	}
	return "debian"
}

// lock is packages.lock.
type lock struct {
	snapshot string // when it was written, as snapshot.debian.org names it; it keeps the files that Debian replaces
	packages []pinned
}

// urls are where to get a package, the first that has it.
func (l lock) urls(p pinned) []string {
	return []string{
		"http://deb.debian.org/" + p.archive() + "/" + p.file,
		"http://snapshot.debian.org/archive/" + p.archive() + "/" + l.snapshot + "/" + p.file,
	}
}

// of lists what an architecture needs.
func (l lock) of(a arch) []pinned {
	return slices.DeleteFunc(slices.Clone(l.packages), func(p pinned) bool { return p.arch != a })
}

func readLock(file string) (lock, error) {
	var l lock
	err := eachLine(file, func(line string) error {
		f := strings.Fields(line)
		if len(f) == 2 && f[0] == "snapshot" {
			l.snapshot = f[1]
			return nil
		}
		if len(f) != 5 {
			return fmt.Errorf("expected architecture, package, version, file and SHA-256, found %q", line)
		}
		p := pinned{arch(f[0]), f[1], f[2], f[3], f[4]}
		if raw, err := hex.DecodeString(p.sha256); err != nil || len(raw) != 32 {
			return fmt.Errorf("%s: expected a SHA-256, found %q", p.name, p.sha256)
		}
		l.packages = append(l.packages, p)
		return nil
	})
	return l, err
}

func (l lock) bytes() []byte {
	var out bytes.Buffer
	fmt.Fprintf(&out, "# Written by %s:\n"+
		"# architecture, package, version, file in Debian's archive, SHA-256.\nsnapshot %s\n", lockCommand, l.snapshot)
	for _, p := range l.packages {
		fmt.Fprintf(&out, "%s %s %s %s %s\n", p.arch, p.name, p.version, p.file, p.sha256)
	}
	return out.Bytes()
}

// eachLine hands over the lines of a file that are not empty and no comment.
func eachLine(file string, do func(string) error) error {
	raw, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	in := bufio.NewScanner(bytes.NewReader(raw))
	for n := 1; in.Scan(); n++ {
		if line := strings.TrimSpace(in.Text()); line != "" && !strings.HasPrefix(line, "#") {
			if err := do(line); err != nil {
				return fmt.Errorf("%s:%d: %w", file, n, err)
			}
		}
	}
	return in.Err()
}

// writeLock asks Debian for the newest versions of the packages in packages.txt, and writes packages.lock. Dir is the
// directory of both.
func writeLock(ctx context.Context, dir string, now time.Time) error {
	debs, err := readPackages(filepath.Join(dir, "packages.txt"))
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "overlay-image-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	options, err := updateApt(ctx, tmp)
	if err != nil {
		return err
	}
	l := lock{snapshot: now.UTC().Format("20060102T150405Z")}
	for _, arch := range []arch{amd64, arm64} {
		found, err := newest(ctx, options, arch, debs)
		if err != nil {
			return err
		}
		l.packages = append(l.packages, found...)
	}
	return os.WriteFile(filepath.Join(dir, "packages.lock"), l.bytes(), 0o644)
}

// updateApt gets Debian's lists of packages, whose signatures apt checks, and returns the options with which apt uses
// them. All of it is in a directory of its own; the machine's packages are left alone.
func updateApt(ctx context.Context, dir string) ([]string, error) {
	for _, d := range []string{"lists/partial", "archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	var sources string
	for _, s := range []string{
		"debian " + suite, "debian " + suite + "-updates", "debian-security " + suite + "-security",
	} {
		sources += "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/" + s + " main\n"
	}
	for name, text := range map[string]string{"sources.list": sources, "status": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	var options []string
	for _, o := range []string{
		"Dir::Etc::sourcelist=" + filepath.Join(dir, "sources.list"), "Dir::Etc::sourceparts=-",
		"Dir::State=" + dir, "Dir::Cache=" + dir, "Dir::State::status=" + filepath.Join(dir, "status"),
		"APT::Sandbox::User=", "APT::Architecture=amd64", "APT::Architectures::=amd64", "APT::Architectures::=arm64",
	} {
		options = append(options, "-o", o)
	}
	_, err := output(ctx, "", nil, "apt-get", append(slices.Clone(options), "update")...)
	return options, err
}

func newest(ctx context.Context, options []string, arch arch, debs []debianPackage) ([]pinned, error) {
	args := append(slices.Clone(options), "show", "--no-all-versions")
	for _, d := range debs { // packages for all architectures count as those of apt's own
		args = append(args, d.name+":"+string(arch), d.name+":"+string(amd64))
	}
	raw, err := output(ctx, "", nil, "apt-cache", args...)
	if err != nil {
		return nil, err
	}
	found := map[string]pinned{}
	for stanza := range strings.SplitSeq(string(raw), "\n\n") {
		f := map[string]string{}
		for line := range strings.Lines(stanza) {
			if key, value, ok := strings.Cut(strings.TrimSpace(line), ": "); ok {
				f[key] = value
			}
		}
		if f["Architecture"] == string(arch) || f["Architecture"] == "all" {
			found[f["Package"]] = pinned{arch, f["Package"], f["Version"], f["Filename"], f["SHA256"]}
		}
	}
	var out []pinned
	for _, d := range debs {
		p := found[d.name]
		if p.version == "" || p.file == "" || p.sha256 == "" {
			return nil, fmt.Errorf("%s:%s: apt knows no version of it", d.name, arch)
		}
		out = append(out, p)
	}
	return out, nil
}

// fetch gets a package into a directory, unless it is there, and returns its path. Its hash is right in either case:
// apt checks what it downloads.
func (l lock) fetch(ctx context.Context, p pinned, cache string) (string, error) {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	file := filepath.Join(cache, path.Base(p.file))
	if raw, err := os.ReadFile(file); err == nil && fmt.Sprintf("%x", sha256.Sum256(raw)) == p.sha256 {
		return file, nil
	}
	var err error
	for _, url := range l.urls(p) {
		if _, err = output(ctx, "", nil, aptHelper, "-o", "APT::Sandbox::User=", "-o", "Acquire::Retries=3",
			"download-file", url, file+".part", "SHA256:"+p.sha256); err == nil {
			return file, os.Rename(file+".part", file)
		}
	}
	return "", fmt.Errorf("%s %s: %w (a newer version: %s)", p.name, p.version, err, lockCommand)
}

// output starts a program and returns what it prints. Env is added to this process's.
func output(ctx context.Context, dir string, env []string, name string, args ...string) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = dir, append(os.Environ(), env...), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		what := filepath.Base(name) + " " + args[len(args)-1]
		return nil, fmt.Errorf("%s: %w: %s", what, err, strings.TrimSpace(stderr.String()))
	}
	return stdout.Bytes(), nil
}
