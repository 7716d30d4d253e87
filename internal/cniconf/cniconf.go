// Package cniconf tells whether a container runtime uses overlayd's CNI configuration where there are several.
package cniconf

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/overlayd/overlayd/internal/ownfile"
)

// ownPlugin is the CNI plugin of overlayd.
const ownPlugin = "overlay-cni"

// Foreign is a configuration that a runtime uses instead of overlayd's.
type Foreign struct {
	File    string   // its path
	Plugins []string // the types of its plugins; none: it can't be read
	Own     string   // the name of the configuration that it precedes
}

func (f *Foreign) Error() string {
	plugins := "its plugins can't be read"
	if len(f.Plugins) > 0 {
		plugins = "plugins: " + strings.Join(f.Plugins, ", ")
	}
	return fmt.Sprintf("%s (%s) comes before %s: the container runtime uses it instead, and new pods are not on overlayd's "+
		"network; remove it, then recreate the pods that were created with it", f.File, plugins, f.Own)
}

// Check is why new pods don't get the network of overlayd's configuration, whose path is given: it is missing, or there
// is a [Foreign] one before it. Runtimes use the first file of the directory (containerd unless max_conf_num says
// otherwise, CRI-O unless cni_default_network does), of those with an extension of a configuration.
//
// A first file that leads to overlayd's is none: a meta plugin's, or one that adds plugins to a copy of it. See leads.
func Check(own string) error {
	dir, name := filepath.Split(own)
	entries, err := os.ReadDir(dir) // in the order of their names
	if err != nil {
		return err
	}
	for _, e := range entries {
		ext := filepath.Ext(e.Name())
		if e.IsDir() || !slices.Contains([]string{".conf", ".conflist", ".json"}, ext) || e.Name() > name {
			continue
		}
		if e.Name() == name {
			return nil
		}
		file := filepath.Join(dir, e.Name())
		if first := read(file); !first.leads("", name, read(own).networkName()) {
			return &Foreign{file, first.plugins(), name}
		}
		return nil
	}
	return fmt.Errorf("%s is missing, so new pods are not on overlayd's network: overlay-install writes it", own)
}

// value is any JSON value.
type value struct{ any }

// read returns the content of a file; nothing if it can't be read.
func read(file string) (v value) {
	raw, err := ownfile.ReadLinked(file, 1<<20)
	if err == nil {
		_ = json.Unmarshal(raw, &v.any) // a broken one is nothing
	}
	return v
}

func (v value) get(key string) value {
	object, _ := v.any.(map[string]any)
	return value{object[key]}
}

func (v value) text() string {
	s, _ := v.any.(string)
	return s
}

func (v value) networkName() string { return v.get("name").text() }

// plugins are the types of the plugins of a configuration or a list.
func (v value) plugins() (out []string) {
	list, _ := v.get("plugins").any.([]any)
	for _, p := range append(list, v.any) {
		if t := (value{p}).get("type").text(); t != "" {
			out = append(out, t)
		}
	}
	return out
}

// leads reports whether a configuration names overlayd's: anywhere in it is overlayd's plugin (Multus: `delegates`; a
// copy with more plugins), or the name of overlayd's file, with or without directory and extension, or of its network
// (Multus: `clusterNetwork`). That the configuration has the network's name itself says nothing.
func (v value) leads(key, file, network string) bool {
	switch x := v.any.(type) {
	case string:
		base := filepath.Base(x)
		return key == "type" && x == ownPlugin || base == file || base == strings.TrimSuffix(file, filepath.Ext(file)) ||
			key != "name" && network != "" && x == network
	case []any:
		return slices.ContainsFunc(x, func(e any) bool { return value{e}.leads(key, file, network) })
	case map[string]any:
		for k, e := range x {
			if (value{e}).leads(k, file, network) {
				return true
			}
		}
	}
	return false
}
