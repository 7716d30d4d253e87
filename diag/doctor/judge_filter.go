package doctor

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/diag/doctor/packetfilter"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

func judgeVariants(f Facts) findings {
	legacy, nft := 0, 0
	for _, c := range f.Legacy {
		legacy += len(c.Rules)
	}
	for _, c := range f.Filter {
		for _, r := range c.Rules {
			ours := strings.HasPrefix(c.Name, "OVERLAYD-") || strings.HasPrefix(r.Action.Chain, "OVERLAYD-")
			if iptablesTable(c) && !ours {
				nft++
			}
		}
	}
	if legacy > 0 && nft > 0 {
		return warn("iptables-legacy has %d rules and iptables-nft %d: packets pass through both, and each program shows "+
			"only its own; in a maintenance window, switch the programs that write legacy rules to nft (update-alternatives "+
			"--config iptables, and ip6tables), and delete the remaining ones one by one", legacy, nft).
			steps("iptables-legacy-save", "ip6tables-legacy-save")
	}
	return ok("at most one is in use (legacy %d rules, nft %d)", legacy, nft)
}

func isIP(c packetfilter.Chain) bool { return c.Family == "ip" || c.Family == "ip6" }

// iptablesTable reports whether iptables-nft would show a chain.
func iptablesTable(c packetfilter.Chain) bool {
	return isIP(c) && slices.Contains([]string{"filter", "mangle", "raw", "security"}, c.Table)
}

// direction is in which direction the tunnel's packets pass, and how commands say that.
type direction struct {
	verb, hook, nft, iptables, ufw string
}

// judgeTunnelFilter sends the tunnel packets of a peer through the rules, in and out.
func judgeTunnelFilter(f Facts) (out findings) {
	if f.backend() == subnet.HostGW {
		return ok("host-gw sends none")
	}
	in := direction{"arrive", "input", "iifname", "-i", "in"}
	leave := direction{"leave", "output", "oifname", "-o", "out"}
	var names []string
	for _, d := range f.tunnels() {
		here, there := d.link.VXLAN.Local, netip.Addr{}
		if d.wg {
			here = d.local
		}
		for _, p := range f.Peers {
			if p.publicIP.IsValid() && addr.FamilyOf(p.publicIP) == d.family {
				there = p.publicIP
				break
			}
		}
		packet := packetfilter.Packet{V6: d.family == addr.IPv6, Protocol: unix.IPPROTO_UDP, Port: d.port}
		for _, l := range f.arrivals(d.family) {
			names = append(names, l.Name)
			p := packet
			p.Source, p.Destination, p.Local = there, here, true
			if at := f.reachedAt(d.family); at.IsValid() {
				p.Destination = at
			}
			p.In, p.Answered = deviceOf(l), f.leavesBy(l.Name, there)
			out.add(f.sayTunnel(d, l.Name, in, f.Filter.Through(p, "ingress", "prerouting", "input")))
		}
		for _, l := range f.uplinks(d.family) {
			p := packet
			p.Source, p.Destination, p.Out = here, there, deviceOf(l)
			if d.local.IsValid() {
				p.Source = d.local
			}
			out.add(f.sayTunnel(d, l.Name, leave, f.Filter.Through(p, "output", "postrouting", "egress")))
		}
	}
	if len(names) == 0 {
		return skipped("the device that the packets use is unknown")
	}
	slices.Sort(names)
	return out.orOK("UDP port %d of %s is open%s", f.tunnels()[0].port,
		strings.Join(slices.Compact(names), " and "), f.besides())
}

func deviceOf(l netstate.SurveyLink) packetfilter.Device {
	return packetfilter.Device{Name: l.Name, Index: l.Index}
}

func (f Facts) sayTunnel(d tunnel, device string, dir direction, t packetfilter.Fate) findings {
	if !t.Drops && !t.Unsure {
		return nil
	}
	packets := fmt.Sprintf("tunnel packets (UDP port %d) that %s by %s", d.port, dir.verb, device)
	return dropped(Fail, packets, t).steps(f.openPort(t.Chain, d, device, dir)...)
}

