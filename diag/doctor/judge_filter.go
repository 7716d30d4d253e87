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

func firewallChecks() []check {
	return []check{{"iptables variants", judgeVariants}, {"iptables-legacy", judgeLegacy}, {"VXLAN in the firewall", judgeTunnelFilter}, {"forwarded packets", judgeForwardFilter}, {"masqueraded packets", judgeTranslation}}
}

func judgeVariants(f Facts) []Finding {
	if why := cmp.Or(f.unreadable(), f.legacyUnknown()); why != "" {
		return skipped(why)
	}
	legacy, nft := 0, 0
	for _, c := range f.Legacy {
		legacy += len(c.Rules)
	}
	for _, c := range f.Filter {
		if iptablesTable(c) {
			nft += foreign(c)
		}
	}
	if legacy > 0 && nft > 0 {
		return warn(fmt.Sprintf("iptables-legacy has %d rules and iptables-nft %d: packets pass through both, and each program shows only its own; in a maintenance window, "+
			"switch the programs that write legacy rules to nft (update-alternatives --config iptables, and ip6tables), and delete the remaining ones one by one", legacy, nft),
			"iptables-legacy-save", "ip6tables-legacy-save")
	}
	return ok(fmt.Sprintf("at most one is in use (legacy %d rules, nft %d)", legacy, nft))
}

// iptablesTable reports whether iptables-nft would show a chain.
func iptablesTable(c packetfilter.Chain) bool {
	return (c.Family == "ip" || c.Family == "ip6") && slices.Contains([]string{"filter", "mangle", "raw", "security"}, c.Table)
}

// foreign counts the rules of a chain that are not ours.
func foreign(c packetfilter.Chain) int {
	if strings.HasPrefix(c.Name, "OVERLAYD-") {
		return 0
	}
	n := 0
	for _, r := range c.Rules {
		if !strings.HasPrefix(r.Action.Chain, "OVERLAYD-") {
			n++
		}
	}
	return n
}

// unreadable says why the packet filter can't be judged.
func (f Facts) unreadable() string {
	if f.Privileges != nil {
		return "needs privileges to read"
	}
	if err := f.Errs["nftables"]; err != nil {
		return err.Error()
	}
	return ""
}

// judgeTunnelFilter sends the VXLAN packets of a peer through the rules, in and out.
func judgeTunnelFilter(f Facts) []Finding {
	if why := f.unreadable(); why != "" {
		return skipped(why)
	}
	if f.backend() == subnet.HostGW {
		return ok("host-gw sends none")
	}
	var out []Finding
	var judged []string
	for _, d := range f.devices() {
		for _, l := range f.arrivals(d.family) {
			judged = append(judged, l.Name)
			fate := f.Filter.Through(f.arriving(d, l), "ingress", "prerouting", "input")
			out = append(out, f.sayTunnel(d, l.Name, "arrive", fate)...)
		}
		for _, l := range f.uplinks(d.family) {
			fate := f.Filter.Through(f.leaving(d, l), "output", "postrouting", "egress")
			out = append(out, f.sayTunnel(d, l.Name, "leave", fate)...)
		}
	}
	if len(judged) == 0 {
		return skipped("the device that the packets use is unknown")
	}
	slices.Sort(judged)
	return orOK(out,
		fmt.Sprintf("UDP port %d of %s is open", f.devices()[0].port, strings.Join(slices.Compact(judged), " and "))+f.besides())
}

// somePeer is the address of a peer; not valid where none is known.
func (f Facts) somePeer(fam addr.Family) netip.Addr {
	for _, p := range f.Peers {
		if p.publicIP.IsValid() && addr.FamilyOf(p.publicIP) == fam {
			return p.publicIP
		}
	}
	return netip.Addr{}
}

func (f Facts) arriving(d tunnel, under netstate.SurveyLink) packetfilter.Packet {
	local := f.reachedAt(d.family)
	if !local.IsValid() {
		local = d.link.VXLAN.Local
	}
	from := f.somePeer(d.family)
	return packetfilter.Packet{
		Source: from, Destination: local, V6: d.family == addr.IPv6, Protocol: unix.IPPROTO_UDP, Port: d.port,
		In: deviceOf(under), Local: true, Answered: f.leavesBy(under.Name, from),
	}
}

