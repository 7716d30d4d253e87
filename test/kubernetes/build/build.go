// Package build makes the programs and images that the tests need, where they are missing. What takes long to compile
// is kept in a directory, by a hash of what it is made from.
package build

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// Names of the images.
const (
	NetcheckImage = "localhost/netcheck:test"
	pauseImage    = "registry.k8s.io/pause:3.10"
	CoreDNSImage  = "localhost/coredns:test"
)

const (
	kubernetesVersion = "1.36.3" // as in go.mod
	needed            = 6e9      // bytes, to compile it and run it
)

// Builder makes things.
type Builder struct {
	Root  string // of the repository
	Cache string // directory for what is kept
	Go    string // the go command
	Note  func(format string, args ...any)
}

// Built are the files that were made.
type Built struct {
	Kubernetes, Helm, Netcheck string // programs
	coreDNS                    string
	Containerd                 string   // directory with the programs of containerd 2
	Images                     []string // archives: what pods of the tests need
}

// All makes all but overlayd's image.
func (b Builder) All(ctx context.Context) (Built, error) {
	var out Built
	if err := os.MkdirAll(b.Cache, 0o755); err != nil {
		return out, err
	}
	err := errors.Join(space(b.Cache, needed), there("containerd runc iproute2 iptables nftables util-linux procps etcd-client",
		"containerd", "containerd-shim-runc-v2", "ctr", "runc", "ip", "iptables", "nft",
		"nsenter", "unshare", "mount", "sysctl", "etcdctl"))
	if err != nil {
		return out, err
	}
	if out.Kubernetes, err = b.program(ctx, "kubernetes", "test/kubernetes", "./cmd/kubernetes",
		kubernetesFlags()); err != nil {
		return out, err
	}
	// It is a tool of the module that tests the chart, since it needs newer libraries of Kubernetes than Kubernetes here
	// has.
	if out.Helm, err = b.program(ctx, "helm", "dist/test", "helm.sh/helm/v3/cmd/helm", "-s -w"); err != nil {
		return out, err
	}
	const containerd = "github.com/containerd/containerd/v2/cmd/"
	out.Containerd, err = b.kept(ctx, "containerd", "test/kubernetes/containerd", "-s -w", containerd+"containerd",
		containerd+"containerd-shim-runc-v2", containerd+"ctr")
	if err != nil {
		return out, err
	}
	if out.coreDNS, err = b.program(ctx, "coredns", "test/kubernetes/coredns", ".", "-s -w"); err != nil {
		return out, err
	}
	out.Netcheck = filepath.Join(b.Cache, "netcheck")
	if err := b.compile(ctx, "", out.Netcheck, "-s -w", "./test/netcheck"); err != nil {
		return out, err
	}
	for _, x := range []struct{ program, names string }{
		{out.Netcheck, NetcheckImage + "," + pauseImage}, {out.coreDNS, CoreDNSImage},
	} {
		archive := filepath.Join(b.Cache, filepath.Base(x.program)+".tar")
		if err := b.imageOf(ctx, x.program, x.names, archive); err != nil {
			return out, err
		}
		out.Images = append(out.Images, archive)
	}
	return out, nil
}

// there fails where a tool is missing, and names the packages that have them all.
func there(packages string, tools ...string) error {
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%s is missing: apt-get install --no-install-recommends %s", tool, packages)
		}
	}
	return nil
}

// space fails where the disk would run full in the middle.
func space(dir string, needed float64) error {
	var s syscall.Statfs_t
	if err := syscall.Statfs(dir, &s); err != nil {
		return err
	}
	if free := float64(s.Bavail) * float64(s.Bsize); free < needed {
		return fmt.Errorf("%s: %.1f GB are free, and Kubernetes takes %.0f GB to compile and run", dir, free/1e9, needed/1e9)
	}
	return nil
}

// Overlayd makes an image of overlayd with this version in its programs, and returns its archive.
func (b Builder) Overlayd(ctx context.Context, version, name string) (string, error) {
	out := filepath.Join(b.Cache, "image", version)
	err := b.image(ctx, "build", "-root", b.Root, "-out", out, "-go", b.Go,
		"-arch", runtime.GOARCH, "-version", version, "-name", name)
	return filepath.Join(out, "overlayd-image-"+runtime.GOARCH+".tar"), err
}