// dropped says what becomes of packets that a rule drops, or may drop.
func dropped(m Mark, packets string, t packetfilter.Fate) findings {
	if t.Drops {
		return finding(m, "%s are dropped by %s: %s", packets, t.Chain, t.By)
	}
	return warn("not sure whether %s pass: %s (%s) may drop them, %s cannot be evaluated", packets, t.Chain,
		cmp.Or(t.By, "a rule"), cmp.Or(t.Unclear, "a test"))
}

// manager is who holds the rules of a chain. In a pod the host's files can't be seen that say who is on; the chains of
// both can.
func (f Facts) manager(c packetfilter.Chain) string {
	firewalld, ufw := f.System.Firewalld, f.System.UFW
	if f.Service.inKubernetes() {
		firewalld, ufw = f.Filter.Has("INPUT_ZONES"), f.Filter.Has("ufw-user-input", "ufw6-user-input")
	}
	switch {
	case c.Table == "firewalld" || strings.HasPrefix(c.Name, "IN_") && firewalld:
		return "firewalld"
	case strings.HasPrefix(c.Name, "ufw") || ufw && c.Table == "filter" && isIP(c):
		return "ufw"
	case iptablesTable(c), isIP(c) && c.Table == "nat" && (c.Name == strings.ToUpper(c.Hook) || c.Hook == ""):
		return "iptables"
	}
	return "nft"
}

// iptables is the program for a family.
func iptables(fam addr.Family) string {
	if fam == addr.IPv6 {
		return "ip6tables"
	}
	return "iptables"
}

// openPort lets the tunnel's packets pass where a chain drops them.
func (f Facts) openPort(c packetfilter.Chain, d tunnel, device string, dir direction) []string {
	h := f.Filter.Head(c, dir.hook)
	switch m := f.manager(c); {
	case m == "firewalld" && dir.hook == "input":
		open := fmt.Sprintf(`--zone="$(firewall-cmd --get-zone-of-interface=%s || firewall-cmd --get-default-zone)" `+
			"--add-port=%d/udp", device, d.port)
		return []string{"firewall-cmd " + open, "firewall-cmd --permanent " + open}
	case m == "ufw":
		return []string{fmt.Sprintf("ufw allow %s on %s to any port %d proto udp", dir.ufw, device, d.port)}
	case m == "iptables":
		table := ""
		if c.Table != "filter" {
			table = " -t " + c.Table
		}
		return []string{fmt.Sprintf("%s%s -I %s %s %s -p udp --dport %d -j ACCEPT", iptables(d.family), table,
			strings.ToUpper(h.Name), dir.iptables, device, d.port)}
	}
	return []string{fmt.Sprintf("nft insert rule %s %s %s %s %s udp dport %d accept", h.Family, h.Table, h.Name, dir.nft,
		device, d.port) + "   # and the same in /etc/nftables.conf"}
}

// podPair is pods here and one elsewhere, which is reached by the device outside.
type podPair struct {
	family  addr.Family
	here    []netstate.Neighbour
	there   netip.Addr
	outside packetfilter.Device
}

// podPairs are one in each family.
func (f Facts) podPairs() (out []podPair) {
	for _, fam := range f.families() {
		i := slices.IndexFunc(f.Peers, func(p peer) bool { return p.family() == fam && p.reachable() })
		if i >= 0 && f.Self.Subnets.Get(fam).IsValid() {
			p := f.Peers[i]
			out = append(out, podPair{fam, f.podsHere(fam), addr.Last(p.subnet).Prev(), deviceOf(f.deviceTo(p))})
		}
	}
	return out
}

// noPair is why packets between pods can't be judged.
const noPair = "no peer or no lease of this node is known"

// deviceTo is the device by which a peer's pods are reached.
func (f Facts) deviceTo(p peer) netstate.SurveyLink {
	if p.path == pathDirect {
		r, _ := f.Survey.Host.Route(p.publicIP)
		return f.device(r.Link)
	}
	for _, d := range f.tunnels() {
		if d.family == p.family() {
			d.link.Name = d.name // also where it does not exist
			return d.link
		}
	}
	return netstate.SurveyLink{}
}

