package cni_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/cni"
	"github.com/overlayd/overlayd/test/bubble"
)

// fakeExec stands for the delegates: it notes what they are told, and answers as the test says.
type fakeExec struct {
	version.PluginDecoder
	mu     sync.Mutex
	calls  []call
	answer func(c call) ([]byte, error)
}

type call struct {
	plugin, command string // command is empty where it comes from this process's environment
	container       string
	conf            map[string]any
}

func (f *fakeExec) ExecPlugin(_ context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	c := call{plugin: filepath.Base(path)}
	for _, e := range environ {
		switch key, value, _ := strings.Cut(e, "="); key {
		case "CNI_COMMAND":
			c.command = value
		case "CNI_CONTAINERID":
			c.container = value
		}
	}
	if err := json.Unmarshal(stdin, &c.conf); err != nil {
		return nil, fmt.Errorf("stdin of %s: %w", path, err)
	}
	f.mu.Lock()
	f.calls = append(f.calls, c)
	f.mu.Unlock()
	if f.answer != nil {
		return f.answer(c)
	}
	return []byte(`{"cniVersion":"1.1.0","ips":[{"address":"10.244.5.2/24"}]}`), nil
}

func (f *fakeExec) FindInPath(plugin string, _ []string) (string, error) {
	if plugin == "absent" {
		return "", fmt.Errorf("failed to find plugin %q in path []", plugin)
	}
	return "/opt/cni/bin/" + plugin, nil
}

// commands lists what the delegates were told, and forgets it.
func (f *fakeExec) commands() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []string
	for _, c := range f.calls {
		all = append(all, c.plugin+" "+c.command)
	}
	f.calls = nil
	return all
}

var _ invoke.Exec = (*fakeExec)(nil)

// stand is a plugin with delegates that are none, and its files in a directory of the test.
type stand struct {
	*testing.T
	*cni.Plugin
	exec   *fakeExec
	dir    string
	out    *bytes.Buffer
	stderr *bytes.Buffer
}

func newStand(t *testing.T) *stand {
	t.Helper()
	s := &stand{T: t, exec: &fakeExec{}, dir: t.TempDir(), out: &bytes.Buffer{}, stderr: &bytes.Buffer{}}
	s.Plugin = &cni.Plugin{
		Exec: s.exec, Stdout: s.out, Stderr: s.stderr, FlannelDir: filepath.Join(s.dir, "flannel"),
		Home: filepath.Join(s.dir, "home"), BootID: "boot-1",
	}
	s.env(envV4)
	return s
}

func (s *stand) env(text string) {
	s.Helper()
	path := filepath.Join(s.dir, "subnet.env")
	if text == "" {
		s.must(os.Remove(path))
		return
	}
	if err := errors.Join(os.WriteFile(path+".new", []byte(text), 0o644), os.Rename(path+".new", path)); err != nil {
		s.Error(err)
	}
}

func (s *stand) data(parts ...string) string {
	return filepath.Join(append([]string{s.dir, "data"}, parts...)...)
}

// args are those for container c1, with further keys of the configuration.
func (s *stand) args(more ...string) *skel.CmdArgs {
	conf := fmt.Sprintf(`{"cniVersion":"1.1.0","name":"pods","type":"overlay-cni","subnetFile":%q,"dataDir":%q,"waitSeconds":0%s}`,
		filepath.Join(s.dir, "subnet.env"), s.data(), strings.Join(append([]string{""}, more...), ","))
	return &skel.CmdArgs{ContainerID: "c1", IfName: "eth0", Netns: "/proc/1/ns/net", StdinData: []byte(conf)}
}

func (s *stand) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// fails holds an error against its code and the beginning of its message.
func (s *stand) fails(err error, code uint, want string) {
	s.Helper()
	said := new(types.Error)
	if !errors.As(err, &said) || said.Code != code || !strings.HasPrefix(said.Msg, want) ||
		strings.Contains(said.Msg, "\n") {
		s.Errorf("got %v (%+v)\nwant %s (code %d)", err, said, want, code)
	}
	if s.out.Len() > 0 {
		s.Errorf("printed %s", s.out)
	}
}

