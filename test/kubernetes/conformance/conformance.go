// Package conformance runs the tests of Kubernetes itself, those of its network, on a cluster with overlayd.
package conformance

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/overlayd/overlayd/test/kubernetes/build"
	"github.com/overlayd/overlayd/test/kubernetes/cluster"
)

// Which tests are run: regular expressions on their names.
const (
	Focus = `\[sig-network\]`
	Skip  = `\[Slow\]|\[Disruptive\]|\[Serial\]|\[Feature:`
)

// within is how long all tests may take.
const within = 2 * time.Hour

// Run is one run of the tests. The cluster has overlayd, CoreDNS and routes from the control plane to the pods.
type Run struct {
	K           *cluster.Cluster
	Programs    build.Conformance
	Focus, Skip string // regular expressions on the names of the tests
	Parallel    int    // tests at a time
	Report      string // the file that JUnit's report goes to
	Out         io.Writer
}

// Do runs the tests, prints what came of them, and returns an error if one failed or none ran.
func (r Run) Do(ctx context.Context) error {
	for _, n := range r.K.Nodes {
		if err := n.Import(ctx, r.Programs.Images...); err != nil {
			return err
		}
	}
	dir := filepath.Join(r.K.Lab.Dir, "conformance")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	kubectl := filepath.Join(dir, "kubectl") // the program goes by the name it is started by
	if err := os.Symlink(r.K.Kubernetes, kubectl); err != nil {
		return err
	}
	p, err := r.K.Lab.Start(r.K.Lab.Control, "control", "ginkgo", "env", "HOME="+dir, r.Programs.Ginkgo, "run",
		"--no-color", "--procs="+strconv.Itoa(r.Parallel), "--timeout="+within.String(), "--poll-progress-after=60s",
		"--focus="+r.Focus, "--skip="+r.Skip, "--output-dir="+dir, "--junit-report=junit.xml", r.Programs.E2E, "--",
		"--provider=skeleton", "--kubeconfig="+r.K.AdminConfig(), "--kubectl-path="+kubectl, "--disable-log-dump",
		"--num-nodes="+strconv.Itoa(len(r.K.Nodes)), "--report-dir="+dir)
	if err != nil {
		return err
	}
	for !p.Ended() {
		select {
		case <-ctx.Done():
			p.Stop()
			return ctx.Err()
		case <-time.After(time.Second):
		}
	}
	raw, err := os.ReadFile(filepath.Join(dir, "junit.xml"))
	if err != nil {
		return fmt.Errorf("the tests ended without a report, see control-ginkgo.log: %w", err)
	}
	got, err := Read(raw)
	if err != nil {
		return err
	}
	got.print(r.Out)
	return errors.Join(got.Err(), os.WriteFile(r.Report, raw, 0o644))
}

// Result is what came of the tests.
type Result struct {
	Passed  []string
	Failed  []Test
	Skipped []Test // by themselves, since the cluster lacks what they need
}

// Test is one that did not pass, with why.
type Test struct{ Name, Why string }

// Read reads the report of Ginkgo in JUnit's form. It lists the tests that were left out by name, too.
func Read(junit []byte) (Result, error) {
	var report struct {
		Suites []struct {
			Cases []struct {
				Name    string `xml:"name,attr"`
				Status  string `xml:"status,attr"`
				Skipped *struct {
					Message string `xml:"message,attr"`
				} `xml:"skipped"`
				Failure *message `xml:"failure"`
				Error   *message `xml:"error"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
	if err := xml.Unmarshal(junit, &report); err != nil {
		return Result{}, fmt.Errorf("report of the tests: %w", err)
	}
	var out Result
	for _, s := range report.Suites {
		for _, c := range s.Cases {
			name, isTest := strings.CutPrefix(c.Name, "[It] ")
			switch why := c.Failure.or(c.Error); {
			case c.Status == "passed" && isTest:
				out.Passed = append(out.Passed, name)
			case c.Status == "passed", c.Skipped != nil && c.Skipped.Message == "skipped": // a set-up; left out by its name
			case c.Skipped != nil:
				out.Skipped = append(out.Skipped, Test{name, firstLine(c.Skipped.Message)})
			default: // also a set-up that failed, and a test that was interrupted or did not end in time
				out.Failed = append(out.Failed, Test{name, strings.TrimSpace(c.Status + ": " + firstLine(why))})
			}
		}
	}
	return out, nil
}

type message struct {
	Message string `xml:"message,attr"`
}

func (m *message) or(other *message) string {
	switch {
	case m != nil:
		return m.Message
	case other != nil:
		return other.Message
	}
	return ""
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}

// Err says which tests failed, if any.
func (r Result) Err() error {
	if len(r.Failed) > 0 {
		return fmt.Errorf("%d of %d tests failed", len(r.Failed), len(r.Failed)+len(r.Passed))
	}
	if len(r.Passed) == 0 {
		return errors.New("no test was run")
	}
	return nil
}

func (r Result) print(w io.Writer) {
	_, _ = fmt.Fprintf(w, "%d passed, %d failed, %d skipped themselves\n", len(r.Passed), len(r.Failed), len(r.Skipped))
	for _, t := range r.Failed {
		_, _ = fmt.Fprintf(w, "FAILED   %s\n         %s\n", t.Name, t.Why)
	}
	for _, t := range r.Skipped {
		_, _ = fmt.Fprintf(w, "skipped  %s\n         %s\n", t.Name, t.Why)
	}
}
