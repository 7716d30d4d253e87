package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const logHere = "LOG_HERE" // has the test program itself log, in the format that it names; "none": end with an error

// Under systemd a line has its priority and no time; elsewhere it is as ever.
func TestJournal(t *testing.T) {
	switch format := os.Getenv(logHere); format {
	case "":
	case "none":
		os.Args = []string{"overlayd", "--log-format", "xml"}
		os.Exit(run())
	default:
		f := flags{logLevel: zap.NewAtomicLevelAt(zap.DebugLevel), logFormat: format}
		log, err := f.logger()
		if err != nil {
			t.Fatal(err)
		}
		log.Debug("observed", zap.Int("n", 1))
		log.Info("overlayd starting")
		log.With(zap.String("node", "n1")).Warn("condition failed", zap.Error(errors.New("no\nanswer")))
		log.Error("two\n<0>lines\n")
		return
	}
	t.Parallel()
	const stamp = `\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z`
	for _, tt := range []struct {
		name, format string
		stream       func(dev, ino uint64) string
		want         []string // regular expressions, one for each line
	}{
		{"console", "console", same, []string{
			`<7>debug\tobserved\t\{"n": 1\}`, `<6>info\toverlayd starting`,
			`<4>warn\tcondition failed\t\{"node": "n1", "error": "no\\nanswer"\}`, `<3>error\ttwo`, `<3><0>lines`, `<3>`,
		}},
		{"json", "json", same, []string{
			`<7>\{"level":"debug","ts":"` + stamp + `","msg":"observed","n":1\}`,
			`<6>\{"level":"info".*"msg":"overlayd starting"\}`,
			`<4>\{"level":"warn".*"error":"no\\nanswer"\}`,
			`<3>\{"level":"error".*"msg":"two\\n<0>lines\\n"\}`,
		}},
		{
			"stderr is redirected", "console", func(dev, ino uint64) string { return fmt.Sprintf("%d:%d", dev, ino+1) },
			[]string{
				stamp + `\tdebug\tobserved\t\{"n": 1\}`, stamp + `\tinfo\toverlayd starting`,
				stamp + `\twarn\tcondition failed\t.*`,
				stamp + `\terror\ttwo`, `<0>lines`, ``,
			},
		},
		{"nonsense in JOURNAL_STREAM", "json", func(uint64, uint64) string { return "x" }, []string{
			`\{"level":"debug","ts":"` + stamp + `",.*`, `\{"level":"info",.*`, `\{"level":"warn",.*`, `\{"level":"error",.*`,
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got := strings.Split(strings.TrimSuffix(stderrOf(t, tt.stream, tt.format), "\n"), "\n")
			if len(got) != len(tt.want) {
				t.Fatalf("%d lines, want %d: %q", len(got), len(tt.want), got)
			}
			for i, want := range tt.want {
				if !regexp.MustCompile("^" + want + "$").MatchString(got[i]) {
					t.Errorf("line %d is %q, want %s", i, got[i], want)
				}
			}
		})
	}
	t.Run("an error that ends it", func(t *testing.T) {
		t.Parallel()
		if got := stderrOf(t, same, "none"); got != "<3>overlayd: --log-format: expected console or json, found \"xml\"\n" {
			t.Errorf("got %q", got)
		}
	})
}

func same(dev, ino uint64) string { return fmt.Sprintf("%d:%d", dev, ino) }

// stderrOf runs this program once more, whose stderr is a socket, as systemd's is, and returns what it wrote there.
func stderrOf(t *testing.T, stream func(dev, ino uint64) string, format string) string {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	defer ours.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fds[1], &st); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestJournal$")
	cmd.Env = append(os.Environ(), logHere+"="+format, "JOURNAL_STREAM="+stream(st.Dev, st.Ino))
	cmd.Stderr = theirs
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(ours)
	if err != nil {
		t.Error(err)
	}
	_ = cmd.Wait()
	return string(out)
}
