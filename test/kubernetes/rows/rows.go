// Package rows has what is proven on a cluster, each as a row of a table.
package rows

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/overlayd/overlayd/test/kubernetes/cluster"
)

// Suite is the rows with the cluster that they are about.
type Suite struct {
	K       *cluster.Cluster
	Store   string         // of overlayd: Etcd or Kubernetes
	Network string         // its network config
	Only    *regexp.Regexp // names of rows; nil is all
	Ingress bool           // the nodes have the image of the ingress controller
	Out     io.Writer
	Overlay Overlay // what the rows begin with
	Chart   Overlay // what they end with, once the other one is removed
	before  before  // overlayd came
	asked   bool    // a row that was asked for was run
	results []result
}

// Overlay brings overlayd to the cluster and takes it away.
type Overlay interface {
	// Install does it as a user would.
	Install(ctx context.Context) error
	// Upgrade takes another image, and returns when all nodes have it.
	Upgrade(ctx context.Context) error
	// Misconfigure gives it a wrong setting, as an operator does by mistake. Upgrade mends it.
	Misconfigure(ctx context.Context) error
	// Healthy tells what is wrong with it, on any node.
	Healthy(ctx context.Context) error
	// Forget takes a node that is gone for good out of the network.
	Forget(ctx context.Context, node string) error
	// Uninstall removes it, and returns when it is gone.
	Uninstall(ctx context.Context) error
}

// Stores of overlayd.
const (
	Etcd       = "etcd"
	Kubernetes = "kubernetes"
)

type result struct {
	name     string
	seconds  float64
	expected float64 // seconds on an idle machine; 0: no number is known
	lost     int     // packets; below 0: none were counted
	err      error
}

//go:embed manifests
var manifests embed.FS

func manifest(name string) (string, error) {
	raw, err := manifests.ReadFile("manifests/" + name)
	return string(raw), err
}

// none is the count of lost packets where none are counted.
const none = -1

// wants tells whether any of these rows is asked for.
func (s *Suite) wants(names ...string) bool {
	return s.Only == nil || slices.ContainsFunc(names, s.Only.MatchString)
}

// rowWithin is how long a row may take before it is taken to hang.
const rowWithin = 15 * time.Minute

// run runs a row, unless it is not asked for.
func (s *Suite) run(ctx context.Context, name string, f func(ctx context.Context) (lost int, err error)) {
	if s.wants(name) {
		s.asked = true
		s.row(ctx, name, f)
	}
}

// row runs a row and remembers what came of it.
func (s *Suite) row(ctx context.Context, name string, f func(ctx context.Context) (lost int, err error)) {
	if ctx.Err() != nil {
		return
	}
	start := time.Now()
	within, cancel := context.WithTimeout(ctx, rowWithin)
	defer cancel()
	lost, err := f(within)
	if ctx.Err() != nil {
		return // it was interrupted, and proves nothing
	}
	if err == nil && lost > 0 {
		err = fmt.Errorf("%d packets were lost", lost)
	}
	s.add(result{name: name, seconds: time.Since(start).Seconds(), lost: lost, err: err})
}

// timed is a row that records a time. Where it is longer than expected, the table says so; the machine may have been
// busy, so that the row fails for no time.
func (s *Suite) timed(name string, took, expected time.Duration) {
	s.add(result{name: name, seconds: took.Seconds(), expected: expected.Seconds(), lost: none})
}

func (s *Suite) add(r result) {
	s.results = append(s.results, r)
	r.print(s.Out)
}

// must is run for what all later rows need.
func (s *Suite) must(ctx context.Context, name string, f func(ctx context.Context) error) error {
	s.asked = s.asked || s.wants(name)
	s.row(ctx, name, func(ctx context.Context) (int, error) { return none, f(ctx) })
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if s.results[len(s.results)-1].err != nil {
		return errors.New("nothing else can be tried before this works: " + name)
	}
	return nil
}

// shown is how many lines of an error stand in the table.
const shown = 6

func (r result) print(w io.Writer) {
	lost, ok := "-", "ok"
	if r.expected > 0 && r.seconds > r.expected {
		ok = fmt.Sprintf("slow: %.0f s expected", r.expected)
	}
	if r.lost >= 0 {
		lost = fmt.Sprint(r.lost)
	}
	if r.err != nil {
		lines := strings.Split(r.err.Error(), "\n")
		if more := len(lines) - shown; more > 0 {
			lines = append(lines[:shown], fmt.Sprintf("and %d lines more", more))
		}
		ok = "FAILED: " + strings.Join(lines, "\n        ")
	}
	_, _ = fmt.Fprintf(w, "%-76s %8.1f %5s  %s\n", r.name, r.seconds, lost, ok)
}

// Head prints the head of the table.
func (s *Suite) Head() {
	_, _ = fmt.Fprintf(s.Out, "%-76s %8s %5s  %s\n", "ROW", "SECONDS", "LOST", "OK")
}

// Asked tells whether any row that was asked for has been run.
func (s *Suite) Asked() bool { return s.asked }

// Failed returns the names of the rows that failed.
func (s *Suite) Failed() []string {
	var out []string
	for _, r := range s.results {
		if r.err != nil {
			out = append(out, r.name)
		}
	}
	return out
}
