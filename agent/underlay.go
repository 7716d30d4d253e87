package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// InterfaceOptions say how to find the device that leads to the other nodes. The first that is set counts, in the order of the
// fields; none means the device with the default route.
type InterfaceOptions struct {
	Names    []string // device names or addresses, the first one that fits
	Regexes  []*regexp.Regexp
	CanReach netip.Addr
	PublicIP addr.Per[netip.Addr] // what the lease says, if it is not the device's own address
}

// Choice is the outcome of the search, with its reason.
type Choice struct {
	Underlay      addr.Per[backend.Underlay]
	PublicIP      addr.Per[netip.Addr]
	PublicIPLocal bool // every public IP is configured on the node
	Reason        string
}

// Choose decides which device and address each family of the network uses. It is pure: all it knows is the host as it was seen.
//
// Where a device has several addresses, it is the current one, if that is there still: the kernel lists a new IPv6 address first, and
// one that comes and goes (a virtual address, a second prefix) must not move the tunnel.
func Choose(h netstate.Host, o InterfaceOptions, c subnet.Config, current addr.Per[netip.Addr]) (Choice, error) {
	out := Choice{PublicIPLocal: true}
	var reasons []string
	for _, f := range c.Families() {
		prefer := current.Get(f)
		if p := o.PublicIP.Get(f); p.IsValid() && h.Has(p) {
			prefer = p
		}
		u, why, err := chooseFamily(h, o, c, f, prefer)
		if err != nil {
			return Choice{}, err
		}
		public := u.Addr
		if p := o.PublicIP.Get(f); p.IsValid() {
			public = p
		}
		out.Underlay.Set(f, u)
		out.PublicIP.Set(f, public)
		out.PublicIPLocal = out.PublicIPLocal && h.Has(public)
		reasons = append(reasons, fmt.Sprintf("%s: %s on %s (%s)", f, u.Addr, u.Device, why))
	}
	out.Reason = strings.Join(reasons, "; ")
	return out, nil
}

