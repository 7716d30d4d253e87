package doctor

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd"
)

func storeChecks() []check {
	return []check{
		{"etcd", judgeStore}, {"certificates", judgeCertificates}, {"clock", judgeClock}, {"network config", judgeConfig}, {"leases", judgeLeases}, {"own lease", judgeOwnLease},
	}
}

// etcdctl is a command line with the node's own settings. A password is asked for.
func (f Facts) etcdctl(args string) string {
	o := f.storeOptions()
	if f.Service.inKubernetes() { // the files are the pod's, which has no etcdctl: whoever has it has them by these names from the secret
		for _, file := range []*string{&o.CAFile, &o.CertFile, &o.KeyFile} {
			if *file != "" {
				*file = filepath.Base(*file)
			}
		}
	}
	s := "etcdctl --endpoints=" + strings.Join(o.Endpoints, ",")
	for _, x := range [][2]string{{"--cacert=", o.CAFile}, {"--cert=", o.CertFile}, {"--key=", o.KeyFile}, {"--user=", o.Username}} {
		if x[1] != "" {
			s += " " + x[0] + x[1]
		}
	}
	return s + " " + args
}

func (f Facts) prefix() string { return storePrefix(f.storeOptions()) }

func storePrefix(o etcd.Options) string {
	return "/" + strings.Trim(cmp.Or(o.Prefix, etcd.DefaultPrefix), "/")
}

// asked says why nothing is known of the store.
func (f Facts) asked() (why string, asked bool) {
	switch {
	case f.Store == nil:
		return "etcd was not queried", false
	case f.Store.OptionsErr != nil:
		return "the etcd settings are invalid", false
	case f.Store.TableErr != nil:
		return "etcd does not answer", false
	}
	return "", true
}

func judgeStore(f Facts) []Finding {
	x := f.Store
	if x == nil {
		return skipped("not queried")
	}
	if x.OptionsErr != nil {
		return fail(strings.ReplaceAll(x.OptionsErr.Error(), "\n", "; "), "overlayd --help")
	}
	var out []Finding
	bad := 0
	for _, e := range x.Endpoints {
		if e.Err != nil {
			bad++
		}
	}
	for _, e := range x.Endpoints {
		if e.Err == nil {
			out = append(out, judgeEndpoint(f, e)...)
			continue
		}
		reason := fmt.Sprintf("%s: %s", e.URL, strings.TrimPrefix(e.Err.Error(), "etcd: "))
		switch {
		case bad < len(x.Endpoints):
			out = append(out, warn(reason+"; others answer", f.etcdctl("endpoint health"))...)
		case f.onlySlow(e.Err):
			out = append(out, warn(reason+onlySlow, f.etcdctl("endpoint status -w table"))...)
		default:
			meanwhile := "this node has no lease yet, and gets none until etcd answers"
			if f.connected() {
				meanwhile = "the daemon is still connected, and sees changes of other nodes while that lasts"
			} else if f.Self.Subnets != (addr.Per[netip.Prefix]{}) {
				meanwhile = "traffic continues with the last known peers, changes of other nodes are not seen"
			}
			out = append(out, fail(reason+"; "+meanwhile, f.etcdctl("endpoint health"))...)
		}
	}
	if bad < len(x.Endpoints) && x.TableErr != nil {
		list := f.etcdctl("get --prefix --keys-only " + f.prefix() + "/")
		out = append(out, f.unlessSlow(x.TableErr, "reading "+f.prefix()+"/", list)...)
	}
	if x.WriteErr != nil {
		status, alarms := f.etcdctl("endpoint status -w table"), f.etcdctl("alarm list")
		out = append(out, f.unlessSlow(x.WriteErr, "leases cannot be written", status, alarms)...)
	}
	return orOK(out, fmt.Sprintf("%d of %d endpoints answer within %s", len(x.Endpoints)-bad, len(x.Endpoints), slowest(x.Endpoints).Round(100*time.Microsecond)))
}

// connected says that the daemon has read etcd, and has had no failure since.
func (f Facts) connected() bool {
	s := f.Daemon.Status.Store
	return f.Daemon.Running && s.Revision != 0 && s.Error == ""
}

