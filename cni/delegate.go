package cni

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/internal/jsonobject"
)

// Delegate is the plugin that does the work, and what it is told.
type Delegate struct {
	Type string
	Conf []byte // JSON
}

// Generate makes the delegate's configuration. What the operator wrote under `delegate` and `ipam` wins, but for the keys
// that only this plugin can know. Errors are of type *types.Error and name the JSON path.
func (c Config) Generate(env SubnetEnv) (Delegate, error) {
	d, err := readObject("delegate", c.delegate)
	if err != nil {
		return Delegate{}, err
	}
	for _, key := range []string{"name", "ipam"} {
		if raw := d.Get(key); raw != nil {
			return Delegate{}, unexpected("delegate."+key, fmt.Sprintf("nothing here (it is taken from %q beside delegate)", key), raw)
		}
	}
	kind, err := pluginType(d, "delegate.", "bridge")
	if err != nil {
		return Delegate{}, err
	}
	if kind == c.Type { // it would start itself for ever
		return Delegate{}, invalid("delegate.type: expected another plugin than this one, found %q", kind)
	}
	ipam, err := c.generateIPAM(env, kind, d)
	if err != nil {
		return Delegate{}, err
	}
	if err := c.fill(d, ipam, env, kind); err != nil {
		return Delegate{}, err
	}
	conf, err := json.Marshal(d)
	return Delegate{Type: kind, Conf: conf}, err
}

func (c Config) fill(d, ipam *jsonobject.Object, env SubnetEnv, kind string) error {
	promisc, err := flag(d, "promiscMode", false)
	if err != nil {
		return err
	}
	type entry struct {
		key   string
		value any
	}
	always := []entry{{"type", kind}, {"name", c.Name}, {"ipam", ipam}}
	if c.CNIVersion != "" {
		always = append(always, entry{"cniVersion", c.CNIVersion})
	}
	if c.runtimeConfig != nil {
		always = append(always, entry{"runtimeConfig", c.runtimeConfig})
	}
	for _, e := range always {
		if err := d.Put(e.key, e.value); err != nil {
			return err
		}
	}
	ifAbsent := []entry{{"mtu", env.MTU}, {"ipMasq", !env.IPMasq}}
	if c.args != nil {
		ifAbsent = append(ifAbsent, entry{"args", c.args})
	}
	if kind == "bridge" {
		ifAbsent = append(ifAbsent, entry{"isGateway", true})
		// A pod that reaches itself through its service goes out and in by one port of the bridge. In promiscuous mode
		// the bridge does that by itself, and the plugin refuses both together.
		if !promisc {
			ifAbsent = append(ifAbsent, entry{"hairpinMode", true})
		}
	}
	for _, e := range ifAbsent {
		if d.Get(e.key) != nil {
			continue
		}
		if err := d.Put(e.key, e.value); err != nil {
			return err
		}
	}
	return nil
}

// ipamRoute is what matters here of a route in ipam.routes.
type ipamRoute struct {
	Dst   netip.Prefix `json:"dst"`
	Table *int         `json:"table"`
}

// generateIPAM makes the ipam section; for a bridge it decides on isDefaultGateway as well, which is a route by another name.
func (c Config) generateIPAM(env SubnetEnv, kind string, d *jsonobject.Object) (*jsonobject.Object, error) {
	ipam, err := readObject("ipam", c.ipam)
	if err != nil {
		return nil, err
	}
	plugin, err := pluginType(ipam, "ipam.", "host-local")
	if err != nil {
		return nil, err
	}
	routes, known, err := givenRoutes(ipam)
	if err != nil {
		return nil, err
	}
	var wanted []netip.Prefix
	type ipRange struct {
		Subnet netip.Prefix `json:"subnet"`
	}
	var ranges [][]ipRange // a set of ranges for each family: a pod gets one address from each set
	for _, f := range env.Families() {
		ranges = append(ranges, []ipRange{{env.Subnet.Get(f)}})
		wanted = append(wanted, env.Networks.Get(f)...)
	}
	defaults, err := c.defaultRoutes(env, kind, d, known)
	if err != nil {
		return nil, err
	}
	for _, dst := range append(wanted, defaults...) {
		if slices.Contains(known, dst) { // the kernel refuses a second one
			continue
		}
		known = append(known, dst)
		raw, err := json.Marshal(struct {
			Dst netip.Prefix `json:"dst"`
		}{dst})
		if err != nil {
			return nil, err
		}
		routes = append(routes, raw)
	}
	for key, v := range map[string]any{"type": plugin, "ranges": ranges, "routes": routes} {
		if err := ipam.Put(key, v); err != nil {
			return nil, err
		}
	}
	return ipam, nil
}