func (s *stand) absent(path string) {
	s.Helper()
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		s.Errorf("%s is still there (%v)", path, err)
	}
}

func TestLife(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	s.must(s.Add(s.args()))
	if got := canonical(t, s.out.String()); !strings.Contains(got, "10.244.5.2/24") {
		t.Errorf("printed %s", got)
	}
	info, err := os.Stat(s.data("pods", "c1:eth0"))
	s.must(err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("kept with mode %v", info.Mode())
	}
	// The daemon is gone, the subnet was another one, and the runtime speaks another version by now.
	s.env("")
	result := `"prevResult":{"cniVersion":"1.0.0","ips":[]},"runtimeConfig":{"mac":"m"},"delegate":{"name":"now wrong"}`
	again := s.args(result)
	again.StdinData = bytes.Replace(again.StdinData, []byte("1.1.0"), []byte("1.0.0"), 1)
	s.must(s.Check(again))
	s.must(s.Del(again))
	for i, c := range s.exec.calls[1:] {
		ranges := fmt.Sprint(c.conf["ipam"].(map[string]any)["ranges"])
		if c.conf["cniVersion"] != "1.0.0" || c.conf["prevResult"] == nil || c.conf["runtimeConfig"] == nil ||
			!strings.Contains(ranges, "10.244.5.0/24") {
			t.Errorf("call %d: %v", i+1, c.conf)
		}
	}
	if got := s.exec.commands(); !slices.Equal(got, []string{"bridge ADD", "bridge CHECK", "bridge DEL"}) {
		t.Errorf("the delegate was told %v", got)
	}
	s.absent(s.data("pods", "c1:eth0"))
	s.must(s.Del(s.args())) // again, of what is unknown now
	if got := s.exec.commands(); got != nil {
		t.Errorf("DEL of what is unknown: %v", got)
	}
	s.out.Reset()
	s.fails(s.Check(s.args()), types.ErrUnknownContainer, s.data("pods", "c1:eth0")+" is missing: ")
}

// A configuration may name any file and directory, as of a user who may write one for Multus.
func TestForeignPaths(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	secret, pipe := filepath.Join(s.dir, "shadow"), filepath.Join(s.dir, "pipe")
	s.must(unix.Mkfifo(pipe, 0o644))
	for path, text := range map[string]string{
		secret:       "root:$y$hash:19000::::::\n",
		secret + "2": "FLANNEL_SUBNET=hash\nFLANNEL_NETWORK=hash\nFLANNEL_MTU=hash\nFLANNEL_IPMASQ=hash\n",
		secret + "3": "FLANNEL_SUBNET=10.0.0.1/24\nFLANNEL_NETWORK=hash\n",
		secret + "4": "FLANNEL_SUBNET=10.0.0.1/24\nFLANNEL_NETWORK=10.0.0.0/8\nFLANNEL_MTU=hash\nFLANNEL_IPMASQ=hash\n",
		secret + "5": "FLANNEL_SUBNET=10.0.0.1/24\nFLANNEL_NETWORK=10.0.0.0/8\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=hash\n",
		pipe:         "",
	} {
		if text != "" {
			s.must(os.WriteFile(path, []byte(text), 0o600))
		}
		args := s.args()
		args.StdinData = bytes.ReplaceAll(args.StdinData, []byte(filepath.Join(s.dir, "subnet.env")), []byte(path))
		for what, do := range map[string]func(*skel.CmdArgs) error{"ADD": s.Add, "STATUS": s.Status} {
			err := do(args)
			if err == nil || !strings.Contains(err.Error(), path) || strings.Contains(err.Error(), "hash") {
				t.Errorf("%s with %s: %v", what, path, err)
			}
		}
	}
	outside := filepath.Join(t.TempDir(), "new")
	args := s.args()
	args.StdinData = bytes.ReplaceAll(args.StdinData, []byte(s.data()), []byte(outside))
	s.fails(s.Add(args), types.ErrIOFailure, "dataDir: "+outside+": does not exist")
	if _, err := os.Lstat(outside); err == nil {
		t.Error("made a directory")
	}
	if got := s.exec.commands(); got != nil {
		t.Errorf("the delegate was told %v", got)
	}
}

