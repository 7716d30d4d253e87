package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"

	"github.com/overlayd/overlayd/internal/owner"
	"github.com/overlayd/overlayd/test/nstest"
)

const conflist = `{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "overlay-cni"}, {"type": "portmap"}]}`

// rig is a node, and an image to install from, as directories.
type rig struct {
	t          *testing.T
	node       node
	from, conf string
	out        *bytes.Buffer
	bridges    []string // that were removed
	busy       error    // why none can be
}

func newRig(t *testing.T) *rig {
	t.Helper()
	dir := t.TempDir()
	r := &rig{t: t, from: filepath.Join(dir, "image"), conf: filepath.Join(dir, "cni.conflist"), out: new(bytes.Buffer)}
	r.node = node{
		binDir: filepath.Join(dir, "bin"), confDir: filepath.Join(dir, "conf"), confName: "10-overlayd.conflist",
		stateDir: filepath.Join(dir, "state"), cniState: filepath.Join(dir, "cni"), out: r.out,
	}
	r.image("one")
	r.write(r.conf, conflist)
	return r
}

func (r *rig) write(path, text string) {
	r.t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		r.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		r.t.Fatal(err)
	}
}

// image is one in which every plugin says which version it is.
func (r *rig) image(version string) {
	r.t.Helper()
	for _, p := range []string{"overlay-cni", "bridge", "host-local", "portmap"} {
		r.write(filepath.Join(r.from, p), p+" "+version)
	}
}

func (r *rig) install() {
	r.t.Helper()
	r.out.Reset()
	if err := r.node.install(r.from, r.conf); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) uninstall() {
	r.t.Helper()
	r.out.Reset()
	if err := r.node.uninstall(r.removeBridge); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) removeBridge(name string) error {
	if r.busy != nil {
		return r.busy
	}
	r.bridges = append(r.bridges, name)
	return nil
}

// has compares all files of the node with what is expected, and their modes with what a runtime needs.
func (r *rig) has(want map[string]string) {
	r.t.Helper()
	got := map[string]string{}
	for _, dir := range []string{r.node.binDir, r.node.confDir} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			r.t.Fatal(err)
		}
		for _, e := range entries {
			raw, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				r.t.Fatal(err)
			}
			got[e.Name()] = string(raw)
			info, err := e.Info()
			if err != nil {
				r.t.Fatal(err)
			}
			if dir == r.node.binDir && info.Mode().Perm() != 0o755 {
				r.t.Errorf("%s: mode %v", e.Name(), info.Mode())
			}
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		r.t.Errorf("expected - + found:\n%s", d)
	}
}

func installed(version string) map[string]string {
	out := map[string]string{"10-overlayd.conflist": conflist}
	for _, p := range []string{"overlay-cni", "bridge", "host-local", "portmap"} {
		out[p] = p + " " + version
	}
	return out
}

// What is installed is there, a second time nothing is written, an upgrade replaces it, and uninstalling leaves
// nothing.
func TestInstall(t *testing.T) {
	r := newRig(t)
	r.install()
	r.has(installed("one"))
	before := r.inodes()
	r.install()
	if r.out.Len() > 0 {
		t.Errorf("a second time:\n%s", r.out)
	}
	after := r.inodes()
	for name, info := range before {
		if !os.SameFile(info, after[name]) {
			t.Errorf("%s was written again, and was as it should be", name)
		}
	}
	if len(before) != len(installed("")) {
		t.Errorf("expected all files, found %d", len(before))
	}
	r.image("two")
	r.install()
	r.has(installed("two"))
	r.write(filepath.Join(r.node.cniState, "networks", "pods", "10.244.1.2"), "x")
	r.uninstall()
	r.has(map[string]string{})
	for _, dir := range []string{r.node.stateDir, filepath.Join(r.node.cniState, "networks")} {
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("left in %s: %v %v", dir, left, err)
		}
	}
	if !slices.Equal(r.bridges, []string{"cni0"}) {
		t.Errorf("removed the bridges %q", r.bridges)
	}
	r.uninstall() // nothing is there any more
}

