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

	"golang.org/x/sys/unix"
)

const (
	recordName  = "installed.json"
	leavingName = "uninstall.conflist"
	partPrefix  = ".overlay-install-" // of a file that is being written; no runtime takes it for a configuration
)

// node is where things are put.
type node struct {
	binDir, confDir, confName, stateDir, cniState string
	out                                           io.Writer
}

// record says which plugins are ours: those that have one of these hashes (SHA-256). There are two while one replaces the other.
type record map[string][]string

func (n node) say(format string, args ...any) { _, _ = fmt.Fprintf(n.out, format+"\n", args...) }

// install makes the node's plugins and configuration those of the image. What is in place is not written again. A plugin that was there
// before is left as it is: it came with the system, and others may depend on it. The configuration comes last: with it the node is ready.
func (n node) install(from, confFile string) error {
	raw, err := os.ReadFile(confFile)
	if err != nil {
		return err
	}
	c, err := parseConf(raw)
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
		removeParts(dir)
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
		if _, err := os.Stat(filepath.Join(n.binDir, p)); err != nil {
			return fmt.Errorf("%s: it needs the plugin %s, which is neither in the image nor on the node: %w", confFile, p, err)
		}
	}
	at := filepath.Join(n.confDir, n.confName)
	if was, err := os.ReadFile(at); err != nil || !bytes.Equal(was, raw) {
		if err := replace(at, raw, 0o644); err != nil {
			return err
		}
		n.say("installed %s", at)
	}
	for _, other := range earlier(n.confDir, n.confName) {
		n.say("warning: %s comes before %s: the container runtime uses that one, and not ours", filepath.Join(n.confDir, other), n.confName)
	}
	return nil
}

func (n node) installPlugin(source, name string, ours record) error {
	data, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	at, sum := filepath.Join(n.binDir, name), hash(data)
	was, err := os.ReadFile(at)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	there := err == nil
	if there && name != ownPlugin && !slices.Contains(ours[name], hash(was)) {
		if _, ok := ours[name]; ok {
			delete(ours, name)
			err = n.writeRecord(ours)
		}
		n.say("kept %s, which is not ours", at)
		return err
	}
	if there && hash(was) == sum {
		if slices.Equal(ours[name], []string{sum}) {
			return nil
		}
		ours[name] = []string{sum}
		return n.writeRecord(ours)
	}
	// Both hashes stand there while the file is replaced, so that a crash in between leaves nothing that is taken for somebody else's.
	ours[name] = []string{sum}
	if there {
		ours[name] = append(ours[name], hash(was))
	}
	if err := n.writeRecord(ours); err != nil {
		return err
	}
	if err := replace(at, data, 0o755); err != nil {
		return err
	}
	n.say("installed %s", at)
	ours[name] = []string{sum}
	return n.writeRecord(ours)
}

// uninstall removes what install put there. Where no container is left, it also removes what the plugins made: the bridge, and what they
// remember.
func (n node) uninstall(removeBridge func(string) error) error {
	at, copied := filepath.Join(n.confDir, n.confName), filepath.Join(n.stateDir, leavingName)
	raw, err := os.ReadFile(at)
	if err == nil {
		err = replace(copied, raw, 0o644) // says what is left to do, if this has to be done again
	} else if raw, err = os.ReadFile(copied); errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	c, _ := parseConf(raw) // one that somebody broke is removed all the same
	err = errors.Join(err, n.remove(at))
	ours, recordErr := n.readRecord()
	err = errors.Join(err, recordErr, n.remove(filepath.Join(n.binDir, ownPlugin)))
	delete(ours, ownPlugin)
	for _, name := range slices.Sorted(maps.Keys(ours)) {
		plugin := filepath.Join(n.binDir, name)
		switch raw, readErr := os.ReadFile(plugin); {
		case errors.Is(readErr, fs.ErrNotExist):
		case readErr != nil:
			err = errors.Join(err, readErr)
		case !slices.Contains(ours[name], hash(raw)):
			n.say("kept %s, which somebody replaced", plugin)
		default:
			err = errors.Join(err, n.remove(plugin))
		}
	}
	for _, dir := range []string{n.binDir, n.confDir, n.stateDir} {
		removeParts(dir)
	}
	if c.Name != "" {
		err = errors.Join(err, n.uninstallState(c, removeBridge))
	}
	if err != nil {
		return err
	}
	for _, name := range []string{recordName, leavingName} { // last: without them nothing is known to be ours
		if err := os.Remove(filepath.Join(n.stateDir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (n node) uninstallState(c conf, removeBridge func(string) error) error {
	kept := filepath.Join(n.cniState, "overlay", c.Name)
	left, err := os.ReadDir(kept)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		return err
	}
	left = slices.DeleteFunc(left, func(e fs.DirEntry) bool { return strings.HasPrefix(e.Name(), ".") }) // half written in a crash
	if len(left) > 0 {
		n.say("kept the bridge and %s: %d containers are still at the network %s", n.cniState, len(left), c.Name)
		return nil
	}
	for _, dir := range []string{kept, filepath.Join(n.cniState, "networks", c.Name)} {
		if _, statErr := os.Stat(dir); statErr != nil {
			continue
		}
		if removeErr := os.RemoveAll(dir); removeErr != nil {
			err = errors.Join(err, removeErr)
			continue
		}
		n.say("removed %s", dir)
	}
	_ = os.Remove(filepath.Dir(kept)) // if nothing else is in it
	if b := c.bridge(); b != "" {
		switch bridgeErr := removeBridge(b); {
		case bridgeErr == nil:
			n.say("removed the bridge %s", b)
		case errors.Is(bridgeErr, errBusy):
			n.say("kept the bridge %s: %v", b, bridgeErr)
		case !errors.Is(bridgeErr, errNoBridge):
			err = errors.Join(err, bridgeErr)
		}
	}
	return err
}

// remove says what it removed; what is not there is no error.
func (n node) remove(path string) error {
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
	r := record{}
	at := filepath.Join(n.stateDir, recordName)
	raw, err := os.ReadFile(at)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(raw, &r); err != nil {
		n.say("warning: %s is not readable, plugins that are on the node are taken for somebody else's: %v", at, err)
		return record{}, nil
	}
	for name := range r {
		if name != filepath.Base(name) || strings.HasPrefix(name, ".") { // nothing leads out of the directory
			delete(r, name)
		}
	}
	return r, nil
}

func (n node) writeRecord(r record) error {
	raw, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return replace(filepath.Join(n.stateDir, recordName), append(raw, '\n'), 0o644)
}

// replace puts a file in place in one step, and on the disk: whoever starts a plugin meanwhile has the old one or the new one, and so has
// a node after a power failure.
func replace(path string, data []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), partPrefix)
	if err != nil {
		return explain(err, filepath.Dir(path))
	}
	defer func() { _ = os.Remove(f.Name()) }() // not there any more if all went well
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// explain names what keeps root out of a directory in a container: without root's powers, it must belong to root.
func explain(err error, dir string) error {
	var st unix.Stat_t
	if errors.Is(err, fs.ErrPermission) && unix.Stat(dir, &st) == nil && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%w (the directory belongs to user %d; on the node: chown %d)", err, st.Uid, os.Geteuid())
	}
	return err
}

// removeParts removes what a crash left half written.
func removeParts(dir string) {
	parts, _ := filepath.Glob(filepath.Join(dir, partPrefix+"*"))
	for _, p := range parts {
		_ = os.Remove(p) // what can't be removed does no harm
	}
}

func hash(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}
