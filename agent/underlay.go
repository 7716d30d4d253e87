package agent

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// InterfaceOptions say how to find the device that leads to the other nodes. They are tried in the order of the
// fields, as in flannel; none means the device with the default route, or the one that has the public IP.
type InterfaceOptions struct {
	Names    []string // devices, by any of their names, or addresses: the first one that fits
	Regexes  []*regexp.Regexp
	CanReach netip.Addr
	PublicIP addr.Per[netip.Addr] // what the lease says, if it is not the device's own address

	namesBy    string           // what has set Names, as a message calls it; "": --iface
	publicIPBy addr.Per[string] // likewise; "": --public-ip
}

// With are the options with what the store has for this node. That comes before the flags, which mostly are the same on
// many nodes. An interface takes the place of all that says which one to take.
func (o InterfaceOptions) With(s subnet.NodeSettings) (InterfaceOptions, error) {
	var errs []error
	wrong := func(s subnet.Setting, expected string) {
		errs = append(errs, fmt.Errorf("%s: expected %s, found %.100q", s.Name, expected, s.Value))
	}
	if i := s.Interface; i.Value != "" {
		names := strings.FieldsFunc(i.Value, func(r rune) bool { return r == ',' || r == ' ' })
		if len(names) == 0 {
			wrong(i, "interfaces or their addresses, separated by commas")
		}
		o.Names, o.Regexes, o.CanReach, o.namesBy = names, nil, netip.Addr{}, i.Name
	}
	for _, f := range addr.Families() {
		p := s.PublicIP.Get(f)
		if p.Value == "" {
			continue
		}
		ip, ok := addr.ParseHost(p.Value, f)
		if !ok {
			wrong(p, fmt.Sprintf("an %s address", f))
		}
		o.PublicIP.Set(f, ip)
		o.publicIPBy.Set(f, p.Name)
	}
	return o, errors.Join(errs...)
}

// setsNames and setsPublicIP are what a message calls the settings.
func (o InterfaceOptions) setsNames() string { return cmp.Or(o.namesBy, "--iface") }

func (o InterfaceOptions) setsPublicIP(f addr.Family) string {
	return cmp.Or(o.publicIPBy.Get(f), "--public-ip")
}

// Chosen says that an operator chose an interface.
func (o InterfaceOptions) Chosen() bool {
	return len(o.Names)+len(o.Regexes) > 0 || o.CanReach.IsValid()
}

// Choice is the outcome of the search, with its reason.
type Choice struct {
	Underlay      addr.Per[backend.Underlay]
	PublicIP      addr.Per[netip.Addr]
	PublicIPLocal bool // every public IP is configured on the node
	ByDefault     bool // in some family it is the one with the default route, as nothing says which to take
	Reason        string
}

// Choose decides which device and address each family of the network uses. It is pure: all it knows is the host as it
// was seen.
//
// Where there are several addresses, it is the one that the route prefers; if that prefers none, the current one, if
// that is there still: the kernel lists a new IPv6 address first, and one that comes and goes (a virtual address, a
// second prefix) must not move the tunnel.
func Choose(h netstate.Host, o InterfaceOptions, c subnet.Config, current addr.Per[netip.Addr]) (Choice, error) {
	out := Choice{PublicIPLocal: true}
	var reasons []string
	for _, f := range c.Families() {
		public := o.PublicIP.Get(f)
		s := search{host: h, config: c, family: f, current: current.Get(f)}
		switch {
		case !public.IsValid():
		case h.Has(public):
			s.asked = public
		case public == s.current: // whether NAT leads here from now on, or its device comes back in a moment, can't be told
			return Choice{}, noUnderlay{f, fmt.Errorf("no network interface for %s: %s %s is no longer on any "+
				"device (restart overlayd if NAT leads from it to this node now)", f, o.setsPublicIP(f), public)}
		}
		u, why, err := s.choose(o)
		if err != nil {
			return Choice{}, noUnderlay{f, err}
		}
		if !public.IsValid() {
			public = u.Addr
		}
		out.Underlay.Set(f, u)
		out.PublicIP.Set(f, public)
		out.PublicIPLocal = out.PublicIPLocal && h.Has(public)
		out.ByDefault = out.ByDefault || !o.Chosen() && !s.asked.IsValid()
		reasons = append(reasons, fmt.Sprintf("%s: %s", f, why))
	}
	out.Reason = strings.Join(reasons, "; ")
	return out, nil
}

