// Package bench measures overlayd as its users meet it: whole processes on a real kernel and a real etcd, beside a
// floor or a naive way that is measured in the same run. A figure here is a median; it is judged against a bound.
package bench

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Unit is what a row's figures are in.
type Unit string

// The units.
const (
	Millis   Unit = "ms"
	Micros   Unit = "µs"
	MB       Unit = "MB" // 10^6 bytes
	Bytes    Unit = "B"
	Count    Unit = "" // requests, changes, processes: the same on every machine
	PerTime  Unit = "at a time"
	Gbit     Unit = "Gbit/s"
	PerEvent Unit = "µs CPU/op"
)

// Row is one line of the result.
type Row struct {
	Group string // what was measured: "cold start"
	Name  string // and where: "5,000 peers: wall"
	Peers int    `json:",omitempty"` // the same number, for a curve
	Unit  Unit

	Ours []float64 // samples, in Unit
	// Base is what Ours is measured beside in the same run (BaseName: the floor program, a naive way), where there is
	// something.
	Base     []float64
	BaseName string

	Bound Bound
}

// row is a row without a bound; at names the number of peers, and the other methods what it is judged by.
func row(group, name string, u Unit, ours ...float64) Row {
	return Row{Group: group, Name: name, Unit: u, Ours: ours}
}

func (r Row) at(n int) Row {
	r.Peers, r.Name = n, peers(n)+": "+r.Name
	return r
}

func (r Row) beside(name string, base []float64) Row {
	r.BaseName, r.Base = name, base
	return r
}

func (r Row) atMost(limit float64) Row      { return r.judgedBy(Bound{"≤", limit, false}) }
func (r Row) ratioAtMost(limit float64) Row { return r.judgedBy(Bound{"≤", limit, true}) }

func (r Row) judgedBy(b Bound) Row {
	r.Bound = b
	return r
}

// Bound is what a row is judged by; the zero Bound judges nothing.
type Bound struct {
	Sense string // "≤" or "≥"
	Limit float64
	Ratio bool // the figure is the median of ours divided by that of the base, else the median of ours
}

// Median is the middle of some samples; NaN of none.
func Median(samples []float64) float64 { return Quantile(samples, 0.5) }

// Quantile is the smallest sample that a share q of all does not exceed; for the half, the mean of the two in the
// middle.
func Quantile(samples []float64, q float64) float64 {
	if len(samples) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(samples))
	if q == 0.5 && len(s)%2 == 0 {
		return (s[len(s)/2-1] + s[len(s)/2]) / 2
	}
	return s[min(max(int(math.Ceil(q*float64(len(s))))-1, 0), len(s)-1)]
}

// Value is what a row says: the median of ours.
func (r Row) Value() float64 { return Median(r.Ours) }

// Ratio is ours divided by the base; NaN where there is no base.
func (r Row) Ratio() float64 { return r.Value() / Median(r.Base) }

// Judged reports whether the row has a bound that counts: in a quick run, on a machine that does other things as well,
// only those on what does not depend on time.
func (r Row) Judged(quick bool) bool {
	return r.Bound != (Bound{}) && (!quick || r.Unit == Count || r.Unit == Bytes)
}

// OK reports whether the row keeps its bound. A figure that could not be had does not.
func (r Row) OK() bool {
	v := r.Value()
	if r.Bound.Ratio {
		v = r.Ratio()
	}
	switch r.Bound.Sense {
	case "≤":
		return v <= r.Bound.Limit
	case "≥":
		return v >= r.Bound.Limit
	}
	return true
}

func (b Bound) String() string {
	if b == (Bound{}) {
		return ""
	}
	unit := ""
	if b.Ratio {
		unit = " ×"
	}
	return b.Sense + " " + number(b.Limit) + unit
}

// number shows three digits, or all of a whole number; and thousands apart.
func number(v float64) string {
	switch {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return "?"
	case v == math.Trunc(v) || math.Abs(v) >= 1000:
		return thousands(strconv.FormatFloat(v, 'f', 0, 64))
	case math.Abs(v) >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case math.Abs(v) >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

func thousands(s string) string {
	sign := ""
	if strings.HasPrefix(s, "-") {
		sign, s = "-", s[1:]
	}
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return sign + s
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// peers names a number of them in a row.
func peers(n int) string { return fmt.Sprintf("%s peers", thousands(strconv.Itoa(n))) }
