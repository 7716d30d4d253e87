package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
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

// Generate makes the delegate's configuration. What the operator wrote under `delegate` and `ipam` wins, but for the
// keys that only this plugin can know. Errors are of type *types.Error and name the JSON path.
func (c Config) Generate(env SubnetEnv) (Delegate, error) {
	var d, ipam jsonobject.Object
	for key, o := range map[string]*jsonobject.Object{"delegate": &d, "ipam": &ipam} {
		if err := c.all.Decode(key, o, "an object"); err != nil {
			return Delegate{}, invalid("%v", err)
		}
	}
	for _, key := range []string{"name", "ipam"} {
		if raw := d.Get(key); raw != nil {
			expected := fmt.Sprintf("nothing here (it is taken from %q beside delegate)", key)
			return Delegate{}, unexpected("delegate."+key, expected, raw)
		}
	}
	kind, err := pluginType(d, "delegate.", "bridge")
	if err != nil {
		return Delegate{}, err
	}
	if kind == c.Type { // it would start itself for ever
		return Delegate{}, invalid("delegate.type: expected another plugin than this one, found %q", kind)
	}
	if err := c.fillIPAM(&ipam, env, kind, &d); err != nil {
		return Delegate{}, err
	}
	if err := c.fill(&d, ipam, env, kind); err != nil {
		return Delegate{}, err
	}
	conf, err := json.Marshal(d)
	return Delegate{Type: kind, Conf: conf}, err
}

func (c Config) fill(d *jsonobject.Object, ipam jsonobject.Object, env SubnetEnv, kind string) error {
	promisc, err := flag(*d, "promiscMode", false)
	if err != nil {
		return err
	}
	always := map[string]any{"type": kind, "name": c.Name, "ipam": ipam}
	ifAbsent := map[string]any{"mtu": env.MTU, "ipMasq": !env.IPMasq}
	if c.CNIVersion != "" {
		always["cniVersion"] = c.CNIVersion
	}
	if c.runtimeConfig != nil {
		always["runtimeConfig"] = c.runtimeConfig
	}
	if args := given(c.all.Get("args")); args != nil {
		ifAbsent["args"] = args
	}
	if kind == "bridge" {
		ifAbsent["isGateway"] = true
		// A pod that reaches itself through its service goes out and in by one port of the bridge. In promiscuous mode
		// the bridge does that by itself, and the plugin rejects both together.
		if !promisc {
			ifAbsent["hairpinMode"] = true
		}
	}
	maps.DeleteFunc(ifAbsent, func(key string, _ any) bool { return d.Get(key) != nil })
	maps.Copy(always, ifAbsent)
	return d.PutAll(always)
}

// fillIPAM completes the ipam section; for a bridge it decides on isDefaultGateway as well, which is a route by another
// name.
func (c Config) fillIPAM(ipam *jsonobject.Object, env SubnetEnv, kind string, d *jsonobject.Object) error {
	plugin, err := pluginType(*ipam, "ipam.", "host-local")
	if err != nil {
		return err
	}
	routes, known, err := givenRoutes(*ipam)
	if err != nil {
		return err
	}
	var add []netip.Prefix
	var ranges [][]map[string]netip.Prefix // a set of ranges for each family: a pod gets one address from each set
	for _, f := range env.Families() {
		ranges = append(ranges, []map[string]netip.Prefix{{"subnet": env.Subnet.Get(f)}})
		add = append(add, env.Networks.Get(f)...)
	}
	defaults, err := defaultRoutes(env, kind, d, known)
	if err != nil {
		return err
	}
	for _, dst := range append(add, defaults...) {
		if slices.Contains(known, dst) { // the kernel rejects a second one
			continue
		}
		known = append(known, dst)
		routes = append(routes, fmt.Appendf(nil, `{"dst":"%s"}`, dst))
	}
	return ipam.PutAll(map[string]any{"type": plugin, "ranges": ranges, "routes": routes})
}

// defaultRoutes gives the default routes to add to ipam.routes. A bridge is told by isDefaultGateway instead, unless
// the operator gives default routes. With macvlan and others, the gateway is not known.
func defaultRoutes(env SubnetEnv, kind string, d *jsonobject.Object, known []netip.Prefix) ([]netip.Prefix, error) {
	var defaults []netip.Prefix
	for _, f := range env.Families() {
		defaults = append(defaults, defaultRoute(f))
	}
	switch kind {
	case "ptp":
		return defaults, nil
	case "bridge":
		gateway, err := flag(*d, "isGateway", true)
		if err != nil || !gateway || d.Get("isDefaultGateway") != nil {
			return nil, err
		}
		if !slices.ContainsFunc(known, func(p netip.Prefix) bool { return p.Bits() == 0 }) {
			return nil, d.Put("isDefaultGateway", true)
		}
		return defaults, nil // with isDefaultGateway, the plugin would add one route twice, and fail
	}
	return nil, nil
}

func defaultRoute(f addr.Family) netip.Prefix {
	return netip.PrefixFrom(addr.Per[netip.Addr]{V4: netip.IPv4Unspecified(), V6: netip.IPv6Unspecified()}.Get(f), 0)
}

// givenRoutes reads ipam.routes: as they were written, and the destinations of those of the main table.
func givenRoutes(ipam jsonobject.Object) ([]json.RawMessage, []netip.Prefix, error) {
	var routes []json.RawMessage
	if err := ipam.Decode("routes", &routes, "a list"); err != nil {
		return nil, nil, invalid("ipam.%v", err)
	}
	var known []netip.Prefix
	for i, raw := range routes {
		var r struct {
			Dst   netip.Prefix
			Table *int
		}
		if err := json.Unmarshal(raw, &r); err != nil || !r.Dst.IsValid() {
			return nil, nil, unexpected(fmt.Sprintf("ipam.routes[%d]", i), `a route such as {"dst": "10.96.0.0/12"}`, raw)
		}
		if r.Table == nil {
			known = append(known, r.Dst.Masked())
		}
	}
	return routes, known, nil
}

// withKept is the configuration that was kept at ADD, with what the runtime says at CHECK and DEL: the result of ADD,
// in the form of the version that it now speaks, and the values for this container. Errors have nothing of the content.
func (c Config) withKept(kept []byte) (Delegate, error) {
	var d jsonobject.Object
	if json.Unmarshal(kept, &d) != nil {
		return Delegate{}, errors.New("not a JSON object")
	}
	d.Delete(bootKey)
	kind, err := pluginType(d, "", "")
	if err != nil {
		return Delegate{}, errors.New("type is not the name of a plugin")
	}
	now := map[string]any{}
	if c.CNIVersion != "" {
		now["cniVersion"] = c.CNIVersion
	}
	for key, v := range map[string]json.RawMessage{"prevResult": c.prevResult, "runtimeConfig": c.runtimeConfig} {
		if v != nil {
			now[key] = v
		}
	}
	if err := d.PutAll(now); err != nil {
		return Delegate{}, err
	}
	conf, err := json.Marshal(d)
	return Delegate{Type: kind, Conf: conf}, err
}

// pluginType reads which plugin an object at a path is for.
func pluginType(o jsonobject.Object, path, deflt string) (name string, err error) {
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
func flag(d jsonobject.Object, key string, v bool) (bool, error) {
	if err := d.Decode(key, &v, "true or false"); err != nil {
		return false, invalid("delegate.%v", err)
	}
	return v, nil
}