// noUnderlay says that nothing leads to the other nodes in a family.
type noUnderlay struct {
	family addr.Family
	error
}

// whatBecame says how the device is that led to the other nodes so far.
func whatBecame(h netstate.Host, u backend.Underlay) string {
	l, there := h.Link(u.Device)
	switch {
	case u.Device == "" && !h.Has(u.Addr):
		return fmt.Sprintf("%s, used so far, is no longer on any device", u.Addr)
	case u.Device == "":
		return fmt.Sprintf("%s, used so far, is still present, but no route leads to other nodes", u.Addr)
	case !there:
		return u.Device + ", used so far, is gone"
	case !l.Up:
		return u.Device + ", used so far, is down"
	case !h.Has(u.Addr):
		return fmt.Sprintf("%s, used so far, lost its address %s", u.Device, u.Addr)
	}
	return u.Device + ", used so far, is unchanged, but no route uses it"
}

// search is what one family's choice is made of.
type search struct {
	host    netstate.Host
	config  subnet.Config
	family  addr.Family
	asked   netip.Addr // --public-ip, where the node has it
	current netip.Addr // that the node goes by so far; not valid before it goes by any
}

// candidate is a way to the other nodes to try, and why.
type candidate struct {
	uplinks []netstate.HostRoute // the next hops by which packets leave; of a named device, maybe nothing but the device
	from    string               // the device whose address it has to be; "": one of the uplinks, or of lo
	addr    netip.Addr           // the one address that was asked for
	named   bool                 // the device was named: the source that a route prefers has to be on it
	why     string
}

func (s search) choose(o InterfaceOptions) (u backend.Underlay, why string, err error) {
	list, wanted := s.candidates(o)
	errs := []error{}
	for _, c := range list {
		u, why, err := s.take(c)
		if err == nil {
			return u, why, nil
		}
		errs = append(errs, err)
	}
	if len(errs) == 0 {
		errs = append(errs, errors.New("no device matches"))
	}
	return backend.Underlay{}, "", fmt.Errorf("no network interface for %s yet (%s): %w", s.family, wanted,
		errors.Join(errs...))
}

// candidates lists what to try, in order, and says what was looked for.
func (s search) candidates(o InterfaceOptions) ([]candidate, string) {
	var list []candidate
	var wanted []string
	if len(o.Names) > 0 {
		list, wanted = s.byName(o), append(wanted, o.setsNames()+" "+strings.Join(o.Names, ", "))
	}
	if len(o.Regexes) > 0 {
		list = append(list, s.byRegex(o.Regexes)...)
		wanted = append(wanted, fmt.Sprintf("--iface-regex %s", o.Regexes))
	}
	if o.CanReach.IsValid() {
		why := fmt.Sprintf("route to %s", o.CanReach)
		if hops := s.host.NextHops(o.CanReach); len(hops) > 0 && !hops[0].Drops {
			c := candidate{uplinks: hops, why: why}
			if l, _ := s.host.Link(hops[0].Link); addr.FamilyOf(o.CanReach) != s.family { // says no more than the device
				c = s.byDevice(l, why)
			}
			list = append(list, c)
		}
		wanted = append(wanted, fmt.Sprintf("--iface-can-reach %s", o.CanReach))
	}
	switch {
	case len(wanted) > 0:
		return list, strings.Join(wanted, ", ")
	case s.asked.IsValid():
		by := o.setsPublicIP(s.family)
		return s.byAddress(s.asked, by), fmt.Sprintf("%s %s", by, s.asked)
	}
	for _, hops := range s.defaults() {
		have := "it has"
		if len(devicesOf(hops)) > 1 {
			have = "they have"
		}
		list = append(list,
			candidate{uplinks: hops, why: fmt.Sprintf("%s the default route, metric %d", have, hops[0].Metric)})
	}
	return list, "the one with the default route"
}