// What is left of an earlier boot is taken back by the first ADD that can; where that fails, ADD goes on.
func TestEarlierBoot(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	add := func(container string) {
		t.Helper()
		args := s.args(`"ipam":{"dataDir":"` + s.data("ips") + `"}`)
		args.ContainerID = container
		s.must(s.Add(args))
	}
	add("c1")
	s.must(os.MkdirAll(s.data("ips", "pods"), 0o755)) // as host-local does
	for _, c := range []string{"c2", "c3"} {
		add(c)
	}
	s.must(os.WriteFile(s.data("pods", "of-no-known-boot:eth0"), []byte(`{"type":"bridge"}`), 0o600))
	for container, at := range map[string]time.Time{"broken": time.Unix(0, 0), "broken-now": time.Now()} {
		s.must(os.WriteFile(s.data("pods", container+":eth0"), nil, 0o600))
		s.must(os.Chtimes(s.data("pods", container+":eth0"), at, at))
	}
	for _, c := range s.exec.calls {
		if text := fmt.Sprint(c.conf); strings.Contains(text, "boot") {
			t.Errorf("the delegate is told %s", text)
		}
	}
	s.exec.commands()
	ips := map[string]string{ // what host-local holds, with the time of the file
		"10.244.5.9": "gone", "fd00:10:244:5::9": "gone", "10.244.5.10": "of-no-known-boot", "10.244.5.11": "flannels",
		"10.244.5.12": "of this boot",
	}
	for ip, container := range ips {
		path, at := s.data("ips", "pods", ip), time.Unix(0, 0)
		if container == "of this boot" {
			at = time.Now()
		}
		s.must(os.WriteFile(path, []byte(container+"\r\neth0"), 0o600))
		s.must(os.Chtimes(path, at, at))
	}
	for ip, content := range map[string]string{"10.244.5.13": "", "10.244.5.14": "\x00\x00\x00"} {
		s.must(os.WriteFile(s.data("ips", "pods", ip), []byte(content), 0o600))
		s.must(os.Chtimes(s.data("ips", "pods", ip), time.Unix(0, 0), time.Unix(0, 0)))
		ips[ip] = "gone"
	}
	s.must(os.MkdirAll(s.FlannelDir, 0o700))
	s.must(os.WriteFile(filepath.Join(s.FlannelDir, "flannels"), []byte(`{"name":"pods"}`), 0o600))

	s.BootID = "boot-2"
	s.exec.answer = func(c call) ([]byte, error) {
		if c.container == "c2" && c.command == "DEL" {
			return nil, &types.Error{Code: 5, Msg: "busy"}
		}
		return []byte(`{"cniVersion":"1.1.0","ips":[{"address":"10.244.5.2/24"}]}`), nil
	}
	add("c1") // again
	if !strings.Contains(s.stderr.String(), "c2:eth0: bridge: busy") {
		t.Errorf("said %q", s.stderr)
	}
	s.absent(s.data("pods", "c3:eth0"))
	s.exec.commands()
	s.exec.answer = nil
	add("c4")
	if got := s.exec.commands(); !slices.Equal(got, []string{"bridge DEL", "bridge ADD"}) { // of c2, not of c1
		t.Errorf("the delegate was told %v", got)
	}
	add("c5")
	if got := s.exec.commands(); !slices.Equal(got, []string{"bridge ADD"}) {
		t.Errorf("the delegate was told %v", got)
	}
	left, err := filepath.Glob(s.data("pods", "*:*"))
	for i, path := range left {
		left[i] = filepath.Base(path)
	}
	if want := []string{"broken-now:eth0", "c1:eth0", "c4:eth0", "c5:eth0", "of-no-known-boot:eth0"}; err != nil ||
		!slices.Equal(left, want) {
		t.Errorf("left: %v, %v", left, err)
	}
	for ip, container := range ips {
		if _, err := os.Stat(s.data("ips", "pods", ip)); (err != nil) != (container == "gone") {
			t.Errorf("%s of %s: %v", ip, container, err)
		}
	}
}

