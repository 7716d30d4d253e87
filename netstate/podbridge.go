package netstate

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/overlayd/overlayd/addr"
)

// PodBridge is a bridge that has an address of this node's own subnet: the one that pods are on.
type PodBridge struct {
	Name  string
	Addrs addr.Per[netip.Prefix]
	Ports []BridgePort `json:",omitempty"`
}

// BridgePort is a device on a bridge. Its index tells it from another one that was given its name later.
type BridgePort struct {
	Index int
	Name  string
}

// BridgeLoss is what such a bridge had and has no longer.
type BridgeLoss struct {
	Bridge string
	Gone   bool // the bridge itself, while devices that were on it are still there
	Down   bool
	Addrs  []netip.Prefix
	Ports  []string
}

// FollowBridges brings up to date what is known of the pods' bridges, and says what they have lost. It is pure. What
// is lost stays known until it is back, or nothing needs it: a bridge that was removed with all that was on it, or
// whose place another one has, has lost nothing.
func FollowBridges(before []PodBridge, h Host, own addr.Per[netip.Prefix]) (now []PodBridge, lost []BridgeLoss) {
	for _, a := range h.Addresses {
		f := addr.FamilyOf(a.Prefix.Addr())
		l, ok := h.Link(a.Link)
		if sn := own.Get(f); !ok || l.Kind != "bridge" || !sn.IsValid() || !sn.Contains(a.Prefix.Addr()) {
			continue
		}
		i := slices.IndexFunc(now, func(b PodBridge) bool { return b.Name == l.Name })
		if i < 0 {
			i, now = len(now), append(now, PodBridge{Name: l.Name})
		}
		if !now[i].Addrs.Get(f).IsValid() {
			now[i].Addrs.Set(f, a.Prefix)
		}
	}
	taken := addr.Per[bool]{V4: inUse(h, own.V4), V6: inUse(h, own.V6)}
	for _, b := range before {
		i := slices.IndexFunc(now, func(n PodBridge) bool { return n.Name == b.Name })
		is := PodBridge{Name: b.Name}
		if i >= 0 {
			is = now[i]
		}
		l, there := h.Link(b.Name)
		there = there && l.Kind == "bridge"
		loss := BridgeLoss{Bridge: b.Name, Gone: !there, Down: there && !l.Up}
		for _, f := range addr.Families() {
			p := b.Addrs.Get(f)
			if there && p.IsValid() && own.Get(f).IsValid() && own.Get(f).Contains(p.Addr()) && !taken.Get(f) {
				is.Addrs.Set(f, p)
				loss.Addrs = append(loss.Addrs, p)
			}
		}
		for _, p := range b.Ports {
			if l, ok := h.Link(p.Name); ok && l.Index == p.Index && l.Master == "" {
				is.Ports = append(is.Ports, p)
				loss.Ports = append(loss.Ports, p.Name)
			}
		}
		if is.Addrs == (addr.Per[netip.Prefix]{}) && len(is.Ports) == 0 {
			continue
		}
		if i >= 0 {
			now[i] = is
		} else {
			now = append(now, is)
		}
		if loss.Down || len(loss.Addrs)+len(loss.Ports) > 0 {
			lost = append(lost, loss)
		}
	}
	for i := range now {
		for _, l := range h.Links {
			if l.Master == now[i].Name {
				now[i].Ports = append(now[i].Ports, BridgePort{l.Index, l.Name})
			}
		}
	}
	return now, lost
}

// inUse reports whether a device of the node, the tunnels aside, has an address of a subnet.
func inUse(h Host, sn netip.Prefix) bool {
	return sn.IsValid() && slices.ContainsFunc(h.Addresses, func(a HostAddress) bool {
		return !a.Tunnel && sn.Contains(a.Prefix.Addr())
	})
}

// String says what is lost and what that means.
func (l BridgeLoss) String() string {
	var out []string
	if l.Down {
		out = append(out, l.Bridge+" is down: pods cannot send")
	}
	for _, p := range l.Addrs {
		out = append(out, fmt.Sprintf("%s has lost its address %s, the gateway of this node's pods", l.Bridge, p))
	}
	if n := len(l.Ports); n > 0 {
		const most = 3
		names := strings.Join(l.Ports[:min(n, most)], ", ")
		if n > most {
			names += ", ..."
		}
		how := fmt.Sprintf("%s has lost %d of its ports (%s)", l.Bridge, n, names)
		if l.Gone {
			how = fmt.Sprintf("%s is gone, but %d of its ports still exist (%s)", l.Bridge, n, names)
		}
		out = append(out, how+": pods there are cut off")
	}
	return strings.Join(out, "; ")
}

// Commands give back what is lost. A bridge that is gone is recreated by the program that made it, with the pods.
func (l BridgeLoss) Commands() []string {
	if l.Gone {
		return []string{"ip link add " + l.Bridge + " type bridge   # or restart the pods of this node"}
	}
	var out []string
	for _, p := range l.Addrs {
		out = append(out, fmt.Sprintf("ip address replace %s dev %s", p, l.Bridge))
	}
	if l.Down || len(l.Addrs) > 0 {
		out = append(out, "ip link set "+l.Bridge+" up")
	}
	for _, p := range l.Ports {
		out = append(out, fmt.Sprintf("ip link set %s up master %s", p, l.Bridge))
	}
	return out
}
