// Command overlay-cni is the CNI plugin of overlayd: it hands pods to bridge and host-local, with what the daemon wrote
// into subnet.env. A container runtime starts it; see Documentation/cni.md.
package main

import (
	"fmt"
	"os"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/overlayd/overlayd/cni"
)

// version is set by the linker: -X main.version=v1.2.3.
var version = "dev"

func main() { os.Exit(run()) }

func run() int {
	about := "overlay-cni " + version + ", the CNI plugin of overlayd; a container runtime starts it"
	failure := skel.PluginMainFuncsWithError(cni.New().Funcs(), cni.Versions(), about)
	if failure == nil {
		return 0
	}
	if err := failure.Print(); err != nil {
		fmt.Fprintln(os.Stderr, "overlay-cni:", err)
	}
	return 1
}
