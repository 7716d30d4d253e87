package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/internal/atomicfile"
	"github.com/overlayd/overlayd/internal/cniconf"
	"github.com/overlayd/overlayd/internal/owner"
	"github.com/overlayd/overlayd/internal/ownfile"
)

const (
	recordName  = "installed.json"
	maxRecord   = 1 << 20 // in bytes
	leavingName = "uninstall.conflist"
)

// node is where things are put.
type node struct {
	binDir, confDir, confName, stateDir, cniState string
	owner, takeOver                               string // see package owner; empty: not told from others
	out                                           io.Writer
}

// record says what is ours.
type record struct {
	// Plugins are those that have one of these hashes (SHA-256); two while one replaces the other.
	Plugins map[string][]string `json:"plugins"`
	Conf    string              `json:"conf,omitempty"` // the name of the configuration
}

// errLink: a symbolic link is never what install put there. What it leads to tells nothing: on the node that is another
// file than here.
var errLink = errors.New("it is a symbolic link")

func (n node) say(format string, args ...any) { _, _ = fmt.Fprintf(n.out, format+"\n", args...) }

// install makes the node's plugins and configuration those of the image. What is in place is not written again. A
// plugin that was there before is left as it is: it came with the system, and others may depend on it. The
// configuration comes last: with it the node is ready.
func (n node) install(from, confFile string) error {
	if n.owner != "" { // the daemon, which has the lock, writes who it is
		if _, err := owner.Check(n.stateDir, n.owner, n.takeOver, time.Now()); err != nil {
			return err
		}
	}
	raw, err := os.ReadFile(confFile)
	if err != nil {
		return err
	}
	c, err := parseConf(raw)
	if err == nil {
		err = checkConf(raw)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", confFile, err)
	}
	sources, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, dir := range []string{n.binDir, n.confDir, n.stateDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	ours, err := n.readRecord()
	if err != nil {
		return err
	}
	for _, s := range sources {
		if err := n.installPlugin(filepath.Join(from, s.Name()), s.Name(), ours); err != nil {
			return err
		}
	}
	for _, p := range c.plugins() {
		if _, err := os.Lstat(filepath.Join(n.binDir, p)); err != nil {
			return fmt.Errorf("%s needs the plugin %s, which is neither in the image nor on the node: %w", confFile, p, err)
		}
	}
	if err := n.put(filepath.Join(n.confDir, n.confName), raw, 0o644); err != nil {
		return err
	}
	// Both would be of the same network, and the runtime would use the first.
	if ours.Conf != "" && ours.Conf != n.confName {
		if err := n.remove(filepath.Join(n.confDir, ours.Conf)); err != nil {
			return err
		}
	}
	ours.Conf = n.confName
	if err := n.writeRecord(ours); err != nil {
		return err
	}
	if err := cniconf.Check(filepath.Join(n.confDir, n.confName)); err != nil {
		n.say("warning: %v", err)
	}
	return nil
}

func (n node) installPlugin(source, name string, ours record) error {
	data, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	at, sum := filepath.Join(n.binDir, name), hash(data)
	atomicfile.RemoveLeftovers(at)
	was, err := readPlugin(at)
	link := errors.Is(err, errLink)
	if err != nil && !link && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	there := err == nil // as a link, ours is replaced as if it were not there
	if name != ownPlugin && (link || there && !slices.Contains(ours.Plugins[name], hash(was))) {
		n.say("kept %s, which overlay-install did not install", at)
		delete(ours.Plugins, name)
		return n.writeRecord(ours)
	}
	// Both hashes are recorded while the file is replaced, so that after a crash in between neither is taken for foreign.
	ours.Plugins[name] = []string{sum}
	if there && hash(was) != sum {
		ours.Plugins[name] = append(ours.Plugins[name], hash(was))
	}
	if err := n.writeRecord(ours); err != nil {
		return err
	}
	if err := n.put(at, data, 0o755); err != nil {
		return err
	}
	ours.Plugins[name] = []string{sum}
	return n.writeRecord(ours)
}

// put installs a file, unless it is in place.
func (n node) put(path string, data []byte, mode fs.FileMode) error {
	changed, err := replace(path, data, mode)
	if changed {
		n.say("installed %s", path)
	}
	return err
}

// uninstall removes what install put there. Where no container is left, it also removes what the plugins made: the
// bridge, and their state. Where one is, it can be run again later.
func (n node) uninstall(removeBridge func(string) error) error {
	ours, err := n.readRecord()
	c, leavingErr := n.leaving(ours)
	err = errors.Join(err, leavingErr)
	for _, name := range n.confNames(ours) {
		err = errors.Join(err, n.remove(filepath.Join(n.confDir, name)))
	}
	err = errors.Join(err, n.removePlugins(ours))
	done := []string{recordName, leavingName}
	if c.Name != "" {
		kept, stateErr := n.uninstallState(c, removeBridge)
		err = errors.Join(err, stateErr)
		if kept {
			done = []string{recordName}
		}
	}
	if err != nil {
		return err
	}
	for _, name := range done { // last: without them nothing is known to be ours
		path := filepath.Join(n.stateDir, name)
		atomicfile.RemoveLeftovers(path)
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// confNames are those under which a configuration may be ours.
func (n node) confNames(ours record) []string {
	if ours.Conf == "" || ours.Conf == n.confName {
		return []string{n.confName}
	}
	return []string{ours.Conf, n.confName}
}

// leaving reads the configuration that is to be removed, and keeps a copy: it says what is left to do if this has to be
// done again.
func (n node) leaving(ours record) (conf, error) {
	copied := filepath.Join(n.stateDir, leavingName)
	for _, name := range n.confNames(ours) {
		c, raw, err := n.readConf(filepath.Join(n.confDir, name))
		if err != nil {
			return conf{}, err
		}
		if c.Name != "" {
			_, err = replace(copied, raw, 0o644)
			return c, err
		}
	}
	c, _, err := n.readConf(copied)
	return c, err
}

// readConf reads a configuration that is to be removed; one that is not there, or that is broken, has no name.
func (n node) readConf(path string) (conf, []byte, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return conf{}, nil, nil
	}
	if err != nil {
		return conf{}, nil, err
	}
	c, err := parseConf(raw)
	if err != nil {
		n.say("warning: %s: cannot tell what to remove from %s: %v", path, n.cniState, err)
	}
	return c, raw, nil
}

// removePlugins removes our own, and those others that are still as they were installed.
func (n node) removePlugins(ours record) error {
	err := n.remove(filepath.Join(n.binDir, ownPlugin))
	delete(ours.Plugins, ownPlugin)
	for _, name := range slices.Sorted(maps.Keys(ours.Plugins)) {
		plugin := filepath.Join(n.binDir, name)
		atomicfile.RemoveLeftovers(plugin)
		switch raw, readErr := readPlugin(plugin); {
		case errors.Is(readErr, fs.ErrNotExist):
		case errors.Is(readErr, errLink), readErr == nil && !slices.Contains(ours.Plugins[name], hash(raw)):
			n.say("kept %s, which was replaced", plugin)
		case readErr != nil:
			err = errors.Join(err, readErr)
		default:
			err = errors.Join(err, n.remove(plugin))
		}
	}
	return err
}

// readPlugin reads a plugin on the node, but does not follow a link.
func readPlugin(path string) ([]byte, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		return nil, errLink
	}
	return os.ReadFile(path)
}

// remove says what it removed; what is not there is no error.
func (n node) remove(path string) error {
	atomicfile.RemoveLeftovers(path)
	err := os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		n.say("removed %s", path)
	}
	return err
}