func (r *rig) inodes() map[string]os.FileInfo {
	out := map[string]os.FileInfo{}
	for name := range installed("") {
		for _, dir := range []string{r.node.binDir, r.node.confDir} {
			if info, err := os.Stat(filepath.Join(dir, name)); err == nil {
				out[name] = info
			}
		}
	}
	return out
}

// Plugins that came with the system stay, at install, upgrade and uninstall; so do ours that were replaced.
func TestOthersPlugins(t *testing.T) {
	r := newRig(t)
	r.write(filepath.Join(r.node.binDir, "bridge"), "the distribution's")
	r.write(filepath.Join(r.node.binDir, "firewall"), "foreign")
	r.install()
	want := installed("one")
	want["bridge"], want["firewall"] = "the distribution's", "foreign"
	r.has(want)
	if !strings.Contains(r.out.String(), "bridge, which overlay-install did not install") {
		t.Errorf("nothing is said of it:\n%s", r.out)
	}
	r.write(filepath.Join(r.node.binDir, "portmap"), "a newer one")
	r.write(filepath.Join(r.node.binDir, "overlay-cni"), "an old one")
	r.image("two")
	r.install()
	want = installed("two")
	want["bridge"], want["firewall"], want["portmap"] = "the distribution's", "foreign", "a newer one"
	r.has(want)
	r.write(filepath.Join(r.node.binDir, "host-local"), "the operator's")
	r.uninstall()
	r.has(map[string]string{
		"bridge": "the distribution's", "firewall": "foreign", "portmap": "a newer one",
		"host-local": "the operator's",
	})
}

// A plugin that is a link to where nothing is mounted here is foreign, at install, upgrade and uninstall; but ours
// is never a link.
func TestLinks(t *testing.T) {
	r := newRig(t)
	dir := t.TempDir()
	theirs := filepath.Join(dir, "bridge")
	r.write(theirs, "bridge one") // as ours, but elsewhere
	link := func(target, name string) {
		t.Helper()
		_ = os.Remove(filepath.Join(r.node.binDir, name))
		if err := os.Symlink(target, filepath.Join(r.node.binDir, name)); err != nil {
			t.Fatal(err)
		}
	}
	isLink := func(name string) bool {
		_, err := os.Readlink(filepath.Join(r.node.binDir, name))
		return err == nil
	}
	if err := os.MkdirAll(r.node.binDir, 0o755); err != nil {
		t.Fatal(err)
	}
	link("/usr/lib/cni/none/portmap", "portmap")
	link("/usr/lib/cni/none/tuning", "tuning")
	link(filepath.Join(r.from, "overlay-cni"), "overlay-cni")
	r.write(r.conf, `{"name": "pods", "plugins": [{"type": "overlay-cni"}, {"type": "portmap"}, {"type": "tuning"}]}`)
	r.install()
	if !isLink("portmap") || !isLink("tuning") || isLink("overlay-cni") || isLink("bridge") {
		t.Errorf("portmap %v, tuning %v, overlay-cni %v, bridge %v", isLink("portmap"), isLink("tuning"),
			isLink("overlay-cni"), isLink("bridge"))
	}
	if !strings.Contains(r.out.String(), "portmap, which overlay-install did not install") {
		t.Errorf("nothing is said of it:\n%s", r.out)
	}
	link(theirs, "bridge") // that was ours
	link("/usr/lib/cni/none/host-local", "host-local")
	r.uninstall()
	for _, name := range []string{"portmap", "tuning", "bridge", "host-local"} {
		if !isLink(name) {
			t.Errorf("%s is not there any more\n%s", name, r.out)
		}
	}
	if _, err := os.Lstat(filepath.Join(r.node.binDir, "overlay-cni")); !os.IsNotExist(err) {
		t.Error(err)
	}
}

