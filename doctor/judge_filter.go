package doctor

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

func firewallChecks() []check {
	return []check{{"iptables variants", judgeVariants}, {"VXLAN in the firewall", judgeTunnelFilter}, {"forwarded packets", judgeForwardFilter}, {"translated packets", judgeTranslation}}
}

func judgeVariants(f Facts) []Finding {
	if f.Privileges != nil {
		return skipped("it takes privileges to look")
	}
	if f.LegacyRules > 0 && f.NFTRules > 0 {
		return warn(fmt.Sprintf("iptables-legacy holds %d rules and iptables-nft %d: a packet must pass both, and each program shows its own only; at a quiet time, "+
			"have whoever makes the legacy ones use nft (update-alternatives --config iptables, and ip6tables), and delete those that stay, one by one", f.LegacyRules, f.NFTRules),
			"iptables-legacy-save", "ip6tables-legacy-save")
	}
	return ok(fmt.Sprintf("one is in use at most (legacy %d rules, nft %d)", f.LegacyRules, f.NFTRules))
}

// unreadable says why the packet filter can't be judged.
func (f Facts) unreadable() string {
	if f.Privileges != nil {
		return "it takes privileges to look"
	}
	for _, what := range []string{"nftables", "iptables-legacy"} {
		if err := f.Errs[what]; err != nil {
			return err.Error()
		}
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
			fate := f.Filter.through(f.arriving(d, l), d.family == addr.IPv6, "ingress", "prerouting", "input")
			out = append(out, f.sayTunnel(d, l.Name, "arrive", fate)...)
		}
		for _, l := range f.uplinks(d.family) {
			fate := f.Filter.through(f.leaving(d, l), d.family == addr.IPv6, "output", "postrouting")
			out = append(out, f.sayTunnel(d, l.Name, "leave", fate)...)
		}
	}
	if len(judged) == 0 {
		return skipped("it is not known by which device the packets go")
	}
	slices.Sort(judged)
	return orOK(out,
		fmt.Sprintf("UDP port %d of %s is open", f.devices()[0].port, strings.Join(slices.Compact(judged), " and ")))
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

// typeLocal is RTN_LOCAL, the kind of address that is this node's own.
const typeLocal, typeUnicast = 2, 1

func (f Facts) arriving(d tunnel, under netstate.SurveyLink) packet {
	local := f.reachedAt(d.family)
	if !local.IsValid() {
		local = d.link.VXLAN.Local
	}
	p := newPacket(f.somePeer(d.family), local, unix.IPPROTO_UDP).in(under.Name, under.Index)
	p[netstate.FieldPort], p[netstate.FieldTypeOfDst] = port16(d.port), native32(typeLocal)
	if f.leavesBy(under.Name, f.somePeer(d.family)) {
		p[netstate.FieldReverse] = native32(1)
	}
	return p
}

func (f Facts) leaving(d tunnel, under netstate.SurveyLink) packet {
	local := d.local
	if !local.IsValid() {
		local = d.link.VXLAN.Local
	}
	p := newPacket(local, f.somePeer(d.family), unix.IPPROTO_UDP).out(under.Name, under.Index)
	family, ether := byte(unix.NFPROTO_IPV4), []byte{0x08, 0x00}
	if d.family == addr.IPv6 {
		family, ether = unix.NFPROTO_IPV6, []byte{0x86, 0xdd}
	}
	p[netstate.FieldFamily], p[netstate.FieldEtherType] = []byte{family}, ether
	p[netstate.FieldPort], p[netstate.FieldTypeOfDst] = port16(d.port), native32(typeUnicast)
	return p
}

func where(c netstate.FilterChain) string {
	if c.Legacy {
		return fmt.Sprintf("iptables-legacy, table %s, chain %s", c.Table, c.Name)
	}
	return fmt.Sprintf("table %s %s, chain %s", c.Family, c.Table, c.Name)
}

func (f Facts) sayTunnel(d tunnel, device, verb string, t fate) []Finding {
	mend := f.openPort(t, d, device)
	if verb == "leave" {
		mend = f.openOut(t, d, device)
	}
	switch {
	case t.drops:
		return fail(fmt.Sprintf("VXLAN packets (UDP port %d) that %s by %s are dropped by %s: %s", d.port, verb, device, where(t.chain), t.by), mend...)
	case t.maybe:
		return warn(fmt.Sprintf("not sure whether VXLAN packets (UDP port %d) that %s by %s are let through: %s (%s) may drop them, %s can't be judged", d.port, verb, device, where(t.chain), orDefault(t.by, "a rule"), orDefault(t.unclear, "a test")), mend...)
	}
	return nil
}

