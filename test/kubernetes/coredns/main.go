// Command coredns is CoreDNS with the plugins that a cluster's DNS needs, and without those for clouds, which take
// minutes to compile.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
	_ "github.com/coredns/coredns/plugin/cache" // each registers itself
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/hosts" // for a test of Kubernetes itself, as is log
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/log"
	_ "github.com/coredns/coredns/plugin/ready"
)

func main() {
	// in the order in which they see a query
	dnsserver.Directives = []string{"errors", "log", "health", "ready", "cache", "hosts", "kubernetes"}
	coremain.Run()
}