// A configuration under another name takes the place of the one before, and uninstalling knows it.
func TestConfName(t *testing.T) {
	r := newRig(t)
	r.write(filepath.Join(r.node.confDir, "05-other.conflist"), "{}")
	r.install()
	r.node.confName = "20-pods.conflist"
	want := installed("one")
	want["05-other.conflist"], want["20-pods.conflist"] = "{}", conflist
	delete(want, "10-overlayd.conflist")
	for range 2 {
		r.install()
		r.has(want)
	}
	r.node.confName = "10-overlayd.conflist"
	r.install()
	if !strings.Contains(r.out.String(), "removed "+filepath.Join(r.node.confDir, "20-pods.conflist")) {
		t.Errorf("nothing is said of it:\n%s", r.out)
	}
	r.node.confName = "30-pods.conflist"
	r.uninstall()
	r.has(map[string]string{"05-other.conflist": "{}"})
	if len(r.bridges) != 1 {
		t.Errorf("bridges %q\n%s", r.bridges, r.out)
	}
}

// A record that can't be read says nothing of what is ours.
func TestBrokenRecord(t *testing.T) {
	for text, warned := range map[string]bool{
		`{`: true, `{"plugins": 1}`: true, `null`: false,
		`{"plugins": null}`: false,
	} {
		r := newRig(t)
		r.install()
		r.write(filepath.Join(r.node.stateDir, recordName), text)
		r.install()
		if strings.Contains(r.out.String(), "warning: ") != warned ||
			!strings.Contains(r.out.String(), "portmap, which overlay-install did not install") {
			t.Errorf("%s:\n%s", text, r.out)
		}
		r.has(installed("one"))
	}
}

// A crash at any moment leaves nothing that the next run does not take for ours.
func TestCrash(t *testing.T) {
	r := newRig(t)
	r.install()
	r.image("two")
	// As it is between the record and the file: the record names both.
	ours, err := r.node.readRecord()
	if err != nil {
		t.Fatal(err)
	}
	ours.Plugins["bridge"] = []string{hash([]byte("bridge two")), hash([]byte("bridge one"))}
	if err := r.node.writeRecord(ours); err != nil {
		t.Fatal(err)
	}
	r.write(filepath.Join(r.node.binDir, ".bridge123"), "bridge tw")
	r.install()
	r.has(installed("two"))
	// As it is between the removal of the configuration and the rest.
	if err := r.node.uninstall(func(string) error { return errors.New("no") }); err == nil {
		t.Fatal("expected an error")
	}
	r.uninstall()
	r.has(map[string]string{})
	if !slices.Equal(r.bridges, []string{"cni0"}) {
		t.Errorf("removed the bridges %q", r.bridges)
	}
}

// A configuration that can't work never replaces one that does.
func TestBadConf(t *testing.T) {
	own := func(keys string) string {
		return `{"name": "a", "plugins": [{"type": "portmap"}, {"type": "overlay-cni", ` + keys + `}]}`
	}
	for text, wrong := range map[string]string{
		`{`:                                      "not a CNI configuration list",
		`{"plugins": [{"type": "overlay-cni"}]}`: "name: expected",
		`{"name": "../x", "plugins": [{"type": "overlay-cni"}]}`:        "name: expected",
		`{"name": "pod network", "plugins": [{"type": "overlay-cni"}]}`: "name: expected",
		`{"name": ".", "plugins": [{"type": "overlay-cni"}]}`:           "name: expected",
		`{"name": "a"}`:                  "plugins: expected",
		`{"name": "a", "plugins": []}`:   "no plugins in list",
		`{"name": "a", "plugins": [{}]}`: "missing 'type'",
		`{"name": "a", "cniVersion": 1.1, "plugins": [{"type": "portmap"}]}`:       "cniVersion",
		`{"name": "a", "cniVersion": null, "plugins": [{"type": "portmap"}]}`:      "cniVersion",
		`{"name": "a", "cniVersion": "one", "plugins": [{"type": "portmap"}]}`:     "cniVersion",
		`{"name": "a", "cniVersion": "1.1", "plugins": [{"type": "overlay-cni"}]}`: "plugins[0]: incompatible CNI versions",
		own(`"waitSeconds": 300`):                       "plugins[1]: waitSeconds: expected",
		own(`"subnetFile": "subnet.env"`):               "plugins[1]: subnetFile: expected",
		own(`"dataDir": "overlay"`):                     "plugins[1]: dataDir: expected",
		own(`"delegate": {"name": "b"}`):                "plugins[1]: delegate.name: expected",
		own(`"delegate": {"type": "overlay-cni"}`):      "plugins[1]: delegate.type: expected",
		own(`"ipam": {"routes": [{"dst": "default"}]}`): "plugins[1]: ipam.routes[0]: expected",
		own(`"delegate": {"type": "macvlan"}`):          "macvlan",
		own(`"ipam": {"type": "dhcp"}`):                 "dhcp",
	} {
		r := newRig(t)
		r.install()
		r.write(r.conf, text)
		if err := r.node.install(r.from, r.conf); err == nil || !strings.Contains(err.Error(), wrong) ||
			strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: expected an error with %q, found %v", text, wrong, err)
		}
		r.has(installed("one"))
	}
}

