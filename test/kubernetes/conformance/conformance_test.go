package conformance

import (
	"slices"
	"testing"
)

const junit = `<?xml version="1.0" encoding="UTF-8"?>
<testsuites tests="6" failures="1" errors="2">
 <testsuite name="Kubernetes e2e suite" tests="6">
  <testcase name="[SynchronizedBeforeSuite]" status="passed"></testcase>
  <testcase name="[It] [sig-network] DNS works" status="passed"></testcase>
  <testcase name="[It] [sig-storage] left out" status="skipped"><skipped message="skipped"></skipped></testcase>
  <testcase name="[It] [sig-network] needs a cloud" status="skipped"><skipped message="skipped - no cloud&#xA;x"></skipped></testcase>
  <testcase name="[It] [sig-network] Services fail" status="failed"><failure message="no answer&#xA;more" type="failed"></failure></testcase>
  <testcase name="[It] [sig-network] is slow" status="timedout"><error message="A suite timeout occurred" type="timedout"></error></testcase>
  <testcase name="[SynchronizedAfterSuite]" status="interrupted"><error message="" type="interrupted"></error></testcase>
 </testsuite>
</testsuites>`

func TestRead(t *testing.T) {
	t.Parallel()
	got, err := Read([]byte(junit))
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"[sig-network] DNS works"}; !slices.Equal(got.Passed, want) {
		t.Errorf("passed: %q", got.Passed)
	}
	if want := []Test{{"[sig-network] needs a cloud", "skipped - no cloud"}}; !slices.Equal(got.Skipped, want) {
		t.Errorf("skipped: %q", got.Skipped)
	}
	want := []Test{
		{"[sig-network] Services fail", "failed: no answer"},
		{"[sig-network] is slow", "timedout: A suite timeout occurred"},
		{"[SynchronizedAfterSuite]", "interrupted:"},
	}
	if !slices.Equal(got.Failed, want) {
		t.Errorf("failed: %q", got.Failed)
	}
	if err := got.Err(); err == nil || err.Error() != "3 of 4 tests failed" {
		t.Errorf("%v", err)
	}
}

// A run in which the pattern fits no test has proven nothing.
func TestNothingRan(t *testing.T) {
	t.Parallel()
	if err := (Result{}).Err(); err == nil {
		t.Error("no error")
	}
	if _, err := Read([]byte("cut off <")); err == nil {
		t.Error("no error for a report that is cut off")
	}
}
