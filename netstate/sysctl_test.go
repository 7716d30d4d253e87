package netstate

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/overlayd/overlayd/addr"
)

// Settings are written where it is said, which is another place in a container.
func TestSysctlDir(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := Forwarding(addr.IPv4)
	path := filepath.Join(dir, s.Path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("0"), 0o644); err != nil {
		t.Fatal(err)
	}
	k := &Kernel{SysctlDir: dir}
	if err := k.writeSysctl(s); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "1" {
		t.Errorf("%q, %v", b, err)
	}
	if err := k.writeSysctl(Sysctl{"net/none", "1"}); err == nil {
		t.Error("a setting that is not there was written")
	}
}
