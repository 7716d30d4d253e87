// Command overlay-image builds the container image of overlayd.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/overlayd/overlayd/dist/image"
)

const usage = `Usage:
  overlay-image build [flags]   make overlayd-image-ARCH.tar and overlayd-image-ARCH.spdx.json
  overlay-image lock [flags]    take the newest versions of the Debian packages: rewrites packages.lock

flags:
`

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	f := flag.NewFlagSet("overlay-image", flag.ContinueOnError)
	root := f.String("root", ".", "the repository's `directory`")
	out := f.String("out", "bin", "`directory` for what is built, below the root if it is not a full path")
	arches := f.String("arch", "amd64,arm64", "`architectures`, separated by commas")
	version := f.String("version", "dev", "`version` of the programs")
	names := f.String("name", "ghcr.io/overlayd/overlayd", "`names` of the image, separated by commas; one without a tag has the version as its tag")
	goCommand := f.String("go", "go", "the go `command`")
	f.Usage = func() {
		_, _ = fmt.Fprint(f.Output(), usage)
		f.PrintDefaults()
	}
	if len(os.Args) < 2 {
		f.Usage()
		return 2
	}
	if err := f.Parse(os.Args[2:]); err != nil {
		return 2
	}
	var err error
	switch os.Args[1] {
	case "build":
		err = build(ctx, *root, *out, *arches, *version, *names, *goCommand)
	case "lock":
		err = image.WriteLock(ctx, filepath.Join(*root, "dist/image"), time.Now())
	default:
		f.Usage()
		return 2
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "overlay-image:", err)
		return 1
	}
	return 0
}

func build(ctx context.Context, root, out, arches, version, names, goCommand string) error {
	root, err := filepath.Abs(root)
	if err != nil {
		return err
	}
	if !filepath.IsAbs(out) {
		out = filepath.Join(root, out)
	}
	created, err := sourceDate(ctx, root)
	if err != nil {
		return err
	}
	for _, text := range strings.Split(arches, ",") {
		arch, err := image.ParseArch(text)
		if err != nil {
			return fmt.Errorf("-arch: %w", err)
		}
		start := time.Now()
		r, err := image.Build(ctx, image.Options{
			Root: root, Out: out, Cache: filepath.Join(out, "debian-packages"), Go: goCommand,
			Arch: arch, Version: version, Names: tagged(names, version), Created: created,
		})
		if err != nil {
			return fmt.Errorf("%s: %w", arch, err)
		}
		fmt.Printf("%s  %s  %.1f MB in %.1f s\n", r.Archive, r.Digest, mb(int(r.Size)), time.Since(start).Seconds())
		for _, l := range r.Layers {
			fmt.Printf("  %6.1f MB to load  %6.1f MB on a node  %s\n", mb(l.Packed), mb(l.Plain), l.What)
		}
	}
	return nil
}

func mb(bytes int) float64 { return float64(bytes) / 1e6 }

// tagged gives a tag to those names that have none.
func tagged(names, version string) []string {
	tag := regexp.MustCompile(`[^A-Za-z0-9_.-]`).ReplaceAllString(version, "-")
	var out []string
	for _, n := range strings.Split(names, ",") {
		if !strings.Contains(n[strings.LastIndex(n, "/")+1:], ":") {
			n += ":" + tag
		}
		out = append(out, n)
	}
	return out
}

// sourceDate is when the source was last changed: SOURCE_DATE_EPOCH, or the time of the last commit.
func sourceDate(ctx context.Context, root string) (time.Time, error) {
	text, ok := os.LookupEnv("SOURCE_DATE_EPOCH")
	if !ok {
		out, err := exec.CommandContext(ctx, "git", "-C", root, "log", "-1", "--format=%ct").Output()
		if err != nil {
			return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH is not set, and git does not know when the last commit was: %w", err)
		}
		text = strings.TrimSpace(string(out))
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH: expected seconds since 1970, found %q", text)
	}
	return time.Unix(n, 0).UTC(), nil
}
