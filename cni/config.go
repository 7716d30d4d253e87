package cni

import (
	"cmp"
	"encoding/json"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/utils"

	"github.com/overlayd/overlayd/internal/jsonobject"
)

// What holds where the configuration says nothing.
const (
	DefaultSubnetFile = "/run/overlayd/subnet.env"
	DefaultDataDir    = "/var/lib/cni/overlay"

	// DefaultWait is how long ADD waits for subnet.env. A daemon that starts has it within about a second, or within three
	// without etcd. The kubelet gives a pod's network two minutes (runtimeRequestTimeout) and tries again by itself: what
	// is waited beyond ten seconds would only hold back the event that tells the operator.
	DefaultWait = 10 * time.Second
	maxWait     = 90 * time.Second // leaves the delegate a quarter of those two minutes
)

// Config is a checked network configuration: what the runtime gives on stdin.
type Config struct {
	CNIVersion string // "" counts as 0.1.0
	Name       string // of the network
	Type       string // this plugin's own name
	SubnetFile string
	DataDir    string
	Wait       time.Duration // for the subnet file

	// Attachments are those that GC is to leave alone. KnowsAttachments tells an empty list from none at all.
	Attachments      []types.GCAttachment
	KnowsAttachments bool

	badSubnetFile, badWait error // what is wrong with these two, which not every command needs

	all                       jsonobject.Object
	runtimeConfig, prevResult json.RawMessage // nil where they are absent
}

// attachmentsKey is where the runtime puts Attachments.
const attachmentsKey = "cni.dev/valid-attachments"

// ParseConfig reads a network configuration, whose keys may be in any letter case, as in every plugin written in Go. It
// rejects what no command could work with; what only some commands need is checked by [Config.CheckForAdd] and
// [Config.Generate], so that DEL still works where an operator broke that. Errors are of type *types.Error and name the
// JSON path.
func ParseConfig(stdin []byte) (Config, error) {
	var c Config
	if err := json.Unmarshal(stdin, &c.all); err != nil {
		if json.Valid(stdin) {
			return Config{}, unexpected("network configuration", "an object", stdin)
		}
		return Config{}, types.NewError(types.ErrDecodingFailure, "network configuration: not JSON: "+err.Error(), "")
	}
	for key, v := range map[string]*string{
		"cniVersion": &c.CNIVersion, "name": &c.Name, "type": &c.Type, "dataDir": &c.DataDir,
	} {
		if err := c.all.Decode(key, v, "a string"); err != nil {
			return Config{}, invalid("%v", err)
		}
	}
	if err := utils.ValidateNetworkName(c.Name); err != nil {
		return Config{}, invalid("name: expected letters, digits, dots, dashes and underscores, found %q", c.Name)
	}
	c.DataDir = cmp.Or(c.DataDir, DefaultDataDir)
	if err := fullPath("dataDir", c.DataDir); err != nil {
		return Config{}, err
	}
	if err := c.all.Decode(attachmentsKey, &c.Attachments, "a list of attachments"); err != nil {
		return Config{}, invalid("%v", err)
	}
	c.KnowsAttachments = c.all.Get(attachmentsKey) != nil
	c.runtimeConfig, c.prevResult = given(c.all.Get("runtimeConfig")), given(c.all.Get("prevResult"))
	c.badSubnetFile, c.badWait = c.readSubnetFile(), c.readWait()
	return c, nil
}

// CheckForAdd says what is wrong with the keys that ADD needs and DEL and CHECK do not: subnetFile and waitSeconds.
func (c Config) CheckForAdd() error { return cmp.Or(c.badSubnetFile, c.badWait) }

func (c *Config) readSubnetFile() error {
	var path string
	if err := c.all.Decode("subnetFile", &path, "a string"); err != nil {
		return invalid("%v", err)
	}
	c.SubnetFile = cmp.Or(path, DefaultSubnetFile)
	return fullPath("subnetFile", c.SubnetFile)
}

func (c *Config) readWait() error {
	s := DefaultWait.Seconds()
	expected := fmt.Sprintf("a number from 0 to %g", maxWait.Seconds())
	if err := c.all.Decode("waitSeconds", &s, expected); err != nil {
		return invalid("%v", err)
	}
	if !(s >= 0 && s <= maxWait.Seconds()) {
		return unexpected("waitSeconds", expected, c.all.Get("waitSeconds"))
	}
	c.Wait = time.Duration(s * float64(time.Second))
	return nil
}

// fullPath rejects a path that depends on where the runtime starts the plugin.
func fullPath(key, path string) error {
	if !filepath.IsAbs(path) {
		return invalid("%s: expected a full path, found %q", key, path)
	}
	return nil
}

// given turns a null into what an absent key is.
func given(raw json.RawMessage) json.RawMessage {
	if string(raw) == "null" {
		return nil
	}
	return raw
}

// invalid is an error in the configuration.
func invalid(format string, args ...any) *types.Error {
	return types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf(format, args...), "")
}

func unexpected(path, expected string, found []byte) *types.Error {
	return invalid("%v", jsonobject.Unexpected(path, expected, found))
}