// manager is who holds the rules of a chain. In a pod the host's files can't be seen that say who is on; the chains of both can.
func (f Facts) manager(c netstate.FilterChain) string {
	firewalld, ufw := f.System.Firewalld, f.System.UFW
	if f.Service.inKubernetes() {
		firewalld, ufw = f.Filter.has("INPUT_ZONES"), f.Filter.has("ufw-user-input", "ufw6-user-input")
	}
	switch {
	case c.Table == "firewalld" || strings.HasPrefix(c.Name, "IN_") && firewalld:
		return "firewalld"
	case strings.HasPrefix(c.Name, "ufw") || ufw && (c.Table == "filter" && (c.Family == "ip" || c.Family == "ip6")):
		return "ufw"
	case c.Legacy:
		return "iptables-legacy"
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

// head is the base chain that leads to a chain: where an accept comes early enough.
func (f Facts) head(c netstate.FilterChain, hook string) netstate.FilterChain {
	if c.Hook != "" {
		return c
	}
	for _, b := range f.Filter {
		if b.Hook == hook && b.Family == c.Family && b.Table == c.Table && b.Legacy == c.Legacy {
			return b
		}
	}
	return c
}

func (f Facts) openPort(t fate, d tunnel, device string) []string {
	switch m := f.manager(t.chain); m {
	case "firewalld":
		zone := fmt.Sprintf(`--zone="$(firewall-cmd --get-zone-of-interface=%s || firewall-cmd --get-default-zone)"`, device)
		return []string{fmt.Sprintf("firewall-cmd %s --add-port=%d/udp", zone, d.port), fmt.Sprintf("firewall-cmd --permanent %s --add-port=%d/udp", zone, d.port)}
	case "ufw":
		return []string{fmt.Sprintf("ufw allow in on %s to any port %d proto udp", device, d.port)}
	case "nft":
		h := f.head(t.chain, "input")
		return []string{fmt.Sprintf("nft insert rule %s %s %s iifname %s udp dport %d accept   # and the same in /etc/nftables.conf", h.Family, h.Table, h.Name, device, d.port)}
	default:
		table := ""
		if t.chain.Table != "filter" {
			table = " -t " + t.chain.Table
		}
		return []string{fmt.Sprintf("%s%s -I %s -i %s -p udp --dport %d -j ACCEPT", iptables(m, d.family), table, strings.ToUpper(f.head(t.chain, "input").Name), device, d.port)}
	}
}

func (f Facts) openOut(t fate, d tunnel, device string) []string {
	switch m := f.manager(t.chain); m {
	case "ufw":
		return []string{fmt.Sprintf("ufw allow out on %s to any port %d proto udp", device, d.port)}
	case "nft", "firewalld":
		h := f.head(t.chain, "output")
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
		return skipped("no peer, or no lease of this node, is known")
	}
	return orOK(out, well)
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
func shielded(r netstate.FilterRule) (to netip.Addr, ok bool) {
	notBy := false
	for _, t := range r.Tests {
		switch {
		case len(t.Key) != 1:
		case t.Key[0].Field == netstate.FieldIn:
			notBy = notBy || t.Not
		case t.Key[0].Field == netstate.FieldDestination && !t.Not && len(t.Any) == 1 && len(t.Any[0]) == 1:
			r, part := t.Any[0][0], func(b byte) bool { return b != 0xff }
			a, whole := netip.AddrFromSlice(r.From)
			if whole && slices.Equal(r.From, r.To) && !slices.ContainsFunc(t.Key[0].Mask, part) {
				to = a
			}
		}
	}
	return to, notBy && to.IsValid() && r.Action.Verdict == netstate.Drop
}

// judgeForwardFilter sends a packet from a pod elsewhere to each one here through the rules, and one the other way.
func judgeForwardFilter(f Facts) []Finding {
	well := "what pods of other nodes send, and what goes to them, is let through"
	return f.betweenPods(well,
		func(fam addr.Family, here []netstate.Neighbour, there netip.Addr, outside netstate.SurveyLink) []Finding {
			var in, back []fate
			for _, pod := range here {
				inside, _ := f.Survey.Link(pod.Link)
				to := newPacket(there, pod.IP, unix.IPPROTO_TCP)
				to.in(outside.Name, outside.Index).out(inside.Name, inside.Index)
				from := newPacket(pod.IP, there, unix.IPPROTO_TCP)
				from.in(inside.Name, inside.Index).out(outside.Name, outside.Index)
				in, back = append(in, f.forward(to, fam)), append(back, f.forward(from, fam))
			}
			found := f.sayForward(fam, here, "from pods of other nodes", "to", in)
			return append(found, f.sayForward(fam, here, "to pods of other nodes", "from", back)...)
		})
}

// forward sends a packet through the rules for what is forwarded.
func (f Facts) forward(p packet, fam addr.Family) fate {
	p[netstate.FieldTypeOfDst] = native32(typeUnicast)
	hooks := []string{"prerouting", "forward", "postrouting"}
	t := f.Filter.through(p, fam == addr.IPv6, hooks...)
	if t.maybe { // some ports may be open, or closed: what becomes of one that no rule is likely to name?
		if other := f.Filter.through(p.ports(49151, 49151), fam == addr.IPv6, hooks...); other.drops {
			other.but = true
			return other
		}
	}
	return t
}

// judgeTranslation sends a packet from a pod here to one elsewhere through the rules that change the sender: overlayd's own leave it.
func judgeTranslation(f Facts) []Finding {
	well := "pods of other nodes see the pods' own addresses, so far as can be told from the rules"
	return f.betweenPods(well,
		func(fam addr.Family, here []netstate.Neighbour, there netip.Addr, outside netstate.SurveyLink) []Finding {
			sent := newPacket(here[0].IP, there, unix.IPPROTO_TCP).out(outside.Name, outside.Index).ports(49151, 49151)
			sent[netstate.FieldTypeOfDst] = native32(typeUnicast)
			t := f.Translation.through(sent, fam == addr.IPv6, "postrouting")
			if !t.drops {
				return nil
			}
			table := "nft -a list chain " + strings.Join([]string{t.chain.Family, t.chain.Table, t.chain.Name}, " ")
			if m := f.manager(t.chain); strings.HasPrefix(m, "iptables") {
				table = fmt.Sprintf("%s -t nat -S %s", iptables(m, fam), t.chain.Name)
			}
			return warn(
				fmt.Sprintf(
					"what pods here send to pods of other nodes arrives with this node's address instead of the pod's: %s "+
						"translates it: %s; it should except %s", where(t.chain), t.by, f.network(fam)),
				table+"   # change it there, and where it comes from")
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
	fates []fate,
) (out []Finding) {
	for i, t := range fates {
		alike := func(o fate) bool {
			return o.drops == t.drops && o.maybe == t.maybe && where(o.chain) == where(t.chain) && byDocker(o) == byDocker(t)
		}
		if !t.drops && !t.maybe || slices.IndexFunc(fates, alike) < i {
			continue
		}
		n := 0
		for _, o := range fates {
			if alike(o) {
				n++
			}
		}
		what, mark := what, Fail
		if n < len(here) || byDocker(t) {
			what += fmt.Sprintf(" %s %s", which, here[i].IP)
			if n > 1 {
				what += fmt.Sprintf(" (and %s %d more of %d pods)", which, n-1, len(here))
			}
			if n < len(here) && !byDocker(t) { // that may be what a policy is for
				mark = Warn
			}
		}
		if t.but {
			what = "(all but what a rule before lets through) " + what
		}
		reason := fmt.Sprintf("packets %s are dropped by %s: %s", what, where(t.chain), t.by)
		if !t.drops {
			mark = Warn
			reason = fmt.Sprintf("not sure whether packets %s are let through: %s (%s) may drop them, %s can't be judged",
				what, where(t.chain), orDefault(t.by, "a rule"), orDefault(t.unclear, "a test"))
		}
		out = append(out, Finding{Mark: mark, Reason: reason, Mend: f.openForward(fam, t)})
	}
	return out
}

// byDocker tells whether a rule is one of those by which Docker Engine 28 and later keep other hosts from reaching a
// container.
func byDocker(t fate) bool {
	_, direct := shielded(t.rule)
	return direct && t.chain.Hook == "prerouting" || t.chain.Name == "DOCKER" || t.chain.Table == "docker-bridges"
}

func (f Facts) openForward(fam addr.Family, t fate) []string {
	network := f.network(fam)
	var commands []string
	switch m := f.manager(t.chain); {
	case byDocker(t) && t.chain.Hook == "prerouting":
		commands = []string{"${EDITOR:-vi} /etc/docker/daemon.json && systemctl restart docker" +
			`   # add "allow-direct-routing": true (Docker 28.2 or later); see Documentation/bare-metal.md`}
	case byDocker(t) && t.chain.Name == "DOCKER":
		commands = []string{fmt.Sprintf("%s -I DOCKER-USER -s %s -d %s -j ACCEPT   # see Documentation/bare-metal.md",
			iptables(m, fam), network, f.Self.Subnets.Get(fam))}
	case byDocker(t):
		commands = []string{"docker network create -o com.docker.network.bridge.gateway_mode_ipv4=nat-unprotected pods" +
			"   # and the other options in Documentation/bare-metal.md"}
	case m == "firewalld":
		trust := "--zone=trusted --add-source=" + network.String()
		commands = []string{fmt.Sprintf("firewall-cmd %s && firewall-cmd --permanent %[1]s", trust)}
	case m == "nft":
		h := f.head(t.chain, "forward")
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
	if t.chain.Name == "FORWARD" && len(t.rule.Tests) == 0 && !f.Daemon.Running && f.ForwardFW {
		commands = append([]string{f.Service.start() + "   # it accepts them by itself"}, commands...)
	}
	return commands
}
