package bench

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Result is what one run found.
type Result struct {
	When    time.Time
	Version string // of overlayd
	Machine Machine
	Quick   bool
	Rows    []Row
}

// Machine is what the figures depend on.
type Machine struct {
	CPU    string
	Cores  int
	Kernel string
	Go     string
}

func machine() Machine {
	m := Machine{Cores: runtime.NumCPU(), Go: runtime.Version()}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m.Kernel, _, _ = strings.Cut(strings.TrimSpace(string(b)), "-") // what follows names a build, not a kernel
	}
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if found := regexp.MustCompile(`(?m)^model name\s*: (.*)$`).FindSubmatch(b); found != nil {
			m.CPU = string(found[1])
		}
	}
	return m
}

// Failed lists the rows that do not keep their bounds.
func (r Result) Failed() []Row {
	var out []Row
	for _, row := range r.Rows {
		if row.Judged(r.Quick) && !row.OK() {
			out = append(out, row)
		}
	}
	return out
}

func (r Result) title() string {
	quick := ""
	if r.Quick {
		quick = ", quick: bounds on times are not judged"
	}
	return fmt.Sprintf("overlayd %s, %s; %s, %d cores, Linux %s, %s%s", r.Version, r.When.Format("2006-01-02 15:04 UTC"),
		r.Machine.CPU, r.Machine.Cores, r.Machine.Kernel, r.Machine.Go, quick)
}

func columns() []string {
	return []string{"", "", "unit", "ours", "range", "beside", "figure", "ratio", "bound", "ok"}
}

func (r Result) cells(row Row) []string {
	base, ratio, ok := "", "", ""
	if row.BaseName != "" {
		base, ratio = number(Median(row.Base)), number(row.Ratio())
	}
	if row.Judged(r.Quick) {
		ok = map[bool]string{true: "yes", false: "NO"}[row.OK()]
	}
	return []string{
		row.Group, row.Name, string(row.Unit), number(row.Value()), spread(row.Ours), row.BaseName, base,
		ratio, row.Bound.String(), ok,
	}
}

// spread shows the lowest and the highest sample.
func spread(samples []float64) string {
	if len(samples) < 2 {
		return ""
	}
	return number(Quantile(samples, 0)) + "–" + number(Quantile(samples, 1))
}

// Table is the result as Markdown with aligned columns, which a terminal shows as well.
func (r Result) Table() string {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# Results\n\n%s. Medians; what is beside ours was measured in the same run.\n\n", r.title())
	w := tabwriter.NewWriter(&b, 0, 0, 1, ' ', 0)
	line := func(cells []string) { _, _ = fmt.Fprintf(w, "| %s\t|\n", strings.Join(cells, "\t| ")) }
	line(columns())
	line(slices.Repeat([]string{"---"}, len(columns())))
	for _, row := range r.Rows {
		line(r.cells(row))
	}
	_ = w.Flush()
	return b.String()
}

// Write writes latest.json, latest.md and latest.svg into a directory.
func (r Result) Write(dir string) error {
	raw, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "latest.json"), append(raw, '\n'), 0o644); err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "latest.md"), []byte(r.Table()), 0o644),
		os.WriteFile(filepath.Join(dir, "latest.svg"), []byte(r.Plot()), 0o644))
}
