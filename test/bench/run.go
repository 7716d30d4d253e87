package bench

import (
	"context"
	"fmt"
	"regexp"
	"time"
)

// Env is what a benchmark is given: how thorough to be, where the programs are, and where its rows go.
type Env struct {
	Quick    bool // few samples, small tables: for seeing that it works and that the counts are right
	Overlayd string
	Progress func(line string)

	rows []Row
}

// Add adds rows to the result.
func (e *Env) Add(rows ...Row) {
	for _, r := range rows {
		e.Progress(fmt.Sprintf("  %s, %s: %s %s", r.Group, r.Name, number(r.Value()), r.Unit))
	}
	e.rows = append(e.rows, rows...)
}

// pick is one of two values, by how thorough to be.
func pick[T any](e *Env, full, quick T) T {
	if e.Quick {
		return quick
	}
	return full
}

// benchmark is one of the things that are measured. Each cleans up after itself.
type benchmark struct {
	name string
	run  func(ctx context.Context, e *Env) error
}

func benchmarks() []benchmark {
	return []benchmark{
		{"compute", compute},
		{"start", start},
		{"running", running},
		{"program", program},
		{"dataplane", dataplane},
		{"herd", herd},
		{"kube", kube},
	}
}

// Run runs the benchmarks whose names match, one after the other: they would take each other's time. One that fails
// ends it; the rows so far are returned.
func Run(ctx context.Context, e *Env, only *regexp.Regexp) (Result, error) {
	res := Result{When: time.Now().UTC().Round(time.Second), Quick: e.Quick, Machine: machine()}
	for _, b := range benchmarks() {
		if only != nil && !only.MatchString(b.name) {
			continue
		}
		began := time.Now()
		e.Progress(b.name)
		err := b.run(ctx, e)
		res.Rows = e.rows
		if err != nil {
			return res, fmt.Errorf("%s: %w", b.name, err)
		}
		e.Progress(fmt.Sprintf("%s: took %v", b.name, time.Since(began).Round(100*time.Millisecond)))
	}
	return res, nil
}
