package bench

import (
	"encoding/binary"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func TestQuantiles(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		samples []float64
		q, want float64
	}{
		{[]float64{3}, 0.5, 3},
		{[]float64{4, 1, 3, 2}, 0.5, 2.5},
		{[]float64{9, 1, 5}, 0.5, 5},
		{[]float64{5, 4, 3, 2, 1}, 0.99, 5},
		{[]float64{5, 4, 3, 2, 1}, 0, 1},
		{[]float64{5, 4, 3, 2, 1}, 0.2, 1},
	} {
		if got := Quantile(tt.samples, tt.q); got != tt.want {
			t.Errorf("quantile %v of %v is %v, want %v", tt.q, tt.samples, got, tt.want)
		}
	}
	if !math.IsNaN(Median(nil)) {
		t.Error("the median of nothing is a number")
	}
}

// A bound is judged by the median or the ratio; what depends on time is not judged in a quick run; and no figure keeps
// no bound.
func TestBounds(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		row    Row
		ok     bool
		quick  bool // judged in a quick run
		bounds string
	}{
		{Row{Unit: Millis, Ours: []float64{1, 9, 5}, Bound: Bound{"≤", 5, false}}, true, false, "≤ 5"},
		{Row{Unit: Millis, Ours: []float64{6, 9, 5}, Bound: Bound{"≤", 5, false}}, false, false, "≤ 5"},
		{Row{Unit: Count, Ours: []float64{0}, Bound: Bound{"≤", 0, false}}, true, true, "≤ 0"},
		{Row{Unit: Count, Ours: []float64{1}, Bound: Bound{"≤", 0, false}}, false, true, "≤ 0"},
		{Row{Unit: PerTime, Ours: []float64{6}, Bound: Bound{"≤", 5, false}}, false, false, "≤ 5"},
		{Row{Unit: Millis, Ours: []float64{6}, Base: []float64{10}, Bound: Bound{"≤", 0.6, true}}, true, false, "≤ 0.60 ×"},
		{Row{Unit: Gbit, Ours: []float64{9}, Base: []float64{10}, Bound: Bound{"≥", 0.95, true}}, false, false, "≥ 0.95 ×"},
		{Row{Unit: Millis, Bound: Bound{"≤", 5, false}}, false, false, "≤ 5"},
		{Row{Unit: Gbit, Bound: Bound{"≥", 0, true}}, false, false, "≥ 0 ×"},
	} {
		if tt.row.OK() != tt.ok || tt.row.Judged(true) != tt.quick || !tt.row.Judged(false) ||
			tt.row.Bound.String() != tt.bounds {
			t.Errorf("%+v: ok %v, judged %v, %s", tt.row, tt.row.OK(), tt.row.Judged(true), tt.row.Bound)
		}
	}
	if (Row{Ours: []float64{1}}).Judged(false) {
		t.Error("a row without a bound is judged")
	}
}

func TestNumbers(t *testing.T) {
	t.Parallel()
	for v, want := range map[float64]string{
		0: "0", 12: "12", 0.523: "0.52", 12.34: "12.3", 345.6: "346",
		1234567: "1,234,567", 1234.5: "1,234", math.NaN(): "?", -1000: "-1,000",
	} {
		if got := number(v); got != want {
			t.Errorf("%v is shown as %s, want %s", v, got, want)
		}
	}
}

func TestResultFiles(t *testing.T) {
	t.Parallel()
	r := Result{Version: "v1", Rows: []Row{
		{
			Group: coldStart, Name: "100 peers: " + execToReady, Peers: 100, Unit: Millis, Ours: []float64{50, 60},
			Base: []float64{11}, BaseName: "a floor", Bound: Bound{"≤", 52, false},
		},
		{Group: "idle", Name: "processes", Unit: Count, Ours: []float64{0}, Bound: Bound{"≤", 0, false}},
	}}
	dir := t.TempDir()
	if err := r.Write(dir); err != nil {
		t.Fatal(err)
	}
	var back Result
	raw, err := os.ReadFile(filepath.Join(dir, "latest.json"))
	if err == nil {
		err = json.Unmarshal(raw, &back)
	}
	if err != nil || len(back.Rows) != 2 || back.Rows[0].Value() != 55 || back.Rows[0].OK() || !back.Rows[1].OK() {
		t.Errorf("%v, %+v from\n%s", err, back, raw)
	}
	md, _ := os.ReadFile(filepath.Join(dir, "latest.md"))
	plain := regexp.MustCompile(` +`).ReplaceAllString(string(md), " ")
	for _, want := range []string{"| 55 | 50–60 | a floor | 11 | 5 | ≤ 52 | NO |", "| 0 | | | | | ≤ 0 | yes |"} {
		if !strings.Contains(plain, want) {
			t.Errorf("latest.md has no %q:\n%s", want, md)
		}
	}
	svg, _ := os.ReadFile(filepath.Join(dir, "latest.svg"))
	for d := xml.NewDecoder(strings.NewReader(string(svg))); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("latest.svg: %v", err)
		}
	}
	if n := strings.Count(string(svg), "<circle"); n != 1 {
		t.Errorf("latest.svg has %d points", n)
	}
	if failed := r.Failed(); len(failed) != 1 || failed[0].Group != coldStart {
		t.Errorf("failed: %+v", failed)
	}
}

func TestPayload(t *testing.T) {
	t.Parallel()
	p := make([]byte, 120)
	p[0], p[9], p[24+12] = 4<<4|6, 6, 8<<4 // IPv4 with an option, TCP with options
	binary.BigEndian.PutUint16(p[2:], 1500)
	binary.BigEndian.PutUint16(p[24:], 6443)
	if got := payload(6443, p); got != 1500-24-32 {
		t.Errorf("%d bytes", got)
	}
	for _, other := range [][]byte{nil, p[:30], p[:19]} {
		if got := payload(6443, other); got != 0 {
			t.Errorf("%d bytes of %d", got, len(other))
		}
	}
	if payload(2379, p) != 0 {
		t.Error("another port")
	}
}
