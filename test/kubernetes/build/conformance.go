package build

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// Conformance is what the tests of Kubernetes itself need beside [Built].
type Conformance struct {
	Ginkgo, E2E string   // programs: the runner, and the tests as a test binary
	Images      []string // archives, for the pods of the tests
}

// names of the images that the tests ask for, see test/utils/image in Kubernetes. Debian and agnhost stand in for all.
const (
	registry   = "registry.k8s.io/"
	testImages = registry + "e2e-test-images/"
	e2eImages  = testImages + "agnhost:2.63.0," + testImages + "agnhost:2.55," + testImages + "glibc-dns-testing:2.0.0," +
		testImages + "busybox:1.37.0-1," + testImages + "nginx:1.15-4," + testImages + "nginx:1.27-0," +
		registry + "build-image/distroless-iptables:v0.9.6," + registry + "pause:3.10.2"
	boomImage = testImages + "regression-issue-74839:1.4"
)

// e2ePackages are the Debian packages that the commands of the tests come from.
const e2ePackages = "ca-certificates,curl,wget,netcat-openbsd,bind9-dnsutils,iperf,iputils-ping,iproute2,conntrack,iptables,procps"

const (
	agnhost = "k8s.io/kubernetes/test/images/agnhost"
	boom    = "k8s.io/kubernetes/test/images/regression-issue-74839"
	module  = "test/kubernetes"
	e2eTest = "conformance/e2e" // the tests, in the module
)

// Conformance makes what the tests of Kubernetes need. CoreDNS is in [Built].
func (b Builder) Conformance(ctx context.Context, built Built) (Conformance, error) {
	if err := there("mmdebstrap", "mmdebstrap"); err != nil {
		return Conformance{}, err
	}
	programs, err := b.kept(ctx, "e2e-programs", module, "-s -w", "github.com/onsi/ginkgo/v2/ginkgo", agnhost, boom)
	if err != nil {
		return Conformance{}, err
	}
	stamp, err := b.stamp([]string{tags}, module+"/go.mod", module+"/go.sum", module+"/"+e2eTest+"/e2e_test.go")
	if err != nil {
		return Conformance{}, err
	}
	tests, err := b.once("e2e-tests", stamp, func(dir string) error {
		args := append([]string{"test", "-c", "-vet=off"}, compileArgs("-s -w", filepath.Join(dir, "e2e.test"))...)
		return b.run(ctx, module, append(args, "./"+e2eTest)...)
	})
	if err != nil {
		return Conformance{}, err
	}
	if stamp, err = b.stamp([]string{programs, built.coreDNS, e2eImages, boomImage, e2ePackages}); err != nil {
		return Conformance{}, err
	}
	images, err := b.once("e2e-images", stamp, func(dir string) error {
		if err := b.imageOf(ctx, filepath.Join(programs, filepath.Base(boom)), boomImage, filepath.Join(dir, "boom.tar")); err != nil {
			return err
		}
		root := filepath.Join(dir, "root.tar")
		if err := b.debian(ctx, programs, built.coreDNS, root); err != nil {
			return err
		}
		err := b.image(ctx, "root", "-arch", runtime.GOARCH, "-name", e2eImages, "-command", "/agnhost pause", root,
			filepath.Join(dir, "agnhost.tar"))
		if err != nil {
			return err
		}
		return os.Remove(root)
	})
	return Conformance{
		Ginkgo: filepath.Join(programs, "ginkgo"), E2E: filepath.Join(tests, "e2e.test"),
		Images: []string{filepath.Join(images, "agnhost.tar"), filepath.Join(images, "boom.tar")},
	}, err
}

// debian makes a tar with a small Debian and agnhost in it, as the Dockerfile of agnhost does with another distribution.
func (b Builder) debian(ctx context.Context, programs, coreDNS, file string) error {
	list := exec.CommandContext(ctx, b.Go, "list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes")
	list.Dir = filepath.Join(b.Root, module)
	source, err := list.Output()
	if err != nil {
		return fmt.Errorf("go list -m k8s.io/kubernetes: %w", err)
	}
	porter := filepath.Join(strings.TrimSpace(string(source)), "test/images/agnhost/porter")
	c := exec.CommandContext(ctx, "mmdebstrap", "--variant=essential", "--include="+e2ePackages,
		"--skip=output/dev,cleanup/apt/cache",
		"--customize-hook=copy-in "+filepath.Join(programs, "agnhost")+" "+coreDNS+" "+filepath.Join(porter, "localhost.crt")+
			" "+filepath.Join(porter, "localhost.key")+" /",
		`--customize-hook=ln -s agnhost "$1/agnhost-2"; mkdir "$1/uploads"`,
		`--customize-hook=cd "$1"; rm -rf usr/share/doc usr/share/locale usr/share/man var/cache/apt var/lib/apt/lists`,
		"bookworm", file)
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("mmdebstrap: %w\n%s", err, out)
	}
	return nil
}