// onlySlow reports whether an error tells of no more than that an answer took longer than this command waits.
func (f Facts) onlySlow(err error) bool {
	return f.connected() && errors.Is(err, context.DeadlineExceeded)
}

const onlySlow = "; the daemon is connected and sees the changes of other nodes: " +
	"etcd is slow, or stopped answering a moment ago"

// unlessSlow is what a request that failed means.
func (f Facts) unlessSlow(err error, what string, commands ...string) []Finding {
	reason := what + ": " + strings.TrimPrefix(err.Error(), "etcd: ")
	if f.onlySlow(err) {
		return warn(reason+onlySlow, commands...)
	}
	return fail(reason, commands...)
}

func slowest(es []etcd.Endpoint) time.Duration {
	var most time.Duration
	for _, e := range es {
		most = max(most, e.Took)
	}
	return most
}

func judgeEndpoint(f Facts, e etcd.Endpoint) []Finding {
	const slow = 300 * time.Millisecond
	var out []Finding
	if e.Took > slow {
		out = append(out, warn(fmt.Sprintf("%s takes %s for one request", e.URL, e.Took.Round(time.Millisecond)), f.etcdctl("endpoint status -w table"))...)
	}
	if len(e.Alarms) > 0 {
		out = append(out, fail(fmt.Sprintf("%s raises an alarm: %s", e.URL, strings.Join(e.Alarms, ", ")), f.etcdctl("alarm list"))...)
	}
	return out
}

func judgeCertificates(f Facts) []Finding {
	const day = 24 * time.Hour
	if f.Store == nil || f.Store.OptionsErr != nil || len(f.Store.Certificates) == 0 {
		return skipped("none is in use")
	}
	var out []Finding
	first := f.Store.Certificates[0].NotAfter
	for _, c := range f.Store.Certificates {
		what := fmt.Sprintf("%s (%s)", c.What, c.Subject)
		if c.File != "" {
			what = fmt.Sprintf("%s %s (%s)", c.What, c.File, c.Subject)
		}
		steps := []string{}
		if c.File != "" {
			steps = []string{"openssl x509 -in " + c.File + " -noout -subject -enddate"}
		}
		// One that lives for hours only is renewed by a program.
		soon := min(14*day, c.NotAfter.Sub(c.NotBefore)/4)
		switch left := c.NotAfter.Sub(f.Now); {
		case left <= 0:
			out = append(out, fail(fmt.Sprintf("%s expired at %s; replace it, the daemon rereads the file", what, c.NotAfter.Format(time.RFC3339)), steps...)...)
		case f.Now.Before(c.NotBefore):
			out = append(out, fail(fmt.Sprintf("%s is valid only from %s: is the clock right?", what, c.NotBefore.Format(time.RFC3339)), steps...)...)
		case left < soon:
			in := fmt.Sprintf("%d days", left/day)
			if left < 2*day {
				in = left.Round(time.Minute).String()
			}
			out = append(out, warn(fmt.Sprintf("%s expires in %s", what, in), steps...)...)
		}
		if c.NotAfter.Before(first) {
			first = c.NotAfter
		}
	}
	return orOK(out, fmt.Sprintf("the first one expires at %s", first.Format(time.DateOnly)))
}

