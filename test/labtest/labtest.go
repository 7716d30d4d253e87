// Package labtest lets tests have a lab. A package that uses it hands its TestMain to [Main].
package labtest

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/test/lab"
	"github.com/overlayd/overlayd/test/nstest"
)

// Main is what TestMain does, and gives the exit status:
//
//	func TestMain(m *testing.M) { os.Exit(labtest.Main(m)) }
//
// The lab starts its etcd by starting the running executable again, which in a test is the test binary; Main makes that
// one serve etcd.
func Main(m *testing.M) int {
	if len(os.Args) < 2 || os.Args[1] != lab.EtcdCommand {
		_ = os.RemoveAll(builds()) // of a process that had the same number, and was killed
		defer func() { _ = os.RemoveAll(builds()) }()
		return m.Run()
	}
	lab.EtcdMain(os.Args[2:])
	return 0
}

// builds is where the programs are that this process has built for its tests; Main removes it.
func builds() string {
	return filepath.Join(os.TempDir(), fmt.Sprintf("overlayd-tests-%d", os.Getpid()))
}

// BuildOverlayd returns the path of the daemon, which the first test that asks builds for all of its package. They only
// run it: none changes the file.
func BuildOverlayd(t testing.TB) string {
	t.Helper()
	path, err := buildOverlayd()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func buildOverlayd() (path string, err error) {
	dir := builds()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	lock, err := os.Open(dir)
	if err != nil {
		return "", err
	}
	defer lock.Close() // which unlocks it
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", fmt.Errorf("lock %s: %w", dir, err)
	}
	path = filepath.Join(dir, "overlayd")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	cmd := exec.Command("go", "build", "-o", path, "github.com/overlayd/overlayd/cmd/overlayd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build overlayd: %w\n%s", err, out)
	}
	return path, nil
}

// Name makes up the name of a lab that no other test uses.
func Name() string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails
	return fmt.Sprintf("t%d-%x", os.Getpid(), b)
}

// Up brings a lab up for one test and takes it down at its end. What the options leave open is filled in: a name of its
// own, and an overlayd built from this tree. When the test has failed, the ends of all logs are shown.
func Up(t testing.TB, o lab.Options) *lab.Lab {
	t.Helper()
	nstest.NeedRoot(t)
	if o.Name == "" {
		o.Name = Name()
	}
	if o.Overlayd == "" {
		o.Overlayd = BuildOverlayd(t)
	}
	if o.Progress == nil {
		o.Progress = func(line string) { t.Log(line) }
	}
	t.Cleanup(func() { takeDown(t, o.Name) })
	l, err := lab.Up(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { showLogs(t, l) })
	return l
}

func takeDown(t testing.TB, name string) {
	if err := lab.Down(context.Background(), name); err != nil {
		t.Errorf("take the lab down: %v", err)
	}
	left, err := lab.Leftovers(name)
	if err != nil {
		t.Errorf("look for leftovers: %v", err)
	}
	if len(left) > 0 {
		t.Errorf("the lab left behind: %s", strings.Join(left, ", "))
	}
}

const logTail = 4 << 10

func showLogs(t testing.TB, l *lab.Lab) {
	if !t.Failed() {
		return
	}
	logs := []string{l.Etcd().Log()}
	for _, n := range l.Nodes() {
		logs = append(logs, n.Log())
	}
	for _, path := range logs {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Logf("%v", err)
			continue
		}
		t.Logf("the end of %s:\n%s", path, b[max(0, len(b)-logTail):])
	}
}

// Check runs the matrix and fails the test with every cell that failed.
func Check(t testing.TB, l *lab.Lab) lab.Report {
	t.Helper()
	report, err := l.Check(t.Context(), lab.Settle)
	if err != nil {
		t.Fatal(err)
	}
	if report.Failed > 0 {
		t.Errorf("the matrix:\n%s", report.Text())
	}
	return report
}
