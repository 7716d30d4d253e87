package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
)

// ownPlugin is ours by its name; all other plugins only where we installed them.
const ownPlugin = "overlay-cni"

// conf is as much of a CNI configuration list as is looked at here.
type conf struct {
	Name    string
	Plugins []struct {
		Type     string
		Delegate struct{ Type, Bridge string }
		IPAM     struct{ Type string }
	}
}

// parseConf refuses what no runtime could use, so that one that works is never replaced by it.
func parseConf(raw []byte) (conf, error) {
	var c conf
	if err := json.Unmarshal(raw, &c); err != nil {
		return c, fmt.Errorf("not a CNI configuration list: %w", err)
	}
	if c.Name == "" || strings.ContainsAny(c.Name, "/\\") || c.Name == ".." {
		return c, fmt.Errorf("name: expected the name of the network, found %q", c.Name)
	}
	if len(c.Plugins) == 0 {
		return c, errors.New("plugins: expected at least one, found none")
	}
	for i, p := range c.Plugins {
		if p.Type == "" {
			return c, fmt.Errorf("plugins[%d].type: expected the name of a plugin, found nothing", i)
		}
	}
	return c, nil
}

// plugins lists the programs that a configuration needs.
func (c conf) plugins() []string {
	var out []string
	add := func(name, otherwise string) {
		if name == "" {
			name = otherwise
		}
		if name != "" && !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	for _, p := range c.Plugins {
		add(p.Type, "")
		if p.Type == ownPlugin {
			add(p.Delegate.Type, "bridge")
			add(p.IPAM.Type, "host-local")
		}
	}
	return out
}

// bridge is the one that the pods are at; empty where there is none.
func (c conf) bridge() string {
	for _, p := range c.Plugins {
		switch {
		case p.Type != ownPlugin || p.Delegate.Type != "" && p.Delegate.Type != "bridge":
		case p.Delegate.Bridge != "":
			return p.Delegate.Bridge
		default:
			return "cni0" // the default of the plugin bridge
		}
	}
	return ""
}

// earlier lists the configurations in a directory that a runtime would take instead of the one named.
func earlier(dir, name string) []string {
	var out []string
	for _, pattern := range []string{"*.conf", "*.conflist", "*.json"} {
		found, _ := filepath.Glob(filepath.Join(dir, pattern)) // the patterns are right
		for _, f := range found {
			if base := filepath.Base(f); base < name {
				out = append(out, base)
			}
		}
	}
	slices.Sort(out)
	return out
}
