package lab

import (
	"fmt"
	"os"
	"path/filepath"
)

// sysctl writes one value under /proc/sys/net of the calling thread's namespace.
func sysctl(key, value string) error {
	if err := os.WriteFile(filepath.Join("/proc/sys/net", key), []byte(value), 0); err != nil {
		return fmt.Errorf("set net/%s to %s: %w", key, value, err)
	}
	return nil
}

// sysctls writes pairs of key and value, in order, up to the first that fails.
func sysctls(pairs ...[2]string) error {
	for _, p := range pairs {
		if err := sysctl(p[0], p[1]); err != nil {
			return err
		}
	}
	return nil
}
