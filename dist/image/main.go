// Command image builds the container image of overlayd: from scratch, without a container daemon, the same bit by bit
// each time. It holds our own programs, the reference CNI plugins, and iptables with what it needs from Debian.
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
)

const usage = `Usage:
  image build [flags]                      make overlayd-image-ARCH.tar and overlayd-image-ARCH.spdx.json
  image program [flags] PROGRAM ARCHIVE    make an image of one static program, for the tests on a cluster
  image root [flags] TAR ARCHIVE           make an image of a root file system, likewise
  image lock [flags]                       take the newest versions of the Debian packages: rewrites packages.lock

flags:
`

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	var o options
	f := flag.NewFlagSet("image", flag.ContinueOnError)
	f.StringVar(&o.root, "root", "../..", "the repository's `directory`")
	f.StringVar(&o.out, "out", "bin", "`directory` for what is built, below the root if it is not a full path")
	f.StringVar(&o.version, "version", "dev", "`version` of the programs")
	f.StringVar(&o.goCommand, "go", "go", "the go `command`")
	arches := f.String("arch", "amd64,arm64", "`architectures`, separated by commas")
	names := f.String("name", "ghcr.io/overlayd/overlayd",
		"`names` of the image, separated by commas; one without a tag has the version as its tag")
	command := f.String("command", "", "what the image of a root file system runs: a `program` and its arguments")
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
	o.names = tagged(*names, o.version)
	var err error
	switch verb := os.Args[1]; {
	case verb == "build" && f.NArg() == 0:
		err = buildAll(ctx, o, *arches)
	case verb == "program" && f.NArg() == 2:
		_, err = program(arch(*arches), f.Arg(0), f.Arg(1), o.names)
	case verb == "root" && f.NArg() == 2:
		_, err = root(arch(*arches), f.Arg(0), f.Arg(1), o.names, strings.Fields(*command))
	case verb == "lock" && f.NArg() == 0:
		err = writeLock(ctx, filepath.Join(o.root, "dist/image"), time.Now())
	default:
		f.Usage()
		return 2
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		return 1
	}
	return 0
}

// buildAll makes the image of each architecture, and prints what it made.
func buildAll(ctx context.Context, o options, arches string) error {
	var err error
	if o.root, err = filepath.Abs(o.root); err != nil {
		return err
	}
	if !filepath.IsAbs(o.out) {
		o.out = filepath.Join(o.root, o.out)
	}
	o.cache = filepath.Join(o.out, "debian-packages")
	if o.created, err = sourceDate(ctx, o.root); err != nil {
		return err
	}
	for _, name := range strings.Split(arches, ",") {
		o.arch = arch(name)
		if err := o.arch.check(); err != nil {
			return err
		}
		start := time.Now()
		r, err := build(ctx, o)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		fmt.Printf("%s  %s  %.1f MB in %.1f s\n", r.archive, r.digest, mb(r.size), time.Since(start).Seconds())
		for _, l := range r.layers {
			fmt.Printf("  %6.1f MB to load  %6.1f MB on a node  %s\n", mb(l.packed), mb(l.plain), l.what)
		}
	}
	return nil
}

func mb(bytes int64) float64 { return float64(bytes) / 1e6 }

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
			return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH is not set, and git gives no time of the last commit: %w", err)
		}
		text = strings.TrimSpace(string(out))
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH: expected seconds since 1970, found %q", text)
	}
	return time.Unix(n, 0).UTC(), nil
}
