package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/overlayd/overlayd/internal/jsonobject"
)

// Plugin is the CNI plugin. Nothing of it lasts longer than one command, but for the files in dataDir.
type Plugin struct {
	Exec       invoke.Exec // starts delegates
	Stdout     io.Writer   // for the result of ADD, and nothing else
	Stderr     io.Writer   // remarks; the runtime shows them or not
	FlannelDir string      // where flannel's plugin kept what it had generated
	Home       string      // where links to every other dataDir are, that a list has named
	BootID     string      // of the running kernel; empty: not known
}

// New is the plugin as it runs on a node: delegates are programs in CNI_PATH.
func New() *Plugin {
	return &Plugin{
		Exec:       &invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: os.Stderr}},
		Stdout:     os.Stdout,
		Stderr:     os.Stderr,
		FlannelDir: "/var/lib/cni/flannel",
		Home:       DefaultDataDir,
		BootID:     readBootID(),
	}
}

// Funcs are the commands, for skel.
func (p *Plugin) Funcs() skel.CNIFuncs {
	return skel.CNIFuncs{Add: p.Add, Del: p.Del, Check: p.Check, GC: p.GC, Status: p.Status}
}

// Versions are those of the specification that the plugin speaks. 0.3.1 is the oldest in use; older ones cost
// nothing, and flannel's plugin takes configurations without a version, which are 0.1.0.
func Versions() version.PluginInfo { return version.All }

// job is one command for one attachment.
type job struct {
	conf Config
	at   attachment
}

func parse(args *skel.CmdArgs) (job, error) {
	c, err := ParseConfig(args.StdinData)
	if err != nil {
		return job{}, err
	}
	at, err := newAttachment(args.ContainerID, args.IfName)
	return job{c, at}, err
}

func (c Config) store() store { return store{c.DataDir, c.Name} }

// Add makes the container's interface through the delegate, and prints the delegate's result.
func (p *Plugin) Add(args *skel.CmdArgs) error {
	j, err := parse(args)
	if err != nil {
		return err
	}
	if err := j.conf.CheckForAdd(); err != nil {
		return err
	}
	env, err := waitForSubnetEnv(j.conf.SubnetFile, j.conf.Wait)
	if err != nil {
		return subnetFileError(err, types.ErrTryAgainLater, fmt.Sprintf("; waited %v for it", j.conf.Wait))
	}
	d, err := j.conf.Generate(env)
	if err != nil {
		return err
	}
	if err := j.conf.store().makeDir(filepath.Dir(p.Home)); err != nil {
		return ioError(err)
	}
	// Kept first: where the delegate fails half way, the runtime calls DEL, which must know what to take back.
	if err := p.noteDir(j.conf.DataDir); err != nil {
		_, _ = fmt.Fprintf(p.Stderr, "DEL will not find what is kept in %s if dataDir is changed: %v\n",
			j.conf.DataDir, err)
	}
	if err := p.keep(context.Background(), j, d, args.Path); err != nil {
		return ioError(err)
	}
	result, err := invoke.DelegateAdd(context.Background(), d.Type, d.Conf, p.Exec)
	if err != nil {
		return delegateError(d.Type, err)
	}
	speaks, err := new(version.ConfigDecoder).Decode(args.StdinData)
	if err != nil {
		return types.NewError(types.ErrDecodingFailure, err.Error(), "")
	}
	if result, err = result.GetAsVersion(speaks); err != nil {
		return delegateError(d.Type, err)
	}
	return result.PrintTo(p.Stdout)
}

// Del takes back what ADD made, with the configuration kept at ADD if that will do. What is not known is gone already.
func (p *Plugin) Del(args *skel.CmdArgs) error {
	j, err := parse(args)
	if err != nil {
		return err
	}
	k, err := p.kept(j)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return ioError(err)
	}
	return p.takeBack(j, k, func(d Delegate) error {
		return invoke.DelegateDel(context.Background(), d.Type, d.Conf, p.Exec)
	})
}

// Check has the delegate check whether all is as ADD left it.
func (p *Plugin) Check(args *skel.CmdArgs) error {
	j, err := parse(args)
	if err != nil {
		return err
	}
	k, err := p.kept(j)
	if errors.Is(err, fs.ErrNotExist) {
		return types.NewError(types.ErrUnknownContainer,
			fmt.Sprintf("%s is missing: this plugin did not set up %s of this container, or already deleted it",
				j.conf.store().path(j.at.file()), j.at.ifname), "")
	}
	if err != nil {
		return ioError(err)
	}
	d, err := p.delegateOf(j, k)
	if err != nil {
		return err
	}
	if err := invoke.DelegateCheck(context.Background(), d.Type, d.Conf, p.Exec); err != nil {
		return delegateError(d.Type, err)
	}
	return nil
}