func judgeClock(f Facts) []Finding {
	const odd, wrong = 5 * time.Second, 5 * time.Minute
	if f.Memory != nil && f.Memory.Saved.After(f.Now.Add(odd)) {
		return fail(fmt.Sprintf("it says %s, but the daemon recorded something at %s: it is wrong or was set back", f.Now.UTC().Format(time.RFC3339), f.Memory.Saved.Format(time.RFC3339)), "timedatectl set-ntp true", "timedatectl status")
	}
	if f.Store == nil || f.Store.OptionsErr != nil {
		return skipped("etcd was not queried")
	}
	var known []etcd.Endpoint
	for _, e := range f.Store.Endpoints {
		if e.ClockErr == nil {
			known = append(known, e)
		}
	}
	if len(known) == 0 {
		return skipped("no etcd endpoint returns its time")
	}
	// The endpoint that agrees best counts: it may be the others that are wrong.
	best := slices.MinFunc(known, func(a, b etcd.Endpoint) int { return int(a.Clock.Abs() - b.Clock.Abs()) })
	way := "ahead of"
	if best.Clock < 0 {
		way = "behind"
	}
	reason := fmt.Sprintf("it is %s %s that of %s", best.Clock.Abs().Round(time.Second), way, best.URL)
	switch {
	case best.Clock.Abs() >= wrong:
		return fail(reason+": certificates and persisted leases depend on it", "timedatectl set-ntp true", "timedatectl status")
	case best.Clock.Abs() >= odd:
		return warn(reason, "timedatectl set-ntp true", "timedatectl status")
	}
	return ok("agrees with etcd's to the second")
}

func judgeConfig(f Facts) []Finding {
	if why, asked := f.asked(); !asked {
		return skipped(why)
	}
	x := f.Store
	key := f.prefix() + "/config"
	var out []Finding
	switch {
	case x.NoConfig && len(x.Table.Entries) == 0:
		return fail(fmt.Sprintf("etcd has nothing under %s/: the prefix is wrong (--etcd-prefix), or no config was written yet", f.prefix()),
			f.etcdctl("get --prefix --keys-only --limit=20 /"), f.etcdctl(fmt.Sprintf(`put %s '{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}'`, key)))
	case x.NoConfig:
		return fail(fmt.Sprintf("%s is missing, there are %d leases", key, len(x.Table.Entries)), f.putConfig(key))
	case x.Table.ConfigErr != nil:
		return fail(fmt.Sprintf("%s; nodes continue with the last valid one", x.Table.ConfigErr), f.putConfig(key))
	}
	if keys := subnet.UnknownKeys([]byte(x.Table.ConfigJSON)); len(keys) > 0 {
		out = append(out, warn(fmt.Sprintf("%s has unknown keys: %s", key, few(keys)), f.etcdctl("get "+key))...)
	}
	for _, fam := range x.Table.Config.Families() {
		out = append(out, judgePool(f, x.Table, fam)...)
	}
	return orOK(out, describeConfig(x.Table.Config))
}

// putConfig puts back the last config that is known, or shows the one that is there.
func (f Facts) putConfig(key string) string {
	if f.Memory != nil && len(f.Memory.Config) > 0 {
		if _, err := subnet.ParseConfig(f.Memory.Config); err == nil {
			return f.etcdctl(fmt.Sprintf("put %s '%s'", key, f.Memory.Config))
		}
	}
	return f.etcdctl("get " + key)
}

func describeConfig(c subnet.Config) string {
	var nets []string
	for _, fam := range c.Families() {
		nets = append(nets, c.Pools.Get(fam).Network.String())
	}
	s := fmt.Sprintf("%s, %s", strings.Join(nets, " and "), c.Backend.Type)
	if c.Backend.Type == subnet.VXLAN {
		s += fmt.Sprintf(", VNI %d, UDP port %d", c.Backend.VNI, c.Backend.Port)
	}
	return s
}

// judgePool warns before there are no subnets left, and of a network that the node's own addresses are in.
func judgePool(f Facts, t subnet.Table, fam addr.Family) []Finding {
	p := t.Config.Pools.Get(fam)
	var out []Finding
	for _, a := range f.Survey.Host.Addresses {
		l, _ := f.Survey.Link(a.Link)
		if a.Tunnel || l.Kind == "bridge" || l.Kind == "vxlan" || !p.Network.Contains(a.Prefix.Addr()) || a.Prefix.Addr().IsLinkLocalUnicast() || f.Self.Subnets.Get(fam).Contains(a.Prefix.Addr()) {
			continue
		}
		out = append(out, fail(fmt.Sprintf("the address %s of %s is inside the overlay network %s: the two must not overlap", a.Prefix, a.Link, p.Network), f.outOfTheNetwork(a)...)...)
	}
	return out
}

