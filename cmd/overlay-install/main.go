// Command overlay-install puts the CNI plugins and their configuration on a Kubernetes node, and takes them away again.
// The init containers of dist/kubernetes run it; it may do so again and again.
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
  overlay-install install     install the CNI plugins and their configuration
  overlay-install uninstall   remove what was installed
  overlay-install wait        sleep until SIGTERM
  overlay-install version     print the version

flags of install and uninstall:
`

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	var n node
	f := flag.NewFlagSet("overlay-install", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&n.binDir, "bin-dir", "/host/opt/cni/bin", "`directory` of the container runtime's plugins")
	f.StringVar(&n.confDir, "conf-dir", "/host/etc/cni/net.d", "`directory` of its network configurations")
	f.StringVar(&n.confName, "conf-name", "10-overlayd.conflist",
		"`name` of overlayd's configuration; the runtime uses the first in alphabetical order")
	f.StringVar(&n.stateDir, "state-dir", "/var/lib/overlayd", "`directory` to record what was installed")
	from := f.String("from", "/opt/cni/bin", "source `directory` of the plugins")
	conf := f.String("conf", "/etc/overlayd/cni.conflist", "source `file` of the configuration")
	f.StringVar(&n.owner, "owner", os.Getenv("OVERLAYD_OWNER"),
		"this `installation`: leave nodes of another one alone; as that of overlayd (install)")
	f.StringVar(&n.takeOver, "take-over", os.Getenv("OVERLAYD_TAKE_OVER"),
		"`owner` of another installation whose nodes this one takes over (install)")
	f.StringVar(&n.cniState, "cni-state-dir", "/host/var/lib/cni",
		"`directory` of the plugins' container state (uninstall)")
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
