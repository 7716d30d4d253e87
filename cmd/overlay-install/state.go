package main

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// hostState is the path on the node of what is at cniState here.
const hostState = "/var/lib/cni"

// uninstallState removes what the plugins made for a network, if nothing is at it any more, and reports whether it kept
// that. The bridge comes first: while a pod is at it, its address must stay reserved.
func (n node) uninstallState(c conf, removeBridge func(string) error) (kept bool, err error) {
	left, err := n.attached(c)
	if err != nil {
		return true, err
	}
	bridge, what := c.bridge(), n.cniState
	if bridge != "" {
		what = "the bridge " + bridge + " and " + what
	}
	if len(left) > 0 {
		n.say("kept %s: containers still use the network %s (%d, such as %s): delete them, then run uninstall again", what,
			c.Name, len(left), left[0])
		return true, nil
	}
	if bridge != "" {
		switch err := removeBridge(bridge); {
		case err == nil:
			n.say("removed the bridge %s", bridge)
		case errors.Is(err, errBusy):
			n.say("kept %s: %v: delete its pods, then run uninstall again", what, err)
			return true, nil
		case !errors.Is(err, errNoBridge):
			return true, err
		}
	}
	state := []string{filepath.Join(n.cniState, "networks", c.Name)}
	data, mounted := n.mounted(c.dataDir())
	if mounted {
		state = append(state, filepath.Join(data, c.Name))
	}
	for _, dir := range state {
		if _, statErr := os.Stat(dir); statErr != nil {
			continue
		}
		if removeErr := os.RemoveAll(dir); removeErr != nil {
			err = errors.Join(err, removeErr)
			continue
		}
		n.say("removed %s", dir)
	}
	if mounted {
		_ = os.Remove(data) // if nothing else is in it
	}
	return false, err
}

// attached lists the files of containers that are at a network: our plugin's, and those that flannel's kept, which ours
// has taken over.
func (n node) attached(c conf) ([]string, error) {
	data, mounted := n.mounted(c.dataDir())
	networks := filepath.Join(n.cniState, "networks", c.Name)
	flannel, own := []string{filepath.Join(n.cniState, "flannel")}, filepath.Join(data, c.Name)
	if !mounted {
		own = networks // at least the addresses that are taken can be seen
	} else if data != flannel[0] {
		flannel = append(flannel, data)
	}
	var left []string
	entries, err := readDir(own)
	for _, e := range entries {
		if _, notAddress := netip.ParseAddr(e.Name()); mounted || notAddress == nil {
			left = append(left, filepath.Join(own, e.Name()))
		}
	}
	for _, dir := range flannel {
		entries, dirErr := readDir(dir)
		err = errors.Join(err, dirErr)
		for _, e := range entries {
			if at := filepath.Join(dir, e.Name()); e.Type().IsRegular() && !ofAnother(at, c.Name) {
				left = append(left, at)
			}
		}
	}
	return left, err
}

// readDir leaves out what was half written in a crash. A directory that is not there has no entries.
func readDir(dir string) ([]fs.DirEntry, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return slices.DeleteFunc(entries, func(e fs.DirEntry) bool { return strings.HasPrefix(e.Name(), ".") }), err
}

// ofAnother says of a file of flannel's whether it is surely of another network.
func ofAnother(path, network string) bool {
	raw, err := os.ReadFile(path)
	var kept struct{ Name string }
	return err == nil && json.Unmarshal(raw, &kept) == nil && kept.Name != network
}

// mounted finds a directory of the node below cniState; all others can't be seen from here.
func (n node) mounted(dir string) (string, bool) {
	rel, err := filepath.Rel(hostState, dir)
	if err != nil || !filepath.IsLocal(rel) {
		return "", false
	}
	return filepath.Join(n.cniState, rel), true
}
