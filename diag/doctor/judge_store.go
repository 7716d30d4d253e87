package doctor

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/internal/jsonobject"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd"
	"github.com/overlayd/overlayd/subnet/examine"
)

func judgeStore(f Facts) (out findings) {
	x := f.Store
	if x == nil {
		return skipped("not queried")
	}
	if x.OptionsErr != nil {
		return fail("%s", strings.ReplaceAll(x.OptionsErr.Error(), "\n", "; ")).fix("overlayd --help")
	}
	bad, slowest := 0, time.Duration(0)
	for _, e := range x.Endpoints {
		slowest = max(slowest, e.Took)
		if e.Err != nil {
			bad++
		}
	}
	for _, e := range x.Endpoints {
		switch {
		case e.Err == nil:
			out.add(f.judgeEndpoint(e))
		case bad < len(x.Endpoints):
			out.add(warn("%s: %s; others answer", e.URL, f.cause(e.Err)).steps(f.storeHealth()))
		default:
			out.add(f.storeFails(e.URL, e.Err, f.storeHealth()))
		}
	}
	if bad < len(x.Endpoints) && x.TableErr != nil {
		out.add(f.storeFails("leases cannot be read", x.TableErr, f.showLeases()))
	}
	if x.WriteErr != nil {
		commands := []string{f.etcdctl("endpoint status -w table"), f.etcdctl("alarm list")}
		if f.kubeStore() {
			commands = []string{"kubectl describe clusterrole overlayd"}
		}
		out.add(f.storeFails("leases cannot be written", x.WriteErr, commands...))
	}
	return out.orOK("%d of %d endpoints answer within %s", len(x.Endpoints)-bad, len(x.Endpoints),
		slowest.Round(100*time.Microsecond))
}

// cause is an error of the store, in a sentence about it.
func (f Facts) cause(err error) string { return strings.TrimPrefix(err.Error(), f.storeName()+": ") }

// storeFails says what the failure of a request means for this node. A daemon that has read the store, and has had no
// failure since, is connected.
func (f Facts) storeFails(what string, err error, commands ...string) findings {
	s, mark, means := f.Daemon.Status.Store, Fail, ""
	switch connected := f.Daemon.Running && s.Revision != 0 && s.Error == ""; {
	case connected && errors.Is(err, context.DeadlineExceeded): // no more than that took longer than is waited here
		mark, means = Warn, "the daemon is connected and sees the changes of other nodes: "+f.storeName()+
			" is slow, or stopped answering a moment ago"
	case connected:
		means = "the daemon is still connected, and sees changes of other nodes while that lasts"
	case f.Self.Subnets != (addr.Per[netip.Prefix]{}):
		means = "traffic continues with the last known peers, changes of other nodes are not seen"
	default:
		means = "this node has no lease yet, and gets none until that is fixed"
	}
	return finding(mark, "%s: %s; %s", what, f.cause(err), means).steps(commands...)
}

func (f Facts) judgeEndpoint(e examine.Endpoint) (out findings) {
	const slow = 300 * time.Millisecond
	if e.Took > slow {
		command := f.storeHealth()
		if !f.kubeStore() {
			command = f.etcdctl("endpoint status -w table")
		}
		out.add(warn("%s takes %s for one request", e.URL, e.Took.Round(time.Millisecond)).steps(command))
	}
	if len(e.Alarms) > 0 {
		out.add(fail("%s raises an alarm: %s", e.URL, strings.Join(e.Alarms, ", ")).steps(f.etcdctl("alarm list")))
	}
	return out
}

func judgeCertificates(f Facts) (out findings) {
	const day = 24 * time.Hour
	if f.Store == nil || len(f.Store.Certificates) == 0 {
		return skipped("none is in use")
	}
	first := f.Store.Certificates[0].NotAfter
	for _, c := range f.Store.Certificates {
		if c.NotAfter.Before(first) {
			first = c.NotAfter
		}
		what, left := fmt.Sprintf("%s (%s)", strings.TrimSpace(c.What+" "+c.File), c.Subject), c.NotAfter.Sub(f.Now)
		var found findings
		switch {
		case left <= 0:
			found = fail("%s expired at %s; replace it, the daemon rereads the file", what, c.NotAfter.Format(time.RFC3339))
		case f.Now.Before(c.NotBefore):
			found = fail("%s is valid only from %s: is the clock right?", what, c.NotBefore.Format(time.RFC3339))
		case left < 2*day && left < c.NotAfter.Sub(c.NotBefore)/4: // a program renews one that lives for hours only
			found = warn("%s expires in %s", what, left.Round(time.Minute))
		case left >= 2*day && left < min(14*day, c.NotAfter.Sub(c.NotBefore)/4):
			found = warn("%s expires in %d days", what, left/day)
		}
		if c.File != "" && found != nil {
			found.fix("openssl x509 -in %s -noout -subject -enddate", c.File)
		}
		out.add(found)
	}
	return out.orOK("the first one expires at %s", first.Format(time.DateOnly))
}