// outOfTheNetwork: the address goes, unless the node itself is reached at it or it may be that of pods here; or the pod network does.
func (f Facts) outOfTheNetwork(a netstate.HostAddress) []string {
	fam := addr.FamilyOf(a.Prefix.Addr())
	needed := !f.Self.Subnets.Get(fam).IsValid() || a.Prefix.Addr() == f.Underlay.By.Get(fam).Addr || slices.ContainsFunc(f.Survey.Host.Routes, func(r netstate.HostRoute) bool {
		return r.Dst.Bits() == 0 && r.Link == a.Link
	})
	other := f.etcdctl("get "+f.prefix()+"/config") + "   # change Network and put it back: all nodes get other subnets, and pods other addresses"
	if needed {
		return []string{other}
	}
	return []string{fmt.Sprintf("ip address del %s dev %s   # if nothing needs it, or:", a.Prefix, a.Link), other}
}

// judgeLeases looks for leases that are in each other's way.
func judgeLeases(f Facts) []Finding {
	if why, asked := f.asked(); !asked {
		return skipped(why)
	}
	var live []*subnet.Entry
	var out []Finding
	broken := []string{}
	for _, e := range f.Store.Table.Entries {
		switch {
		case e.Blank():
		case e.Err != nil:
			broken = append(broken, fmt.Sprintf("%.60q: %.120s", e.Key, e.Err.Error()))
		default:
			live = append(live, e)
		}
	}
	out = append(out, atMost(f.sharedIPs(live))...)
	out = append(out, atMost(f.overlaps(live))...)
	out = append(out, atMost(f.clones(live))...)
	out = append(out, f.refused(out)...)
	for _, e := range f.Store.Table.HarmsFlannel() {
		fix := f.etcdctl("get --prefix " + f.prefix() + "/subnets/")
		if e.Blank() {
			fix = f.etcdctl(fmt.Sprintf("put '%s/subnets/%s' '{}'", f.prefix(), e.Key)) +
				"   # then restart flanneld on its nodes"
		}
		out = append(out, warn(fmt.Sprintf("the value of %.60q is not JSON: flannel nodes, of which this network has some, "+
			"drop all their peers when such a key is written; '{}' reserves the same", e.Key), fix)...)
	}
	if len(broken) > 0 {
		out = append(out, warn(fmt.Sprintf("%d unreadable leases are rejected: %s", len(broken), few(broken)), f.etcdctl("get --prefix "+f.prefix()+"/subnets/"))...)
	}
	return orOK(out, fmt.Sprintf("%d, none in conflict", len(live)))
}

// removal is how to take a lease away.
func (f Facts) removal(e *subnet.Entry) string {
	return f.etcdctl(fmt.Sprintf("del '%s/subnets/%s'", f.prefix(), e.Key)) + "   # if no node uses it"
}

// younger is the lease that came later: it is the one that is not believed.
func younger(a, b *subnet.Entry) *subnet.Entry {
	if a.Created > b.Created {
		return a
	}
	return b
}

// about notes which two leases findings are about.
func about(a, b *subnet.Entry, found []Finding) []Finding {
	for i := range found {
		found[i].leases = []string{a.Key, b.Key}
	}
	return found
}

func (f Facts) sharedIPs(live []*subnet.Entry) []Finding {
	var out []Finding
	for _, fam := range addr.Families() {
		first := map[netip.Addr]*subnet.Entry{}
		for _, e := range live {
			ip := e.PublicIP.Get(fam)
			if !ip.IsValid() {
				continue
			}
			if other := first[ip]; other != nil {
				stale, now := other, e // a node that has the address would have written its lease again
				if stale.Revision > now.Revision {
					stale, now = now, stale
				}
				first[ip] = now
				if stale == f.ownEntry() { // there is a node behind it: this one
					stale = now
				}
				out = append(out, about(other, e, fail(fmt.Sprintf("%s (%s) and %s (%s) have the same public IP %s: peers use the "+
					"one that was written last, %s", other.Name(), other.Key, e.Name(), e.Key, ip, now.Key), f.removal(stale)))...)
				continue
			}
			first[ip] = e
		}
	}
	return out
}