// Status says whether ADD would work now: subnet.env is there and makes sense, and the delegate does not object.
func (p *Plugin) Status(args *skel.CmdArgs) error {
	c, err := ParseConfig(args.StdinData)
	if err != nil {
		return err
	}
	d, err := c.current(types.ErrPluginNotAvailable)
	if err != nil {
		return err
	}
	ctx := context.Background()
	if err := invoke.DelegateStatus(ctx, d.Type, d.Conf, p.Exec); err != nil {
		e := delegateError(d.Type, err)
		if !p.speaks(ctx, d.Type, args.Path) { // then it rejects ADD as well, which is given the same version
			e.Msg += fmt.Sprintf("; %s does not support CNI %s, so that every ADD fails: install a newer one, "+
				"or lower cniVersion and cniVersions in the list", d.Type, c.CNIVersion)
		}
		if e.Code != types.ErrLimitedConnectivity {
			e.Code = types.ErrPluginNotAvailable
		}
		return e
	}
	return nil
}

// GC takes back what belongs to attachments that are not valid any more, and passes the list on to the delegate. The
// reference plugins do nothing at GC: so each attachment that was kept gets a DEL. Where the runtime gives no list,
// nothing is known to be invalid.
func (p *Plugin) GC(args *skel.CmdArgs) error {
	c, err := ParseConfig(args.StdinData)
	if err != nil {
		return err
	}
	ctx := context.Background()
	valid := map[attachment]bool{}
	for _, a := range c.Attachments {
		valid[attachment{container: a.ContainerID, ifname: a.IfName}] = true
	}
	if c.KnowsAttachments {
		err = p.removeAll(ctx, c, args.Path, func(at attachment, _ kept) bool { return !valid[at] })
	}
	return joined(err, p.delegateGC(ctx, c, args.Path))
}

func (p *Plugin) delegateGC(ctx context.Context, c Config, path string) error {
	d, err := c.current(types.ErrTryAgainLater)
	if err == nil && c.KnowsAttachments {
		list := c.all.Get(attachmentsKey)
		// The second is the name that a draft of the specification had, and some plugins read.
		d.Conf, err = edit(d.Conf, map[string]any{attachmentsKey: list, "cni.dev/attachments": list})
	}
	if err != nil {
		return err
	}
	if err := invoke.DelegateGC(ctx, d.Type, d.Conf, p.Exec); err != nil && p.speaks(ctx, d.Type, path) {
		return delegateError(d.Type, err)
	}
	return nil
}

// kept finds what was kept at ADD, by this plugin or by flannel's.
func (p *Plugin) kept(j job) (kept, error) {
	for _, dir := range p.dirs(j.conf.DataDir) {
		k, err := store{dir, j.conf.Name}.kept(j.at.file())
		if !errors.Is(err, fs.ErrNotExist) {
			return k, err
		}
	}
	for _, dir := range []string{j.conf.DataDir, p.FlannelDir} {
		k, err := flannelKept(dir, j.at)
		var of struct{ Name string }
		if err == nil && json.Unmarshal(k.conf, &of) == nil && of.Name == j.conf.Name {
			return k, nil
		}
	}
	return kept{}, fs.ErrNotExist
}

// takeBack has the delegate delete an attachment, and forgets it. What was kept may hold a mistake of the list that
// fails ADD and DEL alike. So where that fails, it is tried once more with what holds now: the list may be corrected
// since.
func (p *Plugin) takeBack(j job, k kept, del func(Delegate) error) error {
	d, err := p.delegateOf(j, k)
	if err != nil {
		return err
	}
	if first := del(d); first != nil {
		now, err := j.conf.recreated()
		if err != nil || bytes.Equal(now.Conf, d.Conf) || del(now) != nil {
			e := delegateError(d.Type, first)
			e.Msg += "; ADD kept its configuration in " + k.path()
			return e
		}
		_, _ = fmt.Fprintf(p.Stderr, "%s: %s; deleted with the current list\n", k.path(), oneLine(first.Error()))
	}
	if err := k.forget(); err != nil {
		return ioError(err)
	}
	return nil
}