func judgeCredentials(f Facts) (out findings) {
	for _, e := range f.Exposed {
		found := warn("%s", e.Text)
		if e.File != "" {
			found.fix("chmod go= %s", e.File)
		}
		out.add(found)
	}
	return out.orOK("no other user can read those of %s", f.storeName())
}

func judgeClock(f Facts) findings {
	const odd, wrong = 5 * time.Second, 5 * time.Minute
	sync := []string{"timedatectl set-ntp true", "timedatectl status"}
	if f.Persisted.Saved.After(f.Now.Add(odd)) {
		return fail("it says %s, but the daemon recorded something at %s: it is wrong or was set back",
			f.Now.UTC().Format(time.RFC3339), f.Persisted.Saved.Format(time.RFC3339)).steps(sync...)
	}
	if f.Store == nil || f.Store.OptionsErr != nil {
		return skipped("the store was not queried")
	}
	known := slices.DeleteFunc(slices.Clone(f.Store.Endpoints), func(e examine.Endpoint) bool { return e.ClockErr != nil })
	if len(known) == 0 {
		return skipped("no endpoint of the store returns its time")
	}
	// The endpoint that agrees best counts: the clocks of the others may be wrong.
	best := slices.MinFunc(known, func(a, b examine.Endpoint) int { return cmp.Compare(a.Clock.Abs(), b.Clock.Abs()) })
	side := "ahead of"
	if best.Clock < 0 {
		side = "behind"
	}
	reason := fmt.Sprintf("it is %s %s that of %s", best.Clock.Abs().Round(time.Second), side, best.URL)
	switch {
	case best.Clock.Abs() >= wrong:
		return fail("%s: certificates and persisted leases depend on it", reason).steps(sync...)
	case best.Clock.Abs() >= odd:
		return warn("%s", reason).steps(sync...)
	}
	return ok("within a second of the store's")
}

func judgeConfig(f Facts) (out findings) {
	x, key := f.Store, f.configKey()
	switch {
	case x.NoConfig && f.kubeStore():
		return fail("%s is missing, or has no key net-conf.json", key).steps(f.restoreConfig())
	case x.NoConfig && len(x.Table.Entries) == 0:
		const example = `{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}`
		return fail("etcd has nothing under %s/: the prefix is wrong (--etcd-prefix), or no config was written yet",
			f.prefix()).steps(f.etcdctl("get --prefix --keys-only --limit=20 /"), f.putConfig(example))
	case x.NoConfig:
		return fail("%s is missing, there are %d leases", key, len(x.Table.Entries)).steps(f.restoreConfig())
	case x.Table.ConfigErr != nil:
		return fail("%s; nodes continue with the last valid one", x.Table.ConfigErr).steps(f.restoreConfig())
	}
	if keys := subnet.UnknownKeys([]byte(x.Table.ConfigJSON)); len(keys) > 0 {
		out.add(warn("%s has unknown keys: %s", key, few(keys)).steps(f.showConfig()))
	}
	out.add(f.judgeInitConfig(key))
	c := x.Table.Config
	well, sep := "", ""
	for _, fam := range c.Families() {
		out.add(f.addressesInside(fam, c.Pools.Get(fam).Network))
		well, sep = well+sep+c.Pools.Get(fam).Network.String(), " and "
	}
	well += ", " + string(c.Backend.Type)
	switch c.Backend.Type {
	case subnet.VXLAN:
		well += fmt.Sprintf(", VNI %d, UDP port %d", c.Backend.VNI, c.Backend.Port)
	case subnet.WireGuard:
		well += fmt.Sprintf(", UDP port %d", c.Backend.ListenPort.Get(c.Families()[0]))
	}
	return out.orOK("%s", well)
}

// judgeInitConfig compares the config that this node was given with the one in etcd.
func (f Facts) judgeInitConfig(key string) findings {
	given := f.Settings.Store.Etcd.InitConfig
	c, err := subnet.ParseConfig(given)
	if err != nil || f.kubeStore() { // there is none; or it is wrong, which is a finding of settings
		return nil
	}
	what := etcd.Overruled(f.Store.Table, c)
	if what == "" {
		return nil
	}
	var text bytes.Buffer
	_ = json.Compact(&text, given) // it was parsed
	return warn("%s; etcd's is in use, change it there or make --init-config the same", what).
		fix("%s   # all nodes follow; another Network or SubnetLen gives them other subnets, and pods other addresses",
			f.etcdctl("put %s '%s'", key, strings.ReplaceAll(text.String(), "'", `'\''`)))
}

