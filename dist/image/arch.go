package image

import "fmt"

// Arch is a processor architecture, as Go and Debian both name it.
type Arch string

// The architectures that images are built for.
const (
	AMD64 Arch = "amd64"
	ARM64 Arch = "arm64"
)

// ParseArch reads an architecture from a flag.
func ParseArch(s string) (Arch, error) {
	switch a := Arch(s); a {
	case AMD64, ARM64:
		return a, nil
	}
	return "", fmt.Errorf("expected amd64 or arm64, found %q", s)
}

// triplet is how Debian names the directory of libraries.
func (a Arch) triplet() string {
	if a == ARM64 {
		return "aarch64-linux-gnu"
	}
	return "x86_64-linux-gnu"
}
