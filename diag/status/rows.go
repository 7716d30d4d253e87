package status

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Row is one property of a node. `overlayd status` and the page show the same rows.
type Row struct {
	Label string `json:"label"`
	Parts []Part `json:"lines"` // the most important first
	List  bool   `json:"-"`     // the parts are of the same kind, and of any number
}

// Part is one part of a row. Alert marks a problem.
type Part struct {
	Text  string `json:"text"`
	Alert bool   `json:"alert,omitempty"`
}

// Rows are the properties of a node.
func (n Node) Rows() []Row {
	out := []Row{n.leaseRow(), n.storeRow(), n.networkRow(), n.interfaceRow()}
	for _, d := range n.Devices {
		out = append(out, d.row())
	}
	return append(out, n.Peers.row(), n.Probe.row(), n.firewallRow(), n.kernelRow(), n.driftRow())
}

func (r *Row) add(format string, args ...any) { r.part(false, format, args...) }

func (r *Row) alert(when bool, format string, args ...any) {
	if when {
		r.part(true, format, args...)
	}
}

func (r *Row) part(alert bool, format string, args ...any) {
	r.Parts = append(r.Parts, Part{Shorten(fmt.Sprintf(format, args...), LongText), alert})
}

func (n Node) leaseRow() Row {
	r, l := Row{Label: "Lease"}, n.Lease
	if len(l.Subnets) == 0 {
		r.alert(true, "none")
		return r
	}
	for _, s := range l.Subnets {
		r.add("%s", s)
	}
	expires := l.Expires.Format(time.RFC3339)
	switch {
	case l.Reserved && n.Store.Kind == Kubernetes:
		r.add("from the Node's podCIDRs")
	case l.Reserved:
		r.add("reserved for this node: does not expire")
	case l.Expires.IsZero():
	case n.Now.After(l.Expires):
		r.alert(true, "expired %s", expires)
	default:
		r.add("expires %s unless renewed", expires)
	}
	r.alert(!l.Held, "not confirmed by %s", n.Store.name())
	r.alert(l.Losses > 0, "disappeared from %s %s, last %s ago", n.Store.name(), times(l.Losses), Ago(n.Now, l.LostAt))
	return r
}

// name is what to call the store in a sentence.
func (s Store) name() string { return cmp.Or(s.Name, "the store") }

func (n Node) storeRow() Row {
	r, e := Row{Label: strings.TrimPrefix(n.Store.name(), "the ")}, n.Store
	r.alert(e.Error != "", "unreachable for %s: %s", Ago(n.Now, e.Since), e.Error)
	if e.Revision == 0 {
		r.alert(true, "no lease table read yet")
	} else {
		r.add("revision %d", e.Revision)
		r.add("%s", count(e.Entries, "lease"))
	}
	r.add("%s", strings.Join(e.Endpoints, " "))
	if e.Kind == Kubernetes {
		r.add("ConfigMap %s", e.ConfigMap)
	} else {
		r.add("prefix %s", e.Prefix)
	}
	r.alert(e.Losses > 0, "lost data or was restored from a backup %s, last %s ago", times(e.Losses), Ago(n.Now, e.LostAt))
	return r
}

func (n Node) networkRow() Row {
	r, w := Row{Label: "Network"}, n.Network
	if w.Backend == "" {
		r.alert(true, "unknown yet")
		return r
	}
	r.add("%s", w.Backend)
	r.add("pod MTU %d", w.MTU)
	for _, name := range w.Networks {
		i := slices.IndexFunc(w.Pools, func(p Pool) bool { return p.Network == name })
		if i < 0 {
			r.add("%s", name)
			continue
		}
		p := w.Pools[i]
		r.part(p.Leased*10 >= p.Subnets*9, "%s: %d of %s leased", name, p.Leased, count(p.Subnets, "subnet"))
	}
	return r
}

func (n Node) interfaceRow() Row {
	r, i := Row{Label: "Interface"}, n.Interface
	if i.Reason == "" {
		r.alert(true, "none yet")
		return r
	}
	r.add("%s", i.Reason)
	if len(i.PublicIPs) > 0 {
		r.add("public IP %s%s", strings.Join(i.PublicIPs, " and "),
			unless(i.PublicIPLocal, " (not configured on this node)"))
	}
	return r
}

func (d Device) row() Row {
	r := Row{Label: "Device"}
	r.add("%s", d.Name)
	if d.PublicKey == "" {
		r.add("VNI %d", d.VNI)
	}
	r.add("UDP %d from %s over %s", d.Port, d.Local, cmp.Or(d.Underlay, "any device"))
	if d.PublicKey == "" {
		r.add("MAC %s", d.MAC)
	} else {
		r.add("public key %s", d.PublicKey)
	}
	r.add("MTU %d", d.MTU)
	var on, off []string
	for _, name := range slices.Sorted(maps.Keys(d.Offloads)) {
		if d.Offloads[name] {
			on = append(on, name)
		} else {
			off = append(off, name)
		}
	}
	if len(on) > 0 {
		r.add("offloads on: %s", strings.Join(on, " "))
	}
	r.alert(len(off) > 0, "offloads off: %s", strings.Join(off, " "))
	return r
}

