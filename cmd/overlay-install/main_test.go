package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/overlayd/overlayd/internal/nstest"
)

const conflist = `{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "overlay-cni"}, {"type": "portmap"}]}`

// rig is a node, and an image to install from, as directories.
type rig struct {
	t          *testing.T
	node       node
	from, conf string
	out        *bytes.Buffer
	bridges    []string // that were removed
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

// What is installed is there, a second time nothing is written, an upgrade replaces it, and uninstalling leaves nothing.
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

// Plugins that came with the system stay, at install, upgrade and uninstall; so do ours that somebody replaced.
func TestOthersPlugins(t *testing.T) {
	r := newRig(t)
	r.write(filepath.Join(r.node.binDir, "bridge"), "the distribution's")
	r.write(filepath.Join(r.node.binDir, "firewall"), "somebody's")
	r.install()
	want := installed("one")
	want["bridge"], want["firewall"] = "the distribution's", "somebody's"
	r.has(want)
	if !strings.Contains(r.out.String(), "bridge, which is not ours") {
		t.Errorf("nothing is said of it:\n%s", r.out)
	}
	r.write(filepath.Join(r.node.binDir, "portmap"), "a newer one")
	r.write(filepath.Join(r.node.binDir, "overlay-cni"), "an old one")
	r.image("two")
	r.install()
	want = installed("two")
	want["bridge"], want["firewall"], want["portmap"] = "the distribution's", "somebody's", "a newer one"
	r.has(want)
	r.write(filepath.Join(r.node.binDir, "host-local"), "the operator's")
	r.uninstall()
	r.has(map[string]string{"bridge": "the distribution's", "firewall": "somebody's", "portmap": "a newer one", "host-local": "the operator's"})
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
	ours["bridge"] = []string{hash([]byte("bridge two")), hash([]byte("bridge one"))}
	if err := r.node.writeRecord(ours); err != nil {
		t.Fatal(err)
	}
	r.write(filepath.Join(r.node.binDir, partPrefix+"123"), "bridge tw")
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
	for text, wrong := range map[string]string{
		`{`:                                      "not a CNI configuration list",
		`{"plugins": [{"type": "overlay-cni"}]}`: "name: expected",
		`{"name": "../x", "plugins": [{"type": "overlay-cni"}]}`:                                             "name: expected",
		`{"name": "a", "plugins": []}`:                                                                       "plugins: expected",
		`{"name": "a", "plugins": [{}]}`:                                                                     "plugins[0].type",
		`{"name": "a", "plugins": [{"type": "overlay-cni", "delegate": {"type": "macvlan"}}]}`:               "macvlan",
		`{"name": "a", "plugins": [{"type": "overlay-cni", "ipam": {"type": "dhcp"}}, {"type": "portmap"}]}`: "dhcp",
	} {
		r := newRig(t)
		r.install()
		r.write(r.conf, text)
		if err := r.node.install(r.from, r.conf); err == nil || !strings.Contains(err.Error(), wrong) {
			t.Errorf("%s: expected an error with %q, found %v", text, wrong, err)
		}
		r.has(installed("one"))
	}
}

// Whoever has pods keeps what they need to be deleted.
func TestContainersLeft(t *testing.T) {
	r := newRig(t)
	r.install()
	r.write(filepath.Join(r.node.cniState, "overlay", "pods", "abc:eth0"), "{}")
	r.uninstall()
	if len(r.bridges) > 0 || !strings.Contains(r.out.String(), "1 containers are still at the network pods") {
		t.Errorf("bridges %q\n%s", r.bridges, r.out)
	}
	if _, err := os.Stat(filepath.Join(r.node.cniState, "overlay", "pods", "abc:eth0")); err != nil {
		t.Error(err)
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
	for _, name := range []string{"05-other.conf", "00-README", "10-overlayd.conf", "20-later.conflist"} {
		r.write(filepath.Join(r.node.confDir, name), "{}")
	}
	r.install()
	var lines []string
	for l := range strings.Lines(r.out.String()) {
		if strings.HasPrefix(l, "warning") {
			lines = append(lines, l)
		}
	}
	if len(lines) != 2 || !strings.Contains(lines[0], "05-other.conf ") || !strings.Contains(lines[1], "10-overlayd.conf ") {
		t.Errorf("%q", lines)
	}
}

// Whoever reads a file while it is replaced reads the old or the new one, whole.
func TestReplaceIsAtomic(t *testing.T) {
	at := filepath.Join(t.TempDir(), "plugin")
	a, b := bytes.Repeat([]byte("a"), 1<<20), bytes.Repeat([]byte("b"), 1<<20)
	if err := replace(at, a, 0o755); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		for i := range 30 {
			if err := replace(at, [][]byte{b, a}[i%2], 0o755); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	for {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			return
		default:
		}
		raw, err := os.ReadFile(at)
		if err != nil || !bytes.Equal(raw, a) && !bytes.Equal(raw, b) {
			t.Fatalf("read %d bytes: %v", len(raw), err)
		}
	}
}

// The record may be written by whoever can write the state directory: it must not lead out of the directory of plugins.
func TestRecordStaysInside(t *testing.T) {
	r := newRig(t)
	victim := filepath.Join(filepath.Dir(r.node.binDir), "victim")
	r.write(victim, "x")
	r.install()
	raw, err := json.Marshal(record{"../victim": {hash([]byte("x"))}})
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
	if out := ns.Exec("ip", "-o", "link", "show", "up"); !strings.Contains(out, "cni0") || !strings.Contains(out, "port@pod") {
		t.Errorf("what was refused is not as it was:\n%s", out)
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
	if status := run([]string{"install", "--conf", "/none"}, &out, &errs); status != exitFailure || !strings.Contains(errs.String(), "/none") {
		t.Errorf("status %d, %q", status, errs.String())
	}
}