// What runtimes and our plugin take is installed.
func TestGoodConf(t *testing.T) {
	for _, text := range []string{
		`{"name": "a", "plugins": [{"type": "overlay-cni"}]}`,
		`{"name": "a", "cniVersion": "", "plugins": [{"type": "overlay-cni"}]}`,
		`{"name": "cbr0", "cniVersion": "0.3.1", "plugins": [{"type": "overlay-cni", "delegate": {"hairpinMode": true, "isDefaultGateway": true}}]}`,
		`{"name": "a_b.c-d", "cniVersion": "1.1.0", "plugins": [{"type": "overlay-cni", "waitSeconds": 90, "subnetFile": "/run/flannel/subnet.env",
		  "dataDir": "/data", "delegate": {"bridge": "pods0"}, "ipam": {"routes": [{"dst": "10.96.0.0/12"}]}}, {"type": "portmap"}]}`,
		`{"name": "a", "cniVersions": ["1.0.0", "1.1.0"], "plugins": [{"type": "overlay-cni"}]}`,
	} {
		r := newRig(t)
		r.write(r.conf, text)
		r.install()
	}
}

// Whoever has pods keeps what they need to be deleted, and when they are gone, the rest is removed.
func TestContainersLeft(t *testing.T) {
	const busy = "busy" // instead of a file: the bridge is in use
	ours := func(keys string) string { return `{"name": "pods", "plugins": [{"type": "overlay-cni"` + keys + `}]}` }
	for _, tt := range []struct {
		name, conf, file, text string
		left                   bool
	}{
		{"ours", conflist, "overlay/pods/abc:eth0", "{}", true},
		{"half written", conflist, "overlay/pods/.0123456789abcdef", "{", false},
		{"another network's", conflist, "overlay/others/abc:eth0", "{}", false},
		{"in dataDir", ours(`, "dataDir": "/var/lib/cni/own/"`), "own/pods/abc:eth0", "{}", true},
		{"where dataDir is not", ours(`, "dataDir": "/var/lib/cni/own"`), "overlay/pods/abc:eth0", "{}", false},
		{
			"an address that is taken, dataDir is elsewhere", ours(`, "dataDir": "/data"`), "networks/pods/10.244.1.2",
			"abc\r\neth0", true,
		},
		{
			"another, dataDir is above", ours(`, "dataDir": "/var/lib/cni/../other"`), "networks/pods/fd00::2", "abc\r\neth0",
			true,
		},
		{
			"no address, dataDir is elsewhere", ours(`, "dataDir": "/data"`), "networks/pods/last_reserved_ip.0", "10.244.1.2",
			false,
		},
		{"flannel's", conflist, "flannel/abc", `{"name": "pods"}`, true},
		{"flannel's, broken", conflist, "flannel/abc", `{"na`, true},
		{"flannel's of another network", conflist, "flannel/abc", `{"name": "others"}`, false},
		{"flannel's in dataDir", ours(`, "dataDir": "/var/lib/cni/own"`), "own/abc", `{"name": "pods"}`, true},
		{
			"flannel's, dataDir is the same", ours(`, "dataDir": "/var/lib/cni/flannel"`), "flannel/abc", `{"name": "pods"}`,
			true,
		},
		{"no bridge", ours(`, "delegate": {"type": "portmap"}`), "overlay/pods/abc:eth0", "{}", true},
		{"the bridge", conflist, busy, "", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t)
			r.write(r.conf, tt.conf)
			r.install()
			address, file := filepath.Join(r.node.cniState, "networks", "pods", "10.244.1.7"), filepath.Join(r.node.cniState,
				tt.file)
			if !strings.Contains(tt.conf, "/data") && !strings.Contains(tt.conf, "..") { // else it would be one that is taken
				r.write(address, "abc\r\neth0")
			}
			r.write(filepath.Join(r.node.cniState, "networks", "others", "10.245.1.2"), "abc\r\neth0")
			if tt.file == busy {
				r.busy = fmt.Errorf("%w by veth1", errBusy)
			} else {
				r.write(file, tt.text)
			}
			before := files(t, r.node.cniState)
			for range 2 {
				r.uninstall()
				said := "kept "
				if tt.file == busy {
					said = "in use by veth1: "
				} else if tt.left {
					said = "(1, such as " + file + "): "
				}
				if tt.left && (len(r.bridges) > 0 || !strings.Contains(r.out.String(), said) ||
					!strings.Contains(r.out.String(), "run uninstall again\n")) {
					t.Errorf("bridges %q\n%s", r.bridges, r.out)
				}
				if d := cmp.Diff(before, files(t, r.node.cniState)); tt.left && d != "" {
					t.Errorf("expected - + found:\n%s", d)
				}
				r.has(map[string]string{})
			}
			if tt.left && tt.file != busy {
				if err := os.Remove(file); err != nil {
					t.Fatal(err)
				}
			}
			r.busy = nil
			r.uninstall()
			if strings.Contains(r.out.String(), "kept") {
				t.Errorf("the last time:\n%s", r.out)
			}
			if left := files(t, r.node.stateDir); len(left) > 0 {
				t.Errorf("kept %q", left)
			}
			for _, dir := range []string{"networks/pods", "own/pods"} {
				if _, err := os.Stat(filepath.Join(r.node.cniState, dir)); !os.IsNotExist(err) {
					t.Errorf("%s: %v", dir, err)
				}
			}
			if _, err := os.Stat(filepath.Join(r.node.cniState, "networks", "others", "10.245.1.2")); err != nil {
				t.Error(err)
			}
			if len(r.bridges) == 0 && !strings.Contains(tt.conf, "delegate") {
				t.Error("the bridge is still there")
			}
		})
	}
}