// addressesInside finds addresses of the node inside the pod network.
func (f Facts) addressesInside(fam addr.Family, network netip.Prefix) (out findings) {
	own := f.Self.Subnets.Get(fam)
	for _, a := range f.Survey.Host.Addresses {
		ip, pods := a.Prefix.Addr(), a.Tunnel || own.Contains(a.Prefix.Addr())
		l, _ := f.Survey.Link(a.Link)
		if pods || l.Kind == "bridge" || l.Kind == "vxlan" || !network.Contains(ip) || ip.IsLinkLocalUnicast() {
			continue
		}
		found := fail("the address %s of %s is inside the overlay network %s: the two must not overlap",
			a.Prefix, a.Link, network)
		// The address stays where the node itself is reached at it, or where it may be that of pods here.
		needed := ip == f.Underlay.By.Get(fam).Addr || slices.ContainsFunc(f.Survey.Host.Routes,
			func(r netstate.HostRoute) bool { return r.Dst.Bits() == 0 && r.Link == a.Link })
		if own.IsValid() && !needed {
			found.fix("ip address del %s dev %s   # if nothing needs it, or:", a.Prefix, a.Link)
		}
		out.add(found.steps(f.showConfig() +
			"   # change Network and put it back: all nodes get other subnets, and pods other addresses"))
	}
	return out
}

// judgeLeases finds leases that contradict each other.
func judgeLeases(f Facts) (out findings) {
	var live []*subnet.Entry
	var broken []string
	for _, e := range f.Store.Table.Entries {
		switch {
		case e.Blank():
		case e.Err != nil:
			broken = append(broken, fmt.Sprintf("%.60q: %.120s", cmp.Or(e.Key, e.NodeName), e.Err.Error()))
		default:
			live = append(live, e)
		}
	}
	out.add(f.rejected(live))
	out.add(f.clones(live).atMost())
	for _, e := range f.Store.Table.HarmsFlannel() {
		found := warn("the value of %.60q is not JSON: flannel nodes, of which this network has some, "+
			"drop all their peers when such a key is written; '{}' reserves the same", e.Key)
		if e.Blank() {
			found.steps(f.etcdctl("put '%s/subnets/%s' '{}'", f.prefix(), e.Key) +
				"   # then restart flanneld on its nodes")
		} else {
			found.steps(f.showLeases())
		}
		out.add(found)
	}
	if len(broken) > 0 {
		out.add(warn("%d unreadable leases are rejected: %s", len(broken), few(broken)).steps(f.showLeases()))
	}
	return out.orOK("%d, none in conflict", len(live))
}

// byAge are the older lease and the younger one, which is the one that is rejected.
func byAge(a, b *subnet.Entry) (older, younger *subnet.Entry) {
	if a.Created > b.Created {
		return b, a
	}
	return a, b
}

// rejected are the leases that this node rejects: those in conflict with another one by themselves, the others
// together.
func (f Facts) rejected(live []*subnet.Entry) (out findings) {
	t := f.Store.Table
	if t.ConfigErr != nil || f.Store.NoConfig {
		return nil
	}
	self := f.Self
	for _, e := range live {
		unused := self.Subnets == addr.Per[netip.Prefix]{} && e.NodeID != ""
		if e.Identity == f.Identity && (e.Subnets == f.Self.Subnets || unused) {
			self = e.Lease // a daemon that can't begin yet has none, and left this one behind
		}
	}
	_, rejected := t.Peers(t.Config, self)
	var names []string
	for _, r := range rejected {
		e := t.Find(r.Key)
		if e == nil || e.Err != nil {
			continue
		}
		what := fmt.Sprintf("%s of %s: %s", r.Key, r.Node, r.Reason)
		if r.Cause == subnet.CauseOverlap || r.Cause == subnet.CauseSharedIP {
			out.add(fail("rejected: %s", what).steps(f.removal(e)))
		} else {
			names = append(names, what)
		}
	}
	out = out.atMost()
	if len(names) > 0 {
		out.add(warn("%d leases are rejected: %s", len(names), few(names)).fix("overlayd leases"))
	}
	return out
}