func (f Facts) leaving(d tunnel, under netstate.SurveyLink) packetfilter.Packet {
	local := d.local
	if !local.IsValid() {
		local = d.link.VXLAN.Local
	}
	return packetfilter.Packet{
		Source: local, Destination: f.somePeer(d.family), V6: d.family == addr.IPv6, Protocol: unix.IPPROTO_UDP, Port: d.port,
		Out: deviceOf(under),
	}
}

func deviceOf(l netstate.SurveyLink) packetfilter.Device {
	return packetfilter.Device{Name: l.Name, Index: l.Index}
}

func (f Facts) sayTunnel(d tunnel, device, verb string, t packetfilter.Fate) []Finding {
	steps := f.openPort(t, d, device)
	if verb == "leave" {
		steps = f.openOut(t, d, device)
	}
	switch {
	case t.Drops:
		return fail(fmt.Sprintf("VXLAN packets (UDP port %d) that %s by %s are dropped by %s: %s", d.port, verb, device, t.Chain, t.By), steps...)
	case t.Unsure:
		return warn(fmt.Sprintf("not sure whether VXLAN packets (UDP port %d) that %s by %s pass: %s (%s) may drop them, %s cannot be evaluated", d.port, verb, device, t.Chain, orDefault(t.By, "a rule"), orDefault(t.Unclear, "a test")), steps...)
	}
	return nil
}

// manager is who holds the rules of a chain. In a pod the host's files can't be seen that say who is on; the chains of both can.
func (f Facts) manager(c packetfilter.Chain) string {
	firewalld, ufw := f.System.Firewalld, f.System.UFW
	if f.Service.inKubernetes() {
		firewalld, ufw = f.Filter.Has("INPUT_ZONES"), f.Filter.Has("ufw-user-input", "ufw6-user-input")
	}
	switch {
	case c.Table == "firewalld" || strings.HasPrefix(c.Name, "IN_") && firewalld:
		return "firewalld"
	case strings.HasPrefix(c.Name, "ufw") || ufw && (c.Table == "filter" && (c.Family == "ip" || c.Family == "ip6")):
		return "ufw"
	case iptablesTable(c), (c.Family == "ip" || c.Family == "ip6") && c.Table == "nat" && (c.Name == strings.ToUpper(c.Hook) || c.Hook == ""):
		return "iptables"
	}
	return "nft"
}

// iptables is the program for a family.
func iptables(manager string, fam addr.Family) string {
	if fam == addr.IPv6 {
		return strings.Replace(manager, "iptables", "ip6tables", 1)
	}
	return manager
}

func (f Facts) openPort(t packetfilter.Fate, d tunnel, device string) []string {
	switch m := f.manager(t.Chain); m {
	case "firewalld":
		zone := fmt.Sprintf(`--zone="$(firewall-cmd --get-zone-of-interface=%s || firewall-cmd --get-default-zone)"`, device)
		return []string{fmt.Sprintf("firewall-cmd %s --add-port=%d/udp", zone, d.port), fmt.Sprintf("firewall-cmd --permanent %s --add-port=%d/udp", zone, d.port)}
	case "ufw":
		return []string{fmt.Sprintf("ufw allow in on %s to any port %d proto udp", device, d.port)}
	case "nft":
		h := f.Filter.Head(t.Chain, "input")
		return []string{fmt.Sprintf("nft insert rule %s %s %s iifname %s udp dport %d accept   # and the same in /etc/nftables.conf", h.Family, h.Table, h.Name, device, d.port)}
	default:
		table := ""
		if t.Chain.Table != "filter" {
			table = " -t " + t.Chain.Table
		}
		return []string{fmt.Sprintf("%s%s -I %s -i %s -p udp --dport %d -j ACCEPT", iptables(m, d.family), table, strings.ToUpper(f.Filter.Head(t.Chain, "input").Name), device, d.port)}
	}
}