func (n node) readRecord() (record, error) {
	none := record{Plugins: map[string][]string{}}
	at := filepath.Join(n.stateDir, recordName)
	raw, err := ownfile.Read(at, maxRecord)
	if errors.Is(err, fs.ErrNotExist) {
		return none, nil
	}
	if err != nil {
		return none, err
	}
	var r record
	if err := json.Unmarshal(raw, &r); err != nil {
		n.say("warning: %s is unreadable, existing plugins are kept as foreign: %v", at, err)
		return none, nil
	}
	if r.Plugins == nil {
		r.Plugins = none.Plugins
	}
	// Nothing leads out of a directory.
	outside := func(name string) bool { return name == "" || name[0] == '.' || strings.Contains(name, "/") }
	maps.DeleteFunc(r.Plugins, func(name string, _ []string) bool { return outside(name) })
	if outside(r.Conf) {
		r.Conf = ""
	}
	return r, nil
}

func (n node) writeRecord(r record) error {
	raw, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	_, err = replace(filepath.Join(n.stateDir, recordName), append(raw, '\n'), 0o644)
	return err
}

// replace puts a file in place in one step, unless it is there already, and its name on the disk too: a node after a
// power failure has what the record says.
func replace(path string, data []byte, mode fs.FileMode) (changed bool, err error) {
	if was, err := readPlugin(path); err == nil && bytes.Equal(was, data) {
		return false, nil
	}
	if err := atomicfile.Write(path, data, mode); err != nil {
		return false, explain(err, filepath.Dir(path))
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return true, err
	}
	defer dir.Close()
	return true, dir.Sync()
}

// explain names what keeps root out of a directory in a container: without root's powers, it must belong to root.
func explain(err error, dir string) error {
	var st unix.Stat_t
	if errors.Is(err, fs.ErrPermission) && unix.Stat(dir, &st) == nil && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%w (the directory belongs to user %d; on the node: chown %d)", err, st.Uid, os.Geteuid())
	}
	return err
}

func hash(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}
