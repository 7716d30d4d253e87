package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"reflect"
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

	delegate, ipam                  json.RawMessage // nil where they are absent
	runtimeConfig, args, prevResult json.RawMessage
	attachments                     json.RawMessage
}

// wire is the configuration as it comes. Letter case does not matter, as in every plugin written in Go.
type wire struct {
	CNIVersion       string          `json:"cniVersion"`
	Name             string          `json:"name"`
	Type             string          `json:"type"`
	SubnetFile       json.RawMessage `json:"subnetFile"`
	DataDir          string          `json:"dataDir"`
	WaitSeconds      json.RawMessage `json:"waitSeconds"`
	Delegate         json.RawMessage `json:"delegate"`
	IPAM             json.RawMessage `json:"ipam"`
	RuntimeConfig    json.RawMessage `json:"runtimeConfig"`
	Args             json.RawMessage `json:"args"`
	PrevResult       json.RawMessage `json:"prevResult"`
	ValidAttachments json.RawMessage `json:"cni.dev/valid-attachments"`
}

// ParseConfig reads a network configuration. It refuses what no command could work with; what only some commands need is
// looked at by [Config.CheckForAdd] and [Config.Generate], so that DEL still works where an operator broke that. Errors are
// of type *types.Error and name the JSON path.
func ParseConfig(stdin []byte) (Config, error) {
	var w wire
	if err := json.Unmarshal(stdin, &w); err != nil {
		return Config{}, decodeError("", err)
	}
	c := Config{
		CNIVersion: w.CNIVersion, Name: w.Name, Type: w.Type, DataDir: w.DataDir,
		delegate: given(w.Delegate), ipam: given(w.IPAM),
		runtimeConfig: given(w.RuntimeConfig), args: given(w.Args), prevResult: given(w.PrevResult), attachments: w.ValidAttachments,
	}
	if err := utils.ValidateNetworkName(w.Name); err != nil {
		return Config{}, invalid("name: expected letters, digits, dots, dashes and underscores, found %q", w.Name)
	}
	if c.DataDir == "" {
		c.DataDir = DefaultDataDir
	}
	if err := fullPath("dataDir", c.DataDir); err != nil {
		return Config{}, err
	}
	c.SubnetFile, c.badSubnetFile = readSubnetFile(w.SubnetFile)
	c.Wait, c.badWait = readWait(w.WaitSeconds)
	if w.ValidAttachments != nil {
		c.KnowsAttachments = true
		if err := json.Unmarshal(w.ValidAttachments, &c.Attachments); err != nil {
			return Config{}, decodeError("cni.dev/valid-attachments", err)
		}
	}
	return c, nil
}

// CheckForAdd says what is wrong with the keys that ADD needs and DEL and CHECK do not: subnetFile and waitSeconds.
func (c Config) CheckForAdd() error {
	if c.badSubnetFile != nil {
		return c.badSubnetFile
	}
	return c.badWait
}

func readSubnetFile(raw json.RawMessage) (string, error) {
	var path string
	if given(raw) != nil {
		if err := json.Unmarshal(raw, &path); err != nil {
			return "", decodeError("subnetFile", err)
		}
	}
	if path == "" {
		path = DefaultSubnetFile
	}
	return path, fullPath("subnetFile", path)
}

func readWait(raw json.RawMessage) (time.Duration, error) {
	if given(raw) == nil {
		return DefaultWait, nil
	}
	var s float64
	if err := json.Unmarshal(raw, &s); err != nil {
		return 0, decodeError("waitSeconds", err)
	}
	if !(s >= 0 && s <= maxWait.Seconds()) {
		return 0, invalid("waitSeconds: expected a number from 0 to %g, found %g", maxWait.Seconds(), s)
	}
	return time.Duration(s * float64(time.Second)), nil
}

// fullPath refuses a path that depends on where the runtime starts the plugin.
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

// decodeError says in an operator's words what encoding/json found at a path.
func decodeError(path string, err error) *types.Error {
	wrong := new(json.UnmarshalTypeError)
	if !errors.As(err, &wrong) {
		return types.NewError(types.ErrDecodingFailure, fmt.Sprintf("network configuration: not JSON: %v", err), "")
	}
	if wrong.Field != "" && path != "" {
		path += "."
	}
	if path += wrong.Field; path == "" {
		path = "network configuration"
	}
	return invalid("%s: expected %s, found %s", path, expected(wrong.Type), wrong.Value)
}

func expected(t reflect.Type) string {
	switch t.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Float64:
		return "a number"
	case reflect.Bool:
		return "true or false"
	case reflect.Slice:
		return "a list"
	default:
		return "an object"
	}
}
