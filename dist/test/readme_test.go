package dist_test

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/kustomize/kyaml/yaml"
)

var update = flag.Bool("update", false, "write the table of values in the chart's README")

// The chart's README has a row for each value: its default, and its comment in values.yaml up to the first empty line.
func TestReadme(t *testing.T) {
	raw, err := os.ReadFile(filepath.Join(chartDir, "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	doc, err := yaml.Parse(string(raw))
	if err != nil {
		t.Fatal(err)
	}
	const head = "| value | default | what it is |\n|---|---|---|\n"
	file := filepath.Join(chartDir, "README.md")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	before, _, ok := strings.Cut(string(text), head)
	if !ok {
		t.Fatalf("%s has no table that begins with\n%s", file, head)
	}
	want := before + head + rows(t, "", doc.YNode())
	if *update {
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if d := cmp.Diff(want, string(text)); d != "" && !*update {
		t.Errorf("values.yaml - + README.md (-update):\n%s", d)
	}
}

// rows has one for each key with a comment; a mapping whose keys have comments has none.
func rows(t *testing.T, path string, mapping *yaml.Node) string {
	t.Helper()
	out := ""
	for i := 0; i < len(mapping.Content); i += 2 {
		key, value := mapping.Content[i], mapping.Content[i+1]
		at := path + strings.ReplaceAll(key.Value, ".", `\.`)
		comment, _, _ := strings.Cut(strings.ReplaceAll(key.HeadComment, "#\n", "\n"), "\n\n")
		comment = strings.Join(strings.Fields(strings.ReplaceAll("\n"+comment, "\n#", "\n")), " ")
		commented := value.Kind == yaml.MappingNode && len(value.Content) > 0 && value.Content[0].HeadComment != ""
		if comment == "" && !commented {
			t.Errorf("%s has no comment", at)
		}
		if comment != "" {
			flow := ""
			if !commented {
				flow = "`" + inOneLine(t, value) + "`"
			}
			out += "| `" + at + "` | " + flow + " | " + strings.ReplaceAll(comment, "|", `\|`) + " |\n"
		}
		if commented {
			out += rows(t, at+".", value)
		}
	}
	return out
}

// inOneLine is a value as it can be written behind its key.
func inOneLine(t *testing.T, value *yaml.Node) string {
	t.Helper()
	v := yaml.NewRNode(value).Copy().YNode()
	var flow func(n *yaml.Node)
	flow = func(n *yaml.Node) {
		if n.Kind != yaml.ScalarNode {
			n.Style = yaml.FlowStyle
		}
		n.HeadComment, n.LineComment, n.FootComment = "", "", ""
		for _, c := range n.Content {
			flow(c)
		}
	}
	flow(v)
	raw, err := yaml.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(strings.Fields(string(raw)), " ")
}