func TestDelegateFails(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	s.exec.answer = func(call) ([]byte, error) { return nil, &types.Error{Code: 5, Msg: "no\nspace", Details: "d"} }
	s.fails(s.Add(s.args()), types.ErrIOFailure, "bridge: no; space")
	s.fails(s.Check(s.args()), types.ErrIOFailure, "bridge: no; space")
	s.fails(s.Del(s.args()), types.ErrIOFailure, "bridge: no; space")
	if _, err := os.Stat(s.data("pods", "c1:eth0")); err != nil {
		t.Errorf("forgotten though DEL failed: %v", err)
	}
	s.exec.answer = func(call) ([]byte, error) { return nil, &types.Error{Msg: "netplugin failed"} }
	s.fails(s.Del(s.args()), types.ErrInternal, "bridge: netplugin failed")
	s.exec.answer = func(call) ([]byte, error) { return []byte("nonsense"), nil }
	s.fails(s.Add(s.args()), types.ErrInternal, "bridge: failed to unmarshal raw result")
	s.must(s.Del(s.args()))
	s.fails(s.Add(s.args(`"delegate":{"type":"absent"}`)), types.ErrInternal, `absent: failed to find plugin "absent"`)
}

func TestWrongAttachment(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	for _, wrong := range [][2]string{
		{"../../x", "eth0"},
		{"c1", "../x"},
		{"..", "eth0"},
		{"", "eth0"},
		{"c1", ""},
		{strings.Repeat("c", 300), "eth0"},
	} {
		args := s.args()
		args.ContainerID, args.IfName = wrong[0], wrong[1]
		want := "CNI_CONTAINERID: expected"
		if wrong[0] == "c1" {
			want = "CNI_IFNAME: expected"
		}
		for _, command := range []func(*skel.CmdArgs) error{s.Add, s.Check, s.Del} {
			s.fails(command(args), types.ErrInvalidEnvironmentVariables, want)
		}
	}
	s.absent(s.data())
	if got := s.exec.commands(); got != nil {
		t.Errorf("the delegate was told %v", got)
	}
}

func TestWaitsForSubnetFile(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		s := newStand(t)
		s.env("")
		// Not there at all.
		args := s.args()
		args.StdinData = bytes.Replace(args.StdinData, []byte(`"waitSeconds":0`), []byte(`"waitSeconds":2.5`), 1)
		start := time.Now()
		s.fails(s.Add(args), types.ErrTryAgainLater, "open "+filepath.Join(s.dir,
			"subnet.env")+": no such file or directory; waited 2.5s for it: is overlayd running on this node? See `overlayd status`")
		if took := time.Since(start); took < 2500*time.Millisecond || took > 3*time.Second {
			t.Errorf("waited %v", took)
		}
		// There in time: by default it is waited for ten seconds.
		args.StdinData = bytes.Replace(args.StdinData, []byte(`"waitSeconds":2.5`), []byte(`"x":0`), 1)
		start = time.Now()
		go func() {
			time.Sleep(9 * time.Second)
			s.env(envV4)
		}()
		s.must(s.Add(args))
		if took := time.Since(start); took < 9*time.Second || took > 10*time.Second {
			t.Errorf("waited %v", took)
		}
		// There, but nonsense: nothing to wait for.
		s.out.Reset()
		s.env("nonsense")
		start = time.Now()
		s.fails(s.Add(args), types.ErrDecodingFailure, filepath.Join(s.dir, "subnet.env")+": line 1: expected NAME=VALUE")
		if took := time.Since(start); took > time.Second {
			t.Errorf("waited %v", took)
		}
	})
}

