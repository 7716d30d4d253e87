package lab_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/test/lab"
	"github.com/overlayd/overlayd/test/labtest"
	"github.com/overlayd/overlayd/test/nstest"
)

func TestMain(m *testing.M) {
	if os.Getenv(standInEnv) != "" {
		os.Exit(standIn(os.Args[1:]))
	}
	os.Exit(labtest.Main(m))
}

// ip runs the ip command, or fails the test.
func ip(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %v: %v: %s", args, err, out)
	}
}

// sleeper starts a process, in a namespace where one is named, and ends it with the test.
func sleeper(t *testing.T, ns string) *exec.Cmd {
	t.Helper()
	argv := []string{"sleep", "60"}
	if ns != "" {
		argv = append([]string{"ip", "netns", "exec", ns}, argv...)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	return cmd
}

// A lab that crashed half way leaves anything behind: Down removes it, and touches nothing else, even where a pid file
// names a process that is not the lab's.
func TestDownCleansUpAfterACrash(t *testing.T) {
	t.Parallel()
	nstest.NeedRoot(t)
	name := labtest.Name()
	dir := filepath.Join("/run/overlay-lab", name)
	ip(t, "netns", "add", name+"-n1")
	ip(t, "netns", "add", name+"-n1-p1")
	other := name + "-2-n1" // of a lab called NAME-2
	ip(t, "netns", "add", other)
	t.Cleanup(func() { ip(t, "netns", "del", other) })
	if err := os.WriteFile(filepath.Join("/run/netns", name+"-n2"), nil, 0o444); err != nil { // created, not yet mounted
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	inside, outside, neighbour := sleeper(t, name+"-n1-p1"), sleeper(t, ""), sleeper(t, other)
	pid := strconv.Itoa(outside.Process.Pid)
	if err := os.WriteFile(filepath.Join(dir, "n1.pid"), []byte(pid), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, on := range []string{"n1/state", "n1/state", "n1"} { // over each other, and one around them
		if err := os.MkdirAll(filepath.Join(dir, on), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("none", filepath.Join(dir, on), "tmpfs", unix.MS_RDONLY, "size=8k"); err != nil {
			t.Fatal(err)
		}
	}
	waitForLeftovers(t, name, 5) // three names, the process, the directory

	if err := lab.Down(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	waitForLeftovers(t, name, 0)
	if err := inside.Wait(); err == nil {
		t.Error("the process inside was not killed")
	}
	for what, cmd := range map[string]*exec.Cmd{"outside": outside, "in another lab": neighbour} {
		if _, err := os.Readlink("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/ns/net"); err != nil {
			t.Errorf("the process %s is gone: %v", what, err)
		}
	}
	if err := lab.Down(context.Background(), name); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

func waitForLeftovers(t *testing.T, name string, want int) {
	t.Helper()
	var left []string
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		var err error
		if left, err = lab.Leftovers(name); err != nil {
			t.Fatal(err)
		}
		if len(left) == want {
			return
		}
	}
	t.Fatalf("left behind: %v, want %d", left, want)
}