// defaults are the next hops of each default route, that with the lowest metric first.
func (s search) defaults() [][]netstate.HostRoute {
	var out [][]netstate.HostRoute
	s.host.EachRoute(func(hops []netstate.HostRoute) {
		if r := hops[0]; r.Dst.Bits() == 0 && addr.FamilyOf(r.Dst.Addr()) == s.family && !r.Drops {
			out = append(out, hops)
		}
	})
	slices.SortStableFunc(out, func(a, b []netstate.HostRoute) int { return int(a[0].Metric) - int(b[0].Metric) })
	return out
}

// uplinks are the next hops by which packets leave from an address that is on none of the devices that they leave by:
// those of the default route, or where there is none, those with any gateway.
func (s search) uplinks() []netstate.HostRoute {
	for _, hops := range s.defaults() {
		if !slices.ContainsFunc(hops, func(r netstate.HostRoute) bool { return s.host.IsTunnel(r.Link) }) {
			return hops
		}
	}
	var out []netstate.HostRoute
	for _, r := range s.host.Routes {
		if addr.FamilyOf(r.Dst.Addr()) == s.family && r.Via.IsValid() && !r.Drops && !s.host.IsTunnel(r.Link) {
			out = append(out, r)
		}
	}
	return out
}

// byName finds devices by any of their names, or by an address.
func (s search) byName(o InterfaceOptions) []candidate {
	var list []candidate
	for _, n := range o.Names {
		why := o.setsNames() + " " + n
		if ip, err := netip.ParseAddr(n); err == nil {
			list = append(list, s.byAddress(ip, why)...)
			continue
		}
		i := slices.IndexFunc(s.host.Links, func(l netstate.HostLink) bool { return l.HasName(n) })
		if i < 0 {
			list = append(list, candidate{uplinks: []netstate.HostRoute{{Link: n}}, named: true})
			continue
		}
		list = append(list, s.byDevice(s.host.Links[i], why))
	}
	return list
}

// byDevice takes a device: to leave by, or the loopback device for its address.
func (s search) byDevice(l netstate.HostLink, why string) candidate {
	if l.Loopback {
		return candidate{uplinks: s.uplinks(), from: l.Name, named: true, why: why}
	}
	c := candidate{named: true, why: why}
	hops := slices.Concat(s.defaults()...)
	i := slices.IndexFunc(hops, func(r netstate.HostRoute) bool { return r.Link == l.Name })
	if c.uplinks = []netstate.HostRoute{{Link: l.Name}}; i >= 0 {
		c.uplinks = hops[i : i+1]
	}
	return c
}

// byAddress takes the device that has an address. One of the other family says no more than which device it is.
func (s search) byAddress(ip netip.Addr, why string) []candidate {
	i := slices.IndexFunc(s.host.Addresses, func(a netstate.HostAddress) bool { return a.Prefix.Addr() == ip })
	if i < 0 {
		return nil
	}
	l, _ := s.host.Link(s.host.Addresses[i].Link)
	c := s.byDevice(l, why)
	if addr.FamilyOf(ip) == s.family {
		c.addr = ip
		if l.Kind == "dummy" { // as good as the loopback device
			c.uplinks, c.from = s.uplinks(), l.Name
		}
	}
	return []candidate{c}
}

func (s search) byRegex(regexes []*regexp.Regexp) []candidate {
	var list []candidate
	for _, re := range regexes {
		for _, l := range s.host.Links {
			why := fmt.Sprintf("--iface-regex %s", re)
			if slices.ContainsFunc(l.Names(), re.MatchString) {
				list = append(list, s.byDevice(l, why))
				continue
			}
			for _, a := range s.host.Addresses {
				if a.Link == l.Name && re.MatchString(a.Prefix.Addr().String()) {
					list = append(list, s.byAddress(a.Prefix.Addr(), why)...)
				}
			}
		}
	}
	return list
}