// imageOf makes an image of one static program.
func (b Builder) imageOf(ctx context.Context, program, names, archive string) error {
	return b.image(ctx, "program", "-arch", runtime.GOARCH, "-name", names, program, archive)
}

// image runs the command that makes images.
func (b Builder) image(ctx context.Context, args ...string) error {
	return b.run(ctx, "dist/image", append([]string{"run", "."}, args...)...)
}

// program is [Builder.kept] for one program, which has the name of its directory.
func (b Builder) program(ctx context.Context, name, module, pkg, flags string) (string, error) {
	dir, err := b.kept(ctx, name, module, flags, pkg)
	return filepath.Join(dir, name), err
}

// kept compiles programs into a directory, see [Builder.once].
func (b Builder) kept(ctx context.Context, name, module, flags string, pkgs ...string) (string, error) {
	files := []string{filepath.Join(module, "go.mod"), filepath.Join(module, "go.sum")}
	for _, pkg := range pkgs {
		if strings.HasPrefix(pkg, ".") {
			files = append(files, filepath.Join(module, pkg, "main.go"))
		}
	}
	stamp, err := b.stamp(append(pkgs, flags, tags), files...)
	if err != nil {
		return "", err
	}
	return b.once(name, stamp, func(dir string) error { return b.compile(ctx, module, dir+"/", flags, pkgs...) })
}

// once makes a directory of the cache with what a function puts into it, unless it is there. An older directory of its
// name is removed.
func (b Builder) once(name, stamp string, fill func(dir string) error) (string, error) {
	dir := filepath.Join(b.Cache, name+"-"+stamp)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	old, err := filepath.Glob(filepath.Join(b.Cache, name+"-*"))
	if err != nil {
		return "", err
	}
	for _, o := range old {
		if err := os.RemoveAll(o); err != nil {
			return "", err
		}
	}
	part := dir + ".part"
	if err := os.Mkdir(part, 0o755); err != nil {
		return "", err
	}
	b.Note("making %s: some minutes the first time", name)
	start := time.Now()
	if err := fill(part); err != nil {
		return "", err
	}
	b.Note("made %s in %.0f s", name, time.Since(start).Seconds())
	return dir, os.Rename(part, dir)
}

// stamp is a hash of what programs are made from.
func (b Builder) stamp(how []string, files ...string) (string, error) {
	made := append([]string{runtime.Version(), runtime.GOARCH}, how...)
	for _, f := range files {
		raw, err := os.ReadFile(filepath.Join(b.Root, f))
		if err != nil {
			return "", err
		}
		made = append(made, string(raw))
	}
	sum := sha256.Sum256([]byte(strings.Join(made, "\x00")))
	return hex.EncodeToString(sum[:6]), nil
}

// tags leave out what containerd has for file systems that nothing here uses, and what needs C.
const tags = "no_btrfs,no_zfs,no_devmapper"

func (b Builder) compile(ctx context.Context, module, out, flags string, pkgs ...string) error {
	return b.run(ctx, module, append(append([]string{"build"}, compileArgs(flags, out)...), pkgs...)...)
}

func compileArgs(flags, out string) []string {
	return []string{"-buildvcs=false", "-trimpath", "-tags", tags, "-ldflags", flags, "-o", out}
}

func (b Builder) run(ctx context.Context, dir string, args ...string) error {
	c := exec.CommandContext(ctx, b.Go, args...)
	c.Dir = filepath.Join(b.Root, dir)
	c.Env = append(os.Environ(), "GOFLAGS=", "GOWORK=off", "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("in %s: go %s: %w\n%s", dir, strings.Join(args, " "), err, out)
	}
	return nil
}

// kubernetesFlags name the version, without which nodes would report v0.0.0.
func kubernetesFlags() string {
	major, rest, _ := strings.Cut(kubernetesVersion, ".")
	minor, _, _ := strings.Cut(rest, ".")
	flags := "-s -w"
	for _, v := range []string{
		"gitVersion=v" + kubernetesVersion, "gitMajor=" + major, "gitMinor=" + minor,
		"gitTreeState=clean", "gitCommit=" + strings.Repeat("0", 40), "buildDate=2026-01-01T00:00:00Z",
	} {
		flags += " -X k8s.io/component-base/version." + v
	}
	return flags
}