// whatBecame says how the devices are that led to the other nodes so far.
func whatBecame(h netstate.Host, was addr.Per[backend.Underlay]) string {
	var out []string
	for _, f := range addr.Families() {
		u := was.Get(f)
		if u.Device == "" {
			continue
		}
		i := slices.IndexFunc(h.Links, func(l netstate.HostLink) bool { return l.Name == u.Device })
		how := "is as it was, but nothing leads to it"
		switch {
		case i < 0:
			how = "is gone"
		case !h.Links[i].Up:
			how = "is down"
		case !h.Has(u.Addr):
			how = fmt.Sprintf("has lost its address %s", u.Addr)
		}
		if s := fmt.Sprintf("%s, which it was so far, %s", u.Device, how); !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return strings.Join(out, "; ")
}

// candidate is a device to try, and why; addr is valid where one address of it was asked for.
type candidate struct {
	device string
	addr   netip.Addr
	why    string
}

func chooseFamily(h netstate.Host, o InterfaceOptions, c subnet.Config, f addr.Family, prefer netip.Addr) (backend.Underlay, string, error) {
	list, wanted := candidates(h, o, f)
	errs := []error{}
	for _, cand := range list {
		u, err := take(h, c, f, cand, prefer)
		if err == nil {
			return u, cand.why, nil
		}
		errs = append(errs, err)
	}
	if len(errs) == 0 {
		errs = append(errs, errors.New("there is none such on this node"))
	}
	return backend.Underlay{}, "", fmt.Errorf("no network interface for %s yet (%s): %w", f, wanted, errors.Join(errs...))
}

// candidates lists the devices to try, in order, and says what was looked for.
func candidates(h netstate.Host, o InterfaceOptions, f addr.Family) ([]candidate, string) {
	switch {
	case len(o.Names) > 0:
		return byName(h, o.Names, f), "--iface " + strings.Join(o.Names, ", ")
	case len(o.Regexes) > 0:
		return byRegex(h, o.Regexes), fmt.Sprintf("--iface-regex %s", o.Regexes)
	case o.CanReach.IsValid():
		var list []candidate
		if r, ok := h.Route(o.CanReach); ok {
			list = append(list, candidate{device: r.Link, why: fmt.Sprintf("the way to %s", o.CanReach)})
		}
		return list, fmt.Sprintf("--iface-can-reach %s", o.CanReach)
	}
	var routes []netstate.HostRoute
	for _, r := range h.Routes {
		if r.Dst.Bits() == 0 && addr.FamilyOf(r.Dst.Addr()) == f && r.Link != "" && !r.Drops {
			routes = append(routes, r)
		}
	}
	slices.SortStableFunc(routes, func(a, b netstate.HostRoute) int { return int(a.Metric) - int(b.Metric) })
	var list []candidate
	for _, r := range routes {
		list = append(list, candidate{device: r.Link, why: fmt.Sprintf("it has the default route, metric %d", r.Metric)})
	}
	return list, "the one with the default route"
}

func byName(h netstate.Host, names []string, f addr.Family) []candidate {
	var list []candidate
	for _, n := range names {
		ip, err := netip.ParseAddr(n)
		if err != nil {
			list = append(list, candidate{device: n, why: "--iface"})
			continue
		}
		for _, a := range h.Addresses {
			if a.Prefix.Addr() != ip {
				continue
			}
			if addr.FamilyOf(ip) != f { // the device's address of the other family will do
				ip = netip.Addr{}
			}
			list = append(list, candidate{device: a.Link, addr: ip, why: "--iface " + n})
			break
		}
	}
	return list
}

func byRegex(h netstate.Host, regexes []*regexp.Regexp) []candidate {
	var list []candidate
	for _, re := range regexes {
		for _, l := range h.Links {
			why := fmt.Sprintf("--iface-regex %s", re)
			if re.MatchString(l.Name) {
				list = append(list, candidate{device: l.Name, why: why})
				continue
			}
			for _, a := range h.Addresses {
				if a.Link == l.Name && re.MatchString(a.Prefix.Addr().String()) {
					list = append(list, candidate{device: l.Name, addr: a.Prefix.Addr(), why: why})
				}
			}
		}
	}
	return list
}

// take looks whether a device can serve.
func take(h netstate.Host, c subnet.Config, f addr.Family, cand candidate, prefer netip.Addr) (backend.Underlay, error) {
	l, ok := h.Link(cand.device)
	switch {
	case !ok:
		return backend.Underlay{}, fmt.Errorf("there is no device %s", cand.device)
	case !l.Up:
		return backend.Underlay{}, fmt.Errorf("%s is down", l.Name)
	case l.Loopback:
		return backend.Underlay{}, fmt.Errorf("%s is the loopback device", l.Name)
	}
	var best, inside netip.Addr
	for _, a := range h.Addresses {
		ip := a.Prefix.Addr()
		if a.Link == l.Name && c.Contains(ip) && addr.FamilyOf(ip) == f {
			inside = ip
		}
		usable := a.Link == l.Name && addr.FamilyOf(ip) == f && !a.Fleeting && ip.IsGlobalUnicast() && !c.Contains(ip)
		if !usable || cand.addr.IsValid() && addr.FamilyOf(cand.addr) == f && ip != cand.addr {
			continue
		}
		if !best.IsValid() || ip == prefer {
			best = ip
		}
	}
	if !best.IsValid() && inside.IsValid() {
		return backend.Underlay{}, fmt.Errorf("%s has the address %s, which is inside the overlay network %s: the two must not overlap",
			l.Name, inside, c.Pools.Get(f).Network)
	}
	if !best.IsValid() {
		return backend.Underlay{}, fmt.Errorf("%s has no %s address to use", l.Name, f)
	}
	return backend.Underlay{Device: l.Name, Addr: best, MTU: l.MTU}, nil
}
