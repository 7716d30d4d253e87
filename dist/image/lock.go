package image

import (
	"bufio"
	"bytes"
	"context"
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

// wanted is a line of packages.txt.
type wanted struct{ name, licence string }

func readWanted(file string) ([]wanted, error) {
	var out []wanted
	err := eachLine(file, func(line string) error {
		name, rest, _ := strings.Cut(line, " ")
		licence, _, ok := strings.Cut(strings.TrimSpace(rest), "  ")
		if !ok {
			return fmt.Errorf("expected a name, a licence and a reason, with two spaces before the reason, found %q", line)
		}
		out = append(out, wanted{name, licence})
		return nil
	})
	slices.SortFunc(out, func(a, b wanted) int { return strings.Compare(a.name, b.name) })
	return out, err
}

// pinned is a line of packages.lock: one package in the one version that is used.
type pinned struct {
	arch                        Arch
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
	snapshot string // when it was written, as snapshot.debian.org names it: the files are there even after Debian has newer ones
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
func (l lock) of(a Arch) []pinned {
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
		p := pinned{Arch(f[0]), f[1], f[2], f[3], f[4]}
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
	fmt.Fprintf(&out, "# Written by `go run ./cmd/overlay-image lock -root ..`: architecture, package, version, file in Debian's archive, SHA-256.\nsnapshot %s\n", l.snapshot)
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

// WriteLock asks Debian for the newest versions of the packages in packages.txt, and writes packages.lock. Dir is the directory of both.
// apt checks Debian's signatures; it works in a directory of its own and leaves the machine's packages alone.
func WriteLock(ctx context.Context, dir string, now time.Time) error {
	want, err := readWanted(filepath.Join(dir, "packages.txt"))
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "overlay-image-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	a, err := newApt(ctx, tmp)
	if err != nil {
		return err
	}
	l := lock{snapshot: now.UTC().Format("20060102T150405Z")}
	for _, arch := range []Arch{AMD64, ARM64} {
		found, err := a.newest(ctx, arch, want)
		if err != nil {
			return err
		}
		l.packages = append(l.packages, found...)
	}
	return os.WriteFile(filepath.Join(dir, "packages.lock"), l.bytes(), 0o644)
}

// apt is one with lists of its own, for all architectures.
type apt struct {
	dir     string
	options []string
}

// newApt makes one that keeps all it has in a directory.
func newApt(ctx context.Context, dir string) (*apt, error) {
	a := &apt{dir: dir}
	for _, d := range []string{"lists/partial", "archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	var sources strings.Builder
	for _, s := range []string{"debian " + suite, "debian " + suite + "-updates", "debian-security " + suite + "-security"} {
		fmt.Fprintf(&sources, "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/%s main\n", s)
	}
	for name, text := range map[string]string{"sources.list": sources.String(), "status": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	for _, o := range []string{
		"Dir::Etc::sourcelist=" + filepath.Join(dir, "sources.list"), "Dir::Etc::sourceparts=-", "Dir::State=" + dir, "Dir::Cache=" + dir,
		"Dir::State::status=" + filepath.Join(dir, "status"), "APT::Sandbox::User=", "APT::Architecture=amd64", "APT::Architectures::=amd64", "APT::Architectures::=arm64",
	} {
		a.options = append(a.options, "-o", o)
	}
	_, err := run(ctx, "", nil, "apt-get", append(a.options, "update")...)
	return a, err
}

func (a *apt) newest(ctx context.Context, arch Arch, want []wanted) ([]pinned, error) {
	args := append(slices.Clone(a.options), "show", "--no-all-versions")
	for _, w := range want { // packages for all architectures count as those of apt's own
		args = append(args, w.name+":"+string(arch), w.name+":"+string(AMD64))
	}
	raw, err := run(ctx, "", nil, "apt-cache", args...)
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
	for _, w := range want {
		p, ok := found[w.name]
		if !ok || p.version == "" || p.file == "" || p.sha256 == "" {
			return nil, fmt.Errorf("%s:%s: apt knows no version of it", w.name, arch)
		}
		out = append(out, p)
	}
	return out, nil
}

// fetch gets a package into a directory, unless it is there, and returns its path. Its hash is right in either case.
func (l lock) fetch(ctx context.Context, p pinned, cache string) (string, error) {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	at := filepath.Join(cache, path.Base(p.file))
	raw, err := os.ReadFile(at)
	if err == nil && hash(raw) == p.sha256 {
		return at, nil
	}
	var last error
	for _, url := range l.urls(p) {
		part := at + ".part"
		if _, last = run(ctx, "", nil, aptHelper, "-o", "APT::Sandbox::User=", "-o", "Acquire::Retries=3", "download-file", url, part, "SHA256:"+p.sha256); last != nil {
			continue
		}
		if raw, last = os.ReadFile(part); last != nil {
			continue
		}
		if got := hash(raw); got != p.sha256 {
			last = fmt.Errorf("%s: expected SHA-256 %s, found %s", url, p.sha256, got)
			continue
		}
		return at, os.Rename(part, at)
	}
	return "", fmt.Errorf("%s %s: %w (a newer version: `go run ./cmd/overlay-image lock -root ../..` in dist/image/)", p.name, p.version, last)
}

// run starts a program and returns what it prints. Env is added to this process's.
func run(ctx context.Context, dir string, env []string, name string, args ...string) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = dir, append(os.Environ(), env...), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", filepath.Base(name), args[len(args)-1], err, strings.TrimSpace(stderr.String()))
	}
	return stdout.Bytes(), nil
}