func TestStatus(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	s.must(s.Status(s.args()))
	if got := s.exec.commands(); !slices.Equal(got, []string{"bridge STATUS"}) {
		t.Errorf("the delegate was told %v", got)
	}
	s.fails(s.Status(s.args(`"delegate":{"type":"absent"}`)), types.ErrPluginNotAvailable, "absent: failed to find plugin")
	s.exec.commands()

	failing := func(versions string) func(c call) ([]byte, error) {
		return func(c call) ([]byte, error) {
			if c.command == "VERSION" {
				return []byte(`{"cniVersion":"1.1.0","supportedVersions":[` + versions + `]}`), nil
			}
			return nil, &types.Error{Code: 1, Msg: "incompatible CNI versions"}
		}
	}
	s.exec.answer = failing(`"0.4.0","1.0.0"`) // nor can ADD work
	s.fails(s.Status(s.args()), types.ErrPluginNotAvailable,
		"bridge: incompatible CNI versions; bridge does not support CNI 1.1.0, so that every ADD fails: install a newer one, or lower cniVersion")
	s.must(s.GC(s.args()))
	s.exec.answer = failing(`"1.0.0","1.1.0"`)
	if err := s.Status(s.args()); err == nil || err.Error() != "bridge: incompatible CNI versions" {
		t.Errorf("of a delegate that is new enough: %v", err)
	}
	s.exec.answer = func(call) ([]byte, error) { return nil, &types.Error{Code: 51, Msg: "limited"} }
	s.fails(s.Status(s.args()), types.ErrLimitedConnectivity, "bridge: limited")

	s.exec.commands()
	s.env("nonsense")
	s.fails(s.Status(s.args()), types.ErrPluginNotAvailable, filepath.Join(s.dir,
		"subnet.env")+": line 1: expected NAME=VALUE")
	s.env("")
	s.fails(s.Status(s.args()), types.ErrPluginNotAvailable, "open "+filepath.Join(s.dir,
		"subnet.env")+": no such file or directory: is overlayd running")
	if got := s.exec.commands(); got != nil {
		t.Errorf("the delegate was told %v", got)
	}
}

func TestGC(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	add := func(container, ifname string) {
		t.Helper()
		args := s.args()
		args.ContainerID, args.IfName = container, ifname
		s.must(s.Add(args))
	}
	for _, c := range []string{"c1", "c2", "c3"} {
		add(c, "eth0")
	}
	add("c1", "eth1")
	other := s.args()
	other.StdinData = bytes.Replace(other.StdinData, []byte(`"pods"`), []byte(`"other"`), 1)
	s.must(s.Add(other))
	s.exec.commands()
	s.out.Reset()

	// No list: nothing is known to be invalid.
	s.must(s.GC(s.args()))
	if got := s.exec.commands(); !slices.Equal(got, []string{"bridge GC"}) {
		t.Errorf("without a list the delegate was told %v", got)
	}
	// One of the stale ones can't be removed: the others are, and it stays for the next time.
	list := `"cni.dev/valid-attachments":[{"containerID":"c1","ifname":"eth0"},{"containerID":"c9","ifname":"eth0"},{"containerID":"../c2","ifname":"eth0"}]`
	s.exec.answer = func(c call) ([]byte, error) {
		if c.container == "c2" {
			return nil, &types.Error{Code: 5, Msg: "busy"}
		}
		return nil, nil
	}
	s.fails(s.GC(s.args(list)), types.ErrIOFailure, "c2:eth0: bridge: busy")
	last := s.exec.calls[len(s.exec.calls)-1]
	for _, key := range []string{"cni.dev/valid-attachments", "cni.dev/attachments"} {
		if list, _ := last.conf[key].([]any); len(list) != 3 {
			t.Errorf("%s: %v", key, last.conf[key])
		}
	}
	if got := s.exec.commands(); !slices.Equal(got, []string{"bridge DEL", "bridge DEL", "bridge DEL", "bridge GC"}) {
		t.Errorf("the delegate was told %v", got)
	}
	for _, gone := range []string{"c1:eth1", "c3:eth0"} {
		s.absent(s.data("pods", gone))
	}
	for _, there := range []string{"pods/c1:eth0", "pods/c2:eth0", "other/c1:eth0"} {
		if _, err := os.Stat(s.data(there)); err != nil {
			t.Error(err)
		}
	}
	// An empty list, and no subnet file: what is kept suffices to remove it.
	s.exec.answer = nil
	s.env("")
	s.fails(s.GC(s.args(`"cni.dev/valid-attachments":null`)), types.ErrTryAgainLater,
		"open "+filepath.Join(s.dir, "subnet.env"))
	if entries, err := filepath.Glob(s.data("pods", "*:*")); err != nil || len(entries) > 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
	if got := s.exec.commands(); !slices.Equal(got, []string{"bridge DEL", "bridge DEL"}) {
		t.Errorf("the delegate was told %v", got)
	}
}

