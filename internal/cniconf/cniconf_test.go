package cniconf

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const ours = `{"cniVersion":"1.0.0","name":"cbr0","plugins":[{"type":"overlay-cni"},{"type":"portmap"}]}`

// What precedes ours and leads elsewhere is named, with its plugins; nothing else is.
func TestCheck(t *testing.T) {
	for _, x := range []struct {
		name  string
		files map[string]string
		want  string // in the error; "": none
	}{
		{"ours alone", nil, ""},
		{"others come later", map[string]string{"87-podman.conflist": `{"plugins":[{"type":"bridge"}]}`}, ""},
		{"not a configuration", map[string]string{"00-notes.txt": "x", "05-old.conflist.bak": "{}", "00-dir.conf/x": ""}, ""},
		{
			"a list",
			map[string]string{"10-flannel.conflist": `{"name":"cbr0","plugins":[{"type":"flannel"},{"type":"portmap"}]}`},
			"10-flannel.conflist (plugins: flannel, portmap) comes before 10-overlayd.conflist",
		},
		{"a single plugin", map[string]string{"05-x.conf": `{"name":"x","type":"bridge"}`}, "05-x.conf (plugins: bridge)"},
		{"the first one counts", map[string]string{"05-x.json": `{"type":"a"}`, "04-x.conf": `{"type":"b"}`}, "04-x.conf"},
		{"a broken one", map[string]string{"05-x.conf": `{`}, "05-x.conf (its plugins can't be read)"},
		{"Multus with ours as delegate", map[string]string{"00-multus.conf": `{"name":"multus","type":"multus",
			"delegates":[` + ours + `]}`}, ""},
		{"Multus with the path of ours", map[string]string{"00-multus.conf": `{"name":"multus","type":"multus-shim",
			"clusterNetwork":"/host/etc/cni/net.d/10-overlayd.conflist"}`}, ""},
		{"Multus with the name of ours", map[string]string{"00-multus.conf": `{"type":"multus","clusterNetwork":"10-overlayd"}`}, ""},
		{"Multus with the network of ours", map[string]string{"00-multus.conf": `{"type":"multus","clusterNetwork":"cbr0"}`}, ""},
		{"Multus with another network", map[string]string{"00-multus.conf": `{"type":"multus",
			"clusterNetwork":"/etc/cni/net.d/10-calico.conflist"}`}, "00-multus.conf (plugins: multus)"},
		{"ours with a plugin more", map[string]string{"05-mesh.conflist": strings.Replace(ours, `]`, `,{"type":"mesh"}]`, 1)}, ""},
	} {
		dir := t.TempDir()
		own := filepath.Join(dir, "10-overlayd.conflist")
		write(t, own, ours)
		for name, text := range x.files {
			write(t, filepath.Join(dir, name), text)
		}
		err := Check(own)
		if (err == nil) != (x.want == "") || err != nil && !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: found %v, expected %q", x.name, err, x.want)
		}
		if f := (*Foreign)(nil); err != nil && (!errors.As(err, &f) || filepath.Dir(f.File) != dir) {
			t.Errorf("%s: not a foreign configuration in %s: %#v", x.name, dir, err)
		}
	}
}

func TestMissing(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "87-podman.conflist"), `{"plugins":[{"type":"bridge"}]}`)
	for _, own := range []string{filepath.Join(dir, "10-overlayd.conflist"), filepath.Join(dir, "none", "10-overlayd.conflist")} {
		if err := Check(own); err == nil || errors.As(err, new(*Foreign)) {
			t.Errorf("%s is not there: %v", own, err)
		}
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// FuzzForeign: whatever stands in the files of other programs is judged.
func FuzzForeign(f *testing.F) {
	f.Add([]byte(`{"name":"a","delegates":[{"type":"overlay-cni"}]}`), []byte(`{"name":"cbr0","plugins":[{"type":"overlay-cni"}]}`))
	f.Add([]byte(`{"type":7,"plugins":{"a":[null]}}`), []byte(`[[[`))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, first, own []byte) {
		for name, raw := range map[string][]byte{"05-first.conf": first, "10-overlayd.conflist": own} {
			if err := os.WriteFile(filepath.Join(dir, name), raw, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		err := Check(filepath.Join(dir, "10-overlayd.conflist"))
		if foreign := (*Foreign)(nil); err != nil && !errors.As(err, &foreign) {
			t.Fatal(err)
		}
	})
}