// podsHere are the addresses in this node's subnet that are in use, so far as the node knows, with their devices: those
// that it has found, and those that Docker's rules name. Where it knows none, it is one that no pod has.
func (f Facts) podsHere(fam addr.Family) (pods []netstate.Neighbour) {
	const most = 128
	own, bridge := f.Self.Subnets.Get(fam), f.bridgeOf(fam).Name
	add := func(ip netip.Addr, device string) {
		known := func(n netstate.Neighbour) bool { return n.IP == ip }
		if len(pods) < most && own.Contains(ip) && !f.Survey.Host.Has(ip) && !slices.ContainsFunc(pods, known) {
			pods = append(pods, netstate.Neighbour{Link: device, IP: ip})
		}
	}
	for _, c := range f.Filter {
		for _, r := range c.Rules {
			if to, ok := shielded(r); ok {
				add(to, bridge)
			}
		}
	}
	for _, n := range f.Survey.Neighbours {
		add(n.IP, n.Link)
	}
	if len(pods) == 0 {
		add(f.freeAddress(fam), bridge)
	}
	return pods
}

// shielded is the address of a container that such a rule of Docker keeps from being reached but by its bridge.
func shielded(r packetfilter.Rule) (to netip.Addr, ok bool) {
	notBy := false
	for _, t := range r.Tests {
		if len(t.Key) != 1 {
			continue
		}
		switch t.Key[0].Field {
		case packetfilter.In:
			notBy = notBy || t.Not
		case packetfilter.Destination:
			to = t.Address()
		}
	}
	return to, notBy && to.IsValid() && r.Action.Verdict == packetfilter.Drop
}

// judgeForwardFilter sends a packet from a pod elsewhere to each one here through the rules, and one the other way.
func judgeForwardFilter(f Facts) (out findings) {
	pairs := f.podPairs()
	if len(pairs) == 0 {
		return skipped(noPair)
	}
	for _, x := range pairs {
		var in, back []forwarded
		for _, pod := range x.here {
			to := packetfilter.Packet{
				Source: x.there, Destination: pod.IP, V6: x.family == addr.IPv6, Protocol: unix.IPPROTO_TCP,
				In: x.outside, Out: deviceOf(f.device(pod.Link)),
			}
			from := to
			from.Source, from.Destination, from.In, from.Out = to.Destination, to.Source, to.Out, to.In
			in, back = append(in, f.forward(pod.IP, to)), append(back, f.forward(pod.IP, from))
		}
		out.add(f.sayForward(x.family, "from pods of other nodes", "to", in))
		out.add(f.sayForward(x.family, "to pods of other nodes", "from", back))
	}
	return out.orOK("packets from and to pods of other nodes pass%s", f.besides())
}

// forwarded is what becomes of a packet from or to a pod here.
type forwarded struct {
	packetfilter.Fate
	pod    netip.Addr
	except bool // it is dropped, except for what a rule before lets through
}

// anyPort is one that no rule is likely to name.
const anyPort = 49151

// forward sends a packet through the rules for what is forwarded.
func (f Facts) forward(pod netip.Addr, p packetfilter.Packet) forwarded {
	hooks := []string{"prerouting", "forward", "postrouting"}
	t := f.Filter.Through(p, hooks...)
	if t.Unsure { // some ports may be open, or closed
		p.SourcePort, p.Port = anyPort, anyPort
		if other := f.Filter.Through(p, hooks...); other.Drops {
			return forwarded{other, pod, true}
		}
	}
	return forwarded{t, pod, false}
}

// sayForward names each chain that drops packets of pods, with the first of them: which says "to" or "from" a pod here.
func (f Facts) sayForward(fam addr.Family, what, which string, fates []forwarded) (out findings) {
	said := map[string]bool{}
	for _, t := range fates {
		kind := func(o forwarded) string { return fmt.Sprint(o.Drops, o.Unsure, o.Chain, byDocker(o.Fate)) }
		if !t.Drops && !t.Unsure || said[kind(t)] {
			continue
		}
		said[kind(t)] = true
		n := len(slices.DeleteFunc(slices.Clone(fates), func(o forwarded) bool { return kind(o) != kind(t) }))
		packets, mark := "packets "+what, Fail
		if t.except {
			packets = "packets (except those that an earlier rule accepts) " + what
		}
		if n < len(fates) || byDocker(t.Fate) {
			packets += fmt.Sprintf(" %s %s", which, t.pod)
			if n > 1 {
				packets += fmt.Sprintf(" (and %s %d more of %d pods)", which, n-1, len(fates))
			}
		}
		if n < len(fates) && !byDocker(t.Fate) { // that may be what a policy is for
			mark = Warn
		}
		out.add(dropped(mark, packets, t.Fate).steps(f.openForward(fam, t.Fate)...))
	}
	return out
}

