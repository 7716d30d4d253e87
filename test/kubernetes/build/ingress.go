package build

import (
	"context"
	"path/filepath"
	"runtime"
)

// IngressImage is the name of the image with the ingress controller.
const IngressImage = "localhost/traefik:test"

// Ingress makes the image of the ingress controller, and returns its archive.
func (b Builder) Ingress(ctx context.Context) (string, error) {
	program, err := b.program(ctx, "traefik", "test/kubernetes/traefik", ".", "-s -w")
	if err != nil {
		return "", err
	}
	archive := filepath.Join(b.Cache, "traefik.tar")
	return archive, b.image(ctx, "program", "-arch", runtime.GOARCH, "-name", IngressImage, program, archive)
}