func (f Facts) openOut(t packetfilter.Fate, d tunnel, device string) []string {
	switch m := f.manager(t.Chain); m {
	case "ufw":
		return []string{fmt.Sprintf("ufw allow out on %s to any port %d proto udp", device, d.port)}
	case "nft", "firewalld":
		h := f.Filter.Head(t.Chain, "output")
		return []string{fmt.Sprintf("nft insert rule %s %s %s oifname %s udp dport %d accept", h.Family, h.Table, h.Name, device, d.port)}
	default:
		return []string{fmt.Sprintf("%s -I OUTPUT -o %s -p udp --dport %d -j ACCEPT", iptables(m, d.family), device, d.port)}
	}
}

// podPair judges packets between pods here and one elsewhere, which is reached by the device outside.
type podPair func(fam addr.Family, here []netstate.Neighbour, there netip.Addr, outside netstate.SurveyLink) []Finding

// betweenPods judges what becomes of packets between pods here and one of a peer, in each family; well says that
// nothing was found.
func (f Facts) betweenPods(well string, judge podPair) []Finding {
	if why := f.unreadable(); why != "" {
		return skipped(why)
	}
	var out []Finding
	judged := 0
	for _, fam := range f.families() {
		if p, own, known := f.samplePeer(fam); known {
			judged++
			out = append(out, judge(fam, f.podsHere(fam, own), addr.Last(p.subnet).Prev(), f.wayTo(p))...)
		}
	}
	if judged == 0 {
		return skipped("no peer or no lease of this node is known")
	}
	return orOK(out, well+f.besides())
}

// mostPods bounds how many pods' packets are sent through the rules.
const mostPods = 128