// files lists all of them below a directory.
func files(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			out = append(out, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// What is not known of a bridge changes nothing: the addresses stay taken.
func TestBridgeFails(t *testing.T) {
	r := newRig(t)
	r.install()
	address := filepath.Join(r.node.cniState, "networks", "pods", "10.244.1.2")
	r.write(address, "x")
	if err := r.node.uninstall(func(string) error { return errors.New("no") }); err == nil {
		t.Error("expected an error")
	}
	if _, err := os.Stat(address); err != nil {
		t.Error(err)
	}
	r.uninstall()
	if _, err := os.Stat(address); !os.IsNotExist(err) || len(r.bridges) != 1 {
		t.Errorf("%v, bridges %q", err, r.bridges)
	}
}

// A configuration that is broken is removed, but leads nowhere.
func TestUninstallBrokenConf(t *testing.T) {
	for _, text := range []string{`{`, `{"name": "../x", "plugins": [{"type": "overlay-cni"}]}`} {
		r := newRig(t)
		r.install()
		r.write(filepath.Join(r.node.confDir, r.node.confName), text)
		for _, dir := range []string{"x", "networks/x"} {
			r.write(filepath.Join(r.node.cniState, dir, "10.244.1.2"), "x")
		}
		r.uninstall()
		r.has(map[string]string{})
		if left := files(t, r.node.cniState); len(left) != 2 || len(r.bridges) > 0 ||
			!strings.Contains(r.out.String(), "warning: ") {
			t.Errorf("%s: left %q, bridges %q\n%s", text, left, r.bridges, r.out)
		}
	}
}

// What a plugin had half written when it was killed is no container.
func TestHalfWritten(t *testing.T) {
	r := newRig(t)
	r.install()
	r.write(filepath.Join(r.node.cniState, "overlay", "pods", ".0123456789abcdef"), "{")
	r.uninstall()
	if len(r.bridges) != 1 {
		t.Errorf("bridges %q\n%s", r.bridges, r.out)
	}
	if _, err := os.Stat(filepath.Join(r.node.cniState, "overlay")); !os.IsNotExist(err) {
		t.Error(err)
	}
}

// An operator is told when the runtime will use another configuration.
func TestEarlier(t *testing.T) {
	r := newRig(t)
	warnings := func() (lines []string) {
		r.install()
		for l := range strings.Lines(r.out.String()) {
			if strings.HasPrefix(l, "warning") {
				lines = append(lines, l)
			}
		}
		return lines
	}
	for _, name := range []string{"05-other.conf", "00-README", "20-later.conflist"} {
		r.write(filepath.Join(r.node.confDir, name), `{"type": "bridge"}`)
	}
	if lines := warnings(); len(lines) != 1 || !strings.Contains(lines[0], "05-other.conf (plugins: bridge) comes before") {
		t.Errorf("%q", lines)
	}
	r.write(filepath.Join(r.node.confDir, "00-meta.conf"), `{"type": "multus", "clusterNetwork": "pods"}`)
	if lines := warnings(); len(lines) != 0 {
		t.Errorf("a meta plugin that leads to ours: %q", lines)
	}
}

// What another installation has put on the node stays as it is, unless the node is handed over.
func TestAnotherInstallation(t *testing.T) {
	r := newRig(t)
	if err := owner.Write(r.node.stateDir, "a/overlayd"); err != nil {
		t.Fatal(err)
	}
	r.node.owner = "a/overlayd"
	r.install()
	r.image("two")
	r.node.owner = "b/overlayd"
	if err := r.node.install(r.from, r.conf); !errors.As(err, new(*owner.Error)) {
		t.Errorf("it is not refused: %v", err)
	}
	r.has(installed("one"))
	r.node.takeOver = "a/overlayd"
	r.install()
	r.has(installed("two"))
}

// The record may be written by whoever can write the state directory: it must not lead out of the directory of plugins.
func TestRecordStaysInside(t *testing.T) {
	r := newRig(t)
	victim := filepath.Join(filepath.Dir(r.node.binDir), "victim")
	r.write(victim, "x")
	r.install()
	raw, err := json.Marshal(record{Plugins: map[string][]string{"../victim": {hash([]byte("x"))}}, Conf: "../victim"})
	if err != nil {
		t.Fatal(err)
	}
	r.write(filepath.Join(r.node.stateDir, recordName), string(raw))
	r.uninstall()
	if _, err := os.Stat(victim); err != nil {
		t.Error(err)
	}
}

// A real bridge is removed if nothing is at it, and nothing else is.
func TestRemoveBridge(t *testing.T) {
	t.Parallel()
	ns := nstest.New(t)
	ns.Exec("ip", "link", "add", "cni0", "type", "bridge")
	ns.Exec("ip", "link", "set", "cni0", "up")
	ns.Exec("ip", "link", "add", "port", "type", "veth", "peer", "name", "pod")
	ns.Exec("ip", "link", "set", "port", "up", "master", "cni0")
	remove := func(name string) (err error) {
		ns.Do(func() { err = removeBridge(name) })
		return err
	}
	if err := remove("cni0"); !errors.Is(err, errBusy) || !strings.Contains(err.Error(), "port") {
		t.Errorf("with a port: %v", err)
	}
	for _, other := range []string{"pod", "none", "lo"} {
		if err := remove(other); !errors.Is(err, errNoBridge) {
			t.Errorf("%s: %v", other, err)
		}
	}
	if out := ns.Exec("ip", "-o", "link", "show", "up"); !strings.Contains(out, "cni0") ||
		!strings.Contains(out, "port@pod") {
		t.Errorf("what was rejected is not as it was:\n%s", out)
	}
	ns.Exec("ip", "link", "delete", "port")
	if err := remove("cni0"); err != nil {
		t.Error(err)
	}
	if out := ns.Exec("ip", "-o", "link"); strings.Contains(out, "cni0") {
		t.Errorf("it is still there:\n%s", out)
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{nil, {"nonsense"}, {"install", "--nonsense"}, {"install", "more"}} {
		var out, errs bytes.Buffer
		if status := run(args, &out, &errs); status != exitUsage || errs.Len() == 0 {
			t.Errorf("%q: status %d, %q", args, status, errs.String())
		}
	}
	var out, errs bytes.Buffer
	if status := run([]string{"version"}, &out, &errs); status != 0 || strings.TrimSpace(out.String()) != version {
		t.Errorf("status %d, %q, %q", status, out.String(), errs.String())
	}
	if status := run([]string{"install", "--conf", "/none"}, &out, &errs); status != exitFailure ||
		!strings.Contains(errs.String(), "/none") {
		t.Errorf("status %d, %q", status, errs.String())
	}
}

// The list that the manifests bring: a runtime that knows cniVersions asks the plugin for its status, and an older one
// works without.
func TestShippedList(t *testing.T) {
	t.Parallel()
	raw, err := os.ReadFile("../../dist/kubernetes/cni.conflist")
	if err != nil {
		t.Fatal(err)
	}
	if err := checkConf(raw); err != nil {
		t.Error(err)
	}
	list, err := libcni.NetworkConfFromBytes(raw)
	if err != nil || list.CNIVersion != "1.1.0" {
		t.Errorf("%+v, %v", list, err)
	}
	var old struct{ CNIVersion string }
	if err := json.Unmarshal(raw, &old); err != nil || old.CNIVersion != "1.0.0" {
		t.Errorf("%+v, %v", old, err)
	}
}

// FuzzConf: a configuration that is installed, and a record of what was, lead nowhere out of their directories.
func FuzzConf(f *testing.F) {
	f.Add([]byte(conflist), []byte(`{"plugins":{"bridge":["00"],"../x":[]},"conf":"10-overlayd.conflist"}`))
	f.Add([]byte(`{"name":"a","cniVersion":"1.1.0","plugins":[{"type":"overlay-cni","dataDir":"/x"}]}`), []byte(`{"conf":"/etc/passwd"}`))
	f.Add([]byte(conflist), []byte(`{"plugins":{"":[]},"conf":"/"}`))
	n := node{stateDir: f.TempDir(), out: new(bytes.Buffer)}
	f.Fuzz(func(t *testing.T, raw, installed []byte) {
		if c, err := parseConf(raw); err == nil && checkConf(raw) == nil {
			if !filepath.IsLocal(c.Name) || strings.Contains(c.Name, "/") || len(c.plugins()) == 0 {
				t.Fatalf("accepted %+v", c)
			}
		}
		if err := os.WriteFile(filepath.Join(n.stateDir, recordName), installed, 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := n.readRecord()
		for name := range r.Plugins {
			if err == nil && strings.Contains(name, "/") {
				t.Fatalf("read %+v", r)
			}
		}
		if err == nil && strings.Contains(r.Conf, "/") {
			t.Fatalf("read %+v", r)
		}
	})
}
