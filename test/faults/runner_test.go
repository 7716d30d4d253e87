package faults

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/overlayd/overlayd/test/bubble"
	"github.com/overlayd/overlayd/test/lab"
)

// fakeDaemon is one that says what it was told to.
type fakeDaemon struct {
	log     string // the file
	ready   string
	status  string
	doctor  string
	drift   string
	metrics string
}

func (d *fakeDaemon) Readyz(context.Context) (int, string, error)       { return 200, d.ready, nil }
func (d *fakeDaemon) Doctor(context.Context, ...string) (string, error) { return d.doctor, nil }
func (d *fakeDaemon) Log() string                                       { return d.log }
func (d *fakeDaemon) Overlayd(_ context.Context, _ string, args ...string) (string, error) {
	if len(args) > 0 {
		return d.drift, nil
	}
	return d.status, nil
}

func (d *fakeDaemon) Metrics(context.Context) (string, error) {
	return d.metrics, unless(d.metrics != "", "connection refused")
}

func (d *fakeDaemon) logs(line string) error {
	f, err := os.OpenFile(d.log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString("2026-01-02T03:04:05.000Z\twarn\t" + line + "\n")
	return errors.Join(err, f.Close())
}

func healthy(t *testing.T) *fakeDaemon {
	return &fakeDaemon{log: filepath.Join(t.TempDir(), "log"), ready: "ok", metrics: "overlayd_ready 1\n"}
}

func holds(context.Context, *Site) error    { return nil }
func violated(context.Context, *Site) error { return errors.New("violated") }

// A row that is as good as its bounds passes, and each promise that is broken fails it.
func TestRow(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(*Fault, *fakeDaemon)
		want  string // a part of the problem; "": none
	}{
		"nothing": {func(*Fault, *fakeDaemon) {}, ""},
		"Inject":  {func(f *Fault, _ *fakeDaemon) { f.Inject = violated }, "violated"},
		"Expect":  {func(f *Fault, _ *fakeDaemon) { f.Expect = violated }, "not within"},
		"Expect late": {func(f *Fault, _ *fakeDaemon) {
			f.Expect = func(_ context.Context, s *Site) error {
				return unless(time.Since(s.began) > f.Bound.Repair, "not yet")
			}
		}, "repaired after"},
		"Keeps":   {func(f *Fault, _ *fakeDaemon) { f.Keeps = violated }, "while it lasts: violated"},
		"Restore": {func(f *Fault, _ *fakeDaemon) { f.Restore = violated }, "end the fault: violated"},
		"Log":     {func(f *Fault, _ *fakeDaemon) { f.Log = "something else" }, "did not log /something else/"},
		"a flood": {func(f *Fault, _ *fakeDaemon) { f.Bound.Lines = 1 }, "2 log lines: at most 1"},
		"Log of another row": {func(f *Fault, d *fakeDaemon) {
			f.Log = "an earlier row"
		}, "did not log /an earlier row/"},
		"Ready":   {func(f *Fault, _ *fakeDaemon) { f.Seen.Ready = "^503" }, `not seen: ["^503"`},
		"Status":  {func(f *Fault, _ *fakeDaemon) { f.Seen.Status = "firewall" }, `not seen: ["firewall"]`},
		"Doctor":  {func(f *Fault, _ *fakeDaemon) { f.Seen.Doctor = "FAIL" }, "does not say /FAIL/"},
		"Metrics": {func(f *Fault, _ *fakeDaemon) { f.Seen.Metrics = []string{"overlayd_ready 7"} }, "not seen"},
		"metrics that do not come back": {func(f *Fault, d *fakeDaemon) {
			f.Restore = func(context.Context, *Site) error { d.ready, d.metrics = "ok", ""; return nil }
		}, "connection refused"},
		"what was there before": {func(_ *Fault, d *fakeDaemon) {
			d.status = "Problems etcd: refused"
		}, "not seen"},
		"signs that stay": {func(f *Fault, d *fakeDaemon) {
			f.Restore = func(context.Context, *Site) error { d.metrics = "overlayd_ready 1\n"; return nil }
		}, "/readyz does not say ok"},
		"a gauge that stays": {func(f *Fault, d *fakeDaemon) {
			f.Restore = func(context.Context, *Site) error { d.ready = "ok"; return nil }
		}, "it was 1, and is 0"},
		"a panic": {func(f *Fault, _ *fakeDaemon) {
			f.Expect = func(context.Context, *Site) error { panic("out of range") }
		}, "panic: out of range"},
		"drift that was logged before": {func(f *Fault, d *fakeDaemon) {
			f.Log = `reverted external change.*"route"`
			d.drift = `{"drift":[{"kind":"route","at":"2999-01-01T00:00:00Z"}]}`
		}, ""},
		"drift of another kind": {func(f *Fault, d *fakeDaemon) {
			f.Log = `reverted external change.*"route"`
			d.drift = `{"drift":[{"kind":"rule","at":"2999-01-01T00:00:00Z"}]}`
		}, "did not log"},
		"drift of another row": {func(f *Fault, d *fakeDaemon) {
			f.Log = `reverted external change.*"route"`
			d.drift = `{"drift":[{"kind":"route","at":"1999-01-01T00:00:00Z"}]}`
		}, "did not log"},
		"drift that was never logged": {func(f *Fault, d *fakeDaemon) {
			f.Log = `reverted external change.*"fdb"`
			d.drift = `{"drift":[{"kind":"fdb","at":"2999-01-01T00:00:00Z"}]}`
		}, "did not log"},
	} {
		t.Run(name, func(t *testing.T) {
			d := healthy(t)
			f := etcdGone(d)
			c.spoil(&f, d)
			before := errors.Join(d.logs("an earlier row"), d.logs(`reverted external change {"kind": "route"}`))
			if before != nil {
				t.Fatal(before)
			}
			got := problemsOf(t, f, d, holds)
			if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
				t.Errorf("the row's problems are %q: want %q", got, c.want)
			}
		})
	}
}

// problemsOf runs a row on a site without a lab; the clock is not the real one.
func problemsOf(t *testing.T, f Fault, d *fakeDaemon, whole Check) string {
	var r Result
	bubble.Test(t, func(t *testing.T) {
		s := &Site{Lab: &lab.Lab{}, Victim: &lab.Node{}, asked: d, whole: whole}
		r.guard(func() { s.run(t.Context(), f, &r) })
	})
	return strings.Join(r.Problems, "; ")
}

// etcdGone is a row of which all is seen.
func etcdGone(d *fakeDaemon) Fault {
	return Fault{
		Inject: func(context.Context, *Site) error {
			d.ready, d.status, d.metrics = "degraded: etcd: refused", "Problems etcd: refused", "overlayd_ready 0\n"
			return errors.Join(d.logs("condition failed etcd"), d.logs("more"))
		},
		Expect: holds, Hold: time.Millisecond, Keeps: holds,
		Restore: func(context.Context, *Site) error {
			d.ready, d.status, d.metrics = "ok", "", "overlayd_ready 1\n"
			return nil
		},
		Bound: Bound{Repair: 200 * time.Millisecond}, Log: "condition failed etcd",
		Seen: &Seen{
			Status: "etcd: refused", Ready: "^200 degraded: etcd", Metrics: []string{"overlayd_ready 0"},
			Within: 100 * time.Millisecond,
		},
	}
}

// What is not whole after the end of the fault fails the row.
func TestRowNotWhole(t *testing.T) {
	d := healthy(t)
	if got := problemsOf(t, etcdGone(d), d, violated); !strings.Contains(got, "not within") {
		t.Errorf("the row's problems are %q", got)
	}
}