// delegateOf reads what was kept. If that is broken, what holds now takes its place.
func (p *Plugin) delegateOf(j job, k kept) (Delegate, error) {
	d, broken := j.conf.withKept(k.conf)
	if broken == nil {
		return d, nil
	}
	d, err := j.conf.recreated()
	if err != nil {
		return Delegate{}, types.NewError(types.ErrIOFailure, oneLine(fmt.Sprintf(
			"%s is broken (%v) and cannot be recreated: %v; leave it, the next DEL tries again", k.path(), broken, err)), "")
	}
	_, _ = fmt.Fprintf(p.Stderr, "%s is broken (%v): recreated from %s\n", k.path(), broken, j.conf.SubnetFile)
	return d, nil
}

// current is what ADD would generate now; absent is the code of the error where there is no subnet file.
func (c Config) current(absent uint) (Delegate, error) {
	if err := c.CheckForAdd(); err != nil {
		return Delegate{}, err
	}
	env, err := readSubnetEnv(c.SubnetFile)
	if err != nil {
		return Delegate{}, subnetFileError(err, absent, "")
	}
	return c.Generate(env)
}

// recreated stands for what an earlier ADD generated, since the delegate finds what belongs to a container by the
// container's ID.
func (c Config) recreated() (Delegate, error) {
	c.badWait = nil
	d, err := c.current(types.ErrTryAgainLater)
	if err != nil {
		return Delegate{}, err
	}
	return c.withKept(d.Conf)
}

// speaks reports whether a delegate knows the commands of version 1.1.0: STATUS and GC. It is asked only when one of
// them failed.
func (p *Plugin) speaks(ctx context.Context, plugin, path string) bool {
	program, err := p.Exec.FindInPath(plugin, filepath.SplitList(path))
	if err != nil {
		return true // the first error is the one to report
	}
	info, err := invoke.GetVersionInfo(ctx, program, p.Exec)
	if err != nil {
		return true
	}
	return slices.ContainsFunc(info.SupportedVersions(), func(v string) bool {
		is, err := version.GreaterThanOrEqualTo(v, "1.1.0")
		return err == nil && is
	})
}

// edit sets fields of a JSON object.
func edit(conf []byte, fields map[string]any) ([]byte, error) {
	var o jsonobject.Object
	if err := json.Unmarshal(conf, &o); err != nil {
		return nil, err
	}
	if err := o.PutAll(fields); err != nil {
		return nil, err
	}
	return json.Marshal(o)
}

// subnetFileError says what to check while the subnet file is not there, with the given code; a file that can't be used
// has codes of its own, but for STATUS, where all that counts is that ADD would fail.
func subnetFileError(err error, absent uint, waited string) *types.Error {
	if errors.Is(err, fs.ErrNotExist) {
		return types.NewError(absent, fmt.Sprintf("%v%s: is overlayd running on this node? "+
			"See `overlayd status` and `journalctl -u overlayd`, or the log of its pod", err, waited), "")
	}
	code := types.ErrIOFailure
	if said := new(types.Error); errors.As(err, &said) {
		code = said.Code
	}
	if absent == types.ErrPluginNotAvailable {
		code = absent
	}
	return types.NewError(code, oneLine(err.Error()), "")
}

func ioError(err error) *types.Error {
	return types.NewError(types.ErrIOFailure, oneLine(err.Error()), "")
}

// delegateError hands on a delegate's error with its code, and says whose it is.
func delegateError(plugin string, err error) *types.Error {
	said := new(types.Error)
	if errors.As(err, &said) {
		code := said.Code
		if code == types.ErrUnknown { // a plugin that crashed, or of a version that had no codes
			code = types.ErrInternal
		}
		return types.NewError(code, oneLine(plugin+": "+said.Msg), said.Details)
	}
	return types.NewError(types.ErrInternal, oneLine(plugin+": "+err.Error()), "")
}

// joined is several errors as one, on one line, with the code of the first.
func joined(errs ...error) error {
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if len(errs) == 0 {
		return nil
	}
	code := types.ErrInternal
	if first := new(types.Error); errors.As(errs[0], &first) {
		code = first.Code
	}
	return types.NewError(code, oneLine(errors.Join(errs...).Error()), "")
}

func oneLine(s string) string {
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
}
