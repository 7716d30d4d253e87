package main_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/overlayd/overlayd/internal/owner"
	"github.com/overlayd/overlayd/test/lab"
	"github.com/overlayd/overlayd/test/labtest"
)

// restart gives a node's daemon more arguments.
func restart(t *testing.T, n *lab.Node, args ...string) {
	t.Helper()
	n.With(args...)
	stop(t, n)
	if err := errors.Join(n.Start(), n.WaitReady(t.Context())); err != nil {
		t.Fatal(err)
	}
}

// says waits until /readyz has a line that begins so, or, with "", has no line of a problem.
func says(t *testing.T, n *lab.Node, line, name string) {
	t.Helper()
	var code int
	var text string
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		code, text, _ = n.Readyz(t.Context())
		if line == "" && !strings.Contains(text, name+": ") || line != "" && strings.Contains(text, "\n"+line) {
			if code != 200 {
				t.Errorf("not ready: %s", text)
			}
			return
		}
	}
	t.Errorf("/readyz does not say %q of %s: %d %s", line, name, code, text)
}

// An initial config that is not the one in etcd is named, with both values, everywhere; written otherwise it is the
// same.
func TestOtherInitConfig(t *testing.T) {
	t.Parallel()
	l := labtest.Up(t, lab.Options{Backend: lab.VXLAN, Overlayd: labtest.BuildOverlayd(t), Nodes: 2, Pods: 1})
	n1 := l.Node(1)
	file := filepath.Join(t.TempDir(), "net-conf.json")
	give := func(config string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
			t.Fatal(err)
		}
		restart(t, n1, "--init-config", file)
	}
	give(`{"backend":{"TYPE":"vxlan"},  "NETWORK":"10.244.0.0/16","SubnetLen":24}`)
	says(t, n1, "", "init-config")
	give(`{"Network":"10.245.0.0/16","Backend":{"Type":"vxlan"}}`)
	const what = "Network is 10.244.0.0/16 in etcd, 10.245.0.0/16 in --init-config; etcd's is in use"
	says(t, n1, "degraded: init-config: "+what, "init-config")
	waitLog(t, n1, `condition failed	{"condition": "init-config", "error": "`+what)
	for _, command := range []string{"status", "doctor"} {
		args := []string{}
		if command == "doctor" {
			args = append(args, "--problems", "--init-config", file)
		}
		if out, _ := n1.Overlayd(t.Context(), command, args...); !strings.Contains(out, what) {
			t.Errorf("%s does not say it:\n%s", command, out)
		}
	}
	labtest.Check(t, l) // nothing has changed
}

// A CNI configuration of another program is reported as long as it precedes ours.
func TestOtherCNIConfiguration(t *testing.T) {
	t.Parallel()
	l := labtest.Up(t, lab.Options{Backend: lab.VXLAN, Overlayd: labtest.BuildOverlayd(t), Nodes: 2, Pods: 1})
	n1, dir := l.Node(1), t.TempDir()
	own, other := filepath.Join(dir, "10-overlayd.conflist"), filepath.Join(dir, "10-crio-bridge.conflist")
	write := func(file, text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(own, `{"name":"cbr0","plugins":[{"type":"overlay-cni"}]}`)
	restart(t, n1, "--cni-conf", own)
	says(t, n1, "", "cni-config")
	write(other, `{"name":"crio","plugins":[{"type":"bridge"}]}`)
	what := other + " (plugins: bridge) comes before 10-overlayd.conflist"
	says(t, n1, "degraded: cni-config: "+what, "cni-config")
	waitLog(t, n1, what)
	out, _ := n1.Overlayd(t.Context(), "doctor", "--problems", "--cni-conf", own)
	if !strings.Contains(out, what) || !strings.Contains(out, "fix: mv "+other) {
		t.Errorf("doctor does not say it:\n%s", out)
	}
	write(other, `{"name":"multus","type":"multus","clusterNetwork":"`+own+`"}`)
	says(t, n1, "", "cni-config")
	if err := os.Remove(own); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(other); err != nil {
		t.Fatal(err)
	}
	says(t, n1, "degraded: cni-config: "+own+" is missing", "cni-config")
}

// While the daemon of one installation is being restarted, that of another does not take its node, unless it is told to.
func TestSecondInstallation(t *testing.T) {
	t.Parallel()
	l := labtest.Up(t, lab.Options{Backend: lab.VXLAN, Overlayd: labtest.BuildOverlayd(t), Nodes: 2, Pods: 1})
	n1 := l.Node(1)
	restart(t, n1, "--owner", "one/overlayd")
	second := func(want string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		argv := n1.Argv()
		argv = append(argv[1:len(argv)-2], "--owner", "two/overlayd", "--healthz-port", "0")
		out, err := n1.Run(ctx, n1.Argv()[0], argv...)
		if err == nil || strings.Count(out, "\n") != 1 || !strings.Contains(out, want) {
			t.Errorf("expected %q, found %v:\n%s", want, err, out)
		}
	}
	second("of the installation one/overlayd")
	for _, end := range []func(context.Context) error{n1.Stop, n1.Kill} {
		if err := end(t.Context()); err != nil {
			t.Fatal(err)
		}
		second("this node belongs to the installation one/overlayd")
		if err := errors.Join(n1.Start(), n1.WaitReady(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
	restart(t, n1, "--owner", "two/overlayd", "--take-over", "one/overlayd")
	const tookOver = `took over this node	{"from": "one/overlayd", "owner": "two/overlayd"}`
	if log, err := os.ReadFile(n1.Log()); err != nil || !strings.Contains(string(log), tookOver) {
		t.Errorf("it is not logged: %v", err)
	}
	restart(t, n1, "--owner", "two/overlayd")
	// An installation that is gone is in the way for a day.
	stop(t, n1)
	yesterday := time.Now().Add(-25 * time.Hour)
	if err := os.Chtimes(owner.File(n1.StateDir()), yesterday, yesterday); err != nil {
		t.Fatal(err)
	}
	n1.With("--owner", "three/overlayd")
	if err := errors.Join(n1.Start(), n1.WaitReady(t.Context())); err != nil {
		t.Fatal(err)
	}
	stop(t, n1)
	out, err := n1.Overlayd(t.Context(), "cleanup", "--state-dir", n1.StateDir(), "--subnet-file", n1.SubnetFile())
	if err != nil || !strings.Contains(out, owner.File(n1.StateDir())) {
		t.Errorf("cleanup: %v\n%s", err, out)
	}
	restart(t, n1)
	labtest.Check(t, l)
}
