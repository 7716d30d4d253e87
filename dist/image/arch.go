package main

import "fmt"

// arch is a processor architecture, as Go and Debian both name it.
type arch string

const (
	amd64 arch = "amd64"
	arm64 arch = "arm64"
)

func (a arch) check() error {
	if a != amd64 && a != arm64 {
		return fmt.Errorf("-arch: expected amd64 or arm64, found %q", string(a))
	}
	return nil
}

// triplet is how Debian names the directory of libraries.
func (a arch) triplet() string {
	if a == arm64 {
		return "aarch64-linux-gnu"
	}
	return "x86_64-linux-gnu"
}
