package nodes

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// settings are those of the kernel that every kubelet sets (setupKernelTunables in its container manager). They are the
// machine's: the lab puts them back.
func settings() []string {
	return []string{
		"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys",
		"kernel/keys/root_maxbytes",
	}
}

func settingsFile(dir string) string { return filepath.Join(dir, "settings.json") }

// saveSettings notes what they are, also for a later run that removes what this one left.
func (l *Lab) saveSettings() error {
	was := map[string]string{}
	for _, name := range settings() {
		raw, err := os.ReadFile(filepath.Join("/proc/sys", name))
		if err != nil {
			return err
		}
		was[name] = strings.TrimSpace(string(raw))
	}
	raw, err := json.Marshal(was)
	if err != nil {
		return err
	}
	return os.WriteFile(settingsFile(l.Dir), raw, 0o644)
}

func restoreSettings(dir string) error {
	raw, err := os.ReadFile(settingsFile(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var was map[string]string
	if err == nil {
		err = json.Unmarshal(raw, &was)
	}
	for name, value := range was {
		err = errors.Join(err, os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0))
	}
	return err
}