// overlaps finds subnets that lie in each other. Prefixes are disjoint or nested: with the widest first, the last one that is open is
// the only one that can hold the next.
func (f Facts) overlaps(live []*subnet.Entry) []Finding {
	var out []Finding
	for _, fam := range addr.Families() {
		order := slices.DeleteFunc(slices.Clone(live), func(e *subnet.Entry) bool { return !e.Subnets.Get(fam).IsValid() })
		slices.SortFunc(order, func(a, b *subnet.Entry) int { return addr.ComparePrefix(a.Subnets.Get(fam), b.Subnets.Get(fam)) })
		var open *subnet.Entry
		for _, e := range order {
			if open != nil && open.Subnets.Get(fam).Overlaps(e.Subnets.Get(fam)) {
				out = append(out, about(open, e, fail(fmt.Sprintf("the subnets %s of %s and %s of %s overlap: the younger lease is rejected",
					open.Subnets.Get(fam), open.Name(), e.Subnets.Get(fam), e.Name()), f.removal(younger(open, e))))...)
				continue
			}
			open = e
		}
	}
	return out
}

// clones finds machines that were copied with their machine-id, and names that two machines have.
func (f Facts) clones(live []*subnet.Entry) []Finding {
	var out []Finding
	byID, byName := map[string]*subnet.Entry{}, map[string]*subnet.Entry{}
	for _, e := range live {
		if e.NodeID != "" {
			if o := byID[e.NodeID]; o != nil && o.NodeName != e.NodeName {
				out = append(out, about(o, e, fail(fmt.Sprintf("the nodes %s and %s have the same ID %s: one is a clone of the other, with its /etc/machine-id", o.Name(), e.Name(), e.NodeID),
					f.Service.newID()+"   # on one of the two: "+younger(o, e).Name()))...)
			} else if o != nil {
				out = append(out, about(o, e, warn(fmt.Sprintf("the node %s holds two leases: %s and %s", e.Name(), o.Key, e.Key), f.removal(younger(o, e))))...)
			}
			byID[e.NodeID] = e
		}
		if e.NodeName != "" {
			if o := byName[e.NodeName]; o != nil && o.NodeID != e.NodeID {
				out = append(out, about(o, e, fail(fmt.Sprintf("two machines are called %s: one has the ID %s, the other %s; or the machine was reinstalled and its old lease still exists", e.NodeName, o.NodeID, e.NodeID), f.removal(earlier(o, e))))...)
			}
			byName[e.NodeName] = e
		}
	}
	return out
}

func earlier(a, b *subnet.Entry) *subnet.Entry {
	if younger(a, b) == a {
		return b
	}
	return a
}

// refused are those that are not believed for another reason than what was found before.
func (f Facts) refused(before []Finding) []Finding {
	x := f.Store.Table
	if x.ConfigErr != nil || f.Store.NoConfig {
		return nil
	}
	self := f.Self
	for _, e := range x.Entries {
		if e.Err == nil && e.Identity == f.Identity &&
			(e.Subnets == f.Self.Subnets || f.Self == subnet.Lease{} && e.NodeID != "") {
			self = e.Lease // a daemon that can't begin yet has none, and left this one behind
		}
	}
	_, refused := x.Peers(x.Config, self)
	var names []string
	for _, r := range refused {
		e := x.Find(r.Key)
		if e != nil && e.Err != nil || slices.ContainsFunc(before, func(b Finding) bool { return slices.Contains(b.leases, r.Key) }) {
			continue
		}
		names = append(names, fmt.Sprintf("%s of %s: %s", r.Key, r.Node, r.Reason))
	}
	if len(names) == 0 {
		return nil
	}
	return warn(fmt.Sprintf("%d leases are rejected: %s", len(names), few(names)), "overlayd leases")
}

