package metrics

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const (
	rulesTest = "../../dist/prometheus/alerts_test.yaml"
	rulesFile = "../../dist/helm/overlayd/files/alerts.yaml"
	dashboard = "../../dist/helm/overlayd/files/dashboard.json"
	document  = "../../Documentation/metrics.md"
)

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The table of the documentation says of each metric what the code says.
func TestDocumentation(t *testing.T) {
	t.Parallel()
	own, _ := all(t)
	const head = "| metric | type | labels | meaning |\n|---|---|---|---|\n"
	want := ""
	for _, name := range slices.Sorted(maps.Keys(own)) {
		labels := slices.Sorted(slices.Values(own[name].labels))
		for _, m := range table() {
			if m.name == name {
				labels = m.labels
			}
		}
		want += fmt.Sprintf("| `%s` | %s | %s | %s |\n", name, own[name].kind, strings.Join(labels, ", "), own[name].help)
	}
	text := read(t, document)
	before, rest, ok := strings.Cut(text, head)
	end := strings.Index(rest, "\n\n") + 1
	if !ok || end == 0 {
		t.Fatalf("%s has no table that begins with\n%s", document, head)
	}
	if *update {
		if err := os.WriteFile(document, []byte(before+head+want+rest[end:]), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	has := slices.Collect(strings.Lines(rest[:end]))
	for line := range strings.Lines(want) {
		if !slices.Contains(has, line) {
			t.Errorf("%s lacks the line (-update)\n%s", document, line)
		}
	}
	for _, line := range has {
		if !strings.Contains(want, line) {
			t.Errorf("%s has a line for what is not there (-update)\n%s", document, line)
		}
	}
}

// Every alert is explained in the documentation, and no other is.
func TestDocumentedAlerts(t *testing.T) {
	t.Parallel()
	want := alerts(t)
	found := regexp.MustCompile("(?m)^\\| `(Overlayd\\w+)` \\| (page|ticket) \\|").
		FindAllStringSubmatch(read(t, document), -1)
	got := map[string]string{}
	for _, m := range found {
		got[m[1]] = m[2]
	}
	if !maps.Equal(got, want) {
		t.Errorf("%s has %v, %s has %v", document, got, rulesFile, want)
	}
}

// alerts are the severities by alert.
func alerts(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, m := range regexp.MustCompile(`(?s)- alert: (\w+)\n.*?severity: (\w+)\n`).FindAllStringSubmatch(read(t,
		rulesFile), -1) {
		out[m[1]] = m[2]
	}
	if n := strings.Count(read(t, rulesFile), "- alert:"); n == 0 || n != len(out) {
		t.Fatalf("%d alerts, %d of them with a severity", n, len(out))
	}
	return out
}

func TestRules(t *testing.T) {
	t.Parallel()
	promtool(t, "", "check", "rules", rulesFile)
	promtool(t, "", "test", "rules", rulesTest)
	tests := read(t, rulesTest)
	mentions(t, rulesFile, read(t, rulesFile))
	mentions(t, rulesTest, tests)
	for a := range alerts(t) {
		if !regexp.MustCompile(`(?:exp_samples: .*|- )[{']*labels: '[^']*alertname="` + a + `"`).MatchString(tests) {
			t.Errorf("no test has %s fire", a)
		}
	}
}

// The runbooks that alerts name are there.
func TestRunbooks(t *testing.T) {
	t.Parallel()
	const at = "https://github.com/overlayd/overlayd/blob/main/"
	rules := read(t, rulesFile)
	found := regexp.MustCompile(`runbook_url: (\S+)`).FindAllStringSubmatch(rules, -1)
	if len(found) != len(alerts(t)) {
		t.Errorf("%d runbooks for %d alerts", len(found), len(alerts(t)))
	}
	for _, m := range found {
		file, anchor, ok := strings.Cut(strings.TrimPrefix(m[1], at), "#")
		if !ok || !slices.Contains(anchors(read(t, "../../"+file)), anchor) {
			t.Errorf("%s: %s has no such heading", m[1], file)
		}
	}
}

// anchors are the ends of the links to a document's headings, as GitHub makes them.
func anchors(markdown string) []string {
	var out []string
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(markdown, -1) {
		a := regexp.MustCompile(`[^a-z0-9 _-]`).ReplaceAllString(strings.ToLower(m[1]), "")
		out = append(out, strings.ReplaceAll(a, " ", "-"))
	}
	return out
}

var (
	metricName = regexp.MustCompile(`\b(?:overlayd|go|process)_[a-z0-9_]+\b`)
	selector   = regexp.MustCompile(`\b(overlayd_[a-z0-9_]+)\{([^}]*)\}`)
	matcher    = regexp.MustCompile(`([a-z]+)(=~|!~|!=|=)\\?"([^"\\]*)\\?"`)
)

// mentions holds a text with expressions against the metrics that there are: their names, labels, and the values of
// labels that are words of our own.
func mentions(t *testing.T, where, text string) {
	t.Helper()
	own, rest := all(t)
	for _, name := range metricName.FindAllString(text, -1) {
		known := own
		if !strings.HasPrefix(name, "overlayd_") {
			known = rest
		}
		if _, ok := known[base(name, known)]; !ok {
			t.Errorf("%s: there is no metric %s", where, name)
		}
	}
	for _, s := range selector.FindAllStringSubmatch(text, -1) {
		f := own[base(s[1], own)]
		for _, m := range matcher.FindAllStringSubmatch(s[2], -1) {
			label, op, value := m[1], m[2], m[3]
			if label == "job" || label == "instance" {
				continue
			}
			if !slices.Contains(f.labels, label) {
				t.Errorf("%s: %s has no label %s", where, s[1], label)
			}
			for word := range strings.SplitSeq(value, "|") {
				if label == "name" || label == "network" || op == "=" && strings.HasPrefix(word, "$") {
					continue // problems are the agent's, networks the config's
				}
				if !slices.ContainsFunc(f.samples, func(s string) bool { return strings.Contains(s, label+`="`+word+`"`) }) {
					t.Errorf("%s: %s never has %s=%q", where, s[1], label, word)
				}
			}
		}
	}
}

// panel is what the test looks at in a panel of a dashboard.
type panel struct {
	ID         int
	Type       string
	Title      string
	Datasource struct{ UID string }
	GridPos    struct{ H, W, X, Y int }
	Targets    []struct {
		Expr       string
		Datasource struct{ UID string }
	}
}

func TestDashboard(t *testing.T) {
	t.Parallel()
	var d struct {
		Title, UID string
		Panels     []panel
		Templating struct {
			List []struct {
				Name  string
				Query json.RawMessage
			}
		}
	}
	text := read(t, dashboard)
	if err := json.Unmarshal([]byte(text), &d); err != nil {
		t.Fatal(err)
	}
	mentions(t, dashboard, strings.ReplaceAll(text, `\"`, `"`))
	var variables []string
	for _, v := range d.Templating.List {
		variables = append(variables, v.Name)
	}
	if !slices.Equal(variables, []string{"datasource", "job", "node"}) {
		t.Errorf("variables: %v", variables)
	}
	var rows, exprs []string
	for i, p := range d.Panels {
		for _, q := range d.Panels[:i] {
			a, b := p.GridPos, q.GridPos
			if p.ID == q.ID || a.X < b.X+b.W && b.X < a.X+a.W && a.Y < b.Y+b.H && b.Y < a.Y+a.H {
				t.Errorf("panels %q and %q: same ID, or one lies on the other", q.Title, p.Title)
			}
		}
		if p.Type == "row" {
			rows = append(rows, p.Title)
			continue
		}
		if p.Title == "" || p.Datasource.UID != "${datasource}" || len(p.Targets) == 0 || p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("panel %d, %q: without title, variable data source or query, or too wide", p.ID, p.Title)
		}
		for _, q := range p.Targets {
			exprs = append(exprs, q.Expr)
			if q.Datasource.UID != "${datasource}" {
				t.Errorf("panel %q has another data source", p.Title)
			}
		}
	}
	if len(rows) != 6 {
		t.Errorf("rows: %q", rows)
	}
	promtool(t, "", "check", "rules", "--lint=none", asRules(t, exprs))
}

// asRules writes expressions down as recording rules: that is how promtool reads them.
func asRules(t *testing.T, exprs []string) (file string) {
	t.Helper()
	values := strings.NewReplacer("$__rate_interval", "5m", "$job", "overlayd", "$node", "n1:8471")
	text := "groups:\n- name: dashboard\n  rules:\n"
	for i, e := range exprs {
		q, err := json.Marshal(values.Replace(e)) // JSON is YAML
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(q), "$") {
			t.Errorf("an unknown variable: %s", e)
		}
		text += fmt.Sprintf("  - record: x:e%d\n    expr: %s\n", i, q)
	}
	file = filepath.Join(t.TempDir(), "dashboard.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
