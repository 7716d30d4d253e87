package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"
	cniversion "github.com/containernetworking/cni/pkg/version"

	"github.com/overlayd/overlayd/cni"
)

// ownPlugin is ours by its name; all other plugins only where we installed them.
const ownPlugin = "overlay-cni"

// sampleEnv is what the daemon of some node could write: it shows whether our plugin makes anything of a configuration.
const sampleEnv = `OVERLAYD_NETWORK=10.244.0.0/16
OVERLAYD_SUBNET=10.244.1.0/24
OVERLAYD_IPV6_NETWORK=fd00:10:244::/48
OVERLAYD_IPV6_SUBNET=fd00:10:244:1::/64
OVERLAYD_MTU=1450
OVERLAYD_IPMASQ=true
`

// conf is as much of a CNI configuration list as matters here.
type conf struct {
	Name    string
	Plugins []struct {
		Type     string
		DataDir  string
		Delegate struct{ Type, Bridge string }
		IPAM     struct{ Type string }
	}
}

// parseConf reads a list, and rejects one whose network has a name that leads elsewhere.
func parseConf(raw []byte) (conf, error) {
	var c conf
	if err := json.Unmarshal(raw, &c); err != nil {
		return conf{}, fmt.Errorf("not a CNI configuration list: %w", err)
	}
	if utils.ValidateNetworkName(c.Name) != nil {
		return conf{}, fmt.Errorf("name: expected letters, digits, dots, dashes and underscores, found %q", c.Name)
	}
	return c, nil
}

// checkConf rejects what no runtime could use, so that one that works is never replaced by it. It has the list read as
// runtimes read it, and our part of it as our plugin does.
func checkConf(raw []byte) error {
	list, err := libcni.NetworkConfFromBytes(raw)
	if err != nil {
		return err
	}
	if _, _, _, err := cniversion.ParseVersion(list.CNIVersion); err != nil {
		return fmt.Errorf("cniVersion: %w", err)
	}
	if len(list.Plugins) == 0 {
		return errors.New("plugins: expected at least one, found none")
	}
	for i, p := range list.Plugins {
		if p.Network.Type != ownPlugin {
			continue
		}
		if err := checkOwn(list, p); err != nil {
			return fmt.Errorf("plugins[%d]: %w", i, err)
		}
	}
	return nil
}

// checkOwn does what our plugin does at ADD before it needs anything of the node.
func checkOwn(list *libcni.NetworkConfigList, p *libcni.PluginConfig) error {
	if err := new(cniversion.Reconciler).Check(cmp.Or(list.CNIVersion, "0.1.0"), cni.Versions()); err != nil {
		return err
	}
	p, err := libcni.InjectConf(p, map[string]any{"name": list.Name, "cniVersion": list.CNIVersion}) // as the runtime does
	if err != nil {
		return err
	}
	c, err := cni.ParseConfig(p.Bytes)
	if err != nil {
		return err
	}
	if err := c.CheckForAdd(); err != nil {
		return err
	}
	env, err := cni.ParseSubnetEnv(sampleEnv)
	if err != nil {
		return err
	}
	_, err = c.Generate(env)
	return err
}

// plugins lists the programs that a configuration needs.
func (c conf) plugins() []string {
	var out []string
	add := func(name, otherwise string) {
		if name = cmp.Or(name, otherwise); name != "" && !slices.Contains(out, name) {
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

// dataDir is where our plugin keeps a file for each container; empty where the list is without our plugin.
func (c conf) dataDir() string {
	for _, p := range c.Plugins {
		if p.Type == ownPlugin {
			return cmp.Or(p.DataDir, cni.DefaultDataDir)
		}
	}
	return ""
}