// judgeMasquerade sends a packet from a pod here to one elsewhere through the rules that change the sender: overlayd's
// own leave it.
func judgeMasquerade(f Facts) (out findings) {
	pairs := f.podPairs()
	if len(pairs) == 0 {
		return skipped(noPair)
	}
	for _, x := range pairs {
		t := f.Filter.Translated(packetfilter.Packet{
			Source: x.here[0].IP, Destination: x.there, V6: x.family == addr.IPv6, Protocol: unix.IPPROTO_TCP,
			Out: x.outside, SourcePort: anyPort, Port: anyPort,
		})
		if !t.Drops {
			continue
		}
		list := fmt.Sprintf("nft -a list chain %s %s %s", t.Chain.Family, t.Chain.Table, t.Chain.Name)
		if f.manager(t.Chain) == "iptables" {
			list = fmt.Sprintf("%s -t nat -S %s", iptables(x.family), t.Chain.Name)
		}
		out.add(warn("packets from local pods to pods of other nodes are masqueraded by %s: %s; exclude %s",
			t.Chain, t.By, f.network(x.family)).fix("%s   # change it there, and where it is configured", list))
	}
	return out.orOK("no rule masquerades packets to pods of other nodes%s", f.besides())
}

// byDocker tells whether a rule is one of those by which Docker Engine 28 and later keep other hosts from reaching a
// container.
func byDocker(t packetfilter.Fate) bool {
	_, direct := shielded(t.Rule)
	return direct && t.Chain.Hook == "prerouting" || t.Chain.Name == "DOCKER" || t.Chain.Table == "docker-bridges"
}

// openForward lets pods' packets pass where a rule drops them.
func (f Facts) openForward(fam addr.Family, t packetfilter.Fate) (commands []string) {
	network := f.network(fam)
	// The daemon's accepts come before what decides about all packets there, and behind every other rule.
	if t.Chain.Name == "FORWARD" && len(t.Rule.Tests) == 0 && !f.Daemon.Running && f.ForwardFW {
		commands = []string{f.Service.start() + "   # it accepts them by itself"}
	}
	both := func(format string) []string {
		return append(commands, fmt.Sprintf(format, "s", network), fmt.Sprintf(format, "d", network))
	}
	switch m := f.manager(t.Chain); {
	case byDocker(t) && t.Chain.Hook == "prerouting":
		return append(commands, "${EDITOR:-vi} /etc/docker/daemon.json && systemctl restart docker"+
			`   # add "allow-direct-routing": true (Docker 28.2 or later); see Documentation/bare-metal.md`)
	case byDocker(t) && t.Chain.Name == "DOCKER":
		return append(commands, fmt.Sprintf("%s -I DOCKER-USER -s %s -d %s -j ACCEPT   # see Documentation/bare-metal.md",
			iptables(fam), network, f.Self.Subnets.Get(fam)))
	case byDocker(t):
		return append(commands, "docker network create -o com.docker.network.bridge.gateway_mode_ipv4=nat-unprotected pods"+
			"   # and the other options in Documentation/bare-metal.md")
	case m == "firewalld":
		trust := "--zone=trusted --add-source=" + network.String()
		return append(commands, fmt.Sprintf("firewall-cmd %s && firewall-cmd --permanent %[1]s", trust))
	case m == "nft":
		h := f.Filter.Head(t.Chain, "forward")
		word := map[addr.Family]string{addr.IPv4: "ip", addr.IPv6: "ip6"}[fam]
		return both(fmt.Sprintf("nft insert rule %s %s %s %s %%saddr %%s accept", h.Family, h.Table, h.Name, word))
	}
	return both(iptables(fam) + " -I FORWARD -%s %s -j ACCEPT")
}
