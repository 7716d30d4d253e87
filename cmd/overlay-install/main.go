// Command overlay-install puts the CNI plugins and their configuration on a Kubernetes node, and takes them away again. The init
// containers of dist/kubernetes run it; it may do so again and again.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// version is set by the linker: -X main.version=v1.2.3.
var version = "dev"

const (
	exitFailure = 1
	exitUsage   = 2 // something given is wrong
)

const usage = `Usage:
  overlay-install install     put the CNI plugins and their configuration in place
  overlay-install uninstall   remove what install put there
  overlay-install wait        do nothing until told to end
  overlay-install version     print the version

flags of install and uninstall:
`

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	var n node
	f := flag.NewFlagSet("overlay-install", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&n.binDir, "bin-dir", "/host/opt/cni/bin", "`directory` where the container runtime looks for plugins")
	f.StringVar(&n.confDir, "conf-dir", "/host/etc/cni/net.d", "`directory` where it looks for configurations")
	f.StringVar(&n.confName, "conf-name", "10-overlayd.conflist", "`name` of ours; the runtime takes the first in alphabetical order")
	f.StringVar(&n.stateDir, "state-dir", "/var/lib/overlayd", "`directory` to remember in what was installed")
	from := f.String("from", "/opt/cni/bin", "`directory` with the plugins to install")
	conf := f.String("conf", "/etc/overlayd/cni.conflist", "`file` with the configuration to install")
	f.StringVar(&n.cniState, "cni-state-dir", "/host/var/lib/cni", "`directory` where plugins remember their containers (uninstall)")
	f.Usage = func() {
		_, _ = fmt.Fprint(stderr, usage)
		f.PrintDefaults()
	}
	if len(args) == 0 {
		f.Usage()
		return exitUsage
	}
	if err := f.Parse(args[1:]); err != nil {
		return exitUsage
	}
	if f.NArg() > 0 {
		_, _ = fmt.Fprintf(stderr, "overlay-install: expected flags only, found %q\n", f.Arg(0))
		return exitUsage
	}
	n.out = stdout
	var err error
	switch args[0] {
	case "install":
		err = n.install(*from, *conf)
	case "uninstall":
		err = n.uninstall(removeBridge)
	case "wait":
		ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
		defer stop()
		<-ctx.Done()
	case "version":
		_, _ = fmt.Fprintln(stdout, version)
	default:
		f.Usage()
		return exitUsage
	}
	if err != nil {
		_, _ = fmt.Fprintln(stderr, "overlay-install:", err)
		return exitFailure
	}
	return 0
}