func TestBrokenKept(t *testing.T) {
	t.Parallel()
	for _, broken := range []string{"", "{", "null", `{"type":7}`, `{"type":"../x"}`, `{"cniVersion":"1.1.0"}`} {
		s := newStand(t)
		s.must(s.Add(s.args()))
		s.out.Reset()
		s.must(os.WriteFile(s.data("pods", "c1:eth0"), []byte(broken), 0o600))
		s.fails(s.Del(s.args(`"subnetFile":"subnet.env"`)), types.ErrIOFailure, s.data("pods", "c1:eth0")+" is broken (")
		if err := s.Del(s.args(`"subnetFile":7`)); err == nil || !strings.Contains(err.Error(),
			"cannot be recreated: subnetFile: expected a string, found 7") {
			t.Errorf("with a bad path of the subnet file: %v", err)
		}
		s.env("")
		s.fails(s.Del(s.args()), types.ErrIOFailure, s.data("pods", "c1:eth0")+" is broken (")
		s.env(envV4)
		s.exec.commands()
		s.must(s.Del(s.args()))
		if got := s.exec.commands(); !slices.Equal(got, []string{"bridge DEL"}) {
			t.Errorf("%q: the delegate was told %v", broken, got)
		}
		s.absent(s.data("pods", "c1:eth0"))
		if !strings.Contains(s.stderr.String(), "recreated") {
			t.Errorf("stderr: %s", s.stderr)
		}
	}
}

// A mistake that only ADD has to do with must not keep pods from being deleted.
func TestMistakesThatOnlyAddMinds(t *testing.T) {
	t.Parallel()
	for mistake, want := range map[string]string{
		`"waitSeconds":"10s"`:       "waitSeconds: expected a number from 0 to 90, found \"10s\"",
		`"waitSeconds":-1`:          "waitSeconds: expected a number from 0 to 90, found -1",
		`"subnetFile":7`:            "subnetFile: expected a string, found 7",
		`"subnetFile":"subnet.env"`: `subnetFile: expected a full path, found "subnet.env"`,
		`"delegate":"ptp"`:          `delegate: expected an object, found "ptp"`,
		`"ipam":[]`:                 "ipam: expected an object, found []",
	} {
		s := newStand(t)
		s.must(s.Add(s.args()))
		other := s.args()
		other.ContainerID = "c2"
		s.must(s.Add(other))
		s.out.Reset()
		s.exec.commands()

		s.fails(s.Add(s.args(mistake)), types.ErrInvalidNetworkConfig, want)
		if err := s.Status(s.args(mistake)); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("STATUS: %v", err)
		}
		s.must(s.Check(s.args(mistake)))
		s.must(s.Del(s.args(mistake)))
		s.fails(s.GC(s.args(mistake, `"cni.dev/valid-attachments":[]`)), types.ErrInvalidNetworkConfig, want)
		if got := s.exec.commands(); !slices.Equal(got, []string{"bridge CHECK", "bridge DEL", "bridge DEL"}) {
			t.Errorf("%s: the delegate was told %v", mistake, got)
		}
		s.absent(s.data("pods", "c1:eth0"))
		s.absent(s.data("pods", "c2:eth0"))
	}
}

