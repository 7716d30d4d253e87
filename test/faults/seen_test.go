package faults

import (
	"regexp"
	"slices"
	"testing"
)

// Enough rows of the short form say what is to be seen, in every area, and each of them what names the cause.
func TestSeen(t *testing.T) {
	t.Parallel()
	inShort, unready := 0, 0
	areas := map[Area]bool{}
	for _, f := range Catalogue(true) {
		s := f.Seen
		if s == nil {
			continue
		}
		if s.Status == "" && s.Doctor == "" {
			t.Errorf("%s: %s: nothing names the cause", f.Area, f.Name)
		}
		for _, pattern := range []string{s.Status, s.Doctor, s.Ready} {
			if _, err := regexp.Compile(pattern); err != nil {
				t.Errorf("%s: %s: %v", f.Area, f.Name, err)
			}
		}
		for _, text := range s.Metrics {
			if _, err := parseMetric(text); err != nil {
				t.Errorf("%s: %s: %v", f.Area, f.Name, err)
			}
		}
		if f.Short {
			inShort++
			areas[f.Area] = true
		}
		if f.Short && s.Ready != "" && len(s.Metrics) > 0 {
			unready++
		}
	}
	if inShort < 18 || unready < 15 || len(areas) < 6 {
		t.Errorf("%d rows of the short form say what is to be seen, %d of them that /readyz moves, in %d areas", inShort,
			unready, len(areas))
	}
}

func TestParseMetric(t *testing.T) {
	t.Parallel()
	for _, bad := range []string{
		"", "overlayd_ready", "overlayd_ready x", "ready 0", "overlayd_ready +", "overlayd_drift_reverted_total 3",
		"overlayd_drift_reverted_total more",
	} {
		if m, err := parseMetric(bad); err == nil {
			t.Errorf("%q is %+v", bad, m)
		}
	}
}

func TestMetric(t *testing.T) {
	t.Parallel()
	const before = `# HELP overlayd_ready 1 if all is well.
# TYPE overlayd_ready gauge
overlayd_ready 1
overlayd_ready_other 7
overlayd_drift_reverted_total{kind="route"} 4
overlayd_drift_reverted_total{kind="fdb"} 1
overlayd_problem{fatal="false",name="etcd"} 1
overlayd_leases_rejected{cause="nonsense"} 1e+04
`
	for _, c := range []struct {
		text        string
		value, then float64
		moved, back bool
	}{
		{"overlayd_ready 0", 1, 0, true, false},
		{"overlayd_ready 0", 1, 1, false, true},
		{`overlayd_drift_reverted_total{kind="route"} +`, 4, 5, true, true},
		{`overlayd_drift_reverted_total{kind="route"} +`, 4, 4, false, true},
		{`overlayd_drift_reverted_total{kind="route"} +`, 4, 3, false, false},
		{`overlayd_drift_reverted_total +`, 5, 6, true, true},
		{`overlayd_problem{name="etcd",fatal="false"} 1`, 1, 1, true, true},
		{`overlayd_problem{name="etcd",fatal="true"} 1`, 0, 1, true, false},
		{`overlayd_leases_rejected more`, 10000, 10001, true, false},
		{`overlayd_leases_rejected more`, 10000, 10000, false, true},
	} {
		m, err := parseMetric(c.text)
		if err != nil {
			t.Fatal(err)
		}
		if v := m.value(before); v != c.value {
			t.Errorf("%s: %g, want %g", c.text, v, c.value)
		}
		if moved, back := m.moved(c.value, c.then), m.isBack(c.value, c.then); moved != c.moved || back != c.back {
			t.Errorf("%s from %g to %g: moved %v, back %v", c.text, c.value, c.then, moved, back)
		}
	}
}

// A line that only got older is no new one.
func TestPlainLines(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]string{
		"Drift   route: 2, last add route 10.244.2.0/24 via 10.244.2.0, 657ms ago\n": "Drift route: 2, last add route 10.244.2.0/24 via 10.244.2.0, … ago",
		"etcd: refused by http://172.31.100.2:2379, for 1m5s":                        "etcd: refused by http://172.31.100.2:2379, for …",
		"Node n1 (id 3), overlayd v1, up 3 days":                                     "Node n1 (id 3), overlayd v1, up …",
		"Kernel reconciled 1.2s ago in 813µs, full resync 2h0m1s ago":                "Kernel reconciled … ago in …, full resync … ago",
		"overlayd does not answer within 5s":                                         "overlayd does not answer within 5s",
		"Device overlay.1, VNI 1, UDP 8472 over eth0, MTU 1450":                      "Device overlay.1, VNI 1, UDP 8472 over eth0, MTU 1450",
	} {
		if got, _ := plainLines(line, nil); len(got) != 1 || got[0] != want {
			t.Errorf("%q: %q, want %q", line, got, want)
		}
	}
}

// A row whose signs are not seen fails; a line that was there before is no sign.
func TestWatchMissing(t *testing.T) {
	t.Parallel()
	w, err := newWatch(nil, *degrades("etcd", "refused"))
	if err != nil {
		t.Fatal(err)
	}
	if out := w.missing(); len(out) != 3 {
		t.Errorf("nothing was seen, and only %q is missing", out)
	}
	w.note(w.Status, []string{"etcd: refused"}, []string{"etcd: refused"})
	w.note(w.Ready, []string{"200 ok", "200 degraded: plan: refused"}, nil)
	if out := w.missing(); len(out) != 3 {
		t.Errorf("nothing of it was seen, and only %q is missing", out)
	}
	w.note(w.Status, []string{"Problems etcd: refused"}, []string{"Problems none"})
	w.note(w.Ready, []string{"200 ok", "200 degraded: etcd: refused by x"}, nil)
	if out := w.missing(); !slices.Equal(out, w.Metrics) {
		t.Errorf("%q is missing", out)
	}
	if s := w.summary(); s != "Problems etcd: refused / 200 degraded: etcd: refused by x" {
		t.Error(s)
	}
}