// podsHere are the addresses in this node's subnet that are in use, so far as the node knows, with their devices: those
// that it has found, and those that Docker's rules name. Where it knows none, it is one that no pod has.
func (f Facts) podsHere(fam addr.Family, own netip.Prefix) (pods []netstate.Neighbour) {
	bridge := f.bridgeOf(fam).Name
	add := func(ip netip.Addr, device string) {
		known := func(n netstate.Neighbour) bool { return n.IP == ip }
		if len(pods) < mostPods && own.Contains(ip) && !f.Survey.Host.Has(ip) && !slices.ContainsFunc(pods, known) {
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
		add(addr.Last(own).Prev(), bridge)
	}
	return pods
}

// shielded is the address of a container that such a rule of Docker keeps from being reached but by its bridge.
func shielded(r packetfilter.Rule) (to netip.Addr, ok bool) {
	notBy := false
	for _, t := range r.Tests {
		switch {
		case len(t.Key) != 1:
		case t.Key[0].Field == packetfilter.In:
			notBy = notBy || t.Not
		case t.Key[0].Field == packetfilter.Destination && !t.Not && len(t.Any) == 1 && len(t.Any[0]) == 1:
			r, part := t.Any[0][0], func(b byte) bool { return b != 0xff }
			a, whole := netip.AddrFromSlice(r.From)
			if whole && slices.Equal(r.From, r.To) && !slices.ContainsFunc(t.Key[0].Mask, part) {
				to = a
			}
		}
	}
	return to, notBy && to.IsValid() && r.Action.Verdict == packetfilter.Drop
}

// judgeForwardFilter sends a packet from a pod elsewhere to each one here through the rules, and one the other way.
func judgeForwardFilter(f Facts) []Finding {
	well := "packets from and to pods of other nodes pass"
	return f.betweenPods(well,
		func(fam addr.Family, here []netstate.Neighbour, there netip.Addr, outside netstate.SurveyLink) []Finding {
			var in, back []forwarded
			for _, pod := range here {
				inside, _ := f.Survey.Link(pod.Link)
				to := packetfilter.Packet{
					Source: there, Destination: pod.IP, V6: fam == addr.IPv6, Protocol: unix.IPPROTO_TCP,
					In: deviceOf(outside), Out: deviceOf(inside),
				}
				from := to
				from.Source, from.Destination, from.In, from.Out = to.Destination, to.Source, to.Out, to.In
				in, back = append(in, f.forward(to)), append(back, f.forward(from))
			}
			found := f.sayForward(fam, here, "from pods of other nodes", "to", in)
			return append(found, f.sayForward(fam, here, "to pods of other nodes", "from", back)...)
		})
}

// forwarded is what becomes of a packet that is forwarded.
type forwarded struct {
	packetfilter.Fate
	but bool // it is dropped, except for what a rule before lets through
}

// anyPort is one that no rule is likely to name.
const anyPort = 49151

// forward sends a packet through the rules for what is forwarded.
func (f Facts) forward(p packetfilter.Packet) forwarded {
	hooks := []string{"prerouting", "forward", "postrouting"}
	t := f.Filter.Through(p, hooks...)
	if t.Unsure { // some ports may be open, or closed: what becomes of one that no rule is likely to name?
		p.SourcePort, p.Port = anyPort, anyPort
		if other := f.Filter.Through(p, hooks...); other.Drops {
			return forwarded{other, true}
		}
	}
	return forwarded{Fate: t}
}

// judgeTranslation sends a packet from a pod here to one elsewhere through the rules that change the sender: overlayd's own leave it.
func judgeTranslation(f Facts) []Finding {
	well := "no rule masquerades packets to pods of other nodes"
	return f.betweenPods(well,
		func(fam addr.Family, here []netstate.Neighbour, there netip.Addr, outside netstate.SurveyLink) []Finding {
			t := f.Filter.Translated(packetfilter.Packet{
				Source: here[0].IP, Destination: there, V6: fam == addr.IPv6, Protocol: unix.IPPROTO_TCP,
				Out: deviceOf(outside), SourcePort: anyPort, Port: anyPort,
			})
			if !t.Drops {
				return nil
			}
			table := "nft -a list chain " + strings.Join([]string{t.Chain.Family, t.Chain.Table, t.Chain.Name}, " ")
			if m := f.manager(t.Chain); strings.HasPrefix(m, "iptables") {
				table = fmt.Sprintf("%s -t nat -S %s", iptables(m, fam), t.Chain.Name)
			}
			return warn(
				fmt.Sprintf(
					"packets from local pods to pods of other nodes are masqueraded by %s: "+
						"%s; exclude %s", t.Chain, t.By, f.network(fam)),
				table+"   # change it there, and where it is configured")
		})
}

// samplePeer is one whose pods can be reached, and this node's own subnet.
func (f Facts) samplePeer(fam addr.Family) (p peer, own netip.Prefix, known bool) {
	i := slices.IndexFunc(f.Peers, func(p peer) bool { return p.family() == fam && (p.way == "tunnel" || p.way == "direct") })
	own = f.Self.Subnets.Get(fam)
	if i < 0 || !own.IsValid() {
		return peer{}, own, false
	}
	return f.Peers[i], own, true
}

// wayTo is the device by which a peer's pods are reached.
func (f Facts) wayTo(p peer) netstate.SurveyLink {
	if p.way == "direct" {
		r, _ := f.Survey.Host.Route(p.publicIP)
		l, _ := f.Survey.Link(r.Link)
		return l
	}
	for _, d := range f.devices() {
		if d.family == p.family() {
			if !d.there {
				return netstate.SurveyLink{HostLink: netstate.HostLink{Name: d.name}}
			}
			return d.link
		}
	}
	return netstate.SurveyLink{}
}

func (f Facts) bridgeOf(fam addr.Family) netstate.SurveyLink {
	for _, b := range f.bridges() {
		for _, a := range f.Survey.Host.Addresses {
			if a.Link == b.Name && addr.FamilyOf(a.Prefix.Addr()) == fam {
				return b
			}
		}
	}
	return netstate.SurveyLink{}
}

// sayForward names each chain that drops packets of pods, with the first of them: which says "to" or "from" a pod here.
func (f Facts) sayForward(fam addr.Family, here []netstate.Neighbour, what, which string,
	fates []forwarded,
) (out []Finding) {
	for i, t := range fates {
		alike := func(o forwarded) bool {
			return o.Drops == t.Drops && o.Unsure == t.Unsure && o.Chain.String() == t.Chain.String() && byDocker(o.Fate) == byDocker(t.Fate)
		}
		if !t.Drops && !t.Unsure || slices.IndexFunc(fates, alike) < i {
			continue
		}
		n := 0
		for _, o := range fates {
			if alike(o) {
				n++
			}
		}
		what, mark := what, Fail
		if n < len(here) || byDocker(t.Fate) {
			what += fmt.Sprintf(" %s %s", which, here[i].IP)
			if n > 1 {
				what += fmt.Sprintf(" (and %s %d more of %d pods)", which, n-1, len(here))
			}
			if n < len(here) && !byDocker(t.Fate) { // that may be what a policy is for
				mark = Warn
			}
		}
		if t.but {
			what = "(except those that an earlier rule accepts) " + what
		}
		reason := fmt.Sprintf("packets %s are dropped by %s: %s", what, t.Chain, t.By)
		if !t.Drops {
			mark = Warn
			reason = fmt.Sprintf("not sure whether packets %s pass: %s (%s) may drop them, %s cannot be evaluated",
				what, t.Chain, orDefault(t.By, "a rule"), orDefault(t.Unclear, "a test"))
		}
		out = append(out, Finding{Mark: mark, Reason: reason, Fix: f.openForward(fam, t.Fate)})
	}
	return out
}

// byDocker tells whether a rule is one of those by which Docker Engine 28 and later keep other hosts from reaching a
// container.
func byDocker(t packetfilter.Fate) bool {
	_, direct := shielded(t.Rule)
	return direct && t.Chain.Hook == "prerouting" || t.Chain.Name == "DOCKER" || t.Chain.Table == "docker-bridges"
}

func (f Facts) openForward(fam addr.Family, t packetfilter.Fate) []string {
	network := f.network(fam)
	var commands []string
	switch m := f.manager(t.Chain); {
	case byDocker(t) && t.Chain.Hook == "prerouting":
		commands = []string{"${EDITOR:-vi} /etc/docker/daemon.json && systemctl restart docker" +
			`   # add "allow-direct-routing": true (Docker 28.2 or later); see Documentation/bare-metal.md`}
	case byDocker(t) && t.Chain.Name == "DOCKER":
		commands = []string{fmt.Sprintf("%s -I DOCKER-USER -s %s -d %s -j ACCEPT   # see Documentation/bare-metal.md",
			iptables(m, fam), network, f.Self.Subnets.Get(fam))}
	case byDocker(t):
		commands = []string{"docker network create -o com.docker.network.bridge.gateway_mode_ipv4=nat-unprotected pods" +
			"   # and the other options in Documentation/bare-metal.md"}
	case m == "firewalld":
		trust := "--zone=trusted --add-source=" + network.String()
		commands = []string{fmt.Sprintf("firewall-cmd %s && firewall-cmd --permanent %[1]s", trust)}
	case m == "nft":
		h := f.Filter.Head(t.Chain, "forward")
		word := map[addr.Family]string{addr.IPv4: "ip", addr.IPv6: "ip6"}[fam]
		commands = []string{
			fmt.Sprintf("nft insert rule %s %s %s %s saddr %s accept", h.Family, h.Table, h.Name, word, network),
			fmt.Sprintf("nft insert rule %s %s %s %s daddr %s accept", h.Family, h.Table, h.Name, word, network),
		}
	default:
		if m == "ufw" {
			m = "iptables"
		}
		commands = []string{
			fmt.Sprintf("%s -I FORWARD -s %s -j ACCEPT", iptables(m, fam), network),
			fmt.Sprintf("%s -I FORWARD -d %s -j ACCEPT", iptables(m, fam), network),
		}
	}
	// The daemon's accepts come before what decides about all packets there, and behind every other rule.
	if t.Chain.Name == "FORWARD" && len(t.Rule.Tests) == 0 && !f.Daemon.Running && f.ForwardFW {
		commands = append([]string{f.Service.start() + "   # it accepts them by itself"}, commands...)
	}
	return commands
}