// What was kept at ADD with a mistake of the list does not outlive its correction.
func TestMistakeIsCorrected(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ mistake, said string }{
		{`"delegate":{"type":"absent"}`, `absent: failed to find plugin "absent" in path []`},
		{`"delegate":{"vlan":5000}`, "bridge: invalid VLAN ID 5000"},
	} {
		s := newStand(t)
		s.exec.answer = func(call call) ([]byte, error) {
			if call.conf["vlan"] != nil {
				return nil, &types.Error{Code: types.ErrInternal, Msg: "invalid VLAN ID 5000"}
			}
			return nil, nil
		}
		kept := s.data("pods", "c1:eth0")
		del, gc := s.args(), s.args(`"cni.dev/valid-attachments":[]`)
		for name, corrected := range map[string]func() error{
			"DEL": func() error { return s.Del(del) },
			"GC":  func() error { return s.GC(gc) },
		} {
			s.fails(s.Add(s.args(c.mistake)), types.ErrInternal, c.said)
			s.exec.commands()
			// Not yet corrected; into another mistake; and without the means to recreate it.
			s.fails(s.Del(s.args(c.mistake)), types.ErrInternal, c.said+"; ADD kept its configuration in "+kept)
			if n := len(s.exec.commands()); n > 1 {
				t.Errorf("%s: the delegate was told the same %d times", c.mistake, n)
			}
			s.fails(s.Del(s.args(`"delegate":{"vlan":6000}`)), types.ErrInternal, c.said+"; ADD kept its configuration in "+kept)
			s.env("")
			s.fails(s.Del(s.args()), types.ErrInternal, c.said+"; ADD kept its configuration in "+kept)
			s.env(envV4)
			if _, err := os.Stat(kept); err != nil {
				t.Errorf("forgotten though DEL failed: %v", err)
			}
			s.exec.commands()

			if err := corrected(); err != nil {
				t.Errorf("%s of %s: %v", name, c.mistake, err)
			}
			if got := s.exec.commands(); !slices.Contains(got, "bridge DEL") {
				t.Errorf("the delegate was told %v", got)
			}
			if !strings.Contains(s.stderr.String(), kept+": ") {
				t.Errorf("stderr: %s", s.stderr)
			}
			s.absent(kept)
		}
	}
}

// A pod that flannel's plugin made is taken down with what that one kept, in its directory or in the one configured.
func TestFlannelKept(t *testing.T) {
	t.Parallel()
	for _, dir := range []string{"flannel", "data"} {
		s := newStand(t)
		s.env("")
		path := filepath.Join(s.dir, dir, "c1")
		s.must(os.MkdirAll(filepath.Dir(path), 0o700))
		theirs := `{"cniVersion":"0.3.1","hairpinMode":true,"ipMasq":false,"ipam":{"type":"host-local"},"isGateway":true,"mtu":1450,"name":%q,"type":"ptp"}`
		s.must(os.WriteFile(path, fmt.Appendf(nil, theirs, "another-network"), 0o600))
		s.must(s.Del(s.args()))
		if got := s.exec.commands(); got != nil {
			t.Errorf("for another network: %v", got)
		}
		s.must(os.WriteFile(path, fmt.Appendf(nil, theirs, "pods"), 0o600))
		s.must(s.Check(s.args()))
		s.exec.answer = func(call) ([]byte, error) { return nil, &types.Error{Code: 5, Msg: "busy"} }
		s.fails(s.Del(s.args()), types.ErrIOFailure, "ptp: busy; ADD kept its configuration in "+path)
		s.exec.answer = nil
		s.must(s.Del(s.args()))
		if got := s.exec.commands(); !slices.Equal(got, []string{"ptp CHECK", "ptp DEL", "ptp DEL"}) {
			t.Errorf("the delegate was told %v", got)
		}
		s.absent(path)
	}
}