func judgeOwnLease(f Facts) []Finding {
	if why, asked := f.asked(); !asked {
		return skipped(why)
	}
	if f.Identity.NodeID == "" {
		return skipped("this node's identity is unknown")
	}
	own := f.ownEntry()
	switch {
	case f.NoLease != "" && !f.Daemon.Running:
		ip := f.elsewhere(own)
		return fail(f.NoLease+": the node's address has changed, or another machine has the same name and ID (one is a clone of the other). Find out which before starting overlayd here",
			fmt.Sprintf("ping -c 3 %s   # if another machine answers, and this one is its clone, then here:", ip), f.Service.newIdentity(), f.Service.start()+"   # if nothing answers")
	case f.NoLease != "" && own == nil:
		return fail("this node has none, so no pod can start here", "overlayd status")
	case f.NoLease != "":
		return skipped(f.NoLease)
	case own == nil && f.Daemon.Running:
		return fail(fmt.Sprintf("the daemon holds %s, and etcd has no lease of this node under %s/subnets/", strings.Join(f.Daemon.Status.Lease.Subnets, " and "), f.prefix()), "overlayd status")
	case own == nil:
		return warn(fmt.Sprintf("etcd has no lease of this node under %s/subnets/; it gets one when overlayd starts", f.prefix()))
	}
	if ip, ours := f.takenOver(own); ip.IsValid() {
		return fail(fmt.Sprintf("etcd has this node at %s, the daemon has it at %s: most likely another machine with this node's name and ID (a clone of it, with /etc/machine-id and host name) has taken the lease over, and is at %s. "+
			"Restarting overlayd here before is fixed would only take it back for a moment", ip, ours, ip), "ping -c 3 "+ip.String()+"   # if it is another machine that answers, then there:", f.Service.newIdentity(), f.Service.restart()+"   # and after that here: the lease is back at once")
	}
	if ip := f.elsewhere(own); ip.IsValid() {
		return fail(fmt.Sprintf("peers send to %s, which no device of this node has: its address changed", ip), f.Service.restart())
	}
	if own.Subnets != f.Self.Subnets {
		return fail(fmt.Sprintf("etcd has %s, but this node uses %s", own.Key, subnet.FormatKey(f.Self.Subnets)), "overlayd status")
	}
	return ok(own.Key)
}

// takenOver finds out whether somebody else wrote this node's lease: it has another public IP than the daemon, which would have put
// that right at once, and no device here has it.
func (f Facts) takenOver(own *subnet.Entry) (theirs, ours netip.Addr) {
	if !f.Daemon.Running || f.Errs["devices"] != nil {
		return theirs, ours
	}
	for _, text := range f.Daemon.Status.Interface.PublicIPs {
		ours, err := netip.ParseAddr(text)
		if err != nil {
			continue
		}
		theirs := own.PublicIP.Get(addr.FamilyOf(ours))
		if theirs.IsValid() && theirs != ours && !f.Survey.Host.Has(theirs) {
			return theirs, ours
		}
	}
	return netip.Addr{}, netip.Addr{}
}

// putBackend puts the network config with another value for a key of Backend; "": it is not known.
func (f Facts) putBackend(name string, value any) string {
	if f.Store == nil || f.Store.Table.ConfigJSON == "" {
		return ""
	}
	doc, ok := withBackend(f.Store.Table.ConfigJSON, name, value)
	if !ok {
		return ""
	}
	return f.etcdctl(fmt.Sprintf("put %s/config '%s'", f.prefix(), strings.ReplaceAll(doc, "'", `'\''`)))
}

// withBackend is the network config with another value for a key of Backend, on one line. Letter case of its keys does
// not matter.
func withBackend(config, name string, value any) (string, bool) {
	var doc map[string]any
	if json.Unmarshal([]byte(config), &doc) != nil {
		return "", false
	}
	key := spelled(doc, "Backend")
	b, _ := doc[key].(map[string]any)
	if b == nil {
		b = map[string]any{"Type": "vxlan"}
	}
	b[spelled(b, name)] = value
	doc[key] = b
	out, err := json.Marshal(doc)
	return string(out), err == nil
}

// spelled is how a document writes a key.
func spelled(doc map[string]any, key string) string {
	for k := range doc {
		if strings.EqualFold(k, key) {
			return k
		}
	}
	return key
}