// clones finds machines that were copied with their machine-id, and names that two machines have.
func (f Facts) clones(live []*subnet.Entry) (out findings) {
	byID, byName := map[string]*subnet.Entry{}, map[string]*subnet.Entry{}
	for _, e := range live {
		if o := byID[e.NodeID]; o != nil && e.NodeID != "" {
			_, younger := byAge(o, e)
			if o.NodeName == e.NodeName {
				out.add(warn("the node %s holds two leases: %s and %s", e.Name(), o.Key, e.Key).steps(f.removal(younger)))
			} else {
				out.add(fail("the nodes %s and %s have the same ID %s: one is a clone of the other, with its /etc/machine-id",
					o.Name(), e.Name(), e.NodeID).
					fix("%s   # on one of the two: %s", f.Service.newID(), younger.Name()))
			}
		}
		if o := byName[e.NodeName]; o != nil && e.NodeName != "" && o.NodeID != e.NodeID {
			older, _ := byAge(o, e)
			out.add(fail("two machines are called %s: one has the ID %s, the other %s; or the machine was reinstalled and "+
				"its old lease still exists", e.NodeName, o.NodeID, e.NodeID).steps(f.removal(older)))
		}
		byID[e.NodeID], byName[e.NodeName] = e, e
	}
	return out
}

func judgeOwnLease(f Facts) findings {
	if f.Identity.NodeID == "" {
		return skipped("this node's identity is unknown")
	}
	own, running := f.ownEntry(), f.Daemon.Running
	switch {
	case own == nil && f.kubeStore():
		return f.noNodeLease()
	case f.NoLease != "" && !running:
		return fail("%s: the node's address has changed, or another machine has the same name and ID (one is a clone of "+
			"the other). Find out which before starting overlayd here", f.NoLease).
			fix("ping -c 3 %s   # if another machine answers, and this one is its clone, then here:", f.elsewhere(own)).
			steps(f.Service.newIdentity(), f.Service.start()+"   # if nothing answers")
	case f.NoLease != "" && own == nil:
		return fail("this node has none, so no pod can start here").fix("overlayd status")
	case f.NoLease != "":
		return skipped("%s", f.NoLease)
	case own == nil && running:
		return fail("the daemon holds %s, and etcd has no lease of this node under %s/subnets/",
			strings.Join(f.Daemon.Status.Lease.Subnets, " and "), f.prefix()).fix("overlayd status")
	case own == nil:
		return warn("etcd has no lease of this node under %s/subnets/; it gets one when overlayd starts", f.prefix())
	}
	if theirs, ours := f.takenOver(own); theirs.IsValid() {
		return fail("%s has this node at %s, the daemon has it at %s: most likely another machine with this node's name "+
			"and ID (a clone of it, with /etc/machine-id and host name) has taken the lease over, and is at %s. Fix that "+
			"first: restarting overlayd here only takes the lease back for a moment", f.storeName(), theirs, ours, theirs).
			fix("ping -c 3 %s   # if it is another machine that answers, then there:", theirs).
			steps(f.Service.newIdentity(), f.Service.restart()+"   # and after that here: the lease is back at once")
	}
	if ip := f.elsewhere(own); ip.IsValid() {
		return fail("peers send to %s, which no device of this node has: its address changed", ip).
			steps(f.Service.restart())
	}
	if own.Subnets != f.Self.Subnets {
		return fail("%s has %s, but this node uses %s", f.storeName(), own.Key, subnet.FormatKey(f.Self.Subnets)).fix("overlayd status")
	}
	return ok("%s", own.Key)
}

// takenOver finds out whether another machine wrote this node's lease: the lease has another public IP than the daemon,
// which would have corrected that at once, and no device here has it.
func (f Facts) takenOver(own *subnet.Entry) (theirs, ours netip.Addr) {
	if !f.Daemon.Running || f.Errs[readDevices] != nil {
		return theirs, ours
	}
	for _, fam := range addr.Families() {
		theirs, ours = own.PublicIP.Get(fam), f.Underlay.PublicIP.Get(fam)
		if theirs.IsValid() && ours.IsValid() && theirs != ours && !f.Survey.Host.Has(theirs) {
			return theirs, ours
		}
	}
	return netip.Addr{}, netip.Addr{}
}

// putBackend writes the network config with another value for a key of Backend; "": it is not known.
func (f Facts) putBackend(name string, value any) string {
	var doc jsonobject.Object
	if f.Store == nil || json.Unmarshal([]byte(f.Store.Table.ConfigJSON), &doc) != nil {
		return ""
	}
	b := jsonobject.Object{{Key: "Type", Value: json.RawMessage(`"vxlan"`)}} // the default
	err := errors.Join(doc.Decode("Backend", &b, "an object"), b.Put(name, value))
	err = errors.Join(err, doc.Put("Backend", b))
	text, wrong := json.Marshal(doc)
	if err != nil || wrong != nil {
		return ""
	}
	return f.putConfig(string(text))
}