// take looks whether a candidate can serve. The tunnel is bound to a device where there is but one uplink, and the
// address is on it.
func (s search) take(c candidate) (backend.Underlay, string, error) {
	if len(c.uplinks) == 0 {
		return backend.Underlay{}, "", fmt.Errorf(
			"no route leads from %s to other nodes: no default route, and none with a gateway", c.from)
	}
	var u backend.Underlay
	var errs []error
	devices, up := devicesOf(c.uplinks), slices.Clone(c.uplinks)
	for _, d := range devices {
		l, err := s.uplink(d)
		if err == nil && !c.named {
			err = s.podsBridge(l)
		}
		counts := err == nil || errors.Is(err, errDown) // one that comes back must not change the pod MTU
		if counts && (u.MTU == 0 || l.MTU < u.MTU) {
			u.MTU = l.MTU
		}
		if err != nil {
			errs = append(errs, err)
			up = slices.DeleteFunc(up, func(hop netstate.HostRoute) bool { return hop.Link == d })
		}
	}
	if len(up) == 0 {
		return u, "", errors.Join(errs...)
	}
	a, err := s.address(c, up)
	if err != nil {
		return u, "", err
	}
	u.Addr = a.Prefix.Addr()
	if len(devices) == 1 && a.Link == devices[0] {
		u.Device = a.Link
		return u, fmt.Sprintf("%s on %s (%s)", u.Addr, u.Device, c.why), nil
	}
	by := strings.Join(devices, " and ")
	return u, fmt.Sprintf("%s of %s by %s, bound to no device (%s)", u.Addr, a.Link, by, c.why), nil
}

// devicesOf lists the devices by which next hops are reached.
func devicesOf(hops []netstate.HostRoute) []string {
	var out []string
	for _, r := range hops {
		if !slices.Contains(out, r.Link) {
			out = append(out, r.Link)
		}
	}
	return out
}

var errDown = errors.New("down")

// uplink looks whether packets to other nodes can leave by a device.
func (s search) uplink(name string) (netstate.HostLink, error) {
	l, ok := s.host.Link(name)
	master, _ := s.host.Link(l.Master)
	switch {
	case name == "":
		return l, errors.New("the route has no device")
	case !ok:
		real, _, found := strings.Cut(name, "@")
		if found && slices.ContainsFunc(s.host.Links, func(l netstate.HostLink) bool { return l.HasName(real) }) {
			return l, fmt.Errorf("device %s does not exist: its name is %s (ip prints the peer behind the @)", name,
				real)
		}
		return l, fmt.Errorf("device %s does not exist", name)
	case l.Tunnel:
		return l, fmt.Errorf("%s is a tunnel device of overlayd itself: packets to other nodes cannot leave by it", name)
	case !l.Up:
		return l, fmt.Errorf("%s is %w", name, errDown)
	case l.Loopback:
		return l, fmt.Errorf("%s is the loopback device", name)
	case master.Kind == "vrf":
		return l, fmt.Errorf("%s is in the VRF %s, but the tunnel uses the main routing table", name, master.Name)
	}
	return l, nil
}

// podsBridge says whether a device is the bridge that pods are on, and nothing else. Whatever routes another program
// makes by it, it leads to no other node; only an operator may name it.
func (s search) podsBridge(l netstate.HostLink) error {
	uplink := func(o netstate.HostLink) bool { return o.Master == l.Name && o.Kind != "veth" }
	i := slices.IndexFunc(s.host.Addresses, func(a netstate.HostAddress) bool {
		return a.Link == l.Name && s.config.Contains(a.Prefix.Addr())
	})
	if l.Kind != "bridge" || i < 0 || slices.ContainsFunc(s.host.Links, uplink) {
		return nil
	}
	return fmt.Errorf("%s is the pod bridge (it has the address %s)", l.Name,
		s.host.Addresses[i].Prefix.Addr())
}

// address finds the address to send from: of those that can be reached, the one with the lowest rank.
func (s search) address(c candidate, up []netstate.HostRoute) (netstate.HostAddress, error) {
	devices := devicesOf(up)
	if c.from != "" {
		devices = []string{c.from}
	}
	best, least := netstate.HostAddress{}, noRank
	for _, a := range s.host.Addresses {
		if r := s.rank(c, up[0], devices, a); r < least && addr.FamilyOf(a.Prefix.Addr()) == s.family && s.why(a) == "" {
			best, least = a, r
		}
	}
	if least == noRank {
		return best, s.unusable(c.addr, devices)
	}
	return best, nil
}