// defaultRoutes gives the default routes to add to ipam.routes. A bridge is told by isDefaultGateway instead, as far as
// the operator says nothing of default routes himself. On macvlan and others nobody knows who the gateway would be.
func (c Config) defaultRoutes(env SubnetEnv, kind string, d *jsonobject.Object, known []netip.Prefix) ([]netip.Prefix, error) {
	var defaults []netip.Prefix
	for _, f := range env.Families() {
		defaults = append(defaults, defaultRoute(f))
	}
	switch kind {
	case "ptp":
		return defaults, nil
	case "bridge":
		gateway, err := flag(d, "isGateway", true)
		if err != nil || !gateway || d.Get("isDefaultGateway") != nil {
			return nil, err
		}
		if !slices.ContainsFunc(known, func(p netip.Prefix) bool { return p.Bits() == 0 }) {
			return nil, d.Put("isDefaultGateway", true)
		}
		// Told both ways, the bridge plugin would add one route twice, and fail.
		return defaults, nil
	}
	return nil, nil
}

func defaultRoute(f addr.Family) netip.Prefix {
	if f == addr.IPv4 {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

// givenRoutes reads ipam.routes: as they were written, and where those of the main table lead.
func givenRoutes(ipam *jsonobject.Object) ([]json.RawMessage, []netip.Prefix, error) {
	var routes []json.RawMessage
	if err := ipam.Decode("routes", &routes, "a list"); err != nil {
		return nil, nil, invalid("ipam.%v", err)
	}
	var known []netip.Prefix
	for i, raw := range routes {
		var r ipamRoute
		if err := json.Unmarshal(raw, &r); err != nil || !r.Dst.IsValid() {
			return nil, nil, unexpected(fmt.Sprintf("ipam.routes[%d]", i), `a route such as {"dst": "10.96.0.0/12"}`, raw)
		}
		if r.Table == nil {
			known = append(known, r.Dst.Masked())
		}
	}
	return routes, known, nil
}

// again is the configuration that was kept at ADD, with what the runtime says anew at CHECK and DEL: the result of ADD,
// in the form of the version that it now speaks, and the values for this container.
func (c Config) again(kept []byte) (Delegate, error) {
	d := new(jsonobject.Object)
	if err := json.Unmarshal(kept, d); err != nil {
		return Delegate{}, err
	}
	d.Delete(bootKey)
	kind, err := pluginType(d, "", "")
	if err != nil {
		return Delegate{}, err
	}
	for key, v := range map[string]json.RawMessage{"prevResult": c.prevResult, "runtimeConfig": c.runtimeConfig} {
		if v == nil {
			continue
		}
		if err := d.Put(key, v); err != nil {
			return Delegate{}, err
		}
	}
	if c.CNIVersion != "" {
		if err := d.Put("cniVersion", c.CNIVersion); err != nil {
			return Delegate{}, err
		}
	}
	conf, err := json.Marshal(d)
	return Delegate{Type: kind, Conf: conf}, err
}

// readObject reads what stands at a path; where nothing does, the object is empty.
func readObject(path string, raw json.RawMessage) (*jsonobject.Object, error) {
	o := new(jsonobject.Object)
	if raw == nil {
		return o, nil
	}
	if err := json.Unmarshal(raw, o); err != nil {
		return nil, decodeError(path, err)
	}
	return o, nil
}

// pluginType reads which plugin an object at a path is for.
func pluginType(o *jsonobject.Object, path, deflt string) (name string, err error) {
	raw := o.Get("type")
	if raw == nil {
		name = deflt
	} else {
		err = json.Unmarshal(raw, &name)
	}
	if err != nil || name == "" || strings.ContainsAny(name, `/\`) {
		return "", unexpected(path+"type", "the name of a plugin", raw)
	}
	return name, nil
}

// flag reads a boolean of the delegate's.
func flag(d *jsonobject.Object, key string, v bool) (bool, error) {
	if err := d.Decode(key, &v, "true or false"); err != nil {
		return false, invalid("delegate.%v", err)
	}
	return v, nil
}