func (p PeerCounts) row() Row {
	r := Row{Label: "Peers"}
	r.add("%d: %d tunnel", p.Total, p.Tunnel)
	r.add("%d direct", p.Direct)
	p.failing(&r)
	r.alert(p.Lingering > 0, "%d kept without a lease", p.Lingering)
	return r
}

// failing adds the peers without a path.
func (p PeerCounts) failing(r *Row) {
	r.alert(p.Unreachable > 0, "%d unreachable", p.Unreachable)
	var causes []string
	for _, cause := range slices.Sorted(maps.Keys(p.RejectedBy)) {
		causes = append(causes, fmt.Sprintf("%d %s", p.RejectedBy[cause], cause))
	}
	r.alert(p.Rejected > 0, "%d rejected%s", p.Rejected,
		unless(len(causes) == 0, " ("+strings.Join(causes, ", ")+")"))
}

func (p Probe) row() Row {
	r := Row{Label: "Pings"}
	if !p.On {
		r.add("off")
		return r
	}
	r.alert(p.Error != "", "%s", p.Error)
	r.add("%d of %d answer", p.Answer+p.Lossy+p.SmallOnly, p.Targets)
	if p.MedianRTT > 0 {
		r.add("median RTT %s", Short(p.MedianRTT))
	}
	p.failing(&r)
	if p.NotPinged > 0 {
		r.add("%d not pinged yet", p.NotPinged)
	}
	r.alert(p.NotAllowed > 0, "the firewall dropped %s before sending", count(p.NotAllowed, "ping"))
	r.add("each peer is pinged every %s", p.Round.Round(time.Second))
	return r
}

// failing adds the peers whose last pings were lost.
func (p Probe) failing(r *Row) {
	r.alert(p.Silent > 0, "%d silent", p.Silent)
	r.alert(p.SmallOnly > 0, "%d answering small packets but not %d bytes", p.SmallOnly, p.Size)
	r.alert(p.Lossy > 0, "%d lossy", p.Lossy)
}

// FailingPeers is in words how many peers have problems now. Counts since the start are none, nor are peers that linger.
func (n Node) FailingPeers() string {
	var r Row
	n.Peers.failing(&r)
	n.Probe.failing(&r)
	var texts []string
	for _, p := range r.Parts {
		texts = append(texts, p.Text)
	}
	return strings.Join(texts, ", ")
}

func (n Node) firewallRow() Row {
	r, f := Row{Label: "Firewall"}, n.Firewall
	if f.Checked.IsZero() {
		r.alert(true, "not applied yet")
		return r
	}
	r.add("%s (%s)", f.Kind, f.Reason)
	r.add("verified %s ago", Ago(n.Now, f.Checked))
	r.alert(f.Failed > 0, "%d of %s failed", f.Failed, count(f.Runs, "run"))
	return r
}

func (n Node) kernelRow() Row {
	r, k := Row{Label: "Kernel"}, n.Reconcile
	if k.Last.IsZero() {
		r.alert(true, "not reconciled yet")
		return r
	}
	r.alert(k.Failures > 0, "rejected %s", count(k.Failures, "object"))
	r.add("reconciled %s ago in %s", Ago(n.Now, k.Last), k.Took.Round(time.Microsecond))
	r.add("full resync %s ago", Ago(n.Now, k.Resynced))
	for _, e := range n.Entries {
		if e.Count > 0 {
			r.add("%s %d", e.Kind, e.Count)
		}
	}
	return r
}

func (n Node) driftRow() Row {
	r := Row{Label: "Drift", List: true}
	if len(n.Drift) == 0 {
		r.add("none since start")
	}
	for _, d := range n.Drift {
		r.alert(true, "%s: %d, last %s, %s ago", d.Kind, d.Count, d.Last, Ago(n.Now, d.At))
	}
	return r
}

// Names and reasons come from other nodes, and may be of any length.
const (
	ShortText = 128
	LongText  = 2000
)

// Shorten cuts a text to at most that many bytes.
func Shorten(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

// Short formats a round-trip time; empty for none.
func Short(d time.Duration) string {
	switch {
	case d <= 0:
		return ""
	case d < 10*time.Millisecond:
		return d.Round(time.Microsecond).String()
	}
	return d.Round(100 * time.Microsecond).String()
}

// Ago formats the time that has passed since then.
func Ago(now, then time.Time) string {
	if then.IsZero() {
		return "?"
	}
	d := now.Sub(then)
	switch {
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < time.Minute:
		return d.Round(100 * time.Millisecond).String()
	case d < 48*time.Hour:
		return d.Round(time.Second).String()
	}
	return fmt.Sprintf("%d days", int(d/(24*time.Hour)))
}

// times formats a number of occurrences.
func times(n int) string {
	if n == 1 {
		return "once"
	}
	return fmt.Sprintf("%d times", n)
}

func count(n int, what string) string { return fmt.Sprintf("%d %s%s", n, what, unless(n == 1, "s")) }

func unless(not bool, s string) string {
	if not {
		return ""
	}
	return s
}