const noRank = math.MaxInt

// rank is the place of an address among those to send from: the one that was asked for; else the one that the route
// prefers, then the current one, and then the one that the kernel would take: in the network of the gateway, or else
// the first of the device, or of the loopback device.
func (s search) rank(c candidate, hop netstate.HostRoute, devices []string, a netstate.HostAddress) int {
	ip, at := a.Prefix.Addr(), slices.Index(devices, a.Link)
	l, _ := s.host.Link(a.Link)
	lost := s.current.IsValid() && !s.host.Has(s.current) // and may be back in a moment
	switch on := at >= 0; {
	case c.addr.IsValid() && ip != c.addr:
		return noRank
	case c.addr.IsValid(), on && ip == s.asked:
		return 0
	case ip == hop.Src && (on || !c.named):
		return 1
	case on && ip == s.current:
		return 2
	case on && a.Link == hop.Link && a.Prefix.Contains(hop.Via):
		return 3
	case on:
		return 4 + at
	case c.from != "" || !hop.Dst.IsValid() || lost: // else a route by devices that have no address of their own
		return noRank
	case ip == hop.Src:
		return 4 + len(devices)
	case l.Loopback && ip == s.current:
		return 5 + len(devices)
	case l.Loopback:
		return 6 + len(devices)
	}
	return noRank
}

// why says why an address of the node can't be the one that it is reached at; "": it can.
func (s search) why(a netstate.HostAddress) string {
	ip := a.Prefix.Addr()
	switch {
	case a.Tunnel:
		return fmt.Sprintf("%s is on %s, a tunnel device of overlayd itself", ip, a.Link)
	case s.config.Contains(ip):
		return fmt.Sprintf("%s has the address %s inside the overlay network %s: the two must not overlap",
			a.Link, ip, s.config.Pools.Get(s.family).Network)
	case ip.IsLoopback():
		return fmt.Sprintf("%s is a loopback address, unreachable from other nodes", ip)
	case !ip.IsGlobalUnicast():
		return fmt.Sprintf("%s of %s is reachable only on its own link", ip, a.Link)
	case a.Fleeting:
		return fmt.Sprintf("the address %s of %s is tentative, deprecated or temporary", ip, a.Link)
	}
	return ""
}

// unusable says why no address serves: of those on the devices, or the one.
func (s search) unusable(one netip.Addr, devices []string) error {
	none := fmt.Errorf("%s has no usable %s address", strings.Join(devices, " and "), s.family)
	for _, a := range s.host.Addresses {
		ip := a.Prefix.Addr()
		meant := ip == one || !one.IsValid() && slices.Contains(devices, a.Link) && !ip.IsLinkLocalUnicast()
		if why := s.why(a); meant && why != "" && addr.FamilyOf(ip) == s.family {
			return fmt.Errorf("%w: %s", none, why)
		}
	}
	for _, d := range devices {
		if l, _ := s.host.Link(d); l.Master != "" {
			return fmt.Errorf("%w: it is a port of %s; use that device", none, l.Master)
		}
	}
	return none
}

// narrowest is the MTU that gets through to all peers: that of the underlay, unless routes lead to some of them by a
// device with less. What it costs depends on the number of peers only where there are such routes.
func narrowest(h netstate.Host, c subnet.Config, f addr.Family, mtu int, peers func() []*subnet.Lease) int {
	less := map[string]int{}
	for _, l := range h.Links {
		if l.Up && !l.Tunnel && l.MTU < mtu {
			less[l.Name] = l.MTU
		}
	}
	leads := func(r netstate.HostRoute) bool {
		dst := r.Dst.Addr()
		return less[r.Link] > 0 && addr.FamilyOf(dst) == f && !r.Drops && !dst.IsLinkLocalUnicast() && !c.Contains(dst)
	}
	if !slices.ContainsFunc(h.Routes, leads) {
		return mtu
	}
	for _, p := range peers() {
		for _, r := range h.NextHops(p.PublicIP.Get(f)) {
			if leads(r) {
				mtu = min(mtu, less[r.Link])
			}
		}
	}
	return mtu
}
