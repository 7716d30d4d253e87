package cni

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/overlayd/overlayd/addr"
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
		if raw, ok := d.get(key); ok {
			return Delegate{}, invalid("delegate.%s: expected nothing here (it is taken from %q beside delegate), found %s", key, key, excerpt(raw))
		}
	}
	kind, err := d.text("delegate", "type", "bridge")
	if err != nil {
		return Delegate{}, err
	}
	if strings.ContainsAny(kind, `/\`) {
		return Delegate{}, invalid("delegate.type: expected the name of a plugin, found %q", kind)
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

func (c Config) fill(d, ipam object, env SubnetEnv, kind string) error {
	promisc, err := d.flag("delegate", "promiscMode", false)
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
		if err := d.put(e.key, e.value); err != nil {
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
		if err := d.offer(e.key, e.value); err != nil {
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
func (c Config) generateIPAM(env SubnetEnv, kind string, d object) (object, error) {
	ipam, err := readObject("ipam", c.ipam)
	if err != nil {
		return nil, err
	}
	plugin, err := ipam.text("ipam", "type", "host-local")
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
		if err := ipam.put(key, v); err != nil {
			return nil, err
		}
	}
	return ipam, nil
}

// defaultRoutes gives the default routes to add to ipam.routes. A bridge is told by isDefaultGateway instead, as far as
// the operator says nothing of default routes himself. On macvlan and others nobody knows who the gateway would be.
func (c Config) defaultRoutes(env SubnetEnv, kind string, d object, known []netip.Prefix) ([]netip.Prefix, error) {
	var defaults []netip.Prefix
	for _, f := range env.Families() {
		defaults = append(defaults, defaultRoute(f))
	}
	switch kind {
	case "ptp":
		return defaults, nil
	case "bridge":
		gateway, err := d.flag("delegate", "isGateway", true)
		if err != nil || !gateway || d.has("isDefaultGateway") {
			return nil, err
		}
		if !slices.ContainsFunc(known, func(p netip.Prefix) bool { return p.Bits() == 0 }) {
			return nil, d.put("isDefaultGateway", true)
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
func givenRoutes(ipam object) ([]json.RawMessage, []netip.Prefix, error) {
	raw, _ := ipam.get("routes")
	var routes []json.RawMessage
	if given(raw) != nil {
		if err := json.Unmarshal(raw, &routes); err != nil {
			return nil, nil, invalid("ipam.routes: expected a list, found %s", excerpt(raw))
		}
	}
	var known []netip.Prefix
	for i, raw := range routes {
		var r ipamRoute
		if err := json.Unmarshal(raw, &r); err != nil || !r.Dst.IsValid() {
			return nil, nil, invalid(`ipam.routes[%d]: expected a route such as {"dst": "10.96.0.0/12"}, found %s`, i, excerpt(raw))
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
	var d object
	if err := json.Unmarshal(kept, &d); err != nil {
		return Delegate{}, err
	}
	delete(d, bootKey)
	kind, err := d.text("", "type", "")
	if err != nil {
		return Delegate{}, err
	}
	if kind == "" || strings.ContainsAny(kind, `/\`) {
		return Delegate{}, fmt.Errorf("type: expected the name of a plugin, found %q", kind)
	}
	for key, v := range map[string]json.RawMessage{"prevResult": c.prevResult, "runtimeConfig": c.runtimeConfig} {
		if v == nil {
			continue
		}
		if err := d.put(key, v); err != nil {
			return Delegate{}, err
		}
	}
	if c.CNIVersion != "" {
		if err := d.put("cniVersion", c.CNIVersion); err != nil {
			return Delegate{}, err
		}
	}
	conf, err := json.Marshal(d)
	return Delegate{Type: kind, Conf: conf}, err
}
